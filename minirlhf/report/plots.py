"""The report's plots: each a function of a run that returns an inline SVG with a title, an alt text and a caption."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from minirlhf.report.metrics import METRICS, Metric
from minirlhf.report.plotting import (
    COLOURS,
    GRID,
    HEALTHY_COLOUR,
    INK,
    NAMES,
    PAPER,
    QUIET,
    curve,
    healthy_range,
    label_axes,
    level,
    panels,
    smooth,
    style,
    to_svg,
)
from minirlhf.report.read import Row, Run
from minirlhf.report.text import listed, number, percent, with_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LONGEST = 300  # points of a curve: more can't be seen at this size and only make the page heavy
THEMED = {
    INK: "ink",
    QUIET: "quiet",
    GRID: "grid",
    PAPER: "card",
    HEALTHY_COLOUR: "healthy",
    **{colour: f"c-{name.replace('_', '-')}" for name, colour in COLOURS.items() if name != "gold"},
    COLOURS["gold"]: "c-truth",
}


FROM_ZERO = ("policy/clip_fraction", "policy/approx_kl", "objective/kl", "objective/beta", "objective/equal_groups")


class Plot(NamedTuple):
    """One plot of the page."""

    title: str
    svg: str
    caption: str


def _draw(
    name: str, title: str, caption: str, draw: Callable[[Axes], str], height: float = 3.2, left: float = 0.15
) -> Plot:
    """A plot; `draw` draws its curves and returns what a reader who can't see them should know."""
    with style():
        figure, axes = panels(height=height, constrained=False)
        # Equal frames align the steps of all plots on the page, and are faster than a layout.
        figure.subplots_adjust(left=left, right=0.975, top=1 - 0.15 / height, bottom=0.52 / height)
        axes.yaxis.set_label_coords(-0.125, 0.5)
        told = draw(axes)
        svg = to_svg(figure, name, f"{title}. {told}")
    for colour, variable in THEMED.items():  # so that a plot follows the light and the dark theme
        svg = svg.replace(f": {colour}", f": var(--{variable})")
    return Plot(title, svg, caption)


def _series(rows: Sequence[Row], key: str) -> tuple[list[float], list[float]]:
    """Steps and finite values of a metric, thinned to what can be seen."""
    pairs = [(float(r["step"]), float(r[key])) for r in rows if r.get(key) is not None and math.isfinite(r[key])]
    stride = max(1, math.ceil(len(pairs) / LONGEST))
    pairs = pairs[::stride] + ([pairs[-1]] if pairs and (len(pairs) - 1) % stride else [])
    return [step for step, _ in pairs], [value for _, value in pairs]


def _curves(
    axes: Axes, run: Run, steps: Sequence[str], key: str, last: dict[str, float] | None = None
) -> dict[str, list[float]]:
    """Draw a metric of some steps; returns their smoothed curves. With `last`, x is each one's percentage of it."""
    curves = {}
    for name in steps:
        x, y = _series(run.metrics[name], key)
        if y:
            x = x if last is None else [100 * step / last[name] for step in x]
            curves[name] = smooth(y)
            curve(axes, x, curves[name], name, raw=y)
    return curves


def _from_to(curves: dict[str, list[float]], digits: int = 2) -> str:
    """Where each curve begins and ends, in words."""
    ends = ((NAMES[name], number(y[0], digits), number(y[-1], digits)) for name, y in curves.items())
    return "; ".join(f"{name} from {first} to {last}" for name, first, last in ends) + "."


def _has(run: Run, steps: Sequence[str], key: str) -> bool:
    return any(_series(run.metrics[name], key)[0] for name in steps)


def loss_plot(run: Run, step: str) -> Plot | None:
    """Training loss of the base model or of SFT."""
    key, what = f"{step}/loss", {"base": "corpus text", "sft": "demonstrations"}[step]
    if not _has(run, [step], key):
        return None

    def draw(axes: Axes) -> str:
        curves = _curves(axes, run, [step], key)
        if step == "base" and (held_out := run.policy("base")["corpus_loss"]) is not None:
            level(axes, held_out, f"held-out text {number(held_out, 3)}", above=False)
            bottom, top = axes.get_ylim()
            axes.set_ylim(min(bottom, held_out - 0.1 * (top - bottom)), top)  # room for the label below its line
        label_axes(axes, "optimizer step", "loss, nats per token")
        return f"{step} loss {_from_to(curves)}"

    caption = {
        "base": "Surprise at the next word of the corpus. It falls fast (which words exist), then slowly (what follows "
        "what). The dashed line is text it never saw.",
        "sft": "The same surprise, at the words of the demonstrators’ answers only. The start shows how little "
        "a base model knows about answering.",
    }[step]
    return _draw(f"{step}-loss", f"Loss on {what}", caption, draw)


