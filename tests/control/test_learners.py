"""What all five learners promise: the same seed the same bits, every setting at work, clear refusals, and learning."""

import math
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch
from minirlhf_course.seeds import run_seeds
from torch.nn.utils import parameters_to_vector

from minirlhf.control import run
from minirlhf.control.actor_critic import REPORT_EVERY, A2CConfig, ActorCriticConfig, train_a2c, train_actor_critic
from minirlhf.control.environments import make_envs
from minirlhf.control.evaluation import Evaluator, evaluate
from minirlhf.control.policies import make_networks
from minirlhf.control.ppo import PPOConfig, adapted, train_ppo
from minirlhf.control.reinforce import BaselineConfig, ReinforceConfig, train_reinforce, train_reinforce_with_baseline
from minirlhf.control.rollout import Collector
from minirlhf.control.trpo import TRPOConfig, train_trpo
from minirlhf.errors import TrainingError, UserError

COMMON = {"num_envs": 2, "hidden": (8,)}
BATCH = COMMON | {"rollout_steps": 20, "total_steps": 100}
LEARNERS = {
    "reinforce": (train_reinforce, ReinforceConfig(**COMMON, total_steps=100)),
    "baseline": (train_reinforce_with_baseline, BaselineConfig(**COMMON, total_steps=100, value_updates=2)),
    "actor-critic": (train_actor_critic, ActorCriticConfig(**COMMON, total_steps=200)),
    "a2c": (train_a2c, A2CConfig(**BATCH, value_updates=2)),
    "trpo": (train_trpo, TRPOConfig(**BATCH, value_updates=2)),
    "ppo": (train_ppo, PPOConfig(**BATCH, epochs=3, minibatch_size=16)),
}


@pytest.fixture(params=LEARNERS)
def learner(request):
    """(name, train, config) of each."""
    return request.param, *LEARNERS[request.param]


def weights(result):
    networks = [result.policy, *([result.values] if result.values is not None else [])]
    return torch.cat([parameters_to_vector(network.parameters()).detach() for network in networks])


def test_same_seed_same_bits(learner):
    _, train, config = learner
    torch.manual_seed(0)
    one = train("CartPole-v1", config, seed=3)
    torch.manual_seed(1)  # the global generator plays no part
    two = train("CartPole-v1", config, seed=3)
    other = train("CartPole-v1", config, seed=4)
    assert torch.equal(weights(one), weights(two))
    assert one.episodes == two.episodes and one.env_steps == two.env_steps
    assert not torch.equal(weights(one), weights(other))


def test_own_networks_are_trained_and_the_result_says_what_happened(learner):
    name, train, config = learner
    networks = make_networks("CartPole-v1", hidden=(4,), activation="relu", seed=9)
    before = parameters_to_vector(networks.policy.parameters()).clone()
    result = train("CartPole-v1", config, networks=networks)
    assert result.policy is networks.policy
    assert not torch.equal(before, parameters_to_vector(networks.policy.parameters()))
    assert result.env_steps >= config.total_steps
    assert (result.values is None) == (name == "reinforce")
    assert result.seconds > 0
    assert [row["step"] for row in result.history] == list(range(len(result.history)))
    assert result.history[-1]["perf/env_steps"] == result.env_steps
    told = [row["objective/episode_return"] for row in result.history if "objective/episode_return" in row]
    assert told and all(r > 0 for r in told)
    expected = {"policy/loss", "policy/entropy", "policy/grad_norm", "perf/seconds"}
    expected |= {"value/loss"} if result.values is not None else set()
    for row in result.history:
        assert expected <= set(row)
        assert 0 < row["policy/entropy"] <= 0.6932  # log 2 for two actions
    assert sum(e.length for e in result.episodes) <= result.env_steps
    assert all(e.episode_return == e.length for e in result.episodes)  # CartPole pays 1 a step


