"""Rows that break other kernels, each against float64: ours, PyTorch's and, where importable, trl's and Liger's.

Without a GPU the Triton kernels run in Triton's interpreter, in a process of their own: triton decides at import.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

INF = float("inf")
COLUMNS = (
    "row", "provider", "logprob", "entropy", "logprob_truth", "entropy_truth", "logprob_error", "entropy_error",
    "where",
)  # fmt: skip


def rows() -> dict[str, tuple[Tensor, int]]:
    torch.manual_seed(0)
    base = 2 * torch.randn(2500)
    first_block, one = base.clone(), base.clone()
    first_block[:2048], one[17] = -INF, -INF
    alone = torch.full((2500,), -INF)
    alone[1234] = 0.7
    pair = alone.clone()
    pair[7] = -3.3
    exact = torch.randint(-64, 64, (2500,)) / 8
    near = {m: torch.zeros(2500).scatter_(0, torch.tensor([3]), float(m)) for m in (10, 20, 40)}
    return {
        "an ordinary row": (base, 2100),
        "first 2048 logits -inf": (first_block, 2100),
        "one logit -inf": (one, 2100),
        "all but the token -inf": (alone, 1234),
        "all but two -inf": (pair, 1234),
        "+10000 on every logit": (exact + 1e4, 99),
        "-10000 on every logit": (exact - 1e4, 99),
        "token 10 nats ahead": (near[10], 3),
        "token 20 nats ahead": (near[20], 3),
        "token 40 nats ahead": (near[40], 3),
        "another 20 nats ahead": (near[20], 4),
        "vocabulary of one": (torch.tensor([0.3]), 0),
        "vocabulary of two": (torch.tensor([0.3, -0.2]), 1),
    }


def truth(z: Tensor, token: int) -> tuple[float, float]:
    """float64, without cancellation: the token against the others, and every term of the entropy positive."""
    u = z.double() - z.double().max()
    others = u.exp()
    others[token] = 0.0
    log_rest = others.sum().log()
    logprob = -torch.nn.functional.softplus(log_rest - u[token], threshold=1e9)
    leader = u.argmax()
    small = u.exp()
    small[leader] = 0.0
    log_sum = small.sum().log1p()
    entropy = log_sum - torch.where(small > 0, small * u, 0.0).sum() / log_sum.exp()
    return logprob.item(), entropy.item()


def calls() -> dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]]:
    from minirlhf_kernels import fused, reference

    def pytorch(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        log_p = z.log_softmax(-1)
        return log_p.gather(-1, t[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)

    found: dict[str, Callable] = {
        "minirlhf, Triton": lambda z, t: fused.token_logprobs(z, t, return_entropy=True),
        "minirlhf, reference": lambda z, t: reference.token_logprobs(z, t, return_entropy=True),
        "PyTorch log_softmax": pytorch,
    }
    try:
        from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

        found["trl"] = selective_log_softmax_and_entropy
    except ImportError:
        pass  # not installed: not in the table
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy

        found["liger-kernel"] = lambda z, t: (-liger_cross_entropy(z.clone(), t, reduction="none"), None)
    except ImportError:
        pass
    return found


def error(got: float | None, exact: float) -> str:
    if got is None:
        return ""
    if got != got or abs(got) == INF:
        return "not finite"
    return f"{abs(got - exact) / abs(exact):.1e}" if exact != 0 else ("0" if got == 0 else f"{abs(got):.1e} absolute")


def table(count: int | None) -> list[dict[str, str]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else "interpreter"
    out = []
    for name, (z, token) in list(rows().items())[:count]:
        exact = truth(z, token)
        for provider, call in calls().items():
            try:
                both = call(z[None].to(device), torch.tensor([token], device=device))
                got = [None if y is None else y.item() for y in both]
            except Exception as problem:
                print(f"  {provider} fails on {name}: {type(problem).__name__}", file=sys.stderr)
                continue
            shown = ["" if y is None else f"{y:.9g}" for y in (*got, *exact)]
            errors = [error(y, e) for y, e in zip(got, exact, strict=True)]
            out.append(dict(zip(COLUMNS, (name, provider, *shown, *errors, where), strict=True)))
    return out


def main(path: Path, count: int | None = None) -> None:
    """All rows, or the first few, by every provider, into a CSV of their own."""
    env = dict(os.environ)
    if not torch.cuda.is_available():
        env |= {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", __file__, *([str(count)] if count else [])]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"no adversarial table: {(result.stderr.strip().splitlines() or ['no output'])[-1]}")
    print(result.stderr, end="")
    found = json.loads(result.stdout.splitlines()[-1])
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(found)
    print(f"  adversarial rows: {len(found)} results of {len({r['provider'] for r in found})} providers")


if __name__ == "__main__":
    print(json.dumps(table(int(sys.argv[1]) if len(sys.argv) > 1 else None)))
