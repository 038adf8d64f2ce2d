"""Environments whose every step is known beforehand."""

import pytest

gymnasium = pytest.importorskip("gymnasium")

import numpy as np  # noqa: E402
from gymnasium.vector import SyncVectorEnv  # noqa: E402


class Counting(gymnasium.Env):
    """Observes (number of this episode, steps in it) and pays the step's number; its episodes have the given lengths.

    `endings` says how the episodes end, in turn: a letter each, t for terminated and c for cut (truncated), after as
    many steps as the number beside it.
    """

    def __init__(self, endings: tuple[tuple[str, int], ...], bad_reward: float | None = None) -> None:
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(2)
        self.endings, self.bad_reward, self.episode = endings, bad_reward, -1

    def _observe(self):
        return np.array([self.episode, self.t], dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self._observe(), {}

    def step(self, action):
        assert action in (0, 1)
        self.t += 1
        how, length = self.endings[self.episode % len(self.endings)]
        over = self.t == length
        reward = float(self.t) if self.bad_reward is None else self.bad_reward
        return self._observe(), reward, over and how == "t", over and how == "c", {}


@pytest.fixture
def counting():
    """``counting((("t", 2),), (("c", 3), ("t", 1)))``: one environment an argument."""

    def make(*endings, **options):
        def environment(num_envs: int):
            assert num_envs in (1, len(endings)), "make_networks looks at one environment"
            return SyncVectorEnv([lambda e=e: Counting(e, **options) for e in endings[:num_envs]])

        return environment

    return make
