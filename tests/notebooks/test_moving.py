"""A picture that moves: the stored lesson keeps the picture alone, and in JupyterLab the keyboard moves it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

EXECUTE = Path(__file__).resolve().parents[2] / "notebooks" / "execute.py"
CELL = """
from minirlhf_course.moving import Slider, moving
from minirlhf_course.plotting import panels, style
drawn = []
def draw(slope):
    drawn.append(slope)
    with style():
        figure, axes = panels(width=3, height=2)
        axes.plot([0, slope])
    return figure
moving(draw, "What to see: a line.", slope=Slider("slope of the line", (1, 2, 3), 2))
"""


def stored(folder: Path, *cells: str) -> Path:
    path = folder / "moves.ipynb"
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


def test_the_stored_lesson_keeps_the_picture_and_its_caption_alone(tmp_path: Path) -> None:
    path = stored(tmp_path, CELL)
    subprocess.run([sys.executable, EXECUTE, path], check=True, capture_output=True)
    picture, caption = nbformat.read(path, as_version=4).cells[0].outputs
    assert picture.data["image/png"] and caption.data["text/markdown"] == "*What to see: a line.*"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_arrow_keys_move_a_picture(tmp_path: Path, open_in_lab) -> None:
    from playwright.sync_api import expect

    stored(tmp_path, CELL, "drawn")
    with open_in_lab("moves.ipynb") as lab:
        page, cell, state = lab.page, lab.cells.nth(0), lab.cells.nth(1)
        cell.locator(".cm-content").click()
        page.keyboard.press("Control+Enter")
        hint = cell.get_by_text("Move a slider")
        images, moved = cell.locator("img"), cell.locator("img.minirlhf-moved")
        expect(hint).to_be_visible(timeout=60_000)
        expect(cell.locator(".widget-label", has_text="slope of the line")).to_be_visible()
        assert [image.is_visible() for image in images.all()].count(True) == 1
        static = images.first.get_attribute("src")

        cell.locator(".noUi-handle").focus()
        page.keyboard.press("ArrowRight")
        expect(moved).to_be_visible(timeout=30_000)
        expect(hint).to_be_hidden()
        expect(cell.locator(".widget-readout")).to_have_text("3")
        assert images.first.get_attribute("src") == static
        page.screenshot(path=tmp_path / "moved.png")

        state.locator(".cm-content").click()
        page.keyboard.press("Control+Enter")
        expect(state.locator(".jp-OutputArea-output")).to_contain_text("[2, 3]")
