"""Step 1: supervised fine-tuning on demonstrations (Ouyang et al. 2022, section 3.5).

The loss counts the completion's tokens and its EOS, never the prompt's. InstructGPT trains for 16 epochs with cosine
decay and finds that the loss overfits after one while the reward model's scores still rise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from minirlhf import parallel
from minirlhf.data import Demonstration
from minirlhf.language.models import pad_answers, response_logprobs
from minirlhf.language.tokenization import encode_prompts, encode_responses, in_chunks
from minirlhf.losses import sft_loss
from minirlhf.settings import Count, CountOrZero, NotNegative, Positive, Settings
from minirlhf.training import (
    Recorder,
    adamw,
    learning_rate_factor,
    length_grouped_batch,
    micro_batches,
    set_learning_rate,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class SFTConfig(Settings, option="sft"):
    """Supervised fine-tuning."""

    epochs: Positive = 1.0
    """Passes over the demonstrations."""
    batch_size: Count = 16
    """Demonstrations per step."""
    lr: NotNegative = 2e-3
    """Peak learning rate (cosine decay to a tenth)."""
    warmup: CountOrZero = 5
    """Steps of linear warm-up."""
    weight_decay: NotNegative = 0.05
    """AdamW's weight decay, for matrices only."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""
    micro_batch_tokens: Count = 4096
    """Padded tokens per forward pass; changes only memory and speed."""


def train_sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    config: SFTConfig,
    *,
    seed: int = 0,
    recorder: Recorder | None = None,
) -> PreTrainedModel:
    """Fine-tune a causal model on demonstrations, in place.

    Args:
        model: the base model.
        tokenizer: its tokenizer, with the template of prompts.
        demonstrations: what to imitate.
        config: the hyper-parameters.
        seed: of the order of demonstrations.
        recorder: where progress and metrics go.

    Returns:
        The same model, in eval mode.

    Raises:
        TrainingError: the loss became NaN or infinite.
    """
    recorder = recorder or Recorder("sft")
    prompts = list(in_chunks(encode_prompts, tokenizer, (row.prompt for row in demonstrations)))
    completions = list(in_chunks(encode_responses, tokenizer, (row.completion for row in demonstrations)))
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    pad_id = tokenizer.pad_token_id

    parallel.shard(model)
    optimizer = adamw(model, config.lr, weight_decay=config.weight_decay)
    recorder.track({"policy": model}, {"policy": optimizer})
    total = max(1, round(config.epochs * len(demonstrations) / config.batch_size))
    model.eval()  # no dropout: a run depends only on its seed, and resumes bit for bit
    for step in recorder.steps(total):
        rows = length_grouped_batch(lengths, config.batch_size, step, total, seed, "sft")
        counted = sum(len(completions[row]) for row in rows)
        optimizer.zero_grad()
        loss = torch.zeros(())
        mine = parallel.my_rows(rows)
        groups = micro_batches([lengths[row] for row in mine], config.micro_batch_tokens)
        for chosen, weight in parallel.even([[mine[i] for i in group] for group in groups], rows[:1]):
            padded = pad_answers(
                [prompts[row] + completions[row] for row in chosen], [len(prompts[row]) for row in chosen], pad_id
            )
            tokens, mask, target_mask = (part.to(model.device) for part in padded)
            logprobs = response_logprobs(model, tokens, mask, target_mask)  # [b, T]
            part = weight * sft_loss(logprobs, target_mask, denominator=counted)
            recorder.check_finite(part, f"demonstrations {[demonstrations[r].where or r for r in chosen[:3]]}")
            part.backward()
            loss += part.detach().cpu()
        lr = config.lr * learning_rate_factor(step, total, config.warmup)
        set_learning_rate(optimizer, lr)
        norm = parallel.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        loss = parallel.sum_over_ranks(loss)
        recorder.log({"sft/loss": loss, "sft/grad_norm": norm, "sft/lr": lr, "sft/epoch": step / total * config.epochs})
    return model.eval()
