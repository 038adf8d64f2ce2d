"""Each estimator of the ladder against the exact policy gradient, over every episode that can happen (Proof 2).

Nothing is sampled: all episodes are listed with their probabilities, the package's loss is taken on each, and the mean
and the variance of its gradient are sums. The problems' own truths are proved in test_control_tiny.py.
"""

import pytest
import torch
from minirlhf_course.tiny import TinyMDP, bandit, chain, gradient_estimates, gridworld, text_mdp

from minirlhf.losses import policy_gradient_loss, token_logprobs
from minirlhf.returns import discounted_returns, gae, n_step_advantages, td_errors, whiten

F64 = torch.float64


def random_world():
    """Two states, two actions, three steps; random moves; action 1 in state 1 ends the episode."""
    generator = torch.Generator().manual_seed(0)
    moves = torch.randn(2, 2, 2, generator=generator, dtype=F64).softmax(-1)
    moves[1, 1] = 0.0
    rewards = torch.randn(2, 2, generator=generator, dtype=F64)
    return TinyMDP(moves, rewards, torch.tensor([0.5, 0.5], dtype=F64), 0.9, ("0", "1"), ("0", "1")).with_horizon(3)


class Exact:
    """A problem, a policy and all its episodes; weights of each step, and the mean and total variance that they give.

    What was not played is NaN, in rewards and values: it must not matter.
    """

    def __init__(self, problem, seed=0):
        self.problem, self.gamma = problem, problem.gamma
        self.theta = torch.randn(problem.shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
        self.episodes, self.probabilities = problem.enumerate(self.theta)
        self.mask, self.ends = self.episodes.mask, self.episodes.ends
        self.rewards = self.episodes.rewards.masked_fill(~self.mask, torch.nan)
        self.v = problem.values(self.theta)
        self.wrong = self.v + 3.0 + torch.arange(len(self.v))

    def at(self, values):
        """The values of states [S], looked up at each step [N, T]."""
        return values[self.episodes.states].masked_fill(~self.mask, torch.nan)

    def returns(self):
        return discounted_returns(self.rewards, self.ends, self.gamma, mask=self.mask)

    def one_step(self, values):
        return td_errors(self.rewards, self.at(values), self.ends, self.gamma, mask=self.mask)

    def n_step(self, values, n):
        return n_step_advantages(self.rewards, self.at(values), self.ends, self.gamma, n, mask=self.mask)

    def gae(self, values, lam, **options):
        options = {"ends": self.ends, "gamma": self.gamma, "mask": self.mask} | options
        return gae(self.rewards, self.at(values), lam=lam, **options)[0]

    def estimates(self, weights):
        """One gradient per episode [N, S, A], gamma^t and all, through the package's loss."""
        tables = self.theta.expand(len(self.mask), -1, -1).clone().requires_grad_()
        logits = tables[torch.arange(len(tables)).unsqueeze(1), self.episodes.states]
        discounts = self.gamma ** torch.arange(self.mask.shape[1], dtype=F64)
        logprobs = token_logprobs(logits, self.episodes.actions, mask=self.mask)
        loss = policy_gradient_loss(logprobs, discounts * weights, self.mask, denominator=1)
        return -torch.autograd.grad(loss, tables)[0]

    def mean(self, estimates):
        return torch.einsum("n,nsa->sa", self.probabilities, estimates)

    def variance(self, weights):
        estimates = self.estimates(weights)
        return float(self.probabilities @ (estimates - self.mean(estimates)).square().sum((1, 2)))

    def error(self, estimates):
        exact = self.problem.policy_gradient(self.theta)
        return float((self.mean(estimates) - exact).norm() / exact.norm())

    def bias(self, weights):
        return self.error(self.estimates(weights))


EXACT = {
    "bandit": Exact(bandit()),
    "chain": Exact(chain(3, gamma=0.9).with_horizon(5)),
    "text": Exact(text_mdp()),
    "random": Exact(random_world()),
}
UNBIASED = {
    "returns": lambda x: x.returns(),
    "baseline": lambda x: x.returns() - x.at(x.v),
    "constant baseline": lambda x: x.returns() - 7.0,
    "any baseline": lambda x: x.returns() - x.at(torch.arange(len(x.v), dtype=F64)),
    "wrong baseline": lambda x: x.returns() - x.at(x.wrong),
    "one-step": lambda x: x.one_step(x.v),
    "two-step": lambda x: x.n_step(x.v, 2),
    "gae 0": lambda x: x.gae(x.v, 0.0),
    "gae 0.7": lambda x: x.gae(x.v, 0.7),
    "gae 1": lambda x: x.gae(x.v, 1.0),
    "gae 1 of a wrong value": lambda x: x.gae(x.wrong, 1.0),
}
MISTAKES = {
    "one-step of a wrong value": lambda x: x.one_step(x.wrong),
    "two-step of a wrong value": lambda x: x.n_step(x.wrong, 2),
    "gae of a wrong value": lambda x: x.gae(x.wrong, 0.7),
    "museum 6: missing minus sign": lambda x: -x.returns(),
    "museum 7: A = r - V for G - V": lambda x: x.rewards - x.at(x.v),
    "museum 8: rewards of padding leak into returns": lambda x: discounted_returns(
        x.rewards.nan_to_num(1.0), torch.zeros_like(x.ends), x.gamma
    ),
    "museum 10: reward stored a step early": lambda x: discounted_returns(
        x.rewards.nan_to_num(0.0).roll(-1, 1), x.ends, x.gamma, mask=x.mask
    ),
    "museum 12: ends belong to the step before": lambda x: x.gae(x.v, 1.0, ends=x.ends.roll(1, 1)),
    "museum 22: the end treated as truncation": lambda x: x.gae(
        x.v, 1.0, truncated_values=1.0 + x.episodes.states.double()
    ),
    "returns whitened over all episodes": lambda x: whiten(x.returns(), x.mask),
}


@pytest.fixture(params=EXACT)
def exact(request):
    return EXACT[request.param]


@pytest.mark.parametrize("kind", UNBIASED)
def test_every_estimator_has_the_exact_gradient_as_its_mean(exact, kind):
    assert exact.bias(UNBIASED[kind](exact)) < 1e-12


@pytest.mark.parametrize("kind", MISTAKES)
def test_the_proof_refuses(kind):
    exact = EXACT["random"]
    assert exact.bias(MISTAKES[kind](exact)) > 0.1


def test_the_courses_estimates_are_the_gradients_of_the_packages_loss(exact):
    estimates = gradient_estimates(exact.episodes, exact.theta, exact.returns(), exact.gamma)
    torch.testing.assert_close(estimates, exact.estimates(exact.returns()), rtol=1e-10, atol=1e-12)


def test_leaving_out_gamma_t_biases_the_gradient_of_the_discounted_return():
    exact = Exact(chain(3, gamma=0.5).with_horizon(4))
    estimates = gradient_estimates(exact.episodes, exact.theta, exact.returns(), 1.0)
    assert exact.bias(exact.returns()) < 1e-12 < 0.1 < exact.error(estimates)


def test_a_baseline_lowers_the_variance_a_poor_one_raises_it_and_bootstrapping_lowers_it_further(exact):
    variance = {kind: exact.variance(weights(exact)) for kind, weights in UNBIASED.items()}
    assert variance["baseline"] < variance["returns"] < variance["constant baseline"]
    assert variance["baseline"] < variance["wrong baseline"]
    if exact is not EXACT["bandit"]:  # with a single step there is nothing to look ahead to
        assert variance["one-step"] < variance["gae 0.7"] < variance["baseline"]


def test_the_gain_is_large_where_all_returns_are_far_from_zero():
    """Rewards of 11, 12 and 13: the choice matters as much as with 1, 2 and 3, the variance of REINFORCE does not."""
    near, far = Exact(bandit([1.0, 2.0, 3.0])), Exact(bandit([11.0, 12.0, 13.0]))
    torch.testing.assert_close(*(x.mean(x.estimates(x.returns())) for x in (near, far)))
    near_plain, far_plain = (x.variance(x.returns()) for x in (near, far))
    near_based, far_based = (x.variance(x.returns() - x.at(x.v)) for x in (near, far))
    assert near_based == pytest.approx(far_based)
    assert near_plain > near_based and far_plain > 50 * far_based


def test_with_a_wrong_value_bias_falls_and_variance_grows_as_one_looks_further():
    exact = EXACT["chain"]
    wrong = 0.5 * exact.v + 0.2
    lams = (0.0, 0.25, 0.5, 0.75, 1.0)
    for weights in ([exact.gae(wrong, lam) for lam in lams], [exact.n_step(wrong, n) for n in (1, 2, 3, 4, 5)]):
        biases = [exact.bias(x) for x in weights]
        assert biases == sorted(biases, reverse=True) and biases[0] > 0.05 and biases[-1] < 1e-12
    variances = [exact.variance(exact.gae(exact.v, lam)) for lam in lams]
    assert variances == sorted(variances)


def test_sampled_episodes_agree_with_the_truth_within_their_error():
    """The same on a problem whose episodes can't be listed."""
    problem = gridworld()
    theta = torch.randn(problem.shape, generator=torch.Generator().manual_seed(2), dtype=F64)
    episodes = problem.sample(theta, 4000, torch.Generator().manual_seed(3))
    assert bool(episodes.ends.any(1).all())
    G = discounted_returns(episodes.rewards, episodes.ends, problem.gamma, mask=episodes.mask)
    spread = []
    for weights in (G - problem.values(theta)[episodes.states], G):
        estimates = gradient_estimates(episodes, theta, weights, problem.gamma)
        error = estimates.mean(0) - problem.policy_gradient(theta)
        standard = estimates.std(0) / len(estimates) ** 0.5
        assert float((error.abs() / (standard + 1e-12)).max()) < 4.5
        spread.append(float(estimates.var(0).sum()))
    assert spread[0] < spread[1]
