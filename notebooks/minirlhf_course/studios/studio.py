"""The machine of the studios: a `Studio` marks a whole trainer by its properties and says where to look.

Properties are checked in the order of the table. The first one that fails is shown with its smallest case, with the
mistake by name where what the trainer does is just what that mistake does, and with the bugs that have this symptom.
"""

from __future__ import annotations

import html
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minirlhf.control.evaluation import Evaluation
from minirlhf_course.checks.untouched import is_untouched

MUSEUM = {
    1: "value targets from whitened advantages",
    2: "KL term detached from the graph",
    3: "ratio always 1, so the clip never acts",
    4: "max for min in the clipped loss",
    5: "min taken before multiplying by A",
    6: "missing minus sign",
    7: "A = r - V in place of G - V",
    8: "KL of padding leaks into returns",
    9: "KL averaged over padding",
    10: "reward stored a step early",
    11: "argmax for sampling",
    12: "done and next_done swapped",
    14: "a chain of ifs falls through to the wrong KL",
    16: "both answers equal after truncation",
    22: "termination treated as truncation",
    23: "off-by-one between logits and tokens",
    24: "top-k left on while sampling",
    25: "a dead critic: values as numbers, without a gradient",
    26: "advantages that run across the end of an episode",
    28: "Categorical(logits) by position, taken for probabilities",
    29: "position ids lost through an adapter's wrapper",
    30: "k3 averaged as a loss where the sequence KL was meant",
}
"""The bugs that a studio may meet, by their number in the course's bug museum."""


@dataclass(frozen=True)
class Failure:
    """How a property fails.

    Attributes:
        case: the smallest case, in words and numbers.
        named: the mistake, if what is seen is just what it does.
    """

    case: str
    named: str = ""


@dataclass(frozen=True)
class Property:
    """Something that holds of every right trainer.

    Args:
        title: what holds, a few words.
        fails: how a trainer fails it, or None; it may leave what it found in `Notes`.
        look: where to look if it fails.
        bugs: numbers of the museum's bugs with this symptom.
        gate: nothing is checked after it has failed.
        last: is checked only if all others hold (it takes long).
    """

    title: str
    fails: Callable[[Callable[..., Any], Notes], Failure | None]
    look: str
    bugs: tuple[int, ...] = ()
    gate: bool = False
    last: bool = False


