"""Lesson 06's pictures show the numbers they are given, all of them, inside the frame."""

from __future__ import annotations

import pytest
import torch
from minirlhf_course import pictures
from minirlhf_course.plotting import to_png


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def inside(figure) -> bool:
    """Whether no label of a drawing is cut off at the figure's edge."""
    assert to_png(figure)[:4] == b"\x89PNG"
    box = figure.bbox
    found = [text.get_window_extent() for axes in figure.axes for text in axes.texts]
    return all(box.x0 <= x.x0 and x.x1 <= box.x1 and box.y0 <= x.y0 and x.y1 <= box.y1 for x in found)


def test_lanes_are_below_what_they_point_at_and_masked_ones_are_crossed():
    at = 6 * torch.arange(3)[:, None] + torch.arange(8)
    figure = pictures.lanes_and_masks(torch.arange(18.0), at, torch.arange(8).expand(3, 8) < 5, 5, 6)
    assert texts(figure).count("×") == 3 * 3
    boxes = [box for box in figure.axes[0].patches if box.get_y() < 0]
    assert sorted(box.get_x() for box in boxes) == sorted(at.flatten().tolist())
    assert inside(figure)


def test_the_online_softmax_shows_its_running_maximum_and_sum():
    steps = [
        {"peak": 1.0, "total": 2.0, "rescale": 0.0, "kept": 0.0},
        {"peak": 3.0, "total": 1.5, "rescale": 0.14, "kept": 0.27},
    ]
    figure = pictures.online_softmax([[0.0, 1.0], [3.0, -1.0]], steps)
    assert {"m = 1.00", "m = 3.00", "s = 2.00", "s = 1.50", "× 0.14"} <= set(texts(figure))
    heights = [bar.get_height() for bar in figure.axes[1].patches]
    assert heights == pytest.approx([0.0, 2.0, 0.27, 1.23, 2.0])  # kept, the block's own; and the old sum


def test_a_row_is_read_in_the_order_of_the_visits():
    visits = [(16, "whole"), (0, "skew"), (48, "tail"), (32, "token")]
    figure = pictures.row_of_blocks(3, 56, 37, 4, 16, visits)
    assert [text for text in texts(figure) if text.isdigit()] == ["1", "2", "3", "4"]
    assert "masked: tail" in texts(figure) and texts(figure).count("whole: no mask") == 1
    assert inside(figure)


def test_a_tile_of_the_scan_shows_each_stages_numbers():
    lines = [(0.9, 1.0), (0.81, 2.0), (0.0, -3.0), (0.0, -1.5)] * 2
    figure = pictures.scan_of_groups(
        list(range(9, 1, -1)), [False] * 7 + [True], lines, lines[3::4], [-1.5, 2.5], [0.25] * 8, 0.0, "the next tile"
    )
    shown = texts(figure)
    assert shown.count("+0.25") == 8 and "9" in shown and "2|" in shown
    assert "0.00 x - 1.50   →   +2.50" in shown and "carry +0.25 to the next tile" in shown
    assert inside(figure)
