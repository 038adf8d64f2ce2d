"""Lesson 13's cases, and its exercises with one mistake planted each: what the checks of lesson13.py run."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf_course.checks.cases import bools, generators, normal, row, tensor
from minirlhf_course.checks.exercise import Case

# 13.1 ----------------------------------------------------------------------------------------------------------------


def best_cases() -> list[Case]:
    half, third = math.log(1 / 2), math.log(1 / 3)
    cases = [
        Case("two answers, equally likely, one earns log 3", (row([half, half]), row([math.log(3), 0]), 1.0),
             row([0.75, 0.25]).log()),
        Case("beta 1/2: the same reward counts twice", (row([half, half]), row([math.log(3), 0]), 0.5),
             row([0.9, 0.1]).log()),
        Case("all answers earn the same", (row([math.log(0.2), math.log(0.8)]), row([3, 3]), 0.1),
             row([0.2, 0.8]).log()),
        Case("an unlikely answer earns log 4", (row([math.log(0.2), math.log(0.8)]), row([math.log(4), 0]), 1.0),
             row([half, half])),
        Case("a large reward, a small beta", (row([third] * 3), row([200, 200, 0]), 0.1),
             row([half, half, third - third - 2000 + half])),
        Case("two prompts, each with its own Z", (row([half, half], [half, half]), row([math.log(3), 0], [5, 5]), 1.0),
             row([math.log(0.75), math.log(0.25)], [half, half])),
    ]  # fmt: skip
    for (rows, answers), generator in zip(((1, 4), (3, 5), (6, 9)), generators(3), strict=True):
        ref = normal(generator, rows, answers).log_softmax(1)
        cases.append(
            Case(f"random, {rows} prompts with {answers} answers", (ref, normal(generator, rows, answers), 0.3))
        )
    return cases


def best_with(bug: str, ref_logprobs: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Exercise 13.1 with one mistake planted."""
    logits = {
        "times": ref_logprobs + beta * rewards,
        "no beta": ref_logprobs + rewards,
        "no reference": rewards / beta,
        "probabilities in": ref_logprobs.exp() + rewards / beta,
        "minus": ref_logprobs - rewards / beta,
        "beta of the reference": beta * ref_logprobs + rewards,
        "both divided": (ref_logprobs + rewards) / beta,
    }.get(bug, ref_logprobs + rewards / beta)
    if bug == "greedy":
        return F.one_hot(rewards.argmax(1), rewards.shape[1]).to(rewards.dtype).log()
    if bug == "no Z":
        return logits
    if bug == "Z of the batch":
        return logits - logits.flatten().logsumexp(0)
    if bug == "Z of the column":
        return logits.log_softmax(0)
    if bug == "Z added":
        return logits + logits.logsumexp(1, keepdim=True)
    if bug == "Z without the log":
        return logits - logits.exp().sum(1, keepdim=True)
    if bug == "overflow":
        weights = ref_logprobs.exp() * (rewards / beta).exp()
        return (weights / weights.sum(1, keepdim=True)).log()
    return logits.softmax(1) if bug == "probabilities out" else logits.log_softmax(1)


# 13.2 ----------------------------------------------------------------------------------------------------------------


