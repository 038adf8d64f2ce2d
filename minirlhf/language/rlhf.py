"""Step 3: PPO against a reward, with a KL penalty per token and PPO-ptx (Ouyang et al. 2022, equation 2).

    maximise  E[r(x, y) - beta log(pi(y|x) / pi_SFT(y|x))]  +  ptx_coef E_corpus[log pi(x)]

Four models take part. The policy answers and learns; the value network, which starts as a copy of the reward model,
predicts the return at every token; the reference is the SFT model, frozen; the reward is any callable
(prompts, responses) -> scores: a reward model, or a plain Python function.

One step, in order:
    1  sample answers and keep their log-probs             `sample_by_rank`
    2  score them, penalize the KL, estimate advantages    `_experience`
    3  a few epochs of clipped updates on minibatches      `_update`
    4  adapt beta, average the weights, log

References: Schulman et al. 2017 (PPO), Ziegler et al. 2019 (adaptive KL), Ouyang et al. 2022 (InstructGPT), and "The N
implementation details of RLHF with PPO". Left out: value-network offloading.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from minirlhf import parallel
from minirlhf.errors import TrainingError, UserError
from minirlhf.kl import AdaptiveKLController, FixedKLController, kl_rewards
from minirlhf.language.forward import compute_dtype
from minirlhf.language.generation import Samples, end_ids, sample_by_rank
from minirlhf.language.models import response_logprobs, share, token_values
from minirlhf.language.pretraining import language_model_loss
from minirlhf.language.reward_model import RewardFunction, RewardModelScorer, scores_tensor
from minirlhf.language.samplers import Sampler, sample_elsewhere
from minirlhf.language.tokenization import decode, encode_prompts
from minirlhf.losses import ppo_loss
from minirlhf.returns import explained_variance, gae, masked_mean, whiten
from minirlhf.settings import (
    Count,
    CountOrZero,
    Fraction,
    NotNegative,
    Positive,
    PositiveOrInf,
    PPOSettings,
    Temperature,
)
from minirlhf.training import (
    Recorder,
    adamw,
    epoch_batch,
    generator_for,
    learning_rate_factor,
    micro_batches,
    set_learning_rate,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Monitor = Callable[[Sequence[str], Sequence[str], Sequence[bool]], dict[str, float]]
"""Called with prompts, responses and whether each ended; what it returns is logged and never trained on."""


@dataclass(frozen=True, kw_only=True)
class RLHFConfig(PPOSettings, option="rlhf"):
    """PPO with a KL penalty."""

    steps: Count = 100
    """PPO steps; each samples one batch."""
    batch_size: Count = 128
    """Answers sampled per step."""
    epochs: Count = 1
    """Passes over each batch (as InstructGPT: fresh answers teach more than a second look)."""
    minibatch_size: Count = 64
    """Maximum number of answers per optimizer step; an epoch is split into equal parts."""
    lr: NotNegative = 4e-4
    """Peak learning rate of the policy (linear decay to a tenth)."""
    value_lr: NotNegative = 1e-3
    """Peak learning rate of the value network (linear decay to a tenth)."""
    warmup: CountOrZero = 5
    """Steps of linear warm-up, so that the value network is useful before the policy moves."""
    beta: NotNegative = 0.08
    """KL coefficient (InstructGPT: 0.02)."""
    target_kl: Positive | None = None
    """Adapt beta to keep the KL near this many nats per answer; None keeps beta fixed."""
    kl_horizon: Positive = 10_000.0
    """Episodes over which beta adapts; more is slower."""
    value_clip_range: Positive | None = 0.2
    """Values are clipped to within this distance of the old ones; None for no clipping."""
    gamma: Fraction = 1.0
    """Discount (InstructGPT: none)."""
    temperature: Temperature = 1.0
    """Sampling temperature; log-probs are of the same tempered distribution."""
    max_response_tokens: Count = 40
    """Maximum tokens per answer."""
    missing_eos_penalty: NotNegative = 1.0
    """Subtracted from the score of an answer that did not end with EOS."""
    ptx_coef: NotNegative = 0.0
    """Weight of the pretraining loss in the policy's gradient (InstructGPT: 27.8); 0 for plain PPO."""
    ptx_batch_size: Count = 8
    """Corpus blocks mixed into each optimizer step."""
    ema_decay: Fraction | None = None
    """Return a moving average of the policy's weights (InstructGPT: 0.992); None for the last weights."""
    max_grad_norm: PositiveOrInf = 1.0
    """Gradients are clipped to this norm, policy and value separately; inf for no clipping."""
    micro_batch_tokens: Count = 4096
    """Padded tokens per forward pass; affects memory and speed, not results."""


