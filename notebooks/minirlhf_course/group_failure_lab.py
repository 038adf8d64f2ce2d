"""The failure lab of lesson 12: GRPO with one mistake planted, under a letter that does not tell which.

    from minirlhf_course import group_failure_lab

    group_failure_lab.train("B", policy, reference, ...)    # the call and the result of train_grpo
    print(group_failure_lab.match({"B": 3}))                # your answers, by number
    print(group_failure_lab.reveal("B"))                    # after you have made up your mind

As in `failure_lab`, a mistake is a wrong version of one function that `minirlhf.language.grpo` calls, put in its place
while the run lasts. Reading on spoils the lab.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from minirlhf.language import grpo, rollouts
from minirlhf.language.generation import Samples
from minirlhf.language.grpo import train_grpo
from minirlhf.returns import group_advantages, masked_sum
from minirlhf_course.failure_lab import Lab, Planted, curves


def summed(shares_times_kl: Tensor, mask: Tensor) -> Tensor:
    """The KL's share of the loss, summed over an answer's tokens where the rest is averaged."""
    return masked_sum(shares_times_kl * mask.sum(1, keepdim=True), mask)


def neighbours(rewards: Tensor, **options: Any) -> Tensor:
    """Each answer has the advantage of the one beside it."""
    return group_advantages(rewards, **options).roll(1, 1)


def policy_as_reference(reference: Any, samples: Samples, config: Any) -> Tensor:
    """The log-probabilities of the policy that has just sampled, in place of the reference's."""
    return samples.logprobs.clone()


RUNS: dict[str, Planted] = {
    "A": Planted(2, "", "", "", "", {"masked_sum": summed}),
    "B": Planted(3, "", "", "", "", {"group_advantages": neighbours}),
    "C": Planted(1, "", "", "", "", {"reference_logprobs": policy_as_reference}),
}
"""The runs of the lab by letter."""


LAB = Lab((grpo, rollouts), RUNS)
planted, match, reveal = LAB.planted, LAB.match, LAB.reveal


EVIDENCE = (
    ("A", "KL, last 5 steps", "objective/kl", slice(-5, None)),
    ("A", "KL in the loss, last 5 steps", "policy/kl_loss", slice(-5, None)),
    ("B", "KL, last 5 steps", "objective/kl", slice(-5, None)),
    ("C", "KL, any step", "objective/kl", slice(None)),
    ("C", "KL in the loss, any step", "policy/kl_loss", slice(None)),
    *((letter, "score, last 5 steps", "objective/score", slice(-5, None)) for letter in RUNS),
)
"""What the clues rest on: the letter, what is measured, its metric, and at which steps."""


def evidence(rows: Sequence[Mapping[str, str]]) -> list[tuple[str, str, np.ndarray, np.ndarray]]:
    """For each line of EVIDENCE: the letter, what is measured, its numbers and the healthy runs'.

    A number per step where the line is about any step, otherwise the mean of its steps, one per seed.
    """
    found = []
    for letter, what, metric, steps in EVIDENCE:
        own, healthy = (curves(rows, run, metric, "step")[1][:, steps] for run in (letter, "healthy"))
        if steps != slice(None):
            own, healthy = own.mean(1), healthy.mean(1)
        found.append((letter, what, own, healthy))
    return found


def train(letter: str, *models: Any, **options: Any) -> Any:
    """`train_grpo` with the mistake of that letter. Raises UserError for an unknown letter."""
    with planted(LAB.run(letter).instead):
        return train_grpo(*models, **options)
