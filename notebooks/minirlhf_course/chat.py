"""Type an instruction, and several models answer it side by side, as with `minirlhf chat`.

    chat(policies, tokenizer, "tell me a story about a frog")

The table of answers stays in the stored lesson. In JupyterLab there is a box below it for the next instruction.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ipywidgets

from minirlhf.errors import UserError
from minirlhf.language.evaluation import EvaluationConfig, answer
from minirlhf.pipeline.chat import ask
from minirlhf_course.plotting import NAMES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["answers", "chat"]

TEMPERATURE = 0.7
"""`minirlhf chat`'s."""
EMPTY = "Nothing was typed: write an instruction, such as: write a story about a frog"
HINT = "Type an instruction and press the button (with the mouse, or Tab and Enter): the answers appear here."

Models = Mapping[str, "PreTrainedModel"]


def answers(
    models: Models, tokenizer: PreTrainedTokenizerBase, instruction: str, seed: int = 0
) -> tuple[list[str], dict[str, str]]:
    """What to know about an instruction, and each model's answer to it, by the model's name.

    An instruction that can't be answered, an empty one or one that leaves no room for an answer, has no answers, and
    one sentence says why. An answer that was cut before its end has three dots behind it.

    Args:
        models: who answers, by name.
        tokenizer: theirs.
        instruction: what was typed.
        seed: of the sampling.
    """
    if not instruction.strip():
        return [EMPTY], {}
    try:
        asked = ask(models.values(), tokenizer, instruction.strip(), EvaluationConfig().max_response_tokens)
    except UserError as error:
        return [f"No answer: {error}"], {}
    settings = EvaluationConfig(temperature=TEMPERATURE, max_response_tokens=asked.room)
    said = {name: answer(model, tokenizer, [asked.prompt], settings, seed=seed) for name, model in models.items()}
    return asked.notes, {NAMES.get(name, name): x.responses[0] + " ..." * (not x.ended[0]) for name, x in said.items()}


def chat(models: Models, tokenizer: PreTrainedTokenizerBase, instruction: str) -> None:
    """Show each model's answer to an instruction, and below, in JupyterLab, a box to type the next one.

    Args:
        models: who answers, by name.
        tokenizer: theirs.
        instruction: the first one.
    """
    from IPython.display import display

    notes, said = answers(models, tokenizer, instruction)
    width = max(map(len, said), default=0)
    lines = [
        instruction,
        *(f"({note})" for note in notes),
        *(f"{name:>{width}}  {text}" for name, text in said.items()),
    ]
    display({"text/plain": "\n".join(lines), "text/html": _page(instruction, notes, said)}, raw=True)

    typed = ipywidgets.Text(
        placeholder="an instruction, such as: explain bread to a pirate",
        description="instruction",
        layout={"width": "min(100%, 44em)"},
    )
    button, below, turn = ipywidgets.Button(description="ask"), ipywidgets.HTML(HINT), 0

    def answer_it(_: Any) -> None:
        nonlocal turn
        turn += 1
        below.value = _page(typed.value, *answers(models, tokenizer, typed.value, seed=turn))

    button.on_click(answer_it)
    display(ipywidgets.VBox([typed, button, below]))


def _page(instruction: str, notes: list[str], said: dict[str, str]) -> str:
    """A table. What was typed and what models say is text: no markup in it is read, nor any mathematics."""

    def text(what: str) -> str:
        return f'<pre style="margin:0;white-space:pre-wrap;text-align:left">{html.escape(what)}</pre>'

    rows = "".join(
        f'<tr><th style="text-align:right">{html.escape(name)}</th><td style="text-align:left">{text(what)}</td></tr>'
        for name, what in said.items()
    )
    return f"{text(instruction)}{''.join(text(f'({note})') for note in notes)}<table>{rows}</table>"
