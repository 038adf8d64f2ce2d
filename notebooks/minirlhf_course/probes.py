"""The five text probes of lesson 09: `train_rlhf` on tasks so small that each can fail for only a few reasons.

    policy, history = probe(lambda prompts, responses: [1.0] * len(prompts), tokenizer, lr=3e-4)

A fresh model of one layer, two prompts, answers of at most five tokens, no KL penalty. (Studio 4 probes a trainer that
the reader wrote, on words of its own: `minirlhf_course.studios.text_probes`.)
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from minirlhf.language.models import ModelConfig, clone, scalar_model_from, tiny_llama
from minirlhf.language.rlhf import RLHFConfig, train_rlhf
from minirlhf.training import Recorder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from minirlhf.language.reward_model import RewardFunction

__all__ = ["PROMPTS", "SETTINGS", "fresh", "probe"]

MODEL = ModelConfig(hidden_size=32, layers=1, heads=2, intermediate_size=64)
PROMPTS = ["tell me about the moon", "i feel sad today"]
SETTINGS = RLHFConfig(
    steps=20,
    batch_size=64,
    minibatch_size=32,
    epochs=4,
    lr=1e-2,
    value_lr=1e-2,
    warmup=0,
    beta=0.0,
    missing_eos_penalty=0.0,
    max_response_tokens=5,
)


def fresh(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model that every probe starts from; the reference of all of them."""
    return tiny_llama(MODEL, tokenizer, 64, seed=0).eval()


def probe(
    reward: RewardFunction,
    tokenizer: PreTrainedTokenizerBase,
    *,
    policy: PreTrainedModel | None = None,
    **settings: Any,
) -> tuple[PreTrainedModel, list[dict[str, float]]]:
    """Run a probe.

    Args:
        reward: what is paid for an answer.
        tokenizer: of the small world.
        policy: starts as this (and is trained in place); None: as the reference does.
        settings: of the run, in place of SETTINGS'.

    Returns:
        The policy, and the metrics of each step.
    """
    reference = fresh(tokenizer)
    policy = policy or clone(reference)
    recorder = Recorder("probe", progress=False)
    train_rlhf(
        policy,
        scalar_model_from(reference, seed=0).eval(),
        reference,
        reward,
        tokenizer,
        PROMPTS,
        replace(SETTINGS, **settings),
        recorder=recorder,
    )
    return policy, recorder.history
