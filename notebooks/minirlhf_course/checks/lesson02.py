"""Lesson 02, REINFORCE with a baseline: what is subtracted, and how the baseline learns."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from minirlhf import losses, returns
from minirlhf.returns import whiten as _whiten
from minirlhf_course.checks.cases import SIZES, bools, flags, generators, normal, random_cases, tensor
from minirlhf_course.checks.exercise import Case, exercise

# 2.1 -----------------------------------------------------------------------------------------------------------------


def _advantage_cases() -> list[Case]:
    cases = [
        Case("one step", (tensor([2]), tensor([0.5]), bools([1]), 0.5), tensor([1.5])),
        Case("two steps", (tensor([1, 2]), tensor([0.5, 3]), bools([0, 1]), 0.5), tensor([1.5, -1.0])),
    ]
    return cases + random_cases(lambda g, size: (normal(g, *size), normal(g, *size), flags(g, *size), 0.97))


def _g(rewards: Tensor, ends: Tensor, gamma: float) -> Tensor:
    return returns.discounted_returns(rewards, ends, gamma)


@exercise(
    "2.1",
    "return minus baseline",
    difficulty=1,
    minutes=5,
    task="The advantage estimate of REINFORCE with a baseline is $G_t - V(S_t)$. Mind what must be constant: "
    "the policy's loss will be built on this, and must not train the baseline. You may use `discounted_returns` "
    "from lesson 01.",
    cases=_advantage_cases,
    suspects={
        "This is r - V: subtract the value from the whole return G, or every later reward is ignored.": (
            lambda r, v, ends, gamma: r - v.detach()
        ),
        "The gradient leaks into the baseline: here V is a constant, use values.detach().": (
            lambda r, v, ends, gamma: _g(r, ends, gamma) - v
        ),
        "The sign is wrong: it is G - V, positive where it went better than expected.": (
            lambda r, v, ends, gamma: v.detach() - _g(r, ends, gamma)
        ),
        "The baseline is missing: subtract the values.": lambda r, v, ends, gamma: _g(r, ends, gamma),
        "The return crosses the end of the episode: give `ends` to discounted_returns.": (
            lambda r, v, ends, gamma: _g(r, torch.zeros_like(ends), gamma) - v.detach()
        ),
        "The return is not discounted: give gamma to discounted_returns.": (
            lambda r, v, ends, gamma: _g(r, ends, 1.0) - v.detach()
        ),
        "This is a TD error: it replaces the rest of the return by a value. That is lesson 03; here G is all "
        "rewards.": (lambda r, v, ends, gamma: returns.td_errors(r, v.detach(), ends, gamma)),
        "It subtracts one number everywhere, the mean value: subtract the value of each step's own state.": (
            lambda r, v, ends, gamma: _g(r, ends, gamma) - v.detach().mean()
        ),
        "It subtracts the mean return: that is a baseline too, but here it is the value of each step's state.": (
            lambda r, v, ends, gamma: _g(r, ends, gamma) - _g(r, ends, gamma).mean()
        ),
        "The values are a step late: V(S_t) is values[:, t], and not values[:, t + 1].": (
            lambda r, v, ends, gamma: _g(r, ends, gamma) - v.detach().roll(-1, 1)
        ),
        "The advantage is whitened: a good trick, but lesson 05's. Here it is G - V.": (
            lambda r, v, ends, gamma: _white(_g(r, ends, gamma) - v)
        ),
        "The baseline is added: subtract it.": lambda r, v, ends, gamma: _g(r, ends, gamma) + v.detach(),
    },
    hints=(
        "First the returns of lesson 01, then one subtraction.",
        "`discounted_returns(rewards, ends, gamma) - values.detach()`",
    ),
    leaves=("values",),
)
def baseline_advantages(rewards: Tensor, values: Tensor, ends: Tensor, gamma: float) -> Tensor:
    """G_t - V(s_t) with no gradient: rewards, values and ends (bool) are [N, T], and so is the result."""
    return returns.discounted_returns(rewards, ends, gamma) - values.detach()


# 2.2 -----------------------------------------------------------------------------------------------------------------


def _loss_cases() -> list[Case]:
    cases = [
        Case("one step", (tensor([-1]), tensor([1]), tensor([3])), (tensor(2.0)[0], tensor(2.0)[0])),
        Case("two steps", (tensor([-1, -2]), tensor([1, 0]), tensor([3, -1])), (tensor(0.0)[0], tensor(1.25)[0])),
    ]
    return cases + random_cases(lambda g, size: (-normal(g, *size).abs(), normal(g, *size), normal(g, *size)))


def _losses(
    logprobs: Tensor,
    values: Tensor,
    returns: Tensor,
    *,
    advantages: Callable[[Tensor, Tensor], Tensor] = lambda g, v: (g - v).detach(),
    targets: Callable[[Tensor, Tensor], Tensor] = lambda g, v: g.detach(),
    sign: float = -1.0,
    half: float = 0.5,
    detach: bool = False,
) -> tuple[Tensor, Tensor]:
    """Exercise 2.2 with one mistake planted."""
    policy = sign * (logprobs * advantages(returns, values)).mean()
    guess = values.detach() if detach else values
    return policy, half * (guess - targets(returns, values)).square().mean()


def _white(x: Tensor) -> Tensor:
    return _whiten(x.detach()) if x.numel() > 1 else torch.zeros_like(x)


@exercise(
    "2.2",
    "two losses, kept apart",
    difficulty=2,
    minutes=12,
    task="Now both losses: the policy's, with the advantage $G - V$ as its weight (without $\\gamma^t$), and the "
    "baseline's, "
    "$\\tfrac12 (V - G)^2$. Both are means over all steps. Each trains its own network and nothing else.",
    cases=_loss_cases,
    suspects={
        "The policy's loss leaks a gradient into the baseline: detach the advantage.": (
            partial(_losses, advantages=lambda g, v: g.detach() - v)
        ),
        "The baseline is trained on whitened returns: its target is the raw G, or it can't be subtracted from G.": (
            partial(_losses, targets=lambda g, v: _white(g))
        ),
        "The baseline is trained on whitened advantages plus V: its target is the raw return G.": (
            partial(_losses, targets=lambda g, v: _white(g - v) + v.detach())
        ),
        "The minus sign of the policy's loss is missing, or the advantage is V - G: it is -(logprobs * (G - "
        "V)).mean().": (partial(_losses, sign=1.0)),
        "The policy's loss has no baseline: its weight is G - V.": partial(_losses, advantages=lambda g, v: g.detach()),
        "The half is missing: the baseline's loss is 1/2 (V - G)^2.": partial(_losses, half=1.0),
        "The baseline can't learn: no gradient flows from its loss into `values`.": partial(_losses, detach=True),
        "The returns are not constant: a gradient flows into them. Use returns.detach().": (
            partial(_losses, advantages=lambda g, v: g - v.detach(), targets=lambda g, v: g)
        ),
        "The baseline's target is the advantage: it must learn the return G itself.": (
            partial(_losses, targets=lambda g, v: (g - v).detach())
        ),
        "The policy's weight is the whitened advantage: a good trick, but lesson 05's. Here it is G - V.": (
            partial(_losses, advantages=lambda g, v: _white(g - v))
        ),
        "These are sums: take means over all steps, or the learning rate depends on the batch.": (
            lambda lp, v, g: tuple(lp.numel() * x for x in _losses(lp, v, g))
        ),
        "These are means over rows of sums over steps: take one mean over all steps.": (
            lambda lp, v, g: tuple(lp.shape[1] * x for x in _losses(lp, v, g))
        ),
        "The policy's loss multiplies two means: multiply step by step first, then take the mean.": (
            lambda lp, v, g: (-lp.mean() * (g - v).detach().mean(), _losses(lp, v, g)[1])
        ),
        "The baseline's error is not squared: its loss is 1/2 (V - G)^2.": (
            lambda lp, v, g: (_losses(lp, v, g)[0], 0.5 * (v - g.detach()).abs().mean())
        ),
        "It weighs probabilities: the score is the gradient of the log-probability, so leave exp out.": (
            lambda lp, v, g: _losses(lp.exp(), v, g)
        ),
    },
    hints=(
        "The policy's loss is lesson 01's with another weight. In which of the two losses may `values` carry a "
        "gradient?",
        "`advantages = (returns - values).detach()`; then `-(logprobs * advantages).mean()` and "
        "`0.5 * (values - returns.detach()).square().mean()`.",
    ),
    leaves=("logprobs", "values", "returns"),
)
def baseline_losses(logprobs: Tensor, values: Tensor, returns: Tensor) -> tuple[Tensor, Tensor]:
    """(policy loss, value loss), means over all steps: logprobs, values and returns are [N, T]."""
    return losses.policy_gradient_loss(logprobs, returns - values), losses.value_loss(values, returns)


# 2.3 -----------------------------------------------------------------------------------------------------------------


def _best_cases() -> list[Case]:
    cases = [
        Case("one sample", (tensor([2]), tensor(3)), tensor(3.0)[0]),
        Case("scores of length 1 and 2", (tensor([1], [2]), tensor(1, 6)), tensor(5.0)[0]),
    ]
    for (samples, parameters), generator in zip(((2, 3), (5, 2), (40, 7)), generators(3), strict=True):
        scores, g = normal(generator, samples, parameters), normal(generator, samples)
        cases.append(Case(f"random, {samples} samples of {parameters} parameters", (scores, g)))
    return cases


@exercise(
    "2.3",
    "the best constant baseline",
    difficulty=3,
    minutes=20,
    task="Which constant $b$ makes the gradient estimate $(G - b)\\,s$ least noisy, with $s = \\nabla \\log \\pi$? "
    "Any $b$ keeps "
    "its mean. Minimise its second moment $\\mathbb{E}\\big[(G - b)^2 \\lVert s \\rVert^2\\big]$ over $b$ on paper, "
    "and write the "
    "result with means over samples.",
    cases=_best_cases,
    suspects={
        "This is the mean return: a good baseline, not the best. Samples with a long score weigh more.": (
            lambda s, g: g.mean()
        ),
        "It weighs by the length of the score: it is the squared length that comes out of the derivative.": (
            lambda s, g: (s.norm(dim=1) * g).sum() / s.norm(dim=1).sum()
        ),
        "The weights are not normalised: divide by the mean squared length of the scores.": (
            lambda s, g: (s.square().sum(1) * g).mean()
        ),
        "This is a baseline for each parameter: sum the squared scores over the parameters first.": (
            lambda s, g: (s.square() * g[:, None]).mean(0) / s.square().mean(0)
        ),
        "This averages the best baseline of each parameter: sum the squared scores over the parameters first.": (
            lambda s, g: ((s.square() * g[:, None]).sum(0) / s.square().sum(0)).mean()
        ),
        "It weighs by the score itself: it is its squared length that comes out of the derivative.": (
            lambda s, g: (s * g[:, None]).sum() / s.sum()
        ),
        "It squares the squared length once more: the derivative has |s|^2, not |s|^4.": (
            lambda s, g: (s.square().sum(1).square() * g).sum() / s.square().sum(1).square().sum()
        ),
        "There is a mean above and a sum below: take two means, or two sums.": (
            lambda s, g: (s.square().sum(1) * g).mean() / s.square().sum(1).sum()
        ),
        "It is upside down: E[|s|^2 G] stands above, E[|s|^2] below.": (
            lambda s, g: s.square().sum(1).sum() / (s.square().sum(1) * g).sum()
        ),
        "The mean is taken of G and of |s|^2 one by one: multiply sample by sample first.": (
            lambda s, g: g.mean() * s.square().sum(1).mean()
        ),
    },
    hints=(
        "Set the derivative with respect to $b$ to zero: $\\mathbb{E}[(G - b) \\lVert s \\rVert^2] = 0$. Solve for "
        "$b$.",
        "$b = \\mathbb{E}[\\lVert s \\rVert^2 G] / \\mathbb{E}[\\lVert s \\rVert^2]$; the squared lengths are "
        "`scores.square().sum(1)`.",
    ),
)
def best_baseline(scores: Tensor, returns: Tensor) -> Tensor:
    """The b that makes (G - b) s least noisy: scores [S, P], one row per sample, and returns [S] give a 0-d tensor."""
    weights = scores.square().sum(1)
    return (weights * returns).sum() / weights.sum()


# 2.4 -----------------------------------------------------------------------------------------------------------------


def _explained_cases() -> list[Case]:
    cases = [
        Case("the values are the returns", (tensor([1, 2]), tensor([1, 2])), tensor(1.0)[0]),
        Case("constant values", (tensor([5, 5]), tensor([1, 2])), tensor(0.0)[0]),
        Case("right but for a constant", (tensor([3, 4]), tensor([1, 2])), tensor(1.0)[0]),
        Case("twice too large", (tensor([2, 4, 6]), tensor([1, 2, 3])), tensor(0.0)[0]),
    ]
    return cases + random_cases(lambda g, size: (normal(g, *size), normal(g, *size)), SIZES[1:])


@exercise(
    "2.4",
    "explained variance",
    difficulty=1,
    minutes=5,
    task="How good is a baseline? The share of the returns' variance that it takes away: "
    "$1 - \\operatorname{Var}(G - V) / \\operatorname{Var}(G)$. You will watch this number in every later lesson.",
    cases=_explained_cases,
    suspects={
        "The two are swapped: divide by the variance of the returns, not of the values.": (
            lambda v, g: 1 - (g - v).var(correction=0) / v.var(correction=0)
        ),
        "It uses the squared error in place of the variance: a value that is off by a constant is punished. "
        "Take the variance of the difference.": lambda v, g: 1 - (g - v).square().mean() / g.var(correction=0),
        "This is the unexplained share: subtract it from 1.": lambda v, g: (
            (g - v).var(correction=0) / g.var(correction=0)
        ),
        "It divides standard deviations: take variances.": lambda v, g: (
            1 - (g - v).std(correction=0) / g.std(correction=0)
        ),
        "This is the squared correlation, blind to values that are twice too large.": lambda v, g: torch.corrcoef(
            torch.stack((v.flatten(), g.flatten()))
        )[0, 1].square(),
        "The fraction is upside down: the variance of the difference stands above, that of the returns below.": (
            lambda v, g: 1 - g.var(correction=0) / (g - v).var(correction=0)
        ),
        "It takes the variances row by row and averages: take them over all the numbers at once.": (
            lambda v, g: (1 - (g - v).var(1, correction=0) / g.var(1, correction=0)).mean()
        ),
        "It uses the variance of the values: the unexplained part is the variance of the difference G - V.": (
            lambda v, g: 1 - v.var(correction=0) / g.var(correction=0)
        ),
        "It is measured around 0: a variance is measured around the mean.": (
            lambda v, g: 1 - (g - v).square().mean() / g.square().mean()
        ),
    },
    hints=("Two variances, over all the numbers at once.", "`1 - (returns - values).var() / returns.var()`"),
)
def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 - Var(G - V) / Var(G) over all numbers: values and returns [N, T] give a 0-d tensor. 1 is perfect."""
    return _explained(values, returns)


