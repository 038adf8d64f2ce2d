"""DPO: the policy is trained on rankings directly, without a reward model and without sampling (Rafailov et al. 2023).

    r(x, y) = beta * log(pi(y|x) / pi_ref(y|x))                          the reward that the policy has by itself
    loss    = -1/C(K,2) * sum over pairs (w, l) of log sigmoid(r(x, y_w) - r(x, y_l))

It is step 2's loss with the policy's own reward in the model's place. As there, all K answers to a prompt go through
the model once and all their pairs are one batch element. The reference's log-probs are computed once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from minirlhf import parallel
from minirlhf.data import Comparison
from minirlhf.language.forward import context_of
from minirlhf.language.generation import end_ids, sample_by_rank
from minirlhf.language.models import pad_answers, response_logprobs
from minirlhf.language.reward_model import encode_comparisons
from minirlhf.language.rollouts import Monitor, check_learners, reference_logprobs
from minirlhf.language.tokenization import decode, encode_prompts, in_chunks
from minirlhf.losses import count_ranked_prompts, implicit_rewards, pairwise_accuracy, ranking_loss, sft_loss
from minirlhf.settings import Count, CountOrZero, Fraction, NotNegative, Positive, Settings
from minirlhf.training import (
    Recorder,
    adamw,
    epoch_batch,
    generator_for,
    learning_rate_factor,
    micro_batches,
    set_learning_rate,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


SUMS = ("loss", "correct", "pairs", "margin", "best", "worst")


@dataclass(frozen=True)
class DPOConfig(Settings, option="dpo"):
    """Direct preference optimization."""

    epochs: Positive = 1.0
    """Passes over the comparisons."""
    batch_size: Count = 8
    """Prompts per step, each with all its answers."""
    lr: NotNegative = 3e-4
    """Peak learning rate (cosine decay to a tenth)."""
    warmup: CountOrZero = 10
    """Steps of linear warm-up."""
    beta: Positive = 0.5
    """Strength of the implicit KL penalty: the larger, the nearer the policy stays to the reference. The paper's 0.1
    lets the small world's policy go 8 nats away, where its answers are hardly better than the reference's."""
    label_smoothing: Fraction = 0.0
    """Assumed probability that a label is the wrong way round (conservative DPO)."""
    sft_coef: NotNegative = 0.0
    """Weight of the SFT loss on the best answer, which keeps its probability from falling; 0 for plain DPO."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""
    micro_batch_tokens: Count = 8192
    """Padded tokens per forward pass; affects memory, not results."""
    measure_every: Count = 25
    """Steps between two samples of answers, for the KL to the reference, the length and the monitor."""
    measured_prompts: CountOrZero = 32
    """Prompts that are answered then, of those that leave room for an answer; 0 for none."""
    max_response_tokens: Count = 40
    """Maximum tokens per answer of these samples."""


