"""A studio in JupyterLab, as a person goes through it: untouched, with a mistake in the empty cell, and solved."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from minirlhf_course.studios import reinforce as studio

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
NAME = "01_reinforce"
SIGN = ("loss = -torch.where(", "loss = torch.where(")
RUN_MS = 150_000
"""The longest a click may wait for what it starts."""


def prepared(path: Path) -> None:
    """The studio without its outputs. CartPole is played on one seed of three, and the package's curves are cut short:
    test_studios.py plays all of it."""
    notebook = nbformat.read(NOTEBOOKS / "studios" / path.name, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            cell.source = re.sub(r"total_steps=\d+_000", "total_steps=6_000", cell.source)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source += "\nfrom minirlhf_course.studios import referee\nreferee.SEEDS = (0,)"
    nbformat.write(notebook, path)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_person_goes_through_a_studio(tmp_path: Path, open_in_lab) -> None:
    from playwright.sync_api import expect

    prepared(tmp_path / f"{NAME}.ipynb")
    solution = (NOTEBOOKS / "solutions" / "studios" / f"{NAME}.py").read_text(encoding="utf-8")
    titles = [item.title for item in studio.reinforce.properties]
    with open_in_lab(f"{NAME}.ipynb") as lab:
        page, cells = lab.page, lab.cells
        empty = cells.filter(has_text="def my_reinforce(").first
        check = cells.filter(has_text=studio.reinforce.check_line).first
        rows = check.locator(".jp-OutputArea-output tr")
        picture = lab.notebook.locator(".jp-OutputArea-output img[src^='data:image/png']")
        busy = lab.notebook.locator(".jp-InputPrompt", has_text="[*]")

        def run_all() -> None:
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_text("Run All Cells", exact=True).click()

        def write(text: str) -> None:
            empty.scroll_into_view_if_needed()
            empty.locator(".cm-content").click()
            page.keyboard.press("ControlOrMeta+a")
            page.keyboard.press("Delete")
            page.keyboard.insert_text(text)
            page.keyboard.press("Shift+Enter")

        def mark() -> None:
            check.scroll_into_view_if_needed()
            check.locator(".cm-content").click()
            page.keyboard.press("Control+Enter")

        def look(name: str) -> None:
            check.scroll_into_view_if_needed()
            check.screenshot(path=tmp_path / f"{name}.png")

        run_all()
        expect(check).to_contain_text("reinforce: not attempted", timeout=RUN_MS)
        expect(picture.first).to_be_visible(timeout=RUN_MS)
        expect(busy).to_have_count(0, timeout=RUN_MS)
        expect(rows).to_have_count(0)
        untouched = picture.first.get_attribute("src")
        look("not_attempted")

        # With a planted bug: the property that fails first, the mistake by name, and CartPole is not played.
        assert solution.count(SIGN[0]) == 1
        write(solution.replace(*SIGN))
        mark()
        expect(check).to_contain_text("reinforce: failed", timeout=RUN_MS)
        expect(rows).to_have_count(len(titles))
        assert [row.locator("td").nth(1).inner_text() for row in rows.all()] == titles
        expect(check).to_contain_text("The minus sign is missing")
        expect(rows.last).to_contain_text("not run")
        look("failed")

        # Solved: everything holds, and the learner's own curve is drawn beside the package's.
        write(solution)
        run_all()
        expect(check).to_contain_text("reinforce: passed", timeout=RUN_MS)
        assert [row.locator("td").nth(0).inner_text() for row in rows.all()] == ["✓ passed"] * len(titles)
        expect(busy).to_have_count(0, timeout=RUN_MS)
        assert picture.first.get_attribute("src") != untouched
        errors = lab.notebook.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']")
        expect(errors).to_have_count(0)
        look("passed")
        picture.first.screenshot(path=tmp_path / "curves.png")
