"""End a small run at each of its file operations, run the same command again, and compare all weights bit for bit.

    python tests/crash/every_point.py                      every operation, ended as SIGKILL would end it
    python tests/crash/every_point.py --how full           the disk is full from that operation on
    python tests/crash/every_point.py --points 20          20 of them, evenly spaced
    python tests/crash/every_point.py --world              of a run that writes its own data first, as without data/

`operations.c`, loaded with LD_PRELOAD, counts the operations and fails the chosen one. It needs Linux and a C compiler.
Each trial is a fork of one process that has imported everything: a run in a fork takes a second, a new process ten.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
KINDS = {"kill": 1, "full": 2, "short": 3, "torn": 4}
LIBRARY = "MINIRLHF_CRASH_LIBRARY"
SMALL = (
    *("--preset", "fast", "--device", "cpu", "--save-seconds", "0", "--no-side-by-side", "--base.steps", "2"),
    *("--base.batch-size", "4", "--sft.epochs", "0.01", "--rlhf.steps", "2", "--rlhf.batch-size", "4"),
    *("--rlhf.minibatch-size", "4", "--rlhf.max-response-tokens", "6", "--reward-model.epochs", "0.01"),
    *("--evaluation.prompts", "4", "--evaluation.corpus-blocks", "2", "--evaluation.max-response-tokens", "6"),
)


def command(out: Path, data: Path | None) -> list[str]:
    """A run of all five steps in about a second."""
    return ["run", *(["--data", str(data)] if data is not None else []), "--out", str(out), *SMALL]


def in_fork(work: Callable[[], int]) -> tuple[int, str]:
    """Call `work` in a fork: its exit code (137 where it was ended) and what it wrote to the standard error."""
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 2)
            sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), write_through=True)
            code = 70
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    code = work()
            finally:
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        return code, said.read()


def _last(said: str) -> str:
    """The end of an error output, without progress bars."""
    return "\n".join(line for line in said.splitlines() if "it/s]" not in line and "?it" not in line)[-600:]


def bits(out: Path) -> dict[str, str]:
    """What must not depend on where a run was ended: weights, tokenizers, and all measurements but the times."""
    sums = {}
    for file in sorted(out.glob("*/*")):
        if file.name in ("config.json", "model.safetensors", "tokenizer.json"):
            sums[str(file.relative_to(out))] = hashlib.sha256(file.read_bytes()).hexdigest()
    report = json.loads((out / "report.json").read_text())
    kept = {key: report[key] for key in ("evaluation", "reward_model", "parameters", "judge")}
    return sums | {"report.json": json.dumps(kept, sort_keys=True)}


def leftovers(out: Path) -> list[str]:
    """Files that a finished run must not hold."""
    names = [str(path.relative_to(out)) for path in out.rglob("*")]
    return [name for name in names if name.endswith((".partial", ".part", "state.safetensors", ".lock"))]


class Harness:
    """Trials of one command: ended somewhere, then run again, and compared with a run that was never ended."""

    def __init__(self, folder: Path, data: Path | None) -> None:
        self.folder, self.data = folder, data
        self.library = ctypes.CDLL(os.environ[LIBRARY])
        self.library.arm.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int]
        whole = folder / "whole"
        code, said = in_fork(lambda: self._counted(whole))
        if code != 0:
            raise SystemExit(f"the run that nothing disturbs failed: {said}")
        self.operations = int((folder / "count").read_text())
        for module in (folder / "modules").read_text().split():
            with contextlib.suppress(Exception):  # some can't be imported by that name; then each fork does
                importlib.import_module(module)
        self.right = bits(whole)

    def _main(self, out: Path) -> int:
        from minirlhf.cli import main

        return main(command(out, self.data))

    def _counted(self, out: Path) -> int:
        self.library.arm(os.fsencode(out), 0, 0)
        code = self._main(out)
        count = self.library.operations()
        self.library.disarm()
        (self.folder / "count").write_text(str(count))
        (self.folder / "modules").write_text(" ".join(sys.modules))
        return code

    def _disturbed(self, out: Path, point: int, how: int) -> int:
        self.library.arm(os.fsencode(out), point, how)
        return self._main(out)

    def trial(self, point: int, how: str) -> str | None:
        """End the run at one operation and run it again; says what went wrong, if anything did."""
        out = self.folder / f"{how}-{point}"
        code, said = in_fork(lambda: self._disturbed(out, point, KINDS[how]))
        wanted = 137 if how in ("kill", "torn") else 2
        lines = [line for line in said.splitlines() if line.startswith("minirlhf: error: ")]
        problem = None
        if "Traceback" in said or (wanted == 2 and code == 2 and len(lines) != 1):
            problem = f"said {_last(said)!r}"
        elif code != wanted and (wanted == 137 or code != 0):
            problem = f"exit code {code}, not {wanted}: {_last(said)!r}"
        if problem is None:
            code, said = in_fork(lambda: self._main(out))
            if code != 0:
                problem = f"run again, it failed: {_last(said)!r}"
            elif bits(out) != self.right:
                differ = [name for name, value in bits(out).items() if self.right.get(name) != value]
                problem = f"run again, it gave other bits: {differ}"
            elif left := leftovers(out):
                problem = f"left behind: {left}"
        shutil.rmtree(out, ignore_errors=True)
        return problem


def build(folder: Path) -> Path:
    """Compile the library that counts."""
    library = folder / "operations.so"
    source = str(HERE / "operations.c")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", str(library), source, "-ldl"], check=True)
    return library


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--how", choices=list(KINDS), default="kill", help="kill; full or short: the disk; torn: a write"
    )
    parser.add_argument("--points", type=int, help="how many operations to try, evenly spaced; default: all")
    parser.add_argument("--at", type=int, nargs="*", help="these operations only")
    parser.add_argument("--world", action="store_true", help="no data is given, and none is shipped")
    parser.add_argument("--data", type=Path, default=HERE.parent / "data" / "tiny_folder", help="folder of data")
    options = parser.parse_args()
    if LIBRARY not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            library = str(build(Path(folder)))
            environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1"}
            environment = {**os.environ, **environment, LIBRARY: library, "LD_PRELOAD": library}
            return subprocess.run([sys.executable, __file__, *sys.argv[1:]], env=environment, check=False).returncode

    import torch

    import minirlhf.cli
    import minirlhf.pipeline.inputs
    import minirlhf.report  # imported before the forks, which then need not

    torch.set_num_threads(1)
    if options.world:
        minirlhf.pipeline.inputs.DEFAULT_DATA = Path(os.devnull)
    with tempfile.TemporaryDirectory() as folder:
        harness = Harness(Path(folder).resolve(), None if options.world else options.data)
        count = harness.operations
        tried = options.at or sorted(
            {round(1 + i * (count - 1) / (options.points - 1)) for i in range(options.points)}
            if options.points
            else range(1, count + 1)
        )
        began, failed = time.monotonic(), 0
        for number, point in enumerate(tried):
            if number and number % 50 == 0:
                print(f"{number} of {len(tried)} tried, {failed} failed", flush=True)
            problem = harness.trial(point, options.how)
            if problem is not None:
                failed += 1
                print(f"{options.how} at operation {point} of {count}: {problem}", flush=True)
    seconds = time.monotonic() - began
    print(f"{options.how}: {len(tried) - failed} of {len(tried)} tried survived ({count} operations; {seconds:.0f} s)")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
