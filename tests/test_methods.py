"""minirlhf run --method: which policies step 3 trains, killed, continued, changed, measured and shown."""

from __future__ import annotations

import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from minirlhf_course.world import GoldLabeler, World
from safetensors.torch import load_file

from minirlhf.checkpoints import load_state, save_state
from minirlhf.cli import main
from minirlhf.config import METHODS, SETTINGS, config_from_dict, preset
from minirlhf.errors import UserError
from minirlhf.pipeline.folder import read_config, read_settings, steps_of_run
from minirlhf.pipeline.run import _pairs
from minirlhf.pipeline.settings import steps_of
from minirlhf.report import summary_table
from minirlhf.report.read import load_run
from minirlhf.report.text import findings, headline

DOC = Path(__file__).parents[1] / "docs" / "methods.md"
OTHERS = ("rloo", "grpo", "dpo")
QUICK = ["--base.steps", "8", "--sft.epochs", "0.1", "--reward-model.epochs", "0.1", "--evaluation.prompts", "4"]
QUICK += ["--evaluation.corpus-blocks", "2", "--evaluation.max-response-tokens", "6", "--evaluation.examples", "2"]
STEPS = {
    "rlhf": ["--rlhf.steps", "2", "--rlhf.batch-size", "8", "--rlhf.max-response-tokens", "6"],
    "rloo": ["--rloo.steps", "3", "--rloo.batch-size", "8", "--rloo.max-response-tokens", "6"],
    "grpo": ["--grpo.steps", "3", "--grpo.batch-size", "8", "--grpo.max-response-tokens", "6"],
    "dpo": ["--dpo.epochs", "1", "--dpo.batch-size", "4", "--dpo.max-response-tokens", "6", "--dpo.measure-every", "2"],
}


def options(*methods: str) -> list[str]:
    groups = dict.fromkeys(SETTINGS[method] for method in methods)
    return [*QUICK, "--method", *methods, *(option for group in groups for option in STEPS[group])]


def weights(out: Path, *steps: str) -> dict[str, str]:
    return {step: hashlib.sha256((out / step / "model.safetensors").read_bytes()).hexdigest() for step in steps}


def rows(out: Path, step: str) -> list[dict]:
    return [json.loads(line) for line in (out / step / "metrics.jsonl").read_text().splitlines()]


def report_of(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, fast_run) -> Path:
    """A run of the three new methods, named in another order and one of them twice."""
    out = tmp_path_factory.mktemp("methods") / "run"
    assert main(fast_run(out, *options("dpo", "grpo", "rloo", "grpo"))) == 0
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_each_method_trains_its_policy(finished: Path) -> None:
    assert read_config(finished).methods == OTHERS and read_settings(finished)["method"] == list(OTHERS)
    assert {file.name for file in finished.iterdir() if file.is_dir()} == {"base", "sft", "reward_model", *OTHERS}
    assert len(set(weights(finished, "sft", *OTHERS).values())) == 4
    for name in ("rloo", "grpo"):
        logged = rows(finished, name)
        assert len(logged) == 3 and abs(logged[0]["objective/kl"]) < 1e-4 < abs(logged[-1]["objective/kl"])
        assert all(row["policy/first_ratio_error"] < 1e-5 for row in logged)
    dpo = rows(finished, "dpo")
    assert abs(dpo[0]["objective/kl"]) < 1e-4 < abs(dpo[-1]["objective/kl"]) and dpo[-1]["dpo/margin"] > 0


