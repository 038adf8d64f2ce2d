"""Several processes compute what one computes, write the same files, and end together."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minirlhf.checkpoints import STATE, verify_model

WORKER = Path(__file__).with_name("worker.py")
TRAINERS = ("base", "sft", "reward_model", "rlhf", "grpo", "dpo")
LONGEST = 30  # seconds in which everything has ended after one process was killed
SMALL = ("--base.steps", "6", "--sft.epochs", "0.2", "--rlhf.steps", "2", "--rlhf.batch-size", "5")


STORES = []  # as long as the processes that meet in them


def start(count: int, *command: str) -> list[subprocess.Popen]:
    """The processes that torchrun would start, without its own (which takes as long to import torch as they do)."""
    STORES.append(torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(STORES[-1].port), "WORLD_SIZE": str(count)}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environments = [os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [subprocess.Popen([sys.executable, *command], env=each, **pipes) for each in environments]


def ended(processes: list[subprocess.Popen], timeout: float | None = None) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each; none is left behind."""
    try:
        said = [process.communicate(timeout=timeout) for process in processes]
        return [(process.returncode, *each) for process, each in zip(processes, said, strict=True)]
    finally:
        for process in processes:
            process.kill()


def succeeded(processes: list[subprocess.Popen]) -> None:
    for code, _, errors in ended(processes):
        assert code == 0, errors


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Path]:
    """What `worker.py` wrote with one process, with two, and with two that shard."""
    folder = tmp_path_factory.mktemp("trained")
    ways = {"one": (1,), "two": (2,), "sharded": (2, "--shard")}
    running = [
        start(count, str(WORKER), str(folder / way), "--gradients", *rest) for way, (count, *rest) in ways.items()
    ]
    for processes in running:
        succeeded(processes)
    return {way: folder / way for way in ways}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Of the tensors, each relative to its norm; none is all zeros."""
    assert one and one.keys() == other.keys() and all(bool(a.any()) for a in one.values())
    return max(float((a - other[key]).norm() / a.norm()) for key, a in one.items())


def weights(folder: Path, trainer: str) -> dict[str, torch.Tensor]:
    verify_model(folder / trainer, required=True)
    return load_file(folder / trainer / "model.safetensors")


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize(("way", "of_gradients", "of_weights"), [("two", 1e-5, 1e-8), ("sharded", 1e-4, 1e-7)])
def test_several_processes_compute_what_one_computes(trained, trainer, way, of_gradients, of_weights) -> None:
    """The summed gradients of a step in float32, and the weights after twenty steps in float64."""
    one, other = (load_file(trained[each] / "gradients.safetensors") for each in ("one", way))
    assert one.keys() == other.keys()
    keys = [key for key in one if key.startswith(f"{trainer}/")]
    assert largest_difference({key: one[key] for key in keys}, {key: other[key] for key in keys}) < of_gradients
    assert largest_difference(weights(trained["one"], trainer), weights(trained[way], trainer)) < of_weights


@pytest.mark.parametrize("way", ["two", "sharded"])
def test_samples_metrics_and_files_are_those_of_one_process(trained, way) -> None:
    one, other = (json.loads((trained[each] / "said.json").read_text()) for each in ("one", way))
    assert one == other and len(set(one["said"])) > 20
    assert len(one["few"]) == 2  # batches of one prompt, which leave the second process without any
    for trainer in TRAINERS:
        folders = trained["one"] / trainer, trained[way] / trainer
        files, same = ({file.name for file in folder.iterdir()} for folder in folders)
        assert files == same
        configs = [json.loads((folder / "config.json").read_text()) for folder in folders]
        assert configs[0].keys() == configs[1].keys() and configs[1]["architectures"] == configs[0]["architectures"]
        assert configs[1].get("score_offset", 0.0) == pytest.approx(configs[0].get("score_offset", 0.0), abs=1e-6)
        rows, again = ((folder / "metrics.jsonl").read_text().splitlines() for folder in folders)
        assert len(rows) == 20
        for row, also in zip(map(json.loads, rows), map(json.loads, again), strict=True):
            for key in row:
                if not key.startswith("perf/"):
                    assert also.pop(key) == pytest.approx(row[key], rel=1e-4, abs=1e-6)
            assert all(key.startswith("perf/") for key in also)


def test_one_killed_process_ends_all_and_the_command_goes_on(trained, tmp_path) -> None:
    """Two that shard, then two, then one: the weights are those of one undisturbed process.

    `kill_ranks.py` does this at ten moments.
    """
    for where, killed, options in (("reward_model", 0, ["--shard"]), ("rlhf", 1, [])):
        running = start(2, str(WORKER), str(tmp_path), *options)
        while not (tmp_path / f"{where}.partial" / STATE).is_file():
            assert running[0].poll() is None and running[1].poll() is None
            time.sleep(0.01)
        running[killed].send_signal(signal.SIGKILL)
        began = time.monotonic()
        results = ended(running, timeout=LONGEST)
        assert time.monotonic() - began < LONGEST
        assert results[killed][0] == -signal.SIGKILL and results[1 - killed][0] == 1
        assert "another process of this run ended" in results[1 - killed][2]
        assert not (tmp_path / where).is_dir()
    succeeded(start(1, str(WORKER), str(tmp_path)))
    for trainer in TRAINERS:
        assert largest_difference(weights(trained["one"], trainer), weights(tmp_path, trainer)) < 1e-7


def test_torchrun_runs_the_whole_pipeline(fast_run, tmp_path) -> None:
    """Two processes that shard; then one finds nothing left to do. Everything is printed once."""
    from minirlhf.cli import main

    command = fast_run(tmp_path / "run", *SMALL)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "minirlhf"]
    done = subprocess.run([sys.executable, *torchrun, *command, "--shard"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report: ") == 1 and done.stderr.count("base:   0%") == 1
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["machine"]["processes"] == 2 and not report["side_by_side"]
    assert not list((tmp_path / "run").glob("*.partial"))
    written = (tmp_path / "run" / "report.json").stat().st_mtime_ns
    assert main(command) == 0
    assert (tmp_path / "run" / "report.json").stat().st_mtime_ns == written


def test_an_error_is_said_once(fast_run, tiny_folder, tmp_path) -> None:
    data = shutil.copytree(tiny_folder, tmp_path / "data")
    (data / "prompts.jsonl").write_text('{"prompt": 3}\n')
    results = ended(start(2, "-m", "minirlhf", *fast_run(tmp_path / "run", data=data)), timeout=300)
    said = "".join(errors for _, _, errors in results)
    assert [code for code, _, _ in results] == [2, 2]
    assert said.count("minirlhf: error") == 1 and "prompts.jsonl:1" in said
    assert not (tmp_path / "run").exists()


ONE_FAILS = """
import sys
import torch
from minirlhf import cli, parallel
from minirlhf.errors import UserError