_explained = returns.explained_variance

# 2.5 -----------------------------------------------------------------------------------------------------------------

NAN = float("nan")


def _whiten_cases() -> list[Case]:
    cases = [
        Case("two numbers", (tensor([1, 3]), bools([1, 1])), tensor([-1.0, 1.0])),
        Case("one of three doesn't count", (tensor([1, 3, 9]), bools([1, 1, 0])), tensor([-1.0, 1.0, 0.0])),
        Case("what doesn't count is NaN", (tensor([1, 3, NAN]), bools([1, 1, 0])), tensor([-1.0, 1.0, 0.0])),
        Case("two rows", (tensor([0, 4], [2, 2]), bools([1, 1], [1, 1])), tensor([-(2**0.5), 2**0.5], [0.0, 0.0])),
    ]
    for size, generator in zip(SIZES[1:], generators(len(SIZES) - 1), strict=True):
        mask = flags(generator, *size, share=0.7)
        mask.view(-1)[:2] = True
        cases.append(Case(f"random, of shape {size}", (3 + 20 * normal(generator, *size), mask)))
    return cases


def _whiten_with(bug: str, x: Tensor, mask: Tensor) -> Tensor:
    """Exercise 2.5 with one mistake planted."""
    counted = x if bug == "all" else x[mask]
    mean, variance = counted.mean(), counted.var(correction=int("unbiased" in bug))
    if bug == "around 0":
        variance = counted.square().mean()
    if bug == "rows":
        inside = x.where(mask, torch.nan)
        mean = inside.nanmean(1, keepdim=True)
        variance = (inside - mean).square().nanmean(1, keepdim=True)
    scale = variance if bug == "variance" else torch.ones_like(mean) if bug == "scale kept" else variance.sqrt()
    result = (x if bug == "mean kept" else x - mean) / (scale + 1e-8)
    return result if "unmasked" in bug else result * mask if bug == "product" else result.where(mask, 0)


