"""How long things take on this machine, beside their floor: a plain copy of the bytes that they have to move.

rows = definitions()                 # the kernels' definitions on one thread of this CPU
rows += results(folder)["NVIDIA ..."]  # what `make bench` has measured on a GPU, in the same form
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from minirlhf_kernels import reference
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["count_operations", "definitions", "microseconds", "on_gpu", "results"]

Row = dict[str, Any]


def microseconds(call: Callable[[], Any], least: float = 0.02) -> float:
    """The fastest of several series of calls, in CPU time: what other programs do here does not count.

    Args:
        call: what to time; called once before the clock starts.
        least: a third of the seconds that the series take together.
    """
    call()
    best, calls, spent = float("inf"), 1, 0.0
    while spent < 3 * least:
        begin = time.process_time()
        for _ in range(calls):
            call()
        took = time.process_time() - begin
        best, spent = min(best, took / calls), spent + took
        if took < least / 20:
            calls *= 2
    return best * 1e6


def definitions() -> list[Row]:
    """The kernels' definitions, forward, on one thread of this CPU; rows as in a results file."""
    cases: list[tuple[str, str, int, Callable[..., Any], tuple[torch.Tensor, ...]]] = []
    for n, words in ((5120, 113), (2560, 512), (256, 8192), (32, 65_536)):
        logits, tokens = torch.randn(n, words), torch.randint(words, (n,))
        shape = f"{n:,} x {words:,}"
        cases.append(("token_logprobs", shape, 4 * n * words, reference.token_logprobs, (logits, tokens)))
    for n in (100, 5_000, 200_000):
        new, old, advantages = 0.1 * torch.randn(3, n)
        mask = torch.ones(n, dtype=torch.bool)
        cases.append(("ppo_loss", f"{n:,} tokens", 21 * n, reference.ppo_loss, (new, old, advantages, mask)))
    for n, steps in ((32_768, 8), (128, 40), (8, 128), (8, 1024)):
        rewards, values = torch.randn(2, n, steps)
        ends = torch.rand(n, steps) < 0.02
        cases.append(("gae", f"{n:,} x {steps:,}", 17 * n * steps, _gae, (rewards, values, ends)))
    rows = []
    for kernel, shape, size, call, batch in cases:
        source = torch.empty(size // 8)
        target = torch.empty_like(source)
        floor = microseconds(lambda a=source, b=target: b.copy_(a))  # type: ignore[misc]  # half read, half written
        took = microseconds(lambda call=call, batch=batch: call(*batch))  # type: ignore[misc]
        names = {"kernel": kernel, "provider": "definition", "mode": "forward", "shape": shape}
        rows.append({**names, "ms_p50": took / 1e3, "share_of_copy": floor / took})
    return rows


def _gae(rewards: torch.Tensor, values: torch.Tensor, ends: torch.Tensor) -> Any:
    return reference.gae(rewards, values, ends, gamma=0.99, lam=0.95)


def results(folder: Path) -> dict[str, list[Row]]:
    """The rows of every results file that holds timings of a GPU, by its name."""
    found: dict[str, list[Row]] = {}
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if "ms_p50" in row and "CPU" not in row["gpu"]:
                    found.setdefault(row["gpu"], []).append(row)
    return found


def on_gpu(own: Any = None) -> dict[str, float]:
    """The log-probs of 4,096 x 50,257 float32 logits on this GPU: by provider, how many times longer than the floor.

    Args:
        own: a learner's kernel, compiled by `triton.jit`, with the arguments of lesson 06's 6.3.
    """
    from minirlhf_kernels import fused
    from triton.testing import do_bench

    logits = torch.randn(4096, 50_257, device="cuda")
    tokens, out = torch.randint(50_257, (4096,), device="cuda"), torch.empty(4096, device="cuda")
    calls: dict[str, Callable[[], Any]] = {
        "PyTorch": lambda: logits.log_softmax(-1).gather(-1, tokens[:, None]),
        "the package's": lambda: fused.token_logprobs(logits, tokens),
    }
    if own is not None:
        options = {"BLOCK": 2048, "num_warps": 4}
        calls["yours"] = lambda: own[(4096,)](logits, tokens, out, 50_257, logits.stride(0), **options)
    copy = do_bench(logits.clone, return_mode="median") / 2  # it reads and writes: two floors
    return {name: do_bench(call, return_mode="median") / copy for name, call in calls.items()}


class _Started(TorchDispatchMode):
    """Counts the operations that start inside, views left out: they move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not operation.is_view
        return operation(*args, **(kwargs or {}))


def count_operations(call: Callable[[], Any]) -> int:
    """How many operations of PyTorch a call starts, views left out: they move nothing.

    Example:
        >>> x = torch.zeros(4)
        >>> count_operations(lambda: (x.view(2, 2) + 1).exp())
        2
    """
    with _Started() as started:
        call()
    return started.count
