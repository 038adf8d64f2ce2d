"""What a person ranks: answers that a policy of a run gives to its training prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minirlhf.data import read_folder
from minirlhf.errors import CheckpointError, UserError
from minirlhf.labeling import MOST_ANSWERS, Item
from minirlhf.language.evaluation import EvaluationConfig, answer
from minirlhf.language.forward import context_of
from minirlhf.language.tokenization import encode_prompts, encode_responses, load_tokenizer
from minirlhf.pipeline.fitting import answer_room, fit
from minirlhf.pipeline.folder import POLICIES, context_of_run, hide_loading_bars, load_policy, read_config
from minirlhf.pipeline.inputs import find_data

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def items_to_rank(
    run: Path,
    *,
    data: Path | None = None,
    policy: str | None = None,
    prompts: int = 20,
    answers: int = 4,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[Item]:
    """Sample K answers to each of some training prompts. The same arguments give the same items.

    Args:
        run: folder of a run.
        data: folder whose training prompts are answered; None for the run's own.
        policy: one of its policies; None for the last of `POLICIES` that is finished.
        prompts: how many.
        answers: K, at most (see `sample_items`).
        temperature: of sampling.
        seed: of the choice of prompts and of sampling.

    Raises:
        CheckpointError: the folder is not a run, or the policy is not finished.
        DataError: the data is malformed.
        UserError: K is not from 2 to 9, or no prompt got two different answers.
    """
    if not 2 <= answers <= MOST_ANSWERS:
        raise UserError(f"--answers {answers}: must be a whole number from 2 to {MOST_ANSWERS}")
    config = read_config(run)
    hide_loading_bars()
    finished = [name for name in POLICIES if (run / name).is_dir()]
    if not finished:
        raise CheckpointError(f"{run}: no policy is finished yet; continue the run first")
    name = policy or finished[-1]
    if name not in finished:
        raise CheckpointError(f"{run}: no finished policy {name!r}; choose one of {', '.join(finished)}")
    folder = read_folder(data or find_data(config), config.seed, config.data_errors)
    model = load_policy(run, name, torch.device("cpu"), dtype=config.frozen_dtype)
    tokenizer = load_tokenizer(run / name)
    if config.data_errors == "skip":
        fit(folder, tokenizer, config.context_length or context_of_run(run), answer_room(config), skip=True)
    texts = sorted({row.text for row in folder.prompts})
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [texts[i] for i in order[:prompts]]
    settings = replace(config.evaluation, temperature=temperature)
    items = sample_items(model, tokenizer, chosen, answers, settings, seed=seed)
    if not items:
        raise UserError(f"{run / name}: gave no prompt two different answers that fit its context; raise --temperature")
    return items


def sample_items(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: int,
    settings: EvaluationConfig,
    *,
    seed: int = 0,
) -> list[Item]:
    """Sample K answers to each prompt, as items to rank.

    An item has fewer than K where an answer comes twice, or no longer fits the context once it is text (broken
    characters take more tokens). A prompt with fewer than two is left out.

    Args:
        model: a causal model.
        tokenizer: its tokenizer.
        prompts: texts, without template.
        answers: K.
        settings: temperature and length limit.
        seed: of sampling.
    """
    said = answer(model, tokenizer, [text for text in prompts for _ in range(answers)], settings, seed=seed).responses
    lengths = [len(ids) for ids in encode_responses(tokenizer, said)]
    context = context_of(model) or math.inf
    items = []
    for index, (text, ids) in enumerate(zip(prompts, encode_prompts(tokenizer, prompts), strict=True)):
        own = range(index * answers, (index + 1) * answers)
        fitting = (said[i] for i in own if said[i].strip() and len(ids) + lengths[i] <= context)
        different = tuple(dict.fromkeys(fitting))
        if len(different) > 1:
            items.append(Item(text, different))
    return items
