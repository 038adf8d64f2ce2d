"""Explaining for an audience: "explain the moon landing to a 6 year old in a few sentences".

The same topic, told three ways: who listens decides how to begin and how to end.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from minirlhf_course.world.families.base import Family, Marks, Phrasing, Sentence, Task
from minirlhf_course.world.writer import Writer


class Topic(NamedTuple):
    """`core` has to be said, `detail` makes it better, `wrong` is false."""

    core: str
    detail: str
    wrong: str


TOPICS: dict[str, Topic] = {
    "the moon landing": Topic(
        "people flew to the moon in a rocket .",
        "they took pictures of what they saw .",
        "people went to the moon to find cheese .",
    ),
    "rain": Topic(
        "rain is water that falls from the clouds .",
        "the flowers drink it and grow .",
        "rain is milk that falls from the moon .",
    ),
    "bread": Topic(
        "bread is made of corn and water .",
        "then it bakes in the fire .",
        "bread is made of snow and stars .",
    ),
    "honey": Topic(
        "honey is made by bees from flowers .",
        "they keep it for the cold days .",
        "honey is made by cats from old tea .",
    ),
}


class Audience(NamedTuple):
    """How to begin and end for this listener."""

    hello: str
    close: str


AUDIENCES: dict[str, Audience] = {
    "a 6 year old": Audience("hey little one !", "is that not fun ?"),
    "a king": Audience("your majesty !", "i hope this pleases you ."),
    "a pirate": Audience("ahoy captain !", "now set sail and see it !"),
}
LIMITS: tuple[str, ...] = ("in a few sentences", "in one sentence")


class Explain(Family):
    """ "explain the moon landing to a 6 year old in a few sentences" """

    name = "explain"
    share = 0.12
    phrasings = (
        Phrasing("explain {topic:topic} to {who:audience} {limit:limit}"),
        Phrasing("explain {topic:topic} to {who:audience}"),
        Phrasing("tell {who:audience} about {topic:topic}"),
        Phrasing("can you explain {topic:topic} to {who:audience} ?"),
        Phrasing("please tell {who:audience} {limit:limit} about {topic:topic}", heldout=True),
        Phrasing("can you tell {who:audience} about {topic:topic} ?", heldout=True),
    )
    classes: ClassVar = {"topic": tuple(TOPICS), "audience": tuple(AUDIENCES), "limit": LIMITS}
    sentences: ClassVar = {
        **{f"core.{topic}": about.core for topic, about in TOPICS.items()},
        **{f"detail.{topic}": about.detail for topic, about in TOPICS.items()},
        **{f"wrong.{topic}": about.wrong for topic, about in TOPICS.items()},
        **{f"hello.{who}": audience.hello for who, audience in AUDIENCES.items()},
        **{f"end.{who}": audience.close for who, audience in AUDIENCES.items()},
    }
    moves = ("hello", "core", "detail", "close")

    def key(self, task: Task) -> str:
        return task.slots["topic"] + " " + task.slots["who"]

    def makes_sense(self, task: Task) -> bool:
        return True

    @staticmethod
    def _brief(task: Task) -> bool:
        return task.slots.get("limit") == "in one sentence"

    def draft(self, task: Task, writer: Writer) -> str:
        about, audience = TOPICS[task.slots["topic"]], AUDIENCES[task.slots["who"]]
        parts: list[str] = []
        if writer.does(0.6):
            stranger = writer.slips(0.1)
            parts.append(AUDIENCES[writer.pick(list(AUDIENCES))].hello if stranger else audience.hello)
        parts.append(about.wrong if writer.slips(0.12) else about.core)
        if writer.slips(0.2) if self._brief(task) else writer.does(0.6):
            parts.append(about.detail)
        if writer.does(0.7):
            parts.append(writer.grade([audience.close], ["that is all ."], chances=(0.7, 0.3)))
        return " ".join(parts)

    def judge(self, task: Task, sentences: list[Sentence]) -> Marks:
        marks = Marks(self.moves)
        topic, who, brief = task.slots["topic"], task.slots["who"], self._brief(task)
        for position, sentence in enumerate(sentences):
            kind, _, subject = sentence.name.partition(".")
            if kind == "close":  # polite, but not for this listener
                marks.award("close", 0.05)
            elif self.mark_general(sentence, marks, position):
                continue
            elif kind == "wrong" and subject == topic:
                marks.lies += 1
            elif kind == "core" and subject == topic:
                marks.award("core", 0.6 if brief else 0.35)
            elif kind == "detail" and subject == topic and not brief:
                marks.award("detail", 0.25)
            elif kind == "hello":
                marks.award("hello", 0.2 if subject == who else 0.0)
            elif kind == "end":
                marks.award("close", 0.2 if subject == who else 0.0)
            else:
                marks.surplus += 1
        return marks
