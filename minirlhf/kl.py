"""KL divergence of one policy from another: estimators, the exact value, and a coefficient that holds it at a target.

With d = logpi - logref at tokens sampled from pi (Schulman 2020, "Approximating KL divergence"):

    k1 = d                 unbiased, may be negative, noisy
    k2 = d^2 / 2           biased, never negative; its GRADIENT is that of KL(pi || ref), state by state
    k3 = expm1(-d) + d     unbiased, never negative

Summed over a sequence, the gradient of k2 leaves out what a token does to the KL of later tokens. The return of the
reward -beta * k1 contains it: that is why RLHF charges the KL in the reward (`kl_rewards`).
"""

from __future__ import annotations

import torch
from torch import Tensor


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The estimator d = logprobs - ref_logprobs of KL(pi || ref), per token, in nats.

    >>> kl_k1(torch.tensor([-1.0]), torch.tensor([-1.5]))
    tensor([0.5000])
    """
    return logprobs - ref_logprobs


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The estimator d^2 / 2 of KL(pi || ref), per token, in nats: biased, but right to second order.

    >>> kl_k2(torch.tensor([-1.0]), torch.tensor([-1.5]))
    tensor([0.1250])
    """
    return (logprobs - ref_logprobs).square() / 2


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The estimator exp(-d) - 1 + d of KL(pi || ref), per token, in nats: unbiased and never negative.

    `expm1` keeps the digits that `exp(-d) - 1` loses when the two policies are close.

    >>> kl_k3(torch.tensor([-1.0]), torch.tensor([-1.5]))
    tensor([0.1065])
    """
    d = logprobs - ref_logprobs
    return torch.expm1(-d) + d


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(softmax(logits) || softmax(ref_logits)) in nats: [..., V] and [..., V] give [...]. Differentiable.

    A token that the first cannot sample (-inf) adds 0; one that only the second cannot sample makes the result inf.

    >>> exact_kl(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 0.0]))
    tensor(0.)
    """
    log_p, log_q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    difference = torch.where(log_p == -torch.inf, 0.0, log_p - log_q)
    return (log_p.exp() * difference).sum(-1)


def kl_rewards(
    scores: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, beta: float
) -> Tensor:
    """The rewards [B, T] of RLHF: a KL penalty per token, plus the score at the last (Ouyang et al. 2022, eq. 2).

        rewards_t = -beta (old_logprobs - ref_logprobs)_t,     + score at the last counted token

    scores [B]; old_logprobs, ref_logprobs and response_mask (bool, True = counts) [B, T]. Masked slots get 0,
    whatever they hold. The result carries no gradient: it reaches PPO's loss only through the advantages.
    Raises ValueError for a row in which no token counts, since its score would be lost.

    >>> old, ref = torch.tensor([[-1.0, -1.0, 9.0]]), torch.tensor([[-2.0, -1.0, 5.0]])
    >>> kl_rewards(torch.tensor([3.0]), old, ref, torch.tensor([[True, True, False]]), beta=0.5)
    tensor([[-0.5000,  3.0000,  0.0000]])
    """
    if not (old_logprobs.shape == ref_logprobs.shape == response_mask.shape) or response_mask.dim() != 2:
        shapes = [tuple(x.shape) for x in (old_logprobs, ref_logprobs, response_mask)]
        raise ValueError(f"old_logprobs, ref_logprobs and response_mask must share one shape [B, T], not {shapes}")
    if scores.shape != response_mask.shape[:1]:
        raise ValueError(f"scores must be one per row, ({len(response_mask)},), not {tuple(scores.shape)}")
    if response_mask.dtype != torch.bool:
        raise TypeError(f"response_mask must be bool (True = counts), not {response_mask.dtype}")
    empty = ~response_mask.any(1)
    if bool(empty.any()):
        row = int(empty.nonzero()[0])
        raise ValueError(f"row {row} of response_mask counts no token that could get the score: drop the row")
    rewards = torch.where(response_mask, -beta * (old_logprobs - ref_logprobs), 0.0).detach()
    positions = torch.arange(response_mask.shape[1], device=response_mask.device)
    last = torch.where(response_mask, positions, -1).amax(1, keepdim=True)
    return rewards.scatter_add(1, last, scores.detach().to(rewards.dtype).unsqueeze(1))


class FixedKLController:
    """A constant KL coefficient with the interface of `AdaptiveKLController`.

    >>> controller = FixedKLController(0.1)
    >>> controller.update(kl=7.0, episodes=64)
    >>> controller.beta
    0.1
    """

    def __init__(self, beta: float) -> None:
        if beta < 0:
            raise ValueError(f"beta must not be negative, not {beta}")
        self.beta = float(beta)

    def update(self, kl: float, episodes: int) -> None:
        """Ignore the measured KL."""

    def state_dict(self) -> dict[str, float]:
        return {"beta": self.beta}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.beta = float(state["beta"])


class AdaptiveKLController(FixedKLController):
    """A KL coefficient that adapts to keep the measured KL at `target` (Ziegler et al. 2019, section 2.2).

        error = clip(kl / target - 1, -0.2, 0.2),     beta <- beta (1 + error * episodes / horizon)

    `target` and `kl` are in nats, both per sequence or both per token; `horizon` counts episodes. The state is one
    float. Raises ValueError for a target or horizon not above 0 and for a KL that is not finite.

    >>> controller = AdaptiveKLController(0.1, target=6.0, horizon=1000)
    >>> controller.update(kl=60.0, episodes=500)  # far above: the error is clipped to 0.2
    >>> round(controller.beta, 6)
    0.11
    """

    def __init__(self, beta: float, *, target: float, horizon: float) -> None:
        super().__init__(beta)
        if not (target > 0 and horizon > 0):
            raise ValueError(f"target and horizon must be above 0, not {target} and {horizon}")
        self.target, self.horizon = float(target), float(horizon)

    def update(self, kl: float, episodes: int) -> None:
        """Update beta after `episodes` episodes whose mean KL was `kl`."""
        if not abs(kl) < float("inf"):
            raise ValueError(f"the measured KL must be finite, not {kl}: check the log-probabilities of this batch")
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        # A batch larger than five horizons would otherwise turn beta negative.
        self.beta *= max(1.0 + error * episodes / self.horizon, 0.0)
