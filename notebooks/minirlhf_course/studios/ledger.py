"""The ledger: environments in which no observation comes twice, so a gradient tells what each single step was worth.

Observations are one-hot, and the networks have one weight for each of them and nothing else: a table of logits, a table
of values. So the gradient of an update, in the row of a step's observation, is the weight that this step's
log-probability has in the loss, and V minus its target. Rewards and ends are written down beforehand, so that a right
trainer's weights can be worked by hand. Losses that differ by a factor (a sum for a mean, a clipped norm) say the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from minirlhf.control.policies import CategoricalPolicy, Networks, ValueNetwork
from minirlhf_course.studios.session import Iteration, Update

F64 = torch.float64
ACTIONS = 3
PARALLEL = 1e-6
"""Two gradients are the same up to a factor if 1 minus their cosine is at most this: one weight in a thousand off."""

Script = Sequence[tuple[Sequence[float], bool]]
"""Episodes, one after the other: the rewards of each, and whether it terminates (else it is truncated)."""


class Ledger:
    """An environment that pays what its script says, whatever is done in it; after its last episode the first again."""

    def __init__(self, script: Script, first: int, size: int) -> None:
        self._script, self._first, self._size = script, first, size
        self._episode, self._t, self._place = -1, 0, first

    def reset(self, seed: int | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        if self._episode >= 0 and self._t < len(self._script[self._episode][0]):  # left in the middle
            self._place += len(self._script[self._episode][0]) - self._t
        self._episode = (self._episode + 1) % len(self._script)
        self._place = self._first if self._episode == 0 else self._place + 1
        self._t = 0
        return self._observation(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        rewards, terminates = self._script[self._episode]
        reward = rewards[self._t]
        self._t += 1
        self._place += 1
        over = self._t == len(rewards)
        return self._observation(), reward, over and terminates, over and not terminates, {}

    def _observation(self) -> np.ndarray:
        row = np.zeros(self._size, dtype=np.float32)
        row[self._place] = 1.0
        return row


class Problem(NamedTuple):
    """Ledgers of N environments, and how many observations they have together."""

    scripts: tuple[Script, ...]

    @property
    def size(self) -> int:
        return sum(_places(script) for script in self.scripts)

    def make(self, n: int) -> Ledger:
        first = sum(_places(script) for script in self.scripts[:n])
        return Ledger(self.scripts[n], first, self.size)

    def networks(self, seed: int = 0, *, common: bool = False) -> Networks:
        """Tables of logits and of values, each entry drawn; see `Common` for common."""
        generator = torch.Generator().manual_seed(seed)
        table = _table(self.size, ACTIONS, 0.5, generator)
        policy = CategoricalPolicy(nn.Identity(), Common(table.weight.detach()) if common else table)
        return Networks(policy, ValueNetwork(nn.Identity(), _table(self.size, 1, 1.0, generator)))


def _places(script: Script) -> int:
    return sum(len(rewards) + 1 for rewards, _ in script)


class Common(nn.Module):
    """A table of logits, plus logits that all observations have in common and that learn faster.

    So one step's update moves the ratios of others, and some of them the wrong way.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.common = nn.Parameter(weight), nn.Parameter(torch.zeros(ACTIONS))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() + FASTER * self.common


FASTER = 3.0


def _table(inputs: int, outputs: int, scale: float, generator: torch.Generator) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    with torch.no_grad():
        layer.weight.normal_(0.0, scale, generator=generator)
    return layer


def drawn(environments: int, steps: int, seed: int, longest: int = 4) -> Problem:
    """A problem of random rewards and episodes, each environment at least `steps` steps long."""
    generator = torch.Generator().manual_seed(seed)
    scripts = []
    for _ in range(environments):
        script: list[tuple[list[float], bool]] = []
        while sum(len(rewards) for rewards, _ in script) < steps:
            length = int(torch.randint(1, longest + 1, (), generator=generator))
            rewards = torch.randint(-2, 4, (length,), generator=generator).double().tolist()
            script.append((rewards, bool(torch.rand((), generator=generator) < 0.6)))
        scripts.append(tuple(script))
    return Problem(tuple(scripts))


