"""Lesson 07's whole loop: what it is marked by, and the same loop with one mistake planted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from minirlhf.data import Demonstration
from minirlhf.language.models import ModelConfig, pad, tiny_llama
from minirlhf.language.sft import SFTConfig
from minirlhf.language.tokenization import encode_prompts, encode_responses
from minirlhf.training import learning_rate_factor, set_learning_rate
from minirlhf_course.checks.exercise import Case
from minirlhf_course.checks.trainers import trainer_exercise
from minirlhf_course.words import word_tokenizer

WORDS = ("who", "where", "why", "owl", "fox", "frog", "bee", "lives", "eats", "sings", "here", "there", "well", "now")
SIZE = ModelConfig(hidden_size=16, layers=1, heads=2, intermediate_size=32, init_std=0.2)


@lru_cache(maxsize=1)
def tiny_tokenizer() -> Any:
    """One token per word."""
    return word_tokenizer(WORDS)


def tiny_model(seed: int = 0) -> Any:
    """A causal model of one layer that has learned nothing."""
    return tiny_llama(SIZE, tiny_tokenizer(), 32, seed).eval()


# The loss and the loop, right or with one mistake --------------------------------------------------------------------


def sft_loss(mistake: str, model: Any, tokenizer: Any, demonstrations: Sequence[Demonstration]) -> Tensor:
    """The loss of a batch of demonstrations: nats per token of the completions and their EOS."""
    prompts = encode_prompts(tokenizer, [row.prompt for row in demonstrations])
    completions = encode_responses(tokenizer, [row.completion for row in demonstrations])
    tokens, real = pad([p + c for p, c in zip(prompts, completions, strict=True)], tokenizer.pad_token_id)  # [B, L]
    columns, starts = torch.arange(tokens.shape[1]), torch.tensor([len(p) for p in prompts])[:, None]
    counts = real & (columns >= starts)
    if mistake == "prompt counts":
        counts = real
    if mistake == "EOS left out":
        counts = counts & (tokens != tokenizer.eos_token_id)
    if mistake in ("padding counts", "padding counts and is read"):
        counts = columns >= starts
    if mistake == "first token left out":
        counts = counts & (columns > starts)
    if mistake == "mask not shifted":
        counts = counts.roll(1, 1)  # cut like the logits, not like the tokens
    read = torch.ones_like(real) if mistake == "padding counts and is read" else real
    logits = model(input_ids=tokens, attention_mask=read.long()).logits
    ahead = {"off by one": 0, "off by one, to the end": 0, "two ahead": 2}.get(mistake, 1)
    targets, counts = tokens[:, ahead:], counts[:, ahead:]
    if mistake == "off by one":
        targets, counts = targets[:, :-1], counts[:, :-1]
    logprobs = logits[:, : targets.shape[1]].log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    kept = torch.where(counts, logprobs, 0)
    if mistake == "mean of means":
        return -(kept.sum(1) / counts.sum(1)).mean()
    if mistake == "all positions":
        return -kept.mean()
    if mistake == "by rows":
        return -kept.sum() / len(kept)
    if mistake == "sum":
        return -kept.sum()
    loss = -kept.sum() / counts.sum()
    return -loss if mistake == "sign" else loss


def sft_with(
    mistake: str, model: Any, tokenizer: Any, demonstrations: Sequence[Demonstration], config: SFTConfig
) -> list[float]:
    """Exercise 7.4 with one mistake planted; "" is none."""
    parameters = list(model.parameters())[-2:] if mistake == "only the last layer" else list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay)
    size, losses = config.batch_size, []
    per_epoch = len(demonstrations) // size
    total = round(config.epochs * len(demonstrations) / size)
    if mistake == "one epoch":
        total = per_epoch
    order: list[int] = []
    for step in range(total):
        if not order or (step % per_epoch == 0 and mistake != "one order"):
            order = torch.randperm(len(demonstrations)).tolist()
            if mistake == "not shuffled":
                order.sort()
        place = 0 if mistake == "one batch" else step % per_epoch * size
        batch = [demonstrations[i] for i in order[place : place + size]]
        if mistake == "drawn with replacement":
            batch = [demonstrations[i] for i in torch.randperm(len(demonstrations))[:size].tolist()]
        loss = sft_loss(mistake, model, tokenizer, batch)
        if mistake != "no zero_grad":
            optimizer.zero_grad()
        loss.backward()
        if mistake == "clipped by value":
            torch.nn.utils.clip_grad_value_(parameters, config.max_grad_norm)
        elif mistake != "not clipped":
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        if mistake != "constant rate":
            warmup = 0 if mistake == "no warm-up" else config.warmup
            shape = "linear" if mistake == "straight decay" else "cosine"
            factor = learning_rate_factor(step, total, warmup, shape=shape)  # type: ignore[arg-type]
            set_learning_rate(optimizer, config.lr * factor)
        optimizer.step()
        losses.append(loss.item())
    model.train(mistake == "left in train mode")
    return losses[-1:] if mistake == "last loss" else losses


# Exercise 7.4 --------------------------------------------------------------------------------------------------------

LOSSES = {
    "The prompt is learned too: the user writes it, the model only reads it.": "prompt counts",
    "EOS is not learned: nobody teaches the model to stop.": "EOS left out",
    "The padding is learned too: it is nothing at all.": "padding counts",
    "The padding is learned too, and read like words: it is nothing at all.": "padding counts and is read",
    "The labels are not shifted: column t of the logits speaks about token t + 1, and it is scored on token t.": (
        "off by one"
    ),
    "The labels are not shifted: every column of the logits is scored on its own token, the last one too, and "
    "it speaks about the next.": "off by one, to the end",
    "The labels are shifted twice: column t of the logits is scored on token t + 2. Does the model's own loss shift "
    "them already?": "two ahead",
    "The completion's first token is not learned: the prompt's last column predicts it.": "first token left out",
    "The mask is cut like the logits: it marks tokens, so it is cut like the tokens, mask[:, 1:].": "mask not shifted",
    "Each row is averaged first, and then the rows: divide one sum by one count, that of the whole batch.": (
        "mean of means"
    ),
    "The loss is divided by all positions: divide by the number of tokens that count.": "all positions",
    "The loss is divided by the rows: divide by the number of tokens that count.": "by rows",
    "The loss is a sum: divide it by the number of tokens that count.": "sum",
    "The sign is flipped: the optimizer minimises, so take minus the log-probs.": "sign",
}
LOOP = {
    "Gradients add up from step to step: optimizer.zero_grad() is missing.": "no zero_grad",
    "The gradient is not clipped: clip_grad_norm_ comes between backward() and step().": "not clipped",
    "Each number of the gradient is clipped by itself: clip the norm, which keeps the direction.": "clipped by value",
    "The learning rate never changes: a linear warm-up, then a cosine. Set it in every step, before step().": (
        "constant rate"
    ),
    "There is no warm-up: the first step's rate is config.lr / config.warmup.": "no warm-up",
    "An epoch does not see each example once.": "one batch",
    "It makes the wrong number of steps: config.epochs says how often all examples are seen.": "one epoch",
    "The examples come in the order of the data: shuffle them, anew for every epoch.": "not shuffled",
    "Every epoch goes through the examples in the same order: shuffle anew for each.": "one order",
    "The learning rate does not fall along a cosine.": "straight decay",
    "The model is left in train mode: whoever uses it next would get its dropout. End with model.eval().": (
        "left in train mode"
    ),
    "It does not return a list with the loss of every step.": "last loss",
}


def sft_cases() -> list[Case]:
    """Tiny runs: a single row, rows of unlike length, a small norm, some passes over a dozen, and no knowledge."""
    animals, verbs = ("owl", "fox", "frog", "bee"), ("lives here", "eats there now", "sings")
    rows = [
        Demonstration(f"{question} {animal}", f"{animal} {verb} {' '.join(['well'] * place)}".strip())
        for place, animal in enumerate(animals)
        for question, verb in zip(("who", "why now", "where"), verbs, strict=True)
    ]
    short = [rows[0], rows[4], rows[11]]
    plain = SFTConfig(epochs=2, batch_size=3, lr=1e-2, warmup=0, max_grad_norm=100.0)
    once = replace(plain, epochs=1, batch_size=1)
    many = replace(plain, epochs=6, batch_size=4, lr=2e-2, warmup=5)
    tokenizer, ignorant = tiny_tokenizer(), tiny_model()
    with torch.no_grad():
        ignorant.get_input_embeddings().weight.zero_()
    return [
        Case("one demonstration", (tiny_model(), tokenizer, rows[:1], once)),
        Case("three demonstrations in one batch, twice", (tiny_model(1), tokenizer, short, plain)),
        Case("the same, clipped to 0.05", (tiny_model(1), tokenizer, short, replace(plain, max_grad_norm=0.05))),
        Case("twelve demonstrations to memorise, in batches of four", (tiny_model(2), tokenizer, rows, many)),
        Case(
            "a model that finds all words equally likely",
            (ignorant, tokenizer, rows[:1], once),
            torch.tensor(float(len(tokenizer))).log(),
        ),
    ]


@trainer_exercise(
    "7.4",
    "the whole loop",
    difficulty=4,
    minutes=40,
    task="Step 1, from texts to a trained model. Each epoch goes through all demonstrations once, in a new random "
    "order, `batch_size` of them per step (it divides their number). A step is one loss, divided by the count of "
    "its whole batch; its gradient clipped to `max_grad_norm`; one step of AdamW, at a rate that rises in a "
    "straight line to `lr` over `warmup` steps and falls along a cosine from there, to a tenth or to 0. At the "
    "end the model is in eval mode. `encode_prompts(tokenizer, texts)` knows the template; EOS is up to you.",
    cases=sft_cases,
    suspects={text: partial(sft_with, name) for text, name in (LOSSES | LOOP).items()},
    mistakes=LOSSES,
    loss=sft_loss,
    rows=lambda tokenizer, row: {
        0: (*encode_prompts(tokenizer, [row.prompt])[0], *encode_responses(tokenizer, [row.completion])[0])
    },
    again="A demonstration is read more than once in a step: each row goes through the model once.",
    hints=(
        "Before the loop: all rows as lists of ids, the optimizer, and how many steps there are. In a step: draw the "
        "rows, pad them to the longest, logits, 7.1 to 7.3, `zero_grad`, `backward`, clip, set the rate, `step`.",
        "`order = torch.randperm(n).tolist()` where an epoch begins, `rows = order[i : i + batch_size]`. With "
        "`s` steps done of `total`, the rate is `lr * (s + 1) / warmup` while `s < warmup`, then "
        "`lr * (0.1 + 0.45 * (1 + cos(pi * (s - warmup) / (total - warmup))))`; write it into every "
        "`group['lr']` of `optimizer.param_groups`.",
    ),
)
def fine_tune(model: Any, tokenizer: Any, demonstrations: Sequence[Demonstration], config: SFTConfig) -> list[float]:
    """Train a causal model in place; give the loss of every step, before its update.

    demonstrations have .prompt and .completion, both texts; config has
    .epochs, .batch_size, .lr, .warmup and .max_grad_norm.
    """
    return sft_with("", model, tokenizer, demonstrations, config)
