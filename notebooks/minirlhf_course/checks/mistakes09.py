"""Wrong answers to the exercises of lesson 09, each with one mistake planted by name: the suspects of its checks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minirlhf.kl import kl_rewards
from minirlhf.returns import gae, whiten

Three = tuple[Tensor, Tensor, Tensor]


def planted(function: Callable[..., Any]) -> Callable[[str], Callable[..., Any]]:
    """function(bug, *arguments) as bug -> an answer to the exercise."""
    return lambda bug: partial(function, bug)


def last_column(mask: Tensor) -> Tensor:
    """[B, 1] column of the last True."""
    return torch.where(mask, torch.arange(mask.shape[1]), -1).amax(1, keepdim=True)


def scaled(x: Tensor, mask: Tensor, correction: int = 0, keep: bool = False) -> Tensor:
    """x scaled over what counts, its mean removed or kept; the variance divides by n - correction."""
    mean = x[mask].mean()
    variance = (x[mask] - mean).square().sum() / (mask.sum() - correction)
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, white + mean if keep else white, 0.0)


@planted
def mask_with(bug: str, tokens: Tensor, eos_id: int) -> Tensor:
    """Exercise 9.1 with one mistake planted."""
    is_eos = tokens == eos_id
    if bug == "ones":
        return torch.ones_like(is_eos)
    if bug == "not eos":
        return ~is_eos
    if bug == "eos alone":
        return is_eos
    ended = is_eos.long().cumsum(1) > 0
    before = is_eos.long().cumsum(1) - is_eos.long() > 0
    if bug == "turned":
        return before
    if bug == "after":
        return ended
    if bug == "one more":
        return torch.cat((torch.zeros_like(before[:, :1]), before[:, :-1]), 1).logical_not()
    if bug == "first row":
        return ~before[:1].expand_as(before)
    if bug == "no eos":
        return is_eos.long().cumsum(1) == 0
    if bug == "padding":
        return tokens != 0
    if bug == "last":
        columns = torch.arange(tokens.shape[1])
        last = torch.where(is_eos, columns, -1).amax(1, keepdim=True)
        return (columns <= last) | (last < 0)
    if bug == "argmax":
        return torch.arange(tokens.shape[1]) <= is_eos.int().argmax(1, keepdim=True)
    if bug == "unended":
        return (is_eos.long().cumsum(1) - is_eos.long() == 0) & is_eos.any(1, keepdim=True)
    return is_eos.long().cumsum(1) <= 1  # "late": all up to the second


@planted
def rewards_with(bug: str, scores: Tensor, logprobs: Tensor, ref: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Exercise 9.2 with one mistake planted."""
    logprobs, ref, last = logprobs if bug == "graph" else logprobs.detach(), ref.detach(), last_column(mask)
    d = torch.where(mask, logprobs - ref, 0.0)
    if bug == "padding":
        d = logprobs - ref
    if bug == "product":
        d = (logprobs - ref) * mask
    count = mask.sum(1)
    if bug == "mean":
        d = d / count[:, None]
    if bug == "last kl":
        d = torch.where(torch.arange(mask.shape[1]) == last, d, 0.0)
    if bug == "sum at last":
        d = torch.zeros_like(d).scatter(1, last, d.sum(1, keepdim=True))
    change = {
        "free": lambda: 0 * d,
        "k2": lambda: d.square() / 2,
        "k3": lambda: torch.expm1(-d) + d,
        "clamp": lambda: d.clamp(min=0),
        "absolute": lambda: d.abs(),
        "ratio": lambda: d.expm1(),
        "probabilities": lambda: torch.where(mask, logprobs.exp() - ref.exp(), 0.0),
    }.get(bug)
    if change is not None:
        d = change()
    sign = 1.0 if bug == "sign" else -1.0
    rewards = sign * (1.0 if bug == "beta" else beta) * d
    paid = scores.detach().unsqueeze(1)
    if bug == "twice":
        paid = paid - beta * d.sum(1, keepdim=True)
    if bug == "score":
        paid = torch.zeros_like(paid)
    if bug == "minus score":
        paid = -paid
    if bug == "to go":
        return torch.where(mask, rewards.scatter_add(1, last, paid).flip(1).cumsum(1).flip(1), 0.0)
    if bug == "score by length":
        paid = paid / count[:, None]
    if bug == "beta score":
        paid = beta * paid
    if bug == "spread":
        return rewards + torch.where(mask, paid / count[:, None], 0.0)
    if bug.startswith("white"):
        return scaled(rewards.scatter_add(1, last, paid), mask, 1 if "n - 1" in bug else 0, keep="kept" in bug)
    if bug == "every":
        return rewards + torch.where(mask, paid, 0.0)
    if bug == "assign":
        return rewards.scatter(1, last, paid)
    if bug == "last column":
        last = torch.full_like(last, mask.shape[1] - 1)
    if bug == "early":
        last = (last - 1).clamp(min=0)
    if bug == "first":
        last = torch.zeros_like(last)
    return rewards.scatter_add(1, last, paid)


