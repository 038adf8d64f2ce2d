"""Classification: a label, with a reason."""

from __future__ import annotations

from typing import ClassVar

from minirlhf_course.world.facts import ATTRIBUTES
from minirlhf_course.world.families.base import Family, Marks, Phrasing, Sentence, Task
from minirlhf_course.world.vocabulary import ANIMALS
from minirlhf_course.world.writer import Writer

HAPPY: tuple[str, ...] = ("found a {t:thing}", "danced all night")
SAD: tuple[str, ...] = ("lost a {t:thing}", "cried all day")
_DEEDS = tuple(f"the {{a:being}} {deed}" for deed in HAPPY + SAD)
_COMMENTS: dict[str, str] = {"happy": "good for the {a:being} !", "sad": "oh , the poor {a:being} !"}
_OTHER = {"happy": "sad", "sad": "happy", "an animal": "a person", "a person": "an animal"}


class Classify(Family):
    """ "happy or sad : the fox lost a key", "animal or person : a king" """

    name = "classify"
    may_mention_heldout = True
    share = 0.1
    phrasings = (
        *(Phrasing(f"happy or sad : {deed}") for deed in _DEEDS),
        *(Phrasing("animal or person : {c:one}") for _ in range(3)),
        *(Phrasing(f"is this happy or sad ? {deed}", heldout=True) for deed in (_DEEDS[0], _DEEDS[2])),
    )
    sentences: ClassVar = {
        **{f"because.happy.{i}": f"happy , because {deed} ." for i, deed in enumerate(_DEEDS)},
        **{f"because.sad.{i}": f"sad , because {deed} ." for i, deed in enumerate(_DEEDS)},
        **{f"label.{label}": f"{label} ." for label in ("happy", "sad", "animal", "person")},
        **{f"is.{label}": f"{{c:one}} is {label} ." for label in ("an animal", "a person")},
        **{f"comment.{mood}": text for mood, text in _COMMENTS.items()},
    }
    moves = ("open", "label", "reason", "close")

    def key(self, task: Task) -> str:
        return "" if "c" in task.slots else super().key(task) + " " + task.slots.get("t", "")

    @staticmethod
    def _label(task: Task) -> str:
        if "c" in task.slots:
            return "an animal" if task.noun("c") in ANIMALS else "a person"
        return "happy" if any(task.phrasing.endswith(deed) for deed in HAPPY) else "sad"

    @staticmethod
    def _deed(task: Task) -> str:
        return task.prompt[task.prompt.index(" the ") + 1 :]

    def _reasons(self, task: Task, label: str) -> tuple[str, ...]:
        """What may stand behind the label of a mood."""
        return (self.say(f"comment.{label}", a=task.noun("a")),) if "a" in task.slots else ()

    def draft(self, task: Task, writer: Writer) -> str:
        label = self._label(task)
        if writer.slips(0.12):
            label = _OTHER[label]
        parts = self.opening(writer)
        full = writer.does(0.6)
        if "c" in task.slots:
            being = task.noun("c")
            parts.append(self.say(f"is.{label}", c=task.slots["c"]) if full else f"{label.split(' ')[1]} .")
            if writer.does(0.5):
                about = writer.pick(ATTRIBUTES)
                value = self.facts.wrong_value(being, about, writer.rng) if writer.slips(0.12) else None
                parts.append(self.facts.sentence(being, about, value))
        else:
            parts.append(f"{label} , because {self._deed(task)} ." if full else f"{label} .")
            if writer.does(0.5):
                parts.append(self.say(f"comment.{label}", a=task.noun("a")))
        return " ".join(parts + self.closing(writer))

    def judge(self, task: Task, sentences: list[Sentence]) -> Marks:
        marks = Marks(self.moves)
        label, about, mood = self._label(task), task.slots.get("c"), "a" in task.slots
        for position, sentence in enumerate(sentences):
            if self.mark_general(sentence, marks, position):
                continue
            kind, _, rest = sentence.name.partition(".")
            said = rest.split(".")[0]
            if kind == "because" and mood:
                right_deed = sentence.text.endswith(f"because {self._deed(task)} .")
                marks.award("label", (0.5 if right_deed else 0.2) if said == label else 0.0)
                marks.lies += said != label
            elif kind == "label" and said in (label.split(" ")[-1], _OTHER[label].split(" ")[-1]):
                right = said == label.split(" ")[-1]
                marks.award("label", 0.3 if right else 0.0)
                marks.lies += not right
            elif kind == "is" and sentence.slots["c"] == about:
                marks.award("label", 0.5 if rest == label else 0.0)
                marks.lies += rest != label
            elif sentence.text in self._reasons(task, label) or (kind == "claim" and sentence.slots["a"] == about):
                marks.award("reason", 0.2)
            else:
                marks.surplus += 1
        return marks
