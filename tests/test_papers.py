"""docs/papers.md: every function, class and setting that it names exists, in the file that it links to."""

from __future__ import annotations

import importlib
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "papers.md"
TEXT = PAGE.read_text(encoding="utf-8")
NAMED = re.findall(r"\[`([\w.]+)`\]\(([^)]+)\)", TEXT)
PAPERS = ("Sutton & Barto", "(TRPO)", "(GAE)", "(PPO)", "(InstructGPT)", "(over-optimisation)", "(DPO)")


def find(dotted: str) -> tuple[object, str]:
    """What a dotted name stands for, and the module it stands in."""
    parts = dotted.split(".")
    module, cut = importlib.import_module(parts[0]), 1
    while cut < len(parts):
        try:
            module = importlib.import_module(".".join(parts[: cut + 1]))
        except ModuleNotFoundError as error:
            if error.name != ".".join(parts[: cut + 1]) and "is not a package" not in str(error):
                raise
            break
        cut += 1
    found: object = module
    for part in parts[cut:]:
        if is_dataclass(found) and part in {field.name for field in fields(found)}:
            return found, module.__name__  # a setting, with or without a default
        assert hasattr(found, part), f"{dotted}: there is no {part}"
        found = getattr(found, part)
    return found, module.__name__


@pytest.mark.parametrize(("dotted", "link"), sorted(set(NAMED)))
def test_what_is_named_exists_where_the_link_says(dotted, link):
    _, module = find(dotted)
    file = (PAGE.parent / link).resolve()
    assert Path(importlib.import_module(module).__file__).resolve() == file
    outer = dotted.removeprefix(f"{module}.").split(".")[0]
    assert re.search(rf"^(?:def|class) {outer}\b", file.read_text(encoding="utf-8"), flags=re.M), "defined elsewhere"


@pytest.mark.parametrize("paper", PAPERS)
def test_every_paper_has_a_table_whose_rows_all_say_where(paper):
    (section,) = (part for part in TEXT.split("\n## ")[1:] if paper in part.splitlines()[0])
    rows = [line for line in section.splitlines() if line.startswith("| ") and "symbol | what" not in line]
    assert len(rows) >= 5
    for row in rows:
        cells = row.strip("| ").split(" | ")
        assert len(cells) == 4 and re.search(r"\[`[\w.]+`\]", cells[3]), row
