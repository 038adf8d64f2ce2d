"""Lesson 11, the whole pipeline: win rates and their intervals, examples before a prompt, the tax, all steps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from minirlhf_course.checks import pipeline11
from minirlhf_course.checks.exercise import exercise
from minirlhf_course.checks.mistakes11 import (
    examples_cases,
    examples_with,
    paired_cases,
    paired_with,
    seed_cases,
    seed_with,
    tax_cases,
    tax_with,
    wilson_rows,
    win_cases,
    win_with,
)

# 11.1 ----------------------------------------------------------------------------------------------------------------


@exercise(
    "11.1",
    "the win rate and how sure it is",
    difficulty=2,
    minutes=15,
    task="Every number of this lesson's figure is a win rate: the share of prompts where gold scores model A above "
    "model B, **ties half**. Near 100 % the textbook interval $p \\pm z\\sqrt{p(1-p)/n}$ breaks: it leaves [0, 1], and "
    "after a clean sweep it has no width at all. Wilson's does not:\n\n"
    "$$\\frac{p + \\frac{z^2}{2n}}{1 + \\frac{z^2}{n}} \\;\\pm\\; \\frac{z}{1 + \\frac{z^2}{n}}"
    "\\sqrt{\\frac{p(1-p)}{n} + \\frac{z^2}{4n^2}}, \\qquad z = 1.96.$$",
    cases=win_cases,
    suspects={
        "Ties count as won: they count half (> and not >=, then half of the ties).": partial(win_with, "ties won"),
        "Ties count as lost: they count half, or a model loses against itself.": partial(win_with, "ties lost"),
        "Ties are dropped: they count half. Two models that nearly always tie are close to 50 %, however the few "
        "others fall.": partial(win_with, "ties dropped"),
        "It is the wrong way round: the first argument's wins.": partial(win_with, "swapped"),
        "It counts by how much, not how often: one large win must weigh as much as one small one.": (
            partial(win_with, "by how much")
        ),
        "This is the textbook interval: after one win out of one it says 100 % for sure. Use Wilson's.": (
            partial(win_with, "normal")
        ),
        "This is the textbook interval, cut to [0, 1]: after one win out of one it still says 100 % for sure.": (
            partial(win_with, "clipped")
        ),
        "This is Agresti and Coull's interval: Wilson's centre, with the textbook's width around it. It may leave "
        "[0, 1]; use Wilson's width, too.": partial(win_with, "Agresti-Coull"),
        "This is Agresti and Coull's interval in round numbers (two wins and two losses added): use Wilson's.": (
            partial(win_with, "plus four")
        ),
        "The division by 1 + z^2 / n is missing: the centre and the half-width are both divided by it.": (
            partial(win_with, "not shrunk")
        ),
        "z^2 / (4 n^2) is missing under the root: after a clean sweep there is no width left.": (
            partial(win_with, "one term")
        ),
        "Under the root it has z^2 / (4 n), where z^2 / (4 n^2) belongs.": partial(win_with, "4n"),
        "It has z where z^2 is meant.": partial(win_with, "z"),
        "Each end is moved outwards by 1 / (2n), a correction for continuity: Wilson's interval as it stands is asked "
        "for.": partial(win_with, "continuity"),
        "These are the distances from the rate: give the ends of the interval.": partial(win_with, "widths"),
        "z is 1.645: that is the 90 % interval, and 95 % has 1.96.": partial(win_with, "90"),
        "z is 2: 95 % has 1.96.": partial(win_with, "2"),
        "The first number is the interval's centre: the win rate itself is asked for.": partial(win_with, "middle"),
        "The order is rate, low, high: here the low end comes first.": partial(win_with, "order"),
        "The order is rate, low, high: here the high end comes before the low one.": partial(win_with, "ends"),
        "These are per cent: give shares, from 0 to 1.": partial(win_with, "per cent"),
        "This is mean ± 1.96 standard errors of the outcomes: after one win out of one it says 100 % for sure. Use "
        "Wilson's.": partial(win_with, "outcomes"),
        "The width is right, the centre is not: Wilson's is nearer to 1/2 than the rate.": (
            partial(win_with, "centred")
        ),
        "n leaves the ties out: a tie is an outcome, too, n is len(scores).": partial(win_with, "decided"),
        "It does not narrow with more prompts: n is len(scores).": partial(win_with, "one prompt"),
    },
    hints=(
        "`won = scores > others`, `tied = scores == others`; the rate is the mean of `won + tied / 2`, in the dtype of "
        "the scores.",
        "`shrink = 1 + z**2 / n`; `centre = (p + z**2 / (2 * n)) / shrink`; `half = z / shrink * (p * (1 - p) / n + "
        "z**2 / (4 * n**2)).sqrt()`; then `torch.stack((p, centre - half, centre + half))`.",
    ),
)
def win_rate_interval(scores: Tensor, others: Tensor) -> Tensor:
    """[3]: win rate of the first model, and low and high end of its 95 % interval.

    scores and others [N] float64: gold of two models' answers to the same prompts.
    """
    rate = ((scores > others) + (scores == others) / 2).to(scores.dtype).mean()
    return wilson_rows(rate, len(scores))


# 11.2 ----------------------------------------------------------------------------------------------------------------


@exercise(
    "11.2",
    "examples before the prompt",
    difficulty=2,
    minutes=15,
    task="The fair way to ask a base model: show it first how answers look. Each example is written as the web of our "
    "world writes an answered question (question, newline, answer, EOS), then come the prompt and its newline, where "
    "the answer is to begin. The model reads `limit` tokens, so take examples in their order until the next one "
    "does not fit whole; the prompt is always there.",
    cases=examples_cases,
    suspects={
        "The newline after the prompt is missing: the model goes on with the question in place of answering it.": (
            partial(examples_with, "no newline")
        ),
        "EOS between the examples is missing: the model learns from them that an answer is followed by the next "
        "question, and never stops.": partial(examples_with, "no eos"),
        "A newline stands in the place of EOS: in the web, EOS ends a document.": (
            partial(examples_with, "newline for eos")
        ),
        "Question and answer run together: a newline belongs between them.": partial(examples_with, "run together"),
        "It cuts the whole to its last tokens, so it may begin in the middle of an example: drop examples whole.": (
            partial(examples_with, "cut on the left")
        ),
        "It cuts the whole to its first tokens: the prompt at the end is lost. Drop examples, whole.": (
            partial(examples_with, "cut on the right")
        ),
        "It does not look at the limit.": partial(examples_with, "no limit"),
        "The prompt itself takes room as well, its newline included: examples have limit minus that.": (
            partial(examples_with, "prompt not counted")
        ),
        "What just fits, fits: the result may have `limit` tokens.": partial(examples_with, "strict"),
        "It skips what does not fit and takes later examples: stop at the first one that does not fit.": (
            partial(examples_with, "skips")
        ),
        "It takes all examples or none: keep those that fit.": partial(examples_with, "all or none"),
        "It keeps the last examples that fit: take them in their order, from the first.": (
            partial(examples_with, "last ones")
        ),
        "The examples stand in reverse order: the first one comes first.": partial(examples_with, "backwards"),
        "The last example is cut to the room that is left: an example that does not fit whole is left out.": (
            partial(examples_with, "a piece")
        ),
        "A newline stands before EOS: an answer is followed by EOS alone.": partial(examples_with, "newline, too"),
        "EOS stands behind the prompt: the answer is to begin there, after the newline.": (
            partial(examples_with, "prompt ends")
        ),
        "There are no examples in it: those that fit come before the prompt.": partial(examples_with, "no examples"),
        "The prompt stands first: it belongs at the end, where the model goes on.": (
            partial(examples_with, "prompt first")
        ),
    },
    hints=(
        "`prompt.new_tensor([newline])` makes a token to join with; `torch.cat` joins any number of tensors.",
        "`ask = torch.cat((prompt, line))`, `room = limit - len(ask)`; for each example make `block = "
        "torch.cat((question, line, answer, end))`, `break` if it is longer than `room`, else keep it and take its "
        "length off `room`. Return `torch.cat((*kept, ask))`.",
    ),
)
def few_shot_prompt(
    examples: Sequence[tuple[Tensor, Tensor]], prompt: Tensor, newline: int, eos: int, limit: int
) -> Tensor:
    """Token ids of examples and prompt, int64 [at most limit].

    examples is a sequence of pairs (question [n], answer [m]), prompt is [p], all token ids
    without newline or EOS; newline and eos are the ids to add.
    """
    line, end = prompt.new_tensor([newline]), prompt.new_tensor([eos])
    ask = torch.cat((prompt, line))
    room, kept = limit - len(ask), []
    for question, text in examples:
        block = torch.cat((question, line, text, end))
        if len(block) > room:
            break
        kept.append(block)
        room -= len(block)
    return torch.cat((*kept, ask))


# 11.3 ----------------------------------------------------------------------------------------------------------------


@exercise(
    "11.3",
    "two models, the same prompts",
    difficulty=3,
    minutes=15,
    task="Is A better than B, or was it luck with the prompts? Some prompts are easy for both and some hard for both, "
    "so compare them **prompt by prompt**. The bootstrap: draw the prompts anew, with replacement, many times (`rows`: "
    "one resample per row, made for you), take the mean difference of each resample, and give the 2.5 % and 97.5 % "
    "quantiles of those.",
    cases=paired_cases,
    suspects={
        "Each model is measured on a resample of its own: the same row must be used for both, or luck with the prompts "
        "does not cancel.": partial(paired_with, "unpaired"),
        "Only the first model is drawn anew: both are, on the same prompts.": partial(paired_with, "one of them"),
        "Low of one minus high of the other is far too wide: take differences first, then quantiles.": (
            partial(paired_with, "apart")
        ),
        "These are differences of quantiles: take the quantiles of the differences.": partial(paired_with, "gap"),
        "These are quantiles of single differences: take the mean of each resample first.": (
            partial(paired_with, "single")
        ),
        "It is the wrong way round: the first minus the second.": partial(paired_with, "swapped"),
        "These are the 5 % and 95 % quantiles: that leaves 10 % outside, not 5.": partial(paired_with, "ninety"),
        "This is mean ± 1.96 standard deviations: a fine approximation, but the task asks for quantiles.": (
            partial(paired_with, "error")
        ),
        "This is mean ± 1.96 standard deviations, around the resamples' mean: a fine approximation, but the task asks "
        "for quantiles.": partial(paired_with, "error of resamples"),
        "This is the textbook interval of the mean difference, without any resample: take quantiles of the resamples' "
        "means.": partial(paired_with, "no resamples"),
        "This is mean ± one standard deviation: that holds the truth two times out of three. Take quantiles.": (
            partial(paired_with, "one deviation")
        ),
        "The mean runs over the resamples: take the mean of each resample, along dimension 1.": (
            partial(paired_with, "down")
        ),
        "These are sums: take the mean difference of each resample.": partial(paired_with, "sums"),
        "This is the first model alone: take differences to the second.": partial(paired_with, "first alone"),
        "These are absolute differences: a prompt that the second one wins counts against the first.": (
            partial(paired_with, "absolute")
        ),
        "This is the basic bootstrap, twice the difference minus the quantiles: the quantiles themselves are asked "
        "for.": partial(paired_with, "basic"),
        "It is moved so that its middle is the measured difference: give the quantiles as they are.": (
            partial(paired_with, "centred")
        ),
        "The high end comes first: low, then high.": partial(paired_with, "ends"),
        "These are differences of medians: take the mean difference of each resample.": partial(paired_with, "medians"),
        "These are per cent: give shares.": partial(paired_with, "per cent"),
        "It takes the nearest resample, or the one in place int(q * R), for a quantile: fine for thousands of them, "
        "but where few were drawn a quantile lies between two. Use `torch.quantile`.": partial(paired_with, "nearest"),
        "It takes the next lower resample for a quantile: fine for thousands of them, but where few were drawn a "
        "quantile lies between two. Use `torch.quantile`.": partial(paired_with, "lower"),
        "These are the smallest and the largest resample: take quantiles.": partial(paired_with, "min max"),
    },
    hints=(
        "`first[rows]` is [R, N]: all resamples at once. What does `.mean(1)` of it give?",
        "`differences = (first - second)[rows].mean(1)`, then `differences.quantile(marks)` with `marks = "
        "torch.tensor([0.025, 0.975], dtype=first.dtype)`.",
    ),
)
def paired_interval(first: Tensor, second: Tensor, rows: Tensor) -> Tensor:
    """[2]: low and high end of the 95 % interval of mean(first) - mean(second).

    first and second [N] float64: outcomes of two models on the same prompts;
    rows [R, N] int64: the prompts of each resample.
    """
    marks = torch.tensor([0.025, 0.975], dtype=first.dtype)
    return (first - second)[rows].mean(1).quantile(marks)


# 11.4 ----------------------------------------------------------------------------------------------------------------


@exercise(
    "11.4",
    "three seeds",
    difficulty=2,
    minutes=10,
    task="Prompts are one source of luck, the training run another: its initial weights, its data order, its samples. "
    "Give the mean over $S$ runs, and its interval\n\n"
    "$$\\bar r \\;\\pm\\; t\\, \\frac{s}{\\sqrt S}, \\qquad s^2 = \\frac{1}{S - 1} \\sum_i (r_i - \\bar r)^2.$$\n\n"
    "$t$ is Student's: 4.30 for three seeds and 95 %, where a normal distribution with a known spread would have 1.96. "
    "Three runs say little about their own spread, and $t$ charges for that.",
    cases=seed_cases,
    suspects={
        "1.96 is for many seeds: with few, the spread itself is uncertain, and Student's t says how much. Use `t`.": (
            partial(seed_with, "normal")
        ),
        "The standard deviation divides by S, and is too small on average: divide by S - 1.": (
            partial(seed_with, "biased")
        ),
        "This is the spread of single runs: the mean of S runs is surer by the root of S.": (
            partial(seed_with, "deviation")
        ),
        "It divides by the root of S - 1: that belongs in the standard deviation. Here it is the root of S.": (
            partial(seed_with, "degrees")
        ),
        "It divides by S: by the root of S.": partial(seed_with, "count"),
        "This is the variance: take its root.": partial(seed_with, "variance"),
        "This is the variance by S: take the root of both.": partial(seed_with, "variance by S"),
        "These are half-widths: give the ends, mean - half and mean + half.": partial(seed_with, "widths"),
        "The ends are cut to [0, 1]: leave them as they are, a wide interval should be seen.": (
            partial(seed_with, "cut")
        ),
        "`t` is not used: one standard error holds the truth in far fewer than 95 % of cases.": (
            partial(seed_with, "no t")
        ),
        "These are the lowest and the highest run: what three runs span holds the true mean three times out of four.": (
            partial(seed_with, "range")
        ),
        "It mixes the models: each column is a model of its own.": partial(seed_with, "all models"),
        "The order is mean, low, high: here the high end comes before the low one.": partial(seed_with, "ends"),
        "The order is mean, low, high: here the low end comes first.": partial(seed_with, "order"),
        "This is the median: the mean is asked for.": partial(seed_with, "median"),
        "It is twice too wide: the ends are one t s / sqrt(S) from the mean on each side.": partial(seed_with, "twice"),
        "This is the mean absolute deviation: s is the standard deviation.": partial(seed_with, "absolute"),
    },
    hints=(
        "Everything runs along dimension 0, the seeds. Does `torch.std` divide the sum of squares by S or by S - 1?",
        "`half = t * rates.std(0) / len(rates) ** 0.5`, then stack mean, mean - half, mean + half.",
    ),
)
def seed_interval(rates: Tensor, t: float) -> Tensor:
    """[3, M]: the mean over seeds, and low and high end of its interval, for M models.

    rates [S, M] float64, one row per seed; t is Student's quantile for S seeds.
    """
    mean, half = rates.mean(0), t * rates.std(0) / len(rates) ** 0.5
    return torch.stack((mean, mean - half, mean + half))


# 11.5 ----------------------------------------------------------------------------------------------------------------


@exercise(
    "11.5",
    "how much of the tax came back",
    difficulty=2,
    minutes=10,
    task="PPO's alignment tax on a kind of text is its loss there minus the base model's. Which share of it does "
    "PPO-ptx take away? 1: all of it, 0: nothing, below 0: it made things worse. Average the losses over the seeds "
    "first: a seed that paid hardly any tax has a ratio that means nothing.",
    cases=tax_cases,
    suspects={
        "It is a mean of the seeds' ratios: one seed with a tiny tax decides everything. Average the taxes over seeds, "
        "then divide once.": partial(tax_with, "mean of ratios"),
        "This is the share that is left: the share taken away is 1 minus it.": partial(tax_with, "what is left"),
        "This compares losses, not taxes: a loss of 0 is out of reach, so take the base model's off first.": (
            partial(tax_with, "of the mean loss")
        ),
        "This compares losses, not taxes, and seed by seed: take the base model's off first.": (
            partial(tax_with, "of the loss")
        ),
        "These are nats: divide by PPO's tax.": partial(tax_with, "nats"),
        "This is PPO-ptx's tax alone: which share of PPO's tax is gone?": partial(tax_with, "left"),
        "It is a median of the seeds' ratios: average the taxes over seeds, then divide once.": (
            partial(tax_with, "median")
        ),
        "The sign is flipped: what is taken away counts above 0.": partial(tax_with, "turned"),
        "This is the absolute value: a repair that makes things worse should be seen.": partial(tax_with, "absolute"),
        "These are per cent: give shares, 1 for all of it.": partial(tax_with, "per cent"),
        "It is upside down: PPO's tax is the denominator.": partial(tax_with, "other way"),
        "It divides by the base model's loss: by PPO's tax.": partial(tax_with, "of the base"),
        "It is cut at 0: a repair that makes things worse should be seen.": partial(tax_with, "clamped"),
    },
    hints=(
        "Two taxes, each averaged over dimension 0.",
        "`1 - (ppo_ptx - base).mean(0) / (ppo - base).mean(0)`",
    ),
)
def tax_repaired(base: Tensor, ppo: Tensor, ppo_ptx: Tensor) -> Tensor:
    """The share of PPO's tax that PPO-ptx takes away, for each kind of text: [K].

    base, ppo, ppo_ptx [S, K] float64: their losses, one row per seed.
    """
    return 1 - (ppo_ptx - base).mean(0) / (ppo - base).mean(0)


# 11.6 ----------------------------------------------------------------------------------------------------------------

pipeline = pipeline11.pipeline
