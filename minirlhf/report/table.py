"""The table of results: its numbers, which the page shows too, and the text that ``minirlhf run`` prints."""

from __future__ import annotations

from pathlib import Path

from minirlhf.errors import visible
from minirlhf.report.plotting import NAMES
from minirlhf.report.read import Run, load_run
from minirlhf.report.text import NOTHING, interval, judge, number, percent, times, with_interval


def cells(run: Run, name: str, *, proxy: bool) -> list[tuple[str, str]]:
    """A policy's row of the table: each number, and its error or interval if it has one.

    Args:
        run: a finished run.
        name: of the policy.
        proxy: whether to include the mean score by the reward model.
    """
    row = run.policy(name)
    error, closed = number(row["gold_standard_error"]), interval(row["headroom_closed_interval"])

    def wins(other: str) -> tuple[str, str]:
        if name == other:  # a model against itself says nothing
            return NOTHING, ""
        return percent(row[f"win_rate_vs_{other}"]), interval(row[f"win_rate_vs_{other}_interval"])

    return [
        (number(row["gold_mean"]), "" if error == NOTHING else f"± {error}"),
        (percent(row["headroom_closed"]), "" if name == "base" else closed),  # for base it is 0 by definition
        wins("base"),
        wins("sft"),
        *([(number(row["proxy_mean"]), "")] if proxy else []),
        (number(row["kl_to_sft"]), ""),
        (number(row["corpus_loss"], 3), ""),
        (number(row["mean_length"], 1), ""),
        (percent(row["ended_fraction"]), ""),
    ]


def summary_table(run: Path) -> str:
    """A short plain-text summary of a finished run.

    Args:
        run: its folder, with report.json.

    Raises:
        CheckpointError: the run is not finished.
    """
    loaded = load_run(run)
    score = "gold ± s.e." if loaded.is_gold else "proxy ± s.e."
    rows = [["", score, "headroom", "wins vs base", "wins vs SFT", "KL", "corpus loss", "length", "ended"]]
    for name in loaded.policies:
        rows.append([NAMES[name], *(" ".join(cell).rstrip() for cell in cells(loaded, name, proxy=False))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    lines.append("± standard error, [95 % interval, in percent]: over the prompts; another seed may differ by more.")
    if not loaded.is_gold:
        lines.append(f"The judge is {judge(loaded)}: a proxy, not the truth.")
    lines += ["", _reward_model(loaded), f"time: {times(loaded.report, 0)}", *_held(loaded)]
    return visible("\n".join(line.rstrip() for line in lines))  # report.json may be anyone's file


def _reward_model(run: Run) -> str:
    row = run.report["reward_model"]
    text = (
        f"reward model: accuracy {with_interval(row, 'accuracy')} (ceiling {percent(row['ceiling'])}, "
        f"length alone {percent(row['length_baseline'])}) on {row['pairs']:,} held-out pairs"
    )
    if row.get("pairs_heldout_labelers"):
        text += f"; held-out labelers {with_interval(row, 'accuracy_heldout_labelers')}"
    return text


def _held(run: Run) -> list[str]:
    """How many models each method holds; an older run doesn't say."""
    held = run.report.get("models_held", {})
    counts = ", ".join(f"{NAMES[name]} {len(held[name])}" for name in run.methods if name in held)
    return [f"models in memory while training: {counts}"] if counts else []
