"""Chat: someone says hello, or is sad, or has lost a shoe. The answer listens, helps, and asks back."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from minirlhf.world.families.base import Family, Marks, Phrasing, Sentence, Task
from minirlhf.world.writer import Writer


class Topic(NamedTuple):
    """`kind`: how to react; `tip`: what may help, best first; `ask`: a question back."""

    kind: str
    tips: tuple[str, ...]
    ask: str


FEELINGS: dict[str, Topic] = {
    "happy": Topic("glad", ("let us dance and eat cake !", "keep that smile ."), "what made you so happy ?"),
    "sad": Topic("sorry", ("a warm hug and a cup of tea may help .", "try to sing a song ."), "do you want to talk ?"),
    "tired": Topic("sorry", ("rest under a warm blanket .", "try to sleep a little ."), "did you sleep well ?"),
    "scared": Topic("sorry", ("keep a lamp on , and i will stay here .", "try to count the stars ."), "what was it ?"),
    "bored": Topic("sorry", ("you could build a castle of books !", "try to play games ."), "what do you like to do ?"),
    "hungry": Topic(
        "sorry", ("a cup of hot soup is good now .", "try to eat some bread ."), "what do you like to eat ?"
    ),
    "angry": Topic("sorry", ("count to five and look at the sky .", "try to go for a walk ."), "who was it ?"),
}
OTHER: dict[str, Topic] = {
    "hello": Topic("hello", ("i am very well , and the sun is out .", "i am well ."), "and how are you ?"),
    "morning": Topic("hello", ("i hope you slept like a bear .", "it is a nice day ."), "what will you do today ?"),
    "thanks": Topic("glad", ("it was a joy to help you .", "it was no work ."), "is there more i can do ?"),
    "lost": Topic(
        "sorry", ("look under the bed , all things hide there .", "try to look again ."), "where did you see it last ?"
    ),
}
TOPICS = {**FEELINGS, **OTHER}
REACTIONS: dict[str, tuple[str, ...]] = {
    "glad": ("that is lovely to hear , my friend !", "that is nice ."),
    "sorry": ("oh no , i am so sorry to hear that .", "that is sad ."),
    "hello": ("hello , my dear friend !", "hello ."),
}
DULL = "i see ."
WISHES: dict[str, float] = {"i wish you a lovely day !": 1.0, "have a nice day .": 0.5}


class Chat(Family):
    """ "i feel sad today" """

    name = "chat"
    share = 0.09
    phrasings = (
        Phrasing("hello , how are you ?"),
        Phrasing("good morning !"),
        Phrasing("thank you for your help !"),
        Phrasing("i feel {f:feeling} today"),
        Phrasing("i am so {f:feeling}"),
        Phrasing("hello , i am very {f:feeling} today"),
        Phrasing("i lost my {t:thing}"),
        Phrasing("help me , i lost my {t:thing} !"),
        Phrasing("today i feel very {f:feeling}", heldout=True),
        Phrasing("oh no , i lost my {t:thing}", heldout=True),
    )
    classes: ClassVar = {"feeling": tuple(FEELINGS)}
    sentences: ClassVar = {
        **{f"react.{kind}.{index}": text for kind, texts in REACTIONS.items() for index, text in enumerate(texts)},
        "react.dull.1": DULL,
        **{f"tip.{key}.{index}": text for key, topic in TOPICS.items() for index, text in enumerate(topic.tips)},
        **{f"ask.{key}": topic.ask for key, topic in TOPICS.items()},
        **{f"wish.{index}": text for index, text in enumerate(WISHES)},
    }
    moves = ("react", "tip", "ask", "wish")

    def key(self, task: Task) -> str:
        if "f" in task.slots:
            return task.slots["f"] + " " + task.phrasing
        return f"lost {task.slots['t']}" if "t" in task.slots else ""

    def limit(self, task: Task) -> int:
        return 38

    def draw_key(self, task: Task) -> str:
        """Which of the topics the prompt is about."""
        if "f" in task.slots:
            return task.slots["f"]
        if "t" in task.slots:
            return "lost"
        return {"hello": "hello", "good": "morning", "thank": "thanks"}[task.prompt.split(" ")[0]]

    def draft(self, task: Task, writer: Writer) -> str:
        key = self.draw_key(task)
        if writer.slips(0.08):  # not really listening
            key = writer.pick(list(TOPICS))
        topic = TOPICS[key]
        good, plain = REACTIONS[topic.kind]
        parts: list[str] = []
        if writer.does(0.75):
            parts.append(writer.grade([good], [plain], [DULL], chances=(0.55, 0.25, 0.2)))
        if writer.does(0.7):
            parts.append(writer.grade(topic.tips[:1], topic.tips[1:], chances=(0.65, 0.35)))
        if writer.does(0.5):
            parts.append(topic.ask)
        if writer.does(0.6) or not parts:
            parts.append(writer.grade(list(WISHES)[:1], list(WISHES)[1:], chances=(0.6, 0.4)))
        return " ".join(parts)

    def judge(self, task: Task, sentences: list[Sentence]) -> Marks:
        marks = Marks(self.moves)
        key = self.draw_key(task)
        for position, sentence in enumerate(sentences):
            if self.mark_general(sentence, marks, position):
                continue
            kind, _, rest = sentence.name.partition(".")
            about, _, level = rest.partition(".")
            if kind == "react" and about in (TOPICS[key].kind, "dull"):
                marks.award("react", 0.27 if level == "0" else 0.05 if about == "dull" else 0.15)
            elif kind == "tip" and about == key:
                marks.award("tip", 0.35 if level == "0" else 0.2)
            elif kind == "ask" and about == key:
                marks.award("ask", 0.25)
            elif kind == "wish":
                marks.award("wish", 0.13 * WISHES[sentence.text])
            else:
                marks.surplus += 1
        return marks
