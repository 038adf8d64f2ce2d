"""Exercise 11.6, the three steps in a row: run for real, with the package's trainers, on models of a few hundred words.

What an answer returns is read (what each model says of fixed texts) and held against the reference's. All trainers draw
under one seed, so a right answer gives the same numbers, and so does each plumbing mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tqdm.auto import tqdm

from minirlhf.config import RunConfig
from minirlhf.data import Comparison, DataFolder, Demonstration, Prompt
from minirlhf.language.evaluation import EvaluationConfig, answer
from minirlhf.language.models import ModelConfig, clone, pad, scalar_model_from, tiny_llama
from minirlhf.language.reward_model import RewardModelConfig, RewardModelScorer, train_reward_model
from minirlhf.language.rlhf import RLHFConfig, train_rlhf
from minirlhf.language.sft import SFTConfig, train_sft
from minirlhf.language.tokenization import encode_prompts, encode_responses
from minirlhf.losses import token_logprobs
from minirlhf_course.checks.exercise import Case, Exercise
from minirlhf_course.checks.outcome import Outcome
from minirlhf_course.words import word_tokenizer

__all__ = ["pipeline"]

WORDS = ("ant", "bee", "cat", "dog", "eel", "fox", "big", "small", "the", "is", "tell", "me", "of")
MODEL = ModelConfig(hidden_size=16, layers=1, heads=2, intermediate_size=32, init_std=0.2)
SETTINGS = RunConfig(
    sft=SFTConfig(epochs=1, batch_size=4, lr=3e-2, warmup=0),
    reward_model=RewardModelConfig(epochs=1, batch_size=2, lr=2e-2, warmup=0),
    rlhf=RLHFConfig(
        steps=2, batch_size=6, minibatch_size=6, lr=1e-2, value_lr=1e-2, warmup=0, beta=0.3, max_response_tokens=3
    ),
    evaluation=EvaluationConfig(max_response_tokens=3),
)
ASKED = ["tell me of the ant", "the fox"]
SAID = ["the ant is big", "small fox"]


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    return word_tokenizer(WORDS)


def _folder(seed: int, demonstrations: int, comparisons: int, prompts: int) -> DataFolder:
    """Rows of a few words; twice as many comparisons and prompts as are used in training, the second half held out."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> str:
        return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (count,), generator=generator).tolist())

    asked = [Prompt(words(3)) for _ in range(2 * prompts)]
    ranked = [
        Comparison(
            words(3), (words(2), words(3), words(1)), tuple(torch.randperm(3, generator=generator).double().tolist())
        )
        for _ in range(2 * comparisons)
    ]
    return DataFolder(
        Path("data"),
        corpus=[],
        demonstrations=[Demonstration(words(3), words(3)) for _ in range(demonstrations)],
        comparisons=ranked[:comparisons],
        heldout_comparisons=ranked[comparisons:],
        prompts=asked[:prompts],
        heldout_prompts=asked[prompts:],
    )


def _cases() -> list[Case]:
    sizes = {"8 demonstrations, 4 rankings, 6 prompts": (0, 8, 4, 6), "12, 6 and 9": (1, 12, 6, 9)}
    return [
        Case(name, (tiny_llama(MODEL, _tokenizer(), 32, seed).eval(), _tokenizer(), _folder(seed, *counts), SETTINGS),
             rtol=1e-3)
        for name, (seed, *counts) in sizes.items()
    ]  # fmt: skip


def _log_probability(model: Any) -> torch.Tensor:
    """Of the two texts in SAID: [2]."""
    prompts, answers = encode_prompts(_tokenizer(), ASKED), encode_responses(_tokenizer(), SAID)
    tokens, mask = pad([x + y for x, y in zip(prompts, answers, strict=True)], _tokenizer().pad_token_id)
    starts = torch.tensor([len(x) for x in prompts])[:, None]
    of_answer = mask & (torch.arange(tokens.shape[1]) >= starts)
    with torch.no_grad():
        logits = model(input_ids=tokens, attention_mask=mask.long()).logits
    logprobs = token_logprobs(logits[:, :-1], tokens[:, 1:])
    return torch.where(of_answer[:, 1:], logprobs, 0.0).sum(1)


