"""The chat cell: several models side by side, whatever was typed and whatever they say is text."""

from __future__ import annotations

from typing import Any

import IPython.display
import ipywidgets
import pytest
from minirlhf_course import chat as module
from minirlhf_course.chat import EMPTY, HINT, answers, chat
from minirlhf_course.studios.text_probes import fresh, tokenizer

from minirlhf.language.evaluation import Answers, EvaluationConfig, answer

HOSTILE = "<script>alert(1)</script> <img src=x onerror=alert(1)> $x^2$ & </pre>"
CONTEXT = 64


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {"base": fresh(0), "ppo_ptx": fresh(1), "a <b>model": fresh(2)}


@pytest.fixture
def shown(monkeypatch) -> list[Any]:
    shown: list[Any] = []
    monkeypatch.setattr(IPython.display, "display", lambda what, **_: shown.append(what))
    return shown


def test_each_model_answers_as_minirlhf_chat_would(models) -> None:
    notes, said = answers(models, tokenizer(), "Tell me about the moon", seed=3)
    assert notes == [] and list(said) == ["base", "PPO-ptx", "a <b>model"]
    settings = EvaluationConfig(temperature=0.7)
    for model, text in zip(models.values(), said.values(), strict=True):
        own = answer(model, tokenizer(), ["tell me about the moon"], settings, seed=3)
        assert text == own.responses[0] + ("" if own.ended[0] else " ...")
    assert answers(models, tokenizer(), "tell me about the moon", seed=4)[1] != said


@pytest.mark.parametrize("typed", ["", "   \n"])
def test_nothing_typed_is_told_so(models, typed) -> None:
    assert answers(models, tokenizer(), typed) == ([EMPTY], {})


def test_an_instruction_longer_than_the_context_gets_one_sentence(models) -> None:
    (note,), said = answers(models, tokenizer(), "moon " * CONTEXT)
    assert said == {} and note.startswith("No answer: the prompt takes ") and f"read {CONTEXT}" in note
    notes, said = answers(models, tokenizer(), "moon " * (CONTEXT - 10))
    assert [note.partition(":")[0] for note in notes] == ["answers are cut after 10 tokens"] and len(said) == len(
        models
    )


def test_the_table_is_text_also_where_it_looks_like_markup(models, shown, monkeypatch) -> None:
    monkeypatch.setattr(module, "answer", lambda *_, **__: Answers([HOSTILE], [True], [1], []))
    chat(models, tokenizer(), HOSTILE)
    table, box = shown
    typed, button, below = box.children
    assert isinstance(typed, ipywidgets.Text) and below.value == HINT
    typed.value = HOSTILE
    button.click()
    for page in (table["text/html"], below.value):
        assert page.count("&lt;script&gt;") == 1 + 1 + len(models), "the instruction, the unknown words, the answers"
        assert not [tag for tag in ("<script", "<img", "<b>") if tag in page]
        outside = "".join(part.partition("</pre>")[2] for part in page.split("<pre"))
        assert "$" not in outside, "mathematics is set everywhere but in <pre>"
    assert HOSTILE in table["text/plain"] and table["text/plain"].count("\n") == 1 + len(models)


def test_the_button_answers_what_was_typed_and_again_with_other_answers(models, shown) -> None:
    chat(models, tokenizer(), "sad today")
    typed, button, below = shown[1].children
    typed.value = "tell me about the moon"
    button.click()
    first = below.value
    assert "tell me about the moon" in first and "PPO-ptx" in first
    button.click()
    assert below.value != first
    typed.value = ""
    button.click()
    assert EMPTY in below.value and "<td" not in below.value
