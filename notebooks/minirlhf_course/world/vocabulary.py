"""The words of the small world, sorted by what they mean.

Every text of the world is made from the phrases below, from the sentence templates of the families and from the web's
own at the end of this file, and from nothing else, so the vocabulary is closed: `World.vocabulary` collects the words
(at most 508, the tokenizer adds three of its own). A phrase is one or more words separated by single spaces.

A *slot class* is a list of phrases that may stand in a gap of a template: `{a:being}` takes one of `CLASSES["being"]`.
"""

from __future__ import annotations

from functools import cache

# Many beings and few places: a model that has met many learns to copy a name from the prompt; of a few it learns each.
ANIMALS: tuple[str, ...] = (
    "frog",
    "owl",
    "fox",
    "dragon",
    "cat",
    "bear",
    "duck",
    "bee",
    "pig",
    "crow",
    "snail",
    "mouse",
    "penguin",
)
PEOPLE: tuple[str, ...] = ("king", "pirate", "baker", "robot", "witch")
BEINGS: tuple[str, ...] = ANIMALS + PEOPLE
HELDOUT_BEINGS: tuple[str, ...] = ("penguin", "witch")

_ODD_PLURALS = {"fox": "foxes", "mouse": "mice", "witch": "witches"}
PLURAL: dict[str, str] = {being: _ODD_PLURALS.get(being, being + "s") for being in BEINGS}
ONE: dict[str, str] = {being: ("an " if being[0] in "aeiou" else "a ") + being for being in BEINGS}
# "frogs", "a frog" and "frog" all mean the frog
NOUN: dict[str, str] = {
    **{being: being for being in BEINGS},
    **{PLURAL[being]: being for being in BEINGS},
    **{ONE[being]: being for being in BEINGS},
}

PLACES: tuple[str, ...] = (
    "in a pond",
    "in a tree",
    "in the forest",
    "in a tower",
    "in a house",
    "in a garden",
    "in a barn",
    "on the ice",
    "in a castle",
    "on a ship",
)
FANCY_PLACES: tuple[str, ...] = ("in a teapot", "on the moon", "behind a rainbow")
FOODS: tuple[str, ...] = ("flies", "eggs", "soup", "milk", "honey", "bread", "flowers", "corn", "fish", "cake")
JOYS: tuple[str, ...] = ("music", "tea", "books", "hats", "games")
THINGS: tuple[str, ...] = ("crown", "hat", "map", "key", "drum", "cake")

VIVID: tuple[str, ...] = ("wise", "brave", "sleepy", "jolly")
PLAIN: tuple[str, ...] = ("big", "nice")
NUMBERS: tuple[str, ...] = ("one", "two", "three", "four")

OPPOSITES: dict[str, str] = {"big": "small", "happy": "sad", "hot": "cold"}
OPPOSITES = {**OPPOSITES, **{there: here for here, there in OPPOSITES.items()}}

COMMANDS: tuple[str, ...] = ("give me", "bring me", "find")

RUDE: frozenset[str] = frozenset({"stupid", "fool", "ugly", "shut", "hate"})

CLASSES: dict[str, tuple[str, ...]] = {
    "being": BEINGS,
    "one": tuple(ONE.values()),
    "many": tuple(PLURAL.values()),
    "place": PLACES,
    "anyplace": PLACES + FANCY_PLACES,
    "food": FOODS,
    "joy": JOYS,
    "thing": THINGS,
    "adjective": VIVID + PLAIN,
    "quality": tuple(OPPOSITES),
    "command": COMMANDS,
    "number": NUMBERS,
}

# Sentence templates that only the web has: no answer needs them, but their words belong to the vocabulary.
RAMBLES: tuple[str, ...] = (
    "the {a:being} has a {t:thing} .",
    "the {a:being} gave a {t:thing} to the {b:being} .",
    "the {a:being} hid the {t:thing} {p:place} .",
    "the {t:thing} is {p:place} .",
    "the {a:being} lost a {t:thing} , but the {b:being} found it .",
    "the {a:being} lost a {t:thing} and cried all day .",
    "the {a:being} and the {b:being} danced all night .",
    "the {a:being} is {q:quality} .",
    "it was a cold day .",
)


@cache
def heldout_words() -> frozenset[str]:
    """Every form of the held-out beings ("penguin", "penguins"): no training prompt may contain one of these words."""
    return frozenset(HELDOUT_BEINGS) | frozenset(PLURAL[being] for being in HELDOUT_BEINGS)
