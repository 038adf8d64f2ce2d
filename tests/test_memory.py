"""The table of docs/memory.md: a formula, held against the peaks that PyTorch's allocator reports."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from minirlhf import memory
from minirlhf.language import models
from minirlhf.language.generation import sample
from minirlhf.language.reward_model import RewardModelScorer
from minirlhf.language.rlhf import RLHFConfig, train_rlhf
from minirlhf.language.tokenization import encode_prompts
from minirlhf.memory import Shape, ppo_step, table
from minirlhf.training import Recorder, generator_for

pytest.importorskip("peft")

ROOT = Path(__file__).parents[1]
ALONE, NAME = "MINIRLHF_TEST_ALONE", "test_the_formula_is_what_a_step_takes"
ROWS, ANSWER = 16, 24  # two micro-batches of 8: in the second the gradients of the first are there
PROMPT = "Tell me about the otter and the newt in the marsh."


@pytest.fixture(scope="module")
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_memory", ROOT / "benchmarks" / "memory.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def peak(four: Sequence[Any], run: Callable[[], Any]) -> tuple[int, int]:
    """Bytes that the models take before, and the highest sum of what is allocated while something runs."""
    held = {x.data_ptr(): x.nbytes for model in four for x in (*model.parameters(), *model.buffers())}
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    now = highest = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            highest = max(highest, now)
    return sum(held.values()), highest


def measured(benchmark: Any, tokenizer: Any, kind: str, prompt: int) -> int:
    """The peak of a second PPO step in bytes."""
    four = benchmark.four_models(**benchmark.KINDS[kind])
    settings = RLHFConfig(
        steps=1,
        batch_size=ROWS,
        minibatch_size=ROWS,
        epochs=2,  # in the second the moments are there
        max_response_tokens=ANSWER,
        micro_batch_tokens=ROWS // 2 * (prompt + ANSWER),
        lr=1e-6,
        value_lr=1e-6,
        warmup=0,
    )
    scorer, recorder = RewardModelScorer(four[3], tokenizer), Recorder("memory", progress=False)
    learn = functools.partial(train_rlhf, *four[:3], scorer, tokenizer, [PROMPT] * ROWS, settings, recorder=recorder)
    return sum(peak(four, learn))


def sampled(benchmark: Any, tokenizer: Any, kind: str) -> int:
    """The peak of sampling beside the models, half of the answers at a time."""
    four = benchmark.four_models(**benchmark.KINDS[kind])
    prompts = encode_prompts(tokenizer, [PROMPT] * ROWS)
    held = ROWS // 2 * (len(prompts[0]) + ANSWER)
    never = benchmark.SHAPE.vocabulary - 1  # so that all answers take their whole length
    options = {"max_new_tokens": ANSWER, "pad_id": 0, "eos_id": never}
    rows = [generator_for(0, row) for row in range(ROWS)]
    return peak(four, lambda: sample(four[0], prompts, generator=rows, cache_tokens=held, **options))[1]


@pytest.mark.parametrize("kind", ["full", "full, bfloat16, checkpointing", "LoRA, bfloat16, checkpointing"])
def test_the_formula_is_what_a_step_takes(kind: str, benchmark, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    if ALONE not in os.environ:  # what other tests leave in a process counts in its peaks
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", f"{__file__}::{NAME}[{kind}]"]
        done = subprocess.run(command, env={**os.environ, ALONE: "1"}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:]
        return
    shape = Shape(layers=3, width=128, intermediate=352, vocabulary=4000, tied=False)
    monkeypatch.setattr(benchmark, "SHAPE", shape)
    for module in (memory, models):
        monkeypatch.setattr(module, "LOGITS_AT_ONCE", 2**17)
    prompt = len(encode_prompts(tokenizer, [PROMPT])[0])
    expected = ppo_step(shape, rows=ROWS // 2, prompt=prompt, answer=ANSWER, **benchmark.KINDS[kind])
    found = measured(benchmark, tokenizer, kind, prompt)
    print(f"{kind}: formula {sum(expected.values()) / 2**20:.1f} MiB, measured {found / 2**20:.1f} MiB", expected)
    assert sum(expected.values()) == pytest.approx(found, rel=0.15)
    options = {key: value for key, value in benchmark.KINDS[kind].items() if key != "checkpointing"}
    expected = memory.sampling(shape, rows=ROWS // 2, prompt=prompt, answer=ANSWER, **options)
    found = sampled(benchmark, tokenizer, kind)
    print(f"{kind}, sampling: formula {expected}, measured {found} bytes")
    assert expected["cache"] + expected["computed"] == pytest.approx(found, rel=0.15)


def test_both_count_logits_alike() -> None:
    assert memory.LOGITS_AT_ONCE == models.LOGITS_AT_ONCE


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_counted_as_transformers_makes_them(tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = Shape(layers=2, width=64, intermediate=96, vocabulary=50, key_value_width=16, tied=tied)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        assert sum(p.numel() for p in LlamaForCausalLM(config).parameters()) == shape.weights


def test_the_page_holds_the_table() -> None:
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert table() in page
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", table(), flags=re.M))
    assert "(40.0)" in rows["full, float32"], "the four models take 40 bytes a parameter"
