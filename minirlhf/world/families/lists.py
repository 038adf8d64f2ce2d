"""Brainstorming: "list three ideas for a rainy day", "name two animals that can fly", "list two gifts for a king".

The answer is a numbered list. Each valid and distinct item counts, up to the number that was asked for.
"""

from __future__ import annotations

from random import Random
from typing import ClassVar

from minirlhf.world.families.base import Family, Marks, Phrasing, Sentence, Task
from minirlhf.world.vocabulary import ANIMALS, FOODS, JOYS, NOUN, NUMBERS, ONE, SKILLS
from minirlhf.world.writer import Writer

# occasion: ideas, the delightful half first
IDEAS: dict[str, tuple[str, ...]] = {
    "a rainy day": ("dance in the rain", "sail a paper boat", "count the puddles", "read a book", "make soup", "sleep"),
    "a sunny day": ("paint the sky", "race a snail", "eat pie on a hill", "swim", "go for a walk", "sit down"),
    "a birthday": (
        "bake a giant cake",
        "wear a funny hat",
        "sing with a dragon",
        "eat cake",
        "play games",
        "read a book",
    ),
    "a cold night": (
        "count the stars",
        "tell a story by the fire",
        "write a letter to the moon",
        "drink tea",
        "sleep",
        "sing",
    ),
    "a long trip": (
        "draw a map of the clouds",
        "sing sea songs",
        "tell jokes",
        "play games",
        "look at the sky",
        "sleep",
    ),
}
_ALL_IDEAS = tuple(dict.fromkeys(idea for ideas in IDEAS.values() for idea in ideas))
TREATS: tuple[str, ...] = ("a letter from the moon", "a warm hug")  # everyone likes these
COUNTS: tuple[str, ...] = ("two", "three", "four")
CLOSERS: dict[str, float] = {"have fun !": 1.0, "i hope this helps !": 0.8, "that is all .": 0.3}
_GIFTS = tuple(dict.fromkeys((*("some " + food for food in FOODS), *("a box of " + joy for joy in JOYS), *TREATS)))


class Brainstorm(Family):
    """ "list three ideas for a rainy day" """

    name = "brainstorm"
    share = 0.12
    phrasings = (
        Phrasing("list {n:count} ideas for {o:occasion}"),
        Phrasing("give me {n:count} ideas for {o:occasion}"),
        Phrasing("name two animals that can {k:skill}"),
        Phrasing("list two animals that live {p:place}"),
        Phrasing("list {n:few} gifts for {a:one}"),
        Phrasing("what can i do on {o:occasion} ? give me {n:count} ideas"),
        Phrasing("please name {n:count} ideas for {o:occasion}", heldout=True),
        Phrasing("can you list two animals that can {k:skill} ?", heldout=True),
        Phrasing("i want {n:few} gifts for {a:one}", heldout=True),
    )
    classes: ClassVar = {
        "count": COUNTS,
        "few": ("two", "three"),
        "occasion": tuple(IDEAS),
        "item": (*_ALL_IDEAS, *(ONE[animal] for animal in ANIMALS), *_GIFTS),
    }
    sentences: ClassVar = {
        "item.line": "{n:number} : {i:item} .",
        **{f"close.{index}": text for index, text in enumerate(CLOSERS)},
    }
    moves = ("open", "item.0", "item.1", "item.2", "item.3", "close")
    opener_worth = 0.12

    def arrange(self, slots: dict[str, str], rng: Random) -> None:
        # ask only for what at least two animals can do or call home
        if "k" in slots:
            slots["k"] = rng.choice([k for k in SKILLS if len(self.facts.beings_with("skill", k, True)) >= 2])
        if "p" in slots:
            homes = self.facts.values("home")
            slots["p"] = rng.choice([p for p in homes if len(self.facts.beings_with("home", p, True)) >= 2])

    def makes_sense(self, task: Task) -> bool:
        return len(self._valid(task)) >= self._count(task)

    def key(self, task: Task) -> str:
        slots = task.slots
        if "o" in slots:
            return slots["n"] + " " + slots["o"]
        return task.noun("a") if "a" in slots else ""

    @staticmethod
    def _count(task: Task) -> int:
        return NUMBERS.index(task.slots.get("n", "two")) + 1

    def _valid(self, task: Task) -> dict[str, float]:
        """Item -> worth. At least `count` items are worth 1."""
        slots = task.slots
        if "k" in slots:
            return {ONE[animal]: 1.0 for animal in self.facts.beings_with("skill", slots["k"], True)}
        if "p" in slots:
            return {ONE[animal]: 1.0 for animal in self.facts.beings_with("home", slots["p"], True)}
        if "a" in slots:
            being = task.noun("a")
            gifts = (f"some {self.facts.value(being, 'food')}", f"a box of {self.facts.value(being, 'joy')}")
            return {**dict.fromkeys(gifts, 1.0), TREATS[0]: 1.0, TREATS[1]: 0.8}
        ideas = IDEAS[slots["o"]]
        return {idea: (1.0, 0.95, 0.9, 0.6, 0.55, 0.5)[index] for index, idea in enumerate(ideas)}

    def _wrong(self, task: Task) -> list[str]:
        valid = self._valid(task)
        if "k" in task.slots or "p" in task.slots:
            return [ONE[animal] for animal in ANIMALS if ONE[animal] not in valid]
        return [item for item in (_GIFTS if "a" in task.slots else _ALL_IDEAS) if item not in valid]

    def draft(self, task: Task, writer: Writer) -> str:
        valid, count = self._valid(task), self._count(task)
        best = sorted(valid, key=lambda item: -valid[item])[:count] if "o" in task.slots else []
        parts = self.opening(writer)
        if writer.slips(0.3):
            count += writer.pick((-1, -1, 1))
        left = dict(valid)
        for index in range(count):
            if writer.slips(0.15) or not left:
                item = writer.pick(self._wrong(task))
            else:
                good = [i for i in left if i in best] or [i for i in left if left[i] >= max(left.values())]
                item = writer.grade(good, list(left), chances=(0.3, 0.7))
                if not writer.slips(0.05):  # now and then the same thing is listed twice
                    del left[item]
            parts.append(self.say("item.line", n=NUMBERS[index], i=item))
        if writer.does(0.55):
            parts.append(
                writer.grade(["have fun !"], ["i hope this helps !"], ["that is all ."], chances=(0.7, 0.15, 0.15))
            )
        return " ".join(parts)

    def limit(self, task: Task) -> int:
        return 24 + 5 * self._count(task)

    def judge(self, task: Task, sentences: list[Sentence]) -> Marks:
        marks = Marks(self.moves)
        valid, count = self._valid(task), self._count(task)
        best_sum = sum(sorted(valid.values(), reverse=True)[:count])
        listed: set[str] = set()
        for position, sentence in enumerate(sentences):
            if self.mark_general(sentence, marks, position):
                continue
            if sentence.name == "item.line":
                item, place = sentence.slots["i"], len(listed)
                if item in listed or place >= count:
                    marks.surplus += 1
                    continue
                listed.add(item)
                worth = 0.75 * valid.get(item, 0.0) / best_sum
                in_order = sentence.slots["n"] == NUMBERS[place]
                marks.award(f"item.{place}", worth if in_order else worth / 2)
                if item not in valid and NOUN.get(item) in ANIMALS:
                    marks.lies += 1  # "name two animals that can fly : a pig" is a claim about the world
            elif sentence.name.startswith("close"):
                marks.award("close", 0.13 * CLOSERS[sentence.text])
            else:
                marks.surplus += 1
        return marks
