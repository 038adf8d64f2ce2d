"""How a failing case is shown: what went in, what was expected, what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minirlhf_course.checks.outcome import Outcome, close, equal, flat, largest, number

LONGEST = 16
"""A tensor with more numbers is shown by its shape and the first place that differs."""
LONGEST_TEXT = 200
"""Whatever has a longer one (a model, a folder of rows) is shown by its type."""


def show(x: Any) -> str:
    """A value in short.

    >>> show(torch.tensor([[0.5, 1 / 3]])), show(torch.zeros(9, 9)), show(0.99)
    ('[[0.5, 0.3333]]', 'float32 of shape (9, 9)', '0.99')
    """
    if isinstance(x, tuple | list):
        return "(" + ", ".join(show(item) for item in x) + ")"
    if isinstance(x, Tensor):
        if x.numel() > LONGEST:
            return f"{dtype_name(x)} of shape {tuple(x.shape)}"
        return _rounded(x.tolist())
    if isinstance(x, float):
        return f"{x:.6g}"
    text = getattr(x, "__name__", str(x))
    return text if len(text) <= LONGEST_TEXT else f"a {type(x).__name__}"


def _rounded(x: Any) -> str:
    if isinstance(x, list):
        return "[" + ", ".join(_rounded(item) for item in x) + "]"
    return f"{x:.4g}" if isinstance(x, float) else str(x)


def describe(
    name: str,
    names: Sequence[str],
    args: Sequence[Any],
    got: Outcome,
    expected: Outcome,
    problem: str | None,
    rtol: float | None,
) -> str:
    """The smallest failing case: what went in, what was expected, what came."""
    lines = [f"Smallest failing case: {name}"]
    width = max(len(word) for word in (*names, "expected"))
    lines += [f"  {word:<{width}} = {show(x)}" for word, x in zip(names, args, strict=True)]
    if got.fault:
        return "\n".join(lines)
    ours, theirs = flat(got.result), flat(expected.result)
    if expected.labels:
        for label, x, y in zip(expected.labels, ours, theirs, strict=True):
            if show(x) != show(y):
                lines.append(f"  {label}: expected {show(y)}, got {show(x)}")
        return "\n".join(lines)
    lines += [f"  {'expected':<{width}} = {show(expected.result)}", f"  {'got':<{width}} = {show(got.result)}"]
    for x, y in zip(map(number, ours), map(number, theirs), strict=False):
        if x is None or y is None or x.shape != y.shape or equal(x, y, rtol):
            continue
        x, y = x.double(), y.double()
        if y.numel() > LONGEST:
            at = tuple((~close(x, y, rtol)).nonzero()[0].tolist())
            wanted, came = _digits(y[at].item(), x[at].item())
            lines.append(f"  first at {list(at)}: expected {wanted}, got {came}")
        elif show(x) == show(y):
            lines.append(f"  {'difference':<{width}} = up to {largest(x, y):.2g}")
        break
    if problem and "radient" in problem:
        for (index, leaf), y in expected.gradients.items():
            x = got.gradients.get((index, leaf))
            x = torch.zeros_like(y) if x is None else x
            if not equal(x, y, rtol):
                which = f" of result {index + 1}" if len(theirs) > 1 else ""
                alike = f", difference up to {largest(x.double(), y.double()):.2g}" if show(x) == show(y) else ""
                lines.append(f"  gradient{which} into {leaf}: expected {show(y)}, got {show(x)}{alike}")
                break
    return "\n".join(lines)


def _digits(x: float, y: float) -> tuple[str, str]:
    """Both with as many digits as it takes to tell them apart.

    >>> _digits(0.123456789, 0.123456123), _digits(1.0, 2.0)
    (('0.123457', '0.123456'), ('1', '2'))
    """
    for digits in range(4, 17):
        if f"{x:.{digits}g}" != f"{y:.{digits}g}":
            break
    return f"{x:.{digits}g}", f"{y:.{digits}g}"


def dtype_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
