"""The table that ``minirlhf run`` prints at its end."""

from __future__ import annotations

from pathlib import Path

from minirlhf.report.plotting import NAMES
from minirlhf.report.read import POLICIES, Row, Run, load_run
from minirlhf.report.text import duration, interval, number, percent, plus_minus


def summary_table(run: Path) -> str:
    """A short plain-text summary of a finished run.

    Args:
        run: its folder, with report.json.

    Raises:
        CheckpointError: the run is not finished.
    """
    loaded = load_run(run)
    score = "gold ± s.e." if loaded.is_gold else "proxy ± s.e."
    head = ["", score, "headroom", "wins vs base", "wins vs SFT", "KL", "corpus loss", "length", "ended"]
    rows = [head, *(_row(name, loaded.policy(name)) for name in POLICIES)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [_line(row, widths) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    if not loaded.is_gold:
        lines.append("The judge is the reward model that PPO was trained against: a proxy, not the truth.")
    return "\n".join(line.rstrip() for line in [*lines, "", _reward_model(loaded), _time(loaded)])


def _row(name: str, row: Row) -> list[str]:
    return [
        NAMES[name],
        plus_minus(row["gold_mean"], row["gold_standard_error"]),
        percent(row["headroom_closed"]),
        # A model against itself says nothing.
        "–" if name == "base" else _wins(row, "base"),
        "–" if name == "sft" else _wins(row, "sft"),
        number(row["kl_to_sft"]),
        number(row["corpus_loss"], 3),
        number(row["mean_length"], 1),
        percent(row["ended_fraction"]),
    ]


def _wins(row: Row, other: str) -> str:
    return f"{percent(row[f'win_rate_vs_{other}'])} {interval(row[f'win_rate_vs_{other}_interval'])}".strip()


def _line(row: list[str], widths: list[int]) -> str:
    first, *rest = (
        cell.ljust(width) if i == 0 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join([first, *rest])


def _reward_model(run: Run) -> str:
    row = run.report["reward_model"]
    text = (
        f"reward model: accuracy {percent(row['accuracy'])} (ceiling {percent(row['ceiling'])}, "
        f"length alone {percent(row['length_baseline'])}) on {row['pairs']:,} held-out pairs"
    )
    if row.get("pairs_heldout_labelers"):
        text += f"; held-out labelers {percent(row['accuracy_heldout_labelers'])}"
    return text


def _time(run: Run) -> str:
    seconds = dict(run.report["seconds"])
    total = seconds.pop("total")
    parts = ", ".join(f"{NAMES.get(name, name)} {number(value, 0)} s" for name, value in seconds.items())
    beside = "; PPO and PPO-ptx at the same time" if run.report.get("side_by_side") else ""
    return f"time: {duration(total)} ({parts}{beside})"