def test_report_and_table_know_them(finished: Path) -> None:
    report = report_of(finished)
    assert list(report["evaluation"]) == ["base", "sft", *OTHERS]
    assert set(report["alignment_tax"]) == {"sft", *OTHERS, "removed_by_ptx"}
    assert report["alignment_tax"]["removed_by_ptx"] is None
    sampled = ["policy", "reference", "reward model"]
    assert report["models_held"] == {"rloo": sampled, "grpo": sampled, "dpo": ["policy", "reference"]}
    assert set(report["seconds"]) == {"preparation", "base", "sft", "reward_model", *OTHERS, "evaluation", "total"}
    for example in json.loads((finished / "answers.json").read_text()):
        assert set(example["answers"]) == {"base", "sft", *OTHERS}
    page = (finished / "report.html").read_text()
    text = re.sub(r"\s+", " ", re.sub("<style.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL))
    for shown in ("The six steps", "The same prompts, five answers", "Step 3: RLOO, GRPO and DPO", "all five models"):
        assert shown in text
    for shown in (
        "policy, reference and reward model",
        "that RLOO and GRPO were trained to please",
        "DPO only compares it",
    ):
        assert shown in text
    assert "PPO" not in text.replace("GRPO", "").split("Settings and numbers")[0], "no sentence about what isn't there"
    table = summary_table(finished)
    assert "the reward model that RLOO and GRPO were trained against: a proxy" in table
    assert "models in memory while training: RLOO 3, GRPO 3, DPO 2" in table and "PPO" not in table.replace("GRPO", "")


def test_chat_evaluate_label_and_export(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["chat", "--run", str(finished), "--prompt", "Hi"]) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines() if line[:2] == "  "] == ["base", "SFT", "RLOO", "GRPO", "DPO"]
    for given, name in (["--checkpoint", "rloo"], "rloo"), ([], "dpo"):
        assert main(["evaluate", "--run", str(finished), "--device", "cpu", *given]) == 0
        measured = json.loads(capsys.readouterr().out)
        assert measured["checkpoint"] == name
        assert measured["kl_to_sft"] == pytest.approx(report_of(finished)["evaluation"][name]["kl_to_sft"], rel=1e-5)
    assert main(["export", "--run", str(finished), "--out", str(tmp_path / "model")]) == 0
    assert weights(tmp_path, "model")["model"] == weights(finished, "dpo")["dpo"]


@pytest.mark.parametrize("method", OTHERS)
def test_killed_and_resumed_with_the_same_bits(
    method: str, finished: Path, run: Path, fast_run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step ends in the middle, as a kill leaves it; the same command goes on from its saved state."""
    for name in (method, "report.json"):
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    command, saved = fast_run(run, *options(*OTHERS), "--save-seconds", "0"), 0

    def killed(file: Path, *parts, **named) -> None:
        nonlocal saved
        save_state(file, *parts, **named)
        saved += 1
        if saved == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("minirlhf.training.save_state", killed)
    assert main(command) == 130
    monkeypatch.undo()
    assert load_state(run / f"{method}.partial" / "state.safetensors") and not (run / method).exists()
    assert main(command) == 0
    assert weights(run, *OTHERS) == weights(finished, *OTHERS)
    assert [row["step"] for row in rows(run, method)] == list(range(len(rows(finished, method))))


def test_a_method_that_is_added_is_all_that_is_trained(finished: Path, run: Path, fast_run, refused) -> None:
    before = {file: file.stat().st_mtime_ns for step in OTHERS for file in (run / step).iterdir()}
    assert main(fast_run(run, *options("ppo", *OTHERS))) == 0
    assert weights(run, *OTHERS) == weights(finished, *OTHERS)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    report = report_of(run)
    assert list(report["evaluation"]) == ["base", "sft", "ppo", *OTHERS] and len(report["models_held"]["ppo"]) == 4
    assert all(report["evaluation"][name] == report_of(finished)["evaluation"][name] for name in OTHERS)
    # One that is left out stays where it is, and the report shows it no longer.
    assert main(fast_run(run, *options("ppo", "dpo"))) == 0
    assert (
        list(report_of(run)["evaluation"]) == ["base", "sft", "ppo", "dpo"] and (run / "grpo" / "config.json").is_file()
    )
    # Its settings are still those of a model that stands.
    said = refused(fast_run(run, *options("ppo", "rloo"), "--rloo.beta", "0.5"))
    assert "rloo was trained with rloo.beta = 0.08, not 0.5" in said and f"delete {run / 'rloo'} to train" in said


def test_a_round_trains_the_run_s_own_methods(finished: Path, tmp_path: Path, tiny_folder: Path) -> None:
    rankings, out = tmp_path / "rankings.jsonl", tmp_path / "next"
    row = json.loads((tiny_folder / "comparisons.jsonl").read_text().splitlines()[0])
    rankings.write_text(json.dumps({key: row[key] for key in row if key != "labeler"} | {"labeler": "me"}) + "\n")
    command = ["round", "--run", str(finished), "--comparisons", str(rankings), "--out", str(out), "--device", "cpu"]
    assert main(command) == 0
    assert list(report_of(out)["evaluation"]) == ["base", "sft", *OTHERS]
    last, first = rows(finished, "grpo")[-1], rows(out, "grpo")[0]
    assert abs(first["objective/kl"]) > 1e-4 and last["objective/kl"] != 0, "it goes on from the last policy"
    new, old = weights(out, "sft", *OTHERS), weights(finished, "sft", *OTHERS)
    assert new["sft"] == old["sft"] and all(new[name] != old[name] for name in OTHERS)


def test_a_reward_function_is_for_those_that_ask_it(tmp_path: Path, fast_run, refused) -> None:
    (tmp_path / "rewards.py").write_text(
        "def short(prompts, responses):\n    return [-len(r) / 9 for r in responses]\n"
    )
    reward = ["--reward", f"{tmp_path / 'rewards.py'}:short"]
    assert "DPO learns from the comparisons" in refused(fast_run(tmp_path / "run", *options("dpo"), *reward))
    assert not (tmp_path / "run").exists()
    assert main(fast_run(tmp_path / "run", *options("rloo", "dpo"), *reward)) == 0
    held = report_of(tmp_path / "run")["models_held"]
    assert held == {"rloo": ["policy", "reference"], "dpo": ["policy", "reference"]}
    assert not (tmp_path / "run" / "reward_model").exists()


def test_adapters_in_bfloat16_with_layers_computed_again(tmp_path: Path, fast_run, make_causal, tokenizer) -> None:
    make_causal("llama", seed=5).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    given = ["--model", str(tmp_path / "model"), "--lora.rank", "2", "--precision", "bfloat16"]
    out, own = tmp_path / "run", options(*OTHERS)
    del own[own.index("--base.steps") : own.index("--base.steps") + 2]
    assert main(fast_run(out, *given, "--gradient-checkpointing", *own)) == 0
    kept = [load_file(out / name / "adapter_model.safetensors") for name in ("sft", *OTHERS)]
    for adapter in kept[1:]:
        assert adapter.keys() == kept[0].keys() and any(not adapter[key].equal(kept[0][key]) for key in adapter)
    for name in ("rloo", "grpo"):
        assert rows(out, name)[0]["policy/first_ratio_error"] < 0.05


@pytest.mark.slow
def test_two_at_a_time_is_the_same_as_one_after_the_other(finished: Path, run: Path, fast_run) -> None:
    for name in OTHERS:
        shutil.rmtree(run / name)
    (run / "report.json").unlink()
    command = [sys.executable, "-m", "minirlhf.cli", *fast_run(run, *options(*OTHERS))]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert weights(run, *OTHERS) == weights(finished, *OTHERS)
    report = report_of(run)
    assert report["side_by_side"] == [["rloo", "grpo"]] and "RLOO and GRPO at the same time" in done.stdout
    seconds = report["seconds"]
    apart = sum(spent for part, spent in seconds.items() if part != "total")
    assert seconds["total"] == pytest.approx(apart - min(seconds["rloo"], seconds["grpo"]))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--method", "ppo", "--dpo.beta", "0.3"], "--dpo.beta 0.3: not used without --method dpo"),
        (["--method", "grpo", "--rlhf.beta", "0.3"], "--rlhf.beta 0.3: not used without --method ppo or ppo_ptx"),
        (["--method", "ppo", "--rlhf.ptx-coef", "0.1"], "--rlhf.ptx-coef 0.1: not used without --method ppo_ptx"),
        (["--grpo.lr", "1e-4"], "--grpo.lr 0.0001: not used without --method grpo"),
        (["--method", "rloo", "--rloo.batch-size", "30"], "--rloo.batch-size 30: must be a multiple of 4 answers"),
    ],
)
def test_what_would_be_ignored_is_refused(given: list[str], said: str, tmp_path: Path, fast_run, refused) -> None:
    assert said in refused(fast_run(tmp_path / "run", *given))
    assert not (tmp_path / "run").exists()


def test_unknown_methods_are_refused(tmp_path: Path, fast_run, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(fast_run(tmp_path / "run", "--method", "trpo"))
    shown = capsys.readouterr()
    assert caught.value.code == 2 and "trpo" in shown.out + shown.err
    for methods in ((), ("ppo", "trpo")):
        with pytest.raises(UserError, match=r"--method .*: name one or more of ppo, ppo_ptx, rloo, grpo, dpo"):
            replace(preset("fast"), method=methods)


def test_help_documents_every_setting(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    said = capsys.readouterr().out
    assert all(f"--{name}.beta" in said for name in ("rlhf", *OTHERS)) and "--method" in said


def test_settings_belong_to_the_methods_that_they_change() -> None:
    assert steps_of("rloo.lr") == ("rloo",) and steps_of("dpo.beta") == ("dpo",) and steps_of("method") == ()
    assert steps_of("comparisons.x") == steps_of("sft.lr")[1:] == ("reward_model", *METHODS)
    assert "dpo" not in steps_of("reward.function") + steps_of("reward_model.lr")
    assert steps_of_run(preset("fast")) == ("base", "sft", "reward_model", "ppo", "ppo_ptx")
    assert preset("fast").methods == ("ppo", "ppo_ptx")


def test_a_run_from_before_has_the_methods_of_then(finished: Path) -> None:
    """config.json and summaries without what this version writes."""
    settings = read_settings(finished)
    for name in ("method", *OTHERS):
        del settings[name]
    assert config_from_dict(settings, finished).methods == ("ppo", "ppo_ptx")
    assert _pairs({"base": False, "ppo": True, "ppo_ptx": False}) == [["ppo", "ppo_ptx"]]
    assert _pairs({"ppo": "rloo", "rloo": None, "grpo": "dpo"}) == [["ppo", "rloo"]]


@pytest.mark.parametrize("methods", [("ppo",), ("ppo_ptx",), ("dpo",), ("ppo", "dpo"), METHODS])
def test_sentences_are_true_for_any_set_of_methods(methods: tuple[str, ...], finished: Path) -> None:
    loaded = load_run(finished)
    row = {**loaded.policy("dpo"), "win_rate_vs_sft": 0.2, "win_rate_vs_sft_interval": [0.1, 0.3]}
    evaluation = {"base": loaded.policy("base"), "sft": loaded.policy("sft"), **dict.fromkeys(methods, row)}
    tax = dict.fromkeys(("sft", *methods), 0.2) | {"removed_by_ptx": 0.5 if {"ppo", "ppo_ptx"} <= {*methods} else None}
    told: Callable = lambda: replace(loaded, report=loaded.report | {"evaluation": evaluation, "alignment_tax": tax})  # noqa: E731
    said = " ".join([headline(told()), *findings(told())])
    names = {"ppo": "PPO", "ppo_ptx": "PPO-ptx", "rloo": "RLOO", "grpo": "GRPO", "dpo": "DPO"}
    for method, name in names.items():
        assert (re.search(rf"(?<![A-Z-]){name}(?![\w-])", said) is not None) == (method in methods), (name, said)
    assert ("step 3" in said) == ("dpo" in methods) and ("PPO-ptx wins 50 % of it back" in said) == (methods == METHODS)


def test_the_reward_of_the_page_is_right(tmp_path: Path) -> None:
    """docs/methods.md: its function accepts the best answers to every such question, and no answer to another one."""
    code = re.search("```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "right.py").write_text(code[1])
    right = runpy.run_path(str(tmp_path / "right.py"))["right"]
    gold = GoldLabeler(World(seed=0))
    prompts = [
        f"{'please ' * polite}read this : the {being} hid the key {place} . {question}"
        for polite in (0, 1)
        for being in ("fox", "king")
        for place in ("in a tree", "on the ice", "in the forest")
        for question in ("who hid the key ?", "where is the key ?")
    ]
    best = [gold.best_answer(prompt) for prompt in prompts]
    assert right(prompts, best) == [1.0] * len(prompts)
    others = [re.sub("the (fox|king) hid the key .*? \\.", "the owl hid the key in a pond .", text) for text in prompts]
    assert right(prompts, [gold.best_answer(text) for text in others]) == [0.0] * len(prompts)
    who, where = prompts[:2]
    wrong = ["the fox . the king .", "the owl hid the key .", "in a tree .", "", "sure , gladly !"]
    assert right([who] * 5, wrong) == [0.0] * 5 and right([who], ["the fox ."]) == [1.0]
    assert right([where] * 3, ["in a tree . on the ice .", "the fox .", "in a barn ."]) == [0.0] * 3
    assert right(["where does an owl live ?"], ["in a tree ."]) == [0.0]
