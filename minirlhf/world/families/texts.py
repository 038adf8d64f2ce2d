"""Rewriting and summarising: the content is in the prompt, and the answer has to keep it."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import ClassVar

from minirlhf.world.families.base import Family, Marks, Phrasing, Sentence, Task
from minirlhf.world.vocabulary import OPPOSITES, PAST, VIVID
from minirlhf.world.writer import Writer

_CLOSERS: dict[str, float] = {"i hope this helps !": 1.0, "that is all .": 0.3}
_POLITE = "{c:command} the {t:thing}"
_PAST = "the {adj:asked} {a:being} {v:verb} the {t:thing} {p:place}"
_OPPOSITE = "the {q:quality} {a:being} is {r:quality}"


class Rewrite(Family):
    """ "say this in a polite way : give me the cake" """

    name = "rewrite"
    share = 0.09
    phrasings = (
        Phrasing(f"say this in a polite way : {_POLITE}"),
        Phrasing(f"make this polite : {_POLITE}"),
        Phrasing(f"say this in the past : {_PAST}"),
        Phrasing(f"say the opposite : {_OPPOSITE}"),
        Phrasing(f"please say this in a nice way : {_POLITE}", heldout=True),
        Phrasing(f"can you say the opposite ? {_OPPOSITE}", heldout=True),
    )
    classes: ClassVar = {"asked": VIVID}
    sentences: ClassVar = {
        "polite.could": "could you please {c:command} the {t:thing} ?",
        "polite.please": "please {c:command} the {t:thing} .",
        "polite.bare": "{c:command} the {t:thing} .",
        "thank.much": "thank you so much !",
        "thank.plain": "thank you .",
        "past.full": "the {adj:asked} {a:being} {v:past} the {t:thing} {p:place} .",
        "past.some": "the {adj:asked} {a:being} {v:past} the {t:thing} .",
        "past.bare": "the {a:being} {v:past} the {t:thing} .",
        "past.not": "the {adj:asked} {a:being} {v:verb} the {t:thing} {p:place} .",
        "opposite.is": "the {q:quality} {a:being} is {r:quality} .",
        **{f"close.{index}": text for index, text in enumerate(_CLOSERS)},
    }
    moves = ("open", "text", "thank", "close")
    opener_worth = 0.15

    def arrange(self, slots: dict[str, str], rng: Random) -> None:
        if "r" in slots:
            others = [q for q in OPPOSITES if q not in (slots["q"], OPPOSITES[slots["q"]])]
            slots["r"] = rng.choice(others)

    def key(self, task: Task) -> str:
        if "c" in task.slots:
            return task.slots["c"] + " " + task.slots["t"]
        return super().key(task)

    @staticmethod
    def _kind(task: Task) -> str:
        return "polite" if "c" in task.slots else "past" if "v" in task.slots else "opposite"

    def draft(self, task: Task, writer: Writer) -> str:
        slots, kind = dict(task.slots), self._kind(task)
        for gap, chance in (("t", 0.1), ("a", 0.1), ("p", 0.1)):  # copied wrongly
            if gap in slots and writer.slips(chance):
                slots[gap] = writer.pick(self.templates["past.full"].gaps[gap])
        parts = self.opening(writer)
        if kind == "polite":
            name = writer.grade(["polite.could"], ["polite.please"], ["polite.bare"], chances=(0.45, 0.4, 0.15))
            parts.append(self.say(name, **slots))
            if writer.does(0.5):
                parts.append(writer.grade(["thank you so much !"], ["thank you ."], chances=(0.7, 0.3)))
            return " ".join(parts)
        if kind == "past":
            name = writer.grade(["past.full"], ["past.some"], ["past.bare", "past.not"], chances=(0.4, 0.3, 0.3))
            if name != "past.not":
                slots["v"] = PAST[slots["v"]]
            parts.append(self.say(name, **slots))
        else:
            for gap in ("q", "r"):
                if writer.does(0.65):
                    slots[gap] = OPPOSITES[slots[gap]]
            parts.append(self.say("opposite.is", **slots))
        if writer.does(0.5):
            parts.append(writer.grade(["i hope this helps !"], ["that is all ."], chances=(0.75, 0.25)))
        return " ".join(parts)

    def judge(self, task: Task, sentences: list[Sentence]) -> Marks:
        marks = Marks(self.moves)
        kind = self._kind(task)
        for position, sentence in enumerate(sentences):
            if self.mark_general(sentence, marks, position):
                continue
            its_kind, _, shape = sentence.name.partition(".")
            if its_kind == kind:
                marks.award("text", self._text(kind, task.slots, sentence, shape))
            elif its_kind == "thank" and kind == "polite":
                marks.award("thank", 0.25 if shape == "much" else 0.15)
            elif its_kind == "close" and kind != "polite":
                marks.award("close", 0.15 * _CLOSERS[sentence.text])
            else:
                marks.surplus += 1
        return marks

    @staticmethod
    def _text(kind: str, asked: Mapping[str, str], sentence: Sentence, shape: str) -> float:
        """Marks for the rewritten text: first what was to change, then what was to stay."""
        wanted = dict(asked)
        if kind == "past":
            wanted["v"] = PAST[asked["v"]]
            worth, each = {"full": 0.7, "some": 0.5, "bare": 0.38, "not": 0.3}[shape], 0.2
        elif kind == "polite":
            worth, each = {"could": 0.6, "please": 0.4, "bare": 0.15}[shape], 0.25
        else:
            wanted |= {gap: OPPOSITES[asked[gap]] for gap in ("q", "r")}
            worth, each = 0.7, 0.27
        wrong = sum(phrase != wanted[gap] for gap, phrase in sentence.slots.items())
        wrong -= shape == "not"  # counted already
        return max(worth - each * wrong, 0.0)


_STORIES: dict[str, str] = {
    "lost": "the {a:being} lost a {k:color} {t:thing} {p:place} and cried all day . at last the {b:being} found it .",
    "gift": "it was the birthday of the {a:being} . the {b:being} worked all night and made a {k:color} {t:thing} .",
    "fight": "the {a:being} and the {b:being} both wanted the {t:thing} . "
    "they shouted all day , but then they shared it .",
}


class Summarise(Family):
    """ "sum this up : the fox lost a red key in a barn and cried all day . at last the owl found it ." """

    name = "summarise"
    share = 0.06
    phrasings = (
        *(Phrasing(f"sum this up : {text}") for text in _STORIES.values()),
        *(Phrasing(f"make this short : {text}") for text in _STORIES.values()),
        Phrasing(f"please sum this up : {_STORIES['lost']}", heldout=True),
        Phrasing(f"can you make this short ? {_STORIES['gift']}", heldout=True),
    )
    sentences: ClassVar = {
        "lost.gist": "the {a:being} lost a {t:thing} , but the {b:being} found it .",
        "lost.half": "the {a:being} lost a {t:thing} .",
        "gift.gist": "the {b:being} made a {t:thing} for the {a:being} .",
        "gift.half": "it was the birthday of the {a:being} .",
        "fight.gist": "the {a:being} and the {b:being} shared the {t:thing} .",
        "fight.half": "the {a:being} and the {b:being} both wanted the {t:thing} .",
        "filler.day": "the {a:being} cried all day .",
        "filler.night": "the {a:being} worked all night .",
        "filler.shout": "they shouted all day .",
        "mood.happy": "it ends well .",
        "mood.sad": "it is a sad story .",
    }
    moves = ("open", "gist", "mood")
    opener_worth = 0.15

    def key(self, task: Task) -> str:
        return ""

    @staticmethod
    def _kind(task: Task) -> str:
        return next(kind for kind, text in _STORIES.items() if task.phrasing.endswith(text))

    def limit(self, task: Task) -> int:
        return 22

    def draft(self, task: Task, writer: Writer) -> str:
        slots, kind = dict(task.slots), self._kind(task)
        if writer.slips(0.15):
            slots["a"], slots["b"] = slots["b"], slots["a"]
        if writer.slips(0.1):
            slots["t"] = writer.pick(self.templates["lost.gist"].gaps["t"])
        parts = self.opening(writer)
        parts.append(self.say(f"{kind}.{'gist' if writer.does(0.65) else 'half'}", **slots))
        if writer.slips(0.3):
            filler = {"lost": "filler.day", "gift": "filler.night", "fight": "filler.shout"}[kind]
            parts.append(self.say(filler, a=slots["b" if kind == "gift" else "a"]))
        if writer.does(0.5):
            parts.append("it is a sad story ." if writer.slips(0.15) else "it ends well .")
        return " ".join(parts)

    def judge(self, task: Task, sentences: list[Sentence]) -> Marks:
        marks = Marks(self.moves)
        kind, asked = self._kind(task), dict(task.slots)
        for position, sentence in enumerate(sentences):
            if self.mark_general(sentence, marks, position):
                continue
            its_kind, _, shape = sentence.name.partition(".")
            if its_kind == kind:
                wrong = sum(asked[gap] != phrase for gap, phrase in sentence.slots.items())
                if kind == "fight" and {sentence.slots["a"], sentence.slots["b"]} == {asked["a"], asked["b"]}:
                    wrong = int(sentence.slots["t"] != asked["t"])  # "and" has no order
                marks.lies += wrong > 0
                marks.award("gist", max((0.65 if shape == "gist" else 0.3) - 0.25 * wrong, 0.0))
            elif its_kind == "mood":
                marks.award("mood", 0.2 if shape == "happy" else 0.0)
            else:
                marks.surplus += 1
        return marks
