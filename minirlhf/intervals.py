"""Confidence intervals for means, win rates and ratios, where values of one prompt are not independent.

Every interval is a 95 % interval. `groups` gives the group of each value, such as its prompt: values of one group may
depend on each other in any way, so evidence is counted in groups. Without `groups` all values are independent.
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
    """Lower and upper end of Wilson's score interval for a proportion, each [...].

    It inverts a test whose standard error, sqrt(p (1 - p) / n), is taken at the hypothesised p, not the observed one.
    So it stays inside [0, 1], and has a width even if every value is a win (Wilson 1927; Newcombe 1998 compares it with
    six others). Its coverage is near 95 %; it dips where few losses are expected (to 85 % for 16 values at p = 0.99).

    Args:
        rate: the observed proportion, [...].
        count: the number of independent values, [...]; need not be whole.

    Example:
        >>> wilson(torch.tensor(1.0), 30)  # 30 of 30
        (tensor(0.8865), tensor(1.))
    """
    square = CONFIDENCE**2
    centre = (rate + square / (2 * count)) / (1 + square / count)
    half = CONFIDENCE / (1 + square / count) * (rate * (1 - rate) / count + square / (4 * count**2)).sqrt()
    # The rate is inside and both ends are in [0, 1], except for rounding.
    return (centre - half).clamp(min=0).minimum(rate), (centre + half).clamp(max=1).maximum(rate)


def effective_count(outcomes: Tensor, groups: Groups = None) -> Tensor:
    """The effective number of independent outcomes: [..., N] give [...].

    This is N divided by the design effect: the variance of the mean, estimated from group sums, over the p (1 - p) / N
    of independent outcomes (Rao and Scott 1992). It is at most N, as in Korn and Graubard (1998), and at least what
    remains if all outcomes of a group are equal (Kish 1965). If p is near 0 or 1, the data say hardly anything about
    the dependence, and nothing if all are wins or all are losses. So the z^2 pseudo-outcomes of 1/2 in Wilson's centre
    are added to both variances too, as whole groups: the fewer wins or losses there are, the closer the result is to
    that minimum.

    Args:
        outcomes: numbers from 0 to 1, [..., N]; 0.5 is a tie.
        groups: the group of each of the N.

    Example:
        >>> effective_count(torch.tensor([1.0, 1.0, 0.0, 0.0]), ["a", "a", "b", "b"])
        tensor(2.)
        >>> effective_count(torch.tensor([1.0, 0.0, 1.0, 0.0]), ["a", "a", "b", "b"])
        tensor(4.)
    """
    count = outcomes.shape[-1]
    rate = outcomes.mean(-1)
    sizes = group_sums(torch.ones_like(outcomes), groups)
    most = sizes.square().sum(-1) / count  # the design effect if all outcomes of a group are equal
    if sizes.shape[-1] < 2:
        return count / most
    imaginary = CONFIDENCE**2 / 4
    together = _squares(group_sums(outcomes - rate[..., None], groups)) + most * imaginary
    apart = count * rate * (1 - rate) + imaginary
    return count / (together / apart).clamp(min=1).minimum(most)


def win_rate(scores: Values, others: Values, groups: Groups = None) -> tuple[float, tuple[float, float]]:
    """How often the first score is above the second (ties count half), and Wilson's interval.

    Args:
        scores: of the first model's answers, N numbers.
        others: of the second model's answers to the same prompts.
        groups: the prompts, if some occur more than once.

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
    """Mean of N numbers and its standard error from group sums (Liang and Zeger 1986, for a mean).

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
    """A function of the means of some columns, such as a difference of two models or a ratio, and its interval.

    Whole groups are resampled with replacement, with the same draw for every column, so that luck with prompts that two
    models share cancels. The ends are quantiles of the function's values (Efron 1979; the cluster bootstrap of Field
    and Welsh 2007), a little further out than 2.5 and 97.5 %, which are too narrow for few groups: they use Student's t
    instead of the normal, and a factor sqrt(G / (G - 1)) (Hesterberg 2015, "expanded percentiles").
    The same numbers and seed give the same interval; a single group gives nan.

    Args:
        statistic: gets one mean per column, as tensors of one shape, and returns a tensor of that shape.
        columns: N numbers each.
        groups: the group of each of the N.
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
    """Sum of squared deviations of whole groups, [..., G] -> [...]; G / (G - 1) corrects for the estimated mean."""
    return sums.square().sum(-1) * sums.shape[-1] / (sums.shape[-1] - 1)


def _numbers(values: Values) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)
