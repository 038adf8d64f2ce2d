"""The checkpoints that the lessons start from: whole, small, and what they say they are."""

from pathlib import Path
from random import Random

import pytest
import torch
from minirlhf_course.export import STEPS, export_checkpoints, export_step
from minirlhf_course.world import GoldLabeler, World
from transformers import PreTrainedModel

from minirlhf.checkpoints import CHECKSUMS, verify_model
from minirlhf.errors import CheckpointError
from minirlhf.language.evaluation import EvaluationConfig, answer
from minirlhf.language.reward_model import RewardModelScorer
from minirlhf.language.tokenization import load_tokenizer
from minirlhf.pipeline.folder import load_policy, load_reward_model

SHIPPED = Path(__file__).resolve().parents[1] / "data" / "checkpoints"
CPU = torch.device("cpu")
TINY = "tiny_ppo_ptx"
"""Lesson 11's smallest model: written by benchmarks/figure_11_pipeline.py, and no step of the default run."""


def test_every_file_is_the_one_that_was_written() -> None:
    folders = {path.name for path in SHIPPED.iterdir() if path.is_dir()}
    assert folders == {*STEPS, TINY}
    for name in folders:
        assert (SHIPPED / name / CHECKSUMS).is_file()
        verify_model(SHIPPED / name)
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) < 6e6


def mean_gold(policy: PreTrainedModel, name: str) -> float:
    world = World(0)
    gold, rng = GoldLabeler(world), Random(3)
    prompts = [world.task(rng, heldout=True).prompt for _ in range(150)]
    said = answer(policy, load_tokenizer(SHIPPED / name), prompts, EvaluationConfig(), seed=0)
    scores = [gold.score(*row).total for row in zip(prompts, said.responses, said.ended, strict=True)]
    return sum(scores) / len(scores)


def test_each_step_of_the_ladder_is_better_by_gold() -> None:
    policies = {name: load_policy(SHIPPED, name, CPU) for name in STEPS if name != "reward_model"}
    assert all(policy.dtype == torch.float32 for policy in policies.values())
    means = {name: mean_gold(policy, name) for name, policy in policies.items()}
    assert means["base"] < 0 < 1.2 < means["sft"] < means["ppo"] - 0.3
    assert means["sft"] < means["ppo_ptx"]


def test_the_tiny_model_is_small_and_answers() -> None:
    assert sum(file.stat().st_size for file in (SHIPPED / TINY).iterdir()) < 100_000
    tiny, large = (load_policy(SHIPPED, name, CPU) for name in (TINY, "base"))
    assert 30 * tiny.num_parameters() <= large.num_parameters()
    assert load_tokenizer(SHIPPED / TINY).get_vocab() == load_tokenizer(SHIPPED / "base").get_vocab()
    assert mean_gold(tiny, TINY) > 0


def test_a_new_export_keeps_what_is_no_step_of_a_run(tmp_path: Path) -> None:
    export_step(SHIPPED, "sft", tmp_path / "out" / "other")
    verify_model(tmp_path / "out" / "other")
    export_checkpoints(SHIPPED, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*STEPS, "other"}
    verify_model(tmp_path / "out" / "other")


def test_the_reward_model_prefers_the_better_answer() -> None:
    reward = RewardModelScorer(*load_reward_model(SHIPPED, CPU))
    prompt = "where does an owl live ?"
    good, wrong, none = reward([prompt] * 3, ["sure , gladly ! an owl lives in a tree .", "in a tower .", "go away !"])
    assert good > wrong and good > none


def test_an_unfinished_run_is_not_shipped(tmp_path: Path) -> None:
    (tmp_path / "run" / "base").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="has no sft, reward_model, ppo, ppo_ptx; finish it first"):
        export_checkpoints(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
