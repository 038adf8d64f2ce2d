"""The whole run on a folder of plain text: killed, continued, damaged, finished."""

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from minirlhf_course.world import write_world

from minirlhf.checkpoints import load_state
from minirlhf.cli import main
from minirlhf.config import preset
from minirlhf.pipeline import run_pipeline
from minirlhf.pipeline.folder import locked, steps_of_run

STEPS = steps_of_run(preset("fast"))
POLICIES = tuple(step for step in STEPS if step != "reward_model")
TINY = Path(__file__).parent / "data" / "tiny_folder"
NUMBERS = {
    *("gold_mean", "gold_standard_error", "kl_to_sft", "corpus_loss", "mean_length", "ended_fraction"),
    *("win_rate_vs_sft", "win_rate_vs_sft_interval", "win_rate_vs_base", "win_rate_vs_base_interval"),
    *("gold_gain_vs_sft", "gold_gain_vs_sft_interval", "gold_gain_vs_base", "gold_gain_vs_base_interval"),
}


def weights(out: Path) -> dict[str, str]:
    return {step: hashlib.sha256((out / step / "model.safetensors").read_bytes()).hexdigest() for step in STEPS}


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    before = contents(folder)
    yield
    assert contents(folder) == before


def read(file: Path) -> dict:
    """JSON as other programs read it: without NaN and Infinity."""
    return json.loads(file.read_text(), parse_constant=pytest.fail)


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def count(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def delete(folder: Path, *names: str) -> None:
    for path in (folder / name for name in names):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def put(file: Path, content: str | None) -> None:
    """Write a file anew, or take it away."""
    file.parent.mkdir(exist_ok=True, parents=True)
    file.unlink() if content is None else file.write_text(content)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, fast_run) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("pipeline") / "run"
    assert main(fast_run(out, "--tensorboard")) == 0
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def unfinished(run: Path) -> Path:
    """A copy of it without step 3 and all that comes after."""
    delete(run, "ppo", "ppo_ptx", "report.json", "report.html", "answers.json")
    return run


def test_folder_holds_what_it_should(finished: Path) -> None:
    assert {f.name for f in finished.iterdir()} == {*STEPS, "config.json", "report.json", "report.html", "answers.json"}
    for step in STEPS:
        names = {f.name for f in (finished / step).iterdir()}
        assert {"model.safetensors", "config.json", "tokenizer.json", "metrics.jsonl", "checksums.json"} <= names
        assert "state.safetensors" not in names and not [n for n in names if n.endswith((".bin", ".pt", ".partial"))]
        assert any(name.startswith("events.out.tfevents") for name in names)
    assert count(finished / "base" / "metrics.jsonl") == 40


def test_report_has_every_key(finished: Path) -> None:
    report = read(finished / "report.json")
    assert set(report["evaluation"]) == set(POLICIES)
    for name, measured in report["evaluation"].items():
        for key in NUMBERS:
            values = measured[key] if key.endswith("interval") else [measured[key]]
            assert all(isinstance(v, float) and math.isfinite(v) for v in values), (name, key)
        assert 0 < measured["mean_length"] <= 40 and 0 <= measured["ended_fraction"] <= 1
        low, high = measured["win_rate_vs_base_interval"]
        assert 0 <= low <= measured["win_rate_vs_base"] <= high <= 1
        assert measured["headroom_closed"] is measured["headroom_closed_interval"] is None
        low, high = measured["gold_gain_vs_sft_interval"]
        assert low <= measured["gold_gain_vs_sft"] <= high
    assert report["judge"] == "reward_model"
    assert report["evaluation"]["sft"]["kl_to_sft"] == 0 and report["evaluation"]["ppo"]["kl_to_sft"] > 0
    assert report["evaluation"]["sft"]["win_rate_vs_sft"] == report["evaluation"]["base"]["win_rate_vs_base"] == 0.5

    seconds = report["seconds"]
    assert set(seconds) == {"preparation", *STEPS, "evaluation", "total"}
    assert seconds["total"] == pytest.approx(sum(v for k, v in seconds.items() if k != "total"))
    assert all(v > 0 for v in seconds.values()) and not report["side_by_side"]
    assert report["parameters"] > 1000
    keys = {
        "accuracy",
        "accuracy_interval",
        "accuracy_heldout_labelers",
        "ceiling",
        "length_baseline",
        "calibration_error",
    }
    assert keys <= set(report["reward_model"]) and report["reward_model"]["ceiling"] is None
    assert report["seed"] == 0 and report["command"].startswith("minirlhf run --preset fast --data")
    assert {"minirlhf", "torch", "transformers", "python"} <= set(report["versions"])
    assert "<html" in (finished / "report.html").read_text()[:300].lower()


