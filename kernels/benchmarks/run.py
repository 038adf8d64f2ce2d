"""Measure every kernel against its rivals: `python kernels/benchmarks/run.py`. One process, one CSV a machine.

Providers take turns, and whoever went first goes last in the next round. A provider whose values or gradients are wrong
is reported and not timed. On a GPU the times are device times over buffers that exceed three times the L2 cache
together; on a CPU the calls take the reference, which is what a CPU user runs, on one thread and on all of them, and
the rows say so.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import adversarial
import report
import torch
import torch._functorch.config as functorch
import torch._inductor.config as inductor
from cases import Call, Case, Inputs, all_cases

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "kernel", "provider", "mode", "dtype", "shape", "ms_p20", "ms_p50", "ms_p80", "gb_per_s", "share_of_copy",
    "peak_mib", "max_error_vs_float64", "gpu", "torch", "triton", "date",
)  # fmt: skip
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
Timed = Callable[[], object]


def machine(device: str) -> str:
    """The GPU's or the CPU's model, and nothing that names a person's machine."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    threads = torch.get_num_threads()
    return f"CPU {model}, {threads} thread{'s' * (threads > 1)} (reference path)"


def triton_version() -> str:
    try:
        import triton

        return triton.__version__
    except ImportError:
        return "none"


def gradients(call: Call, x: Inputs, learns: tuple[str, ...]) -> list[torch.Tensor]:
    out = [y for y in call(x) if y.requires_grad]
    ups = [torch.ones_like(y) for y in out]
    return list(torch.autograd.grad(out, [x[name] for name in learns], ups)) if learns else []


def error_of(case: Case, call: Call, x: Inputs, truth: list[torch.Tensor]) -> float:
    got = [*call(x), *gradients(call, x, case.learns)]
    if [a.shape for a in got] != [b.shape for b in truth]:
        return float("nan")  # it computes something else (no entropy): its own tests vouch for it
    worst = 0.0
    for a, b in zip(got, truth, strict=True):
        worst = max(worst, ((a.double() - b).abs() / b.abs().clamp(min=1.0)).max().item())
    return worst


def truth_of(case: Case, x: Inputs) -> list[torch.Tensor]:
    """PyTorch's own definition in float64."""
    wide = {k: v.detach().double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in x.items()}
    for name in case.learns:
        wide[name].requires_grad_()
    call = case.calls.get("pytorch") or case.calls["python loop"]
    if case.kernel.endswith("entropy") or case.kernel == "token_logprobs" or case.kernel.startswith("linear"):
        call = _wide_logprobs
    return [y.detach() for y in (*call(wide), *gradients(call, wide, case.learns))]


def _wide_logprobs(x: Inputs) -> list[torch.Tensor]:
    log_p = (x["hidden"] @ x["weight"].t() if "hidden" in x else x["logits"]).log_softmax(-1)
    out = [log_p.gather(-1, x["tokens"].unsqueeze(-1)).squeeze(-1)]
    return [*out, -(log_p.exp() * log_p).sum(-1)] if x.get("entropy") else out


def fewer_rows(x: Inputs, rows: int = 64) -> Inputs:
    """A slice on which float64 is affordable. Names of per-row tensors; a head's weight stays whole."""
    if "hidden" in x or "logits" in x:
        x = {k: v.detach()[:rows] if torch.is_tensor(v) and k != "weight" else v for k, v in x.items()}
        return {k: v.detach().requires_grad_() if k in ("hidden", "weight", "logits") else v for k, v in x.items()}
    return x


def prepared(case: Case, call: Call, mode: str, x: Inputs) -> Timed:
    if mode == "forward":

        def forward() -> object:
            with torch.no_grad():
                return call(x)

        return forward
    if mode == "full":
        return lambda: gradients(call, x, case.learns)
    out = [y for y in call(x) if y.requires_grad]
    ups, inputs = [torch.ones_like(y) for y in out], [x[name] for name in case.learns]
    return lambda: torch.autograd.grad(out, inputs, ups, retain_graph=True)


def time_cpu(run: Timed, budget: float = 0.02) -> list[float]:
    """Milliseconds of the calls of one turn. Turns are short: a slow moment of the machine then meets all providers."""
    times: list[float] = []
    until = time.perf_counter() + budget
    while not times or time.perf_counter() < until:
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def time_cuda(runs: list[Timed]) -> list[float]:
    """Milliseconds of one call, from a replayed graph of one call on each buffer where the calls can be captured."""
    if len(runs) == 1:
        import triton

        return triton.testing.do_bench(runs[0], warmup=10, rep=60, return_mode="all")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for run in runs[:2]:
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for run in runs:
            run()
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / len(runs))
    return times


