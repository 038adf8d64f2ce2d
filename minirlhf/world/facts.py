"""What is true in the small world: where each being lives, what it eats, its color, what it can do, what it likes.

The first four belong to the being and never change; what it *likes* is a matter of taste and is dealt out by the seed.
"""

from __future__ import annotations

from random import Random

from minirlhf.world.grammar import Template
from minirlhf.world.vocabulary import ANIMALS, BEINGS, JOYS, NOUN, ONE, PLURAL

# being: home, food, color (people have none), skill
_TABLE: dict[str, tuple[str, str, str, str]] = {
    "frog": ("in a pond", "flies", "green", "jump"),
    "owl": ("in a tree", "mice", "brown", "fly"),
    "fox": ("in the forest", "eggs", "red", "run"),
    "dragon": ("in a cave", "soup", "purple", "fly"),
    "cat": ("in a house", "milk", "grey", "climb"),
    "bear": ("in the forest", "honey", "brown", "climb"),
    "mouse": ("in a barn", "cheese", "grey", "hide"),
    "duck": ("in a pond", "bread", "yellow", "swim"),
    "bee": ("in a garden", "flowers", "yellow", "fly"),
    "snail": ("in a garden", "leaves", "brown", "hide"),
    "crow": ("in a tree", "corn", "black", "fly"),
    "pig": ("in a barn", "corn", "pink", "dig"),
    "penguin": ("on the ice", "fish", "black", "swim"),
    "king": ("in a castle", "cake", "", "dance"),
    "baker": ("in a bakery", "bread", "", "bake"),
    "pirate": ("on a ship", "fish", "", "sail"),
    "robot": ("in a tower", "bread", "", "dance"),
    "witch": ("in the forest", "soup", "", "fly"),
}

ATTRIBUTES: tuple[str, ...] = ("home", "food", "color", "skill", "joy")

# attribute: the claim about one, the claim about many. The slot `x` takes the value.
CLAIMS: dict[str, tuple[str, str]] = {
    "home": ("{a:one} lives {x:place} .", "{a:many} live {x:place} ."),
    "food": ("{a:one} eats {x:food} .", "{a:many} eat {x:food} ."),
    "color": ("{a:one} is {x:color} .", "{a:many} are {x:color} ."),
    "skill": ("{a:one} can {x:skill} .", "{a:many} can {x:skill} ."),
    "joy": ("{a:one} likes {x:joy} .", "{a:many} like {x:joy} ."),
}
CLAIM_SENTENCES: dict[str, str] = {
    f"claim.{attribute}.{form}": text
    for attribute, texts in CLAIMS.items()
    for form, text in zip(("one", "many"), texts, strict=True)
}
_TEMPLATES = {name: Template(text) for name, text in CLAIM_SENTENCES.items()}


class Facts:
    """The truth about every being, and sentences that state it.

    Example:
        >>> Facts(0).value("frog", "home")
        'in a pond'
        >>> Facts(0).sentence("frog", "home", many=True)
        'frogs live in a pond .'
    """

    def __init__(self, seed: int = 0) -> None:
        joys = list(JOYS)
        Random(f"facts {seed}").shuffle(joys)
        self._values: dict[tuple[str, str], str] = {}
        for index, being in enumerate(BEINGS):
            for attribute, value in zip(ATTRIBUTES, (*_TABLE[being], joys[index % len(joys)]), strict=True):
                if value:
                    self._values[being, attribute] = value

    def value(self, being: str, attribute: str) -> str:
        """The true value, as a phrase. Raises KeyError for the color of a person, who has none."""
        return self._values[being, attribute]

    def attributes(self, being: str) -> list[str]:
        """Which of the five attributes the being has."""
        return [attribute for attribute in ATTRIBUTES if (being, attribute) in self._values]

    def beings_with(self, attribute: str, value: str, animals_only: bool = False) -> list[str]:
        """All beings for which the attribute has this value, in the table's order."""
        among = ANIMALS if animals_only else BEINGS
        return [being for being in among if self._values.get((being, attribute)) == value]

    def values(self, attribute: str) -> list[str]:
        """All distinct values that some being has for the attribute, in the table's order."""
        return list(dict.fromkeys(v for (_, name), v in self._values.items() if name == attribute))

    def is_true(self, noun: str, attribute: str, value: str) -> bool:
        """Whether a claim holds; `noun` may be "frog", "a frog" or "frogs"."""
        return self._values.get((NOUN[noun], attribute)) == value

    def wrong_value(self, being: str, attribute: str, rng: Random) -> str:
        """A value of the right kind that is false for this being."""
        return rng.choice([v for v in self.values(attribute) if v != self._values.get((being, attribute))])

    def sentence(self, being: str, attribute: str, many: bool = False, value: str | None = None) -> str:
        """The claim in words; `value` (default: the truth) lets a caller state something false."""
        said = self.value(being, attribute) if value is None else value
        noun = PLURAL[being] if many else ONE[being]
        return _TEMPLATES[f"claim.{attribute}.{'many' if many else 'one'}"].fill({"a": noun, "x": said})
