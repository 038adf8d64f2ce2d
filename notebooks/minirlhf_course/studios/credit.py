"""What each token of an answer is worth to a right RLHF trainer, and to one with a known mistake.

A mistake is a sentence that says what is wrong, and what it gives: rewards, advantages or targets [B, T]. A trainer
whose gradients say just that, in every batch, has made it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.language.rlhf import RLHFConfig
from minirlhf_course.studios.dictation import Run, Step, Update, score_of
from minirlhf_course.studios.ledger import F64
from minirlhf_course.studios.tables import FASTER, ROWS, Table


class Text(NamedTuple):
    """A batch of answers, all [B, T] float64 but where it says otherwise, with V as it was at some update."""

    mask: Tensor
    """bool, the tokens that count."""
    rows: Tensor
    """int64: which text stands before each token; its row in the tables."""
    after: Tensor
    """int64: the text that ends with it."""
    tokens: Tensor
    """int64"""
    d: Tensor
    """log pi - log pi_ref, 0 at padding."""
    d_padded: Tensor
    """The same at padding too, where it means nothing."""
    d_sampled: Tensor
    """The same with the log-probs that `sample` gives, which are 0 at padding."""
    v: Tensor
    """V before each token."""
    v_after: Tensor
    raw: Tensor
    """[B], what the reward said."""
    score: Tensor
    """[B], without the penalty of answers that did not end."""
    beta: float
    gamma: float
    lam: float

    @property
    def last(self) -> Tensor:
        """bool, the last token of each answer."""
        return self.mask & (torch.arange(self.mask.shape[1]) == self.mask.sum(1, keepdim=True) - 1)


def logits_of(table: Tensor, rows: Tensor) -> Tensor:
    """[B, T, V] from a table [V, ROWS + 1]."""
    return table.double().t()[rows] + FASTER * table[:, ROWS].double()


def logprobs_of(table: Tensor, rows: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    logprobs = (logits_of(table, rows) / temperature).log_softmax(-1)
    return logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def text_of(run: Run, step: Step, update: Update, config: RLHFConfig, beta: float) -> Text:
    """A batch, with the values that the value model had before an update."""
    samples = step.samples
    T = samples.response_mask.shape[1]
    body: Table = run.models.policy
    places = body.base_model(samples.tokens, samples.mask).last_hidden_state[..., :ROWS].argmax(-1)
    rows, after = places[:, -T - 1 : -1], places[:, -T:]
    mask, tokens = samples.response_mask, samples.response_tokens
    first = step.updates[0].weights
    old, ref = (logprobs_of(first[name], rows, tokens, config.temperature) for name in ("policy", "reference"))
    padded, sampled = old - ref, torch.where(mask, old, 0.0) - ref
    table = update.weights["value"][0]
    # `token_values` is 0 at padding, which has row 0.
    v, v_after = (torch.where(x == 0, 0.0, table[x] + FASTER * table[ROWS]) for x in (rows, after))
    raw = torch.tensor([score_of(*pair) for pair in pairs_of(run, step)], dtype=F64)
    score = raw - config.missing_eos_penalty * (~samples.ended).double()
    d = torch.where(mask, padded, 0.0)
    return Text(mask, rows, after, tokens, d, padded, sampled, v, v_after, raw, score, beta, config.gamma, config.lam)


def pairs_of(run: Run, step: Step) -> list[tuple[str, str]]:
    """What the reward should hear: each prompt with its answer."""
    responses = run.models.tokenizer.batch_decode(step.samples.responses(), skip_special_tokens=True)
    return list(zip(step.texts, responses, strict=True))


# Rewards and advantages ----------------------------------------------------------------------------------------------


def paid(text: Text, score: Tensor, where: Tensor | None = None) -> Tensor:
    return torch.where(text.last if where is None else where, score.unsqueeze(1), 0.0)


def rewards(text: Text) -> Tensor:
    """-beta d, plus the score at the last token."""
    return paid(text, text.score) - text.beta * text.d


def gae(
    text: Text,
    r: Tensor | None = None,
    *,
    v: Tensor | None = None,
    v_next: Tensor | None = None,
    gamma: float | None = None,
    decay: float | None = None,
    padded: bool = False,
) -> Tensor:
    """GAE [B, T]; the options are what mistakes change. `padded` goes through the padding as if it counted."""
    r = rewards(text) if r is None else r
    gamma = text.gamma if gamma is None else gamma
    decay = text.gamma * text.lam if decay is None else decay
    v = text.v if v is None else v
    mask = torch.ones_like(text.mask) if padded else text.mask
    v = torch.where(mask, v, 0.0)
    if v_next is None:
        v_next = torch.cat([v[:, 1:], torch.zeros(len(v), 1, dtype=F64)], 1)
    deltas = torch.where(mask, r + gamma * v_next - v, 0.0)
    carry, columns = torch.zeros(len(v), dtype=F64), []
    for t in reversed(range(v.shape[1])):
        carry = torch.where(mask[:, t], deltas[:, t] + decay * carry, 0.0)
        columns.append(carry)
    return torch.where(text.mask, torch.stack(columns[::-1], 1), 0.0)


def whitened(mask: Tensor, x: Tensor, correction: int = 0) -> Tensor:
    inside = x[mask]
    return torch.where(mask, (x - inside.mean()) / (inside.std(correction=correction) + 1e-8), 0.0)


def early(x: Tensor, mask: Tensor) -> Tensor:
    """x of each token at the one before it."""
    moved = torch.zeros_like(x)
    moved[:, :-1] = x[:, 1:]
    return torch.where(mask, moved, 0.0)


Give = Callable[[Text], Tensor]
FIRST = "The score is paid at the first token: every later one hears of the KL alone."


def _first(text: Text) -> Tensor:
    first = torch.zeros_like(text.mask)
    first[:, 0] = True
    return first


def _column(text: Text) -> Tensor:
    last = torch.zeros_like(text.mask)
    last[:, -1] = True
    return last


def _one_before(text: Text) -> Tensor:
    length = text.mask.sum(1, keepdim=True)
    return torch.arange(text.mask.shape[1]) == (length - 2).clamp(min=0)


def _mean(text: Text, per: Tensor | int) -> Tensor:
    return torch.where(text.mask, text.d.sum(1, keepdim=True) / per, 0.0)


def _k3(d: Tensor) -> Tensor:
    return torch.expm1(-d) + d


def _kl(change: Callable[[Text], Tensor]) -> Give:
    """Rewards with another KL penalty in place of beta d."""
    return lambda text: paid(text, text.score) - text.beta * change(text)


REWARDS: dict[str, Give] = {
    "The KL changes nothing: it is in no reward, or the reference is the policy itself. (A term of the loss that is "
    "made of constants has no gradient, bug 2.)": _kl(lambda x: 0 * x.d),
    "The KL has the wrong sign: leaving the reference is paid.": _kl(lambda x: -x.d),
    "beta is missing: the whole of d is charged.": _kl(lambda x: x.d / x.beta),
    "The KL is charged twice.": _kl(lambda x: 2 * x.d),
    "Another KL is charged, d^2 / 2 (bug 14): in the reward it is d itself, which may be negative.": _kl(
        lambda x: x.d.square() / 2
    ),
    "Another KL is charged, exp(-d) - 1 + d (bug 14): in the reward it is d itself, which may be negative.": _kl(
        lambda x: _k3(x.d)
    ),
    "Another KL is charged, |d| (bug 14): in the reward it is d itself, which may be negative.": _kl(
        lambda x: x.d.abs()
    ),
    "Negative d are cut off: in the reward it is d itself, which may be negative.": _kl(lambda x: x.d.clamp(min=0)),
    "Every token is charged the mean of its answer's d, not its own (bug 9).": _kl(
        lambda x: _mean(x, x.mask.sum(1, keepdim=True))
    ),
    "Every token is charged the mean of d over the whole row, padding included (bug 9).": _kl(
        lambda x: _mean(x, x.mask.shape[1])
    ),
    "The KL of the whole answer is charged at its last token: charge each token its own.": _kl(
        lambda x: paid(x, x.d.sum(1))
    ),
    "The KL of the whole answer is charged at every token.": _kl(lambda x: _mean(x, 1)),
    "An answer that did not end is not charged missing_eos_penalty.": lambda x: paid(x, x.raw) - x.beta * x.d,
    "Answers that did end are charged missing_eos_penalty.": lambda x: (
        paid(x, torch.where(x.score < x.raw, x.raw, x.raw - (x.raw - x.score).max())) - x.beta * x.d
    ),
    "The score is paid a token early (bug 10).": lambda x: paid(x, x.score, _one_before(x)) - x.beta * x.d,
    "Rewards are stored a token early, KL and all (bug 10).": lambda x: early(rewards(x), x.mask),
    FIRST: lambda x: paid(x, x.score, _first(x)) - x.beta * x.d,
    "The score is paid in the last column, so that only the longest answers get it.": lambda x: (
        torch.where(x.mask, paid(x, x.score, _column(x)), 0.0) - x.beta * x.d
    ),
    "The score is paid at every token.": lambda x: paid(x, x.score, x.mask) - x.beta * x.d,
}
"""What is wrong, and the rewards that it gives."""


def _whole(change: Callable[[Text], Tensor]) -> Give:
    """The weight of log pi when the KL is a term of the loss, beside the score's return."""
    return lambda text: torch.where(text.mask, gae(text, paid(text, text.score)) - text.beta * change(text), 0.0)


