"""Data a hundred times larger than the small world: time and memory up to the first step of each training.

    python benchmarks/large_data.py                         # both files; a few minutes
    python benchmarks/large_data.py --table comparisons     # one of them
    python benchmarks/large_data.py --rows 20000            # smaller

Makes a data folder in a temporary folder: 2 million rows of corpus (302 MB) or 250,000 comparisons (154 MB), of the
small world's sentences in an order that a seed chooses, and the small world's other tables. Then a process of its own
runs the whole pipeline with a few steps of each training, and prints when each one begins: the seconds since the
process began to load the data, those of all its threads' work (on a busy machine the better figure), and its peak of
memory up to then (VmHWM in /proc/self/status, so this needs Linux).
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SMALL_WORLD = Path(__file__).resolve().parents[1] / "data" / "small_world"
ROWS = {"corpus": 2_000_000, "comparisons": 250_000}
FEW = [
    "--base.steps=2",
    "--rlhf.steps=1",
    "--sft.epochs=0.01",
    "--reward-model.epochs=0.0001",
    "--evaluation.prompts=8",
]
FEW += ["--rlhf.batch-size=4", "--rlhf.minibatch-size=4"]


def rows_of(table: str) -> list[dict[str, Any]]:
    """The small world's rows of a table."""
    with gzip.open(SMALL_WORLD / f"{table}.jsonl.gz", "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def made(table: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of a large table: sentences of the small world in another order; its comparisons with numbered prompts."""
    rows, chance = rows_of(table), random.Random(seed)
    sentences = [f"{part} ." for row in rows for part in row.get("text", "").split(" .") if part.strip()]
    for number in range(count):
        if table == "corpus":
            yield {"text": "".join(chance.choices(sentences, k=4)).strip()}
        else:
            row = rows[number % len(rows)]
            yield row | {"prompt": f"{row['prompt']} {number}"}


def write(folder: Path, table: str, count: int, seed: int) -> Path:
    """A data folder with one large table; returns that file."""
    shutil.copytree(SMALL_WORLD, folder)
    (folder / f"{table}.jsonl.gz").unlink()
    for name in ("world.json", "tokenizer.json"):  # numbered prompts are not the world's; the tokenizer is trained
        (folder / name).unlink()
    file = folder / f"{table}.jsonl"
    with file.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in made(table, count, seed))
    return file


def run(folder: Path, out: Path) -> None:
    """Run the pipeline in this process, and print where each training begins."""
    from minirlhf.cli import main
    from minirlhf.training import Recorder

    began, used, steps = time.monotonic(), time.process_time(), Recorder.steps

    def measured(self: Recorder, *args: Any) -> Iterator[int]:
        status = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
        seconds = f"{time.monotonic() - began:6.1f} s, {time.process_time() - used:6.1f} s of processors"
        print(f"{self.name:>14}: {seconds}, {peak / 1e6:5.2f} GB", flush=True)
        yield from steps(self, *args)

    Recorder.steps = measured  # type: ignore[method-assign]
    sys.exit(main(["run", "--data", str(folder), "--out", str(out), "--preset", "fast", "--allow-shared-rows", *FEW]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=ROWS, action="append", help="the large table; default: both, in turn")
    parser.add_argument("--rows", type=int, help="rows of it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run(*options.run)
    for table in options.table or ROWS:
        with tempfile.TemporaryDirectory() as made_in:
            folder = Path(made_in) / "data"
            file = write(folder, table, options.rows or ROWS[table], options.seed)
            print(f"{table}: {options.rows or ROWS[table]:,} rows, {file.stat().st_size / 1e6:.0f} MB", flush=True)
            subprocess.run([sys.executable, __file__, "--run", str(folder), str(Path(made_in) / "run")], check=True)