def test_answers_are_kept_for_the_report(finished: Path) -> None:
    examples = read(finished / "answers.json")
    assert len(examples) == 4  # four held-out prompts, six asked for
    for example in examples:
        assert set(example["answers"]) == set(POLICIES)
        assert all(set(a) == {"response", "ended", "score"} for a in example["answers"].values())


def test_first_minibatch_of_every_step_of_the_run(finished: Path) -> None:
    for step in ("ppo", "ppo_ptx"):
        logged = rows(finished / step / "metrics.jsonl")
        assert len(logged) == 6 and abs(logged[0]["objective/kl"]) < 1e-4
        for row in logged:
            assert row["policy/first_ratio_error"] < 1e-5 and abs(row["policy/first_approx_kl"]) < 1e-5
            assert row["policy/first_clip_fraction"] == 0
        assert ("policy/ptx_loss" in logged[0]) == (step == "ppo_ptx")


def test_finished_run_is_quick_and_changes_nothing(finished: Path, fast_run) -> None:
    began = time.process_time()  # also on a machine that is busy with other things
    with unchanged(finished):
        assert main(fast_run(finished)) == 0
        assert time.process_time() - began < 1
        assert main(fast_run(finished, "--save-seconds", "3")) == 0


def test_the_total_is_the_time_on_the_clock(fast_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minirlhf.report.write_report", lambda run: None)  # the page tells the time: it can't count
    out, began = tmp_path / "run", time.monotonic()
    assert main(fast_run(out)) == 0
    elapsed = time.monotonic() - began
    assert elapsed - 1 <= read(out / "report.json")["seconds"]["total"] <= elapsed


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--seed", "1", "seed = 0, not 1"),
        ("--rlhf.beta", "0.5", "rlhf.beta = 0.08, not 0.5"),
        ("--base.steps", "41", "base.steps = 40, not 41"),
        # No setting may ask for more context than the base model has.
        ("--evaluation.max-response-tokens", "500", "lower --rlhf.max-response-tokens"),
    ],
)
def test_other_settings_are_refused(finished: Path, fast_run, refused, option: str, value: str, said: str) -> None:
    with unchanged(finished):
        message = refused(fast_run(finished, option, value))
    assert str(finished) in message and said in message


def test_other_evaluation_is_measured_again(finished: Path, run: Path, fast_run) -> None:
    command = fast_run(run, "--evaluation.examples", "3")
    assert main(command) == 0
    assert len(read(run / "answers.json")) == 3 and weights(run) == weights(finished)
    assert read(run / "config.json")["evaluation"]["examples"] == 3
    mine, theirs = (read(folder / "report.json") for folder in (run, finished))
    assert mine["evaluation"] == theirs["evaluation"] and mine["command"].endswith("--evaluation.examples 3")
    assert "--evaluation.examples 3" in (run / "report.html").read_text()
    with unchanged(run):
        assert main(command) == 0


