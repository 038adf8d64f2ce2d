"""Lesson 12's failure lab: the planted mistakes are mistakes, and what the clues say holds in the stored runs."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from minirlhf_course import group_failure_lab
from minirlhf_course.checks.write07 import tiny_model, tiny_tokenizer

from minirlhf.language import grpo
from minirlhf.language.grpo import GRPOConfig, train_grpo
from minirlhf.returns import group_advantages, masked_sum
from minirlhf.training import Recorder

ROOT = Path(__file__).resolve().parents[3]
SHORT = GRPOConfig(steps=3, batch_size=8, minibatch_size=8, max_response_tokens=5, lr=1e-2, warmup=1, beta=0.5)


def early(prompts, responses):
    return [sum(word < "m" for word in text.split()) for text in responses]


def history(letter: str | None) -> list[dict[str, float]]:
    recorder = Recorder("lab", progress=False)
    models = tiny_model(0), tiny_model(1), early, tiny_tokenizer(), ["who owl", "where fox"], SHORT
    if letter is None:
        train_grpo(*models, recorder=recorder)
    else:
        group_failure_lab.train(letter, *models, recorder=recorder)
    return recorder.history


def test_the_planted_mistakes_are_mistakes():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    shares = torch.tensor([[1.0, 1.0, 1.0], [3.0, 9.0, 9.0]]) / 6  # of two answers, each of weight 1/2
    assert masked_sum(shares, mask) == pytest.approx(1.0)
    assert group_failure_lab.summed(shares, mask) == pytest.approx(0.5 * 3 + 0.5 * 1)
    rewards = torch.tensor([[0.0, 3.0, 6.0]])
    assert group_advantages(rewards, leave_one_out=False).tolist() == [[-3.0, 0.0, 3.0]]
    assert group_failure_lab.neighbours(rewards, leave_one_out=False).tolist() == [[3.0, -3.0, 0.0]]


def test_a_run_leaves_grpo_as_it_was_and_every_mistake_changes_it():
    before = {name: getattr(grpo, name) for run in group_failure_lab.RUNS.values() for name in run.instead}
    healthy = history(None)
    runs = {letter: history(letter) for letter in group_failure_lab.RUNS}
    assert {name: getattr(grpo, name) for name in before} == before
    scores = {letter: tuple(row["policy/grad_norm"] for row in rows) for letter, rows in runs.items()}
    assert len({*scores.values(), tuple(row["policy/grad_norm"] for row in healthy)}) == 4
    assert all(row["objective/kl"] == 0 for row in runs["C"]) and healthy[-1]["objective/kl"] > 0.1
    assert runs["A"][0]["policy/kl_loss"] > 1.5 * healthy[0]["policy/kl_loss"]


def test_what_the_clues_say_is_so():
    with (ROOT / "data" / "results" / "group_failure_lab.csv").open(encoding="utf-8", newline="") as file:
        file.readline()
        rows = group_failure_lab.evidence(list(csv.DictReader(file)))
    found = {(letter, what.split(",")[0]): numbers for letter, what, *numbers in rows}
    assert len(found) == len(rows) and all("*How sure:*" in run.clue for run in group_failure_lab.RUNS.values())

    own, healthy = found["A", "KL"]
    assert own.max() < 1.1 and healthy.min() > 4
    own, healthy = found["A", "KL in the loss"]
    assert own.min() > 2.5 * healthy.max()
    own, healthy = found["A", "score"]
    assert own.min() > 0.2 and own.max() < healthy.min() - 0.4
    own, _ = found["B", "KL"]
    assert own.min() > 3
    own, _ = found["B", "score"]
    assert own.max() < -0.9
    own, healthy = found["C", "KL"]
    assert (own == 0).all() and healthy.max() > 5
    own, healthy = found["C", "score"]
    assert own.min() > healthy.min() - 0.1
