"""Evaluate a policy on whole episodes, played separately from training and with fixed seeds."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minirlhf.control.environments import Environment, make_envs, to_environment
from minirlhf.control.policies import Policy
from minirlhf.control.run import Progress
from minirlhf.errors import UserError
from minirlhf.training import generator_for


@torch.inference_mode()
def evaluate(policy: Policy, env: Environment, episodes: int = 20, *, greedy: bool = True, seed: int = 1000) -> Tensor:
    """The undiscounted returns of whole episodes, all played in parallel: [episodes] float64.

    Args:
        policy: the policy to evaluate; not changed.
        env: see `policies.Environment`; its episodes must all end.
        episodes: how many.
        greedy: play the most likely action instead of sampling.
        seed: of the environments and of the sampling; the same seed gives the same episodes to every policy.

    Raises:
        UserError: episodes is below 1.

    Example:
        >>> from minirlhf.control.policies import make_networks
        >>> returns = evaluate(make_networks("CartPole-v1").policy, "CartPole-v1", episodes=4)
        >>> returns.shape, bool((returns >= 1).all())
        (torch.Size([4]), True)
    """
    if episodes < 1:
        raise UserError(f"episodes must be at least 1, not {episodes}")
    envs = make_envs(env, episodes)
    generator = generator_for(seed, "control/evaluation")
    observations, _ = envs.reset(seed=seed)
    returns, running = np.zeros(episodes), np.ones(episodes, dtype=bool)
    while running.any():
        outputs = policy(torch.from_numpy(np.asarray(observations, dtype=np.float32)))
        actions = policy.mode(outputs) if greedy else policy.sample(outputs, generator)
        observations, rewards, terminated, truncated, _ = envs.step(to_environment(actions, envs.single_action_space))
        returns[running] += rewards[running]
        running &= ~(terminated | truncated)
    envs.close()
    return torch.from_numpy(returns)


class Evaluation(NamedTuple):
    """One point of a learning curve."""

    env_steps: int
    seconds: float
    """Training time so far, without the evaluations."""
    mean_return: float


class Evaluator:
    """A callback that evaluates at regular intervals, and ends the training when the target is reached.

    Args:
        env: where to evaluate.
        every: environment steps between two evaluations.
        episodes: per evaluation.
        target: stop at this mean return; None continues to the end of the budget.
        greedy: see `evaluate`.
        seed: see `evaluate`.

    Raises:
        UserError: every is below 1.

    Example:
        >>> evaluator = Evaluator("CartPole-v1", every=10_000, target=475)
        >>> result = train_ppo("CartPole-v1", PPOConfig(), callback=evaluator)  # doctest: +SKIP
        >>> evaluator.rows[-1].mean_return  # doctest: +SKIP
        500.0
    """

    def __init__(
        self,
        env: Environment,
        *,
        every: int = 2048,
        episodes: int = 20,
        target: float | None = None,
        greedy: bool = True,
        seed: int = 1000,
    ) -> None:
        if every < 1:
            raise UserError(f"every must be at least 1 environment step, not {every}")
        self.env, self.every, self.episodes, self.target = env, every, episodes, target
        self.greedy, self.seed = greedy, seed
        self.rows: list[Evaluation] = []
        self._next = every

    @property
    def reached(self) -> Evaluation | None:
        """The first evaluation at or above the target, or None."""
        if self.target is None:
            return None
        return next((row for row in self.rows if row.mean_return >= self.target), None)

    def __call__(self, progress: Progress) -> bool:
        if progress.env_steps < self._next:
            return False
        self._next = (progress.env_steps // self.every + 1) * self.every
        returns = evaluate(progress.policy, self.env, self.episodes, greedy=self.greedy, seed=self.seed)
        self.rows.append(Evaluation(progress.env_steps, progress.seconds, float(returns.mean())))
        return self.reached is not None
