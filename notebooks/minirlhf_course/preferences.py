"""Three answers to one prompt, so few that DPO's loss can be seen whole: lesson 13's triangle.

A policy over three answers is a point of a triangle: a corner is one answer alone, the middle is a third each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf_course.plotting import INK, QUIET

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_triangle", "loss_of_policies"]

HEIGHT = 3**0.5 / 2


def loss_of_policies(logprobs: Tensor, ref: Tensor, rewards: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """DPO's expected loss (beta 1) of many policies at once, each [3] log-probs: [..., 3] gives [...].

    Every pair is labeled both ways round, as often as Bradley and Terry say of these rewards.

    >>> even = torch.zeros(3, dtype=torch.float64).log_softmax(0)
    >>> loss_of_policies(even, even, torch.zeros(3, dtype=torch.float64), [(0, 1)])
    tensor(0.6931, dtype=torch.float64)
    """
    own, total = logprobs - ref, torch.zeros(logprobs.shape[:-1], dtype=logprobs.dtype)
    for i, j in pairs:
        share, margin = torch.sigmoid(rewards[i] - rewards[j]), own[..., i] - own[..., j]
        total = total + share * F.softplus(-margin) + (1 - share) * F.softplus(margin)
    return total / len(pairs)


def draw_triangle(
    axes: Axes,
    names: Sequence[str],
    losses: Any,
    points: Mapping[str, tuple[Tensor, str]],
    paths: Mapping[str, tuple[Tensor, str]],
    title: str = "",
    lowest: Tensor | None = None,
) -> None:
    """Draw a loss over all policies, policies as points and trainings as paths.

    Args:
        axes: where to draw; made a triangle.
        names: of the answers: lower left, lower right, top.
        losses: of log-probs [M, 3], the loss of each: [M].
        points: name to (probabilities [3], colour).
        paths: name to (probabilities [steps, 3], colour).
        title: above it.
        lowest: the ends of a line of policies [2, 3] where the loss is lowest, drawn dashed.
    """
    import matplotlib.tri as tri
    import numpy as np

    grid = torch.tensor(
        [(i, j, 120 - i - j) for i in range(121) for j in range(121 - i)], dtype=torch.float64
    ) / 120  # fmt: skip
    inside = (0.996 * grid + 0.004 / 3).log()
    x, y = _place(inside.exp())
    values = losses(inside).numpy()
    levels = values.min() + np.geomspace(0.004, values.max() - values.min(), 12)
    mesh = tri.Triangulation(x, y)
    axes.tricontourf(mesh, values, [values.min() - 1e-9, *levels], cmap="Greys", alpha=0.55)
    if lowest is not None:
        axes.plot(*_place(lowest), color=INK, linewidth=1, linestyle=(0, (4, 3)), label="lowest loss")
    axes.plot([0, 1, 0.5, 0], [0, 0, HEIGHT, 0], color=QUIET, linewidth=1)
    for name, (path, colour) in paths.items():
        px, py = _place(path)
        axes.plot(px, py, color=colour, linewidth=2, label=name)
        axes.plot(px[-1], py[-1], "o", color=colour, markersize=6)
    for name, (point, colour) in points.items():
        px, py = _place(point)
        axes.plot(px, py, "D", color=colour, markersize=6, label=name, zorder=3, markeredgecolor="white")
    for name, at, offset, ha in (
        (names[0], (0, 0), (0, -6), "center"),
        (names[1], (1, 0), (0, -6), "center"),
        (names[2], (0.5, HEIGHT), (0, 5), "center"),
    ):
        va = "bottom" if offset[1] > 0 else "top"
        axes.annotate(name, at, offset, textcoords="offset points", ha=ha, va=va, color=INK, fontsize=9)
    axes.set_aspect("equal")
    axes.axis("off")
    axes.set_xlim(-0.12, 1.12)
    axes.set_ylim(-0.12, HEIGHT + 0.12)
    axes.set_title(title)


def _place(p: Tensor) -> tuple[Any, Any]:
    return (p[..., 1] + 0.5 * p[..., 2]).numpy(), (HEIGHT * p[..., 2]).numpy()
