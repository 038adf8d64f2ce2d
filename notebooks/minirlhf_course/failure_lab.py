"""The failure lab of lesson 05: PPO trained for real with one mistake planted, under a letter that does not tell which.

    from minirlhf_course import failure_lab

    result = failure_lab.train("C", "CartPole-v1", PPOConfig(), seed=0)   # the call and the result of train_ppo
    print(failure_lab.match({"A": 3, "C": 5}))                            # your answers, by number
    print(failure_lab.reveal("C"))                                        # after you have made up your mind

A mistake is a wrong version of one function that `minirlhf.control.ppo` calls (`gae` or `ppo_loss`), put in its place
while the run lasts. The algorithm itself is the package's, untouched. `Planted`, `Lab`, `Meter`, `curves` and `draw`
serve lesson 09's lab too (`text_failure_lab`). Reading on spoils the lab.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from minirlhf.control import ppo
from minirlhf.control.environments import Environment
from minirlhf.control.ppo import PPOConfig, train_ppo
from minirlhf.control.run import Result
from minirlhf.errors import UserError
from minirlhf.losses import clipped_surrogate, ppo_loss
from minirlhf.returns import gae, whiten
from minirlhf_course.plotting import COLOURS, INK, panels, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pair = tuple[Tensor, Tensor]
Loss = tuple[Tensor, dict[str, Tensor]]

# --- What a lab is, here and in lesson 09. ---


class Planted(NamedTuple):
    """A mistake, or none, under a letter."""

    number: int
    """Its place in the lesson's list of suspects."""
    name: str
    """Its line there."""
    mistake: str
    clue: str
    """What in the curves gives it away."""
    look: str
    """Where to look again, for who took it for another."""
    instead: dict[str, Callable[..., Any]]
    """The trainer's functions that it replaces."""


@dataclass(frozen=True)
class Lab:
    """Runs under letters, each with something planted in the modules that train."""

    trainers: tuple[ModuleType, ...]
    runs: dict[str, Planted]

    def run(self, letter: str) -> Planted:
        """The run of that letter. Raises UserError for an unknown one."""
        if letter not in self.runs:
            raise UserError(f"the failure lab has the runs {', '.join(self.runs)}, not {letter!r}")
        return self.runs[letter]

    @contextmanager
    def planted(self, instead: dict[str, Callable[..., Any]]) -> Iterator[None]:
        """While it lasts, the trainer calls these functions in place of its own."""
        with ExitStack() as stack:
            for name, function in instead.items():
                callers = [module for module in self.trainers if hasattr(module, name)]
                assert callers, name
                for module in callers:
                    stack.enter_context(patch.object(module, name, function))
            yield

    def reveal(self, letter: str) -> str:
        """What was planted and which curve tells, in Markdown."""
        run = self.run(letter)
        return f"**{letter}.** {run.mistake}\n\n*The clue:* {run.clue}"

    def match(self, answers: Mapping[str, int | None]) -> str:
        """What the lab thinks of your answers, numbers from the lesson's list by letter, in Markdown.

        A right one is told its clue, a wrong one where to look again; which number would have been right is not told.
        """
        suspects = {run.number: run.name for run in self.runs.values()}
        given = {letter: number for letter, number in answers.items() if number is not None}
        if not given:
            return f"No answers yet: a number from 1 to {len(suspects)} for each letter, then run this cell again."
        said, right = [], 0
        for letter, number in given.items():
            run = self.run(letter)
            if number not in suspects:
                said.append(f"**{letter}**: the list goes from 1 to {len(suspects)}, there is no {number}.")
            elif number == run.number:
                right += 1
                said.append(f"**{letter}**: right, {run.name}. *The clue:* {run.clue}")
            else:
                said.append(f"**{letter}**: not {number}, {suspects[number]}. {run.look}")
        twice = sorted(number for number in suspects if list(given.values()).count(number) > 1)
        said += [f"Each is used once, and you have {number} more than once." for number in twice]
        return "\n\n".join([*said, f"**{right} of {len(suspects)} right.**"])


