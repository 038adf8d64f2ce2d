"""The failure lab of lesson 13: DPO with one mistake planted, under a letter that does not tell which.

    from minirlhf_course import dpo_failure_lab

    dpo_failure_lab.train("B", policy, reference, ...)    # the call and the result of train_dpo
    print(dpo_failure_lab.match({"B": 3}))                # your answers, by number
    print(dpo_failure_lab.reveal("B"))                    # after you have made up your mind

As in `failure_lab`, a mistake is a wrong version of one function that `minirlhf.language.dpo` calls, put in its place
while the run lasts. Reading on spoils the lab.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from minirlhf.language import dpo
from minirlhf.language.dpo import train_dpo
from minirlhf.losses import implicit_rewards, ranking_loss
from minirlhf_course.failure_lab import Lab, Planted


def reference_missing(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float) -> Tensor:
    return implicit_rewards(logprobs, ref_logprobs * 0, mask, beta)


def reference_that_moves(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float) -> Tensor:
    return implicit_rewards(logprobs, logprobs, mask, beta)


def mean_over_padding(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float) -> Tensor:
    return implicit_rewards(logprobs, ref_logprobs, mask, beta) / mask.shape[1]


def swapped(rewards: Tensor, scores: Tensor, *rest: Any, **options: Any) -> Tensor:
    return ranking_loss(rewards, -scores, *rest, **options)


RUNS: dict[str, Planted] = {
    "A": Planted(4, "the reward is a mean over the columns, padding included", "", "", "",
                 {"implicit_rewards": mean_over_padding}),
    "B": Planted(3, "the reference moves: it is the policy itself", "", "", "",
                 {"implicit_rewards": reference_that_moves}),
    "C": Planted(2, "chosen and rejected are swapped", "", "", "", {"ranking_loss": swapped}),
    "D": Planted(1, "nothing is wrong", "", "", "", {}),
    "E": Planted(5, "the reference is missing", "", "", "", {"implicit_rewards": reference_missing}),
}  # fmt: skip
"""The runs of the lab by letter."""


LAB = Lab(dpo, RUNS)
planted, match, reveal = LAB.planted, LAB.match, LAB.reveal


def train(letter: str, *models: Any, **options: Any) -> Any:
    """`train_dpo` with the mistake of that letter. Raises UserError for an unknown letter."""
    with planted(LAB.run(letter).instead):
        return train_dpo(*models, **options)
