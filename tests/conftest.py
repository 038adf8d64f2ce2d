"""Tiny models and a tiny tokenizer for every test: one thread, a few thousand weights."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

TINY_FOLDER = Path(__file__).parent / "data" / "tiny_folder"
ARCHITECTURES = ("llama", "gpt2")
KERNELS = os.environ.get("MINIRLHF_KERNELS")


def pytest_collection_modifyitems(items) -> None:
    """Puzzles that ask for a Triton kernel can only be marked where triton is."""
    from minirlhf_course.checks.kernels import KernelExercise, why_not

    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any(isinstance(x, KernelExercise) for x in parameters) and why_not():
            item.add_marker(pytest.mark.skip(reason=why_not()))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _kernels_as_started() -> None:
    """A file that left Triton chosen would send all that follow through its interpreter, a hundred times slower."""
    assert os.environ.get("MINIRLHF_KERNELS") == KERNELS, "an earlier file, or the import of one, set MINIRLHF_KERNELS"


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    return TINY_FOLDER


@pytest.fixture(scope="session")
def tokenizer():
    from minirlhf.language.tokenization import train_tokenizer

    lines = (TINY_FOLDER / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    return train_tokenizer([json.loads(line)["text"] for line in lines], vocab_size=320)


@pytest.fixture(scope="session")
def make_causal(tokenizer) -> Callable:
    """A fresh tiny causal model, in eval mode: ``make_causal("gpt2", seed=1)``."""

    def make(architecture: str = "llama", seed: int = 0, vocab_size: int | None = None, scale: float = 1.0):
        from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

        common = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "tie_word_embeddings": True}
        size = vocab_size or len(tokenizer)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if architecture == "gpt2":
                shape = {"n_positions": 128, "n_embd": 16, "n_layer": 2, "n_head": 2}
                # Dropout stands in the configuration, as in every published GPT-2.
                dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
                model = GPT2LMHeadModel(GPT2Config(vocab_size=size, **shape, **dropout, **common))
            else:
                shape = {"max_position_embeddings": 128, "hidden_size": 16, "intermediate_size": 32}
                shape |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
                model = LlamaForCausalLM(LlamaConfig(vocab_size=size, **shape, **common))
        if scale != 1.0:
            # Sharper weights make positions and padding matter far above rounding.
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() >= 2:
                        parameter.mul_(scale)
        return model.eval()

    return make


@pytest.fixture(params=ARCHITECTURES)
def causal(request, make_causal):
    """A sharp tiny model of each architecture."""
    return make_causal(request.param, seed=3, scale=8.0)


@pytest.fixture(scope="session")
def fast_run(tiny_folder: Path) -> Callable[..., list[str]]:
    """The command line of a fast run on the tiny folder: ``fast_run(out, "--seed", "1")``."""

    def command(out: Path, *options: str, data: Path = tiny_folder) -> list[str]:
        return ["run", "--preset", "fast", "--data", str(data), "--out", str(out), "--device", "cpu", *options]

    return command


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Call a command that must fail, and return its message: one line, and the only one unless something trained.

    Where a run fails as it begins to train, its estimate comes before it.
    """

    def call(command: list[str], trained: bool = False) -> str:
        from minirlhf.cli import main

        capsys.readouterr()
        assert main(command) == 2
        *before, message = capsys.readouterr().err.splitlines()
        assert message.startswith("minirlhf: error: ") and "minirlhf: error" not in "".join(before)
        assert trained or all(line.startswith("estimate: ") for line in before)
        return message

    return call
