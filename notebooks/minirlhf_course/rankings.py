"""Rankings in lesson 08: as pairs, beside another labeler's, the reader's own, and how far two judges agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minirlhf.data import Comparison, read_rankings
from minirlhf.intervals import win_rate
from minirlhf.labeling import Item
from minirlhf.language.evaluation import ordered_pairs

Answers = tuple[str, tuple[str, ...]]
"""A prompt and the answers that were ranked."""


def single_comparisons(rows: Sequence[Comparison]) -> list[Comparison]:
    """Every pair of every ranking as a ranking of its own, the better answer first; ties make none.

    >>> rows = [Comparison("hi", ("a", "b", "c"), (2.0, 1.0, 2.0))]
    >>> [row.responses for row in single_comparisons(rows)]
    [('a', 'b'), ('c', 'b')]
    """
    return [
        Comparison(row.prompt, (row.responses[i], row.responses[j]), (1.0, 0.0))
        for row in rows
        for i, j in permutations(range(len(row.responses)), 2)
        if row.scores[i] > row.scores[j]
    ]


def side_by_side(rows: Sequence[Comparison], *others: Mapping[Answers, Sequence[float]]) -> list[Tensor]:
    """All pairs of all rankings as rows of two: [pairs, 2] of each row's own scores, then of each of the others'."""
    tables = ({(row.prompt, row.responses): row.scores for row in rows}, *others)
    return [
        torch.tensor(
            [
                (scores[i], scores[j])
                for row in rows
                for scores in [table[row.prompt, row.responses]]
                for i, j in combinations(range(len(scores)), 2)
            ]
        )
        for table in tables
    ]


def shortest_first(item: Item) -> Comparison:
    """What a labeler with one clear taste says: the fewer words, the better.

    >>> shortest_first(Item("hi", ("well met", "hello"))).scores
    (-2.0, -1.0)
    """
    return Comparison(item.prompt, item.responses, tuple(-float(len(text.split())) for text in item.responses))


def ranked_by(name: str, file: Path, items: Sequence[Item]) -> list[Comparison]:
    """The rankings of these items that a labeler has written to a file; none where there is no file."""
    written = read_rankings(file) if file.is_file() and file.stat().st_size else []
    by_item = {Item(row.prompt, row.responses): row for row in written if row.labeler == name}
    return [by_item[item] for item in items if item in by_item]


def agreement(rows: Sequence[Comparison], scored: Sequence[Sequence[float]]) -> tuple[float, str]:
    """The share of the pairs that somebody's scores order as the rankings do, and the share with its 95 % interval.

    A pair that the other scores alike counts half. The interval knows that pairs of one prompt share their answers.
    """
    pairs = ordered_pairs(rows, scored)
    right = (pairs.reward > 0).double() + (pairs.reward == 0).double() / 2
    share, (low, high) = win_rate(right.tolist(), [0.5] * len(right), pairs.prompts)
    return share, f"{share:4.0%}  [{low:.0%}, {high:.0%}]"


def looked_up(rows: Sequence[Comparison], scored: Sequence[Sequence[float]]) -> Callable[[Any, Any], list[float]]:
    """A reward function for answers that were scored before: (prompts, responses) -> their scores.

    >>> looked_up([Comparison("hi", ("a", "b"), (1.0, 2.0))], [[0.5, 0.25]])(["hi"], ["b"])
    [0.25]
    """
    pairs = zip(rows, scored, strict=True)
    table = {(row.prompt, text): score for row, each in pairs for text, score in zip(row.responses, each, strict=True)}
    return lambda prompts, responses: [table[pair] for pair in zip(prompts, responses, strict=True)]
