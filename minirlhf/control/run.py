"""What every learner here has around its algorithm: settings in common, the clock, metrics, the result.

run = Run("ppo", env, config, seed=seed)
for _ in run.iterations():
    trajectory = run.collector.collect(run.networks.policy, steps)
    ...                                    # the algorithm
    run.log(metrics)
return run.result()
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from minirlhf.control.policies import Environment, Networks, Policy, ValueNetwork, make_networks
from minirlhf.control.rollout import Collector, Episode, make_envs
from minirlhf.errors import TrainingError, UserError

Metrics = dict[str, float]


@dataclass(frozen=True)
class ControlConfig:
    """What all algorithms have in common."""

    total_steps: int = 100_000
    """The budget: steps of all environments together; the iteration that reaches it is the last."""
    num_envs: int = 8
    """N, environments played at once."""
    gamma: float = 0.99
    """Discount of a reward one step later."""
    max_grad_norm: float = 0.5
    """Gradients are clipped to this norm; inf for no clip (the norm is still reported)."""
    adam_eps: float = 1e-5
    """Adam's epsilon."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of the networks that the trainer makes; see `networks` there to bring your own."""
    activation: str = "tanh"
    """Of the hidden layers of those networks: "tanh" or "relu"."""

    def __post_init__(self) -> None:
        self.at_least(1, "total_steps", "num_envs")
        self.within(0, 1, "gamma")
        self.above(0, "max_grad_norm", "adam_eps")

    def at_least(self, bound: float, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not value >= bound:
                raise UserError(f"{type(self).__name__}: {name} must be at least {bound}, not {value}")

    def above(self, bound: float, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not value > bound:
                raise UserError(f"{type(self).__name__}: {name} must be above {bound}, not {value}")

    def within(self, low: float, high: float, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"{type(self).__name__}: {name} must lie in [{low}, {high}], not {value}")

    def long_enough(self, rollout_steps: int) -> None:
        """Environments may all reset in one column (CartPole's time limit ends them together), and then nothing counts
        in it: a batch needs columns around that one."""
        short = f"rollout_steps must be at least 3, not {rollout_steps}; train_actor_critic learns after every step"
        self.refuse(rollout_steps < 3, short)

    def refuse(self, wrong: bool, message: str) -> None:
        if wrong:
            raise UserError(f"{type(self).__name__}: {message}")


@dataclass
class Progress:
    """What a callback sees after an iteration."""

    step: int
    """Iterations done."""
    env_steps: int
    """Steps of all environments together."""
    seconds: float
    """Of training, without the callbacks."""
    networks: Networks
    metrics: Metrics

    @property
    def policy(self) -> Policy:
        return self.networks.policy


Callback = Callable[[Progress], bool | None]
"""Called after each iteration; returning True ends the training. The clock stands still meanwhile."""


@dataclass
class Result:
    """What a trainer gives back."""

    policy: Policy
    values: ValueNetwork | None
    """None where the algorithm has none (REINFORCE without baseline)."""
    history: list[Metrics]
    """One row of metrics an iteration."""
    episodes: list[Episode]
    """Every episode that was played to its end."""
    env_steps: int
    seconds: float
    """Of training, without the callbacks."""


class Run:
    """Environments, networks, clock and metrics of one training.

    Args:
        name: of the algorithm, for the progress bar and messages.
        env: see `policies.Environment`.
        config: the settings.
        seed: of everything random: weights, environments, actions, minibatches.
        networks: to train, in place; None makes them by config and seed.
        shared: whether networks made here share their trunk; None where the algorithm has an optimizer for each of the
            two, which then must not share anything.
        progress: whether to draw a bar.
        callback: see `Callback`.
    """

    def __init__(
        self,
        name: str,
        env: Environment,
        config: ControlConfig,
        *,
        seed: int,
        networks: Networks | None = None,
        shared: bool | None = None,
        progress: bool = False,
        callback: Callback | None = None,
    ) -> None:
        self.name, self.config, self._progress, self._callback = name, config, progress, callback
        self.networks = networks or make_networks(
            env, config.hidden, activation=config.activation, shared=bool(shared), seed=seed
        )
        if shared is None and self.networks.values.trunk is self.networks.policy.trunk:
            raise UserError(f"{name} trains policy and value network apart: make the networks with shared=False")
        self._began = time.perf_counter()
        self.collector = Collector(make_envs(env, config.num_envs), seed)
        self.history: list[Metrics] = []
        self._seen = 0  # episodes that an earlier row has told of
        self._paused = 0.0
        self._stopped = False

    @property
    def env_steps(self) -> int:
        return self.collector.env_steps

    @property
    def remaining(self) -> float:
        """The share of the budget that is left, from 1 down to 0: what annealed settings are multiplied by."""
        return max(0.0, 1.0 - self.env_steps / self.config.total_steps)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began - self._paused

    def iterations(self) -> Iterator[int]:
        """Count iterations until the budget is used up or the callback has had enough."""
        from tqdm.auto import tqdm

        bar = tqdm(total=self.config.total_steps, desc=self.name, unit=" steps", disable=not self._progress)
        try:
            step = 0
            while self.env_steps < self.config.total_steps and not self._stopped:
                yield step
                step += 1
                bar.update(min(self.env_steps, self.config.total_steps) - bar.n)
                recent = [episode.episode_return for episode in self.collector.episodes[-20:]]
                if recent and self._progress:
                    bar.set_postfix({"return": f"{sum(recent) / len(recent):.1f}"}, refresh=False)
        finally:
            bar.close()
            self.collector.envs.close()

    def check_finite(self, **losses: Tensor) -> None:
        """Stop before a NaN or infinite loss reaches the weights.

        Raises:
            TrainingError: names the loss, where it happened and what to try.
        """
        for name, loss in losses.items():
            loss = loss.detach()
            if not bool(loss.isfinite()):
                raise TrainingError(
                    f"{self.name}: the {name} loss is {float(loss)} in iteration {len(self.history)} "
                    f"({self.env_steps:,} environment steps): lower the learning rate, or look for extreme "
                    "rewards and observations"
                )

    def log(self, metrics: Mapping[str, float | Tensor]) -> None:
        """Keep a row of metrics, and show it to the callback."""
        row: Metrics = {"step": len(self.history), "perf/env_steps": self.env_steps, "perf/seconds": self.seconds}
        ended = self.collector.episodes[self._seen :]
        self._seen += len(ended)
        if ended:
            row["objective/episode_return"] = sum(episode.episode_return for episode in ended) / len(ended)
            row["objective/episode_length"] = sum(episode.length for episode in ended) / len(ended)
        row |= {key: float(value.detach() if isinstance(value, Tensor) else value) for key, value in metrics.items()}
        self.history.append(row)
        if self._callback is not None:
            began = time.perf_counter()
            progress = Progress(len(self.history), self.env_steps, self.seconds, self.networks, row)
            self._stopped = bool(self._callback(progress))
            self._paused += time.perf_counter() - began

    def result(self, values: bool = True) -> Result:
        """What the trainer returns; values=False where the algorithm has no value network."""
        policy, network = self.networks
        return Result(
            policy,
            network if values else None,
            self.history,
            self.collector.episodes,
            self.env_steps,
            self.seconds,
        )


def adam(parameters: Iterable[torch.nn.Parameter], lr: float, eps: float) -> torch.optim.Adam:
    """Adam with all parameters updated by one fused call: with networks this small, calls are what costs."""
    return torch.optim.Adam(parameters, lr=lr, eps=eps, fused=True)


def clip_gradients(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients down to a common norm of at most `max_norm`; returns the norm before."""
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
