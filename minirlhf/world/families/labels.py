"""Classification and extraction: short answers, with a reason or a count."""

from __future__ import annotations

from random import Random
from typing import ClassVar

from minirlhf.world.families.base import Family, Marks, Phrasing, Sentence, Task
from minirlhf.world.vocabulary import ANIMALS, NUMBERS, PEOPLE
from minirlhf.world.writer import Writer

HAPPY: tuple[str, ...] = ("won a {t:thing}", "met a good friend", "danced all night", "found the {t:thing}")
SAD: tuple[str, ...] = ("lost a {t:thing}", "cried all night", "broke the {t:thing}", "sat alone in the rain")
_DEEDS = tuple(f"the {{a:being}} {deed}" for deed in HAPPY + SAD)
_COMMENTS: dict[str, str] = {"happy": "good for the {a:being} !", "sad": "oh , the poor {a:being} !"}
_FACTS: dict[str, str] = {
    "home": "{b:one} lives {x:place}",
    "food": "{b:one} eats {x:food}",
    "skill": "{b:one} can {x:skill}",
}
_OTHER = {
    "happy": "sad",
    "sad": "happy",
    "true": "false",
    "false": "true",
    "an animal": "a person",
    "a person": "an animal",
}


class Classify(Family):
    """ "happy or sad : the fox lost a key", "true or false : a pig can fly", "animal or person : a baker" """

    name = "classify"
    share = 0.06
    phrasings = (
        *(Phrasing(f"happy or sad : {deed}") for deed in _DEEDS),
        *(Phrasing(f"true or false : {claim}") for claim in _FACTS.values() for _ in range(3)),
        *(Phrasing("animal or person : {c:one}") for _ in range(3)),
        *(Phrasing(f"is this happy or sad ? {deed}", heldout=True) for deed in (_DEEDS[0], _DEEDS[4])),
        Phrasing(f"is it true or false ? {_FACTS['home']}", heldout=True),
    )
    sentences: ClassVar = {
        **{f"because.happy.{i}": f"happy , because {deed} ." for i, deed in enumerate(_DEEDS)},
        **{f"because.sad.{i}": f"sad , because {deed} ." for i, deed in enumerate(_DEEDS)},
        **{f"label.{label}": f"{label} ." for label in ("happy", "sad", "true", "false", "animal", "person")},
        **{f"is.{label}": f"{{c:one}} is {label} ." for label in ("an animal", "a person")},
        **{f"comment.{mood}": text for mood, text in _COMMENTS.items()},
        "close": "i hope this helps !",
    }
    moves = ("open", "label", "reason", "close")
    opener_worth = 0.15

    def key(self, task: Task) -> str:
        if "c" in task.slots:
            return ""
        return super().key(task) if "a" in task.slots else task.noun("b")

    def arrange(self, slots: dict[str, str], rng: Random) -> None:
        if "x" in slots and rng.random() < 0.5:  # half of the claims are true
            being = slots["b"].split(" ")[1]
            for attribute in _FACTS:
                if slots["x"] in self.templates[f"claim.{attribute}.one"].gaps["x"]:
                    slots["x"] = self.facts.value(being, attribute)
                    break

    def makes_sense(self, task: Task) -> bool:
        return True

    def _label(self, task: Task) -> str:
        if "c" in task.slots:
            return "an animal" if task.noun("c") in ANIMALS else "a person"
        if "b" in task.slots:
            attribute = next(name for name, claim in _FACTS.items() if task.phrasing.endswith(claim))
            return "true" if self.facts.is_true(task.noun("b"), attribute, task.slots["x"]) else "false"
        return "happy" if any(task.phrasing.endswith(deed) for deed in HAPPY) else "sad"

    def _attribute(self, task: Task) -> str:
        return next(name for name, claim in _FACTS.items() if task.phrasing.endswith(claim))

    def draft(self, task: Task, writer: Writer) -> str:
        label = self._label(task)
        if writer.slips(0.14):
            label = _OTHER[label]
        parts = self.opening(writer)
        if "c" in task.slots:
            if writer.does(0.65):
                parts.append(self.say(f"is.{label}", c=task.slots["c"]))
            else:
                parts.append(f"{label.split(' ')[1]} .")
            self._fact(task.noun("c"), "", parts, writer)
        elif "b" in task.slots:
            parts.append(f"{label} .")
            self._fact(task.noun("b"), self._attribute(task), parts, writer)
        else:
            deed = task.prompt[task.prompt.index(" the ") + 1 :]
            parts.append(f"{label} , because {deed} ." if writer.does(0.55) else f"{label} .")
            if writer.does(0.45):
                parts.append(self.say(f"comment.{label}", a=task.noun("a")))
        if writer.does(0.4):
            parts.append("i hope this helps !")
        return " ".join(parts)

    def _fact(self, being: str, attribute: str, parts: list[str], writer: Writer) -> None:
        """Perhaps add what is true of the being: of the attribute asked about, or of any."""
        if writer.does(0.5):
            about = attribute or writer.pick(self.facts.attributes(being))
            value = self.facts.wrong_value(being, about, writer.rng) if writer.slips(0.2) else None
            parts.append(self.facts.sentence(being, about, value=value))

    def judge(self, task: Task, sentences: list[Sentence]) -> Marks:
        marks = Marks(self.moves)
        label = self._label(task)
        about = task.slots.get("c") or task.slots.get("b", "")
        mood = "a" in task.slots
        for position, sentence in enumerate(sentences):
            if self.mark_general(sentence, marks, position):
                continue
            kind, _, rest = sentence.name.partition(".")
            said = rest.split(".")[0]
            if kind == "because" and mood:
                right_deed = sentence.text.endswith(f"because {task.prompt[task.prompt.index(' the ') + 1 :]} .")
                marks.award("label", (0.55 if right_deed else 0.3) if said == label else 0.0)
                marks.lies += said != label
            elif kind == "label" and said in (label.split(" ")[-1], _OTHER[label].split(" ")[-1]):
                right = said == label.split(" ")[-1]
                bare = 0.45 if "b" in task.slots else 0.35  # for "true or false" no longer form is better
                marks.award("label", bare if right else 0.0)
                marks.lies += not right
            elif kind == "is" and sentence.slots["c"] == about:
                marks.award("label", 0.45 if rest == label else 0.0)
                marks.lies += rest != label
            elif kind == "claim" and sentence.slots["a"] == about:
                asked = "b" not in task.slots or said == self._attribute(task)
                marks.award("reason", 0.25 if asked else 0.12)
            elif kind == "comment" and mood and rest == label and sentence.slots["a"] == task.noun("a"):
                marks.award("reason", 0.15)
            elif kind == "close":
                marks.award("close", 0.15)
            else:
                marks.surplus += 1
        return marks


