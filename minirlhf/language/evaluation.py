"""Evaluate models: judged answers, distance from the SFT model, and the accuracy of a reward model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from minirlhf.data import Comparison
from minirlhf.intervals import win_rate
from minirlhf.kl import exact_kl
from minirlhf.language.generation import Samples, end_ids, sample
from minirlhf.language.models import response_logits
from minirlhf.language.tokenization import decode, encode_prompts
from minirlhf.settings import Count, Settings, Temperature
from minirlhf.training import generator_for, micro_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from minirlhf.language.reward_model import RewardFunction

CALIBRATION_BINS = 10


@dataclass(frozen=True)
class EvaluationConfig(Settings, option="evaluation"):
    """How the finished models are measured."""

    prompts: Count = 800
    """Held-out prompts to answer, at most; one that occurs twice is answered twice."""
    temperature: Temperature = 1.0
    """Sampling temperature; 1 measures the policy that was trained."""
    max_response_tokens: Count = 40
    """Maximum tokens per answer."""
    batch_size: Count = 256
    """Prompts answered at once."""
    corpus_blocks: Count = 200
    """Blocks of held-out text for the corpus loss, at most."""
    examples: Count = 16
    """Prompts shown with every model's answer in the report."""


class Answers(NamedTuple):
    """One model's answers to a list of prompts."""

    responses: list[str]
    ended: list[bool]
    lengths: list[int]
    """Tokens, EOS included."""
    kl: list[float]
    """KL(model || reference) of each answer in nats, summed over its tokens; empty without a reference."""


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    config: EvaluationConfig,
    *,
    reference: PreTrainedModel | None = None,
    seed: int = 0,
    greedy: bool = False,
) -> Answers:
    """Sample one answer to each prompt.

    Args:
        model: a causal model.
        tokenizer: its tokenizer.
        prompts: texts, without template; or rows of token ids, which are used as they are.
        config: temperature, length limit, batch size.
        reference: also measure the KL to this model. It is exact over the vocabulary at each token of the answer, so
            that only the sampled prefix is random.
        seed: of the sampling; the same seed gives the same answers.
        greedy: take the most likely token instead of sampling.
    """
    model.eval()
    answers = Answers([], [], [], [])
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    encoded = encode_prompts(tokenizer, texts) if texts else [list(map(int, prompt)) for prompt in prompts]
    for start in range(0, len(prompts), config.batch_size):
        part = encoded[start : start + config.batch_size]
        samples = sample(
            model,
            part,
            max_new_tokens=config.max_response_tokens,
            pad_id=tokenizer.pad_token_id,
            eos_id=end_ids(model, tokenizer),
            generator=[generator_for(seed, "answer", start + place) for place in range(len(part))],
            temperature=config.temperature,
            greedy=greedy,
        )
        answers.responses.extend(decode(tokenizer, samples.responses()))
        answers.ended.extend(samples.ended.tolist())
        answers.lengths.extend(samples.lengths.tolist())
        if reference is not None:
            answers.kl.extend(sequence_kl(model, reference, samples, config.temperature).tolist())
    return answers


@torch.no_grad()
def sequence_kl(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    samples: Samples,
    temperature: float = 1.0,
    micro_batch_tokens: int = 1024,
) -> Tensor:
    """KL(model || reference) along each sampled answer, in nats: -> [B] float32 on the CPU."""
    kl = torch.zeros(len(samples.ended))
    for group in micro_batches(samples.mask.sum(dim=1).tolist(), micro_batch_tokens):
        part = samples.rows(torch.tensor(group))
        logits, ref_logits = (
            response_logits(m, part.tokens, part.mask, part.response_mask).float() / temperature
            for m in (model, reference)
        )
        token_kl = torch.zeros(part.response_mask.shape, device=logits.device)
        token_kl[part.response_mask] = exact_kl(logits, ref_logits)
        kl[group] = token_kl.sum(dim=1).cpu()
    return kl


class Pairs(NamedTuple):
    """All ordered pairs of some comparisons, as differences better minus worse; each [pairs]."""

    reward: Tensor
    length: Tensor
    """In words, split at white space."""
    prompts: list[str]
    """The prompt of each pair."""