class Meter(NamedTuple):
    """A column of the lab's page."""

    metric: str
    name: str
    """Its title, with the unit."""
    low: float
    high: float
    """Of the axis; what leaves it is drawn at its edge."""
    ticks: tuple[float, ...]
    log: bool = False


def curves(rows: Sequence[Mapping[str, str]], run: str, metric: str, x: str) -> tuple[Any, Any]:
    """A run's metric from the rows of a file: the mean x of its points [P], and the values [seeds, P].

    Rows without the metric are left out, and a longer seed is cut where the shortest ends.

    >>> rows = [{"run": "A", "seed": s, "step": "1", "kl": kl} for s, kl in (("0", "0.1"), ("1", "0.3"), ("1", ""))]
    >>> [part.tolist() for part in curves(rows, "A", "kl", "step")]
    [[1.0], [[0.1], [0.3]]]
    """
    kept = [row for row in rows if row["run"] == run and row[metric] != ""]
    seeds = [[row for row in kept if row["seed"] == seed] for seed in sorted({row["seed"] for row in kept})]
    length = min(len(seed) for seed in seeds)
    at, values = (np.array([[float(row[key]) for row in seed[:length]] for seed in seeds]) for key in (x, metric))
    return at.mean(0), values


def draw(
    rows: Sequence[Mapping[str, str]], letters: Sequence[str], meters: Sequence[Meter], x: str, x_label: str
) -> Figure:
    """A page of the lab: a row of panels per run, a column per meter, a line per seed; grey: the healthy
    runs, from lowest to highest, and their median."""
    with style():
        figure, axes = panels(len(letters), len(meters), width=10 / len(meters), height=1.5)
        for column, meter in zip(axes.T, meters, strict=True):
            low, high = meter.low, meter.high
            at, healthy = curves(rows, "healthy", meter.metric, x)
            healthy = healthy.clip(low, high)
            for axis, letter in zip(column, letters, strict=True):
                axis.fill_between(at, healthy.min(0), healthy.max(0), color="#d3d6db", linewidth=0, antialiased=False)
                axis.plot(at, np.median(healthy, 0), color="#9a9fa8", linewidth=1.2, antialiased=False)
                steps, values = curves(rows, letter, meter.metric, x)
                axis.plot(steps, values.clip(low, high).T, color=COLOURS["ppo"], linewidth=0.9, antialiased=False)
                axis.set_yscale("log" if meter.log else "linear")
                room = 0.04 * (high - low)  # so that a line at the edge is seen whole
                axis.set_ylim(*(low / 1.6, high * 1.6) if meter.log else (low - room, high + room))
                axis.set_yticks(meter.ticks, [f"{tick:g}" for tick in meter.ticks])
                axis.minorticks_off()
                axis.grid(False)
                axis.locator_params(axis="x", nbins=3)
                axis.xaxis.set_major_formatter("{x:,.0f}")
                axis.tick_params(labelbottom=letter == letters[-1])
            column[0].set_title(meter.name, fontsize=10)
        for row, letter in zip(axes, letters, strict=True):
            row[0].set_ylabel(letter, rotation=0, fontsize=15, color=INK, labelpad=14, va="center")
        figure.supxlabel(x_label, fontsize=9.5)
    return figure


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


# --- The runs. ---