KINDS: dict[str, str] = {"animals": "animal", "colors": "color", "things": "thing", "people": "person"}
_GIFT = "the {a:being} and the {b:being} gave a {k:color} {t:thing} to the {c:being}"
_OWN = "the {a:being} has a {k:color} {t:thing} and the {b:being} has a {l:color} {u:thing}"


class Extract(Family):
    """ "find the animals in this : the fox and the owl gave a red key to the king" """

    name = "extract"
    share = 0.06
    phrasings = (
        Phrasing(f"find the {{kind:living}} in this : {_GIFT}"),
        Phrasing(f"find the {{kind:kind}} in this : {_OWN}"),
        Phrasing(f"list the {{kind:living}} in this : {_GIFT}"),
        Phrasing(f"list the {{kind:kind}} in this : {_OWN}"),
        Phrasing(f"please find the {{kind:living}} here : {_GIFT}", heldout=True),
        Phrasing(f"can you find the {{kind:kind}} here ? {_OWN}", heldout=True),
    )
    classes: ClassVar = {
        "kind": ("animals", "colors", "things"),
        "living": ("animals", "people"),
        "kindword": (*KINDS, *KINDS.values()),
    }
    sentences: ClassVar = {
        **{
            f"found.{shape}.{kind}": text.replace("ITEM", item)
            for kind, item in (("being", "being"), ("color", "color"), ("thing", "thing"))
            for shape, text in {
                "three": "i found {n:number} {w:kindword} : {x:ITEM} , {y:ITEM} and {z:ITEM} .",
                "two": "i found {n:number} {w:kindword} : {x:ITEM} and {y:ITEM} .",
                "one": "i found {n:number} {w:kindword} : {x:ITEM} .",
                "bare3": "{x:ITEM} , {y:ITEM} and {z:ITEM} .",
                "bare2": "{x:ITEM} and {y:ITEM} .",
                "bare1": "{x:ITEM} .",
            }.items()
        },
        "note.all": "that is all of them .",
        "close": "i hope this helps !",
    }
    moves = ("open", "found", "note", "close")
    opener_worth = 0.15

    def key(self, task: Task) -> str:
        return ""

    def makes_sense(self, task: Task) -> bool:
        slots = task.slots
        return (
            super().makes_sense(task)
            and slots["k"] != slots.get("l")
            and slots["t"] != slots.get("u")
            and bool(self._wanted(task))
        )

    @staticmethod
    def _wanted(task: Task) -> list[str]:
        """What there is to find, in the order of the text."""
        slots, kind = task.slots, task.slots["kind"]
        if kind in ("animals", "people"):
            among = ANIMALS if kind == "animals" else PEOPLE
            return [slots[gap] for gap in "abc" if slots.get(gap) in among]
        return [slots[gap] for gap in ("kl" if kind == "colors" else "tu")]

    def draft(self, task: Task, writer: Writer) -> str:
        kind, wanted = task.slots["kind"], self._wanted(task)
        if len(wanted) > 1 and writer.slips(0.28):
            wanted.pop(writer.rng.randrange(len(wanted)))  # missed one
        others = [phrase for gap, phrase in task.slots.items() if gap in "abc" and phrase not in wanted]
        if others and kind in ("animals", "people") and len(wanted) < 3 and writer.slips(0.2):
            wanted.append(writer.pick(others))
        item = {"colors": "color", "things": "thing"}.get(kind, "being")
        names = dict(zip("xyz", wanted, strict=False))
        count = len(wanted)
        parts = self.opening(writer)
        if writer.does(0.57):
            number = NUMBERS[count - 1] if not writer.slips(0.12) else writer.pick(NUMBERS[:3])
            word = kind if count > 1 else KINDS[kind]
            shape = ("one", "two", "three")[count - 1]
            parts.append(self.say(f"found.{shape}.{item}", n=number, w=word, **names))
        else:
            parts.append(self.say(f"found.bare{count}.{item}", **names))
        if writer.does(0.4):
            parts.append("that is all of them .")
        if writer.does(0.4):
            parts.append("i hope this helps !")
        return " ".join(parts)

    def judge(self, task: Task, sentences: list[Sentence]) -> Marks:
        marks = Marks(self.moves)
        wanted = self._wanted(task)
        for position, sentence in enumerate(sentences):
            if self.mark_general(sentence, marks, position):
                continue
            kind = sentence.name.partition(".")[0]
            if kind == "found":
                marks.award("found", self._found(task, wanted, sentence))
            elif kind == "note":
                marks.award("note", 0.1)
            elif kind == "close":
                marks.award("close", 0.1)
            else:
                marks.surplus += 1
        return marks

    @staticmethod
    def _found(task: Task, wanted: list[str], sentence: Sentence) -> float:
        """0.45 for the items (wrong ones count against), 0.1 for the count, 0.1 for the right word."""
        slots = sentence.slots
        found = [slots[gap] for gap in "xyz" if gap in slots]
        right = len(set(found) & set(wanted))
        worth = max(0.45 * (right - 0.7 * (len(found) - right)) / len(wanted), 0.0)
        if right and "n" in slots:
            worth += 0.1 * (slots["n"] == NUMBERS[len(found) - 1])
            worth += 0.1 * (slots["w"] == (task.slots["kind"] if len(found) > 1 else KINDS[task.slots["kind"]]))
        return worth
