"""How sure a mean, a win rate or a ratio is, where values of one prompt are not independent of each other.

Every interval here is a 95 % one. `groups` says what each value belongs to, such as its prompt: values of one group may
depend on each other in any way, so evidence is counted in groups. Without `groups` each value stands alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

CONFIDENCE = 1.96  # standard errors in a 95 % interval
RESAMPLES = 2000

Groups = Sequence[Hashable] | None
Values = Sequence[float] | Tensor


def wilson(rate: Tensor, count: Tensor | float) -> tuple[Tensor, Tensor]:
    """Low and high end of Wilson's score interval for a share: each [...].

    It inverts the test of a share by its own standard error, sqrt(p (1 - p) / n) at the p that is tested and not at the
    one that was seen. So it stays inside [0, 1], and has a width where everything was won (Wilson 1927; Newcombe 1998
    compares it with six others). Its coverage is near 95 %; it dips where few losses can be expected (to
    85 % for 16 values at p = 0.99).

    Args:
        rate: the share that was seen, [...].
        count: of how many independent values, [...]; no whole number is needed.

    Example:
        >>> wilson(torch.tensor(1.0), 30)  # 30 of 30
        (tensor(0.8865), tensor(1.))
    """
    square = CONFIDENCE**2
    centre = (rate + square / (2 * count)) / (1 + square / count)
    half = CONFIDENCE / (1 + square / count) * (rate * (1 - rate) / count + square / (4 * count**2)).sqrt()
    # Rounding aside, the rate lies inside and both ends in [0, 1].
    return (centre - half).clamp(min=0).minimum(rate), (centre + half).clamp(max=1).maximum(rate)


def effective_count(outcomes: Tensor, groups: Groups = None) -> Tensor:
    """How many independent outcomes these are worth: [..., N] give [...].

    That is N by the design effect: how much larger the variance of the mean is, estimated from sums of whole groups,
    than the p (1 - p) / N of independent outcomes (Rao and Scott 1992). At most N, as Korn and Graubard (1998) have it,
    and at least what is left when all outcomes of a group are equal (Kish 1965). Where p is near 0 or 1 hardly
    anything is known about the dependence, and all wins or all losses show none at all. So the z^2 imaginary
    outcomes of 1/2 that stand in Wilson's centre stand in both variances too, as whole groups: the fewer wins or
    losses there are, the nearer the result is to that smallest count.

    Args:
        outcomes: numbers from 0 to 1, [..., N]; a half is a tie.
        groups: what each of the N belongs to.

    Example:
        >>> effective_count(torch.tensor([1.0, 1.0, 0.0, 0.0]), ["a", "a", "b", "b"])
        tensor(2.)
        >>> effective_count(torch.tensor([1.0, 0.0, 1.0, 0.0]), ["a", "a", "b", "b"])
        tensor(4.)
    """
    count = outcomes.shape[-1]
    rate = outcomes.mean(-1)
    sizes = group_sums(torch.ones_like(outcomes), groups)
    most = sizes.square().sum(-1) / count  # the design effect of equal outcomes in each group
    if sizes.shape[-1] < 2:
        return count / most
    imaginary = CONFIDENCE**2 / 4
    together = _squares(group_sums(outcomes - rate[..., None], groups)) + most * imaginary
    apart = count * rate * (1 - rate) + imaginary
    return count / (together / apart).clamp(min=1).minimum(most)


def win_rate(scores: Values, others: Values, groups: Groups = None) -> tuple[float, tuple[float, float]]:
    """How often the first score is above the second, ties counted half, and Wilson's interval.

    Args:
        scores: of the first model's answers, N numbers.
        others: of the second model's answers to the same prompts.
        groups: the prompts, where some occur more than once.

    Example:
        >>> rate, (low, high) = win_rate([1.0, 2.0, 3.0, 3.0], [0.0, 2.0, 1.0, 1.0])
        >>> rate, round(low, 2), round(high, 2)
        (0.875, 0.4, 0.99)
    """
    first, second = _numbers(scores), _numbers(others)
    outcomes = (first > second).double() + (first == second).double() / 2
    rate = outcomes.mean()
    low, high = wilson(rate, effective_count(outcomes, groups))
    return float(rate), (float(low), float(high))


def mean_and_error(values: Values, groups: Groups = None) -> tuple[float, float]:
    """Mean of N numbers and its standard error, from sums of whole groups (Liang and Zeger 1986, for a mean).

    A single group shows no spread: its error is nan.

    Example:
        >>> mean_and_error([1.0, 3.0])
        (2.0, 1.0)
        >>> mean_and_error([1.0, 1.0, 3.0, 3.0], ["a", "a", "b", "b"])
        (2.0, 1.0)
    """
    numbers = _numbers(values)
    mean = numbers.mean()
    sums = group_sums(numbers - mean, groups)
    return float(mean), float(_squares(sums).sqrt()) / len(numbers) if len(sums) > 1 else math.nan


def bootstrap(
    statistic: Callable[..., Tensor], *columns: Values, groups: Groups = None, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """A function of the means of some columns, and its interval: a difference of two models, say, or a ratio.

    Whole groups are drawn with replacement, as many as there are, with the same draw for every column: so luck with
    prompts that two models share cancels. The ends are quantiles of the function's values (Efron 1979; the cluster
    bootstrap of Field and Welsh 2007), a little further out than 2.5 and 97.5 %, for those alone are too narrow for few
    groups: by Student's t in place of the normal, and by sqrt(G / (G - 1)) (Hesterberg 2015, "expanded percentiles").
    The same numbers and seed give the same interval; a single group gives nan.

    Args:
        statistic: gets one mean per column, as tensors of one shape, and returns a tensor of that shape.
        columns: N numbers each.
        groups: what each of the N belongs to.
        seed: of the draws.

    Example:
        >>> gain, (low, high) = bootstrap(torch.sub, [3.0, 5.0, 4.0, 6.0], [2.0, 4.0, 3.0, 3.0])
        >>> gain, low, high
        (1.5, 1.0, 3.0)
    """
    sums = group_sums(torch.stack([_numbers(column) for column in (torch.ones(len(columns[0])), *columns)]), groups)
    sizes, *totals = sums.sum(1)
    value = float(statistic(*(total / sizes for total in totals)))
    count = sums.shape[1]
    if count < 2:
        return value, (math.nan, math.nan)
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randint(count, (100, count), generator=generator) for _ in range(RESAMPLES // 100))
    sizes, *totals = torch.cat([sums[:, rows].sum(-1) for rows in drawn], 1)  # each [RESAMPLES]
    student = CONFIDENCE + (CONFIDENCE**3 + CONFIDENCE) / (4 * (count - 1))  # to first order in 1 / (count - 1)
    tail = torch.special.ndtr(-torch.tensor(student * (count / (count - 1)) ** 0.5, dtype=torch.float64))
    low, high = statistic(*(total / sizes for total in totals)).quantile(torch.stack((tail, 1 - tail))).tolist()
    return value, (low, high)


def group_sums(values: Tensor, groups: Groups) -> Tensor:
    """The sum of each group, in order of appearance: [..., N] give [..., G]."""
    if groups is None:
        return values
    place = {group: index for index, group in enumerate(dict.fromkeys(groups))}
    index = torch.tensor([place[group] for group in groups])
    return values.new_zeros(*values.shape[:-1], len(place)).index_add(-1, index, values)


def _squares(sums: Tensor) -> Tensor:
    """Sum of squared deviations of whole groups, [..., G] -> [...]; G / (G - 1) makes up for the mean they share."""
    return sums.square().sum(-1) * sums.shape[-1] / (sums.shape[-1] - 1)


def _numbers(values: Values) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)
