"""TRPO: the Fisher-vector product is the dense Hessian of the KL; an accepted step holds the bound (Proof 4)."""

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from minirlhf.control.policies import make_networks
from minirlhf.control.trpo import TRPOConfig, conjugate_gradient, fisher_product, flat_gradient, trust_region_step

F64 = torch.float64
close = torch.testing.assert_close


def small(env="CartPole-v1", seed=0, rows=40):
    """A policy that is not near uniform, observations, actions drawn from it, and advantages; all float64."""
    policy = make_networks(env, hidden=(5,), seed=seed).policy.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=F64))
    observations = torch.randn(rows, policy.trunk[0].in_features, generator=generator, dtype=F64)
    with torch.no_grad():
        actions = policy.sample(policy(observations), generator)
    return policy, observations, actions, torch.randn(rows, generator=generator, dtype=F64)


def fisher(policy, observations, damping=0.0):
    old = policy(observations).detach()
    return fisher_product(lambda: policy.kl(old, policy(observations)).mean(), list(policy.parameters()), damping)


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_fisher_vector_product_is_the_dense_hessian_of_the_kl(env):
    policy, observations, *_ = small(env)
    parameters = list(policy.parameters())
    names = [name for name, _ in policy.named_parameters()]
    old = policy(observations).detach()
    sizes = [p.numel() for p in parameters]

    def kl_at(theta):
        parts = [x.reshape(p.shape) for x, p in zip(theta.split(sizes), parameters, strict=True)]
        outputs = torch.func.functional_call(policy, dict(zip(names, parts, strict=True)), (observations,))
        return policy.kl(old, outputs).mean()

    theta = parameters_to_vector(parameters).detach()
    dense = torch.autograd.functional.hessian(kl_at, theta)
    product = fisher(policy, observations)
    identity = torch.eye(len(theta), dtype=F64)
    mine = torch.stack([product(column) for column in identity], 1)
    close(mine, dense, rtol=1e-9, atol=1e-11)
    close(mine, mine.T, rtol=1e-9, atol=1e-11)
    assert float(torch.linalg.eigvalsh(mine).min()) > -1e-10  # Fisher information is never negative
    damped = fisher(policy, observations, damping=0.3)(identity[0])
    close(damped, dense[:, 0] + 0.3 * identity[0], rtol=1e-9, atol=1e-11)


def test_the_hessian_is_also_the_covariance_of_the_score():
    """The other definition of the Fisher matrix: E[grad log pi grad log pi^T], summed over both actions."""
    policy, observations, *_ = small(rows=6)
    parameters = list(policy.parameters())
    log_p = policy(observations).log_softmax(-1)
    size = sum(p.numel() for p in parameters)
    covariance = torch.zeros(size, size, dtype=F64)
    for row in range(6):
        for action in range(2):
            score = flat_gradient(log_p[row, action], parameters, create_graph=True).detach()
            covariance += log_p[row, action].exp().detach() / 6 * torch.outer(score, score)
    v = torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=F64)
    close(fisher(policy, observations)(v), covariance @ v, rtol=1e-9, atol=1e-11)


def test_conjugate_gradient_solves_in_as_many_steps_as_dimensions():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(8, 8, generator=generator, dtype=F64)
    matrix, b = root @ root.T + torch.eye(8, dtype=F64), torch.randn(8, generator=generator, dtype=F64)
    solution = conjugate_gradient(lambda v: matrix @ v, b, iterations=8, tolerance=0.0)
    close(solution, torch.linalg.solve(matrix, b), rtol=1e-6, atol=1e-8)
    few = conjugate_gradient(lambda v: matrix @ v, b, iterations=2)
    assert float((matrix @ few - b).norm()) > float((matrix @ solution - b).norm())


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("max_kl", [1e-4, 1e-2, 0.3])
def test_an_accepted_step_holds_the_bound_and_gains(env, max_kl):
    for seed in range(4):
        policy, observations, actions, advantages = small(env, seed)
        old = policy(observations).detach()
        old_logprobs = policy.logprobs(old, actions)
        # With so little damping the first step often goes too far, and only the line search holds the bound.
        config = TRPOConfig(max_kl=max_kl, cg_damping=1e-3)
        metrics = trust_region_step(policy, observations, actions, advantages, config)
        new = policy(observations).detach()
        kl = policy.kl(old, new).mean()
        gain = ((policy.logprobs(new, actions) - old_logprobs).exp() * advantages).mean() - advantages.mean()
        assert float(metrics["policy/accepted"]) == 1.0 and 0.0 < float(kl) <= max_kl and float(gain) > 0.0
        close(metrics["policy/kl"], kl)
        close(metrics["policy/surrogate_gain"], gain)


def test_a_small_step_ends_where_the_quadratic_said():
    """For a small bound the KL really is 1/2 s^T F s: the full step, damping apart, lands on the bound."""
    metrics = trust_region_step(*small(), TRPOConfig(max_kl=1e-10, cg_damping=1e-9, cg_iterations=60))
    full = float(metrics["policy/kl"]) * 4 ** float(metrics["policy/backtracks"])
    assert full == pytest.approx(1e-10, rel=1e-2)


def test_where_no_step_gains_the_policy_stays_as_it_was():
    policy, observations, actions, advantages = small()
    before = parameters_to_vector(policy.parameters()).clone()
    # A bound far beyond where the quadratic is true, and no backtracking: the KL can't hold. Then nothing to gain.
    for weight, config in ((1.0, TRPOConfig(max_kl=20.0, backtracks=0)), (0.0, TRPOConfig())):
        metrics = trust_region_step(policy, observations, actions, weight * advantages, config)
        assert all(float(metrics[f"policy/{key}"]) == 0.0 for key in ("accepted", "kl", "backtracks"))
        assert torch.equal(before, parameters_to_vector(policy.parameters()))


def test_the_line_search_finds_the_bound_where_the_quadratic_is_wrong():
    metrics = trust_region_step(*small(), TRPOConfig(max_kl=20.0, backtracks=10))
    assert float(metrics["policy/accepted"]) == 1.0 and float(metrics["policy/backtracks"]) >= 1.0
