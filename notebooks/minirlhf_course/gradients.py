"""What the learner's gradient is made of: the contribution of each episode, to see how much they disagree.

A learner follows the mean over a few episodes. The spread of the contributions is its noise: the variance of a mean
over N episodes is their variance divided by N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minirlhf.control.policies import Policy
from minirlhf.control.rollout import Trajectory
from minirlhf.errors import UserError
from minirlhf.losses import policy_gradient_loss

__all__ = ["episode_gradients"]


def episode_gradients(policy: Policy, episodes: Trajectory, weights: Tensor) -> Tensor:
    """One estimate of the policy gradient an episode: [N, P], P counting the parameters of the policy.

        sum over t of weights_t grad log pi(A_t | S_t)              (Sutton & Barto, section 13.3)

    The mean over N is minus the gradient of `train_reinforce`'s loss, whose denominator is the number of episodes.
    `tiny.gradient_estimates` is the same for a tabular policy.

    Args:
        policy: that played them; its gradients are left alone.
        episodes: from `Collector.collect_episodes`, one whole episode a row.
        weights: [N, T], what each step is worth: G, G - V, an advantage (times gamma^t where it is asked for).

    Raises:
        UserError: the weights have another shape.

    Example:
        >>> from minirlhf.control.policies import make_networks
        >>> from minirlhf.control.environments import make_envs
        >>> from minirlhf.control.rollout import Collector
        >>> policy, _ = make_networks("CartPole-v1")
        >>> episodes = Collector(make_envs("CartPole-v1", 3), seed=0).collect_episodes(policy)
        >>> episode_gradients(policy, episodes, episodes.rewards).shape
        torch.Size([3, 4610])
    """
    if weights.shape != episodes.mask.shape:
        raise UserError(f"weights must be {list(episodes.mask.shape)}, one a step, not {list(weights.shape)}")
    parameters = list(policy.parameters())
    rows = []
    for observations, actions, row_weights, mask in zip(
        episodes.observations, episodes.actions, weights, episodes.mask, strict=True
    ):
        logprobs = policy.logprobs(policy(observations[mask]), actions[mask])
        loss = policy_gradient_loss(logprobs, row_weights[mask], denominator=1.0)
        rows.append(torch.cat([-gradient.flatten() for gradient in torch.autograd.grad(loss, parameters)]))
    return torch.stack(rows)
