"""What the operations refuse, in the definitions and in their Triton twins, and how they read what they are given.

These run at every call, before anything is computed: messages are put together only where one is raised.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

IGNORED_TOKEN = -100
"""A token that never counts (torch's own convention for `cross_entropy`)."""
LEAST_TEMPERATURE = 1e-38  # float32 still holds its reciprocal


def checked_temperature(temperature: float) -> float:
    if not LEAST_TEMPERATURE <= temperature < math.inf:
        raise ValueError(f"temperature must be a finite number of at least {LEAST_TEMPERATURE}, not {temperature}")
    return float(temperature)  # of a tensor: a number, through which no gradient goes


def check_tokens(tokens: Tensor, mask: Tensor | None, shape: torch.Size) -> None:
    if tokens.shape != shape:
        raise ValueError(f"tokens must have the rows' shape {tuple(shape)}, not {tuple(tokens.shape)}")
    if tokens.dtype != torch.int64:
        raise TypeError(f"tokens must be int64, not {tokens.dtype}")
    if mask is not None and (mask.shape != shape or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool of shape {tuple(shape)}, not {mask.dtype} of {tuple(mask.shape)}")


def counted_rows(tokens: Tensor, mask: Tensor | None, vocabulary: int) -> Tensor:
    """Which rows count. Raises on a token that counts and is outside the vocabulary."""
    counted = tokens != IGNORED_TOKEN if mask is None else mask & (tokens != IGNORED_TOKEN)
    outside = tokens[counted & ((tokens < 0) | (tokens >= vocabulary))].tolist()
    if outside:
        raise ValueError(
            f"token {outside[0]} is outside the vocabulary [0, {vocabulary}): mask the row, or give it {IGNORED_TOKEN}"
        )
    return counted


def check_linear(hidden: Tensor, weight: Tensor) -> None:
    if weight.dim() != 2 or weight.shape[-1] != hidden.shape[-1]:
        raise ValueError(f"weight must be [V, {hidden.shape[-1]}] for this hidden, not {tuple(weight.shape)}")


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What hidden and weight are multiplied in: the wider type of the two, or autocast's where it is on."""
    dtype, device = torch.promote_types(hidden.dtype, weight.dtype), hidden.device.type
    casts = dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if casts else dtype


def check_gae(rewards: Tensor, last_values: Tensor | None, **others: Tensor | None) -> None:
    shape = rewards.shape
    if len(shape) != 2:
        raise ValueError(f"rewards must have two dimensions, not the shape {tuple(shape)}")
    for name, x in others.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} must have rewards' shape {tuple(shape)}")
        if name in ("ends", "mask") and x is not None and x.dtype != torch.bool:
            raise TypeError(f"{name} must be bool, not {x.dtype}")
    if last_values is not None and last_values.shape != shape[:1]:
        raise ValueError(f"last_values must have the shape {tuple(shape[:1])}")


def check_ppo(
    given: dict[str, Tensor | None],
    mask: Tensor,
    clip_range: float,
    clip_range_high: float | None,
    value_clip_range: float | None,
    entropy_coef: float,
    kl_coef: float,
) -> None:
    shape = mask.shape
    for name, x in given.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} must have response_mask's shape {tuple(shape)}")
    if mask.dtype != torch.bool:
        raise ValueError(f"response_mask must be bool (True = counts), not {mask.dtype}")
    for name, limit in (("clip_range", clip_range), ("clip_range_high", clip_range_high)):
        if limit is not None and not limit > 0:
            raise ValueError(f"{name} must be above 0, not {limit}")
    values, old_values = given["values"], given["old_values"]
    if (values is None) != (given["returns"] is None):
        raise ValueError("values and returns go together: give both or neither")
    if value_clip_range is not None and old_values is None:
        raise ValueError("value_clip_range needs old_values")
    if old_values is not None and values is None:
        raise ValueError("old_values needs values and returns")
    if entropy_coef != 0 and given["entropy"] is None:
        raise ValueError("entropy_coef needs entropy")
    if kl_coef != 0 and given["ref_logprobs"] is None:
        raise ValueError("kl_coef needs ref_logprobs")


def chosen(kl_estimator: str, loss_agg_mode: str) -> tuple[bool, bool]:
    """Whether the KL loss is k3, and whether every sequence counts the same."""
    if kl_estimator not in ("k2", "k3"):
        raise ValueError(f"kl_estimator must be 'k2' or 'k3', not {kl_estimator!r}")
    if loss_agg_mode not in ("token-mean", "seq-mean-token-mean"):
        raise ValueError(f"loss_agg_mode must be 'token-mean' or 'seq-mean-token-mean', not {loss_agg_mode!r}")
    return kl_estimator == "k3", loss_agg_mode == "seq-mean-token-mean"