@exercise(
    "2.5",
    "whitening",
    difficulty=2,
    minutes=10,
    task="Advantages are often shifted and scaled to mean 0 and variance 1 before the policy uses them. "
    "Only what the mask counts has a say; the rest becomes 0.",
    cases=_whiten_cases,
    suspects={
        "The mean and the variance include what does not count: take them over x[mask].": partial(_whiten_with, "all"),
        "What does not count must become 0: torch.where(mask, result, 0).": partial(_whiten_with, "unmasked"),
        "0 * NaN is NaN: choose with torch.where(mask, result, 0) instead of multiplying by the mask.": (
            partial(_whiten_with, "product")
        ),
        "The variance divides by n - 1: here it is the biased one, var(correction=0).": partial(
            _whiten_with, "unbiased"
        ),
        "It divides by the variance: divide by its square root.": partial(_whiten_with, "variance"),
        "The mean is still there: subtract it.": partial(_whiten_with, "mean kept"),
        "Every row is whitened by itself: take one mean and one variance over the whole batch.": (
            partial(_whiten_with, "rows")
        ),
        "It subtracts the mean only: divide by the standard deviation as well.": partial(_whiten_with, "scale kept"),
        "What does not count must become 0, and the variance divides by n, not by n - 1.": (
            partial(_whiten_with, "unmasked, unbiased")
        ),
        "It is measured around 0: the variance is measured around the mean.": partial(_whiten_with, "around 0"),
        "The mask is read the wrong way round: True is what counts.": lambda x, mask: _whiten_with("", x, ~mask),
    },
    hints=(
        "`x[mask]` holds what counts: its mean, its `var(correction=0)`.",
        "`(x - mean) / (variance + 1e-8).sqrt()`, and `torch.where(mask, ..., 0)` around it.",
    ),
)
def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """x shifted and scaled to mean 0 and (biased) variance 1 where mask is True, 0 elsewhere: all [N, T]."""
    return _whiten(x, mask)
