"""Lesson 07's cases."""

from __future__ import annotations

import torch

from minirlhf_course.checks.cases import bools, flags, generators, ids, normal, tensor
from minirlhf_course.checks.exercise import Case

# 7.1 -----------------------------------------------------------------------------------------------------------------


def mask_cases() -> list[Case]:
    one = ids([7, 8, 9, 1]), ids(2), 0
    two = ids([7, 9, 1, 0], [7, 8, 9, 1]), ids(1, 2), 0
    other = ids([7, 0, 1, 9]), ids(1), 9
    cases = [
        Case("one row: 7 8 ask, 9 answers, 1 is EOS, 0 would be padding", one, bools([0, 0, 1, 1])),
        Case("two rows, the first one shorter", two, bools([0, 1, 1, 0], [0, 0, 1, 1])),
        Case("7 asks, 0 answers, 1 is EOS, 9 is padding", other, bools([0, 1, 1, 0])),
    ]
    for (rows, width), generator in zip(((1, 5), (3, 7), (6, 12)), generators(3), strict=True):
        tokens = torch.randint(2, 20, (rows, width), generator=generator)
        starts = torch.randint(1, width - 2, (rows,), generator=generator)
        room = torch.rand(rows, generator=generator)
        lengths = starts + 2 + ((width - starts - 1) * room).long()
        columns = torch.arange(width)
        tokens[columns >= lengths[:, None]] = 0
        tokens[columns == lengths[:, None] - 1] = 1
        cases.append(Case(f"random, {rows} rows of {width} tokens", (tokens, starts, 0)))
    return cases


# 7.2 -----------------------------------------------------------------------------------------------------------------


def shift_cases() -> list[Case]:
    log = torch.log
    # After token 0 the model says (1/4, 3/4), after token 1 (1/2, 1/2): their logarithms, and 1/2 added to all of them,
    # which changes no probability.
    known = (log(tensor([0.25, 0.75], [0.5, 0.5])) + 0.5).unsqueeze(0)
    steep = tensor([0.0, 200.0, 0.0], [0.0, 0.0, 0.0]).unsqueeze(0)
    cases = [
        Case("two tokens, two words", (known, ids([0, 1])), log(tensor([0.75]))),
        Case("a token that is all but impossible", (steep, ids([1, 0])), tensor([-200.0])),
    ]
    for (rows, length, words), generator in zip(((1, 3, 4), (2, 5, 3), (3, 8, 11)), generators(3), strict=True):
        tokens = torch.randint(0, words, (rows, length), generator=generator)
        cases.append(
            Case(f"random, {rows} x {length} tokens of {words}", (normal(generator, rows, length, words), tokens))
        )
    return cases  # fmt: skip


# 7.3 -----------------------------------------------------------------------------------------------------------------


def loss_cases() -> list[Case]:
    cases = [
        Case("a prompt's token, and two that count", (tensor([-9, -1, -3]), bools([0, 1, 1])), tensor(2)[0]),
        Case("rows of one and of three tokens", (tensor([-8, -5, -5], [-1, -2, -3]), bools([1, 0, 0], [1, 1, 1])),
             tensor(3.5)[0]),
        Case("padding that holds NaN", (tensor([-4, -2, torch.nan]), bools([1, 1, 0])), tensor(3)[0]),
    ]  # fmt: skip
    for (rows, columns), generator in zip(((1, 4), (2, 5), (5, 9)), generators(3), strict=True):
        mask = flags(generator, rows, columns, share=0.5)
        mask[0, 0] = True
        logprobs = -normal(generator, rows, columns).exp()
        cases.append(Case(f"random, of shape {rows, columns}", (logprobs, mask)))
    return cases


# 7.5 -----------------------------------------------------------------------------------------------------------------


def micro_cases() -> list[Case]:
    cases = [
        Case("rows of one and of three tokens, one row at a time",
             (tensor([-8, -5, -5], [-1, -2, -3]), bools([1, 0, 0], [1, 1, 1]), 1), tensor(2.0, 1.5)),
        Case("three rows, two at a time", (tensor([-6, 0], [-3, -3], [-2, 0]), bools([1, 0], [1, 1], [1, 0]), 2),
             tensor(3.0, 0.5)),
    ]  # fmt: skip
    for (rows, columns, size), generator in zip(((4, 3, 2), (5, 6, 2), (7, 4, 3)), generators(3), strict=True):
        lengths = torch.randint(1, columns + 1, (rows, 1), generator=generator)
        logprobs = -normal(generator, rows, columns).exp()
        case = logprobs, torch.arange(columns) < lengths, size
        cases.append(Case(f"random, {rows} rows, {size} at a time", case))
    return cases


# 7.6 -----------------------------------------------------------------------------------------------------------------


def perplexity_cases() -> list[Case]:
    half, third = torch.tensor(0.5).log(), torch.tensor(1 / 3).log()
    cases = [
        Case("a coin at each token", (torch.stack((half, half))[None], bools([1, 1])), tensor(2)[0]),
        Case("a die of 3 and padding", (torch.stack((third, third, half))[None], bools([1, 1, 0])), tensor(3)[0]),
    ]
    for (rows, columns), generator in zip(((2, 3), (3, 6), (5, 4)), generators(3), strict=True):
        lengths = torch.randint(1, columns + 1, (rows, 1), generator=generator)
        mask = torch.arange(columns) < lengths
        cases.append(Case(f"random, of shape {rows, columns}", (-normal(generator, rows, columns).exp(), mask)))
    return cases
