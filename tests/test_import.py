"""Importing is quick, and what is not needed is not loaded."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Sequence

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


def test_modules_load_when_they_are_named() -> None:
    code = "import sys, minirlhf; before = 'torch' in sys.modules; print(before, minirlhf.losses.ppo_loss.__name__)"
    assert python(code) == "False ppo_loss"
    assert "no attribute 'nothing'" in python(
        "import minirlhf\ntry: minirlhf.nothing\nexcept AttributeError as e: print(e)"
    )


def without(modules: Sequence[str], code: str) -> str:
    """The code in a Python that has none of these modules."""
    return f"import sys\nfor name in {list(modules)!r}: sys.modules[name] = None\n{code}"


def test_the_mathematics_and_the_kernels_need_torch_alone() -> None:
    code = """
import torch, minirlhf_kernels
from minirlhf import kl
from minirlhf.losses import ppo_loss, token_logprobs
from minirlhf.returns import gae
logprobs = token_logprobs(torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.long))
print(round(float(logprobs.sum()), 4))
"""
    others = ("numpy", "triton", "transformers", "tokenizers", "safetensors", "tqdm", "tyro", "filelock")
    assert float(python(without([*others, "gymnasium", "matplotlib", "tensorboard"], code))) == -2.7726


@pytest.mark.parametrize(
    ("missing", "code", "line"),
    [
        ("tyro", "from minirlhf.cli import main; sys.exit(main(['run']))", "minirlhf[run]"),
        ("transformers", "from minirlhf.cli import main; sys.exit(main(['run', '--out', 'x']))", "minirlhf[run]"),
    ],
)
def test_a_command_that_lacks_its_extra_says_which_line_installs_it(missing, code, line, tmp_path) -> None:
    command = [sys.executable, "-c", without([missing], code)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr == f'minirlhf: error: {missing} is not installed: pip install "{line}"\n'


def test_works_without_triton() -> None:
    modules = "minirlhf.language.rlhf, minirlhf.language.reward_model, minirlhf.language.sft, minirlhf.control.ppo"
    assert python(without(["triton"], f"import {modules}; print('fine')")) == "fine"
