"""Generalised advantage estimation, over whichever layout the caller keeps."""

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
    time_dim: int,
) -> None:
    _require(time_dim in (0, 1), f"time_dim must be 0 for [T, N] or 1 for [N, T], not {time_dim}")
    _require(rewards.dim() == 2, f"rewards must have two dimensions, not the shape {tuple(rewards.shape)}")
    same = {"values": values, "ends": ends, "truncated_values": truncated_values, "mask": mask}
    for name, x in same.items():
        _require(x is None or x.shape == rewards.shape, f"{name} must have rewards' shape {tuple(rewards.shape)}")
    rows = rewards.shape[1 - time_dim]
    _require(last_values is None or last_values.shape == (rows,), f"last_values must have the shape ({rows},)")
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
    time_dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, equation 16) and its returns.

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t),      A_t = delta_t + gamma lam A_{t+1},      returns = A + V

    rewards, values and ends (bool) are [N, T], or [T, N] with time_dim=0; so are both results. `ends[t]` says that the
    episode ends with step t, terminated or truncated: nothing flows back over it. The value after an end is
    `truncated_values[t]` (same shape, read only where ends is True: the value of a truncated episode's last
    observation, 0 for a terminated one), or 0 without it. The value after the last column is `last_values` [N], or 0.
    Where `mask` is False both results are 0 and nothing leaks out (NaN may lie there); the value after the last counted
    step before such a slot is 0 too. No gradient flows. Raises ValueError or TypeError for wrong shapes or types.

    >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]])
    >>> gae(rewards, values, torch.tensor([[False, True]]), gamma=1.0, lam=0.5)
    (tensor([[0.2500, 0.5000]]), tensor([[0.7500, 1.0000]]))
    """
    _check(rewards, values, ends, last_values, truncated_values, mask, time_dim)

    def at(x: Tensor, columns: slice) -> Tensor:
        return x[columns] if time_dim == 0 else x[:, columns]

    dtype = torch.promote_types(torch.promote_types(rewards.dtype, values.dtype), torch.float32)
    rewards, values, hears_next = rewards.to(dtype), values.to(dtype), ~ends
    if mask is not None:
        rewards, values, ends = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0), ends & mask
        hears_next &= mask
        at(hears_next, slice(-1)).logical_and_(at(mask, slice(1, None)))
    next_values = torch.zeros_like(values)
    at(next_values, slice(-1)).copy_(at(values, slice(1, None)))
    if last_values is not None:
        at(next_values, slice(-1, None)).copy_(last_values.unsqueeze(time_dim))
    next_values = torch.where(hears_next, next_values, 0.0)
    if truncated_values is not None:
        next_values = torch.where(ends, truncated_values.to(dtype), next_values)
    deltas = next_values.mul_(gamma).add_(rewards).sub_(values)

    # The recursion runs in place, over [T, N]. Only long rows are worth bringing into that order in memory.
    steps, decays = deltas.movedim(time_dim, 0), hears_next.to(dtype).mul_(gamma * lam).movedim(time_dim, 0)
    if len(steps) > 128:
        steps, decays = steps.contiguous(), decays.contiguous()
    if steps.shape[1] <= 64 <= len(steps):
        _double(steps, decays)
    else:
        step, decay = steps.unbind(0), decays.unbind(0)
        for t in range(len(step) - 2, -1, -1):
            step[t].addcmul_(decay[t], step[t + 1])  # one fused operation a step
    advantages = steps.movedim(0, time_dim).contiguous()
    return advantages, advantages + values


def gae_with_moments(
    rewards: Tensor,
    values: Tensor,
    ends: Tensor,
    *,
    gamma: float,
    lam: float,
    last_values: Tensor | None = None,
    truncated_values: Tensor | None = None,
    mask: Tensor | None = None,
    time_dim: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """`gae` and, from the same pass, what whitening needs: (advantages, returns, moments).

    moments [3] are the count, the mean and the biased variance of the advantages that count (all, without a mask).

    >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]])
    >>> gae_with_moments(rewards, values, torch.tensor([[False, True]]), gamma=1.0, lam=0.5)[2]
    tensor([2.0000, 0.3750, 0.0156])
    """
    options = {"last_values": last_values, "truncated_values": truncated_values, "mask": mask}
    advantages, returns = gae(rewards, values, ends, gamma=gamma, lam=lam, time_dim=time_dim, **options)
    counted = advantages if mask is None else advantages[mask]
    moments = torch.stack((advantages.new_tensor(counted.numel()), counted.mean(), counted.var(correction=0)))
    return advantages, returns, moments