def ordered_pairs(comparisons: Sequence[Comparison], rewards: Sequence[Sequence[float]]) -> Pairs:
    """Differences of reward and of length over every pair that the labeler ordered (ties dropped)."""
    reward: list[float] = []
    length: list[float] = []
    prompts: list[str] = []
    for row, scores in zip(comparisons, rewards, strict=True):
        words = [len(text.split()) for text in row.responses]
        for i, a in enumerate(row.scores):
            for j, b in enumerate(row.scores):
                if a > b:
                    reward.append(scores[i] - scores[j])
                    length.append(float(words[i] - words[j]))
                    prompts.append(row.prompt)
    return Pairs(torch.tensor(reward, dtype=torch.float64), torch.tensor(length, dtype=torch.float64), prompts)


def accuracy(differences: Tensor) -> float:
    """Share of pairs ordered as the labeler did; equal scores count half."""
    if len(differences) == 0:
        return float("nan")
    return float(((differences > 0).double() + 0.5 * (differences == 0).double()).mean())


def calibration_error(differences: Tensor, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error of sigmoid(r_i - r_j) as the probability that i is preferred.

    Every pair is counted in both directions, so that the predictions span 0 to 1; the error is the mean over bins of
    |predicted - observed|, weighted by the pairs in the bin (Guo et al. 2017).
    """
    predicted = torch.cat([differences, -differences]).sigmoid()
    observed = torch.cat([torch.ones_like(differences), torch.zeros_like(differences)])
    place = (predicted * bins).long().clamp(max=bins - 1)
    error = 0.0
    for b in range(bins):
        inside = place == b
        if inside.any():
            gap = (predicted[inside].mean() - observed[inside].mean()).abs()
            error += float(gap) * float(inside.double().mean())
    return error


def score_comparisons(reward: RewardFunction, comparisons: Sequence[Comparison]) -> list[list[float]]:
    """The reward of every response of every comparison."""
    prompts = [row.prompt for row in comparisons for _ in row.responses]
    responses = [text for row in comparisons for text in row.responses]
    flat = iter(torch.as_tensor(reward(prompts, responses)).tolist())
    return [[next(flat) for _ in row.responses] for row in comparisons]


def evaluate_reward_model(
    reward: RewardFunction,
    comparisons: Sequence[Comparison],
    training_labelers: set[str],
    gold: RewardFunction | None = None,
) -> dict[str, float | int | list[float] | None]:
    """Evaluate a reward model on held-out comparisons.

    Args:
        reward: the reward model as a function.
        comparisons: rankings that it was not trained on.
        training_labelers: names of the labelers whose rankings it was trained on; all others are held-out labelers.
        gold: the true score, if known; its accuracy is the ceiling set by label noise.

    Returns:
        accuracy and its 95 % interval (accuracy_interval; it allows for dependent pairs of one prompt), ceiling,
        length_baseline, calibration_error, pairs; all but calibration_error again for held-out labelers, as
        accuracy_heldout_labelers and so on. None where there is nothing to measure.
    """
    result: dict[str, float | int | list[float] | None] = {}
    known = [row for row in comparisons if row.labeler in training_labelers]
    others = [row for row in comparisons if row.labeler not in training_labelers]
    for suffix, rows in (("", known), ("_heldout_labelers", others)):
        pairs = ordered_pairs(rows, score_comparisons(reward, rows)) if rows else None
        right, bounds = win_rate(pairs.reward, torch.zeros_like(pairs.reward), pairs.prompts) if pairs else (None, None)
        result[f"accuracy{suffix}"], result[f"accuracy{suffix}_interval"] = right, list(bounds) if bounds else None
        truth = ordered_pairs(rows, score_comparisons(gold, rows)) if rows and gold else None
        result[f"ceiling{suffix}"] = accuracy(truth.reward) if truth else None
        result[f"length_baseline{suffix}"] = accuracy(pairs.length) if pairs else None
        result[f"pairs{suffix}"] = len(pairs.reward) if pairs else 0
        if not suffix:
            result["calibration_error"] = calibration_error(pairs.reward) if pairs else None
    return result
