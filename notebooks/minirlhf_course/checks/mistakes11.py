"""Lesson 11's cases, and its exercises with one mistake planted each: what the checks of lesson11.py run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minirlhf.intervals import CONFIDENCE, wilson
from minirlhf_course.checks.cases import generators, ids, normal, row
from minirlhf_course.checks.exercise import Case

# 11.1 ----------------------------------------------------------------------------------------------------------------


def wilson_rows(rate: Tensor, count: int) -> Tensor:
    return torch.stack((rate, *wilson(rate, count)))


def win_cases() -> list[Case]:
    square = CONFIDENCE**2
    rtol = 3e-4  # z may be 1.96 or 1.959964
    cases = [
        Case("one prompt, won", (row(2), row(1)), row(1, 1 / (1 + square), 1), rtol),
        Case("one prompt, lost", (row(1), row(2)), row(0, 0, square / (1 + square)), rtol),
        Case("two prompts: one won, one tied", (row(3, 1), row(2, 1)), wilson_rows(row(0.75)[0], 2), rtol),
        Case("three prompts: won by far, lost twice by little", (row(9, 0, 0), row(0, 1, 1)),
             wilson_rows(row(1)[0] / 3, 3), rtol),
        Case("four prompts, all tied", (row(1, 1, 1, 1), row(1, 1, 1, 1)), wilson_rows(row(0.5)[0], 4), rtol),
    ]  # fmt: skip
    for size, generator in zip((5, 12, 40), generators(3), strict=True):
        scores, others = (2 * normal(generator, 2, size)).round()
        cases.append(Case(f"random, {size} prompts", (scores, others), rtol=rtol))
    return cases


def win_with(bug: str, scores: Tensor, others: Tensor) -> Tensor:
    """Exercise 11.1 with one mistake planted."""
    won, tied = (scores > others).to(scores.dtype), (scores == others).to(scores.dtype)
    outcomes = {"ties won": won + tied, "ties lost": won, "swapped": 1 - won - tied / 2}.get(bug, won + tied / 2)
    count = len(scores)
    if bug == "ties dropped":
        count = max(int(count - tied.sum()), 1)
        outcomes = won.sum()[None] / count
    if bug == "decided":
        count = max(int(count - tied.sum()), 1)
    rate = outcomes.mean()
    if bug == "by how much":
        rate = scores.sum() / (scores.sum() + others.sum())
    error = (rate * (1 - rate) / count).clamp(min=0).sqrt()
    if bug == "normal":
        return torch.stack((rate, rate - CONFIDENCE * error, rate + CONFIDENCE * error))
    if bug == "clipped":
        low, high = rate - CONFIDENCE * error, rate + CONFIDENCE * error
        return torch.stack((rate, low.clamp(min=0), high.clamp(max=1)))
    if bug == "one prompt":
        return wilson_rows(rate, 1)
    if bug == "outcomes":
        error = outcomes.std(correction=0) / count**0.5
        return torch.stack((rate, rate - CONFIDENCE * error, rate + CONFIDENCE * error))
    square = CONFIDENCE**2
    if bug in ("Agresti-Coull", "plus four"):
        more = square if bug == "Agresti-Coull" else 4
        middle = (rate * count + more / 2) / (count + more)
        half = CONFIDENCE * (middle * (1 - middle) / (count + more)).sqrt()
        return torch.stack((rate, middle - half, middle + half))
    if bug == "not shrunk":
        middle, half = rate + square / (2 * count), CONFIDENCE * (error**2 + square / (4 * count**2)).sqrt()
        return torch.stack((rate, middle - half, middle + half))
    if bug in ("4n", "z"):
        square = CONFIDENCE if bug == "z" else square
        below = 4 * count if bug == "4n" else 4 * count**2
        middle = rate + square / (2 * count)
        half = CONFIDENCE * (error**2 + square / below).sqrt()
        return torch.stack((rate, (middle - half) / (1 + square / count), (middle + half) / (1 + square / count)))
    if bug == "one term":
        middle, half = rate + square / (2 * count), CONFIDENCE * error
        return torch.stack((rate, (middle - half) / (1 + square / count), (middle + half) / (1 + square / count)))
    if bug in ("90", "2"):
        z = {"90": 1.645, "2": 2.0}[bug]
        # Wilson's interval depends on z^2 / n alone.
        return torch.stack((rate, *wilson(rate, count * square / z**2)))
    rows = wilson_rows(rate, count)
    if bug == "middle":
        return torch.stack(((rows[1] + rows[2]) / 2, rows[1], rows[2]))
    if bug == "order":
        return rows[[1, 0, 2]]
    if bug == "ends":
        return rows[[0, 2, 1]]
    if bug == "per cent":
        return 100 * rows
    if bug == "widths":
        return torch.stack((rate, rate - rows[1], rows[2] - rate))
    if bug == "continuity":
        step = 1 / (2 * count)
        return torch.stack((rate, (rows[1] - step).clamp(min=0), (rows[2] + step).clamp(max=1)))
    if bug == "centred":
        half = (rows[2] - rows[1]) / 2
        return torch.stack((rate, rate - half, rate + half))
    return rows


# 11.2 ----------------------------------------------------------------------------------------------------------------


def examples_cases() -> list[Case]:
    short, other = (ids(11), ids(21)), (ids(12), ids(22))
    long = ids(13, 14, 15), ids(23, 24)
    ask = ids(9)
    cases = [
        Case("no examples", ((), ask, 2, 1, 8), ids(9, 2)),
        Case("one example, and room", ((short,), ask, 2, 1, 8), ids(11, 2, 21, 1, 9, 2)),
        Case("one example that just fits", ((short,), ask, 2, 1, 6), ids(11, 2, 21, 1, 9, 2)),
        Case("one example that is one token too long", ((short,), ask, 2, 1, 5), ids(9, 2)),
        Case("two examples, room for both", ((short, other), ask, 2, 1, 12),
             ids(11, 2, 21, 1, 12, 2, 22, 1, 9, 2)),
        Case("the second is too long", ((short, long), ask, 2, 1, 9), ids(11, 2, 21, 1, 9, 2)),
        Case("the second is too long, a third would fit", ((short, long, other), ask, 2, 1, 12),
             ids(11, 2, 21, 1, 9, 2)),
    ]  # fmt: skip
    for (count, limit), generator in zip(((2, 14), (3, 20), (5, 30)), generators(3), strict=True):
        lengths = torch.randint(1, 6, (count, 2), generator=generator).tolist()
        pairs = tuple(tuple(torch.randint(3, 99, (n,), generator=generator) for n in both) for both in lengths)
        prompt = torch.randint(3, 99, (4,), generator=generator)
        cases.append(Case(f"random, {count} examples, {limit} tokens", (pairs, prompt, 2, 1, limit)))
    return cases


def examples_with(
    bug: str,
    examples: Sequence[tuple[Tensor, Tensor]],
    prompt: Tensor,
    newline: int,
    eos: int,
    limit: int,
) -> Tensor:
    """Exercise 11.2 with one mistake planted."""
    line, end = prompt.new_tensor([newline]), prompt.new_tensor([eos])
    end = prompt.new_tensor([]) if bug == "no eos" else line if bug == "newline for eos" else end
    if bug == "newline, too":
        end = torch.cat((line, end))
    between = prompt.new_tensor([]) if bug == "run together" else line
    ask = prompt if bug == "no newline" else torch.cat((prompt, line))
    if bug == "prompt ends":
        ask = torch.cat((ask, end))
    blocks = [torch.cat((question, between, text, end)) for question, text in examples]
    if bug == "no examples":
        blocks = []
    if bug == "last ones":
        blocks.reverse()
    if bug == "a piece":
        return torch.cat((torch.cat((*blocks, prompt[:0]))[: max(limit - len(ask), 0)], ask))
    if bug in ("cut on the left", "cut on the right", "no limit"):
        whole = torch.cat((*blocks, ask))
        return {"cut on the left": whole[-limit:], "cut on the right": whole[:limit]}.get(bug, whole)
    room = limit if bug == "prompt not counted" else limit - len(ask) - (bug == "strict")
    kept = []
    for block in blocks:
        if len(block) > room:
            if bug == "skips":
                continue
            break
        kept.append(block)
        room -= len(block)
    if bug == "all or none" and len(kept) < len(blocks):
        kept = []
    if bug in ("last ones", "backwards"):
        kept.reverse()
    return torch.cat((ask, *kept)) if bug == "prompt first" else torch.cat((*kept, ask))


# 11.3 ----------------------------------------------------------------------------------------------------------------


def paired_cases() -> list[Case]:
    rtol = 1e-5  # 0.025 may have been a float32 on its way
    cases = [
        Case("two prompts, three resamples: differences 1, 1/2, 0",
             (row(1, 0), row(0, 0), ids([0, 0], [0, 1], [1, 1])), row(0.025, 0.975), rtol),
        Case("the second is better on each", (row(0, 0), row(1, 0.5), ids([0, 0], [0, 1], [1, 1])),
             row(-0.9875, -0.5125), rtol),
        Case("twins on hard and easy prompts: no difference, whatever is drawn",
             (row(1, 0, 1), row(1, 0, 1), ids([0, 0, 2], [1, 1, 0], [2, 1, 1])), row(0, 0), rtol),
    ]  # fmt: skip
    for (size, count), generator in zip(((4, 30), (9, 50), (20, 80)), generators(3), strict=True):
        easy = normal(generator, size)
        first, second = (easy + 0.3 * normal(generator, 2, size) > 0).double()
        drawn = torch.randint(0, size, (count, size), generator=generator)
        cases.append(Case(f"random, {size} prompts, {count} resamples", (first, second, drawn), rtol=rtol))
    return cases


def paired_with(bug: str, first: Tensor, second: Tensor, rows: Tensor) -> Tensor:
    """Exercise 11.3 with one mistake planted."""
    marks = rows.new_tensor([25, 975]).to(first.dtype) / 1000
    one, two = first[rows].mean(1), second[rows].mean(1)
    if bug == "unpaired":
        return (one - second[rows.roll(1, 0)].mean(1)).quantile(marks)
    if bug == "one of them":
        return (one - second.mean()).quantile(marks)
    if bug == "apart":
        return (one.quantile(marks) - two.quantile(marks.flip(0))).sort().values
    if bug == "gap":
        return one.quantile(marks) - two.quantile(marks)
    if bug == "single":
        return (first - second)[rows].flatten().quantile(marks)
    if bug == "swapped":
        return (two - one).quantile(marks)
    if bug == "ninety":
        return (one - two).quantile(rows.new_tensor([5, 95]).to(first.dtype) / 100)
    difference, seen = one - two, (first - second).mean()
    low, high = difference.quantile(marks)
    if bug == "no resamples":
        error = (first - second).std(correction=1) / len(first) ** 0.5
        return seen + torch.stack((-error, error)) * CONFIDENCE
    if bug == "one deviation":
        return difference.mean() + torch.stack((-difference.std(), difference.std()))
    if bug == "down":
        return (first - second)[rows].mean(0).quantile(marks)
    if bug == "sums":
        return torch.stack((low, high)) * len(first)
    if bug == "first alone":
        return one.quantile(marks)
    if bug == "absolute":
        return (first - second).abs()[rows].mean(1).quantile(marks)
    if bug.startswith("error"):
        middle = difference.mean() if "resamples" in bug else seen
        return middle + torch.stack((-difference.std(), difference.std())) * CONFIDENCE
    if bug == "basic":
        return torch.stack((2 * seen - high, 2 * seen - low))
    if bug == "centred":
        return torch.stack((low, high)) - difference.mean() + seen
    if bug == "ends":
        return torch.stack((high, low))
    if bug == "per cent":
        return 100 * torch.stack((low, high))
    if bug == "medians":
        return (first[rows].median(1).values - second[rows].median(1).values).quantile(marks)
    if bug == "nearest":
        at = (marks * (len(difference) - 1)).round().long()
        return difference.sort().values[at]
    if bug == "lower":
        return difference.quantile(marks, interpolation="lower")
    if bug == "min max":
        return torch.stack((difference.min(), difference.max()))
    return difference.quantile(marks)


# 11.4 ----------------------------------------------------------------------------------------------------------------


def seed_cases() -> list[Case]:
    cases = [
        Case("two seeds, t = 10", (row([0.4], [0.6]), 10.0), row([0.5], [-0.5], [1.5])),
        Case("three seeds that agree", (row([0.7], [0.7], [0.7]), 4.303), row([0.7], [0.7], [0.7])),
        Case("three seeds, t = 3", (row([1], [2], [3]), 3.0), row([2], [2 - 3**0.5], [2 + 3**0.5])),
        Case("two models", (row([0.4, 1], [0.6, 3]), 1.0), row([0.5, 2], [0.4, 1], [0.6, 3])),
    ]
    for (seeds, models), generator in zip(((3, 2), (4, 3), (6, 1)), generators(3), strict=True):
        cases.append(Case(f"random, {seeds} seeds, {models} models", (normal(generator, seeds, models), 2.5)))
    return cases


def seed_with(bug: str, rates: Tensor, t: float) -> Tensor:
    """Exercise 11.4 with one mistake planted."""
    count, mean = len(rates), rates.mean(0)
    spread = rates.std(0, correction=0 if bug == "biased" else 1)
    if bug == "all models":
        spread, count = rates.std().expand_as(mean), rates.numel()
    half = (CONFIDENCE if bug == "normal" else t) * spread / count**0.5
    if bug == "deviation":
        half = t * spread
    if bug == "variance":
        half = t * spread.square() / count**0.5
    if bug == "degrees":
        half = t * spread / (count - 1) ** 0.5
    if bug == "count":
        half = t * spread / count
    if bug == "no t":
        half = spread / count**0.5
    if bug == "twice":
        half = 2 * half
    if bug == "absolute":
        half = t * (rates - mean).abs().mean(0) / count**0.5
    if bug == "variance by S":
        half = t * spread.square() / count
    if bug == "widths":
        return torch.stack((mean, half, half))
    if bug == "cut":
        return torch.stack((mean, (mean - half).clamp(0, 1), (mean + half).clamp(0, 1)))
    if bug == "range":
        return torch.stack((mean, rates.amin(0), rates.amax(0)))
    if bug == "median":
        mean = rates.median(0).values
    if bug == "ends":
        return torch.stack((mean, mean + half, mean - half))
    if bug == "order":
        return torch.stack((mean - half, mean, mean + half))
    return torch.stack((mean, mean - half, mean + half))


# 11.5 ----------------------------------------------------------------------------------------------------------------


def tax_cases() -> list[Case]:
    cases = [
        Case("one seed, one kind of text", (row([1]), row([3]), row([1.5])), row(0.75)),
        Case("nothing repaired, all repaired", (row([1, 1]), row([2, 2]), row([2, 1])), row(0, 1)),
        Case("made worse", (row([1]), row([2]), row([3])), row(-1)),
        Case("two seeds, one of which paid hardly any tax",
             (row([1], [1]), row([3], [1.25]), row([1.5], [1.5])), row(5 / 9)),
    ]  # fmt: skip
    for (seeds, kinds), generator in zip(((2, 2), (3, 4), (3, 9)), generators(3), strict=True):
        base = 1 + normal(generator, seeds, kinds).abs()
        ppo = base + 0.2 + normal(generator, seeds, kinds).abs()
        ptx = base + 0.5 * normal(generator, seeds, kinds).abs()
        cases.append(Case(f"random, {seeds} seeds, {kinds} kinds of text", (base, ppo, ptx)))
    return cases


def tax_with(bug: str, base: Tensor, ppo: Tensor, ppo_ptx: Tensor) -> Tensor:
    """Exercise 11.5 with one mistake planted."""
    tax, left = (ppo - base).mean(0), (ppo_ptx - base).mean(0)
    return {
        "median": lambda: ((ppo - ppo_ptx) / (ppo - base)).median(0).values,
        "per cent": lambda: 100 * (1 - left / tax),
        "turned": lambda: left / tax - 1,
        "absolute": lambda: (1 - left / tax).abs(),
        "left": lambda: left,
        "mean of ratios": lambda: (1 - (ppo_ptx - base) / (ppo - base)).mean(0),
        "what is left": lambda: left / tax,
        "of the loss": lambda: 1 - (ppo_ptx / ppo).mean(0),
        "of the mean loss": lambda: 1 - ppo_ptx.mean(0) / ppo.mean(0),
        "nats": lambda: tax - left,
        "other way": lambda: 1 - tax / left,
        "of the base": lambda: (tax - left) / base.mean(0),
        "clamped": lambda: (1 - left / tax).clamp(min=0),
    }[bug]()