def reward_model_plots(run: Run) -> list[Plot]:
    """Loss and accuracy while the reward model trains, with reference levels."""
    row, plots = run.report["reward_model"], []

    def draw_loss(axes: Axes) -> str:
        curves = _curves(axes, run, ["reward_model"], "reward_model/loss")
        level(axes, math.log(2), "a coin toss: ln 2")
        label_axes(axes, "optimizer step", "ranking loss, nats per pair")
        return f"Loss {_from_to(curves)}"

    def draw_accuracy(axes: Axes) -> str:
        _curves(axes, run, ["reward_model"], "reward_model/accuracy")
        if row["ceiling"] is not None:
            level(axes, row["ceiling"], f"ceiling: gold itself {percent(row['ceiling'])}", COLOURS["gold"])
        if row["length_baseline"] is not None:
            level(axes, row["length_baseline"], f"longer answer wins {percent(row['length_baseline'])}")
        label_axes(axes, "optimizer step", "pairs ordered as the labeler did")
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0.45), max(high, 0.95))
        return f"Held-out accuracy {percent(row['accuracy'])}, length alone {percent(row['length_baseline'])}."

    if _has(run, ["reward_model"], "reward_model/loss"):
        caption = "Surprise at which of two answers a labeler preferred. Noise in the labels keeps it from zero."
        plots.append(_draw("reward-loss", "Ranking loss", caption, draw_loss))
    if _has(run, ["reward_model"], "reward_model/accuracy"):
        caption = "Each batch is measured before it is learned from, so in the first epoch these are unseen pairs."
        caption += " No model can pass the ceiling: labelers disagree." if row["ceiling"] is not None else ""
        plots.append(_draw("reward-accuracy", "Accuracy on the batch", caption, draw_accuracy))
    return plots


def reward_model_bars(run: Run) -> Plot | None:
    """Held-out accuracy, for labelers in training and for those held out."""
    row = run.report["reward_model"]
    groups = [("labelers it learned from", ""), ("labelers held out", "_heldout_labelers")]
    groups = [(name, suffix) for name, suffix in groups if row.get(f"accuracy{suffix}") is not None]
    if not groups:
        return None

    def draw(axes: Axes) -> str:
        for place, (_, suffix) in enumerate(groups):
            value = row[f"accuracy{suffix}"]
            axes.barh(place, value, height=0.5, color=COLOURS["reward_model"])
            axes.plot(row[f"accuracy{suffix}_interval"], [place, place], color=INK, linewidth=1.5)
            axes.annotate(
                percent(value), (0, place), xytext=(8, 0), textcoords="offset points", ha="left", va="center",
                color=PAPER, weight="bold",
            )  # fmt: skip
            for key, colour, text in (("ceiling", COLOURS["gold"], "ceiling"), ("length_baseline", INK, "length")):
                mark = row.get(f"{key}{suffix}")
                if mark is not None:
                    axes.plot([mark, mark], [place - 0.33, place + 0.33], color=colour, linewidth=2)
                    axes.annotate(
                        f"{text} {percent(mark)}", (mark, place + 0.34), ha="center", va="bottom",
                        color=colour, fontsize=8.5,
                    )  # fmt: skip
        axes.set_yticks(range(len(groups)), [name.replace(" ", "\n", 1) for name, _ in groups])
        axes.set_xlim(0, 1)
        axes.set_ylim(-0.5, len(groups) - 0.35)
        axes.grid(visible=False, axis="y")
        label_axes(axes, "share of held-out pairs ordered as the labeler did", "")
        accuracies = ", ".join(f"{name} {with_interval(row, f'accuracy{suffix}')}" for name, suffix in groups)
        return f"Accuracy: {accuracies}."

    caption = "The bar should end well right of “length” (a model that only counts words)"
    caption += " and left of the ceiling, which is as far as label noise allows." if row["ceiling"] else "."
    caption += " The thin line is its 95 % interval."
    return _draw("reward-bars", "Accuracy on held-out comparisons", caption, draw, height=2.3, left=0.215)


def method_plots(run: Run) -> list[Plot]:
    """The curves of step 3, each metric in one frame with all methods that have it."""
    return [plot for key, metric in METRICS.items() if (plot := _method_plot(run, key, metric)) is not None]


def _method_plot(run: Run, key: str, metric: Metric) -> Plot | None:
    names = [name for name in run.methods if _has(run, [name], key)]
    if not names:
        return None
    last = {name: max(1.0, _series(run.metrics[name], key)[0][-1]) for name in names}
    alike = len(set(last.values())) == 1  # else each is drawn over the share of its own steps

    def draw(axes: Axes) -> str:
        curves = _curves(axes, run, names, key, None if alike else last)
        if key == "value/explained_variance":
            # An untrained critic can begin at -20 and would flatten all the rest.
            axes.set_ylim(max(-1.2, axes.get_ylim()[0]), 1.03)
        healthy_range(axes, key, start=next(iter(curves.values()))[0])
        if key in FROM_ZERO:
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        label_axes(axes, "training step" if alike else "share of the training, %", metric.unit)
        axes.legend(loc="best", ncols=2, handlelength=2.8)
        return _from_to(curves, 3)

    return _draw(key.replace("/", "-"), metric.title, metric.caption, draw)


