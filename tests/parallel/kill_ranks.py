"""Kill one rank of two at ten instants, and continue each time with another number of processes.

    .venv/bin/python tests/parallel/kill_ranks.py [--seed 0]        two minutes on two quiet cores

A chain of sessions of `worker.py` (eighty steps: twenty of each trainer) in one folder. Each is killed a random moment
after it has gone on: one rank of two by SIGKILL, sharded or not, and now and then a session of one process in between.
Every process must end within LONGEST seconds, and in the end the weights must be those of one undisturbed process.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("worker.py")
TRAINERS = ("base", "sft", "reward_model", "rlhf")
LONGEST, STEPS = 30.0, 80


def start(count: int, folder: Path, *options: str) -> list[subprocess.Popen]:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(count)}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder), *options],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.DEVNULL,
        )
        for rank in range(count)
    ]
    running[0].store = store  # lives as long as they do
    return running


def steps_done(folder: Path) -> int:
    """The steps whose metrics stand in the folder; a moment in which a folder is renamed counts as none."""
    try:
        return sum(len(file.read_text().splitlines()) for file in folder.glob("*/metrics.jsonl"))
    except FileNotFoundError:
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill one rank of two at ten instants, and continue.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=10, help="of one rank of two")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        one, chain = Path(temporary) / "one", Path(temporary) / "chain"
        assert start(1, one)[0].wait() == 0
        longest, kills = 0.0, 0
        for session in itertools.count():
            count = 1 if session % 3 == 2 else 2
            options = ["--shard"] if count == 2 and rng.random() < 0.5 else []
            target = min(steps_done(chain) + rng.randint(1, max(1, STEPS // (2 * args.kills))), STEPS - 1)
            running = start(count, chain, *options)
            while steps_done(chain) < target:
                assert all(process.poll() is None for process in running), "a session ended by itself"
                time.sleep(0.002)
            time.sleep(rng.random() * 0.1)
            rank = rng.randrange(count)
            running[rank].send_signal(signal.SIGKILL)
            began = time.monotonic()
            for process in running:
                process.wait(timeout=LONGEST)
            longest = max(longest, time.monotonic() - began)
            kills += count == 2
            words = (
                f"{count} processes{', sharded' if options else ''}: rank {rank} killed after {steps_done(chain)} steps"
            )
            print(f"{words}; all ended within {time.monotonic() - began:.2f} s", flush=True)
            if kills == args.kills:
                break
        assert all(process.wait() == 0 for process in start(2, chain))
        worst = 0.0
        for trainer in TRAINERS:
            a, b = (load_file(folder / trainer / "model.safetensors") for folder in (one, chain))
            worst = max(worst, *(float((a[key] - b[key]).norm() / a[key].norm().clamp(min=1e-12)) for key in a))
        print(
            f"{kills} kills of a rank; longest end {longest:.2f} s; largest relative difference of a weight {worst:.2g}"
        )
        assert worst < 1e-7


if __name__ == "__main__":
    main()