def test_a_callback_sees_each_row_ends_the_training_and_costs_no_time(learner, monkeypatch):
    now = [0.0]  # a clock that moves a second at each look, and an hour in each callback
    monkeypatch.setattr(run.time, "perf_counter", lambda: now.__setitem__(0, now[0] + 1.0) or now[0])
    _, train, config = learner
    seen = []

    def callback(progress):
        now[0] += 3600.0
        seen.append(progress.metrics)
        return len(seen) == 2

    result = train("CartPole-v1", replace(config, total_steps=10_000), callback=callback)
    assert seen == result.history and len(seen) == 2
    assert 0 < result.history[0]["perf/seconds"] < result.history[1]["perf/seconds"] < result.seconds < 60


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_loss_that_is_not_finite_stops_the_training_before_it_reaches_the_weights(learner, counting):
    name, train, config = learner
    endings = (("t", 3), ("c", 4))
    with pytest.raises(
        TrainingError, match=r"environment 0 returned the reward nan for the observation \[[01].0, 0.0\]"
    ):
        train(counting(endings, endings, bad_reward=float("nan")), config)
    networks = make_networks(counting(endings, endings), hidden=(8,))
    state = parameters_to_vector(networks.policy.parameters()).clone()
    message = rf"{name}: the loss is (nan|inf|-inf) at step 0, after \d+ environment steps"
    with pytest.raises(TrainingError, match=message):
        train(counting(endings, endings, bad_reward=3e38), config, networks=networks)
    assert torch.equal(state, parameters_to_vector(networks.policy.parameters()))


OTHER = {"total_steps": 300, "num_envs": 3, "gamma": 0.5, "max_grad_norm": 1e-3, "adam_eps": 0.1, "hidden": (9,)}
OTHER |= {"activation": "relu", "lr": 1e-2, "value_lr": 1e-2, "value_updates": 3, "weigh_by_gamma_t": True}
OTHER |= {"rollout_steps": 24, "lam": 0.1, "entropy_coef": 0.1, "whiten_advantages": False}
OTHER |= {"max_kl": 1e-4, "cg_iterations": 1, "cg_damping": 10.0}  # TRPO
OTHER |= {"epochs": 2, "minibatch_size": 8, "anneal_lr": False, "clip_range": 1e-3, "beta": 1.0}  # PPO
OTHER |= {"value_clip_range": 1e-3, "value_coef": 2.0, "shared": True}
# These need another setting beside them to show what they do; each has a test of its own.
SPECIAL = {"a2c": {"n_step"}, "trpo": {"backtracks"}, "ppo": {"target_kl"}}  # backtracks: tests/exact
SETTINGS = [
    (name, field.name)
    for name, (_, config) in LEARNERS.items()
    for field in fields(config)
    if field.name not in SPECIAL.get(name, ())
]


@pytest.mark.parametrize(("name", "setting"), SETTINGS)
def test_every_setting_has_an_effect(name, setting):
    train, config = LEARNERS[name]
    if setting == "clip_range":
        config = replace(config, lr=1e-2)
    changed = replace(config, **{setting: OTHER[setting]})
    one, two = (train("CartPole-v1", c, seed=1) for c in (config, changed))
    a, b = weights(one), weights(two)
    assert a.shape != b.shape or not torch.allclose(a, b, rtol=0, atol=1e-7)


