"""Parts of the page: the ladder, the table of results, the facts and the next steps."""

from __future__ import annotations

import math
import shlex
from html import escape
from pathlib import Path
from typing import Any

from minirlhf.report.plotting import NAMES
from minirlhf.report.read import POLICIES, Row, Run
from minirlhf.report.text import duration, interval, number, percent

RISE = 120  # pixels of the highest stair
STORY = {
    "base": "Read the corpus and guesses the next word.",
    "sft": "Copied demonstrations: good answers, written for it.",
    "reward_model": "Learned from rankings which answers labelers prefer. It judges; it doesn’t write.",
    "ppo": "Tried answers of its own and kept what the judge liked.",
    "ppo_ptx": "The same, reading some corpus on the way so as not to forget it.",
}


def ladder(run: Run) -> str:
    """The five steps as stairs, each policy's as high as its score."""
    score = "gold" if run.is_gold else "proxy score"
    means = {name: run.policy(name)["gold_mean"] for name in POLICIES}
    low = min(means.values())
    best = run.report.get("best_mean")
    high = max([*means.values()] + ([best] if best is not None else []))
    items = []
    for name, story in STORY.items():
        css = name.replace("_", "-")
        if name == "reward_model":
            value, stair, css = f"agrees {percent(run.report['reward_model']['accuracy'])}", "", f"{css} judge"
        else:
            share = (means[name] - low) / (high - low) if high > low else 0.0
            value = f"{score} {number(means[name])}"
            stair = f'<div class="stair" style="--rise:{8 + RISE * share:.0f}px;--share:{8 + 92 * share:.0f}%"></div>'
        items.append(
            f'<li class="{css}"><div class="rung"><b>{NAMES[name]}</b>{story}<span class="value">{value}</span></div>'
            f"{stair}</li>"
        )
    top = f" The best answers there are would score {number(best)}." if best is not None else ""
    note = f"<p>A stair is as high as its model’s mean {score} on held-out prompts.{top}</p>"
    return f'<ol class="ladder">{"".join(items)}</ol>\n{note}'


def _columns(run: Run) -> dict[str, str]:
    """Heading and meaning of each column of the results."""
    count, distinct = run.report["heldout_prompts"], run.report["distinct_prompts"]
    prompts = f"{count:,} held-out prompts" + (f" ({distinct:,} of them distinct)" if distinct < count else "")
    judged = (
        {"gold ± s.e.": f"Mean true score of one sampled answer to each of {prompts}, ± its standard error."}
        if run.is_gold
        else {
            "reward model score ± s.e.": f"Mean score by the run’s own reward model over {prompts}, ± its standard "
            "error: a proxy, for this is what PPO was trained to raise."
        }
    )
    proxy = {"proxy": "Mean score by the reward model, which PPO was trained to raise. Demonstrations score 0."}
    return {
        **judged,
        "headroom closed": "Share of the way from the base model’s score to the best reachable one."
        if run.is_gold
        else "Unknown here: it needs a labeler who knows how good an answer could be.",
        "wins vs base": "Share of prompts where its answer scores above the base model’s; a tie counts half. In "
        "brackets a 95 % interval, in percent.",
        "wins vs SFT": "The same against the SFT model: the figure that says whether step 3 was worth it"
        + ("." if run.is_gold else ", as far as a proxy can say."),
        **(proxy if run.is_gold else {}),
        "KL, nats": "How far an answer’s distribution has moved from the SFT model’s, summed over its tokens.",
        "corpus loss, nats": "Surprise a token at held-out text of the corpus. What it rises above base is the "
        "alignment tax.",
        "length, tokens": "Mean length of an answer, its end included.",
        "ended": "Share of answers that stopped by themselves before the limit.",
    }


def results(run: Run) -> str:
    """The table of results, and what each column means."""
    columns = _columns(run)
    head = "".join(f'<th scope="col"><abbr title="{escape(t)}">{escape(c)}</abbr></th>' for c, t in columns.items())
    body = "\n".join(_row(name, run.policy(name), run.is_gold) for name in POLICIES)
    notes = "".join(f"<div><dt>{escape(c)}:</dt> <dd>{escape(t)}</dd></div>" for c, t in columns.items())
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="Results"><table>\n'
        f'<thead><tr><th scope="col">model</th>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>\n'
        f'<dl class="notes">{notes}</dl>'
    )