def run(arguments):
    with parallel.joined(torch.device("cpu")):
        if parallel.rank() == 1:
            raise UserError("these rows are odd")
        parallel.barrier()

cli.COMMANDS["run"] = run
sys.exit(cli.main(["run"]))
"""


def test_an_error_of_one_process_is_said_by_it_alone() -> None:
    results = ended(start(2, "-c", ONE_FAILS), timeout=300)
    assert [code for code, _, _ in results] == [2, 2]
    assert results[1][2] == "minirlhf: error: these rows are odd\n" and results[0][2] == ""


def test_sharding_needs_several_processes(fast_run, tmp_path, refused) -> None:
    assert "--shard: needs several processes" in refused(fast_run(tmp_path / "run", "--shard"))


def test_adapters_in_bfloat16_are_trained_as_by_one_process(tmp_path) -> None:
    """LoRA, a body in bfloat16 and layers computed again in backward: gradients, answers and metrics of each step."""
    worker = str(WORKER.with_name("adapters_worker.py"))
    running = {count: start(count, worker, str(tmp_path / str(count))) for count in (1, 2)}
    for processes in running.values():
        succeeded(processes)
    one, two = (load_file(tmp_path / count / "gradients.safetensors") for count in "12")
    assert len(one) == 2 + 2 + 2 * 2 * 2  # SFT, reward model, and two minibatches of two models in each PPO step
    assert largest_difference(one, two) < 0.1  # a wrong or missing share would be of the order of 1
    one, two = (json.loads((tmp_path / count / "said.json").read_text()) for count in "12")
    assert one["said"] == two["said"] and len(set(one["said"])) == 10
    for name, rows in one["logged"].items():
        for row, other in zip(rows, two["logged"][name], strict=True):
            assert other == pytest.approx(row, rel=0.1, abs=0.1), name
