"""RLOO and GRPO: REINFORCE where the baseline is made of the other answers to the same prompt, without a value network.

    A_i = R_i - mean of the other answers' R                   RLOO (Kool et al. 2019, Ahmadian et al. 2024)
    A_i = (R_i - mean of all K answers' R) / their deviation   GRPO (Shao et al. 2024); without the division: Dr. GRPO

Three models take part: the policy, the frozen reference, and the reward, which is any callable
(prompts, responses) -> scores. The whole answer is one action, so all of its tokens have the same advantage.

One step, in order:
    1  sample K answers to each prompt, score them         `Rollouts.sample`
    2  compare each answer with its group                  `_experience`
    3  a few epochs of clipped updates on minibatches      `update` with `_loss`

Further references: Liu et al. 2025 (Dr. GRPO: what the two divisions bias), Yu et al. 2025 (DAPO: clip-higher, loss per
token). Left out: sampling again where a group has no variance (DAPO's dynamic sampling).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import torch
from torch import Tensor

from minirlhf.kl import kl_k1, kl_k2, kl_k3
from minirlhf.language.generation import Samples
from minirlhf.language.models import response_logprobs
from minirlhf.language.reward_model import RewardFunction
from minirlhf.language.rollouts import (
    Learners,
    Monitor,
    Rollout,
    Rollouts,
    RolloutSettings,
    check_learners,
    measure,
    ratio_errors,
    reference_logprobs,
    speed,
    update,
)
from minirlhf.language.samplers import Sampler
from minirlhf.losses import ppo_loss
from minirlhf.returns import group_advantages, masked_sum
from minirlhf.settings import NotNegative, Positive, whole
from minirlhf.training import Recorder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(RolloutSettings, option="grpo"):
    """GRPO: the group's mean and deviation, a mean per answer, the KL in the loss."""

    group_size: Annotated[int, whole(2)] = 4
    """K, answers per prompt; batch_size is a multiple of it."""
    baseline: Literal["leave_one_out", "group_mean"] = "group_mean"
    """The mean reward of the other answers, or of all K, which only scales the advantage by (K - 1) / K."""
    divide_by_std: bool = True
    """Divide the advantages of a group by the standard deviation of its rewards."""
    loss_over: Literal["tokens", "sequences", "constant"] = "sequences"
    """Tokens: each counts the same. Sequences: each answer does, its tokens share its weight. Constant: the sum of each
    answer's tokens divided by max_response_tokens, which is the policy gradient up to this factor."""
    kl: Literal["reward", "k1", "k2", "k3"] = "k3"
    """Where the KL is charged: in the reward, or as a loss with this estimator (the gradient of k1 is 0 on average)."""
    beta: NotNegative = 0.04
    """KL coefficient."""
    clip_range_high: Positive | None = None
    """Ratios may rise to 1 + this (DAPO's clip-higher); default: clip_range."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.batch_size % self.group_size == 0, "batch_size", f"must be a multiple of {self.group_size} answers"
        )


@dataclass(frozen=True, kw_only=True)
class RLOOConfig(GRPOConfig, option="rloo"):
    """RLOO: the mean of the other answers, no division, the KL in the reward."""

    baseline: Literal["leave_one_out", "group_mean"] = "leave_one_out"
    """The mean reward of the other answers, or of all K, which only scales the advantage by (K - 1) / K."""
    divide_by_std: bool = False
    """Divide the advantages of a group by the standard deviation of its rewards."""
    loss_over: Literal["tokens", "sequences", "constant"] = "constant"
    """Tokens: each counts the same. Sequences: each answer does, its tokens share its weight. Constant: the sum of each
    answer's tokens divided by max_response_tokens, which is the policy gradient up to this factor."""
    kl: Literal["reward", "k1", "k2", "k3"] = "reward"
    """Where the KL is charged: in the reward, or as a loss with this estimator (the gradient of k1 is 0 on average)."""
    beta: NotNegative = 0.08
    """KL coefficient."""


class Experience(NamedTuple):
    """One batch of answers with all that the update needs."""

    samples: Samples
    ref_logprobs: Tensor
    """[B, T]."""
    advantages: Tensor
    """[B, T], the same for each token of an answer unless another sampler's tokens are weighted."""

    def rows(self, index: Tensor) -> Experience:
        """The chosen rows, trimmed to their longest answer."""
        samples = self.samples.rows(index)
        width = samples.response_mask.shape[1]
        return Experience(samples, self.ref_logprobs[index, :width], self.advantages[index, :width])


