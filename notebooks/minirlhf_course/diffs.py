"""How two functions of the package differ, as a diff that a lesson shows."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

__all__ = ["difference"]


def difference(first: Callable[..., Any], second: Callable[..., Any]) -> str:
    """What must be done to the body of the first to get the second's, as Markdown: + new lines, - those that go.

    Example:
        >>> from minirlhf.control.reinforce import train_reinforce, train_reinforce_with_baseline
        >>> shown = difference(train_reinforce, train_reinforce_with_baseline)
        >>> "+    policy, values = run.networks" in shown.splitlines()
        True
    """
    before, after = (inspect.getsource(f).split('"""')[2].strip("\n").splitlines() for f in (first, second))
    lines = list(difflib.unified_diff(before, after, lineterm="", n=1))[2:]  # without the names of two files
    return "```diff\n" + "\n".join(lines) + "\n```"
