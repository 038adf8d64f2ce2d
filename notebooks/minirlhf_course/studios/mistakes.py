"""REINFORCE's weights of log pi, step by step: the right ones, and what those get who make a known mistake.

Each mistake is a sentence that says what is wrong, and the weights [N, T] that it gives on a batch of the ledger. A
trainer whose gradients say just that, in every iteration that is not right, has made it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minirlhf_course.studios import ledger
from minirlhf_course.studios.ledger import Batch, discounted


def times(batch: Batch, gamma: float) -> Tensor:
    return gamma ** torch.arange(batch.rewards.shape[1], dtype=ledger.F64)


def given(batch: Batch, x: Tensor) -> Tensor:
    """x on the steps that count."""
    return torch.where(batch.mask, x, 0.0)


def returns_of(batch: Batch, gamma: float, *, bootstrap: Tensor | None = None, rewards: Tensor | None = None) -> Tensor:
    """G of every step; bootstrap [N, T] is what follows a step of its own, 0 but at ends."""
    extra = None if bootstrap is None else gamma * bootstrap
    return discounted(batch, batch.rewards if rewards is None else rewards, gamma, extra=extra)


def right_return(batch: Batch, gamma: float, baseline: bool) -> Tensor:
    return returns_of(batch, gamma, bootstrap=torch.where(batch.truncated, batch.v_after, 0.0) if baseline else None)


def right_weights(batch: Batch, gamma: float, by_gamma_t: bool, baseline: bool) -> Tensor:
    weights = right_return(batch, gamma, baseline) - (batch.v if baseline else 0.0)
    return given(batch, weights * (times(batch, gamma) if by_gamma_t else 1.0))


def shifted(x: Tensor, by: int) -> Tensor:
    """x of the step `by` later, 0 where there is none."""
    shifted = torch.zeros_like(x)
    if by > 0:
        shifted[:, :-by] = x[:, by:]
    else:
        shifted[:, -by:] = x[:, :by]
    return shifted


def whitened(batch: Batch, x: Tensor, correction: int = 0) -> Tensor:
    inside = x[batch.mask]
    return (x - inside.mean()) / inside.std(correction=correction)


WHITENED = (
    "Returns are whitened: the specification normalises nothing. (The mean that this removes is a baseline of its own.)"
)
AFTER = "Steps after an environment's episode count too, and those are of another episode."

Weights = Callable[[Batch, float, bool, bool], Tensor]


def of_returns(change: Callable[[Batch, float, bool], Tensor]) -> Weights:
    """The right weights but for the returns."""

    def give(batch: Batch, gamma: float, by_gamma_t: bool, baseline: bool) -> Tensor:
        weights = change(batch, gamma, baseline) - (batch.v if baseline else 0.0)
        return given(batch, weights * (times(batch, gamma) if by_gamma_t else 1.0))

    return give


def counted(batch: Batch) -> Tensor:
    return given(batch, batch.rewards)


KNOWN: dict[str, Weights] = {
    "The minus sign is missing: an optimizer minimises, so good actions become rarer (bug 6).": (
        lambda b, g, i, v: -right_weights(b, g, i, v)
    ),
    "A step is weighted by its own reward, not by all that follows: A = r - V for G - V (bug 7).": of_returns(
        lambda b, g, v: b.rewards
    ),
    "Every step has the whole return G_0: right on average, but noisier. Weigh a step by what comes after it.": (
        of_returns(lambda b, g, v: right_return(b, g, v)[:, :1].expand_as(b.rewards))
    ),
    "The discount is missing: G is a plain sum of rewards.": of_returns(
        lambda b, g, v: returns_of(b, 1.0, bootstrap=g * torch.where(b.truncated, b.v_after, 0.0) if v else None)
    ),
    "The returns run forwards: a step is weighted by what came before it. Go backwards from the last column.": (
        of_returns(
            lambda b, g, v: discounted(
                b._replace(rewards=b.rewards.flip(1)), counted(b).flip(1), g, stop=torch.zeros_like(b.mask)
            ).flip(1)
        )
    ),
    "A step's reward is stored a step early: G_t begins with the reward of step t + 1 (bug 10).": of_returns(
        lambda b, g, v: returns_of(b, g, rewards=shifted(counted(b), 1))
    ),
    "A step's reward is stored a step late: G_t begins with the reward of step t - 1.": of_returns(
        lambda b, g, v: returns_of(b, g, rewards=shifted(counted(b), -1))
    ),
    WHITENED: of_returns(lambda b, g, v: whitened(b, right_return(b, g, v))),
    WHITENED + " (So are advantages.)": lambda b, g, i, v: given(
        b, whitened(b, right_weights(b, g, False, v)) * (times(b, g) if i else 1.0)
    ),
    "The returns run across the end of an episode into the next one (bug 26): cut them where an episode is over.": (
        of_returns(lambda b, g, v: discounted(b, b.rewards, g, stop=torch.zeros_like(b.mask)))
    ),
    AFTER: lambda b, g, i, v: right_weights(b._replace(mask=torch.ones_like(b.mask)), g, i, v),
    AFTER + " With G = 0 there, G - v is not 0.": lambda b, g, i, v: (
        (given(b, right_return(b, g, v)) - (b.v if v else 0.0)) * (times(b, g) if i else 1.0)
    ),
    "gamma^t: a return is discounted from the start of its episode, and not from its own step.": (
        lambda b, g, i, v: right_weights(b, g, not i, v)
    ),
    "gamma^t counts from one and not from zero, or twice.": lambda b, g, i, v: right_weights(b, g, i, v) * times(b, g),
    "The baseline is not subtracted: weights are G and not G - v.": lambda b, g, i, v: right_weights(
        b._replace(v=torch.zeros_like(b.v)), g, i, v
    ),
    "The baseline is added: G + v for G - v.": lambda b, g, i, v: right_weights(b._replace(v=-b.v), g, i, v),
    "A truncated episode is treated as a terminated one: v of its last observation is missing.": of_returns(
        lambda b, g, v: returns_of(b, g)
    ),
    "A terminated episode is treated as a truncated one (bug 22): nothing comes after it.": of_returns(
        lambda b, g, v: returns_of(b, g, bootstrap=torch.where(b.ends, b.v_after, 0.0))
    ),
    "A truncated episode bootstraps from the wrong observation: step.observations is the next episode's first one, "
    "step.next_observations what followed.": of_returns(
        lambda b, g, v: returns_of(b, g, bootstrap=torch.where(b.truncated, b.v_now, 0.0))
    ),
    "One-step TD errors, R + gamma v(S') - v(S), and not G - v: that is actor-critic, the next studio.": of_returns(
        lambda b, g, v: b.rewards + g * torch.where(b.terminated, 0.0, b.v_after)
    ),
}

DETACH = (
    "The policy's loss has a gradient into the value network: v is a constant in it. Compute the weights under "
    "torch.no_grad(), or detach them."
)
KEPT = "Steps of an earlier iteration still have a gradient: zero_grad() is missing, or a list is never emptied."
EARLY = "v judges after it has learned: compute G - v before the value network takes its steps."
DEAD = "The value network gets no gradient (bug 25): is it computed under no_grad, or turned into numbers by .item()?"
