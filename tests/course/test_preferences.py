"""Lesson 13's triangle: the loss that it shades is DPO's, and its lowest point is the best policy."""

from __future__ import annotations

import torch
from minirlhf_course.plotting import panels
from minirlhf_course.preferences import draw_triangle, loss_of_policies

from minirlhf.losses import ranking_loss

REF = torch.tensor([0.35, 0.60, 0.05], dtype=torch.float64).log()
REWARDS = torch.tensor([2.0, 0.0, -3.0], dtype=torch.float64)
ALL = [(0, 1), (0, 2), (1, 2)]


def test_it_is_the_packages_loss_with_each_pair_both_ways_round():
    logprobs = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(1)
    for policy, got in zip(logprobs, loss_of_policies(logprobs, REF, REWARDS, ALL), strict=True):
        own, expected = policy - REF, 0.0
        for i, j in ALL:
            share = torch.sigmoid(REWARDS[i] - REWARDS[j])
            pair = own[[i, j]][None]
            first = ranking_loss(pair, torch.tensor([[1.0, 0.0]]))
            expected += share * first + (1 - share) * ranking_loss(pair, torch.tensor([[0.0, 1.0]]))
        torch.testing.assert_close(got, expected / 3)


def test_all_pairs_have_one_lowest_point_and_one_pair_has_a_line_of_them():
    best = (REF + REWARDS).log_softmax(0)
    others = (
        best + 0.05 * torch.randn(500, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ).log_softmax(1)
    assert (loss_of_policies(others, REF, REWARDS, ALL) > loss_of_policies(best, REF, REWARDS, ALL)).all()
    third = torch.tensor([0.0, 0.5, 0.999], dtype=torch.float64)[:, None]
    share = best.exp()[:2] / best.exp()[:2].sum()
    line = torch.cat(((1 - third) * share, third), 1).clamp(min=1e-300).log()
    losses = loss_of_policies(line, REF, REWARDS, [(0, 1)])
    torch.testing.assert_close(losses, losses[:1].expand(3))


def test_the_triangle_has_every_path_and_point_in_its_legend():
    figure, axes = panels(1, 1)
    path = torch.tensor([[0.3, 0.3, 0.4], [1.0, 0.0, 0.0]], dtype=torch.float64)
    draw_triangle(
        axes,
        ("a", "b", "c"),
        lambda logprobs: loss_of_policies(logprobs, REF, REWARDS, ALL),
        {"reference": (REF.exp(), "#5a626e")},
        {"path": (path, "#0072b2")},
        "all",
    )
    assert set(axes.get_legend_handles_labels()[1]) == {"reference", "path"}
    end = next(line for line in axes.get_lines() if line.get_label() == "path")
    assert (end.get_xdata()[-1], end.get_ydata()[-1]) == (0.0, 0.0), "answer a alone is the lower left corner"
    assert {text.get_text() for text in axes.texts} == {"a", "b", "c"} and figure.axes == [axes]
