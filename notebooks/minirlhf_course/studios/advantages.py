"""PPO's advantages and clip, step by step: the right ones, and what those get who make a known mistake."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minirlhf_course.studios.ledger import Batch, discounted
from minirlhf_course.studios.mistakes import shifted


def gae(
    batch: Batch,
    gamma: float,
    lam: float,
    *,
    v_after: Tensor | None = None,
    follows: Tensor | None = None,
    stop: Tensor | None = None,
    decay: float | None = None,
) -> Tensor:
    """GAE [N, T] of a batch; the options are what mistakes change.

    Args:
        batch: the steps.
        gamma: discount.
        lam: lambda.
        v_after: V of what followed each step.
        follows: where it counts, by default where the episode did not terminate.
        stop: where the sum ends, by default at ends.
        decay: of the sum, by default gamma lam.
    """
    v_after = batch.v_after if v_after is None else v_after
    follows = ~batch.terminated if follows is None else follows
    deltas = batch.rewards + gamma * torch.where(follows, v_after, 0.0) - batch.v
    return discounted(batch, deltas, gamma * lam if decay is None else decay, stop=batch.ends if stop is None else stop)


def _late(flags: Tensor) -> Tensor:
    late = torch.zeros_like(flags)
    late[:, 1:] = flags[:, :-1]
    return late


def _last(batch: Batch) -> Tensor:
    last = torch.zeros_like(batch.ends)
    last[:, -1] = True
    return last


SWAPPED = "done and next_done are swapped (bug 12): a step is cut by the end of the one before it."

ADVANTAGES: dict[str, Callable[[Batch, float, float], Tensor]] = {
    "A terminated episode is treated as a truncated one (bug 22): V(terminal) is 0.": lambda b, g, lam: gae(
        b, g, lam, follows=torch.ones_like(b.ends)
    ),
    "A truncated episode is treated as a terminated one: V of its last observation is missing.": lambda b, g, lam: gae(
        b, g, lam, follows=~b.ends
    ),
    "A truncated episode bootstraps from the wrong observation: step.observations is the next episode's first one, "
    "step.next_observations what followed.": lambda b, g, lam: gae(b, g, lam, v_after=b.v_now),
    "The sum of deltas runs across the end of an episode into the next (bug 26).": lambda b, g, lam: gae(
        b, g, lam, stop=torch.zeros_like(b.ends)
    ),
    "Ends are ignored: delta and sum run into the next episode (bug 26).": lambda b, g, lam: gae(
        b, g, lam, v_after=b.v_now, follows=torch.ones_like(b.ends), stop=torch.zeros_like(b.ends)
    ),
    "The sum runs on where an episode was truncated (bug 26): it ends there too, only delta does not.": (
        lambda b, g, lam: gae(b, g, lam, stop=b.terminated)
    ),
    SWAPPED: lambda b, g, lam: gae(b, g, lam, v_after=b.v_now, follows=~_late(b.ends), stop=_late(b.ends)),
    SWAPPED + " Its delta and its sum.": lambda b, g, lam: gae(b, g, lam, follows=~_late(b.ends), stop=_late(b.ends)),
    "Nothing stands for what comes after the last step of the rollout: bootstrap from V of its next_observations.": (
        lambda b, g, lam: gae(b, g, lam, follows=~b.terminated & ~_last(b))
    ),
    "A = r - V, in place of a sum of deltas (bug 7).": lambda b, g, lam: b.rewards - b.v,
    "A is the return, without V taken off.": lambda b, g, lam: gae(b, g, lam) + b.v,
    "lambda is missing: deltas are summed with gamma alone.": lambda b, g, lam: gae(b, g, 1.0),
    "Deltas are not summed at all: this is lambda = 0.": lambda b, g, lam: gae(b, g, 0.0),
    "gamma is missing in the sum: the decay is gamma times lambda.": lambda b, g, lam: gae(b, g, lam, decay=lam),
    "gamma is missing in delta.": lambda b, g, lam: gae(b, 1.0, lam, decay=g * lam),
    "A step's reward is stored a step early (bug 10).": lambda b, g, lam: gae(
        b._replace(rewards=shifted(b.rewards, 1)), g, lam
    ),
    "A step's reward is stored a step late.": lambda b, g, lam: gae(b._replace(rewards=shifted(b.rewards, -1)), g, lam),
}
"""What is wrong, and the advantages that it gives."""


def clip_weights(ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """d/d log pi of min(r A, clip(r) A)."""
    beyond = torch.where(advantages > 0, ratio > 1 + clip_range, ratio < 1 - clip_range)
    return torch.where(beyond, 0.0, ratio * advantages)


CLIPS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "The ratio is always 1 (bug 3): the old log-probabilities are those of the data, computed once, before the first "
    "epoch.": lambda r, a, e: a,
    "The clip never acts: torch.minimum(ratio * A, clipped ratio * A).": lambda r, a, e: r * a,
    "max for min (bug 4): the slope is gone where it should pull back, and full where it should stop.": (
        lambda r, a, e: torch.where(torch.where(a > 0, r < 1 - e, r > 1 + e), 0.0, r * a)
    ),
    "min is taken before multiplying by A (bug 5): for A < 0 that is the wrong side.": lambda r, a, e: torch.where(
        r > 1 + e, 0.0, r * a
    ),
    "Only the clipped ratio is left: outside of the range the slope is gone on both sides.": lambda r, a, e: (
        torch.where((r - 1).abs() > e, 0.0, r * a)
    ),
}
"""What is wrong, and the weight of log pi that it gives from ratio, advantage and clip range."""