def _observe(returned: Any, args: tuple[Any, ...]) -> dict[str, Any] | str:
    if not isinstance(returned, tuple | list) or len(returned) != 4:
        return "It does not return four things: the SFT model, the reward model, the policy, the mean score."
    sft, reward_model, policy, score = returned
    for what, model, scalar in (("SFT model", sft, 0), ("reward model", reward_model, 1), ("policy", policy, 0)):
        if not isinstance(model, torch.nn.Module) or (getattr(model, "score", None) is not None) != bool(scalar):
            return f"What should be the {what} is something else: return SFT model, reward model, policy, mean score."
    return {
        "the log-probability of two answers under the base model, afterwards": _log_probability(args[0]),
        "the log-probability of two answers under the SFT model": _log_probability(sft),
        "the reward model's score of two answers": RewardModelScorer(reward_model, _tokenizer())(ASKED, SAID),
        "the log-probability of two answers under the policy": _log_probability(policy),
        "the mean score": torch.as_tensor(score, dtype=torch.float32),
    }


_OUTCOMES: dict[tuple[Callable[..., Any], str], Outcome] = {}
"""Of the reference and the suspects, by function and case: a pipeline takes a third of a second."""


def _without_bar(*args: Any, **options: Any) -> Any:
    return tqdm(*args, **(options | {"disable": True}))


@dataclass(frozen=True)
class PipelineExercise(Exercise):
    """Runs each answer on a copy of the base model, without progress bars; what is known runs once."""

    def run(self, function: Callable[..., Any], case: Case) -> Outcome:
        known = any(function is one for one in (self.reference, *self.suspects.values()))
        if known and (function, case.name) in _OUTCOMES:
            return _OUTCOMES[function, case.name]
        base, *others = case.args
        with patch("tqdm.auto.tqdm", _without_bar):
            outcome = super().run(function, replace(case, args=(clone(base), *others)))
        if known:
            _OUTCOMES[function, case.name] = outcome
        return outcome


def _texts(rows: list[Prompt]) -> list[str]:
    return [row.text for row in rows]


def pipeline_reference(base: Any, tokenizer: Any, folder: DataFolder, settings: RunConfig) -> Any:
    """Steps 1 to 3 of InstructGPT on the rows of a folder.

    Returns SFT model, reward model, policy, and the mean reward of the policy's answers to
    the held-out prompts.
    """
    sft = train_sft(clone(base), tokenizer, folder.demonstrations, settings.sft)
    reward_model = train_reward_model(
        sft, tokenizer, folder.comparisons, settings.reward_model, demonstrations=folder.demonstrations
    )
    reward = RewardModelScorer(reward_model, tokenizer)
    policy = train_rlhf(
        clone(sft), clone(reward_model), sft, reward, tokenizer, _texts(folder.prompts), settings.rlhf
    )  # fmt: skip
    asked = _texts(folder.heldout_prompts)
    said = answer(policy, tokenizer, asked, settings.evaluation)
    return sft, reward_model, policy, reward(asked, said.responses).mean()


pipeline_reference.__name__ = "pipeline"


def _with(bug: str, base: Any, tokenizer: Any, folder: DataFolder, settings: RunConfig) -> Any:
    """The reference with one mistake planted."""
    sft = train_sft(base if bug == "base trained" else clone(base), tokenizer, folder.demonstrations, settings.sft)
    if bug == "no step 1":
        sft = clone(base)
    rankings = folder.heldout_comparisons if bug == "held-out rankings" else folder.comparisons
    known = () if bug == "not centred" else folder.demonstrations
    body = base if bug == "judge on base" else sft
    reward_model = train_reward_model(body, tokenizer, rankings, settings.reward_model, demonstrations=known)
    judge = clone(reward_model)
    reward = RewardModelScorer(judge, tokenizer)
    policy = sft if bug == "sft trained" else clone(base if bug == "policy from base" else sft)
    reference = clone(base if bug == "reference is base" else sft)
    value = reward_model if bug == "judge trained" else clone(reward_model)
    if bug == "fresh value":
        value = scalar_model_from(sft, seed=0)
    asked = folder.heldout_prompts
    prompts = {"held-out prompts": asked, "demonstrations' prompts": [Prompt(x.prompt) for x in folder.demonstrations],
               "all prompts": folder.prompts + asked}.get(bug, folder.prompts)  # fmt: skip
    if bug != "no step 3":
        policy = train_rlhf(policy, value, reference, reward, tokenizer, _texts(prompts), settings.rlhf)
    if bug == "same prompts":
        asked = folder.prompts
    who = sft if bug == "sft asked" else policy
    scores = reward(_texts(asked), answer(who, tokenizer, _texts(asked), settings.evaluation).responses)
    return sft, reward_model, policy, scores.sum() if bug == "sum" else scores.mean()


