"""Pictures for the lessons: the report's style, the axes that lessons 01 to 05 share, and figures in a notebook.

with style():
    figure, (left, right) = panels(1, 2)
    curve(left, steps, mean, "ppo", band=(low, high))
    healthy_range(right, "policy/clip_fraction")
show(figure, "What to see here.")
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from minirlhf.report.plotting import (
    COLOURS,
    HEALTHY,
    INK,
    NAMES,
    QUIET,
    curve,
    healthy_range,
    label_axes,
    level,
    panels,
    smooth,
    style,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "HEALTHY",
    "INK",
    "LEARNERS",
    "NAMES",
    "QUIET",
    "curve",
    "healthy_range",
    "label_axes",
    "learning_curves",
    "level",
    "panels",
    "show",
    "smooth",
    "style",
    "to_png",
]

LEARNERS = {
    "reinforce": ("REINFORCE", "#0072b2"),
    "baseline": ("with a baseline", "#008a63"),
    "actor_critic": ("actor-critic", "#b0568c"),
    "a2c": ("A2C", "#8a6600"),
    "trpo": ("TRPO", "#5e4fa2"),
    "ppo": ("PPO", "#d55e00"),
}
"""Name and colour of each method of lessons 01 to 05."""


class Evaluated(Protocol):
    """A point of a learning curve, such as `minirlhf.control.evaluation.Evaluation`."""

    @property
    def env_steps(self) -> int: ...
    @property
    def mean_return(self) -> float: ...


class LearningCurve(NamedTuple):
    """What several seeds say together, at environment steps that all of them cover: four arrays of one length."""

    env_steps: Any
    mean: Any
    low: Any
    high: Any


def learning_curves(
    axes: Axes,
    seeds: Sequence[Sequence[Evaluated]],
    who: str,
    *,
    label: str | None = None,
    highest: float = 500.0,
    solved: float | None = 475.0,
) -> LearningCurve:
    """The learning curves of one method: a thin line a seed, their mean, and a band from the lowest to the highest.

    Seeds are evaluated at steps of their own (an episode ends when it ends), so the mean is taken of the straight lines
    between points, where all seeds have one. The axes are those of lessons 01 to 05 (CartPole-v1): the same in every
    figure, whoever draws.

    Args:
        axes: where to draw; several methods may share it.
        seeds: the evaluations of each seed, `[run.evaluations for run in run_seeds(...)]`.
        who: a key of LEARNERS, or any colour.
        label: for the legend; left out: the method's name.
        highest: the best return there is, the top of the axis.
        solved: the return at which the task counts as solved, a dashed line; None for no line.

    Returns:
        The mean and the band as they are drawn.

    Raises:
        ValueError: no seed, or one that was never evaluated.

    Example:
        >>> from minirlhf.control.evaluation import Evaluation
        >>> seeds = [[Evaluation(0, 0, 20), Evaluation(100, 1, 40)], [Evaluation(0, 0, 30), Evaluation(50, 1, 90)]]
        >>> _, axes = panels()
        >>> curve = learning_curves(axes, seeds, "reinforce")
        >>> float(curve.env_steps[-1]), float(curve.mean[-1])  # one seed's last point is at 50
        (50.0, 60.0)
    """
    import numpy as np

    if not seeds or not all(seeds):
        raise ValueError("learning_curves needs at least one seed, and at least one evaluation of each")
    name, colour = LEARNERS.get(who, (who, who))
    points = [([row.env_steps for row in rows], [row.mean_return for row in rows]) for rows in seeds]
    start, end = max(steps[0] for steps, _ in points), min(steps[-1] for steps, _ in points)
    if end < start:
        raise ValueError("no environment step is covered by all seeds: evaluate them more often, or train on")
    grid = np.linspace(start, end, 200)
    table = np.stack([np.interp(grid, *point) for point in points])
    mean, low, high = table.mean(0), table.min(0), table.max(0)

    if not axes.get_xlabel():  # the frame, once
        label_axes(axes, "environment steps", "mean return of 20 greedy episodes")
        axes.set_ylim(0, 1.04 * highest)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        if solved is not None:
            axes.axhline(solved, color=QUIET, linewidth=1.1, linestyle=(0, (2, 2)))
            axes.annotate(  # at the left, where no curve is high yet
                f"solved: {solved:g}",
                (0, solved),
                xycoords=("axes fraction", "data"),
                xytext=(4, 3),
                textcoords="offset points",
                color=QUIET,
                fontsize=8.5,
            )
    for steps, returns in points:
        axes.plot(steps, returns, color=colour, linewidth=0.7, alpha=0.4)
    axes.fill_between(grid, low, high, color=colour, alpha=0.13, linewidth=0)
    axes.plot(grid, mean, color=colour, linewidth=2.2, label=label or name)
    return LearningCurve(grid, mean, low, high)


def to_png(figure: Figure, dpi: int = 110, colours: int = 64) -> bytes:
    """The figure as a PNG, equal bytes for equal figures. `colours` of its own choice: 64 take a quarter of the bytes.

    Lines of few hues look the same in 16, and take less.
    """
    import numpy as np
    from PIL import Image  # matplotlib's own image library

    stream = io.BytesIO()
    with style():
        figure.savefig(stream, format="png", dpi=dpi, metadata={"Software": None})
    picture = Image.open(stream).convert("RGB").quantize(colours, kmeans=2, dither=Image.Dither.NONE)
    # Pillow filters the rows, which is good for shades: indices into a palette take a seventh more so.
    pixels, depth = np.asarray(picture), 8
    if colours <= 16:  # two pixels in a byte
        pixels, depth = np.pad(pixels, ((0, 0), (0, pixels.shape[1] % 2))), 4
        pixels = pixels[:, ::2] << 4 | pixels[:, 1::2]
    deflate = zlib.compressobj(9, strategy=zlib.Z_FILTERED)
    rows = deflate.compress(np.insert(pixels, 0, 0, axis=1).tobytes()) + deflate.flush()  # 0: a row without a filter
    header = struct.pack(">IIBBBBB", *picture.size, depth, 3, 0, 0, 0)
    palette = bytes(picture.getpalette() or ())[: 3 * colours]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", header), (b"PLTE", palette), (b"IDAT", rows), (b"IEND", b""))
    )


def show(figure: Figure, caption: str = "", dpi: int = 110, colours: int = 64) -> None:
    """Show a figure in a notebook, its caption below.

    `dpi` is dots per inch: fewer for a figure of many panels. `colours`: see `to_png`.
    """
    import importlib

    display = importlib.import_module("IPython.display")
    display.display(display.Image(to_png(figure, dpi, colours), alt=caption or "plot"))
    if caption:
        display.display(display.Markdown(f"*{caption}*"))
