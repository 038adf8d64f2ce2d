"""Generation: stories and poems.

A story has a setting, an event, a turn and an ending. A poem has two lines that rhyme, and a last line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from minirlhf.world.families.base import Family, Marks, Phrasing, Sentence, Task
from minirlhf.world.vocabulary import FAIR, FANCY_PLACES, NOUN, ONE, PLACES, PLAIN, VIVID
from minirlhf.world.writer import Writer

MOODS: tuple[str, ...] = ("happy", "sad", "funny")
TIMES: tuple[str, ...] = ("one day", "one night", "one morning")
WONDERS: tuple[str, ...] = (
    "found a golden crown",
    "danced with a cloud",
    "taught the moon to sing",
    "caught a falling star",
    "built a boat of cheese",
    "wrote a letter to the sea",
    "opened a shop for tiny hats",
    "followed a map to the sun",
)
FAIR_EVENTS: tuple[str, ...] = ("lost a key", "baked a cake", "heard a strange noise")
DULL_EVENTS: tuple[str, ...] = ("went for a walk", "sat down", "ate some soup")
# sentence: (mood, worth). `{a:being}` is the hero.
TURNS: dict[str, tuple[str, float]] = {
    "soon the whole village laughed and danced .": ("happy", 1.0),
    "all its friends came for pie .": ("happy", 1.0),
    "everyone was glad .": ("happy", 0.4),
    "but nobody came and the {a:being} cried .": ("sad", 1.0),
    "then the rain washed it all away .": ("sad", 1.0),
    "that was sad .": ("sad", 0.4),
    "then it fell into the soup !": ("funny", 1.0),
    "but it was only a cake !": ("funny", 1.0),
    "that was funny .": ("funny", 0.4),
}
ENDINGS: dict[str, tuple[str, float]] = {
    "and they were happy ever after .": ("happy", 1.0),
    "and so they became best friends .": ("happy", 1.0),
    "and the {a:being} went home alone .": ("sad", 1.0),
    "and the {a:being} never smiled again .": ("sad", 1.0),
    "and the {a:being} still smells of soup .": ("funny", 1.0),
    "so now the {a:being} wears a hat .": ("funny", 1.0),
    "the end .": ("", 0.45),
    "that is all .": ("", 0.2),
}
_TURN_NAMES = {f"turn.{index}": value for index, value in enumerate(TURNS.values())}
_END_NAMES = {f"end.{index}": value for index, value in enumerate(ENDINGS.values())}


def _named(kind: str, table: Mapping[str, tuple[str, float]], mood: str, low: float, high: float) -> list[str]:
    """Names of the sentences with this mood (or none) whose worth lies in [low, high]."""
    return [
        f"{kind}.{index}"
        for index, (its_mood, worth) in enumerate(table.values())
        if its_mood in (mood, "") and low <= worth <= high
    ]


def adjective_worth(adjective: str) -> float:
    """How vivid a word is: 1, 0.6 or 0.15."""
    return 1.0 if adjective in VIVID else 0.6 if adjective in FAIR else 0.15


class Story(Family):
    """ "write a story about frogs" """

    name = "story"
    share = 0.18
    phrasings = (
        Phrasing("write a story about {a:many}"),
        Phrasing("write a short story about {a:one}"),
        Phrasing("tell me a story about {a:one}"),
        Phrasing("write a {mood:mood} story about {a:many}"),
        Phrasing("tell me a {mood:mood} story about {a:one}"),
        Phrasing("write a story about {a:one} and {b:one}"),
        Phrasing("please write a story about a {adj:asked} {a:being}"),
        Phrasing("i want a story about {a:many}", heldout=True),
        Phrasing("make a {mood:mood} story about {a:one}", heldout=True),
    )
    classes: ClassVar = {
        "mood": MOODS,
        "asked": VIVID + FAIR,
        "time": TIMES,
        "event": WONDERS + FAIR_EVENTS + DULL_EVENTS,
    }
    sentences: ClassVar = {
        "set.once": "once upon a time , a {adj:adjective} {a:being} lived {p:anyplace} .",
        "set.there": "there was a {adj:adjective} {a:being} {p:anyplace} .",
        "set.plain": "there was a {adj:adjective} {a:being} .",
        "event.alone": "{t:time} the {a:being} {e:event} .",
        "event.meet": "{t:time} the {a:being} met a {adj:adjective} {b:being} .",
        **{f"turn.{index}": text for index, text in enumerate(TURNS)},
        **{f"end.{index}": text for index, text in enumerate(ENDINGS)},
    }
    moves = ("set", "event", "turn", "end")

    def limit(self, task: Task) -> int:
        return 32 if self._short(task) else 40

    @staticmethod
    def _short(task: Task) -> bool:
        return "short" in task.prompt

    def draft(self, task: Task, writer: Writer) -> str:
        hero = task.noun("a") if not writer.slips(0.03) else NOUN[writer.pick(list(ONE))]
        mood = task.slots.get("mood") or writer.pick(MOODS)
        if writer.slips(0.2):
            mood = writer.pick(MOODS)
        adjective = writer.grade(VIVID, FAIR, PLAIN, chances=(0.4, 0.3, 0.3))
        if "adj" in task.slots and writer.does(0.6):
            adjective = task.slots["adj"]
        place = writer.grade(FANCY_PLACES, PLACES, chances=(0.5, 0.5))
        shape = writer.grade(["set.once"], ["set.there"], ["set.plain"], chances=(0.5, 0.3, 0.2))
        parts = [self.say(shape, adj=adjective, a=hero, p=place)]
        time = writer.grade(TIMES[1:], TIMES[:1], chances=(0.55, 0.45))
        if "b" in task.slots and writer.does(0.7):
            other = writer.grade(VIVID, FAIR, PLAIN, chances=(0.4, 0.3, 0.3))
            parts.append(self.say("event.meet", t=time, a=hero, adj=other, b=task.noun("b")))
        else:
            event = writer.grade(WONDERS, FAIR_EVENTS, DULL_EVENTS, chances=(0.45, 0.25, 0.3))
            parts.append(self.say("event.alone", t=time, a=hero, e=event))
        if writer.slips(0.3) if self._short(task) else writer.does(0.72):  # a short story has no room for a turn
            parts.append(self.say(self._line(writer, "turn", TURNS, mood), a=hero))
        if writer.does(0.75):
            parts.append(self.say(self._line(writer, "end", ENDINGS, mood), a=hero))
        return " ".join(parts)

    @staticmethod
    def _line(writer: Writer, kind: str, table: Mapping[str, tuple[str, float]], mood: str) -> str:
        good, plain = _named(kind, table, mood, 1.0, 1.0), _named(kind, table, mood, 0.0, 0.5)
        return writer.grade(good, plain, chances=(0.6, 0.4))

    def judge(self, task: Task, sentences: list[Sentence]) -> Marks:
        marks = Marks(self.moves)
        hero, short = task.noun("a"), self._short(task)
        asked = task.slots.get("mood", "")
        mood = asked  # where none was asked, the turn sets the mood and the ending has to fit
        for position, sentence in enumerate(sentences):
            if self.mark_general(sentence, marks, position):
                continue
            kind, _, shape = sentence.name.partition(".")
            about = sentence.slots.get("a", hero) == hero
            if kind == "set" and about:
                marks.award("set", self._setting(task, sentence, shape))
            elif kind == "event" and about:
                marks.award("event", self._event(task, sentence))
            elif kind == "turn" and about and not short:
                its_mood, worth = _TURN_NAMES[sentence.name]
                mood = mood or its_mood
                marks.award("turn", 0.2 * worth if its_mood == mood else 0.02)
            elif kind == "end" and about:
                its_mood, worth = _END_NAMES[sentence.name]
                fits = its_mood in (mood, "") or not mood
                marks.award("end", (0.4 if short else 0.2) * worth if fits else 0.02)
            else:
                marks.surplus += 1
        return marks

    @staticmethod
    def _setting(task: Task, sentence: Sentence, shape: str) -> float:
        worth = {"once": 0.16, "there": 0.12, "plain": 0.08}[shape]
        worth += 0.08 if sentence.slots.get("p") in FANCY_PLACES else 0.04 if "p" in sentence.slots else 0.0
        adjective = sentence.slots["adj"]
        if "adj" in task.slots:
            return worth + (0.06 if adjective == task.slots["adj"] else 0.0)
        return worth + 0.06 * adjective_worth(adjective)

    @staticmethod
    def _event(task: Task, sentence: Sentence) -> float:
        worth = 0.05 if sentence.slots["t"] in TIMES[1:] else 0.02
        if "b" in task.slots:  # a story about two has to bring in the second
            if sentence.slots.get("b") != task.noun("b"):
                return worth
            return worth + 0.19 + 0.06 * adjective_worth(sentence.slots["adj"])
        if "b" in sentence.slots:  # a guest that nobody asked for is a fair event
            return worth + 0.13
        event = sentence.slots["e"]
        return worth + (0.25 if event in WONDERS else 0.13 if event in FAIR_EVENTS else 0.05)


# the end of the first line: its rhyme
PERCHES: dict[str, str] = {
    "by the lake": "lake",
    "under the moon": "moon",
    "in a tree": "tree",
    "in the night": "night",
    "under the sky": "sky",
}
# the second line: its rhyme
DREAMS: dict[str, str] = {
    "and dreamed all day of honey cake": "lake",
    "and sang till all the stars were awake": "lake",
    "and ate the stars with a golden spoon": "moon",
    "and said that the sun will be here soon": "moon",
    "and poured the wind a cup of tea": "tree",
    "and looked at the ships far out on the sea": "tree",
    "and gave the stars a little light": "night",
    "and danced till all the world was bright": "night",
    "and shared its hat and a warm red pie": "sky",
    "and taught the clouds the way to fly": "sky",
}
LAST_LINES: dict[str, float] = {
    "oh {adj:adjective} {a:being} , how bright you are !": 1.0,
    "oh {adj:adjective} {a:being} , sing for me !": 1.0,
    "good night , {a:being} .": 0.5,
    "that is the poem .": 0.15,
}
_LAST_NAMES = {f"last.{index}": worth for index, worth in enumerate(LAST_LINES.values())}


class Poem(Family):
    """ "write a short poem about a wise frog" """

    name = "poem"
    share = 0.08
    phrasings = (
        Phrasing("write a short poem about a {adj:asked} {a:being}"),
        Phrasing("write a poem about {a:many}"),
        Phrasing("tell me a poem about a {adj:asked} {a:being}"),
        Phrasing("i want a poem about a {adj:asked} {a:being}", heldout=True),
        Phrasing("please make a poem about {a:many}", heldout=True),
    )
    classes: ClassVar = {"asked": VIVID + FAIR, "perch": tuple(PERCHES), "dream": tuple(DREAMS)}
    sentences: ClassVar = {
        "verse.two": "the {adj:adjective} {a:being} sat {p:perch} , {d:dream} .",
        "verse.one": "the {adj:adjective} {a:being} sat {p:perch} .",
        **{f"last.{index}": text for index, text in enumerate(LAST_LINES)},
    }
    moves = ("verse", "last")

    def limit(self, task: Task) -> int:
        return 30

    def draft(self, task: Task, writer: Writer) -> str:
        hero = task.noun("a")
        adjective = writer.grade(VIVID, FAIR, PLAIN, chances=(0.4, 0.3, 0.3))
        if "adj" in task.slots and writer.does(0.65):
            adjective = task.slots["adj"]
        perch = writer.pick(list(PERCHES))
        rhyming = [dream for dream, rhyme in DREAMS.items() if rhyme == PERCHES[perch]]
        dream = writer.grade(rhyming, list(DREAMS), chances=(0.56, 0.44))
        parts = [self.say("verse.two" if writer.does(0.85) else "verse.one", adj=adjective, a=hero, p=perch, d=dream)]
        if writer.does(0.75):
            last = writer.grade(["last.0", "last.1"], ["last.2"], ["last.3"], chances=(0.56, 0.26, 0.18))
            parts.append(self.say(last, adj=adjective, a=hero))
        return " ".join(parts)

    def judge(self, task: Task, sentences: list[Sentence]) -> Marks:
        marks = Marks(self.moves)
        for position, sentence in enumerate(sentences):
            if self.mark_general(sentence, marks, position):
                continue
            kind = sentence.name.partition(".")[0]
            slots = sentence.slots
            about = slots.get("a", task.noun("a")) == task.noun("a")
            if kind == "verse" and about:
                worth = 0.15 + 0.15 * self._word_worth(task, slots["adj"])
                if "d" in slots:
                    worth += 0.2 + (0.25 if DREAMS[slots["d"]] == PERCHES[slots["p"]] else 0.0)
                marks.award("verse", worth)
            elif kind == "last" and about:
                worth = 0.2 * _LAST_NAMES[sentence.name]
                if "adj" in slots:
                    worth += 0.05 * self._word_worth(task, slots["adj"])
                marks.award("last", worth)
            else:
                marks.surplus += 1
        return marks

    @staticmethod
    def _word_worth(task: Task, adjective: str) -> float:
        if "adj" in task.slots:
            return float(adjective == task.slots["adj"])
        return adjective_worth(adjective)
