"""What a lesson shows of the package is the package's own text, whole or in part, and without the docstring."""

from __future__ import annotations

import inspect

import pytest
from minirlhf_course.source import show_source, source_of

from minirlhf.control.reinforce import train_reinforce


def plain(x: int) -> int:
    y = x + 1
    # a comment
    for _ in range(2):
        y *= 2
    return y


def told(x: int) -> int:
    """Gives x.

    In two lines.
    """
    return x


def test_a_function_without_its_docstring():
    assert source_of(plain) == inspect.getsource(plain).rstrip()
    assert source_of(told) == "def told(x: int) -> int:\n    return x"


def test_a_part_of_a_function_begins_at_the_margin():
    assert source_of(plain, first="# a comment", last="y *=") == "# a comment\nfor _ in range(2):\n    y *= 2"
    assert source_of(plain, first="return") == "return y"


@pytest.mark.parametrize(("first", "last"), [("no such line", ""), ("return", "# a comment")])
def test_a_part_that_is_not_there_is_an_error(first, last):
    with pytest.raises(ValueError, match="plain has no lines"):
        source_of(plain, first, last)


def test_every_line_of_a_learner_is_shown(capsys):
    shown, source = source_of(train_reinforce), inspect.getsource(train_reinforce)
    assert "optimizer.step()" in shown and train_reinforce.__doc__.splitlines()[0] not in shown
    assert all(line in source for line in shown.splitlines())
    show_source(train_reinforce)
    assert "Markdown" in capsys.readouterr().out
