"""Actor-critic: the value network is not only a baseline, it also replaces future rewards (bootstrapping).

One-step actor-critic (Sutton & Barto, section 13.5, page 332), at each step of each episode:

    delta <- R + gamma v(S'; w) - v(S; w)                 v(terminal) = 0            `td_errors`
    w     <- w + alpha_w delta grad v(S; w)                                          `value_loss`
    theta <- theta + alpha I delta grad log pi(A | S)                                `policy_gradient_loss`
    I     <- gamma I                                      I = 1 at the start of an episode

`train_actor_critic` does exactly this in N environments at once: the N gradients are averaged and passed to Adam.

A2C (Mnih et al. 2016, the synchronous form) collects T steps and looks further ahead: n steps, or GAE(lambda)
(Schulman et al. 2016). With `value_updates=1`, `train_a2c` is PPO with one epoch, one minibatch and nothing to clip.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from minirlhf.control.environments import Environment
from minirlhf.control.policies import Networks
from minirlhf.control.rollout import Trajectory, Values
from minirlhf.control.run import SHORTEST, Callback, ControlConfig, Result, Run
from minirlhf.losses import policy_gradient_loss, value_loss
from minirlhf.returns import explained_variance, gae, masked_mean, n_step_advantages, td_errors, whiten
from minirlhf.settings import Count, Fraction, NotNegative, Positive

REPORT_EVERY = 64
"""Time steps of one-step actor-critic between two rows of metrics."""


@dataclass(frozen=True)
class ActorCriticConfig(ControlConfig):
    """One-step actor-critic; an update is one step of each of the `num_envs` environments."""

    num_envs: Count = 16
    """N, environments played at once; an update averages over them."""
    lr: Positive = 1e-3
    """Learning rate of the policy."""
    value_lr: Positive = 3e-3
    """Learning rate of the value network."""
    weigh_by_gamma_t: bool = False
    """Keep Sutton's factor I = gamma^t, as the exact discounted objective requires; False keeps I at 1."""
    entropy_coef: NotNegative = 0.0
    """Weight of an entropy bonus; Sutton's algorithm has none."""