def _row(name: str, row: Row, is_gold: bool) -> str:
    error = row["gold_standard_error"]
    mean = number(row["gold_mean"]) + (f"<small>± {number(error)}</small>" if _known(error) else "")
    cells = [
        mean,
        percent(row["headroom_closed"]),
        _wins(row, "base") if name != "base" else number(None),
        _wins(row, "sft") if name != "sft" else number(None),
        *([number(row["proxy_mean"])] if is_gold else []),
        number(row["kl_to_sft"]),
        number(row["corpus_loss"], 3),
        number(row["mean_length"], 1),
        percent(row["ended_fraction"]),
    ]
    css = name.replace("_", "-")
    dot = f'<span class="dot {css}"></span>'
    return f'<tr><th scope="row">{dot}{NAMES[name]}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _wins(row: Row, other: str) -> str:
    bounds = interval(row[f"win_rate_vs_{other}_interval"])
    return percent(row[f"win_rate_vs_{other}"]) + (f"<small>{bounds}</small>" if bounds else "")


def facts(run: Run) -> str:
    """Seed, command, versions, seconds, and every setting."""
    report = run.report
    machine = report["machine"]
    rows = {
        "command": f"<code>{escape(report['command'] or 'called from Python')}</code>",
        "preset": escape(str(report["preset"])),
        "seed": escape(str(report["seed"])),
        "data": escape(str(report["data"])),
        "size": f"{report['parameters']:,} parameters",
        "machine": escape(f"{machine['device']}, {machine['threads']} threads, {machine['platform']}"),
        "versions": escape(", ".join(f"{name} {version}" for name, version in report["versions"].items())),
        "time": escape(_seconds(report["seconds"], report.get("side_by_side", False))),
    }
    return _facts_table(rows) + _settings(run.config)


def _seconds(seconds: dict[str, float], side_by_side: bool) -> str:
    parts = ", ".join(f"{NAMES.get(k, k)} {number(v, 1)} s" for k, v in seconds.items() if k != "total")
    beside = "; PPO and PPO-ptx at the same time" if side_by_side else ""
    return f"{duration(seconds['total'])} ({parts}{beside})"


def _facts_table(rows: dict[str, str]) -> str:
    body = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{cell}</td></tr>' for name, cell in rows.items())
    return f'<table class="facts"><tbody>{body}</tbody></table>'


def _settings(config: dict[str, Any]) -> str:
    flat: dict[str, Any] = {}
    for group, value in config.items():
        if group == "data_sha256":  # what the data were, and no setting
            continue
        if isinstance(value, dict):
            flat |= {f"{group}.{name}": setting for name, setting in value.items()}
        elif group != "data":  # a path of this machine, and its name stands above
            flat[group] = value
    if not flat:
        return ""
    rows = {name: f"<code>{escape('–' if value is None else str(value))}</code>" for name, value in flat.items()}
    return f"<details><summary>All {len(flat)} settings</summary>{_facts_table(rows)}</details>"


def next_steps(run: Run) -> str:
    """What to type now."""
    folder = escape(shlex.quote(_shown(run.folder)))
    return (
        "<p>Talk to all four models at once, or measure one of them on more prompts or at another temperature:</p>\n"
        f"<pre>minirlhf chat --run {folder}\n"
        f"minirlhf evaluate --run {folder} --checkpoint ppo --temperature 0.7</pre>\n"
        "<p>To see why each piece is there, take the lessons in <code>notebooks/</code>: 07 to 09 build these three "
        "steps, 10 breaks them on purpose, 11 runs the whole way. To bring your own text, give a folder: "
        "<code>minirlhf run --data FOLDER --out runs/mine</code>.</p>"
    )


def _shown(folder: Path) -> str:
    """The run's folder without the paths of this machine: seen from here, or its name alone."""
    if not folder.is_absolute():
        return folder.as_posix()
    here = Path.cwd()
    return folder.relative_to(here).as_posix() if folder.is_relative_to(here) else folder.name
