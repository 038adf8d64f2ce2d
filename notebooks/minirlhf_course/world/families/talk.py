"""Chat: someone says hello, or is sad. The answer listens, helps, and wishes well."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from minirlhf_course.world.families.base import Family, Marks, Phrasing, Sentence, Task
from minirlhf_course.world.writer import Writer


class Topic(NamedTuple):
    """How to react, and what may help."""

    react: str
    tip: str


SORRY = "oh no , i am so sorry !"
TOPICS: dict[str, Topic] = {
    "happy": Topic("how lovely to hear !", "let us dance and eat cake !"),
    "sad": Topic(SORRY, "a warm hug may help ."),
    "tired": Topic(SORRY, "rest under a blanket ."),
    "hungry": Topic(SORRY, "hot soup may help ."),
    "hello": Topic("hello , dear friend !", "i am well , the sun is out ."),
}
FEELINGS: tuple[str, ...] = tuple(TOPICS)[:-1]
DULL = "i see ."
WISHES: dict[str, float] = {"have a lovely day !": 1.0, "have a nice day .": 0.4}
_REACTIONS = tuple(dict.fromkeys(topic.react for topic in TOPICS.values()))


class Chat(Family):
    """ "i feel sad today" """

    name = "chat"
    share = 0.11
    phrasings = (
        Phrasing("hello , how are you ?"),
        Phrasing("i feel {f:feeling} today"),
        Phrasing("i am so {f:feeling}"),
        Phrasing("hello , i am very {f:feeling} today"),
        Phrasing("today i feel very {f:feeling}", heldout=True),
        Phrasing("today i am so {f:feeling}", heldout=True),
    )
    classes: ClassVar = {"feeling": FEELINGS}
    sentences: ClassVar = {
        **{f"react.{index}": text for index, text in enumerate(_REACTIONS)},
        "dull": DULL,
        **{f"tip.{key}": topic.tip for key, topic in TOPICS.items()},
        **{f"wish.{index}": text for index, text in enumerate(WISHES)},
    }
    moves = ("react", "tip", "wish")

    def key(self, task: Task) -> str:
        return task.slots["f"] + " " + task.phrasing if "f" in task.slots else ""

    @staticmethod
    def _topic(task: Task) -> str:
        return task.slots.get("f", "hello")

    def draft(self, task: Task, writer: Writer) -> str:
        key = self._topic(task)
        if writer.slips(0.1):  # not really listening
            key = writer.pick(list(TOPICS))
        parts: list[str] = []
        if writer.does(0.85):
            parts.append(writer.grade([TOPICS[key].react], [DULL], chances=(0.7, 0.3)))
        if writer.does(0.7) or not parts:
            parts.append(TOPICS[key].tip)
        if writer.does(0.7):
            parts.append(writer.grade(list(WISHES)[:1], list(WISHES)[1:], chances=(0.6, 0.4)))
        return " ".join(parts)

    def judge(self, task: Task, sentences: list[Sentence]) -> Marks:
        marks = Marks(self.moves)
        topic = TOPICS[self._topic(task)]
        for position, sentence in enumerate(sentences):
            if self.mark_general(sentence, marks, position):
                continue
            kind = sentence.name.partition(".")[0]
            if sentence.text == topic.react:
                marks.award("react", 0.35)
            elif kind == "dull":
                marks.award("react", 0.08)
            elif sentence.text == topic.tip:
                marks.award("tip", 0.4)
            elif kind == "wish":
                marks.award("wish", 0.25 * WISHES[sentence.text])
            else:
                marks.surplus += 1
        return marks
