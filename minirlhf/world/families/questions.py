"""Open and closed question answering.

An open question is answered from what one knows about the world, a closed one from the passage in front of it.
"""

from __future__ import annotations

from random import Random
from typing import ClassVar

from minirlhf.world.families.base import Family, Marks, Phrasing, Sentence, Task
from minirlhf.world.vocabulary import ANIMALS, ONE, PLURAL, THINGS
from minirlhf.world.writer import Writer

# what each phrasing asks for
_ASKS: dict[str, str] = {
    "where does {a:one} live ?": "home",
    "where do {a:many} live ?": "home",
    "what does {a:one} eat ?": "food",
    "what do {a:many} eat ?": "food",
    "what color is {c:colored} ?": "color",
    "what can {a:one} do ?": "skill",
    "what does {a:one} like ?": "joy",
    "can you tell me where {a:one} lives ?": "home",
    "can you tell me what {a:many} eat ?": "food",
    "please tell me what {a:one} likes": "joy",
}
_HELDOUT = tuple(_ASKS)[-3:]
CLOSERS: dict[str, float] = {"i hope this helps !": 1.0, "that is all .": 0.4}


class OpenQA(Family):
    """ "where does a fox live ?" """

    name = "open_qa"
    share = 0.13
    phrasings = tuple(Phrasing(text, heldout=text in _HELDOUT) for text in _ASKS)
    classes: ClassVar = {"colored": tuple(ONE[animal] for animal in ANIMALS)}
    sentences: ClassVar = {
        "fact.home": "it lives {x:place} .",
        "fact.food": "it eats {x:food} .",
        "fact.color": "it is {x:color} .",
        "fact.skill": "it can {x:skill} .",
        "fact.joy": "it likes {x:joy} .",
        **{f"close.{index}": text for index, text in enumerate(CLOSERS)},
    }
    moves = ("open", "answer", "more", "close")
    opener_worth = 0.12

    def key(self, task: Task) -> str:
        return self._being(task) + " " + _ASKS[task.phrasing]

    @staticmethod
    def _being(task: Task) -> str:
        return task.noun("a" if "a" in task.slots else "c")

    def draft(self, task: Task, writer: Writer) -> str:
        being, asked = self._being(task), _ASKS[task.phrasing]
        many = "{a:many}" in task.phrasing
        parts = self.opening(writer)
        value = self.facts.wrong_value(being, asked, writer.rng) if writer.slips(0.14) else None
        if writer.does(0.65):
            parts.append(self.facts.sentence(being, asked, many, value))
        else:
            parts.append(self.say(f"fact.{asked}", x=value or self.facts.value(being, asked)))
        if writer.does(0.47):
            other = writer.pick([attribute for attribute in self.facts.attributes(being) if attribute != asked])
            value = self.facts.wrong_value(being, other, writer.rng) if writer.slips(0.12) else None
            parts.append(self.facts.sentence(being, other, many, value))
        if writer.does(0.55):
            parts.append(writer.grade(["i hope this helps !"], ["that is all ."], chances=(0.7, 0.3)))
        return " ".join(parts)

    def judge(self, task: Task, sentences: list[Sentence]) -> Marks:
        marks = Marks(self.moves)
        being, asked = self._being(task), _ASKS[task.phrasing]
        names = (ONE[being], PLURAL[being])
        same_form = names[int("{a:many}" in task.phrasing)]
        for position, sentence in enumerate(sentences):
            if self.mark_general(sentence, marks, position):
                continue
            kind, _, rest = sentence.name.partition(".")
            if kind == "claim" and sentence.slots["a"] in names:
                in_form = sentence.slots["a"] == same_form
                if rest.startswith(asked):
                    marks.award("answer", 0.55 if in_form else 0.5)
                else:
                    marks.award("more", 0.2 if in_form else 0.17)
            elif kind == "fact":  # "it" is whoever the question is about
                if not self.facts.is_true(being, rest, sentence.slots["x"]):
                    marks.lies += 1
                elif rest == asked:
                    marks.award("answer", 0.42)
                else:
                    marks.award("more", 0.15)
            elif kind == "close":
                marks.award("close", 0.13 * CLOSERS[sentence.text])
            else:
                marks.surplus += 1
        return marks


