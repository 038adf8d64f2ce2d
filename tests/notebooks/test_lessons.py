"""Every lesson has the same anatomy, ran to its end, and names neither a machine nor a moment (CONTRIBUTING.md)."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from minirlhf_course.checks import Exercise

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
LESSONS = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
LARGEST = 400_000
WIDEST = 96
FOLDED = {"source_hidden": True}
DRAWING = ("draw", "plot", "show", "picture")


@pytest.fixture(params=LESSONS, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


@pytest.fixture
def lesson(path) -> Any:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def text_of(lesson: Any, kind: str) -> list[str]:
    return [cell.source for cell in lesson.cells if cell.cell_type == kind]


def prose(lesson: Any, pattern: str) -> list[str]:
    """All places in the Markdown where the pattern matches."""
    return re.findall(pattern, "\n\n".join(text_of(lesson, "markdown")), flags=re.M)


def execute(*arguments: Path | str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(NOTEBOOKS / "execute.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def outputs(lesson: Any) -> list[Any]:
    return [output for cell in lesson.cells if cell.cell_type == "code" for output in cell.outputs]


def exercises(path: Path) -> list[Exercise]:
    module = importlib.import_module(f"minirlhf_course.checks.lesson{path.name[:2]}")
    return [item for item in vars(module).values() if isinstance(item, Exercise)]


def test_there_are_lessons():
    assert LESSONS and LESSONS[0].name == "00_map_and_setup.ipynb"
    assert [path.name[:2] for path in LESSONS] == [f"{index:02d}" for index in range(len(LESSONS))], "one is missing"


def test_is_small(path):
    assert path.stat().st_size <= LARGEST, f"{path.stat().st_size / 1000:.0f} kB: fewer or smaller figures"


def test_ran_from_top_to_bottom_without_a_word_of_complaint(lesson):
    code = [cell for cell in lesson.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run `make notebooks`"
    assert outputs(lesson)
    assert not [output for output in outputs(lesson) if output.output_type == "error"]
    complaints = [output.text for output in outputs(lesson) if output.get("name") == "stderr"]
    assert not complaints, "warnings are for the author: find their cause"


def test_names_neither_a_machine_nor_a_moment(lesson):
    assert set(lesson.metadata) == {"kernelspec", "language_info"}
    assert lesson.metadata.kernelspec.name == "python3"
    assert set(lesson.metadata.language_info) <= {"name", "file_extension", "mimetype", "pygments_lexer"}
    assert all(set(cell.metadata) <= {"tags", "jupyter"} for cell in lesson.cells)
    assert all(cell.metadata.get("jupyter", FOLDED) == FOLDED for cell in lesson.cells)
    text = nbformat.writes(lesson)
    # Written in pieces, as in test_packaging.py, which looks for the same in every file.
    folders = "|".join(("work", "root", "home", "Users", "tmp", "opt", "mnt", "usr"))
    found = re.search(rf"(?<![\w.\]/-])/(?:{folders})/[\w.-]+|site-packages|0x[0-9a-f]{{8,}}|ipykernel_\d+", text)
    assert not found, f"names {found.group()!r}"


def test_folds_only_what_draws_or_sets_up(path, lesson):
    """A reader who never unfolds a cell still reads all code that the lesson is about."""
    own = {source for item in exercises(path) for source in (item.stub, item.check_line)}
    for cell in (cell for cell in lesson.cells if "jupyter" in cell.metadata):
        assert cell.cell_type == "code" and cell.source not in own
        assert not cell.source.startswith("# NBVAL_CHECK_OUTPUT"), "its output is compared: the reader wants to see why"
        statements = ast.parse(cell.source).body
        sets_up = all(isinstance(node, ast.Import | ast.ImportFrom | ast.Assign) for node in statements)
        helpers = all(isinstance(node, ast.FunctionDef) and node.name.startswith(DRAWING) for node in statements)
        draws = any("image/png" in output.get("data", {}) for output in cell.outputs)
        assert sets_up or helpers or draws, f"folded, and neither set-up nor drawing:\n{cell.source}"


def test_begins_with_its_title_and_the_question_and_ends_with_what_to_remember(path, lesson):
    title = lesson.cells[0]
    assert title.cell_type == "markdown" and title.source.startswith(f"# {path.name[:2]} · ")
    assert len(title.source.splitlines()) >= 3, "after the title: what you will hold in your hands, how long it takes"
    headings = prose(lesson, r"^## (.+)$")
    assert (headings[0], headings[-1]) == ("The question", "What to remember")
    assert len(prose(lesson, r"^# ")) == 1, "one title"


def test_asks_for_a_prediction(lesson):
    assert prose(lesson, r"\*\*Predict first\.\*\*")


def test_has_exercises_as_the_checks_declare_them(path, lesson):
    declared = exercises(path)
    shown = [item for item in declared if any(cell.source == item.header for cell in lesson.cells)]
    assert len(shown) == 1 if path.name.startswith("00") else 3 <= len(shown) <= 7
    titles = [item.header.splitlines()[0] for item in shown]
    assert prose(lesson, r"^### Exercise .*") == titles, "in the order of their numbers, and no other"
    for item in shown:
        at = next(index for index, cell in enumerate(lesson.cells) if cell.source == item.header)
        four = lesson.cells[at : at + 4]
        assert [cell.cell_type for cell in four] == ["markdown", "code", "code", "markdown"], item.name
        assert four[1].source == item.stub, f"{item.name}: the stub is not minirlhf_course.checks'"
        assert four[2].source == item.check_line
        assert four[3].source == item.hints_markdown
        (verdict,) = four[2].outputs
        assert verdict.data["text/plain"].startswith(f"{item.name}: not attempted"), "solved, or not run"


def test_has_solutions(path):
    source = (NOTEBOOKS / "solutions" / f"{path.stem}.py").read_text(encoding="utf-8")
    functions = {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    assert functions == {f"my_{item.name}" for item in exercises(path)}


def test_goes_on_with_what_the_check_returned(path, lesson):
    """Only the stub and the check name `my_...`: another cell that did would fail where nothing is solved."""
    for item in exercises(path):
        elsewhere = [text for text in text_of(lesson, "code") if text not in (item.stub, item.check_line)]
        assert not [text for text in elsewhere if re.search(rf"\bmy_{item.name}\b", text)], item.name


def test_figures_have_a_caption(lesson):
    images = [output for output in outputs(lesson) if "image/png" in output.get("data", {})]
    assert images
    for image in images:
        caption = image.metadata.get("image/png", {}).get("alt", "plot")
        assert len(caption) > 20 and caption != "plot", "show(figure, caption): the caption says what to see"


def test_has_a_cell_whose_output_is_compared(lesson):
    marked = [cell for cell in lesson.cells if cell.source.startswith("# NBVAL_CHECK_OUTPUT")]
    assert marked, "deterministic mathematics begins with # NBVAL_CHECK_OUTPUT"
    for cell in marked:
        assert cell.outputs and all(output.output_type != "display_data" for output in cell.outputs)


def test_lines_fit_the_page(lesson):
    wide = [line for text in text_of(lesson, "code") for line in text.splitlines() if len(line) > WIDEST]
    assert not wide, f"over {WIDEST} characters: {wide}"


def test_links_lead_to_files_that_are_there(lesson):
    for link in prose(lesson, r"\]\(([^)#]+)\)"):
        assert "://" in link or (NOTEBOOKS / link).exists(), link


def test_the_script_that_runs_them_leaves_a_clean_lesson_as_it_is(path, tmp_path):
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    done = execute("--clean", copy)
    assert done.returncode == 0, done.stderr
    assert copy.read_bytes() == path.read_bytes(), "run `make notebooks`"


def test_the_script_stops_at_a_cell_that_fails_and_keeps_the_file(tmp_path):
    bad = tmp_path / "00_bad.ipynb"
    cells = [nbformat.v4.new_code_cell("print('before')"), nbformat.v4.new_code_cell("1 / 0")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), bad)
    before = bad.read_bytes()
    done = execute(bad)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
    assert bad.read_bytes() == before and [item.name for item in tmp_path.iterdir()] == [bad.name]
