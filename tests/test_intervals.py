"""Intervals hold the truth as often as they say, also where values of one prompt depend on each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from minirlhf import intervals
from minirlhf.intervals import CONFIDENCE, bootstrap, effective_count, mean_and_error, wilson, win_rate

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clusters(count: int, low: int = 2, high: int = 4) -> Tensor:
    """The cluster of each value: so many clusters of low to high values."""
    return torch.arange(count).repeat_interleave(torch.randint(low, high + 1, (count,), generator=seeded(1)))


def outcomes(groups: Tensor, truth: float, together: float, runs: int) -> Tensor:
    """[runs, N] wins: all of a cluster are one draw with probability `together`, which is then their correlation."""
    shape, generator = (runs, int(groups.max()) + 1), seeded(2)
    as_one = (torch.rand(shape, generator=generator) < together)[:, groups]
    shared = (torch.rand(shape, generator=generator) < truth)[:, groups]
    own = torch.rand(runs, len(groups), generator=generator) < truth
    return torch.where(as_one, shared, own).double()


def coverage(low: Tensor, high: Tensor, truth: float) -> float:
    return float(((low <= truth) & (truth <= high)).double().mean())


@pytest.mark.parametrize(("count", "truth", "textbook"), [(64, 0.9, 0.89), (64, 0.99, 0.48), (800, 0.99, 0.91)])
def test_wilsons_interval_covers_where_the_textbooks_does_not(count: int, truth: float, textbook: float) -> None:
    wins = torch.arange(count + 1, dtype=F64)
    chance = torch.distributions.Binomial(count, torch.tensor(truth, dtype=F64)).log_prob(wins).exp()
    rate = wins / count
    half = CONFIDENCE * (rate * (1 - rate) / count).sqrt()
    for (low, high), least, most in (((rate - half, rate + half), 0, textbook), (wilson(rate, count), 0.93, 0.98)):
        exact = float(chance[(low <= truth) & (truth <= high)].sum())
        assert least <= exact <= most


def check_coverage(count: int, truth: float, together: float, runs: int) -> None:
    groups = clusters(count)
    won = outcomes(groups, truth, together, runs)
    assert coverage(*wilson(won.mean(1), effective_count(won, groups.tolist())), truth) >= 0.93
    if together >= 0.3 and count > 60:
        assert coverage(*wilson(won.mean(1), len(groups)), truth) < 0.93, "as if they were independent"


@pytest.mark.parametrize("together", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize(("count", "truth"), [(21, 0.9), (64, 0.9), (64, 0.99), (266, 0.99)])
def test_win_rates_cover_with_clusters(count: int, truth: float, together: float) -> None:
    check_coverage(count, truth, together, runs=2500)


@pytest.mark.slow
@pytest.mark.parametrize("together", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize(
    ("count", "truth"), [(21, 0.5), (21, 0.9), (64, 0.5), (64, 0.9), (64, 0.99), (266, 0.9), (266, 0.99)]
)
def test_win_rates_cover_with_clusters_more_closely(count: int, truth: float, together: float) -> None:
    check_coverage(count, truth, together, runs=20_000)


def check_bootstrap(count: int, runs: int, least: float) -> None:
    """Base, own and best score -2, 2 and 3 on average; luck with a prompt is shared, and a few answers are very bad."""
    groups, generator = clusters(count), seeded(3)
    held = {"gain": 0, "headroom": 0}
    for _ in range(runs):
        luck = torch.randn(count, generator=generator, dtype=F64)[groups]
        noise = torch.randn(3, len(groups), generator=generator, dtype=F64)
        bad = (torch.rand(len(groups), generator=generator) < 0.1).double() - 0.1
        base, own, best = -2 + luck + noise[0], 2 + luck / 2 + noise[1] / 2 - 3 * bad, 3 + noise[2] / 3
        for name, function, columns, truth in (
            ("gain", torch.sub, (own, base), 4.0),
            ("headroom", lambda a, b, c: (a - b) / (c - b), (own, base, best), 0.8),
        ):
            low, high = bootstrap(function, *columns, groups=groups.tolist())[1]
            held[name] += low <= truth <= high
    assert all(least <= hits / runs <= 0.98 for hits in held.values()), held


def test_the_bootstrap_covers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "RESAMPLES", 400)
    check_bootstrap(64, runs=300, least=0.91)


@pytest.mark.slow
@pytest.mark.parametrize("count", [20, 64, 266])
def test_the_bootstrap_covers_more_closely(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(intervals, "RESAMPLES", 1000)
    check_bootstrap(count, runs=1000, least=0.93)


def test_win_rate() -> None:
    rate, (low, high) = win_rate([1.0] * 50 + [0.0] * 50, [0.5] * 100)
    half = 1.96 / (1 + 1.96**2 / 100) * (0.25 / 100 + 1.96**2 / 40_000) ** 0.5
    assert rate == 0.5 and low == pytest.approx(0.5 - half) and high == pytest.approx(0.5 + half)
    # All won: n / (n + z^2). All lost: the same, turned round.
    assert win_rate([1.0] * 30, [0.0] * 30) == (1.0, pytest.approx((30 / (30 + 1.96**2), 1.0)))
    assert win_rate([0.0] * 30, [1.0] * 30) == (0.0, pytest.approx((0.0, 1.96**2 / (30 + 1.96**2))))
    for wins in range(31):
        rate, (low, high) = win_rate([1.0] * wins + [0.0] * (30 - wins), [0.5] * 30)
        assert 0 <= low <= rate <= high <= 1 and high - low > 0.1


def test_ties_count_half_and_are_outcomes() -> None:
    assert win_rate([1.0] * 8, [1.0] * 8) == win_rate([1.0] * 4 + [0.0] * 4, [0.5] * 8)
    assert win_rate([1.0, 1.0, 0.0], [0.0, 1.0, 0.0])[0] == pytest.approx(2 / 3)


def test_the_same_prompt_twice_is_no_new_evidence() -> None:
    scores, prompts = [1.0, 2.0, 4.0], ["a", "b", "c"]
    assert mean_and_error(scores * 4, prompts * 4) == pytest.approx(mean_and_error(scores))
    assert mean_and_error(scores * 4)[1] < 0.6 * mean_and_error(scores)[1]
    for own, other in (([1.0, 0.0, 1.0], [0.0, 1.0, 1.0]), ([1.0] * 3, [0.0] * 3)):
        once = win_rate(own, other)
        again = win_rate(own * 4, other * 4, prompts * 4)
        assert (again[0], *again[1]) == pytest.approx((once[0], *once[1]))
    assert bootstrap(torch.sub, scores * 4, [0.0] * 12, groups=prompts * 4) == bootstrap(torch.sub, scores, [0.0] * 3)


def test_the_effective_count_lies_between_that_of_equal_and_that_of_independent_outcomes() -> None:
    groups = clusters(30, 1, 6)
    sizes = groups.bincount().double()
    least, names = float(sizes.sum() ** 2 / sizes.square().sum()), groups.tolist()
    for together in (0.0, 0.5, 1.0):
        count = effective_count(outcomes(groups, 0.8, together, 500), names)
        assert count.shape == (500,) and bool((count >= least * (1 - 1e-9)).all() and (count <= len(groups)).all())
    for equal in (torch.zeros(len(groups), dtype=F64), torch.ones(len(groups), dtype=F64)):
        assert float(effective_count(equal, names)) == pytest.approx(least), "nothing is known: the worst is assumed"
    independent = effective_count(outcomes(groups, 0.5, 0.0, 500), names).mean() / len(groups)
    assert independent > 0.85, "and where the data say that they are independent, little is lost"


def test_mean_and_error() -> None:
    mean, error = mean_and_error([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5 and error == pytest.approx((5 / 3) ** 0.5 / 2)


def test_bootstrap_agrees_with_the_standard_error_of_many_groups() -> None:
    groups = clusters(400)
    values = torch.randn(400, generator=seeded(), dtype=F64)[groups] + torch.randn(len(groups), generator=seeded(1))
    mean, error = mean_and_error(values, groups.tolist())
    value, (low, high) = bootstrap(lambda x: x, values, groups=groups.tolist())
    assert value == pytest.approx(mean)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.06) and low < value < high


def test_bootstrap_is_paired_and_a_function_of_its_seed() -> None:
    easy = 5 * torch.randn(200, generator=seeded(), dtype=F64)
    gain = 1 + 0.1 * torch.randn(200, generator=seeded(1), dtype=F64)
    value, (low, high) = bootstrap(torch.sub, easy + gain, easy)
    assert value == pytest.approx(1, abs=0.03) and high - low < 0.05, "what is hard for both cancels"
    assert bootstrap(torch.sub, easy + gain, easy) == (value, (low, high))
    assert bootstrap(torch.sub, easy + gain, easy, seed=1) != (value, (low, high))
    assert bootstrap(torch.sub, easy, easy) == (0, (0, 0))


def test_a_single_prompt_says_nothing_of_others() -> None:
    for values, groups in (([2.0], None), ([2.0, 3.0], ["a", "a"])):
        assert math.isnan(mean_and_error(values, groups)[1])
        value, ends = bootstrap(lambda x: x, values, groups=groups)
        assert value == mean_and_error(values)[0] and all(map(math.isnan, ends))
        assert win_rate(values, [0.0] * len(values), groups)[1] == pytest.approx((1 / (1 + 1.96**2), 1.0))