RUNS: dict[str, Planted] = {
    "A": Planted(
        4,
        "the ratio is always 1: `old_logprobs` is computed again from the new policy",
        "The ratio is always 1: `old_logprobs` is computed again from the new policy, `ratio = (logprobs - "
        "logprobs.detach()).exp()`. The clip never acts, and ten epochs on one batch run away.",
        "the KL is exactly 0 in every update (its line lies on the floor of the panel), and so is the clip fraction, "
        "while the entropy falls: the policy does move, and the meter does not. In a healthy run both rise as soon as "
        "the first minibatch is over. *How sure:* certain. No working trainer has a KL of exactly 0, and no other run "
        "here has one.",
        "One of its meters stands still in every update while another moves. How can both be true?",
        {"ppo_loss": ratio_of_the_policy_to_itself},
    ),
    "B": Planted(
        5,
        "`A = r - V` in place of `G - V`",
        "A = r - V in place of G - V: `advantages = rewards - values`. On CartPole r is always 1, so this depends on "
        "the state alone and says nothing about the action: a baseline with nothing to subtract it from, whose mean "
        "gradient is 0 (lesson 02). The policy wanders.",
        "nothing looks sick, and nothing is learned: the KL begins *below* the healthy band, the entropy drifts, and "
        "the greedy return sits at 9 (a nearly random policy with a favourite action) or wherever chance took it. *How "
        "sure:* fairly. Its first KL lies between A's 0 and all others, but too low a learning rate would push it down "
        "as well; what settles it is a step by hand.",
        "No update is too large, and yet the return goes nowhere. What does a policy have to hear from an advantage?",
        {"gae": reward_minus_value},
    ),
    "C": Planted(
        3,
        "`max` for `min` in the clipped loss",
        "`torch.maximum` for `torch.minimum` in the clipped loss. The optimist's choice: the slope is full where it "
        "should stop, and zero where it should pull back.",
        "the first KL is tens of times too large and the next ones are no better, because nothing ends a step. The "
        "entropy falls off a cliff, and once it is 0 nothing new is tried any more: all meters come to rest, with the "
        "return at 9. *How sure:* that nothing holds the step, certain; that it is `max` for `min`, less so. No clip "
        "at all, or a rate ten times too high, could do the same, and only F's lower entropy tells these two apart "
        "here.",
        "Two runs begin with a KL that is far too large. Compare how much entropy each has left after one update.",
        {"ppo_loss": max_for_min},
    ),
    "D": Planted(
        1,
        "nothing is wrong",
        "None: this run is healthy, under other seeds than the band.",
        "every curve runs inside the grey band, or close to it. (Leaving alone what works is part of the job.) *How "
        "sure:* never quite. Its return is no better than that of H and of two seeds of E: curves can show a mistake, "
        "and not that there is none.",
        "Hold each curve against the grey band before you accuse it.",
        {},
    ),
    "E": Planted(
        6,
        "value targets from whitened advantages",
        "Value targets from whitened advantages: `returns = whiten(advantages) + values`. The value network learns "
        "numbers of the wrong size.",
        "the value loss is near 1/2 from the first update to the last: half the variance of a whitened advantage. It "
        "is small because the targets run along with the values. (The explained variance, measured against the same "
        "wrong targets, looks better than healthy.) The return still rises, only later: on this task whitening hides "
        "the damage. *How sure:* certain from the first update on, where every other run's value loss is some fifty "
        "times as large.",
        "The policy's meters are well. Look at the value loss of the first updates, where nothing is learned yet.",
        {"gae": targets_from_whitened},
    ),
    "F": Planted(
        2,
        "the minus sign of the policy loss is missing",
        "The minus sign is missing: `loss = torch.minimum(...).mean()`. The optimizer makes good actions rarer.",
        "the return falls to 9 at once, the fastest way to drop the pole, and hardly ever leaves it. The clip is gone "
        "with the sign: the first KL is tens of times too large, and that single update takes nearly all the entropy. "
        "The value loss drops with it: falling over at once is easy to predict. *How sure:* quite. A return that falls "
        "below a random policy's needs a sign; but rewards or advantages with the wrong sign would draw the same "
        "curves.",
        "Two runs begin with a KL that is far too large. Compare how much entropy each has left after one update.",
        {"ppo_loss": minus_missing},
    ),
    "G": Planted(
        7,
        "termination treated as truncation: it bootstraps where the pole fell",
        "Termination treated as truncation: the value of the last observation is added where the pole fell, "
        "`truncated_values = where(ends, V(s'), 0)`. Falling costs little, since the value network promises a future "
        "after it.",
        "all policy meters look well, but the return stalls or comes and goes. And while the policy is still bad, the "
        "value loss falls below the healthy one: every state is worth about 1 / (1 - gamma) = 100, whatever the policy"
        " does, and a constant is easy to learn. (A healthy run ends like that too, once every episode lasts 500 "
        "steps: then all states really are worth the same, and the explained variance means nothing.) *How sure:* only"
        " with two meters. Among the runs whose first update looks healthy no other has a value loss this small after "
        "20 to 30 updates; C and F are as low, for another reason.",
        "Look at the value loss while the return is still bad. Which targets are that easy to learn?",
        {"gae": termination_as_truncation},
    ),
    "H": Planted(
        8,
        "`done` and `next_done` swapped: the end is marked a step late",
        "done and next_done swapped: the flag that belongs to the next observation is used as this step's, so the "
        "first step of each episode counts as its last, and the real last step is credited with the next episode.",
        "the least visible of all: it learns, only later, and then the return is perfect. But the value loss stays in "
        "the tens where a healthy one falls to nearly 0, because the first step of each episode has the target 1 and "
        "all others 100. Only a test is sure to find it: two episodes in one row, worked by hand. *How sure:* that the "
        "targets are wrong, yes. Which flag is shifted no curve tells.",
        "Look at the value loss at the end, where the return is perfect. What can still surprise the value network?",
        {"gae": end_kept_with_the_next_observation},
    ),
}
"""The runs of the lab by letter."""


