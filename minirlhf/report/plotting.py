"""Shared plotting: the report and the lessons use the same colours, bands and healthy ranges.

    with style():
        figure, (left, right) = panels(1, 2)
        curve(left, steps, mean, "ppo", band=(low, high))
        healthy_range(right, "policy/clip_fraction")
    svg = to_svg(figure, "demo", "What to see here.")

Figures are made without pyplot, so nothing global is left behind and equal data give equal bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# After Okabe and Ito (2008) and Tol (2021): told apart with any common colour blindness, and by dashes in grey print.
COLOURS = {
    "base": "#767b84",
    "sft": "#0072b2",
    "reward_model": "#b0568c",
    "ppo": "#d55e00",
    "ppo_ptx": "#008a63",
    "rloo": "#1f9dc4",
    "grpo": "#332288",
    "dpo": "#882255",
    "gold": "#8a6600",
}
NAMES = {"base": "base", "sft": "SFT", "reward_model": "reward model", "ppo": "PPO", "ppo_ptx": "PPO-ptx"}
NAMES |= {"rloo": "RLOO", "grpo": "GRPO", "dpo": "DPO"}
DASHES = {"ppo_ptx": (0, (5, 1.6)), "rloo": (0, (1.2, 1.2)), "grpo": (0, (6, 1.4, 1.2, 1.4)), "dpo": (0, (9, 1.6))}
INK, QUIET, GRID, PAPER, HEALTHY_COLOUR = "#20242c", "#5a626e", "#dfe2e7", "#fffefd", "#24763f"

STYLE: Any = {  # Any: matplotlib's own type lists every key and changes with its version
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same layout on every machine
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.labelsize": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched, and takes the page's font
    "svg.hashsalt": "minirlhf",
}


class Range(NamedTuple):
    """Where a healthy PPO run keeps a metric."""

    low: float
    high: float
    relative: bool = False
    """The bounds are multiples of the metric's first value."""


HEALTHY: dict[str, Range] = {
    "objective/kl": Range(0.0, 10.0),
    "objective/entropy": Range(0.3, 1.3, relative=True),
    "objective/response_length": Range(0.5, 1.6, relative=True),
    "objective/ended_fraction": Range(0.95, 1.0),
    "policy/clip_fraction": Range(0.0, 0.25),
    "policy/approx_kl": Range(0.0, 0.03),
    "value/explained_variance": Range(0.3, 1.0),
}
"""Rules of thumb, not laws: a metric outside its range deserves a look. objective/kl is in nats per answer."""


def style() -> AbstractContextManager[None]:
    """Draw inside ``with style():``; previous settings are restored afterwards."""
    import matplotlib

    return matplotlib.rc_context(STYLE)


