"""What a trainer of Studio 4 is given: logits and values of padded rows, samples, batches of prompts, corpus blocks.

    log = run(my_rlhf, policy, value_model, reference, reward, tokenizer, prompts, RLHFConfig(steps=20))

runs a trainer on any models, with the prompts, samples and corpus blocks that `train_rlhf` would draw.

    log = brought(my_rlhf, policy, value_model, ..., monitor=watch)

does the same for a trainer that the reader has brought to a lesson, measured as the package's is; None for a stub.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minirlhf.language.forward import inputs, is_plain_llama, next_token_logits, readable
from minirlhf.language.generation import Samples, end_ids, sample
from minirlhf.language.models import token_values
from minirlhf.language.tokenization import decode, encode_prompts
from minirlhf.training import epoch_batch, generator_for
from minirlhf_course.checks.untouched import is_untouched

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from minirlhf.language.reward_model import RewardFunction
    from minirlhf.language.rlhf import Monitor, RLHFConfig

__all__ = ["Trainer", "brought", "run", "sampler", "token_logits", "token_values"]

Trainer = Callable[..., Any]
"""What the learner writes."""
Sampler = Callable[["PreTrainedModel", Sequence[str]], Samples]


def token_logits(model: PreTrainedModel, tokens: Tensor, mask: Tensor) -> Tensor:
    """The logits of what comes after each token: tokens and mask [B, L] -> [B, L, V]. At padding they mean nothing."""
    if is_plain_llama(model):
        logits = next_token_logits(model, tokens, mask, mask.bool())
        spread = logits.new_zeros(*mask.shape, logits.shape[-1])
        return spread.index_put((mask.bool(),), logits)
    model, tokens, mask = readable(model, tokens, mask)
    return model(**inputs(model, tokens, mask), use_cache=False).logits


def sampler(tokenizer: PreTrainedTokenizerBase, config: RLHFConfig, seed: int = 0) -> Sampler:
    """`sample(policy, texts)` of a studio: answers drawn as `train_rlhf` draws them under this seed."""
    count = 0

    def draw(policy: PreTrainedModel, texts: Sequence[str]) -> Samples:
        nonlocal count
        generators = [generator_for(seed, "rlhf/sample", count, place) for place in range(len(texts))]
        count += 1
        return sample(
            policy.eval(),
            encode_prompts(tokenizer, texts),
            max_new_tokens=config.max_response_tokens,
            pad_id=tokenizer.pad_token_id,
            eos_id=end_ids(policy, tokenizer),
            generator=generators,
            temperature=config.temperature,
        )

    return draw


def blocks_from(corpus_blocks: Tensor, config: RLHFConfig, seed: int = 0) -> Iterator[Tensor]:
    """Endless blocks of text for PPO-ptx, as `train_rlhf` draws them."""
    number = 0
    while True:
        yield corpus_blocks[epoch_batch(len(corpus_blocks), config.ptx_batch_size, number, seed, "rlhf/ptx")]
        number += 1


def run(
    trainer: Trainer,
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
    monitor: Monitor | None = None,
) -> Any:
    """Run a learner's trainer, in place; the first samples and minibatches are `train_rlhf`'s under the same seed.

    Args:
        trainer: what the learner wrote.
        policy: starts as the SFT model.
        value_model: starts as the reward model.
        reference: the SFT model.
        reward: (prompts, responses) -> one score per response.
        tokenizer: of all models.
        prompts: to answer.
        config: the hyper-parameters.
        corpus_blocks: [N, L] int64 text for PPO-ptx.
        seed: of prompts, samples, minibatches and blocks.
        monitor: extra measurements of the sampled answers, as `train_rlhf` takes them.

    Returns:
        What the trainer returns: its log; with a monitor, each row holds its measurements too.
    """
    for model in (policy, value_model, reference):
        model.eval()
    rows = [epoch_batch(len(prompts), config.batch_size, step, seed, "rlhf/prompts") for step in range(config.steps)]
    draw, measured = sampler(tokenizer, config, seed), []

    def draw_and_measure(policy: PreTrainedModel, texts: Sequence[str]) -> Samples:
        samples = draw(policy, texts)
        if monitor is not None:
            measured.append(monitor(texts, decode(tokenizer, samples.responses()), samples.ended.tolist()))
        return samples

    with torch.enable_grad():
        log = trainer(
            policy,
            value_model,
            reference,
            reward,
            tokenizer,
            [[prompts[row] for row in batch] for batch in rows],
            config,
            sample=draw_and_measure,
            corpus=None if corpus_blocks is None else blocks_from(corpus_blocks, config, seed),
            generator=generator_for(seed, "rlhf/minibatch", 0, 0),
        )
    return log if monitor is None else [row | more for row, more in zip(log, measured, strict=True)]


def brought(trainer: Trainer, *models: Any, **settings: Any) -> Any:
    """Run the trainer that a reader brings from Studio 4 to a lesson; an untouched stub gives None, and says so.

    Args:
        trainer: `my_rlhf`, pasted into the lesson.
        models: see `run`, as everything else.
        settings: see `run`.
    """
    if is_untouched(trainer):
        print("my_rlhf: not attempted (the package's run stands alone)")
        return None
    return run(trainer, *models, **settings)