NUMBERS: tuple[tuple[str, str, str, Callable[[Any], Any]], ...] = (
    ("A", "largest KL of an update", "policy/approx_kl", lambda x: x.max(1)),
    ("B", "KL of the first update", "policy/approx_kl", lambda x: x[:, 0]),
    ("B", "median return", "return", lambda x: np.median(x, 1)),
    ("C", "entropy after one update", "policy/entropy", lambda x: x[:, 1]),
    ("D", "return at the end", "return", lambda x: x[:, -5:].mean(1)),
    ("E", "value loss of the first update", "value/loss", lambda x: x[:, 0]),
    ("F", "entropy after one update", "policy/entropy", lambda x: x[:, 1]),
    ("G", "value loss, updates 20 to 30", "value/loss", lambda x: np.median(x[:, 20:30], 1)),
    ("H", "value loss, last ten updates", "value/loss", lambda x: np.median(x[:, -10:], 1)),
)
"""What the clues speak of: a letter, the number in words, the metric, and the number of each seed from its curve."""


def evidence(rows: Sequence[Mapping[str, str]]) -> str:
    """The numbers behind the clues: of the run's own seeds, and of every other run that has a seed among them."""
    lines = [f"{'':<34}{'lowest':>9}{'highest':>9}   between them, or next to them"]
    for letter, words, metric, of in NUMBERS:
        own, others = of(curves(rows, letter, metric, "env_steps")[1]), []
        for run in ("healthy", *RUNS):
            others += [(x, run) for x in of(curves(rows, run, metric, "env_steps")[1]) if run != letter]
        among = sorted({run for x, run in others if own.min() <= x <= own.max()})
        nearest, run = min(others, key=lambda pair: min(abs(pair[0] - x) for x in own))
        told = "seeds of " + ", ".join(among) if among else f"nobody; next {nearest:.3g} ({run})"
        lines.append(f"{letter}  {words:<31}{own.min():9.3g}{own.max():9.3g}   {told}")
    return "\n".join(lines)


LAB = Lab((ppo,), RUNS)
planted, match, reveal = LAB.planted, LAB.match, LAB.reveal


def train(letter: str, env: Environment, config: PPOConfig | None = None, **options: Any) -> Result:
    """`train_ppo` with the mistake of that letter. Raises UserError for an unknown letter.

    Example:
        >>> train("A", "CartPole-v1", PPOConfig(total_steps=2_000), seed=0).history[0]["policy/clip_fraction"]
        0.0
    """
    with planted(LAB.run(letter).instead):
        return train_ppo(env, config, **options)
