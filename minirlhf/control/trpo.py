"""Trust region policy optimization (Schulman et al. 2015): the largest step within a bound on the KL divergence.

    maximise over theta    E[ pi_theta(a|s) / pi_old(a|s) * A(s, a) ]         the surrogate (equation 14)
    subject to             E[ KL(pi_old(.|s) || pi_theta(.|s)) ] <= max_kl

Appendix C of the paper, and the code of each step:

    1  g, the gradient of the surrogate at theta_old                          `surrogate`
    2  x ~ F^-1 g by conjugate gradient, F the Hessian of the mean KL         `conjugate_gradient`, `fisher_product`
    3  the longest step along x: beta = sqrt(2 max_kl / x^T F x)
    4  shrink it until the surrogate improves and the KL holds                the line search

F is never formed: F v is the gradient of (grad KL . v), two backward passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from minirlhf.control.environments import Environment
from minirlhf.control.policies import Networks, Policy
from minirlhf.control.run import SHORTEST, Callback, ControlConfig, Result, Run
from minirlhf.losses import clipped_surrogate, value_loss
from minirlhf.returns import explained_variance, gae, whiten
from minirlhf.settings import Count, CountOrZero, Fraction, NotNegative, Positive


@dataclass(frozen=True)
class TRPOConfig(ControlConfig):
    """TRPO; an update is `num_envs` times `rollout_steps` steps."""

    rollout_steps: Annotated[int, SHORTEST] = 128
    """T, columns played before each update."""
    max_kl: Positive = 0.01
    """The bound on the mean KL(old || new) of an update, in nats."""
    cg_iterations: Count = 10
    """Steps of conjugate gradient."""
    cg_damping: NotNegative = 0.1
    """Added to F's diagonal, so that a nearly flat direction doesn't give a huge step."""
    backtracks: CountOrZero = 10
    """Halvings of the step in the line search before the update is skipped."""
    value_lr: Positive = 3e-3
    """Learning rate of the value network."""
    value_updates: Count = 20
    """Gradient steps of the value network on each batch."""
    lam: Fraction = 0.95
    """GAE's lambda."""


def train_trpo(
    env: Environment,
    config: TRPOConfig | None = None,
    *,
    seed: int = 0,
    networks: Networks | None = None,
    progress: bool = False,
    callback: Callback | None = None,
) -> Result:
    """Train a policy by TRPO and a value network by Adam. Arguments and result as in `minirlhf.control`.

    `max_grad_norm` applies to the value network only: the policy's step is bounded by the KL.

    Example:
        >>> result = train_trpo("CartPole-v1", TRPOConfig(total_steps=2_000), seed=1)
        >>> all(row["policy/kl"] <= 0.01 for row in result.history)
        True
    """
    config = config or TRPOConfig()
    run = Run("trpo", env, config, seed=seed, networks=networks, progress=progress, callback=callback)
    policy, values = run.networks
    value_optimizer = torch.optim.Adam(values.parameters(), config.value_lr, eps=config.adam_eps, fused=True)

    for _ in run.iterations():
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
        mask = trajectory.mask
        observations, actions = trajectory.observations[mask], trajectory.actions[mask]
        advantages, returns, old_values = whiten(advantages[mask]), returns[mask], old.values[mask]

        metrics = trust_region_step(policy, observations, actions, advantages, config)
        run.check_finite(metrics["policy/loss"])

        for _ in range(config.value_updates):
            error = value_loss(values(observations), returns)
            run.check_finite(error)
            value_optimizer.zero_grad()
            error.backward()
            nn.utils.clip_grad_norm_(values.parameters(), config.max_grad_norm)
            value_optimizer.step()
        run.log(metrics | {"value/loss": error, "value/explained_variance": explained_variance(old_values, returns)})
    return run.result()


