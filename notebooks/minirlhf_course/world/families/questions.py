"""Open and closed question answering.

An open question is answered from what one knows about the world, a closed one from the passage in front of it.
"""

from __future__ import annotations

from typing import ClassVar

from minirlhf_course.world.facts import ATTRIBUTES
from minirlhf_course.world.families.base import Family, Marks, Phrasing, Sentence, Task
from minirlhf_course.world.vocabulary import ONE
from minirlhf_course.world.writer import Writer

# what each phrasing asks for
_ASKS: dict[str, str] = {
    "where does {a:one} live ?": "home",
    "what does {a:one} eat ?": "food",
    "what does {a:one} like ?": "joy",
    "tell me where {a:one} lives": "home",
    "tell me what {a:one} eats": "food",
    "can you tell me where {a:one} lives ?": "home",
    "can you tell me what {a:one} likes ?": "joy",
}
_HELDOUT = tuple(_ASKS)[-2:]


class OpenQA(Family):
    """ "where does a fox live ?" """

    name = "open_qa"
    share = 0.15
    phrasings = tuple(Phrasing(text, heldout=text in _HELDOUT) for text in _ASKS)
    sentences: ClassVar = {
        "fact.home": "it lives {x:place} .",
        "fact.food": "it eats {x:food} .",
        "fact.joy": "it likes {x:joy} .",
    }
    moves = ("open", "answer", "more", "close")

    def key(self, task: Task) -> str:
        return task.noun("a") + " " + _ASKS[task.phrasing]

    def draft(self, task: Task, writer: Writer) -> str:
        being, asked = task.noun("a"), _ASKS[task.phrasing]
        parts = self.opening(writer)
        value = self.facts.wrong_value(being, asked, writer.rng) if writer.slips(0.12) else None
        if writer.does(0.65):
            parts.append(self.facts.sentence(being, asked, value))
        else:
            parts.append(self.say(f"fact.{asked}", x=value or self.facts.value(being, asked)))
        if writer.does(0.45):
            other = writer.pick([attribute for attribute in ATTRIBUTES if attribute != asked])
            value = self.facts.wrong_value(being, other, writer.rng) if writer.slips(0.12) else None
            parts.append(self.facts.sentence(being, other, value))
        return " ".join(parts + self.closing(writer))

    def judge(self, task: Task, sentences: list[Sentence]) -> Marks:
        marks = Marks(self.moves)
        being, asked = task.noun("a"), _ASKS[task.phrasing]
        for position, sentence in enumerate(sentences):
            if self.mark_general(sentence, marks, position):
                continue
            kind, _, about = sentence.name.partition(".")
            if kind == "fact" and not self.facts.is_true(being, about, sentence.slots["x"]):
                marks.lies += 1  # "it" is whoever the question is about
            elif kind == "fact" and about == asked:
                marks.award("answer", 0.35)
            elif kind == "claim" and sentence.slots["a"] == ONE[being] and about == asked:
                marks.award("answer", 0.5)
            elif kind == "fact" or (kind == "claim" and sentence.slots["a"] == ONE[being]):
                marks.award("more", 0.2)
            else:
                marks.surplus += 1
        return marks


PASSAGE = "read this : the {a:being} hid the {t:thing} {p:place} . "
_QUESTIONS: tuple[str, ...] = ("who hid the {t:thing} ?", "where is the {t:thing} ?")


class ClosedQA(Family):
    """ "read this : the fox hid the key in a cave . who hid the key ?" """

    name = "closed_qa"
    may_mention_heldout = True
    share = 0.1
    phrasings = (
        *(Phrasing(PASSAGE + question) for question in _QUESTIONS),
        *(Phrasing(PASSAGE.replace("read this :", "please read this :") + question, True) for question in _QUESTIONS),
    )
    sentences: ClassVar = {
        "who.hid": "the {a:being} hid the {t:thing} .",
        "where.is": "the {t:thing} is {p:place} .",
        "short.being": "the {a:being} .",
        "short.place": "{p:place} .",
    }
    moves = ("open", "answer", "support", "close")

    def key(self, task: Task) -> str:
        return task.noun("a") + " " + task.slots["p"]

    @staticmethod
    def _asked(task: Task) -> str:
        """The sentence that answers the question. The other one is its support."""
        return "who.hid" if " who hid the " in task.phrasing else "where.is"

    def draft(self, task: Task, writer: Writer) -> str:
        asked, slots = self._asked(task), dict(task.slots)
        other = "where.is" if asked == "who.hid" else "who.hid"
        if writer.slips(0.12):  # a careless reader
            gap = "a" if asked == "who.hid" else "p"
            slots[gap] = writer.pick(self.templates[asked].gaps[gap])
        parts = self.opening(writer)
        short = "short.being" if asked == "who.hid" else "short.place"
        parts.append(self.say(asked if writer.does(0.65) else short, **slots))
        if writer.does(0.45):
            parts.append(self.say(other, **slots))
        return " ".join(parts + self.closing(writer))

    def judge(self, task: Task, sentences: list[Sentence]) -> Marks:
        marks = Marks(self.moves)
        asked = self._asked(task)
        short = "short.being" if asked == "who.hid" else "short.place"
        for position, sentence in enumerate(sentences):
            if self.mark_general(sentence, marks, position):
                continue
            kind = sentence.name.partition(".")[0]
            if kind in ("who", "where", "short") and any(task.slots[gap] != x for gap, x in sentence.slots.items()):
                marks.lies += 1
            elif sentence.name == short:
                marks.award("answer", 0.35)
            elif sentence.name == asked:
                marks.award("answer", 0.5)
            elif kind in ("who", "where"):
                marks.award("support", 0.2)
            else:
                marks.surplus += 1
        return marks