@dataclass(frozen=True)
class A2CConfig(ControlConfig):
    """Advantage actor-critic in batches; an update is `num_envs` times `rollout_steps` steps."""

    num_envs: Count = 16
    """N, environments played at once."""
    rollout_steps: Annotated[int, SHORTEST] = 32
    """T, steps per environment before each update."""
    lr: Positive = 1e-3
    """Learning rate of the policy."""
    value_lr: Positive = 3e-3
    """Learning rate of the value network."""
    value_updates: Count = 10
    """Gradient steps of the value network on each batch (1 in Mnih et al.)."""
    lam: Fraction | None = 0.95
    """GAE's lambda; None if `n_step` is given."""
    n_step: Count | None = None
    """Rewards to sum before bootstrapping; None if `lam` is given."""
    whiten_advantages: bool = True
    """Scale each batch's advantages to mean 0 and variance 1."""
    entropy_coef: NotNegative = 0.0
    """Weight of an entropy bonus."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            (self.lam is None) != (self.n_step is None), "n_step", "give either lam or n_step, and None for the other"
        )
        fits = self.n_step is None or self.n_step <= self.rollout_steps
        self.require(fits, "n_step", f"must be at most rollout_steps, {self.rollout_steps}")


def train_actor_critic(
    env: Environment,
    config: ActorCriticConfig | None = None,
    *,
    seed: int = 0,
    networks: Networks | None = None,
    progress: bool = False,
    callback: Callback | None = None,
) -> Result:
    """Train by one-step actor-critic, learning after every step. Arguments and result as in `minirlhf.control`.

    A row of metrics is the mean over `REPORT_EVERY` steps, without those in which all environments only reset.

    Example:
        >>> result = train_actor_critic("CartPole-v1", ActorCriticConfig(total_steps=1_000), seed=1)
        >>> result.env_steps >= 1_000, "value/td_error" in result.history[0]
        (True, True)
    """
    config = config or ActorCriticConfig()
    run = Run("actor-critic", env, config, seed=seed, networks=networks, progress=progress, callback=callback)
    policy, values = run.networks
    optimizer = torch.optim.Adam(policy.parameters(), config.lr, eps=config.adam_eps, fused=True)
    value_optimizer = torch.optim.Adam(values.parameters(), config.value_lr, eps=config.adam_eps, fused=True)
    I = torch.ones(config.num_envs, 1)  # noqa: E741 (Sutton's name)

    for _ in run.iterations():
        rows: list[dict[str, Tensor]] = []
        for _ in range(REPORT_EVERY):
            step = run.collector.collect(policy, 1)  # every field [N, 1]
            observations, after = step.observations, step.last_observations
            if not bool(step.mask.any()):
                continue  # every environment was resetting: there is no experience

            # delta = R + gamma v(S') - v(S). v(S') is 0 where the episode terminated, and v of the last observation
            # where it was only cut.
            v = values(observations)
            with torch.no_grad():
                v_after = values(after)
            deltas = td_errors(
                step.rewards,
                v.detach(),
                step.ends,
                config.gamma,
                last_values=v_after,
                truncated_values=torch.where(step.truncated, v_after.unsqueeze(1), 0.0),
                mask=step.mask,
            )

            # w <- w + alpha_w delta grad v(S): the target v + delta is held fixed ("semi-gradient").
            error = value_loss(v, v.detach() + deltas, step.mask)
            # theta <- theta + alpha I delta grad log pi(A | S)
            logprobs, entropy = policy.logprobs_and_entropy(policy(observations), step.actions)
            entropy = masked_mean(entropy, step.mask)
            loss = policy_gradient_loss(logprobs, I * deltas, step.mask) - config.entropy_coef * entropy
            run.check_finite(loss + error)

            optimizer.zero_grad()
            value_optimizer.zero_grad()
            (loss + error).backward()  # the two share no parameter, so each gets its own gradient
            grad_norm = nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
            value_grad_norm = nn.utils.clip_grad_norm_(values.parameters(), config.max_grad_norm)
            optimizer.step()
            value_optimizer.step()

            # I <- gamma I; an environment that is about to reset begins its next episode with I = 1.
            if config.weigh_by_gamma_t:
                I = torch.where(step.ends | ~step.mask, 1.0, config.gamma * I)  # noqa: E741
            row = {
                "policy/loss": loss,
                "policy/entropy": entropy,
                "policy/grad_norm": grad_norm,
                "value/loss": error,
                "value/grad_norm": value_grad_norm,
                "value/td_error": masked_mean(deltas.abs(), step.mask),
            }
            rows.append({key: value.detach() for key, value in row.items()})
        run.log({key: torch.stack([row[key] for row in rows]).mean() for key in rows[0]})
    return run.result()


def train_a2c(
    env: Environment,
    config: A2CConfig | None = None,
    *,
    seed: int = 0,
    networks: Networks | None = None,
    progress: bool = False,
    callback: Callback | None = None,
) -> Result:
    """Train by advantage actor-critic with n-step or GAE advantages. Arguments and result as in `minirlhf.control`.

    Example:
        >>> result = train_a2c("CartPole-v1", A2CConfig(total_steps=1_000, lam=None, n_step=5), seed=1)
        >>> result.env_steps >= 1_000, "value/explained_variance" in result.history[0]
        (True, True)
    """
    config = config or A2CConfig()
    run = Run("a2c", env, config, seed=seed, networks=networks, progress=progress, callback=callback)
    policy, values = run.networks
    optimizer = torch.optim.Adam(policy.parameters(), config.lr, eps=config.adam_eps, fused=True)
    value_optimizer = torch.optim.Adam(values.parameters(), config.value_lr, eps=config.adam_eps, fused=True)

    for _ in run.iterations():
        batch = run.collector.collect(policy, config.rollout_steps)
        old = batch.estimate(values)
        advantages = _advantages(batch, old, config)
        returns = advantages + old.values  # from the raw advantages, not the normalised ones

        logprobs, entropy = policy.logprobs_and_entropy(policy(batch.observations), batch.actions)
        entropy = masked_mean(entropy, batch.mask)
        weights = whiten(advantages, batch.mask) if config.whiten_advantages else advantages
        loss = policy_gradient_loss(logprobs, weights, batch.mask) - config.entropy_coef * entropy
        run.check_finite(loss)
        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        optimizer.step()

        for _ in range(config.value_updates):
            error = value_loss(values(batch.observations), returns, batch.mask)
            run.check_finite(error)
            value_optimizer.zero_grad()
            error.backward()
            value_grad_norm = nn.utils.clip_grad_norm_(values.parameters(), config.max_grad_norm)
            value_optimizer.step()

        run.log(
            {
                "policy/loss": loss,
                "policy/entropy": entropy,
                "policy/grad_norm": grad_norm,
                "value/loss": error,
                "value/grad_norm": value_grad_norm,
                "value/explained_variance": explained_variance(old.values, returns, batch.mask),
            }
        )
    return run.result()


def _advantages(batch: Trajectory, old: Values, config: A2CConfig) -> Tensor:
    """Advantages [N, T] by the estimator that the settings choose."""
    options = {"ends": batch.ends, "mask": batch.mask, "gamma": config.gamma, **old._asdict()}
    if config.n_step is not None:
        return n_step_advantages(batch.rewards, n=config.n_step, **options)
    assert config.lam is not None  # checked by the settings
    return gae(batch.rewards, lam=config.lam, **options)[0]
