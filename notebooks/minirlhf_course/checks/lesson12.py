"""Lesson 12, back to REINFORCE: leave-one-out advantages, RLOO's whole loop, GRPO's advantages and its loss."""

from __future__ import annotations

import torch
from torch import Tensor

from minirlhf.kl import kl_k3
from minirlhf.returns import group_advantages, masked_mean
from minirlhf_course.checks import write12
from minirlhf_course.checks.cases import SIZES, bools, generators, normal, tensor
from minirlhf_course.checks.exercise import Case, exercise
from minirlhf_course.checks.mistakes12 import group_with, left_out_with, loss_with

GROUPS = ((1, 3), (3, 2), (2, 4), (5, 8), (4, 16))
"""[N, K] of the random cases."""


# 12.1 ----------------------------------------------------------------------------------------------------------------


def _left_out_cases() -> list[Case]:
    cases = [
        Case("two answers: each is the other's baseline", (tensor([3, 1]),), tensor([2.0, -2.0])),
        Case("three answers", (tensor([0, 3, 6]),), tensor([-4.5, 0.0, 4.5])),
        Case("two prompts, an easy one and a hard one", (tensor([4, 4, 5], [0, 1, 2]),),
             tensor([-0.5, -0.5, 1.0], [-1.5, 0.0, 1.5])),
        Case("equal answers", (tensor([2, 2, 2]),), tensor([0.0, 0.0, 0.0])),
    ]  # fmt: skip
    for size, generator in zip(GROUPS, generators(len(GROUPS)), strict=True):
        cases.append(Case(f"random, {size[0]} prompts of {size[1]} answers", (normal(generator, *size),)))
    return cases


@exercise(
    "12.1",
    "the other answers",
    difficulty=2,
    minutes=8,
    task="A row per prompt, and in it the rewards of its $K$ answers. Each answer's baseline is the mean reward of the "
    "$K - 1$ *others*: $A_i = R_i - \\frac{1}{K-1} \\sum_{j \\neq i} R_j$.",
    cases=_left_out_cases,
    suspects={
        "An answer's own reward is in its baseline: take the mean of the other K - 1.": left_out_with("own"),
        "The sum of the others is divided by K: there are K - 1 of them.": left_out_with("divided by k"),
        "This subtracts the sum of the others: their mean.": left_out_with("sum"),
        "This is the baseline itself: subtract it from the answer's own reward.": left_out_with("baseline"),
        "The sign is wrong: an answer that is better than the others has a positive advantage.": left_out_with("sign"),
        "The factor is upside down: R_i minus the mean of all K is (K - 1) / K of what is asked for.": left_out_with(
            "factor"
        ),
        "The baseline is the mean of the whole batch: only answers to the same prompt are compared.": left_out_with(
            "batch"
        ),
        "The baseline is the mean of all other answers of the batch: only those to the same prompt.": left_out_with(
            "batch, left out"
        ),
        "It compares answers to different prompts: a prompt's answers are a row, so the mean is over dim 1.": (
            left_out_with("columns")
        ),
        "Nothing is subtracted: these are the rewards.": left_out_with("raw"),
        "The advantages are divided by the standard deviation: RLOO leaves their scale alone.": left_out_with("std"),
        "These are GRPO's advantages: leave the answer's own reward out of the mean, and don't divide.": left_out_with(
            "grpo"
        ),
        "The baseline is the best of the others: their mean.": left_out_with("best"),
        "The baseline is a single other answer: the mean of all the others is less noisy.": left_out_with("neighbour"),
    },
    hints=(
        "The others' sum is the sum of the row without the answer's own reward.",
        "`others = (rewards.sum(1, keepdim=True) - rewards) / (K - 1)`, then one subtraction.",
    ),
)
def leave_one_out(rewards: Tensor) -> Tensor:
    """RLOO's advantages [N, K] from the rewards [N, K] of K answers to each of N prompts."""
    return group_advantages(rewards, leave_one_out=True)


rloo = write12.rloo  # 12.2


# 12.3 ----------------------------------------------------------------------------------------------------------------

LOOSE = 1e-3
"""trl adds 1e-4 to the standard deviation, verl 1e-6: both are right."""


