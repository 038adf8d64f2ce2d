"""The stored results of long runs: a table of data/results, its columns by seed, and what the seeds say together."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

RESULTS = Path(__file__).resolve().parents[2] / "data" / "results"
STUDENT = {3: 4.303, 5: 2.776}
"""How many standard errors a 95 % interval has to either side, by the number of seeds (Student's t)."""

Row = dict[str, str]
Numbers = dict[str, float | str]


def read_results(name: str) -> list[Row]:
    """The rows of a table; prints the machine and the command that made it, from the table's first line."""
    with (RESULTS / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        print(f"{name}: {file.readline().removeprefix('#').strip()}")
        return list(csv.DictReader(file))


def by_seed(rows: Sequence[Row], columns: Sequence[str]) -> dict[str, Tensor]:
    """Columns of a table as numbers, [seeds, rows of each seed]; NaN where a cell is empty.

    Example:
        >>> rows = [{"seed": "1", "gold": "2"}, {"seed": "0", "gold": "3"}, {"seed": "1", "gold": ""}]
        >>> by_seed(rows[:2], ["gold"])
        {'gold': tensor([[3.],
                [2.]], dtype=torch.float64)}
    """
    seeds = sorted({int(row["seed"]) for row in rows})
    of = [[row for row in rows if int(row["seed"]) == seed] for seed in seeds]
    return {
        name: torch.tensor([[float(row[name] or "nan") for row in part] for part in of], dtype=torch.float64)
        for name in columns
    }


class Interval(NamedTuple):
    """A mean over seeds and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


def over_seeds(values: Tensor) -> Interval:
    """The mean of three or five seeds, with Student's interval: so few of them are noisy about their own spread too.

    Example:
        >>> [round(x, 2) for x in over_seeds(torch.tensor([1.0, 2.0, 3.0]))]
        [2.0, -0.48, 4.48]
    """
    half = STUDENT[len(values)] * float(values.std()) / math.sqrt(len(values))
    mean = float(values.mean())
    return Interval(mean, mean - half, mean + half)


def read_numbers(path: Path) -> list[Numbers]:
    """The rows of a table, numbers as numbers and empty places as NaN; prints its first line, which says what it is."""
    with open(path, encoding="utf-8") as file:
        print(file.readline().strip("# \n").replace("; ", "\n"))
        return [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def grouped(rows: Sequence[Numbers], key: str, value: str) -> tuple[list[float], Tensor]:
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
