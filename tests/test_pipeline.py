"""The whole run on a folder of plain text: killed, continued, damaged, finished, talked to."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from minirlhf.checkpoints import load_state
from minirlhf.cli import main
from minirlhf.pipeline.folder import locked

ROOT = Path(__file__).parents[1]
STEPS = ("base", "sft", "reward_model", "ppo", "ppo_ptx")
POLICIES = ("base", "sft", "ppo", "ppo_ptx")
MEASURED = {
    "gold_mean",
    "gold_standard_error",
    "headroom_closed",
    "win_rate_vs_sft",
    "win_rate_vs_sft_interval",
    "win_rate_vs_base",
    "win_rate_vs_base_interval",
    "kl_to_sft",
    "corpus_loss",
    "mean_length",
    "ended_fraction",
}


def arguments(data: Path, out: Path, *options: str) -> list[str]:
    return ["run", "--preset", "fast", "--data", str(data), "--out", str(out), "--device", "cpu", *options]


def weights(out: Path) -> dict[str, str]:
    return {step: hashlib.sha256((out / step / "model.safetensors").read_bytes()).hexdigest() for step in STEPS}


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(f.relative_to(folder)): (f.stat().st_mtime_ns, f.read_bytes()) for f in folder.rglob("*") if f.is_file()
    }


def strict(text: str) -> dict:
    """JSON as other programs read it: without NaN and Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("pipeline") / "run"
    assert main(arguments(tiny_folder, out)) == 0
    return out


def test_folder_holds_what_it_should(finished: Path) -> None:
    assert {f.name for f in finished.iterdir()} == {*STEPS, "config.json", "report.json", "report.html", "answers.json"}
    for step in STEPS:
        names = {f.name for f in (finished / step).iterdir()}
        assert {"model.safetensors", "config.json", "tokenizer.json", "metrics.jsonl", "checksums.json"} <= names
        assert "state.safetensors" not in names and not [n for n in names if n.endswith((".bin", ".pt", ".partial"))]
        assert any(name.startswith("events.out.tfevents") for name in names)
    assert len((finished / "base" / "metrics.jsonl").read_text().splitlines()) == 40


def test_report_has_every_key(finished: Path) -> None:
    report = strict((finished / "report.json").read_text())
    assert set(report["evaluation"]) == set(POLICIES)
    for name, measured in report["evaluation"].items():
        assert set(measured) >= MEASURED
        for key in MEASURED - {"headroom_closed"}:
            values = measured[key] if key.endswith("interval") else [measured[key]]
            assert all(isinstance(v, float) and math.isfinite(v) for v in values), (name, key)
        assert 0 < measured["mean_length"] <= 40 and 0 <= measured["ended_fraction"] <= 1
        low, high = measured["win_rate_vs_base_interval"]
        assert 0 <= low <= measured["win_rate_vs_base"] <= high <= 1
    assert report["judge"] == "reward_model"
    assert all(report["evaluation"][name]["headroom_closed"] is None for name in POLICIES)
    assert report["evaluation"]["sft"]["kl_to_sft"] == 0 and report["evaluation"]["ppo"]["kl_to_sft"] > 0
    assert report["evaluation"]["sft"]["win_rate_vs_sft"] == report["evaluation"]["base"]["win_rate_vs_base"] == 0.5

    seconds = report["seconds"]
    assert set(seconds) == {"preparation", *STEPS, "evaluation", "total"}
    apart = sum(v for k, v in seconds.items() if k != "total")
    if report["side_by_side"]:  # as long as the longer of the two, and not as both
        assert apart - seconds["ppo"] - 1e-6 <= seconds["total"]
    else:
        assert seconds["total"] == pytest.approx(apart)
    assert all(v > 0 for v in seconds.values())
    assert report["parameters"] > 1000
    keys = {"accuracy", "accuracy_heldout_labelers", "ceiling", "length_baseline", "calibration_error"}
    assert keys <= set(report["reward_model"]) and report["reward_model"]["ceiling"] is None
    assert report["seed"] == 0 and report["command"].startswith("minirlhf run --preset fast --data")
    assert {"minirlhf", "torch", "transformers", "python"} <= set(report["versions"])
    assert "<html" in (finished / "report.html").read_text()[:300].lower()


def test_answers_are_kept_for_the_report(finished: Path) -> None:
    rows = strict((finished / "answers.json").read_text())
    assert len(rows) == 4  # four held-out prompts, six asked for
    for row in rows:
        assert set(row["answers"]) == set(POLICIES)
        assert all(set(a) == {"response", "ended", "score"} for a in row["answers"].values())