def trust_region_step(
    policy: Policy, observations: Tensor, actions: Tensor, advantages: Tensor, config: TRPOConfig
) -> dict[str, Tensor]:
    """One update of the policy, in place; returns its metrics. observations [B, D], actions [B, ...], advantages [B].

    Afterwards the mean KL is at most `config.max_kl`; if no step improves the surrogate, the policy is unchanged
    (policy/accepted 0).
    """
    parameters = list(policy.parameters())
    theta_old = parameters_to_vector(parameters).detach().clone()
    with torch.no_grad():
        old_outputs = policy(observations)
        old_logprobs = policy.logprobs(old_outputs, actions)

    def surrogate() -> Tensor:
        # clip_range=inf: E[r A] alone. The loss is its negative.
        return -clipped_surrogate(
            policy.logprobs(policy(observations), actions), old_logprobs, advantages, clip_range=math.inf
        )

    def mean_kl() -> Tensor:
        return policy.kl(old_outputs, policy(observations)).mean()

    # 1  The gradient. At theta_old every ratio is 1.
    old_surrogate = surrogate()
    g = flat_gradient(old_surrogate, parameters).detach()
    metrics = {
        "policy/loss": -old_surrogate.detach(),
        "policy/entropy": policy.entropy(old_outputs).mean(),
        "policy/grad_norm": g.norm(),
    }
    outcome = ("policy/kl", "policy/surrogate_gain", "policy/accepted", "policy/backtracks")
    stayed = metrics | {key: torch.tensor(0.0) for key in outcome}
    if not bool(g.isfinite().all()) or float(g.norm()) == 0.0:
        return stayed  # a NaN loss is reported by the caller; a zero gradient gives no direction

    # 2  The natural gradient's direction.
    fisher = fisher_product(mean_kl, parameters, config.cg_damping)
    x = conjugate_gradient(fisher, g, config.cg_iterations)

    # 3  The step at which the KL reaches its bound in the quadratic approximation 1/2 s^T F s.
    curvature = float(x @ fisher(x))
    if not curvature > 0:
        return stayed  # only without damping: due to rounding, F was not positive along x
    step = math.sqrt(2 * config.max_kl / curvature) * x

    # 4  That is only approximate: halve the step until the bound holds and the surrogate improves.
    with torch.no_grad():
        for halvings in range(config.backtracks + 1):
            vector_to_parameters(theta_old + 0.5**halvings * step, parameters)
            gain, kl = surrogate() - old_surrogate, mean_kl()
            if bool(gain > 0) and bool(kl <= config.max_kl):
                return metrics | {
                    "policy/kl": kl,
                    "policy/surrogate_gain": gain,
                    "policy/accepted": torch.tensor(1.0),
                    "policy/backtracks": torch.tensor(float(halvings)),
                }
        vector_to_parameters(theta_old, parameters)
    return stayed | {"policy/backtracks": torch.tensor(float(config.backtracks))}


def flat_gradient(y: Tensor, parameters: Sequence[Tensor], create_graph: bool = False) -> Tensor:
    """The gradient of a scalar as one vector [P]."""
    return torch.cat([grad.reshape(-1) for grad in torch.autograd.grad(y, parameters, create_graph=create_graph)])


def fisher_product(
    mean_kl: Callable[[], Tensor], parameters: Sequence[Tensor], damping: float
) -> Callable[[Tensor], Tensor]:
    """v [P] -> (F + damping I) v [P], F the Hessian of `mean_kl` at the present parameters (Pearlmutter's trick).

    At them the KL to the old policy and its gradient are 0, and its Hessian is the Fisher information matrix.
    """
    kl_gradient = flat_gradient(mean_kl(), parameters, create_graph=True)

    def product(v: Tensor) -> Tensor:
        grads = torch.autograd.grad(kl_gradient @ v, parameters, retain_graph=True)
        return torch.cat([grad.reshape(-1) for grad in grads]) + damping * v

    return product


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], b: Tensor, iterations: int, tolerance: float = 1e-10
) -> Tensor:
    """x with A x ~ b, for a positive definite A given by its product (Hestenes & Stiefel 1952).

    Stops early when the squared residual falls to `tolerance` times that of x = 0.

    >>> conjugate_gradient(lambda v: torch.tensor([2.0, 4.0]) * v, torch.tensor([1.0, 1.0]), iterations=2)
    tensor([0.5000, 0.2500])
    """
    x = torch.zeros_like(b)
    residual = b.clone()
    direction = b.clone()
    squared = residual @ residual
    enough = tolerance * squared
    for _ in range(iterations):
        if bool(squared <= enough):
            break
        curved = product(direction)
        length = squared / (direction @ curved)
        x = x + length * direction
        residual = residual - length * curved
        before, squared = squared, residual @ residual
        direction = residual + (squared / before) * direction
    return x
