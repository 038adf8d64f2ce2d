"""The definition of each operation in plain PyTorch: the formula of its paper, with autograd for every backward.

This runs where there is no GPU, and the Triton kernels in `fused/` are tested against it. Half precision is computed in
float32, float64 in float64.

Masked values are set to 0 with `where` before any arithmetic. A mask applied by multiplication, or only at the end,
turns a masked NaN into a NaN loss or, through 0 * NaN in the backward, into NaN gradients.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["IGNORED_TOKEN", "gae", "linear_token_logprobs", "ppo_loss", "token_logprobs"]

IGNORED_TOKEN = -100
"""A token that never counts (torch's own convention for `cross_entropy`)."""
LEAST_TEMPERATURE = 1e-38  # float32 still holds its reciprocal


def _counted(x: Tensor, mask: Tensor) -> Tensor:
    """x where mask is True, 0 elsewhere; half precision becomes float32."""
    return torch.where(mask, x.to(torch.promote_types(x.dtype, torch.float32)), 0.0)


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    return_entropy: bool = False,
) -> Any:
    """Log-probability, in nats, that softmax(logits / temperature) gives each token.

    logits [..., V] and tokens [...] (int64) give logprobs [...]: float64 for float64 logits, float32 for any other
    (bfloat16 and float16 are computed in float32). `logits[..., i, :]` must be the distribution that `tokens[..., i]`
    was drawn from; for a causal model that is `token_logprobs(logits[:, :-1], input_ids[:, 1:])`.

    Rows where mask is False or the token is -100 give 0 and no gradient, whatever their logits hold. Logits of -inf are
    tokens that cannot be drawn. `return_entropy=True` returns (logprobs, entropy), both [...]. Raises ValueError for a
    token outside [0, V) and for a temperature below 1e-38. In Triton a second derivative raises an error.

    >>> logits = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    >>> token_logprobs(logits, torch.tensor([1, 0]))
    tensor([-0.6931, -0.1269])
    >>> token_logprobs(logits, torch.tensor([1, 0]), mask=torch.tensor([True, False]))
    tensor([-0.6931,  0.0000])
    """
    temperature = _checked_temperature(temperature)
    _check_tokens(tokens, mask, logits.shape[:-1])
    counted = _counted_rows(tokens, mask, logits.shape[-1])
    z = _counted(logits, counted.unsqueeze(-1))
    if temperature != 1.0:  # z / temperature alone may overflow
        z = (z - z.detach().amax(-1, keepdim=True)) / temperature
    log_p = z.log_softmax(-1)
    index = torch.where(counted, tokens, 0).unsqueeze(-1)
    logprobs = _counted(log_p.gather(-1, index).squeeze(-1), counted)
    if not return_entropy:
        return logprobs
    p_log_p = log_p.exp() * _counted(log_p, log_p > -math.inf)  # 0 log 0 is 0
    return logprobs, _counted(-p_log_p.sum(-1), counted)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    return_entropy: bool = False,
) -> Any:
    """`token_logprobs(hidden @ weight.T, tokens)`. The Triton version never holds all the logits; this one does.

    hidden [..., H], weight [V, H] (a head without bias) and tokens [...] give logprobs [...], with entropy on request,
    as `token_logprobs` does, with the same masks and the same errors.

    >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 5.0], [0.0, 7.0]])
    >>> linear_token_logprobs(hidden, weight, torch.tensor([0]))
    tensor([-0.1269])
    """
    _check_linear(hidden, weight)
    _check_tokens(tokens, mask, hidden.shape[:-1])
    hidden = _counted(hidden, _counted_rows(tokens, mask, len(weight)).unsqueeze(-1))
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.to(dtype) @ weight.to(dtype).T
    return token_logprobs(logits, tokens, temperature=temperature, mask=mask, return_entropy=return_entropy)


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    ends: Tensor,
    *,
    gamma: float,
    lam: float,
    last_values: Tensor | None = None,
    truncated_values: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, equation 16) and its returns.

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t),      A_t = delta_t + gamma lam A_{t+1},      returns = A + V

    rewards, values and ends (bool) are [N, T], and so are both results. Any strides work: pass a [T, N] tensor as
    `x.t()`, a view. `ends[t]` means that the episode ends with step t, terminated or truncated: nothing flows back
    across it. The value after an end is `truncated_values[t]` (same shape, read only where ends is True: the value of a
    truncated episode's last observation, 0 for a terminated one), or 0 without it. The value after the last column is
    `last_values` [N], or 0.
    Where `mask` is False both results are 0 and nothing leaks out (even NaN); the value after the last counted step
    before such a slot is 0 too. No gradient flows. Raises ValueError or TypeError for wrong shapes or types.

    >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]])
    >>> gae(rewards, values, torch.tensor([[False, True]]), gamma=1.0, lam=0.5)
    (tensor([[0.2500, 0.5000]]), tensor([[0.7500, 1.0000]]))
    """
    _check_gae(rewards, last_values, values=values, ends=ends, truncated_values=truncated_values, mask=mask)
    counted = torch.ones_like(ends) if mask is None else mask
    values = _counted(values, counted)
    next_values = torch.zeros_like(values)
    next_values[:, :-1] = values[:, 1:]
    if last_values is not None:
        next_values[:, -1:] = last_values.unsqueeze(1)
    after_ends = torch.zeros_like(values) if truncated_values is None else truncated_values.to(values.dtype)
    next_values = torch.where(ends, after_ends, next_values)
    advantages = _counted(rewards + gamma * next_values - values, counted)  # so far the deltas
    decays = gamma * lam * (counted & ~ends).to(advantages.dtype)
    for t in reversed(range(rewards.shape[1] - 1)):
        advantages[:, t] += decays[:, t] * advantages[:, t + 1]
    return advantages, advantages + values


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    entropy: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    clip_range: float = 0.2,
    value_clip_range: float | None = None,
    value_coef: float = 0.5,
    entropy_coef: float = 0.0,
    kl_coef: float = 0.0,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's loss, to be minimised, and its metrics (Schulman et al. 2017, equations 7 and 9).

        policy    -min(r A, clip(r, 1 - clip_range, 1 + clip_range) A),       r = exp(logprobs - old_logprobs)
        value     1/2 (V - R)^2; with `value_clip_range` the larger of that and the same for V clipped near old_values
        loss      policy + value_coef value - entropy_coef entropy + kl_coef KL

    Each term is summed over the tokens where response_mask is True and divided by `denominator`: the number of counted
    tokens of the WHOLE optimizer step (default: of this call), so that micro-batches add up to the same gradient.
    All tensors share one shape, [B, T] or any other; masked values, even NaN, change nothing.
    Gradients flow into logprobs, values and entropy only. The KL term is k2 = (logprobs - ref_logprobs)^2 / 2 whose
    gradient, on samples of the policy, is that of KL(policy || ref); k3's would be that of KL(ref || policy).

    Metrics (0-d, detached): policy/loss, policy/clip_fraction (tokens where the clip stops the gradient),
    policy/approx_kl (k3 of old against new), policy/ratio_mean, policy/ratio_max; value/loss with values and
    value/clip_fraction with value_clip_range; policy/entropy with entropy; policy/ref_kl (k3) with ref_logprobs.
    All but policy/ratio_max are sums over counted tokens divided by `denominator`, and so add up over micro-batches.
    Raises ValueError if a coefficient lacks its tensor, shapes differ, or no token counts and no denominator is
    given.

    >>> logprobs = torch.tensor([[-1.0, -0.5]], requires_grad=True)
    >>> mask = torch.tensor([[True, True]])
    >>> loss, metrics = ppo_loss(logprobs, torch.tensor([[-1.0, -1.0]]), torch.tensor([[1.0, 1.0]]), mask)
    >>> loss.item(), metrics["policy/clip_fraction"].item()  # r = 1 and 1.65: the second is clipped to 1.2
    (-1.100000023841858, 0.5)
    """
    mask = response_mask
    given = {"logprobs": logprobs, "old_logprobs": old_logprobs, "advantages": advantages, "values": values}
    given |= {"returns": returns, "old_values": old_values, "entropy": entropy, "ref_logprobs": ref_logprobs}
    _check_ppo(given, mask, clip_range, value_clip_range, entropy_coef, kl_coef)
    if denominator is None:
        denominator = mask.sum()
        _require(bool(denominator > 0), "no token counts: give the denominator of the whole optimizer step")

    logprobs, old_logprobs = _counted(logprobs, mask), _counted(old_logprobs.detach(), mask)
    advantages = _counted(advantages.detach(), mask)
    # Above 88 exp is inf in float32, and the gradient of the clipped branch would be 0 * inf.
    log_ratio = (logprobs - old_logprobs).clamp(max=80.0)
    ratio = log_ratio.exp()
    surrogate = ratio * advantages
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    loss = -torch.minimum(surrogate, clipped).sum() / denominator
    metrics = {
        "policy/loss": loss,
        "policy/clip_fraction": (clipped < surrogate).sum(dtype=ratio.dtype) / denominator,
        "policy/approx_kl": (log_ratio.expm1() - log_ratio).sum() / denominator,
        "policy/ratio_mean": _counted(ratio, mask).sum() / denominator,
        "policy/ratio_max": _counted(ratio, mask).amax(),
    }

    if values is not None and returns is not None:
        values, returns = _counted(values, mask), _counted(returns.detach(), mask)
        error = (values - returns).square()
        if value_clip_range is not None and old_values is not None:
            old_values = _counted(old_values.detach(), mask)
            move = values - old_values
            near = old_values + move.clamp(-value_clip_range, value_clip_range)
            # Within the range use the value itself: old + move is rounded, and would be counted as clipped.
            near = torch.where(move.abs() <= value_clip_range, values, near)
            clipped_error = (near - returns).square()
            metrics["value/clip_fraction"] = (clipped_error > error).sum(dtype=error.dtype) / denominator
            error = torch.maximum(error, clipped_error)
        metrics["value/loss"] = 0.5 * error.sum() / denominator
        loss = loss + value_coef * metrics["value/loss"]
    if entropy is not None:
        metrics["policy/entropy"] = _counted(entropy, mask).sum() / denominator
        loss = loss - entropy_coef * metrics["policy/entropy"] if entropy_coef else loss
    if ref_logprobs is not None:
        d = logprobs - _counted(ref_logprobs.detach(), mask)
        metrics["policy/ref_kl"] = (torch.expm1(-d) + d).sum() / denominator
        loss = loss + kl_coef * 0.5 * d.square().sum() / denominator if kl_coef else loss
    return loss, {name: metric.detach() for name, metric in metrics.items()}


