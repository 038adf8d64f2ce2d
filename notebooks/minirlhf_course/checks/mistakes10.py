"""Lesson 10's cases, and its exercises with one mistake planted each: what the checks of lesson10.py run."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minirlhf_course import overoptimisation
from minirlhf_course.checks.cases import F64, bools, generators, ids, normal, row
from minirlhf_course.checks.exercise import Case
from minirlhf_course.overoptimisation import HOW

# 10.1 ----------------------------------------------------------------------------------------------------------------


def kl_cases() -> list[Case]:
    ln2 = math.log(2)
    rtol = 1e-4  # the integral may have been done by adding up
    cases = [
        Case("one answer: no choice", (row(1),), row(0), rtol),
        Case("the better of two", (row(2),), row(ln2 - 0.5), rtol),
        Case("the best of 1, 4 and 128", (row(1, 4, 128),), row(0, 2 * ln2 - 0.75, 7 * ln2 - 127 / 128), rtol),
    ]
    for size, generator in zip((2, 5, 12), generators(3), strict=True):
        counts = torch.randint(1, 200, (size,), generator=generator).double()
        cases.append(Case(f"random, {size} counts", (counts,), rtol=rtol))
    return cases


def kl_with(bug: str, counts: Tensor) -> Tensor:
    """Exercise 10.1 with one mistake planted."""
    log, share = counts.log(), (counts - 1) / counts
    return {
        "log n": log,
        "other way": counts - 1 - log,
        "root": (log - share).clamp(min=0).sqrt(),
        "added": log + share,
        "one over n": log - 1 / counts,
        "brackets": log - counts - 1 / counts,
        "bits": (log - share) / math.log(2),
        "one": log - 1,
        "ten": counts.log10() - share,
        "turned": share - log,
        "times": log * share,
    }[bug]


# 10.2 ----------------------------------------------------------------------------------------------------------------


def best_cases() -> list[Case]:
    cases = [
        Case("two answers, the better one", (row([0, 1]), row([5, 7]), 2), row(7)),
        Case("two answers, one drawn", (row([1, 0]), row([5, 7]), 1), row(6)),
        Case("two answers that tie", (row([1, 1]), row([5, 7]), 2), row(6)),
        Case("three answers, the better of two", (row([0, 1, 2]), row([5, 7, 3]), 2), row(13 / 3)),
        Case("three answers, two of them tie", (row([1, 0, 1]), row([3, 9, 5]), 2), row(4)),
        Case("four answers, the best of three, two prompts",
             (row([0, 1, 2, 3], [3, 2, 1, 0]), row([9, 9, 4, 8], [9, 9, 4, 8]), 3), row(7, 9)),
    ]  # fmt: skip
    for (rows, pool, n), generator in zip(((2, 6, 3), (3, 9, 2), (5, 16, 8)), generators(3), strict=True):
        proxy, values = normal(generator, 2, rows, pool)
        if rows == 3:
            proxy = (2 * proxy).round()
        cases.append(Case(f"random, {rows} prompts, best of {n} from {pool}", (proxy, values, n)))
    return cases


def best_with(bug: str, proxy: Tensor, values: Tensor, n: int) -> Tensor:
    """Exercise 10.2 with one mistake planted."""
    pool = proxy.shape[1]
    if bug == "first n":
        return values.gather(1, proxy[:, :n].argmax(1, keepdim=True))[:, 0]
    if bug == "whole pool":
        return values.gather(1, proxy.argmax(1, keepdim=True))[:, 0]
    if bug == "top n":
        return values.gather(1, proxy.sort(dim=1, descending=True, stable=True).indices[:, :n]).mean(1)
    if bug == "groups":
        groups = pool // n
        of = proxy[:, : groups * n].unflatten(1, (groups, n)), values[:, : groups * n].unflatten(1, (groups, n))
        return of[1].gather(2, of[0].argmax(2, keepdim=True))[..., 0].mean(1)
    if bug == "own best":
        return overoptimisation.best_of_n(values, values, n)
    if bug == "proxy":
        return overoptimisation.best_of_n(proxy, proxy, n)
    if bug == "worst":
        return overoptimisation.best_of_n(-proxy, values, n)
    if bug == "mean":
        return values.mean(1)
    if bug == "first tie":
        return best_with("ties", proxy.flip(1), values.flip(1), n)
    place = torch.arange(1, pool + 1, dtype=values.dtype)
    if bug == "shifted":
        wins = values.new_tensor([0, *(math.comb(i, n - 1) for i in range(pool - 1))]) / math.comb(pool, n)
    elif bug == "counts":
        wins = values.new_tensor([math.comb(i, n - 1) for i in range(pool)])
    elif bug == "put back":
        wins = (place / pool) ** n - ((place - 1) / pool) ** n
    elif bug == "ranks":
        wins = values.new_tensor([math.comb(i, n) for i in range(1, pool + 1)]) / math.comb(pool, n)
    else:  # "ties": the later one takes all
        wins = values.new_tensor([math.comb(i, n - 1) for i in range(pool)]) / math.comb(pool, n)
    order = proxy.argsort(dim=1, stable=True)
    if bug != "ties":  # these share, so that only their own mistake shows
        same = (proxy[:, None] == proxy[:, :, None]).to(values.dtype)
        values = (same @ values[..., None])[..., 0] / same.sum(2)
    return (values.gather(1, order) * wins).sum(1)


# 10.3 ----------------------------------------------------------------------------------------------------------------


def curve_cases() -> list[Case]:
    cases = [
        Case("two points: d = 1 and 2, alpha = 2, beta = 1/2", (row(1, 4), row(1.5, 2)), row(2, 0.5, 4)),
        Case("the start is a point as well", (row(0, 1, 9), row(0, 2, 0)), row(3, 1, 2.25)),
        Case("four points, alpha = 1, beta = 1/4", (row(0, 1, 4, 9), row(0, 0.75, 1, 0.75)), row(1, 0.25, 4)),
    ]
    for size, generator in zip((5, 9, 20), generators(3), strict=True):
        d = torch.linspace(0, 3, size, dtype=F64)
        gain = d * (1.2 - 0.3 * d) + 0.05 * normal(generator, size)
        cases.append(Case(f"random, {size} points", (d.square(), gain)))
    return cases


def curve_with(bug: str, kl: Tensor, gain: Tensor) -> Tensor:
    """Exercise 10.3 with one mistake planted."""
    d = kl if bug == "no root" else kl.sqrt()
    columns, target = [d, -d.square()], gain
    if bug == "logarithm":
        columns = [d, -torch.xlogy(d, d)]
    if bug == "constant":
        columns.append(torch.ones_like(d))
    if bug == "ratio":
        far = d > 0
        d, target = d[far], gain[far] / d[far]
        columns = [torch.ones_like(d), -d]
    matrix = torch.stack(columns, 1)
    # pinv: a suspect may have more unknowns than there are points.
    alpha, beta = (torch.linalg.pinv(matrix) @ target)[:2]
    peak = {
        "no root": alpha / (2 * beta),
        "distance": alpha / (2 * beta),
        "back to zero": (alpha / beta).square(),
        "half": (alpha / beta).square() / 2,
        "height": alpha.square() / (4 * beta),
        "no 2": alpha / beta,
        "upside down": (2 * beta / alpha).square(),
        "logarithm": (2 * (alpha / beta - 1)).exp(),
        "measured": kl[gain.argmax()],
        "grid": kl[(alpha * d - beta * d.square()).argmax()],
    }.get(bug, (alpha / (2 * beta)).square())
    if bug == "sign":
        beta = -beta
    if bug == "peak first":
        return torch.stack((peak, alpha, beta))
    return torch.stack((beta, alpha, peak) if bug == "swapped" else (alpha, beta, peak))


# 10.4 ----------------------------------------------------------------------------------------------------------------


def stop_cases() -> list[Case]:
    def case(name: str, proxy: object, validation: object, gold: object, kl: object, budget: float, to: object) -> Case:
        return Case(name, (*(row(x) for x in (proxy, validation, gold, kl)), budget), row(to))

    cases = [
        case("two measurements, within the budget", [0, 3], [1, 0], [5, 7], [0, 4], 9.0, 5),
        case("two measurements, the second on the edge of the budget", [0, 3], [0, 1], [5, 4], [0, 9], 9.0, 4),
        case("the best one is beyond the budget", [0, 1, 2], [0, 1, 2], [5, 7, 9], [0, 2, 6], 4.0, 7),
        case("two are equally good: the earlier", [0, 1, 2], [0, 1, 1], [5, 7, 9], [0, 2, 3], 4.0, 7),
        case("it comes back into the budget", [0, 1, 2], [0, 9, 1], [5, 7, 9], [0, 6, 3], 4.0, 9),
        Case("two runs, each stopped for itself",
             (row([0, 2, 4], [0, 2, 4]), row([0, 2, -3], [0, 0.5, 1]), row([5, 6, 1], [5, 7, 9]),
              row([0, 1, 2], [0, 1, 2]), 9.0), row(6, 9)),
    ]  # fmt: skip
    for (runs, steps), generator in zip(((1, 5), (3, 7), (4, 20)), generators(3), strict=True):
        kl = torch.cat((torch.zeros(runs, 1, dtype=F64), normal(generator, runs, steps - 1).abs().cumsum(1)), 1)
        proxy = 0.3 * torch.arange(steps, dtype=F64) + normal(generator, runs, steps)
        validation, gold = normal(generator, 2, runs, steps)
        middle = float(kl[0, -2])
        cases.append(Case(f"random, {runs} runs, {steps} measurements", (proxy, validation, gold, kl, middle)))
    return cases


def stop_with(bug: str, proxy: Tensor, validation: Tensor, gold: Tensor, kl: Tensor, budget: float) -> Tensor:
    """Exercise 10.4 with one mistake planted."""
    within = kl < budget if bug == "strict" else kl <= budget
    before = (~within).long().cumsum(1) == 0  # no measurement so far has left the budget
    if bug == "stays":
        within = before
    if bug == "no budget":
        within = torch.ones_like(within)
    judge = {"proxy": proxy, "oracle": gold, "both": proxy + validation}.get(bug, validation)
    held = judge.masked_fill(~within, -math.inf)
    if bug == "together":
        held = held.mean(0).expand_as(held)
    if bug == "zeros":
        held = judge * within
    if bug == "earlier of the filtered":
        held = torch.stack([torch.cat((x[w], x.new_full((int((~w).sum()),), -math.inf)))
                            for x, w in zip(judge, within, strict=True)])  # fmt: skip
    at = held.argmax(1)
    if bug == "later":
        at = held.shape[1] - 1 - held.flip(1).argmax(1)
    if bug == "edge":
        at = (within * torch.arange(kl.shape[1])).argmax(1)
    if bug == "first fall":
        falls = (validation[:, 1:] < validation[:, :-1]).to(kl.dtype)
        never = falls.sum(1) == 0
        at = torch.where(never, kl.shape[1] - 1, falls.argmax(1))
    if bug == "end":
        at = torch.full_like(at, kl.shape[1] - 1)
    if bug == "last before":
        at = before.sum(1) - 1
    if bug == "first exceed":
        at = before.sum(1).clamp(max=kl.shape[1] - 1)
    if bug == "nearest":
        at = (kl - budget).abs().argmin(1)
    if bug == "start":
        at = torch.zeros_like(at)
    if bug == "index":
        return at.to(gold.dtype)
    if bug == "lowest":
        at = validation.masked_fill(~within, math.inf).argmin(1)
    told = {"told": validation, "proxy told": proxy}.get(bug, gold)
    return told.gather(1, at[:, None])[:, 0]


# 10.5 ----------------------------------------------------------------------------------------------------------------


def ensemble_cases() -> list[Case]:
    apart = row([-1, 1], [-10, 10]) / 2**0.5  # standard deviations 1 and 10
    cases = [
        Case("one model, the lowest", (row([3]), row([-1, 1]) / 2**0.5, "min"), row(3)),
        Case("two models, one on ten times the scale, the mean", (row([1], [20]), apart, "mean"), row(1.5)),
        Case("two models, one on ten times the scale, the lowest", (row([1], [20]), apart, "min"), row(1)),
        Case("a constant is added to one of them", (row([1], [102]), apart[:1] + row([0], [100]), "min"),
             row(1)),
        Case("three answers", (row([1, 2, 3], [30, 20, 10]), apart, "min"), row(1, 2, 1)),
        Case("three answers, the mean", (row([1, 2, 3], [30, 20, 10]), apart, "mean"), row(2, 2, 2)),
    ]  # fmt: skip
    for (models, count, reference), generator in zip(((2, 4, 6), (3, 2, 9), (4, 20, 50)), generators(3), strict=True):
        scale, zero = normal(generator, models, 1).exp(), 3 * normal(generator, models, 1)
        known, scores = (zero + scale * normal(generator, models, size) for size in (reference, count))
        for how in HOW:
            cases.append(Case(f"random, {models} models, {count} answers, {how}", (scores, known, how)))
    return cases


def ensemble_with(bug: str, scores: Tensor, reference: Tensor, how: str) -> Tensor:
    """Exercise 10.5 with one mistake planted."""
    mean, deviation = reference.mean(1, keepdim=True), reference.std(1, keepdim=True)
    if bug == "own batch":
        # A batch of one has no deviation.
        mean = scores.mean(1, keepdim=True)
        deviation = scores.std(1, keepdim=True, correction=0).clamp(min=1e-6)
    if bug == "all together":
        mean, deviation = reference.mean(), reference.std()
    if bug == "variance":
        deviation = deviation.square()
    if bug == "population":
        deviation = reference.std(1, keepdim=True, correction=0)
    if bug == "range":
        mean, deviation = reference.amin(1, keepdim=True), reference.amax(1, keepdim=True)
        deviation = deviation - mean
    if bug == "across":
        mean, deviation = scores.mean(0), scores.std(0, correction=0) + 1e-8
    if bug == "afterwards":
        combined, known = ((x.mean(0) if how == "mean" else x.amin(0)) for x in (scores, reference))
        return (combined - known.mean()) / known.std()
    standard = (scores - mean) / deviation
    if bug.startswith("doubt") and how == "min":
        centre = standard.mean(0)
        squares = (standard - centre).square().sum(0) / (len(standard) - (bug == "doubt, M - 1"))
        return centre - squares.sqrt()
    if bug == "raw":
        standard = scores
    if bug == "not centred":
        standard = scores / deviation
    if bug == "not scaled":
        standard = scores - mean
    if bug == "brackets":
        standard = scores - mean / deviation
    lowest = how == "min"
    if bug == "swapped":
        lowest = not lowest
    if bug == "always mean":
        lowest = False
    if bug == "pessimist":
        lowest = True
    if bug == "one for all":
        return standard.amin().expand(standard.shape[1]) if lowest else standard.mean(0)
    if bug == "max":
        return standard.amax(0) if lowest else standard.mean(0)
    if bug == "median":
        return standard.amin(0) if lowest else standard.quantile(0.5, dim=0)
    if bug == "sum":
        return standard.amin(0) if lowest else standard.sum(0)
    if bug == "one model":
        return standard[scores.mean(1).argmin()] if lowest else standard.mean(0)
    return standard.amin(0) if lowest else standard.mean(0)


# 10.6 ----------------------------------------------------------------------------------------------------------------


def fresh_cases() -> list[Case]:
    cases = [
        Case("two answers", (ids(4, 4), ids(1, 1), row(1, 2)), bools([0, 0], [1, 0])),
        Case("two answers that tie", (ids(4, 4), ids(1, 1), row(2, 2)), bools([0, 0], [0, 0])),
        Case("two answers to two prompts", (ids(4, 5), ids(1, 1), row(1, 2)), bools([0, 0], [0, 0])),
        Case("one of them is an older policy's", (ids(4, 4), ids(0, 1), row(1, 2)), bools([0, 0], [0, 0])),
        Case("two older ones and a new one", (ids(4, 4, 4), ids(1, 1, 2), row(1, 2, 3)),
             bools([0, 0, 0], [0, 0, 0], [0, 0, 0])),
        Case("three answers, two of them tie", (ids(4, 4, 4), ids(2, 2, 2), row(1, 3, 3)),
             bools([0, 0, 0], [1, 0, 0], [1, 0, 0])),
        Case("three answers: three pairs", (ids(4, 4, 4), ids(2, 2, 2), row(1, 2, 3)),
             bools([0, 0, 0], [1, 0, 0], [1, 1, 0])),
        Case("an old and a new policy, three answers of the new one",
             (ids(4, 4, 4, 4), ids(0, 1, 1, 1), row(9, 1, 2, 3)),
             bools([0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0])),
    ]  # fmt: skip
    for size, generator in zip((5, 9, 24), generators(3), strict=True):
        prompts = torch.randint(0, 1 + size // 4, (size,), generator=generator)
        policies = torch.randint(0, 3, (size,), generator=generator)
        scores = (2 * normal(generator, size)).round()
        cases.append(Case(f"random, {size} answers", (prompts, policies, scores)))
    return cases


def fresh_with(bug: str, prompts: Tensor, policies: Tensor, scores: Tensor) -> Tensor:
    """Exercise 10.6 with one mistake planted."""
    together = prompts[:, None] == prompts
    newest = policies == policies.max()
    new = newest[:, None] & newest
    better = scores[:, None] > scores
    if bug == "prompts":
        together = torch.ones_like(together)
    if bug == "any policy":
        new = torch.ones_like(new)
    if bug == "one policy":
        new = policies[:, None] == policies
    if bug == "each prompt":
        latest = policies == torch.where(together, policies, -1).amax(1)
        new = latest[:, None] & latest
    if bug == "last answer":
        last = policies == policies[-1]
        new = last[:, None] & last
    if bug == "one of them":
        new = newest[:, None] | newest
    if bug == "winner":
        new = newest[:, None].expand_as(new)
    if bug == "loser":
        new = newest.expand_as(new)
    if bug == "newer wins":
        new = policies[:, None] > policies
    if bug == "oldest":
        oldest = policies == policies.min()
        new = oldest[:, None] & oldest
    if bug == "ties":
        better = (scores[:, None] >= scores) & ~torch.eye(len(scores), dtype=torch.bool)
    if bug == "with itself":
        better = scores[:, None] >= scores
    if bug == "both ways":
        better = scores[:, None] != scores
    if bug == "worse":
        better = scores[:, None] < scores
    if bug == "no scores":
        better = ~torch.eye(len(scores), dtype=torch.bool)
    pairs = together & new & better
    if bug == "upper":
        pairs = pairs.triu(1)
    if bug == "neighbours":
        pairs = pairs & ((pairs.long() @ pairs.long()) == 0)
    if bug == "best and worst":
        all_pairs = pairs
        # The best beats somebody and nobody beats it; the worst the other way round.
        best, worst = all_pairs.any(1) & ~all_pairs.any(0), all_pairs.any(0) & ~all_pairs.any(1)
        pairs = all_pairs & best[:, None] & worst
    return pairs
