"""What a studio gives to a learner's trainer: N environments side by side, which begin a new episode where one ended.

    observations = envs.reset()                    # [N, D], new episodes everywhere
    step = envs.step(actions)                      # actions [N]
    step.rewards, step.terminated, step.truncated  # [N] each
    step.next_observations                         # [N, D]: what followed each action, also at an episode's end
    step.observations                              # [N, D]: what to act on now
    envs.steps, envs.num_envs                      # steps played so far, all environments together; N

The two observations differ only where an episode has just ended: there the first one is its last, and the second one
the first of the next episode. A single environment is what gymnasium calls one: `reset(seed=...)` and `step(action)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from minirlhf.training import generator_for


class Step(NamedTuple):
    """What N environments answer to N actions."""

    observations: Tensor
    """[N, D] float32: what to act on next, of a new episode where one has ended."""
    rewards: Tensor
    """[N] float32"""
    terminated: Tensor
    """[N] bool: the episode is over; nothing comes after."""
    truncated: Tensor
    """[N] bool: a time limit cut the episode; more would have come."""
    next_observations: Tensor
    """[N, D] float32: what followed the action, also where the episode ended with it."""


class Watcher(Protocol):
    """Who looks on while a trainer plays."""

    def on_reset(self) -> None: ...

    def before_step(self, envs: Environments) -> None: ...

    def after_step(self, observations: Tensor, actions: Tensor, step: Step) -> None: ...


class Environments:
    """N environments side by side; see the top of this file.

    Args:
        make: makes environment number n.
        num_envs: N.
        seed: of the environments.
        watcher: is told of every reset and step; None: nobody looks on.

    Example:
        >>> envs = Environments(lambda n: cartpole(), num_envs=2)
        >>> envs.reset().shape, envs.step(torch.tensor([0, 1])).rewards
        (torch.Size([2, 4]), tensor([1., 1.]))
    """

    def __init__(
        self, make: Callable[[int], Any], num_envs: int, seed: int = 0, watcher: Watcher | None = None
    ) -> None:
        self.num_envs = num_envs
        self.steps = 0
        self._envs = [make(n) for n in range(num_envs)]
        drawn = torch.randint(2**31, (num_envs,), generator=generator_for(seed, "studio/environments"))
        self._seeds: list[int | None] = list(drawn.tolist())
        self._watcher = watcher
        self._observations: Tensor | None = None

    def reset(self) -> Tensor:
        """Begin a new episode in every environment: observations [N, D]."""
        rows = [env.reset(seed=seed)[0] for env, seed in zip(self._envs, self._seeds, strict=True)]
        self._seeds = [None] * self.num_envs  # each goes on with its own random numbers
        if self._watcher is not None:
            self._watcher.on_reset()
        self._observations = _stacked(rows)
        return self._observations.clone()

    def step(self, actions: Any) -> Step:
        """Play one action in each environment: actions [N], integers."""
        if self._observations is None:
            raise RuntimeError("call envs.reset() before envs.step(actions)")
        actions = torch.as_tensor(actions).detach().clone()  # a trainer may use its tensor again
        if actions.shape != (self.num_envs,) or actions.is_floating_point():
            shape, kind = tuple(actions.shape), str(actions.dtype).removeprefix("torch.")
            raise ValueError(f"actions must be {self.num_envs} integers, [N], not {kind} of shape {shape}")
        if self._watcher is not None:
            self._watcher.before_step(self)
        answers = [env.step(action) for env, action in zip(self._envs, actions.tolist(), strict=True)]
        self.steps += self.num_envs
        after, rewards, terminated, truncated = list(zip(*(answer[:4] for answer in answers), strict=True))
        ended = [bool(over or cut) for over, cut in zip(terminated, truncated, strict=True)]
        now = [env.reset()[0] if end else row for env, row, end in zip(self._envs, after, ended, strict=True)]
        step = Step(
            _stacked(now),
            torch.tensor(rewards, dtype=torch.float32),
            torch.tensor(terminated, dtype=torch.bool),
            torch.tensor(truncated, dtype=torch.bool),
            _stacked(list(after)),
        )
        if self._watcher is not None:
            self._watcher.after_step(self._observations, actions, step)
        # The caller's tensors are the caller's: writing into them changes nothing here.
        self._observations = step.observations.clone()
        return step


def _stacked(rows: list[Any]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(row, dtype=np.float32) for row in rows]))


def cartpole() -> Any:
    """The pole of lessons 01 to 05: 1 for every step, at most 500 of them."""
    import gymnasium

    return gymnasium.make("CartPole-v1", disable_env_checker=True)
