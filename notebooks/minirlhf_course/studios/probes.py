"""Problems that a right trainer solves in seconds, each with one thing more in it than the one before.

Where probe k fails and those before it pass, the mistake is in what k adds: the value loss (1), the way from
observation to output (2), discount and bootstrap (3), credit in time (4), action and sign (5), a time limit (6).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minirlhf.control.policies import CategoricalPolicy, Networks, ValueNetwork
from minirlhf_course.studios.session import Run, Trainer, watch
from minirlhf_course.studios.studio import Failure

GAMMA = 0.5
"""Of the probes: small, so that what a discount does is seen at once."""
ACTIONS = 2


class Probe:
    """A tiny environment: `length` steps, `kinds` of episodes, one-hot observations that tell kind and time.

    Args:
        pays: the reward from (kind, time, first action, action).
        kinds: an episode's kind is drawn, evenly.
        length: steps of an episode.
        cut: whether its end is a time limit.
        tells_time: whether the observation tells the time; else the kind only.
        remembers: whether the kind becomes the first action, so that observations tell it.
        cycle: the time that observations tell begins again after so many steps.
    """

    def __init__(
        self,
        pays: Callable[[int, int, int, int], float],
        kinds: int = 1,
        length: int = 1,
        *,
        cut: bool = False,
        tells_time: bool = True,
        remembers: bool = False,
        cycle: int | None = None,
    ) -> None:
        self._pays, self._kinds, self.length, self._cut = pays, kinds, length, cut
        self._cycle = (cycle or length + 1) if tells_time else 1
        self._remembers = remembers
        self.size = kinds * self._cycle
        self._random = np.random.default_rng(0)
        self._kind = self._time = self._first = 0

    def reset(self, seed: int | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        if seed is not None:
            self._random = np.random.default_rng(seed)
        self._kind, self._time = 0 if self._remembers else int(self._random.integers(self._kinds)), 0
        return self.observation(self._kind, 0), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if self._time == 0:
            self._first = action
            self._kind = action if self._remembers else self._kind
        reward = self._pays(self._kind, self._time, self._first, action)
        self._time += 1
        over = self._time == self.length
        return self.observation(self._kind, self._time), reward, over and not self._cut, over and self._cut, {}

    def observation(self, kind: int, time: int) -> np.ndarray:
        row = np.zeros(self.size, dtype=np.float32)
        row[kind + self._kinds * (time % self._cycle)] = 1.0
        return row


@dataclass(frozen=True)
class Question:
    """What a probe must have taught: V or the chance of action 1 at an observation."""

    what: str
    kind: int
    time: int
    expected: float
    of_values: bool
    tolerance: float


@dataclass(frozen=True)
class Task:
    """A probe and its questions."""

    title: str
    make: Callable[[], Probe]
    questions: tuple[Question, ...]
    look: str
    bugs: tuple[int, ...]


def _v(what: str, kind: int, time: int, expected: float, tolerance: float = 0.1) -> Question:
    return Question(f"V({what})", kind, time, expected, True, tolerance)


def _p(what: str, kind: int, time: int, expected: float) -> Question:
    return Question(f"pi(action 1 | {what})", kind, time, expected, False, 0.2)


TASKS = (
    Task(
        "probe 1, constant reward: V is 1",
        lambda: Probe(lambda kind, time, first, action: 1.0),
        (_v("the only observation", 0, 0, 1.0),),
        "the value loss: does it reach the value network (no .item(), no no_grad), and has that an optimizer?",
        (25,),
    ),
    Task(
        "probe 2, the observation tells the reward: V is +1 or -1",
        lambda: Probe(lambda kind, time, first, action: 2.0 * kind - 1.0, kinds=2),
        (_v("the good one", 1, 0, 1.0), _v("the bad one", 0, 0, -1.0)),
        "whether values, targets and observations of the same step stay together, [N] against [N, 1] included.",
        (25,),
    ),
    Task(
        "probe 3, two steps, paid at the end: V is gamma, then 1",
        lambda: Probe(lambda kind, time, first, action: float(time), length=2),
        (_v("first step", 0, 0, GAMMA), _v("second step", 0, 1, 1.0)),
        "the discount, and what comes after the last step: nothing where the episode terminated.",
        (1, 10, 12, 22, 26),
    ),
    Task(
        "probe 4, delayed: the first action is paid for two steps later",
        lambda: Probe(lambda kind, time, first, action: 4.0 * first * (time == 2), kinds=2, length=3, remembers=True),
        (_p("first step", 0, 0, 1.0),),
        "the credit: the weight of a step is what comes after it, not its own reward.",
        (7, 10, 12),
    ),
    Task(
        "probe 5, the right action depends on the observation",
        lambda: Probe(lambda kind, time, first, action: float(action == kind), kinds=2),
        (_p("kind 0", 0, 0, 0.0), _p("kind 1", 1, 0, 1.0)),
        "the policy's loss: its sign, and that the log-probability is of the action that was played.",
        (3, 4, 6, 11),
    ),
    Task(
        "probe 6, a time limit cuts it: V is 1 / (1 - gamma)",
        lambda: Probe(lambda kind, time, first, action: 1.0, length=3, cut=True, tells_time=False),
        (_v("the only observation", 0, 0, 1 / (1 - GAMMA), 0.15),),
        "the end of a truncated episode: more would have come, and V of next_observations says how much.",
        (22, 12),
    ),
)


def networks(size: int, seed: int = 0, *, shared: bool = False, hidden: int = 16) -> Networks:
    """Small networks of one hidden layer, 2 actions."""
    generator = torch.Generator().manual_seed(seed)

    def linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
        layer = nn.Linear(inputs, outputs)
        with torch.no_grad():
            nn.init.orthogonal_(layer.weight, gain, generator=generator)
            layer.bias.zero_()
        return layer

    def trunk() -> nn.Module:
        return nn.Sequential(linear(size, hidden, math.sqrt(2)), nn.Tanh())

    first = trunk()
    policy = CategoricalPolicy(first, linear(hidden, ACTIONS, 0.01))
    return Networks(policy, ValueNetwork(first if shared else trunk(), linear(hidden, 1, 1.0)))


def probe(
    task: Task,
    trainer: Trainer,
    settings: dict[str, Any],
    *,
    num_envs: int = 16,
    values: bool = True,
    shared: bool = False,
) -> Failure | None:
    """Train on a probe and ask its questions; without a value network only those about the policy."""
    size = task.make().size
    run = watch(
        trainer,
        lambda n: task.make(),
        networks(size, shared=shared),
        {"gamma": GAMMA, **settings},
        num_envs=num_envs,
        watched=False,
        without_values=not values,
    )
    if run.problem:
        return Failure(run.problem)
    return answers(task, run)


@torch.no_grad()
def answers(task: Task, run: Run) -> Failure | None:
    """What the networks of a run say to the questions of its probe."""
    lines, wrong = [], False
    for question in task.questions:
        observation = torch.from_numpy(task.make().observation(question.kind, question.time))
        if question.of_values:
            got = float(run.networks.values(observation))
        else:
            got = float(run.networks.policy(observation).softmax(-1)[1])
        off = not abs(got - question.expected) <= question.tolerance
        wrong = wrong or off
        lines.append(f"  {question.what}: {got:.3f}, right is {question.expected:g} ± {question.tolerance:g}")
    return Failure(f"After {run.steps:,} steps:\n" + "\n".join(lines)) if wrong else None


# How actions are drawn -----------------------------------------------------------------------------------------------


class _Fixed(nn.Module):
    """Outputs that do not depend on the observation, as one parameter."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(*x.shape[:-1], -1)


