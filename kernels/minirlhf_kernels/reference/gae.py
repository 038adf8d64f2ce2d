"""Generalised advantage estimation, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check(
    rewards: Tensor,
    values: Tensor,
    ends: Tensor,
    last_values: Tensor | None,
    truncated_values: Tensor | None,
    mask: Tensor | None,
) -> None:
    _require(rewards.dim() == 2, f"rewards must have two dimensions, not the shape {tuple(rewards.shape)}")
    same = {"values": values, "ends": ends, "truncated_values": truncated_values, "mask": mask}
    for name, x in same.items():
        _require(x is None or x.shape == rewards.shape, f"{name} must have rewards' shape {tuple(rewards.shape)}")
    rows = rewards.shape[:1]
    _require(last_values is None or last_values.shape == rows, f"last_values must have the shape {tuple(rows)}")
    for name, flags in {"ends": ends, "mask": mask}.items():
        if flags is not None and flags.dtype != torch.bool:
            raise TypeError(f"{name} must be bool, not {flags.dtype}")


def _double(steps: Tensor, decays: Tensor) -> None:
    """The recursion for few and long rows, in log2(T) rounds: sums over 1 step, 2, 4, ... joined pair by pair."""
    reach = 1
    while reach < len(steps):
        steps[:-reach] = torch.addcmul(steps[:-reach], decays[:-reach], steps[reach:])
        decays[:-reach] = decays[:-reach] * decays[reach:]
        reach *= 2


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

    rewards, values and ends (bool) are [N, T], and so are both results. Strides are honoured: what is kept as [T, N]
    goes in as `x.t()`, a view. `ends[t]` says that the episode ends with step t, terminated or truncated: nothing flows
    back over it. The value after an end is `truncated_values[t]` (same shape, read only where ends is True: the value
    of a truncated episode's last observation, 0 for a terminated one), or 0 without it. The value after the last column
    is `last_values` [N], or 0.
    Where `mask` is False both results are 0 and nothing leaks out (NaN may lie there); the value after the last counted
    step before such a slot is 0 too. No gradient flows. Raises ValueError or TypeError for wrong shapes or types.

    >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]])
    >>> gae(rewards, values, torch.tensor([[False, True]]), gamma=1.0, lam=0.5)
    (tensor([[0.2500, 0.5000]]), tensor([[0.7500, 1.0000]]))
    """
    _check(rewards, values, ends, last_values, truncated_values, mask)
    dtype = torch.promote_types(torch.promote_types(rewards.dtype, values.dtype), torch.float32)
    rewards, values, hears_next = rewards.to(dtype), values.to(dtype), ~ends
    if mask is not None:
        rewards, values, ends = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0), ends & mask
        hears_next &= mask
        hears_next[:, :-1].logical_and_(mask[:, 1:])
    next_values = torch.zeros_like(values)
    next_values[:, :-1] = values[:, 1:]
    if last_values is not None:
        next_values[:, -1:] = last_values.unsqueeze(1)
    next_values = torch.where(hears_next, next_values, 0.0)
    if truncated_values is not None:
        next_values = torch.where(ends, truncated_values.to(dtype), next_values)
    deltas = next_values.mul_(gamma).add_(rewards).sub_(values)

    # The recursion runs in place, over [T, N]. Only long rows are worth bringing into that order in memory.
    steps, decays = deltas.t(), hears_next.to(dtype).mul_(gamma * lam).t()
    if len(steps) > 128:
        steps, decays = steps.contiguous(), decays.contiguous()
    if steps.shape[1] <= 64 <= len(steps):
        _double(steps, decays)
    else:
        step, decay = steps.unbind(0), decays.unbind(0)
        for t in range(len(step) - 2, -1, -1):
            step[t].addcmul_(decay[t], step[t + 1])  # one fused operation a step
    advantages = steps.t().contiguous()
    return advantages, advantages + values
