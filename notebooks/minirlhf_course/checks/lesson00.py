"""Lesson 00: one toy exercise, to see how the checks talk."""

from __future__ import annotations

from torch import Tensor

from minirlhf import returns
from minirlhf_course.checks.cases import SIZES, bools, flags, generators, normal, tensor
from minirlhf_course.checks.exercise import Case, exercise

NAN = float("nan")


def _cases() -> list[Case]:
    cases = [
        Case("everything counts", (tensor(1, 3), bools(1, 1)), tensor(2.0)[0]),
        Case("the last number doesn't count", (tensor(1, 3, 50), bools(1, 1, 0)), tensor(2.0)[0]),
        Case("what doesn't count is NaN", (tensor(1, 3, NAN), bools(1, 1, 0)), tensor(2.0)[0]),
        Case("two rows", (tensor([1, 3, 50], [5, 50, 50]), bools([1, 1, 0], [1, 0, 0])), tensor(3.0)[0]),
    ]
    for size, generator in zip(SIZES, generators(), strict=True):
        mask = flags(generator, *size, share=0.6)
        mask[0, 0] = True
        cases.append(Case(f"random, of shape {size}", (normal(generator, *size), mask)))
    return cases


@exercise(
    "0.1",
    "the mean of what counts",
    difficulty=1,
    minutes=3,
    task="Answers have different lengths, so every mean in this course takes a **mask**: True for what counts. "
    "Write that mean. Try a wrong version first, for instance `x.mean()`, and see what the check says.",
    cases=_cases,
    suspects={
        "It averages over everything: divide the sum of what counts by how many count, mask.sum().": (
            lambda x, mask: x.mean()
        ),
        "The sum is right, the count is not: divide by mask.sum(), not by the size of x.": (
            lambda x, mask: x.where(mask, 0).mean()
        ),
        "0 * NaN is NaN: choose with torch.where(mask, x, 0) or x[mask] instead of multiplying by the mask.": (
            lambda x, mask: (x * mask).sum() / mask.sum()
        ),
        "The mask is read the wrong way round: True is what counts.": (
            lambda x, mask: x.where(~mask, 0).sum() / (~mask).sum()
        ),
        "This is the sum: divide by how many count, mask.sum().": lambda x, mask: x.where(mask, 0).sum(),
        "It averages row by row first, so that short rows weigh too much: one sum, one count.": (
            lambda x, mask: (x.where(mask, 0).sum(-1) / mask.sum(-1)).nanmean()
        ),
    },
    hints=(
        "Two numbers: the sum of what counts, and how many count.",
        "`x[mask]` holds just what counts, in one row. It has a `.mean()`.",
    ),
)
def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of x where mask is True. x and mask have one shape; what lies elsewhere may even be NaN."""
    return returns.masked_mean(x, mask)
