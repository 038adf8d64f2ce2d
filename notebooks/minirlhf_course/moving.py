"""Pictures that move: a figure as a function of a few numbers, and a slider for each of them.

    def draw(ratio, epsilon):
        ...
        return figure

    moving(draw, "What to see: ...", ratio=Slider("ratio r", (0.8, 1.0, 1.2), start=1.2), ...)

The first picture is an ordinary figure with its caption: it stays in the stored lesson, for whoever reads that. Beneath
it are the sliders, and beneath them, once one was moved, the picture redrawn with their values. They need a running
kernel; the stored lesson has none of them.

Cells below may give a name another meaning, and the reader may come back to the slider after they ran: bind what
`draw` needs of the lesson as defaults, `def draw(b, *, V=V)`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import ipywidgets

from minirlhf_course.plotting import show, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Slider", "moving"]

HINT = "Move a slider (with the mouse, or Tab and the arrow keys): the picture with your values appears here."
ALT = "the picture above, drawn with the values of the sliders"


class Slider(NamedTuple):
    """The values that one parameter of a picture may take."""

    label: str
    """What it is, in words."""
    values: Sequence[float] | Mapping[str, float]
    """From left to right; where a number says little, with a name for each."""
    start: float
    """One of the values: that of the first picture."""


def moving(draw: Callable[..., Figure], caption: str, *, dpi: int = 110, colours: int = 64, **sliders: Slider) -> None:
    """Show a figure, its caption, and live sliders that draw it anew.

    Args:
        draw: takes a keyword argument for each slider, gives a figure, and changes nothing else. It is called whenever
            a slider moves, so it should take less than 0.2 s.
        caption: what to see in the first picture.
        dpi: see `show`.
        colours: see `show`.
        sliders: by the name of `draw`'s argument.

    Raises:
        ValueError: a slider starts at none of its values.
    """
    from IPython.display import display

    rows = {}
    for name, (label, values, start) in sliders.items():
        options = [*values.items()] if isinstance(values, Mapping) else [(f"{value:g}", value) for value in values]
        if start not in dict(options).values():
            raise ValueError(f"the slider {label!r} starts at {start}, which is none of its values")
        rows[name] = ipywidgets.SelectionSlider(
            options=options,
            value=start,
            description=label,
            tooltip=label,
            style={"description_width": "14em"},
            layout={"width": "min(100%, 44em)"},
        )
    show(draw(**{name: row.value for name, row in rows.items()}), caption, dpi, colours)

    picture = ipywidgets.HTML(HINT)

    def redraw(_: Any) -> None:
        with style():
            stream = io.BytesIO()  # not `to_png`: choosing few colours takes longer than drawing
            figure = draw(**{name: row.value for name, row in rows.items()})
            figure.savefig(stream, format="png", dpi=dpi, pil_kwargs={"compress_level": 1})
        drawn = base64.b64encode(stream.getvalue()).decode()
        picture.value = f'<img class="minirlhf-moved" alt="{ALT}" src="data:image/png;base64,{drawn}">'

    for row in rows.values():
        row.observe(redraw, names="value")
    display(ipywidgets.VBox([*rows.values(), picture]))
