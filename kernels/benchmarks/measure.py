"""How a row is measured: the gate, the clock, and the CSV that grows by one row at a time.

The gate comes first: values and gradients against float64, called as they will be timed, with all rows. A provider that
fails it is named and not timed. Ours are held to more: the same bits twice, and no wait for the device.
Then providers take turns, the copy among them, and whoever went first goes last in the next turn. The copy moves the
fewest bytes that the case could, on the same clock as everybody else.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from cases import SCALES, Case, Scale
from providers import Inputs, Provider
from results import Table
from torch import Tensor

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
ROWS_COMPARED = 64
CUDA = torch.cuda.is_available()
Run = Callable[[], object]
Clock = Callable[[], list[float]]


@dataclass(frozen=True)
class Effort:
    turns: int
    milliseconds: float
    """Of one provider's turn."""


EFFORTS = {"gpu": Effort(3, 40), "cpu": Effort(16, 20), "tiny": Effort(1, 0)}


@dataclass
class Bench:
    """One run of the benchmark: what is measured, how long, and where the rows go."""

    name: str
    """gpu, cpu or tiny: of the sizes, the efforts and the CSV."""
    device: str
    out: Path
    table: Table = field(init=False)

    def __post_init__(self) -> None:
        self.table = Table(self.out / f"{self.name}.csv")

    @property
    def tiny(self) -> bool:
        return self.name == "tiny"

    @property
    def scale(self) -> Scale:
        return SCALES[self.name]

    @property
    def effort(self) -> Effort:
        return EFFORTS[self.name]


# ---------------------------------------------------------------- the gate


def few_rows(case: Case, x: Inputs) -> tuple[Tensor | None, Inputs]:
    """Which rows are compared (None: all of them), and the inputs of these in float64; the last row is among them."""
    chosen = None
    if case.per_row:
        count = len(x["tokens"])
        chosen = torch.linspace(0, count - 1, min(count, ROWS_COMPARED), device=x["tokens"].device).long()
    part = {}
    for name, y in x.items():
        if torch.is_tensor(y):
            y = y.detach()[chosen] if name in case.per_row else y.detach()
            y = y.double().requires_grad_(name in case.learns) if y.is_floating_point() else y
        part[name] = y
    return chosen, part


def results_of(case: Case, provider: Provider, x: Inputs, chosen: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of the chosen rows, and gradients for upstream gradients of 1 in these rows and 0 elsewhere."""
    out = [y if chosen is None else y[chosen] for y in provider.call(x)]
    learning = [y.sum() for y in out if y.requires_grad] if case.learns else []
    grads = torch.autograd.grad(learning, [x[name] for name in case.learns]) if learning else ()
    return out, [g[chosen] if name in case.per_row else g for name, g in zip(case.learns, grads, strict=True)]


def error_of(case: Case, out: list[Tensor], grads: list[Tensor], part: Inputs, truth: list[Tensor]) -> float:
    """The largest error of outputs (relative to them, or to 1) and gradients (relative to each one's largest number).

    Who returns fewer outputs than the truth is held to those.
    """
    pairs = [(y, exact, exact.abs().clamp(min=1.0)) for y, exact in zip(out, truth, strict=False)]
    if grads:
        learning = [exact.sum() for y, exact in zip(out, truth, strict=False) if y.requires_grad]
        exact_grads = torch.autograd.grad(learning, [part[name] for name in case.learns], retain_graph=True)
        pairs += [(g, exact, exact.abs().max().clamp(min=1e-30)) for g, exact in zip(grads, exact_grads, strict=True)]
    if any(got.shape != exact.shape for got, exact, _ in pairs):
        return math.nan
    errors = [((got.detach().double() - exact.detach()).abs() / scale).max() for got, exact, scale in pairs]
    return torch.stack(errors).max().item()  # NaN where any is


def waits(run: Run) -> bool:
    """Whether a call makes the host wait for the device. Such a call can't be captured in a CUDA graph either."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as refusal:
        if "synchroniz" not in str(refusal):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def gate(case: Case, provider: Provider, x: Inputs, chosen: Tensor | None, part: Inputs, truth: list[Tensor]) -> float:
    """The error; raises ValueError where the provider must not be timed."""
    with provider.active() as asked:
        out, grads = results_of(case, provider, x, chosen)
        if provider.hook is not None and not asked:
            raise ValueError(f"nobody asked {provider.hook.module}.{provider.hook.function} for a configuration")
        worst = error_of(case, out, grads, part, truth)
        if not worst <= TOLERANCE[case.dtype]:
            raise ValueError(f"WRONG by {worst:.2g}")
        if provider.ours:
            again, grads_again = results_of(case, provider, x, chosen)
            if not all(map(torch.equal, [*out, *grads], [*again, *grads_again])):
                raise ValueError("other bits when called again")
            if CUDA and waits(lambda: results_of(case, provider, x, chosen)):
                raise ValueError("makes the host wait for the device")
    return worst


# ---------------------------------------------------------------- the clock


def prepared(case: Case, provider: Provider, mode: str, x: Inputs) -> Run:
    if mode == "forward":
        x = {k: y.detach() if torch.is_tensor(y) else y for k, y in x.items()}
        return lambda: provider.call(x)
    inputs = [x[name] for name in case.learns]
    ups: list[Tensor] = []  # made once: they aren't part of the work

    def forward() -> list[Tensor]:
        out = [y for y in provider.call(x) if y.requires_grad]
        ups.extend(torch.ones_like(y) for y in out[len(ups) :])
        return out

    if mode == "full":
        return lambda: torch.autograd.grad(forward(), inputs, ups)
    out = forward()
    return lambda: torch.autograd.grad(out, inputs, ups, retain_graph=True)


def clock_of(kind: str, runs: list[Run], milliseconds: float) -> Clock:
    """What gives the milliseconds of single calls, a turn's worth at a time."""
    if not CUDA:
        return lambda: on_the_wall(runs[0], milliseconds, 1)
    if kind == "wall":
        return lambda: on_the_wall(runs[0], milliseconds, 50)
    if kind == "events":
        import triton

        return lambda: triton.testing.do_bench(runs[0], warmup=10, rep=milliseconds, return_mode="all")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for run in runs:
            run()

    def replayed() -> list[float]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(21)]
        marks[0].record()
        for mark in marks[1:]:
            graph.replay()
            mark.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / len(runs) for a, b in itertools.pairwise(marks)]

    return replayed


