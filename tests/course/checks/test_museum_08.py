"""Museum bugs 15, 16, 18 and 19, as learners would write them: lesson 08's checks refuse them and name them.

Numbers are the museum's, "-" marks mistakes that are not in it; see test_museum.py for lessons 01 to 05.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from minirlhf_course.checks import lesson08


class Bug(NamedTuple):
    number: int | str
    check: str
    source: str
    named: str


BUGS = [
    Bug(19, "pair_loss", """
def f(chosen, rejected):
    return -torch.log(torch.sigmoid(chosen - rejected)).mean()
""", "log(sigmoid(x)) is unstable"),
    Bug(19, "pair_loss", """
def f(chosen, rejected):
    return -torch.sigmoid(chosen - rejected).mean()
""", "The log is missing"),
    Bug("-", "pair_loss", """
def f(chosen, rejected):
    return F.softplus(chosen - rejected).mean()
""", "The difference is the wrong way round"),
    Bug("-", "pair_loss", """
def f(chosen, rejected):
    return F.binary_cross_entropy_with_logits(chosen - rejected, torch.zeros_like(chosen))
""", "The difference is the wrong way round"),
    Bug(19, "ranking_loss", """
def f(rewards, scores):
    total, prompts = 0.0, 0
    for r, s in zip(rewards, scores):
        pairs = [(i, j) for i in range(len(r)) for j in range(len(r)) if s[i] > s[j]]
        if pairs:
            mean = sum(-F.logsigmoid(r[i] - r[j]) for i, j in pairs) / len(pairs)
            total, prompts = total + mean / (len(r) * (len(r) - 1) / 2), prompts + 1
    return total / prompts
""", "It is normalised twice"),
    Bug(19, "ranking_loss", """
def f(rewards, scores):
    total, prompts = 0.0, 0
    for r, s in zip(rewards, scores):
        pairs = [(i, j) for i in range(len(r)) for j in range(len(r)) if s[i] > s[j]]
        if pairs:
            total, prompts = total + sum(-torch.sigmoid(r[i] - r[j]) for i, j in pairs) / len(pairs), prompts + 1
    return total / prompts
""", "The log is missing"),
    Bug(19, "ranking_loss", """
def f(rewards, scores):
    total, prompts = 0.0, 0
    for r, s in zip(rewards, scores):
        pairs = [(i, j) for i in range(len(r)) for j in range(len(r)) if s[i] > s[j]]
        if pairs:
            logs = [torch.log(torch.sigmoid(r[i] - r[j])) for i, j in pairs]
            total, prompts = total - sum(logs) / len(pairs), prompts + 1
    return total / prompts
""", "log(sigmoid(x)) is unstable"),
    Bug("-", "ranking_loss", """
def f(rewards, scores):
    K = rewards.shape[1]
    i, j = torch.triu_indices(K, K, 1)
    return -F.logsigmoid(rewards[:, i] - rewards[:, j]).mean(1).mean()
""", "It takes the answers as sorted"),
    Bug("-", "ranking_loss", """
def f(rewards, scores):
    pairs = scores.unsqueeze(2) > scores.unsqueeze(1)
    d = rewards.unsqueeze(2) - rewards.unsqueeze(1)
    return -F.logsigmoid(d[pairs]).mean()
""", "It is the mean over all pairs of the batch"),
    Bug("-", "ranking_loss", """
def f(rewards, scores):
    pairs = scores.unsqueeze(2) >= scores.unsqueeze(1)
    pairs = pairs & (torch.ones_like(pairs[0]).triu(1) | (scores.unsqueeze(2) > scores.unsqueeze(1)))
    d = rewards.unsqueeze(2) - rewards.unsqueeze(1)
    return (torch.where(pairs, -F.logsigmoid(d), 0).sum((1, 2)) / pairs.sum((1, 2))).sum() / (
        (scores.amax(1) > scores.amin(1)).sum()
    )
""", "Tied answers are counted as pairs"),
    Bug(16, "usable_pairs", """
def f(tokens, scores):
    return scores.unsqueeze(2) > scores.unsqueeze(1)
""", "Answers that became equal after truncation still make a pair"),
    Bug(15, "last_token_scores", """
