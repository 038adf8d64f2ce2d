"""The dials' parts are what listing every episode gives, for any error of the critic."""

from __future__ import annotations

import pytest
import torch
from minirlhf_course.bias_variance import bias_std_error, critic_after, parts
from minirlhf_course.tiny import F64, chain, gradient_estimates

from minirlhf.returns import gae

PROBLEM = chain(3, gamma=0.95).with_horizon(4)
THETA = torch.linspace(-1, 1, PROBLEM.rewards.numel(), dtype=F64).reshape(PROBLEM.shape)


@pytest.mark.parametrize("k", [0.0, 0.5, 1.0, 2.0])
def test_bias_and_variance_are_those_of_all_episodes(k):
    values, lams = PROBLEM.values(THETA), (0.0, 0.6, 1.0)
    critics = [critic_after(PROBLEM, THETA, 20, seed) for seed in range(3)]
    found = bias_std_error(parts(PROBLEM, THETA, critics, lams), k, batch=64)

    episodes, chances = PROBLEM.enumerate(THETA)
    exact = PROBLEM.policy_gradient(THETA)
    rows = torch.zeros(3, len(critics), len(lams), dtype=F64)
    for i, critic in enumerate(critics):
        wrong = values + k * (critic - values)
        for j, lam in enumerate(lams):
            advantages, _ = gae(
                episodes.rewards, wrong[episodes.states], episodes.ends, mask=episodes.mask, gamma=0.95, lam=lam
            )
            estimates = gradient_estimates(episodes, THETA, advantages, 0.95)
            mean = torch.einsum("n,nsa->sa", chances, estimates)
            variance = chances @ (estimates - mean).square().sum((1, 2)) / exact.norm().square()
            bias = (mean - exact).norm() / exact.norm()
            rows[:, i, j] = torch.stack((bias, variance.sqrt(), bias.square() + variance / 64))
    expected = rows.mean(1)
    expected[2] = expected[2].sqrt()
    assert torch.allclose(torch.stack(found), expected, atol=1e-10)


def test_a_critic_knows_what_it_has_seen():
    few, many = (critic_after(PROBLEM, THETA, seen, seed=0) for seen in (1, 20_000))
    visits = PROBLEM.visits(THETA)
    assert (few == 0).sum() > (many == 0).sum(), "states that never came have the value 0"
    common = visits > 0.05
    assert torch.allclose(many[common], PROBLEM.values(THETA)[common], atol=0.03)
