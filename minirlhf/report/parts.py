"""Parts of the page: the ladder, the table of results, the answers, the facts and the next steps."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from html import escape
from pathlib import Path

from minirlhf.report.plotting import NAMES
from minirlhf.report.read import Row, Run
from minirlhf.report.table import cells
from minirlhf.report.text import NOTHING, count, judge, learners, listed, number, percent, readable, times

RISE = 120  # height of the highest stair in pixels
STORY = {
    "base": "Read the corpus; predicts the next word.",
    "sft": "Imitated demonstrations: good answers, written for it.",
    "reward_model": "Learned from rankings which answers labelers prefer. It judges; it doesn’t write.",
    "ppo": "Tried answers of its own and kept what the judge liked.",
    "ppo_ptx": "PPO with some corpus text mixed in so as not to forget it.",
    "rloo": "Tried several answers to each prompt; each had to beat the others’ mean.",
    "grpo": "The same, in units of how much their scores vary.",
    "dpo": "Learned straight from the rankings, without a judge.",
}
ALONE = {
    "ppo_ptx": "Tried answers of its own and kept what the judge liked, with some corpus text mixed in.",
    "grpo": "Tried several answers to each prompt; each had to beat their mean, in units of how much they vary.",
}
"""What is told where the step before, which the story above refers to, isn't there."""
BEFORE = {"ppo_ptx": "ppo", "grpo": "rloo"}
FULL = 3.5  # a part of a score that fills its half of the bar


def ladder(run: Run) -> str:
    """The steps as stairs; the height of a policy's stair shows its score."""
    score = "gold" if run.is_gold else "proxy score"
    means = {name: run.policy(name)["gold_mean"] for name in run.policies}
    steps = ("base", "sft", "reward_model", *run.methods)
    low = min(means.values())
    best = run.report.get("best_mean")
    high = max([*means.values()] + ([best] if best is not None else []))
    items = []
    for name in steps:
        story = STORY[name] if BEFORE.get(name, name) in steps else ALONE[name]
        css = name.replace("_", "-")
        if name == "reward_model":
            value, stair, css = f"agrees {percent(run.report['reward_model']['accuracy'])}", "", f"{css} judge"
        else:
            share = (means[name] - low) / (high - low) if high > low else 0.0
            value = f"{score} {number(means[name])}"
            stair = f'<div class="stair" style="--rise:{8 + RISE * share:.0f}px;--share:{8 + 92 * share:.0f}%"></div>'
        css += " other" if name in run.methods[1:] else ""
        items.append(
            f'<li class="{css}"><div class="rung"><b>{NAMES[name]}</b>{story}<span class="value">{value}</span></div>'
            f"{stair}</li>"
        )
    top = f" The best possible answers would score {number(best)}." if best is not None else ""
    note = f"<p>The height of a stair is its model’s mean {score} on held-out prompts.{top}</p>"
    many = " many" if len(steps) > 5 else ""
    return f'<ol class="ladder{many}" style="--steps:{len(steps)}">{"".join(items)}</ol>\n{note}'


def _columns(run: Run) -> dict[str, str]:
    """Heading and meaning of each column of the results."""
    count, distinct = run.report["heldout_prompts"], run.report["distinct_prompts"]
    prompts = f"{count:,} held-out prompts" + (f" ({distinct:,} of them distinct)" if distinct < count else "")
    raised = f"which {listed(learners(run))} {'was' if len(learners(run)) == 1 else 'were'} trained to raise"
    judged = (
        {
            "gold ± s.e.": f"Mean true score of one sampled answer to each of {prompts}, ± its standard error. "
            "Errors and intervals allow for prompts that occur more than once, and say nothing about other seeds."
        }
        if run.is_gold
        else {
            "reward model score ± s.e.": f"Mean score by the run’s own reward model over {prompts}, ± its standard "
            f"error: a proxy, since it is {judge(run)}."
        }
    )
    proxy = {
        "proxy": f"Mean score by the reward model{f', {raised}' if learners(run) else ''}. Demonstrations score 0."
    }
    return {
        **judged,
        "headroom closed": "Share of the way from the base model’s score to the best reachable one. In brackets a "
        "95 % bootstrap interval over prompts, in percent."
        if run.is_gold
        else "Unknown here: it needs a labeler who knows how good an answer could be.",
        "wins vs base": "Share of prompts where its answer scores above the base model’s; a tie counts half. In "
        "brackets Wilson’s 95 % interval, in percent.",
        "wins vs SFT": "The same against the SFT model: the figure that says whether step 3 was worth it"
        + ("." if run.is_gold else ", as far as a proxy can say."),
        **(proxy if run.is_gold else {}),
        "KL, nats": "How far an answer’s distribution has moved from the SFT model’s, summed over its tokens.",
        "corpus loss, nats": "Loss per token on held-out text of the corpus. Its rise above base is the alignment tax.",
        "length, tokens": "Mean length of an answer, end token included.",
        "ended": "Share of answers that ended on their own before the limit.",
    }