# The checks of arguments, here and in the Triton versions.


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _checked_temperature(temperature: float) -> float:
    fits = LEAST_TEMPERATURE <= temperature < math.inf
    _require(fits, f"temperature must be a finite number of at least {LEAST_TEMPERATURE}, not {temperature}")
    return float(temperature)  # a tensor becomes a number, which passes no gradient


def _check_tokens(tokens: Tensor, mask: Tensor | None, shape: torch.Size) -> None:
    _require(tokens.shape == shape, f"tokens must have the rows' shape {tuple(shape)}, not {tuple(tokens.shape)}")
    if tokens.dtype != torch.int64:
        raise TypeError(f"tokens must be int64, not {tokens.dtype}")
    if mask is not None and (mask.shape != shape or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool of shape {tuple(shape)}, not {mask.dtype} of {tuple(mask.shape)}")


def _counted_rows(tokens: Tensor, mask: Tensor | None, vocabulary: int) -> Tensor:
    """Which rows count. Raises on a token that counts and is outside the vocabulary."""
    counted = tokens != IGNORED_TOKEN if mask is None else mask & (tokens != IGNORED_TOKEN)
    outside = tokens[counted & ((tokens < 0) | (tokens >= vocabulary))].tolist()
    if outside:
        raise ValueError(
            f"token {outside[0]} is outside the vocabulary [0, {vocabulary}): mask the row, or give it {IGNORED_TOKEN}"
        )
    return counted


def _check_linear(hidden: Tensor, weight: Tensor) -> None:
    fits = weight.dim() == 2 and weight.shape[-1] == hidden.shape[-1]
    _require(fits, f"weight must be [V, {hidden.shape[-1]}] for this hidden, not {tuple(weight.shape)}")


def _check_gae(rewards: Tensor, last_values: Tensor | None, **others: Tensor | None) -> None:
    _require(rewards.dim() == 2, f"rewards must have two dimensions, not the shape {tuple(rewards.shape)}")
    shape, rows = rewards.shape, rewards.shape[:1]
    for name, x in others.items():
        _require(x is None or x.shape == shape, f"{name} must have rewards' shape {tuple(shape)}")
        if name in ("ends", "mask") and x is not None and x.dtype != torch.bool:
            raise TypeError(f"{name} must be bool, not {x.dtype}")
    _require(last_values is None or last_values.shape == rows, f"last_values must have the shape {tuple(rows)}")


def _check_ppo(
    given: dict[str, Tensor | None],
    mask: Tensor,
    clip_range: float,
    value_clip_range: float | None,
    entropy_coef: float,
    kl_coef: float,
) -> None:
    for name, x in given.items():
        _require(x is None or x.shape == mask.shape, f"{name} must have response_mask's shape {tuple(mask.shape)}")
    _require(mask.dtype == torch.bool, f"response_mask must be bool (True = counts), not {mask.dtype}")
    _require(clip_range > 0, f"clip_range must be above 0, not {clip_range}")
    values, old_values = given["values"], given["old_values"]
    _require((values is None) == (given["returns"] is None), "values and returns go together: give both or neither")
    _require(value_clip_range is None or old_values is not None, "value_clip_range needs old_values")
    _require(old_values is None or values is not None, "old_values needs values and returns")
    _require(entropy_coef == 0 or given["entropy"] is not None, "entropy_coef needs entropy")
    _require(kl_coef == 0 or given["ref_logprobs"] is not None, "kl_coef needs ref_logprobs")