def implicit_cases() -> list[Case]:
    cases = [
        Case("one token, twice as likely as to the reference", (row([-1]), row([-1 - math.log(2)]), bools([1]), 1.0),
             row(math.log(2))),
        Case("a prompt of one token, an answer of one", (row([-3, -1]), row([-1, -1.5]), bools([0, 1]), 1.0), row(0.5)),
        Case("two tokens of an answer", (row([-1, -2]), row([-2, -2.5]), bools([1, 1]), 0.1), row(0.15)),
        Case("an answer of one token, then padding", (row([-1, -7, -7]), row([-3, -1, -1]), bools([1, 0, 0]), 0.5),
             row(1)),
        Case("two answers of unlike length to one prompt",
             (row([-2, -1, -1, -1], [-2, -1, -9, -9]), row([-3, -2, -2, -2], [-3, -2, -4, -5]),
              bools([0, 1, 1, 1], [0, 1, 0, 0]), 0.1), row(0.3, 0.1)),
    ]  # fmt: skip
    for (rows, columns), generator in zip(((2, 4), (3, 9), (5, 12)), generators(3), strict=True):
        logprobs, ref = -normal(generator, 2, rows, columns).abs()
        start = torch.randint(0, columns // 2, (rows, 1), generator=generator)
        end = torch.randint(columns // 2, columns + 1, (rows, 1), generator=generator)
        place = torch.arange(columns)
        mask = (place >= start) & (place <= end)
        cases.append(Case(f"random, of shape {(rows, columns)}", (logprobs, ref, mask, 0.3)))
    return cases


def implicit_with(bug: str, logprobs: Tensor, ref_logprobs: Tensor, answer_mask: Tensor, beta: float) -> Tensor:
    """Exercise 13.2 with one mistake planted."""
    columns = torch.arange(answer_mask.shape[1])
    first = answer_mask.long().argmax(1, keepdim=True)
    last = torch.where(answer_mask, columns, -1).amax(1, keepdim=True)
    counts = {
        "prompt": columns <= last,
        "padding": columns >= first,
        "everything": torch.ones_like(answer_mask),
        "last token": columns == last,
        "EOS left out": answer_mask & (columns < last),
        "first token left out": answer_mask & (columns > first),
        "outside": ~answer_mask,
    }.get(bug, answer_mask)
    d = logprobs - ref_logprobs.detach()
    if bug == "no reference":
        d = logprobs
    if bug == "turned":
        d = -d
    if bug == "moving reference":
        d = logprobs - logprobs.detach()
    if bug == "added":
        d = logprobs + ref_logprobs
    if bug == "probabilities":
        d = logprobs.exp() - ref_logprobs.exp()
    if bug == "ratio":
        d = d.exp()
    if bug == "quotient":
        d = logprobs / ref_logprobs
    total = torch.where(counts, d, 0).sum(1)
    if bug == "mean":
        total = total / answer_mask.sum(1)
    if bug == "mean of columns":
        total = total / answer_mask.shape[1]
    if bug == "over beta":
        return total / beta
    if bug == "no beta":
        return total
    if bug == "batch":
        return beta * total.sum()
    return beta * (torch.where(counts, d, 0) if bug == "each token" else total)


# 13.3 ----------------------------------------------------------------------------------------------------------------


def dpo_cases() -> list[Case]:
    ln2 = math.log(2)

    def pair(*numbers: float) -> tuple[Tensor, ...]:
        return tuple(row(number) for number in numbers)

    cases = [
        Case("the policy is the reference", (*pair(-5, -3, -5, -3), 0.1), row(ln2)[0]),
        Case("the chosen answer became likelier by 2 log 3, beta 1/2", (*pair(-4 + 2 * math.log(3), -3, -4, -3), 0.5),
             row(4 / 3).log()[0]),
        Case("both less likely, the rejected one more so", (*pair(-9, -15, -6, -6), 1.0), F.softplus(row(-6))[0]),
        Case("the chosen answer is the less likely one, as to the reference", (*pair(-30, -10, -30, -10), 1.0),
             row(ln2)[0]),
        Case("far off", (tensor(-300), tensor(-10), tensor(-20), tensor(-30), 1.0), tensor(300.0)[0]),
        Case("two pairs", (row(-4, -9), row(-3, -15), row(-4, -6), row(-3, -6), 1.0),
             (row(ln2)[0] + F.softplus(row(-6))[0]) / 2),
    ]  # fmt: skip
    for size, generator in zip((2, 5, 17), generators(3), strict=True):
        cases.append(Case(f"random, {size} pairs", (*(-3 * normal(generator, 4, size).abs()).unbind(0), 0.5)))
    return cases


def dpo_with(
    bug: str, chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> Tensor:
    """Exercise 13.3 with one mistake planted."""
    won, lost = chosen - ref_chosen.detach(), rejected - ref_rejected.detach()
    if bug == "no reference":
        won, lost = chosen, rejected
    if bug == "reference added":
        won, lost = chosen + ref_chosen, rejected + ref_rejected
    if bug == "reference only":
        won, lost = ref_chosen - chosen.detach(), ref_rejected - rejected.detach()
    if bug == "moving reference":
        won, lost = chosen - chosen.detach(), rejected - rejected.detach()
    if bug == "ratios":
        won, lost = won.exp(), lost.exp()
    if bug == "rejected is held":
        lost = lost.detach()
    if bug == "swapped":
        won, lost = lost, won
    margin = {"no beta": 1.0, "over beta": 1 / beta}.get(bug, beta) * (won - lost)
    if bug == "beta outside":
        return -beta * F.logsigmoid(won - lost).mean()
    if bug == "unstable":
        return -margin.sigmoid().log().mean()
    if bug == "no log":
        return -margin.sigmoid().mean()
    if bug == "linear":
        return -margin.mean()
    if bug == "hinge":
        return (1 - margin).clamp(min=0).mean()
    if bug == "IPO":
        return (won - lost - 1 / (2 * beta)).square().mean()
    if bug == "alone":
        return -(F.logsigmoid(beta * won) + F.logsigmoid(-beta * lost)).mean()
    if bug == "mean first":
        return -F.logsigmoid(margin.mean())
    if bug == "all against all":
        return -F.logsigmoid(beta * (won[:, None] - lost)).mean()
    if bug == "each":
        return -F.logsigmoid(margin)
    total = F.logsigmoid(margin).sum() if bug == "sum" else F.logsigmoid(margin).mean()
    return total if bug == "sign" else -total
