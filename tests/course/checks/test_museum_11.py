"""Mistakes of lesson 11 as learners would write them, refused and named by its checks; and the references' proofs."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from minirlhf_course.checks import lesson11

from minirlhf.language.evaluation import win_rate
from minirlhf.language.tokenization import encode_prompts, encode_responses, tokenizer_from_file

WORLD = Path(__file__).resolve().parents[3] / "data" / "small_world"


class Bug(NamedTuple):
    check: str
    source: str
    named: str


BUGS = [
    Bug("win_rate_interval", """
def f(scores, others):
    z, n = 1.96, len(scores)
    p = (scores >= others).double().mean()
    centre, half = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    return torch.stack((p, (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)))
""", "Ties count as won"),
    Bug("win_rate_interval", """
def f(scores, others):
    z, decided = 1.96, scores != others
    n = max(int(decided.sum()), 1)
    p = (scores > others).double().sum() / n
    centre, half = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    return torch.stack((p, (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)))
""", "Ties are dropped"),
    Bug("win_rate_interval", """
def f(scores, others):
    outcomes = torch.where(scores > others, 1.0, torch.where(scores < others, 0.0, 0.5)).double()
    p = outcomes.mean()
    half = 1.96 * (p * (1 - p) / len(outcomes)) ** 0.5
    return torch.stack((p, p - half, p + half))
""", "This is the textbook interval: "),
    Bug("few_shot_prompt", """
def f(examples, prompt, newline, eos, limit):
    ids = []
    for question, answer in examples:
        ids += [*question.tolist(), newline, *answer.tolist(), eos]
    return torch.tensor([*ids, *prompt.tolist(), newline])[-limit:]
""", "It cuts the whole to its last tokens"),
    Bug("few_shot_prompt", """
def f(examples, prompt, newline, eos, limit):
    ids, ask = [], prompt.tolist()
    for question, answer in examples:
        block = [*question.tolist(), newline, *answer.tolist(), eos]
        if len(ids) + len(block) + len(ask) + 1 > limit:
            break
        ids += block
    return torch.tensor(ids + ask)
""", "The newline after the prompt is missing"),
    Bug("few_shot_prompt", """
def f(examples, prompt, newline, eos, limit):
    ids, ask = [], [*prompt.tolist(), newline]
    for question, answer in examples:
        block = [*question.tolist(), newline, *answer.tolist()]
        if len(ids) + len(block) + len(ask) > limit:
            break
        ids += block
    return torch.tensor(ids + ask)
""", "EOS between the examples is missing"),
    Bug("paired_interval", """
def f(first, second, rows):
    generator = torch.Generator().manual_seed(0)
    others = rows[torch.randperm(len(rows), generator=generator)].roll(1, 0)
    differences = first[rows].mean(1) - second[rows.roll(1, 0)].mean(1)
    return differences.quantile(torch.tensor([0.025, 0.975]).double())
""", "Each model is measured on a resample of its own"),
    Bug("paired_interval", """
def f(first, second, rows):
    low, high = torch.tensor([0.025, 0.975]).double()
    a, b = first[rows].mean(1), second[rows].mean(1)
    return torch.stack((a.quantile(low) - b.quantile(high), a.quantile(high) - b.quantile(low)))
""", "Low of one minus high of the other"),
    Bug("seed_interval", """
def f(rates, t):
    mean, error = rates.mean(0), rates.std(0) / len(rates) ** 0.5
    return torch.stack((mean, mean - 1.96 * error, mean + 1.96 * error))
""", "1.96 is for many seeds"),
    Bug("seed_interval", """
def f(rates, t):
    mean = rates.mean(0)
    error = (((rates - mean) ** 2).mean(0) / len(rates)) ** 0.5
    return torch.stack((mean, mean - t * error, mean + t * error))
""", "The standard deviation divides by S"),
    Bug("seed_interval", """
def f(rates, t):
    return torch.stack((rates.mean(0), rates.min(0).values, rates.max(0).values))
""", "These are the lowest and the highest run"),
    Bug("tax_repaired", """
def f(base, ppo, ppo_ptx):
    return ((ppo - ppo_ptx) / (ppo - base)).mean(0)
""", "It is a mean of the seeds' ratios"),
    Bug("tax_repaired", """
def f(base, ppo, ppo_ptx):
    return (ppo_ptx.mean(0) - base.mean(0)) / (ppo.mean(0) - base.mean(0))
