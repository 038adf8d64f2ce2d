"""Lesson 11, the whole pipeline: win rates and their intervals, examples before a prompt, the tax that was repaired."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from minirlhf.intervals import CONFIDENCE, wilson
from minirlhf_course.checks.cases import generators, ids, normal, row
from minirlhf_course.checks.exercise import Case, exercise

INT = torch.int64

# 11.1 ----------------------------------------------------------------------------------------------------------------


def _wilson(rate: Tensor, count: int) -> Tensor:
    return torch.stack((rate, *wilson(rate, count)))


def _win_cases() -> list[Case]:
    square = CONFIDENCE**2
    rtol = 3e-4  # z may be 1.96 or 1.959964
    cases = [
        Case("one prompt, won", (row(2), row(1)), row(1, 1 / (1 + square), 1), rtol),
        Case("one prompt, lost", (row(1), row(2)), row(0, 0, square / (1 + square)), rtol),
        Case("two prompts: one won, one tied", (row(3, 1), row(2, 1)), _wilson(row(0.75)[0], 2), rtol),
        Case("three prompts: won by far, lost twice by little", (row(9, 0, 0), row(0, 1, 1)),
             _wilson(row(1)[0] / 3, 3), rtol),
        Case("four prompts, all tied", (row(1, 1, 1, 1), row(1, 1, 1, 1)), _wilson(row(0.5)[0], 4), rtol),
    ]  # fmt: skip
    for size, generator in zip((5, 12, 40), generators(3), strict=True):
        scores, others = (2 * normal(generator, 2, size)).round()
        cases.append(Case(f"random, {size} prompts", (scores, others), rtol=rtol))
    return cases


def _win_with(bug: str, scores: Tensor, others: Tensor) -> Tensor:
    """Exercise 11.1 with one mistake planted."""
    won, tied = (scores > others).to(scores.dtype), (scores == others).to(scores.dtype)
    outcomes = {"ties won": won + tied, "ties lost": won, "swapped": 1 - won - tied / 2}.get(bug, won + tied / 2)
    count = len(scores)
    if bug == "ties dropped":
        count = max(int(count - tied.sum()), 1)
        outcomes = won.sum()[None] / count
    if bug == "decided":
        count = max(int(count - tied.sum()), 1)
    rate = outcomes.mean()
    if bug == "by how much":
        rate = scores.sum() / (scores.sum() + others.sum())
    error = (rate * (1 - rate) / count).clamp(min=0).sqrt()
    if bug == "normal":
        return torch.stack((rate, rate - CONFIDENCE * error, rate + CONFIDENCE * error))
    if bug == "clipped":
        low, high = rate - CONFIDENCE * error, rate + CONFIDENCE * error
        return torch.stack((rate, low.clamp(min=0), high.clamp(max=1)))
    if bug == "one prompt":
        return _wilson(rate, 1)
    if bug == "outcomes":
        error = outcomes.std(correction=0) / count**0.5
        return torch.stack((rate, rate - CONFIDENCE * error, rate + CONFIDENCE * error))
    square = CONFIDENCE**2
    if bug in ("Agresti-Coull", "plus four"):
        more = square if bug == "Agresti-Coull" else 4
        middle = (rate * count + more / 2) / (count + more)
        half = CONFIDENCE * (middle * (1 - middle) / (count + more)).sqrt()
        return torch.stack((rate, middle - half, middle + half))
    if bug == "not shrunk":
        middle, half = rate + square / (2 * count), CONFIDENCE * (error**2 + square / (4 * count**2)).sqrt()
        return torch.stack((rate, middle - half, middle + half))
    if bug in ("4n", "z"):
        square = CONFIDENCE if bug == "z" else square
        below = 4 * count if bug == "4n" else 4 * count**2
        middle = rate + square / (2 * count)
        half = CONFIDENCE * (error**2 + square / below).sqrt()
        return torch.stack((rate, (middle - half) / (1 + square / count), (middle + half) / (1 + square / count)))
    if bug == "one term":
        middle, half = rate + square / (2 * count), CONFIDENCE * error
        return torch.stack((rate, (middle - half) / (1 + square / count), (middle + half) / (1 + square / count)))
    if bug in ("90", "2"):
        z = {"90": 1.645, "2": 2.0}[bug]
        # Wilson's interval depends on z^2 / n alone.
        return torch.stack((rate, *wilson(rate, count * square / z**2)))
    rows = _wilson(rate, count)
    if bug == "middle":
        return torch.stack(((rows[1] + rows[2]) / 2, rows[1], rows[2]))
    if bug == "order":
        return rows[[1, 0, 2]]
    if bug == "ends":
        return rows[[0, 2, 1]]
    if bug == "per cent":
        return 100 * rows
    if bug == "widths":
        return torch.stack((rate, rate - rows[1], rows[2] - rate))
    if bug == "continuity":
        step = 1 / (2 * count)
        return torch.stack((rate, (rows[1] - step).clamp(min=0), (rows[2] + step).clamp(max=1)))
    if bug == "centred":
        half = (rows[2] - rows[1]) / 2
        return torch.stack((rate, rate - half, rate + half))
    return rows


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
    cases=_win_cases,
    suspects={
        "Ties count as won: they count half (> and not >=, then half of the ties).": partial(_win_with, "ties won"),
        "Ties count as lost: they count half, or a model loses against itself.": partial(_win_with, "ties lost"),
        "Ties are dropped: they count half. Two models that nearly always tie are close to 50 %, however the few "
        "others fall.": partial(_win_with, "ties dropped"),
        "It is the wrong way round: the first argument's wins.": partial(_win_with, "swapped"),
        "It counts by how much, not how often: one large win must weigh as much as one small one.": (
            partial(_win_with, "by how much")
        ),
        "This is the textbook interval: after one win out of one it says 100 % for sure. Use Wilson's.": (
            partial(_win_with, "normal")
        ),
        "This is the textbook interval, cut to [0, 1]: after one win out of one it still says 100 % for sure.": (
            partial(_win_with, "clipped")
        ),
        "This is Agresti and Coull's interval: Wilson's centre, with the textbook's width around it. It may leave "
        "[0, 1]; use Wilson's width, too.": partial(_win_with, "Agresti-Coull"),
        "This is Agresti and Coull's interval in round numbers (two wins and two losses added): use Wilson's.": (
            partial(_win_with, "plus four")
        ),
        "The division by 1 + z^2 / n is missing: the centre and the half-width are both divided by it.": (
            partial(_win_with, "not shrunk")
        ),
        "z^2 / (4 n^2) is missing under the root: after a clean sweep there is no width left.": (
            partial(_win_with, "one term")
        ),
        "Under the root it has z^2 / (4 n), where z^2 / (4 n^2) belongs.": partial(_win_with, "4n"),
        "It has z where z^2 is meant.": partial(_win_with, "z"),
        "Each end is moved outwards by 1 / (2n), a correction for continuity: Wilson's interval as it stands is asked "
        "for.": partial(_win_with, "continuity"),
        "These are the distances from the rate: give the ends of the interval.": partial(_win_with, "widths"),
        "z is 1.645: that is the 90 % interval, and 95 % has 1.96.": partial(_win_with, "90"),
        "z is 2: 95 % has 1.96.": partial(_win_with, "2"),
        "The first number is the interval's centre: the win rate itself is asked for.": partial(_win_with, "middle"),
        "The order is rate, low, high: here the low end comes first.": partial(_win_with, "order"),
        "The order is rate, low, high: here the high end comes before the low one.": partial(_win_with, "ends"),
        "These are per cent: give shares, from 0 to 1.": partial(_win_with, "per cent"),
        "This is mean ± 1.96 standard errors of the outcomes: after one win out of one it says 100 % for sure. Use "
        "Wilson's.": partial(_win_with, "outcomes"),
        "The width is right, the centre is not: Wilson's is nearer to 1/2 than the rate.": (
            partial(_win_with, "centred")
        ),
        "n leaves the ties out: a tie is an outcome, too, n is len(scores).": partial(_win_with, "decided"),
        "It does not narrow with more prompts: n is len(scores).": partial(_win_with, "one prompt"),
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
    return _wilson(rate, len(scores))


# 11.2 ----------------------------------------------------------------------------------------------------------------


def _examples_cases() -> list[Case]:
    short, other = (ids(11), ids(21)), (ids(12), ids(22))
    long = ids(13, 14, 15), ids(23, 24)
    ask = ids(9)
    cases = [
        Case("no examples", ((), ask, 2, 1, 8), ids(9, 2)),
        Case("one example, and room", ((short,), ask, 2, 1, 8), ids(11, 2, 21, 1, 9, 2)),
        Case("one example that just fits", ((short,), ask, 2, 1, 6), ids(11, 2, 21, 1, 9, 2)),
        Case("one example that is one token too long", ((short,), ask, 2, 1, 5), ids(9, 2)),
        Case("two examples, room for both", ((short, other), ask, 2, 1, 12),
             ids(11, 2, 21, 1, 12, 2, 22, 1, 9, 2)),
        Case("the second is too long", ((short, long), ask, 2, 1, 9), ids(11, 2, 21, 1, 9, 2)),
        Case("the second is too long, a third would fit", ((short, long, other), ask, 2, 1, 12),
             ids(11, 2, 21, 1, 9, 2)),
    ]  # fmt: skip
    for (count, limit), generator in zip(((2, 14), (3, 20), (5, 30)), generators(3), strict=True):
        lengths = torch.randint(1, 6, (count, 2), generator=generator).tolist()
        pairs = tuple(tuple(torch.randint(3, 99, (n,), generator=generator) for n in both) for both in lengths)
        prompt = torch.randint(3, 99, (4,), generator=generator)
        cases.append(Case(f"random, {count} examples, {limit} tokens", (pairs, prompt, 2, 1, limit)))
    return cases


def _examples_with(
    bug: str,
    examples: Sequence[tuple[Tensor, Tensor]],
    prompt: Tensor,
    newline: int,
    eos: int,
    limit: int,
) -> Tensor:
    """Exercise 11.2 with one mistake planted."""
    line, end = prompt.new_tensor([newline]), prompt.new_tensor([eos])
    end = prompt.new_tensor([]) if bug == "no eos" else line if bug == "newline for eos" else end
    if bug == "newline, too":
        end = torch.cat((line, end))
    between = prompt.new_tensor([]) if bug == "run together" else line
    ask = prompt if bug == "no newline" else torch.cat((prompt, line))
    if bug == "prompt ends":
        ask = torch.cat((ask, end))
    blocks = [torch.cat((question, between, text, end)) for question, text in examples]
    if bug == "no examples":
        blocks = []
    if bug == "last ones":
        blocks.reverse()
    if bug == "a piece":
        return torch.cat((torch.cat((*blocks, prompt[:0]))[: max(limit - len(ask), 0)], ask))
    if bug in ("cut on the left", "cut on the right", "no limit"):
        whole = torch.cat((*blocks, ask))
        return {"cut on the left": whole[-limit:], "cut on the right": whole[:limit]}.get(bug, whole)
    room = limit if bug == "prompt not counted" else limit - len(ask) - (bug == "strict")
    kept = []
    for block in blocks:
        if len(block) > room:
            if bug == "skips":
                continue
            break
        kept.append(block)
        room -= len(block)
    if bug == "all or none" and len(kept) < len(blocks):
        kept = []
    if bug in ("last ones", "backwards"):
        kept.reverse()
    return torch.cat((ask, *kept)) if bug == "prompt first" else torch.cat((*kept, ask))


@exercise(
    "11.2",
    "examples before the prompt",
    difficulty=2,
    minutes=15,
    task="The fair way to ask a base model: show it first how answers look. Each example is written as the web of our "
    "world writes an answered question (question, newline, answer, EOS), then come the prompt and its newline, where "
    "the answer is to begin. The model reads `limit` tokens, so take examples in their order until the next one "
    "does not fit whole; the prompt is always there.",
    cases=_examples_cases,
    suspects={
        "The newline after the prompt is missing: the model goes on with the question in place of answering it.": (
            partial(_examples_with, "no newline")
        ),
        "EOS between the examples is missing: the model learns from them that an answer is followed by the next "
        "question, and never stops.": partial(_examples_with, "no eos"),
        "A newline stands in the place of EOS: in the web, EOS ends a document.": (
            partial(_examples_with, "newline for eos")
        ),
        "Question and answer run together: a newline belongs between them.": partial(_examples_with, "run together"),
        "It cuts the whole to its last tokens, so it may begin in the middle of an example: drop examples whole.": (
            partial(_examples_with, "cut on the left")
        ),
        "It cuts the whole to its first tokens: the prompt at the end is lost. Drop examples, whole.": (
            partial(_examples_with, "cut on the right")
        ),
        "It does not look at the limit.": partial(_examples_with, "no limit"),
        "The prompt itself takes room as well, its newline included: examples have limit minus that.": (
            partial(_examples_with, "prompt not counted")
        ),
        "What just fits, fits: the result may have `limit` tokens.": partial(_examples_with, "strict"),
        "It skips what does not fit and takes later examples: stop at the first one that does not fit.": (
            partial(_examples_with, "skips")
        ),
        "It takes all examples or none: keep those that fit.": partial(_examples_with, "all or none"),
        "It keeps the last examples that fit: take them in their order, from the first.": (
            partial(_examples_with, "last ones")
        ),
        "The examples stand in reverse order: the first one comes first.": partial(_examples_with, "backwards"),
        "The last example is cut to the room that is left: an example that does not fit whole is left out.": (
            partial(_examples_with, "a piece")
        ),
        "A newline stands before EOS: an answer is followed by EOS alone.": partial(_examples_with, "newline, too"),
        "EOS stands behind the prompt: the answer is to begin there, after the newline.": (
            partial(_examples_with, "prompt ends")
        ),
        "There are no examples in it: those that fit come before the prompt.": partial(_examples_with, "no examples"),
        "The prompt stands first: it belongs at the end, where the model goes on.": (
            partial(_examples_with, "prompt first")
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


def _paired_cases() -> list[Case]:
    rtol = 1e-5  # 0.025 may have been a float32 on its way
    cases = [
        Case("two prompts, three resamples: differences 1, 1/2, 0",
             (row(1, 0), row(0, 0), ids([0, 0], [0, 1], [1, 1])), row(0.025, 0.975), rtol),
        Case("the second is better on each", (row(0, 0), row(1, 0.5), ids([0, 0], [0, 1], [1, 1])),
             row(-0.9875, -0.5125), rtol),
        Case("twins on hard and easy prompts: no difference, whatever is drawn",
             (row(1, 0, 1), row(1, 0, 1), ids([0, 0, 2], [1, 1, 0], [2, 1, 1])), row(0, 0), rtol),
    ]  # fmt: skip
    for (size, count), generator in zip(((4, 30), (9, 50), (20, 80)), generators(3), strict=True):
        easy = normal(generator, size)
        first, second = (easy + 0.3 * normal(generator, 2, size) > 0).double()
        drawn = torch.randint(0, size, (count, size), generator=generator)
        cases.append(Case(f"random, {size} prompts, {count} resamples", (first, second, drawn), rtol=rtol))
    return cases


def _paired_with(bug: str, first: Tensor, second: Tensor, rows: Tensor) -> Tensor:
    """Exercise 11.3 with one mistake planted."""
    marks = rows.new_tensor([25, 975]).to(first.dtype) / 1000
    one, two = first[rows].mean(1), second[rows].mean(1)
    if bug == "unpaired":
        return (one - second[rows.roll(1, 0)].mean(1)).quantile(marks)
    if bug == "one of them":
        return (one - second.mean()).quantile(marks)
    if bug == "apart":
        return (one.quantile(marks) - two.quantile(marks.flip(0))).sort().values
    if bug == "gap":
        return one.quantile(marks) - two.quantile(marks)
    if bug == "single":
        return (first - second)[rows].flatten().quantile(marks)
    if bug == "swapped":
        return (two - one).quantile(marks)
    if bug == "ninety":
        return (one - two).quantile(rows.new_tensor([5, 95]).to(first.dtype) / 100)
    difference, seen = one - two, (first - second).mean()
    low, high = difference.quantile(marks)
    if bug == "no resamples":
        error = (first - second).std(correction=1) / len(first) ** 0.5
        return seen + torch.stack((-error, error)) * CONFIDENCE
    if bug == "one deviation":
        return difference.mean() + torch.stack((-difference.std(), difference.std()))
    if bug == "down":
        return (first - second)[rows].mean(0).quantile(marks)
    if bug == "sums":
        return torch.stack((low, high)) * len(first)
    if bug == "first alone":
        return one.quantile(marks)
    if bug == "absolute":
        return (first - second).abs()[rows].mean(1).quantile(marks)
    if bug.startswith("error"):
        middle = difference.mean() if "resamples" in bug else seen
        return middle + torch.stack((-difference.std(), difference.std())) * CONFIDENCE
    if bug == "basic":
        return torch.stack((2 * seen - high, 2 * seen - low))
    if bug == "centred":
        return torch.stack((low, high)) - difference.mean() + seen
    if bug == "ends":
        return torch.stack((high, low))
    if bug == "per cent":
        return 100 * torch.stack((low, high))
    if bug == "medians":
        return (first[rows].median(1).values - second[rows].median(1).values).quantile(marks)
    if bug == "nearest":
        at = (marks * (len(difference) - 1)).round().long()
        return difference.sort().values[at]
    if bug == "lower":
        return difference.quantile(marks, interpolation="lower")
    if bug == "min max":
        return torch.stack((difference.min(), difference.max()))
    return difference.quantile(marks)


@exercise(
    "11.3",
    "two models, the same prompts",
    difficulty=3,
    minutes=15,
    task="Is A better than B, or was it luck with the prompts? Some prompts are easy for both and some hard for both, "
    "so compare them **prompt by prompt**. The bootstrap: draw the prompts anew, with replacement, many times (`rows`: "
    "one resample per row, made for you), take the mean difference of each resample, and give the 2.5 % and 97.5 % "
    "quantiles of those.",
    cases=_paired_cases,
    suspects={
        "Each model is measured on a resample of its own: the same row must be used for both, or luck with the prompts "
        "does not cancel.": partial(_paired_with, "unpaired"),
        "Only the first model is drawn anew: both are, on the same prompts.": partial(_paired_with, "one of them"),
        "Low of one minus high of the other is far too wide: take differences first, then quantiles.": (
            partial(_paired_with, "apart")
        ),
        "These are differences of quantiles: take the quantiles of the differences.": partial(_paired_with, "gap"),
        "These are quantiles of single differences: take the mean of each resample first.": (
            partial(_paired_with, "single")
        ),
        "It is the wrong way round: the first minus the second.": partial(_paired_with, "swapped"),
        "These are the 5 % and 95 % quantiles: that leaves 10 % outside, not 5.": partial(_paired_with, "ninety"),
        "This is mean ± 1.96 standard deviations: a fine approximation, but the task asks for quantiles.": (
            partial(_paired_with, "error")
        ),
        "This is mean ± 1.96 standard deviations, around the resamples' mean: a fine approximation, but the task asks "
        "for quantiles.": partial(_paired_with, "error of resamples"),
        "This is the textbook interval of the mean difference, without any resample: take quantiles of the resamples' "
        "means.": partial(_paired_with, "no resamples"),
        "This is mean ± one standard deviation: that holds the truth two times out of three. Take quantiles.": (
            partial(_paired_with, "one deviation")
        ),
        "The mean runs over the resamples: take the mean of each resample, along dimension 1.": (
            partial(_paired_with, "down")
        ),
        "These are sums: take the mean difference of each resample.": partial(_paired_with, "sums"),
        "This is the first model alone: take differences to the second.": partial(_paired_with, "first alone"),
        "These are absolute differences: a prompt that the second one wins counts against the first.": (
            partial(_paired_with, "absolute")
        ),
        "This is the basic bootstrap, twice the difference minus the quantiles: the quantiles themselves are asked "
        "for.": partial(_paired_with, "basic"),
        "It is moved so that its middle is the measured difference: give the quantiles as they are.": (
            partial(_paired_with, "centred")
        ),
        "The high end comes first: low, then high.": partial(_paired_with, "ends"),
        "These are differences of medians: take the mean difference of each resample.": partial(
            _paired_with, "medians"
        ),
        "These are per cent: give shares.": partial(_paired_with, "per cent"),
        "It takes the nearest resample, or the one in place int(q * R), for a quantile: fine for thousands of them, "
        "but where few were drawn a quantile lies between two. Use `torch.quantile`.": partial(_paired_with, "nearest"),
        "It takes the next lower resample for a quantile: fine for thousands of them, but where few were drawn a "
        "quantile lies between two. Use `torch.quantile`.": partial(_paired_with, "lower"),
        "These are the smallest and the largest resample: take quantiles.": partial(_paired_with, "min max"),
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


def _seed_cases() -> list[Case]:
    cases = [
        Case("two seeds, t = 10", (row([0.4], [0.6]), 10.0), row([0.5], [-0.5], [1.5])),
        Case("three seeds that agree", (row([0.7], [0.7], [0.7]), 4.303), row([0.7], [0.7], [0.7])),
        Case("three seeds, t = 3", (row([1], [2], [3]), 3.0), row([2], [2 - 3**0.5], [2 + 3**0.5])),
        Case("two models", (row([0.4, 1], [0.6, 3]), 1.0), row([0.5, 2], [0.4, 1], [0.6, 3])),
    ]
    for (seeds, models), generator in zip(((3, 2), (4, 3), (6, 1)), generators(3), strict=True):
        cases.append(Case(f"random, {seeds} seeds, {models} models", (normal(generator, seeds, models), 2.5)))
    return cases


def _seed_with(bug: str, rates: Tensor, t: float) -> Tensor:
    """Exercise 11.4 with one mistake planted."""
    count, mean = len(rates), rates.mean(0)
    spread = rates.std(0, correction=0 if bug == "biased" else 1)
    if bug == "all models":
        spread, count = rates.std().expand_as(mean), rates.numel()
    half = (CONFIDENCE if bug == "normal" else t) * spread / count**0.5
    if bug == "deviation":
        half = t * spread
    if bug == "variance":
        half = t * spread.square() / count**0.5
    if bug == "degrees":
        half = t * spread / (count - 1) ** 0.5
    if bug == "count":
        half = t * spread / count
    if bug == "no t":
        half = spread / count**0.5
    if bug == "twice":
        half = 2 * half
    if bug == "absolute":
        half = t * (rates - mean).abs().mean(0) / count**0.5
    if bug == "variance by S":
        half = t * spread.square() / count
    if bug == "widths":
        return torch.stack((mean, half, half))
    if bug == "cut":
        return torch.stack((mean, (mean - half).clamp(0, 1), (mean + half).clamp(0, 1)))
    if bug == "range":
        return torch.stack((mean, rates.amin(0), rates.amax(0)))
    if bug == "median":
        mean = rates.median(0).values
    if bug == "ends":
        return torch.stack((mean, mean + half, mean - half))
    if bug == "order":
        return torch.stack((mean - half, mean, mean + half))
    return torch.stack((mean, mean - half, mean + half))


@exercise(
    "11.4",
    "three seeds",
    difficulty=2,
    minutes=10,
    task="Prompts are one source of luck, the training run another: its weights at the start, its order, its samples. "
    "With $S$ runs the mean is known to $\\pm\\, t\\, s / \\sqrt S$, where $s$ is the standard deviation with $S - 1$ "
    "below, and $t$ is Student's: 4.30 for three seeds and 95 %, where the normal law has 1.96. Three runs say little "
    "about their own spread; $t$ charges for that.",
    cases=_seed_cases,
    suspects={
        "1.96 is for many seeds: with few, the spread itself is uncertain, and Student's t says how much. Use `t`.": (
            partial(_seed_with, "normal")
        ),
        "The standard deviation divides by S, and is too small on average: divide by S - 1.": (
            partial(_seed_with, "biased")
        ),
        "This is the spread of single runs: the mean of S runs is surer by the root of S.": (
            partial(_seed_with, "deviation")
        ),
        "It divides by the root of S - 1: that belongs in the standard deviation. Here it is the root of S.": (
            partial(_seed_with, "degrees")
        ),
        "It divides by S: by the root of S.": partial(_seed_with, "count"),
        "This is the variance: take its root.": partial(_seed_with, "variance"),
        "This is the variance by S: take the root of both.": partial(_seed_with, "variance by S"),
        "These are half-widths: give the ends, mean - half and mean + half.": partial(_seed_with, "widths"),
        "The ends are cut to [0, 1]: leave them as they are, a wide interval should be seen.": (
            partial(_seed_with, "cut")
        ),
        "`t` is not used: one standard error holds the truth in far fewer than 95 % of cases.": (
            partial(_seed_with, "no t")
        ),
        "These are the lowest and the highest run: what three runs span holds the true mean three times out of four.": (
            partial(_seed_with, "range")
        ),
        "It mixes the models: each column is a model of its own.": partial(_seed_with, "all models"),
        "The order is mean, low, high: here the high end comes before the low one.": partial(_seed_with, "ends"),
        "The order is mean, low, high: here the low end comes first.": partial(_seed_with, "order"),
        "This is the median: the mean is asked for.": partial(_seed_with, "median"),
        "It is twice too wide: the ends are one t s / sqrt(S) from the mean on each side.": partial(
            _seed_with, "twice"
        ),
        "This is the mean absolute deviation: s is the standard deviation.": partial(_seed_with, "absolute"),
    },
    hints=(
        "Everything along dimension 0, the seeds. What is `torch.std`'s default below the sum of squares?",
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


def _tax_cases() -> list[Case]:
    cases = [
        Case("one seed, one kind of text", (row([1]), row([3]), row([1.5])), row(0.75)),
        Case("nothing repaired, all repaired", (row([1, 1]), row([2, 2]), row([2, 1])), row(0, 1)),
        Case("made worse", (row([1]), row([2]), row([3])), row(-1)),
        Case("two seeds, one of which paid hardly any tax",
             (row([1], [1]), row([3], [1.25]), row([1.5], [1.5])), row(5 / 9)),
    ]  # fmt: skip
    for (seeds, kinds), generator in zip(((2, 2), (3, 4), (3, 9)), generators(3), strict=True):
        base = 1 + normal(generator, seeds, kinds).abs()
        ppo = base + 0.2 + normal(generator, seeds, kinds).abs()
        ptx = base + 0.5 * normal(generator, seeds, kinds).abs()
        cases.append(Case(f"random, {seeds} seeds, {kinds} kinds of text", (base, ppo, ptx)))
    return cases


def _tax_with(bug: str, base: Tensor, ppo: Tensor, ppo_ptx: Tensor) -> Tensor:
    """Exercise 11.5 with one mistake planted."""
    tax, left = (ppo - base).mean(0), (ppo_ptx - base).mean(0)
    return {
        "median": lambda: ((ppo - ppo_ptx) / (ppo - base)).median(0).values,
        "per cent": lambda: 100 * (1 - left / tax),
        "turned": lambda: left / tax - 1,
        "absolute": lambda: (1 - left / tax).abs(),
        "left": lambda: left,
        "mean of ratios": lambda: (1 - (ppo_ptx - base) / (ppo - base)).mean(0),
        "what is left": lambda: left / tax,
        "of the loss": lambda: 1 - (ppo_ptx / ppo).mean(0),
        "of the mean loss": lambda: 1 - ppo_ptx.mean(0) / ppo.mean(0),
        "nats": lambda: tax - left,
        "other way": lambda: 1 - tax / left,
        "of the base": lambda: (tax - left) / base.mean(0),
        "clamped": lambda: (1 - left / tax).clamp(min=0),
    }[bug]()


@exercise(
    "11.5",
    "how much of the tax came back",
    difficulty=2,
    minutes=10,
    task="PPO's alignment tax on a kind of text is its loss there minus the base model's. Which share of it does "
    "PPO-ptx take away? 1: all of it, 0: nothing, below 0: it made things worse. Average the losses over the seeds "
    "first: a seed that paid hardly any tax has a ratio that means nothing.",
    cases=_tax_cases,
    suspects={
        "It is a mean of the seeds' ratios: one seed with a tiny tax decides everything. Average the taxes over seeds, "
        "then divide once.": partial(_tax_with, "mean of ratios"),
        "This is the share that is left: the share taken away is 1 minus it.": partial(_tax_with, "what is left"),
        "This compares losses, not taxes: a loss of 0 is out of reach, so take the base model's off first.": (
            partial(_tax_with, "of the mean loss")
        ),
        "This compares losses, not taxes, and seed by seed: take the base model's off first.": (
            partial(_tax_with, "of the loss")
        ),
        "These are nats: divide by PPO's tax.": partial(_tax_with, "nats"),
        "This is PPO-ptx's tax alone: which share of PPO's tax is gone?": partial(_tax_with, "left"),
        "It is a median of the seeds' ratios: average the taxes over seeds, then divide once.": (
            partial(_tax_with, "median")
        ),
        "The sign is flipped: what is taken away counts above 0.": partial(_tax_with, "turned"),
        "This is the absolute value: a repair that makes things worse should be seen.": partial(_tax_with, "absolute"),
        "These are per cent: give shares, 1 for all of it.": partial(_tax_with, "per cent"),
        "It is upside down: PPO's tax is the denominator.": partial(_tax_with, "other way"),
        "It divides by the base model's loss: by PPO's tax.": partial(_tax_with, "of the base"),
        "It is cut at 0: a repair that makes things worse should be seen.": partial(_tax_with, "clamped"),
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