def results(run: Run) -> str:
    """The table of results, and what each column means."""
    columns = _columns(run)
    head = "".join(f'<th scope="col"><abbr title="{escape(t)}">{escape(c)}</abbr></th>' for c, t in columns.items())
    body = "\n".join(_row(name, run) for name in run.policies)
    notes = "".join(f"<div><dt>{escape(c)}:</dt> <dd>{escape(t)}</dd></div>" for c, t in columns.items())
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="Results"><table>\n'
        f'<thead><tr><th scope="col">model</th>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>\n'
        f'<dl class="notes">{notes}</dl>'
    )


def costs(run: Run) -> str:
    """What each method took: seconds, and the models in memory. A run from before this was kept says nothing."""
    held = run.report.get("models_held", {})
    rows = [
        f'<tr><th scope="row"><span class="dot {name.replace("_", "-")}"></span>{NAMES[name]}</th>'
        f"<td>{number(run.report['seconds'][name], 1)}</td><td>{len(held[name])}</td>"
        f'<td class="told">{escape(listed(held[name]))}</td></tr>'
        for name in run.methods
        if name in held
    ]
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{title}</th>' for title in ("method", "training, s", "models"))
    head += '<th scope="col" class="told">in memory</th>'
    dpo = " DPO computes its reference’s log-probabilities once, before the first step." if "dpo" in held else ""
    beside = " Methods that were trained at the same time had half of the threads each." * bool(
        run.report.get("side_by_side")
    )
    return (
        '<h3>What each method took</h3>\n<div class="wide" tabindex="0" role="region" aria-label="Costs"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{chr(10).join(rows)}\n</tbody></table></div>\n"
        f"<p>Policy and value network are trained; the others never change.{dpo}{beside}</p>"
    )


def _row(name: str, run: Run) -> str:
    dot = f'<span class="dot {name.replace("_", "-")}"></span>'
    row = "".join(
        f"<td>{value}{f'<small>{small}</small>' if small else ''}</td>"
        for value, small in cells(run, name, proxy=run.is_gold)
    )
    return f'<tr><th scope="row">{dot}{NAMES[name]}</th>{row}</tr>'


def answers(run: Run) -> str:
    """Every example prompt with the models' answers side by side, so that a reader sees the difference."""
    if not run.answers:
        return "<p>No examples were kept.</p>"
    told = (
        "Each answer is scored by the gold labeler, which knows the truth of this world: helpful (did what was asked), "
        "truthful, harmless, well formed. Bars grow right for good and left for bad."
        if run.is_gold
        else "Each score is the reward model’s, a proxy: read the answers and see whether you agree."
    )
    examples = "\n".join(_example(row, run) for row in run.answers)
    return (
        f"<p>{len(run.answers)} prompts that no model saw in training, one sampled answer each, not picked by hand. "
        f"{told}</p>\n{examples}"
    )


