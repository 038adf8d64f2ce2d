"""Rewards and advantages of an RLHF trainer, read off its gradients on tables, and the exact gradient of equation 2."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

from minirlhf.language.rlhf import RLHFConfig
from minirlhf_course.studios.credit import (
    ADVANTAGES,
    REWARDS,
    WEIGHTS,
    Text,
    gae,
    logprobs_of,
    rewards,
    strangers,
    text_of,
    weights_of,
    whitened,
)
from minirlhf_course.studios.dictation import Run, Step, watch
from minirlhf_course.studios.given import Trainer
from minirlhf_course.studios.ledger import parallel, scaled
from minirlhf_course.studios.studio import Failure, Notes
from minirlhf_course.studios.tables import trio

BASE = RLHFConfig(
    steps=2,
    batch_size=8,
    minibatch_size=8,
    epochs=1,
    lr=0.02,
    value_lr=0.05,
    warmup=0,
    beta=0.3,
    gamma=0.9,
    lam=0.7,
    temperature=0.8,
    max_response_tokens=5,
    missing_eos_penalty=0.75,
)
"""Of the tables: eight prompts, answers of at most five tokens."""
FAST = replace(BASE, lr=0.15, value_lr=0.2, epochs=4)
"""Ratios leave the clip range."""


def shown(run: Run, step: Step, text: Text, table: dict[str, Tensor], wrong: Tensor, settings: str) -> str:
    """The shortest answer of those that are wrong, token by token."""
    rows_off = wrong.any(1).nonzero().flatten().tolist() or list(range(len(wrong)))
    n = min(rows_off, key=lambda row: int(text.mask[row].sum()))
    length = int(text.mask[n].sum())
    words = run.models.tokenizer.convert_ids_to_tokens(step.samples.response_tokens[n, :length].tolist())
    rows = [("token", [str(word) for word in words])]
    rows += [(name, [f"{x:.3f}" for x in values[n, :length].tolist()]) for name, values in table.items()]
    width = max(len(name) for name, _ in rows)
    lines = [f'Smallest case: the answer to "{step.texts[n]}"; the reward says {float(text.raw[n]):.3f}.  {settings}']
    lines += [f"  {name:<{width}} " + " ".join(f"{cell:>9}" for cell in cells) for name, cells in rows]
    return "\n".join(lines)


def off(got: Tensor, right: Tensor) -> Tensor:
    """Where two tables differ visibly."""
    return (got - right).abs() > 2e-3 * right.abs().max().clamp(min=1e-12)


# Whose gradient ------------------------------------------------------------------------------------------------------

SHIFTED = (
    "Logits and tokens are off by one (bug 23): what stands in column t is said by the logits of column t - 1, so the "
    "slice of both begins one column to the left of the answer and ends one before the last."
)
PADDING = "Padding counts in the loss: take what counts, `x[response_mask]`, before any mean (bug 9)."
KEPT = "Answers of an earlier batch still have a gradient: zero_grad() is missing, or a list is never emptied."

LATE = "V of the wrong texts learns: V *before* a token of the answer stands one column to its left."


def _within_prompts(run: Run, step: Step) -> set[int]:
    """The rows of texts that end before their prompt does."""
    places = run.models.policy.base_model(step.samples.prompt_tokens, step.samples.prompt_mask).last_hidden_state
    rows = places[:, :-1, :-1].argmax(-1)
    return set(rows[step.samples.prompt_mask[:, :-1]].tolist())


def only_answers_learn(trainer: Trainer, notes: Notes) -> Failure | None:
    """No gradient anywhere but before the tokens that count."""
    run = watch(trainer, BASE)
    if run.problem:
        return Failure(run.problem)
    earlier: set[int] = set()
    for number, step in enumerate(run.steps, 1):
        for update in step.updates:
            text = text_of(run, step, update, BASE, BASE.beta)
            for model, gradient in update.gradients.items():
                rows = set(strangers(gradient, text).tolist())
                if not rows:
                    continue
                if rows <= earlier:
                    named = KEPT
                elif model == "value":
                    named = PADDING if 0 in rows else LATE
                else:
                    named = PADDING if 0 in rows and not rows & _within_prompts(run, step) else SHIFTED
                return Failure(
                    f"In batch {number} the {model} model learns at {len(rows)} texts that no token of an answer "
                    f"follows{', padding among them' if 0 in rows else ''}.",
                    named,
                )
            earlier |= set(text.rows[text.mask].tolist())
    return None


# Rewards -------------------------------------------------------------------------------------------------------------

PLAIN = replace(BASE, whiten_advantages=False, gamma=1.0, lam=1.0)


def _differing(
    run: Run, config: RLHFConfig, right_of: Callable[[Text], Tensor]
) -> list[tuple[Step, Text, Tensor, Tensor]]:
    """The steps whose first update weighs the tokens otherwise than right, with what was seen and what is right."""
    found = []
    for step in run.steps:
        update = step.updates[0]
        text = text_of(run, step, update, config, config.beta)
        got, right = weights_of(update, text, config.temperature), right_of(text)
        if not parallel(got, right):
            found.append((step, text, got, right))
    return found


def kl_is_charged(trainer: Trainer, notes: Notes) -> Failure | None:
    """Where V is 0 and nothing is discounted or whitened, differences of the weights are the rewards."""
    config = replace(PLAIN, value_lr=0.0)
    run = watch(trainer, config, models=trio(values=0.0))
    if run.problem:
        return Failure(run.problem)
    differing = _differing(run, config, gae)
    if not differing:
        return None
    seen = [(got, text) for _, text, got, _ in differing]
    named = _first_that_gives(seen, {text: _charged(give) for text, give in REWARDS.items()})
    named = named or _first_that_gives(seen, WEIGHTS) or _sign(seen, gae)
    named = named or _first_that_gives(seen, {MEANS: lambda x: gae(x) / x.mask.sum(1, keepdim=True)})
    step, text, got, right = differing[0]
    got = scaled(got, right)
    paid = torch.where(text.mask, got - torch.cat([got[:, 1:], 0 * got[:, :1]], 1), 0.0)
    table = {"d = log pi - log pi_ref": text.d, "reward: right": rewards(text), "reward: yours": paid}
    settings = f"beta {config.beta}, gamma 1, lam 1, V = 0"
    return Failure(shown(run, step, text, table, off(paid, rewards(text)), settings), named)


MEANS = (
    "Every answer weighs the same, however long: the mean is over all tokens of the minibatch that count, not over "
    "means of answers."
)


def _first_that_gives(seen: Sequence[tuple[Tensor, Text]], suspects: dict[str, Callable[[Text], Tensor]]) -> str:
    return next((name for name, give in suspects.items() if all(parallel(x, give(text)) for x, text in seen)), "")


def _sign(seen: Sequence[tuple[Tensor, Text]], give: Callable[[Text], Tensor]) -> str:
    turned = all(parallel(-x, give(text)) for x, text in seen)
    return "The minus sign is missing, or the ratio is upside down: good tokens become rarer (bug 6)." if turned else ""


def exact_on_average(trainer: Trainer, notes: Notes) -> Failure | None:
    """All answers of a language of three tokens, each as often as the policy draws it: the mean is exact."""
    tokens = [1, 3, 4]
    answers = [_cut(row) for row in product(tokens, repeat=3)]
    models = trio(seed=3, even=True)
    config = replace(
        PLAIN, steps=1, batch_size=27, minibatch_size=27, temperature=1.0, max_response_tokens=3, max_grad_norm=math.inf
    )
    run = watch(trainer, config, models=models, answers=answers, texts=["why"] * 27)
    if run.problem:
        return Failure(run.problem)
    step = run.steps[0]
    update = step.updates[0]
    text = text_of(run, step, update, config, config.beta)
    theta = update.weights["policy"].clone().requires_grad_(True)
    different = torch.tensor([n for n, row in enumerate(answers) if row not in answers[:n]])
    logprobs = logprobs_of(theta, text.rows[different], text.tokens[different], 1.0)
    log_pi = torch.where(text.mask[different], logprobs, 0.0).sum(1)
    log_ratio = log_pi - (log_pi.detach() - text.d[different].sum(1))
    objective = (log_pi.exp() * (text.score[different] - config.beta * log_ratio)).sum()
    exact = torch.autograd.grad(objective, theta)[0]
    got = -update.gradients.get("policy", torch.zeros_like(exact))
    if parallel(got, exact, 1e-5):
        return None
    cosine = float((got * exact).sum() / (got.norm() * exact.norm()).clamp(min=1e-30))
    return Failure(
        f"The 15 answers of at most 3 of the tokens yes, no and <eos>, each as often as the policy draws it: the "
        f"gradient's cosine with that of E[r - beta log(pi / pi_ref)] is {cosine:.4f}; it should be 1."
    )


def _cut(row: Sequence[int]) -> list[int]:
    return list(row[: row.index(1) + 1]) if 1 in row else list(row)


# Advantages ----------------------------------------------------------------------------------------------------------


def advantages_are_right(trainer: Trainer, notes: Notes) -> Failure | None:
    for whiten in (False, True):
        config = replace(BASE, whiten_advantages=whiten)
        run = watch(trainer, config, seed=1)
        if run.problem:
            return Failure(run.problem)
        differing = _differing(run, config, partial(_advantages, whiten=whiten))
        if not differing:
            continue
        step, text, got, right = differing[0]
        table = {"reward": rewards(text), "V before it": text.v, "A: right": right, "A: yours": scaled(got, right)}
        wrong = off(scaled(got, right), right)
        settings = f"gamma {config.gamma}, lam {config.lam}, whiten_advantages={whiten}"
        seen = [(got, text) for _, text, got, _ in differing]
        return Failure(shown(run, step, text, table, wrong, settings), _advantage_name(seen, whiten))
    return None


def _advantages(text: Text, whiten: bool) -> Tensor:
    return _changed(text, gae(text), whiten)


def _advantage_name(seen: list[tuple[Tensor, Text]], whiten: bool) -> str:
    suspects: dict[str, Callable[[Text], Tensor]] = {}
    if whiten:
        suspects |= {
            "Advantages are not whitened.": gae,
            "Advantages are divided by their standard deviation, but their mean is not taken off.": lambda x: (
                gae(x) / gae(x)[x.mask].std()
            ),
            "Padding counts in the mean and the variance of the whitening (bug 9).": lambda x: torch.where(
                x.mask, (gae(x) - gae(x).mean()) / gae(x).std(), 0.0
            ),
            "Each answer is whitened by itself: mean and variance are those of all tokens of the batch.": _by_answer,
        }
    else:
        suspects["Advantages are whitened although whiten_advantages is False."] = lambda x: whitened(x.mask, gae(x))
    suspects |= {name: _given(give, whiten) for name, give in ADVANTAGES.items()}
    return _first_that_gives(seen, suspects) or _sign(seen, lambda x: _advantages(x, whiten))


def _charged(give: Callable[[Text], Tensor]) -> Callable[[Text], Tensor]:
    """The advantages that come of these rewards."""
    return lambda text: gae(text, give(text))


def _given(give: Callable[[Text], Tensor], whiten: bool) -> Callable[[Text], Tensor]:
    return lambda text: _changed(text, give(text), whiten)


def _changed(text: Text, advantages: Tensor, whiten: bool) -> Tensor:
    return whitened(text.mask, advantages) if whiten else advantages


def _by_answer(text: Text) -> Tensor:
    rows = []
    for mask, x in zip(text.mask, gae(text), strict=True):
        inside = x[mask]
        rows.append(torch.where(mask, (x - inside.mean()) / (inside.std(correction=0) + 1e-8), 0.0))
    return torch.stack(rows)
