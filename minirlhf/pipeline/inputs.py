"""From a data folder to token ids that fit the model: every check is made here, before any training starts."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from minirlhf.config import SETTINGS, RunConfig
from minirlhf.data import DataFolder, read_folder, read_rankings
from minirlhf.errors import CheckpointError, DataError, UserError
from minirlhf.hub import fetch_rows, is_hub_name
from minirlhf.language.adapters import add_lora, lora_scalar_from
from minirlhf.language.forward import context_of, recompute_layers
from minirlhf.language.models import context_in, load_causal_model
from minirlhf.language.pretraining import blocks_of
from minirlhf.language.supported import check_model, check_scalar_model
from minirlhf.language.tokenization import encode_texts, in_chunks, load_tokenizer, tokenizer_from_file, train_tokenizer
from minirlhf.pipeline.audit import audit
from minirlhf.pipeline.estimate import Size, check_memory, size_of
from minirlhf.pipeline.fitting import answer_room, fit
from minirlhf.pipeline.folder import find_device
from minirlhf.pipeline.given import load_given_reward_model
from minirlhf.pipeline.judges import gold_judge
from minirlhf.worlds import DEFAULT_WORLD, find_world

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MADE_WORLD = "world"
FROM_HUB = "hub"
LEARNT_FROM = 2**24
"""Characters of a corpus that are enough to train a tokenizer on."""
FEWEST_BLOCKS = 2**16
"""Blocks of a corpus that are made if it has them, even for a run that reads fewer."""
DEFAULT_DATA = Path(__file__).resolve().parents[2] / "data" / "small_world"


@dataclass
class Inputs:
    """Everything that the steps need, checked and tokenized."""

    folder: DataFolder
    tokenizer: PreTrainedTokenizerBase
    context_length: int
    corpus_blocks: Tensor
    size: Size
    """Of models and data: how much work the run is."""


def find_data(config: RunConfig) -> Path:
    """The folder or file to read: the one given, the shipped small world, or a small world made for this run.

    The rows of a data set on the hub are kept in the run's folder, so that a run that goes on learns from the same.

    Raises:
        UserError: none of them is there, for example if the package that provides the small world is not installed.
        DataError: the data set can't be read from the hub.
    """
    if config.data is not None:
        return fetch_rows(config.data, config.out / FROM_HUB) if is_hub_name(config.data) else config.data
    if DEFAULT_DATA.is_dir():
        return DEFAULT_DATA
    # Installed without the repository: make the same folder (the seed of the shipped one is 0).
    made = config.out / MADE_WORLD
    for unfinished in config.out.glob(f".{MADE_WORLD}.*.part"):  # of a run that was ended while it wrote the folder
        shutil.rmtree(unfinished)
    if not made.is_dir():
        try:
            find_world(DEFAULT_WORLD).write(made, seed=0)
        except UserError as error:
            raise UserError(f"{error}, or give a folder of your own with --data") from None
    return made


def load_inputs(config: RunConfig, path: Path) -> Inputs:
    """Read, check and tokenize a data folder, and test the models that are given.

    Raises:
        DataError: a row is malformed or too long for the context, named by file and line.
        UserError: the models would take more memory than there is.
        CheckpointError: a model that is given can't be loaded.
    """
    skip = config.data_errors == "skip"
    folder = read_folder(path, config.seed, config.data_errors)
    _add_rankings(folder, config.comparisons, skip)
    gold_judge(folder)  # finds prompts that it can't judge now, not after the training
    limit = config.context_length
    if config.pretrained is not None:
        tokenizer, model_limit = _pretrained(config)
        if limit is not None and model_limit is not None and limit > model_limit:
            raise UserError(f"--context-length {limit}: {config.pretrained} can read {model_limit} tokens at most")
        limit = limit or model_limit
    elif folder.tokenizer_file is not None:
        tokenizer = _from_file(folder.tokenizer_file)
    else:
        characters = sum(len(row.text) for row in folder.corpus)
        texts = (row.text for row in folder.corpus[:: max(1, characters // LEARNT_FROM)])
        tokenizer = train_tokenizer(texts, config.model_size.vocab_size)

    block_length, room = config.base.block_length, answer_room(config)
    longest = max(block_length, fit(folder, tokenizer, limit, room, skip))
    if limit is not None and block_length > limit:
        raise UserError(f"--base.block-length {block_length} is longer than the context of {limit}")
    every = _every(config, folder, tokenizer)
    blocks = {}
    for name, rows, most in (("corpus", folder.corpus[::every], None), ("held-out corpus", folder.heldout_corpus, 1)):
        try:
            documents = in_chunks(encode_texts, tokenizer, (row.text for row in rows))
            blocks[name] = blocks_of(documents, block_length, most)
        except ValueError as error:
            raise DataError(f"{path}: {name}: {error}") from None
    with _named("--model" if config.model is not None else "--sft", config.pretrained or ""):
        size = size_of(config, folder, tokenizer, longest)
    check_memory(config, size, find_device(config.device))
    _test_given(config)
    if (named := config.given_reward_model) is not None:
        kept = config.out / "reward_model"
        reader, reads = _given_reward_model(named) if not kept.is_dir() else (load_tokenizer(kept), context_in(kept))
        fit(folder, reader, reads, room, skip, reward_model=named)
    used = (config.out, *config.comparisons)
    folder.notes += audit(folder, tokenizer, allow_shared=config.allow_shared_rows, used=used)
    return Inputs(folder, tokenizer, limit or -(-longest // 64) * 64, blocks["corpus"], size)


def _every(config: RunConfig, folder: DataFolder, tokenizer: PreTrainedTokenizerBase) -> int:
    """One in how many rows of the corpus holds all that the run's steps read: 1 unless the corpus is large."""
    read = config.base.steps * config.base.batch_size  # in blocks
    for group in {SETTINGS[method] for method in config.methods if method not in ("ppo", "dpo")}:
        settings = getattr(config, group)
        if settings.ptx_coef > 0:
            updates = settings.steps * settings.epochs * math.ceil(settings.batch_size / settings.minibatch_size)
            read = max(read, updates * settings.ptx_batch_size)
    wanted = max(FEWEST_BLOCKS, read) * config.base.block_length
    some = [row.text for row in folder.corpus[:: max(1, len(folder.corpus) // 1000)]]
    tokens = sum(map(len, encode_texts(tokenizer, some))) / len(some) * len(folder.corpus)
    every = max(1, int(tokens / wanted))
    if every > 1:
        folder.notes.append(
            f"{folder.path}: one in {every} rows of the corpus is used: {wanted:,} tokens or more, which is enough "
            "for the steps of this run"
        )
    return every


def _add_rankings(folder: DataFolder, files: Sequence[Path], skip: bool = False) -> None:
    """Add files of rankings to the comparisons. A person may tie all answers; such a row teaches nothing."""
    held = {row.prompt for row in folder.heldout_comparisons} | {row.text for row in folder.heldout_prompts}
    # A round's file may be the last round's with more rows: each file counts once.
    for file in {file.resolve(): file for file in files}.values():
        rows = read_rankings(file, folder.notes if skip else None)
        used = [row for row in rows if len(set(row.scores)) > 1 and row.prompt not in held]
        for count, what in (
            (sum(len(set(row.scores)) == 1 for row in rows), "state no preference (all answers tied)"),
            (sum(row.prompt in held for row in rows), "are of held-out prompts"),
        ):
            if count:
                folder.notes.append(f"{file}: {count} of {len(rows)} rows {what} and were left out")
        if not used:
            raise DataError(f"{file}: no row is left to train on: {folder.notes[-1].removeprefix(f'{file}: ')}")
        folder.comparisons += used


def _pretrained(config: RunConfig) -> tuple[PreTrainedTokenizerBase, int | None]:
    """Tokenizer and context of the models that are given."""
    found: dict[str, tuple[PreTrainedTokenizerBase, int | None]] = {}
    for option, name, _ in _given(config):
        with _named(option, name):
            found[option] = load_tokenizer(name), context_in(name)
    if len(found) == 2 and found["--model"][0].get_vocab() != found["--sft"][0].get_vocab():
        raise CheckpointError(f"--sft {config.given_sft}: its vocabulary differs from that of --model {config.model}")
    limits = [limit for _, limit in found.values() if limit is not None]
    return next(iter(found.values()))[0], min(limits, default=None)


def _test_given(config: RunConfig) -> None:
    """Load the models that are given and that the run still needs, and test them."""
    for option, name, step in _given(config):
        if (config.out / step).is_dir():
            continue
        with _named(option, name):
            model = load_causal_model(name, load_tokenizer(name))
            check_model(model)
            if config.gradient_checkpointing:
                recompute_layers(model)
            if config.lora.rank is not None:
                adapted = add_lora(model, config.lora, config.seed, name)
                lora_scalar_from(adapted, config.lora, config.seed, name)


def _given(config: RunConfig) -> Iterator[tuple[str, str, str]]:
    """The option, the name and the step of each model that is given."""
    for option, name, step in (("--model", config.model, "base"), ("--sft", config.given_sft, "sft")):
        if name is not None:
            yield option, name, step


@contextlib.contextmanager
def _named(option: str, name: str) -> Iterator[None]:
    """Errors name the option and the model."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{option} {str(error) if name in str(error) else f'{name}: {error}'}") from None


def _given_reward_model(named: str) -> tuple[PreTrainedTokenizerBase, int | None]:
    """Tokenizer and context of the reward model that is given, which is loaded once and tested."""
    model, tokenizer = load_given_reward_model(named)
    try:
        check_scalar_model(model)
    except CheckpointError as error:
        raise CheckpointError(f"--reward-model {named}: {error}") from None
    return tokenizer, context_of(model)


def _from_file(file: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = tokenizer_from_file(file)
    except Exception as error:
        raise DataError(f"{file}: the tokenizer can't be loaded ({error}); delete it to train one") from None
    return tokenizer
