"""Every loss of the course as a pure function of tensors, to be minimised.

Each is a sum over the entries that count, divided by `denominator`: their number in the WHOLE optimizer step (tokens;
prompts for the reward model), so that the losses and gradients of micro-batches add up. The default is the number in
this call. Masks are True where an entry counts; masked values, even NaN, change neither loss nor gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from minirlhf_kernels import linear_token_logprobs, ppo_loss, token_logprobs
from torch import Tensor

__all__ = [
    "clipped_surrogate",
    "count_ranked_prompts",
    "entropy_from_logits",
    "implicit_rewards",
    "linear_token_logprobs",
    "pairwise_accuracy",
    "policy_gradient_loss",
    "ppo_loss",
    "ranking_loss",
    "sft_loss",
    "token_logprobs",
    "value_loss",
]


def _counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """x where mask is True, 0 elsewhere. Apply it before any product or square, whose gradient would be 0 * NaN."""
    if mask is None:
        return x
    if x.shape != mask.shape or mask.dtype != torch.bool:
        raise ValueError(f"the mask must be bool of shape {tuple(x.shape)}, not {mask.dtype} of {tuple(mask.shape)}")
    return torch.where(mask, x, 0)


def _mean_of_counted(x: Tensor, mask: Tensor | None, denominator: Tensor | float | None) -> Tensor:
    if denominator is None:
        denominator = x.numel() if mask is None else mask.sum()
        if not bool(denominator > 0):
            raise ValueError("nothing counts: give the denominator of the whole optimizer step")
    return _counted(x, mask).sum() / denominator


def _check_same_shape(x: Tensor, other: Tensor, names: str) -> None:
    # Broadcasting [N] against [N, 1] would silently give an N x N loss.
    if x.shape != other.shape:
        raise ValueError(f"{names} must share one shape, not {tuple(x.shape)} and {tuple(other.shape)}")


def policy_gradient_loss(
    logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor | None = None,
    *,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """-sum(logprobs * advantages) / denominator, whose gradient is minus the policy gradient (Williams 1992).

    All [...]. The advantages are constants: returns for REINFORCE, G - V with a baseline, delta for actor-critic, each
    times gamma^t for the exact discounted objective (Sutton & Barto, section 13.3).

    >>> policy_gradient_loss(torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 3.0]))
    tensor(3.5000)
    """
    _check_same_shape(logprobs, advantages, "logprobs and advantages")
    logprobs, advantages = _counted(logprobs, response_mask), _counted(advantages.detach(), response_mask)
    return -_mean_of_counted(logprobs * advantages, response_mask, denominator)


def clipped_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor | None = None,
    *,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """-min(r A, clip(r, 1 - clip_range, 1 + clip_range) A), r = exp(logprobs - old_logprobs) (PPO, equation 7).

    All [...]: the policy term of `ppo_loss` alone. clip_range=inf gives the unclipped surrogate of TRPO.
    `clip_range_high` is the upper limit where it differs (DAPO's "clip-higher").

    >>> clipped_surrogate(torch.tensor([0.0]), torch.tensor([-1.0]), torch.tensor([1.0]))  # r = 2.7
    tensor(-1.2000)
    """
    if response_mask is None:
        response_mask = torch.ones_like(logprobs, dtype=torch.bool)
    loss, _ = ppo_loss(
        logprobs,
        old_logprobs,
        advantages,
        response_mask,
        clip_range=clip_range,
        clip_range_high=clip_range_high,
        denominator=denominator,
    )
    return loss


def value_loss(
    values: Tensor,
    returns: Tensor,
    response_mask: Tensor | None = None,
    *,
    old_values: Tensor | None = None,
    clip_range: float | None = None,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """1/2 (V - R)^2; with `clip_range`, the larger of that and the same for V clipped to old_values ± it. All [...].

    The returns are constants. Raises ValueError if only one of old_values and clip_range is given.

    >>> value_loss(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    tensor(1.)
    """
    _check_same_shape(values, returns, "values and returns")
    values, returns = _counted(values, response_mask), _counted(returns.detach(), response_mask)
    error = (values - returns).square()
    if old_values is not None and clip_range is not None:
        _check_same_shape(values, old_values, "values and old_values")
        old = _counted(old_values.detach(), response_mask)
        near = old + (values - old).clamp(-clip_range, clip_range)
        error = torch.maximum(error, (near - returns).square())
    elif old_values is not None or clip_range is not None:
        raise ValueError("old_values and clip_range go together: give both or neither")
    return _mean_of_counted(0.5 * error, response_mask, denominator)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """The entropy -sum p log p of softmax(logits), in nats: [..., V] gives [...]. -inf logits add nothing.

    Differentiable any number of times (on a GPU the entropy of `token_logprobs` only once).

    >>> entropy_from_logits(torch.tensor([0.0, 0.0, -torch.inf]))
    tensor(0.6931)
    """
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)


def sft_loss(logprobs: Tensor, response_mask: Tensor, *, denominator: Tensor | float | None = None) -> Tensor:
    """The cross-entropy of the completion's tokens, in nats per token: -sum of counted logprobs / denominator.

    logprobs and response_mask (True on completion tokens, EOS among them; False on prompt and padding) [B, T].

    >>> sft_loss(torch.tensor([[-9.0, -1.0, -3.0]]), torch.tensor([[False, True, True]]))
    tensor(2.)
    """
    return -_mean_of_counted(logprobs, response_mask, denominator)


def _ranked_pairs(rewards: Tensor, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Differences r_i - r_j and which of them are pairs (i strictly better than j, both counted), each [B, K, K]."""
    _check_same_shape(rewards, scores, "rewards and scores")
    if rewards.dim() != 2:
        raise ValueError(f"rewards must be [B, K], a row per prompt, not {tuple(rewards.shape)}")
    pairs = scores.unsqueeze(2) > scores.unsqueeze(1)
    if mask is not None:
        if mask.shape != rewards.shape or mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool of shape {tuple(rewards.shape)}, not {mask.dtype}")
        pairs &= mask.unsqueeze(2) & mask.unsqueeze(1)
    return rewards.unsqueeze(2) - rewards.unsqueeze(1), pairs


def count_ranked_prompts(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """The number of prompts (rows of scores [B, K]) with at least one untied pair: `ranking_loss`'s denominator.

    >>> count_ranked_prompts(torch.tensor([[2.0, 1.0], [3.0, 3.0]]))
    tensor(1)
    """
    return _ranked_pairs(scores, scores, mask)[1].flatten(1).any(1).sum()


def ranking_loss(
    rewards: Tensor,
    scores: Tensor,
    mask: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """The reward model's loss over all pairs of each prompt's K answers (Ouyang et al. 2022, equation 1).

        -1/C(K, 2) * sum over pairs (w better than l) of log sigmoid(r_w - r_l),     averaged over prompts

    rewards [B, K] are the model's, scores [B, K] the labeler's (higher is better; for ranks, where 1 is best, pass
    -ranks); mask [B, K] (True = an answer is present) lets K differ. A prompt is one batch element.
    Tied pairs are dropped, and a prompt's sum is divided by its remaining pairs: 1/C(K, 2) without ties, and a prompt
    with ties weighs as much as any other. A prompt with no pair left adds 0 and is not counted in the default
    denominator (`count_ranked_prompts`); for micro-batches pass the count of the whole optimizer step.
    `label_smoothing` is the probability that a label is the wrong way round: that share of each pair counts turned.
    Raises ValueError if no pair is left at all and no denominator is given.

    >>> ranking_loss(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[3.0, 1.0, 1.0]]))  # two pairs, one tie dropped
    tensor(0.3133)
    """
    differences, pairs = _ranked_pairs(rewards, scores, mask)
    # The where comes before logsigmoid: its gradient at a NaN under the mask would be 0 * NaN.
    differences = torch.where(pairs, differences, 0)
    losses = -F.logsigmoid(differences)
    if label_smoothing > 0:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-differences)
    losses = torch.where(pairs, losses, 0).sum((1, 2))
    counts = pairs.sum((1, 2))
    if denominator is None:
        denominator = (counts > 0).sum()
        if not bool(denominator > 0):
            raise ValueError("every pair is tied or masked: there is nothing to learn from; drop these prompts")
    return (losses / counts.clamp(min=1)).sum() / denominator


def implicit_rewards(logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, beta: float) -> Tensor:
    """The reward that a policy has by itself: beta * sum over counted tokens of (logprobs - ref_logprobs), [B].

    The best policy under a reward and a KL penalty is pi_ref exp(r / beta) / Z, so the reward is beta log(pi / pi_ref)
    plus beta log Z(prompt), which cancels in the difference of two answers to one prompt. DPO's loss is `ranking_loss`
    of these rewards (Rafailov et al. 2023, equations 5 and 7).

    logprobs, ref_logprobs and response_mask (True on the answer's tokens, EOS among them) [B, T].

    >>> logprobs, ref = torch.tensor([[-1.0, -1.0, 7.0]]), torch.tensor([[-2.0, -1.5, 0.0]])
    >>> implicit_rewards(logprobs, ref, torch.tensor([[True, True, False]]), beta=0.1)
    tensor([0.1500])
    """
    _check_same_shape(logprobs, ref_logprobs, "logprobs and ref_logprobs")
    return beta * (_counted(logprobs, response_mask) - _counted(ref_logprobs.detach(), response_mask)).sum(1)


@torch.no_grad()
def pairwise_accuracy(rewards: Tensor, scores: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(correct, total) over all pairs that the labeler ordered: add both up over batches, then divide.

    Shapes as in `ranking_loss`. Pairs tied in scores are dropped; pairs tied in rewards count half.

    >>> correct, total = pairwise_accuracy(torch.tensor([[2.0, 1.0, 1.0]]), torch.tensor([[3.0, 2.0, 1.0]]))
    >>> correct.item(), total.item()
    (2.5, 3)
    """
    differences, pairs = _ranked_pairs(rewards, scores, mask)
    right = (differences > 0).double() + 0.5 * (differences == 0).double()
    return torch.where(pairs, right, 0).sum(), pairs.sum()
