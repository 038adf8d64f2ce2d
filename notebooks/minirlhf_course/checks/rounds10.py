"""Exercise 10.7, steps 2 and 3 in a loop.

In its cases a model is a few numbers and a trainer a line of arithmetic: the result shows who was trained on what.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minirlhf_course.checks.cases import F64, generators, normal, row
from minirlhf_course.checks.exercise import Case, exercise

Rankings = tuple[Tensor, ...]


def _named(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What a failing case shows of a function."""

    def give(function: Callable[..., Any]) -> Callable[..., Any]:
        function.__name__ = name
        return function

    return give


@_named("label(policy, prompts): policy * prompt, one for each prompt")
def label(policy: Tensor, prompts: Sequence[float]) -> Rankings:
    return tuple(policy * prompt for prompt in prompts)


@_named("train_judge(start, rankings): start + the sum of the rankings")
def train_judge(start: Tensor, rankings: Sequence[Tensor]) -> Tensor:
    return start + sum(rankings)


@_named("train_policy(policy, judge, reference): policy * judge - reference")
def train_policy(policy: Tensor, judge: Tensor, reference: Tensor) -> Tensor:
    return policy * judge - reference


TOOLS = (label, train_judge, train_policy)


def rounds_cases() -> list[Case]:
    cases = [
        Case("one round with one prompt: the judge is 1 + 2 + 3", (row(1), (row(2),), ((3,),), *TOOLS), [row(5)]),
        Case("two rounds with one prompt each: the judges are 6 and 16",
             (row(1), (row(2),), ((3,), (2,)), *TOOLS), [row(5), row(79)]),
        Case("two rounds, no rankings before: the judges are 5 and 9",
             (row(2), (), ((1.5,), (0.5,)), *TOOLS), [row(8), row(70)]),
    ]  # fmt: skip
    for (size, rounds), generator in zip(((2, 2), (3, 3), (4, 2)), generators(3), strict=True):
        sft, old = 0.5 * normal(generator, size), tuple(normal(generator, 3, size))
        batches = tuple(tuple((0.5 + torch.rand(2, generator=generator, dtype=F64)).tolist()) for _ in range(rounds))
        cases.append(Case(f"random, {rounds} rounds, models of {size} numbers", (sft, old, batches, *TOOLS)))
    return cases


def rounds_with(
    bug: str,
    sft: Tensor,
    rankings: Rankings,
    batches: Sequence[Sequence[float]],
    label: Callable[..., Any],
    train_judge: Callable[..., Any],
    train_policy: Callable[..., Any],
) -> list[Tensor]:
    """Exercise 10.7 with one mistake planted."""
    policies: list[Tensor] = []
    policy = before = judge = sft
    known, last = () if bug == "no old rankings" else rankings, ()
    if bug == "all labels first":
        known = (*known, *(new for prompts in batches for new in label(sft, prompts)))
    for prompts in batches:
        new = label({"old answers": sft, "one round late": before}.get(bug, policy), prompts)
        if bug == "judge before labels":
            new, last = last, new
        if bug == "new labels only":
            known = new
        elif bug == "first and new":
            known = (*rankings, *new)
        elif bug != "all labels first":
            known = (*known, *new)
        if bug != "first judge" or not policies:
            judge = train_judge({"judge goes on": judge, "judge from policy": policy}.get(bug, sft), known)
        before = policy
        policy = train_policy(sft if bug == "restart" else policy, judge, policy if bug == "reference" else sft)
        policies.append(policy)
    return policies


@exercise(
    "10.7",
    "steps 2 and 3, again and again",
    difficulty=3,
    minutes=20,
    task="Write the loop that InstructGPT's authors describe. In each round the labelers rank answers of the policy as "
    "it is then; the judge is trained anew, from the SFT model, on all rankings that there are by now; and PPO goes on "
    "from where the last round ended. The KL is charged to the SFT model throughout. The trainers are given, and "
    "change nothing that they get. (In the check a model is a few numbers and a trainer is a line of arithmetic, so "
    "that the result shows who was trained on what.)",
    cases=rounds_cases,
    suspects={
        "The SFT model's answers are labelled in every round: ask about what the policy says by then.": (
            partial(rounds_with, "old answers")
        ),
        "All labels are of the SFT model, before the first round: each round asks about the policy as it is then.": (
            partial(rounds_with, "all labels first")
        ),
        "Labels come one round late, of the policy that the round before started from: ask about the newest.": (
            partial(rounds_with, "one round late")
        ),
        "The judge learns from the new rankings alone: from old and new ones, or it knows only what a broken policy "
        "says.": partial(rounds_with, "new labels only"),
        "Each judge learns from the first rankings and from its own round's: those of the rounds between belong to it "
        "as well.": partial(rounds_with, "first and new"),
        "The rankings that there were at the start are left out: the judge learns from old and new ones.": (
            partial(rounds_with, "no old rankings")
        ),
        "The judge is trained before the new rankings are in: label first.": partial(
            rounds_with, "judge before labels"
        ),
        "The judge of the first round stays: train it again in every round, on all rankings.": (
            partial(rounds_with, "first judge")
        ),
        "The judge goes on from the last one: then it reads the old rankings once more in each round, and learns them "
        "by heart. Start it from the SFT model.": partial(rounds_with, "judge goes on"),
        "The judge starts from the policy: from the SFT model.": partial(rounds_with, "judge from policy"),
        "PPO starts from the SFT model in every round: it goes on from the last round's policy.": (
            partial(rounds_with, "restart")
        ),
        "The reference moves along with the policy: the KL is charged to the SFT model in every round, or each one may "
        "go as far again.": partial(rounds_with, "reference"),
    },
    hints=(
        "Two things are carried from round to round: the newest policy, and all rankings so far. Two things are not: "
        "the SFT model is where every judge starts and what every KL is measured from.",
        "In the loop over `batches`: `rankings = (*rankings, *label(policy, prompts))`, `judge = train_judge(sft, "
        "rankings)`, `policy = train_policy(policy, judge, sft)`, and `policies.append(policy)`. Before it: `policy = "
        "sft`.",
    ),
)
def rounds(
    sft: Any,
    rankings: tuple[Any, ...],
    batches: Sequence[Sequence[Any]],
    label: Callable[..., tuple[Any, ...]],
    train_judge: Callable[..., Any],
    train_policy: Callable[..., Any],
) -> list[Any]:
    """A list: the policy after each round, one round for each batch of prompts.

    rankings: a tuple, of the SFT model's answers;
    label(policy, prompts): new rankings, a tuple;
    train_judge(start, rankings): a reward model; start is the model that it begins as;
    train_policy(policy, judge, reference): PPO from that policy, KL to that reference.
    """
    policy, policies = sft, []
    for prompts in batches:
        rankings = (*rankings, *label(policy, prompts))
        judge = train_judge(sft, rankings)
        policy = train_policy(policy, judge, sft)
        policies.append(policy)
    return policies
