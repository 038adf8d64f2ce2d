"""JupyterLab itself, in headless Chromium: open a lesson, run it, solve an exercise, see the check change its mind."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest
from minirlhf_course.checks import Exercise, lesson01

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
LESSON = "01_reinforce"
RUN_MS = 150_000
"""The longest a lesson may take, and a click may wait for it."""


def solution(name: str) -> str:
    """The text of a solution, as a learner would type it: the file without its docstring and the other functions."""
    text = (NOTEBOOKS / "solutions" / f"{LESSON}.py").read_text(encoding="utf-8")
    nodes = [node for node in ast.parse(text).body[1:] if getattr(node, "name", f"my_{name}") == f"my_{name}"]
    return "\n".join(ast.get_source_segment(text, node) for node in nodes)


def without_outputs(path: Path) -> None:
    """So that what appears was made in this run."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    path.write_text(json.dumps(notebook), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_lesson_runs_and_an_exercise_can_be_solved_in_jupyterlab(tmp_path, open_in_lab):
    from playwright.sync_api import expect

    shutil.copytree(NOTEBOOKS, tmp_path / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for folder in ("docs", "data"):  # what lessons may read beside them
        shutil.copytree(ROOT / folder, tmp_path / folder)
    without_outputs(tmp_path / "notebooks" / f"{LESSON}.ipynb")
    item = next(item for item in vars(lesson01).values() if isinstance(item, Exercise))

    with open_in_lab(f"notebooks/{LESSON}.ipynb") as lab:
        page, lesson, cells = lab.page, lab.notebook, lab.cells
        stub = cells.filter(has_text=f"def my_{item.name}(").first
        check = cells.filter(has_text=item.check_line).first
        plot = lesson.locator(".jp-OutputArea-output img[src^='data:image/png']")
        assert plot.count() == 0

        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        expect(check).to_contain_text("not attempted", timeout=RUN_MS)
        expect(plot.first).to_be_visible(timeout=RUN_MS)
        expect(lesson.locator(".jp-InputPrompt", has_text="[*]")).to_have_count(0, timeout=RUN_MS)
        expect(lesson.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']")).to_have_count(0)

        # Type the solution over the stub, run it, run the check.
        editor = stub.locator(".cm-content")
        editor.scroll_into_view_if_needed()
        editor.click()
        page.keyboard.press("ControlOrMeta+a")
        page.keyboard.press("Delete")
        page.keyboard.insert_text(solution(item.name))
        page.keyboard.press("Shift+Enter")
        check.scroll_into_view_if_needed()
        check.locator(".cm-content").click()
        page.keyboard.press("Shift+Enter")
        expect(check).to_contain_text(f"{item.name}: passed", timeout=30_000)
        expect(check).not_to_contain_text("not attempted")
