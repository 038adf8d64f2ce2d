"""What is true in the small world: where each being lives, what it eats, what it likes.

The first two belong to the being and never change; what it *likes* is a matter of taste and is dealt out by the seed.
"""

from __future__ import annotations

from random import Random

from minirlhf_course.world.grammar import Template
from minirlhf_course.world.vocabulary import BEINGS, JOYS, NOUN, ONE

# being: home, food
_TABLE: dict[str, tuple[str, str]] = {
    "frog": ("in a pond", "flies"),
    "owl": ("in a tree", "eggs"),
    "fox": ("in the forest", "eggs"),
    "dragon": ("in a tower", "soup"),
    "cat": ("in a house", "milk"),
    "bear": ("in the forest", "honey"),
    "duck": ("in a pond", "bread"),
    "bee": ("in a garden", "flowers"),
    "pig": ("in a barn", "corn"),
    "crow": ("in a tree", "corn"),
    "snail": ("in a garden", "flowers"),
    "mouse": ("in a barn", "bread"),
    "penguin": ("on the ice", "fish"),
    "king": ("in a castle", "cake"),
    "pirate": ("on a ship", "fish"),
    "baker": ("in a house", "cake"),
    "robot": ("in a tower", "milk"),
    "witch": ("in the forest", "soup"),
}

ATTRIBUTES: tuple[str, ...] = ("home", "food", "joy")

# attribute: the claim. The slot `x` takes the value.
CLAIMS: dict[str, str] = {
    "home": "{a:one} lives {x:place} .",
    "food": "{a:one} eats {x:food} .",
    "joy": "{a:one} likes {x:joy} .",
}
CLAIM_SENTENCES: dict[str, str] = {f"claim.{attribute}": text for attribute, text in CLAIMS.items()}
_TEMPLATES = {attribute: Template(text) for attribute, text in CLAIMS.items()}


class Facts:
    """The truth about every being, and sentences that state it.

    Example:
        >>> Facts(0).value("frog", "home")
        'in a pond'
        >>> Facts(0).sentence("frog", "home")
        'a frog lives in a pond .'
    """

    def __init__(self, seed: int = 0) -> None:
        joys = list(JOYS)
        Random(f"facts {seed}").shuffle(joys)
        self._values: dict[tuple[str, str], str] = {}
        for index, being in enumerate(BEINGS):
            home, food = _TABLE[being]
            self._values |= {(being, "home"): home, (being, "food"): food, (being, "joy"): joys[index % len(joys)]}

    def value(self, being: str, attribute: str) -> str:
        """The true value, as a phrase. Raises KeyError for an unknown being or attribute."""
        return self._values[being, attribute]

    def values(self, attribute: str) -> list[str]:
        """All distinct values that some being has for the attribute, in the table's order."""
        return list(dict.fromkeys(v for (_, name), v in self._values.items() if name == attribute))

    def is_true(self, noun: str, attribute: str, value: str) -> bool:
        """Whether a claim holds; `noun` may be "frog", "a frog" or "frogs"."""
        return self._values.get((NOUN[noun], attribute)) == value

    def wrong_value(self, being: str, attribute: str, rng: Random) -> str:
        """A value of the right kind that is false for this being."""
        return rng.choice([v for v in self.values(attribute) if v != self._values[being, attribute]])

    def sentence(self, being: str, attribute: str, value: str | None = None) -> str:
        """The claim in words; `value` (default: the truth) lets a caller state something false."""
        said = self.value(being, attribute) if value is None else value
        return _TEMPLATES[attribute].fill({"a": ONE[being], "x": said})
