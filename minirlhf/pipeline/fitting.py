"""Check that every row of the data can be written in the tokenizer's template, and fits the models' context."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from minirlhf.config import SETTINGS, RunConfig
from minirlhf.data import Comparison, DataFolder, Demonstration, Prompt, counted
from minirlhf.errors import DataError, UserError
from minirlhf.formats import Conversation
from minirlhf.language.tokenization import encode_prompts, encode_responses, in_chunks, templated

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LISTS = ("demonstrations", "comparisons", "heldout_comparisons", "prompts", "heldout_prompts")
SCORED = LISTS[2:]
"""What a reward model reads that is not trained here: the pairs that measure it, and answers to all prompts."""


def answer_room(config: RunConfig) -> int:
    """Maximum tokens of a sampled answer, in training and evaluation."""
    return max(getattr(config, group).max_response_tokens for group in _answering(config))


def answer_options(config: RunConfig) -> list[str]:
    """The options that decide it."""
    return [f"--{group}.max-response-tokens" for group in _answering(config)]


def _answering(config: RunConfig) -> list[str]:
    """The groups of settings whose steps answer the prompts; DPO samples only where there is room."""
    return [*dict.fromkeys(SETTINGS[method] for method in config.methods if method != "dpo"), "evaluation"]


def fit(
    folder: DataFolder,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
    room: int,
    skip: bool,
    reward_model: str | None = None,
) -> int:
    """Check the rows of a folder, and leave out those that don't fit if asked to.

    Where a prompt is a text in the template already, the EOS that the template wrote after the answers is taken off:
    it is added when they are encoded.

    Args:
        folder: the data; its lists and notes may change.
        tokenizer: of the models.
        limit: the longest sequence that they read; None for no limit.
        room: maximum tokens of a sampled answer.
        skip: leave out the rows that don't fit, with a note that counts them.
        reward_model: the name of a reward model that was given, if tokenizer and limit are its own: then only what it
            scores must fit, see `SCORED`.

    Returns:
        The length of the longest sequence that a step will see.

    Raises:
        DataError: a row doesn't fit, named by file and line; or with `skip`, no row of a list is left.
    """
    total = sum(len(getattr(folder, name)) for name in LISTS)
    left_out: dict[str, str] = {}  # the place of a row, and the reason
    lists = LISTS if reward_model is None else SCORED
    if reward_model is None:
        _cut_ends(folder, tokenizer)
    for where, reason in _refused(folder, tokenizer, lists):
        if not skip:
            raise DataError(f"{where}: {reason}")
        left_out[where] = reason
    _leave_out(folder, left_out)
    longest = 0
    holds, context = f"the context holds {limit}", f"the context of {limit} tokens"
    advice = "raise --context-length if the model allows it"
    if reward_model is not None:
        holds, context = f"--reward-model {reward_model} reads {limit}", f"{context} of --reward-model {reward_model}"
        advice = "give another reward model"
    for what, where, length in _sequences(folder, tokenizer, room, lists):
        if limit is None or length <= limit:
            longest = max(longest, length)
        elif skip:
            left_out.setdefault(where, f"{what} are longer than {context}")
        else:
            raise DataError(f"{where}: {what} takes {length} tokens, but {holds}; shorten the row, or {advice}")
    _leave_out(folder, left_out)
    if left_out:
        folder.notes.append(counted(str(folder.path), list(left_out.items()), total))
    return longest


def _asked(row: Demonstration | Comparison | Prompt) -> str:
    return row.text if isinstance(row, Prompt) else row.prompt


def _refused(
    folder: DataFolder, tokenizer: PreTrainedTokenizerBase, lists: Collection[str]
) -> Iterator[tuple[str, str]]:
    """The rows whose conversation the template can't write: a system message, or two turns of one role in a row."""
    asked = [(row.where, _asked(row)) for name in lists for row in getattr(folder, name)]
    conversations = [(where, prompt) for where, prompt in asked if isinstance(prompt, Conversation)]
    if _refusal(tokenizer, [prompt for _, prompt in conversations]) is not None:  # which of them?
        reasons = {prompt: _refusal(tokenizer, [prompt]) for _, prompt in conversations}
        yield from ((where, reason) for where, prompt in conversations if (reason := reasons[prompt]) is not None)


def _refusal(tokenizer: PreTrainedTokenizerBase, prompts: list[Conversation]) -> str | None:
    try:
        encode_prompts(tokenizer, prompts)
    except UserError as error:
        return str(error)
    return None


def _leave_out(folder: DataFolder, wheres: Container[str]) -> None:
    for name in LISTS:
        rows = getattr(folder, name)
        kept = [row for row in rows if row.where not in wheres]
        if rows and not kept:
            raise DataError(f"{folder.path}: none of the {name.replace('heldout_', 'held-out ')} fits the model")
        setattr(folder, name, kept)


def _cut_ends(folder: DataFolder, tokenizer: PreTrainedTokenizerBase) -> None:
    done = templated(tokenizer, {_asked(row) for name in LISTS for row in getattr(folder, name)})

    def cut(answer: str) -> str:
        return answer.rstrip().removesuffix(str(tokenizer.eos_token)) or answer

    if done:
        folder.demonstrations = [
            replace(row, completion=cut(row.completion)) if row.prompt in done else row for row in folder.demonstrations
        ]
    for name in ("comparisons", "heldout_comparisons") if done else ():
        rows = [
            replace(row, responses=tuple(map(cut, row.responses))) if row.prompt in done else row
            for row in getattr(folder, name)
        ]
        setattr(folder, name, rows)


def _sequences(
    folder: DataFolder, tokenizer: PreTrainedTokenizerBase, room: int, lists: Collection[str]
) -> Iterator[tuple[str, str, int]]:
    """Every sequence that a step will see: what it is, its file and line, its length in tokens.

    Args:
        folder: the data.
        tokenizer: of the models.
        room: maximum tokens of a sampled answer.
        lists: of the folder that are read.
    """
    demonstrations = folder.demonstrations if "demonstrations" in lists else []
    comparisons = (*(folder.comparisons if "comparisons" in lists else []), *folder.heldout_comparisons)
    for what, rows in (
        ("prompt and completion", [(row.where, row.prompt, row.completion) for row in demonstrations]),
        ("prompt and response", [(row.where, row.prompt, text) for row in comparisons for text in row.responses]),
    ):
        wheres, prompts, answers = zip(*rows, strict=True) if rows else ((), (), ())
        encoded = in_chunks(encode_prompts, tokenizer, prompts), in_chunks(encode_responses, tokenizer, answers)
        for where, prompt, answer in zip(wheres, *encoded, strict=True):
            yield what, where, len(prompt) + len(answer)
    asked = (*folder.prompts, *folder.heldout_prompts)
    for row, ids in zip(asked, in_chunks(encode_prompts, tokenizer, (row.text for row in asked)), strict=True):
        yield f"prompt and an answer of {room} tokens (max-response-tokens)", row.where, len(ids) + room
