"""PPO's loss and every metric of a minibatch.

Losses are sums over counted tokens divided by a denominator that the caller may give, so that micro-batches add up.
Slots that do not count are set to 0 with `where` before any arithmetic: a mask applied by multiplication, or only at
the end, turns a NaN under it into a NaN loss or, through 0 * NaN in the backward, into NaN gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _counted(x: Tensor, mask: Tensor) -> Tensor:
    """x where it counts and 0 elsewhere; half precision is read as float32."""
    return torch.where(mask, x.to(torch.promote_types(x.dtype, torch.float32)), 0.0)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check(
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
        value     1/2 (V - R)^2; with `value_clip_range` the larger of that and the same with V kept near old_values
        loss      policy + value_coef value - entropy_coef entropy + kl_coef KL

    Each term is summed over the tokens where response_mask is True and divided by `denominator`: the number of counted
    tokens of the WHOLE optimizer step (default: of this call), so that micro-batches add up to the same gradient.
    All tensors share one shape, [B, T] or any other; what lies under the mask, NaN too, changes nothing.
    Gradients flow into logprobs, values and entropy only. The KL term is k2 = (logprobs - ref_logprobs)^2 / 2 whose
    gradient, on samples of the policy, is that of KL(policy || ref); k3's would be that of KL(ref || policy).

    Metrics (0-d, detached): policy/loss, policy/clip_fraction (tokens where the clip stops the gradient),
    policy/approx_kl (k3 of old against new), policy/ratio_mean, policy/ratio_max; value/loss with values and
    value/clip_fraction with value_clip_range; policy/entropy with entropy; policy/ref_kl (k3) with ref_logprobs.
    All but policy/ratio_max are sums over counted tokens divided by `denominator`, and so add up over micro-batches.
    Raises ValueError where a coefficient lacks its tensor, shapes differ, or no token counts and no denominator is
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
    _check(given, mask, clip_range, value_clip_range, entropy_coef, kl_coef)
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
            # Within reach the value itself: old + move is off by a rounding, and would be counted as clipped.
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
