"""Best of n against every choice one by one, its KL against the integral, ensembles, and a known curve."""

import itertools

import pytest
import torch
from minirlhf_course.overoptimisation import EnsembleReward, best_of_n, best_of_n_kl, fit_curve

F64 = torch.float64


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def every_choice(proxy: list[float], values: list[float], n: int) -> float:
    """The mean over all C(N, n) choices of what the best by proxy is worth; the best share it where some tie."""
    worth = []
    for chosen in itertools.combinations(range(len(proxy)), n):
        top = max(proxy[i] for i in chosen)
        winners = [values[i] for i in chosen if proxy[i] == top]
        worth.append(sum(winners) / len(winners))
    return sum(worth) / len(worth)


POOLS = [randn(2, size, seed=size) for size in (1, 2, 5, 9)]
POOLS += [torch.tensor([[1, 0, 1, 1, 0, -2], [3, 9, 5, -1, 2, 7]], dtype=F64)]  # with ties
POOLS += [torch.tensor([[0, 0, 0, 0], [4, -1, 2, 7]], dtype=F64)]  # nobody is better


@pytest.mark.parametrize("pool", POOLS)
def test_best_of_n_is_the_mean_over_every_choice(pool) -> None:
    proxy, values = pool
    for n in range(1, len(proxy) + 1):
        for worth in (values, proxy):
            expected = every_choice(proxy.tolist(), worth.tolist(), n)
            assert float(best_of_n(proxy, worth, n)) == pytest.approx(expected, abs=1e-12)


def test_best_of_one_is_the_mean_and_best_of_all_is_the_best() -> None:
    proxy, values = randn(2, 128, seed=0)
    assert float(best_of_n(proxy, values, 1)) == pytest.approx(float(values.mean()), abs=1e-12)
    assert float(best_of_n(proxy, values, 128)) == float(values[proxy.argmax()])
    means = [float(best_of_n(proxy, proxy, n)) for n in range(1, 129)]
    assert all(a < b for a, b in itertools.pairwise(means)), "the proxy's own best only rises"


def test_prompts_stand_apart_and_order_does_not_matter() -> None:
    proxy, values = randn(2, 3, 4, 10, seed=1)
    together = best_of_n(proxy, values, 4)
    assert together.shape == (3, 4) and together.dtype == F64
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(together, best_of_n(proxy[..., order], values[..., order], 4))
    assert float(together[2, 1]) == pytest.approx(float(best_of_n(proxy[2, 1], values[2, 1], 4)))


@pytest.mark.parametrize(
    ("proxy", "values", "n", "message"), [(3, 4, 1, "one shape"), (3, 3, 0, "in 1..3"), (3, 3, 4, "in 1..3")]
)
def test_best_of_n_refuses(proxy: int, values: int, n: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        best_of_n(torch.zeros(proxy), torch.zeros(values), n)


def test_the_kl_is_the_integral_over_a_quantile() -> None:
    # The best of n has density f = n u^(n-1) at the quantile u of the score, one sample has 1: KL is that of f log f.
    u = (torch.arange(1_000_000, dtype=F64) + 0.5) / 1_000_000
    for n in (1, 2, 4, 128):
        density = n * u ** (n - 1)
        integral = float(torch.special.xlogy(density, density).mean())
        assert integral == pytest.approx(best_of_n_kl(n), rel=1e-6)
    with pytest.raises(ValueError, match="at least 1"):
        best_of_n_kl(0)


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


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 0.5), (0.3, -0.1), (0.0, 1.0)])
def test_a_known_curve_is_found(alpha, beta) -> None:
    d = torch.tensor([0.0, 0.4, 1.0, 1.5, 2.5, 4.0], dtype=F64)
    assert fit_curve(d, d * (alpha - beta * d)) == pytest.approx((alpha, beta), abs=1e-9)


def test_the_fit_is_the_least_sum_of_squares() -> None:
    d = randn(20, seed=3).abs()
    gain = d * (1.0 - 0.2 * d) + 0.1 * randn(20, seed=4)
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
