"""The same training under several seeds: what a learning curve with a band is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from minirlhf.control.environments import Environment
from minirlhf.control.evaluation import Evaluation, Evaluator
from minirlhf.control.run import Result


class SeedRun(NamedTuple):
    """One seed of an experiment."""

    seed: int
    result: Result
    evaluations: list[Evaluation]
    reached: Evaluation | None

    def first_at(self, level: float) -> int | None:
        """The environment steps of the first evaluation with this mean return or more; None if there was none."""
        return next((row.env_steps for row in self.evaluations if row.mean_return >= level), None)


def run_seeds(
    train: Callable[..., Result],
    env: Environment,
    config: Any,
    seeds: Iterable[int],
    *,
    every: int = 2048,
    episodes: int = 20,
    target: float | None = None,
    progress: bool = False,
) -> list[SeedRun]:
    """The same training under several seeds, evaluated on one schedule: what a curve with a band is made of.

    `seeds` may be a progress bar, `tqdm(range(5))`.

    Example:
        >>> runs = run_seeds(train_ppo, "CartPole-v1", PPOConfig(), range(5), target=475)  # doctest: +SKIP
        >>> [run.reached.env_steps for run in runs if run.reached]  # doctest: +SKIP
    """
    runs = []
    for seed in seeds:
        evaluator = Evaluator(env, every=every, episodes=episodes, target=target)
        result = train(env, config, seed=seed, callback=evaluator, progress=progress)
        runs.append(SeedRun(seed, result, evaluator.rows, evaluator.reached))
    return runs
