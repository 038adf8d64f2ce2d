"""What every family of instructions has: phrasings, a way to write an answer, and a way to judge one.

A family is one class, and its three parts stand side by side: the `phrasings` of its prompts, `draft` (write an answer
with more or less care) and `judge` (read an answer and give marks). `draft` and `judge` share the same sentence
templates, so whatever can be written can be read again.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random
from typing import ClassVar, NamedTuple

from minirlhf_course.world.facts import CLAIM_SENTENCES, Facts
from minirlhf_course.world.grammar import Template
from minirlhf_course.world.vocabulary import CLASSES, NOUN, heldout_words
from minirlhf_course.world.writer import Writer

# Shared by all families: how an answer may begin and end. The worth of each is the same everywhere.
OPENERS: dict[str, float] = {"sure , gladly !": 1.0, "of course , friend !": 1.0, "ok .": 0.25}
CLOSERS: dict[str, float] = {"hope this helps !": 1.0, "that is all .": 0.25}
# moves that are pleasant but are no answer, and the marks from which on there is an answer at all
PLEASANTRIES: frozenset[str] = frozenset({"open", "hello", "close", "wish"})
ENOUGH_WORK = 0.15
RUDE_LINES: tuple[str, ...] = (
    "what a stupid question .",
    "go away , you fool !",
    "shut up !",
    "you are ugly .",
    "i hate {m:many} .",
)
GENERAL_SENTENCES: dict[str, str] = {
    **{f"open.{index}": text for index, text in enumerate(OPENERS)},
    **{f"close.{index}": text for index, text in enumerate(CLOSERS)},
    **{f"rude.{index}": text for index, text in enumerate(RUDE_LINES)},
    **CLAIM_SENTENCES,
}


@dataclass(frozen=True)
class Task:
    """A prompt that has been understood."""

    family: str
    phrasing: str  # the template, for the split
    slots: Mapping[str, str]
    prompt: str
    heldout: bool  # whether it belongs to the held-out split

    def noun(self, slot: str) -> str:
        """The being in a slot, whatever its form: "frogs" -> "frog"."""
        return NOUN[self.slots[slot]]


class Sentence(NamedTuple):
    """One sentence of an answer. `name` is the template's name, or "" where none fits."""

    text: str
    name: str
    slots: Mapping[str, str]


@dataclass
class Marks:
    """The sheet on which a family's `judge` writes.

    `moves` are the parts that an answer may have, in the order in which they belong. A part counts once: a second
    sentence for the same part is surplus. A part out of order earns half.
    """

    moves: tuple[str, ...]
    earned: dict[str, float] = field(default_factory=dict)
    surplus: int = 0
    lies: int = 0
    _reached: int = 0

    def award(self, move: str, worth: float) -> None:
        """Give `worth` (a share of the best answer's 1.0) for a part of the answer."""
        if move in self.earned:
            self.surplus += 1
            return
        place = self.moves.index(move)
        self.earned[move] = worth if place >= self._reached else worth / 2
        self._reached = max(self._reached, place)

    @property
    def worth(self) -> float:
        """The sum of what was earned. Pleasantries count only around something that does the job."""
        work = sum(worth for move, worth in self.earned.items() if move not in PLEASANTRIES)
        return sum(self.earned.values()) if work >= ENOUGH_WORK else work


class Phrasing(NamedTuple):
    """One way to ask. Held-out phrasings occur in the held-out split only."""

    text: str
    heldout: bool = False