LEAKS = "The KL of padding leaks into the returns (bug 8): beyond the last token there is neither reward nor V."

FORWARDS = "The sum runs from the first token on: it should run from the last one back."

WEIGHTS: dict[str, Give] = {
    LEAKS: lambda x: gae(x, paid(x, x.score) - x.beta * x.d_padded, padded=True),
    LEAKS + " (Its old log-probabilities are 0 there.)": lambda x: gae(
        x, paid(x, x.score) - x.beta * x.d_sampled, padded=True
    ),
    "The KL is a term of the loss, k3 = exp(-d) - 1 + d (bug 30): its gradient is not that of the KL of the answer.": (
        _whole(lambda x: 1 - torch.exp(-x.d))
    ),
    "The KL is a term of the loss, d^2 / 2: that forgets what a token does to the KL of later ones.": _whole(
        lambda x: x.d
    ),
    "The KL is a term of the loss, d itself: on average over the policy's own tokens the gradient of that is 0.": (
        _whole(lambda x: torch.ones_like(x.d))
    ),
    "Each token hears of its own reward alone: A = r - V, in place of a sum of deltas (bug 7).": rewards,
    FORWARDS: lambda x: _forwards(x),
}
"""What is wrong, and the weight of log pi that it gives where V is 0, gamma and lambda 1 and nothing is whitened."""

