"""Pictures of what lesson 06 computes: lanes and masks, the online softmax, a row's blocks, the scan of GAE.

Each draws numbers that the lesson's own cells have computed, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from minirlhf_course.plotting import COLOURS, INK, QUIET, label_axes, panels, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["lanes_and_masks", "online_softmax", "row_of_blocks", "scan_of_groups"]

BLUE, ORANGE, GREEN, PINK, GREY = (COLOURS[name] for name in ("sft", "ppo", "ppo_ptx", "reward_model", "base"))
TINTS = {BLUE: "#cfe3f2", ORANGE: "#f8dcc9", GREEN: "#cdeae0", PINK: "#eedbe7", GREY: "#e6e7ea"}
HUES = (BLUE, ORANGE, GREEN, PINK)


def _canvas(width: float, height: float, xlim: tuple[float, float], ylim: tuple[float, float]) -> tuple[Figure, Any]:
    figure, axes = panels(1, 1, width=width, height=height)
    axes.set_xlim(*xlim)
    axes.set_ylim(*ylim)
    axes.axis("off")
    return figure, axes


def _box(axes: Any, corner: tuple[float, float], size: tuple[float, float], fill: str, edge: str) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle(corner, *size, facecolor=fill, edgecolor=edge, linewidth=0.8))


def _text(axes: Any, x: float, y: float, text: str, ink: str = INK, size: float = 8.5, ha: str = "center") -> None:
    axes.text(x, y, text, ha=ha, va="center", fontsize=size, color=ink)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], ink: str) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": ink, "linewidth": 0.9})


def lanes_and_masks(memory: Any, at: Any, inside: Any, columns: int, row_stride: int) -> Figure:
    """Memory as a strip of numbers, and below each the lane that points at it, a line per program.

    Args:
        memory: the numbers, [rows * row_stride].
        at: where each lane points, [programs, BLOCK].
        inside: its mask, like `at`.
        columns: numbers of a row that are its own.
        row_stride: from the beginning of a row to that of the next.
    """
    end = max(len(memory), int(at.max()) + 1)
    with style():
        figure, axes = _canvas(8.0, 2.5, (-3.6, end + 0.1), (-1.35 * len(at) - 0.3, 2.5))
        _text(axes, -0.3, 1.45, "address", QUIET, 8, ha="right")
        _text(axes, -0.3, 0.5, "memory", size=9, ha="right")
        for address, number in enumerate(memory):
            row, column = divmod(address, row_stride)
            own, hue = column < columns, HUES[row % 4]
            _box(axes, (address, 0), (1, 1), TINTS[hue if own else GREY], QUIET)
            _text(axes, address + 0.5, 0.5, f"{number:g}", INK if own else QUIET)
            _text(axes, address + 0.5, 1.45, f"{address}", QUIET, 7.5)
            if column == 0:
                _text(axes, address, 2.2, f"row {row}", hue, ha="left")
        for program, (places, reading) in enumerate(zip(at.tolist(), inside.tolist(), strict=True)):
            y, hue = -1.35 * (program + 1), HUES[program % 4]
            _text(axes, -0.3, y + 0.5, f"program {program}", hue, 9, ha="right")
            for lane, (place, reads) in enumerate(zip(places, reading, strict=True)):
                _box(axes, (place, y), (1, 1), TINTS[hue] if reads else "white", hue if reads else QUIET)
                _text(axes, place + 0.5, y + 0.5, f"{lane}" if reads else "×", INK if reads else QUIET)
    return figure


def online_softmax(blocks: Sequence[Sequence[float]], steps: Sequence[dict[str, float]]) -> Figure:
    """The logits of a row with the running maximum, and below, the running sum before and after each block.

    Args:
        blocks: the logits of each block.
        steps: of each block `peak` and `total` after it, `rescale`, which multiplied the old sum, and `kept`, the old
            sum after that.
    """
    width = len(blocks[0])
    with style():
        figure, (top, bottom) = panels(2, 1, width=7.6, height=2.0)
        for i, (block, step) in enumerate(zip(blocks, steps, strict=True)):
            left, middle, right = i * width - 0.5, (i + 0.5) * width - 0.5, (i + 1) * width - 0.5
            kept, own = step["kept"], step["total"] - step["kept"]
            top.bar([i * width + j for j in range(width)], block, 0.75, color=TINTS[BLUE], edgecolor=BLUE)
            top.plot([left, right], [step["peak"]] * 2, color=ORANGE, linewidth=2)
            top.text(right - 0.1, step["peak"] + 0.15, f"m = {step['peak']:.2f}", color=ORANGE, ha="right")
            bottom.bar(middle + 0.45, kept, 0.8, color=TINTS[GREY], edgecolor=QUIET)
            bottom.bar(middle + 0.45, own, 0.8, bottom=kept, color=TINTS[BLUE], edgecolor=BLUE)
            bottom.text(middle + 0.45, step["total"] + 0.08, f"s = {step['total']:.2f}", ha="center", color=BLUE)
            if i:
                old = steps[i - 1]
                top.plot([left, left], [old["peak"], step["peak"]], color=ORANGE, linewidth=2)
                bottom.bar(middle - 0.75, old["total"], 0.8, color="white", edgecolor=QUIET, linestyle=(0, (2, 2)))
                bottom.text(middle - 0.75, old["total"] + 0.08, f"× {step['rescale']:.2f}", ha="center")
                _arrow(bottom, (middle - 0.32, old["total"] / 2), (middle + 0.02, kept / 2), INK)
                for panel in (top, bottom):
                    panel.axvline(left, color=QUIET, linewidth=0.6)
        top.set_ylim(min(min(map(min, blocks)), 0) - 0.3, max(step["peak"] for step in steps) + 1.2)
        bottom.set_ylim(0, 1.25 * max(step["total"] for step in steps))
        for panel, what in ((top, "logit z"), (bottom, "sum s")):
            panel.set_xlim(-0.5, len(blocks) * width - 0.5)
            panel.grid(False, axis="x")
            panel.set_xticks([])
            label_axes(panel, "", what, "")
        bottom.set_xticks(
            [(i + 0.5) * width - 0.5 for i in range(len(blocks))], [f"block {i}" for i in range(len(blocks))]
        )
    return figure


def row_of_blocks(
    skew: int, end: int, token_at: int, group: int, block: int, visits: Sequence[tuple[int, str]]
) -> Figure:
    """One row of logits in memory, in groups of 16 bytes, and the blocks in the order in which a program reads them.

    Args:
        skew: numbers between the multiple of 16 bytes and the row's first.
        end: where the row ends.
        token_at: where its token's logit is.
        group: numbers in 16 bytes.
        block: numbers in a block.
        visits: (start, "whole" or what the mask is for) of each block read, in order.
    """
    last = max(start for start, _ in visits) + block
    with style():
        figure, axes = _canvas(8.0, 2.3, (-0.5, last + 0.5), (-4.1, 3.2))
        for at in range(last):
            hue = PINK if at == token_at else BLUE if skew <= at < end else GREY
            _box(axes, (at, 0), (1, 1), TINTS[hue], "white")
        for at in range(0, last + 1, group):
            low, high, width = (-0.25, 1.25, 1.4) if at % block == 0 else (0.0, 1.0, 0.6)
            axes.plot([at, at], [low, high], color=INK, linewidth=width)
        for place, where, text, ink, ha in (
            (skew / 2, 0.0, "the row before", QUIET, "left"),
            (token_at + 0.5, token_at + 0.5, "the token's logit", PINK, "center"),
            ((end + last) / 2, float(last), "the row after", QUIET, "right"),
        ):
            line = {"arrowstyle": "-", "color": ink, "linewidth": 0.6}
            axes.annotate(text, (place, 1.0), (where, 2.3), fontsize=8.5, color=ink, ha=ha, arrowprops=line)
        for order, (start, why) in enumerate(visits):
            hue, text = (BLUE, "whole: no mask") if why == "whole" else (ORANGE, f"masked: {why}")
            _box(axes, (start + 0.15, -2.2), (block - 0.3, 1.3), TINTS[hue], hue)
            _text(axes, start + block / 2, -1.55, f"{order + 1}", size=10)
            _text(axes, start + block / 2, -2.9, text, hue, 8)
        lines = f"thin lines: every 16 bytes, a group of {group}   ·   thick lines: every block of {block}"
        _text(axes, 0, -3.8, f"{lines}   ·   numbers: the order of reading", QUIET, 8, ha="left")
    return figure


def scan_of_groups(
    times: Sequence[int],
    ends: Sequence[bool],
    inside: Sequence[tuple[float, float]],
    groups: Sequence[tuple[float, float]],
    scanned: Sequence[float],
    advantages: Sequence[float],
    carry: float,
    follows: str,
) -> Figure:
    """One tile of GAE's scan, its lanes from left to right, a line of boxes per stage.

    Args:
        times: the step t of each lane.
        ends: whether an episode ends with the lane's step.
        inside: (slope, intercept) of each lane's line after its thread has composed its group.
        groups: the line of each whole group.
        scanned: the last advantage of each group, once the groups have been scanned.
        advantages: of each lane.
        carry: the advantage that the tile begins with, the last of the tile before.
        follows: which tile the next carry goes to.
    """
    lanes = len(times)
    group = lanes // len(groups)
    with style():
        figure, axes = _canvas(8.6, 4.1, (-3.9, lanes + 0.6), (-9.6, 2.1))
        for y, name in (
            (0.5, "step t"),
            (-1.6, "1  in each thread:\nlines composed"),
            (-4.4, f"2  across threads:\nscan of {len(groups)} lines"),
            (-7.0, "3  in each thread:\nadvantages"),
        ):
            _text(axes, -0.25, y, name, ha="right")
        for lane, (t, (a, b), advantage) in enumerate(zip(times, inside, advantages, strict=True)):
            hue, x = HUES[lane // group % 4], lane + 0.08 * (lane // group)
            last = lane % group == group - 1
            _box(axes, (x, 0), (1, 1), TINTS[hue], hue)
            _box(axes, (x, -2.2), (1, 1.25), TINTS[hue] if last else "white", hue)
            _box(axes, (x, -7.5), (1, 1), TINTS[hue], hue)
            _text(axes, x + 0.5, 0.5, f"{t}|" if ends[lane] else f"{t}", size=8)
            _text(axes, x + 0.5, -1.575, f"{a:.2f}\n{b:+.2f}", size=6.8)
            _text(axes, x + 0.5, -7.0, f"{advantage:+.2f}", size=7.2)
            if not last:
                _arrow(axes, (x + 0.88, -2.45), (x + 1.12, -2.45), hue)
        for i, ((a, b), value) in enumerate(zip(groups, scanned, strict=True)):
            hue, x = HUES[i % 4], (group + 0.08) * i
            _text(axes, x + group / 2, 1.5, f"thread {i}", hue)
            _box(axes, (x, -4.9), (group, 1), TINTS[hue], hue)
            line = f"{a:.2f} x {'+' if b >= 0 else '-'} {abs(b):.2f}"
            _text(axes, x + group / 2, -4.4, f"{line}   →   {value:+.2f}", size=8.2)
            _arrow(axes, (x + group - 0.5, -2.25), (x + group / 2, -3.85), hue)
            if i + 1 < len(groups):
                _arrow(axes, (x + group - 0.4, -4.95), (x + group + 0.5, -6.45), hue)
        _arrow(axes, (-0.6, -5.75), (0.5, -6.45), QUIET)
        _text(axes, -0.7, -5.75, f"carry {carry:+.2f}", QUIET, 8, ha="right")
        _text(axes, lanes + 0.24, -8.25, f"carry {advantages[-1]:+.2f} to {follows}", QUIET, 8, ha="right")
        note = "| the episode ends with this step: its slope is 0, and nothing from its left gets past it"
        _text(axes, 0, -9.2, note, QUIET, 8, ha="left")
    return figure
