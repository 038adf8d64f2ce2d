"""What a function did on one case, whether that is what another did, and how to say so in short."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

LONGEST = 16
"""A tensor with more numbers is shown by its shape and the first place that differs."""


@dataclass
class Outcome:
    """The result, the gradient of each of its tensors into each leaf, and the fault that makes both worthless."""

    result: Any = None
    gradients: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    fault: str | None = None


class _Count(TorchDispatchMode):
    """Counts the tensor operations inside."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


def run_on(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    names: Sequence[str],
    leaves: Sequence[str],
    observe: Callable[[Any, tuple[Any, ...]], Any] | None,
    limit: int | None,
) -> Outcome:
    """Run a function on copies of the arguments, with a seeded generator, and watch what it does to them."""
    sources = {name: x.detach().clone().requires_grad_() for name, x in zip(names, args, strict=True) if name in leaves}
    # Not the leaf itself but a copy of it: writing into that is found below, in words of our own.
    given = [
        sources[name].clone() if name in sources else x.clone() if isinstance(x, Tensor) else x
        for name, x in zip(names, args, strict=True)
    ]
    count = _Count()
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), nullcontext() if limit is None else count:
        torch.manual_seed(0)
        try:
            result = function(*given)
        except Exception as error:  # whatever a learner's code may raise becomes the verdict
            return Outcome(fault=_raised(error, function, names))
    for name, before, after in zip(names, args, given, strict=True):
        if isinstance(before, Tensor) and not _equal(before, after.detach(), 0.0):
            fault = (
                f"It writes into its argument `{name}`: the caller's tensor has changed. Work on a copy: {name}.clone()"
            )
            return Outcome(fault=fault)
    if result is None:
        return Outcome(fault="It returns None: is there a `return` at its end?")
    if limit is not None and count.operations > limit:
        fault = f"It takes {count.operations} tensor operations where {limit} are enough: no loop over the time steps."
        return Outcome(fault=fault)
    seen = result if observe is None else observe(result, args)
    if isinstance(seen, str):
        return Outcome(fault=seen)
    return Outcome(seen, _gradients(result, sources))


def _gradients(result: Any, sources: dict[str, Tensor]) -> dict[tuple[int, str], Tensor]:
    found = {}
    for index, output in enumerate(_flat(result)):
        if not isinstance(output, Tensor) or not output.is_floating_point():
            continue
        # Unequal weights: a gradient that is right only in the sum is not right.
        weights = torch.linspace(1.0, 2.0, output.numel(), dtype=output.dtype).reshape(output.shape)
        for name, source in sources.items():
            gradient = None
            if output.requires_grad:
                (gradient,) = torch.autograd.grad(
                    (output * weights).sum(), source, retain_graph=True, allow_unused=True
                )
            found[index, name] = torch.zeros_like(source) if gradient is None else gradient
    return found


def _raised(error: Exception, function: Callable[..., Any], names: Sequence[str]) -> str:
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    code = getattr(function, "__code__", None)
    where = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code is code]
    if code is not None and not where and isinstance(error, TypeError):
        return f"It can't be called with ({', '.join(names)}), as the stub can. {line}"
    frames = [
        entry for entry in traceback.extract_tb(error.__traceback__) if code and entry.filename == code.co_filename
    ]
    if frames:
        source = frames[-1].line or linecache.getline(frames[-1].filename, frames[-1].lineno or 0).strip()
        return f"It raises {line}\n    in the line: {source}"
    return f"It raises {line}"


def _flat(result: Any) -> list[Any]:
    return list(result) if isinstance(result, tuple | list) else [result]


def _equal(x: Tensor, y: Tensor, rtol: float | None) -> bool:
    if rtol is None:
        rtol = 1e-8 if y.dtype == torch.float64 else 1e-4
    if not x.is_floating_point():
        return bool((x == y).all())
    # A small number beside large ones may be off by as much as they: unless the case asks for more.
    scale = y[y.isfinite()].abs().max().item() if bool(y.isfinite().any()) else 0.0
    return torch.allclose(x, y, rtol=rtol, atol=1e-3 * rtol * scale, equal_nan=True)


def same(got: Outcome, expected: Outcome, rtol: float | None) -> bool:
    """Whether two functions did the same: types, shapes, numbers and gradients."""
    return compare(got, expected, rtol) is None


