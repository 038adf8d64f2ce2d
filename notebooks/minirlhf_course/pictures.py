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


def _cell(
    axes: Any, x: float, y: float, text: str = "", *, fill: str = "white", edge: str = QUIET, size: float = 8, **about: Any
) -> None:
    """A box of one number, its left lower corner at (x, y)."""
    from matplotlib.patches import Rectangle

    width, height = about.pop("width", 1.0), about.pop("height", 1.0)
    ink = about.pop("ink", INK)
    axes.add_patch(Rectangle((x, y), width, height, facecolor=fill, edgecolor=edge, linewidth=0.8, **about))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=ink)


def _canvas(width: float, height: float, xlim: tuple[float, float], ylim: tuple[float, float]) -> tuple[Figure, Any]:
    figure, axes = panels(1, 1, width=width, height=height)
    axes.set_xlim(*xlim)
    axes.set_ylim(*ylim)
    axes.axis("off")
    return figure, axes


def lanes_and_masks(memory: Any, at: Any, inside: Any, columns: int, row_stride: int) -> Figure:
    """Memory as a strip of numbers, and below each the lane that points at it, a line per program.

    Args:
        memory: the numbers, [rows * row_stride].
        at: where each lane points, [programs, BLOCK].
        inside: its mask, like `at`.
        columns: numbers of a row that are its own.
        row_stride: from the beginning of a row to that of the next.
    """
    hues = (BLUE, ORANGE, GREEN)
    end = max(len(memory), int(at.max()) + 1)
    with style():
        figure, axes = _canvas(8.0, 2.5, (-3.6, end + 0.1), (-1.35 * len(at) - 0.3, 2.5))
        axes.text(-0.3, 0.5, "memory", ha="right", va="center", fontsize=9)
        axes.text(-0.3, 1.45, "address", ha="right", va="center", fontsize=8, color=QUIET)
        for address, number in enumerate(memory):
            row, column = divmod(address, row_stride)
            own = column < columns
            fill = TINTS[hues[row % 3]] if own else TINTS[GREY]
            _cell(axes, address, 0, f"{number:g}", fill=fill, ink=INK if own else QUIET, size=8.5)
            axes.text(address + 0.5, 1.45, str(address), ha="center", va="center", fontsize=7.5, color=QUIET)
            if column == 0:
                axes.text(address, 2.1, f"row {row}", fontsize=8.5, color=hues[row % 3])
        for program, (places, own) in enumerate(zip(at.tolist(), inside.tolist(), strict=True)):
            y = -1.35 * (program + 1)
            axes.text(-0.3, y + 0.5, f"program {program}", ha="right", va="center", fontsize=9, color=hues[program % 3])
            for lane, (place, reads) in enumerate(zip(places, own, strict=True)):
                fill = TINTS[hues[program % 3]] if reads else "white"
                edge = hues[program % 3] if reads else QUIET
                text = f"{lane}" if reads else "×"
                _cell(axes, place, y, text, fill=fill, edge=edge, ink=INK if reads else QUIET, size=8.5)
    return figure


