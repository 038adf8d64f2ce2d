"""Lesson 13's whole loop: what it is marked by, and the same loop with one mistake planted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.data import Comparison
from minirlhf.language.dpo import DPOConfig
from minirlhf.language.models import clone, pad
from minirlhf.language.tokenization import encode_prompts
from minirlhf.training import learning_rate_factor, set_learning_rate
from minirlhf_course.checks.exercise import Case
from minirlhf_course.checks.trainers import Run, trainer_exercise
from minirlhf_course.checks.write07 import tiny_model, tiny_tokenizer
from minirlhf_course.checks.write08 import encoded
from minirlhf_course.rankings import single_comparisons

# The loss and the loop, right or with one mistake --------------------------------------------------------------------


def rewards_of(
    mistake: str, model: Any, tokenizer: Any, comparisons: Sequence[Comparison], reference: Any, beta: float
) -> Tensor:
    """The implicit reward of every answer, prompt by prompt: [N]."""
    rows = [ids for row in comparisons for ids in encoded(tokenizer, row.prompt, row.responses)]
    prompts = encode_prompts(tokenizer, [row.prompt for row in comparisons])
    starts = [len(ids) for ids, row in zip(prompts, comparisons, strict=True) for _ in row.responses]
    tokens, real = pad(rows, tokenizer.pad_token_id)
    columns = torch.arange(tokens.shape[1])
    counts = real & (columns >= torch.tensor(starts)[:, None])
    if mistake == "EOS left out":
        counts = counts & (tokens != tokenizer.eos_token_id)
    if mistake == "padding counts":
        counts = columns >= torch.tensor(starts)[:, None]
    if mistake == "mask not shifted":
        counts = counts.roll(1, 1)  # cut like the logits, not like the tokens
    counts = counts[:, 1:]

    def logprobs(of: Any) -> Tensor:
        logits = of(input_ids=tokens, attention_mask=real.long()).logits[:, :-1]
        targets = tokens[:, :-1] if mistake == "off by one" else tokens[:, 1:]
        return logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)

    own = logprobs(model)
    with torch.no_grad():
        ref = logprobs(reference)
    if mistake == "no reference":
        ref = torch.zeros_like(own)
    if mistake == "moving reference":
        ref = own.detach()
    kept = torch.where(counts, own - ref, 0).sum(1)
    if mistake == "mean":
        kept = kept / counts.sum(1)
    if mistake == "mean of columns":
        kept = kept / counts.shape[1]
    return kept if mistake == "no beta" else kept / beta if mistake == "over beta" else beta * kept


def preferences_loss(
    mistake: str,
    model: Any,
    tokenizer: Any,
    comparisons: Sequence[Comparison],
    reference: Any,
    config: DPOConfig,
) -> Tensor:
    """The loss of a batch: the mean over the pairs of each prompt, then over prompts."""
    rewards = rewards_of(mistake, model, tokenizer, comparisons, reference, config.beta)
    losses = []
    sizes = [len(row.responses) for row in comparisons]
    for ours, row in zip(rewards.split(sizes), comparisons, strict=True):
        scores = torch.tensor(row.scores)
        better = scores[:, None] > scores[None, :]
        if mistake == "ties count":
            better = better | (scores[:, None] == scores[None, :]).triu(1)
        if mistake == "swapped":
            better = better.T
        if mistake == "first is best":
            better = torch.ones_like(better).triu(1)
        if mistake == "best against the rest":
            better = better & (scores == scores.max())[:, None]
        if mistake == "best against worst":
            better = better & (scores == scores.max())[:, None] & (scores == scores.min())[None, :]
        margins = (ours[:, None] - ours[None, :])[better]
        each = -margins.sigmoid() if mistake == "no log" else -F.logsigmoid(margins)
        if mistake == "SFT on the best":
            each = -ours[scores == scores.max()]
        losses.append(each)
    if mistake == "over pairs":
        return torch.cat(losses).mean()
    if mistake == "unweighted":
        return torch.stack([each.sum() for each in losses]).mean()
    means = torch.stack([each.mean() for each in losses])
    return means.sum() if mistake == "sum" else means.mean()


def preferences_with(
    mistake: str, model: Any, tokenizer: Any, comparisons: Sequence[Comparison], reference: Any, config: DPOConfig
) -> list[float]:
    """Exercise 13.4 with one mistake planted; "" is none."""
    parameters = list(model.parameters())
    if mistake == "reference learns":
        parameters += list(reference.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.1)
    rows = single_comparisons(comparisons) if mistake == "shuffled pairs" else list(comparisons)
    size, losses = config.batch_size, []
    per_epoch = len(rows) // size
    total = round(config.epochs * len(rows) / size) * (2 if mistake == "twice as long" else 1)
    start = clone(reference)
    order: list[int] = []
    for step in range(total):
        if step % per_epoch == 0:
            order = torch.randperm(len(rows)).tolist()
            if mistake == "not shuffled":
                order.sort()
        place = step % per_epoch * size
        batch = [rows[i] for i in order[place : place + size]]
        loss = preferences_loss(mistake, model, tokenizer, batch, start, config)
        if mistake != "no zero_grad":
            optimizer.zero_grad()
        loss.backward()
        if mistake == "reference learns":
            for own, other in zip(model.parameters(), reference.parameters(), strict=True):
                other.grad = own.grad.clone()
        if mistake != "not clipped":
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        if mistake != "constant rate":
            set_learning_rate(optimizer, config.lr * learning_rate_factor(step, total, config.warmup))
        optimizer.step()
        losses.append(loss.item())
    model.train(mistake == "left in train mode")
    return losses


# Exercise 13.4 -------------------------------------------------------------------------------------------------------

LOSSES = {
    "Chosen and rejected are swapped: the better answer's reward comes first.": "swapped",
    "The reference is the policy itself, so every reward is 0: it is the other model, and stays as it is.": (
        "moving reference"
    ),
    "The reference is missing: the reward is beta times the log-ratio, not the log-probability.": "no reference",
    "beta is missing: it turns nats into points of reward.": "no beta",
    "The log-ratio is divided by beta: multiply.": "over beta",
    "The reward is a mean over the answer's tokens: the log-probability of an answer is the sum.": "mean",
    "The reward is a mean over all columns, padding among them: the log-probability of an answer is the sum.": (
        "mean of columns"
    ),
    "The padding is in the sum: it is nothing at all.": "padding counts",
    "EOS is left out: that the answer ends here was the policy's choice, too.": "EOS left out",
    "The labels are not shifted: column t of the logits speaks about token t + 1, and it is scored on token t.": (
        "off by one"
    ),
    "The mask is cut like the logits: it marks tokens, so it is cut like the tokens, mask[:, 1:].": "mask not shifted",
    "Ties count: a pair that the labeler could not order is no pair.": "ties count",
    "The first answer is taken for the best: the answers come in no order, the scores tell.": "first is best",
    "Only the best answer is compared with the others: all pairs of a ranking count.": "best against the rest",
    "Only the best and the worst are compared: all pairs of a ranking count.": "best against worst",
    "All pairs of the batch are averaged alike: first the mean over each prompt's pairs, then over prompts.": (
        "over pairs"
    ),
    "1/C(K, 2) is missing: take each prompt's mean over its pairs, so that nine answers weigh as much as four.": (
        "unweighted"
    ),
    "The prompts are added up: take the mean over prompts.": "sum",
    "The log is missing: -sigmoid has no gradient where the policy is most wrong.": "no log",
    "Only the best answer is learned, as by SFT: the others tell what not to say.": "SFT on the best",
}
AGAIN = (
    "An answer goes through the policy twice in a step, or without the others to its prompt: all K of a prompt "
    "together, once, in one batch."
)
LOOP = {
    AGAIN: "shuffled pairs",
    "The reference has moved: it is the fixed point that every log-ratio is measured from.": "reference learns",
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
}
MOVED = next(sentence for sentence, name in LOOP.items() if name == "reference learns")


def reference_problem(run: Run, case: Case) -> tuple[str, str] | None:
    """Whether the reference is still what it was."""
    before, after = case.args[3].state_dict(), run.given[3].state_dict()
    moved = [name for name, x in before.items() if not torch.equal(x, after[name])]
    return (MOVED, f"  the first weight that differs: {moved[0]}") if moved else None


def preference_cases() -> list[Case]:
    """Tiny runs: one pair, unlike K with ties, a small norm, some passes over eight prompts, and a start at the
    reference."""
    verbs = ("sings", "lives here", "eats there now", "well", "lives there well now")
    rows = []
    for place, animal in enumerate(("owl", "fox", "frog", "bee")):
        for question in ("who", "where now"):
            turned = verbs[place:] + verbs[:place]
            answers = tuple(f"{animal} {verb}" for verb in turned[: 3 + place % 3])
            scores = tuple(-float(verbs.index(verb)) for verb in turned[: len(answers)])
            rows.append(Comparison(f"{question} {animal}", answers, scores))
    pair = Comparison("who owl", ("owl sings", "owl lives here now"), (1.0, 2.0))
    tied = Comparison(
        "where now fox", ("fox lives here", "fox eats", "fox sings there now", "well"), (1.0, 3.0, 1.0, 2.0)
    )
    three = Comparison("why bee", ("bee", "bee sings there", "bee well"), (2.0, 3.0, 1.0))
    plain = DPOConfig(epochs=2, batch_size=1, lr=1e-2, warmup=0, beta=0.5, max_grad_norm=100.0)
    mixed, both = [pair, tied, three], replace(plain, batch_size=3)
    many = replace(plain, epochs=4, batch_size=2, lr=2e-2, warmup=5)
    tokenizer, other = tiny_tokenizer(), tiny_model(7)
    return [
        Case("one prompt with two answers", (tiny_model(), tokenizer, [pair], other, plain)),
        Case("one prompt with four answers, two of them tied", (tiny_model(), tokenizer, [tied], other, plain)),
        Case("three prompts in one batch, one with a tie", (tiny_model(1), tokenizer, mixed, other, both)),
        Case("the same, clipped to 0.05", (tiny_model(1), tokenizer, mixed, other, replace(both, max_grad_norm=0.05))),
        Case("eight prompts to memorise, in batches of two", (tiny_model(2), tokenizer, rows, tiny_model(2), many)),
        Case(
            "a policy that starts as the reference",
            (tiny_model(), tokenizer, [tied], tiny_model(), plain),
            torch.tensor(2.0).log(),
        ),
    ]


@trainer_exercise(
    "13.4",
    "the whole loop",
    difficulty=4,
    minutes=40,
    task="From rankings to a policy, without a reward model and without a sample. It is lesson 08's loop with another "
    "reward: each epoch goes through all prompts in a new random order, `batch_size` of them per step (it divides "
    "their number), each with all of its 2 to 9 answers, and every answer goes through the policy once per step. The "
    "reward of an answer is 13.2's; the loss is the mean of 13.3's over the pairs of each prompt, without ties, then "
    "the mean over prompts. AdamW, a linear warm-up, a cosine, a clipped norm. The reference is given, need not be "
    "where the policy starts, and stays as it is. At the end the model is in eval mode.",
    cases=preference_cases,
    suspects={text: partial(preferences_with, name) for text, name in (LOSSES | LOOP).items()},
    mistakes=LOSSES,
    loss=preferences_loss,
    rows=lambda tokenizer, row: dict(enumerate(map(tuple, encoded(tokenizer, row.prompt, row.responses)))),
    again=AGAIN,
    close=reference_problem,
    reads=2,
    hints=(
        "`tokens, mask, response_mask = models.pad_answers(rows, starts, tokenizer.pad_token_id)` pads rows of prompt, "
        "answer and EOS, where `starts` says where each answer begins; `models.response_logprobs(model, tokens, mask, "
        "response_mask)` is the log-probability of every token of an answer, 0 elsewhere. The reference's need no "
        "gradient.",
        "`rewards = implicit_rewards(logprobs, ref_logprobs, response_mask, config.beta)` for all answers of the "
        "batch; `rewards.split([K_1, K_2, ...])` gives each prompt its own; for each, "
        "`-logsigmoid(r[:, None] - r[None, :])[s[:, None] > s[None, :]].mean()`.",
    ),
)
def fit_preferences(
    model: Any, tokenizer: Any, comparisons: Sequence[Comparison], reference: Any, config: DPOConfig
) -> list[float]:
    """Train a causal model in place; give the loss of every step, before its update.

    comparisons have .prompt, .responses and .scores (high = good); reference is a causal
    model; config has .epochs, .batch_size, .lr, .warmup, .beta and .max_grad_norm.
    """
    return preferences_with("", model, tokenizer, comparisons, reference, config)