pipeline = PipelineExercise(
    "11.6",
    "the whole pipeline, in your own code",
    difficulty=3,
    minutes=25,
    task="Steps 1, 2 and 3 in a row, from the package's trainers: `train_sft`, `train_reward_model` (given the "
    "demonstrations too, so that they score 0 on average), `train_rlhf`; then `answer` and the reward model's mean "
    "score on held-out prompts. Each trainer has its config in `settings` (`.sft`, `.reward_model`, `.rlhf`; "
    "`.evaluation` is `answer`'s), and keeps its default seed. Some trainers work in place and some on a copy: their "
    "docstrings say which. Mind who starts as whom, and `clone` whatever must stay as it is; `base` is the caller's.",
    reference=pipeline_reference,
    cases=_cases,
    suspects={
        "The base model itself is trained: train_sft works in place. Give it a clone.": partial(_with, "base trained"),
        "Step 1 is left out: all that follows starts from the base model.": partial(_with, "no step 1"),
        "The policy starts from the base model: step 3 goes on from the SFT model.": partial(_with, "policy from base"),
        "The reference is the base model: the KL is charged for leaving the SFT model.": (
            partial(_with, "reference is base")
        ),
        "The SFT model is trained as the policy: train_rlhf works in place. Give it clone(sft), and sft stays the "
        "reference.": partial(_with, "sft trained"),
        "The value network starts with a fresh head: start it as a clone of the reward model.": (
            partial(_with, "fresh value")
        ),
        "The reward model is trained as the value network: then it is no longer the judge. Give train_rlhf a "
        "clone.": partial(_with, "judge trained"),
        "The reward model starts from the base model: it starts from the SFT model.": partial(_with, "judge on base"),
        "The reward model's scores are not centred: give train_reward_model the demonstrations.": (
            partial(_with, "not centred")
        ),
        "The reward model learns from the held-out rankings: they are there to measure it.": (
            partial(_with, "held-out rankings")
        ),
        "PPO trains on the held-out prompts: what is measured on them then means nothing.": (
            partial(_with, "held-out prompts")
        ),
        "PPO trains on the held-out prompts, too: what is measured on them then means nothing.": (
            partial(_with, "all prompts")
        ),
        "PPO trains on the demonstrations' prompts: it has prompts of its own, folder.prompts.": (
            partial(_with, "demonstrations' prompts")
        ),
        "It is measured on the prompts that PPO was trained on: ask the held-out ones.": partial(_with, "same prompts"),
        "The SFT model answers the held-out prompts: ask the policy.": partial(_with, "sft asked"),
        "Step 3 is left out: the policy is the SFT model.": partial(_with, "no step 3"),
        "This is the sum of the scores: give their mean.": partial(_with, "sum"),
    },
    hints=(
        "`train_sft` and `train_rlhf` train the model that they are given, `train_reward_model` a copy. So what must "
        "be cloned: `base` in step 1; `sft` and the reward model in step 3, where both are needed as they are too.",
        "`sft = train_sft(clone(base), ...)`; `reward_model = train_reward_model(sft, ..., "
        "demonstrations=folder.demonstrations)`; `reward = RewardModelScorer(reward_model, tokenizer)`; `policy = "
        "train_rlhf(clone(sft), clone(reward_model), sft, reward, tokenizer, [row.text for row in folder.prompts], "
        "settings.rlhf)`; then `answer(policy, tokenizer, asked, settings.evaluation).responses`.",
    ),
    observe=_observe,
)
