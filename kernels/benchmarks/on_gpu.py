"""Everything that a GPU rented by the minute can tell, in two calls of at most nine minutes each:

    python kernels/benchmarks/on_gpu.py ours      tests on the device; our kernels and their candidate configurations
    python kernels/benchmarks/on_gpu.py rivals    other libraries, lesson 06's kernels, `minirlhf run`, torch.compile

Rows are measured in the order of their worth and written to results/gpu.csv one by one, so whoever stops it keeps what
there is; it stops by itself in time (--seconds). Then `python kernels/benchmarks/report.py` makes the table and the
plot. No network is needed: other libraries and what minirlhf needs can be carried along as wheels (--wheels FOLDER).

Without a GPU it times the definitions, which is what runs there. --tiny proves this script anywhere: small shapes, and
the kernels in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.metadata
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

BEGAN = time.monotonic()

import torch  # noqa: E402 (importing it takes seconds, and they count)

if TYPE_CHECKING:
    from measure import Bench

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
CUDA = torch.cuda.is_available()
INTERPRETER = ("TRITON_INTERPRET", "MINIRLHF_KERNELS")


@dataclass(frozen=True)
class Work:
    name: str
    seconds: float
    """What it may take on a GPU: with less time left it is left out."""
    do: Callable[[], None]


def passed() -> float:
    return time.monotonic() - BEGAN


class Stopped(BaseException):
    """The time is over, or somebody said so. No library takes it for an error of its own."""


def stop(number: int, frame: FrameType | None) -> None:
    raise Stopped("the time is over" if number == signal.SIGALRM else "it was told to stop")


# ---------------------------------------------------------------- without a network


def make_importable(wheels: Path | None) -> None:
    """This checkout and the wheels, for this process and its children; entry points need the package's metadata."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-index", "--no-deps"]
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "notebooks")]
    if wheels is not None:
        site = tempfile.mkdtemp(prefix="wheels-")
        files = sorted(map(str, wheels.glob("*.whl")))
        if not files or subprocess.run([*pip, "--target", site, *files]).returncode != 0:
            raise SystemExit(f"--wheels {wheels}: nothing could be installed from {len(files)} wheels")
        paths.insert(0, site)
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        importlib.metadata.version("minirlhf")
    except importlib.metadata.PackageNotFoundError:
        if subprocess.run([*pip, "--no-build-isolation", "-e", str(ROOT)]).returncode != 0:
            print("  could not install minirlhf itself: `minirlhf run` won't find the small world", flush=True)


# ---------------------------------------------------------------- work that runs in a process of its own


def run_for(seconds: float, command: list[str], log: Path) -> int | None:
    """Run a command for so long at most; its exit code, or None where the time was up."""
    env = {k: v for k, v in os.environ.items() if k not in INTERPRETER} | {"PYTHONUNBUFFERED": "1"}
    with open(log, "w") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its workers too
                process.wait()


def last_line(log: Path) -> str:
    return (log.read_text().strip().splitlines() or ["it said nothing"])[-1][:160]


def run_tests(bench: Bench) -> None:
    """`pytest tests/kernels` on this device: what only a GPU can show first (the same bits, CUDA graphs, no syncs)."""
    tests = ["tests/kernels/test_gpu.py", "tests/kernels/test_doctests.py" if bench.tiny else "tests/kernels"]
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-m", "not slow", "-p", "no:cacheprovider", *tests]
    if importlib.util.find_spec("xdist") and not bench.tiny:
        command += ["-n", "4", "--dist", "loadfile"]
    log = bench.out / "tests.log"
    code = run_for(180, command, log)
    print(f"  {last_line(log)}", flush=True)
    if code != 0:
        why = "180 seconds were not enough" if code is None else f"exit code {code}"
        bench.table.problem(f"tests: {why}; {log.name} has all of it")


def run_pipeline(bench: Bench, device: str, seconds: float) -> None:
    """`minirlhf run` for so many seconds: what a step of PPO takes at the default sizes, after a short training."""
    folder, answers = Path(tempfile.mkdtemp(prefix="run-")) / "run", 8 if bench.tiny else 128
    options = f"--base.steps 100 --sft.epochs 0.2 --reward-model.epochs 0.1 --rlhf.batch-size {answers}"
    if bench.tiny:
        options = f"--preset fast --base.steps 2 --rlhf.steps 2 --rlhf.batch-size {answers} --rlhf.minibatch-size 8"
        options += f" --evaluation.prompts 2 --data {ROOT / 'tests/data/tiny_folder'}"
    command = [sys.executable, "-m", "minirlhf", "run", "--device", device, "--out", str(folder), "--no-side-by-side"]
    log = bench.out / f"run_{device}.log"
    code = run_for(seconds, [*command, *options.split()], log)
    files = [path for path in (folder / "ppo/metrics.jsonl", folder / "ppo.partial/metrics.jsonl") if path.is_file()]
    lines = [line for path in files for line in path.read_text().splitlines() if line.endswith("}")]
    took = [1e3 * json.loads(line)["perf/seconds"] for line in lines]
    if took:  # the first step compiles
        shape = f"{answers} answers"
        bench.table.add("minirlhf run", "float32", shape, "minirlhf", "a PPO step", took[1:] or took, device)
    if code not in (0, None) or not took:
        bench.table.problem(f"minirlhf run on {device}: {len(took)} steps of PPO; {log.name}: {last_line(log)}")


