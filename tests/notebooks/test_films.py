"""The films of CartPole in JupyterLab: played, paused and moved through by keyboard, with names shown as text."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

EVIL = "<img src=x onerror='window.ran = true'><script>window.ran = true</script>"
CELL = f"""
import numpy as np
from minirlhf_course.films import Film, Player
def film(name, steps, tilt):
    return Film(name, np.linspace((0, 0, 0, 0), (1.0, 0, tilt, 0), steps + 1))
Player([film("stands", 100, 0.1), film({EVIL!r}, 10, 0.22)])
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_person_plays_films_with_the_keyboard(tmp_path: Path, open_in_lab) -> None:
    from playwright.sync_api import expect

    cell = nbformat.v4.new_code_cell(CELL)
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), tmp_path / "films.ipynb")
    with open_in_lab("films.ipynb") as lab:
        page, player = lab.page, lab.notebook.locator(".minirlhf-films")
        lab.cells.first.locator(".cm-content").click()
        page.keyboard.press("Control+Enter")
        slider, button = player.get_by_role("slider", name="Time"), player.get_by_role("button")
        expect(slider).to_be_visible(timeout=60_000)
        states, clock, poles = player.locator(".state"), player.locator(".clock"), player.locator(".pole")
        expect(states).to_have_text(["step 0", "step 0"])
        expect(player.locator("div", has_text=EVIL).first).to_be_visible()
        assert player.locator("img, script").count() == 0 and page.evaluate("window.ran") is None

        # Step by step: half-way the second pole leans by 0.11 radians, at its end it has fallen.
        expect(lab.cells.first.locator(".jp-InputPrompt").first).to_have_text("[1]:")
        for _ in range(5):
            slider.press("ArrowRight")
        expect(states).to_have_text(["step 5", "step 5"])
        expect(clock).to_have_text("0.10 s, step 5")
        expect(slider).to_have_attribute("aria-valuetext", "0.10 s, step 5")
        turned = poles.nth(1).get_attribute("transform")
        assert float(turned.split("(")[1].split()[0]) == pytest.approx(6.30, abs=0.03)  # degrees
        slider.press("End")
        expect(states).to_have_text(["still up after 100 steps", "fell after 10 steps"])
        assert poles.nth(0).get_attribute("stroke") != poles.nth(1).get_attribute("stroke")

        page.screenshot(path=tmp_path / "films.png")

        # Played from the start with the space bar, paused, and played to the end.
        player.get_by_label("5 times slower").press("Space")
        button.press("Space")
        expect(button).to_have_text("Pause")
        expect(slider).not_to_have_value("100")
        expect(states.nth(1)).to_have_text("fell after 10 steps")
        button.press("Space")
        expect(button).to_have_text("Play")
        stopped = slider.input_value()
        page.wait_for_timeout(300)
        assert 10 <= int(stopped) < 100 and slider.input_value() == stopped
        player.get_by_label("5 times slower").press("Space")
        button.press("Space")
        expect(states.nth(0)).to_have_text("still up after 100 steps", timeout=20_000)
        expect(button).to_have_text("Play")
        expect(lab.cells).to_have_count(1)

        # At 400 % zoom nothing is wider than the page.
        lab.notebook.locator(".jp-Notebook-toolbar, .jp-NotebookPanel-toolbar").first.click(position={"x": 2, "y": 2})
        page.keyboard.press("Control+b")  # the sidebar would take it all
        page.set_viewport_size({"width": 325, "height": 900})
        expect(slider).to_be_visible()
        assert player.evaluate("page => page.scrollWidth <= page.clientWidth + 1")
        page.screenshot(path=tmp_path / "narrow.png")
