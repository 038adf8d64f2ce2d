"""Every kernel compiles for NVIDIA's Ampere and Hopper and AMD's CDNA 3, on any machine with triton."""

import os
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
    for kernel in ("forward_kernel", "backward_kernel", "fold_kernel", "gae_kernel", "moments_kernel"):
        for target in ("sm_80", "sm_90", "gfx942"):
            assert f"{kernel} {target} ok" in result.stdout
