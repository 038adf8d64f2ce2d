"""The ranking widget: messages from the page, and a person in JupyterLab with keys, a mouse and a dying kernel."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from minirlhf_course.labeler import Ranking

from minirlhf.labeling import Item, RankingFile

ITEMS = [Item(f"prompt {i}", ("one", "two", "three")) for i in range(3)]
EVIL = "<img src=x onerror='window.ran = true'><script>window.ran = true</script>"
CELL = f"""
from pathlib import Path
from minirlhf.labeling import Item, RankingFile
from minirlhf_course.labeler import Ranking
items = [Item(f"prompt {{i}}", ("one", "two", {EVIL!r}, "four")) for i in range(5)]
Ranking(RankingFile(Path("mine.jsonl"), "ada"), items)
"""


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


@pytest.fixture
def file(tmp_path: Path) -> RankingFile:
    return RankingFile(tmp_path / "mine.jsonl", "ada")


def test_ranks_skips_and_takes_back(file: RankingFile) -> None:
    widget = Ranking(file, ITEMS)
    widget.receive({"do": "rank", "number": 0, "ranking": [3, 1, 1]})
    assert (widget.done, widget.item["number"], widget.message) == (1, 1, "Saved.")
    widget.receive({"do": "skip", "number": 1})
    assert (widget.done, widget.item["number"]) == (1, 2)
    widget.receive({"do": "undo", "number": 2})
    assert (widget.done, widget.item["number"], rows(file.path)) == (0, 0, [])
    for number in (0, 2, 1):
        widget.receive({"do": "rank", "number": number, "ranking": [1, 2, 3]})
    assert widget.item == {} and [row["prompt"] for row in rows(file.path)] == ["prompt 0", "prompt 2", "prompt 1"]
    widget.receive({"do": "undo"})
    assert widget.item["number"] == 1 and widget.done == 2


def test_a_message_that_comes_twice_ranks_nothing_else(file: RankingFile) -> None:
    widget = Ranking(file, ITEMS)
    for _ in range(2):
        widget.receive({"do": "rank", "number": 0, "ranking": [1, 2, 3]})
    assert widget.done == 1 and widget.item["number"] == 1 and len(rows(file.path)) == 1


@pytest.mark.parametrize("ranking", [[1, 2], [1, 2, 9], [1, 2, "x"], None])
def test_a_ranking_that_is_none_is_not_saved(file: RankingFile, ranking: object) -> None:
    widget = Ranking(file, ITEMS)
    widget.receive({"do": "rank", "number": 0, "ranking": ranking})
    assert widget.message.startswith("Not saved") and widget.item["number"] == 0 and not rows(file.path)


def test_two_widgets_on_one_file_double_nothing(file: RankingFile) -> None:
    one, two = Ranking(file, ITEMS), Ranking(RankingFile(file.path, "ada"), ITEMS)
    one.receive({"do": "rank", "number": 0, "ranking": [1, 2, 3]})
    two.receive({"do": "rank", "number": 0, "ranking": [3, 2, 1]})
    assert "another window" in two.message and two.item["number"] == 1 and len(rows(file.path)) == 1


def test_takes_back_nothing_that_is_not_on_the_page(file: RankingFile) -> None:
    Ranking(file, ITEMS[:1]).receive({"do": "rank", "number": 0, "ranking": [1, 2, 3]})
    later = Ranking(file, ITEMS[1:])
    later.receive({"do": "undo"})
    assert later.message == "Nothing to take back." and len(rows(file.path)) == 1


@pytest.mark.parametrize("asked", ["rank", "skip", "undo"])
def test_a_file_that_was_spoiled_is_reported_to_the_page(file: RankingFile, asked: str) -> None:
    widget, sent = Ranking(file, ITEMS), []
    file.path.write_text("not a ranking\n")
    widget.send = sent.append
    widget._answer(None, {"do": asked, "number": 0, "ranking": [1, 2, 3]}, None)
    assert "mine.jsonl:1: not valid JSON" in widget.message and widget.item["number"] == 0 and sent == [{}]
    assert file.path.read_text() == "not a ranking\n"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_person_ranks_with_keys_and_mouse_and_the_kernel_dies(tmp_path: Path, open_in_lab) -> None:
    from playwright.sync_api import expect

    cell = nbformat.v4.new_code_cell(CELL)
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), tmp_path / "label.ipynb")
    file = tmp_path / "mine.jsonl"
    with open_in_lab("label.ipynb") as lab:
        page, widget = lab.page, lab.notebook.locator(".minirlhf-ranking")

        def run() -> None:
            lab.cells.first.locator(".cm-content").click()
            page.keyboard.press("Control+Enter")
            expect(widget.locator(".answer")).to_have_count(4, timeout=60_000)

        def places() -> list[str]:
            return [row.inner_text() for row in widget.locator(".answer kbd").all()]

        run()
        expect(widget.locator(".prompt")).to_have_text("prompt 0")
        expect(widget.locator(".answer .text").nth(2)).to_have_text(EVIL)

        # By typing: 2 first, 1 and 3 tie, then 4. JupyterLab's own keys (1 makes a heading of a cell) stay out of it.
        widget.focus()
        page.keyboard.type("21=34")
        assert places() == ["2", "1", "3", "4"]
        page.keyboard.press("Enter")
        expect(widget.locator(".prompt")).to_have_text("prompt 1")
        assert [row["ranking"] for row in rows(file)] == [[2, 1, 2, 4]]
        expect(lab.cells).to_have_count(1)
        expect(lab.notebook.locator(".jp-MarkdownCell")).to_have_count(0)

        # With the arrow keys, and then by dragging.
        widget.locator(".answer").nth(1).focus()
        page.keyboard.press("ArrowUp")
        assert places() == ["2", "1", "3", "4"]
        page.keyboard.press("Enter")
        expect(widget.locator(".prompt")).to_have_text("prompt 2")
        widget.locator(".answer").nth(3).drag_to(widget.locator(".answer").nth(0))
        assert places() == ["4", "1", "2", "3"]
        widget.get_by_role("button", name="Save this ranking").click()
        expect(widget.locator(".prompt")).to_have_text("prompt 3")
        assert [row["ranking"] for row in rows(file)][1:] == [[2, 1, 3, 4], [2, 3, 4, 1]]

        # Taken back, and ranked again after a skip.
        page.keyboard.press("u")
        expect(widget.locator(".prompt")).to_have_text("prompt 2")
        assert len(rows(file)) == 2
        page.keyboard.press("s")
        expect(widget.locator(".prompt")).to_have_text("prompt 3")

        # It reads at 400 % zoom: nothing is wider than the page.
        lab.notebook.locator(".jp-Notebook-toolbar, .jp-NotebookPanel-toolbar").first.click(position={"x": 2, "y": 2})
        page.keyboard.press("Control+b")  # the sidebar would take it all
        page.set_viewport_size({"width": 325, "height": 900})
        expect(widget.locator(".answer")).to_have_count(4)
        assert widget.evaluate("x => x.scrollWidth <= x.clientWidth + 1")
        page.screenshot(path=tmp_path / "narrow.png")
        page.set_viewport_size({"width": 1300, "height": 1000})
        page.screenshot(path=tmp_path / "widget.png")

        # The kernel dies with a ranking on its way: the page says so, and what was saved is in the file.
        lab.kill_kernel()
        widget.focus()
        page.keyboard.type("4321")
        page.keyboard.press("Enter")
        expect(widget.locator(".said")).to_contain_text("not saved", timeout=20_000)
        assert len(rows(file)) == 2
        page.locator(".jp-Dialog").get_by_role("button").first.click(timeout=20_000)
        run()
        expect(widget.locator(".count")).to_have_text("2 of 5", timeout=60_000)
        assert page.evaluate("window.ran") is None, "an answer's markup ran"
