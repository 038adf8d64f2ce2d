"""Step 2: a reward model from K-way rankings (Ouyang et al. 2022, section 3.5, equation 1).

    loss = -1/C(K,2) * sum over pairs (w, l) of log sigmoid(r(x, y_w) - r(x, y_l))

All K answers to a prompt go through the model once and all their pairs are one batch element: K forward passes
instead of K(K-1), and no answer is seen in more than one update per epoch (shuffled pairs overfit).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence, Set, Sized
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minirlhf import parallel
from minirlhf.data import Comparison, Demonstration
from minirlhf.errors import UserError
from minirlhf.language.forward import context_of
from minirlhf.language.models import clone, pad, scalar_model_from, sequence_scores, share
from minirlhf.language.tokenization import encode_prompts, encode_responses, in_chunks
from minirlhf.losses import count_ranked_prompts, pairwise_accuracy, ranking_loss
from minirlhf.settings import Count, CountOrZero, NotNegative, Positive, Settings
from minirlhf.training import (
    Recorder,
    adamw,
    epoch_batch,
    learning_rate_factor,
    micro_batches,
    set_learning_rate,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RewardFunction = Callable[[Sequence[str], Sequence[str]], "Sequence[float] | Tensor"]
"""Any callable (prompts, responses) -> one score per response; higher is better."""


def scores_tensor(returned: object, count: int) -> Tensor:
    """Convert what a reward function returned to one number per response: -> [count] float32 on the CPU.

    Args:
        returned: a tensor or array [count], or anything that yields ``count`` numbers: a list, a generator.
        count: the number of responses.

    Raises:
        UserError: it is something else, or not of that length.

    Example:
        >>> scores_tensor((len(text) for text in ["a", "abc"]), 2)
        tensor([1., 3.])
    """

    def wrong(what: str) -> UserError:
        return UserError(f"the reward returned {what} for {count} responses; it must return one number each")

    shape = tuple(getattr(returned, "shape", (count,)))
    if shape != (count,):
        raise wrong(str(shape))
    if isinstance(returned, Tensor):
        if returned.is_complex():
            raise wrong("complex numbers")
        return returned.detach().to("cpu", torch.float32)
    if isinstance(returned, (str, bytes, Mapping, Set)) or not isinstance(returned, Iterable):
        raise wrong(f"{type(returned).__name__} {returned!r:.60}")
    numbers: list[float] = []
    for value in islice(returned, count + 1):  # a generator may have no end
        try:
            if isinstance(value, (str, bytes, complex)):
                raise TypeError
            numbers.append(float(value))
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise wrong(f"{value!r:.60} ({type(value).__name__}) at index {len(numbers)}") from None
    if len(numbers) != count:
        raise wrong(f"({len(returned) if isinstance(returned, Sized) else len(numbers)},)")
    return torch.tensor(numbers, dtype=torch.float32)


@dataclass(frozen=True)
class RewardModelConfig(Settings, option="reward_model"):
    """Training of the reward model."""

    epochs: Positive = 1.0
    """Passes over the comparisons; more than one overfits."""
    batch_size: Count = 8
    """Prompts per step, each with all its answers."""
    lr: NotNegative = 1e-3
    """Peak learning rate (cosine decay to a tenth)."""
    warmup: CountOrZero = 10
    """Steps of linear warm-up."""
    weight_decay: NotNegative = 0.05
    """AdamW's weight decay, for matrices only."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""
    micro_batch_tokens: Count = 8192
    """Padded tokens per forward pass; affects memory, not results."""


