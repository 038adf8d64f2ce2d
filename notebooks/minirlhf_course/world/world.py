"""The world itself: its facts, its families of prompts, and how a person answers one."""

from __future__ import annotations

from functools import lru_cache
from random import Random

from minirlhf_course.world.demonstrator import demonstrate
from minirlhf_course.world.facts import Facts
from minirlhf_course.world.families import REGISTRY, Family, Task
from minirlhf_course.world.grammar import Template
from minirlhf_course.world.vocabulary import RAMBLES, heldout_words
from minirlhf_course.world.writer import Writer


class World:
    """A small world whose truth is known.

    Everything is a function of the arguments: the same seed gives the same texts, on every machine.

    Args:
        seed: deals out what each being likes; the rest of the facts never changes.

    Example:
        >>> world = World(seed=0)
        >>> len(world.vocabulary) <= 508
        True
        >>> prompt = world.prompts(1, seed=0)[0]
        >>> world.parse(prompt).prompt == prompt
        True
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.facts = Facts(seed)
        self.families: dict[str, Family] = {kind.name: kind(self.facts) for kind in REGISTRY}
        self._shares = [kind.share for kind in REGISTRY]
        self.parse = lru_cache(maxsize=50_000)(self._parse)

    @property
    def vocabulary(self) -> list[str]:
        """Every word that any text can contain, sorted, the newline included."""
        words = {"\n"}
        for family in self.families.values():
            for template in (*(t for _, t in family.prompt_templates), *family.templates.values()):
                words.update(template.words())
        for text in RAMBLES:
            words.update(Template(text).words())
        return sorted(words - {""})

    def _parse(self, prompt: str) -> Task:
        """The task behind a prompt. Raises ValueError for a text that is no prompt of this world."""
        for family in self.families.values():
            task = family.parse(prompt)
            if task is not None:
                return task
        raise ValueError(f"not a prompt of the small world: {prompt!r}")

    def is_prompt(self, text: str) -> bool:
        """Whether the text is an instruction or question that this world knows."""
        return any(family.parse(text) is not None for family in self.families.values())

    # -- prompts and answers ------------------------------------------------------------------------------------
    def task(self, rng: Random, heldout: bool = False, family: str | None = None) -> Task:
        """One random task of the training (or the held-out) split, of any family or of one."""
        name = family or rng.choices(list(self.families), weights=self._shares)[0]
        while True:
            task = self.families[name].draw(rng)
            if task.heldout == heldout:
                return task

    def prompts(self, n: int, seed: int, heldout: bool = False) -> list[str]:
        """`n` prompts, drawn with the families' shares. The splits never share a prompt."""
        rng = Random(f"prompts {self.seed} {seed} {heldout}")
        return [self.task(rng, heldout).prompt for _ in range(n)]

    def demonstrations(self, n: int, seed: int) -> list[tuple[str, str]]:
        """`n` pairs (prompt, completion) of good but human quality, training split."""
        rng = Random(f"demonstrations {self.seed} {seed}")
        pairs = []
        for _ in range(n):
            task = self.task(rng)
            pairs.append((task.prompt, self.demonstrate(task, Writer(rng))))
        return pairs

    def demonstrate(self, task: Task, writer: Writer) -> str:
        """An answer to a task as this writer gives it. Nobody speaks of the held-out beings in the training split."""
        while True:
            text = demonstrate(self.families[task.family], task, writer)
            if not self.strange(task, text):
                return text

    @staticmethod
    def strange(task: Task, text: str) -> bool:
        """Whether an answer of the training split names a held-out being that its prompt does not name."""
        named = heldout_words().intersection(text.split(" "))
        return not task.heldout and bool(named) and heldout_words().isdisjoint(task.prompt.split(" "))
