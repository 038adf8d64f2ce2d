"""What the tests of several processes run in each of them: ``python worker.py FOLDER [--shard] [--gradients]``.

Every trainer takes twenty steps in float64, saved after each, and its model is saved as a step of a run is. What stands
in FOLDER already is not trained again, and what was killed goes on. With --gradients every trainer first takes one step
in float32, and its summed gradients are kept. The sizes are odd: shares differ, micro-batches are not as many
everywhere, and the last minibatch of a PPO step has a row for rank 0 alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from minirlhf import parallel
from minirlhf.checkpoints import save_model
from minirlhf.data import Comparison, Demonstration
from minirlhf.language.dpo import DPOConfig, train_dpo
from minirlhf.language.grpo import GRPOConfig, train_grpo
from minirlhf.language.models import clone, scalar_model_from
from minirlhf.language.pretraining import PretrainingConfig, train_base
from minirlhf.language.reward_model import RewardModelConfig, RewardModelScorer, train_reward_model
from minirlhf.language.rlhf import RLHFConfig, train_rlhf
from minirlhf.language.sft import SFTConfig, train_sft
from minirlhf.language.tokenization import train_tokenizer
from minirlhf.training import Recorder, generator_for

TRAINERS = ("base", "sft", "reward_model", "rlhf", "grpo", "dpo")
TEXTS = [f"The {a} {v} by the {p}." for a in ("otter", "newt") for v in ("naps", "digs") for p in ("barn", "marsh")]
DEMONSTRATIONS = [Demonstration("say" + " so" * (i % 4), text) for i, text in enumerate(TEXTS)]
RANKED = ((2.0, 1.0, 0.0), (1.0, 0.0))
COMPARISONS = [
    Comparison(f"say {i}", (text, text[:9], "No.")[: len(scores)], scores)
    for i, text in enumerate(TEXTS)
    for scores in RANKED[i % 2 : i % 2 + 1]
]
PROMPTS = [row.prompt + " now" * i for i, row in enumerate(DEMONSTRATIONS)]
TOKENIZER = train_tokenizer(TEXTS * 4, vocab_size=320)
BLOCKS = torch.randint(2, len(TOKENIZER), (10, 12), generator=generator_for(0))


def causal(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": len(TOKENIZER), "max_position_embeddings": 128, "initializer_range": 0.3}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**sizes, **special)).to(dtype).eval()


def train(name: str, dtype: torch.dtype, steps: int, recorder: Recorder, said: list[str], batch_size: int = 5):
    model, shared = causal(dtype), {"batch_size": batch_size, "warmup": 2}
    if name == "base":
        return train_base(model, BLOCKS, PretrainingConfig(steps=steps, **shared), recorder=recorder)
    shared |= {"micro_batch_tokens": 60}
    epochs = steps * batch_size / len(TEXTS)
    if name == "sft":
        return train_sft(model, TOKENIZER, DEMONSTRATIONS, SFTConfig(epochs=epochs, **shared), recorder=recorder)
    if name == "reward_model":
        settings = RewardModelConfig(epochs=epochs, **shared)
        options = {"demonstrations": DEMONSTRATIONS, "recorder": recorder}
        return train_reward_model(model, TOKENIZER, COMPARISONS, settings, **options)
    if name == "dpo":
        other = causal(dtype)
        with torch.no_grad():
            other.model.layers[0].mlp.up_proj.weight.mul_(0.5)  # a reference that is not the policy
        settings = DPOConfig(epochs=epochs, sft_coef=0.1, measured_prompts=3, measure_every=6, **shared)
        return train_dpo(model, other, TOKENIZER, COMPARISONS, settings, recorder=recorder)
    if name == "grpo":
        shared |= {"batch_size": 6, "group_size": 3, "minibatch_size": 5, "max_response_tokens": 9}
        settings = GRPOConfig(steps=steps, epochs=2, ptx_coef=0.3, ptx_batch_size=3, **shared)
        reward = RewardModelScorer(scalar_model_from(model, seed=3), TOKENIZER)
        options = {"corpus_blocks": BLOCKS, "recorder": recorder}
        return train_grpo(model, clone(model), reward, TOKENIZER, PROMPTS, settings, **options)
    settings = RLHFConfig(
        steps=steps,
        minibatch_size=2,
        max_response_tokens=9,
        ptx_coef=0.3,
        ptx_batch_size=3,
        ema_decay=0.9,
        target_kl=0.5,
        entropy_coef=0.01,
        **shared,
    )
    scalar = scalar_model_from(model, seed=3)
    reward = RewardModelScorer(clone(scalar), TOKENIZER)

    def monitor(prompts: list[str], responses: list[str], ended: list[bool]) -> dict[str, float]:
        said.extend(responses)
        return {}

    options = {"corpus_blocks": BLOCKS, "recorder": recorder, "monitor": monitor}
    return train_rlhf(model, scalar, clone(model), reward, TOKENIZER, PROMPTS, settings, **options)


def gradients() -> dict[str, torch.Tensor]:
    """The gradients of each trainer's first steps, as they are clipped."""
    kept: dict[str, torch.Tensor] = {}
    clip = torch.nn.utils.clip_grad_norm_

    def keep(parameters: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
        for i, parameter in enumerate(parameters):
            kept[f"{name}/{len(kept)}/{i}"] = parallel.whole(parameter.grad).clone()
        return clip(parameters, max_norm)

    torch.nn.utils.clip_grad_norm_ = keep
    for name in TRAINERS:
        train(name, torch.float32, 1, Recorder(name, progress=False), [])
    torch.nn.utils.clip_grad_norm_ = clip
    return kept


def main(folder: Path, shard: bool, with_gradients: bool) -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    with parallel.joined(torch.device("cpu"), shard=shard):
        said: list[str] = []
        few: list[str] = []
        if with_gradients:
            kept = gradients()
            train("rlhf", torch.float32, 2, Recorder("few", progress=False), few, batch_size=1)
        for name in TRAINERS:
            if not (folder / name).is_dir():
                aside = folder / f"{name}.partial"
                recorder = Recorder(name, aside, save_seconds=0, progress=False)
                save_model(folder / name, train(name, torch.float64, 20, recorder, said), TOKENIZER, aside=aside)
        if with_gradients and parallel.rank() == 0:
            save_file(kept, folder / "gradients.safetensors")
            (folder / "said.json").write_text(json.dumps({"said": said, "few": few}), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--shard" in sys.argv, "--gradients" in sys.argv)
