"""A lesson's models as a run: its answers are labelled, and `minirlhf round` goes on from it, twice."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import torch
from minirlhf_course.rounds import at_terminal, rank_all, run_of
from minirlhf_course.world import World, make_labelers

from minirlhf.config import RunConfig
from minirlhf.data import read_folder, read_rankings
from minirlhf.language.evaluation import EvaluationConfig
from minirlhf.language.models import load_causal_model, scalar_model_from
from minirlhf.language.rlhf import RLHFConfig
from minirlhf.language.tokenization import load_tokenizer
from minirlhf.pipeline.folder import hide_loading_bars, read_config
from minirlhf.pipeline.label import items_to_rank

DATA = Path(__file__).resolve().parents[2] / "data"


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([x.detach().flatten() for x in load_causal_model(folder).parameters()])


def test_two_rounds_from_a_lessons_models(tmp_path, capsys):
    hide_loading_bars()
    tiny = DATA / "checkpoints" / "tiny_ppo_ptx"
    policy, rows = load_causal_model(tiny).eval(), read_folder(DATA / "small_world")
    models = dict.fromkeys(("base", "sft", "ppo", "ppo_ptx"), policy) | {"reward_model": scalar_model_from(policy, 0)}
    config = RunConfig(
        rlhf=RLHFConfig(steps=1, batch_size=4, minibatch_size=4, ptx_coef=0.1, warmup=0),
        evaluation=EvaluationConfig(prompts=4, corpus_blocks=2, examples=1),
    )
    first, known = tmp_path / "first", rows.comparisons[:20]
    run_of(first, DATA / "small_world", known, rows.heldout_comparisons[::100], models, load_tokenizer(tiny), config)
    assert [row.scores for row in read_folder(first / "data").comparisons] == [row.scores for row in known]
    assert read_config(first).rlhf == config.rlhf

    for last, following in (("first", "second"), ("second", "third")):
        items = items_to_rank(tmp_path / last, prompts=6)
        rank_all(tmp_path / f"{last}.jsonl", items, make_labelers(World(0)), Random(0))
        ranked = read_rankings(tmp_path / f"{last}.jsonl")
        assert [(row.prompt, row.responses) for row in ranked] == [(item.prompt, item.responses) for item in items]
        assert len({row.labeler for row in ranked}) > 1 and all(max(row.scores) == -1 for row in ranked)
        at_terminal(f"minirlhf round --run {last} --comparisons {last}.jsonl --out {following} --device cpu", tmp_path)
    said = capsys.readouterr().out
    assert "$ minirlhf round --run second --comparisons second.jsonl --out third" in said and "PPO-ptx" in said
    assert str(tmp_path) not in said and "time: " not in said, "an output names neither a machine nor a moment"
    sources = json.loads((tmp_path / "third" / "config.json").read_text())["comparisons"]
    assert [Path(name).name for name in sources] == ["first.jsonl", "second.jsonl"], "old rankings and new ones"
    moved = [weights(tmp_path / run / "ppo") for run in ("first", "second", "third")]
    assert torch.equal(weights(tmp_path / "third" / "sft"), moved[0])
    steps = [float((after - before).norm()) for before, after in pairwise(moved)]
    assert min(steps) > 0 and float((moved[2] - moved[0]).norm()) > max(steps), "the second goes on from the first"


def test_a_command_that_fails_stops_the_lesson(tmp_path, capsys):
    with pytest.raises(RuntimeError, match="exit code 2: minirlhf round"):
        at_terminal("minirlhf round --run nowhere --comparisons x.jsonl --out y", tmp_path)
    assert "not a run of minirlhf" in capsys.readouterr().err
