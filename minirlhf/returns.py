"""From rewards to returns and advantages, and the masked statistics that go with them.

Every estimate here is one recursion with different settings. With delta_t = r_t + gamma V(s_{t+1}) - V(s_t):

    td_errors            A_t = delta_t                                  lam = 0
    n_step_advantages    A_t = sum over k < n of gamma^k delta_{t+k}
    gae                  A_t = delta_t + gamma lam A_{t+1}
    discounted_returns   G_t = r_t + gamma G_{t+1}                      lam = 1 and V = 0

Layout: [N, T]; pass a [T, N] tensor as `x.t()`, a view. `ends` (bool) marks the last step of an episode, terminated or
truncated. Masks are True where a step counts; masked values, even NaN, change nothing.
"""

from __future__ import annotations

import torch
from minirlhf_kernels import gae
from torch import Tensor

__all__ = [
    "discounted_returns",
    "explained_variance",
    "gae",
    "masked_mean",
    "masked_sum",
    "masked_var",
    "n_step_advantages",
    "td_errors",
    "whiten",
]


def discounted_returns(
    rewards: Tensor,
    ends: Tensor,
    gamma: float,
    *,
    last_values: Tensor | None = None,
    truncated_values: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The return G_t = r_t + gamma r_{t+1} + ... up to the end of the episode (Sutton & Barto, equation 3.8).

    Shapes and optional tensors are as in `gae`. Without them, an episode that is truncated, or cut off by the last
    column, is worth 0 from there on; `last_values` and `truncated_values` bootstrap from a value instead.

    >>> discounted_returns(torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[False, True, False]]), 0.5)
    tensor([[1.5000, 1.0000, 1.0000]])
    """
    options = {"last_values": last_values, "truncated_values": truncated_values, "mask": mask}
    return gae(rewards, torch.zeros_like(rewards), ends, gamma=gamma, lam=1.0, **options)[0]


def td_errors(
    rewards: Tensor,
    values: Tensor,
    ends: Tensor,
    gamma: float,
    *,
    last_values: Tensor | None = None,
    truncated_values: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The one-step errors delta_t = r_t + gamma V(s_{t+1}) - V(s_t) (Sutton & Barto, equation 6.5), shapes as in `gae`.

    >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]])
    >>> td_errors(rewards, values, torch.tensor([[False, True]]), gamma=1.0)
    tensor([[0.0000, 0.5000]])
    """
    options = {"last_values": last_values, "truncated_values": truncated_values, "mask": mask}
    return gae(rewards, values, ends, gamma=gamma, lam=0.0, **options)[0]


def n_step_advantages(
    rewards: Tensor,
    values: Tensor,
    ends: Tensor,
    gamma: float,
    n: int,
    *,
    last_values: Tensor | None = None,
    truncated_values: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """n-step advantages: r_t + ... + gamma^n V(s_{t+n}) - V(s_t) (Sutton & Barto, equation 7.1).

    Fewer rewards are left at the end of an episode or the buffer. n = 1 gives `td_errors`; n >= T gives G - V.
    Shapes as in `gae`. Raises ValueError for n < 1.

    >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]])
    >>> n_step_advantages(rewards, values, torch.tensor([[False, True]]), gamma=1.0, n=2)
    tensor([[0.5000, 0.5000]])
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    options = {"last_values": last_values, "truncated_values": truncated_values, "mask": mask}
    deltas = td_errors(rewards, values, ends, gamma, **options)
    hears_next = ~ends if mask is None else ~ends & mask
    decay = gamma * hears_next[:, :-1].to(deltas.dtype)
    advantages = deltas.clone()
    for _ in range(min(n, deltas.shape[1]) - 1):
        # From k steps to k + 1: the error of this step, then the k-step estimate of the next one.
        advantages[:, :-1] = deltas[:, :-1] + decay * advantages[:, 1:]
    return advantages


def group_advantages(rewards: Tensor, *, leave_one_out: bool, divide_by_std: bool = False) -> Tensor:
    """How much better each of K answers is than the answers to the same prompt: rewards [N, K] give [N, K].

    The baseline is the mean of the other K - 1 (RLOO; Kool et al. 2019), so it is independent of the answer and leaves
    the mean gradient unchanged; or the mean of all K (GRPO; Shao et al. 2024), which is (K - 1) / K times that.
    `divide_by_std` divides by each row's standard deviation (Bessel's) + 1e-6, so that equal answers give 0: GRPO's
    weight for prompts whose answers hardly differ. Raises ValueError for K < 2.

    >>> group_advantages(torch.tensor([[1.0, 2.0, 6.0]]), leave_one_out=True)
    tensor([[-3.0000, -1.5000,  4.5000]])
    >>> group_advantages(torch.tensor([[1.0, 2.0, 6.0]]), leave_one_out=False)
    tensor([[-2., -1.,  3.]])
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [N, K], a row per prompt with K >= 2 answers, not {tuple(rewards.shape)}")
    k = rewards.shape[1]
    advantages = rewards - rewards.mean(1, keepdim=True)
    if leave_one_out:
        advantages = advantages * (k / (k - 1))
    return advantages / (rewards.std(1, keepdim=True) + 1e-6) if divide_by_std else advantages


