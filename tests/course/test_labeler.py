"""A reward model learns the taste of one reader from twenty of their rankings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minirlhf.data import Comparison, read_folder
from minirlhf.language.evaluation import EvaluationConfig, answer
from minirlhf.language.models import load_causal_model, load_scalar_model
from minirlhf.language.reward_model import RewardModelConfig, RewardModelScorer, train_reward_model
from minirlhf.language.tokenization import load_tokenizer
from minirlhf.losses import pairwise_accuracy

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINTS = ROOT / "data" / "checkpoints"


def shortest_first(model, tokenizer, texts: list[str], count: int, seed: int) -> list[Comparison]:
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    prompts = [texts[i] for i in order[:count] for _ in range(4)]
    said = answer(model, tokenizer, prompts, EvaluationConfig(), seed=seed).responses
    rows = [(prompts[i], tuple(said[i : i + 4])) for i in range(0, len(said), 4)]
    return [Comparison(prompt, texts, tuple(-len(text.split()) * 1.0 for text in texts)) for prompt, texts in rows]


def agreement(model, tokenizer, rows: list[Comparison]) -> float:
    scorer = RewardModelScorer(model, tokenizer)
    scores = scorer([row.prompt for row in rows for _ in range(4)], [text for row in rows for text in row.responses])
    right, pairs = pairwise_accuracy(scores.view(-1, 4), torch.tensor([row.scores for row in rows]))
    return float(right / pairs)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_twenty_rankings_teach_the_shipped_reward_model_that_short_is_good(seed: int) -> None:
    tokenizer = load_tokenizer(CHECKPOINTS / "sft")
    sft, shipped = load_causal_model(CHECKPOINTS / "sft").eval(), load_scalar_model(CHECKPOINTS / "reward_model").eval()
    data = read_folder(ROOT / "data" / "small_world")
    heldout = shortest_first(sft, tokenizer, sorted({row.text for row in data.heldout_prompts}), 60, seed=99)
    mine = shortest_first(sft, tokenizer, sorted({row.text for row in data.prompts}), 20, seed)
    before = {name: value.clone() for name, value in shipped.state_dict().items()}
    config = RewardModelConfig(epochs=10, batch_size=4, warmup=2)
    taught = train_reward_model(shipped, tokenizer, mine, config, seed=seed)
    assert agreement(shipped, tokenizer, heldout) < 0.35, "the shipped one prefers long answers"
    assert agreement(taught, tokenizer, heldout) > 0.6
    assert all(torch.equal(value, before[name]) for name, value in shipped.state_dict().items()), "it is not changed"
