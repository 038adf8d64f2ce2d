"""The judges of answers: a world's own judge if the truth is known, else the reward model."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minirlhf.data import DataFolder
from minirlhf.errors import DataError, UserError
from minirlhf.worlds import DEFAULT_WORLD, Judge, find_world

if TYPE_CHECKING:
    from minirlhf.language.reward_model import RewardFunction

SAMPLE = 2000
"""Texts of the corpus whose facts are compared with the world's."""
DELETE = "or delete the file to have the reward model judge"
WRITE_AGAIN = f"write the folder again with: minirlhf world --out DIR, {DELETE}"


class RewardModelJudge:
    """The run's own reward model: a proxy, and the report says so."""

    is_gold = False

    def __init__(self, reward: RewardFunction) -> None:
        self.reward = reward

    def check(self, prompt: str) -> None:
        """Accept every prompt."""

    def scores(self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool]) -> list[float]:
        return torch.as_tensor(self.reward(prompts, responses)).tolist()

    def parts(self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool]) -> list[dict[str, float]]:
        return [{"total": score} for score in self.scores(prompts, responses, ended)]

    def best(self, prompts: Sequence[str]) -> list[float] | None:
        return None


def find_judge(folder: DataFolder, reward: RewardFunction) -> Judge:
    """The gold judge if the folder's truth is known, else the reward model."""
    return gold_judge(folder) or RewardModelJudge(reward)


def gold_judge(folder: DataFolder) -> Judge | None:
    """The judge of the world that the folder's world.json names; None for a folder without that file.

    Raises:
        DataError: world.json is malformed, names a world that is not installed, or is of another world than the corpus;
            or a prompt that will be judged is not of that world; names the file and the line.
    """
    if folder.world_file is None:
        return None
    facts = _facts(folder.world_file)
    try:
        world = find_world(facts.get("world", DEFAULT_WORLD))
        judge = world.judge(facts)
        world.verify(facts, (row.text for row in itertools.islice(folder.corpus, SAMPLE)))
    except UserError as error:
        raise DataError(f"{folder.world_file}: {error}, {DELETE}") from None
    except ValueError as error:
        raise DataError(f"{folder.world_file}: {error}; {WRITE_AGAIN}") from None
    prompts = [(row.text, row.where) for row in (*folder.prompts, *folder.heldout_prompts)]
    for prompt, where in prompts + [(row.prompt, row.where) for row in folder.heldout_comparisons]:
        try:
            judge.check(prompt)
        except ValueError as error:
            raise DataError(
                f"{where}: the gold judge can't score this prompt ({error}); remove the row, or delete "
                f"{folder.world_file} to have the reward model judge"
            ) from None
    return judge


def _facts(file: Path) -> dict[str, Any]:
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not valid JSON ({error}); {WRITE_AGAIN}") from None
    if not isinstance(facts, dict):
        raise DataError(f"{file}: expected a JSON object; {WRITE_AGAIN}")
    return facts