@dataclass
class Notes:
    """What the properties found on their way.

    Attributes:
        runs: the evaluations of each seed on CartPole, by the name of the variant.
        remarks: what a reader may like to know and nothing that is wrong.
    """

    runs: dict[str, list[list[Evaluation]]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


class Row(NamedTuple):
    """A line of the table: "passed", "failed" or "not run"."""

    title: str
    status: str


@dataclass
class Marks:
    """What a studio found.

    Attributes:
        status: "not attempted", "passed" or "failed".
        message: what was printed below the table.
        rows: the table.
        notes: see `Notes`; `runs` in it are what the lesson draws.
    """

    status: str
    message: str
    rows: list[Row] = field(default_factory=list)
    notes: Notes = field(default_factory=Notes)
    named: str = ""

    @property
    def passed(self) -> bool:
        return self.status == "passed"

    def runs(self, variant: str) -> list[list[Evaluation]]:
        """The learner's own learning curves, seed by seed; empty unless CartPole was played."""
        return self.notes.runs.get(variant, [])

    def _ipython_display_(self) -> None:
        """Nothing: the studio has just shown it."""


@dataclass(frozen=True)
class Studio:
    """A studio; calling it with a trainer prints and returns the `Marks`. Its specification stands in its notebook.

    Args:
        name: of the studio, and of the function after "my_".
        stub: the code of the empty cell.
        hints: Markdown, folded, each nearer to the solution than the one before.
        properties: in the order of the table.
    """

    name: str
    stub: str
    hints: tuple[str, ...]
    properties: Sequence[Property]

    @property
    def check_line(self) -> str:
        """The code cell that marks."""
        return f"marks = studio.{self.name}(my_{self.name})"

    @property
    def hints_markdown(self) -> str:
        """The Markdown below the check."""
        return "\n".join(
            f"<details><summary>Hint {number}</summary>\n\n{hint}\n\n</details>"
            for number, hint in enumerate(self.hints, 1)
        )

    def __call__(self, trainer: object) -> Marks:
        marks = self.mark(trainer, progress=True)
        _display(self.name, marks)
        return marks

    def mark(self, trainer: object, *, progress: bool = False, last: bool = True, to_the_first: bool = False) -> Marks:
        """The marks of a trainer, without printing them.

        Args:
            trainer: what the learner wrote.
            progress: whether to draw a progress bar.
            last: whether to check what takes long, too.
            to_the_first: whether to check nothing after the first property that fails.
        """
        if not callable(trainer):
            return Marks("failed", f"Give the function itself: `{self.check_line}`, not {type(trainer).__name__}.")
        if is_untouched(trainer):
            return Marks("not attempted", "The notebook goes on with the package's trainer.")
        from tqdm.auto import tqdm

        notes, rows = Notes(), []
        first: tuple[Property, Failure] | None = None
        closed = False
        for item in tqdm(self.properties, desc=self.name, disable=not progress, leave=False):
            if closed or (item.last and (first is not None or not last)):
                rows.append(Row(item.title, "not run"))
                continue
            failure = item.fails(trainer, notes)
            rows.append(Row(item.title, "passed" if failure is None else "failed"))
            if failure is not None:
                first = first or (item, failure)
                closed = closed or item.gate or to_the_first
        if first is None:
            held = sum(row.status == "passed" for row in rows)
            message = " ".join([f"All {held} properties hold.", *notes.remarks])
            return Marks("passed", message, rows, notes)
        return Marks("failed", _explained(*first), rows, notes, first[1].named)


def _explained(item: Property, failure: Failure) -> str:
    parts = [f"The first that fails: {item.title}"]
    if failure.named:
        parts.append(failure.named)
    parts.append(failure.case)
    parts.append(f"Look at {item.look}")
    if item.bugs:
        listed = "\n".join(f"  {number:>2}  {MUSEUM[number]}" for number in item.bugs)
        parts.append(f"Bugs of the museum with this symptom:\n{listed}")
    return "\n\n".join(parts)


def log_problem(log: object, right: Sequence[Mapping[str, Sequence[float]]], tolerance: float = 1e-4) -> str:
    """What is wrong with a log, in words, or "": for each iteration, by key, the numbers that may stand there."""
    if not isinstance(log, list | tuple) or not all(isinstance(row, Mapping) for row in log):
        return "What it returns is not a list with a dict per iteration."
    if len(log) != len(right):
        return f"It returns {len(log)} rows of its log, and made {len(right)} iterations."
    for number, (row, allowed) in enumerate(zip(log, right, strict=True)):
        for key, numbers in allowed.items():
            if key not in row:
                return f"The rows of its log have no {key!r}."
            try:
                got = float(row[key])
            except (TypeError, ValueError):
                return f"Row {number} of its log has {row[key]!r} for {key}, which is no number."
            if not any(abs(got - x) <= tolerance * max(1.0, abs(x)) for x in numbers):
                return f"Row {number} of its log says {key} {got:g}; it is {numbers[0]:.4g}."
    return ""


MARKS = {"passed": "✓", "failed": "✗", "not run": "·"}
COLOURS = {"passed": "#24763f", "failed": "#b3261e"}
QUIET = "#5a626e"


def _display(name: str, marks: Marks) -> None:
    """Coloured in Jupyter, plain elsewhere."""
    table = "\n".join(f"  {MARKS[row.status]} {row.status:<8} {row.title}" for row in marks.rows)
    text = "\n".join(part for part in (f"{name}: {marks.status}", table, marks.message) if part)
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None or not hasattr(shell, "kernel"):
        print(text)
        return
    colour = COLOURS.get(marks.status, QUIET)
    cell = "text-align:left;padding:1px 14px 1px 0"
    lines = "".join(
        f'<tr><td style="{cell};white-space:nowrap;color:{COLOURS.get(row.status, QUIET)}">'
        f'{MARKS[row.status]} {row.status}</td><td style="{cell}">{html.escape(row.title)}</td></tr>'
        for row in marks.rows
    )
    table = f'<table style="margin:4px 0">{lines}</table>' if lines else ""
    page = (
        f'<div style="border-left:4px solid {colour};padding:2px 0 2px 10px"><b style="color:{colour}">'
        f'{name}: {marks.status}</b>{table}<pre style="margin:6px 0 0;white-space:pre-wrap">'
        f"{html.escape(marks.message)}</pre></div>"
    )
    from IPython.display import display

    display({"text/plain": text, "text/html": page}, raw=True)