def train_dpo(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    comparisons: Sequence[Comparison],
    config: DPOConfig,
    *,
    seed: int = 0,
    recorder: Recorder | None = None,
    monitor: Monitor | None = None,
) -> PreTrainedModel:
    """Train a policy on rankings, in place.

    Args:
        policy: starts as the SFT model.
        reference: the SFT model, never changed.
        tokenizer: of both.
        comparisons: rankings of K >= 2 answers; equal scores are ties and are ignored.
        config: the hyper-parameters.
        seed: of the order of prompts and of the samples that are measured.
        recorder: where progress and metrics go.
        monitor: extra measurements of sampled answers, as in `train_rlhf`.

    Returns:
        The policy, in eval mode.

    Raises:
        UserError: policy and reference share trained weights.
        TrainingError: the loss became NaN or infinite.

    Example:
        >>> train_dpo(clone(sft), sft, tokenizer, comparisons, DPOConfig())  # doctest: +SKIP
    """
    check_learners({"policy": policy}, {"reference": reference})
    recorder = recorder or Recorder("dpo", show=("dpo/loss", "dpo/accuracy"))
    encoded = encode_comparisons(tokenizer, comparisons)
    starts = [len(prompt) for prompt in in_chunks(encode_prompts, tokenizer, (row.prompt for row in comparisons))]
    sizes = [len(rows) * max(map(len, rows)) for rows in encoded]  # a prompt takes K rows of its longest answer
    context = context_of(policy) or math.inf
    asked = [row for row, start in enumerate(starts) if start + config.max_response_tokens <= context]
    ranked = [int(count_ranked_prompts(torch.tensor([row.scores]))) for row in comparisons]
    policy.eval()  # no dropout: a run depends only on its seed, and resumes bit for bit
    reference.eval()

    def shares(rows: list[int]) -> Iterator[tuple[list[int], _Answers, float]]:
        """This process's micro-batches of some rows, each with its weight."""
        mine = parallel.my_rows(rows)
        groups = micro_batches([sizes[row] for row in mine], config.micro_batch_tokens)
        for chosen, weight in parallel.even([[mine[i] for i in group] for group in groups], rows[:1]):
            padded = pad_answers(
                [ids for row in chosen for ids in encoded[row]],
                [starts[row] for row in chosen for _ in encoded[row]],
                tokenizer.pad_token_id,
            )
            parts = (part.to(policy.device) for part in (*padded, *_ranks([comparisons[row] for row in chosen])))
            yield chosen, _Answers(*parts), weight

    total = max(1, round(config.epochs * len(comparisons) / config.batch_size))
    batches = [epoch_batch(len(comparisons), config.batch_size, step, seed, "dpo") for step in range(total)]
    parallel.shard(policy, reference)
    known: list[tuple[int, Tensor]] = []
    with torch.no_grad():
        for chosen, answers, _ in shares(sorted({row for batch in batches for row in batch})):
            each = response_logprobs(reference, answers.tokens, answers.mask, answers.response_mask)
            counts = answers.by_prompt(answers.response_mask.sum(1)).sum(1)
            known += zip(chosen, each[answers.response_mask].cpu().split(counts.tolist()), strict=True)
    references = dict(parallel.gather(known))  # of all answers to a prompt, one after the other

    optimizer = adamw(policy, config.lr)
    recorder.track({"policy": policy}, {"policy": optimizer})
    for step in recorder.steps(total):
        sampled: dict[str, float] = {}
        if asked and config.measured_prompts and (step % config.measure_every == 0 or step == total - 1):
            rows = epoch_batch(len(asked), config.measured_prompts, step, seed, "dpo/measure")
            prompts = [comparisons[asked[row]].prompt for row in rows]
            sampled = _sampled(policy, reference, tokenizer, prompts, config, seed, step, monitor)
        batch = batches[step]
        counted = max(1, sum(ranked[row] for row in batch))
        teaching = [row for row in batch if ranked[row]]
        best_tokens = max(1, sum(len(encoded[row][_best(comparisons[row])]) - starts[row] for row in teaching))
        optimizer.zero_grad()
        sums = torch.zeros(len(SUMS), dtype=torch.float64)
        for chosen, answers, weight in shares(batch):
            logprobs = response_logprobs(policy, answers.tokens, answers.mask, answers.response_mask)
            ref = torch.cat([references[row] for row in chosen]).to(policy.device)
            ref = torch.zeros_like(logprobs).masked_scatter(answers.response_mask, ref)
            rewards = answers.by_prompt(implicit_rewards(logprobs, ref, answers.response_mask, config.beta))
            smoothing = config.label_smoothing
            loss = ranking_loss(
                rewards, answers.scores, answers.present, label_smoothing=smoothing, denominator=counted
            )
            if config.sft_coef > 0:
                best = answers.response_mask & answers.best()[:, None]
                loss = loss + config.sft_coef * sft_loss(logprobs, best, denominator=best_tokens)
            where = [comparisons[row].where or row for row in chosen[:3]]
            recorder.check_finite(loss, f"comparisons {where}", "lower --dpo.lr or raise --dpo.beta")
            (weight * loss).backward()
            parts = (loss.detach(), *_measure(rewards, logprobs, answers))
            sums += weight * torch.tensor([float(part) for part in parts], dtype=torch.float64)
        lr = config.lr * learning_rate_factor(step, total, config.warmup)
        set_learning_rate(optimizer, lr)
        norm = parallel.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        optimizer.step()
        of_step = dict(zip(SUMS, parallel.sum_over_ranks(sums).tolist(), strict=True))
        recorder.log(
            sampled
            | {
                "dpo/loss": of_step["loss"],
                "dpo/accuracy": of_step["correct"] / max(of_step["pairs"], 1.0),
                "dpo/margin": of_step["margin"] / max(of_step["pairs"], 1.0),
                "dpo/best_logprob": of_step["best"] / counted,
                "dpo/worst_logprob": of_step["worst"] / counted,
                "policy/grad_norm": float(norm),
                "policy/lr": lr,
            }
        )
    return policy.eval()


