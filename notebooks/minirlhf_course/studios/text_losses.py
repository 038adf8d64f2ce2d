"""The update of an RLHF trainer, read off its gradients on tables: ratio, clip, values, the text of PPO-ptx."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from minirlhf_course.studios.advantages import CLIPS, clip_weights
from minirlhf_course.studios.credit import (
    Text,
    errors_of,
    gae,
    logits_of,
    logprobs_of,
    rewards,
    text_of,
    weights_of,
    whitened,
)
from minirlhf_course.studios.dictation import Run, Step, Update, watch
from minirlhf_course.studios.equation2 import BASE, FAST, off, shown
from minirlhf_course.studios.given import Trainer
from minirlhf_course.studios.ledger import parallel, scaled
from minirlhf_course.studios.mistakes import DEAD
from minirlhf_course.studios.studio import Failure, Notes

# The first ratio -----------------------------------------------------------------------------------------------------

KEYS = ("score", "kl", "beta", "first_ratio_error", "first_clip_fraction")
RATIOS: dict[str, Callable[[Tensor], Tensor]] = {
    "The log-probs of the update are not those of sampling: logits are not divided by config.temperature.": (
        lambda logits: logits.log_softmax(-1)
    ),
    "The log-probs of the update are not those of sampling: logits are multiplied by config.temperature.": (
        lambda logits: (logits * FAST.temperature).log_softmax(-1)
    ),
    "Probabilities are taken for logits: the softmax is taken twice.": lambda logits: (
        (logits / FAST.temperature).softmax(-1).log_softmax(-1)
    ),
    "Logits are taken for log-probabilities: log_softmax is missing.": lambda logits: logits / FAST.temperature,
}
"""What is wrong, and the log-probs that it gives."""


def log_shape(run: Run) -> str:
    """What is wrong with the form of a trainer's log; "" if nothing is."""
    log = run.log
    if not isinstance(log, list | tuple) or not all(isinstance(row, dict) for row in log):
        return "What it returns is not a list with a dict per batch."
    if len(log) != len(run.steps):
        return f"It returns {len(log)} rows of its log for {len(run.steps)} batches."
    for key in KEYS:
        if any(key not in row for row in log):
            return f"The rows of its log have no {key!r}."
        if not all(_is_number(row[key]) for row in log):
            return f"Its log's {key!r} is not a number in every row: {log[0][key]!r}."
    return ""


def _is_number(x: object) -> bool:
    try:
        return math.isfinite(float(x))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False


def first_ratio_is_one(trainer: Trainer, notes: Notes) -> Failure | None:
    run = watch(trainer, replace(FAST, minibatch_size=4))
    problem = run.problem or log_shape(run)
    if problem:
        return Failure(problem)
    for number, row in enumerate(run.log):
        for key in ("first_ratio_error", "first_clip_fraction"):
            if not abs(float(row[key])) <= 1e-4:
                said = float(row[key])
                return Failure(
                    f"Row {number} of its log says {key} {said:.3g}; nothing has moved yet, so it is 0.\n"
                    f"temperature {FAST.temperature}, 8 answers in two minibatches.",
                    _ratio_name(run, number, float(row["first_ratio_error"])),
                )
    return None


def _ratio_name(run: Run, number: int, error: float) -> str:
    step = run.steps[number]
    update = step.of("policy")[0]
    text = text_of(run, step, update, FAST, FAST.beta)
    rows = drawn(run, step, 0)
    mask, tokens, logits = text.mask[rows], text.tokens[rows], logits_of(update.weights["policy"], text.rows[rows])
    old = (logits / FAST.temperature).log_softmax(-1)
    for sentence, give in RATIOS.items():
        moved = (give(logits) - old).gather(-1, tokens.unsqueeze(-1)).squeeze(-1).expm1().abs()
        if abs(float(moved[mask].max()) - error) < 1e-3 * max(1.0, error):
            return sentence
    return ""


def drawn(run: Run, step: Step, place: int) -> list[int]:
    """The answers of a minibatch: those that its gradient hears of."""
    model = "value" if len(step.of("value")) > place else "policy"
    update = step.of(model)[place]
    text = text_of(run, step, update, BASE, BASE.beta)
    size = update.gradients[model].abs().sum(0)
    return (size[text.rows] * text.mask).any(1).nonzero().flatten().tolist()


# The clip ------------------------------------------------------------------------------------------------------------


