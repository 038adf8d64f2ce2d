"""Proximal policy optimization (Schulman et al. 2017), with every variant that the paper compares.

Algorithm 1 of the paper, and the code of each line:

    for iteration = 1, 2, ... do                                          `run.iterations()`
        for actor = 1, 2, ..., N do
            Run policy pi_old in environment for T timesteps              `collector.collect`
            Compute advantage estimates A_1, ..., A_T                     `gae`
        end for
        Optimize surrogate L wrt theta, with K epochs
            and minibatch size M <= NT                                    `for epoch`, `for index`, `ppo_loss`
        theta_old <- theta
    end for

Equation 9, to be maximised: L = L_CLIP - c1 L_VF + c2 S. The other surrogates of the paper's table 1 are settings:

    clip (equation 7)                  clip_range=0.2
    no clipping or penalty (eq. 6)     clip_range=None
    KL penalty, fixed (equation 8)     clip_range=None, beta=1.0
    KL penalty, adaptive (section 4)   clip_range=None, beta=1.0, target_kl=0.01
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from minirlhf.control.environments import Environment
from minirlhf.control.policies import Networks
from minirlhf.control.run import SHORTEST, Callback, ControlConfig, Result, Run
from minirlhf.losses import ppo_loss
from minirlhf.returns import explained_variance, gae, whiten
from minirlhf.settings import Count, NotNegative, Positive, PPOSettings
from minirlhf.training import generator_for, set_learning_rate


@dataclass(frozen=True, kw_only=True)
class PPOConfig(ControlConfig, PPOSettings):
    """PPO; an iteration is `num_envs` actors (N) times `rollout_steps` (T)."""

    rollout_steps: Annotated[int, SHORTEST] = 128
    """T, steps per environment before each update."""
    epochs: Count = 10
    """K, passes over each batch."""
    minibatch_size: Count = 256
    """M, maximum steps per minibatch; an epoch is split into equal parts."""
    lr: Positive = 2e-3
    """Learning rate of policy and value network."""
    anneal_lr: bool = True
    """Anneal the learning rate linearly to 0 over the budget."""
    value_coef: NotNegative = 0.5
    """c1, weight of the value loss; c2 is `entropy_coef`."""
    shared: bool = False
    """Whether the networks that the trainer creates share their trunk."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # Below 3 the last minibatch may be a single step, which has no variance to divide by.
        fits = self.minibatch_size >= 3 or not self.whiten_advantages
        self.require(fits, "minibatch_size", "must be at least 3, or whiten_advantages False")
        self.require(self.target_kl is None or self.beta > 0, "target_kl", "needs beta above 0 to start from")


PENDULUM = PPOConfig(total_steps=150_000, num_envs=16, gamma=0.9)
"""For Pendulum-v1, a continuous task: reaches about -200 on average; a useless policy gets -1200."""


def train_ppo(
    env: Environment,
    config: PPOConfig | None = None,
    *,
    seed: int = 0,
    networks: Networks | None = None,
    progress: bool = False,
    callback: Callback | None = None,
) -> Result:
    """Train a policy and a value network by PPO. Arguments and result as in `minirlhf.control`.

    Example:
        >>> result = train_ppo("CartPole-v1", PPOConfig(total_steps=2_000), seed=1)
        >>> result.history[0]["policy/first_clip_fraction"]
        0.0
    """
    config = config or PPOConfig()
    run = Run(
        "ppo", env, config, seed=seed, networks=networks, shared=config.shared, progress=progress, callback=callback
    )
    policy, values = run.networks
    parameters = list(run.networks.parameters())
    optimizer = torch.optim.Adam(parameters, config.lr, eps=config.adam_eps, fused=True)
    shuffle = generator_for(seed, "control/minibatches")
    beta = config.beta

    for _ in run.iterations():
        lr = run.annealed(config.lr) if config.anneal_lr else config.lr
        set_learning_rate(optimizer, lr)

        # N actors play pi_old for T steps; then their advantages.
        trajectory = run.collector.collect(policy, config.rollout_steps)
        old = trajectory.estimate(values)
        advantages, returns = gae(
            trajectory.rewards,
            ends=trajectory.ends,
            mask=trajectory.mask,
            gamma=config.gamma,
            lam=config.lam,
            **old._asdict(),  # values, last_values, truncated_values
        )

        # From here on steps are a flat batch [B]: the order does not matter, and resets are left out.
        mask = trajectory.mask
        observations, actions = trajectory.observations[mask], trajectory.actions[mask]
        advantages, returns, old_values = advantages[mask], returns[mask], old.values[mask]
        with torch.no_grad():
            old_outputs = policy(observations)
            old_logprobs = policy.logprobs(old_outputs, actions)

        # K epochs of minibatches of at most M steps.
        rows: list[dict[str, Tensor]] = []
        for _ in range(config.epochs):
            order = torch.randperm(len(actions), generator=shuffle)
            for index in order.tensor_split(math.ceil(len(order) / config.minibatch_size)):
                outputs, new_values = run.networks.both(observations[index])
                logprobs = policy.logprobs(outputs, actions[index])
                loss, metrics = ppo_loss(
                    logprobs,
                    old_logprobs[index],
                    whiten(advantages[index]) if config.whiten_advantages else advantages[index],
                    torch.ones_like(index, dtype=torch.bool),
                    values=new_values,
                    old_values=old_values[index],
                    returns=returns[index],
                    entropy=policy.entropy(outputs) if config.entropy_coef else None,
                    clip_range=config.clip_range or math.inf,
                    value_clip_range=config.value_clip_range,
                    value_coef=config.value_coef,
                    entropy_coef=config.entropy_coef,
                    denominator=len(index),
                )
                if beta > 0:
                    loss = loss + beta * policy.kl(old_outputs[index], outputs).mean()
                run.check_finite(loss)
                optimizer.zero_grad()
                loss.backward()
                metrics["policy/grad_norm"] = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                optimizer.step()
                if not rows:
                    # No weight has changed yet: unless every ratio is 1 and nothing is clipped, a log-prob is wrong.
                    ratio_error = ((logprobs.detach() - old_logprobs[index]).exp() - 1).abs().max()
                    first = {"policy/first_ratio_error": ratio_error}
                    first |= {f"policy/first_{key}": metrics[f"policy/{key}"] for key in ("approx_kl", "clip_fraction")}
                rows.append(metrics)

        with torch.no_grad():
            kl = float(policy.kl(old_outputs, policy(observations)).mean())
        run.log(
            _summary(rows)
            | first
            | {
                "policy/kl": kl,
                "policy/entropy": policy.entropy(old_outputs).mean(),
                "policy/lr": lr,
                "policy/beta": beta,
                "value/explained_variance": explained_variance(old_values, returns),
            }
        )
        if config.target_kl is not None:
            beta = adapted(beta, kl, config.target_kl)
    return run.result()


def adapted(beta: float, kl: float, target_kl: float) -> float:
    """The next KL coefficient (section 4): doubled if the policy moved too far, halved if it hardly moved.

    >>> adapted(1.0, kl=0.02, target_kl=0.01), adapted(1.0, kl=0.005, target_kl=0.01)
    (2.0, 0.5)
    """
    if kl > 1.5 * target_kl:
        return 2 * beta
    return beta / 2 if kl < target_kl / 1.5 else beta


def _summary(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each metric over an iteration's minibatches; the maximum for policy/ratio_max."""
    summary = {key: torch.stack([row[key] for row in rows]).mean() for key in rows[0]}
    summary["policy/ratio_max"] = torch.stack([row["policy/ratio_max"] for row in rows]).max()
    return summary
