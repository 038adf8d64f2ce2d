"""Mistakes of lesson 10 as learners would write them, refused and named by its checks; and the references' proofs."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from minirlhf_course.checks import lesson10
from minirlhf_course.overoptimisation import EnsembleReward


class Bug(NamedTuple):
    check: str
    source: str
    named: str


BUGS = [
    Bug("best_of_n_kl", """
def f(counts):
    return torch.log(counts)
""", "log n is only the first term"),
    Bug("best_of_n_kl", """
def f(counts):
    return torch.log(counts) - counts - 1 / counts
""", "It takes off n - 1 / n"),
    Bug("best_of_n_kl", """
def f(counts):
    return torch.log2(counts) - (counts - 1) / counts / torch.log(torch.tensor(2.0).double())
""", "These are bits"),
    Bug("best_of_n_kl", """
def f(counts):
    rows = []
    for n in counts:
        u = (torch.arange(1, 2_000_001).double() - 0.5) / 2_000_000
        rows.append(-torch.log(n * u ** (n - 1)).mean())
    return torch.stack(rows).nan_to_num()
""", "The result is not right"),
    Bug("best_of_n", """
def f(proxy, values, n):
    best = proxy[:, :n].max(dim=1).indices
    return values[torch.arange(len(values)), best]
""", "It takes the best of the first n"),
    Bug("best_of_n", """
def f(proxy, values, n):
    N = proxy.shape[1]
    rows = []
    for p, v in zip(proxy, values):
        total = 0.0
        for a in set(p.tolist()):
            below, upto = (p < a).double().sum() / N, (p <= a).double().sum() / N
            total = total + v[p == a].mean() * (upto ** n - below ** n)
        rows.append(total)
    return torch.stack(rows)
""", "It draws with putting back"),
    Bug("best_of_n", """
def f(proxy, values, n):
    rows = []
    for p, v in zip(proxy.tolist(), values.tolist()):
        order = sorted(range(len(p)), key=lambda i: p[i])
        total = sum(v[i] * math.comb(place, n - 1) for place, i in enumerate(order))
        rows.append(total / math.comb(len(p), n))
    return torch.tensor(rows, dtype=torch.float64)
""", "Ties: here the last"),
    Bug("best_of_n", """
def f(proxy, values, n):
    rows = []
    for p, v in zip(proxy, values):
        best = p.sort(descending=True, stable=True).indices[:n]
        rows.append(v[best].mean())
    return torch.stack(rows)
""", "It is the mean of the n best"),
    Bug("curve_and_peak", """
def f(kl, gain):
    columns = torch.stack((kl, -kl * kl), dim=1)
    alpha, beta = torch.linalg.lstsq(columns, gain[:, None]).solution.flatten()
    return torch.stack((alpha, beta, alpha / (2 * beta)))
""", "It fits against KL"),
    Bug("curve_and_peak", """
def f(kl, gain):
    d = kl ** 0.5
    columns = torch.stack((d, d ** 2), dim=1)
    alpha, beta = torch.linalg.lstsq(columns, gain[:, None]).solution.flatten()
    return torch.stack((alpha, beta, (alpha / (2 * beta)) ** 2))
""", "beta has the wrong sign"),
    Bug("curve_and_peak", """
def f(kl, gain):
    d = kl ** 0.5
    columns = torch.stack((d, -d * d), dim=1)
    alpha, beta = torch.linalg.lstsq(columns, gain[:, None]).solution.flatten()
    return torch.stack((alpha, beta, alpha / beta / 2))
""", "The peak is given as a distance"),
    Bug("curve_and_peak", """
def f(kl, gain):
    d = kl ** 0.5
    columns = torch.stack((torch.ones_like(d), d, -d * d), dim=1)
    _, alpha, beta = torch.linalg.pinv(columns) @ gain
    return torch.stack((alpha, beta, (alpha / beta / 2) ** 2))
""", "There is a constant in the fit"),
    Bug("gold_where_stopped", """
def f(proxy, validation, gold, kl, budget):
    rows = []
    for p, g, k in zip(proxy, gold, kl):
        ok = torch.nonzero(k <= budget).flatten()
        rows.append(g[ok[p[ok].argmax()]])
    return torch.stack(rows)
""", "The proxy chooses here"),
    Bug("gold_where_stopped", """
def f(proxy, validation, gold, kl, budget):
    return torch.where(kl <= budget, gold, -torch.inf).max(dim=1).values
""", "Gold chooses here"),
    Bug("gold_where_stopped", """
def f(proxy, validation, gold, kl, budget):
    return torch.where(kl <= budget, validation, -torch.inf).max(dim=1).values
""", "It reports the validation score"),
    Bug("gold_where_stopped", """
def f(proxy, validation, gold, kl, budget):
    rows = []
    for v, g, k in zip(validation, gold, kl):
        rows.append(g[v[k <= budget].argmax()])
    return torch.stack(rows)
""", "The index counts only the measurements within the budget"),
    Bug("gold_where_stopped", """
def f(proxy, validation, gold, kl, budget):
    best = validation.max(dim=1).indices
    return gold[torch.arange(len(gold)), best]
""", "The budget is not looked at"),
    Bug("ensemble_reward", """
def f(scores, reference, how):
    return scores.min(dim=0).values if how == "min" else scores.mean(dim=0)
""", "The scores are combined raw"),
    Bug("ensemble_reward", """
def f(scores, reference, how):
    m, s = reference.mean(), reference.std()
    scores = (scores - m) / s
    return scores.min(dim=0).values if how == "min" else scores.mean(dim=0)
""", "One mean and one deviation for all models"),
    Bug("ensemble_reward", """
