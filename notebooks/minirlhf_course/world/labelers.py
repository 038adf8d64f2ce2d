"""Simulated labelers: they see gold through a bias of their own and through noise.

Two of them agree on 72 to 77 % of the pairs of answers, as InstructGPT's labelers did (72.6 %).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from minirlhf_course.world.gold import GoldLabeler
from minirlhf_course.world.world import World

NOISE = 1.0  # standard deviation, in units of gold
_POLITE = frozenset({"please", "thank", "sure", "friend", "majesty", "hope"})


@dataclass(frozen=True)
class SimulatedLabeler:
    """A labeler with a character.

    Attributes:
        helpful, truthful, harmless, well_formed: weights of gold's parts (1 = as gold).
        length: liking for each word of the answer, up to 40.
        polite: liking for the first two polite words.
        noise: standard deviation of what changes from one look to the next.
    """

    name: str
    gold: GoldLabeler
    helpful: float = 1.0
    truthful: float = 1.0
    harmless: float = 1.0
    well_formed: float = 1.0
    length: float = 0.0
    polite: float = 0.0
    noise: float = NOISE

    def score(self, prompt: str, response: str, generator: Random) -> float:
        """What the labeler gives this answer now: noisy, rounded to 0.01. Draws one number from `generator`."""
        gold = self.gold.score(prompt, response)
        words = response.split(" ")
        seen = (
            self.helpful * gold.helpful
            + self.truthful * gold.truthful
            + self.harmless * gold.harmless
            + self.well_formed * gold.well_formed
            + self.length * min(len(words), 40)
            + self.polite * min(sum(word in _POLITE for word in words), 2)
        )
        return round(seen + generator.gauss(0.0, self.noise), 2)

    def rank(self, prompt: str, responses: Iterable[str], generator: Random) -> dict[str, Any]:
        """One row of comparisons: what this labeler gives each answer now."""
        answers = list(responses)
        scores = [self.score(prompt, answer, generator) for answer in answers]
        return {"prompt": prompt, "responses": answers, "scores": scores, "labeler": self.name}


CHARACTERS: dict[str, Mapping[str, float]] = {
    "anna": {},  # sees what gold sees
    "bo": {"length": 0.02},  # likes long answers
    "chidi": {"truthful": 0.2},  # forgives wrong facts
    "dina": {"polite": 0.3},  # loves politeness
    "emil": {"harmless": 2.0},  # cannot stand rude words
    "fay": {"well_formed": 1.4, "length": -0.015},  # a stern teacher: short and clean
}
HELDOUT_CHARACTERS: dict[str, Mapping[str, float]] = {
    "gus": {"length": 0.02, "truthful": 0.5},
    "hana": {"truthful": 1.6, "polite": 0.15},
    "ivo": {"harmless": 0.5, "well_formed": 1.3},
}


def make_labelers(world: World, heldout: bool = False) -> list[SimulatedLabeler]:
    """The labelers of the training comparisons, or those who are held out."""
    gold = GoldLabeler(world)
    characters = HELDOUT_CHARACTERS if heldout else CHARACTERS
    return [SimulatedLabeler(name, gold, **character) for name, character in characters.items()]
