"""Step 3: PPO against a reward, with a KL penalty per token and PPO-ptx (Ouyang et al. 2022, equation 2).

    maximise  E[r(x, y) - beta log(pi(y|x) / pi_SFT(y|x))]  +  ptx_coef E_corpus[log pi(x)]

Four models take part. The policy answers and learns; the value network, which starts as a copy of the reward model,
predicts the return at every token; the reference is the SFT model, frozen; the reward is any callable
(prompts, responses) -> scores: a reward model, or a plain Python function.

One step, in order:
    1  sample answers, keep their log-probs, score them    `Rollouts.sample`
    2  penalize the KL, estimate advantages                `_experience`
    3  a few epochs of clipped updates on minibatches      `update` with `_loss`
    4  adapt beta, log

References: Schulman et al. 2017 (PPO), Ziegler et al. 2019 (adaptive KL), Ouyang et al. 2022 (InstructGPT), and "The N
implementation details of RLHF with PPO". Left out: value-network offloading.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from minirlhf.kl import AdaptiveKLController, FixedKLController, kl_rewards
from minirlhf.language.generation import Samples
from minirlhf.language.models import response_logprobs, token_values
from minirlhf.language.reward_model import RewardFunction
from minirlhf.language.rollouts import (
    Learners,
    Monitor,
    Rollout,
    Rollouts,
    RolloutSettings,
    check_learners,
    measure,
    over_tokens,
    ratio_errors,
    reference_logprobs,
    speed,
    update,
)
from minirlhf.language.samplers import Sampler
from minirlhf.losses import ppo_loss
from minirlhf.returns import explained_variance, gae, masked_mean, whiten
from minirlhf.settings import Fraction, NotNegative, Positive, PPOSettings
from minirlhf.training import Recorder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class RLHFConfig(RolloutSettings, PPOSettings, option="rlhf"):
    """PPO with a KL penalty."""

    value_lr: NotNegative = 1e-3
    """Peak learning rate of the value network (linear decay to a tenth)."""
    target_kl: Positive | None = None
    """Adapt beta to keep the KL near this many nats per answer; None keeps beta fixed."""
    kl_horizon: Positive = 10_000.0
    """Episodes over which beta adapts; more is slower."""
    value_clip_range: Positive | None = 0.2
    """Values are clipped to within this distance of the old ones; None for no clipping."""
    gamma: Fraction = 1.0
    """Discount (InstructGPT: none)."""


class Experience(NamedTuple):
    """One batch of answers with all that the update needs; all [B, T] except `scores`."""

    samples: Samples
    scores: Tensor
    """[B], penalties included."""
    ref_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor

    def rows(self, index: Tensor) -> Experience:
        """The chosen rows, trimmed to their longest answer."""
        samples = self.samples.rows(index)
        width = samples.response_mask.shape[1]
        parts = (x[index, :width] for x in (self.ref_logprobs, self.old_values, self.advantages, self.returns))
        return Experience(samples, self.scores[index], *parts)


def train_rlhf(
    policy: PreTrainedModel,
    value_model: PreTrainedModel,
    reference: PreTrainedModel,
    reward: RewardFunction,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    config: RLHFConfig,
    *,
    corpus_blocks: Tensor | None = None,
    seed: int = 0,
    recorder: Recorder | None = None,
    monitor: Monitor | None = None,
    sampler: Sampler | None = None,
    importance_cap: float | None = None,
) -> PreTrainedModel:
    """Train a policy by PPO, in place.

    Args:
        policy: starts as the SFT model.
        value_model: a scalar model; starts as the reward model.
        reference: the SFT model, never changed.
        reward: (prompts, responses) -> one score per response. It sees answers cut after their end.
        tokenizer: of policy and value model.
        prompts: to answer.
        config: the hyper-parameters.
        corpus_blocks: [N, L] int64 pretraining text for PPO-ptx; needed when config.ptx_coef > 0.
        seed: of prompts, samples and minibatches.
        recorder: where progress and metrics go.
        monitor: extra measurements of the sampled answers.
        sampler: answers the prompts in place of `sample`, see `samplers`: what it does differently is measured, and
            doesn't stop the training.
        importance_cap: with a sampler: weight each token's policy loss by min(pi_train / pi_sampler, importance_cap).

    Returns:
        The policy (or, with ema_decay, its moving average), in eval mode.

    Raises:
        UserError: ptx_coef > 0 without corpus_blocks; importance_cap without a sampler; models share trained weights;
            or the reward returned anything but one number per response, or the sampler anything but answers.
        TrainingError: a loss or a score became NaN or infinite; or the log-probs of sampling differ from those of
            training, so that the first ratio is not 1.

    Example:
        >>> reward = lambda prompts, responses: [-abs(len(r.split()) - 5) for r in responses]
        >>> train_rlhf(sft, values, reference, reward, tokenizer, prompts, RLHFConfig())  # doctest: +SKIP
    """
    rollouts = Rollouts(policy, reward, tokenizer, prompts, config, seed, corpus_blocks, sampler, importance_cap)
    learned = {"policy": policy, "value": value_model}
    check_learners({"policy": policy, "value model": value_model}, {"reference": reference, **rollouts.models})
    recorder = recorder or Recorder("rlhf", show=("objective/score", "objective/kl"))
    controller = FixedKLController(config.beta)
    if config.target_kl is not None:
        controller = AdaptiveKLController(config.beta, target=config.target_kl, horizon=config.kl_horizon)
    learners = Learners(learned, {"policy": config.lr, "value": config.value_lr}, config)
    learners.begin(recorder, [reference], {"kl": controller})

    for step in recorder.steps(config.steps):
        began = time.monotonic()
        rates = learners.set_rates(step)
        rollout = rollouts.sample(step)
        experience = _experience(rollout.samples, rollout.scores, value_model, reference, controller.beta, config)
        if rollout.weights is not None:  # min(r A, clip(r) A) times w >= 0 is that of w A; the value's loss has none
            experience = experience._replace(advantages=experience.advantages * rollout.weights)
        sampled = time.monotonic()

        loss_of = partial(_loss, learners, experience, config)
        metrics = update(learners, rollout.samples, rollouts.minibatches(step), loss_of, config, recorder)
        measured = _measure(rollout, experience, controller.beta)
        controller.update(kl=measured["objective/kl"], episodes=config.batch_size)
        measured |= rollout.monitored(monitor)
        recorder.log(measured | metrics | rollout.mismatch | rates | speed(rollout.samples, began, sampled))
    return (policy if learners.average is None else learners.average).eval()


@torch.no_grad()
def _experience(
    samples: Samples,
    scores: Tensor,
    value_model: PreTrainedModel,
    reference: PreTrainedModel,
    beta: float,
    config: RLHFConfig,
) -> Experience:
    """Charge the KL, pay the score at the last token, and estimate advantages and returns."""
    ref_logprobs = reference_logprobs(reference, samples, config.micro_batch_tokens, config.temperature)
    values = over_tokens(lambda part: _response_values(value_model, part), samples, config.micro_batch_tokens)
    rewards = kl_rewards(scores, samples.logprobs, ref_logprobs, samples.response_mask, beta)
    last = torch.zeros_like(samples.response_mask).scatter(1, samples.lengths[:, None] - 1, True)
    advantages, returns = gae(
        rewards, values, last, gamma=config.gamma, lam=config.lam, mask=samples.response_mask
    )  # returns are made of the raw advantages, not of the whitened ones
    if config.whiten_advantages:
        advantages = whiten(advantages, samples.response_mask)
    return Experience(samples, scores, ref_logprobs, values, advantages, returns)


def _response_values(value_model: PreTrainedModel, samples: Samples) -> Tensor:
    """V before each response token: [b, T]. The value at column t depends on the tokens before t, like the policy."""
    tokens, mask, length = samples.tokens[:, :-1], samples.mask[:, :-1], samples.response_mask.shape[1]
    before = torch.zeros_like(mask)
    before[:, -length:] = samples.response_mask
    return token_values(value_model, tokens, mask, before)[:, -length:]


def _loss(
    learners: Learners, experience: Experience, config: RLHFConfig, rows: Tensor, minibatch: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's loss on a few rows, divided by the token count of their whole minibatch; and its metrics."""
    counted = float(experience.samples.response_mask[minibatch].sum())
    part = experience.rows(rows)
    samples = part.samples
    logprobs, entropy = response_logprobs(
        learners.policy, samples.tokens, samples.mask, samples.response_mask, config.temperature, return_entropy=True
    )
    loss, metrics = ppo_loss(
        logprobs,
        samples.logprobs,
        part.advantages,
        samples.response_mask,
        values=_response_values(learners.models["value"], samples),
        old_values=part.old_values,
        returns=part.returns,
        entropy=entropy if config.entropy_coef > 0 else entropy.detach(),  # so its graph is freed at once
        clip_range=config.clip_range or math.inf,
        value_clip_range=config.value_clip_range,
        value_coef=1.0,  # the two networks share nothing, so the value's weight is its learning rate
        entropy_coef=config.entropy_coef,
        denominator=counted,
    )
    return loss, metrics | ratio_errors(logprobs, samples.logprobs, counted)


def _measure(rollout: Rollout, experience: Experience, beta: float) -> dict[str, float]:
    mask = experience.samples.response_mask
    return measure(rollout, experience.ref_logprobs, beta) | {
        "value/explained_variance": float(explained_variance(experience.old_values, experience.returns, mask)),
        "value/mean": float(masked_mean(experience.old_values, mask)),
        "value/return_mean": float(masked_mean(experience.returns, mask)),
    }