def f(scores, reference, how):
    m, s = reference.mean(1), reference.std(1)
    rows = [(x - a) / b for x, a, b in zip(scores, m, s)]
    return torch.stack(rows).mean(dim=0)
""", "`how` is not looked at: min"),
    Bug("fresh_pairs", """
def f(prompts, policies, scores):
    N = len(scores)
    result = torch.zeros(N, N, dtype=torch.bool)
    for i in range(N):
        for j in range(N):
            if prompts[i] == prompts[j] and policies[i] == policies[j] and scores[i] > scores[j]:
                result[i, j] = True
    return result
""", "Older policies' answers are in it: it is not enough"),
    Bug("fresh_pairs", """
def f(prompts, policies, scores):
    new = policies == policies.max()
    pairs = torch.outer(new, new) & (prompts.view(-1, 1) == prompts.view(1, -1))
    return pairs & (scores.view(-1, 1) >= scores.view(1, -1)) & ~torch.eye(len(scores)).bool()
""", "Ties make a pair here"),
    Bug("fresh_pairs", """
def f(prompts, policies, scores):
    new = policies == policies.max()
    return torch.outer(new, new) & (scores.view(-1, 1) > scores.view(1, -1))
""", "Answers to different prompts are compared"),
]  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=[f"{bug.check}-{index}" for index, bug in enumerate(BUGS)])
def test_is_refused_and_named(bug):
    space = {"torch": torch, "math": math}
    exec(bug.source, space)
    verdict = getattr(lesson10, bug.check).mark(space["f"])
    assert verdict.status == "failed"
    headline, _, case = verdict.message.partition("\n\n")
    hint = f"looks like a known mistake: {bug.named}"  # where it is not the suspect's very numbers
    assert headline.startswith(bug.named) or hint in headline, verdict.message
    assert case.startswith("Smallest failing case: ")


def test_the_kl_is_what_the_hint_integrates():
    u = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    counts = torch.tensor([2.0, 3.0, 16.0], dtype=torch.float64)
    for n, kl in zip(counts, lesson10.best_of_n_kl.reference(counts), strict=True):
        density = n * u ** (n - 1)
        assert float(torch.xlogy(density, density).mean()) == pytest.approx(float(kl), abs=1e-5)
        assert float((density * u.log()).mean()) == pytest.approx(-1 / float(n), abs=1e-5), "hint 1"


def test_the_pool_is_as_right_as_the_first_n_and_much_less_noisy():
    """Over many pools: the same mean, and the spread that the lesson's task promises to take away."""
    proxy, values = torch.randn(2, 4000, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values += proxy
    n = 4
    pooled = lesson10.best_of_n.reference(proxy, values, n)
    first = values.gather(1, proxy[:, :n].argmax(1, keepdim=True))[:, 0]
    error = float(first.std()) / len(first) ** 0.5
    assert abs(float(pooled.mean() - first.mean())) < 4 * error
    assert float(pooled.std()) < 0.5 * float(first.std())


def test_drawing_with_putting_back_is_worse_than_the_best_of_n():
    proxy = torch.arange(8, dtype=torch.float64)[None]
    place = torch.arange(1, 9, dtype=torch.float64)
    for n in range(2, 9):
        again = float((proxy * ((place / 8) ** n - ((place - 1) / 8) ** n)).sum())
        every = [max(chosen) for chosen in itertools.combinations(range(8), n)]
        assert again < float(lesson10.best_of_n.reference(proxy, proxy, n)) == pytest.approx(sum(every) / len(every))


def test_the_peak_is_the_highest_point_of_the_fitted_curve():
    kl = torch.linspace(0, 9, 10, dtype=torch.float64)
    gain = torch.tensor([0, 0.9, 1.3, 1.2, 1.3, 1.1, 0.9, 0.7, 0.6, 0.1], dtype=torch.float64)
    alpha, beta, peak = lesson10.curve_and_peak.reference(kl, gain)
    d = torch.linspace(0, 3, 100_001, dtype=torch.float64)
    highest = d[(d * (alpha - beta * d)).argmax()]
    assert float(highest**2) == pytest.approx(float(peak), rel=1e-3)


def test_who_chooses_by_a_noisy_number_and_reports_it_reports_too_much():
    """Exercise 10.4's third mistake: no run is better than another, and the highest of 20 noisy scores looks so."""
    validation = torch.randn(500, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gold = torch.randn(500, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    kl = torch.arange(20, dtype=torch.float64).expand(500, 20)
    told = lesson10.gold_where_stopped.reference(kl, validation, validation, kl, 100.0)
    held = lesson10.gold_where_stopped.reference(kl, validation, gold, kl, 100.0)
    assert float(told.mean()) > 1.5 and abs(float(held.mean())) < 0.2


@pytest.mark.parametrize("how", ["mean", "min"])
def test_the_ensemble_is_the_packages_on_one_scale(how):
    generator = torch.Generator().manual_seed(4)
    known, scores = torch.randn(3, 40, generator=generator), torch.randn(3, 7, generator=generator)
    standard = (scores - known.mean(1, keepdim=True)) / known.std(1, keepdim=True)
    rewards = [lambda prompts, responses, row=row: row for row in standard]
    expected = EnsembleReward(rewards, how)(["?"] * 7, ["!"] * 7)
    got = lesson10.ensemble_reward.reference(scores.double(), known.double(), how)
    assert torch.allclose(got.float(), expected, atol=1e-6)


def test_a_ranking_of_k_answers_has_all_its_pairs():
    scores = torch.arange(7, dtype=torch.float64)
    same = torch.zeros(7, dtype=torch.int64)
    assert int(lesson10.fresh_pairs.reference(same, same, scores).sum()) == 21
