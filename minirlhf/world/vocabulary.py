"""The words of the small world, sorted by what they mean.

Every text of the world is made from the phrases below and from the sentence templates of the families, and from nothing
else, so the vocabulary is closed: `World.vocabulary` collects the words (at most 508, the tokenizer adds three of its
own). A phrase is one or more words separated by single spaces.

A *slot class* is a list of phrases that may stand in a gap of a template: `{a:being}` takes one of `CLASSES["being"]`.
"""

from __future__ import annotations

ANIMALS: tuple[str, ...] = (
    "frog",
    "owl",
    "fox",
    "dragon",
    "cat",
    "bear",
    "mouse",
    "duck",
    "bee",
    "snail",
    "crow",
    "pig",
    "penguin",
)
PEOPLE: tuple[str, ...] = ("king", "baker", "pirate", "robot", "witch")
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
    "in the forest",
    "in a cave",
    "in a castle",
    "in the sea",
    "in a barn",
    "in a garden",
    "in a tree",
    "in a tower",
    "on a ship",
    "in a house",
    "on a hill",
    "in a bakery",
    "on the ice",
)
FANCY_PLACES: tuple[str, ...] = ("in a teapot", "on the moon", "under a bridge", "in a shoe", "behind a rainbow")
FOODS: tuple[str, ...] = (
    "flies",
    "mice",
    "eggs",
    "fish",
    "milk",
    "honey",
    "cheese",
    "bread",
    "flowers",
    "leaves",
    "corn",
    "cake",
    "pie",
    "soup",
)
COLORS: tuple[str, ...] = (
    "green",
    "brown",
    "red",
    "purple",
    "grey",
    "yellow",
    "white",
    "blue",
    "black",
    "pink",
    "golden",
)
SKILLS: tuple[str, ...] = ("jump", "fly", "run", "swim", "climb", "dig", "hide", "sing", "dance", "bake", "sail")
JOYS: tuple[str, ...] = ("music", "tea", "books", "hats", "games", "jokes", "stars", "naps", "parties", "puddles")
THINGS: tuple[str, ...] = ("crown", "hat", "map", "boat", "key", "book", "drum", "cake")

VIVID: tuple[str, ...] = ("wise", "brave", "sleepy", "grumpy", "clever", "lonely", "jolly", "curious", "fluffy")
FAIR: tuple[str, ...] = ("tiny", "shy", "lazy", "funny")
PLAIN: tuple[str, ...] = ("big", "small", "nice", "good")
NUMBERS: tuple[str, ...] = ("one", "two", "three", "four", "five")

OPPOSITES: dict[str, str] = {
    "big": "small",
    "happy": "sad",
    "hot": "cold",
    "wet": "dry",
    "loud": "quiet",
    "brave": "scared",
    "rich": "poor",
}
OPPOSITES = {**OPPOSITES, **{there: here for here, there in OPPOSITES.items()}}

PAST: dict[str, str] = {
    "finds": "found",
    "hides": "hid",
    "paints": "painted",
    "steals": "stole",
    "sells": "sold",
    "breaks": "broke",
    "wears": "wore",
}
COMMANDS: tuple[str, ...] = ("give me", "bring me", "pass me", "find", "fix", "clean", "paint")

RUDE: frozenset[str] = frozenset({"stupid", "fool", "ugly", "dumb", "shut", "hate"})

CLASSES: dict[str, tuple[str, ...]] = {
    "being": BEINGS,
    "animal": ANIMALS,
    "one": tuple(ONE.values()),
    "many": tuple(PLURAL.values()),
    "place": PLACES,
    "anyplace": PLACES + FANCY_PLACES,
    "food": FOODS,
    "color": COLORS,
    "skill": SKILLS,
    "joy": JOYS,
    "thing": THINGS,
    "adjective": VIVID + FAIR + PLAIN,
    "quality": tuple(OPPOSITES),
    "verb": tuple(PAST),
    "past": tuple(PAST.values()),
    "command": COMMANDS,
    "number": NUMBERS,
}


def heldout_words() -> frozenset[str]:
    """Every form of the held-out beings ("penguin", "penguins"): no training prompt may contain one of these words."""
    return frozenset(HELDOUT_BEINGS) | frozenset(PLURAL[being] for being in HELDOUT_BEINGS)
