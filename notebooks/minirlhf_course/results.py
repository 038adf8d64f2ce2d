"""Results that a benchmark has written to data/results, for lessons that draw them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

Row = dict[str, float | str]


def read_results(path: Path) -> list[Row]:
    """The rows of a table, numbers as numbers and empty places as NaN; prints its first line, which says what it is."""
    with open(path, encoding="utf-8") as file:
        print(file.readline().strip("# \n").replace("; ", "\n"))
        return [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def grouped(rows: Sequence[Row], key: str, value: str) -> tuple[list[float], Tensor]:
    """The sorted values of `key`, and for each a row of `value`, one number per seed: [values of the key, seeds].

    >>> grouped([{"size": 2.0, "gold": 0.5}, {"size": 1.0, "gold": 0.25}], "size", "gold")
    ([1.0, 2.0], tensor([[0.2500],
            [0.5000]]))
    """
    at = sorted({row[key] for row in rows})
    return at, torch.tensor([[row[value] for row in rows if row[key] == x] for x in at])  # type: ignore[return-value]


def _value(text: str) -> float | str:
    try:
        return float(text or "nan")
    except ValueError:
        return text
