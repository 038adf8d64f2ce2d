"""What all trainers here share: common settings, environments, time, metrics and the result.

run = Run("ppo", env, config, seed=seed)
for _ in run.iterations():
    trajectory = run.collector.collect(run.networks.policy, steps)
    ...                                    # the algorithm
    run.log(metrics)
return run.result()
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from minirlhf.control.environments import Environment, make_envs
from minirlhf.control.policies import Networks, Policy, ValueNetwork, make_networks
from minirlhf.control.rollout import Collector, Episode
from minirlhf.errors import UserError
from minirlhf.settings import Count, Fraction, Positive, PositiveOrInf, Settings, whole
from minirlhf.training import Metrics, Recorder, learning_rate_factor

SHORTEST = whole(3)
"""Steps of a rollout. All environments may reset in the same column (CartPole's time limit ends them together), which
then doesn't count: a batch needs other columns too. `train_actor_critic` learns after every step."""


@dataclass(frozen=True)
class ControlConfig(Settings):
    """The settings that all algorithms share."""

    total_steps: Count = 100_000
    """The budget: steps of all environments together; the iteration that reaches it is the last."""
    num_envs: Count = 8
    """N, environments played at once."""
    gamma: Fraction = 0.99
    """Discount factor per step."""
    max_grad_norm: PositiveOrInf = 0.5
    """Gradients are clipped to this norm; inf disables it (the norm is still reported)."""
    adam_eps: Positive = 1e-5
    """Adam's epsilon."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of the networks that the trainer creates; pass `networks` to use your own."""
    activation: str = "tanh"
    """Activation of the hidden layers of those networks: "tanh" or "relu"."""


@dataclass
class Progress:
    """What a callback receives after an iteration."""

    step: int
    """Iterations done."""
    env_steps: int
    """Steps of all environments together."""
    seconds: float
    """Seconds of training, without the callbacks."""
    networks: Networks
    metrics: Metrics

    @property
    def policy(self) -> Policy:
        return self.networks.policy


Callback = Callable[[Progress], bool | None]
"""Called after each iteration; returning True ends the training. Its time is not counted."""


@dataclass
class Result:
    """What a trainer returns."""

    policy: Policy
    values: ValueNetwork | None
    """None if the algorithm has none (REINFORCE without baseline)."""
    history: list[Metrics]
    """One row of metrics per iteration."""
    episodes: list[Episode]
    """Every episode that was played to its end."""
    env_steps: int
    seconds: float
    """Seconds of training, without the callbacks."""


class Run:
    """Environments, networks, time and metrics of one training.

    Args:
        name: of the algorithm, for the progress bar and messages.
        env: see `environments.Environment`.
        config: the settings.
        seed: random seed for weights, environments, actions and minibatches.
        networks: to train in place; None creates them from config and seed.
        shared: whether networks created here share their trunk; None if the algorithm has one optimizer for each, so
            that they must not share anything.
        progress: whether to draw a progress bar.
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
        self.config, self._callback = config, callback
        self.networks = networks or make_networks(
            env, config.hidden, activation=config.activation, shared=bool(shared), seed=seed
        )
        if shared is None and self.networks.values.trunk is self.networks.policy.trunk:
            raise UserError(f"{name} trains policy and value network separately: make the networks with shared=False")
        self._began = time.perf_counter()
        self.collector = Collector(make_envs(env, config.num_envs), seed)
        self.recorder = Recorder(name, show=("objective/episode_return",), progress=progress)
        self._reported = 0  # episodes reported in earlier rows
        self._paused = 0.0
        self._stopped = False

    @property
    def env_steps(self) -> int:
        return self.collector.env_steps

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began - self._paused

    def annealed(self, lr: float) -> float:
        """The learning rate, annealed linearly to 0 over the budget."""
        return lr * learning_rate_factor(self.env_steps, self.config.total_steps, final=0.0, shape="linear")

    def iterations(self) -> Iterator[int]:
        """Yield iterations until the budget is used up or the callback ends the training."""
        try:
            for step in self.recorder.steps(self.config.total_steps, done=lambda: self.env_steps):
                yield step
                if self._stopped:
                    break
        finally:
            self.collector.envs.close()

    def check_finite(self, loss: Tensor) -> None:
        """Stop before a NaN or infinite loss reaches the weights.

        Raises:
            TrainingError: says where it happened and what to try.
        """
        where = f"after {self.env_steps:,} environment steps"
        self.recorder.check_finite(loss, where, "lower the learning rate, or look for extreme rewards and observations")

    def log(self, metrics: Mapping[str, float | Tensor]) -> None:
        """Record a row of metrics and pass it to the callback."""
        row: dict[str, float | Tensor] = {"perf/env_steps": self.env_steps, "perf/seconds": self.seconds}
        ended = self.collector.episodes[self._reported :]
        self._reported += len(ended)
        if ended:
            row["objective/episode_return"] = sum(episode.episode_return for episode in ended) / len(ended)
            row["objective/episode_length"] = sum(episode.length for episode in ended) / len(ended)
        self.recorder.log(row | dict(metrics))
        if self._callback is not None:
            began = time.perf_counter()
            history = self.recorder.history
            progress = Progress(len(history), self.env_steps, self.seconds, self.networks, history[-1])
            self._stopped = bool(self._callback(progress))
            self._paused += time.perf_counter() - began

    def result(self, values: bool = True) -> Result:
        """What the trainer returns; values=False if the algorithm has no value network."""
        policy, network = self.networks
        return Result(
            policy,
            network if values else None,
            self.recorder.history,
            self.collector.episodes,
            self.env_steps,
            self.seconds,
        )
