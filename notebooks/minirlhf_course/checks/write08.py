"""Lesson 08's whole loop: what it is marked by, and the same loop with one mistake planted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minirlhf.data import Comparison, Demonstration
from minirlhf.language.models import pad, scalar_model_from, token_values
from minirlhf.language.reward_model import RewardModelConfig
from minirlhf.language.tokenization import encode_prompts, encode_responses
from minirlhf.training import learning_rate_factor, set_learning_rate
from minirlhf_course.checks.exercise import Case
from minirlhf_course.checks.trainers import Run, trainer_exercise
from minirlhf_course.checks.write07 import tiny_model, tiny_tokenizer
from minirlhf_course.rankings import single_comparisons

# The loss and the loop, right or with one mistake --------------------------------------------------------------------


def encoded(tokenizer: Any, prompt: str, answers: Sequence[str]) -> list[list[int]]:
    """The rows of a prompt: the prompt, an answer and EOS."""
    (before,) = encode_prompts(tokenizer, [prompt])
    return [before + after for after in encode_responses(tokenizer, answers)]


def scores_of(model: Any, tokenizer: Any, rows: Sequence[Sequence[int]], mistake: str = "") -> Tensor:
    """One score per row: the head at its last token."""
    tokens, real = pad(rows, tokenizer.pad_token_id)
    values = token_values(model, tokens, real)
    if mistake == "last column":
        return values[:, -1]
    if mistake == "mean of tokens":
        return values.sum(1) / real.sum(1)
    return values[torch.arange(len(rows)), real.sum(1) - (2 if mistake == "before EOS" else 1)]


def rankings_loss(mistake: str, model: Any, tokenizer: Any, comparisons: Sequence[Comparison]) -> Tensor:
    """The K-way loss of a batch: the mean over the pairs of each prompt, then over prompts."""
    rows = [ids for row in comparisons for ids in encoded(tokenizer, row.prompt, row.responses)]
    rewards = scores_of(model, tokenizer, rows, mistake).split([len(row.responses) for row in comparisons])
    losses = []
    for ours, row in zip(rewards, comparisons, strict=True):
        scores = torch.tensor(row.scores)
        better = scores[:, None] > scores[None, :]
        if mistake == "ties count":
            better = better | (scores[:, None] == scores[None, :]).triu(1)
        if mistake == "sign":
            better = better.T
        if mistake == "best against the rest":
            better = better & (scores == scores.max())[:, None]
        if mistake == "first is best":
            better = torch.ones_like(better).triu(1)
        if mistake == "neighbours":
            places = scores.unique(return_inverse=True)[1]
            better = better & (places[:, None] - places[None, :] == 1)
        each = -F.logsigmoid(ours[:, None] - ours[None, :])[better]
        if mistake == "no log":
            each = -(ours[:, None] - ours[None, :]).sigmoid()[better]
        if mistake == "ties in C":
            each = torch.cat((each, each.new_zeros(len(scores) * (len(scores) - 1) // 2 - len(each))))
        if mistake == "regression":
            each = (ours - scores).square()
        losses.append(each)
    if mistake == "over pairs":
        return torch.cat(losses).mean()
    if mistake == "unweighted":
        return torch.stack([each.sum() for each in losses]).mean()
    means = torch.stack([each.mean() for each in losses])
    return means.sum() if mistake == "sum" else means.mean()


def rewards_with(
    mistake: str,
    model: Any,
    tokenizer: Any,
    comparisons: Sequence[Comparison],
    demonstrations: Sequence[Demonstration],
    config: RewardModelConfig,
) -> list[float]:
    """Exercise 8.7 with one mistake planted; "" is none."""

    def mean_score() -> float:
        rows = [encoded(tokenizer, row.prompt, [row.completion])[0] for row in demonstrations]
        if mistake == "offset of the answers":
            rows = [ids for row in comparisons for ids in encoded(tokenizer, row.prompt, row.responses)]
        with torch.no_grad():
            return float(scores_of(model, tokenizer, rows).mean())

    before = mean_score()
    parameters = list(model.score.parameters()) if mistake == "only the head" else list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay)
    rows = single_comparisons(comparisons) if mistake == "shuffled pairs" else list(comparisons)
    size, losses = config.batch_size, []
    per_epoch = len(rows) // size
    total = round(config.epochs * len(rows) / size) * (2 if mistake == "twice as long" else 1)
    order: list[int] = []
    for step in range(total):
        if step % per_epoch == 0:
            order = torch.randperm(len(rows)).tolist()
            if mistake == "not shuffled":
                order.sort()
        place = step % per_epoch * size
        loss = rankings_loss(mistake, model, tokenizer, [rows[i] for i in order[place : place + size]])
        if mistake != "no zero_grad":
            optimizer.zero_grad()
        loss.backward()
        if mistake != "not clipped":
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        if mistake != "constant rate":
            set_learning_rate(optimizer, config.lr * learning_rate_factor(step, total, config.warmup))
        optimizer.step()
        losses.append(loss.item())
    model.train(mistake == "left in train mode")
    if mistake != "no offset":
        offset = before if mistake == "offset before training" else mean_score()
        model.config.score_offset = -offset if mistake == "offset with the other sign" else offset
    return losses


# Exercise 8.7 --------------------------------------------------------------------------------------------------------

TIED = "Ties count: a pair that the labeler could not order is no pair."
LOSSES = {
    TIED: "ties count",
    "The sign is flipped: the better answer's score comes first, r_w - r_l.": "sign",
    "The first answer is taken for the best: the answers come in no order, the scores tell.": "first is best",
    "Only the best answer is compared with the others: all pairs of a ranking count.": "best against the rest",
    "Only neighbours in the ranking are compared: all pairs of a ranking count.": "neighbours",
    "All pairs of the batch are averaged alike: first the mean over each prompt's pairs, then over prompts.": (
        "over pairs"
    ),
    "1/C(K, 2) is missing: take each prompt's mean over its pairs, so that nine answers weigh as much as four.": (
        "unweighted"
    ),
    "Ties are left in the divisor: divide by the pairs that are left.": "ties in C",
    "The prompts are added up: take the mean over prompts.": "sum",
    "The log is missing: -sigmoid has no gradient where the model is most wrong.": "no log",
    "This is a regression on the labeler's scores: only their order counts.": "regression",
    "The score is read in the last column, which is padding in all but the longest row: at the last real token.": (
        "last column"
    ),
    "The score is the mean over all tokens: only the last one has read the whole answer.": "mean of tokens",
    "The score is read one token before the end: EOS is the last one, and says that the answer ends here.": (
        "before EOS"
    ),
}
AGAIN = (
    "An answer goes through the model twice, or without the others to its prompt: all K of a prompt together, once, in "
    "one batch. Pairs that are shuffled as examples of their own overfit."
)
LOOP = {
    AGAIN: "shuffled pairs",
    "Gradients add up from step to step: optimizer.zero_grad() is missing.": "no zero_grad",
    "The gradient is not clipped: clip_grad_norm_ comes between backward() and step().": "not clipped",
    "The learning rate never changes: a linear warm-up, then a cosine. Set it in every step, before step().": (
        "constant rate"
    ),
    "It makes the wrong number of steps: config.epochs says how often all examples are seen.": "twice as long",
    "The examples come in the order of the data: shuffle them, anew for every epoch.": "not shuffled",
    "The model is left in train mode: whoever uses it next would get its dropout. End with model.eval().": (
        "left in train mode"
    ),
    "The offset is not set: model.config.score_offset is what is taken off every score.": "no offset",
    "The offset has the wrong sign: it is taken off, so it is the demonstrations' mean itself.": (
        "offset with the other sign"
    ),
    "The offset was measured before training: the scores have moved since.": "offset before training",
    "The demonstrations do not score 0 on average.": "offset of the answers",
}


def offset_problem(run: Run, case: Case) -> tuple[str, str] | None:
    """Whether the demonstrations score 0 on average, and what was done instead."""
    _, tokenizer, _, demonstrations, _ = case.args
    rows = [encoded(tokenizer, row.prompt, [row.completion])[0] for row in demonstrations]
    offset = float(getattr(run.model.config, "score_offset", 0.0))
    with torch.no_grad():
        left = float(scores_of(run.model, tokenizer, rows).mean())
        before = float(scores_of(run.start, tokenizer, rows).mean())
    if abs(left) < 1e-3:
        return None
    mean = left + offset
    more = f"  their mean is {mean:.4f}, score_offset is {offset:.4f}"
    known = {"no offset": 0.0, "offset with the other sign": -mean, "offset before training": before}
    for sentence, name in LOOP.items():
        if name in known and abs(offset - known[name]) < 1e-3:
            return sentence, more
    return "The demonstrations do not score 0 on average.", more


def tiny_rewarder(seed: int = 0) -> Any:
    """A model of one layer with a scalar head."""
    return scalar_model_from(tiny_model(seed), seed)


def ranking_cases() -> list[Case]:
    """Tiny runs: one pair, unlike K with ties, a small norm, some passes over eight prompts, and no knowledge."""
    verbs = ("sings", "lives here", "eats there now", "well", "lives there well now")
    rows = []
    for place, animal in enumerate(("owl", "fox", "frog", "bee")):
        for question in ("who", "where now"):
            turned = verbs[place:] + verbs[:place]
            answers = tuple(f"{animal} {verb}" for verb in turned[: 3 + place % 3])
            scores = tuple(-float(verbs.index(verb)) for verb in turned[: len(answers)])
            rows.append(Comparison(f"{question} {animal}", answers, scores))
    shown = [Demonstration(f"why {animal}", f"{animal} eats well") for animal in ("owl", "fox", "bee")]
    pair = Comparison("who owl", ("owl sings", "owl lives here now"), (1.0, 2.0))
    tied = Comparison("where fox", ("fox lives here", "fox eats", "fox sings there now", "well"), (1.0, 3.0, 1.0, 2.0))
    three = Comparison("why bee", ("bee", "bee sings there", "bee well"), (2.0, 3.0, 1.0))
    plain = RewardModelConfig(epochs=2, batch_size=1, lr=1e-2, warmup=0, max_grad_norm=100.0)
    mixed, both = [pair, tied, three], replace(plain, batch_size=3)
    tokenizer, ignorant = tiny_tokenizer(), tiny_rewarder()
    nn.init.zeros_(ignorant.score.weight)
    clipped = replace(both, max_grad_norm=0.05)
    many = replace(plain, epochs=4, batch_size=2, lr=2e-2, warmup=5)
    return [
        Case("one prompt with two answers", (tiny_rewarder(), tokenizer, [pair], shown, plain)),
        Case("one prompt with four answers, two of them tied", (tiny_rewarder(), tokenizer, [tied], shown, plain)),
        Case("three prompts in one batch, one with a tie", (tiny_rewarder(1), tokenizer, mixed, shown, both)),
        Case("the same, clipped to 0.05", (tiny_rewarder(1), tokenizer, mixed, shown, clipped)),
        Case("eight prompts to memorise, in batches of two", (tiny_rewarder(2), tokenizer, rows, shown, many)),
        Case(
            "a head that scores all answers alike",
            (ignorant, tokenizer, [tied], shown, plain),
            torch.tensor(2.0).log(),
        ),
    ]


@trainer_exercise(
    "8.7",
    "the whole loop",
    difficulty=4,
    minutes=40,
    task="Step 2, from rankings to a reward model. The model has its scalar head already: `models.token_values(model, "
    "tokens, mask)` is what it says at every token, [B, T]. Each epoch (the paper: one) goes through all prompts in a "
    "new random order, `batch_size` of them per step (it divides their number), each with all of its 2 to 9 answers: "
    "every answer goes through the model once. The loss is 8.2's, without ties; the optimizer is lesson 07's: AdamW, a "
    "linear warm-up, a cosine, a clipped norm. At the end the model is in eval mode, and `model.config.score_offset`, "
    "which `token_values` takes off every score, makes the demonstrations score 0 on average.",
    cases=ranking_cases,
    suspects={text: partial(rewards_with, name) for text, name in (LOSSES | LOOP).items()},
    mistakes=LOSSES,
    loss=rankings_loss,
    rows=lambda tokenizer, row: dict(enumerate(map(tuple, encoded(tokenizer, row.prompt, row.responses)))),
    again=AGAIN,
    close=offset_problem,
    hints=(
        "K differs between prompts, so put the answers of a whole batch into one list of rows, score all of them in "
        "one go, and give each prompt its own share of the scores again: `scores.split([K_1, K_2, ...])`.",
        "`scores = last_token_scores(models.token_values(model, tokens, mask), mask)`; for each prompt "
        "`-logsigmoid(r[:, None] - r[None, :])[s[:, None] > s[None, :]].mean()`; the batch's loss is the mean of "
        "these. The offset is the mean score of the demonstrations after training.",
    ),
)
def fit_rewards(
    model: Any,
    tokenizer: Any,
    comparisons: Sequence[Comparison],
    demonstrations: Sequence[Demonstration],
    config: RewardModelConfig,
) -> list[float]:
    """Train a model with a scalar head in place; give the loss of every step.

    comparisons have .prompt, .responses and .scores (high = good); demonstrations have
    .prompt and .completion; config has .epochs, .batch_size, .lr, .warmup and
    .max_grad_norm. Sets model.config.score_offset.
    """
    return rewards_with("", model, tokenizer, comparisons, demonstrations, config)
