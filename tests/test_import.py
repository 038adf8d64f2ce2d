"""Importing is quick, and what is not needed is not loaded."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

import pytest

HEAVY = ("transformers", "gymnasium", "matplotlib", "tensorboard")


def python(code: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_costs_little_more_than_torch() -> None:
    code = "import torch, time; t = time.perf_counter(); import minirlhf; print(time.perf_counter() - t)"
    assert statistics.median(float(python(code)) for _ in range(3)) < 0.3


@pytest.mark.parametrize(
    "modules",
    [
        "minirlhf",
        "minirlhf.language.rlhf, minirlhf.language.sft, minirlhf.language.reward_model, minirlhf.language.generation",
        "minirlhf.cli, minirlhf.config, minirlhf.data, minirlhf.losses, minirlhf.kl, minirlhf.returns",
    ],
)
def test_nothing_heavy_is_imported(modules: str) -> None:
    found = python(f"import {modules}, sys; print(*[name for name in {HEAVY} if name in sys.modules])")
    assert found == ""


def test_works_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None  # any import of it now raises ImportError
import torch
import minirlhf.language.rlhf, minirlhf.language.reward_model, minirlhf.language.sft, minirlhf.language.evaluation
from minirlhf.losses import ppo_loss, token_logprobs
from minirlhf.returns import gae
logprobs = token_logprobs(torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.long))
print(round(float(logprobs.sum()), 4))
"""
    assert float(python(code)) == pytest.approx(-2.7726, abs=1e-4)