def train_reward_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    comparisons: Sequence[Comparison],
    config: RewardModelConfig,
    *,
    demonstrations: Sequence[Demonstration] = (),
    seed: int = 0,
    recorder: Recorder | None = None,
) -> PreTrainedModel:
    """Train a reward model that starts from the body of a causal model.

    Args:
        model: the SFT model, or a reward model to train further (not changed; what is trained is a copy). Of a reward
            model with a peft adapter only the adapter and the head are trained, and the copy shares its body.
        tokenizer: its tokenizer.
        comparisons: rankings of K >= 2 answers; equal scores are ties and are ignored.
        config: the hyper-parameters.
        demonstrations: after training, scores are shifted so that these average 0.
        seed: of the new head and of the order of prompts.
        recorder: where progress and metrics go.

    Returns:
        A new sequence classifier with one label, in eval mode.

    Raises:
        TrainingError: the loss became NaN or infinite.
    """
    recorder = recorder or Recorder("reward_model")
    if getattr(model, "score", None) is None:  # it has no head yet
        reward_model = scalar_model_from(model, seed)
    elif hasattr(model, "peft_config"):
        reward_model = share(model)
    else:
        reward_model = clone(model).requires_grad_(True)
    encoded = encode_comparisons(tokenizer, comparisons)

    parallel.shard(reward_model)
    optimizer = adamw(reward_model, config.lr, weight_decay=config.weight_decay)
    recorder.track({"reward_model": reward_model}, {"reward_model": optimizer})
    total = max(1, round(config.epochs * len(comparisons) / config.batch_size))
    reward_model.eval()  # no dropout: a run depends only on its seed, and resumes bit for bit
    for step in recorder.steps(total):
        batch = epoch_batch(len(comparisons), config.batch_size, step, seed, "reward_model")
        optimizer.zero_grad()
        # The prompts that state a preference. The others add nothing to the loss or its denominator.
        counted = max(1, sum(int(count_ranked_prompts(torch.tensor([comparisons[row].scores]))) for row in batch))
        totals = torch.zeros(3, dtype=torch.float64)  # loss, pairs ordered as the labeler did, pairs
        mine = parallel.my_rows(batch)
        sizes = [len(encoded[row]) * max(map(len, encoded[row])) for row in mine]  # K rows of the longest answer
        groups = micro_batches(sizes, config.micro_batch_tokens)
        for chosen, weight in parallel.even([[mine[i] for i in group] for group in groups], batch[:1]):
            rewards, scores, mask = _score_group(
                reward_model,
                [encoded[row] for row in chosen],
                [comparisons[row] for row in chosen],
                tokenizer,
            )
            part = weight * ranking_loss(rewards, scores, mask, denominator=counted)
            where = [comparisons[row].where or row for row in chosen[:3]]
            recorder.check_finite(part, f"comparisons {where}", "lower --reward-model.lr")
            part.backward()
            right, count = pairwise_accuracy(rewards.detach(), scores, mask)
            totals += torch.tensor(
                [float(part.detach()), weight * float(right), weight * float(count)], dtype=torch.float64
            )
        lr = config.lr * learning_rate_factor(step, total, config.warmup)
        set_learning_rate(optimizer, lr)
        norm = parallel.clip_grad_norm_(reward_model.parameters(), config.max_grad_norm)
        optimizer.step()
        loss, correct, pairs = parallel.sum_over_ranks(totals).tolist()
        recorder.log(
            {
                "reward_model/loss": loss,
                "reward_model/accuracy": correct / max(pairs, 1.0),
                "reward_model/grad_norm": norm,
                "reward_model/lr": lr,
            }
        )
    reward_model.eval()
    if demonstrations:
        scorer, scores = RewardModelScorer(reward_model, tokenizer), torch.zeros(len(demonstrations))
        mine = parallel.my_rows(list(range(len(demonstrations))))
        with parallel.gathered(reward_model):
            own = [demonstrations[i] for i in mine]
            if own:
                scores[mine] = scorer([row.prompt for row in own], [row.completion for row in own])
        scores = parallel.sum_over_ranks(scores)
        reward_model.config.score_offset = float(scores.mean()) + reward_model.config.score_offset
    return reward_model


def encode_comparisons(tokenizer: PreTrainedTokenizerBase, comparisons: Sequence[Comparison]) -> list[list[array[int]]]:
    """Token ids of prompt + answer + EOS, for each answer of each comparison."""
    prompts = in_chunks(encode_prompts, tokenizer, (row.prompt for row in comparisons))
    responses = in_chunks(encode_responses, tokenizer, (text for row in comparisons for text in row.responses))
    return [[prompt + next(responses) for _ in row.responses] for prompt, row in zip(prompts, comparisons, strict=True)]


def _score_group(
    model: PreTrainedModel,
    encoded: Sequence[Sequence[Sequence[int]]],
    comparisons: Sequence[Comparison],
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, labels and mask of a few prompts, padded to the largest K; each [b, K]."""
    counts = [len(rows) for rows in encoded]
    flat = _score_rows(model, [row for rows in encoded for row in rows], tokenizer)
    valid = torch.arange(max(counts))[None] < torch.tensor(counts)[:, None]
    valid = valid.to(flat.device)
    rewards = torch.zeros(valid.shape, device=flat.device).masked_scatter(valid, flat)
    labels = torch.zeros(valid.shape, device=flat.device)
    labels[valid] = torch.tensor([s for row in comparisons for s in row.scores], device=flat.device)
    return rewards, labels, valid


def _score_rows(model: PreTrainedModel, rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """One score per row: -> [N]."""
    tokens, mask = (part.to(model.device) for part in pad(rows, tokenizer.pad_token_id))
    return sequence_scores(model, tokens, mask)


class RewardModelScorer:
    """A reward model as a plain function of texts, which is all that PPO needs.

    Example:
        >>> reward = RewardModelScorer(model, tokenizer)  # doctest: +SKIP
        >>> reward(["write a story about frogs"], ["once upon a time ..."])  # doctest: +SKIP
        tensor([1.3])

    ``micro_batch_tokens``: padded tokens per forward pass; changes only memory and speed.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, micro_batch_tokens: int = 4096
    ) -> None:
        self.model, self.tokenizer, self.micro_batch_tokens = model.eval(), tokenizer, micro_batch_tokens

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """Score each response to its prompt: -> [B] float32 on the CPU.

        A sampled answer may take more tokens when it is encoded again (half a character becomes a whole one, EOS is
        added to an answer that was cut off). Tokens beyond the model's context are dropped before EOS.
        """
        encoded = encode_prompts(self.tokenizer, prompts)
        rows = [p + r for p, r in zip(encoded, encode_responses(self.tokenizer, responses), strict=True)]
        context = context_of(self.model)
        rows = [row if context is None or len(row) <= context else [*row[: context - 1], row[-1]] for row in rows]
        scores = torch.zeros(len(rows))
        for group in micro_batches([len(row) for row in rows], self.micro_batch_tokens):
            scores[group] = _score_rows(self.model, [rows[i] for i in group], self.tokenizer).cpu()
        return scores
