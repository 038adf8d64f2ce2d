"""Lesson 11 takes the trainer that the reader wrote in Studio 4, runs it, and shows what it gained."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
MINE = "my_rlhf = ...  # your trainer of Studio 4"
SHORTER = {
    MINE: (NOTEBOOKS / "solutions" / "studios" / "04_rlhf.py").read_text(encoding="utf-8"),
    # The package's own run is not what is tested: one batch of it, and no gain asked of it.
    "    config, corpus_blocks=blocks,": "    replace(config, steps=1), corpus_blocks=blocks,",
    "assert gain[1] > 0.5": "assert gain[1] > 0",
    "for name, row in gains.items():": 'for name, row in [("yours", gains["yours"])]:',
    "replace(config, lr=0.55 * config.lr)": "replace(config, steps=50, lr=0.55 * config.lr)",
}
"""What is replaced in the lesson's cells."""


@pytest.mark.slow
def test_the_solution_of_studio_4_finishes_lesson_11_with_a_gain():
    lesson = nbformat.read(NOTEBOOKS / "11_whole_pipeline.ipynb", as_version=4)
    code = [cell for cell in lesson.cells if cell.cell_type == "code"]
    wanted = (
        code[0].source,
        "policies = {",
        "def answers_of(",
        "def my_win_rate_interval(",
        "win_rate_interval = check.",
        "def percent(",
        "longest = ...",
        'steps["ppo_ptx"] = train_rlhf(',
        "gain = win_rate_interval(",
        MINE,
        "# Draws both runs",
    )
    lesson.cells = [next(cell for cell in code if text in cell.source) for text in wanted]
    for old, new in SHORTER.items():
        (cell,) = (cell for cell in lesson.cells if old in cell.source)
        cell.source = cell.source.replace(old, new)
    NotebookClient(lesson, timeout=500, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    outputs = lesson.cells[-1].outputs  # it asserts that the interval lies above 50 %
    assert [output for output in outputs if "image/png" in output.get("data", {})]
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    assert said.startswith("yours        preferred to its SFT model ")


def test_untouched_it_shows_the_packages_run_alone():
    lesson = nbformat.read(NOTEBOOKS / "11_whole_pipeline.ipynb", as_version=4)
    at = next(index for index, cell in enumerate(lesson.cells) if cell.source.startswith(MINE))
    (said,) = lesson.cells[at].outputs
    assert said.text.startswith("not attempted")
    printed = "".join(output.get("text", "") for output in lesson.cells[at + 1].outputs)
    assert "the package" in printed and "yours" not in printed
