"""Lesson 13's picture of all methods: gold and proxy against the distance from SFT, and what each has cost.

rows = read_methods()
print(table(rows))
show(draw_methods(rows), "What to see ...")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from minirlhf_course.plotting import COLOURS, label_axes, level, panels, style
from minirlhf_course.results import Row, by_seed, read_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["METHODS", "Method", "draw_methods", "ends", "read_methods", "table"]


class Method(NamedTuple):
    """How a method is called and drawn."""

    name: str
    colour: str
    dashes: str | tuple[int, tuple[float, ...]] = "-"


METHODS = {
    "best_of_n": Method("best of n", COLOURS["base"], (0, (1.5, 1.5))),
    "ppo": Method("PPO", COLOURS["ppo"]),
    "ppo_ptx": Method("PPO-ptx", COLOURS["ppo_ptx"], (0, (5, 1.6))),
    "rloo": Method("RLOO", "#5e4fa2"),
    "grpo": Method("GRPO", "#b0568c", (0, (5, 1.6))),
    "dpo": Method("DPO", "#0072b2"),
    "dpo_paper": Method("DPO, β 0.1", "#56b4e9", (0, (5, 1.6))),
}
"""By their names in the file; `sft` is where all begin."""
MEANS = ("kl", "proxy", "gold", "win_rate", "length", "ended", "seconds", "sampled_tokens", "labels", "models")


def read_methods() -> dict[str, dict[str, Tensor]]:
    """The columns of data/results/methods.csv by method, [seeds, measured points]; "sft" has one of each.

    `corpus_loss` is that of the last point, NaN elsewhere.
    """
    return of_rows(read_results("methods"))


def of_rows(rows: list[Row]) -> dict[str, dict[str, Tensor]]:
    """As `read_methods`, of rows that are given."""
    names = ["sft", *(name for name in METHODS if any(row["method"] == name for row in rows))]
    of = {name: [row for row in rows if row["method"] == name] for name in names}
    return {name: by_seed(part, ("step", *MEANS, "corpus_loss")) for name, part in of.items()}


def ends(data: dict[str, dict[str, Tensor]], column: str) -> dict[str, Tensor]:
    """A column at each method's last point, one number per seed."""
    return {name: columns[column][:, -1] for name, columns in data.items()}


def draw_methods(data: dict[str, dict[str, Tensor]]) -> Figure:
    """Gold (left) and proxy (right) against the root of the KL, all methods in the same axes.

    A line is the mean of a method's seeds, a point one of its measurements, the band from its lowest to its highest
    seed; the last point is ringed.
    """
    with style():
        figure, axes = panels(1, 2, width=5.0, height=3.7)
        for ax, column in zip(axes, ("gold", "proxy"), strict=True):
            for name, method in METHODS.items():
                if name not in data:
                    continue
                start = data["sft"][column].mean()
                kl, y = data[name]["kl"].clamp(min=0).sqrt(), data[name][column]
                if name != "best_of_n":  # its first point, n = 1, is the SFT model itself
                    kl = torch.cat((torch.zeros(len(kl), 1, dtype=kl.dtype), kl), 1)
                    y = torch.cat((start.expand(len(y), 1), y), 1)
                if len(y) > 1:
                    ax.fill_between(kl.mean(0), y.amin(0), y.amax(0), color=method.colour, alpha=0.14, linewidth=0)
                ax.plot(kl.mean(0), y.mean(0), color=method.colour, linestyle=method.dashes, label=method.name)
                ax.plot(kl.mean(0)[1:], y.mean(0)[1:], ".", color=method.colour, markersize=4)
                ax.plot(kl.mean(0)[-1], y.mean(0)[-1], "o", color=method.colour, markersize=7, fillstyle="none")
            level(ax, float(data["sft"][column].mean()), "SFT", above=False)
        label_axes(axes[0], r"$\sqrt{\mathrm{KL}}$ from SFT", "gold, points", "the truth")
        label_axes(axes[1], r"$\sqrt{\mathrm{KL}}$ from SFT", "reward model's score", "the judge")
        axes[1].legend(loc="upper left")
    return figure


def table(data: dict[str, dict[str, Tensor]]) -> str:
    """What each method has reached at its last point and what it has cost: means of its seeds, a line a method.

    The corpus tax is what the loss on held-out corpus text has risen above the SFT model's. Seconds are those of the
    fastest seed: what else ran on the machine only makes the others slower.
    """
    lines = [
        f"{'':<10}{'models':>7}{'labels':>8}{'tokens':>10}{'seconds':>9}{'KL':>7}{'gold':>14}{'win rate':>10}"
        f"{'proxy':>7}{'corpus tax':>12}{'length':>8}"
    ]
    start = data["sft"]["corpus_loss"].mean()
    for name, columns in data.items():
        last = {key: column[:, -1] for key, column in columns.items()}
        mean = {key: float(values.mean()) for key, values in last.items()} | {"seconds": float(last["seconds"].min())}
        title = METHODS[name].name if name in METHODS else "SFT"
        gold = f"{mean['gold']:.2f}" + (f" ± {float(last['gold'].std()):.2f}" if len(last["gold"]) > 1 else " " * 7)
        tax = "" if name == "sft" else "0, SFT's" if name == "best_of_n" else f"{mean['corpus_loss'] - start:+.3f}"
        lines.append(
            f"{title:<10}{mean['models']:7.0f}{mean['labels']:8,.0f}{mean['sampled_tokens']:10,.0f}"
            f"{mean['seconds']:9.0f}{mean['kl']:7.2f}{gold:>14}{mean['win_rate']:10.1%}{mean['proxy']:7.2f}"
            f"{tax:>12}{mean['length']:8.1f}"
        )
    return "\n".join(lines)
