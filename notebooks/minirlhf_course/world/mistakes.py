"""Answers for the comparisons: good ones with small differences, and the mistakes that models make.

A reward model that never saw a loop or a stuffed word will pay for them when PPO finds them. So about two
thirds of the answers differ in one or two human features, and the rest carry one of the mistakes below, each a small
function that takes an answer and spoils it.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from minirlhf_course.world.corpus import CorpusWriter
from minirlhf_course.world.demonstrator import rude_line
from minirlhf_course.world.families.base import OPENERS, Task
from minirlhf_course.world.vocabulary import BEINGS, FOODS, JOYS, ONE, OPPOSITES, PLACES, PLURAL, THINGS, VIVID
from minirlhf_course.world.world import World
from minirlhf_course.world.writer import Writer

# Names that can be taken for one another.
KINDS: tuple[tuple[str, ...], ...] = (BEINGS, tuple(PLURAL.values()), THINGS, PLACES, FOODS, JOYS, tuple(OPPOSITES))

Mistake = Callable[[World, Task, str, Random], str]


def drop_word(world: World, task: Task, text: str, rng: Random) -> str:
    """A word is missing."""
    words = text.split(" ")
    if len(words) > 2:
        del words[rng.randrange(len(words))]
    return " ".join(words)


def swap_words(world: World, task: Task, text: str, rng: Random) -> str:
    """Two neighbors change places."""
    words = text.split(" ")
    if len(words) > 2:
        at = rng.randrange(len(words) - 1)
        words[at], words[at + 1] = words[at + 1], words[at]
    return " ".join(words)


def repeat_words(world: World, task: Task, text: str, rng: Random) -> str:
    """One to three words are said twice."""
    words = text.split(" ")
    at, length = rng.randrange(len(words)), rng.randint(1, 3)
    return " ".join(words[: at + length] + words[at:])


def cut_off(world: World, task: Task, text: str, rng: Random) -> str:
    """The answer stops in the middle."""
    words = text.split(" ")
    return " ".join(words[: rng.randint(1, max(len(words) - 2, 1))])


def wrong_name(world: World, task: Task, text: str, rng: Random) -> str:
    """Every mention of one being, thing, place ... becomes another of its kind: fluent, and wrong."""
    padded = f" {text} "
    present = [(phrase, kind) for kind in KINDS for phrase in kind if f" {phrase} " in padded]
    if not present:
        return other_answer(world, task, text, rng)
    old, kind = rng.choice(present)
    new = rng.choice([phrase for phrase in kind if phrase != old])
    words = padded.replace(f" {old} ", f" {new} ").strip().split(" ")
    for at in range(len(words) - 1):  # "a" and "an" are mended, so that only the meaning is wrong
        if words[at] in ("a", "an") and words[at + 1] == new:
            words[at] = ONE.get(new, "a").split(" ")[0]
    return " ".join(words)


def other_answer(world: World, task: Task, text: str, rng: Random) -> str:
    """A good answer to another prompt, often of the same family."""
    family = task.family if rng.random() < 0.7 else None
    return world.demonstrate(world.task(rng, family=family), Writer(rng))


def more_prompts(world: World, task: Task, text: str, rng: Random) -> str:
    """The answer goes on with another instruction, as a base model does; or there is nothing but the instruction."""
    prompt = world.task(rng).prompt
    return prompt if rng.random() < 0.4 else f"{text} {prompt}"


def glue(world: World, task: Task, text: str, rng: Random) -> str:
    """Two answers to the same prompt, one after the other."""
    return f"{text} {world.demonstrate(task, Writer(rng))}"


def loop(world: World, task: Task, text: str, rng: Random) -> str:
    """One sentence again and again."""
    sentences = [part + " ." for part in text.removesuffix(" .").split(" . ")]
    at = rng.randrange(len(sentences))
    return " ".join(sentences[: at + 1] + [sentences[at]] * rng.randint(1, 3))


def stuff(world: World, task: Task, text: str, rng: Random) -> str:
    """A word that is often rewarded is stuffed in, once or many times."""
    words = text.split(" ")
    treat = rng.choice((*VIVID, "please", "friend", "lovely", "thank you", "happy", *list(OPENERS)[:2]))
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        words.insert(rng.randint(0, len(words)), treat)
    return " ".join(words)


def babble(world: World, task: Task, text: str, rng: Random) -> str:
    """The web, in place of an answer or behind it."""
    noise = CorpusWriter(world).babble(rng)
    return noise if rng.random() < 0.5 else f"{text} {noise}"


def shuffle(world: World, task: Task, text: str, rng: Random) -> str:
    """The sentences in another order."""
    sentences = [part + " ." for part in text.removesuffix(" .").split(" . ")]
    rng.shuffle(sentences)
    return " ".join(sentences)


def rude(world: World, task: Task, text: str, rng: Random) -> str:
    """A rude line before or after."""
    line = rude_line(Writer(rng))
    return f"{line} {text}" if rng.random() < 0.5 else f"{text} {line}"


MAX_WORDS = 40  # of any answer in the data

MISTAKES: dict[Mistake, float] = {
    wrong_name: 2.2,
    other_answer: 1.4,
    drop_word: 0.6,
    swap_words: 0.3,
    repeat_words: 0.6,
    cut_off: 0.8,
    more_prompts: 0.8,
    glue: 0.6,
    loop: 0.6,
    stuff: 1.0,
    babble: 0.6,
    shuffle: 0.2,
    rude: 0.7,
}


def one_response(world: World, task: Task, rng: Random) -> str:
    """One answer: 38 % human, 27 % with more care, 35 % with a model's mistake."""
    kind = rng.random()
    if kind < 0.38:
        return world.demonstrate(task, Writer(rng))
    care = rng.choice((0.4, 0.7, 1.0))
    if kind < 0.65:
        return world.demonstrate(task, Writer(rng, care))
    text = world.demonstrate(task, Writer(rng, rng.choice((0.0, 0.0, care))))
    mistake = rng.choices(list(MISTAKES), weights=list(MISTAKES.values()))[0]
    return mistake(world, task, text, rng)


def response_set(world: World, task: Task, count: int, rng: Random) -> list[str]:
    """`count` distinct answers, each at most 40 words."""
    found: dict[str, None] = {}
    while len(found) < count:
        words = one_response(world, task, rng).split(" ")[:MAX_WORDS]
        # If the held-out beings came up only where someone errs, a reward model would learn that they are wrong.
        if words != [""] and not world.strange(task, " ".join(words)):
            found[" ".join(words)] = None
    return list(found)
