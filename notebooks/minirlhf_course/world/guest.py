"""The small world as minirlhf finds it, under the entry point "small" of the group ``minirlhf.worlds``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minirlhf.worlds import Judge, WorldGuest
from minirlhf_course.world.facts import CLAIMS, Facts
from minirlhf_course.world.gold import GoldLabeler, GoldScore, split_sentences
from minirlhf_course.world.grammar import Template
from minirlhf_course.world.world import World
from minirlhf_course.world.write import FORMAT_VERSION, write_world

TASTE = Template(CLAIMS["joy"])  # what each being likes is all that the seed deals out
ENOUGH_CLAIMS = 20
MOST_LIES = 0.25
"""Share of a corpus's tastes that may be false. Its writers err in 8 %; in another world at least 39 % are false."""


class GoldJudge(Judge):
    """The gold labeler, many answers at a time."""

    is_gold = True

    def __init__(self, gold: GoldLabeler) -> None:
        self.gold = gold

    def check(self, prompt: str) -> None:
        self.gold.family(prompt)

    def _all(self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool]) -> list[GoldScore]:
        return [self.gold.score(p, r, e) for p, r, e in zip(prompts, responses, ended, strict=True)]

    def scores(self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool]) -> list[float]:
        return [score.total for score in self._all(prompts, responses, ended)]

    def parts(self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool]) -> list[dict[str, float]]:
        return [score._asdict() for score in self._all(prompts, responses, ended)]

    def best(self, prompts: Sequence[str]) -> list[float]:
        return [self.gold.best(prompt) for prompt in prompts]


class SmallWorld(WorldGuest):
    """Writes the small world's folder, and rebuilds its gold labeler from the seed in `world.json`."""

    def write(self, folder: Path, seed: int) -> None:
        write_world(folder, seed=seed)

    def judge(self, facts: Mapping[str, Any]) -> GoldJudge:
        version = facts.get("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise ValueError(f"format_version {version!r}: the small world installed here knows {FORMAT_VERSION}")
        seed = facts.get("seed")
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ValueError("expected an object with the field 'seed', a whole number")
        return GoldJudge(GoldLabeler(World(seed)))

    def verify(self, facts: Mapping[str, Any], texts: Iterable[str]) -> None:
        world = Facts(facts["seed"])
        sentences = [sentence for text in texts for sentence in split_sentences(text.split(" "))]
        claims = [(sentence, read) for sentence in sentences if (read := TASTE.read(sentence)) is not None]
        lies = [sentence for sentence, read in claims if not world.is_true(read["a"], "joy", read["x"])]
        if len(claims) >= ENOUGH_CLAIMS and len(lies) > MOST_LIES * len(claims):
            raise ValueError(
                f"seed {facts['seed']}: in that world {len(lies)} of {len(claims)} tastes that the corpus tells are "
                f"false, the first {lies[0]!r}; give the seed that the folder was written with"
            )


SMALL_WORLD = SmallWorld()
