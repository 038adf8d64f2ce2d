"""PPO's loss straight from hidden states: what `linear_token_logprobs` and `ppo_loss` give one after the other."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from minirlhf_kernels.reference.linear import linear_token_logprobs
from minirlhf_kernels.reference.ppo import ppo_loss


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`ppo_loss` of the log-probabilities (and entropy) that hidden [..., H] and weight [V, H] give tokens [...].

    For a step that needs the log-probabilities for nothing but the loss. `options` are ppo_loss's own: values,
    old_values, returns, ref_logprobs, clip ranges, coefficients, denominator. The policy's entropy is always there.
    The Triton twin makes the logits once, turns them into their gradient in forward, and keeps the gradients of hidden
    and weight for backward: 6 M H V operations, where the two calls need 8 (logits again in backward).
    Raises as the two calls do.

    >>> import torch
    >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 5.0], [0.0, 7.0]])
    >>> old, one = torch.tensor([-0.1269]), torch.tensor([1.0])
    >>> linear_ppo_loss(hidden, weight, torch.tensor([0]), old, one, torch.tensor([True]))[0]
    tensor(-1.0000)
    """
    logprobs, entropy = linear_token_logprobs(
        hidden,
        weight,
        tokens,
        temperature=temperature,
        mask=response_mask,
        return_entropy=True,
        chunk_size=chunk_size,
    )
    return ppo_loss(logprobs, old_logprobs, advantages, response_mask, entropy=entropy, **options)
