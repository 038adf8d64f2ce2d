"""The README's pictures: docs/results.png from the tables of lessons 10 and 11, docs/methods.png from lesson 13's.

.venv/bin/python benchmarks/readme_picture.py
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from minirlhf_course.methods import draw_methods, read_methods
from minirlhf_course.plotting import COLOURS, NAMES, curve, label_axes, level, panels, style, to_png
from tables import RESULTS, ROOT, Row

PICTURE, METHODS = ROOT / "docs" / "results.png", ROOT / "docs" / "methods.png"
SIZES = ("tiny", "small", "large")
FEW = "comparisons 300"
RUNS = {FEW: "#c9a13b", "comparisons 1200": "#8a6600", "comparisons 6000": "#4f3a00"}


def read(path: Path) -> list[Row]:
    with open(path, newline="", encoding="utf-8") as file:
        file.readline()  # machine, versions, date and command
        return list(csv.DictReader(file))


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def along(rows: Sequence[Row], key: str) -> tuple[list[float], list[list[float]]]:
    """The mean distance of each measured step, and there the gain of each seed; in the order of the distance."""
    steps = sorted({int(row["step"]) for row in rows})
    by_step = [[row for row in rows if int(row["step"]) == step] for step in steps]
    points = [(mean(float(row["kl"]) ** 0.5 for row in group), [float(row[key]) for row in group]) for group in by_step]
    start = mean(points[0][1])
    points.sort(key=lambda point: point[0])
    return [d for d, _ in points], [[x - start for x in values] for _, values in points]


def main() -> None:
    models = read(RESULTS / "pipeline_models.csv")
    rows = read(RESULTS / "overoptimisation_ppo.csv")
    pushed = {run: [row for row in rows if row["run"] == run] for run in RUNS}
    with style():
        figure, (left, right) = panels(1, 2, width=5.4, height=3.4)
        counts = [next(int(row["parameters"]) for row in models if row["size"] == size) for size in SIZES]
        for method in ("ppo", "ppo_ptx", "sft", "base"):
            found = [
                [100 * float(row["preferred"]) for row in models if (row["size"], row["method"]) == (size, method)]
                for size in SIZES
            ]
            band = [min(x) for x in found], [max(x) for x in found]
            curve(left, counts, [mean(x) for x in found], method, band=band, label=NAMES[method])
        level(left, 50, "the large SFT model")
        left.set_xscale("log")
        left.set_xticks(counts, [f"{count:,}" for count in counts])
        left.minorticks_off()
        left.set_ylim(0, 100)
        label_axes(left, "parameters", "preferred to the large SFT model, %", "Size, or being taught what people want?")
        left.legend(loc="upper left")

        for run, shade in RUNS.items():
            distance, gold = along(pushed[run], "gold")
            curve(right, distance, [mean(x) for x in gold], shade, label=f"the truth, {run.split()[1]} rankings")
        distance, proxy = along(pushed[FEW], "proxy")
        curve(
            right, distance, [mean(x) for x in proxy], "reward_model", label=f"what the judge of {FEW.split()[1]} says"
        )
        right.axhline(0.0, color=COLOURS["base"], linewidth=0.8)
        label_axes(right, "root of KL from the SFT model", "gain over the SFT model", "PPO that goes on for too long")
        right.set_ylim(top=2.5)
        right.legend(loc="lower left", fontsize=8.5)
    PICTURE.write_bytes(to_png(figure, dpi=120))
    METHODS.write_bytes(to_png(draw_methods(read_methods()), dpi=120))
    print(PICTURE.relative_to(ROOT), METHODS.relative_to(ROOT))


if __name__ == "__main__":
    main()
