"""Step 3: PPO against a reward, with a KL penalty token by token and PPO-ptx (Ouyang et al. 2022, equation 2).

    maximise  E[r(x, y) - beta log(pi(y|x) / pi_SFT(y|x))]  +  ptx_coef E_corpus[log pi(x)]

Four models take part. The policy answers and learns; the value network, which starts as a copy of the reward model,
predicts the return at every token; the reference is the SFT model, frozen; the reward is any callable
(prompts, responses) -> scores: a reward model, or a plain Python function.

A step, in the order it happens:
    1  sample answers and keep their log-probs             `sample`
    2  score them, charge the KL, estimate advantages      `_experience`
    3  a few epochs of clipped updates on minibatches      `_update`
    4  steer beta, average the weights, log

References: Schulman et al. 2017 (PPO), Ziegler et al. 2019 (adaptive KL), Ouyang et al. 2022 (InstructGPT), and "The N
implementation details of RLHF with PPO". Left out: rollouts on other machines, and value-network offloading.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from minirlhf.errors import TrainingError, UserError, check_ranges
from minirlhf.kl import AdaptiveKLController, FixedKLController, kl_rewards
from minirlhf.language.generation import Samples, sample
from minirlhf.language.models import clone, response_logprobs, response_logprobs_and_entropy, token_values
from minirlhf.language.pretraining import language_model_loss
from minirlhf.language.reward_model import RewardFunction, scores_tensor
from minirlhf.language.tokenization import decode, encode_prompts
from minirlhf.losses import ppo_loss
from minirlhf.returns import explained_variance, gae, masked_mean, whiten
from minirlhf.training import Recorder, adamw, epoch_batch, generator_for, micro_batches, set_learning_rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WORST = ("policy/ratio_max", "policy/ratio_error")  # logged as the largest of a step; all else as the mean

Monitor = Callable[[Sequence[str], Sequence[str], Sequence[bool]], dict[str, float]]
"""Called with prompts, responses and whether each ended; what it returns is logged and never trained on."""


@dataclass
class RLHFConfig:
    """PPO with a KL penalty."""

    steps: int = 70
    """PPO steps; each samples one batch."""
    batch_size: int = 128
    """Answers sampled a step."""
    epochs: int = 1
    """Passes over each batch (as InstructGPT: fresh answers teach more than a second look)."""
    minibatches: int = 2
    """Optimizer steps a pass."""
    lr: float = 4e-4
    """Peak learning rate of the policy (linear, to a tenth)."""
    value_lr: float = 1e-3
    """Peak learning rate of the value network (linear, to a tenth)."""
    warmup: int = 5
    """Steps of linear warm-up, so that the value network is useful before the policy moves."""
    beta: float = 0.05
    """KL coefficient (InstructGPT: 0.02)."""
    target_kl: float | None = None
    """Steer beta so that an answer's KL stays near so many nats; None keeps beta fixed."""
    kl_horizon: float = 10_000.0
    """Episodes over which beta is steered."""
    clip_range: float = 0.2
    """Probability ratios are clipped to 1 ± this."""
    value_clip_range: float | None = 0.2
    """Values are clipped to the old ones ± this; None for no clip."""
    gamma: float = 1.0
    """Discount (InstructGPT: none)."""
    lam: float = 0.95
    """GAE's lambda."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    whiten_advantages: bool = True
    """Bring each batch's advantages to mean 0 and variance 1."""
    temperature: float = 1.0
    """Of sampling; log-probs are those of the same distribution."""
    max_response_tokens: int = 40
    """Answers are cut after so many tokens."""
    missing_eos_penalty: float = 1.0
    """Taken off the score of an answer that did not end."""
    ptx_coef: float = 0.0
    """Weight of the pretraining loss in the policy's gradient (InstructGPT: 27.8); 0 for plain PPO."""
    ptx_batch_size: int = 8
    """Corpus blocks mixed into each optimizer step."""
    ema_decay: float | None = None
    """Return a moving average of the policy's weights (InstructGPT: 0.992); None for the last weights."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm, policy and value apart."""
    adam_eps: float = 1e-5
    """Adam's epsilon."""
    micro_batch_tokens: int = 4096
    """Padded tokens a forward pass: memory and speed, not mathematics."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "rlhf",
            counts=(
                "steps",
                "batch_size",
                "epochs",
                "minibatches",
                "max_response_tokens",
                "ptx_batch_size",
                "micro_batch_tokens",
            ),
            positive=("target_kl", "kl_horizon", "clip_range", "value_clip_range", "temperature", "max_grad_norm"),
            not_negative=("lr", "value_lr", "beta", "entropy_coef", "missing_eos_penalty", "ptx_coef", "adam_eps"),
            fractions=("gamma", "lam", "ema_decay"),
        )
        check_ranges(self, "rlhf", counts=("warmup",), least=0)
        if self.batch_size % self.minibatches:
            raise UserError(
                f"--rlhf.batch-size {self.batch_size}: must be a multiple of --rlhf.minibatches {self.minibatches}"
            )


class Experience(NamedTuple):
    """One batch of answers with all that the update needs; each [B, T] but `scores`."""

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
) -> PreTrainedModel:
    """Train a policy by PPO, in place.

    Args:
        policy: starts as the SFT model.
        value_model: a scalar model; starts as the reward model.
        reference: the SFT model, never changed.
        reward: (prompts, responses) -> one score a response. It sees answers cut after their end.
        tokenizer: of policy and value model.
        prompts: to answer.
        config: the hyper-parameters.
        corpus_blocks: [N, L] int64 pretraining text for PPO-ptx; needed when config.ptx_coef > 0.
        seed: of prompts, samples and minibatches.
        recorder: where progress and metrics go.
        monitor: extra measurements of the sampled answers.

    Returns:
        The policy (or, with ema_decay, its moving average), in eval mode.

    Raises:
        UserError: ptx_coef > 0 without corpus_blocks, or the reward returned anything but one number a response.
        TrainingError: a loss or a score became NaN or infinite.

    Example:
        >>> reward = lambda prompts, responses: [-abs(len(r.split()) - 5) for r in responses]
        >>> train_rlhf(sft, values, reference, reward, tokenizer, prompts, RLHFConfig())  # doctest: +SKIP
    """
    if config.ptx_coef > 0 and corpus_blocks is None:
        raise UserError("ptx_coef > 0 mixes in pretraining text: give corpus_blocks")
    recorder = recorder or Recorder("rlhf", show=("objective/score", "objective/kl"))
    encoded = encode_prompts(tokenizer, prompts)
    policy_optimizer = adamw(policy, config.lr, betas=(0.9, 0.95), eps=config.adam_eps)
    value_optimizer = adamw(value_model, config.value_lr, betas=(0.9, 0.95), eps=config.adam_eps)
    if config.target_kl is None:
        controller = FixedKLController(config.beta)
    else:
        controller = AdaptiveKLController(config.beta, target=config.target_kl, horizon=config.kl_horizon)
    average = clone(policy).eval() if config.ema_decay is not None else None
    models = {"policy": policy, "value": value_model} | ({"average": average} if average is not None else {})
    recorder.track(models, {"policy": policy_optimizer, "value": value_optimizer}, {"kl": controller})
    for model in (policy, value_model, reference):
        model.eval()  # dropout would make the first ratio differ from 1

    for step in recorder.steps(config.steps):
        began = time.monotonic()
        factor = _factor(step, config)
        set_learning_rate(policy_optimizer, config.lr * factor)
        set_learning_rate(value_optimizer, config.value_lr * factor)

        rows = epoch_batch(len(prompts), config.batch_size, step, seed, "rlhf/prompts")
        samples = sample(
            policy,
            [encoded[row] for row in rows],
            max_new_tokens=config.max_response_tokens,
            pad_id=tokenizer.pad_token_id,
            eos_id=tokenizer.eos_token_id,
            generator=generator_for(seed, "rlhf/sample", step, device=policy.device),
            temperature=config.temperature,
        )
        texts = [prompts[row] for row in rows]
        responses = decode(tokenizer, samples.responses())
        scores = _scores(reward, texts, responses, samples.ended, config, recorder, step)
        experience = _experience(samples, scores, value_model, reference, controller.beta, config)
        sampled = time.monotonic()

        metrics = _update(
            policy,
            value_model,
            experience,
            policy_optimizer,
            value_optimizer,
            config,
            corpus_blocks,
            seed,
            recorder,
            step,
        )
        if average is not None and config.ema_decay is not None:
            _average(average, policy, config.ema_decay)
        measured = _measure(experience, controller.beta, config)
        controller.update(kl=measured["objective/kl"], episodes=config.batch_size)
        if monitor is not None:
            measured |= monitor(texts, responses, samples.ended.tolist())
        now = time.monotonic()
        recorder.log(
            measured
            | metrics
            | {
                "policy/lr": config.lr * factor,
                "value/lr": config.value_lr * factor,
                "perf/seconds": now - began,
                "perf/seconds_sampling": sampled - began,
                "perf/response_tokens_per_second": float(samples.response_mask.sum()) / (now - began),
                "perf/episodes_per_second": config.batch_size / (now - began),
            }
        )
    return (average if average is not None else policy).eval()


def _factor(step: int, config: RLHFConfig) -> float:
    """Warm-up, then a line down to a tenth of the peak."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    return 1.0 - 0.9 * (step - config.warmup) / max(1, config.steps - config.warmup)