def clip_is_right(trainer: Trainer, notes: Notes) -> Failure | None:
    """The gradients of later epochs, from the ratios that the weights have then."""
    run = watch(trainer, FAST)
    if run.problem:
        return Failure(run.problem)
    clip = FAST.clip_range or math.inf
    seen = []
    failing: tuple[Step, Text, Tensor, Tensor, Tensor, int] | None = None
    for step in run.steps:
        updates = step.of("policy")
        first = text_of(run, step, step.updates[0], FAST, FAST.beta)
        advantages = whitened(first.mask, gae(first))
        old = logprobs_of(step.updates[0].weights["policy"], first.rows, first.tokens, FAST.temperature)
        for epoch, update in enumerate(updates[1:], 2):
            new = logprobs_of(update.weights["policy"], first.rows, first.tokens, FAST.temperature)
            ratio = torch.where(first.mask, (new - old).exp(), 1.0)
            got, right = weights_of(update, first, FAST.temperature), clip_weights(ratio, advantages, clip)
            if not parallel(got, right):
                seen.append((got, ratio, advantages))
                failing = failing or (step, first, ratio, right, got, epoch)
    if failing is None:
        return None
    named = next((text for text, give in CLIPS.items() if all(parallel(x, give(r, a, clip)) for x, r, a in seen)), "")
    step, text, ratio, right, got, epoch = failing
    got = scaled(got, right)
    table = {"ratio": ratio, "A": seen[0][2], "weight of log pi: right": right, "weight of log pi: yours": got}
    return Failure(shown(run, step, text, table, off(got, right), f"epoch {epoch}, clip_range {clip}"), named)


# Values --------------------------------------------------------------------------------------------------------------


def critic_is_right(trainer: Trainer, notes: Notes) -> Failure | None:
    run = watch(trainer, FAST)
    if run.problem:
        return Failure(run.problem)
    clip = FAST.value_clip_range or math.inf
    seen: list[tuple[Tensor, Text, Text]] = []
    failing: tuple[Step, Text, Text, Tensor, Tensor, int] | None = None
    for number, step in enumerate(run.steps, 1):
        updates = step.of("value")
        if not updates:
            return Failure(f"In batch {number} no update has a gradient of the value model.", DEAD)
        before = text_of(run, step, step.updates[0], FAST, FAST.beta)
        for epoch, update in enumerate(updates, 1):
            now = text_of(run, step, update, FAST, FAST.beta)
            got = errors_of(update, now)
            right = value_errors(now.v, before.v, gae(before) + before.v, now.mask, clip)
            if not parallel(got, right):
                seen.append((got, before, now))
                failing = failing or (step, before, now, right, got, epoch)
    if failing is None:
        return None
    step, before, now, right, got, epoch = failing
    targets = torch.where(now.mask, gae(before) + before.v, 0.0)
    table = {"V now": now.v, "V before": before.v, "return": targets}
    table |= {"slope of the loss: right": right, "slope of the loss: yours": scaled(got, right)}
    settings = f"epoch {epoch}, value_clip_range {clip}"
    return Failure(shown(run, step, now, table, off(scaled(got, right), right), settings), _critic_name(seen, clip))