def compare(got: Outcome, expected: Outcome, rtol: float | None) -> str | None:
    """What is wrong with an outcome, in a sentence; None if nothing is."""
    if got.fault or expected.fault:
        return None if got.fault == expected.fault else got.fault or expected.fault
    ours, theirs = _flat(got.result), _flat(expected.result)
    if len(ours) != len(theirs) or isinstance(got.result, tuple | list) != isinstance(expected.result, tuple | list):
        return f"It returns {_kind(got.result)}, not {_kind(expected.result)}."
    place = [f"result {i} of {len(theirs)}" if len(theirs) > 1 else "the result" for i in range(1, len(theirs) + 1)]
    for where, x, y in zip(place, ours, theirs, strict=True):
        problem = _compare_one(where, x, y, rtol)
        if problem:
            return problem
    for (index, name), y in expected.gradients.items():
        x = got.gradients[index, name]
        if _equal(x, y, rtol):
            continue
        if not x.any():
            return (
                f"No gradient flows from {place[index]} into `{name}`, and there should be one: was it detached, "
                f"turned "
                "into a number, or made under no_grad?"
            )
        if not y.any():
            return f"A gradient flows from {place[index]} into `{name}`, which is a constant here: use {name}.detach()."
        return f"The numbers of {place[index]} are right, and its gradient into `{name}` is not."
    return None


def _compare_one(where: str, x: Any, y: Any, rtol: float | None) -> str | None:
    if not isinstance(y, Tensor):
        if isinstance(x, Tensor) and x.numel() == 1:
            x = x.item()
        if not isinstance(x, int | float):
            return _sentence(f"{where} is {_kind(x)}, not {_kind(y)}.")
        close = abs(x - y) <= (1e-8 if rtol is None else rtol) * max(1.0, abs(y))
        return None if close else _sentence(f"{where} is not right.")
    if not isinstance(x, Tensor):
        return _sentence(f"{where} is {_kind(x)}, not a tensor.")
    if x.shape != y.shape:
        return _sentence(f"{where} has the shape {tuple(x.shape)}, not {tuple(y.shape)}.")
    if x.dtype != y.dtype:
        make = "make new tensors with zeros_like of an argument" if y.is_floating_point() else "look at its type"
        return _sentence(f"{where} is {_dtype(x)}, not {_dtype(y)} as its arguments ask for: {make}.")
    return None if _equal(x.detach(), y.detach(), rtol) else _sentence(f"{where} is not right.")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _kind(x: Any) -> str:
    if isinstance(x, tuple | list):
        return f"{len(x)} results"
    return "one tensor" if isinstance(x, Tensor) else f"a {type(x).__name__}"


def show(x: Any) -> str:
    """A value in short.

    >>> show(torch.tensor([[0.5, 1 / 3]])), show(torch.zeros(9, 9)), show(0.99)
    ('[[0.5, 0.3333]]', 'float32 of shape (9, 9)', '0.99')
    """
    if isinstance(x, tuple | list):
        return "(" + ", ".join(show(item) for item in x) + ")"
    if isinstance(x, Tensor):
        if x.numel() > LONGEST:
            return f"{_dtype(x)} of shape {tuple(x.shape)}"
        return _rounded(x.tolist())
    if isinstance(x, float):
        return f"{x:.6g}"
    return getattr(x, "__name__", str(x))


def _rounded(x: Any) -> str:
    if isinstance(x, list):
        return "[" + ", ".join(_rounded(item) for item in x) + "]"
    return f"{x:.4g}" if isinstance(x, float) else str(x)


def describe(
    name: str, names: Sequence[str], args: Sequence[Any], got: Outcome, expected: Outcome, problem: str | None
) -> str:
    """The smallest failing case: what went in, what was expected, what came."""
    lines = [f"Smallest failing case: {name}"]
    width = max(len(word) for word in (*names, "expected"))
    lines += [f"  {word:<{width}} = {show(x)}" for word, x in zip(names, args, strict=True)]
    if got.fault:
        return "\n".join(lines)
    lines += [f"  {'expected':<{width}} = {show(expected.result)}", f"  {'got':<{width}} = {show(got.result)}"]
    ours, theirs = _flat(got.result), _flat(expected.result)
    for x, y in zip(ours, theirs, strict=False):
        if isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and y.numel() > LONGEST:
            places = (~torch.isclose(x.detach().double(), y.detach().double(), rtol=1e-4, equal_nan=True)).nonzero()
            if len(places):
                at = tuple(places[0].tolist())
                lines.append(f"  first at {list(at)}: expected {y[at].item():.4g}, got {x[at].item():.4g}")
                break
    if problem and "radient" in problem:
        for (index, leaf), y in expected.gradients.items():
            x = got.gradients.get((index, leaf))
            if x is not None and (x.shape != y.shape or not torch.allclose(x, y, rtol=1e-4)):
                which = f" of result {index + 1}" if len(theirs) > 1 else ""
                lines.append(f"  gradient{which} into {leaf}: expected {show(y)}, got {show(x)}")
                break
    return "\n".join(lines)