def _group_cases() -> list[Case]:
    cases = [
        Case("three answers", (tensor([0, 3, 6]),), tensor([-1.0, 0.0, 1.0]), rtol=LOOSE),
        Case("equal answers: nothing to learn", (tensor([2, 2, 2, 2]),), tensor([0.0, 0.0, 0.0, 0.0])),
        Case("one prompt of large rewards and one of small ones", (tensor([0, 20, 40], [3, 2, 1]),),
             tensor([-1.0, 0.0, 1.0], [1.0, 0.0, -1.0]), rtol=LOOSE),
        Case("one right answer of four, and a prompt that has none", (tensor([0, 1, 0, 0], [0, 0, 0, 0]),),
             tensor([-0.5, 1.5, -0.5, -0.5], [0.0, 0.0, 0.0, 0.0]), rtol=LOOSE),
    ]  # fmt: skip
    for size, generator in zip(GROUPS, generators(len(GROUPS)), strict=True):
        rewards = 2 * normal(generator, *size)
        rewards[:, :2] += tensor(3, -3, dtype=rewards.dtype)  # no deviation near 0
        cases.append(Case(f"random, {size[0]} prompts of {size[1]} answers", (rewards,), rtol=LOOSE))
    return cases


@exercise(
    "12.3",
    "GRPO's advantages",
    difficulty=2,
    minutes=8,
    task="The same groups, as GRPO compares them: each reward minus the mean of *all* $K$, divided by the standard "
    "deviation of the $K$ (torch's own, with $K - 1$). And where all $K$ rewards are equal? There is nothing to learn "
    "from such a group: 0.",
    cases=_group_cases,
    suspects={
        "0 / 0 is NaN: where all rewards are equal the standard deviation is 0. Add a little to it.": group_with("nan"),
        "The standard deviation divides by K: torch's own (and trl's, and verl's) divides by K - 1.": group_with(
            "population"
        ),
        "The answer's own reward is left out of the mean: GRPO takes the mean of all K.": group_with("left out"),
        "The standard deviation is missing: divide by it.": group_with("centred"),
        "This divides by the variance: take the standard deviation, its root.": group_with("variance"),
        "It multiplies by the standard deviation: divide.": group_with("times"),
        "The mean is not subtracted.": group_with("raw"),
        "The standard deviation is that of the whole batch: each group has its own.": group_with("batch std"),
        "Mean and standard deviation are those of the whole batch: each group has its own.": group_with("batch"),
        "It compares answers to different prompts: a prompt's answers are a row, so mean and deviation are over dim "
        "1.": group_with("columns"),
        "A standard deviation below 1 is taken for 1: only one of 0 needs help.": group_with("at least 1"),
        "1 is added to the standard deviation: what is added must be far smaller than it (1e-6).": group_with(
            "one more"
        ),
        "The sign is wrong: an answer that is better than the others has a positive advantage.": group_with("sign"),
        "This divides by the range, from the lowest to the highest: take the standard deviation.": group_with("range"),
    },
    hints=(
        "`mean` and `std` over dim 1 with `keepdim=True`. What is 0 / 0?",
        "`(rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)`",
    ),
)
def group_relative(rewards: Tensor) -> Tensor:
    """GRPO's advantages [N, K] from the rewards [N, K] of K answers to each of N prompts."""
    return group_advantages(rewards, leave_one_out=False, divide_by_std=True)


# 12.4 ----------------------------------------------------------------------------------------------------------------


def _loss_cases() -> list[Case]:
    one, half = tensor([-1.0]), torch.tensor(0.5).log()
    short = bools([1, 1, 1], [1, 0, 0])
    three = tensor([-1, -1, -1], [-1, 9, 9])
    cases = [
        Case("one token, nothing has moved", (one, one, one, tensor(2), bools([1]), 0.5), torch.tensor(-2.0)),
        Case(
            "one token, half as likely under the reference",
            (one, one, one + half, tensor(2), bools([1]), 1.0),
            torch.tensor(-2.0) + torch.tensor(0.5) - 1 - half,
        ),
        Case("one token, twice as likely as when it was sampled", (one, one + half, one, tensor(2), bools([1]), 0.5),
             torch.tensor(-4.0)),
        Case(
            "a long answer and a short one, 9s in the padding",
            (three, three, three, tensor(2, -4), short, 0.5),
            torch.tensor(1.0),
        ),
    ]  # fmt: skip
    for size, generator in zip(SIZES, generators(), strict=True):
        mask = torch.arange(size[1]) < torch.randint(1, size[1] + 1, (size[0], 1), generator=generator)
        mask[0] = True
        new, ref = (-normal(generator, *size).abs() for _ in range(2))
        old = new + 0.3 * normal(generator, *size)
        args = (new, old, ref, normal(generator, size[0]), mask, 0.3)
        cases.append(Case(f"random, of shape {size}", args))
    return cases