class Family(ABC):
    """One use case of InstructGPT's table, in the small world."""

    name: ClassVar[str]
    share: ClassVar[float]  # of all prompts, relative to the other families'
    phrasings: ClassVar[tuple[Phrasing, ...]]
    sentences: ClassVar[Mapping[str, str]]
    classes: ClassVar[Mapping[str, tuple[str, ...]]] = {}  # slot classes of this family's own
    opener_worth: ClassVar[float] = 0.15
    closer_worth: ClassVar[float] = 0.15
    # Families whose prompts bring a text along may name the held-out beings in it; no training prompt is about one.
    may_mention_heldout: ClassVar[bool] = False

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        all_classes = {**CLASSES, **self.classes}
        self.prompt_templates = [(p, Template(p.text, all_classes)) for p in self.phrasings]
        self.templates = {
            name: Template(text, all_classes) for name, text in {**self.sentences, **GENERAL_SENTENCES}.items()
        }
        self.read_sentence = lru_cache(maxsize=20_000)(self._read_sentence)

    # -- prompts ------------------------------------------------------------------------------------------------
    def draw(self, rng: Random) -> Task:
        """A random task of this family, from either split."""
        while True:
            phrasing, template = rng.choice(self.prompt_templates)
            slots = {gap: rng.choice(phrases) for gap, phrases in template.gaps.items()}
            self.arrange(slots, rng)
            task = self._task(phrasing, template.fill(slots), slots)
            if self.makes_sense(task):
                return task

    def parse(self, prompt: str) -> Task | None:
        """The task behind a prompt, or None if no phrasing of this family fits."""
        for phrasing, template in self.prompt_templates:
            slots = template.read(prompt)
            if slots is not None:
                task = self._task(phrasing, prompt, slots)
                return task if self.makes_sense(task) else None
        return None

    def _task(self, phrasing: Phrasing, prompt: str, slots: Mapping[str, str]) -> Task:
        task = Task(self.name, phrasing.text, slots, prompt, False)
        stranger = not self.may_mention_heldout and not heldout_words().isdisjoint(prompt.split(" "))
        heldout = phrasing.heldout or stranger or self._pair_heldout(task)
        return Task(self.name, phrasing.text, slots, prompt, heldout)

    def _pair_heldout(self, task: Task) -> bool:
        key = self.key(task)
        return bool(key) and zlib.crc32(f"{self.name} {key}".encode()) % 8 == 0

    def arrange(self, slots: dict[str, str], rng: Random) -> None:  # noqa: B027 (optional)
        """Change randomly drawn slots in place where not every combination is natural."""

    def makes_sense(self, task: Task) -> bool:
        """Whether the slots go together: by default, no being is named twice."""
        beings = [NOUN[phrase] for phrase in task.slots.values() if phrase in NOUN]
        return len(set(beings)) == len(beings)

    def key(self, task: Task) -> str:
        """What the held-out pairs are about: by default the being in slot `a`. "" holds nothing out."""
        return task.noun("a") if "a" in task.slots else ""

    # -- answers ------------------------------------------------------------------------------------------------
    @abstractmethod
    def draft(self, task: Task, writer: Writer) -> str:
        """Write an answer."""

    @abstractmethod
    def judge(self, task: Task, sentences: list[Sentence]) -> Marks:
        """Read an answer and mark it. The best answer is worth 1.0."""

    def limit(self, task: Task) -> int:
        """The number of words from which an answer is too long."""
        return 34

    def say(self, name: str, **slots: str) -> str:
        """A sentence of this family."""
        return self.templates[name].fill(slots)

    def _read_sentence(self, text: str) -> Sentence:
        for name, template in self.templates.items():
            slots = template.read(text)
            if slots is not None:
                return Sentence(text, name, slots)
        return Sentence(text, "", {})

    def opening(self, writer: Writer) -> list[str]:
        """Perhaps a friendly opener, as a list to which the rest of the answer is added."""
        good, plain = [[text] for text, worth in OPENERS.items() if worth == 1.0], [["ok ."], []]
        return writer.grade(good, plain, chances=(0.5, 0.5))[:]

    def closing(self, writer: Writer) -> list[str]:
        """Perhaps a friendly word at the end."""
        return writer.grade([["hope this helps !"]], [["that is all ."], []], chances=(0.5, 0.5))

    def mark_general(self, sentence: Sentence, marks: Marks, position: int) -> bool:
        """Mark what is the same in all families: openers, closers, false claims. True if the sentence is done with."""
        kind = sentence.name.partition(".")[0]
        if sentence.text in CLOSERS and "close" in marks.moves:
            marks.award("close", self.closer_worth * CLOSERS[sentence.text])
            return True
        if kind == "open":
            if position == 0 and "open" in marks.moves:
                marks.award("open", self.opener_worth * OPENERS[sentence.text])
            else:
                marks.surplus += 1
            return True
        if kind == "claim" and not self.claim_holds(sentence):
            marks.lies += 1
            return True
        return False

    def claim_holds(self, sentence: Sentence) -> bool:
        """Whether a sentence named `claim.ATTRIBUTE` is true."""
        attribute = sentence.name.split(".")[1]
        return self.facts.is_true(sentence.slots["a"], attribute, sentence.slots["x"])
