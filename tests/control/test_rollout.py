"""Vectorised play: next-step autoreset, and terminated told apart from truncated."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from minirlhf.control.environments import make_envs, to_environment
from minirlhf.control.evaluation import evaluate
from minirlhf.control.policies import make_networks
from minirlhf.control.rollout import Collector
from minirlhf.errors import UserError
from minirlhf.returns import gae


def play(env, num_envs, *steps, seed=0):
    policy, values = make_networks(env, hidden=(8,))
    collector = Collector(make_envs(env, num_envs), seed)
    return collector, values, [collector.collect(policy, n) for n in steps]


def test_the_column_after_an_end_only_resets(counting):
    collector, _, (trajectory,) = play(counting((("t", 2),), (("c", 3),)), 2, 5)
    T, F = True, False
    # columns: (episode, steps in it) before the step
    assert trajectory.observations[0].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]]
    assert trajectory.observations[1].tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0]]
    assert trajectory.mask.tolist() == [[T, T, F, T, T], [T, T, T, F, T]]
    assert trajectory.terminated.tolist() == [[F, T, F, F, T], [F, F, F, F, F]]
    assert trajectory.truncated.tolist() == [[F, F, F, F, F], [F, F, T, F, F]]
    assert trajectory.rewards.tolist() == [[1, 2, 0, 1, 2], [1, 2, 3, 0, 1]]
    assert trajectory.last_observations.tolist() == [[1, 2], [1, 1]]
    assert collector.env_steps == 8  # ten columns, two of which only reset
    assert [(e.env_steps, e.episode_return, e.length, e.terminated) for e in collector.episodes] == [
        (4, 3.0, 2, True),
        (5, 6.0, 3, False),
        (8, 3.0, 2, True),
    ]


def test_cutting_the_buffer_anywhere_changes_nothing(counting):
    endings = (("t", 2), ("c", 1), ("c", 3))
    whole = play(counting(endings, endings[::-1]), 2, 12)[2][0]
    for cut in range(1, 12):
        parts = play(counting(endings, endings[::-1]), 2, cut, 12 - cut)[2]
        for name in ("observations", "actions", "rewards", "terminated", "truncated", "mask"):
            joined = torch.cat([getattr(part, name) for part in parts], 1)
            assert torch.equal(joined, getattr(whole, name)), (name, cut)
        assert torch.equal(parts[0].last_observations, parts[1].observations[:, 0])


def test_truncated_episodes_go_on_with_the_value_of_their_last_observation(counting):
    """By hand, episode by episode, at every place where the buffer can be cut."""
    gamma, lam = 0.9, 0.8
    endings = (("t", 2), ("c", 2), ("c", 1), ("t", 3))
    for length in range(1, 14):
        _, network, (trajectory,) = play(counting(endings), 1, length)
        old = trajectory.estimate(network)
        advantages, _ = gae(
            trajectory.rewards,
            old.values,
            trajectory.ends,
            gamma=gamma,
            lam=lam,
            last_values=old.last_values,
            truncated_values=old.truncated_values,
            mask=trajectory.mask,
        )
        t = 0
        episode = 0
        while t < length:
            how, steps = endings[episode % len(endings)]
            played = min(steps, length - t)
            v = [float(network(torch.tensor([float(episode), float(k)]))) for k in range(played + 1)]
            if how == "t" and played == steps:
                v[played] = 0.0  # nothing comes after a terminated episode
            expected, after = [], 0.0
            for k in reversed(range(played)):
                after = (k + 1) + gamma * v[k + 1] - v[k] + gamma * lam * after
                expected.insert(0, after)
            torch.testing.assert_close(advantages[0, t : t + played], torch.tensor(expected))
            t, episode = t + steps + 1, episode + 1  # one more column for the reset
        assert float(advantages[~trajectory.mask].abs().sum()) == 0.0


def test_whole_episodes_are_padded_and_play_starts_anew_after_them(counting):
    env = counting((("t", 1),), (("c", 4),), (("t", 3),))
    policy, _ = make_networks(env, hidden=(8,))
    collector = Collector(make_envs(env, 3), seed=0)
    episodes = collector.collect_episodes(policy)
    assert episodes.mask.sum(1).tolist() == [1, 4, 3]
    assert episodes.mask.shape == (3, 4)
    assert episodes.ends.sum(1).tolist() == [1, 1, 1]  # the ends of what was dropped are not there
    assert episodes.rewards[episodes.mask].tolist() == [1, 1, 2, 3, 4, 1, 2, 3]
    assert episodes.observations[:, 0, 1].tolist() == [0, 0, 0]
    assert collector.env_steps == 8 and len(collector.episodes) == 3
    after = collector.collect(policy, 2)
    assert bool(after.mask[:, 0].all()) and after.observations[:, 0, 1].tolist() == [0, 0, 0]


def test_native_and_single_cartpole_agree_step_by_step():
    """Replaying the actions of the native vector environment in plain CartPole gives the same numbers."""
    policy, _ = make_networks("CartPole-v1")
    collector = Collector(make_envs("CartPole-v1", 3), seed=1)
    assert type(collector.envs).__name__ == "CartPoleVectorEnv"
    trajectory = collector.collect(policy, 60)
    assert bool(trajectory.terminated.any())
    single = gymnasium.make("CartPole-v1").unwrapped
    single.reset(seed=0)
    for n in range(3):
        for t in range(59):
            if not trajectory.mask[n, t]:
                continue
            if t == 0 or not trajectory.mask[n, t - 1]:
                single.reset()
                single.state = tuple(trajectory.observations[n, t].tolist())
            observation, reward, terminated, _, _ = single.step(int(trajectory.actions[n, t]))
            np.testing.assert_allclose(observation, trajectory.observations[n, t + 1], atol=1e-5)
            assert reward == trajectory.rewards[n, t] and terminated == trajectory.terminated[n, t]


def test_cartpole_is_truncated_at_500_steps():
    def balance(envs):
        policy, _ = make_networks("CartPole-v1")
        with torch.no_grad():  # push against the angle and its speed: it balances for ever
            for parameter in policy.parameters():
                parameter.zero_()
            policy.trunk[0].weight[0] = torch.tensor([0.0, 0.1, 3.0, 1.0])
            policy.trunk[2].weight[0, 0] = 1.0
            policy.head.weight[1, 0] = 1e4
        return Collector(envs, seed=0).collect(policy, 502)

    trajectory = balance(make_envs("CartPole-v1", 2))
    assert trajectory.truncated.nonzero().tolist() == [[0, 499], [1, 499]]
    assert not bool(trajectory.terminated.any())
    assert trajectory.mask[:, 500].tolist() == [False, False]


def test_same_seed_same_bits_and_the_global_generators_are_left_alone():
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    _, _, (one,) = play("CartPole-v1", 4, 50, seed=3)
    _, _, (two,) = play("CartPole-v1", 4, 50, seed=3)
    _, _, (other,) = play("CartPole-v1", 4, 50, seed=4)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.observations[:, 0], other.observations[:, 0])
    assert not torch.equal(one.actions, other.actions)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


def test_other_ways_of_resetting_are_refused():
    def same_step(num_envs):
        return SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)

    with pytest.raises(UserError, match="reset on the next step"):
        make_envs(same_step, 2)


def test_environments_that_return_their_own_buffers_give_the_same_trajectory(counting):
    """SyncVectorEnv(copy=False) writes its next step into the observations that it returned."""
    endings = ((("t", 2),), (("c", 3),))

    def shared(num_envs):
        envs = counting(*endings)(num_envs)
        envs.copy = False
        step = envs.step
        rewards, *flags = np.zeros(num_envs), *np.zeros((2, num_envs), dtype=bool)

        def with_buffers(actions):  # and one that keeps all the rest in buffers too
            observations, *found, info = step(actions)
            for buffer, new in zip((rewards, *flags), found, strict=True):
                buffer[:] = new
            return observations, rewards, *flags, info

        envs.step = with_buffers
        return envs

    plain, own = (play(env, 2, 5, 4)[2] for env in (counting(*endings), shared))
    for part, other in zip(plain, own, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part, other, strict=True))


def test_discrete_actions_are_counted_from_the_start_of_their_space():
    played = []

    class FromThree(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
        action_space = gymnasium.spaces.Discrete(2, start=3)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return np.zeros(2, np.float32), {}

        def step(self, action):
            played.append(int(action))
            return np.zeros(2, np.float32), 1.0, len(played) % 7 == 0, False, {}

    _, _, (trajectory,) = play(lambda n: SyncVectorEnv([FromThree] * n), 1, 60)
    chosen = trajectory.actions[trajectory.mask]
    assert played == (chosen + 3).tolist() and set(chosen.tolist()) == {0, 1}
    policy, _ = make_networks(lambda n: SyncVectorEnv([FromThree] * n), hidden=(8,))
    assert evaluate(policy, lambda n: SyncVectorEnv([FromThree] * n), 1).tolist()[0] >= 1
    assert set(played) == {3, 4}


def test_unknown_environments_and_wrong_numbers_are_refused(counting):
    with pytest.raises(UserError, match="can't make the environment 'CartPoodle-v1'"):
        make_envs("CartPoodle-v1", 2)
    with pytest.raises(UserError, match="must have 2 environments, not"):
        make_envs(lambda n: gymnasium.make_vec("CartPole-v1", num_envs=3), 2)


def test_continuous_actions_are_scaled_to_the_bounds_and_clipped():
    space = gymnasium.spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 10.0], np.float32))
    played = to_environment(torch.tensor([[0.0, 0.0], [0.5, -0.5], [7.0, -7.0]]), space)
    assert played.tolist() == [[0.0, 5.0], [1.0, 2.5], [2.0, 0.0]]
    assert played.dtype == np.float32
    free = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    assert to_environment(torch.tensor([[7.0]]), free).tolist() == [[7.0]]