PASSAGE = "read this : the {a:being} hid the {k:color} {t:thing} {p:place} . the {b:being} found it . "
_QUESTIONS: tuple[str, ...] = (
    "who hid the {t:thing} ?",
    "where was the {t:thing} ?",
    "what color was the {t:thing} ?",
    "who found the {t:thing} ?",
)


class ClosedQA(Family):
    """ "read this : the fox hid the red key in a barn . the owl found it . who hid the key ?" """

    name = "closed_qa"
    share = 0.06
    phrasings = (
        *(Phrasing(PASSAGE + question) for question in _QUESTIONS),
        Phrasing(PASSAGE.replace("read this :", "please read this text :") + _QUESTIONS[0], heldout=True),
        Phrasing(PASSAGE.replace("read this :", "please read this text :") + _QUESTIONS[1], heldout=True),
    )
    sentences: ClassVar = {
        "who.hid": "the {a:being} hid the {t:thing} .",
        "where.was": "the {t:thing} was {p:place} .",
        "what.color": "the {t:thing} was {k:color} .",
        "who.found": "the {b:being} found the {t:thing} .",
        "short.being": "the {a:being} .",
        "short.place": "{p:place} .",
        "short.color": "{k:color} .",
        "note.text": "the text says so .",
    }
    # which sentence answers which question, and its short form
    answers: ClassVar = {
        "who hid": "who.hid",
        "where was": "where.was",
        "what color": "what.color",
        "who found": "who.found",
    }
    support: ClassVar = {
        "who.hid": "who.found",
        "where.was": "who.hid",
        "what.color": "where.was",
        "who.found": "where.was",
    }
    moves = ("open", "answer", "support", "note")
    opener_worth = 0.12

    def key(self, task: Task) -> str:
        return ""

    def arrange(self, slots: dict[str, str], rng: Random) -> None:
        slots["t"] = rng.choice(THINGS)

    def _asked(self, task: Task) -> str:
        question = task.phrasing.rpartition(" . ")[2]
        return self.answers[" ".join(question.split(" ")[:2])]

    def _short(self, task: Task) -> str:
        """The answer as a mere phrase."""
        slots = task.slots
        return {
            "who.hid": f"the {slots['a']} .",
            "who.found": f"the {slots['b']} .",
            "where.was": f"{slots['p']} .",
            "what.color": f"{slots['k']} .",
        }[self._asked(task)]

    def draft(self, task: Task, writer: Writer) -> str:
        asked, slots = self._asked(task), dict(task.slots)
        if writer.slips(0.14):  # a confused reader swaps the two beings, or gets the place or color wrong
            slots["a"], slots["b"] = slots["b"], slots["a"]
            slots["p"], slots["k"] = writer.pick(self._gap("where.was", "p")), writer.pick(self._gap("what.color", "k"))
        parts = self.opening(writer)
        if writer.does(0.6):
            parts.append(self.say(asked, **slots))
        else:
            parts.append(self._short(Task(task.family, task.phrasing, slots, task.prompt, task.heldout)))
        if writer.does(0.45):
            parts.append(self.say(self.support[asked], **slots))
        if writer.does(0.35):
            parts.append("the text says so .")
        return " ".join(parts)

    def _gap(self, name: str, gap: str) -> tuple[str, ...]:
        return self.templates[name].gaps[gap]

    def judge(self, task: Task, sentences: list[Sentence]) -> Marks:
        marks = Marks(self.moves)
        asked, short = self._asked(task), self._short(task)
        for position, sentence in enumerate(sentences):
            if self.mark_general(sentence, marks, position):
                continue
            kind = sentence.name.partition(".")[0]
            if kind == "short":
                if sentence.text == short:
                    marks.award("answer", 0.42)
                else:
                    marks.lies += 1
            elif kind in ("who", "where", "what"):
                if any(task.slots[gap] != phrase for gap, phrase in sentence.slots.items()):
                    marks.lies += 1
                elif sentence.name == asked:
                    marks.award("answer", 0.56)
                else:
                    marks.award("support", 0.22 if sentence.name == self.support[asked] else 0.15)
            elif kind == "note":
                marks.award("note", 0.1)
            else:
                marks.surplus += 1
        return marks
