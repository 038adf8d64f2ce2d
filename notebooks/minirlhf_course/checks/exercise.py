"""The machine behind the checks: an `Exercise` runs an answer on its cases and names what went wrong.

1. The answer and the reference run on every case, hand-worked ones first, then random ones of many sizes.
   An answer is right if its numbers and gradients are, to about five digits, whatever the types they come in.
2. Where they differ, the exercise's *suspects* run too: the mistakes that others made, each a small function. If one of
   them gives just what the answer gave on every case, its sentence is the verdict. If one does so on the smallest
   failing case and on most of the other failing ones, its sentence is a hint beside the verdict; on less than that it
   may be chance, and nothing is said of it. The smallest failing case is shown either way.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import update_wrapper
from itertools import permutations
from typing import Any

from torch import Tensor

from minirlhf_course.checks.outcome import Outcome, compare, conform, observed, run_on, same
from minirlhf_course.checks.shown import describe
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
        rtol: how far off an answer may be, relative to it, also where it is small; None: 1e-5 of the result, and 1e-6
            of 1 or of its largest number where that is more.
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
        observe: turns (result, args) into what is compared, for answers that draw random numbers: a dict from what each
            thing is, in words that the learner reads ("the share of each action"), to its value. A string is a fault.
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
            arguments = "\n" + textwrap.indent("\n".join(filled(arguments, WIDTH - 4)), "    ") + "\n"
        lines = wrapped(f'"""{inspect.getdoc(self.reference) or ""}', WIDTH - 4)
        if len(lines) == 1 and len(lines[0]) < WIDTH - 7:
            lines[0] += '"""'
        else:
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
            message = f"Right on all {count} cases; later cells use your function."
            return Verdict("passed", message, self._conformed(answer), answer)
        return Verdict("failed", problem, self.reference, answer)

    def _conformed(self, answer: Callable[..., Any]) -> Callable[..., Any]:
        """A right answer, made to return the reference's types (a mask as bool) where it doesn't by itself."""
        if self.observe is not None or answer is self.reference:
            return answer
        cases = list(self.cases())
        patterns = [self.run(self.reference, case).result for case in cases]
        results = [self.run(answer, case).result for case in cases]
        rows = zip(cases, results, patterns, strict=True)
        if all(_identical(x, conform(x, y, case.args)) for case, x, y in rows):
            return answer

        def conformed(*args: Any, **kwargs: Any) -> Any:
            return conform(answer(*args, **kwargs), patterns[0], (*args, *kwargs.values()))

        return conformed

    def run(self, function: Callable[..., Any], case: Case) -> Outcome:
        """A function's outcome on a case: its result, the gradients, and what it did wrong on the way."""
        limit = None if self.budget is None else self.budget(*case.args)
        return run_on(function, case.args, self.arguments, self.leaves, self.observe, limit)

    def _problem(self, answer: Callable[..., Any]) -> tuple[str | None, int]:
        cases = list(self.cases())
        runs = [_Run(case, self.run(answer, case), self.run(self.reference, case)) for case in cases]
        constants = _never_moved([run.expected for run in runs])
        for run in runs:
            run.problem = compare(run.got, run.expected, run.case.rtol, constants)
        failing = [run for run in runs if run.problem is not None]
        if not failing:
            return None, len(cases)
        worst = min(failing, key=lambda run: run.case.size)  # the first of the smallest
        sentence, certain = (None, False) if worst.got.fault else self._suspect(runs, worst)
        order = None if sentence and certain else self._right_order(runs)
        if sentence and certain:
            headline = sentence
        elif order is not None:
            headline = _ordered(order)
        elif sentence:
            headline = f"{worst.problem} On this case it looks like a known mistake: {sentence}"
        else:
            headline = str(worst.problem)
        case = worst.case
        shown = describe(case.name, self.arguments, case.args, worst.got, worst.expected, worst.problem, case.rtol)
        return f"{headline}\n\n{shown}", len(cases)

    def _suspect(self, runs: list[_Run], worst: _Run) -> tuple[str | None, bool]:
        """The suspect that agrees with the answer on the smallest failing case and on most others: (sentence, on all).

        Only one that agrees on all cases is certain. One that agrees on less than half of the failing ones, or on a
        single one of three or more, is as likely another mistake, and none is returned.
        """
        best, best_count = None, 0
        failing = [run for run in runs if run.problem is not None]
        runs = sorted(runs, key=lambda run: run is not worst)
        for sentence, suspect in self.suspects.items():
            agreed = []
            for run in runs:
                if same(run.got, self.run(suspect, run.case), run.case.rtol):
                    agreed.append(run)
                elif run is worst:
                    break
            telling = sum(run.problem is not None for run in agreed)
            enough = 2 * telling >= len(failing) and telling >= min(2, len(failing) // 2)
            if enough and len(agreed) > best_count:
                best, best_count = sentence, len(agreed)
        return best, best_count == len(runs)

    def _right_order(self, runs: list[_Run]) -> tuple[int, ...] | None:
        """The order in which what the answer returns is right on every case, if it isn't as it is."""
        returned, wanted = runs[0].got.returned, runs[0].expected.returned
        several = isinstance(returned, tuple | list) and isinstance(wanted, tuple | list)
        if not several or len(returned) != len(wanted):
            return None
        for order in permutations(range(len(wanted))):
            if all(compare(self._reordered(run, order), run.expected, run.case.rtol) is None for run in runs):
                return order
        return None

    def _reordered(self, run: _Run, order: tuple[int, ...]) -> Outcome:
        got = run.got
        if not isinstance(got.returned, tuple | list) or len(got.returned) != len(order):
            return got
        seen = observed(tuple(got.returned[index] for index in order), run.case.args, self.observe)
        seen.gradients = {(order.index(index), name): x for (index, name), x in got.gradients.items()}
        seen.cut = {(order.index(index), name) for index, name in got.cut}
        return seen


@dataclass
class _Run:
    """An answer's outcome on a case, beside the reference's."""

    case: Case
    got: Outcome
    expected: Outcome
    problem: str | None = None


def _never_moved(outcomes: Sequence[Outcome]) -> set[tuple[int, str]]:
    """The places where no outcome has a gradient."""
    places = {place for outcome in outcomes for place in outcome.gradients}
    return {
        place for place in places if not any(place in x.gradients and bool(x.gradients[place].any()) for x in outcomes)
    }


def _ordered(order: tuple[int, ...]) -> str:
    if len(order) == 2:
        return "Both results are right, but swapped: return the second one first."
    first, *rest = (f"result {index + 1}" for index in order)
    return f"All results are right, but in the wrong order: your {first} comes first, then {', then '.join(rest)}."


def _identical(x: Any, y: Any) -> bool:
    if isinstance(x, tuple | list) and isinstance(y, tuple):
        return all(a is b for a, b in zip(x, y, strict=True))
    return x is y


def wrapped(text: str, width: int) -> list[str]:
    """The lines of a docstring, none longer than width.

    Lines are left as they are unless one of their paragraph is too long; then all of that paragraph is filled anew, so
    that no word is left alone on a line, and a shape like [N, T] is not broken.

    >>> wrapped("The KL of one row [N, T] from another row, in nats.", 30)
    ['The KL of one row [N, T] from', 'another row, in nats.']
    """
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        lines += [""] if lines else []
        given = paragraph.splitlines() or [""]
        lines += given if all(len(line) <= width for line in given) else filled(" ".join(given), width)
    return lines


def filled(text: str, width: int) -> list[str]:
    """The text in lines, as few as the width allows, the last one no shorter than half of the longest."""
    together = r"( ?\[[^][]*\]| [<>=]+ |(?<=:) (?=tl\.))"  # "rewards [N, T]", "n <= N", "BLOCK: tl.constexpr"
    kept = re.sub(together, lambda found: found[0].replace(" ", "\N{NO-BREAK SPACE}"), text)
    best = textwrap.wrap(kept, width)
    while len(best[-1]) < max(map(len, best)) / 2:
        width -= 1
        narrower = textwrap.wrap(kept, width)
        if len(narrower) > len(best):
            break
        best = narrower
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in best]


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
