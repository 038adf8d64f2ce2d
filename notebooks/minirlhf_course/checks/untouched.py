"""Whether a stub was left as it was: a body of `...`, `pass` or `raise NotImplementedError` and nothing else."""

from __future__ import annotations

import dis
from collections.abc import Callable
from typing import Any

_SILENT = {"RESUME", "NOP", "CACHE", "PUSH_NULL", "PRECALL", "COPY_FREE_VARS", "MAKE_CELL", "EXTENDED_ARG"}


def is_untouched(function: Callable[..., Any]) -> bool:
    """True for a Python function that does nothing at all; a half-written one that fails is not untouched.

    >>> def stub(x):
    ...     "What it should do."
    ...     ...
    >>> is_untouched(stub), is_untouched(lambda x: x)
    (True, False)
    """
    code = getattr(function, "__code__", None)
    if code is None:
        return False
    steps = [step for step in dis.get_instructions(code) if step.opname not in _SILENT]
    names = [step.opname for step in steps]
    if all(name in ("LOAD_CONST", "RETURN_CONST", "RETURN_VALUE") for name in names):
        return all(step.argval in (None, ...) for step in steps if step.opname != "RETURN_VALUE")
    raises = names[0].startswith("LOAD_") and steps[0].argval == "NotImplementedError" and names[-1] == "RAISE_VARARGS"
    # `raise NotImplementedError` or `raise NotImplementedError("text")`, and nothing before it.
    return raises and all(name in ("LOAD_CONST", "CALL", "KW_NAMES") for name in names[1:-1])
