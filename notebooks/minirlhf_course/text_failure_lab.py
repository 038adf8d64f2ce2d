"""The failure lab of lesson 09: PPO on answers with one mistake planted, under a letter that does not tell which.

    from minirlhf_course import text_failure_lab

    text_failure_lab.train("B", policy, value_model, ...)   # the call and the result of train_rlhf
    print(text_failure_lab.match({"B": 3}))                 # your answers, by number
    print(text_failure_lab.reveal("B"))                     # after you have made up your mind

As in `failure_lab`, a mistake is a wrong version of one function that `minirlhf.language.rlhf` calls, put in its place
while the run lasts. Reading on spoils the lab.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minirlhf.kl import kl_rewards
from minirlhf.language import rlhf
from minirlhf.language.generation import Samples, sample
from minirlhf.language.rlhf import train_rlhf
from minirlhf.returns import gae, whiten
from minirlhf_course.failure_lab import Lab, Planted


def kl_paid_out(scores: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float) -> Tensor:
    return kl_rewards(scores, old_logprobs, ref_logprobs, mask, -beta)


def score_at_the_first_token(
    scores: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float
) -> Tensor:
    rewards = kl_rewards(torch.zeros_like(scores), old_logprobs, ref_logprobs, mask, beta)
    rewards[:, 0] += scores
    return rewards


def sampled_colder(model: Any, prompts: Any, *, temperature: float = 1.0, **options: Any) -> Samples:
    return sample(model, prompts, temperature=0.7 * temperature, **options)


def unchecked(*arguments: Any) -> None:
    """In place of the check that stops a run whose first ratio is not 1."""


def targets_from_whitened(
    rewards: Tensor, values: Tensor, ends: Tensor, *, mask: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    advantages, _ = gae(rewards, values, ends, mask=mask, **options)
    advantages = whiten(advantages, mask)
    return advantages, torch.where(mask, advantages + values, 0.0)


RUNS: dict[str, Planted] = {
    "A": Planted(
        4,
        "sampled at temperature 0.7, updated with log-probabilities at 1",
        "The answers are sampled at temperature 0.7, the log-probabilities of the update are taken at 1 (leaving "
        "top-k on while sampling does the same): the data come from another policy than the one that is updated.",
        "the first minibatch of the first step, where nothing has been learned yet: its ratio is not 1, and the KL to "
        "the reference is not 0. The entropy begins below the band and goes on falling: colder samples are surer, and "
        "each update makes them surer still. The score rises as if all were well.",
        "Look at the first minibatch of the first step, where nothing has been learned yet.",
        {"sample": sampled_colder, "_check_first_ratio": unchecked},
    ),
    "B": Planted(
        2,
        "the KL reward has the wrong sign",
        "The sign of the KL reward: `+beta * d`. The policy is paid for leaving the reference.",
        "the KL climbs and never levels off: being unlike the SFT model has become a way to earn. With no reward but "
        "the KL (lesson 09, probe 5) it rises where it should fall. In the end the answers hold nothing that the "
        "reward model knows: the entropy is far above the band, and the score falls as well.",
        "Look at the KL: what would make it climb for ever?",
        {"kl_rewards": kl_paid_out},
    ),
    "C": Planted(
        1,
        "nothing is wrong",
        "None: this run is healthy, with other seeds than the band's.",
        "every curve runs inside the band, or close to it: two more seeds may well leave what five have shown.",
        "Hold each curve against the grey band before you accuse it.",
        {},
    ),
    "D": Planted(
        3,
        "the score is paid at the first token, not at the last",
        "The score is paid at the first token, not at the last: every later token hears of the KL alone.",
        "the score hardly rises, because the first token is credited with all that the others did. And the values: "
        "they come from a reward model, which expects a score that has been paid already, so the explained variance "
        "begins far below the band. Then the value loss falls below it: a return of nearly 0 is easy to predict.",
        "Look at the explained variance of the first step: what did the values expect, and what came?",
        {"kl_rewards": score_at_the_first_token},
    ),
    "E": Planted(
        5,
        "value targets from whitened advantages",
        "Value targets from whitened advantages: `returns = whiten(advantages) + values`.",
        "the value loss: its targets move along with the values, so it can't fall (half the variance of a whitened "
        "advantage is 1/2, before the value clip). The explained variance is measured against the same targets, and "
        "looks good from the first step, where healthy runs are below 0. With values that learn nothing, the score "
        "hardly rises.",
        "The policy is not off the scale. Look at the value loss: does it ever fall?",
        {"gae": targets_from_whitened},
    ),
}
"""The runs of the lab by letter."""


LAB = Lab(rlhf, RUNS)
planted, match, reveal = LAB.planted, LAB.match, LAB.reveal


def train(letter: str, *models: Any, **options: Any) -> Any:
    """`train_rlhf` with the mistake of that letter. Raises UserError for an unknown letter."""
    with planted(LAB.run(letter).instead):
        return train_rlhf(*models, **options)
