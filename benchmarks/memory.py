"""Peak memory of a PPO step: full fine-tuning in float32 against LoRA, bfloat16 and gradient checkpointing, same code.

    python benchmarks/memory.py             # every kind, in processes of their own; writes results/memory.csv
    python benchmarks/memory.py --kind lora # one of them, in this process

A Llama of 6 layers and width 512 with a vocabulary of 32,000 answers 16 prompts with 40 tokens each; the batch is one
micro-batch. The peak is the kernel's (VmHWM in /proc/self/status, so this needs Linux), set back when the models are
ready; what the process held before it made any model is taken off, and is in the table too.

Every kind is measured twice: as the process comes (step_mib), and with RETURNED in its environment (returned_mib), so
that glibc's malloc gives large blocks back to the system when they are freed; by default it keeps many of them.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from minirlhf.language.adapters import LoraConfig, add_lora, lora_scalar_from
from minirlhf.language.forward import compute_in, recompute_layers
from minirlhf.language.models import half, scalar_model_from, share
from minirlhf.language.rlhf import RLHFConfig, train_rlhf
from minirlhf.memory import Shape, mebibytes, ppo_step
from minirlhf.training import Recorder

RESULTS = Path(__file__).parent / "results" / "memory.csv"
SHAPE = Shape(layers=6, width=512, intermediate=1376, vocabulary=32_000, tied=False)
ROWS, PROMPT, ANSWER, STEPS = 16, 20, 40, 2
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536"}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, bfloat16, checkpointing": {"precision": "bfloat16", "checkpointing": True},
    "LoRA, bfloat16, checkpointing": {"rank": 16, "precision": "bfloat16", "checkpointing": True},
}


def status(name: str) -> int:
    """A figure of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) // 1024


def four_models(rank: int | None = None, precision: str = "float32", checkpointing: bool = False) -> tuple[Any, ...]:
    """Policy, value network, reference and reward model, as `minirlhf run` makes them for step 3."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sft = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=SHAPE.vocabulary,
            hidden_size=SHAPE.width,
            intermediate_size=SHAPE.intermediate,
            num_hidden_layers=SHAPE.layers,
            num_attention_heads=8,
            max_position_embeddings=128,
            tie_word_embeddings=SHAPE.tied,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    ).eval()
    dtype, lora = getattr(torch, precision), LoraConfig(rank=rank)
    if rank is None:
        reward = scalar_model_from(sft, seed=1)
        policy, value = share(sft), share(reward)
        for learner in (policy, value):
            if dtype != torch.float32:
                compute_in(learner, dtype)
        half(sft, dtype)
        half(reward, dtype)
    else:
        sft = add_lora(sft.to(dtype), lora, seed=0, base="body")  # what SFT would have trained
        reward = lora_scalar_from(sft, lora, seed=1, base="body")
        policy, value = share(sft), share(reward)
    models = policy, value, sft.requires_grad_(False), reward.requires_grad_(False)
    if checkpointing:
        for model in models:
            recompute_layers(model)
    return models


def peak(kind: str) -> dict[str, float]:
    """Train two steps and return the peak memory above that of the bare process, in MiB."""
    import peft  # noqa: F401  (its memory belongs to the process, not to a step)
    import tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, SHAPE.vocabulary)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    prompts = [" ".join(f"w{2 + (17 * row + i) % 31_000}" for i in range(PROMPT)) for row in range(ROWS)]
    bare = status("VmRSS")
    policy, value, reference, reward = four_models(**KINDS[kind])

    from minirlhf.language.reward_model import RewardModelScorer

    scorer = RewardModelScorer(reward, tokenizer)
    settings = RLHFConfig(
        steps=STEPS,
        batch_size=ROWS,
        minibatch_size=ROWS,
        max_response_tokens=ANSWER,
        micro_batch_tokens=10**9,
        lr=1e-6,
        value_lr=1e-6,
        warmup=0,
    )
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to what is held now
    began, recorder = time.monotonic(), Recorder("memory", progress=False)
    train_rlhf(policy, value, reference, scorer, tokenizer, prompts, settings, recorder=recorder)
    total, seconds = status("VmHWM"), (time.monotonic() - began) / STEPS
    length = recorder.history[-1]["objective/response_length"]
    expected = ppo_step(SHAPE, rows=ROWS, prompt=PROMPT, answer=ANSWER, **KINDS[kind])
    return {
        "process_mib": bare,
        "step_mib": total - bare,
        "total_mib": total,
        "formula_mib": round(mebibytes(sum(expected.values()))),
        "mean_answer_tokens": round(length, 1),
        "seconds_a_step": round(seconds, 1),
    }


def alone(kind: str, environment: dict[str, str]) -> dict[str, float]:
    """`peak` in a process of its own."""
    command = [sys.executable, __file__, "--kind", kind]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=list(KINDS))
    kind = parser.parse_args().kind
    if kind is not None:
        print(json.dumps(peak(kind)))
        return
    rows = []
    for name in KINDS:
        plain, returned = (alone(name, environment) for environment in ({}, RETURNED))
        both = {"returned_mib": returned["step_mib"], "returned_seconds_a_step": returned["seconds_a_step"]}
        rows.append({"kind": name} | plain | both)
        print(rows[-1], flush=True)
    for row in rows:
        row["of_full"] = round(row["step_mib"] / rows[0]["step_mib"], 3)
        row["returned_of_full"] = round(row["returned_mib"] / rows[0]["returned_mib"], 3)
    with RESULTS.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"LoRA, bfloat16 and checkpointing: {rows[-1]['of_full']:.2f} of full fine-tuning in float32")


if __name__ == "__main__":
    main()
