"""What a critic's error, lambda and the length of episodes do to a policy gradient, exactly: lesson 04's dials.

GAE's advantage is linear in the critic's values. So with the values V + k error the estimate of one episode is

    right + k added,      right from the true V, added from the error alone

with a bias of k |E added| and a variance of the form a + k b + k^2 c. `parts` sums the bias, a, b and c over every
possible episode, once; after that any k costs nothing (`bias_std_error`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minirlhf.returns import gae
from minirlhf_course.tiny import F64, TinyMDP, discounted_returns, gradient_estimates

__all__ = ["bias_std_error", "critic_after", "parts"]


def critic_after(problem: TinyMDP, theta: Tensor, seen: int, seed: int) -> Tensor:
    """A critic's table [S] after `seen` episodes: the mean return of each state's visits, 0 where there was none."""
    played = problem.sample(theta, seen, torch.Generator().manual_seed(seed))
    G = discounted_returns(played.rewards, played.ends, problem.gamma, mask=played.mask)[played.mask]
    nothing = torch.zeros(len(theta), dtype=F64)
    total = nothing.index_add(0, played.states[played.mask], G)
    visits = nothing.index_add(0, played.states[played.mask], torch.ones_like(G))
    return total / visits.clamp(min=1)


def parts(problem: TinyMDP, theta: Tensor, critics: Sequence[Tensor], lams: Sequence[float]) -> Tensor:
    """[critics, lams, 4]: bias, a, b and c of one episode's estimate, in units of |grad J| and of its square.

    Args:
        problem: one whose episodes can all be listed.
        theta: the policy's logits [S, A].
        critics: values [S] of each critic.
        lams: GAE's lambda.
    """
    episodes, chances = problem.enumerate(theta)
    values, size = problem.values(theta), problem.policy_gradient(theta).norm()

    def estimates(rewards: Tensor, critic: Tensor, lam: float) -> Tensor:
        advantages, _ = gae(
            rewards, critic[episodes.states], episodes.ends, mask=episodes.mask, gamma=problem.gamma, lam=lam
        )
        return gradient_estimates(episodes, theta, advantages, problem.gamma).flatten(1) / size

    table = torch.zeros(len(critics), len(lams), 4, dtype=F64)
    for j, lam in enumerate(lams):
        right = estimates(episodes.rewards, values, lam)
        right = right - chances @ right
        for i, critic in enumerate(critics):
            added = estimates(torch.zeros_like(episodes.rewards), critic - values, lam)
            bias = chances @ added
            added = added - bias
            squares = torch.stack((right * right, 2 * right * added, added * added)).sum(-1) @ chances
            table[i, j] = torch.cat((bias.norm()[None], squares))
    return table


def bias_std_error(parts: Tensor, k: float, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each lambda: bias, standard deviation of one episode, error of a batch, where each critic is k times as wrong.

    Means over the critics; of the error, the root of the mean square.
    """
    bias, a, b, c = parts.unbind(-1)
    bias, variance = k * bias, a + k * b + k * k * c
    return bias.mean(0), variance.sqrt().mean(0), (bias.square() + variance / batch).mean(0).sqrt()