def test_the_pipeline_measures_and_draws_nothing(finished: Path, run: Path, tiny_folder: Path) -> None:
    (run / "report.json").unlink()
    measured = run_pipeline(replace(preset("fast"), data=tiny_folder, out=run, device="cpu"), progress=False)
    assert measured == read(run / "report.json") and measured["command"] == ""
    assert measured["evaluation"] == read(finished / "report.json")["evaluation"]
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("option", "steps"),
    [("--rlhf.beta", ["ppo", "ppo_ptx"]), ("--rlhf.ptx-coef", ["ppo_ptx"]), ("--sft.lr", STEPS[1:])],
)
def test_what_the_message_says_to_delete_is_enough(
    finished: Path, run: Path, fast_run, refused, option: str, steps: list[str]
) -> None:
    command = fast_run(run, option, "0.01")
    message = refused(command)
    advice = re.search("delete (.*) to train", message)
    assert advice is not None, message
    folders = [Path(name) for name in re.split(", | and ", advice[1])]
    assert folders == [run / step for step in steps] and f"{steps[0]} was trained with" in message
    delete(run, *steps)
    assert main(command) == 0
    old, new = weights(finished), weights(run)
    assert {step for step in STEPS if old[step] != new[step]} == set(steps)


def test_settings_of_a_step_that_begins_may_change(run: Path, fast_run, refused) -> None:
    partial = run / "ppo_ptx.partial"
    os.replace(run / "ppo_ptx", partial)
    (partial / "state.safetensors").touch()
    command = fast_run(run, "--rlhf.ptx-coef", "0.2")
    assert f"delete {partial} to" in refused(command)
    assert (run / "report.json").is_file()  # nothing is touched by a command that is refused
    (partial / "state.safetensors").unlink()
    assert main(command) == 0
    assert count(run / "ppo_ptx" / "metrics.jsonl") == 6
    assert read(run / "config.json")["rlhf"]["ptx_coef"] == 0.2


@pytest.mark.parametrize(
    ("name", "said"), [("prompts.jsonl", "another"), ("corpus.jsonl", "a"), ("tokenizer.json", "no")]
)
def test_other_data_are_refused(
    run: Path, tiny_folder: Path, fast_run, refused, tmp_path: Path, name: str, said: str
) -> None:
    """Also where the run is finished, and nothing would be read again."""
    data = Path(shutil.copytree(tiny_folder, tmp_path / "data"))
    (data / "notes.txt").write_text("not read by any step")
    assert main(fast_run(run, data=data)) == 0
    put(data / name, None if said == "a" else "\n")
    with unchanged(run):
        message = refused(fast_run(run, data=data))
    assert f"base was trained with {said} {data / name}; give the same settings and data" in message
    assert f"delete {run / 'base'}, " in message


@pytest.mark.parametrize(("kept", "who"), [(None, "minirlhf 0.1"), (99, "another version of minirlhf")])
def test_a_run_of_another_version_is_refused(run: Path, fast_run, refused, kept: int | None, who: str) -> None:
    """In one sentence, by every command that reads a run, and nothing of it is touched."""
    settings = read(run / "config.json")
    assert settings.pop("format") == 2 and settings.pop("sha256")
    (run / "config.json").write_text(json.dumps(settings | ({} if kept is None else {"format": kept})))
    evaluate = ["evaluate", "--run", str(run), "--checkpoint", "ppo"]
    with unchanged(run):
        for command in (fast_run(run), evaluate, ["chat", "--run", str(run), "--prompt", "Hi"]):
            assert f"{run}: a run of {who}, which this version can neither continue nor read" in refused(command)


