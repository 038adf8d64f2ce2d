"""The bug museum's part of lesson 09, as learners would write it: refused by a check, which names the bug.

Numbers are the museum's; "-" marks mistakes that are not in it. Below, the lesson's failure lab.
"""

from __future__ import annotations

import csv
from pathlib import Path

import nbformat
import pytest
import torch
from minirlhf_course import text_failure_lab
from minirlhf_course.checks import lesson09

from minirlhf.errors import UserError
from minirlhf.language import rlhf
from minirlhf.returns import gae, whiten

ROOT = Path(__file__).resolve().parents[3]

BUGS = [
    (17, "answer_mask", """
def f(tokens, eos_id):
    return torch.ones_like(tokens, dtype=torch.bool)
""", "A mask of all ones"),
    ("-", "answer_mask", """
def f(tokens, eos_id):
    seen = torch.zeros(len(tokens), dtype=torch.bool)
    columns = []
    for t in range(tokens.shape[1]):
        seen = seen | (tokens[:, t] == eos_id)
        columns.append(~seen)
    return torch.stack(columns, 1)
""", "EOS is left out"),
    (8, "token_rewards", """
def f(scores, logprobs, ref_logprobs, response_mask, beta):
    rewards = (-beta * (logprobs - ref_logprobs)).detach()
    rewards[torch.arange(len(scores)), response_mask.sum(1) - 1] += scores
    return rewards
""", "The KL of padding leaks into the rewards"),
    (9, "token_rewards", """
def f(scores, logprobs, ref_logprobs, response_mask, beta):
    d = (logprobs - ref_logprobs).nan_to_num().detach() * response_mask
    rewards = -beta * d / response_mask.sum(-1, keepdim=True)
    rewards[torch.arange(len(scores)), response_mask.sum(1) - 1] += scores
    return rewards
""", "The KL is averaged over the answer"),
    (10, "token_rewards", """
def f(scores, logprobs, ref_logprobs, response_mask, beta):
    rewards = torch.where(response_mask, -beta * (logprobs - ref_logprobs), 0.0).detach()
    at = (response_mask.sum(1) - 2).clamp(min=0)
    rewards[torch.arange(len(scores)), at] += scores
    return rewards
""", "The reward is stored a step early"),
    ("-", "token_rewards", """
def f(scores, logprobs, ref_logprobs, response_mask, beta):
    d = torch.where(response_mask, logprobs - ref_logprobs, 0.0).detach()
    rewards = -beta * d
    rewards[torch.arange(len(scores)), response_mask.sum(1) - 1] += scores - beta * d.sum(1)
    return rewards
""", "The KL is charged twice"),
    ("-", "token_rewards", """
def f(scores, logprobs, ref_logprobs, response_mask, beta):
    rewards = torch.where(response_mask, -beta * (logprobs - ref_logprobs), 0.0).detach()
    rewards[:, -1] += scores
    return rewards
""", "The score lands in the padding"),
    (2, "kl_estimates", """
@torch.no_grad()
def f(logprobs, ref_logprobs):
    d = logprobs - ref_logprobs
    return d, d**2 / 2, torch.expm1(-d) + d
""", "The KL is detached from the graph"),
    (13, "kl_estimates", """
def f(logprobs, ref_logprobs):
    d = logprobs - ref_logprobs
    return d, 0.5 * d * d, (torch.exp(-d) - 1) + d
""", "The digits cancel"),
    (14, "kl_estimates", """
def f(logprobs, ref_logprobs):
    def estimate(kind):
        d = logprobs - ref_logprobs
        if kind == "k3":
            kl = torch.expm1(-d) + d
        if kind == "k2":
            kl = d.square() / 2
        else:
            kl = d
        return kl
    return estimate("k1"), estimate("k2"), estimate("k3")
""", "The third is k1 again"),
    (1, "experience", """
def f(scores, logprobs, ref_logprobs, values, response_mask, beta, lam):
    rewards = lesson09.token_rewards.reference(scores, logprobs, ref_logprobs, response_mask, beta)
    ends = torch.zeros_like(response_mask)
    ends[torch.arange(len(scores)), response_mask.sum(1) - 1] = True
    advantages, _ = gae(rewards, values, ends, gamma=1.0, lam=lam, mask=response_mask)
    advantages = whiten(advantages, response_mask)
    return advantages, (advantages + values) * response_mask
""", "The value targets are made from whitened advantages"),
    ("-", "experience", """
def f(scores, logprobs, ref_logprobs, values, response_mask, beta, lam):
    total = scores - beta * ((logprobs - ref_logprobs) * response_mask).sum(1)
    rewards = lesson09.token_rewards.reference(total, logprobs, ref_logprobs, response_mask, beta)
    ends = torch.zeros_like(response_mask)
    ends[torch.arange(len(scores)), response_mask.sum(1) - 1] = True
    advantages, returns = gae(rewards, values, ends, gamma=1.0, lam=lam, mask=response_mask)
    return whiten(advantages, response_mask), returns
""", "The KL is charged twice"),
    (7, "experience", """
def f(scores, logprobs, ref_logprobs, values, response_mask, beta, lam):
    rewards = lesson09.token_rewards.reference(scores, logprobs, ref_logprobs, response_mask, beta)
    advantages = (rewards - values) * response_mask
    return whiten(advantages, response_mask), (advantages + values) * response_mask
""", "This is r - V"),
    ("-", "ppo_ptx_loss", """
def f(ppo_loss, corpus_logprobs, ptx_coef):
    return (1 - ptx_coef) * ppo_loss - ptx_coef * corpus_logprobs.mean()
""", "PPO's share is scaled by 1 - ptx_coef"),
    (6, "ppo_ptx_loss", """
def f(ppo_loss, corpus_logprobs, ptx_coef):
    return ppo_loss + ptx_coef * corpus_logprobs.mean()
""", "The sign is wrong"),
    ("-", "answer_mask", """
def f(tokens, eos_id):
    is_eos = tokens == eos_id
    return torch.arange(tokens.shape[1]) <= is_eos.int().argmax(1)[:, None]
""", "Without EOS argmax gives 0"),
    ("-", "experience", """
def f(scores, logprobs, ref_logprobs, values, response_mask, beta, lam):
    rewards = lesson09.token_rewards.reference(scores, logprobs, ref_logprobs, response_mask, beta)
    ends = torch.zeros_like(response_mask)
    ends[torch.arange(len(scores)), response_mask.sum(1) - 1] = True
    advantages, _ = gae(rewards, values, ends, gamma=1.0, lam=lam, mask=response_mask)
    return whiten(advantages, response_mask), advantages + values
""", "Values of padding are in the returns"),
    ("-", "experience", """
def f(scores, logprobs, ref_logprobs, values, response_mask, beta, lam):
    rewards = lesson09.token_rewards.reference(scores, logprobs, ref_logprobs, response_mask, beta)
    ends = torch.zeros_like(response_mask)
    ends[torch.arange(len(scores)), response_mask.sum(1) - 1] = True
    advantages, returns = gae(rewards, values, ends, gamma=0.99, lam=lam, mask=response_mask)
    return whiten(advantages, response_mask), returns
""", "gamma is 1 here"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("number", "name", "source", "named"), BUGS, ids=[f"{bug[0]}-{bug[1]}-{i}" for i, bug in enumerate(BUGS)]
)
def test_is_refused_and_named(number, name, source, named):
    space = {"torch": torch, "gae": gae, "whiten": whiten, "lesson09": lesson09}
    exec(source, space)
    verdict = getattr(lesson09, name).mark(space["f"])
    assert verdict.status == "failed"
    headline, _, case = verdict.message.partition("\n\n")
    assert named in headline, verdict.message
    assert case.startswith("Smallest failing case: ")


def test_every_bug_of_this_lesson_is_here():
    assert {bug[0] for bug in BUGS} >= {1, 2, 8, 9, 10, 13, 14, 17}


# The failure lab ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("letter", text_failure_lab.RUNS)
def test_a_mistake_is_planted_while_it_lasts_and_gone_after(letter):
    run = text_failure_lab.RUNS[letter]
    before = {name: getattr(rlhf, name) for name in run.instead}
    with text_failure_lab.planted(run.instead):
        assert all(getattr(rlhf, name) is function for name, function in run.instead.items())
    assert all(getattr(rlhf, name) is function for name, function in before.items())
    assert text_failure_lab.reveal(letter).startswith(f"**{letter}.** ")


def test_one_run_is_healthy_and_an_unknown_letter_is_said():
    assert [letter for letter, run in text_failure_lab.RUNS.items() if not run.instead] == ["C"]
    with pytest.raises(UserError, match="A, B, C, D, E, not 'Z'"):
        text_failure_lab.reveal("Z")


def test_the_planted_mistakes_are_mistakes():
    scores, mask = torch.tensor([3.0]), torch.tensor([[True, True, False]])
    old, ref = torch.tensor([[-1.0, -1.0, 9.0]]), torch.tensor([[-2.0, -1.5, 5.0]])
    right = rlhf.kl_rewards(scores, old, ref, mask, 0.5)
    assert right.tolist() == [[-0.5, 2.75, 0.0]]
    assert text_failure_lab.kl_paid_out(scores, old, ref, mask, 0.5).tolist() == [[0.5, 3.25, 0.0]]
    assert text_failure_lab.score_at_the_first_token(scores, old, ref, mask, 0.5).tolist() == [[2.5, -0.25, 0.0]]
    values, ends = torch.zeros(1, 3), torch.tensor([[False, True, False]])
    advantages, returns = text_failure_lab.targets_from_whitened(right, values, ends, gamma=1.0, lam=1.0, mask=mask)
    assert torch.allclose(advantages, returns) and abs(float(returns.sum())) < 1e-6


def test_the_lesson_shows_what_the_lab_says_and_its_file_holds_every_run():
    lesson = nbformat.read(ROOT / "notebooks" / "09_ppo_kl_ptx.ipynb", as_version=4)
    text = "\n".join(cell.source for cell in lesson.cells if cell.cell_type == "markdown")
    for letter in text_failure_lab.RUNS:
        told = text_failure_lab.reveal(letter)
        assert told in text, f"run {letter}: rebuild the fold from text_failure_lab.reveal"
        assert f"run {letter}" not in text.split("## The failure lab")[0], "told before it is asked"
    with (ROOT / "data" / "results" / "text_failure_lab.csv").open(encoding="utf-8", newline="") as file:
        assert file.readline().startswith("# ")
        runs = {row["run"] for row in csv.DictReader(file)}
    assert runs == {"healthy", *text_failure_lab.RUNS}
