"""What a function did on one case, and whether that is what another did."""

from __future__ import annotations

import linecache
import re
import traceback
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

TOLERANCE = 1e-5
"""How far off a right answer may be, relative to what is expected: float32 is enough, an epsilon of 1e-8 too."""

Place = tuple[int, str]
"""Which result, and which argument its gradient flows into."""


@dataclass
class Outcome:
    """What a function did on a case.

    Attributes:
        result: what is compared: what it returned, or what an exercise's `observe` saw in that.
        gradients: of each tensor it returned into each leaf.
        fault: makes all else worthless.
        labels: what each result is, in words; empty where they are what the function returned.
        cut: the places between which nothing connects result and leaf, not even a gradient of 0.
        returned: what it returned.
    """

    result: Any = None
    gradients: dict[Place, Tensor] = field(default_factory=dict)
    fault: str | None = None
    labels: tuple[str, ...] = ()
    cut: set[Place] = field(default_factory=set)
    returned: Any = None

    @property
    def places(self) -> list[str]:
        """What to call each result."""
        count = len(flat(self.result))
        numbered = [f"result {i} of {count}" for i in range(1, count + 1)]
        return list(self.labels) or (numbered if count > 1 else ["the result"])


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
    counted = nullcontext() if limit is None else count
    # A suspect that divides by zero is no news to the learner: what counts is said in the verdict.
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), warnings.catch_warnings(), counted:
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            result = function(*given)
        except Exception as error:  # whatever a learner's code may raise becomes the verdict
            narrow = tuple(x.float() if isinstance(x, Tensor) and x.dtype == torch.float64 else x for x in args)
            if _MIXED.search(str(error)) and any(x is not y for x, y in zip(args, narrow, strict=True)):
                # The cases are float64, and it makes float32 tensors of its own: it is right if it is right in float32.
                again = run_on(function, narrow, names, leaves, observe, limit)
                if again.fault is None:
                    return again
            return Outcome(fault=raised(error, function, names))
    for name, before, after in zip(names, args, given, strict=True):
        if isinstance(before, Tensor) and not equal(before, after.detach(), 0.0):
            fault = (
                f"It writes into its argument `{name}`: the caller's tensor has changed. Work on a copy: {name}.clone()"
            )
            return Outcome(fault=fault)
    if result is None:
        return Outcome(fault="It returns None: is there a `return` at its end?")
    if limit is not None and count.operations > limit:
        fault = f"It takes {count.operations} tensor operations where {limit} are enough: no loop over the time steps."
        return Outcome(fault=fault)
    seen = observed(result, args, observe)
    seen.gradients, seen.cut = _gradients(result, sources)
    return seen


_MIXED = re.compile(r"dtype|scalar type|Float|Double")


def observed(returned: Any, args: tuple[Any, ...], observe: Callable[[Any, tuple[Any, ...]], Any] | None) -> Outcome:
    """What is compared of a result: itself, or what `observe` makes of it (a fault, or numbers by what they are)."""
    if observe is None:
        return Outcome(returned, returned=returned)
    seen = observe(returned, args)
    if isinstance(seen, str):
        return Outcome(fault=seen, returned=returned)
    return Outcome(tuple(seen.values()), labels=tuple(seen), returned=returned)


def _gradients(result: Any, sources: dict[str, Tensor]) -> tuple[dict[Place, Tensor], set[Place]]:
    found, cut = {}, set()
    for index, output in enumerate(flat(result)):
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
            if gradient is None:
                cut.add((index, name))
            found[index, name] = torch.zeros_like(source) if gradient is None else gradient
    return found, cut


def raised(error: Exception, function: Callable[..., Any], names: Sequence[str]) -> str:
    """What an answer raised, and in which of its lines."""
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


def flat(result: Any) -> list[Any]:
    return list(result) if isinstance(result, tuple | list) else [result]


def equal(x: Tensor, y: Tensor, rtol: float | None) -> bool:
    """Whether x is y, whatever the types they are stored in."""
    if x.shape != y.shape or x.is_complex() != y.is_complex():
        return False
    return bool(close(x.double(), y.double(), rtol).all())


def close(x: Tensor, y: Tensor, rtol: float | None) -> Tensor:
    scale = y[y.isfinite()].abs().max().item() if bool(y.isfinite().any()) else 0.0
    # A small number beside large ones may be off by as much as they are: unless the case asks for more.
    atol = 0.1 * TOLERANCE * max(1.0, scale) if rtol is None else 1e-3 * rtol * scale
    return torch.isclose(x, y, rtol=TOLERANCE if rtol is None else rtol, atol=atol, equal_nan=True)


def same(got: Outcome, expected: Outcome, rtol: float | None) -> bool:
    """Whether two functions did the same: shapes, numbers and gradients."""
    return compare(got, expected, rtol) is None