NO_SUMS = [None, "{}", "null", "[]"]
NO_RUN = ["[]", "null", "{}", '{"data": "x", "seed": 0, "base": [], "judge": 1, "parameters": 1}']
DAMAGED = {  # by file: what may stand in its place, and how many commands read it
    "base/model.safetensors": (["half a model"], 3),
    "ppo/model.safetensors": (["half a model"], 3),
    "ppo/checksums.json": (NO_SUMS, 3),
    "reward_model/checksums.json": (NO_SUMS, 2),
    "config.json": (NO_RUN, 3),
    "report.json": (NO_RUN, 1),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged_is_named(run: Path, fast_run, refused, name: str) -> None:
    checkpoint = "base" if name.startswith("base") else "ppo"
    evaluate = ["evaluate", "--run", str(run), "--checkpoint", checkpoint]
    commands = [fast_run(run), evaluate, ["chat", "--run", str(run), "--prompt", "Hi"]]
    contents, readers = DAMAGED[name]
    for content in contents:
        put(run / name, content)
        for command in commands[:readers]:
            assert f"{run / name}: {'missing' if content is None else 'damaged'}" in refused(command)


@pytest.mark.parametrize(
    ("name", "content", "gone"),
    [
        ("ppo/model.safetensors", "half a model", []),
        ("base/checksums.json", None, ["report.json"]),
        ("ppo_ptx.partial/state.safetensors", "half a state", ["ppo_ptx", "report.json"]),
        ("report.json", "[]", []),
    ],
)
def test_what_the_message_says_mends_it(
    finished: Path, run: Path, fast_run, refused, name: str, content: str | None, gone: list[str]
) -> None:
    file = run / name
    delete(run, *gone)
    put(file, content)
    advice = re.search(f"{file}: .*delete ([^ ]+) ", refused(fast_run(run)))
    assert advice is not None and advice[1] in ("it", str(file), str(file.parent))
    delete(run, name if advice[1] == "it" else advice[1])
    assert main(fast_run(run)) == 0 and weights(run) == weights(finished)


def test_damaged_config_and_foreign_folder(fast_run, refused, tmp_path: Path) -> None:
    put(tmp_path / "mine" / "thesis.txt", "precious")
    with unchanged(tmp_path / "mine"):
        assert "not empty" in refused(fast_run(tmp_path / "mine"))
    put(tmp_path / "broken" / "config.json", "{")
    assert "config.json" in refused(fast_run(tmp_path / "broken"))


@pytest.mark.parametrize(
    ("rate", "options"),
    [("1e30", ["--save-seconds", "0"]), ("1e38", ["--base.steps", "1"])],
    ids=["saved", "not saved"],
)
def test_a_learning_rate_that_breaks_the_weights(fast_run, refused, tmp_path: Path, rate: str, options) -> None:
    out = tmp_path / "run"
    state = out / "base.partial" / "state.safetensors"
    message = refused(fast_run(out, "--base.lr", rate, "--base.warmup", "0", *options), trained=True)
    assert message.startswith("minirlhf: error: base: ") and "lower --base.lr" in message
    assert not (out / "base").exists()
    assert state.is_file() == (str(state) in message) == (f"Delete {state.parent} " in message) == (rate == "1e30")
    if state.is_file():
        assert all(value.isfinite().all() for value in load_state(state)[0].values())


class Background:
    """Commands in processes of their own, with so many threads each; what they say goes to a log."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def start(self, command: list[str], threads: int, **settings) -> subprocess.Popen:
        with self.log.open("a") as stream:
            return subprocess.Popen(
                [sys.executable, "-m", "minirlhf.cli", *command],
                stdout=stream,
                stderr=stream,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                **settings,
            )

    def wait_for(self, process: subprocess.Popen, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert process.poll() is None, f"ended too early: {self.log.read_text()[-2000:]}"
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def kill_when(self, condition: Callable[[], bool], command: list[str], threads: int = 1) -> None:
        """Start the command, SIGKILL it as soon as the condition holds."""
        process = self.start(command, threads)
        self.wait_for(process, condition)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL

    def finish(self, command: list[str], threads: int = 1, code: int = 0) -> str:
        """Run the command to its end; returns all that was said since the first."""
        assert self.start(command, threads).wait() == code, self.log.read_text()[-2000:]
        return self.log.read_text()


@pytest.fixture
def background(tmp_path: Path) -> Background:
    return Background(tmp_path / "log")


@pytest.mark.slow
def test_killed_three_times_ends_with_the_same_weights(finished: Path, fast_run, tmp_path: Path, background) -> None:
    out = tmp_path / "run"
    command = fast_run(out, "--save-seconds", "0")
    for step, steps in (("base", 15), ("ppo", 3), ("ppo_ptx", 4)):
        partial = out / f"{step}.partial"
        background.kill_when(lambda file=partial / "metrics.jsonl", n=steps: count(file) >= n, command)
        assert (partial / "state.safetensors").is_file()
        assert not (out / step).exists() and not (out / "report.json").exists()
    background.finish(command)
    assert weights(out) == weights(finished)
    assert not list(out.rglob("*.partial")) and not list(out.rglob("state.safetensors"))
    mine, theirs = (read(folder / "report.json") for folder in (out, finished))
    assert mine["evaluation"] == theirs["evaluation"] and mine["reward_model"] == theirs["reward_model"]
    for step in STEPS:
        steps = [row["step"] for row in rows(out / step / "metrics.jsonl")]
        assert steps == list(range(count(finished / step / "metrics.jsonl")))


@pytest.mark.slow
def test_killed_before_the_page_is_drawn(run: Path, fast_run, background) -> None:
    report, page = run / "report.json", run / "report.html"
    report.unlink()
    background.kill_when(report.is_file, fast_run(run))
    assert not page.exists()
    before = contents(run)
    assert main(fast_run(run)) == 0
    drawn = contents(run)
    assert "</html>" in drawn.pop("report.html")[1].decode()
    before.pop("run.lock", None)  # killed before or after it gave the lock back
    assert drawn == before  # the page alone is new


# What cli.main does, telling when the two steps side by side have ended, and when it would draw the page.
TIMED = """
import sys, time
from contextlib import contextmanager
from minirlhf import cli, report
from minirlhf.pipeline import run
began, beside = time.monotonic(), run.step_beside

@contextmanager
def watched(*settings):
    with beside(*settings):
        yield
    print("joined", time.time())

run.step_beside = watched
report.write_report = lambda run: print("elapsed", time.monotonic() - began)
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_side_by_side_is_the_same_as_one_after_the_other(finished: Path, unfinished: Path, fast_run) -> None:
    command = [sys.executable, "-c", TIMED, *fast_run(unfinished)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr[-2000:]
    joined, elapsed = (float(re.search(f"{name} (.*)", done.stdout)[1]) for name in ("joined", "elapsed"))
    assert weights(unfinished) == weights(finished)
    report = read(unfinished / "report.json")
    seconds = report["seconds"]
    assert report["side_by_side"] == [["ppo", "ppo_ptx"]]
    before = seconds["base"] + seconds["sft"] + seconds["reward_model"]  # of the run it went on from
    counted = seconds["total"] - before
    longer = max(seconds["ppo"], seconds["ppo_ptx"])
    assert longer + seconds["evaluation"] <= counted <= elapsed  # no second counts twice
    # And none is left out, but the end of a process whose step is saved: its folder is touched last when it is whole.
    ending = joined - max((unfinished / step).stat().st_mtime for step in ("ppo", "ppo_ptx"))
    assert counted + ending >= elapsed - 1


@pytest.mark.slow
def test_a_kill_ends_both_and_the_rest_is_trained_as_before(
    finished: Path, unfinished: Path, fast_run, background
) -> None:
    command, file = fast_run(unfinished, "--save-seconds", "0"), unfinished / "ppo.partial" / "metrics.jsonl"
    background.kill_when(lambda: count(file) >= 1, command, threads=2)
    time.sleep(1.0)
    before = count(file)
    time.sleep(1.5)
    assert before == count(file) < 6  # nobody trains on
    background.finish(command, threads=2)
    assert weights(unfinished) == weights(finished)


@pytest.mark.slow
def test_keyboard_interrupt_while_two_train(unfinished: Path, fast_run, background) -> None:
    """Ctrl-C reaches parent and child: one line, no traceback, nobody trains on; and a second run is kept out."""
    command = fast_run(unfinished, "--rlhf.steps", "2000")
    process = background.start(
        command,
        threads=2,
        start_new_session=True,
        # Tests that a shell started with & inherit that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    files = [unfinished / f"{step}.partial" / "metrics.jsonl" for step in ("ppo", "ppo_ptx")]
    background.wait_for(process, lambda: all(map(count, files)))
    os.killpg(process.pid, signal.SIGSTOP)
    said = Background(unfinished.parent / "second").finish(command, threads=2, code=2)
    os.killpg(process.pid, signal.SIGCONT)
    assert f"another minirlhf run is working in {unfinished}" in said
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    said = background.log.read_text()
    assert "Traceback" not in said and "Warning" not in said
    assert said.count("minirlhf: ") == 1 and "stopped; run the same command" in said
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_one_run_at_a_time(finished: Path, fast_run, refused, tmp_path: Path) -> None:
    with unchanged(finished), locked(finished):
        assert f"another minirlhf run is working in {finished}" in refused(fast_run(finished))
    with unchanged(finished):
        (finished / "run.lock").touch()  # left by a killed run
        assert main(fast_run(finished)) == 0
    refused(fast_run(tmp_path / "deep" / "run", data=tmp_path / "no_data"))
    assert not (tmp_path / "deep").exists()


@pytest.mark.slow
def test_a_step_that_fails_beside_another_is_reported(unfinished: Path, fast_run, background) -> None:
    put(unfinished / "ppo.partial" / "state.safetensors", "damaged")
    said = background.finish(fast_run(unfinished), threads=2, code=2)
    assert "damaged training state" in said and "ppo stopped with exit code 2" in said
    assert not (unfinished / "report.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the child in /proc")
def test_a_child_that_is_killed_stops_the_run_at_once(unfinished: Path, fast_run, background) -> None:
    process = background.start(fast_run(unfinished, "--rlhf.steps", "100000"), threads=2)
    files = [unfinished / f"{step}.partial" / "metrics.jsonl" for step in ("ppo", "ppo_ptx")]
    background.wait_for(process, lambda: all(map(count, files)))
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert os.sched_getaffinity(int(child)) == os.sched_getaffinity(0)  # that of the shell, as taskset leaves it
    os.kill(int(child), signal.SIGKILL)
    try:
        assert process.wait(timeout=20) == 2
    finally:
        process.kill()
    said = background.log.read_text()
    assert "the process that trained ppo was ended by SIGKILL" in said and "Traceback" not in said
    assert said.count("minirlhf: error") == 1 and not (unfinished / "report.json").exists()


def test_what_a_run_leaves_half_written_is_its_own_to_remove(finished: Path, run: Path, fast_run) -> None:
    outside = run.parent / "outside"
    outside.write_text("mine")
    (run / "report.json.partial").symlink_to(outside)
    (run / "answers.json.partial").write_text("half")
    delete(run, "report.json")
    assert main(fast_run(run)) == 0
    assert outside.read_text() == "mine" and not list(run.glob("*.partial"))
    delete(run, "ppo", "ppo_ptx")
    (run / "elsewhere").mkdir()
    (run / "ppo_ptx.partial").symlink_to(run / "elsewhere")
    put(run / "ppo.partial" / "chat_template.jinja.old", "what a save that was killed may leave")
    (run / "ppo.partial" / "model.safetensors").symlink_to(outside)
    (run / "ppo.partial" / "metrics.jsonl").write_bytes(b"\xff half a row")
    assert main(fast_run(run)) == 0
    assert weights(run) == weights(finished) and not list((run / "elsewhere").iterdir())
    assert outside.read_text() == "mine" and not (run / "ppo" / "chat_template.jinja.old").exists()


def test_data_are_known_by_what_they_hold(run: Path, finished: Path, fast_run, refused, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(TINY, tmp_path / "moved"))
    delete(run, "ppo_ptx")
    assert main(fast_run(run, data=moved)) == 0
    assert weights(run) == weights(finished)
    (moved / "prompts.jsonl").write_text((moved / "prompts.jsonl").read_text() + '{"prompt": "one more"}\n')
    message = refused(["evaluate", "--run", str(run), "--checkpoint", "sft"])
    assert f"{moved / 'prompts.jsonl'}: has changed since the run" in message
    (moved / "prompts.jsonl").unlink()
    message = refused(["evaluate", "--run", str(run), "--checkpoint", "sft"])
    assert str(moved / "prompts.jsonl") in message


@pytest.mark.parametrize("name", ["config.json", "report.json", "answers.json"])
def test_a_changed_digit_is_found(name: str, run: Path, fast_run, refused) -> None:
    text = (run / name).read_text()
    place = max(i for i, character in enumerate(text[:-80]) if character.isdigit())
    (run / name).write_text(text[:place] + str(9 - int(text[place])) + text[place + 1 :])
    (run / "report.html").unlink()
    assert f"{run / name}: damaged" in refused(fast_run(run))


def test_other_versions_are_said_and_recorded(run: Path, fast_run, capsys: pytest.CaptureFixture) -> None:
    file = run / "sft" / "summary.json"
    summary = read(file)
    summary["made_with"] |= {"torch": "2.0.0", "threads": 64}
    file.write_text(json.dumps(summary))
    sums = read(run / "sft" / "checksums.json") | {"summary.json": hashlib.sha256(file.read_bytes()).hexdigest()}
    (run / "sft" / "checksums.json").write_text(json.dumps(sums))
    delete(run, "ppo_ptx")
    assert main(fast_run(run)) == 0
    assert f"{run / 'sft'}: trained with torch 2.0.0, threads 64; the rest" in capsys.readouterr().err
    made_with = read(run / "report.json")["made_with"]
    assert made_with["sft"]["torch"] == "2.0.0" and made_with["ppo_ptx"]["torch"] != "2.0.0"


def test_a_run_ended_in_its_first_second_goes_on(finished: Path, fast_run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    put_aside = out / "config.json.partial"
    put(put_aside, "{")
    assert main(fast_run(out)) == 0
    assert weights(out) == weights(finished) and not put_aside.exists()


def test_small_world_is_judged_by_gold(fast_run, tmp_path: Path) -> None:
    out, world = tmp_path / "run", tmp_path / "world"
    write_world(world, corpus=200, demonstrations=60, comparisons=30, prompts=60, heldout_comparisons=20)
    quick = ["--rlhf.steps", "1", "--rlhf.batch-size", "8", "--rlhf.max-response-tokens", "6", "--base.steps", "2"]
    quick += ["--evaluation.max-response-tokens", "6", "--evaluation.prompts", "8", "--evaluation.corpus-blocks", "4"]
    assert main(fast_run(out, *quick, data=world)) == 0
    report = read(out / "report.json")
    assert report["judge"] == "gold"
    base, ppo = (report["evaluation"][name] for name in ("base", "ppo"))
    assert base["headroom_closed"] == 0 and base["headroom_closed_interval"] == [0, 0]
    low, high = ppo["headroom_closed_interval"]
    assert low <= ppo["headroom_closed"] <= high  # equal where one step of PPO changed no answer
    low, high = report["reward_model"]["accuracy_interval"]
    assert 0 < low < report["reward_model"]["accuracy"] < high < 1
    assert all(isinstance(report["evaluation"][name]["headroom_closed"], float) for name in POLICIES)
    assert 0.5 < report["reward_model"]["ceiling"] <= 1
    assert report["reward_model"]["pairs_heldout_labelers"] > 0
    assert report["best_mean"] > report["evaluation"]["ppo"]["gold_mean"]
    assert "objective/gold" in rows(out / "ppo" / "metrics.jsonl")[0]