def test_first_minibatch_of_every_step_of_the_run(finished: Path) -> None:
    for step in ("ppo", "ppo_ptx"):
        rows = [json.loads(line) for line in (finished / step / "metrics.jsonl").read_text().splitlines()]
        assert len(rows) == 6 and abs(rows[0]["objective/kl"]) < 1e-4
        for row in rows:
            assert row["policy/first_ratio_error"] < 1e-5 and abs(row["policy/first_approx_kl"]) < 1e-5
            assert row["policy/first_clip_fraction"] == 0
        assert ("policy/ptx_loss" in rows[0]) == (step == "ppo_ptx")


def test_finished_run_is_quick_and_changes_nothing(finished: Path, tiny_folder: Path) -> None:
    before, began = contents(finished), time.monotonic()
    assert main(arguments(tiny_folder, finished)) == 0
    assert time.monotonic() - began < 2
    assert contents(finished) == before


def test_the_total_is_the_time_on_the_clock(tiny_folder: Path, tmp_path: Path) -> None:
    out, began = tmp_path / "run", time.monotonic()
    assert main(arguments(tiny_folder, out)) == 0
    elapsed = time.monotonic() - began
    seconds = strict((out / "report.json").read_text())["seconds"]
    drawing = 3.0  # the page tells the time, so drawing it can't count
    assert elapsed - drawing <= seconds["total"] <= elapsed, seconds


@pytest.mark.parametrize("option", [("--seed", "1"), ("--rlhf.beta", "0.5"), ("--base.steps", "41")])
def test_other_settings_are_refused(finished: Path, tiny_folder: Path, capsys, option: tuple[str, str]) -> None:
    before = contents(finished)
    assert main(arguments(tiny_folder, finished, *option)) == 2
    message = capsys.readouterr().err
    name = option[0].removeprefix("--").replace("-", "_")
    assert message.startswith("minirlhf: error:") and message.count("\n") == 1
    assert str(finished) in message and name in message and option[1] in message
    assert contents(finished) == before


