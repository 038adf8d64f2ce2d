"""A lesson's models as a run: its answers are labelled, and `minirlhf round` goes on from it, twice."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch
from minirlhf_course.rounds import at_terminal, rank_all, run_of

from minirlhf.config import RunConfig
from minirlhf.data import read_folder, read_rankings
from minirlhf.language.evaluation import EvaluationConfig
from minirlhf.language.models import load_causal_model, scalar_model_from
from minirlhf.language.pretraining import PretrainingConfig
from minirlhf.language.rlhf import RLHFConfig
from minirlhf.pipeline.folder import read_config
from minirlhf.pipeline.label import items_to_rank


class Shortest:
    """Ranks the shortest answer first."""

    def __init__(self, name: str) -> None:
        self.name = name

    def rank(self, prompt, responses, generator):
        return {"scores": [-len(text) for text in responses]}


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([x.detach().flatten() for x in load_causal_model(folder).parameters()])


def test_two_rounds_from_a_lessons_models(tmp_path, tiny_folder, make_causal, tokenizer, capsys):
    sft, policy = make_causal(seed=0, scale=4.0), make_causal(seed=1, scale=4.0)
    known = read_folder(tiny_folder).comparisons[:5]
    models = {"base": make_causal(seed=2), "sft": sft, "reward_model": scalar_model_from(sft, 0)}
    config = RunConfig(
        base=PretrainingConfig(block_length=16),
        rlhf=RLHFConfig(steps=1, batch_size=4, minibatch_size=4, max_response_tokens=8, ptx_coef=0.1),
        evaluation=EvaluationConfig(prompts=4, corpus_blocks=2, max_response_tokens=8, examples=1),
        context_length=128,
        device="cpu",
    )
    first = tmp_path / "first"
    run_of(first, tiny_folder, known, models | {"ppo": policy, "ppo_ptx": policy}, tokenizer, config)
    assert [row.scores for row in read_rankings(first / "data" / "comparisons.jsonl")] == [row.scores for row in known]
    assert read_config(first).rlhf == config.rlhf and torch.equal(weights(first / "sft"), weights(first / "sft"))

    for last, following in (("first", "second"), ("second", "third")):
        items = items_to_rank(tmp_path / last, prompts=6, answers=3)
        rank_all(tmp_path / f"{last}.jsonl", items, [Shortest("ada"), Shortest("bo")], Random(0))
        rows = read_rankings(tmp_path / f"{last}.jsonl")
        assert len(rows) == len(items) and set(Counter(row.labeler for row in rows)) == {"ada", "bo"}
        assert all(min(zip(row.scores, map(len, row.responses), strict=True))[1] == max(map(len, row.responses))
                   for row in rows)  # fmt: skip
        at_terminal(f"minirlhf round --run {last} --comparisons {last}.jsonl --out {following} --device cpu", tmp_path)
    said = capsys.readouterr().out
    assert "$ minirlhf round --run second --comparisons second.jsonl --out third" in said
    assert str(tmp_path) not in said, "a lesson's output names no folder of this machine"
    sources = json.loads((tmp_path / "third" / "config.json").read_text())["comparisons"]
    assert [Path(name).name for name in sources] == ["first.jsonl", "second.jsonl"], "old rankings and new ones"
    assert torch.equal(weights(tmp_path / "third" / "sft"), weights(first / "sft"))
    moved = [weights(tmp_path / run / "ppo") for run in ("first", "second", "third")]
    steps = [float((after - before).norm()) for before, after in zip(moved, moved[1:], strict=False)]
    assert 0 < min(steps) and max(steps) < float((moved[2] - weights(first / "sft")).norm()) / 10, "it goes on"


def test_a_command_that_fails_stops_the_lesson(tmp_path, capsys):
    with pytest.raises(RuntimeError, match="exit code 2: minirlhf round"):
        at_terminal("minirlhf round --run nowhere --comparisons x.jsonl --out y", tmp_path)
    assert "not a run of minirlhf" in capsys.readouterr().err