def over_optimisation_plot(run: Run) -> Plot | None:
    """Gold against proxy during step 3: the picture of over-optimisation. DPO never asks the proxy."""
    paths = {}
    for name in run.methods:
        rows = [row for row in run.metrics[name] if "objective/gold" in row and "objective/score" in row]
        if rows:
            # Smoother than the curves above: here both coordinates are noisy, and a path would be a tangle.
            window = max(1, len(rows) // 6)
            x, y = (smooth(_series(rows, key)[1], window) for key in ("objective/score", "objective/gold"))
            # The first batch comes from the SFT model itself, so both paths begin at its scores.
            paths[name] = ([float(rows[0]["objective/score"]), *x[1:]], [float(rows[0]["objective/gold"]), *y[1:]])
    if not paths:
        return None

    def draw(axes: Axes) -> str:
        for name, (x, y) in paths.items():
            curve(axes, x, y, name)
            axes.plot(x[-1:], y[-1:], "o", color=COLOURS[name], markersize=7)
            axes.plot(x[:1], y[:1], "s", color=COLOURS["sft"], markersize=7)
        label_axes(axes, "score by the reward model (proxy)", "gold score")
        axes.legend(loc="best", handlelength=2.4)
        return f"Paths of {listed([NAMES[name] for name in paths])} from the SFT model to their end."

    caption = (
        "Each line is one training, from the blue square (SFT) to the dot. Up and right: the proxy can be trusted. "
        "Right and down: it is being exploited."
    )
    return _draw("gold-proxy", "Gold against proxy", caption, draw)


def tax_plot(run: Run) -> Plot:
    """What each policy forgot of the corpus."""
    names = ("sft", *run.methods)
    base = run.policy("base")["corpus_loss"]
    taxes = [run.policy(name)["corpus_loss"] - base for name in names]

    def draw(axes: Axes) -> str:
        axes.barh([NAMES[n] for n in names], taxes, height=0.55, color=[COLOURS[n] for n in names])
        for place, value in enumerate(taxes):
            axes.annotate(
                number(value, 3, sign=True), (max(value, 0), place), xytext=(5, 0), textcoords="offset points",
                va="center",
            )  # fmt: skip
        axes.axvline(0, color=INK, linewidth=1)
        axes.invert_yaxis()
        axes.margins(x=0.16)
        axes.grid(visible=False, axis="y")
        label_axes(axes, f"loss on held-out text above base ({number(base, 3)}), nats per token", "")
        told = ", ".join(f"{NAMES[n]} {number(t, 3, sign=True)}" for n, t in zip(names, taxes, strict=True))
        return f"{told} nats per token."

    caption = "How much of plain language each policy forgot."
    if "ppo_ptx" in run.methods:
        caption += " PPO-ptx mixes the corpus back in and should be " + ("shortest." if len(names) < 4 else "short.")
    return _draw("tax", "Alignment tax", caption, draw, height=1.4 + 0.3 * len(names), left=0.16)


def win_plot(run: Run) -> Plot | None:
    """Win rates with their intervals, against the line of one half."""
    duels = [("sft", "base"), *((who, other) for other in ("base", "sft") for who in run.methods)]
    duels = [(who, other) for who, other in duels if run.policy(who)[f"win_rate_vs_{other}"] is not None]
    if not duels:
        return None
    rows = [run.policy(who) for who, _ in duels]

    def draw(axes: Axes) -> str:
        for place, ((who, other), row) in enumerate(zip(duels, rows, strict=True)):
            rate = row[f"win_rate_vs_{other}"]
            bounds = row[f"win_rate_vs_{other}_interval"]
            axes.plot(bounds, [place, place], color=COLOURS[who], linewidth=3.5, solid_capstyle="round")
            axes.plot(rate, place, "o", color=COLOURS[who], markersize=8)
            axes.annotate(percent(rate), (rate, place), xytext=(0, 8), textcoords="offset points", ha="center")
        axes.axvline(0.5, color=INK, linewidth=1, linestyle=(0, (2, 2)))
        axes.set_yticks(range(len(duels)), [f"{NAMES[who]} vs {NAMES[other]}" for who, other in duels])
        axes.set_xlim(0, 1.02)
        axes.set_ylim(len(duels) - 0.5, -0.7)
        axes.grid(visible=False, axis="y")
        label_axes(axes, "share of prompts won (a tie counts half)", "")
        rates = [
            f"{NAMES[who]} against {NAMES[other]} {percent(row[f'win_rate_vs_{other}'])}"
            for (who, other), row in zip(duels, rows, strict=True)
        ]
        return ", ".join(rates) + "."

    caption = "Right of the dashed line the first of the two wins more often. Bars are 95 % intervals."
    return _draw("wins", "Win rates", caption, draw, height=1.0 + 0.4 * len(duels), left=0.235)
