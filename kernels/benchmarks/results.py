"""The results: a CSV that grows by one row at a time, and what a row says of the machine it was measured on."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

COLUMNS = (
    "kernel", "provider", "mode", "dtype", "shape", "ms_p20", "ms_p50", "ms_p80", "gb_per_s", "share_of_copy",
    "peak_mib", "max_error_vs_float64", "gpu", "torch", "triton", "date",
)  # fmt: skip


def machine(device: str) -> str:
    """The GPU's or the CPU's model, and nothing that names a person's machine."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    threads = torch.get_num_threads()
    return f"CPU {model}, {threads} thread{'s' * (threads > 1)}"


def triton_version() -> str:
    try:
        import triton

        return triton.__version__
    except ImportError:
        return "none"


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Table:
    """A CSV that is whole after every row: who is killed keeps what was measured. Later runs are added below."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists() or path.stat().st_size == 0
        self.file = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115 (it stays open)
        self.writer = csv.DictWriter(self.file, COLUMNS)
        self.rows = 0
        self.problems: list[str] = []
        if new:
            self.writer.writeheader()
            self.file.flush()

    def add(
        self, kernel: str, dtype: str, shape: str, provider: str, mode: str, ms: Sequence[float], device: str,
        **more: str,
    ) -> None:  # fmt: skip
        """One row; ms are the milliseconds of single calls."""
        tenths = statistics.quantiles(ms if len(ms) > 1 else [*ms, *ms], n=10)
        p20, p50, p80 = (f"{tenths[i]:.4g}" for i in (1, 4, 7))
        row = {"kernel": kernel, "provider": provider, "mode": mode, "dtype": dtype, "shape": shape}
        row |= {"ms_p20": p20, "ms_p50": p50, "ms_p80": p80, "gpu": machine(device), "triton": triton_version()}
        row |= {"torch": torch.__version__.split("+")[0], "date": datetime.date.today().isoformat()}
        self.writer.writerow(row | more)
        self.file.flush()  # one line in one write
        os.fsync(self.file.fileno())
        self.rows += 1
        share = f"{100 * float(more['share_of_copy']):6.1f} % of copy" if "share_of_copy" in more else ""
        print(f"  {mode:9} {provider:40} {p50:>10} ms  {share}", flush=True)

    def problem(self, what: str) -> None:
        """Something of ours is wrong: said at once, and again at the end."""
        self.problems.append(what)
        print(f"  PROBLEM: {what}", flush=True)
