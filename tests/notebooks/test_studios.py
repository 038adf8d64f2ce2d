"""Every studio runs untouched to its end, and with its solution in the empty cell all of its properties hold."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
STUDIOS = sorted((NOTEBOOKS / "studios").glob("[0-9]*.ipynb"))
LARGEST = 300_000
WIDEST = 96


@pytest.fixture(params=STUDIOS, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


@pytest.fixture
def notebook(path) -> Any:
    found = nbformat.read(path, as_version=4)
    nbformat.validate(found)
    return found


@pytest.fixture
def studio(path) -> Any:
    name = path.stem.partition("_")[2]
    return getattr(importlib.import_module(f"minirlhf_course.studios.{name}"), name)


def outputs(notebook) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_they_are_numbered_and_have_solutions():
    assert [path.name[:2] for path in STUDIOS] == [f"{number:02d}" for number in range(1, len(STUDIOS) + 1)]
    solutions = {path.stem for path in (NOTEBOOKS / "solutions" / "studios").glob("[0-9]*.py")}
    assert STUDIOS and solutions == {path.stem for path in STUDIOS}


def test_has_its_anatomy(path, notebook, studio):
    sources = [cell.source for cell in notebook.cells]
    assert sources[0].startswith(f"# Studio {int(path.name[:2])} · ")
    at = sources.index(studio.stub)
    assert sources[at + 1 : at + 3] == [studio.check_line, studio.hints_markdown]
    headings = [line for source in sources for line in source.splitlines() if line.startswith("## ")]
    assert headings[:2] == ["## What you are given", "## What to write"] and headings[-1] == "## What to remember"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [line for cell in code for line in cell.source.splitlines() if len(line) > WIDEST]
    folded = [cell for cell in code if "jupyter" in cell.metadata]
    assert all(any("image/png" in output.get("data", {}) for output in cell.outputs) for cell in folded)
    for link in re.findall(r"\]\(([^)#]+)\)", "\n".join(sources)):
        assert "://" in link or (path.parent / link).exists(), link


def test_ran_untouched_to_its_end(path, notebook, studio):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run `make notebooks`"
    assert not [
        output for output in outputs(notebook) if output.output_type == "error" or output.get("name") == "stderr"
    ]
    (shown,) = next(cell for cell in code if cell.source == studio.check_line).outputs
    assert shown.data["text/plain"].startswith(f"{studio.name}: not attempted"), "solved, or not run"
    images = [output for output in outputs(notebook) if "image/png" in output.get("data", {})]
    assert images and all(len(image.metadata["image/png"]["alt"]) > 20 for image in images)
    assert path.stat().st_size <= LARGEST


def test_names_no_machine_and_is_clean(path, notebook, tmp_path):
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    folders = "|".join(("work", "root", "home", "Users", "tmp", "opt", "mnt", "usr"))
    assert not re.search(rf"(?<![\w.\]/-])/(?:{folders})/[\w.-]+|0x[0-9a-f]{{8,}}", nbformat.writes(notebook))
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    command = [sys.executable, str(NOTEBOOKS / "execute.py"), "--clean", str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and copy.read_bytes() == path.read_bytes(), "run `make notebooks`"


@pytest.mark.slow
def test_passes_with_the_solution_pasted_in(path, notebook, studio):
    """CartPole on three seeds too; the package's curves beside it are cut short, to save time."""
    text = (NOTEBOOKS / "solutions" / "studios" / f"{path.stem}.py").read_text(encoding="utf-8")
    next(cell for cell in notebook.cells if cell.source == studio.stub).source = text
    for cell in notebook.cells:
        if "jupyter" in cell.metadata:
            cell.source = re.sub(r"total_steps=\d+_000", "total_steps=6_000", cell.source)
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(path.parent)}}).execute()
    (check,) = (cell for cell in notebook.cells if cell.source == studio.check_line)
    shown = [output.data["text/plain"] for output in check.outputs if "text/html" in output.get("data", {})]
    (table,) = (text for text in shown if text.startswith(f"{studio.name}: "))
    assert table.startswith(f"{studio.name}: passed") and "not run" not in table, table
    assert "in another order than" not in table, "the solution draws as the specification says"
    assert "CartPole" in table or studio.name == "rlhf", table
    assert [output for output in outputs(notebook) if "image/png" in output.get("data", {})]
