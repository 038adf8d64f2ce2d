"""Random inputs of many sizes, the same at every call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from minirlhf_course.checks.exercise import Case

F64 = torch.float64

SIZES = ((1, 1), (1, 3), (3, 1), (2, 5), (5, 4), (4, 17))
"""[N, T] of the random cases: one step, one row, more rows than steps and more steps than rows."""


def generators(count: int = len(SIZES)) -> Iterator[torch.Generator]:
    """`count` generators, seeded 0, 1, ..."""
    return (torch.Generator().manual_seed(seed) for seed in range(count))


def random_cases(
    make: Callable[[torch.Generator, tuple[int, int]], tuple[Any, ...]], sizes: Sequence[tuple[int, int]] = SIZES
) -> list[Case]:
    """A case of each size, with the arguments that make(generator, size) draws."""
    seeded = zip(sizes, generators(len(sizes)), strict=True)
    return [Case(f"random, of shape {size}", make(generator, size)) for size, generator in seeded]


def two_logprobs() -> list[Case]:
    """Cases of two policies' log-probabilities."""
    return random_cases(lambda g, size: (-normal(g, *size).abs(), -normal(g, *size).abs()))


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=generator, dtype=dtype)


def flags(generator: torch.Generator, *shape: int, share: float = 0.3) -> Tensor:
    """Booleans, True for about `share` of them."""
    return torch.rand(*shape, generator=generator) < share


def tensor(*rows: object, dtype: torch.dtype = torch.float32) -> Tensor:
    """The rows as a tensor: `tensor([1, 2])` is [1, 2]."""
    return torch.tensor(rows, dtype=dtype)


def bools(*rows: object) -> Tensor:
    """The rows (of 0 and 1) as a bool tensor."""
    return torch.tensor(rows, dtype=torch.bool)


def row(*numbers: object) -> Tensor:
    """The numbers, or rows of them, in float64."""
    return tensor(*numbers, dtype=F64)


def ids(*numbers: object) -> Tensor:
    """The numbers, or rows of them, as int64: tokens, and what else is counted."""
    return tensor(*numbers, dtype=torch.int64)
