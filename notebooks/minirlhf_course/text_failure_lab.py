"""The failure lab of lesson 09: PPO on answers with one mistake planted, under a letter that does not tell which.

    from minirlhf_course import text_failure_lab

    text_failure_lab.train("B", policy, value_model, ...)   # the call and the result of train_rlhf
    print(text_failure_lab.match({"B": 3}))                 # your answers, by number
    print(text_failure_lab.reveal("B"))                     # after you have made up your mind

As in `failure_lab`, a mistake is a wrong version of one function that `minirlhf.language.rlhf` or `rollouts` calls, put
in its place while the run lasts. Reading on spoils the lab.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minirlhf.kl import kl_rewards
from minirlhf.language import rlhf, rollouts
from minirlhf.language.generation import Samples, sample
from minirlhf.language.rlhf import train_rlhf
from minirlhf.returns import gae, whiten
from minirlhf_course.failure_lab import Lab, Planted, curves


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
        "the first minibatch of the first step, where nothing has been learned yet: its ratio is not 1, and the KL "
        "to the reference is not 0. The entropy begins below the band and goes on falling: colder samples are "
        "surer, and each update makes them surer still. The score rises as if all were well. *How sure:* certain, "
        "from the first minibatch of one seed: that ratio is 1 by definition, and here it is off by 0.79 or more "
        "where healthy runs are off by a hundred thousandth. That sampling and training disagree is proved; that it "
        "is the temperature is not. Colder sampling fits the low entropy, but only a comparison of the "
        "log-probabilities token by token would tell it from top-k.",
        "Look at the first minibatch of the first step, where nothing has been learned yet.",
        {"sample_by_rank": sampled_colder, "_check_first_ratio": unchecked},
    ),
    "B": Planted(
        2,
        "the KL reward has the wrong sign",
        "The sign of the KL reward: `+beta * d`. The policy is paid for leaving the reference.",
        "the KL climbs and never levels off: being unlike the SFT model has become a way to earn. With no reward "
        "but the KL (lesson 09, probe 5) it rises where it should fall. In the end the answers hold nothing that "
        "the reward model knows: the entropy is far above the band, and the score falls as well. *How sure:* very "
        "sure by the end: a KL above 120, where healthy runs have below 4. A beta that is merely too small is ruled "
        "out by the sweep above: with beta 0 the KL ends near 10. More than no penalty at all can only be a reward "
        "for leaving. Probe 5 would prove it in seconds.",
        "Look at the KL: what would make it climb for ever?",
        {"kl_rewards": kl_paid_out},
    ),
    "C": Planted(
        1,
        "nothing is wrong",
        "None: this run is healthy, with other seeds than the band's.",
        "every curve runs inside the band, or close to it: two more seeds may well leave what five have shown. *How "
        "sure:* never quite: two seeds within the band of five say that no *large* mistake is left. One that costs "
        "a tenth of the score would look the same. Here you know by elimination, and a real run has no such list.",
        "Hold each curve against the grey band before you accuse it.",
        {},
    ),
    "D": Planted(
        3,
        "the score is paid at the first token, not at the last",
        "The score is paid at the first token, not at the last: every later token hears of the KL alone.",
        "the score hardly rises, because the first token is credited with all that the others did. And the values: "
        "they come from a reward model, which expects a score that has been paid already, so the explained variance "
        "begins far below the band. Then the value loss falls below it: a return of nearly 0 is easy to predict. "
        "*How sure:* fairly: both seeds are far outside of the band, in two columns. But the explained variance "
        "alone could also come from a fresh value network (the frogs began near -22), and a small value loss from "
        "rewards that are nearly 0. Only the two together point here, and one look at an answer's rewards, token by "
        "token, is what settles it.",
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
        "hardly rises. *How sure:* quite, if one looks at the whole curve: no single value loss of 0.42 to 0.51 "
        "is suspicious, since healthy runs pass through there on their way down. That it *stays* there "
        "is, and 1/2 is a number with a reason. A value network that starts better than usual would explain the "
        "first explained variance, but not a loss that never falls.",
        "The policy is not off the scale. Look at the value loss: does it ever fall?",
        {"gae": targets_from_whitened},
    ),
}
"""The runs of the lab by letter."""


LAB = Lab((rlhf, rollouts), RUNS)
planted, match, reveal = LAB.planted, LAB.match, LAB.reveal


Evidence = tuple[str, str, str, slice]
EVIDENCE: tuple[Evidence, ...] = (
    ("A", "first ratio - 1, any step", "policy/first_ratio_error", slice(None)),
    ("A", "KL before any update", "objective/kl", slice(1)),
    ("A", "entropy, last 5 steps", "objective/entropy", slice(-5, None)),
    ("B", "KL, last 5 steps", "objective/kl", slice(-5, None)),
    ("B", "entropy, last 5 steps", "objective/entropy", slice(-5, None)),
    ("C", "KL, last 5 steps", "objective/kl", slice(-5, None)),
    ("D", "expl. variance, first 4 steps", "value/explained_variance", slice(4)),
    ("D", "value loss, last 5 steps", "value/loss", slice(-5, None)),
    ("E", "value loss, any step", "value/loss", slice(None)),
    ("E", "expl. variance, first step", "value/explained_variance", slice(1)),
    *((letter, "score, last 5 steps", "objective/score", slice(-5, None)) for letter in RUNS),
)
"""What the clues rest on: the letter, what is measured, its metric, and at which steps."""


def evidence(
    rows: Sequence[Mapping[str, str]], lines: Sequence[Evidence] = EVIDENCE
) -> list[tuple[str, str, np.ndarray, np.ndarray]]:
    """For each line: the letter, what is measured, its numbers and the healthy runs'.

    A number per step where the line is about any step, otherwise the mean of its steps, one per seed.
    """
    found = []
    for letter, what, metric, steps in lines:
        own, healthy = (curves(rows, run, metric, "step")[1][:, steps] for run in (letter, "healthy"))
        if steps != slice(None):
            own, healthy = own.mean(1), healthy.mean(1)
        found.append((letter, what, own, healthy))
    return found


def train(letter: str, *models: Any, **options: Any) -> Any:
    """`train_rlhf` with the mistake of that letter. Raises UserError for an unknown letter."""
    with planted(LAB.run(letter).instead):
        return train_rlhf(*models, **options)