class Batch(NamedTuple):
    """The steps of an iteration, [N, T] float64, as its trainer found them, and V as it was before it learned."""

    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    mask: Tensor
    """The steps that count."""
    v: Tensor
    """V of each step's observation."""
    v_after: Tensor
    """V of what followed the step, also where an episode ended."""
    v_now: Tensor
    """V of what was acted on next: of a new episode where one ended."""
    states: Tensor
    """Which observation; int64."""
    after: Tensor
    actions: Tensor
    table: Tensor
    """V of every observation [S]."""

    @property
    def ends(self) -> Tensor:
        return self.terminated | self.truncated


def batch_of(iteration: Iteration, weights: dict[str, Tensor], *, first_episodes: bool = False) -> Batch:
    """What was played in an iteration, with V from the given weights.

    first_episodes counts each environment's steps up to its first end, from the last reset on, and no others.
    """
    played = iteration.played[iteration.resets[-1] if first_episodes and iteration.resets else 0 :]
    v = weights["values.head.weight"][0].double()
    states = torch.stack([row.observations.argmax(-1) for row in played], 1)
    after = torch.stack([row.step.next_observations.argmax(-1) for row in played], 1)
    now = torch.stack([row.step.observations.argmax(-1) for row in played], 1)
    terminated = torch.stack([row.step.terminated for row in played], 1)
    truncated = torch.stack([row.step.truncated for row in played], 1)
    mask = torch.ones_like(terminated)
    if first_episodes:
        ended_before = (terminated | truncated).cumsum(1) - (terminated | truncated).long()
        mask = ended_before == 0
    rewards = torch.stack([row.step.rewards for row in played], 1).double()
    actions = torch.stack([row.actions for row in played], 1)
    return Batch(rewards, terminated, truncated, mask, v[states], v[after], v[now], states, after, actions, v)


def discounted(
    batch: Batch, rewards: Tensor, decay: float, *, stop: Tensor | None = None, extra: Tensor | None = None
) -> Tensor:
    """x_t = rewards_t + extra_t + decay x_{t+1}, not across `stop`, by default the ends of episodes."""
    stop = batch.ends if stop is None else stop
    carry, columns = torch.zeros(len(rewards), dtype=F64), []
    for t in reversed(range(rewards.shape[1])):
        carry = rewards[:, t] + (0.0 if extra is None else extra[:, t]) + decay * torch.where(stop[:, t], 0.0, carry)
        columns.append(carry)
    return torch.stack(columns[::-1], 1)


# What a gradient says ------------------------------------------------------------------------------------------------


def probabilities(update: Update) -> Tensor:
    """pi [S, A] of the table at an update."""
    common = update.weights.get("policy.head.common", torch.zeros(ACTIONS))
    return (update.weights["policy.head.weight"].t() + FASTER * common).double().softmax(-1)


def weights_of(update: Update, batch: Batch) -> Tensor | None:
    """The weight of log pi(a|s) of every step [N, T] in minus the loss, up to a factor; None without a gradient."""
    gradient = update.gradients.get("policy.head.weight")
    if gradient is None:
        return None
    states, actions = batch.states, batch.actions
    slope = 1 - probabilities(update)[states, actions]
    return -gradient.double().t()[states, actions] / slope


def outside(update: Update, batch: Batch) -> bool:
    """Whether the policy's gradient has something to say of observations that are not of this batch."""
    gradient = update.gradients["policy.head.weight"].abs().sum(0)
    others = torch.ones(len(gradient), dtype=torch.bool)
    others[batch.states.flatten()] = False
    return bool((gradient[others] > 1e-6 * gradient.max()).any())


