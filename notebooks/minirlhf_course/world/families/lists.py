"""Brainstorming: "list three ideas for a rainy day", "list two gifts for a king".

The answer is a numbered list. Each valid and distinct item counts, up to the number that was asked for.
"""

from __future__ import annotations

from typing import ClassVar

from minirlhf_course.world.families.base import Family, Marks, Phrasing, Sentence, Task
from minirlhf_course.world.vocabulary import FOODS, JOYS, NUMBERS
from minirlhf_course.world.writer import Writer

# occasion: three delightful ideas, and a dull one
IDEAS: dict[str, tuple[str, ...]] = {
    "a rainy day": ("sail a paper boat", "dance in the rain", "count the puddles", "sleep"),
    "a birthday": ("bake a giant cake", "wear a funny hat", "sing with a dragon", "sit down"),
    "a cold night": ("count the stars", "tell a story by the fire", "write to the moon", "read a book"),
}
DULL_WORTH = 0.3
_ALL_IDEAS = tuple(dict.fromkeys(idea for ideas in IDEAS.values() for idea in ideas))
HUG = "a warm hug"  # everyone likes it
_GIFTS = (*("some " + food for food in FOODS), *("a box of " + joy for joy in JOYS), HUG)


class Brainstorm(Family):
    """ "list three ideas for a rainy day" """

    name = "brainstorm"
    share = 0.12
    phrasings = (
        Phrasing("list {n:count} ideas for {o:occasion}"),
        Phrasing("give me {n:count} ideas for {o:occasion}"),
        Phrasing("list two gifts for {a:one}"),
        Phrasing("what can i do on {o:occasion} ? give me {n:count} ideas"),
        Phrasing("please list {n:count} ideas for {o:occasion}", heldout=True),
        Phrasing("please list two gifts for {a:one}", heldout=True),
    )
    classes: ClassVar = {
        "count": ("two", "three"),
        "occasion": tuple(IDEAS),
        "item": (*_ALL_IDEAS, *_GIFTS),
    }
    sentences: ClassVar = {"item.line": "{n:number} : {i:item} ."}
    moves = ("open", "item.0", "item.1", "item.2", "close")

    def key(self, task: Task) -> str:
        slots = task.slots
        return task.noun("a") if "a" in slots else f"{slots['n']} {slots['o']} {task.phrasing}"

    @staticmethod
    def _count(task: Task) -> int:
        return NUMBERS.index(task.slots.get("n", "two")) + 1

    def _valid(self, task: Task) -> dict[str, float]:
        """Item -> worth. At least `count` items are worth 1."""
        if "a" in task.slots:
            being = task.noun("a")
            gifts = (f"some {self.facts.value(being, 'food')}", f"a box of {self.facts.value(being, 'joy')}", HUG)
            return dict.fromkeys(gifts, 1.0)
        return {idea: 1.0 if index < 3 else DULL_WORTH for index, idea in enumerate(IDEAS[task.slots["o"]])}

    def draft(self, task: Task, writer: Writer) -> str:
        left, count = self._valid(task), self._count(task)
        parts = self.opening(writer)
        if not writer.does(0.75):
            count += writer.pick((-1, 1))
        for index in range(count):
            if writer.slips(0.08) or not left:
                item = writer.pick(_GIFTS if "a" in task.slots else _ALL_IDEAS)
            else:
                good = [item for item, worth in left.items() if worth == max(left.values())]
                item = writer.grade(good, list(left), chances=(0.5, 0.5))
                if not writer.slips(0.08):  # now and then the same thing is listed twice
                    del left[item]
            parts.append(self.say("item.line", n=NUMBERS[index], i=item))
        return " ".join(parts + self.closing(writer))

    def judge(self, task: Task, sentences: list[Sentence]) -> Marks:
        marks = Marks(self.moves)
        valid, count = self._valid(task), self._count(task)
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
                worth = 0.7 * valid.get(item, 0.0) / count
                marks.award(f"item.{place}", worth if sentence.slots["n"] == NUMBERS[place] else worth / 2)
            else:
                marks.surplus += 1
        return marks
