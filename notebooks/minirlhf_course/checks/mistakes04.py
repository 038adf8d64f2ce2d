"""Lesson 04's cases, and its answers with one mistake planted: what its checks know by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minirlhf.returns import whiten as _whiten
from minirlhf_course.checks.cases import F64, SIZES, bools, flags, generators, normal, random_cases, tensor
from minirlhf_course.checks.exercise import Case

# 4.1 -----------------------------------------------------------------------------------------------------------------


def q_cases() -> list[Case]:
    cases = [
        Case("two equally likely actions", (tensor([1, 3]), tensor([0.5, 0.5])), tensor([-1.0, 1.0])),
        Case("probabilities 1/4 and 3/4", (tensor([1, 5]), tensor([0.25, 0.75])), tensor([-3.0, 1.0])),
    ]
    for (states, actions), generator in zip(((3, 2), (2, 4), (5, 3)), generators(3), strict=True):
        probabilities = normal(generator, states, actions).softmax(-1)
        cases.append(Case(f"random, {states} states", (normal(generator, states, actions), probabilities)))
    return cases


# Trajectories --------------------------------------------------------------------------------------------------------


def _trajectories(*rest: float) -> list[Case]:
    return random_cases(
        lambda g, size: (normal(g, *size), normal(g, *size), flags(g, *size), normal(g, size[0]), *rest)
    )


def _next_values(values: Tensor, last_values: Tensor) -> Tensor:
    return torch.cat((values[:, 1:], last_values[:, None]), 1)


# 4.2 -----------------------------------------------------------------------------------------------------------------


def n_step_cases() -> list[Case]:
    last = tensor(8)
    three = tensor([1, 1, 1]), tensor([2, 2, 2])
    cases = [
        Case("one step, n = 1", (tensor([1]), tensor([2]), bools([0]), last, 0.5, 1), tensor([3.0])),
        Case("one step that ends, n = 1", (tensor([1]), tensor([2]), bools([1]), last, 0.5, 1), tensor([-1.0])),
        Case("three steps, n = 2", (*three, bools([0, 0, 0]), last, 0.5, 2), tensor([0.0, 1.5, 3.0])),
        Case(
            "three steps, the second ends, n = 2", (*three, bools([0, 1, 0]), last, 0.5, 2), tensor([-0.5, -1.0, 3.0])
        ),
    ]
    return cases + _trajectories(0.9, 2) + _trajectories(0.9, 4)


def n_step_with(
    bug: str, rewards: Tensor, values: Tensor, ends: Tensor, last_values: Tensor, gamma: float, n: int
) -> Tensor:
    """Exercise 4.2 with one mistake planted."""
    n = {"too few": max(n - 1, 1), "too many": n + 1, "all": rewards.shape[1]}.get(bug, n)
    columns = rewards.shape[1]
    result = torch.zeros_like(rewards)
    extended = torch.cat((values, last_values[:, None]), 1)
    for row in range(len(rewards)):
        for t in range(columns):
            total, k = torch.zeros_like(rewards[0, 0]), t
            if bug == "whole windows" and t + n > columns:
                continue
            ended = False
            while k < min(t + n, columns):
                if bug == "reward lost" and ends[row, k]:
                    ended = True
                    break
                total = total + (1.0 if bug == "rewards" else gamma ** (k - t)) * rewards[row, k]
                k += 1
                seen = k - 2 if bug == "late" else k - 1
                ended = seen >= t and bool(ends[row, seen])
                if ended and bug != "crosses":
                    break
            if (not ended or bug in ("crosses", "end")) and not (bug == "no value" or (bug == "last" and k == columns)):
                steps = n if bug == "gamma n" else k - t
                power = 1.0 if bug == "no discount" else gamma if bug == "one gamma" else gamma**steps
                total = total + power * extended[row, k - 1 if bug == "early value" else k]
            result[row, t] = total if bug == "target" else total - values[row, t]
    return result


def n_step_cut_late(rewards: Tensor, values: Tensor, ends: Tensor, last_values: Tensor, gamma: float, n: int) -> Tensor:
    """The n-step advantage from TD errors, each multiplied by the flag of the step after it."""
    deltas = rewards + gamma * _next_values(values, last_values) * ~ends - values
    nothing = torch.zeros_like(deltas[:, :1])
    late = torch.cat((ends[:, 1:], torch.zeros_like(ends[:, :1])), 1)
    result = deltas
    for _ in range(n - 1):
        result = deltas + gamma * torch.cat((result[:, 1:], nothing), 1) * ~late
    return result


# 4.3 -----------------------------------------------------------------------------------------------------------------


def gae_cases() -> list[Case]:
    last, zero = tensor(8), tensor(0)
    two = tensor([1, 1]), tensor([2, 4])
    cases = [
        Case("one step that ends", (tensor([1]), tensor([2]), bools([1]), last, 0.5, 0.5), tensor([-1.0])),
        Case("one step in mid-episode", (tensor([1]), tensor([2]), bools([0]), last, 0.5, 0.5), tensor([3.0])),
        Case("two steps, the second ends", (*two, bools([0, 1]), zero, 0.5, 0.25), tensor([0.625, -3.0])),
        Case("two steps, the first ends", (*two, bools([1, 0]), last, 0.5, 0.25), tensor([-1.0, 1.0])),
    ]
    return cases + _trajectories(0.97, 0.9) + _trajectories(0.9, 0.0) + _trajectories(0.9, 1.0)


def gae_with(
    bug: str, rewards: Tensor, values: Tensor, ends: Tensor, last_values: Tensor, gamma: float, lam: float
) -> Tensor:
    """Exercise 4.3 with one mistake planted."""
    beyond = {"last": torch.zeros_like(last_values), "rolled": values[:, 0], "own last": values[:, -1]}
    next_values = _next_values(values, beyond.get(bug, last_values))
    if bug == "unshifted":
        next_values = values
    blank = torch.zeros_like(ends[:, :1])
    if bug == "flags early":
        ends = torch.cat((blank, ends[:, :-1]), 1)
    if bug == "flags late":
        ends = torch.cat((ends[:, 1:], blank), 1)
    if bug == "never ends":
        ends = torch.zeros_like(ends)
    inside = torch.ones_like(ends) if bug == "bootstrap" else ~ends
    deltas = (
        rewards + (lam if bug == "swapped" else 1.0 if bug == "no gamma" else gamma) * next_values * inside - values
    )
    if bug == "no V":
        deltas = deltas + values
    if bug == "reward lost":
        deltas = (rewards + gamma * next_values) * ~ends - values
    if bug == "lam in delta":
        deltas = rewards + gamma * lam * next_values * ~ends - values
    if bug == "sign":
        deltas = -deltas
    shifted = {"carry late": torch.cat((ends[:, 1:], blank), 1), "carry early": torch.cat((blank, ends[:, :-1]), 1)}
    cuts = shifted.get(bug, ends)
    decay = {"lam alone": lam, "gamma alone": gamma, "swapped": gamma * lam}.get(bug, gamma * lam)
    carry = torch.zeros_like(rewards[:, 0])
    result = torch.zeros_like(rewards)
    columns = range(rewards.shape[1])
    for t in columns if bug == "forwards" else reversed(columns):
        kept = carry if bug == "carry" else torch.where(cuts[:, t], 0, carry)
        carry = deltas[:, t] + (0.0 if bug == "deltas" else decay) * kept
        result[:, t] = carry
    if bug == "white":
        return _whiten(result) if result.numel() > 1 else torch.zeros_like(result)
    return result + values if bug == "targets" else result.flip(1) if bug == "flipped" else result


# 4.4 -----------------------------------------------------------------------------------------------------------------


def clock_cases() -> list[Case]:
    yes, no = bools([1]), bools([0])
    one = tensor([1]), tensor([2])
    three = tensor([1, 1, 1]), tensor([2, 4, 6])
    last = tensor(8)
    cases = [
        Case("one step that terminates", (*one, yes, no, tensor([6]), last, 0.5, 0.5), tensor([-1.0])),
        Case("one step that is truncated", (*one, no, yes, tensor([6]), last, 0.5, 0.5), tensor([2.0])),
        Case("one step in mid-episode", (*one, no, no, tensor([0]), last, 0.5, 0.5), tensor([3.0])),
        Case(
            "three steps, the first is truncated",
            (*three, bools([0, 0, 0]), bools([1, 0, 0]), tensor([8, 0, 0]), last, 0.5, 0.5),
            tensor([3.0, -0.25, -1.0]),
        ),
    ]
    return cases + random_cases(_ends_of_both_kinds)


def _ends_of_both_kinds(generator: torch.Generator, size: tuple[int, int]) -> tuple[Any, ...]:
    rewards, values, final = (normal(generator, *size) for _ in range(3))
    ends, clock = flags(generator, *size, share=0.5), flags(generator, *size, share=0.5)
    final = torch.where(ends, final, 0)
    return rewards, values, ends & ~clock, ends & clock, final, normal(generator, size[0]), 0.97, 0.9


def clock_with(
    bug: str,
    rewards: Tensor,
    values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    final_values: Tensor,
    last_values: Tensor,
    gamma: float,
    lam: float,
) -> Tensor:
    """Exercise 4.4 with one mistake planted."""
    nothing, ends = torch.zeros_like(values), terminated | truncated
    following = _next_values(values, torch.zeros_like(last_values) if bug == "last" else last_values)
    resets = {"reset": following, "ignored": following, "never cut": following, "own": values}
    after_clock = resets.get(bug, nothing if bug in ("clock ends", "kinds") else final_values)
    if bug == "no gamma":
        after_clock = final_values / gamma
    if bug == "on top":
        after_clock = final_values + following
    after_end = final_values if bug in ("death goes on", "kinds") else following if bug == "never cut" else nothing
    after = torch.where(truncated, after_clock, torch.where(terminated, after_end, following))
    if bug == "always last":
        after[:, -1] = last_values
    deltas = rewards + gamma * after - values
    never = torch.zeros_like(ends)
    chain = dict.fromkeys(("chain", "ignored", "on top"), terminated)
    cuts = (chain | {"death's chain": truncated, "never cut": never, "chains": never}).get(bug, ends)
    result, carry = torch.zeros_like(rewards), torch.zeros_like(last_values)
    for t in reversed(range(rewards.shape[1])):
        result[:, t] = carry = deltas[:, t] + gamma * lam * torch.where(cuts[:, t], 0, carry)
    return result + values if bug == "targets" else deltas if bug == "deltas" else result


# 4.5 -----------------------------------------------------------------------------------------------------------------


def target_cases() -> list[Case]:
    two = tensor([1, -3]), tensor([2, 4])
    cases = [
        Case("two advantages", two, (tensor([1.0, -1.0]), tensor([3.0, 1.0]))),
        Case("two rows", (tensor([0, 4], [2, 2]), tensor([1, 1], [1, 1])),
             (tensor([-(2**0.5), 2**0.5], [0.0, 0.0]), tensor([1.0, 5.0], [3.0, 3.0]))),
    ]  # fmt: skip
    for size, generator in zip(SIZES[1:], generators(len(SIZES) - 1), strict=True):
        x = 1 + 20 * normal(generator, *size)
        cases.append(Case(f"random, of shape {size}", (x, normal(generator, *size))))
    return cases


def row_whitened(x: Tensor) -> Tensor:
    return (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-8).sqrt()


# 4.6 -----------------------------------------------------------------------------------------------------------------


def scan_cases() -> list[Case]:
    cases = [
        Case("one column", (tensor([3]), tensor([0.5])), tensor([3.0])),
        Case("two columns", (tensor([1, 4]), tensor([0.5, 9])), tensor([3.0, 4.0])),
        Case("three columns", (tensor([1, 2, 4]), tensor([0.5, 0.25, 9])), tensor([2.5, 3.0, 4.0])),
    ]
    for size, generator in zip(((2, 5), (3, 8), (1, 13), (2, 256)), generators(4), strict=True):
        decays = torch.rand(size, generator=generator, dtype=F64) * ~flags(generator, *size, share=0.1)
        cases.append(Case(f"random, of shape {size}", (normal(generator, *size), decays)))
    return cases


def scan_with(bug: str, x: Tensor, decays: Tensor) -> Tensor:
    """Exercise 4.6 with one mistake planted."""
    if bug == "forwards":
        return scan_with("", x.flip(1), decays.flip(1)).flip(1)
    x, decays = x.clone(), decays.clone()
    reach = 1
    while reach < x.shape[1]:
        if "cut" in bug:
            decays[:, -reach:] = 0.0
        x = torch.cat((x[:, :-reach] + decays[:, :-reach] * x[:, reach:], x[:, -reach:]), 1)
        if bug != "decays":
            following = decays[:, :-reach] * decays[:, reach:]
            decays = torch.cat((following, decays[:, -reach:]), 1)
        reach = reach + 1 if "linear" in bug else 2 * reach
        if bug == "one round":
            break
    return x
