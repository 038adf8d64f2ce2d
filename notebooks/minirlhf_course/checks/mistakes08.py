"""Lesson 08's answers with one mistake planted: what its checks know by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# 8.1 -----------------------------------------------------------------------------------------------------------------


def pair_with(bug: str, chosen: Tensor, rejected: Tensor) -> Tensor:
    """Exercise 8.1 with one mistake planted."""
    difference = rejected - chosen if bug == "swapped" else chosen - rejected
    if bug == "unstable":
        return -difference.sigmoid().log().mean()
    if bug == "ratio":
        return -(chosen.exp() / (chosen.exp() + rejected.exp())).log().mean()
    if bug == "cut":
        return F.binary_cross_entropy(difference.sigmoid(), torch.ones_like(difference))
    if bug == "squares":
        return (1 - difference.sigmoid()).square().mean()
    if bug == "relu":
        return F.relu(-difference).mean()
    if bug == "crossed":
        return -F.logsigmoid(chosen[:, None] - rejected).mean()
    if bug == "to one":
        return (1 - difference).square().mean()
    if bug == "alone":
        return -(F.logsigmoid(chosen) + F.logsigmoid(-rejected)).mean()
    if bug == "mean first":
        return -F.logsigmoid(difference.mean())
    if bug == "no log":
        return -difference.sigmoid().mean()
    if bug == "one minus":
        return (1 - difference.sigmoid()).mean()
    if bug == "linear":
        return -difference.mean()
    if bug == "hinge":
        return (1 - difference).clamp(min=0).mean()
    if bug == "constant":
        return -F.logsigmoid(chosen - rejected.detach()).mean()
    if bug == "each":
        return -F.logsigmoid(difference)
    total = F.logsigmoid(difference)
    total = total.sum() if bug == "sum" else total.mean()
    return total if bug == "sign" else -total


# 8.2 -----------------------------------------------------------------------------------------------------------------


def ranking_with(bug: str, rewards: Tensor, scores: Tensor) -> Tensor:
    """Exercise 8.2 with one mistake planted."""
    k = rewards.shape[1]
    differences = rewards[:, :, None] - rewards[:, None, :]
    better = scores[:, :, None] > scores[:, None, :]
    upper = torch.ones(k, k, dtype=torch.bool).triu(1)
    if bug == "first is best":
        better = upper.expand_as(better)
    if bug == "ties count":
        better = better | ((scores[:, :, None] == scores[:, None, :]) & upper)
    if bug == "everybody":
        better = ~torch.eye(k, dtype=torch.bool).expand_as(better)
    if bug in ("neighbours", "ends"):
        order = scores.argsort(dim=1, descending=True, stable=True)
        rewards, scores = rewards.gather(1, order), scores.gather(1, order)
        differences = rewards[:, :, None] - rewards[:, None, :]
        better = scores[:, :, None] > scores[:, None, :]
        near = torch.ones(k, k, dtype=torch.bool).triu(1).tril(1)
        if bug == "ends":
            near = torch.zeros(k, k, dtype=torch.bool)
            near[0, -1] = True
        better = better & near
    if bug == "swapped":
        better = better.transpose(1, 2)
    if bug == "regression":
        return F.mse_loss(rewards, scores)
    if bug == "classes":
        return F.cross_entropy(rewards, scores.argmax(1))
    if bug == "ListNet":
        return -(scores.softmax(1) * rewards.log_softmax(1)).sum(1).mean()
    if bug == "half":
        halves = ((scores[:, :, None] - scores[:, None, :]).sign() + 1) / 2
        return F.binary_cross_entropy_with_logits(differences, halves)
    if bug.startswith("places"):
        ordered = rewards.gather(1, scores.argsort(dim=1, descending=True, stable=True))
        nll = (ordered.flip(1).logcumsumexp(1).flip(1) - ordered)[:, :-1]
        return nll.sum(1).mean() if bug == "places" else nll.mean()
    gap = torch.where(better, scores[:, :, None] - scores[:, None, :], 0)
    if bug == "margin":
        differences = differences - gap
    if bug == "best":
        best = scores == scores.amax(1, keepdim=True)
        better = better & best[:, :, None] & (best.cumsum(1) == 1)[:, :, None]
    if bug == "no log":
        logs = differences.sigmoid()
    elif bug == "hinge":
        logs = (differences - 1).clamp(max=0)
    elif bug == "unstable":
        logs = torch.where(better, differences, 0).sigmoid().log()
    else:
        logs = F.logsigmoid(differences)
    kept = torch.where(better, logs, 0)
    if bug.startswith("gaps"):
        kept = kept * gap
    counts = better.sum((1, 2))
    per_prompt = kept.sum((1, 2))
    choose = k * (k - 1) / 2
    prompts = (counts > 0).sum()
    if bug == "unweighted":
        loss = per_prompt.sum() / prompts
    elif bug == "twice":
        loss = (per_prompt / counts.clamp(min=1)).sum() / prompts / choose
    elif bug == "ties in C":
        loss = per_prompt.sum() / choose / prompts
    elif bug == "k squared":
        loss = kept.mean((1, 2)).sum() / prompts
    elif bug == "over pairs":
        loss = kept.sum() / counts.sum()
    elif bug == "tied prompts":
        loss = (per_prompt / counts.clamp(min=1)).mean()
    elif bug == "sum":
        loss = (per_prompt / counts.clamp(min=1)).sum()
    elif bug == "by K":
        loss = per_prompt.sum() / k / prompts
    elif bug == "gaps by gaps":
        loss = (per_prompt / gap.sum((1, 2)).clamp(min=1e-9)).sum() / prompts
    elif bug == "unguarded":
        loss = (per_prompt / counts).mean()
    else:
        loss = (per_prompt / counts.clamp(min=1)).sum() / prompts
    return loss if bug == "sign" else -loss


# 8.3 -----------------------------------------------------------------------------------------------------------------


def usable_with(bug: str, tokens: Tensor, scores: Tensor) -> Tensor:
    """Exercise 8.3 with one mistake planted."""
    better = scores[:, :, None] > scores[:, None, :]
    if bug == "ties":
        better = scores[:, :, None] >= scores[:, None, :]
    if bug == "upside down":
        better = better.transpose(1, 2)
    if bug == "either":
        better = scores[:, :, None] != scores[:, None, :]
    unequal = tokens[:, :, None] != tokens[:, None, :]
    if bug == "no scores":
        return unequal.any(-1)
    if bug == "upper":
        return (better & unequal.any(-1)).triu(1)
    if bug == "twins":
        alone = (~unequal.any(-1)).sum(2) == 1
        return better & alone[:, :, None] & alone[:, None, :]
    if bug == "sorted":
        ordered = tokens.sort(-1).values
        return better & (ordered[:, :, None] != ordered[:, None, :]).any(-1)
    if bug == "or":
        return better | unequal.any(-1)
    if bug == "same":
        return better & ~unequal.any(-1)
    if bug == "sums":
        return better & (tokens.sum(-1)[:, :, None] != tokens.sum(-1)[:, None, :])
    differ = {"all": unequal.all(-1), "first": unequal[..., 0], "last": unequal[..., -1]}.get(bug, unequal.any(-1))
    return better if bug == "truncated" else better & differ


# 8.4 -----------------------------------------------------------------------------------------------------------------


def last_with(bug: str, token_values: Tensor, mask: Tensor) -> Tensor:
    """Exercise 8.4 with one mistake planted."""
    columns = token_values.shape[1]
    rows = torch.arange(len(token_values))
    counts = mask.sum(1)
    if bug == "mean":
        return torch.where(mask, token_values, 0).sum(1) / counts
    if bug == "sum":
        return torch.where(mask, token_values, 0).sum(1)
    if bug == "lowest":
        return torch.where(mask, token_values, torch.inf).amin(1)
    if bug == "highest":
        return torch.where(mask, token_values, -torch.inf).amax(1)
    if bug == "multiplied":
        last = torch.where(mask, torch.arange(columns), -1).amax(1)
        return (token_values * F.one_hot(last, columns)).sum(1)
    last = torch.where(mask, torch.arange(columns), -1).amax(1)
    index = {
        "last column": torch.full_like(counts, columns - 1),
        "count": counts - 1,
        "first pad": (~mask).int().argmax(1) - 1,
        "one behind": (last + 1).clamp(max=columns - 1),
        "one before": (last - 1).clamp(min=0),
        "first": mask.int().argmax(1),
        "row's first": last[:1].expand_as(last),
    }[bug]
    return token_values[rows, index]


# 8.5 -----------------------------------------------------------------------------------------------------------------


def ceiling_with(bug: str, scores: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Exercise 8.5 with one mistake planted."""
    first = (scores[:, :, None] - scores[:, None, :]).sign()
    second = (others[:, :, None] - others[:, None, :]).sign()
    upper = torch.ones(scores.shape[1], scores.shape[1], dtype=torch.bool).triu(1)
    counted = {"diagonal": torch.ones_like(first, dtype=torch.bool), "ties": upper.expand_as(first)}.get(
        bug, (first != 0) & (second != 0) & upper
    )
    if bug == "one tie":
        counted = (first != 0) & upper
    if bug == "across":
        return ceiling_with("", scores.reshape(1, -1), others.reshape(1, -1))
    same = (first == second) & counted
    agreement = same.sum().double() / counted.sum()
    if bug == "of prompts":
        shares = same.sum((1, 2)).double() / counted.sum((1, 2)).clamp(min=1)
        agreement = shares[counted.any(2).any(1)].mean()
    if bug == "half ties":
        agreement = torch.where((first != 0) & (second != 0), same.double(), 0.5)[upper.expand_as(first)].mean()
    excess = (2 * agreement - 1).clamp(min=0)
    if bug == "chance":
        return agreement, 2 * agreement - 1
    if bug == "no half":
        return agreement, 1 + excess.sqrt()
    if bug == "abs":
        excess = (2 * agreement - 1).abs()
    if bug == "agreement":
        return agreement, agreement.clamp(min=0.5)
    if bug == "both":
        return agreement, agreement
    if bug == "root":
        return agreement, agreement.sqrt()
    if bug == "half way":
        return agreement, (1 + agreement) / 2
    if bug == "square":
        return agreement, agreement**2 + (1 - agreement) ** 2
    if bug == "minus":
        return agreement, (1 - excess.sqrt()) / 2
    if bug == "nan":
        excess = 2 * agreement - 1
    return agreement, (1 + excess.sqrt()) / 2


# 8.6 -----------------------------------------------------------------------------------------------------------------


def offset_with(bug: str, model: Callable[[Tensor], Tensor], rows: Tensor, batch_size: int) -> Tensor:
    """Exercise 8.6 with one mistake planted."""
    parts = [model(part) for part in rows.split(batch_size)]
    if bug == "reset":
        return parts[-1].mean()
    if bug == "first":
        return parts[0].mean()
    if bug == "all but first":
        return torch.cat(parts[1:] or parts).mean()
    if bug == "rows":
        return rows.mean()
    if bug == "mean of means":
        return torch.stack([part.mean() for part in parts]).mean()
    if bug == "dropped":
        whole = [part for part in parts if len(part) == batch_size] or parts
        return torch.cat(whole).mean()
    scores = torch.cat(parts)
    return {
        "sum": scores.sum(),
        "minus": -scores.mean(),
        "median": scores.median(),
        "batches": scores.sum() / len(parts),
        "as if full": scores.sum() / (len(parts) * batch_size),
        "highest": scores.max(),
    }[bug]
