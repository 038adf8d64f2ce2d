"""How the compiler lays out GAE's tiles, which the counts of test_budgets.py do not show; no GPU is needed.

The kernel is compiled for Hopper in a process of its own, because the other tests import triton as an interpreter.
"""

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

COMPILE = r"""
import json, sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from minirlhf_kernels.fused.gae import configuration, gae_kernel

TYPES = {"mask": "*u1", "ends": "*u1"}


def compiled(kernel, warps, numbers, **constants):
    signature = {}
    for p in kernel.params:
        number = "fp64" if p.annotation_type else numbers.get(p.name)
        signature[p.name] = "constexpr" if p.name in constants else number or TYPES.get(p.name, "*fp32")
    names = [p.name for p in kernel.params]
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, {})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ttgir"]


def gae(time_first):
    rows, steps, warps = configuration(1024, time_first)
    numbers = {"rows": "i32", "steps": "i32", "stride": "i64"}
    flags = {"LAST": True, "TRUNCATED": False, "MASKED": True, "TIME_FIRST": time_first}
    return compiled(gae_kernel, warps, numbers, **flags, ACC=tl.float32, ROWS=rows, STEPS=steps)


out = {"gae [N, T]": gae(False), "gae [T, N]": gae(True)}
json.dump(out, sys.stdout)
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MINIRLHF_KERNELS")}
    env |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "CUDA_VISIBLE_DEVICES": ""}
    (script := tmp_path_factory.mktemp("script") / "compile.py").write_text(COMPILE)
    result = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def loops(ttgir):
    """The text of every loop."""
    lines, found = ttgir.splitlines(), []
    for i, line in enumerate(lines):
        if "scf.for" in line:
            indent = len(line) - len(line.lstrip())
            stop = next(j for j in range(i + 1, len(lines)) if len(lines[j]) - len(lines[j].lstrip()) <= indent)
            found.append("\n".join(lines[i:stop]))
    return found


@pytest.mark.parametrize(("layout", "order"), [("gae [N, T]", "[1, 0]"), ("gae [T, N]", "[0, 1]")])
def test_gae_s_threads_lie_along_what_is_contiguous_in_memory(compiled, layout, order):
    (body,) = loops(compiled[layout])
    layouts = dict(re.findall(r"(#\w+) = #ttg.blocked<\{.*order = (\[[\d, ]+\])\}>", compiled[layout]))
    of_tiles = re.findall(r"tt\.(?:load|store) .*tensor<\d+x(?!1x)\d+x!tt.ptr<\w+>, (#\w+)>", body)
    assert len(of_tiles) == 8  # rewards, values twice, ends, mask twice, and both results
    assert {layouts[x] for x in of_tiles} == {order}
