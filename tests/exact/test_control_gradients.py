"""Each estimator of the ladder against the exact policy gradient, over every episode that can happen (Proof 2).

The mean of an estimator is a sum over the listed episodes, its variance too: nothing here is sampled.
"""

import pytest
import torch
from minirlhf_course.tiny import bandit, chain, gradient_estimates, gridworld, text_mdp

from minirlhf.returns import discounted_returns, gae, n_step_advantages, td_errors

F64 = torch.float64
PROBLEMS = {"bandit": bandit(), "chain": chain(3, gamma=0.9).with_horizon(5), "text": text_mdp()}


class Exact:
    """A problem, a policy, all its episodes; mean and total variance of any estimator."""

    def __init__(self, problem, seed=0):
        self.problem = problem
        self.theta = torch.randn(problem.shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
        self.episodes, self.probabilities = problem.enumerate(self.theta)
        self.gradient = problem.policy_gradient(self.theta)

    def at(self, values):
        """A value a state [S], at each step [N, T]; NaN where nothing was played, which must not matter."""
        return values[self.episodes.states].masked_fill(~self.episodes.mask, torch.nan)

    def weights(self, kind, values, **options):
        e, gamma = self.episodes, self.problem.gamma
        if kind == "reinforce":
            return discounted_returns(e.rewards, e.ends, gamma, mask=e.mask)
        if kind == "baseline":
            return discounted_returns(e.rewards, e.ends, gamma, mask=e.mask) - self.at(values)
        if kind == "one-step":
            return td_errors(e.rewards, self.at(values), e.ends, gamma, mask=e.mask)
        if kind == "n-step":
            return n_step_advantages(e.rewards, self.at(values), e.ends, gamma, options["n"], mask=e.mask)
        return gae(e.rewards, self.at(values), e.ends, gamma=gamma, lam=options["lam"], mask=e.mask)[0]

    def moments(self, weights):
        estimates = gradient_estimates(self.episodes, self.theta, weights, self.problem.gamma)
        mean = torch.einsum("n,nsa->sa", self.probabilities, estimates)
        variance = (self.probabilities * (estimates - mean).square().sum((1, 2))).sum()
        return mean, float(variance)

    def bias(self, weights):
        return float((self.moments(weights)[0] - self.gradient).norm() / self.gradient.norm())


@pytest.fixture(params=PROBLEMS, scope="module")
def exact(request):
    return Exact(PROBLEMS[request.param])


def test_reinforce_is_unbiased(exact):
    assert exact.bias(exact.weights("reinforce", None)) < 1e-12


def test_any_baseline_keeps_the_mean_and_the_value_lowers_the_variance(exact):
    v = exact.problem.values(exact.theta)
    plain = exact.moments(exact.weights("reinforce", None))[1]
    for baseline in (v, torch.full_like(v, 7.0), torch.arange(len(v), dtype=F64)):
        assert exact.bias(exact.weights("baseline", baseline)) < 1e-12
    assert exact.moments(exact.weights("baseline", v))[1] < plain
    assert exact.moments(exact.weights("baseline", torch.full_like(v, 7.0)))[1] > plain  # a poor one raises it


def test_the_gain_is_large_where_all_returns_are_far_from_zero():
    """Rewards of 11, 12 and 13: the choice matters as much as with 1, 2 and 3, the variance of REINFORCE does not."""
    near, far = Exact(bandit([1.0, 2.0, 3.0])), Exact(bandit([11.0, 12.0, 13.0]))
    torch.testing.assert_close(near.gradient, far.gradient)
    near_plain, far_plain = (e.moments(e.weights("reinforce", None))[1] for e in (near, far))
    near_based, far_based = (e.moments(e.weights("baseline", e.problem.values(e.theta)))[1] for e in (near, far))
    assert near_based == pytest.approx(far_based)
    assert near_plain > near_based and far_plain > 50 * far_based


@pytest.mark.parametrize(
    ("kind", "options"), [("one-step", {}), ("n-step", {"n": 2}), ("gae", {"lam": 0.0}), ("gae", {"lam": 0.7})]
)
def test_with_the_exact_value_bootstrapping_is_unbiased(exact, kind, options):
    v = exact.problem.values(exact.theta)
    assert exact.bias(exact.weights(kind, v, **options)) < 1e-12


def test_with_a_wrong_value_bias_falls_and_variance_grows_as_lambda_goes_to_one():
    exact = Exact(PROBLEMS["chain"])
    wrong = 0.5 * exact.problem.values(exact.theta) + 0.2
    lams = (0.0, 0.25, 0.5, 0.75, 1.0)
    biases = [exact.bias(exact.weights("gae", wrong, lam=lam)) for lam in lams]
    assert biases == sorted(biases, reverse=True) and biases[0] > 0.05
    assert biases[-1] < 1e-12
    right = exact.problem.values(exact.theta)
    variances = [exact.moments(exact.weights("gae", right, lam=lam))[1] for lam in lams]
    assert variances == sorted(variances)


def test_a_longer_look_ahead_leans_less_on_a_wrong_value():
    exact = Exact(PROBLEMS["chain"])
    wrong = 0.5 * exact.problem.values(exact.theta) + 0.2
    biases = [exact.bias(exact.weights("n-step", wrong, n=n)) for n in (1, 2, 3, 4, 5)]
    assert biases == sorted(biases, reverse=True) and biases[0] > 0.05 and biases[-1] < 1e-12


def test_sampled_episodes_agree_with_the_truth_within_their_error():
    """The same on a problem whose episodes can't be listed."""
    problem = gridworld()
    theta = torch.randn(problem.shape, generator=torch.Generator().manual_seed(2), dtype=F64)
    episodes = problem.sample(theta, 4000, torch.Generator().manual_seed(3))
    assert bool(episodes.ends.any(1).all())
    G = discounted_returns(episodes.rewards, episodes.ends, problem.gamma, mask=episodes.mask)
    v = problem.values(theta)[episodes.states]
    spread = {}
    for name, weights in (("returns", G), ("baseline", G - v)):
        estimates = gradient_estimates(episodes, theta, weights, problem.gamma)
        error = estimates.mean(0) - problem.policy_gradient(theta)
        standard = estimates.std(0) / len(estimates) ** 0.5
        assert float((error.abs() / (standard + 1e-12)).max()) < 4.5
        spread[name] = float(estimates.var(0).sum())
    assert spread["baseline"] < spread["returns"]
