"""Puzzles in Triton: the learner writes a kernel as a plain function, the check launches it on tensors.

Triton is the real one where there is a GPU and its interpreter, on numpy, where there is none. The interpreter has to
be switched on before triton is first imported, so lessons take `triton` and `tl` from here. Both are None on a machine
without triton (macOS and Windows): the puzzles then say so, and the lesson goes on with the definitions in PyTorch.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import linecache
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minirlhf_course.checks.exercise import WIDTH, Case, Exercise, Verdict, filled
from minirlhf_course.checks.outcome import Outcome
from minirlhf_course.checks.untouched import is_untouched

__all__ = ["KernelExercise", "guarded", "jit", "loops", "own_kernel", "puzzle", "tl", "triton", "variants", "why_not"]

if importlib.util.find_spec("triton") is not None:
    if not torch.cuda.is_available() and "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    import triton
    import triton.language as tl
else:
    triton = tl = None

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def why_not() -> str:
    """Why kernels can't run in this Python, and what to do about it; empty where they can."""
    if triton is None:
        return "It needs triton, which is there for Linux alone: run this lesson on Linux, in WSL 2, or on Colab."
    if DEVICE == "cpu" and not triton.knobs.runtime.interpret:
        return "Triton was imported before its interpreter was switched on: restart the kernel and run from the top."
    return ""


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or the function as it is on a machine without triton."""
    return function if triton is None else triton.jit(function)


def guarded(x: Tensor, beyond: float, room: int = 8) -> Tensor:
    """x on the device that runs kernels, with `room` numbers `beyond` behind it: what a kernel must not read.

    >>> guarded(torch.ones(2), 7.0).untyped_storage().nbytes() // 4
    10
    """
    memory = torch.full((x.numel() + room,), beyond, dtype=x.dtype, device=DEVICE)
    inside = memory[: x.numel()].view(x.shape)
    return inside.copy_(x)


def untouched_beyond(x: Tensor, beyond: float) -> None:
    """Raises if a kernel has written behind a `guarded` tensor, into what would be somebody else's memory."""
    memory = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,))
    if bool((memory[x.numel() :] != beyond).any()):
        raise IndexError("it wrote behind the last token, into memory that is not its own: the store needs a mask too")


class _Launched:
    """A kernel as the function of tensors that its puzzle asks for."""

    def __init__(self, kernel: Callable[..., Any], launch: Callable[..., Any]) -> None:
        self.kernel = kernel
        self.launch = launch
        self.compiled = jit(kernel)

    @property
    def __code__(self) -> Any:
        return self.kernel.__code__  # faults are shown with the learner's own line

    def __call__(self, *args: Any) -> Any:
        try:
            return self.launch(self.compiled, *args)
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:  # the interpreter wraps what happened inside, once a call
                cause = cause.__cause__
            kind = RuntimeError if isinstance(cause, TypeError) else type(cause)
            text = f"{cause}" if kind is type(cause) else f"{type(cause).__name__}: {cause}"
            raise kind(text).with_traceback(cause.__traceback__) from None


def own_kernel(verdict: Verdict) -> Any:
    """The learner's kernel as `triton.jit` made it, to be launched on other sizes; None until it has passed."""
    launched = verdict.answer
    return launched.compiled if verdict.status == "passed" and isinstance(launched, _Launched) else None


@dataclass(frozen=True, kw_only=True)
class KernelExercise(Exercise):
    """An exercise whose answer is a Triton kernel; `reference` is the definition in plain PyTorch.

    The stub has the kernel's signature, pointers and sizes. What the check returns is called with tensors, like
    `reference`. Suspects are kernels.

    Args:
        kernel: one that is right; its signature and docstring are the stub's.
        launch: launch(kernel, *args of a case) makes room for the results, launches, and returns them on the CPU.
        form: what is wrong with how the kernel is written, from the syntax tree of an answer whose numbers are right;
            None where nothing is. For what numbers can't tell: how often a row is read, whether steps wait.
    """

    kernel: Callable[..., Any]
    launch: Callable[..., Any]
    form: Callable[[ast.AST], str | None] | None = None

    @property
    def stub(self) -> str:
        """The code cell that the learner fills in."""
        names = [f"{name}: tl.constexpr" if name.isupper() else name for name in _parameters(self.kernel)]
        arguments = ", ".join(names)
        if len(f"def my_{self.name}({arguments}):") > WIDTH:
            arguments = "\n" + textwrap.indent("\n".join(filled(arguments, WIDTH - 4)), "    ") + "\n"
        doc = f'"""{inspect.getdoc(self.kernel)}\n"""'
        return f"def my_{self.name}({arguments}):\n{textwrap.indent(doc, '    ')}\n    ...  # your code here"

    def mark(self, answer: object) -> Verdict:
        """The verdict on a kernel, without printing it."""
        answer = answer.answer if isinstance(answer, Verdict) else answer
        answer = answer.kernel if isinstance(answer, _Launched) else answer
        answer = getattr(answer, "fn", answer)  # decorated already
        if answer is self.reference or not callable(answer):
            return super().mark(answer)
        if why_not():
            message = f"{why_not()} The lesson goes on with the definition in PyTorch."
            return Verdict("not attempted", message, self.reference, answer)
        if is_untouched(answer):
            return super().mark(answer)
        if _parameters(answer) != _parameters(self.kernel):
            asked = ", ".join(_parameters(self.kernel))
            return Verdict("failed", f"It can't be launched: its arguments are ({asked}).", self.reference, answer)
        verdict = super().mark(_Launched(answer, self.launch))
        if verdict.status != "passed" or self.form is None:
            return verdict
        # Triton has compiled it, from its text: so there is one.
        problem = self.form(ast.parse(textwrap.dedent(inspect.getsource(answer))))
        return verdict if problem is None else Verdict("failed", problem, self.reference, answer)

    def run(self, function: Callable[..., Any], case: Case) -> Outcome:
        """The outcome of a kernel, or of the reference, on a case."""
        if function is not self.reference and not isinstance(function, _Launched):
            function = _Launched(function, self.launch)
        return super().run(function, case)


def loops(tree: ast.AST) -> int:
    """How many loops a kernel's syntax tree has.

    >>> loops(ast.parse("for i in x:\\n  while y: pass"))
    2
    """
    return sum(isinstance(node, ast.For | ast.While) for node in ast.walk(tree))


def _parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def puzzle(number: str, title: str, **about: Any) -> Callable[[Callable[..., Any]], KernelExercise]:
    """Makes a `KernelExercise` of the definition that it decorates; the arguments are those of `KernelExercise`."""
    return lambda reference: KernelExercise(number, title, reference=reference, **about)


def variants(
    kernel: Callable[..., Any], changes: Mapping[str, Sequence[tuple[str, str]]]
) -> dict[str, Callable[..., Any]]:
    """Wrong kernels made of a right one: the sentence that names a mistake, and the text that makes it.

    Raises:
        ValueError: a text to be replaced is not in the kernel exactly once.
    """
    source = textwrap.dedent(inspect.getsource(kernel))
    made = {}
    for sentence, edits in changes.items():
        text = source
        for old, new in edits:
            if text.count(old) != 1:
                raise ValueError(f"{old!r} must be in {kernel.__name__} once, not {text.count(old)} times")
            text = text.replace(old, new)
        file = f"<{kernel.__name__}: {sentence}>"
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)  # Triton reads the source
        space = dict(kernel.__globals__)
        exec(compile(text, file, "exec"), space)
        made[sentence] = space[kernel.__name__]
    return made
