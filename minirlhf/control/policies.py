"""Policies and value networks: small MLPs with orthogonal initialization, for discrete and continuous actions.

A policy network returns the *parameters* of a distribution over actions, `outputs` [..., K]: logits, or mean and log
standard deviation. All else is a function of these outputs, so keeping an old distribution means keeping one tensor.

    policy, values = make_networks("CartPole-v1")
    outputs = policy(observations)
    actions = policy.sample(outputs, generator)
    logprobs = policy.logprobs(outputs, actions)

Initialization as in "The 37 implementation details of PPO": orthogonal, gain sqrt(2) in hidden layers, 0.01 at the
policy's head (all actions start nearly equally likely), 1 at the value's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minirlhf.control.environments import Environment, make_envs
from minirlhf.errors import UserError
from minirlhf.kl import exact_kl
from minirlhf.losses import entropy_from_logits, token_logprobs
from minirlhf.training import generator_for

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


class Policy(nn.Module):
    """A distribution over actions for every observation: [..., D] gives `outputs` [..., K]."""

    def __init__(self, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, observations: Tensor) -> Tensor:
        return self.outputs_of(self.trunk(observations))

    def outputs_of(self, features: Tensor) -> Tensor:
        """The outputs [..., K] from the trunk's features [..., H]."""
        raise NotImplementedError

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw one action per row."""
        raise NotImplementedError

    def mode(self, outputs: Tensor) -> Tensor:
        """The most likely action of each row, which greedy evaluation plays."""
        raise NotImplementedError

    def logprobs(self, outputs: Tensor, actions: Tensor) -> Tensor:
        """log pi(action | observation) [...]."""
        raise NotImplementedError

    def entropy(self, outputs: Tensor) -> Tensor:
        """The entropy of each row [...], in nats."""
        raise NotImplementedError

    def kl(self, old_outputs: Tensor, outputs: Tensor) -> Tensor:
        """KL(old || new) [...], in nats, exact and not sampled; differentiable any number of times."""
        raise NotImplementedError

    def logprobs_and_entropy(self, outputs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        return self.logprobs(outputs, actions), self.entropy(outputs)


class CategoricalPolicy(Policy):
    """Discrete actions: outputs are logits [..., A], actions int64 [...].

    >>> policy, _ = make_networks("CartPole-v1")
    >>> outputs = policy(torch.zeros(3, 4))
    >>> policy.logprobs(outputs, torch.zeros(3, dtype=torch.int64)).shape
    torch.Size([3])
    """

    def outputs_of(self, features: Tensor) -> Tensor:
        return self.head(features)

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        # The Gumbel trick: the largest of logits - log(Exponential noise) is a draw from their softmax.
        return (outputs - torch.empty_like(outputs).exponential_(generator=generator).log_()).argmax(-1)

    def mode(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(-1)

    def logprobs(self, outputs: Tensor, actions: Tensor) -> Tensor:
        return token_logprobs(outputs, actions)

    def entropy(self, outputs: Tensor) -> Tensor:
        return entropy_from_logits(outputs)

    def kl(self, old_outputs: Tensor, outputs: Tensor) -> Tensor:
        return exact_kl(old_outputs, outputs)

    def logprobs_and_entropy(self, outputs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprobs(outputs, actions, return_entropy=True)


class GaussianPolicy(Policy):
    """Continuous actions: independent Gaussians, outputs are mean and log standard deviation [..., 2 A].

    Actions [..., A] are in units of the action space: -1 and 1 are its bounds. Actions outside are clipped when
    they are played (`environments.to_environment`), not before their log-probability is taken. The standard
    deviation does not depend on the observation (as in TRPO and PPO).
    """

    def __init__(self, trunk: nn.Module, head: nn.Linear) -> None:
        super().__init__(trunk, head)
        self.log_std = nn.Parameter(torch.zeros(head.out_features))

    def outputs_of(self, features: Tensor) -> Tensor:
        mean = self.head(features)
        return torch.cat((mean, self.log_std.expand_as(mean)), -1)

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mean, log_std = outputs.chunk(2, -1)
        return mean + log_std.exp() * torch.empty_like(mean).normal_(generator=generator)

    def mode(self, outputs: Tensor) -> Tensor:
        return outputs.chunk(2, -1)[0]

    def logprobs(self, outputs: Tensor, actions: Tensor) -> Tensor:
        mean, log_std = outputs.chunk(2, -1)
        z = (actions - mean) * (-log_std).exp()
        return (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self, outputs: Tensor) -> Tensor:
        log_std = outputs.chunk(2, -1)[1]
        return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def kl(self, old_outputs: Tensor, outputs: Tensor) -> Tensor:
        old_mean, old_log_std = old_outputs.chunk(2, -1)
        mean, log_std = outputs.chunk(2, -1)
        # KL of two Gaussians, term by term: log(s/s0) + (s0^2 + (m0 - m)^2) / (2 s^2) - 1/2
        spread = ((2 * old_log_std).exp() + (old_mean - mean).square()) * 0.5 * (-2 * log_std).exp()
        return (log_std - old_log_std + spread - 0.5).sum(-1)


class ValueNetwork(nn.Module):
    """V(s): observations [..., D] give values [...]."""

    def __init__(self, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, observations: Tensor) -> Tensor:
        return self.values_of(self.trunk(observations))

    def values_of(self, features: Tensor) -> Tensor:
        return self.head(features).squeeze(-1)


class Networks(NamedTuple):
    """A policy and a value network; they share their trunk if `policy.trunk is values.trunk`."""

    policy: Policy
    values: ValueNetwork

    def both(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """(outputs [..., K], values [...]); a shared trunk is run once."""
        features = self.policy.trunk(observations)
        if self.values.trunk is self.policy.trunk:
            return self.policy.outputs_of(features), self.values.values_of(features)
        return self.policy.outputs_of(features), self.values(observations)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter once, even if the trunk is shared."""
        return nn.ModuleList(self).parameters()