def masked_sum(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """The sum of x where mask is True, over all dimensions or over `dim`. x and mask [...].

    >>> masked_sum(torch.tensor([1.0, float("nan")]), torch.tensor([True, False]))
    tensor(1.)
    """
    if x.shape != mask.shape or mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool of shape {tuple(x.shape)}, not {mask.dtype} of {tuple(mask.shape)}")
    return torch.where(mask, x, 0).sum(dim)  # where, and not x * mask: 0 * NaN is NaN


def _counts(mask: Tensor, at_least: int, dim: int | tuple[int, ...] | None) -> Tensor:
    counts = mask.sum(dim)
    if bool((counts < at_least).any()):
        raise ValueError(f"the mask counts {int(counts.min())} values, but at least {at_least} are needed")
    return counts


def masked_mean(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """The mean of x where mask is True. Raises ValueError if there is no such value.

    >>> masked_mean(torch.tensor([1.0, 3.0, 100.0]), torch.tensor([True, True, False]))
    tensor(2.)
    """
    return masked_sum(x, mask, dim) / _counts(mask, 1, dim)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """The biased variance (divided by the count) of x where mask is True. Raises ValueError if nothing counts.

    >>> masked_var(torch.tensor([1.0, 3.0, 100.0]), torch.tensor([True, True, False]))
    tensor(1.)
    """
    x = torch.where(mask, x, 0)  # before the square, whose gradient would be 0 * NaN
    return masked_mean((x - masked_mean(x, mask)).square(), mask)


def whiten(x: Tensor, mask: Tensor | None = None, shift_mean: bool = True) -> Tensor:
    """x scaled to variance 1 over the entries that count; shift_mean=True REMOVES the mean, False keeps it.

    x and mask [...] (default: everything counts); masked entries become 0. The variance is the biased one, with 1e-8
    added. Raises ValueError with fewer than two counted values. (Ziegler et al. 2019's code.)

    >>> whiten(torch.tensor([1.0, 3.0]))
    tensor([-1.,  1.])
    >>> whiten(torch.tensor([1.0, 3.0]), shift_mean=False)
    tensor([1., 3.])
    """
    if mask is None:
        mask = torch.ones_like(x, dtype=torch.bool)
    _counts(mask, 2, None)
    x = torch.where(mask, x, 0)
    mean = masked_mean(x, mask)
    whitened = (x - mean) * torch.rsqrt(masked_var(x, mask) + 1e-8)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor | None = None) -> Tensor:
    """The share of the returns' variance that the values explain: 1 - Var(returns - values) / Var(returns).

    1 is perfect, 0 no better than a constant, below 0 worse; NaN where all returns are equal. Shapes [...].

    >>> explained_variance(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
    tensor(1.)
    """
    if mask is None:
        mask = torch.ones_like(returns, dtype=torch.bool)
    total = masked_var(returns, mask)
    return torch.where(total > 0, 1 - masked_var(returns - values, mask) / total, torch.nan)