def train_grpo(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    reward: RewardFunction,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    config: GRPOConfig,
    *,
    corpus_blocks: Tensor | None = None,
    seed: int = 0,
    recorder: Recorder | None = None,
    monitor: Monitor | None = None,
    sampler: Sampler | None = None,
    importance_cap: float | None = None,
) -> PreTrainedModel:
    """Train a policy by GRPO, or by RLOO with an `RLOOConfig`, in place.

    Args and errors are those of `train_rlhf`, which also has a value model.

    Returns:
        The policy (or, with ema_decay, its moving average), in eval mode.

    Example:
        >>> right = lambda prompts, responses: [float(r == "yes") for r in responses]
        >>> train_grpo(clone(sft), sft, right, tokenizer, prompts, GRPOConfig())  # doctest: +SKIP
    """
    name, k = str(config.option), config.group_size
    rollouts = Rollouts(policy, reward, tokenizer, prompts, config, seed, corpus_blocks, sampler, importance_cap, k)
    check_learners({"policy": policy}, {"reference": reference, **rollouts.models})
    recorder = recorder or Recorder(name, show=("objective/score", "objective/kl"))
    learners = Learners({"policy": policy}, {"policy": config.lr}, config)
    learners.begin(recorder, [reference], {})

    for step in recorder.steps(config.steps):
        began = time.monotonic()
        rates = learners.set_rates(step)
        rollout = rollouts.sample(step)
        experience, of_groups = _experience(rollout, reference, config)
        sampled = time.monotonic()

        loss_of = partial(_loss, policy, experience, config)
        metrics = update(learners, rollout.samples, rollouts.minibatches(step), loss_of, config, recorder)
        measured = measure(rollout, experience.ref_logprobs, config.beta) | of_groups | rollout.monitored(monitor)
        recorder.log(measured | metrics | rollout.mismatch | rates | speed(rollout.samples, began, sampled))
    return (policy if learners.average is None else learners.average).eval()


@torch.no_grad()
def _experience(
    rollout: Rollout, reference: PreTrainedModel, config: GRPOConfig
) -> tuple[Experience, dict[str, float]]:
    """Compare each answer with the others of its group."""
    samples, rewards = rollout.samples, rollout.scores
    ref_logprobs = reference_logprobs(reference, samples, config.micro_batch_tokens, config.temperature)
    if config.kl == "reward":
        rewards = rewards - config.beta * (samples.logprobs - ref_logprobs).sum(1)
    groups = rewards.view(-1, config.group_size)
    leave_one_out = config.baseline == "leave_one_out"
    own = group_advantages(groups, leave_one_out=leave_one_out, divide_by_std=config.divide_by_std).flatten()
    advantages = torch.where(samples.response_mask, own[:, None], 0.0)
    if rollout.weights is not None:
        advantages = advantages * rollout.weights
    metrics = {
        "objective/group_std": float(groups.std(1).mean()),
        "objective/equal_groups": float((groups.amax(1) == groups.amin(1)).float().mean()),  # they teach nothing
    }
    return Experience(samples, ref_logprobs, advantages), metrics


def _loss(
    policy: PreTrainedModel, experience: Experience, config: GRPOConfig, rows: Tensor, minibatch: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped loss of a few rows, divided by the counts of their whole minibatch; and its metrics."""
    mask = experience.samples.response_mask
    counted = float(mask[minibatch].sum())
    part = experience.rows(rows)
    samples = part.samples
    shares = token_shares(samples.response_mask, counted, len(minibatch), config)
    logprobs, entropy = response_logprobs(
        policy, samples.tokens, samples.mask, samples.response_mask, config.temperature, return_entropy=True
    )
    loss, metrics = ppo_loss(
        logprobs,
        samples.logprobs,
        part.advantages * shares * counted,  # min(r A, clip(r) A) times w >= 0 is that of w A
        samples.response_mask,
        entropy=entropy if config.entropy_coef > 0 else entropy.detach(),  # so its graph is freed at once
        clip_range=config.clip_range or math.inf,
        clip_range_high=config.clip_range_high,
        entropy_coef=config.entropy_coef,
        denominator=counted,
    )
    if config.kl != "reward" and config.beta > 0:
        kl = masked_sum(shares * ESTIMATORS[config.kl](logprobs, part.ref_logprobs), samples.response_mask)
        loss = loss + config.beta * kl
        metrics["policy/kl_loss"] = kl.detach()
    return loss, metrics | ratio_errors(logprobs, samples.logprobs, counted)


def token_shares(response_mask: Tensor, counted: float, answers: int, config: GRPOConfig) -> Tensor:
    """The weight [b, T] of each token in the loss of a minibatch: see `GRPOConfig.loss_over`.

    Args:
        response_mask: [b, T] bool, of some of the minibatch's answers.
        counted: the response tokens of the whole minibatch.
        answers: its answers.
        config: which names the mean.

    Example:
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> token_shares(mask, 3, 2, GRPOConfig(loss_over="sequences"))
        tensor([[0.2500, 0.2500],
                [0.5000, 0.0000]])
    """
    counts = response_mask.to(torch.get_default_dtype())
    if config.loss_over == "tokens":
        return counts / counted
    if config.loss_over == "sequences":
        return counts / counts.sum(1, keepdim=True).clamp(min=1) / answers
    return counts / (config.max_response_tokens * answers)