def test_a2c_looks_as_many_steps_ahead_as_it_is_told():
    train, config = LEARNERS["a2c"]
    results = [train("CartPole-v1", replace(config, lam=None, n_step=n)) for n in (1, 5)]
    assert not torch.equal(weights(results[0]), weights(results[1]))
    lam_zero = train("CartPole-v1", replace(config, lam=0.0))
    torch.testing.assert_close(weights(results[0]), weights(lam_zero))  # one step is lambda = 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PPOConfig(lr=0.0), "PPOConfig.lr 0.0: must be a number above 0"),
        (lambda: PPOConfig(gamma=1.5), "gamma 1.5: must be a number from 0 to 1"),
        (lambda: PPOConfig(epochs=0), "epochs 0: must be a whole number, 1 or more"),
        (lambda: PPOConfig(target_kl=0.01), "target_kl 0.01: needs beta above 0"),
        (lambda: PPOConfig(clip_range=-0.2), "clip_range -0.2: must be a number above 0"),
        (lambda: PPOConfig(lam=float("nan")), "lam nan: must be a number from 0 to 1"),
        (lambda: A2CConfig(lam=None), "either lam or n_step"),
        (lambda: A2CConfig(n_step=3), "either lam or n_step"),
        (lambda: A2CConfig(lam=None, n_step=99), "n_step 99: must be at most rollout_steps"),
        (lambda: A2CConfig(lam=1.1), "lam 1.1: must be a number from 0 to 1"),
        (lambda: TRPOConfig(max_kl=0.0), "max_kl 0.0: must be a number above 0"),
        (lambda: ReinforceConfig(num_envs=0), "num_envs 0: must be a whole number, 1 or more"),
        (lambda: BaselineConfig(value_updates=0), "value_updates 0: must be a whole number, 1 or more"),
        (lambda: ActorCriticConfig(entropy_coef=-1.0), "entropy_coef -1.0: must be a number, 0 or more"),
        (lambda: PPOConfig(minibatch_size=2), "minibatch_size 2: must be at least 3, or whiten_advantages False"),
        (lambda: PPOConfig(rollout_steps=2), "PPOConfig.rollout_steps 2: must be a whole number, 3 or more"),
        (lambda: A2CConfig(rollout_steps=1), "A2CConfig.rollout_steps 1: must be a whole number, 3 or more"),
        (lambda: TRPOConfig(rollout_steps=0), "TRPOConfig.rollout_steps 0: must be a whole number, 3 or more"),
        (lambda: Evaluator("CartPole-v1", every=0), "every must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("name", ["a2c", "trpo", "ppo"])
def test_the_shortest_batches_of_one_environment_hold_enough(name):
    """One of the three columns may be a reset, which is no experience."""
    train, config = LEARNERS[name]
    least = {"minibatch_size": 3} if name == "ppo" else {}
    result = train("CartPole-v1", replace(config, num_envs=1, rollout_steps=3, total_steps=150, **least))
    assert len(result.episodes) >= 2 and bool(weights(result).isfinite().all())


def test_a_row_of_one_step_actor_critic_is_the_mean_over_the_steps_that_were_played():
    """One environment resets in columns of its own: they must not pull the mean down."""
    config = ActorCriticConfig(num_envs=1, hidden=(8,), total_steps=300, lr=1e-9)
    result = train_actor_critic("CartPole-v1", config)
    assert len(result.episodes) >= 5
    for row in result.history:
        assert row["policy/entropy"] == pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize("name", [name for name in LEARNERS if name != "ppo"])
def test_a_shared_trunk_is_refused_where_each_network_has_an_optimizer(name):
    train, config = LEARNERS[name]
    with pytest.raises(UserError, match="shared=False"):
        train("CartPole-v1", config, networks=make_networks("CartPole-v1", shared=True))


def test_one_step_actor_critic_is_suttons_update_by_hand(counting, monkeypatch):
    """One environment and plain arithmetic: delta, the two gradients, and I, through an end of each kind."""
    env = counting((("t", 3), ("c", 2)))
    gamma, lr, value_lr = 0.9, 0.02, 0.01
    config = ActorCriticConfig(
        num_envs=1, total_steps=40, gamma=gamma, lr=lr, value_lr=value_lr, weigh_by_gamma_t=True, max_grad_norm=1e9
    )
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, lr, **_: torch.optim.SGD(parameters, lr))
    result = train_actor_critic(env, config, seed=5, networks=make_networks(env, hidden=(6,), seed=2))

    policy, values = make_networks(env, hidden=(6,), seed=2)
    collector = Collector(make_envs(env, 1), 5)
    I = 1.0  # noqa: E741
    for _ in range(REPORT_EVERY):
        step = collector.collect(policy, 1)
        if not bool(step.mask[0, 0]):
            I = 1.0  # noqa: E741
            continue
        s, a, after = step.observations[0, 0], step.actions[0, 0], step.last_observations[0]
        v = values(s)
        v_after = 0.0 if bool(step.terminated[0, 0]) else float(values(after).detach())
        delta = float(step.rewards[0, 0]) + gamma * v_after - float(v.detach())
        log_pi = policy(s).log_softmax(-1)[a]
        w, theta = list(values.parameters()), list(policy.parameters())
        grad_v, grad_log_pi = torch.autograd.grad(v, w), torch.autograd.grad(log_pi, theta)
        with torch.no_grad():
            for p, g in zip(w, grad_v, strict=True):
                p += value_lr * delta * g
            for p, g in zip(theta, grad_log_pi, strict=True):
                p += lr * I * delta * g
        I *= gamma  # noqa: E741
    assert {episode.terminated for episode in collector.episodes} == {True, False}
    trained = torch.cat([parameters_to_vector(n.parameters()) for n in (result.policy, result.values)])
    mine = torch.cat([parameters_to_vector(n.parameters()) for n in (policy, values)])
    torch.testing.assert_close(trained, mine, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_nothing_has_moved_in_ppos_first_minibatch(env):
    result = train_ppo(env, PPOConfig(num_envs=4, rollout_steps=50, total_steps=800, minibatch_size=50))
    assert len(result.history) >= 4
    for row in result.history:
        assert row["policy/first_ratio_error"] == pytest.approx(0.0, abs=2e-6)
        assert row["policy/first_approx_kl"] == pytest.approx(0.0, abs=1e-7)
        assert row["policy/first_clip_fraction"] == 0.0
    assert max(row["policy/approx_kl"] for row in result.history) > 1e-5


def test_ppo_with_one_epoch_one_minibatch_and_no_clip_follows_the_policy_gradient():
    """At theta_old the surrogate's gradient is that of log pi A: PPO's first update is A2C's."""
    common = {"num_envs": 4, "rollout_steps": 32, "total_steps": 100, "hidden": (8,), "lam": 0.9, "max_grad_norm": 1e9}
    ppo = train_ppo(
        "CartPole-v1",
        PPOConfig(**common, epochs=1, minibatch_size=128, clip_range=None, value_coef=1.0, lr=1e-3, anneal_lr=False),
    )
    a2c = train_a2c("CartPole-v1", A2CConfig(**common, lr=1e-3, value_lr=1e-3, value_updates=1))
    assert len(ppo.history) == 1 == len(a2c.history)
    torch.testing.assert_close(weights(ppo), weights(a2c), rtol=1e-4, atol=1e-6)


def test_ppos_variants_do_what_they_are_for():
    base = PPOConfig(num_envs=8, rollout_steps=64, total_steps=3_000, lr=1e-2, anneal_lr=False, minibatch_size=128)
    kl = {}
    for name, settings in {
        "clip": {},
        "no clip": {"clip_range": None},
        "penalty": {"clip_range": None, "beta": 30.0},
    }.items():
        rows = train_ppo("CartPole-v1", replace(base, **settings)).history
        kl[name] = sum(row["policy/kl"] for row in rows) / len(rows)
        assert (max(row["policy/clip_fraction"] for row in rows) > 0) == (name == "clip")
    assert kl["no clip"] > 2 * kl["clip"] and kl["no clip"] > 2 * kl["penalty"]


def test_adaptive_beta_steers_the_kl():
    base = PPOConfig(num_envs=8, rollout_steps=64, total_steps=10_000, clip_range=None, beta=1.0, target_kl=0.01)
    rows = train_ppo("CartPole-v1", base).history
    for before, after in pairwise(rows):
        assert after["policy/beta"] == adapted(before["policy/beta"], before["policy/kl"], 0.01)
    assert len({row["policy/beta"] for row in rows}) > 1
    late = [row["policy/kl"] for row in rows[len(rows) // 2 :]]
    assert 0.003 < sum(late) / len(late) < 0.03


def test_returns_are_made_of_the_raw_advantages():
    """Bug 1 of the museum: with normalised ones the value network would learn returns of variance 1."""
    result = train_ppo("CartPole-v1", PPOConfig(total_steps=10_000, gamma=0.99))
    assert float(result.values(torch.zeros(1, 4)).detach()) > 10.0


@pytest.mark.parametrize("name", ["ppo", "trpo", "baseline"])
def test_cartpole_is_learned_in_seconds(name):
    train, config = LEARNERS[name]
    evaluator = Evaluator("CartPole-v1", target=475)
    result = train("CartPole-v1", type(config)(total_steps=50_000), seed=0, callback=evaluator)
    assert evaluator.reached is not None, evaluator.rows
    assert float(evaluate(result.policy, "CartPole-v1", 20).mean()) >= 475


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reinforce", "actor-critic", "a2c"])
def test_cartpole_is_learned_by_the_others_too(name):
    train, config = LEARNERS[name]
    runs = run_seeds(train, "CartPole-v1", type(config)(), range(3), target=475)
    assert sum(run.reached is not None for run in runs) >= 2, [run.evaluations[-1] for run in runs]
    assert all(run.evaluations[-1] == run.reached for run in runs if run.reached)
