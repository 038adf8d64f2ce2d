"""Actor-critic's targets, step by step: the right ones, and those of who makes a known mistake."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minirlhf_course.studios.ledger import F64, Batch, discounted
from minirlhf_course.studios.mistakes import shifted, whitened

GAMMA = 0.5
"""On the ledger."""


def _targets(batch: Batch, gamma: float, follows: Tensor, v_after: Tensor, stop: Tensor | None = None) -> Tensor:
    """R + gamma v_after where `follows`, R + gamma (the next target) elsewhere; nothing after `stop`."""
    last = torch.zeros_like(batch.ends)
    last[:, -1] = True
    stop = batch.ends | last if stop is None else stop
    return discounted(
        batch, batch.rewards, gamma, stop=stop | follows, extra=gamma * torch.where(follows, v_after, 0.0)
    )


def _cut(batch: Batch) -> Tensor:
    """Where v of what followed stands for all that would have come: time limits, and the last of the n steps."""
    cut = batch.truncated.clone()
    cut[:, -1] = ~batch.terminated[:, -1]
    return cut


def right_targets(batch: Batch, gamma: float) -> Tensor:
    return _targets(batch, gamma, _cut(batch), batch.v_after)


def _late(flags: Tensor) -> Tensor:
    late = torch.zeros_like(flags)
    late[:, 1:] = flags[:, :-1]
    return late


def _across(batch: Batch, gamma: float) -> Tensor:
    last = torch.zeros_like(batch.ends)
    last[:, -1] = True
    return _targets(batch, gamma, last, batch.v_now, stop=last)


def _swapped(batch: Batch, gamma: float, v_last: Tensor) -> Tensor:
    moved = batch._replace(terminated=_late(batch.ends), truncated=torch.zeros_like(batch.ends))
    return _targets(moved, gamma, _cut(moved), v_last)


def _one_step(batch: Batch, gamma: float) -> Tensor:
    return batch.rewards + gamma * torch.where(batch.terminated, 0.0, batch.v_after)


SWAPPED = "done and next_done are swapped (bug 12): an end cuts a step later than it should."

TARGETS: dict[str, Callable[[Batch, float], Tensor]] = {
    "A terminated episode is treated as a truncated one (bug 22): v(terminal) is 0.": lambda b, g: _targets(
        b, g, _cut(b) | b.ends, b.v_after
    ),
    "A truncated episode is treated as a terminated one: v of its last observation is missing.": lambda b, g: _targets(
        b, g, _cut(b) & ~b.truncated, b.v_after
    ),
    "A truncated episode bootstraps from the wrong observation: step.observations is the next episode's first one, "
    "step.next_observations what followed.": lambda b, g: _targets(b, g, _cut(b), b.v_now),
    "An end is ignored: the target runs into the next episode (bug 26).": _across,
    SWAPPED: lambda b, g: _swapped(b, g, b.v_now),
    SWAPPED + " Ends are those of the step before.": lambda b, g: _swapped(b, g, b.v_after),
    "Nothing stands for what comes after the last of the n steps: bootstrap from v of its next_observations.": (
        lambda b, g: _targets(b, g, _cut(b) & b.truncated, b.v_after)
    ),
    "Every target looks one step ahead: with n > 1 it sums rewards up to the last of the n steps.": _one_step,
    "A step's reward is its whole target: A = r - V (bug 7).": lambda b, g: b.rewards,
    "The discount is missing.": lambda b, g: right_targets(b, 1.0),
    "v of what follows is not discounted.": lambda b, g: _targets(b, g, _cut(b), b.v_after / g),
    "A step's reward is stored a step early (bug 10).": lambda b, g: right_targets(
        b._replace(rewards=shifted(b.rewards, 1)), g
    ),
    "A step's reward is stored a step late.": lambda b, g: right_targets(b._replace(rewards=shifted(b.rewards, -1)), g),
}


Weights = Callable[[Batch, Tensor, bool], Tensor]


def _factor(times: Tensor, by_gamma_t: bool) -> Tensor:
    return GAMMA ** times.double() if by_gamma_t else torch.ones_like(times, dtype=F64)


def right_weights(batch: Batch, times: Tensor, by_gamma_t: bool) -> Tensor:
    return (right_targets(batch, GAMMA) - batch.v) * _factor(times, by_gamma_t)


def _with(targets: Callable[[Batch, float], Tensor]) -> Weights:
    return lambda b, times, i: (targets(b, GAMMA) - b.v) * _factor(times, i)


KNOWN: dict[str, Weights] = {
    "The minus sign is missing: an optimizer minimises, so good actions become rarer (bug 6).": (
        lambda b, times, i: -right_weights(b, times, i)
    ),
    **{sentence: _with(targets) for sentence, targets in TARGETS.items()},
    "The baseline is missing: weights are targets, and not targets minus v.": lambda b, times, i: (
        right_targets(b, GAMMA) * _factor(times, i)
    ),
    "Advantages are whitened: the specification normalises nothing.": lambda b, times, i: (
        whitened(b, right_targets(b, GAMMA) - b.v) * _factor(times, i)
    ),
    "gamma^t is there where it should not be, or missing where it should: look at weigh_by_gamma_t.": (
        lambda b, times, i: right_weights(b, times, not i)
    ),
    "gamma^t begins again with every n steps: I goes on from one iteration into the next.": lambda b, times, i: (
        (right_targets(b, GAMMA) - b.v) * _factor(times.minimum(torch.arange(times.shape[1])), i)
    ),
    "gamma^t goes on over the end of an episode: I begins again at 1 where an episode does.": lambda b, times, i: (
        (right_targets(b, GAMMA) - b.v) * _factor(torch.arange(times.shape[1]).expand_as(times), i)
    ),
}

MOVING = (
    "The critic's target has a gradient of its own: R + gamma v(S') is held fixed (a semi-gradient). Compute it under "
    "torch.no_grad(), or detach it."
)
