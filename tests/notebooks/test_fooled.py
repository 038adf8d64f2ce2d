"""Lesson 10 with a reader's own trainer pasted in: it fools the poor judge as the package's does."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
NEEDED = (
    "# Imports and paths.",
    "torch.manual_seed(0)",
    "rankings = Random(10)",
    "POOL = 32",
    "CLIMBED, WATCHING = ",
    "def my_rlhf(",
    "yours = brought(",
    "# Draws how your trainer climbs",
)
SHORTER = {"POOL = 32": "POOL = 4", "steps=14": "steps=9"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_solution_of_studio_4_fools_the_poor_judge(tmp_path):
    lesson = nbformat.read(NOTEBOOKS / "10_overoptimisation.ipynb", as_version=4)
    lesson.cells = [cell for cell in lesson.cells if cell.cell_type == "code" and cell.source.startswith(NEEDED)]
    assert len(lesson.cells) == len(NEEDED), "a cell has another beginning now"
    for cell in lesson.cells:
        for longer, shorter in SHORTER.items():
            cell.source = cell.source.replace(longer, shorter)
        if cell.source.startswith("def my_rlhf("):
            cell.source = (NOTEBOOKS / "solutions" / "studios" / "04_rlhf.py").read_text(encoding="utf-8")
    lesson.cells[-1].source = "history = recorder.history\n" + lesson.cells[-1].source  # from a cell that is left out
    NotebookClient(lesson, timeout=500, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    outputs = lesson.cells[-1].outputs
    (said,) = (output.text for output in outputs if output.output_type == "stream")
    line = re.compile(r"^(the package's|yours) +judge ([-+.\d]+) sd, gold ([-+.\d]+) points", re.MULTILINE)
    moved = {who: (float(judge), float(gold)) for who, judge, gold in line.findall(said)}
    assert moved.keys() == {"the package's", "yours"}, said
    for who, (judge, gold) in moved.items():
        assert judge > 0.5 and gold < -0.7, f"{who}: the judge is pleased, and gold falls"
    (picture,) = (output.data["image/png"] for output in outputs if "image/png" in output.get("data", {}))
    (tmp_path / "fooled.png").write_bytes(base64.b64decode(picture))  # both curves, to look at
