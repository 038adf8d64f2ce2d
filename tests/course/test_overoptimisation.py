"""Best of n against every choice one by one, its KL against exact distributions, ensembles, and a known curve."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from minirlhf_course.overoptimisation import EnsembleReward, best_of_n, best_of_n_kl, fit_curve


def every_choice(proxy, values, n: int) -> float:
    """The mean over all C(N, n) choices of what the best by proxy is worth; the best share it where some tie."""
    worth = []
    for chosen in itertools.combinations(range(len(proxy)), n):
        top = max(proxy[i] for i in chosen)
        winners = [values[i] for i in chosen if proxy[i] == top]
        worth.append(sum(winners) / len(winners))
    assert len(worth) == math.comb(len(proxy), n)
    return sum(worth) / len(worth)


def kl_of_best(p: torch.Tensor, n: int) -> float:
    """KL(best of n || p) of answers with probabilities p [K], in the order of their scores, the worst first."""
    below = torch.cat((torch.zeros(1, dtype=p.dtype), p.cumsum(0)))
    best = below[1:] ** n - below[:-1] ** n
    return float((best * (best / p).log()).sum())


# best_of_n -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", [1, 2, 5, 9])
def test_best_of_n_is_the_mean_over_every_choice(pool) -> None:
    generator = torch.Generator().manual_seed(pool)
    proxy, values = torch.randn(2, pool, generator=generator, dtype=torch.float64)
    for n in range(1, pool + 1):
        expected = every_choice(proxy.tolist(), values.tolist(), n)
        assert float(best_of_n(proxy, values, n)) == pytest.approx(expected, abs=1e-12)
        assert float(best_of_n(proxy, proxy, n)) == pytest.approx(every_choice(proxy.tolist(), proxy.tolist(), n))


def test_ties_share_what_they_win() -> None:
    proxy = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, -2.0], dtype=torch.float64)
    values = torch.tensor([3.0, 9.0, 5.0, -1.0, 2.0, 7.0], dtype=torch.float64)
    for n in range(1, 7):
        expected = every_choice(proxy.tolist(), values.tolist(), n)
        assert float(best_of_n(proxy, values, n)) == pytest.approx(expected, abs=1e-12)
    assert float(best_of_n(torch.zeros(6), values, 4)) == pytest.approx(float(values.mean())), "nobody is better"


def test_best_of_one_is_the_mean_and_best_of_all_is_the_best() -> None:
    proxy, values = torch.randn(2, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(best_of_n(proxy, values, 1)) == pytest.approx(float(values.mean()), abs=1e-12)
    assert float(best_of_n(proxy, values, 128)) == float(values[proxy.argmax()])
    means = [float(best_of_n(proxy, proxy, n)) for n in range(1, 129)]
    assert all(a < b for a, b in itertools.pairwise(means)), "the proxy's own best only rises"


def test_prompts_stand_apart_and_order_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(1)
    proxy, values = torch.randn(2, 3, 4, 10, generator=generator, dtype=torch.float64)
    together = best_of_n(proxy, values, 4)
    assert together.shape == (3, 4) and together.dtype == torch.float64
    order = torch.randperm(10, generator=generator)
    assert torch.allclose(together, best_of_n(proxy[..., order], values[..., order], 4))
    assert float(together[2, 1]) == pytest.approx(float(best_of_n(proxy[2, 1], values[2, 1], 4)))


def test_a_pool_is_unbiased() -> None:
    # All pools of 3 from 4 answers, equally likely: their estimates average to what the 4 themselves say.
    proxy, values = torch.randn(2, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    pools = torch.tensor(list(itertools.combinations(range(4), 3)))
    assert float(best_of_n(proxy[pools], values[pools], 2).mean()) == pytest.approx(float(best_of_n(proxy, values, 2)))


@pytest.mark.parametrize(("proxy", "values", "n", "message"), [
    (torch.zeros(3), torch.zeros(4), 1, "one shape"),
    (torch.zeros(3), torch.zeros(3), 0, "n must be in 1..3"),
    (torch.zeros(3), torch.zeros(3), 4, "n must be in 1..3"),
])  # fmt: skip
def test_best_of_n_refuses(proxy, values, n, message) -> None:
    with pytest.raises(ValueError, match=message):
        best_of_n(proxy, values, n)


# best_of_n_kl --------------------------------------------------------------------------------------------------------


def test_the_distribution_of_the_best_is_that_of_every_draw() -> None:
    p = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)
    best = torch.zeros(4, dtype=torch.float64)
    for drawn in itertools.product(range(4), repeat=3):
        best[max(drawn)] += p[list(drawn)].prod()
    assert kl_of_best(p, 3) == pytest.approx(float((best * (best / p).log()).sum()))


@pytest.mark.parametrize("n", [1, 2, 5, 32])
def test_the_formula_bounds_any_answers_and_is_reached_by_many(n) -> None:
    """With K answers, each with a score of its own, two draws may still be one answer: the formula is the limit."""
    generator = torch.Generator().manual_seed(n)
    for count in (2, 7, 50):
        p = torch.rand(count, generator=generator, dtype=torch.float64).add(0.1)
        assert kl_of_best(p / p.sum(), n) <= best_of_n_kl(n) + 1e-12
    short = [best_of_n_kl(n) - kl_of_best(torch.full((k,), 1 / k, dtype=torch.float64), n) for k in (100, 1000, 10_000)]
    assert all(left + 1e-9 >= right for left, right in itertools.pairwise([*short, 0.0])), "from below"
    assert short[2] < 0.001 * n


def test_the_formula_is_the_integral_over_a_quantile() -> None:
    # The best of n has density f = n u^(n-1) at the quantile u of the score, one sample has 1: KL is that of f log f.
    u = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    for n in (2, 4, 128):
        density = n * u ** (n - 1)
        integral = float(torch.special.xlogy(density, density).mean())
        assert integral == pytest.approx(best_of_n_kl(n), rel=1e-6)


def test_kl_of_best_of_none_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        best_of_n_kl(0)


# EnsembleReward ------------------------------------------------------------------------------------------------------


def length(prompts, responses):
    return [float(len(text)) for text in responses]


def vowels(prompts, responses):
    return torch.tensor([float(sum(letter in "aeiou" for letter in text)) for text in responses])


def test_an_ensemble_is_the_mean_or_the_lowest_of_its_members() -> None:
    prompts, responses = ["a", "b", "c"], ["newt", "eel", "oo"]
    assert EnsembleReward([length, vowels])(prompts, responses).tolist() == [2.5, 2.5, 2.0]
    assert EnsembleReward([length, vowels], "min")(prompts, responses).tolist() == [1.0, 2.0, 2.0]
    alone = EnsembleReward([length], "min")(prompts, responses)
    assert alone.tolist() == [4.0, 3.0, 2.0] and alone.dtype == torch.float32


@pytest.mark.parametrize(("rewards", "how"), [([], "mean"), ([length], "max")])
def test_an_ensemble_refuses(rewards, how) -> None:
    with pytest.raises(ValueError, match="an ensemble needs"):
        EnsembleReward(rewards, how)


# fit_curve -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 0.5), (0.3, -0.1), (0.0, 1.0)])
def test_a_known_curve_is_found(alpha, beta) -> None:
    d = torch.tensor([0.0, 0.4, 1.0, 1.5, 2.5, 4.0], dtype=torch.float64)
    assert fit_curve(d, d * (alpha - beta * d)) == pytest.approx((alpha, beta), abs=1e-9)


def test_the_fit_is_the_least_sum_of_squares() -> None:
    generator = torch.Generator().manual_seed(3)
    d = 3 * torch.rand(20, generator=generator, dtype=torch.float64)
    gain = d * (1.0 - 0.2 * d) + 0.1 * torch.randn(20, generator=generator, dtype=torch.float64)
    alpha, beta = fit_curve(d, gain)

    def squares(a: float, b: float) -> float:
        return float((gain - d * (a - b * d)).square().sum())

    least = squares(alpha, beta)
    assert all(least < squares(alpha + a, beta + b) for a, b in [(0.01, 0), (-0.01, 0), (0, 0.01), (0, -0.01)])
    assert abs(alpha - 1.0) < 0.3 and abs(beta - 0.2) < 0.15


@pytest.mark.parametrize("distance", [[], [0.0], [1.0, 1.0], [0.0, 2.0]])
def test_too_few_distances_are_refused(distance) -> None:
    with pytest.raises(ValueError, match="two different distances"):
        fit_curve(torch.tensor(distance), torch.tensor(distance))
