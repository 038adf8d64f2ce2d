"""Gymnasium's vector environments, and the conversion of actions for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from minirlhf.errors import UserError, require_installed

Environment = str | Callable[[int], Any]
"""A gymnasium id such as "CartPole-v1", or a function from a number of environments to a gymnasium VectorEnv."""


def make_envs(env: Environment, num_envs: int) -> Any:
    """A gymnasium VectorEnv of `num_envs` environments: the native one if there is one (CartPole-v1), else sync.

    Raises:
        UserError: gymnasium is missing or does not know the environment, or it does not reset on the next step.
    """
    require_installed("gymnasium", "course")
    import gymnasium
    from gymnasium.vector import AutoresetMode

    if callable(env):
        envs = env(num_envs)
    else:
        try:
            envs = gymnasium.make_vec(env, num_envs=num_envs)
        except gymnasium.error.Error as error:
            raise UserError(f"gymnasium can't make the environment {env!r}: {error}") from error
    mode = envs.metadata.get("autoreset_mode")
    if mode != AutoresetMode.NEXT_STEP:
        raise UserError(f"the vector environment must reset on the next step (AutoresetMode.NEXT_STEP), not {mode}")
    if envs.num_envs != num_envs:
        raise UserError(f"the vector environment must have {num_envs} environments, not {envs.num_envs}")
    return envs


def to_environment(actions: Tensor, space: Any) -> np.ndarray:
    """Convert a policy's actions for the environment.

    Discrete actions are offset by the space's start; continuous ones are clipped to [-1, 1] and scaled to its bounds.
    Where a bound is infinite there is nothing to scale to, and actions are unchanged.
    """
    played = actions.numpy()
    if not hasattr(space, "low"):
        return played + space.start
    low, high = space.low, space.high
    bounded = np.isfinite(low) & np.isfinite(high)
    low, high = np.where(bounded, low, -1.0), np.where(bounded, high, 1.0)
    inside = np.where(bounded, np.clip(played, -1.0, 1.0), played)
    return (low + (inside + 1.0) * 0.5 * (high - low)).astype(space.dtype)
