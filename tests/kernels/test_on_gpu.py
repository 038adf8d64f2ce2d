"""The benchmark for a rented GPU, whole, in tiny sizes on any machine: nothing may fail there for the first time."""

import csv
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
pytest.importorskip("triton")

FOLDER = Path(__file__).parents[2] / "kernels" / "benchmarks"
NUMBERS = ("ms_p20", "ms_p50", "ms_p80", "gb_per_s", "share_of_copy", "max_error_vs_float64")


def command(call, out, *options):
    return [sys.executable, str(FOLDER / "on_gpu.py"), call, "--tiny", "--out", str(out), *options]


def environment():
    """One thread, no GPU, and triton not yet told what to be."""
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MINIRLHF_KERNELS")}
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def rows_of(out):
    with open(out / "tiny.csv", newline="") as file:
        return list(csv.DictReader(file))


def run(call, out, *options):
    result = subprocess.run(
        command(call, out, *options), env=environment(), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "PROBLEM" not in result.stdout and "no time left" not in result.stdout
    return result.stdout


def check(rows):
    for row in rows:
        assert None not in row and None not in row.values(), row
        numbers = NUMBERS if row["kernel"] != "minirlhf run" else NUMBERS[:3]
        assert all(float(row[name]) >= 0 for name in numbers), row
        assert float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])


def test_the_first_call_tests_and_measures_ours_with_every_candidate(tmp_path):
    said = run("ours", tmp_path)
    rows = rows_of(tmp_path)
    check(rows)
    assert " passed" in said and (tmp_path / "tests.log").is_file()
    assert {row["provider"].split(",")[0] for row in rows} == {"minirlhf", "library"}
    for kernel, candidates in (("token_logprobs + entropy", 3), ("linear_token_logprobs", 3), ("gae", 5)):
        assert len({row["provider"] for row in rows if row["kernel"] == kernel}) > candidates, kernel
    # The headline comes first, and each mode of it.
    assert rows[0]["kernel"] == "token_logprobs + entropy" and rows[0]["provider"] == "minirlhf"
    shapes = {row["shape"] for row in rows}
    for kind in ("peaked", "half masked", "laid out as [T, N]", "eager calls"):
        assert any(kind in shape for shape in shapes), kind
    for kernel in ("token_logprobs + entropy", "linear_token_logprobs", "ppo_loss"):
        assert {row["mode"] for row in rows if row["kernel"] == kernel} == {"forward", "backward", "full"}


def test_the_second_call_measures_everybody_else(tmp_path):
    run("rivals", tmp_path)
    rows = rows_of(tmp_path)
    check(rows)
    assert {"minirlhf", "pytorch", "torch compile", "lesson 06"} <= {row["provider"] for row in rows}
    assert sum(row["kernel"].endswith("of lesson 06") for row in rows) > 3
    (step,) = (row for row in rows if row["kernel"] == "minirlhf run")
    assert step["mode"] == "a PPO step" and "CPU" in step["gpu"]
    last = [row["provider"] for row in rows[-2:]]
    assert "torch compile" in last
    with open(tmp_path / "adversarial.csv", newline="") as file:
        assert {row["where"] for row in csv.DictReader(file)} == {"interpreter"}

    (tmp_path / "tiny.csv").rename(tmp_path / "gpu.csv")
    readme = Path(shutil.copy(FOLDER.parent / "README.md", tmp_path))
    subprocess.run(
        [sys.executable, str(FOLDER / "report.py"), "--results", str(tmp_path), "--readme", str(readme)], check=True
    )
    text = readme.read_text()
    assert "in Triton's interpreter, whose exp2 and log are exact to the last digit; a GPU's exp2 is off by" in text
    assert "| `minirlhf run`, a step of PPO |" in text and "| token_logprobs + entropy | 2 x 40 | full |" in text
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_what_is_wrong_is_named_and_not_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    from cases import ppo_loss
    from measure import Bench, measure
    from providers import Provider

    case, calls = ppo_loss(40, "cpu"), itertools.count(1)

    def plus(change):
        def call(x):
            loss, *metrics = case.plain(x)
            return [loss + change(x), *metrics]

        return call

    def broken(x):
        raise RuntimeError("no such kernel")

    bench = Bench("tiny", "cpu", tmp_path)
    measure(
        bench,
        case,
        [
            Provider("right", case.plain, ours=True),
            Provider("off by a hundredth", plus(lambda x: 0.01)),
            Provider("NaN in a gradient", plus(lambda x: (0.0 * x["values"]).sum().sqrt())),
            Provider("a third of a gradient", lambda x: case.plain(x | {"values": x["values"].detach()})),
            Provider("other bits", plus(lambda x: 1e-6 * next(calls)), ours=True),
            Provider("broken", broken),
        ],
    )
    assert [row["provider"] for row in rows_of(tmp_path)] == ["right"] * 3
    assert len(bench.table.problems) == 1 and "other bits when called again" in bench.table.problems[0]
    said = capsys.readouterr().out
    for name, why in (
        ("off by a hundredth", "WRONG by 0.01"),
        ("NaN in a gradient", "WRONG by nan"),
        ("a third of a gradient", "RuntimeError"),
        ("broken", "no such kernel"),
    ):
        (line,) = (line for line in said.splitlines() if line.startswith(f"  {name},"))
        assert why in line


def test_whoever_kills_it_keeps_every_row(tmp_path):
    options = ("--only", "token_logprobs")
    with open(tmp_path / "said", "w") as out:
        process = subprocess.Popen(command("ours", tmp_path, *options), env=environment(), stdout=out)
        try:
            until = time.monotonic() + 500
            while time.monotonic() < until and process.poll() is None:
                if (tmp_path / "said").read_text().count(" ms ") >= 3:
                    break
                time.sleep(0.01)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert process.returncode == -signal.SIGKILL, "it was done before it was killed"
    rows = rows_of(tmp_path)
    check(rows)
    printed = [line for line in (tmp_path / "said").read_text().splitlines() if " ms " in line]
    assert len(printed) >= 3 and len(rows) - len(printed) in (0, 1)
    for row, line in zip(rows, printed, strict=False):
        assert row["provider"] in line and row["mode"] in line and row["ms_p50"] in line


def test_it_stops_by_itself_before_its_time_is_over(tmp_path):
    """Exit code 1 would be that of the last resort, which ends a process that hears no signal."""
    began = time.monotonic()
    run("all", tmp_path, "--only", "imports, and nothing else")
    seconds = max(15.0, 4 * (time.monotonic() - began))  # a busy machine takes long to import torch
    options = command("all", tmp_path, "--seconds", str(seconds))
    result = subprocess.run(options, env=environment(), capture_output=True, text=True, timeout=seconds + 30)
    assert result.returncode == 0 and "the time is over: " in result.stdout, result.stdout + result.stderr
    check(rows_of(tmp_path))