def f(token_values, mask):
    values = token_values.masked_fill(~mask, 0.0)
    return values.sum(dim=1) / mask.sum(dim=1)
""", "The reward is read on every token and averaged"),
    Bug(15, "last_token_scores", """
def f(token_values, mask):
    return torch.stack([row[keep].sum() for row, keep in zip(token_values, mask)])
""", "The reward is read on every token and added up"),
    Bug("-", "last_token_scores", """
def f(token_values, mask):
    return token_values[:, -1]
""", "It reads the last column"),
    Bug("-", "last_token_scores", """
def f(token_values, mask):
    lengths = mask.long().sum(-1)
    return token_values[torch.arange(len(lengths)), lengths - 1]
""", "It counts the real tokens"),
    Bug("-", "noise_ceiling", """
def f(scores, others):
    K = scores.shape[1]
    i, j = torch.triu_indices(K, K, 1)
    a, b = (scores[:, i] - scores[:, j]).sign(), (others[:, i] - others[:, j]).sign()
    both = (a != 0) & (b != 0)
    agreement = (a == b)[both].double().mean()
    return agreement, agreement.sqrt()
""", "The root of the agreement forgets"),
    Bug(18, "score_offset", """
def f(model, rows, batch_size):
    for batch in rows.split(batch_size):
        scores = []
        scores.extend(model(batch))
    return torch.stack(scores).mean()
""", "The list is reset every batch"),
    Bug("-", "score_offset", """
def f(model, rows, batch_size):
    means = [model(batch).mean() for batch in rows.split(batch_size)]
    return sum(means) / len(means)
""", "It is the mean of the batches' means"),
    Bug("-", "pair_loss", """
def f(chosen, rejected):
    return -torch.log(torch.sigmoid(chosen - rejected) + 1e-8).mean()
""", "The epsilon caps the loss at 18"),
    Bug("-", "noise_ceiling", """
def f(scores, others):
    pairs = torch.combinations(torch.arange(scores.shape[1])).T
    a, b = ((x[:, pairs[0]] - x[:, pairs[1]]).sign() for x in (scores, others))
    agreement = (a == b)[(a != 0) & (b != 0)].double().mean()
    return agreement, 0.5 + (2 * agreement - 1).abs().sqrt() / 2
""", "Below an agreement of 1/2 it turns"),
]  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=[f"{bug.number}-{bug.check}-{index}" for index, bug in enumerate(BUGS)])
def test_is_refused_and_named(bug):
    space = {"torch": torch, "F": F}
    exec(bug.source, space)
    verdict = getattr(lesson08, bug.check).mark(space["f"])
    assert verdict.status == "failed"
    headline, _, case = verdict.message.partition("\n\n")
    assert bug.named in headline, verdict.message
    assert case.startswith("Smallest failing case: ")


def test_every_bug_of_this_lesson_is_here():
    assert {bug.number for bug in BUGS} >= {15, 16, 18, 19}


def test_k_is_two_is_the_pair_loss():
    chosen, rejected = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards = torch.stack((rejected, chosen), 1)
    pair = lesson08.pair_loss.reference(chosen, rejected)
    torch.testing.assert_close(lesson08.ranking_loss.reference(rewards, torch.tensor([[0.0, 1.0]] * 6)), pair)


def test_the_ceiling_is_right_for_independent_mistakes_and_an_upper_bound_for_others():
    """Two labelers of a known truth: mistakes that fall on any pair alike, then mistakes that fall on close pairs."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([[0.0, 1.0]]).expand(40_000, 2)

    def flipped(chance):
        wrong = torch.rand(len(truth), 1, generator=generator) < chance
        return torch.where(wrong, truth.flip(1), truth)

    agreement, ceiling = lesson08.noise_ceiling.reference(flipped(0.2), flipped(0.2))
    assert abs(float(agreement) - 0.68) < 0.01 and abs(float(ceiling) - 0.8) < 0.01
    hard = torch.where(torch.arange(len(truth))[:, None] % 2 == 0, 0.4, 0.0)
    agreement, ceiling = lesson08.noise_ceiling.reference(flipped(hard), flipped(hard))
    assert float(ceiling) > 0.8 + 0.05, "with the same 20 % of mistakes, all on the hard half"
