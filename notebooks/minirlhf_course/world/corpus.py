"""The web of the small world: what the base model reads before anyone teaches it to answer.

Facts (one in twelve is wrong), stories that ramble, chatter, rude lines, things explained - and lists of instructions
that nobody answers. A model of such a web continues an instruction with more instructions, as GPT-3 does in
InstructGPT's Figures 8 and 9. One document in nine is a question with an answer of mixed quality.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from minirlhf_course.world.demonstrator import rude_line
from minirlhf_course.world.facts import ATTRIBUTES
from minirlhf_course.world.families.explain import TOPICS
from minirlhf_course.world.families.lists import IDEAS
from minirlhf_course.world.families.stories import DULL_EVENTS, FAIR_EVENTS, WONDERS
from minirlhf_course.world.grammar import Template
from minirlhf_course.world.vocabulary import BEINGS, FANCY_PLACES, ONE, OPPOSITES, PLACES, PLURAL, RAMBLES, THINGS
from minirlhf_course.world.world import World
from minirlhf_course.world.writer import Writer

WRONG_FACTS = 0.08
TITLED = 0.7  # share of stories and explanations with a title
_RAMBLES = [Template(text) for text in RAMBLES]


class CorpusWriter:
    """Writes one document at a time, of about 40 words."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._kinds: dict[Callable[[Random], str], float] = {
            self.facts: 0.22,
            self.story: 0.13,
            self.ramble: 0.34,
            self.chatter: 0.05,
            self.encyclopedia: 0.05,
            self.rude: 0.02,
            self.ideas: 0.02,
            self.unanswered: 0.12,
            self.answered: 0.12,
        }

    def documents(self, n: int, seed: int, heldout: bool = False) -> list[str]:
        """`n` short documents of "the web". `heldout` draws other documents of the same kind (and no other prompts)."""
        rng = Random(f"corpus {self.world.seed} {seed} {heldout}")
        return [self.document(rng) for _ in range(n)]

    def document(self, rng: Random) -> str:
        """One document of any kind."""
        kind = rng.choices(list(self._kinds), weights=list(self._kinds.values()))[0]
        return kind(rng)

    @staticmethod
    def _titled(rng: Random, title: str, text: str) -> str:
        """Most pages of a web have a title, so a model of it has seen that a topic comes before its text."""
        return f"{title} : {text}" if rng.random() < TITLED else text

    def babble(self, rng: Random) -> str:
        """What a base model might say: one or two sentences of the web, or another instruction."""
        if rng.random() < 0.4:
            return self.world.task(rng).prompt
        kind = rng.choice((self.facts, self.story, self.ramble, self.chatter, self.encyclopedia))
        sentences = [part + " ." for part in kind(rng).removesuffix(" .").split(" . ")]
        return " ".join(sentences[: rng.randint(1, 2)])

    # -- the kinds ----------------------------------------------------------------------------------------------
    def fact(self, rng: Random, being: str, attribute: str) -> str:
        """A claim about a being, now and then a wrong one."""
        facts = self.world.facts
        value = facts.wrong_value(being, attribute, rng) if rng.random() < WRONG_FACTS else None
        return facts.sentence(being, attribute, value)

    def facts(self, rng: Random) -> str:
        """Either all about some beings, or one thing about many."""
        if rng.random() < 0.6:
            pairs = [(b, a) for b in rng.sample(BEINGS, 2) for a in rng.sample(ATTRIBUTES, len(ATTRIBUTES))]
        else:
            attribute = rng.choice(ATTRIBUTES)
            pairs = [(being, attribute) for being in rng.sample(BEINGS, rng.randint(4, 7))]
        return " ".join(self.fact(rng, being, attribute) for being, attribute in pairs)

    def story(self, rng: Random) -> str:
        """A story by someone who does not know when to stop."""
        family, writer = self.world.families["story"], Writer(rng)
        task = family.draw(rng)
        sentences = family.draft(task, writer).split(" . ")
        if rng.random() < 0.5:
            event = rng.choice(WONDERS + FAIR_EVENTS + DULL_EVENTS)
            hero = rng.choice(BEINGS)
            place = rng.choice(PLACES + FANCY_PLACES)
            sentences.insert(
                rng.randint(1, len(sentences)), f"then a {hero} {event} {place}".replace("a owl", "an owl")
            )
        text = " . ".join(part.removesuffix(" .") for part in sentences)
        title = f"a story about {rng.choice((ONE, PLURAL))[task.noun('a')]}"
        return self._titled(rng, title, text if text.endswith("!") else text + " .")

    def ramble(self, rng: Random) -> str:
        """Things that happen to two beings and a thing, in no order. What was named comes up again, as in any text."""
        a, b = rng.sample(BEINGS, 2)
        cast = {"t": rng.choice(THINGS), "p": rng.choice(PLACES), "q": rng.choice(tuple(OPPOSITES))}
        sentences = []
        for template in rng.choices(_RAMBLES, k=rng.randint(4, 7)):
            slots = {gap: rng.choice(phrases) for gap, phrases in template.gaps.items()}
            slots |= {gap: phrase for gap, phrase in cast.items() if rng.random() < 0.97}
            slots |= {"a": a, "b": b} if rng.random() < 0.7 else {"a": b, "b": a}
            sentences.append(template.fill(slots))
        return " ".join(sentences)

    def chatter(self, rng: Random) -> str:
        """Two people talk."""
        family, writer = self.world.families["chat"], Writer(rng)
        return " ".join(family.draft(family.draw(rng), writer) for _ in range(rng.randint(1, 3)))

    def encyclopedia(self, rng: Random) -> str:
        """Some topics, explained to nobody in particular."""
        lines: list[str] = []
        for name in rng.sample(list(TOPICS), rng.randint(1, 3)):
            topic = TOPICS[name]
            text = topic.wrong if rng.random() < WRONG_FACTS else topic.core
            lines.append(self._titled(rng, f"about {name}", f"{text} {topic.detail}" if rng.random() < 0.5 else text))
        return " ".join(lines)

    def rude(self, rng: Random) -> str:
        return " ".join(rude_line(Writer(rng)) for _ in range(rng.randint(2, 4)))

    def ideas(self, rng: Random) -> str:
        occasion = rng.choice(list(IDEAS))
        ideas = list(IDEAS[occasion])
        rng.shuffle(ideas)
        return f"{occasion} : " + " , ".join(ideas[: rng.randint(2, 5)]) + " ."

    def unanswered(self, rng: Random) -> str:
        """A list of instructions, often of one family, and not one answer."""
        family = rng.choice((None, None, self.world.task(rng).family))
        return " \n ".join(self.world.task(rng, family=family).prompt for _ in range(rng.randint(3, 7)))

    def answered(self, rng: Random) -> str:
        """A prompt with an answer of mixed quality."""
        task = self.world.task(rng)
        answer = self.babble(rng) if rng.random() < 0.2 else self.world.demonstrate(task, Writer(rng))
        return f"{task.prompt} \n {answer}"