def online_softmax(blocks: Sequence[Sequence[float]], steps: Sequence[dict[str, float]]) -> Figure:
    """The logits of a row with the running maximum, and below, the running sum before and after each block.

    Args:
        blocks: the logits of each block.
        steps: of each block `peak` and `total` after it, `rescale`, which multiplied the old sum, and `kept`, the old
            sum after that.
    """
    with style():
        figure, (top, bottom) = panels(2, 1, width=7.6, height=2.0)
        x, before = 0.0, None
        for i, (block, step) in enumerate(zip(blocks, steps, strict=True)):
            places = [x + j for j in range(len(block))]
            top.bar(places, block, width=0.75, color=TINTS[BLUE], edgecolor=BLUE, linewidth=0.8)
            left, right = x - 0.5, x + len(block) - 0.5
            if before is not None:
                top.plot([left, left], [before["peak"], step["peak"]], color=ORANGE, linewidth=2)
            top.plot([left, right], [step["peak"]] * 2, color=ORANGE, linewidth=2)
            top.text(right - 0.1, step["peak"] + 0.15, f"m = {step['peak']:.2f}", color=ORANGE, fontsize=8.5, ha="right")
            middle = (left + right) / 2
            bottom.bar(middle + 0.45, step["kept"], width=0.8, color=TINTS[GREY], edgecolor=QUIET, linewidth=0.8)
            bottom.bar(middle + 0.45, step["total"] - step["kept"], width=0.8, bottom=step["kept"], color=TINTS[BLUE],
                       edgecolor=BLUE, linewidth=0.8)  # fmt: skip
            if before is not None:
                bottom.bar(middle - 0.75, before["total"], width=0.8, color="white", edgecolor=QUIET, linewidth=0.8,
                           linestyle=(0, (2, 2)))  # fmt: skip
                bottom.annotate("", (middle + 0.02, step["kept"] / 2), (middle - 0.32, before["total"] / 2),
                                arrowprops={"arrowstyle": "->", "color": INK, "linewidth": 0.8})  # fmt: skip
                bottom.text(middle - 0.75, before["total"] + 0.08, f"× {step['rescale']:.2f}", ha="center", fontsize=8.5)
            bottom.text(middle + 0.45, step["total"] + 0.08, f"s = {step['total']:.2f}", ha="center", fontsize=8.5,
                        color=BLUE)  # fmt: skip
            for panel in (top, bottom):
                if i:
                    panel.axvline(left, color=QUIET, linewidth=0.6)
            x, before = x + len(block), step
        high = max(step["peak"] for step in steps)
        low = min(min(block) for block in blocks)
        top.set_ylim(min(low, 0) - 0.3, high + 1.2)
        bottom.set_ylim(0, 1.25 * max(step["total"] for step in steps))
        for panel in (top, bottom):
            panel.set_xlim(-0.5, x - 0.5)
            panel.grid(False, axis="x")
            panel.set_xticks([])
        label_axes(top, "", "logit z", "")
        label_axes(bottom, "", "sum s", "")
        bottom.set_xticks([4 * i + 1.5 for i in range(len(blocks))], [f"block {i}" for i in range(len(blocks))])
    return figure


