"""Who judges the answers: the gold labeler where the world is known, the reward model where it is not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from minirlhf.data import DataFolder
from minirlhf.errors import DataError

if TYPE_CHECKING:
    from minirlhf.language.reward_model import RewardFunction

MEND_WORLD = "write the folder again with: minirlhf world --out DIR, or delete the file to have the reward model judge"


class Judge(Protocol):
    """Scores answers; higher is better."""

    is_gold: bool

    def scores(self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool]) -> list[float]: ...

    def parts(self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool]) -> list[dict[str, float]]:
        """What each score is made of."""
        ...

    def best(self, prompts: Sequence[str]) -> list[float] | None:
        """The best reachable score of each prompt, where that is known."""
        ...


class GoldJudge:
    """The gold labeler of the small world.

    Args:
        folder: a data folder with a world.json; every prompt that it will judge is checked here.

    Raises:
        DataError: world.json is malformed, or a prompt is none of that world, named by file and line.
    """

    is_gold = True

    def __init__(self, folder: DataFolder) -> None:
        from minirlhf_course.world import GoldLabeler, World

        assert folder.world_file is not None
        self.gold = GoldLabeler(World(seed=_world_seed(folder.world_file)))
        prompts = [(row.text, row.where) for row in (*folder.prompts, *folder.heldout_prompts)]
        for prompt, where in prompts + [(row.prompt, row.where) for row in folder.heldout_comparisons]:
            try:
                self.gold.family(prompt)
            except ValueError as error:
                raise DataError(
                    f"{where}: gold can't judge this prompt ({error}); take the row out, or delete "
                    f"{folder.world_file} to have the reward model judge"
                ) from None

    def _all(self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool]) -> list:
        return [self.gold.score(p, r, e) for p, r, e in zip(prompts, responses, ended, strict=True)]

    def scores(self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool]) -> list[float]:
        return [score.total for score in self._all(prompts, responses, ended)]

    def parts(self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool]) -> list[dict[str, float]]:
        return [score._asdict() for score in self._all(prompts, responses, ended)]

    def best(self, prompts: Sequence[str]) -> list[float] | None:
        return [self.gold.best(prompt) for prompt in prompts]


def _world_seed(file: Path) -> int:
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not valid JSON ({error}); {MEND_WORLD}") from None
    seed = facts.get("seed") if isinstance(facts, dict) else None
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise DataError(f"{file}: expected an object with the field 'seed', a whole number; {MEND_WORLD}")
    return seed


class RewardModelJudge:
    """The run's own reward model: a proxy, and the report says so."""

    is_gold = False

    def __init__(self, reward: RewardFunction) -> None:
        self.reward = reward

    def scores(self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool]) -> list[float]:
        return torch.as_tensor(self.reward(prompts, responses)).tolist()

    def parts(self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool]) -> list[dict[str, float]]:
        return [{"total": score} for score in self.scores(prompts, responses, ended)]

    def best(self, prompts: Sequence[str]) -> list[float] | None:
        return None


def find_judge(folder: DataFolder, reward: RewardFunction) -> Judge:
    """The gold labeler if the folder holds a small world, else the reward model."""
    return GoldJudge(folder) if folder.world_file is not None else RewardModelJudge(reward)
