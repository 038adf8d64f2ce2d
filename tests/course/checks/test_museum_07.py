"""Museum bugs 17 and 23, as learners would write them: lesson 07's checks refuse them and name them.

Numbers are the museum's, "-" marks mistakes that are not in it; see test_museum.py for lessons 01 to 05.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from minirlhf_course.checks import lesson07


class Bug(NamedTuple):
    number: int | str
    check: str
    source: str
    named: str


BUGS = [
    Bug(17, "completion_mask", """
def f(tokens, prompt_lengths, pad_id):
    return torch.ones(tokens.shape, dtype=torch.bool)
""", "A mask of all ones"),
    Bug("-", "completion_mask", """
def f(tokens, prompt_lengths, pad_id):
    mask = torch.ones_like(tokens, dtype=torch.bool)
    for row, start in enumerate(prompt_lengths.tolist()):
        mask[row, :start] = False
    return mask
""", "The padding counts"),
    Bug("-", "completion_mask", """
def f(tokens, prompt_lengths, pad_id):
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for row, start in enumerate(prompt_lengths.tolist()):
        length = int((tokens[row] != pad_id).sum())
        mask[row, start : length - 1] = True
    return mask
""", "EOS is left out"),
    Bug("-", "completion_mask", """
def f(tokens, prompt_lengths, pad_id):
    labels = tokens.clone()
    labels[tokens == pad_id] = -100
    for row, start in enumerate(prompt_lengths.tolist()):
        labels[row, : start + 1] = -100
    return labels != -100
""", "Off by one: the completion's first token is left out"),
    Bug(23, "next_token_logprobs", """
def f(logits, tokens):
    logprobs = logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0]
    return logprobs[:, :-1]
""", "Off by one: logits[:, t] predict tokens[:, t + 1]"),
    Bug(23, "next_token_logprobs", """
def f(logits, tokens):
    return logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0]
""", "Off by one, and by all columns"),
    Bug(23, "next_token_logprobs", """
def f(logits, tokens):
    return -F.cross_entropy(logits[:, 1:].transpose(1, 2), tokens[:, :-1], reduction="none")
""", "Shifted the wrong way"),
    Bug("-", "next_token_logprobs", """
def f(logits, tokens):
    p = F.softmax(logits, dim=-1)[:, :-1]
    return torch.log(p.gather(2, tokens[:, 1:, None]).squeeze(2))
""", "log(softmax(x)) is -inf"),
    Bug("-", "next_token_logprobs", """
def f(logits, tokens):
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
""", "The sign is turned"),
    Bug(17, "sft_loss", """
def f(logprobs, mask):
    mask = torch.ones_like(mask)
    return -logprobs.sum() / mask.sum()
""", "The mask is not used"),
    Bug("-", "sft_loss", """
def f(logprobs, mask):
    return -(logprobs * mask.to(logprobs.dtype)).sum() / mask.sum()
""", "0 * NaN is NaN"),
    Bug("-", "sft_loss", """
def f(logprobs, mask):
    per_row = -torch.where(mask, logprobs, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)
    return per_row[mask.any(-1)].mean()
""", "Each row is averaged first"),
    Bug("-", "sft_loss", """
def f(logprobs, mask):
    return -logprobs.masked_fill(~mask, 0.0).mean()
""", "It divides by all positions"),
    Bug("-", "piece_losses", """
def f(logprobs, mask, size):
    steps = -(-len(logprobs) // size)
    losses = []
    for i in range(0, len(logprobs), size):
        x, m = logprobs[i : i + size], mask[i : i + size]
        losses.append(-x[m].mean() / steps)
    return torch.stack(losses)
""", "A mean of means"),
    Bug("-", "piece_losses", """
def f(logprobs, mask, size):
    return torch.stack([-x[m].mean() for x, m in zip(logprobs.split(size), mask.split(size))])
""", "Each piece is divided by its own tokens"),
    Bug("-", "perplexity", """
def f(logprobs, mask):
    rows = [(-row[keep].mean()).exp() for row, keep in zip(logprobs, mask)]
    return torch.stack(rows).mean()
""", "It is the mean of the rows' perplexities"),
    Bug("-", "perplexity", """
def f(logprobs, mask):
    rows = (logprobs * mask).sum(-1) / mask.sum(-1)
    return torch.exp(-rows.mean())
""", "One count for the whole batch."),
]  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=[f"{bug.number}-{bug.check}-{index}" for index, bug in enumerate(BUGS)])
def test_is_refused_and_named(bug):
    space = {"torch": torch, "F": F}
    exec(bug.source, space)
    verdict = getattr(lesson07, bug.check).mark(space["f"])
    assert verdict.status == "failed"
    headline, _, case = verdict.message.partition("\n\n")
    assert bug.named in headline, verdict.message
    assert case.startswith("Smallest failing case: ")


def test_every_bug_of_this_lesson_is_here():
    assert {bug.number for bug in BUGS} >= {17, 23}


def test_pieces_add_up_and_a_mean_of_means_does_not():
    logprobs = -torch.rand(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[1], [1], [1], [5], [5], [5], [2]])
    whole = lesson07.sft_loss.reference(logprobs, mask)
    for size in range(1, 9):
        torch.testing.assert_close(lesson07.piece_losses.reference(logprobs, mask, size).sum(), whole)
    means = torch.stack([-x[m].mean() for x, m in zip(logprobs.split(3), mask.split(3), strict=True)])
    assert abs(float(means.mean() - whole)) > 0.02


def test_perplexity_of_a_fair_die():
    logprobs = torch.full((2, 4), 1 / 6, dtype=torch.float64).log()
    assert abs(float(lesson07.perplexity.reference(logprobs, torch.ones(2, 4, dtype=torch.bool))) - 6) < 1e-12
