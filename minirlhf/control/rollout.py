"""Play a policy in many environments at once: [N, T] steps that tell terminated from truncated episodes.

Gymnasium's vector environments reset themselves, in one of several modes. This module uses NEXT_STEP, the mode of the
native vector environments. One environment, an episode of two steps:

    column           0      1      2        3
    observation      s0     s1     s2       s0'      s2 is the episode's last observation
    action           a0     a1     ignored  a0'
    mask             True   True   False    True     column 2 only resets: it is not experience and never counts
    ended            False  True   False    False

So the observation after ANY step is in the next column (`last_observations` after the last one), even after the last
step of a truncated episode, where the learner needs its value.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minirlhf.control.environments import to_environment
from minirlhf.control.policies import Policy, ValueNetwork
from minirlhf.errors import TrainingError
from minirlhf.training import generator_for


class Episode(NamedTuple):
    """An episode that ended."""

    env_steps: int
    """Steps played by all environments together when it ended."""
    episode_return: float
    """The plain sum of its rewards."""
    length: int
    terminated: bool
    """False if it was truncated, for example by a time limit."""


class Values(NamedTuple):
    """A value network's estimates for a trajectory, in the form that `minirlhf.returns.gae` takes."""

    values: Tensor
    """[N, T]"""
    last_values: Tensor
    """[N], after the last column."""
    truncated_values: Tensor
    """[N, T]: the value of an episode's last observation where it was truncated; elsewhere 0."""


class Trajectory(NamedTuple):
    """T steps of N environments; see the table at the top of this file."""

    observations: Tensor
    """[N, T, D] float32, before each step."""
    actions: Tensor
    """[N, T] int64, or [N, T, A] float32."""
    rewards: Tensor
    """[N, T] float32"""
    terminated: Tensor
    """[N, T] bool: the environment ended the episode with this step; nothing comes after."""
    truncated: Tensor
    """[N, T] bool: a time limit cut the episode; more would have come."""
    mask: Tensor
    """[N, T] bool, True = a step that counts."""
    last_observations: Tensor
    """[N, D], after the last column."""

    @property
    def ends(self) -> Tensor:
        """[N, T] bool: the last step of an episode."""
        return self.terminated | self.truncated

    @torch.no_grad()
    def estimate(self, network: ValueNetwork) -> Values:
        """The values of all observations, in one forward pass."""
        observations = torch.cat((self.observations, self.last_observations.unsqueeze(1)), 1)
        values = network(observations)
        return Values(values[:, :-1], values[:, -1], torch.where(self.truncated, values[:, 1:], 0.0))


class Collector:
    """Plays a policy and keeps the state of each environment.

    Args:
        envs: from `environments.make_envs`.
        seed: of the environments and of the sampled actions.

    Example:
        >>> from minirlhf.control.environments import make_envs
        >>> from minirlhf.control.policies import make_networks
        >>> policy, _ = make_networks("CartPole-v1")
        >>> collector = Collector(make_envs("CartPole-v1", 4), seed=0)
        >>> collector.collect(policy, 16).observations.shape
        torch.Size([4, 16, 4])
    """

    def __init__(self, envs: Any, seed: int) -> None:
        self.envs = envs
        self.generator = generator_for(seed, "control/actions")
        self.env_steps = 0
        """Steps played so far; resets don't count."""
        self.episodes: list[Episode] = []
        """Every episode that ended so far."""
        environment_seed = int(torch.randint(2**31, (), generator=generator_for(seed, "control/environments")))
        self._begin(environment_seed)

    def _begin(self, seed: int | None = None) -> None:
        self._observations = np.array(self.envs.reset(seed=seed)[0], dtype=np.float32)
        self._resetting = np.zeros(self.envs.num_envs, dtype=bool)
        self._returns = np.zeros(self.envs.num_envs)
        self._lengths = np.zeros(self.envs.num_envs, dtype=np.int64)
        self._restart = False

    def collect(self, policy: Policy, steps: int) -> Trajectory:
        """Play `steps` columns, continuing where the last call stopped.

        Raises:
            TrainingError: the environment returned a reward or an observation that is not finite.
        """
        if self._restart:
            self._begin()
        columns = [self._step(policy) for _ in range(steps)]
        return self._trajectory(columns)

    def collect_episodes(self, policy: Policy) -> Trajectory:
        """Play one whole episode in every environment, from its start; rows are padded (mask False) to the longest.

        All episodes of the environment must end. Steps that others play during the longest episode are dropped.
        """
        self._begin()
        running = np.ones(self.envs.num_envs, dtype=bool)
        columns = []
        while running.any():
            column = self._step(policy, running)
            columns.append(column)
            running = running & ~(column[3] | column[4])
        self._restart = True  # the others are inside an episode of which nothing was kept
        return self._trajectory(columns)

    def _step(self, policy: Policy, running: np.ndarray | None = None) -> tuple[Any, ...]:
        """One step of every environment: (observation, action, reward, terminated, truncated, mask), each [N, ...]."""
        observations = self._observations
        with torch.inference_mode():
            actions = policy.sample(policy(torch.from_numpy(observations)), self.generator)
        played = to_environment(actions, self.envs.single_action_space)
        # Copies: an environment may write its next step into the arrays that it returned.
        after, rewards, terminated, truncated = map(np.array, self.envs.step(played)[:4])
        self._observations = after.astype(np.float32, copy=False)
        mask = ~self._resetting if running is None else running
        self._resetting = terminated | truncated
        self._note(rewards, terminated, mask)
        return observations, actions.numpy(), rewards, terminated, truncated, mask

    def _note(self, rewards: np.ndarray, terminated: np.ndarray, mask: np.ndarray) -> None:
        """Count steps and record the episodes that ended."""
        self.env_steps += int(np.count_nonzero(mask))
        self._returns += rewards * mask
        self._lengths += mask
        for n in np.flatnonzero(self._resetting & mask):
            self.episodes.append(
                Episode(self.env_steps, float(self._returns[n]), int(self._lengths[n]), bool(terminated[n]))
            )
            self._returns[n], self._lengths[n] = 0.0, 0

    def _trajectory(self, columns: list[tuple[Any, ...]]) -> Trajectory:
        parts = [torch.from_numpy(np.stack(part, 1)) for part in zip(*columns, strict=True)]
        observations, actions, rewards, terminated, truncated, mask = parts
        last_observations = torch.from_numpy(self._observations)
        rewards = rewards.float()
        bad = (~rewards.isfinite() | ~observations.isfinite().all(-1)) & mask
        if bool(bad.any()):
            row, column = bad.nonzero()[0].tolist()
            raise TrainingError(
                f"environment {row} returned the reward {float(rewards[row, column])} for the observation "
                f"{observations[row, column].tolist()}: both must be finite; check the environment"
            )
        # A dropped episode may end in a masked column of `collect_episodes`: that is not the end of this row's.
        return Trajectory(observations, actions, rewards, terminated & mask, truncated & mask, mask, last_observations)