def on_the_wall(run: Run, milliseconds: float, calls: int) -> list[float]:
    """Calls in a row, as a user makes them; on a GPU the last one is waited for."""
    times: list[float] = []
    until = time.perf_counter() + milliseconds / 1e3
    while not times or time.perf_counter() < until:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        if CUDA:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start) / calls)
    return times


def peak_of(run: Run) -> str:
    if not CUDA:
        return ""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    run()
    return f"{(torch.cuda.max_memory_allocated() - held) / 2**20:.1f}"


def copies_of(size: float, count: int, device: str) -> list[Run]:
    """Copies that each read and write `size` bytes in all: what a perfect kernel of this size could reach."""
    n = max(1 << 10, int(size / 2) // 4)
    pairs = [[torch.empty(n, device=device) for _ in range(2)] for _ in range(count)]
    return [lambda a=a, b=b: b.copy_(a) for a, b in pairs]


# ---------------------------------------------------------------- a case


def buffers_of(case: Case, mode: str) -> int:
    """How many inputs a graph goes through, so that together they exceed three times the L2 cache."""
    if case.clock != "graph" or not CUDA:
        return 1
    return 2 + int(3 * torch.cuda.get_device_properties(0).L2_cache_size / case.bytes_of[mode])


def measure(bench: Bench, case: Case, providers: list[Provider]) -> None:
    """Every mode of a case by every provider that passes the gate: a row each, written as soon as it is known."""
    x = case.make()
    chosen, part = few_rows(case, x)
    truth = case.plain(part)
    errors: dict[Provider, float] = {}
    for provider in providers:
        own = case.make() if provider.writes_over else x
        with refusals_of(bench, provider, case.title):
            errors[provider] = gate(case, provider, own, chosen, part, truth)
    del truth, part
    for mode in ("forward", "backward", "full") if case.learns else ("forward",):
        measure_mode(bench, case, mode, x, errors)


def measure_mode(bench: Bench, case: Case, mode: str, x: Inputs, errors: dict[Provider, float]) -> None:
    size, count, span = case.bytes_of[mode], buffers_of(case, mode), bench.effort.milliseconds
    buffers = [x, *(case.make() for _ in range(count - 1))]
    copy = Provider("copy", lambda _: [])
    clocks = {copy: clock_of(case.clock, copies_of(size, count, bench.device), span)}
    names, peaks = {}, {}
    for provider in errors:
        with refusals_of(bench, provider, f"{case.title} {mode}"), provider.active():
            own = [case.make() for _ in buffers] if provider.writes_over else buffers
            runs = [prepared(case, provider, mode, y) for y in own]
            for run in runs[:3] if CUDA else ():  # compile and warm up
                run()
            peaks[provider] = peak_of(runs[0])
            captured = case.clock != "graph" or not CUDA or not waits(runs[0])
            names[provider] = provider.name + ("" if captured else ", no graph")
            clocks[provider] = clock_of(case.clock if captured else "events", runs, span)
    times: dict[Provider, list[float]] = {provider: [] for provider in clocks}
    order = list(clocks)
    for _ in range(bench.effort.turns):
        for provider in order:
            with refusals_of(bench, provider, f"{case.title} {mode}"), provider.active():
                times[provider] += clocks[provider]()
        order.reverse()
    speed = size / statistics.median(times.pop(copy))
    for provider, ms in ((p, ms) for p, ms in times.items() if ms):
        rate = size / statistics.median(ms)
        bench.table.add(
            case.kernel, case.dtype_name, case.full_shape, names[provider], mode, ms, bench.device,
            gb_per_s=f"{rate / 1e6:.4g}", share_of_copy=f"{rate / speed:.3g}", peak_mib=peaks[provider],
            max_error_vs_float64=f"{errors[provider]:.2g}",
        )  # fmt: skip


@contextlib.contextmanager
def refusals_of(bench: Bench, provider: Provider, where: str) -> Iterator[None]:
    """Whatever a provider raises is said and costs its own rows only; if the provider is ours, it is a problem."""
    try:
        yield
    except Exception as refusal:
        said = f"{provider.name}, {where}: {type(refusal).__name__}: {' '.join(str(refusal).split())[:160]}"
        if provider.ours:
            bench.table.problem(said)
        else:
            print(f"  {said}", flush=True)
