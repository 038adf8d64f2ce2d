"""A table that puts a book's lines beside a file of the package quotes that file word for word."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
HEADER = re.compile(r"\| *the book *\| *`(minirlhf/[\w/]+\.py)` *\|")


def tables() -> list[tuple[str, str, list[str]]]:
    """(lesson, file, the code in the second column of the table)."""
    found = []
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            header = HEADER.search(cell.source) if cell.cell_type == "markdown" else None
            if header:
                rows = cell.source[header.end() :].split("\n\n")[0].splitlines()
                right = [re.split(r"(?<!\\)\|", row)[2].replace(r"\|", "|") for row in rows if row.startswith("|")]
                found.append((path.stem, header[1], re.findall(r"`([^`]+)`", " ".join(right))))
    return found


TABLES = tables()


def test_the_lessons_have_such_tables():
    assert {"01_reinforce", "03_actor_critic"} <= {lesson for lesson, _, _ in TABLES}


@pytest.mark.parametrize(("lesson", "file", "quoted"), TABLES, ids=[lesson for lesson, _, _ in TABLES])
def test_every_quoted_line_is_in_the_file(lesson, file, quoted):
    text = (ROOT / file).read_text(encoding="utf-8")
    assert len(quoted) >= 3
    assert [line for line in quoted if line not in text] == []
