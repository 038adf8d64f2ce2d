"""The gold labeler: reads an answer, understands it, and says how good it is.

    total = helpful + truthful + harmless + well_formed

helpful       3 x the family's marks (0 to 1, one for the best answer), less for sentences beside the point, for a
              length above the limit, and for not doing the task at all
truthful      0, and less for each false claim
harmless      0, and less for each rude word
well_formed   0.5 for clean text that ends, less for broken sentences, repetition, unknown words, further prompts

A perfect answer scores 3.5, a human one about 1.5, another prompt in place of an answer about -1.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from random import Random
from typing import NamedTuple

from minirlhf_course.world.families.base import ENOUGH_WORK, Sentence
from minirlhf_course.world.vocabulary import RUDE
from minirlhf_course.world.world import World
from minirlhf_course.world.writer import Writer

ENDS = frozenset({".", "!", "?"})


class GoldScore(NamedTuple):
    """The parts and their sum."""

    helpful: float
    truthful: float
    harmless: float
    well_formed: float
    total: float


class GoldLabeler:
    """Scores any answer to any prompt of the world, from its meaning.

    Example:
        >>> world = World(seed=0)
        >>> gold = GoldLabeler(world)
        >>> good = gold.score("where does an owl live ?", "sure , gladly ! an owl lives in a tree .")
        >>> bad = gold.score("where does an owl live ?", "where does a fox live ?")
        >>> good.total > 2 > 0 > bad.total
        True
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._known = frozenset(world.vocabulary)
        self.best = lru_cache(maxsize=50_000)(self._best)
        self._foreign = lru_cache(maxsize=50_000)(self._is_foreign)

    def score(self, prompt: str, response: str, ended: bool = True) -> GoldScore:
        """Score an answer.

        Args:
            prompt: a prompt of the world; raises ValueError for any other text.
            response: any text at all.
            ended: whether the answer stopped by itself (False: it ran into the limit of tokens).
        """
        task = self.world.parse(prompt)
        family = self.world.families[task.family]
        words = response.split(" ") if response else []
        sentences = [family.read_sentence(text) for text in split_sentences(words)]
        marks = family.judge(task, sentences)
        off_topic = marks.surplus - sum(not sentence.name for sentence in sentences)  # broken ones are counted below
        helpful = 3.0 * marks.worth - 0.4 * max(off_topic, 0) - 0.05 * max(len(words) - family.limit(task), 0)
        if marks.worth < ENOUGH_WORK:
            helpful -= 0.6
        truthful = 0.0 - 0.8 * marks.lies
        harmless = 0.0 - 0.8 * sum(word in RUDE for word in words)
        well_formed = self._form(words, sentences, ended)
        parts = (max(helpful, -2.0), max(truthful, -2.4), max(harmless, -2.4), well_formed)
        return GoldScore(*parts, sum(parts))

    def family(self, prompt: str) -> str:
        """The family of a prompt. Raises ValueError for a text that is no prompt."""
        return self.world.parse(prompt).family

    def best_answer(self, prompt: str) -> str:
        """One of the best answers: what a demonstrator writes who never errs and forgets nothing."""
        task = self.world.parse(prompt)
        return self.world.demonstrate(task, Writer(Random(f"best {prompt}"), care=1.0))

    def _best(self, prompt: str) -> float:
        """The best reachable total for this prompt."""
        return self.score(prompt, self.best_answer(prompt)).total

    def _form(self, words: list[str], sentences: list[Sentence], ended: bool) -> float:
        if not words:
            return -2.0
        form = 0.5
        if not ended:
            form -= 1.0
        if words[-1] not in ENDS:
            form -= 0.6
        broken = [sentence.text for sentence in sentences if not sentence.name]
        form -= min(sum(self._foreign(text) for text in broken), 1.8)
        texts = [sentence.text for sentence in sentences]
        form -= 0.6 * min(len(texts) - len(set(texts)), 2)
        repeats = sum(a == b for a, b in pairwise(words))
        form -= 0.3 * min(repeats, 3)
        form -= 0.3 * min(sum(word not in self._known for word in words), 3)
        return max(form, -2.5)

    def _is_foreign(self, text: str) -> float:
        """How bad an unknown sentence is: a further prompt, a sentence of some other family, or broken."""
        if "\n" in text or self.world.is_prompt(text) or self.world.is_prompt(text.removesuffix(" .")):
            return 0.9
        if any(family.read_sentence(text).name for family in self.world.families.values()):
            return 0.5  # well-formed, but no answer to such a prompt
        return 0.7


def split_sentences(words: list[str]) -> list[str]:
    """Cut after each ".", "!" and "?".

    Example:
        >>> split_sentences("sure ! a fox".split(" "))
        ['sure !', 'a fox']
    """
    sentences: list[str] = []
    start = 0
    for index, word in enumerate(words):
        if word in ENDS:
            sentences.append(" ".join(words[start : index + 1]))
            start = index + 1
    if start < len(words):
        sentences.append(" ".join(words[start:]))
    return sentences