@dataclass
class Learners:
    """The two models that are trained, each with its optimizer."""

    policy: PreTrainedModel
    value_model: PreTrainedModel
    policy_optimizer: torch.optim.Optimizer
    value_optimizer: torch.optim.Optimizer

    def zero_grad(self) -> None:
        self.policy_optimizer.zero_grad()
        self.value_optimizer.zero_grad()

    def step(self, max_grad_norm: float) -> dict[str, float]:
        """Clip the two gradients separately and take a step; returns the norms before clipping."""
        norms = {
            "policy/grad_norm": float(parallel.clip_grad_norm_(self.policy.parameters(), max_grad_norm)),
            "value/grad_norm": float(parallel.clip_grad_norm_(self.value_model.parameters(), max_grad_norm)),
        }
        self.policy_optimizer.step()
        self.value_optimizer.step()
        return norms


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
    if config.ptx_coef > 0 and corpus_blocks is None:
        raise UserError("ptx_coef > 0 needs pretraining text: give corpus_blocks")
    if importance_cap is not None and sampler is None:
        raise UserError("importance_cap weights what another sampler does differently: give sampler too")
    if sampler is not None and parallel.size() > 1:
        raise UserError("a sampler of your own is for one process: the processes would each ask it for all answers")
    judge = {"reward model": reward.model} if isinstance(reward, RewardModelScorer) else {}
    check_learners({"policy": policy, "value model": value_model}, {"reference": reference, **judge})
    recorder = recorder or Recorder("rlhf", show=("objective/score", "objective/kl"))
    encoded = encode_prompts(tokenizer, prompts)
    average = share(policy).eval() if config.ema_decay is not None else None
    parallel.shard(policy, value_model, reference, *([average] if average is not None else []))
    learners = Learners(
        policy,
        value_model,
        adamw(policy, config.lr, eps=config.adam_eps),
        adamw(value_model, config.value_lr, eps=config.adam_eps),
    )
    controller = FixedKLController(config.beta)
    if config.target_kl is not None:
        controller = AdaptiveKLController(config.beta, target=config.target_kl, horizon=config.kl_horizon)
    models = {"policy": policy, "value": value_model} | ({"average": average} if average is not None else {})
    optimizers = {"policy": learners.policy_optimizer, "value": learners.value_optimizer}
    recorder.track(models, optimizers, {"kl": controller})
    for model in (policy, value_model, reference):
        model.eval()  # dropout would make the first ratio differ from 1

    for step in recorder.steps(config.steps):
        began = time.monotonic()
        factor = learning_rate_factor(step, config.steps, config.warmup, shape="linear")
        set_learning_rate(learners.policy_optimizer, config.lr * factor)
        set_learning_rate(learners.value_optimizer, config.value_lr * factor)

        rows = epoch_batch(len(prompts), config.batch_size, step, seed, "rlhf/prompts")
        asked = [encoded[row] for row in rows]
        weights, mismatch = None, dict[str, float]()
        if sampler is None:
            samples = sample_by_rank(
                policy,
                asked,
                max_new_tokens=config.max_response_tokens,
                pad_id=tokenizer.pad_token_id,
                eos_id=end_ids(policy, tokenizer),
                generator=[generator_for(seed, "rlhf/sample", step, place) for place in range(len(rows))],
                temperature=config.temperature,
            )
        else:
            limits = {"max_new_tokens": config.max_response_tokens, "micro_batch_tokens": config.micro_batch_tokens}
            samples, weights, mismatch = sample_elsewhere(
                sampler, asked, policy, temperature=config.temperature, importance_cap=importance_cap, **limits
            )
        texts = [prompts[row] for row in rows]
        responses = decode(tokenizer, samples.responses())
        scores = _scores(reward, texts, responses, f"{recorder.name}: step {step}")
        scores = (scores - config.missing_eos_penalty * (~samples.ended.cpu()).float()).to(policy.device)
        experience = _experience(samples, scores, value_model, reference, controller.beta, config)
        if weights is not None:  # min(r A, clip(r) A) times w >= 0 is that of w A; the value's loss has no weight
            experience = experience._replace(advantages=experience.advantages * weights)
        sampled = time.monotonic()

        updates = _updates(config, seed, step, corpus_blocks)
        metrics = _update(learners, experience, updates, config, recorder)
        if average is not None and config.ema_decay is not None:
            _average(average, policy, config.ema_decay)
        measured = _measure(experience, controller.beta)
        controller.update(kl=measured["objective/kl"], episodes=config.batch_size)
        if monitor is not None and parallel.rank() == 0:
            measured |= monitor(texts, responses, samples.ended.tolist())
        now = time.monotonic()
        recorder.log(
            measured
            | metrics
            | mismatch
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


def check_learners(learners: dict[str, PreTrainedModel], others: dict[str, PreTrainedModel]) -> None:
    """Check that each learner has trainable weights and shares none of them with another model.

    Raises:
        UserError: names the models and the tensor.
    """
    for name, learner in learners.items():
        trained = {p.data_ptr(): key for key, p in learner.named_parameters() if p.requires_grad}
        if not trained:
            raise UserError(f"no tensor of the {name} can be trained; call requires_grad_(True) on it")
        for other, model in (learners | others).items():
            shared = [trained[p.data_ptr()] for p in model.parameters() if p.data_ptr() in trained]
            if shared and other != name:
                raise UserError(
                    f"the {name} and the {other} share {shared[0]}, which is trained: one would change with the "
                    "other; give a clone(model) as one of them, made before any adapter is added"
                )


def _scores(reward: RewardFunction, prompts: list[str], responses: list[str], where: str) -> Tensor:
    """The reward of each answer: [B] float32 on the CPU, all finite.

    Each process scores its share: a reward model's forward takes as long as that of the other models.
    """
    scores, mine = torch.zeros(len(prompts)), parallel.my_rows(list(range(len(prompts))))
    if mine:
        own = reward([prompts[i] for i in mine], [responses[i] for i in mine])
        scores[mine] = scores_tensor(own, len(mine))
    for i in (~scores.isfinite()).nonzero().flatten().tolist():
        raise TrainingError(
            f"{where}: the reward returned {float(scores[i])} for the prompt {prompts[i]!r} and the response "
            f"{responses[i]!r}; it must return finite numbers"
        )
    return parallel.sum_over_ranks(scores)


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
    everything = torch.arange(len(scores))
    for index, weight in parallel.even(_groups(samples, parallel.my_rows(everything), config), everything[:1]):
        part = samples.rows(index)
        width = part.response_mask.shape[1]
        ref_logprobs[index, :width] += weight * response_logprobs(
            reference, part.tokens, part.mask, part.response_mask, config.temperature
        )
        values[index, :width] += weight * _response_values(value_model, part)
    ref_logprobs, values = parallel.sum_over_ranks(ref_logprobs), parallel.sum_over_ranks(values)
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


def _groups(samples: Samples, index: Tensor, config: RLHFConfig) -> list[Tensor]:
    """Micro-batches of rows of similar length, so that little of a forward pass is padding."""
    lengths = samples.mask.sum(dim=1)[index].tolist()
    return [index[group] for group in micro_batches(lengths, config.micro_batch_tokens)]


def _updates(
    config: RLHFConfig, seed: int, step: int, corpus_blocks: Tensor | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The optimizer steps of a PPO step, a few epochs of minibatches: the rows of each and its text for PPO-ptx."""
    per_epoch = math.ceil(config.batch_size / config.minibatch_size)
    first = step * config.epochs * per_epoch  # optimizer steps before this PPO step
    for epoch in range(config.epochs):
        order = torch.randperm(config.batch_size, generator=generator_for(seed, "rlhf/minibatch", step, epoch))
        for place, rows in enumerate(order.tensor_split(per_epoch)):
            blocks = None
            if config.ptx_coef > 0 and corpus_blocks is not None:
                number = first + epoch * per_epoch + place
                chosen = epoch_batch(len(corpus_blocks), config.ptx_batch_size, number, seed, "rlhf/ptx")
                blocks = corpus_blocks[chosen]
            yield rows, blocks


def _update(
    learners: Learners,
    experience: Experience,
    updates: Iterable[tuple[Tensor, Tensor | None]],
    config: RLHFConfig,
    recorder: Recorder,
) -> dict[str, float]:
    """Clipped updates on minibatches. Every loss is divided by the number of response tokens in its minibatch."""
    rows: list[dict[str, float]] = []
    for index, blocks in updates:
        learners.zero_grad()
        counted = float(experience.samples.response_mask[index].sum())
        parts = []
        groups = _groups(experience.samples, parallel.my_rows(index), config)
        for group, weight in parallel.even(groups, index[:1]):
            loss, metrics = _loss(learners, experience.rows(group), config, counted)
            recorder.check_finite(
                loss, f"rows {group[:4].tolist()}... of the batch", "lower --rlhf.lr or raise --rlhf.beta"
            )
            (weight * loss).backward()
            parts.append({key: weight * float(value) for key, value in metrics.items()})
        row = _together(parallel.gather(parts))
        if not rows:
            _check_first_ratio(row, learners.policy, recorder.name)
        if blocks is not None:
            # PPO-ptx: the pretraining gradient is added to PPO's before the one optimizer step.
            row["policy/ptx_loss"] = _add_pretraining_gradient(learners.policy, blocks, config.ptx_coef, recorder)
        rows.append(row | learners.step(config.max_grad_norm))
    # No weight has changed before the first: unless the ratio is 1 and nothing is clipped, a log-prob is wrong.
    names = ("ratio_error", "approx_kl", "clip_fraction")
    return _together(rows, len(rows)) | {f"policy/first_{name}": rows[0][f"policy/{name}"] for name in names}


def _add_pretraining_gradient(policy: PreTrainedModel, blocks: Tensor, coef: float, recorder: Recorder) -> float:
    """Add ``coef`` times the gradient of the loss of some blocks [B, T] to the policy's; returns the loss."""
    loss, mine = torch.zeros(()), parallel.my_rows(blocks)
    for part, weight in parallel.even([mine] if len(mine) else [], blocks[:1]):
        part_loss = weight * language_model_loss(policy, part.to(policy.device), len(blocks))
        recorder.check_finite(part_loss, "corpus blocks of PPO-ptx", "lower --rlhf.ptx-coef")
        (coef * part_loss).backward()
        loss += part_loss.detach().cpu()
    return float(parallel.sum_over_ranks(loss))


def _check_first_ratio(row: dict[str, float], policy: PreTrainedModel, where: str) -> None:
    """Check that, before a step's first update, training gives each token the probability it was sampled with.

    Raises:
        TrainingError: it does not, so PPO's updates would be wrong.
    """
    dtype = compute_dtype(policy)
    rounds = dtype in (torch.bfloat16, torch.float16)
    what, limit = ("mean", 5e-2) if rounds else ("largest", 1e-3)
    error = row["policy/mean_ratio_error" if rounds else "policy/ratio_error"]
    if error > limit:
        raise TrainingError(
            f"{where}: before the first update the ratio of the probabilities in training and in sampling must be 1, "
            f"but its {what} error is {error:.2g} (at most {limit} in {dtype}); check what the policy's "
            "forward does differently with a cache, or in a padded batch. No weight has changed in this step."
        )


def _loss(learners: Learners, part: Experience, config: RLHFConfig, counted: float) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's loss on a few rows, divided by the token count of the whole minibatch; and its metrics."""
    samples = part.samples
    logprobs, entropy = response_logprobs(
        learners.policy, samples.tokens, samples.mask, samples.response_mask, config.temperature, return_entropy=True
    )
    loss, metrics = ppo_loss(
        logprobs,
        samples.logprobs,
        part.advantages,
        samples.response_mask,
        values=_response_values(learners.value_model, samples),
        old_values=part.old_values,
        returns=part.returns,
        entropy=entropy if config.entropy_coef > 0 else entropy.detach(),  # so its graph is freed at once
        clip_range=config.clip_range or math.inf,
        value_clip_range=config.value_clip_range,
        value_coef=1.0,  # the two networks share nothing, so the value's weight is its learning rate
        entropy_coef=config.entropy_coef,
        denominator=counted,
    )
    error = (logprobs.detach() - samples.logprobs).expm1().abs()  # 0 where the mask is False
    return loss, metrics | {"policy/ratio_error": error.max(), "policy/mean_ratio_error": error.sum() / counted}


def _together(rows: list[dict[str, float]], divisor: int = 1) -> dict[str, float]:
    """The sum of each metric divided by `divisor`; the maximum for the ratio's maxima."""
    worst = ("policy/ratio_max", "policy/ratio_error")
    return {
        key: max(row[key] for row in rows) if key in worst else sum(row[key] for row in rows) / divisor
        for key in rows[0]
    }


@torch.no_grad()
def _average(average: PreTrainedModel, policy: PreTrainedModel, decay: float) -> None:
    for own, weight in zip(average.parameters(), policy.parameters(), strict=True):
        if own.requires_grad:
            own.lerp_(weight, 1 - decay)


def _measure(experience: Experience, beta: float) -> dict[str, float]:
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
