"""Answers that something else samples, such as vLLM: checked, and weighted for what it does differently.

Two programs give one token slightly different probabilities, even with the same weights (other kernels, other
precisions, weights that are a step old). So PPO's `old_logprobs` are computed again by the trainer, its ratio starts
at 1 as always, and what the sampler itself reported only serves to measure the mismatch, pi_train / pi_sampler.

The tokens are then off-policy: they come from pi_sampler, and PPO's gradient is an expectation under pi_train.
Importance sampling weights each token's policy loss by pi_train / pi_sampler; a rare token may get a huge weight, so
the weight is truncated: min(pi_train / pi_sampler, cap), a constant without a gradient (Ionides 2008; Espeholt et al.
2018, IMPALA; for language models Yao et al. 2025, "On the Rollout-Training Mismatch in Modern RL Systems"). Per token,
it corrects which token was drawn after a prefix, and not how often the sampler visits the prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minirlhf.errors import UserError
from minirlhf.language.generation import Samples
from minirlhf.language.models import pad, response_logprobs
from minirlhf.training import micro_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Sampler = Callable[[Sequence[Sequence[int]]], Samples]
"""Token ids of B prompts, template included -> an answer to each, in their order, with the sampler's log-probs."""


def samples_of(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float]],
    ended: Sequence[bool],
    *,
    pad_id: int,
) -> Samples:
    """Answers as lists of tokens, as other programs return them, in the form that PPO takes.

    Args:
        prompts: B rows of token ids.
        responses: B answers, at least one token each, with the token that ended it.
        logprobs: of each response token, under the distribution that it was drawn from.
        ended: whether each answer ended, rather than being cut at the length limit.
        pad_id: fills the gaps.

    Raises:
        UserError: the lists don't fit together, or an answer is empty.

    Example:
        >>> samples_of([[5, 6]], [[7, 1]], [[-0.5, -0.1]], [True], pad_id=0).response_mask
        tensor([[True, True]])
    """
    counts = {len(rows) for rows in (prompts, responses, logprobs, ended)}
    if len(counts) > 1 or any(len(row) != len(own) for row, own in zip(responses, logprobs, strict=False)):
        raise UserError("the sampler must give one response per prompt, and one log-prob per token of each response")
    if not all(len(row) for row in (*prompts, *responses)):
        raise UserError("the sampler gave an empty answer; one that ends at once is its end token")
    prompt_tokens, prompt_mask = pad(prompts, pad_id, side="left")
    response_tokens, response_mask = pad(responses, pad_id)
    flat = torch.tensor([value for row in logprobs for value in row], dtype=torch.float32)
    spread = torch.zeros(response_mask.shape).masked_scatter(response_mask, flat)
    return Samples(prompt_tokens, prompt_mask, response_tokens, response_mask, spread, torch.tensor(ended))


def check_samples(samples: Samples, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Check what a sampler returned.

    Raises:
        UserError: it does not answer these prompts, is longer than allowed, or has values that are not log-probs.
    """

    def require(fits: bool | Tensor, wanted: str) -> None:
        if not fits:
            raise UserError(f"the sampler must return {wanted}")

    mask, shape = samples.response_mask, samples.response_tokens.shape
    asked = [row[own].tolist() for row, own in zip(samples.prompt_tokens, samples.prompt_mask, strict=True)]
    require(asked == [list(row) for row in prompts], "answers to the prompts that it was given, in their order")
    require(mask.shape == samples.logprobs.shape == shape, "tokens, mask and log-probs of one shape")
    lengths, columns = mask.sum(dim=1), torch.arange(shape[1], device=mask.device)
    fits = bool((lengths > 0).all()) and shape[1] <= max_new_tokens
    require(fits, f"answers of 1 to {max_new_tokens} tokens")
    require(torch.equal(mask, columns < lengths[:, None]), "answers without gaps, padded on the right")
    counted = samples.logprobs[mask]
    require((counted.isfinite() & (counted <= 1e-4)).all(), "finite log-probs, 0 or below")


def sample_elsewhere(
    sampler: Sampler,
    prompts: Sequence[Sequence[int]],
    policy: PreTrainedModel,
    *,
    max_new_tokens: int,
    temperature: float,
    micro_batch_tokens: int,
    importance_cap: float | None,
) -> tuple[Samples, Tensor | None, dict[str, float]]:
    """Let a sampler answer, put the policy's log-probs in place of the sampler's, and measure how far apart they are.

    Args:
        sampler: see `Sampler`.
        prompts: B rows of token ids.
        policy: the model that is trained.
        max_new_tokens: maximum tokens per answer.
        temperature: of sampling; the policy's log-probs are of the same tempered distribution.
        micro_batch_tokens: padded tokens per forward pass.
        importance_cap: of the weights; None for no weights.

    Returns:
        The samples with the policy's log-probs, on its device; each token's weight [B, T], 0 where the mask is False,
        or None; and metrics: mean and maximum of pi_train / pi_sampler, and the estimate of KL(sampler || train) in
        nats per token.

    Raises:
        UserError: see `check_samples` and `importance_weights`.
    """
    samples = sampler(prompts)
    check_samples(samples, prompts, max_new_tokens)
    samples = Samples(*(part.to(policy.device) for part in samples))
    own = _own_logprobs(samples, policy, temperature, micro_batch_tokens)
    mask = samples.response_mask
    difference = torch.where(mask, own - samples.logprobs, 0.0)
    ratio = torch.where(mask, difference.exp(), 0.0)
    count = float(mask.sum())
    metrics = {
        "sampler/ratio_mean": float(ratio.sum()) / count,
        "sampler/ratio_max": float(ratio.max()),
        "sampler/kl": -float(difference.sum()) / count,
    }
    weights = None if importance_cap is None else importance_weights(ratio, importance_cap)
    return samples._replace(logprobs=own), weights, metrics


@torch.no_grad()
def _own_logprobs(samples: Samples, policy: PreTrainedModel, temperature: float, micro_batch_tokens: int) -> Tensor:
    own = torch.zeros_like(samples.logprobs)
    for group in micro_batches(samples.mask.sum(dim=1).tolist(), micro_batch_tokens):
        index = torch.tensor(group, device=own.device)
        part = samples.rows(index)
        logprobs = response_logprobs(policy, part.tokens, part.mask, part.response_mask, temperature)
        own[index, : logprobs.shape[1]] = logprobs
    return own


def importance_weights(ratio: Tensor, cap: float) -> Tensor:
    """min(pi_train / pi_sampler, cap) of each token, constants.

    Raises:
        UserError: the cap is not a positive number.

    Example:
        >>> importance_weights(torch.tensor([0.5, 1.0, 7.0]), cap=2.0)
        tensor([0.5000, 1.0000, 2.0000])
    """
    if not cap > 0:
        raise UserError(f"importance_cap {cap}: must be a number above 0 (2 is usual), or None for no weights")
    return ratio.detach().clamp(max=cap)
