"""How many instructions a kernel takes on a GPU that this machine does not have: compiled for an H100, and counted.

Triton compiles for any GPU, but not in a process where its interpreter is switched on, as it is in the lesson. So the
kernels' text goes to a process of its own. That process counts with tests/kernels/compile_ahead.py, which holds the
package's kernels to their budgets.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["count", "count_own", "package_counts"]

COLUMNS, ROW_STRIDE = 50_257, 50_257
"""GPT-2's vocabulary: a row begins anywhere, and ends inside a block."""


def count(
    root: Path,
    helpers: Sequence[Any],
    kernels: Mapping[str, tuple[Any, Mapping[str, Any]]],
    dtype: str = "bfloat16",
) -> dict[str, dict[str, float]]:
    """What the loop of each kernel takes, by its name: instructions_per_element, barriers, shuffles, load_bits, ...

    Args:
        root: of the repository.
        helpers: `triton.jit` functions that the kernels call.
        kernels: name to (kernel, its constants and num_warps). Kernels take what lesson 06's take: logits, tokens,
            results, columns, row_stride.
        dtype: of the logits.

    Raises:
        RuntimeError: a kernel does not compile; what the compiler said of it.
    """
    texts = dict.fromkeys(_text(function) for function in (*helpers, *(kernel for kernel, _ in kernels.values())))
    calls = [(name, _name(kernel), dict(options)) for name, (kernel, options) in kernels.items()]
    task = json.dumps({"text": "\n\n".join((HEAD, *texts)), "calls": calls, "dtype": dtype})
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(root / "tests" / "kernels"), *filter(None, sys.path)])
    done = subprocess.run([sys.executable, __file__], input=task, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError("it does not compile:\n" + "\n".join(done.stderr.splitlines()[-12:]))
    found: dict[str, dict[str, float]] = json.loads(done.stdout)
    return found


def count_own(root: Path, kernel: Any) -> str:
    """A sentence on a learner's kernel of float32 logits: its instructions per logit, or why it does not compile."""
    try:
        found = count(root, (), {"yours": (kernel, {"BLOCK": 2048, "num_warps": 4})}, dtype="float32")
    except RuntimeError as error:
        return str(error)
    return f"yours: {found['yours']['instructions_per_element']:.1f} instructions per float32 logit;"


def package_counts(root: Path) -> dict[str, float]:
    """Instructions per logit of the package's log-prob kernels on an H100, as its budgets have them (newest Triton)."""
    with (root / "kernels" / "benchmarks" / "budgets.csv").open(newline="", encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if row["target"] == "sm_90"]
    newest = max((row["triton"] for row in rows), key=lambda version: [int(part) for part in version.split(".")])
    found = {}
    for row in rows:
        if row["triton"] == newest and row["call"].startswith("token_logprobs") and "bfloat16, long" in row["call"]:
            way = "backward" if "backward" in row["kernel"] else "forward"
            what = "with the entropy" if "entropy" in row["call"] else "log-probs alone"
            found[f"{way}, {what}"] = float(row["instructions_per_element"])
    return found


HEAD = "import triton\nimport triton.language as tl\nfrom triton import jit\n"


def _name(function: Any) -> str:
    return str(getattr(function, "fn", function).__name__)


def _text(function: Any) -> str:
    text = textwrap.dedent(inspect.getsource(getattr(function, "fn", function)))
    return text if text.startswith("@") else f"@jit\n{text}"


def _count(task: dict[str, Any]) -> dict[str, Any]:
    """In a process without the interpreter: launch every kernel on a GPU that isn't there, compile it, and count."""
    import torch

    counting, fake = importlib.import_module("compile_ahead"), importlib.import_module("fake_driver")
    logits = torch.zeros(2, ROW_STRIDE, dtype=getattr(torch, task["dtype"]))
    tokens, results = torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lesson.py"
        path.write_text(task["text"], encoding="utf-8")
        spec = importlib.util.spec_from_file_location("lesson", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found = {}
        for name, function, options in task["calls"]:
            with fake.FakeDevice() as device:
                getattr(module, function)[(2,)](logits, tokens, results, COLUMNS, ROW_STRIDE, **options)
            found[name] = counting.count(name, device.compiled[0])
    return found


if __name__ == "__main__":
    print(json.dumps(_count(json.load(sys.stdin))))
