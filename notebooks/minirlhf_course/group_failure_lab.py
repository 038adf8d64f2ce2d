"""The failure lab of lesson 12: GRPO with one mistake planted, under a letter that does not tell which.

    from minirlhf_course import group_failure_lab

    group_failure_lab.train("B", policy, reference, ...)    # the call and the result of train_grpo
    print(group_failure_lab.match({"B": 3}))                # your answers, by number
    print(group_failure_lab.reveal("B"))                    # after you have made up your mind

As in `failure_lab`, a mistake is a wrong version of one function that `minirlhf.language.grpo` calls, put in its place
while the run lasts. Reading on spoils the lab.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from minirlhf.language import grpo, rollouts
from minirlhf.language.generation import Samples
from minirlhf.language.grpo import train_grpo
from minirlhf.returns import group_advantages, masked_sum
from minirlhf_course import text_failure_lab
from minirlhf_course.failure_lab import Lab, Planted


def summed(shares_times_kl: Tensor, mask: Tensor) -> Tensor:
    """The KL's share of the loss, summed over an answer's tokens where the rest is averaged."""
    return masked_sum(shares_times_kl * mask.sum(1, keepdim=True), mask)


def neighbours(rewards: Tensor, **options: Any) -> Tensor:
    """Each answer has the advantage of the one beside it."""
    return group_advantages(rewards, **options).roll(1, 1)


def policy_as_reference(reference: Any, samples: Samples, *_: Any) -> Tensor:
    """The log-probabilities of the policy that has just sampled, in place of the reference's."""
    return samples.logprobs.clone()


RUNS: dict[str, Planted] = {
    "A": Planted(
        2,
        "the KL in the loss is summed where the rest is averaged",
        "The KL in the loss is summed over an answer's tokens, where the rest of the loss is averaged over them: beta "
        "is some twenty times as large as it seems.",
        "the KL to SFT stays near 1 where healthy runs reach 4 or more, and yet the KL *in the loss* is three times as "
        "large as theirs: a mean per token can't be, with so few nats per answer. The score rises a little and stops. "
        "*How sure:* of a leash that is too short, very. That beta is not simply set too high is what the two KLs "
        "together say: with a mean per token the one in the loss would have fallen with the other.",
        "Compare two panels: the KL to SFT, per answer, and the KL in the loss. Do they fit each other?",
        {"masked_sum": summed},
    ),
    "B": Planted(
        3,
        "the advantages slip by one answer",
        "The advantages slip by one: each answer gets that of its neighbour in the group.",
        "the score falls, and so does the length, while nats are spent as in a healthy run: the policy learns, and it "
        "learns the wrong thing. *How sure:* that advantages and answers don't belong together, very. A flipped sign "
        "would look much the same (an answer's reward is in its neighbour's mean with a minus); one group, printed "
        "with scores and advantages, settles it.",
        "Look at the score: does the run learn nothing, or the opposite?",
        {"group_advantages": neighbours},
    ),
    "C": Planted(
        1,
        "the reference moves along",
        "The reference moves: it is always the policy that has just sampled, so nothing holds the policy near SFT.",
        "the KL is 0, at every step, while score and length change as in healthy runs. A policy that has changed can't "
        "be at distance 0 from the one it started as. *How sure:* certain, if the KL is exactly 0; a reference that "
        "follows slowly would show a small one, and only a frozen copy of the weights would tell.",
        "Look for a number that is too good: which curve can't be what it says?",
        {"reference_logprobs": policy_as_reference},
    ),
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


evidence = partial(text_failure_lab.evidence, lines=EVIDENCE)


def train(letter: str, *models: Any, **options: Any) -> Any:
    """`train_grpo` with the mistake of that letter. Raises UserError for an unknown letter."""
    with planted(LAB.run(letter).instead):
        return train_grpo(*models, **options)
