"""Before step 1: a base model that continues text, trained to predict the next token of a corpus.

If a pretrained model is given, this step is skipped and that model is used instead.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor

from minirlhf import parallel
from minirlhf.language.models import response_logprobs
from minirlhf.settings import Count, CountOrZero, NotNegative, Positive, Settings, whole
from minirlhf.training import (
    Recorder,
    adamw,
    epoch_batch,
    learning_rate_factor,
    set_learning_rate,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class PretrainingConfig(Settings, option="base"):
    """Training of the base model."""

    steps: Count = 1000
    """Optimizer steps."""
    batch_size: Count = 16
    """Blocks per step."""
    block_length: Annotated[int, whole(2)] = 64  # the first token of a block predicts, the last is predicted
    """Tokens per block."""
    lr: NotNegative = 4e-3
    """Peak learning rate (cosine decay to a tenth)."""
    warmup: CountOrZero = 20
    """Steps of linear warm-up."""
    weight_decay: NotNegative = 0.05
    """AdamW's weight decay, for matrices only."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""


def blocks_of(documents: Iterable[Sequence[int]], block_length: int, most: int | None = None) -> Tensor:
    """Concatenate documents and cut them into blocks: -> [N, block_length] int64.

    Args:
        documents: token ids, each followed by EOS.
        block_length: tokens per block; an incomplete last block is dropped.
        most: blocks; no more documents are read than they take.

    Raises:
        ValueError: the documents together are shorter than one block.

    Example:
        >>> blocks_of([[5, 1], [6, 7, 1]], block_length=2).tolist()
        [[5, 1], [6, 7]]
    """
    flat = array("i")  # four bytes per token
    for document in documents:
        flat.extend(document)
        if most is not None and len(flat) >= most * block_length:
            break
    count = min(len(flat) // block_length, len(flat) if most is None else most)
    if count == 0:
        raise ValueError(
            f"the corpus has {len(flat)} tokens, fewer than one block of {block_length}; "
            "add text or lower --base.block-length"
        )
    return torch.frombuffer(flat, dtype=torch.int32)[: count * block_length].view(count, block_length).long()


def language_model_loss(model: PreTrainedModel, blocks: Tensor, count: int | None = None) -> Tensor:
    """Mean negative log-likelihood per token of full blocks: [B, T] -> scalar, in nats.

    ``count``: of the blocks in the whole optimizer step, if these are only some of them.
    """
    everything = torch.ones_like(blocks, dtype=torch.bool)
    logprobs = response_logprobs(model, blocks, everything, everything[:, 1:])
    return -logprobs.sum() / ((len(blocks) if count is None else count) * logprobs.shape[1])


def train_base(
    model: PreTrainedModel,
    blocks: Tensor,
    config: PretrainingConfig,
    *,
    seed: int = 0,
    recorder: Recorder | None = None,
) -> PreTrainedModel:
    """Train a causal model on blocks of text, in place.

    Args:
        model: the model to train.
        blocks: [N, T] int64 token ids without padding.
        config: the hyper-parameters.
        seed: of the order of blocks.
        recorder: where progress and metrics go.

    Returns:
        The same model, in eval mode.

    Raises:
        TrainingError: the loss became NaN or infinite.
    """
    recorder = recorder or Recorder("base")
    parallel.shard(model)
    optimizer = adamw(model, config.lr, weight_decay=config.weight_decay)
    recorder.track({"policy": model}, {"policy": optimizer})
    model.eval()  # no dropout: a run depends only on its seed, and resumes bit for bit
    for step in recorder.steps(config.steps):
        rows = epoch_batch(len(blocks), config.batch_size, step, seed, "base")
        optimizer.zero_grad()
        loss = torch.zeros((), device=model.device)
        mine = parallel.my_rows(rows)
        for chosen, weight in parallel.even([mine] if mine else [], rows[:1]):
            part = weight * language_model_loss(model, blocks[chosen].to(model.device), len(rows))
            recorder.check_finite(part, f"blocks {chosen[:4]}...", "lower --base.lr")
            part.backward()
            loss += part.detach()
        lr = config.lr * learning_rate_factor(step, config.steps, config.warmup)
        set_learning_rate(optimizer, lr)
        norm = parallel.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        loss = parallel.sum_over_ranks(loss)
        recorder.log({"base/loss": loss, "base/grad_norm": norm, "base/lr": lr})
    return model.eval()


@torch.no_grad()
def corpus_loss(model: PreTrainedModel, blocks: Tensor, batch_size: int = 64) -> float:
    """Mean negative log-likelihood per token over all blocks, in nats: how well a model still knows plain text."""
    model.eval()
    total, count = 0.0, 0
    for batch in blocks.split(batch_size):
        total += float(language_model_loss(model, batch.to(model.device))) * len(batch)
        count += len(batch)
    return total / count