def value_errors(v: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """The slope of half the larger of (V - R)^2 and the same for V clipped to old ± clip."""
    near = old + (v - old).clamp(-clip, clip)
    error = torch.where((near - returns).square() > (v - returns).square(), 0.0, v - returns)
    return torch.where(mask, error, 0.0)


def _critic_name(seen: list[tuple[Tensor, Text, Text]], clip: float) -> str:
    def gives(targets: Callable[[Text, Text], Tensor], clip: float = clip) -> bool:
        return all(parallel(x, value_errors(now.v, old.v, targets(old, now), now.mask, clip)) for x, old, now in seen)

    def right(old: Text, now: Text) -> Tensor:
        return gae(old) + old.v

    if all(parallel(-x, value_errors(n.v, o.v, right(o, n), n.mask, clip)) for x, o, n in seen):
        return "The value loss has the wrong sign (bug 6): V runs away from its targets."
    if gives(right, math.inf):
        return (
            "V is not clipped: the loss is the larger of two, of V and of V clipped to its old self ± value_clip_range."
        )
    if all(parallel(x, _smaller(n, o, right(o, n), clip)) for x, o, n in seen):
        return "The smaller of the two losses is taken: the clip should hold V back, so it is the larger (bug 4)."
    targets: dict[str, Callable[[Text, Text], Tensor]] = {
        "The targets are made of whitened advantages (bug 1): returns = A + V, A as it was before.": lambda o, n: (
            whitened(o.mask, gae(o)) + o.v
        ),
        "The targets are made of whitened advantages (bug 1): returns = A + V, A as it was before. ": lambda o, n: (
            whitened(o.mask, gae(o), 1) + o.v
        ),
        "The targets are computed again in every epoch, by the V that is learning: compute them once.": lambda o, n: (
            gae(n) + n.v
        ),
        "The targets are advantages: returns = A + V.": lambda o, n: gae(o),
        "The targets are rewards: returns = A + V.": lambda o, n: rewards(o),
        "The targets are scores, without the KL.": lambda o, n: o.score.unsqueeze(1).expand_as(o.d),
    }
    for sentence, give in targets.items():
        if gives(give) or gives(give, math.inf):
            return sentence
    return ""


def _smaller(now: Text, old: Text, returns: Tensor, clip: float) -> Tensor:
    near = old.v + (now.v - old.v).clamp(-clip, clip)
    keep = ((now.v - returns).square() < (near - returns).square()) | (near == now.v)
    return torch.where(now.mask & keep, now.v - returns, 0.0)


# Reading -------------------------------------------------------------------------------------------------------------


def ptx_is_the_sum(trainer: Trainer, notes: Notes) -> Failure | None:
    """With and without PPO-ptx the same answers: what is added to the gradient is ptx_coef times the text's."""
    plain = replace(BASE, steps=1, max_grad_norm=math.inf)
    without, reading = watch(trainer, plain), watch(trainer, replace(plain, ptx_coef=PTX))
    for run in (without, reading):
        if run.problem:
            return Failure(f"{run.problem}\nptx_coef={PTX if run is reading else 0}.")
    updates = [run.steps[0].of("policy") for run in (without, reading)]
    if len(updates[1]) > len(updates[0]):
        return Failure(
            f"With ptx_coef={PTX} the policy takes {len(updates[1])} steps where it takes {len(updates[0])} without.",
            "PPO-ptx is one step on the sum of two gradients, not a step on each: Adam would scale each by itself.",
        )
    first, second = updates[0][0], updates[1][0]
    if not reading.blocks:
        return Failure(f"With ptx_coef={PTX} nothing is read: next(corpus) is never called.")
    text = text_of(without, without.steps[0], first, plain, plain.beta)
    right = whitened(text.mask, gae(text)) / text.mask.sum()
    got = weights_of(first, text, plain.temperature)
    scale = float(got.norm() / right.norm())
    added = (second.gradients["policy"] - first.gradients["policy"]) / scale
    expected = PTX * text_gradient(reading, second, reading.blocks[0])
    if not bool(added.any()):
        return Failure(f"With ptx_coef={PTX} the gradient is that without it.")
    size = float(added.norm() / expected.norm())
    if parallel(added, expected, 1e-4) and 0.98 < size < 1.02:
        return None
    named = ""
    if parallel(-added, expected, 1e-4):
        named = "The text is unlearned: its log-likelihood is to be raised, so its loss is minus that."
    elif parallel(added, expected, 1e-4) and abs(size * PTX - 1) < 0.02:
        named = "ptx_coef is missing."
    elif parallel(added, expected, 1e-4):
        named = (
            "The weights of the two losses are not those of equation 2: PPO's is a mean over tokens, the text's too."
        )
    elif parallel(second.gradients["policy"], expected, 1e-4):
        named = "Only the text is left: the gradient is to be the sum of the two."
    return Failure(
        f"ptx_coef={PTX}, three blocks of five tokens. What is added to the gradient of PPO's loss has a cosine of "
        f"{float((added * expected).sum() / (added.norm() * expected.norm())):.4f} with ptx_coef times that of the "
        f"text's mean loss per predicted token (right is 1), and {size:.2f} times its size (right is 1).",
        named,
    )


PTX = 0.6


def text_gradient(run: Run, update: Update, blocks: Tensor) -> Tensor:
    """Of the mean loss per predicted token, at the weights before an update."""
    places = run.models.policy.base_model(blocks).last_hidden_state[..., :-1].argmax(-1)[:, :-1]
    table = update.weights["policy"].clone().requires_grad_(True)
    logprobs = logits_of(table, places).log_softmax(-1).gather(-1, blocks[:, 1:, None])
    return torch.autograd.grad(-logprobs.mean(), table)[0]