LOGITS = [1.2, 0.4, -0.9]


def draws(trainer: Trainer, settings: dict[str, Any], *, values: bool = True) -> Failure | None:
    """Whether a trainer plays the actions of its policy as often as that says."""

    def one(n: int) -> Probe:
        return Probe(lambda kind, time, first, action: float(action))

    policy = CategoricalPolicy(nn.Identity(), _Fixed(LOGITS))
    size = one(0).size
    run = watch(
        trainer,
        one,
        Networks(policy, networks(size).values),
        {"gamma": GAMMA, **settings},
        num_envs=64,
        without_values=not values,
    )
    if run.fault:
        return Failure(run.fault)
    actions = torch.cat([row.actions for iteration in run.iterations for row in iteration.played])
    share = torch.bincount(actions, minlength=3) / len(actions)
    right = torch.tensor(LOGITS).softmax(-1)
    known = {
        "The most likely action is played, not drawn: nothing else is ever tried, and log pi(a) of it is all that is "
        "learned (bug 11).": torch.tensor([1.0, 0.0, 0.0]),
        "Probabilities are taken for logits (or logits for probabilities, bug 28): the softmax is taken twice. "
        "Categorical(logits=outputs), by name.": right.softmax(-1),
        "Actions are drawn evenly, whatever the policy says.": torch.full((3,), 1 / 3),
    }
    slack = 4.5 * (right * (1 - right) / len(actions)).sqrt()
    if bool(((share - right).abs() <= slack).all()):
        return None
    named = next((text for text, other in known.items() if bool(((share - other).abs() < slack).all())), "")
    rows = [f"  action {k}: {share[k]:.3f}, right is {right[k]:.3f}" for k in range(3)]
    return Failure(f"Share of each action in {len(actions):,} draws:\n" + "\n".join(rows), named)
