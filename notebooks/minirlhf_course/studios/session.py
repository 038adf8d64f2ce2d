"""Runs a learner's trainer and watches it: what it plays, and the gradient of every update, whatever computes it.

Every `torch.optim` optimizer tells its hooks before it takes a step. So the gradients are seen without asking the
trainer for anything, and they can be held against those that a right trainer has on the same steps.
"""

from __future__ import annotations

import linecache
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from minirlhf.control.evaluation import Evaluation
from minirlhf.control.policies import Networks
from minirlhf.training import generator_for
from minirlhf_course.studios.environments import Environments, Step

Trainer = Callable[..., Any]
"""What the learner writes."""


class Played(NamedTuple):
    """One step of all environments."""

    observations: Tensor
    actions: Tensor
    step: Step


class Update(NamedTuple):
    """One step of an optimizer: by the names of the parameters ("policy.head.weight", "values.head.weight")."""

    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    """Before the step."""
    twice: bool
    """Whether the optimizer has a parameter more than once."""


@dataclass
class Iteration:
    """What was played between two groups of updates, and the updates made of it."""

    played: list[Played] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    resets: list[int] = field(default_factory=list)
    """How many steps had been played in this iteration at each call of `envs.reset`."""

    def of(self, part: str) -> list[Update]:
        """The updates that have a gradient, other than 0, in "policy" or "values"."""
        return [
            update
            for update in self.updates
            if any(name.startswith(part) and bool(x.any()) for name, x in update.gradients.items())
        ]


@dataclass
class Run:
    """A trainer's run.

    Attributes:
        iterations: what it played and how it learned; empty unless `watched`.
        log: what it returned.
        fault: why it did not come to its end, in words; None if it did.
        steps: that all environments played together.
        evaluations: of the greedy policy, if it was judged on the way.
    """

    networks: Networks
    watched: bool = True
    iterations: list[Iteration] = field(default_factory=list)
    log: Any = None
    fault: str | None = None
    steps: int = 0
    evaluations: list[Evaluation] = field(default_factory=list)

    @property
    def problem(self) -> str:
        """Why there is nothing to look at: what it raised, or an iteration that plays or learns nothing; else ""."""
        if self.fault or not self.watched:
            return self.fault or ""
        if not any(iteration.of("policy") for iteration in self.iterations):
            return "No optimizer of torch.optim has taken a step with a gradient of the policy that it was given."
        for number, iteration in enumerate(self.iterations, 1):
            if not iteration.played or not iteration.updates:
                return f"Iteration {number} {'learns' if iteration.updates else 'plays'} and does nothing else."
            if any(not bool(x.isfinite().all()) for update in iteration.updates for x in update.gradients.values()):
                return f"In iteration {number} a gradient is NaN or infinite: look for 0 / 0, or the log of 0."
            if not iteration.of("policy"):
                return f"In iteration {number} no update has a gradient of the policy."
        return ""


class Enough(BaseException):
    """Ends a trainer from within `envs.step`; not an Exception, so that no `except Exception` stops it."""