def test_other_evaluation_is_measured_again(finished: Path, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    command = arguments(tiny_folder, out, "--evaluation.examples", "3")
    assert main(command) == 0
    assert len(strict((out / "answers.json").read_text())) == 3 and weights(out) == weights(finished)
    assert strict((out / "config.json").read_text())["evaluation"]["examples"] == 3
    mine, theirs = (strict((run / "report.json").read_text()) for run in (out, finished))
    assert mine["evaluation"] == theirs["evaluation"] and mine["command"].endswith("--evaluation.examples 3")
    before = contents(out)
    assert main(command) == 0 and contents(out) == before


@pytest.mark.parametrize(
    ("option", "steps"),
    [("--rlhf.beta", ["ppo", "ppo_ptx"]), ("--rlhf.ptx-coef", ["ppo_ptx"]), ("--sft.lr", STEPS[1:])],
)
def test_what_the_message_says_to_delete_is_enough(
    finished: Path, tiny_folder: Path, tmp_path: Path, capsys, option: str, steps: list[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    command = arguments(tiny_folder, out, option, "0.01")
    assert main(command) == 2
    message = capsys.readouterr().err
    advice = re.search("delete (.*) to train", message)
    assert advice is not None, message
    folders = [Path(name) for name in re.split(", | and ", advice[1])]
    assert folders == [out / step for step in steps] and f"{steps[0]} was trained with" in message
    for folder in folders:
        shutil.rmtree(folder)
    assert main(command) == 0
    old, new = weights(finished), weights(out)
    assert {step for step in STEPS if old[step] != new[step]} == set(steps)


def test_settings_of_a_step_that_begins_may_change(finished: Path, tiny_folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    os.replace(out / "ppo_ptx", out / "ppo_ptx.partial")
    (out / "ppo_ptx.partial" / "state.safetensors").touch()
    command = arguments(tiny_folder, out, "--rlhf.ptx-coef", "0.2")
    assert main(command) == 2
    assert f"delete {out / 'ppo_ptx.partial'} to" in capsys.readouterr().err
    assert (out / "report.json").is_file()  # nothing is touched by a command that is refused
    (out / "ppo_ptx.partial" / "state.safetensors").unlink()
    assert main(command) == 0
    assert count(out / "ppo_ptx" / "metrics.jsonl") == 6
    assert strict((out / "config.json").read_text())["rlhf"]["ptx_coef"] == 0.2


def test_no_setting_may_ask_for_more_context_than_the_base_has(finished: Path, tiny_folder: Path, capsys) -> None:
    before = contents(finished)
    assert main(arguments(tiny_folder, finished, "--evaluation.max-response-tokens", "500")) == 2
    assert "lower --rlhf.max-response-tokens" in capsys.readouterr().err and contents(finished) == before


@pytest.mark.parametrize(
    ("name", "said"), [("prompts.jsonl", "another"), ("corpus.jsonl", "a"), ("tokenizer.json", "no")]
)
def test_other_data_are_refused(
    finished: Path, tiny_folder: Path, tmp_path: Path, capsys, name: str, said: str
) -> None:
    """Also where the run is finished, and nothing would be read again."""
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(tiny_folder, data)
    shutil.copytree(finished, out)
    settings = strict((out / "config.json").read_text()) | {"data": str(data)}
    (out / "config.json").write_text(json.dumps(settings))
    (data / "notes.txt").write_text("not read by any step")
    assert main(arguments(data, out)) == 0
    if said == "a":
        (data / name).unlink()
    else:
        (data / name).open("a").write("\n")
    before = contents(out)
    assert main(arguments(data, out)) == 2
    message = capsys.readouterr().err
    assert f"base was trained with {said} {data / name}; give the same settings and data" in message
    assert f"delete {out / 'base'}, " in message and message.count("\n") == 1 and contents(out) == before


def test_a_run_of_an_older_version_knows_its_data_by_their_path(
    finished: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    settings = strict((out / "config.json").read_text())
    assert set(settings.pop("data_sha256")) == {f.name for f in tiny_folder.iterdir()}
    (out / "config.json").write_text(json.dumps(settings))
    before = contents(out)
    assert main(arguments(tiny_folder, out)) == 0 and contents(out) == before


def test_save_seconds_may_change(finished: Path, tiny_folder: Path) -> None:
    assert main(arguments(tiny_folder, finished, "--save-seconds", "3")) == 0


@pytest.mark.parametrize("step", ["base", "ppo"])
def test_damaged_checkpoint_is_named(finished: Path, tiny_folder: Path, tmp_path: Path, capsys, step: str) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    file = out / step / "model.safetensors"
    payload = bytearray(file.read_bytes())
    payload[-1000] ^= 1
    file.write_bytes(payload)
    commands = [arguments(tiny_folder, out), ["evaluate", "--run", str(out), "--checkpoint", step]]
    for command in [*commands, ["chat", "--run", str(out), "--prompt", "Hi"]]:
        assert main(command) == 2
        message = capsys.readouterr().err
        assert str(file) in message and "damaged" in message and message.count("minirlhf: error") == 1
    # The advice of the message helps: delete that step, and the same command makes it again.
    if step == "ppo":
        shutil.rmtree(out / "ppo")
        (out / "report.json").unlink()
        assert main(arguments(tiny_folder, out)) == 0
        assert weights(out) == weights(finished)


@pytest.mark.parametrize("sums", [None, "{}", "null", "[]"])
@pytest.mark.parametrize("step", ["reward_model", "ppo"])
def test_a_model_without_its_checksums_is_not_trusted(
    finished: Path, tiny_folder: Path, tmp_path: Path, capsys, step: str, sums: str | None
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    record = out / step / "checksums.json"
    record.unlink()
    if sums is not None:
        record.write_text(sums)
    weight_file = out / step / "model.safetensors"
    weight_file.write_bytes(weight_file.read_bytes()[:1000])
    commands = [arguments(tiny_folder, out), ["evaluate", "--run", str(out), "--checkpoint", "ppo"]]
    for command in [*commands, *([["chat", "--run", str(out), "--prompt", "Hi"]] if step == "ppo" else [])]:
        assert main(command) == 2
        message = capsys.readouterr().err
        assert f"{record}: " in message and f"delete {out / step}" in message and message.count("\n") == 1


def test_an_empty_step_is_not_finished(finished: Path, tiny_folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for file in (out / "base").iterdir():
        file.unlink()
    for _ in ("a finished run", "one without a report"):
        assert main(arguments(tiny_folder, out)) == 2
        assert f"delete {out / 'base'} and run" in capsys.readouterr().err
        (out / "report.json").unlink(missing_ok=True)
    shutil.rmtree(out / "base")  # what the message advises
    assert main(arguments(tiny_folder, out)) == 0 and weights(out) == weights(finished)


@pytest.mark.parametrize(
    "text", ["[]", "null", "{}", '{"data": "x", "seed": 0, "base": [], "judge": 1, "parameters": 1}']
)
@pytest.mark.parametrize("name", ["config.json", "report.json"])
def test_json_of_another_shape_is_damage(
    finished: Path, tiny_folder: Path, tmp_path: Path, capsys, name: str, text: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / name).write_text(text)
    commands = [arguments(tiny_folder, out)]
    if name == "config.json":
        commands += [["evaluate", "--run", str(out)], ["chat", "--run", str(out), "--prompt", "Hi"]]
    for command in commands:
        assert main(command) == 2
        message = capsys.readouterr().err
        assert f"{out / name}: damaged" in message and message.count("\n") == 1
    if name == "report.json":
        (out / name).unlink()  # what the message advises
        assert main(arguments(tiny_folder, out)) == 0 and weights(out) == weights(finished)


def test_damaged_state_of_a_stopped_run_is_named(finished: Path, tiny_folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "ppo_ptx")
    (out / "report.json").unlink()
    state = out / "ppo_ptx.partial" / "state.safetensors"
    state.parent.mkdir()
    state.write_bytes(b"half a state")
    assert main(arguments(tiny_folder, out)) == 2
    message = capsys.readouterr().err
    assert str(state) in message and "damaged" in message and message.count("minirlhf: error") == 1
    state.unlink()  # what the message advises
    assert main(arguments(tiny_folder, out)) == 0
    assert weights(out) == weights(finished)


def test_damaged_config_and_foreign_folder(finished: Path, tiny_folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert main(arguments(tiny_folder, tmp_path / "mine")) == 2
    assert "not empty" in capsys.readouterr().err
    assert [f.name for f in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    assert main(arguments(tiny_folder, tmp_path / "broken")) == 2
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "state"),
    [
        (["--base.lr", "1e30", "--base.warmup", "0", "--save-seconds", "0"], "base.partial"),
        (["--base.steps", "1", "--base.warmup", "0", "--base.lr", "1e38"], None),
    ],
)
def test_a_learning_rate_that_breaks_the_weights(
    tiny_folder: Path, tmp_path: Path, capsys, options: list[str], state: str | None
) -> None:
    out = tmp_path / "run"
    assert main(arguments(tiny_folder, out, *options)) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("minirlhf: error: base: ") and "lower --base.lr" in message
    assert not (out / "base").exists()
    file = out / "base.partial" / "state.safetensors"
    assert file.is_file() == (str(file) in message) == (state is not None)
    if state is not None:
        assert f"Delete {out / state} " in message
        assert all(value.isfinite().all() for value in load_state(file)[0].values())


def kill_when(command: list[str], condition: Callable[[], bool], log: Path, threads: int = 1) -> None:
    """Start the command, SIGKILL it as soon as the condition holds."""
    with log.open("a") as stream:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, f"ended before it could be killed: {log.read_text()[-2000:]}"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def count(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.is_file() else 0


@pytest.mark.slow
def test_killed_three_times_ends_with_the_same_weights(finished: Path, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "minirlhf.cli", *arguments(tiny_folder, out, "--save-seconds", "0")]
    moments: list[Callable[[], bool]] = [
        lambda: count(out / "base.partial" / "metrics.jsonl") >= 15,
        lambda: count(out / "ppo.partial" / "metrics.jsonl") >= 3,
        lambda: count(out / "ppo_ptx.partial" / "metrics.jsonl") >= 4,
    ]
    for moment, left in zip(moments, ["base.partial", "ppo.partial", "ppo_ptx.partial"], strict=True):
        kill_when(command, moment, tmp_path / "log")
        assert (out / left).is_dir() and not (out / left.removesuffix(".partial")).exists()
        assert (out / left / "state.safetensors").is_file()
        assert not (out / "report.json").exists()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert weights(out) == weights(finished)
    assert not list(out.rglob("*.partial")) and not list(out.rglob("state.safetensors"))
    mine, theirs = (strict((run / "report.json").read_text()) for run in (out, finished))
    assert mine["evaluation"] == theirs["evaluation"] and mine["reward_model"] == theirs["reward_model"]
    for step in STEPS:
        steps = [json.loads(line)["step"] for line in (out / step / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(len(steps)))
        assert len(steps) == count(finished / step / "metrics.jsonl")


def without_step_3(finished: Path, out: Path) -> Path:
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("ppo", "ppo_ptx", "report.*", "answers.json"))
    return out


@pytest.mark.slow
def test_side_by_side_is_the_same_as_one_after_the_other(finished: Path, tiny_folder: Path, tmp_path: Path) -> None:
    out = without_step_3(finished, tmp_path / "run")
    command = [sys.executable, "-m", "minirlhf.cli", *arguments(tiny_folder, out)]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    elapsed = time.monotonic() - began
    assert done.returncode == 0, done.stderr[-2000:]
    assert weights(out) == weights(finished)
    report = strict((out / "report.json").read_text())
    seconds = report["seconds"]
    assert report["side_by_side"] is True
    before = seconds["base"] + seconds["sft"] + seconds["reward_model"]  # of the run it went on from
    counted = seconds["total"] - before
    longer = max(seconds["ppo"], seconds["ppo_ptx"])
    assert longer + seconds["evaluation"] <= counted <= elapsed  # no second counts twice
    assert counted >= elapsed - 8  # Python's own start and the drawing don't count, here with both cores at work


@pytest.mark.slow
def test_a_kill_ends_both_and_the_rest_is_trained_as_before(finished: Path, tiny_folder: Path, tmp_path: Path) -> None:
    out = without_step_3(finished, tmp_path / "run")
    command = [sys.executable, "-m", "minirlhf.cli", *arguments(tiny_folder, out, "--save-seconds", "0")]
    rows = out / "ppo.partial" / "metrics.jsonl"
    kill_when(command, lambda: count(rows) >= 1, tmp_path / "log", threads=2)
    time.sleep(1.0)
    before = count(rows)
    time.sleep(1.5)
    assert before == count(rows) < 6  # nobody trains on
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert weights(out) == weights(finished)


@pytest.mark.slow
def test_keyboard_interrupt_while_two_train(finished: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches parent and child: one line, no traceback, nobody trains on; and a second run is kept out."""
    out = without_step_3(finished, tmp_path / "run")
    command = [sys.executable, "-m", "minirlhf.cli", *arguments(tiny_folder, out, "--rlhf.steps", "2000")]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
            # Tests that a shell started with & inherit that Ctrl-C is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    deadline = time.monotonic() + 60
    while not all(count(out / f"{step}.partial" / "metrics.jsonl") for step in ("ppo", "ppo_ptx")):
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-2000:]
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGSTOP)
    second = subprocess.run(command, capture_output=True, text=True, env=environment)
    os.killpg(process.pid, signal.SIGCONT)
    assert second.returncode == 2 and f"another minirlhf run is working in {out}" in second.stderr
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    said = (tmp_path / "log").read_text()
    assert (
        "Traceback" not in said
        and "Warning" not in said
        and said.count("minirlhf: ") == 1
        and "stopped; the same command" in said
    )
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_one_run_at_a_time(finished: Path, tiny_folder: Path, tmp_path: Path, capsys) -> None:
    before = contents(finished)
    with locked(finished):
        assert main(arguments(tiny_folder, finished)) == 2
        message = capsys.readouterr().err
        assert f"another minirlhf run is working in {finished}" in message and message.count("\n") == 1
    assert contents(finished) == before
    (finished / "run.lock").touch()  # left by a killed run
    assert main(arguments(tiny_folder, finished)) == 0 and contents(finished) == before
    assert main(arguments(tmp_path / "no_data", tmp_path / "deep" / "run")) == 2
    assert not (tmp_path / "deep").exists()


@pytest.mark.slow
def test_a_step_that_fails_beside_another_is_reported(finished: Path, tiny_folder: Path, tmp_path: Path) -> None:
    out = without_step_3(finished, tmp_path / "run")
    (out / "ppo.partial").mkdir()
    (out / "ppo.partial" / "state.safetensors").write_bytes(b"damaged")
    command = [sys.executable, "-m", "minirlhf.cli", *arguments(tiny_folder, out)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert done.returncode == 2
    assert "damaged training state" in done.stderr and "ppo stopped with exit code 2" in done.stderr
    assert not (out / "report.json").exists()


def test_chat_answers_with_every_policy(finished: Path, capsys) -> None:
    command = ["chat", "--run", str(finished), "--prompt", "Tell me about the otter.", "--max-response-tokens", "5"]
    assert main(command) == 0
    said = capsys.readouterr().out
    for name in ("base", "SFT", "PPO", "PPO-ptx"):
        assert any(line.split()[:1] == [name] for line in said.splitlines()), said
    assert main(command) == 0
    assert capsys.readouterr().out == said  # the same seed says the same
    assert main([*command, "--greedy"]) == 0


def test_chat_asks_at_the_terminal(finished: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = iter(["hello", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    assert main(["chat", "--run", str(finished), "--max-response-tokens", "3"]) == 0
    assert "PPO-ptx" in capsys.readouterr().out


def test_evaluate_repeats_the_report(finished: Path, capsys) -> None:
    report = strict((finished / "report.json").read_text())["evaluation"]
    command = ["evaluate", "--run", str(finished), "--checkpoint", "ppo", "--device", "cpu"]
    assert main([*command, "--prompts", "64"]) == 0
    measured = strict(capsys.readouterr().out)
    assert measured["checkpoint"] == "ppo" and measured["judge"] == "reward_model"
    assert measured["headroom_closed"] is None
    for key in MEASURED - {"headroom_closed"}:
        assert measured[key] == pytest.approx(report["ppo"][key], rel=1e-5), key


def test_evaluate_one_prompt_prints_json(finished: Path, capsys) -> None:
    assert main(["evaluate", "--run", str(finished), "--prompts", "1", "--max-response-tokens", "3"]) == 0
    strict(capsys.readouterr().out)


def test_evaluate_mistakes(finished: Path, tmp_path: Path, capsys) -> None:
    for command, word in (
        (["evaluate", "--run", str(tmp_path)], str(tmp_path)),
        (["chat", "--run", str(tmp_path / "none"), "--prompt", "a"], "none"),
        (["evaluate", "--run", str(finished), "--checkpoint", "nonsense"], "nonsense"),
        (["evaluate", "--run", str(finished), "--device", "toaster"], "toaster"),
    ):
        assert main(command) == 2
        message = capsys.readouterr().err
        assert message.startswith("minirlhf: error:") and word in message


QUICK = ["--sft.epochs", "0.1", "--rlhf.steps", "1", "--rlhf.batch-size", "8", "--rlhf.max-response-tokens", "6"]
QUICK += ["--evaluation.max-response-tokens", "6", "--evaluation.prompts", "8", "--evaluation.corpus-blocks", "4"]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, make_causal, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    make_causal("gpt2", seed=5).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_pretrained_model_takes_the_base_steps_place(gpt2: Path, tiny_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "run"
    assert main(arguments(tiny_folder, out, "--model", str(gpt2), *QUICK)) == 0
    base, given = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (out / "base", gpt2))
    assert all((base[key] == given[key]).all() for key in given)
    assert json.loads((out / "ppo_ptx" / "config.json").read_text())["model_type"] == "gpt2"
    assert (out / "report.html").is_file()
    report = strict((out / "report.json").read_text())
    assert report["parameters"] == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(gpt2).parameters())
    row = json.loads((out / "ppo" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["policy/first_ratio_error"] < 1e-5
    # The checkpoint answers like any of transformers'.
    assert main(["chat", "--run", str(out), "--prompt", "Hi", "--max-response-tokens", "3"]) == 0


def test_pretrained_model_mistakes(gpt2: Path, tiny_folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "no_model").mkdir()
    assert main(arguments(tiny_folder, tmp_path / "a", "--model", str(tmp_path / "no_model"))) == 2
    assert "--model" in capsys.readouterr().err
    assert main(arguments(tiny_folder, tmp_path / "b", "--model", str(gpt2), "--context-length", "4000")) == 2
    assert "128" in capsys.readouterr().err


def test_small_world_is_judged_by_gold(tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = [*QUICK, "--base.steps", "2", "--reward-model.epochs", "0.01"]
    assert main(arguments(ROOT / "data" / "small_world", out, *options)) == 0
    report = strict((out / "report.json").read_text())
    assert report["judge"] == "gold"
    assert report["evaluation"]["base"]["headroom_closed"] == 0
    assert all(isinstance(report["evaluation"][name]["headroom_closed"], float) for name in POLICIES)
    assert 0.5 < report["reward_model"]["ceiling"] <= 1
    assert report["reward_model"]["pairs_heldout_labelers"] > 0
    assert report["best_mean"] > report["evaluation"]["ppo"]["gold_mean"]
    row = json.loads((out / "ppo" / "metrics.jsonl").read_text().splitlines()[0])
    assert "objective/gold" in row
