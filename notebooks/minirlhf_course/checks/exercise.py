"""The machine behind the checks: an `Exercise` runs an answer on its cases and names what went wrong.

1. The answer and the reference run on every case, hand-worked ones first, then random ones of many sizes.
2. Where they differ, the exercise's *suspects* run too: the mistakes that others made, each a small function. If one of
   them gives just what the answer gave on every case, its sentence is the verdict. If one does so on the smallest
   failing case alone, that may be chance: its sentence is a hint below the verdict. That case is shown either way.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import update_wrapper
from typing import Any

from torch import Tensor

from minirlhf_course.checks.outcome import Outcome, compare, describe, run_on, same
from minirlhf_course.checks.untouched import is_untouched

__all__ = ["Case", "Exercise", "Verdict", "exercise"]


WIDTH = 92
"""Of the lines of a stub: a notebook's cell shows no more without scrolling."""


@dataclass(frozen=True)
class Case:
    """One input of an exercise.

    Args:
        name: what is special about it, shown to the learner.
        args: the arguments, in the order of the stub.
        expected: the answer worked by hand (tests compare it with the reference); None for random cases.
        rtol: how far off an answer may be, relative to it; None: 1e-4 for float32 and 1e-8 for float64.
    """

    name: str
    args: tuple[Any, ...]
    expected: Any = None
    rtol: float | None = None

    @property
    def size(self) -> int:
        """How many numbers it holds: the smallest failing case is the one to show."""
        return sum(x.numel() if isinstance(x, Tensor) else 1 for x in self.args)


class Verdict:
    """What a check found. Call it like the function: it is the learner's once passed, the package's until then.

    Attributes:
        status: "not attempted", "passed" or "failed".
        message: what was printed.
    """

    def __init__(self, status: str, message: str, function: Callable[..., Any], answer: object) -> None:
        update_wrapper(self, function)
        self.status = status
        self.message = message
        self.answer = answer
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<{self.status}>"

    def _ipython_display_(self) -> None:
        """Nothing: the check has just shown itself, also where it is the last line of a cell."""