@planted
def experience_with(
    bug: str,
    scores: Tensor,
    logprobs: Tensor,
    ref: Tensor,
    values: Tensor,
    mask: Tensor,
    beta: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Exercise 9.3 with one mistake planted."""
    if bug == "twice":
        scores = scores - beta * torch.where(mask, logprobs - ref, 0.0).sum(1)
    if bug == "free":
        ref = logprobs
    if bug == "kl sign":
        logprobs, ref = ref, logprobs
    if bug == "early":
        rewards = kl_rewards(torch.zeros_like(scores), logprobs, ref, mask, beta)
        rewards = rewards.scatter_add(1, (last_column(mask) - 1).clamp(min=0), scores.unsqueeze(1))
    else:
        rewards = kl_rewards(scores, logprobs, ref, mask, beta)
    ends = torch.zeros_like(mask).scatter(1, last_column(mask), True)
    if bug.startswith("white rewards"):
        rewards = scaled(rewards, mask, 1 if "trl" in bug else 0, keep="kept" in bug)
    if bug == "padding":
        raw, _ = gae(rewards, values, torch.zeros_like(mask), gamma=1.0, lam=lam)
        raw = torch.where(mask, raw, 0.0)
    elif bug == "reward minus value":
        raw = torch.where(mask, rewards - values, 0.0)
    else:
        gamma, lam = 0.99 if bug == "gamma" else 1.0, {"lam": 1.0, "one step": 0.0}.get(bug, lam)
        raw, _ = gae(rewards, values, ends, gamma=gamma, lam=lam, mask=mask)
    white = raw if bug == "raw" else whiten(raw) if bug == "over padding" else whiten(raw, mask)
    if bug in ("n - 1", "white rewards, trl, kept"):
        white = scaled(raw, mask, 1)
    if bug == "mean kept":
        white = scaled(raw, mask, keep=True)
    if bug == "centred":
        white = torch.where(mask, raw - raw[mask].mean(), 0.0)
    if bug == "each row":
        white = torch.cat([scaled(x[None], m[None]) for x, m in zip(raw, mask, strict=True)])
    if bug == "over padding":
        white = torch.where(mask, white, 0.0)
    if bug == "into padding":
        white = whiten(raw)
    targets = white if bug == "whitened targets" else raw
    returns = targets + values if bug == "values of padding" else torch.where(mask, targets + values, 0.0)
    if bug == "white returns":
        returns = whiten(returns, mask)
    if bug == "sums":
        returns = torch.where(mask, rewards.flip(1).cumsum(1).flip(1), 0.0)
    if bug == "raw twice":
        returns = raw
    if bug == "minus":
        returns = torch.where(mask, raw - values, 0.0)
    return white, rewards if bug == "rewards" else returns


@planted
def estimates_with(bug: str, logprobs: Tensor, ref: Tensor) -> Three:
    """Exercise 9.4 with one mistake planted."""
    d = ref - logprobs if bug == "reversed" else logprobs - ref
    k1, k2, k3 = d, d.square() / 2, torch.expm1(-d) + d
    if bug == "digits":
        k3 = ((-d).exp() - 1) + d
    if bug == "k3 reversed":
        k3 = torch.expm1(d) - d
    if bug == "limited":
        d = d.clamp(-10, 10)
        k1, k2, k3 = d, d.square() / 2, torch.expm1(-d) + d
    if bug == "k1 at 0":
        k1 = d.clamp(min=0)
    if bug == "k1 turned":
        k1 = -d
    if bug == "not squared":
        k2 = d / 2
    if bug == "k3 without d":
        k3 = torch.expm1(-d)
    if bug == "k3 minus d":
        k3 = torch.expm1(-d) - d
    if bug == "weighed":
        k1 = d.exp() * d
    if bug == "expected":
        k1 = logprobs.exp() * d
    if bug == "half":
        k2 = d.square()
    if bug == "falls through":
        k3 = k1
    if bug == "no graph":
        return k1.detach(), k2.detach(), k3.detach()
    if bug == "absolute":
        k1 = d.abs()
    return k1, k2, k3


@planted
def ptx_with(bug: str, loss: Tensor, corpus_logprobs: Tensor, ptx_coef: float) -> Tensor:
    """Exercise 9.5 with one mistake planted."""
    if bug == "sign":
        return loss + ptx_coef * corpus_logprobs.mean()
    if bug == "sum":
        return loss - ptx_coef * corpus_logprobs.sum()
    if bug == "mixture":
        return (1 - ptx_coef) * loss - ptx_coef * corpus_logprobs.mean()
    if bug == "coefficient":
        return ptx_coef * loss - corpus_logprobs.mean()
    if bug == "missing":
        return loss - corpus_logprobs.mean()
    if bug == "probabilities":
        return loss - ptx_coef * corpus_logprobs.exp().mean()
    if bug == "detached":
        return loss - ptx_coef * corpus_logprobs.detach().mean()
    nll = -corpus_logprobs.mean()
    return {
        "rows": loss - ptx_coef * corpus_logprobs.sum(1).mean(),
        "perplexity": loss + ptx_coef * nll.exp(),
        "share": (loss + ptx_coef * nll) / (1 + ptx_coef),
        "turned": -(loss + ptx_coef * nll),
        "ppo turned": ptx_coef * nll - loss,
        "product": loss * ptx_coef * nll,
        "alone": ptx_coef * nll,
    }[bug]