class _Answers(NamedTuple):
    """All answers to a few prompts, one after the other, and their ranks."""

    tokens: Tensor
    """[N, P + T]."""
    mask: Tensor
    """[N, P + T] bool."""
    response_mask: Tensor
    """[N, T] bool."""
    scores: Tensor
    """[b, K], the labeler's."""
    present: Tensor
    """[b, K] bool: prompts may have different K."""

    def by_prompt(self, each: Tensor) -> Tensor:
        """[N] -> [b, K], 0 where there is no answer."""
        return each.new_zeros(self.present.shape).masked_scatter(self.present, each)

    def best(self) -> Tensor:
        """The answers that are the first of the best to their prompt, if not all are tied: [N] bool."""
        first = self.scores.masked_fill(~self.present, -torch.inf).argmax(1, keepdim=True)
        return torch.zeros_like(self.present).scatter(1, first, self.ranked()[:, None])[self.present]

    def ranked(self) -> Tensor:
        """The prompts with two answers that the labeler told apart; the others teach nothing: [b] bool."""
        low, high = (
            self.scores.masked_fill(~self.present, torch.inf),
            self.scores.masked_fill(~self.present, -torch.inf),
        )
        return low.amin(1) < high.amax(1)


def _ranks(comparisons: Sequence[Comparison]) -> tuple[Tensor, Tensor]:
    counts = torch.tensor([len(row.scores) for row in comparisons])
    present = torch.arange(int(counts.max()))[None] < counts[:, None]
    scores = torch.zeros(present.shape)
    scores[present] = torch.tensor([score for row in comparisons for score in row.scores])
    return scores, present


def _best(row: Comparison) -> int:
    return row.scores.index(max(row.scores))


@torch.no_grad()
def _measure(rewards: Tensor, logprobs: Tensor, answers: _Answers) -> tuple[Tensor, ...]:
    """`SUMS` over pairs and prompts after the loss, to be divided by the counts of the whole step."""
    scores, present = answers.scores, answers.present
    correct, pairs = pairwise_accuracy(rewards, scores, present)
    better = (scores[:, :, None] > scores[:, None]) & present[:, :, None] & present[:, None]
    whole = answers.by_prompt(logprobs.sum(1))  # 0 where response_mask is False
    best = scores.masked_fill(~present, -torch.inf).argmax(1, keepdim=True)
    worst = scores.masked_fill(~present, torch.inf).argmin(1, keepdim=True)
    margin = ((rewards[:, :, None] - rewards[:, None]) * better).sum()
    ends = (whole.gather(1, index)[answers.ranked()].sum() for index in (best, worst))
    return correct, pairs, margin, *ends


@torch.no_grad()
def _sampled(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    config: DPOConfig,
    seed: int,
    step: int,
    monitor: Monitor | None,
) -> dict[str, float]:
    """What the rankings can't show: how far the policy has moved, by answers of its own."""
    samples = sample_by_rank(
        policy,
        encode_prompts(tokenizer, prompts),
        max_new_tokens=config.max_response_tokens,
        pad_id=tokenizer.pad_token_id,
        eos_id=end_ids(policy, tokenizer),
        generator=[generator_for(seed, "dpo/sample", step, place) for place in range(len(prompts))],
    )
    ref = reference_logprobs(reference, samples, config.micro_batch_tokens)
    measured = {
        "objective/kl": float((samples.logprobs - ref).sum(1).mean()),
        "objective/response_length": float(samples.lengths.float().mean()),
        "objective/ended_fraction": float(samples.ended.float().mean()),
    }
    if monitor is not None and parallel.rank() == 0:
        measured |= monitor(prompts, decode(tokenizer, samples.responses()), samples.ended.tolist())
    return measured
