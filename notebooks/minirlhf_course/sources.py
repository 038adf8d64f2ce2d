"""Shows the package's own lines in a lesson."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any


def show_source(function: Callable[..., Any], first: str = "", last: str = "", width: int = 100) -> None:
    """Print a function without its docstring, or its lines from one that holds `first` to one that holds `last`.

    >>> show_source(textwrap.indent, "def ", "def ")
    def indent(text, prefix, predicate=None):
    """
    source = textwrap.dedent(inspect.getsource(function))
    lines = re.sub(r'\n +r?""".*?"""', "", source, count=1, flags=re.S).rstrip().splitlines()
    start = next(place for place, line in enumerate(lines) if first in line)
    kept = lines[start:]
    if last:
        kept = kept[: next(place for place, line in enumerate(kept) if last in line) + 1]
    for line in textwrap.dedent("\n".join(kept)).splitlines():
        print(textwrap.fill(line, width, subsequent_indent=" " * 12, break_on_hyphens=False) if line.strip() else "")