def _linear(inputs: int, outputs: int, gain: float, generator: torch.Generator) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):  # torch draws its own weights from the global generator: don't advance it
        layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def make_networks(
    env: Environment,
    hidden: Sequence[int] = (64, 64),
    *,
    activation: str = "tanh",
    shared: bool = False,
    seed: int = 0,
) -> Networks:
    """A policy and a value network that fit an environment's spaces.

    Args:
        env: see `environments.Environment`; flat Box observations, Discrete or Box actions.
        hidden: widths of the hidden layers.
        activation: "tanh" or "relu".
        shared: whether policy and value network have one trunk.
        seed: of the weights; the global generator is not advanced.

    Raises:
        UserError: the spaces are of another kind, or the activation or the environment is unknown.

    Example:
        >>> policy, values = make_networks("CartPole-v1", hidden=(32,))
        >>> policy(torch.zeros(5, 4)).shape, values(torch.zeros(5, 4)).shape
        (torch.Size([5, 2]), torch.Size([5]))
    """
    import gymnasium

    if activation not in ACTIVATIONS:
        raise UserError(f"activation must be one of {sorted(ACTIVATIONS)}, not {activation!r}")
    if not hidden or min(hidden) < 1:
        raise UserError(f"hidden must have at least one layer of at least one unit, not {tuple(hidden)}")
    envs = make_envs(env, 1)
    observation_space, action_space = envs.single_observation_space, envs.single_action_space
    envs.close()
    if not isinstance(observation_space, gymnasium.spaces.Box) or len(observation_space.shape) != 1:
        raise UserError(
            f"observations must be a flat Box, not {observation_space}: wrap the environment to flatten them"
        )
    generator = generator_for(seed, "control/networks")

    def trunk() -> nn.Sequential:
        layers: list[nn.Module] = []
        widths = [observation_space.shape[0], *hidden]
        for inputs, outputs in pairwise(widths):
            layers += [_linear(inputs, outputs, math.sqrt(2), generator), ACTIVATIONS[activation]()]
        return nn.Sequential(*layers)

    policy: Policy
    if isinstance(action_space, gymnasium.spaces.Discrete):
        policy = CategoricalPolicy(trunk(), _linear(hidden[-1], int(action_space.n), 0.01, generator))
    elif isinstance(action_space, gymnasium.spaces.Box) and len(action_space.shape) == 1:
        policy = GaussianPolicy(trunk(), _linear(hidden[-1], action_space.shape[0], 0.01, generator))
    else:
        raise UserError(f"actions must be Discrete or a flat Box, not {action_space}")
    values_trunk = policy.trunk if shared else trunk()
    return Networks(policy, ValueNetwork(values_trunk, _linear(hidden[-1], 1, 1.0, generator)))
