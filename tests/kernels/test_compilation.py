"""Every kernel compiles for NVIDIA's Ampere and Hopper and AMD's CDNA 3, on any machine with triton."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_every_kernel_compiles_for_real_gpus(tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MINIRLHF_KERNELS")}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("compile_ahead.py")
    result = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    for kernel in ("forward_kernel", "backward_kernel", "fold_kernel", "gae_kernel"):
        for target in ("sm_80", "sm_90", "gfx942"):
            assert f"{kernel} {target} ok" in result.stdout
    hopper = [line for line in result.stdout.splitlines() if " sm_90 ok" in line]
    assert all(", 0 bytes spilled" in line for line in hopper)
    # Rows of logits, 16 of them a thread and round: at the memory's speed an H200 has time for 15 instructions each
    # forward, 30 backward. With at most 40 registers a core holds 48 warps or more, whose loads hide each other's wait.
    assert all(" ALIKE" in line for line in hopper if "OF_LOGPROBS" in line)
    for kernel, types, limit in (
        ("forward_kernel", "bf16/i64/u1/fp32, HAS_MASK WANT_ENTROPY", 16 * 12),
        ("backward_kernel", "bf16/i64/u1/fp32, HAS_MASK OF_LOGPROBS OF_ENTROPY ALIKE", 16 * 18),
    ):
        lines = [line for line in hopper if line.startswith(f"{kernel} sm_90 ok, {types}, ")]
        found = [re.search(r"(\d+) registers.*loops: (\d+)$", line) for line in lines]
        # For short rows and for long ones, and no third: slices of an odd vocabulary take the same machine code.
        assert len(found) == 2 and all(found), lines
        assert not any("threads that wait" in line for line in lines)
        assert max(int(x[1]) for x in found) <= 40
        assert max(int(x[2]) for x in found) <= limit
    # Slabs of the linear op's logits, in float32: the same loop, whatever comes before the slab or after it.
    lines = [
        line for line in hopper if line.startswith("fold_kernel sm_90 ok, fp32/i64, ") and "FIRST LAST" not in line
    ]
    found = [re.search(r"(\d+) registers.*loops: (\d+)$", line) for line in lines]
    assert len(found) == 6 and all(found), lines
    assert max(int(x[1]) for x in found) <= 48
    assert max(int(x[2]) for x in found) <= 16 * 12
