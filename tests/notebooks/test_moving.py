"""A picture that moves: the stored lesson keeps the picture and its caption, not the sliders."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nbformat

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
