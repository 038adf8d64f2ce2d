"""The page: one HTML file that shows what a run did, to a newcomer and to an expert."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

from minirlhf.report import plots
from minirlhf.report.parts import answers, costs, facts, ladder, next_steps, results
from minirlhf.report.plotting import NAMES
from minirlhf.report.read import Run, load_run
from minirlhf.report.style import CSS
from minirlhf.report.text import count, findings, headline, learners, listed, number, percent, with_interval

REFERENCES = {
    "rloo": "RLOO: Ahmadian et al. 2024, arXiv 2402.14740.",
    "grpo": "GRPO: Shao et al. 2024, arXiv 2402.03300.",
    "dpo": "DPO: Rafailov et al. 2023, arXiv 2305.18290.",
}


def write_report(run: Path) -> Path:
    """Write ``report.html`` into the folder of a finished run.

    Args:
        run: a folder with report.json; answers.json, config.json and each step's metrics.jsonl are shown if they
            exist.

    Returns:
        The path of the page: one file that needs no network and no other file. It is written atomically, and
        equal runs give equal bytes.

    Raises:
        CheckpointError: report.json is missing or damaged.
    """
    # Here, not at the top: checkpoints imports torch, and importing the report should be fast.
    from minirlhf.checkpoints import write_text

    page = run / "report.html"
    write_text(page, render(load_run(run)))
    return page


def render(run: Run) -> str:
    """The whole page as a string."""
    steps = f"The {count(3 + len(run.methods))} steps"
    measured = results(run) + _figures(plots.win_plot(run), plots.tax_plot(run)) + costs(run)
    sections = {  # each with its short name for the links, its heading and its body
        "steps": (steps, steps, ladder(run)),
        "results": ("Results", "Results", measured),
        "training": ("Training", "How it trained", _training(run)),
        "answers": ("Answers", f"The same prompts, {count(len(run.policies))} answers", answers(run)),
        "settings": ("Settings", "Settings and numbers", facts(run)),
        "next": ("Next steps", "Next steps", next_steps(run)),
    }
    links = " ".join(f'<a href="#{name}">{short}</a>' for name, (short, _, _) in sections.items())
    parts = [_opening(run, links)]
    for name, (_, heading, body) in sections.items():
        parts.append(f'<section id="{name}">\n<h2>{heading}</h2>\n{body}\n</section>')
    return _unbroken(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>What this run learned · minirlhf</title>\n<style>\n{CSS}\n</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n<footer>Written by minirlhf. The method is that of InstructGPT: Ouyang et al. 2022, “Training language "
        f"models to follow instructions with human feedback”, arXiv 2203.02155.{_references(run)}</footer>\n</main>\n"
        "</body>\n</html>\n"
    )


def _references(run: Run) -> str:
    return "".join(f" {REFERENCES[name]}" for name in run.methods if name in REFERENCES)


def _caveat(run: Run) -> str:
    """Said where the reward model judges the policies."""
    pleased = learners(run)
    told = f"the very model that {listed(pleased)} {'was' if len(pleased) == 1 else 'were'} trained to please"
    return (
        "These data come with no labeler who knows the truth, so the judge here is the run’s own reward model: "
        f"{told if pleased else 'a model of the same rankings that DPO learned from'}. Its scores are a proxy. A high "
        "one may mean good answers, or answers that exploit the reward model’s blind spots: read them below and judge "
        "for yourself."
    )


def _unbroken(page: str) -> str:
    """Keep "74 %" and "[71, 78]" on one line."""
    return re.sub(r"(?<=\d) %|\[[−\d.]+, (?=[−\d])", lambda match: match[0].replace(" ", "\u00a0"), page)


def _prose(text: str) -> str:
    """Escape the text, and keep PPO-ptx on one line."""
    return escape(text).replace(NAMES["ppo_ptx"], f'<span class="whole">{NAMES["ppo_ptx"]}</span>')


def _opening(run: Run, links: str) -> str:
    caveat = "" if run.is_gold else f'<p class="caveat">{_caveat(run)}</p>'
    listed = "".join(f"<li>{_prose(sentence)}</li>" for sentence in findings(run))
    return (
        f"<header>\n<h1>A run of minirlhf on {escape(str(run.report['data']))}</h1>\n"
        f'<p class="headline">{_prose(headline(run))}</p>\n{caveat}\n<ul class="findings">{listed}</ul>\n'
        f'<nav aria-label="Sections">{links}</nav>\n</header>'
    )


def _figures(*drawn: plots.Plot | None) -> str:
    """Plots with their titles and captions, as many side by side as there is room for."""
    figures = "\n".join(
        f"<figure><h4>{escape(plot.title)}</h4>{plot.svg}<figcaption>{escape(plot.caption)}</figcaption></figure>"
        for plot in drawn
        if plot is not None
    )
    return f'<div class="plots">{figures}</div>' if figures else ""


def _training(run: Run) -> str:
    base, sft = plots.loss_plot(run, "base"), plots.loss_plot(run, "sft")
    nothing = "" if base else "<p>The base model was given, not trained here, so it has no curve.</p>"
    reward_model = _figures(*plots.reward_model_plots(run), plots.reward_model_bars(run))
    return (
        "<p>Thin lines are single batches, thick ones their moving average. A green band is where a healthy run stays: "
        "a rule of thumb, and the place to look first when an answer disappoints.</p>\n"
        "<h3>Base model, then step 1: supervised fine-tuning</h3>\n"
        f"{nothing}{_figures(base, sft)}\n<h3>Step 2: the reward model</h3>\n{_reward_model(run)}{reward_model}\n"
        f"<h3>Step 3: {_prose(listed([NAMES[name] for name in run.methods]))}</h3>\n"
        f"{_figures(*plots.method_plots(run), plots.over_optimisation_plot(run))}"
    )


def _reward_model(run: Run) -> str:
    row = run.report["reward_model"]
    text = (
        f"On {row['pairs']:,} held-out pairs it agrees with the labelers on "
        f"<b>{with_interval(row, 'accuracy', 1)}</b>. "
        f"Choosing the longer answer gets {percent(row['length_baseline'], 1)}"
    )
    if row["ceiling"] is not None:
        text += f", and even the true score only {percent(row['ceiling'], 1)}, since labelers err"
    text += "."
    if row.get("pairs_heldout_labelers"):
        text += (
            f" With labelers it never learned from ({row['pairs_heldout_labelers']:,} pairs) it agrees on "
            f"<b>{with_interval(row, 'accuracy_heldout_labelers', 1)}</b>."
        )
    if row["calibration_error"] is not None:
        text += f" Its stated probabilities are off by {number(100 * row['calibration_error'], 1)} points on average."
    return f"<p>{text}</p>"
