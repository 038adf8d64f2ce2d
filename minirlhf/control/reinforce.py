"""REINFORCE: play whole episodes, then make actions followed by a high return more likely (Williams 1992).

Sutton & Barto, section 13.3 (page 328) and, with a baseline, 13.4 (page 330), for each episode and each of its steps:

    G     <- sum over k > t of gamma^(k-t-1) R_k                     `discounted_returns`
    theta <- theta + alpha gamma^t G grad log pi(A_t | S_t)          `policy_gradient_loss`
    with a baseline:
    delta <- G - v(S_t; w)
    w     <- w + alpha_w delta grad v(S_t; w)                        `value_loss`
    theta <- theta + alpha gamma^t delta grad log pi(A_t | S_t)

Two usual deviations: the gradient is averaged over a few episodes before each Adam step, and gamma^t is left out unless
`weigh_by_gamma_t` is set (late steps would hardly count: 0.99^400 = 0.02).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minirlhf.control.environments import Environment
from minirlhf.control.policies import Networks
from minirlhf.control.rollout import Trajectory
from minirlhf.control.run import Callback, ControlConfig, Result, Run
from minirlhf.losses import policy_gradient_loss, value_loss
from minirlhf.returns import discounted_returns, explained_variance, masked_mean, masked_var
from minirlhf.settings import Count, Positive


@dataclass(frozen=True)
class ReinforceConfig(ControlConfig):
    """REINFORCE; an update uses `num_envs` whole episodes."""

    lr: Positive = 3e-3
    """Learning rate of the policy."""
    weigh_by_gamma_t: bool = False
    """Weight step t by gamma^t, as the exact discounted objective requires."""


@dataclass(frozen=True)
class BaselineConfig(ReinforceConfig):
    """REINFORCE with a learned baseline."""

    value_lr: Positive = 3e-3
    """Learning rate of the value network."""
    value_updates: Count = 10
    """Gradient steps of the value network on each batch of episodes."""


def train_reinforce(
    env: Environment,
    config: ReinforceConfig | None = None,
    *,
    seed: int = 0,
    networks: Networks | None = None,
    progress: bool = False,
    callback: Callback | None = None,
) -> Result:
    """Train a policy by REINFORCE, without a baseline. The value network of `networks` is not changed.

    A truncated episode is used as it is: without a value network, the rest of its return is unknown.
    Arguments and result as in `minirlhf.control`.

    Example:
        >>> result = train_reinforce("CartPole-v1", ReinforceConfig(total_steps=1_000), seed=1)
        >>> result.values is None, len(result.episodes) % 8  # eight whole episodes an update
        (True, 0)
    """
    config = config or ReinforceConfig()
    run = Run("reinforce", env, config, seed=seed, networks=networks, progress=progress, callback=callback)
    policy = run.networks.policy
    optimizer = torch.optim.Adam(policy.parameters(), config.lr, eps=config.adam_eps, fused=True)

    for _ in run.iterations():
        episodes = run.collector.collect_episodes(policy)
        returns = discounted_returns(episodes.rewards, episodes.ends, config.gamma, mask=episodes.mask)
        weights = returns * _gamma_t(episodes, config)

        logprobs, entropy = policy.logprobs_and_entropy(policy(episodes.observations), episodes.actions)
        loss = policy_gradient_loss(logprobs, weights, episodes.mask, denominator=config.num_envs)
        run.check_finite(loss)
        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        optimizer.step()

        run.log(
            {
                "policy/loss": loss,
                "policy/grad_norm": grad_norm,
                "policy/entropy": masked_mean(entropy, episodes.mask),
                "policy/weight_std": masked_var(weights, episodes.mask).sqrt(),
            }
        )
    return run.result(values=False)


def train_reinforce_with_baseline(
    env: Environment,
    config: BaselineConfig | None = None,
    *,
    seed: int = 0,
    networks: Networks | None = None,
    progress: bool = False,
    callback: Callback | None = None,
) -> Result:
    """Train a policy by REINFORCE with a learned baseline v(s; w).

    The return of a truncated episode bootstraps from v of its last observation. Arguments and result as in
    `minirlhf.control`.

    Example:
        >>> result = train_reinforce_with_baseline("CartPole-v1", BaselineConfig(total_steps=1_000), seed=1)
        >>> "value/explained_variance" in result.history[0]
        True
    """
    config = config or BaselineConfig()
    run = Run("baseline", env, config, seed=seed, networks=networks, progress=progress, callback=callback)
    policy, values = run.networks
    optimizer = torch.optim.Adam(policy.parameters(), config.lr, eps=config.adam_eps, fused=True)
    value_optimizer = torch.optim.Adam(values.parameters(), config.value_lr, eps=config.adam_eps, fused=True)

    for _ in run.iterations():
        episodes = run.collector.collect_episodes(policy)
        old = episodes.estimate(values)
        returns = discounted_returns(
            episodes.rewards, episodes.ends, config.gamma, truncated_values=old.truncated_values, mask=episodes.mask
        )
        deltas = torch.where(episodes.mask, returns - old.values, 0.0)
        weights = deltas * _gamma_t(episodes, config)

        logprobs, entropy = policy.logprobs_and_entropy(policy(episodes.observations), episodes.actions)
        loss = policy_gradient_loss(logprobs, weights, episodes.mask, denominator=config.num_envs)
        run.check_finite(loss)
        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        optimizer.step()

        for _ in range(config.value_updates):  # v learns after it has judged: a baseline may not look at its own action
            error = value_loss(values(episodes.observations), returns, episodes.mask)
            run.check_finite(error)
            value_optimizer.zero_grad()
            error.backward()
            nn.utils.clip_grad_norm_(values.parameters(), config.max_grad_norm)
            value_optimizer.step()

        run.log(
            {
                "policy/loss": loss,
                "policy/grad_norm": grad_norm,
                "policy/entropy": masked_mean(entropy, episodes.mask),
                "policy/weight_std": masked_var(weights, episodes.mask).sqrt(),
                "value/loss": error,
                "value/explained_variance": explained_variance(old.values, returns, episodes.mask),
            }
        )
    return run.result()


def _gamma_t(episodes: Trajectory, config: ReinforceConfig) -> Tensor:
    """[1, T]: gamma^t if `weigh_by_gamma_t`, else 1. Each row is an episode from its start, so t is the column."""
    t = torch.arange(episodes.mask.shape[1])
    return (config.gamma**t if config.weigh_by_gamma_t else torch.ones_like(t, dtype=torch.float32)).unsqueeze(0)