ADVANTAGES: dict[str, Give] = {
    "A = r - V, in place of a sum of deltas (bug 7).": lambda x: torch.where(x.mask, rewards(x) - x.v, 0.0),
    "A is the return, without V taken off.": lambda x: torch.where(x.mask, gae(x) + x.v, 0.0),
    "V has seen the token that it should judge: V of the text *before* each token is one column to the left.": (
        lambda x: gae(x, v=x.v_after)
    ),
    "After the last token V is 0: the answer is over, whatever the value model says there.": lambda x: gae(
        x, v_next=x.v_after
    ),
    "lambda is missing: deltas are summed with gamma alone.": lambda x: gae(x, decay=x.gamma),
    "gamma is missing in the sum: the decay is gamma times lambda.": lambda x: gae(x, decay=x.lam),
    "gamma is missing.": lambda x: gae(x, gamma=1.0, decay=x.lam),
    "gamma is missing in delta.": lambda x: gae(x, gamma=1.0),
    "Deltas are not summed at all: this is lambda = 0.": lambda x: gae(x, decay=0.0),
    "V of padding leaks into the sum (bug 8): nothing comes back from beyond the last token.": lambda x: gae(
        x, padded=True
    ),
    FORWARDS: lambda x: _forwards(x),
    "Advantages are the returns of the rewards alone: G, without V.": lambda x: gae(x, v=0 * x.v, decay=x.gamma),
    "A = G - V: this is lambda = 1.": lambda x: gae(x, decay=x.gamma),
}
"""What is wrong, and the advantages that it gives, before whitening."""


def _forwards(text: Text) -> Tensor:
    v = torch.where(text.mask, text.v, 0.0)
    v_next = torch.cat([v[:, 1:], torch.zeros(len(v), 1, dtype=F64)], 1)
    deltas = torch.where(text.mask, rewards(text) + text.gamma * v_next - v, 0.0)
    carry, columns = torch.zeros(len(v), dtype=F64), []
    for t in range(v.shape[1]):
        carry = deltas[:, t] + text.gamma * text.lam * carry
        columns.append(carry)
    return torch.where(text.mask, torch.stack(columns, 1), 0.0)


# What a gradient says ------------------------------------------------------------------------------------------------


def weights_of(update: Update, text: Text, temperature: float) -> Tensor:
    """The weight of log pi of every token [B, T] in minus the loss."""
    gradient = update.gradients.get("policy")
    if gradient is None:
        return torch.zeros_like(text.d)
    pi = logprobs_of(update.weights["policy"], text.rows, text.tokens, temperature).exp()
    weight = -gradient.t()[text.rows].gather(-1, text.tokens.unsqueeze(-1)).squeeze(-1) * temperature / (1 - pi)
    return torch.where(text.mask, weight, 0.0)


def errors_of(update: Update, text: Text) -> Tensor:
    """What the value loss pushes each token's V by [B, T]."""
    gradient = update.gradients.get("value")
    return torch.zeros_like(text.d) if gradient is None else torch.where(text.mask, gradient[0][text.rows], 0.0)


def strangers(gradient: Tensor, text: Text) -> Tensor:
    """The rows of a table that get a gradient although no token of an answer follows their text."""
    size = gradient[:, :ROWS].abs().sum(0)
    size[text.rows[text.mask]] = 0.0
    return (size > 1e-6 * gradient[:, :ROWS].abs().max()).nonzero().flatten()