def panels(
    rows: int = 1, columns: int = 1, *, width: float = 5.4, height: float = 3.2, constrained: bool = True
) -> tuple[Figure, Any]:
    """A figure and its axes: one Axes, or an array [rows, columns] of them (a row alone: [columns]).

    Args:
        rows: of panels.
        columns: of panels.
        width: inches per panel.
        height: inches per panel.
        constrained: whether margins are fitted to the labels; False leaves them to you.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(width * columns, height * rows), layout="constrained" if constrained else None)
        FigureCanvasAgg(figure)
        return figure, figure.subplots(rows, columns)


def smooth(values: Sequence[float], window: int | None = None) -> list[float]:
    """Centred moving average; the window is a 16th of the curve unless given, and shrinks at both ends.

    >>> smooth([0.0, 3.0, 0.0], window=3)
    [1.5, 1.0, 1.5]
    """
    half = (window if window is not None else max(1, len(values) // 16)) // 2
    result = []
    for i in range(len(values)):
        near = values[max(0, i - half) : i + half + 1]
        result.append(sum(near) / len(near))
    return result


def curve(
    axes: Axes,
    x: Sequence[float],
    y: Sequence[float],
    who: str,
    *,
    band: tuple[Sequence[float], Sequence[float]] | None = None,
    raw: Sequence[float] | None = None,
    label: str | None = None,
) -> None:
    """A line in the colour of a step of the pipeline.

    Args:
        axes: where to draw.
        x: steps.
        y: the line.
        who: a key of COLOURS, or any colour.
        band: lower and upper edge of a band around it (spread over seeds, or a standard error: say which).
        raw: the unsmoothed values, drawn thin behind the line.
        label: for the legend; default: the name of `who`.
    """
    colour = COLOURS.get(who, who)
    if raw is not None:
        axes.plot(x, raw, color=colour, linewidth=0.7, alpha=0.3)
    if band is not None:
        axes.fill_between(x, *band, color=colour, alpha=0.18, linewidth=0)
    axes.plot(x, y, color=colour, linestyle=DASHES.get(who, "-"), label=label or NAMES.get(who, who))


def healthy_range(axes: Axes, metric: str, start: float | None = None) -> Range | None:
    """Shade and label the range in which a healthy run keeps this metric; call it after the curves.

    Args:
        axes: where to draw.
        metric: a key of HEALTHY; for any other nothing is drawn.
        start: the metric's first value, which relative ranges need.

    Returns:
        The range in the metric's own units.
    """
    import numpy as np

    bounds = HEALTHY.get(metric)
    if bounds is None or (bounds.relative and start is None):
        return None
    low, high = bounds.low, bounds.high
    if bounds.relative and start is not None:
        low, high = sorted((low * start, high * start))
    axes.axhspan(low, high, color=HEALTHY_COLOUR, alpha=0.1, linewidth=0)
    # At the right, inside of the band, at its upper edge unless the curves end there.
    ends = [y for line in axes.get_lines() for y in np.asarray(line.get_ydata(), dtype=float)[-25:]]
    below = any(y > low + 0.7 * (high - low) for y in ends if y <= high)
    _note(axes, low if below else high, f"healthy: {low:.3g} to {high:.3g}", HEALTHY_COLOUR, above=below, gap=4)
    return Range(low, high)


def level(axes: Axes, y: float, text: str, colour: str = QUIET, *, above: bool = True) -> None:
    """A dashed horizontal line with a label: a ceiling, a baseline, a parent's score."""
    axes.axhline(y, color=colour, linewidth=1.1, linestyle=(0, (2, 2)))
    _note(axes, y, text, colour, above=above, gap=3)


def _note(axes: Axes, y: float, text: str, colour: str, *, above: bool, gap: int) -> None:
    """A text at the right end of a horizontal line, `gap` points above or below it."""
    axes.annotate(
        text,
        (1, y),
        xycoords=("axes fraction", "data"),
        xytext=(-1 - gap, gap if above else -gap),
        textcoords="offset points",
        ha="right",
        va="bottom" if above else "top",
        color=colour,
        fontsize=8.5,
    )


def label_axes(axes: Axes, x: str, y: str, title: str = "") -> None:
    """Names with units on both axes."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if title:
        axes.set_title(title)


def to_svg(figure: Figure, name: str, alt: str) -> str:
    """The figure as an ``<svg>`` to put into a page.

    Args:
        figure: what to draw.
        name: makes the ids of its parts unique, so that one page can have many.
        alt: what a reader who can't see it should know.
    """
    import html

    stream = io.StringIO()
    with style():
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r' id="[a-z]+[0-9]*(?:[._][a-z]*)?_[0-9]+"', "", text)  # groups such as axes_1: never referred to
    text = re.sub(r' id="([^"]+)"', rf' id="{name}-\1"', text)
    text = re.sub(r'(?:xlink:)?href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    box = re.search(r'viewBox="[^"]+"', text)
    assert box is not None
    opening = f'<svg {box.group()} role="img" aria-label="{html.escape(alt)}">'
    return re.sub(r"\n\s*", "\n", opening + text[text.index(">") + 1 :]).strip()