@exercise(
    "12.4",
    "GRPO's loss: a mean of means",
    difficulty=3,
    minutes=20,
    task="Every token costs $-r_t A + \\beta\\, k_3$, where $r_t = \\pi(y_t)/\\pi_\\text{old}(y_t)$ is lesson 05's "
    "ratio (without a clip here), $A$ is the advantage of its answer, and $k_3 = e^{-d} - 1 + d$ with $d = \\log\\pi - "
    "\\log\\pi_\\text{ref}$ is lesson 09's. Average over the tokens of each answer, then over the answers. Padding "
    "counts nowhere.",
    cases=_loss_cases,
    suspects={
        "The mean goes over padding, and over what lies there: divide each answer's sum by its own tokens.": loss_with(
            "padding"
        ),
        "Each answer is divided by the width of the table, padding and all: divide by its own tokens.": loss_with(
            "padding counted"
        ),
        "The KL is summed over an answer where the rest is averaged: the same mean for both, or beta grows with the "
        "length.": loss_with("kl summed"),
        "The KL has a mean of its own, over all tokens: average over each answer first, as the rest.": loss_with(
            "kl over tokens"
        ),
        "All tokens count the same here (as in DAPO): average over each answer first, then over the answers.": (
            loss_with("tokens")
        ),
        "An answer's tokens are summed: average over them.": loss_with("sum"),
        "The answers are summed: average over them.": loss_with("sum of answers"),
        "All tokens are summed: average over each answer, then over the answers.": loss_with("all summed"),
        "The sign of the whole is wrong: a loss is minimised.": loss_with("all turned"),
        "The sign of the advantage is wrong: minimising this makes good answers less likely.": loss_with("sign"),
        "The sign of the KL is wrong: this pays for leaving the reference.": loss_with("kl sign"),
        "k3 is the wrong way round: with d = logprobs - ref_logprobs it is expm1(-d) + d.": loss_with("kl turned"),
        "This is k1 = d: as a loss its mean gradient is 0. Take k3 = expm1(-d) + d.": loss_with("k1"),
        "This is k2 = d^2 / 2: GRPO takes k3 = expm1(-d) + d.": loss_with("k2"),
        "No gradient flows through the KL: then it is for show.": loss_with("detached"),
        "The KL is missing: add beta times k3 to each token.": loss_with("free"),
        "beta is missing.": loss_with("beta"),
        "The KL is taken from the policy that sampled: from the reference.": loss_with("old for reference"),
        "The ratio is upside down: exp(logprobs - old_logprobs).": loss_with("turned"),
        "There is no ratio: A is multiplied by exp(logprobs - old_logprobs), not by a log-probability.": loss_with(
            "no ratio"
        ),
        "A is multiplied by a probability: the ratio divides it by the one under the policy that sampled.": loss_with(
            "probability"
        ),
        "The ratio is 1 whatever happens: divide by the probability under old_logprobs.": loss_with("ratio of one"),
    },
    hints=(
        "One table [B, T] of what each token costs, then `torch.where`, then two means. `advantages` has one number "
        "per answer: give it a second dimension.",
        "`per_token = beta * (torch.expm1(-d) + d) - ratio * advantages[:, None]`; the sum over what counts, "
        "`.sum(1) / response_mask.sum(1)`, and `.mean()`.",
    ),
    leaves=("logprobs",),
)
def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    beta: float,
) -> Tensor:
    """GRPO's loss (0-d) of B answers: advantages [B], the other tensors [B, T]."""
    ratio = (logprobs - old_logprobs).exp()
    per_token = beta * kl_k3(logprobs, ref_logprobs) - ratio * advantages[:, None]
    return masked_mean(per_token, response_mask, 1).mean()