class Session:
    """Watches one run; see `watch`."""

    def __init__(
        self,
        networks: Networks,
        limit: int,
        *,
        watched: bool,
        judge: Callable[[], float] | None,
        every: int,
        target: float | None,
    ) -> None:
        self.run = Run(networks, watched)
        self._limit, self._watched = limit, watched
        self._judge, self._every, self._next, self._target = judge, every, every, target
        self._names: dict[nn.Parameter, str] = {}
        for part, network in (("policy", networks.policy), ("values", networks.values)):
            for name, parameter in network.named_parameters():
                self._names.setdefault(parameter, f"{part}.{name}")  # a shared trunk is the policy's

    # As the environments' watcher.

    def on_reset(self) -> None:
        if self._watched:
            iteration = self._current()
            iteration.resets.append(len(iteration.played))

    def before_step(self, envs: Environments) -> None:
        self.run.steps = envs.steps
        if self._judge is not None and envs.steps >= self._next:
            self._next = (envs.steps // self._every + 1) * self._every
            self.evaluate()
            if self._target is not None and self.run.evaluations[-1].mean_return >= self._target:
                raise Enough
        if envs.steps >= self._limit:
            self.run.fault = (
                f"It plays on after {envs.steps:,} steps, far more than total_steps: compare envs.steps with "
                "total_steps at the top of your loop."
            )
            raise Enough

    def after_step(self, observations: Tensor, actions: Tensor, step: Step) -> None:
        if self._watched:
            self._current().played.append(Played(observations, actions, Step(*(x.clone() for x in step))))

    def evaluate(self) -> None:
        assert self._judge is not None
        steps = self.run.steps
        if not self.run.evaluations or self.run.evaluations[-1].env_steps < steps:
            self.run.evaluations.append(Evaluation(steps, 0.0, self._judge()))

    # As the optimizers' hook.

    def on_update(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        groups = optimizer.param_groups
        own = {p: group for group in groups for p in group["params"] if p in self._names}
        if not own or not self._watched:
            return
        count = sum(p in own for group in groups for p in group["params"])
        gradients = {
            # Of a loss, whether the optimizer is to lower one or to raise an objective.
            self._names[p]: (-1 if group.get("maximize") else 1) * p.grad.detach().clone()
            for p, group in own.items()
            if p.grad is not None
        }
        weights = {name: p.detach().clone() for p, name in self._names.items()}
        if not self.run.iterations:
            self.run.iterations.append(Iteration())
        self.run.iterations[-1].updates.append(Update(gradients, weights, count > len(own)))

    def _current(self) -> Iteration:
        """The iteration that steps belong to: a new one once there were updates."""
        if not self.run.iterations or self.run.iterations[-1].updates:
            self.run.iterations.append(Iteration())
        return self.run.iterations[-1]


def watch(
    trainer: Trainer,
    make: Callable[[int], Any],
    networks: Networks,
    settings: dict[str, Any],
    *,
    num_envs: int,
    seed: int = 0,
    watched: bool = True,
    without_values: bool = False,
    judge: Callable[[], float] | None = None,
    every: int = 2_500,
    target: float | None = None,
) -> Run:
    """Run a trainer as a studio calls it, and return what was seen.

    Args:
        trainer: what the learner wrote.
        make: makes environment number n.
        networks: to train.
        settings: the keyword arguments of the trainer, `total_steps` among them, but for `generator`.
        num_envs: how many environments.
        seed: of everything random.
        watched: keep all steps and gradients, which takes memory.
        without_values: give None for the value network.
        judge: the mean return of the policy, asked for every `every` steps and at the end.
        target: ends the run once the judge finds it.
    """
    limit = 2 * settings["total_steps"] + 2_000 * num_envs
    session = Session(networks, limit, watched=watched, judge=judge, every=every, target=target)
    envs = Environments(make, num_envs, seed, session)
    run = session.run
    arguments = dict(settings)
    arguments["generator"] = generator_for(seed, "control/actions")
    if "epochs" in settings:
        arguments["shuffle"] = generator_for(seed, "control/minibatches")
    handle = register_optimizer_step_pre_hook(session.on_update)
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        try:
            run.log = trainer(envs, networks.policy, None if without_values else networks.values, **arguments)
        except Enough:
            pass
        except Exception as error:  # whatever a learner's code may raise becomes the verdict
            run.fault = complaint(error, trainer)
        finally:
            handle.remove()
    run.steps = envs.steps
    if judge is not None and run.fault is None:
        session.evaluate()
    return run


def complaint(error: Exception, trainer: Trainer) -> str:
    """What a trainer raised and in which of its lines."""
    line = f"It raises {type(error).__name__}: {error}".splitlines()[0]
    if isinstance(error, ValueError) and "Simplex" in str(error):
        line = (
            "It raises ValueError: Categorical(x) by position takes x for probabilities (bug 28), and the outputs are "
            "logits: Categorical(logits=outputs), by name."
        )
    code = getattr(trainer, "__code__", None)
    frames: Sequence[traceback.FrameSummary] = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    if not own:
        return line
    source = own[-1].line or linecache.getline(own[-1].filename, own[-1].lineno or 0).strip()
    return f"{line}\n    in the line: {source}"