def _example(row: Row, run: Run) -> str:
    totals = {name: row["answers"][name]["score"]["total"] for name in run.policies if name in row["answers"]}
    top = max(totals.values())
    winners = [name for name, total in totals.items() if total == top]
    best = f'<span class="best">best reachable: {number(row["best"])}</span>' if row.get("best") is not None else ""
    shown = len(totals) if len(totals) < 5 else -(-len(totals) // 2)  # in a row
    cards = "".join(_card(name, row["answers"][name], run.is_gold, won=winners == [name]) for name in totals)
    return (
        f'<article class="example"><h3><q>{escape(readable(row["prompt"]))}</q>{best}</h3>'
        f'<div class="answers" style="--shown:{shown}">{cards}</div></article>'
    )


def _card(name: str, answer: Row, is_gold: bool, *, won: bool) -> str:
    score: dict[str, float] = answer["score"]
    text = escape(readable(answer["response"])) or '<span class="none">(said nothing)</span>'
    cut = "" if answer["ended"] else ' <span class="cut" title="It hit the token limit.">… did not end</span>'
    called = "gold" if is_gold else "reward model score (proxy)"
    crown = '<span class="won">highest</span>' if won else ""
    parts = "".join(_part(part, value) for part, value in score.items() if part != "total")
    return (
        f'<div class="answer {name.replace("_", "-")}{" first" if won else ""}"><h4>{NAMES[name]}{crown}</h4>'
        f'<blockquote>{text}{cut}</blockquote><p class="total">{called} <b>{number(score["total"])}</b></p>'
        + (f'<dl class="parts">{parts}</dl>' if parts else "")
        + "</div>"
    )


def _part(part: str, value: float) -> str:
    """A number and a bar that grows from the middle: right is good, left is bad."""
    share = 50 * min(abs(value) / FULL, 1.0)
    left, kind = (50.0, "plus") if value >= 0 else (50.0 - share, "minus")
    bar = f'<i class="{kind}" style="left:{left:.1f}%;width:{share:.1f}%"></i>' if share else ""
    return (
        f"<div><dt>{escape(part.replace('_', ' '))}</dt>"
        f'<dd><span class="bar">{bar}</span><b>{number(value, sign=True)}</b></dd></div>'
    )


def facts(run: Run) -> str:
    """Seed, command, versions, seconds, and every setting."""
    report = run.report
    machine, threads = report["machine"], f"{report['machine']['threads']} threads"
    if machine.get("processes", 1) > 1:
        threads = f"{machine['processes']} processes of {threads} each"
    rows = {
        "command": report["command"] or "called from Python",
        "preset": report["preset"],
        "seed": report["seed"],
        "data": report["data"],
        "size": f"{report['parameters']:,} parameters",
        "machine": f"{machine['device']}, {threads}, {machine['platform']}",
        "versions": ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        "time": times(report, 1),
    }
    return _facts_table(rows, code=["command"]) + _settings(run.config)


def _facts_table(rows: Row, code: Collection[str]) -> str:
    told = {name: f"<code>{escape(str(x))}</code>" if name in code else escape(str(x)) for name, x in rows.items()}
    body = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{cell}</td></tr>' for name, cell in told.items())
    return f'<table class="facts"><tbody>{body}</tbody></table>'


def _settings(config: Row) -> str:
    flat: Row = {}
    for group, value in config.items():
        if group in ("data", "data_sha256"):  # a local path and its checksums: not settings
            continue
        flat |= {f"{group}.{name}": x for name, x in value.items()} if isinstance(value, dict) else {group: value}
    if not flat:
        return ""
    rows = {name: NOTHING if value is None else value for name, value in flat.items()}
    return f"<details><summary>All {len(flat)} settings</summary>{_facts_table(rows, code=rows)}</details>"


def next_steps(run: Run) -> str:
    """Commands to try next."""
    folder = escape(shlex.quote(_shown(run.folder)))
    return (
        f"<p>Talk to all {count(len(run.policies))} models at once, or measure one of them on more prompts or at "
        "another temperature:</p>\n"
        f"<pre>minirlhf chat --run {folder}\n"
        f"minirlhf evaluate --run {folder} --checkpoint {run.methods[0]} --temperature 0.7</pre>\n"
        "<p>To see why each piece is there, take the lessons in <code>notebooks/</code>: 07 to 09 build these three "
        "steps, 10 breaks them on purpose, 11 runs the whole pipeline. To use your own text, give a folder: "
        "<code>minirlhf run --data FOLDER --out runs/mine</code>.</p>"
    )


def _shown(folder: Path) -> str:
    """The run's folder without absolute paths: relative to the current folder, or only its name."""
    if not folder.is_absolute():
        return folder.as_posix()
    here = Path.cwd()
    return folder.relative_to(here).as_posix() if folder.is_relative_to(here) else folder.name