def compare(
    got: Outcome, expected: Outcome, rtol: float | None, constants: Collection[Place] = frozenset()
) -> str | None:
    """What is wrong with an outcome, in a sentence; None if nothing is.

    constants are the places where no case of the exercise has a gradient.
    """
    if got.fault or expected.fault:
        return None if got.fault == expected.fault else got.fault or expected.fault
    ours, theirs = flat(got.result), flat(expected.result)
    if len(ours) != len(theirs) or isinstance(got.result, tuple | list) != isinstance(expected.result, tuple | list):
        return f"It returns {_kind(got.result)}, not {_kind(expected.result)}."
    rows = list(zip(expected.places, ours, theirs, strict=True))
    for find in (_not_finite, _not_equal):
        for where, x, y in rows:
            problem = find(where, x, y, rtol)
            if problem:
                return _sentence(problem)
    for place, y in expected.gradients.items():
        problem = _gradient_problem(place, got, expected.places[place[0]], y, rtol, constants)
        if problem:
            return problem
    return None


def _gradient_problem(
    place: Place, got: Outcome, where: str, y: Tensor, rtol: float | None, constants: Collection[Place]
) -> str | None:
    name = place[1]
    x = got.gradients.get(place)
    connected = x is not None and place not in got.cut
    if x is None or not connected:
        if not y.any():
            return None
        return (
            f"No gradient flows from {where} into `{name}`, and there should be one: was it detached, turned "
            "into a number, or made under no_grad?"
        )
    if equal(x, y, rtol):
        return None
    if not x.isfinite().all() and y.isfinite().all():
        return (
            f"The numbers of {where} are right, and its gradient into `{name}` is {_which(x)}: some step has an "
            "infinite or undefined derivative, and torch.where or a product with 0 afterwards does not remove it."
        )
    if place in constants:
        return f"A gradient flows from {where} into `{name}`, which is a constant here: use {name}.detach()."
    off = _precision(x.double(), y.double(), rtol)
    return f"The numbers of {where} are right, and its gradient into `{name}` is not.{off}"


def number(x: Any) -> Tensor | None:
    """A result as a tensor; None for what holds no numbers."""
    if isinstance(x, Tensor):
        return x.detach().cpu()
    return torch.as_tensor(x) if isinstance(x, bool | int | float) or hasattr(x, "__array__") else None


def _not_finite(where: str, x: Any, y: Any, rtol: float | None) -> str | None:
    x, y = number(x), number(y)
    if x is None or y is None or x.is_complex():
        return None
    bad = ~x.isfinite()
    if x.shape == y.shape:
        bad = bad & y.isfinite()
    elif not y.isfinite().all():
        return None
    if not bad.any():
        return None
    causes = {
        "NaN": "look for 0 / 0, inf - inf, 0 * inf, or the log or root of a negative number",
        "infinite": "look for a division by 0, the log of 0, or an exp that overflows",
    }
    which = _which(x[bad])
    return f"{where} is {which} where a number is expected: {causes[which]}."


def _which(x: Tensor) -> str:
    return "NaN" if bool(x.isnan().any()) else "infinite"


def _not_equal(where: str, x: Any, y: Any, rtol: float | None) -> str | None:
    given, wanted, x, y = x, y, number(x), number(y)
    if x is None or y is None:
        return None if x is y and given == y else f"{where} is {_kind(given)}, not a tensor or a number."
    if not isinstance(wanted, Tensor) and x.numel() == 1:
        x = x.reshape(())
    if x.shape != y.shape:
        if not isinstance(given, Tensor) and not x.shape:
            return f"{where} is a single number, not a tensor of the shape {tuple(y.shape)}."
        return f"{where} has the shape {tuple(x.shape)}, not {tuple(y.shape)}."
    return None if equal(x, y, rtol) else f"{where} is not right.{_precision(x.double(), y.double(), rtol)}"


def _precision(x: Tensor, y: Tensor, rtol: float | None) -> str:
    """What to say of numbers that are wrong only in digits that are not printed; nothing of others."""
    allowed = TOLERANCE if rtol is None else rtol
    if not (allowed <= 1e-3 and bool(torch.isclose(x, y, rtol=1e-3, atol=0.0, equal_nan=True).all())):
        return ""
    return (
        f" It is close: off by up to {largest(x, y):.2g}, where about {allowed:g} of the result is allowed. If the "
        "formula is right, look for what costs precision: an epsilon, a rounded constant, digits that cancel, too few "
        "steps."
    )


def largest(x: Tensor, y: Tensor) -> float:
    return float((x - y).abs().nan_to_num(0.0).max())


def conform(result: Any, pattern: Any, args: Sequence[Any]) -> Any:
    """A right result in the types of the pattern's: a mask as bool, ids as integers, a Python float as a tensor.

    What needs no change comes back as it is.
    """
    if isinstance(pattern, tuple):
        return tuple(conform(x, y, args) for x, y in zip(result, pattern, strict=True))
    if not isinstance(pattern, Tensor):
        return result if type(result) is type(pattern) else type(pattern)(result)
    floating = pattern.is_floating_point()
    if isinstance(result, Tensor) and (result.dtype == pattern.dtype or (floating and result.is_floating_point())):
        return result
    given = [x.dtype for x in args if isinstance(x, Tensor) and x.is_floating_point()]
    return torch.as_tensor(result).to(given[0] if floating and given else pattern.dtype)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _kind(x: Any) -> str:
    if isinstance(x, tuple | list):
        return f"{len(x)} results" if len(x) != 1 else "a tuple of one result"
    return "one tensor" if isinstance(x, Tensor) else f"a {type(x).__name__}"
