"""Lesson 13's picture of all methods: what is read, drawn and told, on a table made up here."""

from __future__ import annotations

import math

import pytest
import torch
from minirlhf_course.methods import METHODS, draw_methods, ends, of_rows, table


def made_up():
    names = ("kl", "proxy", "gold", "win_rate", "length", "ended", "seconds", "sampled_tokens")

    def row(method, seed, step, *numbers, tax="", models=2):
        cells = dict(zip(names, map(str, numbers), strict=True))
        return {"method": method, "seed": str(seed), "step": str(step), "corpus_loss": tax} | cells | {
            "labels": "0" if method == "sft" else "6000",
            "models": str(models),
        }  # fmt: skip

    rows = [row("sft", 0, 0, 0, 0.5, 1.5, 0.5, 14, 1, 0, 0, tax="2.0", models=1)]
    for seed in (0, 1, 2):
        rows.append(row("ppo", seed, 10, 1, 1, 1.6, 0.6, 15, 1, 20, 1000, models=4))
        rows.append(row("ppo", seed, 20, 4, 1.5, 1.9 + 0.1 * seed, 0.7, 16, 1, 40, 2000, tax="2.25", models=4))
    rows += [row("best_of_n", 0, n, math.log(n) - 1 + 1 / n, 1, 1.5, 0.5, 14, 1, n, 10 * n) for n in (1, 4)]
    return of_rows(rows)


def test_columns_are_by_method_and_seed():
    data = made_up()
    assert list(data) == ["sft", "best_of_n", "ppo"], "a method that is not in the file is left out"
    assert data["ppo"]["gold"].shape == (3, 2) and data["best_of_n"]["kl"].shape == (1, 2)
    assert ends(data, "gold")["ppo"].tolist() == pytest.approx([1.9, 2.0, 2.1])
    assert torch.isnan(data["ppo"]["corpus_loss"][:, 0]).all()


def test_the_table_tells_means_the_spread_and_the_tax():
    head, sft, best, ppo = table(made_up()).splitlines()
    assert head.split()[:4] == ["models", "labels", "tokens", "seconds"]
    assert sft.startswith("SFT") and best.startswith("best of n") and "0, SFT's" in best
    assert ppo.split() == [
        "PPO",
        "4",
        "6,000",
        "2,000",
        "40",
        "4.00",
        "2.00",
        "±",
        "0.10",
        "70.0%",
        "1.50",
        "+0.250",
        "16.0",
    ]


def test_every_method_is_a_line_from_sft_to_its_ringed_last_point():
    figure = draw_methods(made_up())
    left, right = figure.axes
    lines = {line.get_label(): line for line in left.get_lines()}
    assert list(lines["PPO"].get_xdata()) == pytest.approx([0, 1, 2])
    assert list(lines["PPO"].get_ydata()) == pytest.approx([1.5, 1.6, 2.0])
    assert lines["best of n"].get_xdata()[0] == 0 and len(lines["best of n"].get_xdata()) == 2
    assert len(left.collections) == 1, "a band only where there are several seeds"
    rings = [line for line in left.get_lines() if line.get_fillstyle() == "none"]
    assert len(rings) == 2 and right.get_legend() is not None and len(METHODS) == 7