def copy_speed(device: str, size: float) -> float:
    """GB/s (read + write) of a copy that moves `size` bytes: what a perfect kernel of this size could reach."""
    n = max(1 << 12, int(size / 2) // 4)
    a, b = (torch.empty(n, device=device) for _ in range(2))
    times = time_cuda([lambda: b.copy_(a)]) if device == "cuda" else time_cpu(lambda: b.copy_(a), 0.15)
    return 8 * n / statistics.median(times) / 1e6


def measure(case: Case, rounds: int, skip_compile: bool) -> list[dict[str, object]]:
    cuda = case.device == "cuda"
    calls = {name: call for name, call in case.calls.items() if not (skip_compile and name == "torch compile")}
    x = case.make()
    errors: dict[str, float] = {}
    part = fewer_rows(x)
    truth = truth_of(case, part)
    for name, call in list(calls.items()):
        try:
            errors[name] = error_of(case, call, part, truth)
        except Exception as error:
            print(f"  {name} fails: {type(error).__name__}: {str(error)[:120]}")
            del calls[name]
            continue
        if errors[name] > TOLERANCE[case.dtype]:
            print(f"  {name} is WRONG by {errors[name]:.2g} and not timed")
            del calls[name]
    rows: list[dict[str, object]] = []
    for mode in ("forward", "backward", "full") if case.learns else ("forward",):
        size = case.bytes_of[mode]
        copies = 1
        if cuda and case.small:
            copies = 2 + int(3 * torch.cuda.get_device_properties(0).L2_cache_size / size)
        buffers = [x, *(case.make() for _ in range(copies - 1))]
        runs: dict[str, list[Timed]] = {}
        peaks: dict[str, float | str] = {}
        for name, call in calls.items():
            runs[name] = [prepared(case, call, mode, y) for y in buffers]
            for run in runs[name][:1] * 3:  # compile and warm up
                run()
            peaks[name] = ""
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
                runs[name][0]()
                peaks[name] = round((torch.cuda.max_memory_allocated() - held) / 2**20, 1)
        speed = copy_speed(case.device, size)
        times: dict[str, list[float]] = {name: [] for name in calls}
        order = list(calls)
        for _ in range(rounds):
            for name in order:
                try:
                    times[name] += time_cuda(runs[name]) if cuda else time_cpu(runs[name][0])
                except RuntimeError:  # a peer that syncs cannot be captured
                    times[name] += time_cuda(runs[name][:1])
            order.reverse()
        for name in calls:
            p20, p50, p80 = (statistics.quantiles(times[name], n=10)[i] for i in (1, 4, 7))
            rate = size / p50 / 1e6
            rows.append(
                dict(
                    zip(
                        COLUMNS,
                        (
                            case.kernel, name, mode, str(case.dtype).removeprefix("torch."), case.shape,
                            f"{p20:.4g}", f"{p50:.4g}", f"{p80:.4g}", f"{rate:.4g}", f"{rate / speed:.3g}",
                            peaks[name], f"{errors[name]:.2g}", machine(case.device), torch.__version__.split("+")[0],
                            triton_version(), datetime.date.today().isoformat(),
                        ),
                        strict=True,
                    )
                )
            )  # fmt: skip
            print(f"  {mode:8} {name:20} {p50:10.4f} ms   {rate:8.1f} GB/s   {100 * rate / speed:5.1f} % of copy")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a part of a kernel's name, or 'adversarial'")
    parser.add_argument("--rounds", type=int, help="turns of each provider; by default 4 on a GPU and 32 on a CPU")
    parser.add_argument("--skip-compile", action="store_true", help="leave torch.compile out: it takes a while")
    parser.add_argument("--report", action="store_true", help="only write the plot and the README's tables")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    functorch.donated_buffer = False  # backward is timed alone, over one kept graph
    inductor.fx_graph_cache = False  # what was compiled for other threads would be found there
    RESULTS.mkdir(exist_ok=True)
    if not args.report:
        rows = []
        every = torch.get_num_threads()
        for threads in (every,) if device == "cuda" else sorted({1, every}):
            torch.set_num_threads(threads)
            print(machine(device))
            for make in all_cases(device) if args.only != "adversarial" else ():
                case = make()
                if args.only in case.kernel:
                    print(f"{case.kernel} {case.shape} {str(case.dtype).removeprefix('torch.')}")
                    rows += measure(case, args.rounds or (4 if device == "cuda" else 32), args.skip_compile)
        if rows and not args.only:
            with open(RESULTS / f"{'gpu' if device == 'cuda' else 'cpu'}.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(rows)
        if args.only in ("", "adversarial"):
            adversarial.main(RESULTS / "adversarial.csv")
    report.main(RESULTS)


if __name__ == "__main__":
    main()
