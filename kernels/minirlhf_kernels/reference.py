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

from minirlhf_kernels.checks import (
    IGNORED_TOKEN,
    check_gae,
    check_linear,
    check_ppo,
    check_tokens,
    checked_temperature,
    chosen,
    counted_rows,
    product_dtype,
    without_autocast,
)

__all__ = ["IGNORED_TOKEN", "gae", "linear_token_logprobs", "ppo_loss", "token_logprobs"]


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
    temperature = checked_temperature(temperature)
    check_tokens(tokens, mask, logits.shape[:-1])
    counted = counted_rows(tokens, mask, logits.shape[-1])
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
    as `token_logprobs` does, with the same masks and the same errors. Under autocast both are cast to its type first.

    >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 5.0], [0.0, 7.0]])
    >>> linear_token_logprobs(hidden, weight, torch.tensor([0]))
    tensor([-0.1269])
    """
    check_linear(hidden, weight)
    check_tokens(tokens, mask, hidden.shape[:-1])
    counted, dtype = counted_rows(tokens, mask, len(weight)), product_dtype(hidden, weight)
    hidden, weight = _counted(hidden.to(dtype), counted.unsqueeze(-1)), weight.to(dtype)
    with without_autocast(hidden.device.type):
        logits = hidden @ weight.to(hidden.dtype).T
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

    rewards, values and ends (bool) are [N, T], and so are both results. Data stored as [T, N], as a vectorised
    environment fills it, goes in as the view `x.t()`: any strides work, the results have the same layout, and in Triton
    the view costs no copy. Rows packed from several sequences need nothing else: `ends` is
    True on the last token of each. `ends[t]` says that the episode ends with step t, terminated or truncated: nothing
    flows back over it. The value after an end is `truncated_values[t]` (same shape, read only where ends is True: the
    value of a truncated episode's last observation, 0 for a terminated one), or 0 without it. The value after the last
    column is `last_values` [N], or 0.
    Where `mask` is False both results are 0 and nothing leaks out (NaN may lie there); the value after the last counted
    step before such a slot is 0 too. No gradient flows. Raises ValueError or TypeError for wrong shapes or types.

    >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]])
    >>> gae(rewards, values, torch.tensor([[False, True]]), gamma=1.0, lam=0.5)
    (tensor([[0.2500, 0.5000]]), tensor([[0.7500, 1.0000]]))
    """
    check_gae(rewards, last_values, values=values, ends=ends, truncated_values=truncated_values, mask=mask)
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
    clip_range_high: float | None = None,
    value_clip_range: float | None = None,
    value_coef: float = 0.5,
    entropy_coef: float = 0.0,
    kl_coef: float = 0.0,
    kl_estimator: str = "k2",
    loss_agg_mode: str = "token-mean",
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's loss, to be minimised, and its metrics (Schulman et al. 2017, equations 7 and 9).

        policy    -min(r A, clip(r, 1 - clip_range, 1 + clip_range_high) A),       r = exp(logprobs - old_logprobs)
        value     1/2 (V - R)^2; with `value_clip_range` the larger of that and the same with V kept near old_values
        loss      policy + value_coef value - entropy_coef entropy + kl_coef KL

    Each term is summed over the tokens where response_mask is True and divided by `denominator`: the number of counted
    tokens of the WHOLE optimizer step (default: of this call), so that micro-batches add up to the same gradient.
    All tensors share one shape, [B, T] or any other; what lies under the mask, NaN too, changes nothing.
    Gradients flow into logprobs, values and entropy only.

    `clip_range_high` (default: clip_range) lets a ratio rise further than it may fall, "clip-higher" (DAPO).
    `loss_agg_mode="seq-mean-token-mean"` is GRPO's mean: each sequence (the last dimension) counts as much as any
    other, its terms are divided by the count of its own tokens, and `denominator` is the number of sequences in which a
    token counts. (For the sum of each sequence, averaged over sequences, pass their number with "token-mean".)
    `kl_estimator`, with d = logprobs - ref_logprobs, on samples of the policy:
        k2   d^2 / 2              its gradient is that of KL(policy || ref) at each token
        k3   exp(-d) - 1 + d      GRPO's: its mean is KL(policy || ref), its gradient that of KL(ref || policy)
    Both gradients stop at the token: what it does to the KL of later tokens only a KL in the reward can charge.

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
    check_ppo(given, mask, clip_range, clip_range_high, value_clip_range, entropy_coef, kl_coef)
    k3_loss, sequence_mean = chosen(kl_estimator, loss_agg_mode)
    if denominator is None:
        denominator = mask.any(-1).sum() if sequence_mean else mask.sum()
        if not bool(denominator > 0):
            raise ValueError("no token counts: give the denominator of the whole optimizer step")

    def total(x: Tensor) -> Tensor:
        return (x / mask.sum(-1, keepdim=True).clamp(min=1) if sequence_mean else x).sum()

    logprobs, old_logprobs = _counted(logprobs, mask), _counted(old_logprobs.detach(), mask)
    advantages = _counted(advantages.detach(), mask)
    # Above 88 exp is inf in float32, and the gradient of the clipped branch would be 0 * inf.
    log_ratio = (logprobs - old_logprobs).clamp(max=80.0)
    ratio = log_ratio.exp()
    surrogate = ratio * advantages
    high = clip_range if clip_range_high is None else clip_range_high
    clipped = ratio.clamp(1 - clip_range, 1 + high) * advantages
    loss = -total(torch.minimum(surrogate, clipped)) / denominator
    metrics = {
        "policy/loss": loss,
        "policy/clip_fraction": total((clipped < surrogate).to(ratio.dtype)) / denominator,
        "policy/approx_kl": total(log_ratio.expm1() - log_ratio) / denominator,
        "policy/ratio_mean": total(_counted(ratio, mask)) / denominator,
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
            metrics["value/clip_fraction"] = total((clipped_error > error).to(error.dtype)) / denominator
            error = torch.maximum(error, clipped_error)
        metrics["value/loss"] = 0.5 * total(error) / denominator
        loss = loss + value_coef * metrics["value/loss"]
    if entropy is not None:
        metrics["policy/entropy"] = total(_counted(entropy, mask)) / denominator
        loss = loss - entropy_coef * metrics["policy/entropy"] if entropy_coef else loss
    if ref_logprobs is not None:
        d = logprobs - _counted(ref_logprobs.detach(), mask)
        k3 = torch.expm1(-d) + d
        metrics["policy/ref_kl"] = total(k3) / denominator
        kl_sum = total(k3) if k3_loss else 0.5 * total(d.square())
        loss = loss + kl_coef * kl_sum / denominator if kl_coef else loss
    return loss, {name: metric.detach() for name, metric in metrics.items()}