def errors_of(update: Update) -> Tensor | None:
    """V - target of every observation [S] in the value loss, up to a factor; None without a gradient."""
    gradient = update.gradients.get("values.head.weight")
    return None if gradient is None else gradient[0].double()


def at(states: Tensor, x: Tensor, size: int) -> Tensor:
    """x of the steps [N, T] as a vector over observations [S]."""
    return torch.zeros(size, dtype=F64).index_add(0, states.flatten(), x.flatten().to(F64))


def parallel(x: Tensor | None, y: Tensor, tolerance: float = PARALLEL) -> bool:
    """Whether x is y times a positive factor."""
    if x is None:
        return False
    x, y = x.flatten(), y.flatten()
    if not bool(y.any()) or not bool(x.any()):
        return bool(x.any()) == bool(y.any())
    return bool(1 - (x @ y) / (x.norm() * y.norm()) <= tolerance)


def combines(x: Tensor, parts: Sequence[Tensor]) -> bool:
    """Whether x is a sum of the parts, each times some factor, none of them 0."""
    basis = torch.stack([part.flatten() for part in parts], 1)
    factors = torch.linalg.lstsq(basis, x.flatten().unsqueeze(1)).solution
    rest = (basis @ factors - x.flatten().unsqueeze(1)).norm() / x.norm()
    lengths = factors[:, 0].abs() * basis.norm(dim=0)
    return bool(rest < 1e-3) and bool((lengths > 1e-3 * x.norm()).all())


def scaled(x: Tensor, y: Tensor) -> Tensor:
    """x in y's length, to be shown beside it."""
    return x * (y.norm() / x.norm().clamp(min=1e-30))


Suspects = dict[str, Callable[..., Tensor]]
"""A sentence that says what is wrong, and what it would give."""


def suspect(suspects: Suspects, seen: Sequence[tuple[Tensor, tuple[Any, ...]]]) -> str:
    """The sentence of the first suspect that gives what was seen, up to a factor, everywhere; "" if none does."""
    for sentence, give in suspects.items():
        if all(parallel(x, give(*args)) for x, args in seen):
            return sentence
    return ""


# The smallest case ---------------------------------------------------------------------------------------------------


def shown_row(batch: Batch, expected: Tensor, got: Tensor, what: str, settings: str) -> str:
    """The environment with the fewest steps of those where the two differ: what it paid, and both rows of numbers."""
    got = scaled(got, expected)
    off = ((got - expected).abs() > 2e-3 * expected.abs().max().clamp(min=1e-12)).any(1)
    rows = [n for n in range(len(off)) if off[n]] or list(range(len(off)))
    n = min(rows, key=lambda row: int(batch.mask[row].sum()))
    last = int(batch.mask[n].nonzero().max()) + 1
    ends = [
        "terminated" if over else "truncated" if cut else ""
        for over, cut in zip(batch.terminated[n, :last].tolist(), batch.truncated[n, :last].tolist(), strict=True)
    ]
    lines = [
        ("reward", [f"{x:g}" for x in batch.rewards[n, :last].tolist()]),
        ("then the episode is", ends),
        (f"{what}: right", [f"{x:.3f}" for x in expected[n, :last].tolist()]),
        (f"{what}: yours", [f"{x:.3f}" for x in got[n, :last].tolist()]),
    ]
    if bool(batch.v.any()):
        lines.insert(2, ("V(s)", [f"{x:.3f}" for x in batch.v[n, :last].tolist()]))
        lines.insert(3, ("V(what followed)", [f"{x:.3f}" for x in batch.v_after[n, :last].tolist()]))
    width = max(len(name) for name, _ in lines)
    text = [f"Smallest case: environment {n}, {settings}"]
    text += [f"  {name:<{width}} " + " ".join(f"{cell:>10}" for cell in cells) for name, cells in lines]
    return "\n".join(text)