def row_of_blocks(skew: int, end: int, token_at: int, group: int, block: int, visits: Sequence[tuple[int, str]]) -> Figure:
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
        figure, axes = _canvas(8.0, 2.3, (-0.5, last + 0.5), (-3.9, 3.2))
        for at in range(last):
            own = skew <= at < end
            fill = TINTS[PINK] if at == token_at else TINTS[BLUE] if own else TINTS[GREY]
            _cell(axes, at, 0, fill=fill, edge="white")
        for at in range(0, last + 1, group):
            whole_block = at % block == 0
            axes.plot([at, at], [-0.25 if whole_block else 0, 1.0 if not whole_block else 1.25], color=INK,
                      linewidth=1.4 if whole_block else 0.6)  # fmt: skip
        axes.annotate("the row before", (skew / 2, 1.0), (0, 2.3), fontsize=8.5, color=QUIET,
                      arrowprops={"arrowstyle": "-", "color": QUIET, "linewidth": 0.6})  # fmt: skip
        axes.annotate("the token's logit", (token_at + 0.5, 1.0), (token_at + 0.5, 2.3), fontsize=8.5, color=PINK,
                      ha="center", arrowprops={"arrowstyle": "-", "color": PINK, "linewidth": 0.6})  # fmt: skip
        axes.annotate("the row after", ((end + last) / 2, 1.0), (last, 2.3), fontsize=8.5, color=QUIET, ha="right",
                      arrowprops={"arrowstyle": "-", "color": QUIET, "linewidth": 0.6})  # fmt: skip
        for order, (start, why) in enumerate(visits):
            whole = why == "whole"
            colour = BLUE if whole else ORANGE
            _cell(axes, start + 0.15, -2.2, f"{order + 1}", fill=TINTS[colour], edge=colour, size=10, width=block - 0.3,
                  height=1.3)  # fmt: skip
            text = "whole: no mask" if whole else f"masked: {why}"
            axes.text(start + block / 2, -2.9, text, ha="center", va="center", fontsize=8, color=colour)
        axes.text(0, -3.75, f"thin lines: every 16 bytes, a group of {group}   ·   thick lines: every block of {block}   ·   "
                  "numbers: the order of reading", fontsize=8, color=QUIET)  # fmt: skip
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
    group: int = 4,
) -> Figure:
    """One tile of GAE's scan, its lanes from left to right, a line of boxes per stage.

    Args:
        times: the step t of each lane; lanes before step 0 are left out by their mask.
        ends: whether an episode ends with the lane's step.
        inside: (slope, intercept) of each lane's line after its thread has composed its group.
        groups: the line of each whole group.
        scanned: the last advantage of each group, once the groups have been scanned.
        advantages: of each lane.
        carry: the advantage that the tile begins with, the last of the tile before.
        follows: which tile the next carry goes to.
        group: lanes of a thread.
    """
    lanes = len(times)
    hues = (BLUE, ORANGE, GREEN, PINK)
    with style():
        figure, axes = _canvas(8.6, 4.1, (-3.9, lanes + 0.6), (-9.6, 2.1))
        names = ((0, "step t"), (-2.2, "1  in each thread:\nlines composed"), (-4.9, "2  across threads:\nscan of 4 lines"),
                 (-7.5, "3  in each thread:\nadvantages"))  # fmt: skip
        for y, name in names:
            axes.text(-0.25, y + 0.5, name, ha="right", va="center", fontsize=8.5, linespacing=1.3)
        for lane, t in enumerate(times):
            hue = hues[lane // group % len(hues)]
            x = lane + 0.08 * (lane // group)
            _cell(axes, x, 0, f"{t}" + ("|" if ends[lane] else ""), fill=TINTS[hue], edge=hue)
            last = lane % group == group - 1
            a, b = inside[lane]
            _cell(axes, x, -2.2, f"{a:.2f}\n{b:+.2f}", fill=TINTS[hue] if last else "white", edge=hue, size=6.8,
                  height=1.25)  # fmt: skip
            _cell(axes, x, -7.5, f"{advantages[lane]:+.2f}", fill=TINTS[hue], edge=hue, size=7.2)
            if not last:
                axes.annotate("", (x + 1.12, -2.45), (x + 0.88, -2.45),
                              arrowprops={"arrowstyle": "->", "color": hue, "linewidth": 1.0})  # fmt: skip
        for i, (line, value) in enumerate(zip(groups, scanned, strict=True)):
            hue = hues[i % len(hues)]
            x, width = group * i + 0.08 * i, float(group)
            axes.text(x + width / 2, 1.35, f"thread {i}", ha="center", fontsize=8.5, color=hue)
            a, b = line
            text = f"{a:.2f} x {'+' if b >= 0 else '-'} {abs(b):.2f}   →   {value:+.2f}"
            _cell(axes, x, -4.9, text, fill=TINTS[hue], edge=hue, size=8.2, width=width)
            axes.annotate("", (x + width / 2, -3.85), (x + width - 0.5, -2.25),
                          arrowprops={"arrowstyle": "->", "color": hue, "linewidth": 0.9})  # fmt: skip
            start = x + width + 0.5 if i + 1 < len(groups) else None
            if start is not None:
                axes.annotate("", (start, -6.45), (x + width - 0.4, -4.95),
                              arrowprops={"arrowstyle": "->", "color": hue, "linewidth": 0.9})  # fmt: skip
        axes.annotate("", (0.5, -6.45), (-0.6, -5.75), arrowprops={"arrowstyle": "->", "color": QUIET, "linewidth": 0.9})
        axes.text(-0.7, -5.75, f"carry {carry:+.2f}", ha="right", va="center", fontsize=8, color=QUIET)
        axes.text(lanes + 0.24, -8.25, f"carry {advantages[-1]:+.2f} to {follows}", ha="right", va="center", fontsize=8, color=QUIET)
        axes.text(0, -9.3, "| the episode ends with this step: its slope is 0, and nothing from its left gets past it",
                  fontsize=8, color=QUIET)  # fmt: skip
    return figure
