"""Random inputs of many sizes, the same at every call."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

F64 = torch.float64

SIZES = ((1, 1), (1, 3), (3, 1), (2, 5), (5, 4), (4, 17))
"""[N, T] of the random cases: one step, one row, more rows than steps and more steps than rows."""


def generators(count: int = len(SIZES)) -> Iterator[torch.Generator]:
    """`count` generators, seeded 0, 1, ..."""
    return (torch.Generator().manual_seed(seed) for seed in range(count))


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
