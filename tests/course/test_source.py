"""What lesson 02 says of the package's source is still in it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import nbformat
from minirlhf_course.source import difference

from minirlhf.control.reinforce import train_reinforce, train_reinforce_with_baseline

LESSON = Path(__file__).resolve().parents[2] / "notebooks" / "02_baseline.ipynb"


def test_a_diff_leads_from_the_first_body_to_the_second():
    fence, *lines, end = difference(train_reinforce, train_reinforce_with_baseline).splitlines()
    assert (fence, end) == ("```diff", "```") and not [line for line in lines if line[:3] in ("---", "+++")]
    bodies = [inspect.getsource(f).split('"""')[2] for f in (train_reinforce, train_reinforce_with_baseline)]
    gone, new = ([line[1:] for line in lines if line[0] == sign] for sign in "-+")
    assert gone and new
    assert all(line in bodies[0] for line in gone) and all(line in bodies[1] for line in new)


def test_the_lines_beside_the_books_are_the_functions():
    cells = nbformat.read(LESSON, as_version=4).cells
    (cell,) = [cell.source for cell in cells if "| the book | `minirlhf/control/reinforce.py` |" in cell.source]
    rows = [row for row in cell.splitlines() if row.startswith("| $")]
    lines = [line for row in rows for line in re.findall(r"`([^`]+)`", row)]
    source = inspect.getsource(train_reinforce_with_baseline)
    assert len(lines) == 3 and [line for line in lines if line not in source] == []
