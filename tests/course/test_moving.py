"""Pictures that move: the first one is shown once, and a slider's change draws one more, with that value."""

from __future__ import annotations

import base64
import io
from typing import Any

import IPython.display
import ipywidgets
import pytest
from minirlhf_course import plotting
from minirlhf_course.moving import HINT, Slider, moving
from PIL import Image

SIGNS = {"a good action": 1.0, "a bad action": -1.0}


class Stage:
    """What a cell has put on the page, and what was drawn for it."""

    def __init__(self) -> None:
        self.shown: list[Any] = []
        self.drawn: list[dict[str, float]] = []

    def draw(self, **values: float) -> Any:
        self.drawn.append(values)
        with plotting.style():
            figure, axes = plotting.panels(width=2, height=1.5)
            axes.plot([0, values["slope"]], color="#d55e00" if values.get("sign", 1) > 0 else "#0072b2")
        return figure

    def widgets(self, kind: type) -> list[Any]:
        return [child for child in self.shown[-1].children if isinstance(child, kind)]

    @property
    def sliders(self) -> list[Any]:
        return self.widgets(ipywidgets.SelectionSlider)

    @property
    def beneath(self) -> str:
        """The markup beneath the sliders."""
        (box,) = self.widgets(ipywidgets.HTML)
        return box.value

    @property
    def picture(self) -> bytes:
        """What its picture holds."""
        return base64.b64decode(self.beneath.partition("data:image/png;base64,")[2].partition('"')[0], validate=True)


@pytest.fixture
def stage(monkeypatch) -> Stage:
    stage = Stage()
    monkeypatch.setattr(IPython.display, "display", stage.shown.append)
    return stage


def test_the_first_picture_is_shown_once_and_beneath_it_the_sliders(stage: Stage) -> None:
    moving(stage.draw, "What to see.", slope=Slider("slope", (1, 2, 3), 2), sign=Slider("action", SIGNS, -1.0))
    assert stage.drawn == [{"slope": 2, "sign": -1.0}]
    assert [type(item) for item in stage.shown] == [IPython.display.Image, IPython.display.Markdown, ipywidgets.VBox]
    static, caption, _ = stage.shown
    assert static.data == plotting.to_png(stage.draw(slope=2, sign=-1.0)) and caption.data == "*What to see.*"
    assert static.alt == "What to see."
    assert [slider.description for slider in stage.sliders] == ["slope", "action"]
    assert [slider.label for slider in stage.sliders] == ["2", "a bad action"]
    assert stage.beneath == HINT  # not the same picture twice


def test_a_change_draws_one_picture_with_that_value_and_leaves_the_first_one_alone(stage: Stage) -> None:
    moving(stage.draw, "What to see.", slope=Slider("slope", (1, 2, 3), 2), sign=Slider("action", SIGNS, 1.0))
    static = stage.shown[0].data
    slope, sign = stage.sliders
    slope.value = 3
    assert stage.drawn[1:] == [{"slope": 3, "sign": 1.0}]
    first = stage.picture
    assert 'alt="the picture above' in stage.beneath
    slope.value = 3  # nothing has moved
    assert len(stage.drawn) == 2
    sign.label = "a bad action"
    assert stage.drawn[2:] == [{"slope": 3, "sign": -1.0}]
    assert stage.picture != first
    assert len(stage.shown) == 3 and stage.shown[0].data == static
    sizes = {Image.open(io.BytesIO(png)).size for png in (static, first, stage.picture)}
    assert len(sizes) == 1, "the picture beneath the sliders is as large as the one above"


def test_a_slider_that_starts_nowhere_is_refused_before_anything_is_drawn(stage: Stage) -> None:
    with pytest.raises(ValueError, match="'slope' starts at 9, which is none of its values"):
        moving(stage.draw, "What to see.", slope=Slider("slope", (1, 2, 3), 9))
    assert not stage.drawn and not stage.shown
