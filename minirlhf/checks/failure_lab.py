"""The failure lab of lesson 05: PPO trained for real with one mistake planted, under a letter that does not tell which.

    from minirlhf.checks import failure_lab

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
from minirlhf.control.policies import Environment
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
        "approx_kl and clip_fraction are exactly 0, in every update, while the entropy falls: the policy does move, "
        "and the meter does not. A healthy run moves both after the first minibatch.",
        {"ppo_loss": ratio_of_the_policy_to_itself},
    ),
    "B": Planted(
        "A = r - V in place of G - V: `advantages = rewards - values`. All rewards after the first are forgotten, so "
        "the best state is the one that promises least.",
        "the return sinks below that of a policy that knows nothing (about 20), to 9, the fastest way to fall. But KL "
        "and clip fraction are healthy and the entropy falls slowly: the optimizer works well, on the wrong goal.",
        {"gae": reward_minus_value},
    ),
    "C": Planted(
        "`torch.maximum` for `torch.minimum` in the clipped loss. The optimist's choice: beyond the clip the slope is "
        "zero where it should pull back, and full where it should stop.",
        "KL and clip fraction are many times too large from the very first update: nothing stops a step. The entropy "
        "collapses within a few updates, and the return jumps between 9 and 500.",
        {"ppo_loss": max_for_min},
    ),
    "D": Planted(
        "None: this run is healthy, under other seeds than the band.",
        "every curve runs inside of the grey band, or near it. (Also a part of the job: not to mend what works.)",
        {},
    ),
    "E": Planted(
        "Value targets from whitened advantages: `returns = whiten(advantages) + values`. The value network learns "
        "numbers of size 1 where the returns are of size 100.",
        "the value loss is near 1/2 from the first update on, and stays: that is half the variance of a whitened "
        "advantage. It is small because the targets run along with the values, and the explained variance is measured "
        "against the same wrong targets. The return still rises: whitening hides most of the damage on this task.",
        {"gae": targets_from_whitened},
    ),
    "F": Planted(
        "The minus sign is missing: `loss = torch.minimum(...).mean()`. The optimizer makes good actions rarer.",
        "the return falls to 9 at once, as in B; but the clip is gone with the sign, so the first KL is a hundred "
        "times too large, and the entropy is 0 after a few updates. Explained variance near 1: falling over at once is "
        "easy to predict.",
        {"ppo_loss": minus_missing},
    ),
    "G": Planted(
        "Termination treated as truncation: the value of the last observation is added where the pole fell, "
        "`truncated_values = where(ends, V(s'), 0)`. Falling costs almost nothing, since the value network promises a "
        "future after it.",
        "KL, clip fraction and entropy look well, but the return stalls far below 500 or comes and goes, and the "
        "explained variance sinks to 0: every state is worth about 1 / (1 - gamma) = 100, whatever the policy does.",
        {"gae": termination_as_truncation},
    ),
    "H": Planted(
        "done and next_done swapped: the flag that belongs to the next observation is used as this step's, so the "
        "first step of each episode counts as its last, and the real last step gets the next episode's value.",
        "the least visible of all: it learns later than the band, with an explained variance below it at first. Only "
        "a test finds it surely: two episodes in one row, worked by hand.",
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