""", "This is the share that is left"),
    Bug("tax_repaired", """
def f(base, ppo, ppo_ptx):
    return (ppo.mean(0) - ppo_ptx.mean(0)) / ppo.mean(0)
""", "This compares losses, not taxes: "),
    Bug("seed_interval", """
def f(rates, t):
    mean = rates.mean(0)
    half = t * rates.std(0) / (len(rates) - 1) ** 0.5
    return torch.stack((mean, mean - half, mean + half))
""", "It divides by the root of S - 1"),
]  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=[f"{bug.check}-{index}" for index, bug in enumerate(BUGS)])
def test_is_refused_and_named(bug):
    space = {"torch": torch}
    exec(bug.source, space)
    verdict = getattr(lesson11, bug.check).mark(space["f"])
    assert verdict.status == "failed"
    headline, _, case = verdict.message.partition("\n\n")
    hint = f"looks like a known mistake: {bug.named}"  # where it is not the suspect's very numbers
    assert headline.startswith(bug.named) or hint in headline, verdict.message
    assert case.startswith("Smallest failing case: ")


def test_the_rate_is_the_packages_and_wilson_agrees_with_the_textbook_in_the_middle():
    generator = torch.Generator().manual_seed(0)
    scores, others = torch.randn(2, 2000, generator=generator, dtype=torch.float64)
    rate, low, high = lesson11.win_rate_interval.reference(scores, others).tolist()
    package, (package_low, package_high) = win_rate(scores.tolist(), others.tolist())
    assert rate == package
    assert abs(low - package_low) < 1e-3 and abs(high - package_high) < 1e-3


@pytest.mark.parametrize("truth", [0.5, 0.9, 0.98])
def test_wilsons_interval_holds_the_truth_as_often_as_it_says(truth):
    generator = torch.Generator().manual_seed(1)
    won = (torch.rand(4000, 60, generator=generator) < truth).double()
    rows = [lesson11.win_rate_interval.reference(row, torch.full_like(row, 0.5)) for row in won]
    held = sum(bool(low <= truth <= high) for _, low, high in rows) / len(rows)
    assert 0.93 < held < 0.985


def test_the_seeds_interval_holds_the_truth_as_often_as_it_says_and_the_normal_one_does_not():
    rates = torch.randn(3, 20_000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for t, low, high in ((4.303, 0.94, 0.96), (1.96, 0.78, 0.84)):
        _, below, above = lesson11.seed_interval.reference(rates, t)
        assert low < float(((below <= 0) & (above >= 0)).double().mean()) < high
    inside = (rates.amin(0) <= 0) & (rates.amax(0) >= 0)
    assert abs(float(inside.double().mean()) - 0.75) < 0.01, "what the check says of the lowest and the highest run"


def test_the_paired_interval_is_narrower_than_the_unpaired_one():
    generator = torch.Generator().manual_seed(3)
    easy = torch.randn(400, generator=generator, dtype=torch.float64)
    first, second = (easy + 0.3 * torch.randn(2, 400, generator=generator, dtype=torch.float64) > 0).double()
    rows = torch.randint(0, 400, (2000, 400), generator=generator)
    low, high = lesson11.paired_interval.reference(first, second, rows)
    unpaired = first[rows].mean(1) - second[rows.roll(1, 0)].mean(1)
    assert high - low < 0.8 * 4 * unpaired.std()


def test_examples_are_written_as_the_tokenizer_writes_them():
    tokenizer = tokenizer_from_file(WORLD / "tokenizer.json")
    pairs = [("where does a fox live ?", "a fox lives in the forest ."), ("i feel sad today", "do not cry !")]

    def ids(text):
        return torch.tensor(tokenizer.encode(text, add_special_tokens=False))

    newline = tokenizer.convert_tokens_to_ids("\n")
    got = lesson11.few_shot_prompt.reference(
        [(ids(q), ids(a)) for q, a in pairs], ids("write a story about frogs"), newline, tokenizer.eos_token_id, 64
    )
    prompts = encode_prompts(tokenizer, [*(q for q, _ in pairs), "write a story about frogs"])
    answers = encode_responses(tokenizer, [a for _, a in pairs])
    assert got.tolist() == [*prompts[0], *answers[0], *prompts[1], *answers[1], *prompts[2]]
