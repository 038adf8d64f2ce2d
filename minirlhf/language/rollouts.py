"""What PPO (`rlhf`) and GRPO (`grpo`) share: answers with their scores, and optimizer steps on minibatches of them.

Every batch is sampled fresh from the policy. All randomness is a function of (seed, step, place in the batch), and
every loss is divided by counts of the whole minibatch, so neither micro-batches nor processes change the result.
"""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from minirlhf import parallel
from minirlhf.errors import TrainingError, UserError
from minirlhf.language.forward import compute_dtype
from minirlhf.language.generation import Samples, end_ids, sample_by_rank
from minirlhf.language.models import response_logprobs, share
from minirlhf.language.pretraining import language_model_loss
from minirlhf.language.reward_model import RewardFunction, RewardModelScorer, scores_tensor
from minirlhf.language.samplers import Sampler, sample_elsewhere
from minirlhf.language.tokenization import decode, encode_prompts, in_chunks
from minirlhf.settings import Count, CountOrZero, Fraction, NotNegative, Positive, PositiveOrInf, Settings, Temperature
from minirlhf.training import (
    Metrics,
    Recorder,
    Stateful,
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
Loss = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""The loss of some rows of the batch, given these and all rows of their minibatch, and its metrics."""


@dataclass(frozen=True, kw_only=True)
class RolloutSettings(Settings):
    """The settings of a learner that samples its answers."""

    steps: Count = 100
    """Training steps; each samples one batch."""
    batch_size: Count = 128
    """Answers sampled per step."""
    epochs: Count = 1
    """Passes over each batch (as InstructGPT: fresh answers teach more than a second look)."""
    minibatch_size: Count = 64
    """Maximum number of answers per optimizer step; an epoch is split into equal parts."""
    lr: NotNegative = 4e-4
    """Peak learning rate of the policy (linear decay to a tenth)."""
    warmup: CountOrZero = 5
    """Steps of linear warm-up."""
    beta: NotNegative = 0.08
    """KL coefficient (InstructGPT: 0.02)."""
    clip_range: Positive | None = 0.2
    """Ratios are clipped to 1 ± this; None disables clipping."""
    entropy_coef: NotNegative = 0.0
    """Weight of the entropy bonus."""
    temperature: Temperature = 1.0
    """Sampling temperature; log-probs are of the same tempered distribution."""
    max_response_tokens: Count = 40
    """Maximum tokens per answer."""
    missing_eos_penalty: NotNegative = 1.0
    """Subtracted from the score of an answer that did not end with EOS."""
    ptx_coef: NotNegative = 0.0
    """Weight of the pretraining loss in the policy's gradient (InstructGPT: 27.8); 0 for none."""
    ptx_batch_size: Count = 8
    """Corpus blocks mixed into each optimizer step."""
    ema_decay: Fraction | None = None
    """Return a moving average of the policy's weights (InstructGPT: 0.992); None for the last weights."""
    max_grad_norm: PositiveOrInf = 1.0
    """Gradients are clipped to this norm, each model's separately; inf for no clipping."""
    adam_eps: Positive = 1e-5
    """Adam's epsilon."""
    micro_batch_tokens: Count = 4096
    """Padded tokens per forward pass; affects memory and speed, not results."""
    cache_tokens: Count | None = None
    """Tokens in the KV cache of sampling, prompts and full-length answers; None answers a whole batch at once."""


class Rollout(NamedTuple):
    """The answers of one step."""

    prompts: list[str]
    responses: list[str]
    samples: Samples
    scores: Tensor
    """[B], penalties included."""
    weights: Tensor | None
    """[B, T] importance weights of another sampler's tokens."""
    mismatch: Metrics
    """How far another sampler is off."""

    def monitored(self, monitor: Monitor | None) -> Metrics:
        """What the monitor measures; it is called by rank 0 alone."""
        if monitor is None or parallel.rank() > 0:
            return {}
        return monitor(self.prompts, self.responses, self.samples.ended.tolist())


@dataclass
class Rollouts:
    """Samples and scores the answers of each step; see `train_rlhf` for what the parts are.

    Raises:
        UserError: settings and parts do not fit together.
    """

    policy: PreTrainedModel
    reward: RewardFunction
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[str]
    config: RolloutSettings
    seed: int
    corpus_blocks: Tensor | None = None
    sampler: Sampler | None = None
    importance_cap: float | None = None
    answers_per_prompt: int = 1
    """They stand next to each other in the batch."""
    encoded: list[array[int]] = field(init=False)

    def __post_init__(self) -> None:
        if self.config.ptx_coef > 0 and self.corpus_blocks is None:
            raise UserError("ptx_coef > 0 needs pretraining text: give corpus_blocks")
        if self.importance_cap is not None and self.sampler is None:
            raise UserError("importance_cap weights what another sampler does differently: give sampler too")
        if self.sampler is not None and parallel.size() > 1:
            raise UserError("a sampler of your own is for one process: the processes would each ask it for all answers")
        self.encoded = list(in_chunks(encode_prompts, self.tokenizer, self.prompts))

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """The reward model, if there is one: nothing that is trained may share its weights."""
        return {"reward model": self.reward.model} if isinstance(self.reward, RewardModelScorer) else {}

    def sample(self, step: int) -> Rollout:
        """Let the policy answer the prompts of a step, and score the answers.

        Raises:
            UserError: the reward returned anything but one number per response, or the sampler anything but answers.
            TrainingError: a score is NaN or infinite.
        """
        config, name = self.config, self.config.option
        count = config.batch_size // self.answers_per_prompt
        rows = epoch_batch(len(self.prompts), count, step, self.seed, f"{name}/prompts")
        rows = [row for row in rows for _ in range(self.answers_per_prompt)]
        asked, texts = [list(self.encoded[row]) for row in rows], [self.prompts[row] for row in rows]
        weights, mismatch = None, Metrics()
        if self.sampler is None:
            samples = sample_by_rank(
                self.policy,
                asked,
                max_new_tokens=config.max_response_tokens,
                pad_id=self.tokenizer.pad_token_id,
                eos_id=end_ids(self.policy, self.tokenizer),
                generator=[generator_for(self.seed, f"{name}/sample", step, place) for place in range(len(rows))],
                temperature=config.temperature,
                cache_tokens=config.cache_tokens,
            )
        else:
            limits = {"max_new_tokens": config.max_response_tokens, "micro_batch_tokens": config.micro_batch_tokens}
            cap = self.importance_cap
            samples, weights, mismatch = sample_elsewhere(
                self.sampler, asked, self.policy, temperature=config.temperature, importance_cap=cap, **limits
            )
        responses = decode(self.tokenizer, samples.responses())
        scores = _scores(self.reward, texts, responses, f"{name}: step {step}")
        scores = scores - config.missing_eos_penalty * (~samples.ended.cpu()).float()
        return Rollout(texts, responses, samples, scores.to(self.policy.device), weights, mismatch)

    def minibatches(self, step: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The optimizer steps of a training step: the rows of each and its text for PPO-ptx."""
        config, name = self.config, self.config.option
        per_epoch = math.ceil(config.batch_size / config.minibatch_size)
        first = step * config.epochs * per_epoch  # optimizer steps before this training step
        for epoch in range(config.epochs):
            generator = generator_for(self.seed, f"{name}/minibatch", step, epoch)
            order = torch.randperm(config.batch_size, generator=generator)
            for place, rows in enumerate(order.tensor_split(per_epoch)):
                blocks = None
                if config.ptx_coef > 0 and self.corpus_blocks is not None:
                    number = first + epoch * per_epoch + place
                    chosen = epoch_batch(
                        len(self.corpus_blocks), config.ptx_batch_size, number, self.seed, f"{name}/ptx"
                    )
                    blocks = self.corpus_blocks[chosen]
                yield rows, blocks


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


def micro_batch_rows(samples: Samples, index: Tensor, max_tokens: int) -> list[Tensor]:
    """Micro-batches of rows of similar length, so that little of a forward pass is padding."""
    lengths = samples.mask.sum(dim=1)[index].tolist()
    return [index[group] for group in micro_batches(lengths, max_tokens)]


@torch.no_grad()
def over_tokens(compute: Callable[[Samples], Tensor], samples: Samples, max_tokens: int) -> Tensor:
    """What ``compute`` returns per response token [b, T], for all rows: [B, T]. Each process computes its share."""
    found = torch.zeros(samples.response_mask.shape, device=samples.tokens.device)
    everything = torch.arange(len(found))
    groups = micro_batch_rows(samples, parallel.my_rows(everything), max_tokens)
    for index, weight in parallel.even(groups, everything[:1]):
        part = samples.rows(index)
        found[index, : part.response_mask.shape[1]] += weight * compute(part)
    return parallel.sum_over_ranks(found)


def reference_logprobs(
    reference: PreTrainedModel, samples: Samples, max_tokens: int, temperature: float = 1.0
) -> Tensor:
    """The reference's log-prob of each response token: [B, T], at most `max_tokens` at a time."""

    def compute(part: Samples) -> Tensor:
        return response_logprobs(reference, part.tokens, part.mask, part.response_mask, temperature)

    return over_tokens(compute, samples, max_tokens)


@dataclass
class Learners:
    """The models that are trained, the policy first, each with its optimizer and its peak learning rate."""

    models: dict[str, PreTrainedModel]
    rates: dict[str, float]
    config: RolloutSettings
    optimizers: dict[str, torch.optim.Optimizer] = field(init=False)
    average: PreTrainedModel | None = field(init=False)
    """The moving average of the policy's weights."""

    def __post_init__(self) -> None:
        self.average = share(self.policy).eval() if self.config.ema_decay is not None else None

    @property
    def policy(self) -> PreTrainedModel:
        """The model that answers."""
        return self.models["policy"]

    @property
    def averages(self) -> dict[str, PreTrainedModel]:
        """The moving average by its name, if there is one."""
        return {} if self.average is None else {"average": self.average}

    def begin(self, recorder: Recorder, others: Sequence[PreTrainedModel], extras: dict[str, Stateful]) -> None:
        """Split all models over the processes where that was asked for, make the optimizers, and resume.

        Args:
            recorder: loads the state of a killed run.
            others: models that are not trained.
            extras: what else has a state to save.
        """
        parallel.shard(*self.models.values(), *others, *self.averages.values())
        eps = self.config.adam_eps
        self.optimizers = {name: adamw(model, self.rates[name], eps=eps) for name, model in self.models.items()}
        recorder.track(self.models | self.averages, self.optimizers, extras)
        for model in (*self.models.values(), *others):
            model.eval()  # dropout would make the first ratio differ from 1

    def set_rates(self, step: int) -> Metrics:
        """Set and return the learning rates of a training step."""
        factor = learning_rate_factor(step, self.config.steps, self.config.warmup, shape="linear")
        for name, optimizer in self.optimizers.items():
            set_learning_rate(optimizer, self.rates[name] * factor)
        return {f"{name}/lr": rate * factor for name, rate in self.rates.items()}

    def step(self) -> Metrics:
        """Clip the gradients and take an optimizer step; returns the norms before clipping."""
        limit = self.config.max_grad_norm
        norms = {
            f"{name}/grad_norm": float(parallel.clip_grad_norm_(model.parameters(), limit))
            for name, model in self.models.items()
        }
        for optimizer in self.optimizers.values():
            optimizer.step()
        return norms

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the average towards the policy."""
        if self.average is not None and self.config.ema_decay is not None:
            for own, weight in zip(self.average.parameters(), self.policy.parameters(), strict=True):
                if own.requires_grad:
                    own.lerp_(weight, 1 - self.config.ema_decay)


def update(
    learners: Learners,
    samples: Samples,
    minibatches: Iterator[tuple[Tensor, Tensor | None]],
    loss_of: Loss,
    config: RolloutSettings,
    recorder: Recorder,
) -> Metrics:
    """Take an optimizer step on each minibatch.

    Args:
        learners: what is trained.
        samples: the batch.
        minibatches: rows and text for PPO-ptx of each, see `Rollouts.minibatches`.
        loss_of: the loss of a micro-batch, divided by the counts of its whole minibatch.
        config: of the run.
        recorder: which checks losses and gradients.

    Returns:
        The means of the metrics over the minibatches, and what they were in the first.

    Raises:
        TrainingError: a loss is not finite, or the first ratio is not 1.
    """
    rows: list[Metrics] = []
    for index, blocks in minibatches:
        for optimizer in learners.optimizers.values():
            optimizer.zero_grad()
        parts = []
        groups = micro_batch_rows(samples, parallel.my_rows(index), config.micro_batch_tokens)
        for group, weight in parallel.even(groups, index[:1]):
            loss, metrics = loss_of(group, index)
            advice = f"lower --{config.option}.lr or raise --{config.option}.beta"
            recorder.check_finite(loss, f"rows {group[:4].tolist()}... of the batch", advice)
            (weight * loss).backward()
            parts.append({key: weight * float(value) for key, value in metrics.items()})
        row = _together(parallel.gather(parts))
        if not rows:
            _check_first_ratio(row, learners.policy, recorder.name)
        if blocks is not None:
            # PPO-ptx: the pretraining gradient is added to the policy's before the one optimizer step.
            row["policy/ptx_loss"] = _add_pretraining_gradient(learners.policy, blocks, config, recorder)
        rows.append(row | learners.step())
    learners.update_average()
    # No weight has changed before the first: unless the ratio is 1 and nothing is clipped, a log-prob is wrong.
    names = ("ratio_error", "approx_kl", "clip_fraction")
    return _together(rows, len(rows)) | {f"policy/first_{name}": rows[0][f"policy/{name}"] for name in names}


def ratio_errors(logprobs: Tensor, old_logprobs: Tensor, counted: float) -> dict[str, Tensor]:
    """How far ratios [b, T], 1 where the mask is False, are from 1: the largest error, and the share in the mean."""
    error = (logprobs.detach() - old_logprobs).expm1().abs()
    return {"policy/ratio_error": error.max(), "policy/mean_ratio_error": error.sum() / counted}


def _together(rows: list[Metrics], divisor: int = 1) -> Metrics:
    """The sum of each metric divided by `divisor`; the maximum for the ratio's maxima."""
    worst = ("policy/ratio_max", "policy/ratio_error")
    return {
        key: max(row[key] for row in rows) if key in worst else sum(row[key] for row in rows) / divisor
        for key in rows[0]
    }


def _add_pretraining_gradient(
    policy: PreTrainedModel, blocks: Tensor, config: RolloutSettings, recorder: Recorder
) -> float:
    """Add ptx_coef times the gradient of the loss of some blocks [B, T] to the policy's; returns the loss."""
    loss, mine = torch.zeros(()), parallel.my_rows(blocks)
    rows = max(1, config.micro_batch_tokens // blocks.shape[1])
    for part, weight in parallel.even(list(mine.split(rows)) if len(mine) else [], blocks[:1]):
        part_loss = weight * language_model_loss(policy, part.to(policy.device), len(blocks))
        recorder.check_finite(part_loss, "corpus blocks of PPO-ptx", f"lower --{config.option}.ptx-coef")
        (config.ptx_coef * part_loss).backward()
        loss += part_loss.detach().cpu()
    return float(parallel.sum_over_ranks(loss))


def _check_first_ratio(row: Metrics, policy: PreTrainedModel, where: str) -> None:
    """Check that, before a step's first update, training gives each token the probability it was sampled with.

    Raises:
        TrainingError: it does not, so the clipped updates would be wrong.
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


def measure(rollout: Rollout, ref_logprobs: Tensor, beta: float) -> Metrics:
    """The metrics of the sampled answers."""
    samples, scores = rollout.samples, rollout.scores
    kl = (samples.logprobs - ref_logprobs).sum(dim=1)  # both are 0 where the mask is False
    return {
        "objective/score": float(scores.mean()),
        "objective/score_std": float(scores.std(unbiased=False)),
        "objective/kl": float(kl.mean()),
        "objective/beta": beta,
        "objective/rlhf_reward": float((scores - beta * kl).mean()),
        "objective/entropy": float(-samples.logprobs.sum(dim=1).mean()),
        "objective/response_length": float(samples.lengths.float().mean()),
        "objective/ended_fraction": float(samples.ended.float().mean()),
    }


def speed(samples: Samples, began: float, sampled: float) -> Metrics:
    """The metrics of a step's time; by `time.monotonic`, when it began and when its answers were ready."""
    now = time.monotonic()
    return {
        "perf/seconds": now - began,
        "perf/seconds_sampling": sampled - began,
        "perf/response_tokens_per_second": float(samples.response_mask.sum()) / (now - began),
        "perf/episodes_per_second": len(samples.ended) / (now - began),
    }


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
