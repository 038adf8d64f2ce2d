"""The package's code in a lesson, as it runs: nothing in a lesson is a copy that could grow old."""

from __future__ import annotations

import importlib
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

__all__ = ["show_source", "source_of"]


def source_of(function: Callable[..., Any], first: str = "", last: str = "") -> str:
    """The text of a function without its docstring, or of a part of it.

    Args:
        function: any function.
        first: begin with the line that holds this; left out: with the function's first line.
        last: end with the next line that holds this; left out: with the function's last line.

    Raises:
        ValueError: no line holds `first`, or none after it `last`.

    Example:
        >>> print(source_of(source_of, first="lines =", last="lines ="))
        lines = text.splitlines()
    """
    text = inspect.getsource(function)
    if function.__doc__:
        before, _, rest = text.partition('"""')
        text = before.rstrip() + rest.partition('"""')[2]
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if first in line), None)
    end = None if begin is None else next((i for i in range(begin, len(lines)) if last in lines[i]), None)
    if begin is None or end is None:
        raise ValueError(f"{function.__name__} has no lines from {first!r} to {last!r}")
    return textwrap.dedent("\n".join(lines[begin : end + 1 if last else None]))


def show_source(function: Callable[..., Any], first: str = "", last: str = "") -> None:
    """Show the text of a function in a notebook, coloured; see `source_of`."""
    display = importlib.import_module("IPython.display")
    display.display(display.Markdown(f"```python\n{source_of(function, first, last)}\n```"))
