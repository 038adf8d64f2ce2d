"""The same prompts, four answers: the part of the page where a reader sees the difference."""

from __future__ import annotations

from html import escape

from minirlhf.report.plotting import NAMES
from minirlhf.report.read import POLICIES, Row, Run
from minirlhf.report.text import number, readable

FULL = 3.5  # a bar of this length fills its half of the scale
PART_NAMES = {"well_formed": "well formed"}


def answers_html(run: Run) -> str:
    """Every example prompt with the answers beside each other."""
    return "\n".join(_example(row, run.is_gold) for row in run.answers)


def _example(row: Row, is_gold: bool) -> str:
    totals = {name: row["answers"][name]["score"]["total"] for name in POLICIES if name in row["answers"]}
    top = max(totals.values())
    winners = [name for name, total in totals.items() if total == top]
    best = f'<span class="best">best reachable: {number(row["best"])}</span>' if row.get("best") is not None else ""
    cards = "".join(_card(name, row["answers"][name], is_gold, won=winners == [name]) for name in totals)
    return (
        f'<article class="example"><h3><q>{escape(readable(row["prompt"]))}</q>{best}</h3>'
        f'<div class="answers">{cards}</div></article>'
    )


def _card(name: str, answer: Row, is_gold: bool, *, won: bool) -> str:
    score: dict[str, float] = answer["score"]
    text = escape(readable(answer["response"])) or '<span class="none">(said nothing)</span>'
    cut = "" if answer["ended"] else ' <span class="cut" title="It ran into the limit of tokens.">… did not end</span>'
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
        f"<div><dt>{escape(PART_NAMES.get(part, part))}</dt>"
        f'<dd><span class="bar">{bar}</span><b>{number(value, sign=True)}</b></dd></div>'
    )
