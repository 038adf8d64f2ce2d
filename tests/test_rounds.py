"""And again: rankings by a person, a reward model that learns from them, and PPO from where it ended."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from minirlhf.cli import main
from minirlhf.language.models import load_causal_model
from minirlhf.pipeline.folder import read_config
from minirlhf.pipeline.label import items_to_rank

pytestmark = pytest.mark.slow


ROOM = ("--context-length", "256")  # an untrained model's broken characters take three tokens each as text


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, fast_run) -> Path:
    out = tmp_path_factory.mktemp("rounds") / "first"
    assert main(fast_run(out, *ROOM)) == 0
    return out


@pytest.fixture(scope="module")
def rankings(run: Path) -> Path:
    """Rankings typed at the terminal: the first answer is the best, the others are tied; in the last row all are."""
    file = run.parent / "mine.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO("1 2=3\n" * 4 + "1=2=3\n"))
        options = ["--prompts", "5", "--answers", "3", "--labeler", "ada"]
        assert main(["label", "--run", str(run), "--out", str(file), *options]) == 0
    return file


@pytest.fixture(scope="module")
def following(run: Path, rankings: Path) -> Path:
    out = run.parent / "second"
    assert main(["round", "--run", str(run), "--comparisons", str(rankings), "--out", str(out), "--device", "cpu"]) == 0
    return out


def test_the_answers_are_those_of_the_newest_policy_to_training_prompts(run: Path, rankings: Path) -> None:
    written = rows(rankings)
    assert len(written) == 5 and {row["labeler"] for row in written} == {"ada"}
    trained = {row["prompt"] for row in rows(read_config(run).data / "prompts.jsonl")}
    assert {row["prompt"] for row in written} <= trained
    same = items_to_rank(run, policy="ppo_ptx", prompts=5, answers=3)
    assert [(item.prompt, list(item.responses)) for item in same] == [(r["prompt"], r["responses"]) for r in written]
    assert items_to_rank(run, policy="base", prompts=5, answers=3) != same


def test_a_round_keeps_base_and_sft_and_goes_on_from_both_policies(run: Path, following: Path) -> None:
    for step in ("base", "sft"):
        assert weights(following / step) == weights(run / step)
        assert rows(following / step / "metrics.jsonl") == rows(run / step / "metrics.jsonl")
    assert all(weights(following / step) != weights(run / step) for step in ("reward_model", "ppo", "ppo_ptx"))

    def distance(one: Path, other: Path) -> float:
        pairs = zip(load_causal_model(one).parameters(), load_causal_model(other).parameters(), strict=True)
        return sum(float((a - b).detach().pow(2).sum()) for a, b in pairs) ** 0.5

    for step in ("ppo", "ppo_ptx"):
        assert distance(following / step, run / step) < distance(following / step, run / "sft")
    assert (following / "report.html").is_file()


def test_a_round_begins_as_far_from_sft_as_the_last_one_went(run: Path, following: Path) -> None:
    last, first = rows(run / "ppo" / "metrics.jsonl")[-1], rows(following / "ppo" / "metrics.jsonl")[0]
    began = rows(run / "ppo" / "metrics.jsonl")[0]
    assert abs(began["objective/kl"]) < 1e-4 < last["objective/kl"] / 2 < first["objective/kl"]


def test_rankings_train_the_reward_model_and_nothing_before_it(
    run: Path, rankings: Path, tmp_path: Path, fast_run, refused, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    command = fast_run(out, *ROOM, "--comparisons", str(rankings))
    assert f"reward_model was trained with no {rankings}" in refused(command)
    for name in ("reward_model", "ppo", "ppo_ptx"):
        shutil.rmtree(out / name)
    assert main(command) == 0
    assert "1 of 5 rows state no preference (all answers tied) and were left out" in capsys.readouterr().err
    assert weights(out / "sft") == weights(run / "sft") and weights(out / "reward_model") != weights(
        run / "reward_model"
    )
    assert main(command) == 0, "the finished run is recognised"
    edited = tmp_path / "edited.jsonl"
    edited.write_bytes(rankings.read_bytes())
    assert f"trained with no {edited}" in refused(fast_run(out, *ROOM, "--comparisons", str(rankings), str(edited)))


def test_what_is_refused(run: Path, rankings: Path, tmp_path: Path, refused, fast_run) -> None:
    tied = tmp_path / "tied.jsonl"
    tied.write_text(json.dumps(rows(rankings)[-1]) + "\n")
    assert "no row is left to train on" in refused(fast_run(tmp_path / "a", "--comparisons", str(tied)))
    assert "no such file" in refused(fast_run(tmp_path / "a", "--comparisons", str(tmp_path / "none.jsonl")))
    assert not (tmp_path / "a").exists()
    common = ["round", "--comparisons", str(rankings), "--run"]
    assert "is the run itself" in refused([*common, str(run), "--out", str(run)])
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished)
    shutil.rmtree(unfinished / "ppo")
    assert "ppo is not finished" in refused([*common, str(unfinished), "--out", str(tmp_path / "b")])
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps(rows(rankings)[0] | {"responses": ["so on " * 200, "x", "y"]}) + "\n")
    said = refused(["round", "--comparisons", str(long), "--run", str(run), "--out", str(tmp_path / "b")])
    assert f"{long}:1: prompt and response takes" in said and "the context holds 256" in said
    label = ["label", "--out", str(tmp_path / "x.jsonl"), "--run"]
    assert "from 2 to 9" in refused([*label, str(run), "--answers", "1"])
    assert "no finished policy 'best'" in refused([*label, str(run), "--policy", "best"])
    assert "not a run" in refused([*label, str(tmp_path)])


def test_a_round_needs_the_data_of_the_last_one(run: Path, rankings: Path, tmp_path: Path, refused) -> None:
    data, copy = tmp_path / "data", tmp_path / "run"
    shutil.copytree(read_config(run).data, data)
    shutil.copytree(run, copy)
    settings = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    del settings["sha256"]
    (copy / "config.json").write_text(json.dumps(settings | {"data": str(data)}), encoding="utf-8")
    with (data / "prompts.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"prompt": "one more"}\n')
    command = ["round", "--comparisons", str(rankings), "--run", str(copy), "--out", str(tmp_path / "next")]
    assert f"{copy}: was trained with another {data / 'prompts.jsonl'}" in refused(command)
    assert not (tmp_path / "next").exists()


def test_run_does_not_go_on_with_a_round(run: Path, following: Path, fast_run, refused) -> None:
    before = {step: weights(following / step) for step in ("base", "reward_model", "ppo")}
    assert f"a round after {run.resolve()}" in refused(fast_run(following, *ROOM))
    assert {step: weights(following / step) for step in before} == before


def test_a_run_from_before_this_setting_is_recognised(run: Path, tmp_path: Path, fast_run) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    settings = json.loads((out / "config.json").read_text(encoding="utf-8"))
    del settings["comparisons"], settings["previous"]
    del settings["sha256"]
    (out / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    report = (out / "report.json").read_bytes()
    assert main(fast_run(out, *ROOM)) == 0 and (out / "report.json").read_bytes() == report


def test_the_answers_do_not_depend_on_torch_s_own_seed(run: Path) -> None:
    first = items_to_rank(run, prompts=3)
    torch.manual_seed(1)
    assert items_to_rank(run, prompts=3) == first and items_to_rank(run, prompts=3, seed=1) != first
