"""The failure lab of lesson 05: PPO trained for real with one mistake planted, under a letter that does not tell which.

    from minirlhf_course import failure_lab

    result = failure_lab.train("C", "CartPole-v1", PPOConfig(), seed=0)   # the call and the result of train_ppo
    print(failure_lab.reveal("C"))                                        # after you have made up your mind

A mistake is a wrong version of one function that `minirlhf.control.ppo` calls (`gae` or `ppo_loss`), put in its place
while the run lasts. The algorithm itself is the package's, untouched. Reading on spoils the lab.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from minirlhf.control import ppo
from minirlhf.control.environments import Environment
from minirlhf.control.ppo import PPOConfig, train_ppo
from minirlhf.control.run import Result
from minirlhf.errors import UserError
from minirlhf.losses import clipped_surrogate, ppo_loss
from minirlhf.returns import gae, whiten

Pair = tuple[Tensor, Tensor]
Loss = tuple[Tensor, dict[str, Tensor]]

# --- Wrong versions of gae: rewards, values, ends [N, T] -> (advantages, returns). ---


def targets_from_whitened(rewards: Tensor, values: Tensor, ends: Tensor, *, mask: Tensor, **options: Any) -> Pair:
    advantages, _ = gae(rewards, values, ends, mask=mask, **options)
    advantages = whiten(advantages, mask)
    return advantages, advantages + values


def reward_minus_value(rewards: Tensor, values: Tensor, ends: Tensor, **options: Any) -> Pair:
    _, returns = gae(rewards, values, ends, **options)
    return rewards - values, returns


def end_kept_with_the_next_observation(
    rewards: Tensor, values: Tensor, ends: Tensor, *, mask: Tensor, truncated_values: Tensor, **options: Any
) -> Pair:
    # Here a reset takes a column of its own, so that the next episode's first observation is two columns on.
    late = torch.zeros_like(ends)
    late[:, 2:] = ends[:, :-2]
    return gae(rewards, values, late, **options)


def termination_as_truncation(
    rewards: Tensor, values: Tensor, ends: Tensor, *, last_values: Tensor, truncated_values: Tensor, **options: Any
) -> Pair:
    after = torch.cat((values[:, 1:], last_values.unsqueeze(1)), 1)
    bootstrapped = torch.where(ends, after, 0.0)
    return gae(rewards, values, ends, last_values=last_values, truncated_values=bootstrapped, **options)


def truncation_as_termination(
    rewards: Tensor, values: Tensor, ends: Tensor, *, truncated_values: Tensor, **options: Any
) -> Pair:
    return gae(rewards, values, ends, **options)


# --- Wrong versions of ppo_loss: the same metrics, another policy term. ---


def _with_policy_term(term: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> Callable[..., Loss]:
    def wrong(
        logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_range: float, **options: Any
    ) -> Loss:
        loss, metrics = ppo_loss(logprobs, old_logprobs, advantages, mask, clip_range=clip_range, **options)
        right = clipped_surrogate(logprobs, old_logprobs, advantages, clip_range=clip_range)
        return loss - right + term(logprobs, old_logprobs, advantages, clip_range), metrics

    return wrong


@_with_policy_term
def max_for_min(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    ratio = (logprobs - old_logprobs).exp()
    return -torch.maximum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages).mean()


@_with_policy_term
def minus_missing(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    ratio = (logprobs - old_logprobs).exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages).mean()


def ratio_of_the_policy_to_itself(logprobs: Tensor, old_logprobs: Tensor, *others: Any, **options: Any) -> Loss:
    return ppo_loss(logprobs, logprobs.detach(), *others, **options)


# --- The lab. ---


@dataclass(frozen=True)
class Planted:
    """A mistake: what it is, the clue in the curves, and which functions of `minirlhf.control.ppo` it replaces."""

    mistake: str
    clue: str
    instead: dict[str, Callable[..., Any]]


RUNS: dict[str, Planted] = {
    "A": Planted(
        "The ratio is always 1: `old_logprobs` is computed again from the new policy, `ratio = (logprobs - "
        "logprobs.detach()).exp()`. The clip never acts, and ten epochs on one batch run away.",
        "approx_kl and clip_fraction are exactly 0 in every update, while the entropy falls: the policy does move, and "
        "the meter does not. In a healthy run both rise as soon as the first minibatch is over.",
        {"ppo_loss": ratio_of_the_policy_to_itself},
    ),
    "B": Planted(
        "A = r - V in place of G - V: `advantages = rewards - values`. On CartPole r is always 1, so this depends on "
        "the state alone and says nothing about the action: a baseline with nothing to subtract it from, whose mean "
        "gradient is 0 (lesson 02). The policy wanders.",
        "nothing looks sick, and nothing is learned: KL and clip fraction begin *below* the healthy band, the entropy "
        "drifts, and the greedy return sits at 9 (a nearly random policy with a favourite action) or wherever chance "
        "took it.",
        {"gae": reward_minus_value},
    ),
    "C": Planted(
        "`torch.maximum` for `torch.minimum` in the clipped loss. The optimist's choice: the slope is full where it "
        "should stop, and zero where it should pull back.",
        "the first KL is tens of times too large, the clip fraction six times, and they stay so for many updates, "
        "because nothing ends a step. The entropy falls off a cliff, and once it is 0 nothing new is tried any more: "
        "all meters come to rest, with the return at 9.",
        {"ppo_loss": max_for_min},
    ),
    "D": Planted(
        "None: this run is healthy, under other seeds than the band.",
        "every curve runs inside the grey band, or close to it. (Leaving alone what works is part of the job.)",
        {},
    ),
    "E": Planted(
        "Value targets from whitened advantages: `returns = whiten(advantages) + values`. The value network learns "
        "numbers of the wrong size.",
        "the value loss is near 1/2 from the first update to the last: half the variance of a whitened advantage. It "
        "is small because the targets run along with the values, and the explained variance is measured against the "
        "same wrong targets, so it looks better than healthy. The return still rises, only later: on this task "
        "whitening hides the damage.",
        {"gae": targets_from_whitened},
    ),
    "F": Planted(
        "The minus sign is missing: `loss = torch.minimum(...).mean()`. The optimizer makes good actions rarer.",
        "the return falls to 9 at once, the fastest way to drop the pole, and hardly ever leaves it. The clip is gone "
        "with the sign: the first KL is tens of times too large, and that single update takes nearly all the entropy. "
        "Then it is quiet, unlike C, with an explained variance near 1: falling over at once is easy to predict.",
        {"ppo_loss": minus_missing},
    ),
    "G": Planted(
        "Termination treated as truncation: the value of the last observation is added where the pole fell, "
        "`truncated_values = where(ends, V(s'), 0)`. Falling costs little, since the value network promises a future "
        "after it.",
        "all policy meters look well, but the return stalls or comes and goes. And while the policy is still bad, the "
        "value loss is already tiny: every state is worth about 1 / (1 - gamma) = 100, whatever the policy does, and a "
        "constant is easy to learn. (A healthy run ends like that too, once every episode lasts 500 steps: then all "
        "states really are worth the same, and the explained variance means nothing.)",
        {"gae": termination_as_truncation},
    ),
    "H": Planted(
        "done and next_done swapped: the flag that belongs to the next observation is used as this step's, so the "
        "first step of each episode counts as its last, and the real last step is credited with the next episode.",
        "the least visible of all: it learns, only later, and then the return is perfect. But the value loss stays at "
        "20 to 100 where a healthy one falls to nearly 0, because the first step of each episode has the target 1 "
        "and all others 100. Only a test is sure to find it: two episodes in one row, worked by hand.",
        {"gae": end_kept_with_the_next_observation},
    ),
}
"""The runs of the lab by letter."""


@contextmanager
def planted(instead: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """While it lasts, `minirlhf.control.ppo` calls these functions in place of its own."""
    with ExitStack() as stack:
        for name, function in instead.items():
            stack.enter_context(patch.object(ppo, name, function))
        yield


def _run(letter: str) -> Planted:
    if letter not in RUNS:
        raise UserError(f"the failure lab has the runs {', '.join(RUNS)}, not {letter!r}")
    return RUNS[letter]


def train(letter: str, env: Environment, config: PPOConfig | None = None, **options: Any) -> Result:
    """`train_ppo` with the mistake of that letter. Raises UserError for an unknown letter.

    Example:
        >>> train("A", "CartPole-v1", PPOConfig(total_steps=2_000), seed=0).history[0]["policy/clip_fraction"]
        0.0
    """
    with planted(_run(letter).instead):
        return train_ppo(env, config, **options)


def reveal(letter: str) -> str:
    """What was planted and which curve tells, in Markdown."""
    run = _run(letter)
    return f"**{letter}.** {run.mistake}\n\n*The clue:* {run.clue}"
