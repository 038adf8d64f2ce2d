"""The five text probes: tasks so small that each can fail for only a few reasons, each with one thing more in it.

A model of one layer, two prompts of different length, answers of at most five tokens out of a dozen. Models are judged
afterwards, on fresh answers: nothing that a trainer reports is asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch

from minirlhf.language.generation import Samples, sample
from minirlhf.language.models import (
    ModelConfig,
    clone,
    response_logprobs,
    scalar_model_from,
    tiny_llama,
    token_values,
)
from minirlhf.language.rlhf import RLHFConfig, train_rlhf
from minirlhf.language.tokenization import decode, encode_prompts
from minirlhf.training import Recorder, generator_for
from minirlhf_course.studios.given import Trainer, run
from minirlhf_course.studios.session import complaint
from minirlhf_course.studios.studio import Failure, Notes
from minirlhf_course.words import word_tokenizer

EARLY = ("ant", "bee", "cat", "dog", "eel")
LATE = ("rat", "seal", "tuna", "wasp", "yak")
PROMPTS = ("tell me about the moon", "sad today")
MODEL = ModelConfig(hidden_size=32, layers=1, heads=2, intermediate_size=64, init_std=0.05)
CONFIG = RLHFConfig(
    steps=20,
    batch_size=32,
    minibatch_size=16,
    epochs=4,
    lr=1e-2,
    value_lr=1e-2,
    warmup=0,
    beta=0.0,
    missing_eos_penalty=0.0,
    max_response_tokens=5,
)


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    return word_tokenizer((*EARLY, *LATE, *dict.fromkeys(" ".join(PROMPTS).split())))


def early(response: str) -> float:
    return float(response.split(" ")[0] in EARLY)


def fresh(seed: int, init_std: float = 0.05) -> Any:
    """A model that has learned nothing."""
    return tiny_llama(replace(MODEL, init_std=init_std), tokenizer(), 64, seed).eval()


@dataclass(frozen=True)
class Task:
    """A probe.

    Args:
        title: of its property.
        reward: of prompts and responses.
        measure: "values": how far V is from 1; "score": the mean score; "kl": KL to the reference.
        limit: what the measure must reach: at most, but for scores at least.
        look: where to look if it fails.
        bugs: of the museum.
        settings: of the run, besides CONFIG's.
        stray: the policy begins elsewhere than the reference.
    """

    title: str
    reward: Callable[[Sequence[str], Sequence[str]], list[float]]
    measure: str
    limit: float
    look: str
    bugs: tuple[int, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    stray: bool = False


TASKS = (
    Task(
        "probe 1, constant reward: V is 1",
        lambda prompts, responses: [1.0] * len(prompts),
        "values",
        0.15,
        "the value model: its optimizer and rate, returns of raw advantages, V's column, what counts in its loss.",
        (1, 8, 25),
        {"lr": 3e-4, "whiten_advantages": False, "value_clip_range": 10.0, "steps": 12},
    ),
    Task(
        "probe 2, reward for the only token",
        lambda prompts, responses: [early(text) for text in responses],
        "score",
        0.9,
        "the policy's loss: its sign, the ratio, which log-prob is of which token, the optimizer's weights.",
        (3, 6, 23),
        {"max_response_tokens": 1},
    ),
    Task(
        "probe 3, reward for the first of five tokens",
        lambda prompts, responses: [early(text) for text in responses],
        "score",
        0.8,
        "credit over time: GAE's direction, gamma, lambda, the column where the score is paid, the padding.",
        (7, 8, 10),
    ),
    Task(
        "probe 4, which word is right depends on the prompt",
        lambda prompts, responses: [
            float(early(text) == ("moon" in prompt)) for prompt, text in zip(prompts, responses, strict=True)
        ],
        "score",
        0.9,
        "the prompt: mask and padding on the left, and that prompts, answers and scores keep one order.",
        (29,),
        {"max_response_tokens": 1},
    ),
    Task(
        "probe 5, the KL alone: the policy comes home",
        lambda prompts, responses: [0.0] * len(prompts),
        "kl",
        0.25,
        "the KL: its sign, whose log-probs, whether beta reaches the rewards, whether the reference is frozen.",
        (2, 14, 30),
        {"beta": 1.0, "lr": 3e-3, "steps": 25},
        stray=True,
    ),
)


def answers(policy: Any, seed: int) -> tuple[list[str], Samples]:
    texts = list(PROMPTS) * 64
    samples = sample(
        policy,
        encode_prompts(tokenizer(), texts),
        max_new_tokens=5,
        pad_id=tokenizer().pad_token_id,
        eos_id=tokenizer().eos_token_id,
        generator=generator_for(seed, "studio/probe"),
    )
    return texts, samples


@torch.no_grad()
def measured(task: Task, policy: Any, value: Any, reference: Any) -> float:
    """What a probe is judged by, on 128 fresh answers."""
    texts, samples = answers(policy, seed=5)
    if task.measure == "score":
        scores = task.reward(texts, decode(tokenizer(), samples.responses()))
        return sum(scores) / len(scores)
    T = samples.response_mask.shape[1]
    if task.measure == "values":
        values = token_values(value, samples.tokens, samples.mask)[:, -T - 1 : -1][samples.response_mask]
        return float((values - 1).abs().mean())
    of_reference = response_logprobs(reference, samples.tokens, samples.mask, samples.response_mask)
    return float((samples.logprobs - of_reference).sum(1).mean())


def probe(task: Task, trainer: Trainer) -> Failure | None:
    """Run a trainer on a probe."""
    reference = fresh(0)
    policy = fresh(1, init_std=0.2) if task.stray else clone(reference)
    value = scalar_model_from(reference, 0).eval()
    before = measured(task, policy, value, reference)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        config = replace(CONFIG, **task.settings)
        try:
            run(trainer, policy, value, reference, task.reward, tokenizer(), PROMPTS, config)
        except Exception as error:  # whatever a learner's code may raise becomes the verdict
            return Failure(complaint(error, trainer))
    after = measured(task, policy.eval(), value.eval(), reference)
    what = {"values": "mean distance of V from 1", "score": "mean score", "kl": "KL to the reference, nats per answer"}
    limit = task.limit * before if task.measure == "kl" else task.limit
    reached = after >= limit if task.measure == "score" else after <= limit
    if reached:
        return None
    word = "at least" if task.measure == "score" else "at most"
    return Failure(
        f"{what[task.measure]}: {before:.2f} before, {after:.2f} after {config.steps} batches of "
        f"{config.batch_size} answers; {word} {limit:.2f} is asked for."
    )


def equals_the_package(trainer: Trainer, notes: Notes) -> Failure | None:
    """One batch under one seed: the weights of policy and value model are `train_rlhf`'s."""
    config = replace(
        CONFIG,
        steps=1,
        epochs=1,
        minibatch_size=10,
        beta=0.2,
        ptx_coef=0.3,
        ptx_batch_size=4,
        missing_eos_penalty=1.0,
        lam=0.9,
        temperature=0.9,
        lr=1e-3,
    )
    blocks = torch.randint(3, len(tokenizer()), (16, 8), generator=torch.Generator().manual_seed(0))
    reference = fresh(0)
    ours: list[Any]
    theirs: list[Any]
    ours, theirs = ([fresh(1), scalar_model_from(reference, 0).eval()] for _ in range(2))
    start = [[p.detach().clone() for p in model.parameters()] for model in ours]

    def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [early(text) + 0.1 * len(text.split()) for text in responses]

    recorder = Recorder("rlhf", progress=False)
    parts: list[Any] = [reference, reward, tokenizer(), PROMPTS, config]
    train_rlhf(*theirs, *parts, corpus_blocks=blocks, seed=4, recorder=recorder)
    try:
        run(trainer, *ours, *parts, corpus_blocks=blocks, seed=4)
    except Exception as error:  # whatever a learner's code may raise becomes the verdict
        return Failure(complaint(error, trainer))
    for name, mine, their, old in zip(("policy", "value model"), ours, theirs, start, strict=True):
        moved = torch.cat([(p.detach() - q).flatten() for p, q in zip(mine.parameters(), old, strict=True)])
        right = torch.cat([(p.detach() - q).flatten() for p, q in zip(their.parameters(), old, strict=True)])
        off, whole = float((moved - right).norm()), float(right.norm())
        if off > 0.02 * whole:
            return Failure(
                f"One batch, four minibatches: the {name}'s weights move by {whole:.4f} in `train_rlhf`; yours are "
                f"{off:.4f} away from there. The optimizer's numbers, or which blocks are read?"
            )
    return None
