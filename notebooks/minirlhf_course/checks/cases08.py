"""Lesson 08's cases."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf_course.checks.cases import F64, bools, flags, generators, ids, normal, tensor
from minirlhf_course.checks.exercise import Case

# 8.1 -----------------------------------------------------------------------------------------------------------------


def pair_cases() -> list[Case]:
    cases = [
        Case("two answers that score the same", (tensor(1), tensor(1)), tensor(math.log(2))[0]),
        Case("the better one ahead by ln 3: sigmoid is 3/4", (tensor(3).log(), tensor(0)), tensor(4 / 3).log()[0]),
        Case("both score 200", (tensor(200), tensor(200)), tensor(math.log(2))[0]),
        Case("the better one behind by 200", (tensor(0), tensor(200)), tensor(200.0)[0]),
        Case("the better one ahead by 20", (tensor(20), tensor(0)), tensor(20).neg().exp()[0]),
        Case("two pairs", (tensor(0, 3).exp().log(), tensor(0, 3)), tensor(math.log(2))[0]),
    ]
    for size, generator in zip((2, 3, 5, 17), generators(4), strict=True):
        cases.append(Case(f"random, {size} pairs", (2 * normal(generator, size), 2 * normal(generator, size))))
    return cases


# 8.2 -----------------------------------------------------------------------------------------------------------------


def ranking_cases() -> list[Case]:
    ln2 = math.log(2)
    cases = [
        Case("two answers, the second is the better one", (tensor([0, 0]), tensor([1, 2])), tensor(ln2)[0]),
        Case(
            "three answers, three pairs",
            (tensor([2, 1, 0]), tensor([3, 2, 1])),
            (2 * F.softplus(tensor(-1)) + F.softplus(tensor(-2)))[0] / 3,
        ),
        Case("three answers, the last two are tied", (tensor([1, 0, 0]), tensor([3, 1, 1])), F.softplus(tensor(-1))[0]),
        Case("the best answer is not the first", (tensor([0, 2]), tensor([1, 5])), F.softplus(tensor(-2))[0]),
        Case("far apart, and wrong", (tensor([0, 200]), tensor([2, 1])), tensor(200.0)[0]),
        Case(
            "two prompts, the second with a tie",
            (tensor([0, 0, 0], [0, 3, 3]), tensor([1, 2, 3], [0, 1, 1])),
            (ln2 + F.softplus(tensor(-3)))[0] / 2,
        ),
        Case(
            "two prompts, the second all tied",
            (tensor([0, 0, 0], [1, 2, 3]), tensor([1, 2, 3], [1, 1, 1])),
            tensor(ln2)[0],
        ),
    ]
    for (rows, k), generator in zip(((1, 4), (3, 2), (4, 5), (6, 9)), generators(4), strict=True):
        rewards, scores = 2 * normal(generator, rows, k), (2 * normal(generator, rows, k)).round()
        scores[:, 0] = 9.0  # no row is all tied
        cases.append(Case(f"random, {rows} prompts with {k} answers, some tied", (rewards, scores)))
    return cases


# 8.3 -----------------------------------------------------------------------------------------------------------------


def usable_cases() -> list[Case]:
    cases = [
        Case(
            "two answers, the second is better",
            (ids([[5, 6], [5, 7]]), tensor([1, 2])),
            bools([[0, 0], [1, 0]]),
        ),
        Case("tied", (ids([[5, 6], [5, 7]]), tensor([1, 1])), bools([[0, 0], [0, 0]])),
        Case(
            "alike after truncation, and scored apart",
            (ids([[5, 6], [5, 6]]), tensor([1, 2])),
            bools([[0, 0], [0, 0]]),
        ),
        Case(
            "three texts with the same sum, two of which have the same tokens",
            (ids([[4, 7], [7, 4], [5, 6]]), tensor([3, 2, 1])),
            bools([[0, 1, 1], [0, 0, 1], [0, 0, 0]]),
        ),
        Case("different in the first token alone", (ids([[4, 6], [5, 6]]), tensor([2, 1])), bools([[0, 1], [0, 0]])),
        Case(
            "one is the beginning of the other (0 is padding)",
            (ids([[5, 6, 0], [5, 6, 7]]), tensor([2, 1])),
            bools([[0, 1], [0, 0]]),
        ),
    ]
    for (rows, k, width), generator in zip(((2, 3, 2), (3, 4, 3), (4, 6, 3)), generators(3), strict=True):
        tokens = torch.randint(3, 5, (rows, k, width), generator=generator)
        scores = (2 * normal(generator, rows, k)).round()
        cases.append(Case(f"random, {rows} prompts with {k} answers", (tokens, scores)))
    return cases


# 8.4 -----------------------------------------------------------------------------------------------------------------


def last_cases() -> list[Case]:
    nan = torch.nan
    cases = [
        Case("no padding", (tensor([1, 2, 3]), bools([1, 1, 1])), tensor(3.0)),
        Case("padding on the right", (tensor([1, 2, nan]), bools([1, 1, 0])), tensor(2.0)),
        Case("padding on the left", (tensor([nan, 2, 3]), bools([0, 1, 1])), tensor(3.0)),
        Case("padding on both sides", (tensor([nan, 2, 3, nan]), bools([0, 1, 1, 0])), tensor(3.0)),
        Case("a single token", (tensor([nan, 2, nan]), bools([0, 1, 0])), tensor(2.0)),
        Case(
            "two answers of unlike length",
            (tensor([1, 2, 3], [4, nan, nan]), bools([1, 1, 1], [1, 0, 0])),
            tensor(3.0, 4.0),
        ),
    ]
    for (rows, columns), generator in zip(((3, 4), (5, 9), (2, 17)), generators(3), strict=True):
        values = normal(generator, rows, columns)
        left = torch.randint(0, columns // 2, (rows, 1), generator=generator)
        right = torch.randint(columns // 2, columns, (rows, 1), generator=generator)
        place = torch.arange(columns)
        mask = (place >= left) & (place <= right)
        values = torch.where(mask | flags(generator, rows, columns, share=0.5), values, nan)
        cases.append(Case(f"random, of shape {(rows, columns)}, padded on both sides", (values, mask)))
    return cases


# 8.5 -----------------------------------------------------------------------------------------------------------------


def ceiling_cases() -> list[Case]:
    def both(agreement: float, ceiling: float) -> tuple[Tensor, Tensor]:
        return torch.tensor(agreement, dtype=F64), torch.tensor(ceiling, dtype=F64)

    def rows(*scores: object) -> Tensor:
        return tensor(*scores, dtype=F64)

    ladder = rows([1, 2, 3, 4, 5])
    # One neighbour swapped: 9 of 10 pairs agree. Two swaps of neighbours and one more: 8, 7.
    cases = [
        Case("they agree on everything", (rows([1, 2, 3]), rows([10, 20, 30])), both(1.0, 1.0)),
        Case("one pair of ten the other way", (ladder, rows([2, 1, 3, 4, 5])), both(0.9, (1 + 0.8**0.5) / 2)),
        Case("a tie of the first, one of the second", (rows([1, 1, 2]), rows([1, 2, 2])), both(1.0, 1.0)),
        Case("they agree by chance", (rows([1, 2], [1, 2]), rows([1, 2], [2, 1])), both(0.5, 0.5)),
        Case("they disagree on everything", (rows([1, 2]), rows([2, 1])), both(0.0, 0.5)),
        Case(
            "two prompts, one has fewer pairs",
            (rows([1, 2, 3], [1, 1, 2]), rows([1, 2, 3], [1, 1, 0])),
            both(3 / 5, (1 + 0.2**0.5) / 2),
        ),
    ]
    for (count, k), generator in zip(((4, 4), (8, 6), (20, 9)), generators(3), strict=True):
        truth = normal(generator, count, k)
        one, two = truth + 0.5 * normal(generator, count, k), truth + 0.5 * normal(generator, count, k)
        cases.append(Case(f"random, {count} prompts with {k} answers", (one.round(), two.round())))
    return cases


# 8.6 -----------------------------------------------------------------------------------------------------------------


def first_token(rows: Tensor) -> Tensor:
    """A model for the cases: the score of a row is its first number."""
    return rows[:, 0]


def row_mean(rows: Tensor) -> Tensor:
    """Another one: the mean of the row."""
    return rows.mean(1)


def offset_cases() -> list[Case]:
    model: Callable[[Tensor], Tensor] = first_token
    cases = [
        Case("one row", (model, tensor([3]), 4), tensor(3.0)[0]),
        Case("two batches of one row", (model, tensor([1], [3]), 1), tensor(2.0)[0]),
        Case("two rows, of which the model reads the first number", (model, tensor([1, 9], [3, 5]), 2), tensor(2.0)[0]),
        Case("a batch of two, a batch of one", (model, tensor([1], [2], [6]), 2), tensor(3.0)[0]),
        Case("two batches of two", (model, tensor([1], [2], [6], [7]), 2), tensor(4.0)[0]),
    ]
    for (rows, width, size), generator in zip(((5, 2, 2), (7, 3, 3), (10, 4, 4)), generators(3), strict=True):
        cases.append(
            Case(f"random, {rows} rows in batches of {size}", (row_mean, normal(generator, rows, width), size))
        )
    return cases
