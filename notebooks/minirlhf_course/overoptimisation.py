"""Over-optimisation of a reward model (Gao, Schulman and Hilton 2022): best-of-n, ensembles, and the curve's form.

A proxy reward is a reward model; gold is what it stands for. Push on the proxy, by PPO or by taking the best of n
answers, and gold rises, bends and falls. The push is measured in d = sqrt(KL(policy || initial policy)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from minirlhf.language.reward_model import RewardFunction

HOW = ("mean", "min")


def best_of_n_kl(n: int) -> float:
    """KL(best of n || one sample) in nats: log n - (n - 1) / n, whatever the reward (Stiennon et al. 2020, G.3).

    Exact where no two answers score the same; an upper bound where some do.

    Raises:
        ValueError: n below 1.

    Example:
        >>> best_of_n_kl(1), round(best_of_n_kl(128), 4)
        (0.0, 3.8598)
    """
    if n < 1:
        raise ValueError(f"best of {n}: n must be at least 1")
    return math.log(n) - (n - 1) / n


def best_of_n(proxy: Tensor, values: Tensor, n: int) -> Tensor:
    """What the best of n answers is worth, from a pool of N >= n: the mean over all C(N, n) choices, with no loop.

    The answer of rank i (of N, the best has rank N) is the best of n in C(i - 1, n - 1) of the C(N, n) choices
    (Nakano et al. 2021, WebGPT, appendix I). Answers with equal proxy share what they win together.

    Args:
        proxy: [..., N], decides who is best.
        values: [..., N], what is asked of the winner: gold, its length, or the proxy itself.
        n: how many are drawn, without putting back.

    Returns:
        [...] float64.

    Raises:
        ValueError: shapes that differ, or n not in 1..N.

    Example:
        >>> best_of_n(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([5.0, 7.0, 3.0]), n=2)  # (7 + 3 + 3) / 3
        tensor(4.3333, dtype=torch.float64)
    """
    if proxy.shape != values.shape:
        raise ValueError(f"proxy {tuple(proxy.shape)} and values {tuple(values.shape)} must have one shape")
    pool = proxy.shape[-1]
    if not 1 <= n <= pool:
        raise ValueError(f"best of {n} from a pool of {pool}: n must be in 1..{pool}")
    count = torch.arange(pool + 1, dtype=torch.float64)
    # log C(count, n) - log C(pool, n); -inf where fewer than n answers are to choose from.
    logs = torch.lgamma(count + 1) - torch.lgamma((count - n).clamp(min=0) + 1)
    share = torch.where(count >= n, (logs - logs[-1]).exp(), 0.0)  # of choices that lie within the lowest `count`
    below = (proxy[..., None, :] < proxy[..., :, None]).sum(-1)
    within = (proxy[..., None, :] <= proxy[..., :, None]).sum(-1)
    wins = (share[within] - share[below]) / (within - below)
    return (wins * values.double()).sum(-1)


class EnsembleReward:
    """Several reward models as one: their mean, or the lowest of them (Coste et al. 2023: worst-case optimisation).

    Args:
        rewards: callables (prompts, responses) -> scores, with one zero (`train_reward_model`'s demonstrations).
        how: "mean" or "min".

    Raises:
        ValueError: no reward, or another `how`.

    Example:
        >>> short = lambda prompts, responses: [-len(r) for r in responses]
        >>> likes_frogs = lambda prompts, responses: [float("frog" in r) for r in responses]
        >>> EnsembleReward([short, likes_frogs], "min")(["a", "b"], ["frog", "ox"])
        tensor([-4., -2.])
    """

    def __init__(self, rewards: Sequence[RewardFunction], how: str = "mean") -> None:
        if not rewards or how not in HOW:
            raise ValueError(f"an ensemble needs at least one reward, and how in {HOW}; got {len(rewards)} and {how!r}")
        self.rewards, self.how = list(rewards), how

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """Score each response to its prompt: -> [B] float32."""
        scores = torch.stack([torch.as_tensor(r(prompts, responses), dtype=torch.float32) for r in self.rewards])
        return scores.mean(dim=0) if self.how == "mean" else scores.amin(dim=0)


def fit_curve(distance: Tensor, gain: Tensor) -> tuple[float, float]:
    """Least squares of gain = d (alpha - beta d): the form that Gao et al. found for best-of-n.

    Args:
        distance: [P], d = sqrt(KL).
        gain: [P], gold above the initial policy's. There is no constant: no distance, no gain.

    Returns:
        alpha (gain a unit of distance at the start) and beta (how fast it is lost). For beta > 0 the curve's peak is
        alpha^2 / (4 beta), at d = alpha / (2 beta).

    Raises:
        ValueError: fewer than two distances above 0 that differ.

    Example:
        >>> d = torch.tensor([0.0, 1.0, 2.0, 3.0])
        >>> alpha, beta = fit_curve(d, d * (2.0 - 0.5 * d))
        >>> round(alpha, 6), round(beta, 6)
        (2.0, 0.5)
    """
    d, g = distance.double(), gain.double()
    if len(d[d > 0].unique()) < 2:
        raise ValueError("the curve has two parameters: give at least two different distances above 0")
    # The normal equations of the columns d and -d^2.
    columns = torch.stack((d, -d.square()), dim=1)
    alpha, beta = torch.linalg.solve(columns.T @ columns, columns.T @ g).tolist()
    return alpha, beta
