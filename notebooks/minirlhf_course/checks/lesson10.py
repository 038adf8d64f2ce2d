"""Lesson 10, over-optimisation: best of n and its KL, the curve and its peak, when to stop, ensembles, fresh labels."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from minirlhf_course import overoptimisation
from minirlhf_course.checks.cases import F64, bools, generators, ids, normal, row
from minirlhf_course.checks.exercise import Case, exercise
from minirlhf_course.overoptimisation import HOW

INT = torch.int64


# 10.1 ----------------------------------------------------------------------------------------------------------------


def _kl_cases() -> list[Case]:
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


def _kl_with(bug: str, counts: Tensor) -> Tensor:
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


@exercise(
    "10.1",
    "how far is the best of n?",
    difficulty=2,
    minutes=10,
    task="Rank all answers that the model may give by their score, and call $u \\in [0, 1]$ an answer's place (0: the "
    "worst, 1: the best). One sample has a uniform $u$. The best of $n$ has the density $f(u) = n\\,u^{n-1}$, whatever "
    "the score is. So\n\n"
    "$$\\mathrm{KL}(\\text{best of } n \\,\\|\\, \\text{one}) = \\int_0^1 f(u) \\log f(u)\\, du.$$\n\n"
    "Do the integral, and write down what comes out.",
    cases=_kl_cases,
    suspects={
        "log n is only the first term: it would be the KL of taking the best 1/n of all answers, each alike. The best "
        "of n is less sharp: take (n - 1) / n off.": partial(_kl_with, "log n"),
        "This is the KL the other way round, of one sample from the best of n: average log f under f.": (
            partial(_kl_with, "other way")
        ),
        "This is the root of the KL, the distance of the figures: give the KL.": partial(_kl_with, "root"),
        "The second term is taken off, not added: u^(n-1) is at most 1, and its log is below 0.": (
            partial(_kl_with, "added")
        ),
        "It takes off 1 / n: (n - 1) / n.": partial(_kl_with, "one over n"),
        "It takes off n - 1 / n, where (n - 1) / n is meant: brackets.": partial(_kl_with, "brackets"),
        "These are bits: nats, with the natural logarithm.": partial(_kl_with, "bits"),
        "The logarithm has base 10: nats, with the natural logarithm.": partial(_kl_with, "ten"),
        "It takes off 1: (n - 1) / n, which comes near to 1 only for large n, and is 0 for n = 1.": (
            partial(_kl_with, "one")
        ),
        "The sign is flipped: a KL is never below 0.": partial(_kl_with, "turned"),
        "log n is multiplied by (n - 1) / n: (n - 1) / n is taken off.": partial(_kl_with, "times"),
    },
    hints=(
        "$\\log f = \\log n + (n-1) \\log u$. The first part averages to itself. For the second: $\\int_0^1 n\\,u^{n-1}"
        "\\log u\\, du = -1/n$, by parts.",
        "`counts.log() - (counts - 1) / counts`",
    ),
)
def best_of_n_kl(counts: Tensor) -> Tensor:
    """KL(best of n || one sample) in nats, for each n of counts: [M] float64 gives [M]."""
    return counts.new_tensor([overoptimisation.best_of_n_kl(int(n)) for n in counts])


# 10.2 ----------------------------------------------------------------------------------------------------------------


def _best_cases() -> list[Case]:
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


def _best_with(bug: str, proxy: Tensor, values: Tensor, n: int) -> Tensor:
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
        return _best_with("ties", proxy.flip(1), values.flip(1), n)
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


@exercise(
    "10.2",
    "the best of n, from a pool",
    difficulty=4,
    minutes=25,
    task="$N$ answers to a prompt are sampled and scored, once. What is the best of $n$ worth, for every $n \\le N$? "
    "Do not take the first $n$ and throw the rest away: average over **all** $\\binom{N}{n}$ choices of $n$ from the "
    "pool. That needs no loop over choices. Sort by proxy: the answer at place $i$ (1 the worst, $N$ the best) wins "
    "a choice if it is in it and the other $n - 1$ come from the $i - 1$ below it. Answers with the same proxy share "
    "equally what they win together.",
    cases=_best_cases,
    suspects={
        "It takes the best of the first n and throws the rest of the pool away: right on average, and as noisy as one "
        "draw. Average over all choices.": partial(_best_with, "first n"),
        "It cuts the pool into groups of n: right on average, but C(N, n) choices are less noisy than N // n.": (
            partial(_best_with, "groups")
        ),
        "It draws with putting back: then one answer may be drawn twice, and the best of n is worse than it is. The "
        "n answers are n different ones.": partial(_best_with, "put back"),
        "Ties: here the last of those with the same proxy takes all. They must share, or the order in the pool "
        "decides.": partial(_best_with, "ties"),
        "Ties: here the first of those with the same proxy takes all. They must share, or the order in the pool "
        "decides.": partial(_best_with, "first tie"),
        "It is the best of the whole pool, whatever n is.": partial(_best_with, "whole pool"),
        "It is not divided by C(N, n), the number of choices: the shares must sum to 1.": partial(_best_with, "counts"),
        "Places are off by one: i - 1 answers lie below place i, so the worst one has none below it, and the best one "
        "N - 1.": partial(_best_with, "shifted"),
        "This is the mean of all answers: the proxy is not looked at, nor is n.": partial(_best_with, "mean"),
        "It is the mean of the n best: the best of n is one answer, the best of n drawn at random.": (
            partial(_best_with, "top n")
        ),
        "It takes the best by `values`: the proxy decides who wins, it does not see values.": (
            partial(_best_with, "own best")
        ),
        "It gives the winner's proxy: `values` of the winner is asked for.": partial(_best_with, "proxy"),
        "It takes the lowest proxy: the highest wins.": partial(_best_with, "worst"),
        "C(i, n) counts the choices among the lowest i, also those that i is not in: i must be in it, so the other "
        "n - 1 come from i - 1.": partial(_best_with, "ranks"),
    },
    hints=(
        "`math.comb(i - 1, n - 1) / math.comb(N, n)` is the share that place i wins; these sum to 1. For ties: first "
        "replace every value by the mean of those with the same proxy. Then who wins among them does not matter.",
        "`same = (proxy[:, None] == proxy[:, :, None]).double()`, `values = (same @ values[..., None])[..., 0] / "
        "same.sum(2)`; `wins = values.new_tensor([math.comb(i, n - 1) for i in range(N)]) / math.comb(N, n)` with "
        "`N = proxy.shape[1]`; then `(values.gather(1, proxy.argsort(1)) * wins).sum(1)`.",
    ),
)
def best_of_n(proxy: Tensor, values: Tensor, n: int) -> Tensor:
    """What the best of n by proxy is worth on average, for each prompt: [B].

    proxy and values [B, N] float64, one row per prompt; 1 <= n <= N, drawn without putting back.
    """
    return overoptimisation.best_of_n(proxy, values, n)


# 10.3 ----------------------------------------------------------------------------------------------------------------


def _curve_cases() -> list[Case]:
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


def _curve_with(bug: str, kl: Tensor, gain: Tensor) -> Tensor:
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


@exercise(
    "10.3",
    "the curve, and where it peaks",
    difficulty=3,
    minutes=20,
    task="Gao, Schulman and Hilton found that best-of-$n$'s gold above the start is well described by two numbers:\n\n"
    "$$\\text{gain} = d\\,(\\alpha - \\beta d), \\qquad d = \\sqrt{\\mathrm{KL}}.$$\n\n"
    "$\\alpha$ is what the first step away earns, $\\beta$ how fast the judge goes blind. Fit both by least squares, "
    "and say at which **KL** the fitted curve is highest. (At $d = 0$ there is no gain, so no constant.)",
    cases=_curve_cases,
    suspects={
        "It fits against KL: the distance is its root.": partial(_curve_with, "no root"),
        "The peak is given as a distance: as KL, so square it.": partial(_curve_with, "distance"),
        "This is where all gain is lost again: the peak lies at half of that distance.": (
            partial(_curve_with, "back to zero")
        ),
        "Half of the distance is a quarter of the KL, not half of it.": partial(_curve_with, "half"),
        "The third number is the gain at the peak: the KL there is asked for.": partial(_curve_with, "height"),
        "The square and the 2 are missing: the curve is highest at d = alpha / (2 beta), and the KL is the square of "
        "that.": partial(_curve_with, "no 2"),
        "The peak is upside down: at d = alpha / (2 beta), and squared.": partial(_curve_with, "upside down"),
        "The peak is the highest of the measured points: one point's noise decides. Take the fitted curve's.": (
            partial(_curve_with, "measured")
        ),
        "This is Gao et al.'s form for reinforcement learning, d (alpha - beta log d): for best of n it is d (alpha - "
        "beta d).": partial(_curve_with, "logarithm"),
        "beta has the wrong sign: in gain = d (alpha - beta d) a curve that bends down has beta > 0.": (
            partial(_curve_with, "sign")
        ),
        "The order is alpha, beta, peak.": partial(_curve_with, "swapped"),
        "The order is alpha, beta, peak: here the peak comes first.": partial(_curve_with, "peak first"),
        "The peak is looked for among the measured KLs: it lies between them, where the derivative is 0.": (
            partial(_curve_with, "grid")
        ),
        "There is a constant in the fit: no distance, no gain.": partial(_curve_with, "constant"),
        "This fits gain / d: least squares of the gain itself, or the points nearest to 0, where noise is divided by "
        "almost nothing, weigh most.": partial(_curve_with, "ratio"),
    },
    hints=(
        "It is linear in $\\alpha$ and $\\beta$: two columns, $d$ and $-d^2$. Set the derivative of $\\alpha d - "
        "\\beta d^2$ to 0 for the peak.",
        "`d = kl.sqrt()`, `columns = torch.stack((d, -d**2), 1)`, `alpha, beta = torch.linalg.lstsq(columns, "
        "gain[:, None]).solution[:, 0]`; the peak is `(alpha / (2 * beta))**2`.",
    ),
)
def curve_and_peak(kl: Tensor, gain: Tensor) -> Tensor:
    """[3]: alpha, beta, and the KL where alpha d - beta d^2 is highest, d = sqrt(KL).

    kl and gain [P] float64: gold above that of the start, at each KL.
    """
    alpha, beta = overoptimisation.fit_curve(kl.sqrt(), gain)
    return gain.new_tensor([alpha, beta, (alpha / (2 * beta)) ** 2])


# 10.4 ----------------------------------------------------------------------------------------------------------------


def _stop_cases() -> list[Case]:
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


def _stop_with(bug: str, proxy: Tensor, validation: Tensor, gold: Tensor, kl: Tensor, budget: float) -> Tensor:
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


@exercise(
    "10.4",
    "when to stop, and what to report",
    difficulty=3,
    minutes=15,
    task="A run is measured now and then: the proxy it is trained on, the score of a *validation* reward model "
    "(trained on other rankings, never optimised), the KL, and gold. Stop each run where a team without gold would: "
    "of the measurements with KL at most `budget`, the one with the highest validation score, the earlier one where "
    "two are equal. Then report gold *there*. Who chooses must not be who reports, and neither of the two may be the "
    "proxy.",
    cases=_stop_cases,
    suspects={
        "The proxy chooses here: it is what the run climbs, and says the last step nearly always.": (
            partial(_stop_with, "proxy")
        ),
        "Gold chooses here: nobody has it while training. Gold only reports, validation chooses.": (
            partial(_stop_with, "oracle")
        ),
        "It reports the validation score it has chosen by: the highest of many noisy numbers is too high. Report gold "
        "there.": partial(_stop_with, "told"),
        "It reports the proxy: that is what the run has climbed. Report gold there.": partial(_stop_with, "proxy told"),
        "It takes the lowest validation score: the highest is the best.": partial(_stop_with, "lowest"),
        "The budget is not looked at: measurements with a KL above it are out.": partial(_stop_with, "no budget"),
        "KL at the budget is within it: <=.": partial(_stop_with, "strict"),
        "It takes the last measurement within the budget: of those, the one with the highest validation score.": (
            partial(_stop_with, "edge")
        ),
        "It takes the last measurement, whatever it is.": partial(_stop_with, "end"),
        "It stops where the KL first leaves the budget: a later measurement within it counts as well, if the KL comes "
        "back.": partial(_stop_with, "stays"),
        "It takes the last measurement before the KL first leaves the budget: of all those within it, the one with the "
        "highest validation score.": partial(_stop_with, "last before"),
        "It takes the first measurement beyond the budget: that is out already. Of all those within it, the one with "
        "the highest validation score.": partial(_stop_with, "first exceed"),
        "It takes the measurement whose KL is nearest to the budget: of those within it, the one with the highest "
        "validation score.": partial(_stop_with, "nearest"),
        "The proxy has a say here, beside the validation score: it is what the run climbs. Validation chooses alone.": (
            partial(_stop_with, "both")
        ),
        "This is gold at the start: report it where the validation score is highest.": partial(_stop_with, "start"),
        "These are the indices of the measurements: report gold there.": partial(_stop_with, "index"),
        "It stops at the first fall of the validation score: measurements are noisy, look at all of them.": (
            partial(_stop_with, "first fall")
        ),
        "Where two are equally good it takes the later one: the earlier one is nearer to the start.": (
            partial(_stop_with, "later")
        ),
        "It chooses one step for all runs: each run is stopped for itself.": partial(_stop_with, "together"),
        "Measurements beyond the budget count as a score of 0, which may be the highest: fill with -inf.": (
            partial(_stop_with, "zeros")
        ),
        "The index counts only the measurements within the budget, and is then looked up among all of them.": (
            partial(_stop_with, "earlier of the filtered")
        ),
    },
    hints=(
        "`validation.masked_fill(kl > budget, -math.inf)`; `argmax` gives the first of equal ones.",
        "`at = validation.masked_fill(kl > budget, -math.inf).argmax(1, keepdim=True)`, then `gold.gather(1, at)[:, "
        "0]`. `proxy` is there to be left alone.",
    ),
)
def gold_where_stopped(proxy: Tensor, validation: Tensor, gold: Tensor, kl: Tensor, budget: float) -> Tensor:
    """Gold where each run is stopped: [R].

    proxy, validation, gold, kl [R, S] float64: R runs, S measurements of each; the first has
    KL 0; budget in nats.
    """
    at = validation.masked_fill(kl > budget, -math.inf).argmax(1, keepdim=True)
    return gold.gather(1, at)[:, 0]


# 10.5 ----------------------------------------------------------------------------------------------------------------


def _ensemble_cases() -> list[Case]:
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


def _ensemble_with(bug: str, scores: Tensor, reference: Tensor, how: str) -> Tensor:
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


@exercise(
    "10.5",
    "several judges",
    difficulty=2,
    minutes=12,
    task="Where one reward model is fooled, another one, trained from another start, may not be. Combine $M$ of them: "
    "their mean, or for each answer the lowest of them (Coste et al.: worst-case optimisation). But a reward model's "
    "zero and its scale are its own (lesson 08). First bring each of them to one scale: mean 0 and standard deviation "
    "1 (`.std()`) over `reference`, its scores of a fixed set of the SFT model's answers.",
    cases=_ensemble_cases,
    suspects={
        "The scores are combined raw: the model with the largest scale rules the mean, and the lowest one is mostly "
        "the model whose zero lies lowest. Standardise each first.": partial(_ensemble_with, "raw"),
        "They are standardised over the batch at hand: then every batch has mean 0, however good it is, and PPO could "
        "not see that it gets better. Use the mean and deviation of `reference`.": partial(_ensemble_with, "own batch"),
        "One mean and one deviation for all models: each has its own, along dimension 1.": (
            partial(_ensemble_with, "all together")
        ),
        "The mean is not taken off: zero differs from model to model.": partial(_ensemble_with, "not centred"),
        "It does not divide by the deviation: the scale differs from model to model.": (
            partial(_ensemble_with, "not scaled")
        ),
        "Only the mean is divided: brackets.": partial(_ensemble_with, "brackets"),
        "It divides by the variance: by the standard deviation.": partial(_ensemble_with, "variance"),
        "The deviation divides by R: `.std()` divides by R - 1.": partial(_ensemble_with, "population"),
        "Mean and min are interchanged.": partial(_ensemble_with, "swapped"),
        "`how` is not looked at: min asks for the lowest.": partial(_ensemble_with, "always mean"),
        "`how` is not looked at: mean asks for the mean.": partial(_ensemble_with, "pessimist"),
        "It takes the highest: an optimist is fooled whenever one of them is.": partial(_ensemble_with, "max"),
        "It takes one model for all answers: the lowest of each answer.": partial(_ensemble_with, "one model"),
        "This is the lowest score of the whole batch: the lowest of each answer.": (
            partial(_ensemble_with, "one for all")
        ),
        "This is the median: the mean is asked for.": partial(_ensemble_with, "median"),
        "This is the sum: the mean, or beta's unit changes with the number of models.": partial(_ensemble_with, "sum"),
        "They are brought between the lowest and the highest of `reference`: mean 0 and standard deviation 1 are asked "
        "for.": partial(_ensemble_with, "range"),
        "They are combined first and standardised afterwards: bring each model to one scale before.": (
            partial(_ensemble_with, "afterwards")
        ),
        "They are standardised across the models, answer by answer: then their mean is 0 for every answer. Use each "
        "model's own mean and deviation over `reference`.": partial(_ensemble_with, "across"),
        "This is the mean minus the models' deviation (dividing by M), another cautious reward: the lowest is asked "
        "for.": partial(_ensemble_with, "doubt, M"),
        "This is the mean minus the models' deviation (dividing by M - 1), another cautious reward: the lowest is "
        "asked for.": partial(_ensemble_with, "doubt, M - 1"),
    },
    hints=(
        "`reference.mean(1, keepdim=True)` and `reference.std(1, keepdim=True)` are [M, 1], and fit `scores` [M, B].",
        '`standard = (scores - mean) / deviation`; `standard.mean(0) if how == "mean" else standard.amin(0)`',
    ),
)
def ensemble_reward(scores: Tensor, reference: Tensor, how: str) -> Tensor:
    """One reward per answer from M models: [B].

    scores [M, B] float64: of the answers; reference [M, R]: of the SFT model's answers;
    how is "mean" or "min".
    """
    mean, deviation = reference.mean(1, keepdim=True), reference.std(1, keepdim=True)
    standard = (scores - mean) / deviation
    return standard.mean(0) if how == "mean" else standard.amin(0)


# 10.6 ----------------------------------------------------------------------------------------------------------------


def _fresh_cases() -> list[Case]:
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


def _fresh_with(bug: str, prompts: Tensor, policies: Tensor, scores: Tensor) -> Tensor:
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


@exercise(
    "10.6",
    "pairs for the next round",
    difficulty=2,
    minutes=10,
    task="When a policy has left the answers its judge was trained on, ask the labelers again, about what it says "
    "*now*. Of all answers in the file, which pairs teach the judge what it does not know yet? Both answers must be of "
    "the **newest** policy (the highest number), to the **same** prompt, and the labeler must have preferred one: ties "
    "make no pair.",
    cases=_fresh_cases,
    suspects={
        "Answers to different prompts are compared: nobody ranked those against each other.": (
            partial(_fresh_with, "prompts")
        ),
        "Older policies' answers are in it: pairs whose two answers are both the newest policy's.": (
            partial(_fresh_with, "any policy")
        ),
        "Older policies' answers are in it: it is not enough that both are of one policy, it must be the newest.": (
            partial(_fresh_with, "one policy")
        ),
        "One answer of the newest policy is enough here: both must be. New against old mostly teaches what a hack "
        "looks like against an answer, which is easier.": partial(_fresh_with, "one of them"),
        "Only the better one must be new here: both must be.": partial(_fresh_with, "winner"),
        "Only the worse one must be new here: both must be.": partial(_fresh_with, "loser"),
        "A newer policy's answer is compared with an older one's: both must be the newest policy's.": (
            partial(_fresh_with, "newer wins")
        ),
        "These are the oldest policy's answers: the newest has the highest number.": partial(_fresh_with, "oldest"),
        "Ties make a pair here: the labeler preferred neither.": partial(_fresh_with, "ties"),
        "An answer is better than itself here: > and not >=.": partial(_fresh_with, "with itself"),
        "Each pair is there in both directions: [i, j] means that i is the better one.": (
            partial(_fresh_with, "both ways")
        ),
        "It is the wrong way round: [i, j] means that i, the row, is the better one.": partial(_fresh_with, "worse"),
        "The newest policy of each prompt is taken: a prompt that the newest policy has not answered makes no pair.": (
            partial(_fresh_with, "each prompt")
        ),
        "The last answer's policy is taken for the newest: the newest has the highest number.": (
            partial(_fresh_with, "last answer")
        ),
        "The scores are not looked at: only where i is the better one.": partial(_fresh_with, "no scores"),
        "Only i < j is looked at: where the later answer is the better one, the pair stands at [i, j] with i > j.": (
            partial(_fresh_with, "upper")
        ),
        "Only neighbours in the ranking are compared: use all pairs.": partial(_fresh_with, "neighbours"),
        "Only the best against the worst: a ranking of K answers has up to K (K - 1) / 2 pairs, use them all.": (
            partial(_fresh_with, "best and worst")
        ),
    },
    hints=(
        "`prompts[:, None] == prompts` is [N, N]: same prompt, for all pairs at once. Three such conditions, joined by "
        "`&`.",
        "`newest = policies == policies.max()`; `(prompts[:, None] == prompts) & newest[:, None] & newest & (scores[:, "
        "None] > scores)`",
    ),
)
def fresh_pairs(prompts: Tensor, policies: Tensor, scores: Tensor) -> Tensor:
    """True at [i, j] where answer i is the better one of a pair for the next round: bool [N, N].

    prompts and policies [N] int64: which prompt, and which policy's answer; scores [N] float64:
    the labeler's, higher is better.
    """
    newest = policies == policies.max()
    better = scores[:, None] > scores
    return (prompts[:, None] == prompts) & newest[:, None] & newest & better
