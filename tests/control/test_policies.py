"""Networks, their distributions, and evaluation."""

import gymnasium
import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Independent, Normal, kl_divergence

from minirlhf.control.evaluation import Evaluator, evaluate
from minirlhf.control.policies import CategoricalPolicy, GaussianPolicy, make_networks
from minirlhf.control.run import Progress
from minirlhf.errors import UserError


def distribution(policy, outputs):
    if isinstance(policy, CategoricalPolicy):
        return Categorical(logits=outputs)
    mean, log_std = outputs.chunk(2, -1)
    return Independent(Normal(mean, log_std.exp()), 1)


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_logprobs_entropy_and_kl_are_those_of_torch_distributions(env):
    policy, _ = make_networks(env, seed=1)
    torch.manual_seed(0)
    size = policy.trunk[0].in_features
    old, new = (policy(torch.randn(50, size)) + 0.3 * torch.randn(50, 2) for _ in range(2))
    actions = policy.sample(new, torch.Generator().manual_seed(1))
    reference = distribution(policy, new)
    logprobs, entropy = policy.logprobs_and_entropy(new, actions)
    torch.testing.assert_close(logprobs, reference.log_prob(actions), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(policy.logprobs(new, actions), logprobs)
    torch.testing.assert_close(entropy, reference.entropy(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(policy.entropy(new), entropy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(policy.kl(old, new), kl_divergence(distribution(policy, old), reference))
    torch.testing.assert_close(policy.kl(new, new), torch.zeros(50), rtol=0, atol=1e-6)


def test_categorical_samples_have_the_softmax_as_their_frequencies():
    policy, _ = make_networks("CartPole-v1")
    outputs = torch.tensor([0.0, 1.0, -1.0]).expand(200_000, 3)
    counts = policy.sample(outputs, torch.Generator().manual_seed(0)).bincount(minlength=3) / 200_000
    torch.testing.assert_close(counts, outputs[0].softmax(-1), rtol=0, atol=0.004)  # 3.5 standard errors
    assert policy.mode(outputs[:2]).tolist() == [1, 1]


def test_gaussian_samples_have_the_mean_and_the_deviation():
    policy, _ = make_networks("Pendulum-v1")
    assert isinstance(policy, GaussianPolicy)
    outputs = torch.tensor([0.5, -1.0]).expand(100_000, 2)
    samples = policy.sample(outputs, torch.Generator().manual_seed(0))
    assert samples.shape == (100_000, 1)
    assert float(samples.mean()) == pytest.approx(0.5, abs=0.005)
    assert float(samples.std()) == pytest.approx(np.exp(-1), abs=0.004)
    assert policy.mode(outputs[:1]).tolist() == [[0.5]]


def test_initialization_is_orthogonal_and_the_first_policy_nearly_uniform():
    policy, values = make_networks("CartPole-v1", hidden=(32, 32), seed=0)
    inner = policy.trunk[2].weight
    torch.testing.assert_close(inner @ inner.T, 2 * torch.eye(32), atol=1e-5, rtol=0)  # gain sqrt(2), squared
    torch.testing.assert_close(policy.head.weight @ policy.head.weight.T, 1e-4 * torch.eye(2), atol=1e-8, rtol=0)
    torch.testing.assert_close(values.head.weight @ values.head.weight.T, torch.ones(1, 1))
    probabilities = policy(torch.randn(100, 4)).softmax(-1)
    assert float((probabilities - 0.5).abs().max().detach()) < 0.05


def test_networks_depend_on_the_seed_alone():
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    one, two, other = (make_networks("CartPole-v1", seed=seed) for seed in (3, 3, 4))
    for a, b, c in zip(one.parameters(), two.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.dim() < 2 or not torch.equal(a, c)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("shared", [False, True])
def test_both_gives_what_each_gives_alone(shared):
    networks = make_networks("CartPole-v1", hidden=(16,), shared=shared)
    x = torch.randn(7, 4)
    outputs, values = networks.both(x)
    torch.testing.assert_close(outputs, networks.policy(x))
    torch.testing.assert_close(values, networks.values(x))
    assert values.shape == (7,)
    trunk, heads = 4 * 16 + 16, 2 * 16 + 2 + 16 + 1
    assert sum(p.numel() for p in networks.parameters()) == heads + (trunk if shared else 2 * trunk)
    values.sum().backward()
    assert (networks.policy.trunk[0].weight.grad is not None) == shared


def test_activation_and_widths_are_what_was_asked():
    policy, _ = make_networks("CartPole-v1", hidden=(5, 7, 9), activation="relu")
    assert [type(layer).__name__ for layer in policy.trunk] == ["Linear", "ReLU"] * 3
    assert [layer.out_features for layer in policy.trunk[::2]] == [5, 7, 9]


class Odd(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.MultiDiscrete([2, 2])


@pytest.mark.parametrize(
    ("env", "options", "message"),
    [
        ("CartPole-v1", {"activation": "gelu"}, "activation must be one of"),
        ("CartPole-v1", {"hidden": ()}, "hidden must have at least one layer"),
        ("FrozenLake-v1", {}, "observations must be a flat Box"),
        (lambda n: gymnasium.vector.SyncVectorEnv([Odd] * n), {}, "actions must be Discrete or a flat Box"),
    ],
)
def test_what_does_not_fit_is_refused(env, options, message):
    with pytest.raises(UserError, match=message):
        make_networks(env, **options)


def test_evaluation_is_fixed_by_its_seed_and_counts_first_episodes_only(counting):
    policy, _ = make_networks("CartPole-v1", seed=0)
    one = evaluate(policy, "CartPole-v1", 10)
    assert one.shape == (10,) and one.dtype == torch.float64
    assert torch.equal(one, evaluate(policy, "CartPole-v1", 10))
    assert not torch.equal(one, evaluate(policy, "CartPole-v1", 10, seed=5))
    assert not torch.equal(one, evaluate(policy, "CartPole-v1", 10, greedy=False))
    env = counting((("t", 1),), (("c", 4),), (("t", 3),))
    policy, _ = make_networks(env, hidden=(8,))
    assert evaluate(policy, env, 3).tolist() == [1.0, 10.0, 6.0]
    with pytest.raises(UserError, match="episodes must be at least 1"):
        evaluate(policy, env, 0)


def test_evaluator_keeps_its_schedule_and_stops_at_the_target():
    networks = make_networks("CartPole-v1")
    evaluator = Evaluator("CartPole-v1", every=100, episodes=2)
    for env_steps in (50, 99, 100, 150, 199, 420, 450, 500):
        assert evaluator(Progress(1, env_steps, 0.0, networks, {})) is False
    assert [row.env_steps for row in evaluator.rows] == [100, 420, 500]
    assert evaluator.reached is None
    easy = Evaluator("CartPole-v1", every=100, episodes=2, target=1.0)
    assert easy(Progress(1, 100, 0.5, networks, {})) is True
    assert easy.reached == easy.rows[0] and easy.reached.seconds == 0.5
