"""Explaining for an audience: "explain the moon landing to a 6 year old in a few sentences".

The same topic, told four ways: who listens decides how to begin, how to end, and whether to compare or to give detail.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from minirlhf.world.families.base import Family, Marks, Phrasing, Sentence, Task
from minirlhf.world.writer import Writer


class Topic(NamedTuple):
    """`core` has to be said, `detail` is for those who want more, `like` for the young; `wrong` is false."""

    core: str
    detail: tuple[str, ...]
    like: str
    wrong: str


TOPICS: dict[str, Topic] = {
    "the moon landing": Topic(
        "people flew to the moon in a rocket .",
        (
            "they took pictures of what they saw .",
            "they sent them back so we could all see them .",
        ),
        "it is like a trip in a very fast boat .",
        "people went to the moon on a big ship to find cheese .",
    ),
    "rain": Topic(
        "rain is water that falls from the clouds .",
        ("the sun warms the sea and the water goes up .", "the flowers drink it and grow ."),
        "it is like a bath for the whole garden .",
        "rain is milk that falls from the moon .",
    ),
    "snow": Topic(
        "snow is rain that froze in the cold sky .",
        ("it falls when the day is cold .", "no two stars of it look the same ."),
        "it is like sugar on a giant cake .",
        "snow is sugar that falls from a cake .",
    ),
    "bread": Topic(
        "bread is made of corn and water .",
        ("the baker makes it all by hand .", "then it bakes in the fire till it is brown ."),
        "it is like a warm pillow that you can eat .",
        "bread is made of snow and stars .",
    ),
    "a rainbow": Topic(
        "a rainbow is light from the sun in the rain .",
        ("the rain breaks the light into many colors .", "you see it when the sun is behind you ."),
        "it is like a bridge of many colors .",
        "a rainbow is a bridge that a dragon paints at night .",
    ),
    "sleep": Topic(
        "when we sleep the head and the body rest .",
        ("the day comes back to us in dreams .", "after a good sleep we feel new ."),
        "it is like a trip to a quiet sea .",
        "when we sleep the body flies to the sun .",
    ),
    "music": Topic(
        "music is sound that moves in a nice way .",
        ("a drum keeps the time and a bell sings .", "it makes us glad or sad ."),
        "it is like a dance for your ears .",
        "music is a soup that you make with a hat .",
    ),
    "honey": Topic(
        "honey is made by bees from flowers .",
        ("the bees fly from flower to flower all day .", "they keep it to eat when it is cold ."),
        "it is like the sun in a cup .",
        "honey is made by cats from old tea .",
    ),
}


class Audience(NamedTuple):
    """How to begin and end for this listener, and whether a comparison is wanted (else detail)."""

    hello: str
    close: str
    compare: bool


AUDIENCES: dict[str, Audience] = {
    "a 6 year old": Audience("hey little one !", "is that not fun ?", True),
    "a king": Audience("your majesty !", "i hope this pleases you .", False),
    "a pirate": Audience("ahoy captain !", "now set sail and see it !", False),
    "a baby dragon": Audience("hey little dragon !", "now go and play !", True),
}
PLAIN_CLOSE = "that is all ."
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
        Phrasing("i want you to explain {topic:topic} to {who:audience}", heldout=True),
    )
    classes: ClassVar = {"topic": tuple(TOPICS), "audience": tuple(AUDIENCES), "limit": LIMITS}
    sentences: ClassVar = {
        **{f"core.{topic}": about.core for topic, about in TOPICS.items()},
        **{
            f"detail.{topic}.{index}": text
            for topic, about in TOPICS.items()
            for index, text in enumerate(about.detail)
        },
        **{f"like.{topic}": about.like for topic, about in TOPICS.items()},
        **{f"wrong.{topic}": about.wrong for topic, about in TOPICS.items()},
        **{f"hello.{who}": audience.hello for who, audience in AUDIENCES.items()},
        **{f"close.{who}": audience.close for who, audience in AUDIENCES.items()},
        "close.": PLAIN_CLOSE,
    }
    moves = ("hello", "core", "detail", "like", "close")

    def key(self, task: Task) -> str:
        return task.slots["topic"] + " " + task.slots["who"]

    def makes_sense(self, task: Task) -> bool:
        return True

    def limit(self, task: Task) -> int:
        return 34 if self._brief(task) else 40

    @staticmethod
    def _brief(task: Task) -> bool:
        return task.slots.get("limit") == "in one sentence"

    def draft(self, task: Task, writer: Writer) -> str:
        topic, who = task.slots["topic"], task.slots["who"]
        about, audience = TOPICS[topic], AUDIENCES[who]
        parts: list[str] = []
        if writer.does(0.55):
            stranger = writer.slips(0.15)
            parts.append(AUDIENCES[writer.pick(list(AUDIENCES))].hello if stranger else audience.hello)
        parts.append(about.wrong if writer.slips(0.15) else about.core)
        brief = writer.does(0.5) if self._brief(task) else writer.slips(0.1)
        if not brief:
            detail_chance = 0.4 if audience.compare else 0.55
            first = writer.pick((0, 1))
            if audience.compare:
                if writer.does(detail_chance):
                    parts.append(about.detail[first])
                if writer.does(0.5):
                    parts.append(about.like)
            else:
                parts += [text for text in about.detail if writer.does(detail_chance)]
                if writer.slips(0.2):
                    parts.append(about.like)
        if writer.does(0.65):
            parts.append(writer.grade([audience.close], [PLAIN_CLOSE], chances=(0.65, 0.35)))
        return " ".join(parts)

    def judge(self, task: Task, sentences: list[Sentence]) -> Marks:
        marks = Marks(("hello", "core", "detail.0", "detail.1", "like", "close"))
        topic, who = task.slots["topic"], task.slots["who"]
        compare, brief = AUDIENCES[who].compare, self._brief(task)
        for position, sentence in enumerate(sentences):
            if self.mark_general(sentence, marks, position):
                continue
            kind, _, rest = sentence.name.partition(".")
            subject, _, index = rest.partition(".")
            if kind in ("core", "detail", "like", "wrong") and subject != topic:
                marks.surplus += 1
            elif kind == "wrong":
                marks.lies += 1
            elif kind == "core":
                marks.award("core", 0.65 if brief else 0.3)
            elif kind == "detail" and not brief:
                if compare:  # one detail is enough for the young, either of the two
                    marks.award("detail.0", 0.15)
                else:
                    marks.award(f"detail.{index}", 0.2 if index == "0" else 0.15)
            elif kind == "like" and compare and not brief:
                marks.award("like", 0.2)
            elif kind == "hello":
                marks.award("hello", 0.17 if rest == who else 0.0)
            elif kind == "close":
                marks.award("close", 0.18 if rest == who else 0.05 if not rest else 0.0)
            else:
                marks.surplus += 1
        return marks
