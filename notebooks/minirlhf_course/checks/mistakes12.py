"""Wrong answers to the exercises of lesson 12, each with one mistake planted by name: the suspects of its checks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minirlhf.kl import kl_k1, kl_k2, kl_k3


def planted(function: Callable[..., Any]) -> Callable[[str], Callable[..., Any]]:
    """function(bug, *arguments) as bug -> an answer to the exercise."""
    return lambda bug: partial(function, bug)


@planted
def left_out_with(bug: str, rewards: Tensor) -> Tensor:
    """Exercise 12.1 with one mistake planted."""
    k, total = rewards.shape[1], rewards.sum(1, keepdim=True)
    others = (total - rewards) / (k - 1)
    if bug == "own":
        return rewards - total / k
    if bug == "divided by k":
        return rewards - (total - rewards) / k
    if bug == "sum":
        return rewards - (total - rewards)
    if bug == "baseline":
        return others
    if bug == "sign":
        return others - rewards
    if bug == "factor":
        return (rewards - total / k) * (k - 1) / k
    if bug == "batch":
        return rewards - rewards.mean()
    if bug == "batch, left out":
        return rewards - (rewards.sum() - rewards) / (rewards.numel() - 1)
    if bug == "columns":
        return rewards - rewards.mean(0, keepdim=True)
    if bug == "raw":
        return rewards.clone()
    if bug == "std":
        return (rewards - others) / (rewards.std(1, keepdim=True) + 1e-6)
    if bug == "grpo":
        return (rewards - total / k) / (rewards.std(1, keepdim=True) + 1e-6)
    best = torch.stack([torch.cat((rewards[:, :i], rewards[:, i + 1 :]), 1).amax(1) for i in range(k)], 1)
    if bug == "best":
        return rewards - best
    if bug == "neighbour":
        return rewards - rewards.roll(1, 1)
    raise ValueError(bug)


@planted
def group_with(bug: str, rewards: Tensor) -> Tensor:
    """Exercise 12.3 with one mistake planted."""
    k = rewards.shape[1]
    above = rewards - rewards.mean(1, keepdim=True)
    std = rewards.std(1, keepdim=True)
    if bug == "nan":
        return above / std
    if bug == "population":
        return above / (rewards.std(1, keepdim=True, correction=0) + 1e-6)
    if bug == "left out":
        return above * k / (k - 1) / (std + 1e-6)
    if bug == "centred":
        return above
    if bug == "variance":
        return above / (std.square() + 1e-6)
    if bug == "times":
        return above * std
    if bug == "raw":
        return rewards / (std + 1e-6)
    if bug == "batch std":
        return above / (rewards.std() + 1e-6)
    if bug == "batch":
        return (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    if bug == "columns":
        return (rewards - rewards.mean(0)) / (rewards.std(0) + 1e-6)
    if bug == "at least 1":
        return above / std.clamp(min=1)
    if bug == "one more":
        return above / (std + 1)
    if bug == "sign":
        return -above / (std + 1e-6)
    if bug == "range":
        return above / (rewards.amax(1, keepdim=True) - rewards.amin(1, keepdim=True) + 1e-6)
    raise ValueError(bug)


@planted
def loss_with(
    bug: str,
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    beta: float,
) -> Tensor:
    """Exercise 12.4 with one mistake planted; "" is none."""
    counts = response_mask.sum(1)
    ref = old_logprobs if bug == "old for reference" else ref_logprobs
    ratio = (logprobs - old_logprobs).exp()
    if bug == "turned":
        ratio = (old_logprobs - logprobs).exp()
    if bug == "no ratio":
        ratio = logprobs
    if bug == "probability":
        ratio = logprobs.exp()
    if bug == "ratio of one":
        ratio = (logprobs - logprobs).exp()
    kl = kl_k3(logprobs, ref)
    kl = {"k1": kl_k1(logprobs, ref), "k2": kl_k2(logprobs, ref), "kl turned": kl_k3(ref, logprobs)}.get(bug, kl)
    if bug == "detached":
        kl = kl.detach()
    gain = ratio * advantages[:, None]
    if bug == "free":
        kl = torch.zeros_like(kl)
    if bug == "sign":
        gain = -gain
    if bug == "kl sign":
        kl = -kl
    per_token = beta * kl - gain
    if bug == "beta":
        per_token = kl - gain
    if bug == "all turned":
        per_token = -per_token
    kept = torch.where(response_mask, per_token, 0.0)
    if bug == "padding":
        return per_token.mean()
    if bug == "padding counted":
        return kept.mean()
    if bug == "tokens":
        return kept.sum() / counts.sum()
    if bug == "sum":
        return kept.sum(1).mean()
    if bug == "sum of answers":
        return (kept.sum(1) / counts).sum()
    if bug == "all summed":
        return kept.sum()
    if bug == "kl summed":
        policy = (torch.where(response_mask, -gain, 0.0).sum(1) / counts).mean()
        return policy + beta * torch.where(response_mask, kl, 0.0).sum(1).mean()
    if bug == "kl over tokens":
        policy = (torch.where(response_mask, -gain, 0.0).sum(1) / counts).mean()
        return policy + beta * torch.where(response_mask, kl, 0.0).sum() / counts.sum()
    return (kept.sum(1) / counts).mean()
