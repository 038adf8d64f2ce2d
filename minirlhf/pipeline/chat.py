"""Type an instruction and compare the answers of a run's models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from minirlhf.errors import CheckpointError, UserError, visible
from minirlhf.language.evaluation import EvaluationConfig, answer
from minirlhf.language.forward import context_of
from minirlhf.language.tokenization import encode_prompts, load_tokenizer
from minirlhf.pipeline.folder import POLICIES, Bodies, hide_loading_bars, load_policy, read_config, read_examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHOWN = 200
"""Characters of an example."""
NAMES = {"base": "base", "sft": "SFT", "ppo": "PPO", "ppo_ptx": "PPO-ptx", "rloo": "RLOO", "grpo": "GRPO", "dpo": "DPO"}


def chat(
    run: Path,
    *,
    prompts: Sequence[str] = (),
    temperature: float = 0.7,
    greedy: bool = False,
    max_response_tokens: int | None = None,
    seed: int = 0,
) -> None:
    """Answer instructions with every finished policy of a run, until an empty line.

    Args:
        run: folder of a run; steps that are not finished yet are left out.
        prompts: answer these and stop; without any, ask at the terminal.
        temperature: of sampling.
        greedy: take the most likely token instead.
        max_response_tokens: maximum tokens per answer; None for the limit of the run's evaluation.
        seed: of sampling.

    Raises:
        CheckpointError: the folder is not a run, or has no finished policy.
        UserError: a prompt of `prompts` leaves no room for an answer.
    """
    config = read_config(run)
    hide_loading_bars()
    names = [name for name in POLICIES if (run / name).is_dir()]
    if not names:
        raise CheckpointError(f"{run}: no policy is finished yet; continue the run first")
    device = torch.device("cpu")
    bodies: Bodies = {}  # adapters share one
    models = {name: load_policy(run, name, device, dtype=config.frozen_dtype, bodies=bodies) for name in names}
    tokenizer = load_tokenizer(run / names[0])
    for turn, typed in enumerate(prompts or _typed(run)):
        try:
            asked = ask(models.values(), tokenizer, typed, max_response_tokens or config.evaluation.max_response_tokens)
        except UserError as error:
            if prompts:
                raise
            print(f"({visible(str(error))})")
            continue
        for note in asked.notes:
            print(f"({visible(note)})")
        settings = EvaluationConfig(temperature=temperature, max_response_tokens=asked.room)
        for name in names:
            said = answer(models[name], tokenizer, [asked.prompt], settings, seed=seed + turn, greedy=greedy)
            cut = "" if said.ended[0] else " ..."
            print(f"  {NAMES[name]:>8}  {visible(said.responses[0])}{cut}")


class Asked(NamedTuple):
    """An instruction as the models are asked it."""

    prompt: str
    room: int
    """Maximum tokens of an answer."""
    notes: list[str]
    """What the one who typed it should know."""


def ask(
    models: Iterable[PreTrainedModel], tokenizer: PreTrainedTokenizerBase, typed: str, max_response_tokens: int
) -> Asked:
    """Prepare what was typed for models that read a limited vocabulary and a limited number of tokens.

    Args:
        models: who will be asked.
        tokenizer: theirs.
        typed: the instruction.
        max_response_tokens: maximum tokens per answer, where the models' context has room for them.

    Raises:
        UserError: the prompt leaves no room for an answer, or is not UTF-8.
    """
    if typed != typed.encode(errors="replace").decode():
        raise UserError(f"the prompt {typed} is not UTF-8; type it again")
    # A vocabulary without capitals, such as the small world's, knows more words of a prompt in lower case.
    prompt = min(typed, typed.lower(), key=lambda text: len(_unknown(tokenizer, text)))
    notes = []
    if unknown := _unknown(tokenizer, prompt):
        notes.append(f"these models have no word for: {', '.join(unknown)}")
    context = min(filter(None, map(context_of, models)), default=None)
    length = len(encode_prompts(tokenizer, [prompt])[0])
    room = max_response_tokens if context is None else min(max_response_tokens, context - length)
    if room < 1:
        raise UserError(f"the prompt takes {length} tokens, but the models read {context}, answer included; shorten it")
    if room < max_response_tokens:
        notes.append(f"answers are cut after {room} tokens: the models read {context}, and the prompt takes {length}")
    return Asked(prompt, room, notes)


def _unknown(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[str]:
    """The words that a tokenizer can't encode. The small world's knows a few hundred; a subword one knows all."""
    return [w for w in prompt.split() if tokenizer.unk_token_id in tokenizer(w, add_special_tokens=False)["input_ids"]]


def _typed(run: Path) -> Iterator[str]:
    short = min(read_examples(run), key=len, default="")
    print(f"Type an instruction{f', for example: {visible(short[:SHOWN])}' if short else ''}    (an empty line ends)")
    while True:
        try:
            prompt = input("> ").strip()
        except EOFError:
            return
        if not prompt:
            return
        yield prompt