# ---------------------------------------------------------------- the two calls


def first_call(bench: Bench) -> Iterator[Work]:
    """Is it right on this device, and how fast is ours?"""
    from cases import all_cases
    from measure import measure

    if CUDA or bench.tiny:
        yield Work("tests", 60, lambda: run_tests(bench))
    for case in all_cases(bench.scale, bench.device):
        yield Work(case.title, 20, lambda case=case: measure(bench, case, case.with_candidates()))


def second_call(bench: Bench) -> Iterator[Work]:
    """Is anybody faster? What would be missed least comes last."""
    import adversarial
    from cases import all_cases
    from lesson import lesson_cases
    from measure import measure
    from providers import has_triton

    cases = all_cases(bench.scale, bench.device)
    for case in [*cases, *(lesson_cases(bench.scale, bench.device) if has_triton() else [])]:
        yield Work(case.title, 30, lambda case=case: measure(bench, case, case.with_peers()))
    yield Work(
        "adversarial rows", 40, lambda: adversarial.main(bench.out / "adversarial.csv", 2 if bench.tiny else None)
    )
    if CUDA or bench.tiny:
        for device, seconds in (("cuda", 90), ("cpu", 45)) if CUDA else (("cpu", 300),):
            yield Work(f"minirlhf run on {device}", seconds + 5, lambda d=device, s=seconds: run_pipeline(bench, d, s))
    backend = "aot_eager" if bench.tiny else "inductor"
    for case in [case for case in cases if case.compiles]:
        yield Work(f"{case.title}, compiled", 45, lambda c=case: measure(bench, c, c.with_compiled(backend)))


CALLS: dict[str, tuple[Callable[[Bench], Iterator[Work]], ...]] = {
    "ours": (first_call,),
    "rivals": (second_call,),
    "all": (first_call, second_call),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("call", choices=CALLS)
    parser.add_argument("--seconds", type=float, help="stop well before; by default 540 for one call, no limit for all")
    parser.add_argument("--out", type=Path, help="folder of the CSV and the logs; by default results, beside this file")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install, without a network")
    parser.add_argument("--only", default="", help="what has this in its name: gae, tests, compiled, adversarial ...")
    parser.add_argument(
        "--tiny", action="store_true", help="small shapes, to prove this script; without a GPU in the interpreter"
    )
    args = parser.parse_args()
    seconds = args.seconds or (math.inf if args.call == "all" else 540.0)
    margin = min(20.0, seconds / 5)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGALRM, stop)
    if seconds < math.inf:
        signal.setitimer(signal.ITIMER_REAL, max(0.1, seconds - margin - passed()))
        # The last resort, for where no signal is heard.
        faulthandler.dump_traceback_later(max(0.2, seconds - margin / 4 - passed()), exit=True)
    try:
        return work_through(args, seconds - margin)
    except Stopped as why:
        faulthandler.cancel_dump_traceback_later()
        print(f"{why}: stopped after {passed():.0f} s", flush=True)
        return 0


def work_through(args: argparse.Namespace, seconds: float) -> int:
    if args.tiny and not CUDA and importlib.util.find_spec("triton"):
        os.environ |= {"TRITON_INTERPRET": "1", "MINIRLHF_KERNELS": "triton"}
    make_importable(args.wheels)
    import torch._functorch.config as functorch
    from measure import Bench
    from results import machine

    warnings.filterwarnings("ignore", module="triton.runtime.interpreter")  # numpy warns of what isn't chosen
    functorch.donated_buffer = False  # backward is timed alone, over one kept graph
    if CUDA:
        torch.cuda.set_stream(torch.cuda.Stream())  # the default stream can't be captured
    device = "cuda" if CUDA else "cpu"
    out = args.out or (ROOT / "build" / "on_gpu_tiny" if args.tiny else RESULTS)
    bench = Bench("tiny" if args.tiny else "gpu" if CUDA else "cpu", device, out)
    print(f"{machine(device)}, torch {torch.__version__}", flush=True)
    try:
        for work in (work for call in CALLS[args.call] for work in call(bench) if args.only in work.name):
            if not args.tiny and passed() + work.seconds > seconds:
                print(f"no time left for {work.name}", flush=True)
                continue
            print(f"{work.name}   ({passed():.0f} s)", flush=True)
            try:
                work.do()
            except Exception as error:  # the next one may work; this one is named again at the end
                bench.table.problem(f"{work.name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            if CUDA:
                torch.cuda.empty_cache()
    finally:
        print(f"{bench.table.rows} rows in {passed():.0f} s, {bench.table.file.name}", flush=True)
        for problem in bench.table.problems:
            print(f"  PROBLEM: {problem}", flush=True)
    return 1 if bench.table.problems else 0


if __name__ == "__main__":
    sys.exit(main())
