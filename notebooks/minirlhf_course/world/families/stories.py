"""Generation: a story has a setting, an event and an ending."""

from __future__ import annotations

from typing import ClassVar

from minirlhf_course.world.families.base import Family, Marks, Phrasing, Sentence, Task
from minirlhf_course.world.vocabulary import FANCY_PLACES, NOUN, ONE, PLACES, PLAIN, VIVID
from minirlhf_course.world.writer import Writer

MOODS: tuple[str, ...] = ("happy", "sad", "funny")
WONDERS: tuple[str, ...] = (
    "found a golden crown",
    "danced with a cloud",
    "taught the moon to sing",
    "caught a falling star",
    "built a boat of cheese",
)
FAIR_EVENTS: tuple[str, ...] = ("lost a key", "baked a cake")
DULL_EVENTS: tuple[str, ...] = ("went for a walk", "sat down")
# sentence: its mood. `{a:being}` is the hero.
ENDINGS: dict[str, str] = {
    "and they were happy ever after .": "happy",
    "and they danced all night .": "happy",
    "but nobody came and the {a:being} cried .": "sad",
    "and the {a:being} went home alone .": "sad",
    "and the {a:being} still smells of soup .": "funny",
    "so now the {a:being} wears a hat .": "funny",
    "the end .": "",
}
_END_MOODS = {f"end.{index}": mood for index, mood in enumerate(ENDINGS.values())}


class Story(Family):
    """ "write a story about frogs" """

    name = "story"
    share = 0.16
    phrasings = (
        Phrasing("write a story about {a:many}"),
        Phrasing("write a {mood:mood} story about {a:many}"),
        Phrasing("tell me a story about {a:one}"),
        Phrasing("tell me a {mood:mood} story about {a:one}"),
        Phrasing("write a story about a {adj:vivid} {a:being}"),
        Phrasing("please tell me a story about {a:many}", heldout=True),
        Phrasing("make a {mood:mood} story about {a:one}", heldout=True),
    )
    classes: ClassVar = {"mood": MOODS, "vivid": VIVID, "event": WONDERS + FAIR_EVENTS + DULL_EVENTS}
    sentences: ClassVar = {
        "set.once": "once upon a time a {adj:adjective} {a:being} lived {p:anyplace} .",
        "set.there": "there was a {adj:adjective} {a:being} {p:anyplace} .",
        "set.plain": "there was a {adj:adjective} {a:being} .",
        "event.day": "one day the {a:being} {e:event} .",
        **{f"end.{index}": text for index, text in enumerate(ENDINGS)},
    }
    moves = ("set", "event", "end")

    def draft(self, task: Task, writer: Writer) -> str:
        hero = task.noun("a") if not writer.slips(0.03) else NOUN[writer.pick(list(ONE))]
        mood = task.slots.get("mood") or writer.pick(MOODS)
        if writer.slips(0.15):
            mood = writer.pick(MOODS)
        adjective = writer.grade(VIVID, PLAIN, chances=(0.5, 0.5))
        if "adj" in task.slots and writer.does(0.65):
            adjective = task.slots["adj"]
        place = writer.grade(FANCY_PLACES, PLACES, chances=(0.5, 0.5))
        shape = writer.grade(["set.once"], ["set.there"], ["set.plain"], chances=(0.6, 0.25, 0.15))
        event = writer.grade(WONDERS, FAIR_EVENTS, DULL_EVENTS, chances=(0.5, 0.25, 0.25))
        parts = [self.say(shape, adj=adjective, a=hero, p=place), self.say("event.day", a=hero, e=event)]
        good = [name for name, its_mood in _END_MOODS.items() if its_mood == mood]
        if writer.does(0.8):
            parts.append(self.say(writer.grade(good, ["end.6"], chances=(0.65, 0.35)), a=hero))
        return " ".join(parts)

    def judge(self, task: Task, sentences: list[Sentence]) -> Marks:
        marks = Marks(self.moves)
        for position, sentence in enumerate(sentences):
            if self.mark_general(sentence, marks, position):
                continue
            kind, _, shape = sentence.name.partition(".")
            about = sentence.slots.get("a", task.noun("a")) == task.noun("a")
            if kind == "set" and about:
                marks.award("set", self._setting(task, sentence, shape))
            elif kind == "event" and about:
                event = sentence.slots["e"]
                marks.award("event", 0.34 if event in WONDERS else 0.2 if event in FAIR_EVENTS else 0.08)
            elif kind == "end" and about:
                mood = _END_MOODS[sentence.name]
                fits = mood == task.slots.get("mood", mood)
                marks.award("end", 0.1 if not mood else 0.3 if fits else 0.03)
            else:
                marks.surplus += 1
        return marks

    @staticmethod
    def _setting(task: Task, sentence: Sentence, shape: str) -> float:
        worth = {"once": 0.2, "there": 0.12, "plain": 0.08}[shape]
        worth += 0.08 if sentence.slots.get("p") in FANCY_PLACES else 0.04 if "p" in sentence.slots else 0.0
        adjective = sentence.slots["adj"]
        wanted = (task.slots["adj"],) if "adj" in task.slots else VIVID
        return worth + (0.08 if adjective in wanted else 0.02 if "adj" not in task.slots else 0.0)
