"""How the compiler lays out GAE's tiles, which the counts of test_budgets.py do not show; no GPU is needed.

The kernel is compiled in a process of its own, because the other tests import triton as an interpreter.
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
TARGETS = {"sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}


def compiled(target, kernel, warps, numbers, **constants):
    signature = {}
    for p in kernel.params:
        number = "fp64" if p.annotation_type else numbers.get(p.name)
        signature[p.name] = "constexpr" if p.name in constants else number or TYPES.get(p.name, "*fp32")
    names = [p.name for p in kernel.params]
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, {})
    return triton.compile(source, target=TARGETS[target], options={"num_warps": warps}).asm["ttgir"]


def gae(target, steps, time_first):
    rows, steps, warps = configuration(steps, time_first)
    numbers = {"rows": "i32", "steps": "i32", "stride": "i64"}
    flags = {"LAST": True, "TRUNCATED": False, "MASKED": True, "TIME_FIRST": time_first}
    return compiled(target, gae_kernel, warps, numbers, **flags, ACC=tl.float32, ROWS=rows, STEPS=steps)


tiles = {"[N, T]": (1024, False), "[N, T], short rows": (16, False), "[T, N]": (1024, True)}
json.dump({target: {name: gae(target, *tile) for name, tile in tiles.items()} for target in TARGETS}, sys.stdout)
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


@pytest.mark.parametrize(("tile", "order"), [("[N, T]", "[1, 0]"), ("[T, N]", "[0, 1]")])
def test_gae_s_threads_lie_along_what_is_contiguous_in_memory(compiled, tile, order):
    (body,) = loops(compiled["sm_90"][tile])
    layouts = dict(re.findall(r"(#\w+) = #ttg.blocked<\{.*order = (\[[\d, ]+\])\}>", compiled["sm_90"][tile]))
    of_tiles = re.findall(r"tt\.(?:load|store) .*tensor<\d+x(?!1x)\d+x!tt.ptr<\w+>, (#\w+)>", body)
    assert len(of_tiles) == 8  # rewards, values twice, ends, mask twice, and both results
    assert {layouts[x] for x in of_tiles} == {order}


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("tile", ["[N, T]", "[N, T], short rows", "[T, N]"])
def test_gae_s_scan_stays_within_a_warp(compiled, target, tile):
    """A row's groups are one warp's, so no scan takes the way across warps: on gfx942 there is a report of wrong
    results on that way (ROCm/triton#947)."""
    ttgir = compiled[target][tile]
    lanes = r"(#\w+) = #ttg.blocked<\{sizePerThread = \[\d+, (\d+)\], threadsPerWarp = \[\d+, (\d+)\],"
    of_a_warp = {name: int(per_thread) * int(threads) for name, per_thread, threads in re.findall(lanes, ttgir)}
    scans = re.findall(r"\}\) : \(tensor<\d+x(\d+)xf32, (#\w+)>, [^)]*\) -> \(tensor", ttgir)
    assert len(scans) == ttgir.count('"tt.scan"(') >= 1
    assert all(of_a_warp[layout] >= int(groups) for groups, layout in scans)
