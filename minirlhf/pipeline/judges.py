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
    """The gold labeler of the small world."""

    is_gold = True

    def __init__(self, world_file: str) -> None:
        from minirlhf.world import GoldLabeler, World

        facts = json.loads(Path(world_file).read_text(encoding="utf-8"))
        self.gold = GoldLabeler(World(seed=facts["seed"]))
        self.world_file = world_file

    def _check(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            try:
                self.gold.family(prompt)
            except ValueError as error:
                raise DataError(
                    f"{self.world_file}: gold can't judge the folder beside it ({error}); write it again with: "
                    "minirlhf world --out DIR, or delete world.json to have the reward model judge"
                ) from None

    def _all(self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool]) -> list:
        self._check(prompts)
        return [self.gold.score(p, r, e) for p, r, e in zip(prompts, responses, ended, strict=True)]

    def scores(self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool]) -> list[float]:
        return [score.total for score in self._all(prompts, responses, ended)]

    def parts(self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool]) -> list[dict[str, float]]:
        return [score._asdict() for score in self._all(prompts, responses, ended)]

    def best(self, prompts: Sequence[str]) -> list[float] | None:
        return [self.gold.best(prompt) for prompt in prompts]


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
    return GoldJudge(str(folder.world_file)) if folder.world_file is not None else RewardModelJudge(reward)
