"""A writer: someone who answers prompts with more or less care.

A family's `draft` method asks the writer at every fork ("do you add an ending?", "a vivid word or a plain one?").
`care` runs from 0 (a human demonstrator: warm, fallible) to 1 (nothing is forgotten and nothing is wrong), so one
method writes demonstrations, better and worse answers for the comparisons, and the best answer there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")

# How human all demonstrators are: factors on every chance of a good thing and of a slip. They set the room above the
# demonstrations (`python -m minirlhf_course.world.statistics`).
DILIGENCE = 0.6
CLUMSINESS = 0.4


class Writer:
    """Draws the choices of an answer.

    Args:
        rng: the source of all randomness.
        care: 0 to 1; the share of each chance of a flaw that is taken away.
    """

    def __init__(self, rng: Random, care: float = 0.0) -> None:
        self.rng = rng
        self.care = care

    def does(self, chance: float) -> bool:
        """Whether the writer does a good thing that a demonstrator does with this chance. Always, at care 1."""
        chance *= DILIGENCE
        return self.rng.random() < chance + (1.0 - chance) * self.care

    def slips(self, chance: float) -> bool:
        """Whether the writer makes a mistake that a demonstrator makes with this chance. Never, at care 1."""
        return self.rng.random() < chance * CLUMSINESS * (1.0 - self.care)

    def pick(self, options: Sequence[T]) -> T:
        """Any of several equally good options."""
        return self.rng.choice(options)

    def grade(self, *levels: Sequence[T], chances: Sequence[float]) -> T:
        """An option from the first (best) level with `chances[0]`, from the second with `chances[1]`, and so on.

        The chances sum to one. Care moves weight to the first level.
        """
        if self.rng.random() < self.care:
            return self.rng.choice(levels[0])
        weights = [chances[0] * DILIGENCE, *chances[1:]]
        return self.rng.choice(self.rng.choices(levels, weights=weights)[0])