@dataclass(frozen=True)
class Exercise:
    """An exercise of a lesson; calling it with an answer prints and returns the `Verdict`.

    Args:
        number: "4.2", the second exercise of lesson 04.
        title: a few words.
        difficulty: 1 to 5.
        minutes: how long it takes someone new to it.
        task: one or two sentences, in Markdown, above the stub.
        reference: the package's version. Its name, signature and docstring are the stub's.
        cases: makes the cases, hand-worked and small ones first.
        suspects: sentence to wrong function, likeliest first. A sentence says what is wrong and what to do.
        hints: two, the second nearly the solution; in Markdown.
        leaves: names of tensor arguments that need a gradient. The gradients of every result into them must be right,
            also where they must be zero.
        observe: turns (result, args) into what is compared, for answers that draw random numbers; a string is a fault.
        budget: the most tensor operations that an answer may take, from its arguments; None: any number.
    """

    number: str
    title: str
    difficulty: int
    minutes: int
    task: str
    reference: Callable[..., Any]
    cases: Callable[[], Sequence[Case]]
    suspects: Mapping[str, Callable[..., Any]]
    hints: tuple[str, str]
    leaves: tuple[str, ...] = ()
    observe: Callable[[Any, tuple[Any, ...]], Any] | None = None
    budget: Callable[..., int] | None = None

    @property
    def name(self) -> str:
        return self.reference.__name__

    @property
    def arguments(self) -> tuple[str, ...]:
        return tuple(inspect.signature(self.reference).parameters)

    # What a lesson shows ------------------------------------------------------------------------------------------

    @property
    def header(self) -> str:
        """The Markdown above the stub."""
        about = f"difficulty {self.difficulty} of 5 · {self.minutes} minutes"
        return f"### Exercise {self.number}: {self.title}\n*{about}*\n\n{self.task}"

    @property
    def stub(self) -> str:
        """The code cell that the learner fills in."""
        arguments = ", ".join(self.arguments)
        if len(f"def my_{self.name}({arguments}):") > WIDTH:
            arguments = "\n" + textwrap.fill(arguments, WIDTH, initial_indent="    ", subsequent_indent="    ") + "\n"
        lines = (inspect.getdoc(self.reference) or "").splitlines()
        lines[0] = f'"""{lines[0]}'
        if len(lines) == 1 and len(lines[0]) < WIDTH - 7:
            lines[0] += '"""'
        else:
            lines = [part for line in lines for part in textwrap.wrap(line, WIDTH - 4) or [""]]
            lines.append('"""')
        doc = textwrap.indent("\n".join(lines), "    ")
        return f"def my_{self.name}({arguments}):\n{doc}\n    ...  # your code here"

    @property
    def check_line(self) -> str:
        """The code cell that checks it."""
        return f"{self.name} = check.{self.name}(my_{self.name})"

    @property
    def hints_markdown(self) -> str:
        """The Markdown below the check: two hints, folded."""
        first, second = self.hints
        return (
            f"<details><summary>Hint 1</summary>\n\n{first}\n\n</details>\n"
            f"<details><summary>Hint 2</summary>\n\n{second}\n\n</details>"
        )

    # Marking ------------------------------------------------------------------------------------------------------

    def __call__(self, answer: object) -> Verdict:
        verdict = self.mark(answer)
        _display(self.name, verdict)
        return verdict

    def mark(self, answer: object) -> Verdict:
        """The verdict on an answer, without printing it."""
        if isinstance(answer, Verdict):
            answer = answer.answer
        if not callable(answer):
            message = f"Give the function itself: `{self.check_line}`, not {type(answer).__name__}."
            return Verdict("failed", message, self.reference, answer)
        if is_untouched(answer):
            later = "The lesson goes on with the package's version."
            return Verdict("not attempted", later, self.reference, answer)
        problem, count = self._problem(answer)
        if problem is None:
            return Verdict("passed", f"Right on all {count} cases; later cells use your function.", answer, answer)
        return Verdict("failed", problem, self.reference, answer)

    def run(self, function: Callable[..., Any], case: Case) -> Outcome:
        """A function's outcome on a case: its result, the gradients, and what it did wrong on the way."""
        limit = None if self.budget is None else self.budget(*case.args)
        return run_on(function, case.args, self.arguments, self.leaves, self.observe, limit)

    def _problem(self, answer: Callable[..., Any]) -> tuple[str | None, int]:
        cases = list(self.cases())
        runs = [(case, self.run(answer, case), self.run(self.reference, case)) for case in cases]
        found = [(case, got, compare(got, expected, case.rtol)) for case, got, expected in runs]
        failing = [(case, got, problem) for case, got, problem in found if problem is not None]
        if not failing:
            return None, len(cases)
        case, got, problem = min(failing, key=lambda item: item[0].size)  # the first of the smallest
        sentence, certain = (None, False) if got.fault else self._suspect([(case, got) for case, got, _ in runs], case)
        headline = sentence if sentence and certain else problem
        if sentence and not certain:
            headline += f" On this case it looks like a known mistake: {sentence}"
        expected = next(expected for other, _, expected in runs if other is case)
        return f"{headline}\n\n{describe(case.name, self.arguments, case.args, got, expected, problem)}", len(cases)

    def _suspect(self, runs: list[tuple[Case, Outcome]], smallest: Case) -> tuple[str | None, bool]:
        """The suspect that agrees with the answer on the smallest failing case and on most others: (sentence, on all).

        What agrees on the smallest case alone may be another mistake, so only one that agrees on all is certain.
        """
        best, best_count = None, 0
        runs = sorted(runs, key=lambda item: item[0] is not smallest)
        for sentence, suspect in self.suspects.items():
            count = 0
            for case, got in runs:
                if same(got, self.run(suspect, case), case.rtol):
                    count += 1
                elif case is smallest:
                    break
            if count > best_count:
                best, best_count = sentence, count
        return best, best_count == len(runs)


def exercise(number: str, title: str, **about: Any) -> Callable[[Callable[..., Any]], Exercise]:
    """Makes an `Exercise` of the reference that it decorates; the arguments are those of `Exercise`."""
    return lambda reference: Exercise(number, title, reference=reference, **about)


def _display(name: str, verdict: Verdict) -> None:
    """Coloured in Jupyter, plain elsewhere."""
    import html
    import sys

    text = f"{name}: {verdict.status}\n{verdict.message}"
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None or not hasattr(shell, "kernel"):
        print(text)
        return
    colour = {"passed": "#24763f", "failed": "#b3261e"}.get(verdict.status, "#5a626e")
    first, _, rest = verdict.message.partition("\n\n")
    rest = f'<pre style="margin:6px 0 0;white-space:pre-wrap">{html.escape(rest)}</pre>' if rest else ""
    page = (
        f'<div style="border-left:4px solid {colour};padding:2px 0 2px 10px"><b style="color:{colour}">'
        f"{name}: {verdict.status}</b><br>{html.escape(first)}{rest}</div>"
    )
    from IPython.display import display

    display({"text/plain": text, "text/html": page}, raw=True)
