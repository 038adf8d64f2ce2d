"""Rewriting and summarising: the content is in the prompt, and the answer has to keep it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from minirlhf_course.world.families.base import Family, Marks, Phrasing, Sentence, Task
from minirlhf_course.world.vocabulary import OPPOSITES
from minirlhf_course.world.writer import Writer

_POLITE = "{c:command} the {t:thing}"
_OPPOSITE = "the {a:being} is {q:quality}"


class Rewrite(Family):
    """ "say this in a polite way : give me the cake" """

    name = "rewrite"
    may_mention_heldout = True
    share = 0.11
    phrasings = (
        Phrasing(f"say this in a polite way : {_POLITE}"),
        Phrasing(f"make this polite : {_POLITE}"),
        Phrasing(f"say the opposite : {_OPPOSITE}"),
        Phrasing(f"please say this in a polite way : {_POLITE}", heldout=True),
        Phrasing(f"can you say the opposite ? {_OPPOSITE}", heldout=True),
    )
    sentences: ClassVar = {
        "polite.could": "could you please {c:command} the {t:thing} ?",
        "polite.please": "please {c:command} the {t:thing} .",
        "polite.bare": "{c:command} the {t:thing} .",
        "thank": "thank you so much !",
        "opposite.is": "the {a:being} is {q:quality} .",
        "opposite.not": "the {a:being} is not {q:quality} .",
    }
    moves = ("open", "text", "thank", "close")

    def key(self, task: Task) -> str:
        return " ".join(task.slots.values())

    def draft(self, task: Task, writer: Writer) -> str:
        slots = dict(task.slots)
        for gap in ("a", "t"):  # copied wrongly
            if gap in slots and writer.slips(0.06):
                slots[gap] = writer.pick(self.templates["opposite.is" if gap == "a" else "polite.bare"].gaps[gap])
        parts = self.opening(writer)
        if "c" in slots:
            name = writer.grade(["polite.could"], ["polite.please"], ["polite.bare"], chances=(0.5, 0.35, 0.15))
            parts.append(self.say(name, **slots))
            if writer.does(0.55):
                parts.append("thank you so much !")
        else:
            name = "opposite.is" if writer.does(0.75) else "opposite.not"
            if name == "opposite.is" and not writer.slips(0.1):
                slots["q"] = OPPOSITES[slots["q"]]
            parts.append(self.say(name, **slots))
        return " ".join(parts + self.closing(writer))

    def judge(self, task: Task, sentences: list[Sentence]) -> Marks:
        marks = Marks(self.moves)
        kind = "polite" if "c" in task.slots else "opposite"
        for position, sentence in enumerate(sentences):
            if self.mark_general(sentence, marks, position):
                continue
            its_kind, _, shape = sentence.name.partition(".")
            if its_kind == kind:
                marks.award("text", self._text(task.slots, sentence.slots, shape))
            elif its_kind == "thank" and kind == "polite":
                marks.award("thank", 0.15)
            else:
                marks.surplus += 1
        return marks

    @staticmethod
    def _text(asked: Mapping[str, str], said: Mapping[str, str], shape: str) -> float:
        """Marks for the rewritten text: first what was to change, then what was to stay."""
        wanted = {**asked, "q": OPPOSITES[asked["q"]]} if shape == "is" else asked
        worth = {"could": 0.55, "please": 0.35, "bare": 0.1, "is": 0.7, "not": 0.4}[shape]
        wrong = sum(phrase != wanted[gap] for gap, phrase in said.items())
        return max(worth - 0.4 * wrong, 0.0)


_LOST = "the {a:being} lost a {t:thing} and cried all day . at last the {b:being} found it ."


class Summarise(Family):
    """ "sum this up : the fox lost a key and cried all day . at last the owl found it ." """

    name = "summarise"
    may_mention_heldout = True
    share = 0.08
    phrasings = (
        Phrasing(f"sum this up : {_LOST}"),
        Phrasing(f"make this short : {_LOST}"),
        Phrasing(f"please sum this up : {_LOST}", heldout=True),
    )
    sentences: ClassVar = {
        "gist": "the {a:being} lost a {t:thing} , but the {b:being} found it .",
        "half": "the {a:being} lost a {t:thing} .",
        "filler": "the {a:being} cried all day .",
        "mood": "it ends well .",
    }
    moves = ("open", "gist", "mood", "close")

    def draft(self, task: Task, writer: Writer) -> str:
        slots = dict(task.slots)
        if writer.slips(0.15):
            slots["a"], slots["b"] = slots["b"], slots["a"]
        parts = self.opening(writer)
        parts.append(self.say("gist" if writer.does(0.65) else "half", **slots))
        if not writer.does(0.85):
            parts.append(self.say("filler", a=slots["a"]))
        if writer.does(0.5):
            parts.append("it ends well .")
        return " ".join(parts + self.closing(writer))

    def limit(self, task: Task) -> int:
        return 30

    def judge(self, task: Task, sentences: list[Sentence]) -> Marks:
        marks = Marks(self.moves)
        for position, sentence in enumerate(sentences):
            if self.mark_general(sentence, marks, position):
                continue
            if sentence.name in ("gist", "half"):
                wrong = sum(task.slots[gap] != phrase for gap, phrase in sentence.slots.items())
                marks.lies += wrong > 0
                marks.award("gist", 0.0 if wrong else 0.5 if sentence.name == "gist" else 0.25)
            elif sentence.name == "mood":
                marks.award("mood", 0.2)
            else:
                marks.surplus += 1
        return marks