def _scores(
    reward: RewardFunction,
    prompts: list[str],
    responses: list[str],
    ended: Tensor,
    config: RLHFConfig,
    recorder: Recorder,
    step: int,
) -> Tensor:
    scores = scores_tensor(reward(prompts, responses), len(prompts))
    bad = (~scores.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise TrainingError(
            f"{recorder.name}: the reward returned {float(scores[bad[0]])} at step {step} for the prompt "
            f"{prompts[bad[0]]!r} and the response {responses[bad[0]]!r}; it must return finite numbers"
        )
    return (scores - config.missing_eos_penalty * (~ended.cpu()).float()).to(ended.device)


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
    shape = samples.response_mask.shape
    ref_logprobs = torch.zeros(shape, device=scores.device)
    values = torch.zeros(shape, device=scores.device)
    for index in _groups(samples, torch.arange(len(scores)), config):
        part = samples.rows(index)
        width = part.response_mask.shape[1]
        ref_logprobs[index, :width] = response_logprobs(
            reference, part.tokens, part.mask, part.response_mask, config.temperature
        )
        values[index, :width] = _response_values(value_model, part)
    rewards = kl_rewards(scores, samples.logprobs, ref_logprobs, samples.response_mask, beta)
    last = torch.zeros_like(samples.response_mask).scatter(1, samples.lengths[:, None] - 1, True)
    advantages, returns = gae(
        rewards, values, last, gamma=config.gamma, lam=config.lam, mask=samples.response_mask
    )  # returns are made of the raw advantages, not of the whitened ones
    if config.whiten_advantages:
        advantages = whiten(advantages, samples.response_mask)
    return Experience(samples, scores, ref_logprobs, values, advantages, returns)


def _response_values(value_model: PreTrainedModel, samples: Samples) -> Tensor:
    """V before each response token: [b, T]. The value of column t has seen the tokens before t, as the policy had."""
    tokens, mask, length = samples.tokens[:, :-1], samples.mask[:, :-1], samples.response_mask.shape[1]
    before = torch.zeros_like(mask)
    before[:, -length:] = samples.response_mask
    return token_values(value_model, tokens, mask, before)[:, -length:]


def _groups(samples: Samples, index: Tensor, config: RLHFConfig) -> list[Tensor]:
    """Micro-batches of rows of like length, so that little of a forward pass is padding."""
    lengths = samples.mask.sum(dim=1)[index].tolist()
    return [index[group] for group in micro_batches(lengths, config.micro_batch_tokens)]


def _update(
    policy: PreTrainedModel,
    value_model: PreTrainedModel,
    experience: Experience,
    policy_optimizer: torch.optim.Optimizer,
    value_optimizer: torch.optim.Optimizer,
    config: RLHFConfig,
    corpus_blocks: Tensor | None,
    seed: int,
    recorder: Recorder,
    step: int,
) -> dict[str, float]:
    """A few epochs of minibatches. Every loss is divided by the token count of its whole minibatch."""
    sums: dict[str, float] = {}
    first: dict[str, float] = {}
    updates = config.epochs * config.minibatches
    for update in range(updates):
        epoch, place = divmod(update, config.minibatches)
        order = torch.randperm(config.batch_size, generator=generator_for(seed, "rlhf/minibatch", step, epoch))
        index = order.chunk(config.minibatches)[place]
        counted = float(experience.samples.response_mask[index].sum())
        policy_optimizer.zero_grad()
        value_optimizer.zero_grad()
        totals: dict[str, float] = {"policy/ratio_error": 0.0}
        for group in _groups(experience.samples, index, config):
            part = experience.rows(group)
            samples = part.samples
            logprobs, entropy = response_logprobs_and_entropy(
                policy, samples.tokens, samples.mask, samples.response_mask, config.temperature
            )
            loss, metrics = ppo_loss(
                logprobs,
                samples.logprobs,
                part.advantages,
                samples.response_mask,
                values=_response_values(value_model, samples),
                old_values=part.old_values,
                returns=part.returns,
                entropy=entropy,
                clip_range=config.clip_range,
                value_clip_range=config.value_clip_range,
                value_coef=1.0,  # the two networks share nothing, so the value's weight is its learning rate
                entropy_coef=config.entropy_coef,
                denominator=counted,
            )
            recorder.check_finite(
                loss, f"rows {group[:4].tolist()}... of the batch", "lower --rlhf.lr or raise --rlhf.beta"
            )
            loss.backward()
            error = ((logprobs.detach() - samples.logprobs).exp() - 1).abs()
            totals["policy/ratio_error"] = max(totals["policy/ratio_error"], float(error.max()))
            for key, metric in metrics.items():
                old = totals.get(key, 0.0)
                totals[key] = max(old, float(metric)) if key == "policy/ratio_max" else old + float(metric)
        if config.ptx_coef > 0 and corpus_blocks is not None:
            # PPO-ptx: the pretraining gradient is added to PPO's before the one optimizer step.
            rows = epoch_batch(len(corpus_blocks), config.ptx_batch_size, step * updates + update, seed, "rlhf/ptx")
            ptx_loss = language_model_loss(policy, corpus_blocks[rows].to(policy.device))
            recorder.check_finite(ptx_loss, f"corpus blocks {rows[:4]}...", "lower --rlhf.ptx-coef")
            (config.ptx_coef * ptx_loss).backward()
            totals["policy/ptx_loss"] = float(ptx_loss.detach())
        totals["policy/grad_norm"] = float(torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm))
        totals["value/grad_norm"] = float(
            torch.nn.utils.clip_grad_norm_(value_model.parameters(), config.max_grad_norm)
        )
        policy_optimizer.step()
        value_optimizer.step()
        if update == 0:
            # Nothing has moved yet: the ratio is 1 and nothing is clipped, or a log-prob is wrong somewhere.
            names = ("policy/ratio_error", "policy/approx_kl", "policy/clip_fraction")
            first = {key.replace("policy/", "policy/first_"): totals[key] for key in names}
        for key, total in totals.items():
            old = sums.get(key, 0.0)
            sums[key] = max(old, total) if key in WORST else old + total / updates
    return sums | first


@torch.no_grad()
def _average(average: PreTrainedModel, policy: PreTrainedModel, decay: float) -> None:
    for own, weight in zip(average.parameters(), policy.parameters(), strict=True):
        own.lerp_(weight, 1 - decay)


def _measure(experience: Experience, beta: float, config: RLHFConfig) -> dict[str, float]:
    samples = experience.samples
    kl = (samples.logprobs - experience.ref_logprobs).sum(dim=1)  # both are 0 where the mask is False
    return {
        "objective/score": float(experience.scores.mean()),
        "objective/score_std": float(experience.scores.std(unbiased=False)),
        "objective/kl": float(kl.mean()),
        "objective/beta": beta,
        "objective/rlhf_reward": float((experience.scores - beta * kl).mean()),
        "objective/entropy": float(-samples.logprobs.sum(dim=1).mean()),
        "objective/response_length": float(samples.lengths.float().mean()),
        "objective/ended_fraction": float(samples.ended.float().mean()),
        "value/explained_variance": float(
            explained_variance(experience.old_values, experience.returns, samples.response_mask)
        ),
        "value/mean": float(masked_mean(experience.old_values, samples.response_mask)),
        "value/return_mean": float(masked_mean(experience.returns, samples.response_mask)),
    }
