"""Lesson 01, REINFORCE: the score, sampling, the return, the loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import log
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical
from torch.nn.functional import one_hot

from minirlhf import losses, returns
from minirlhf_course.checks.cases import bools, flags, generators, normal, random_cases, tensor
from minirlhf_course.checks.exercise import Case, exercise

# 1.1 -----------------------------------------------------------------------------------------------------------------


def _hot(logits: Tensor, actions: Tensor) -> Tensor:
    return one_hot(actions, logits.shape[-1]).to(logits.dtype)


def _score_cases() -> list[Case]:
    even = (tensor([0, 0]), torch.tensor([0]))
    odd = (tensor([0, log(3)]), torch.tensor([1]))
    cases = [
        Case("two equal logits, the first action", even, tensor([0.5, -0.5])),
        Case("probabilities 1/4 and 3/4, the second action", odd, tensor([-0.25, 0.25])),
    ]
    for (rows, actions), generator in zip(((3, 2), (2, 4), (6, 5)), generators(3), strict=True):
        drawn = torch.randint(actions, (rows,), generator=generator)
        cases.append(Case(f"random, {rows} rows of {actions} actions", (normal(generator, rows, actions), drawn)))
    return cases


@exercise(
    "1.1",
    "the score",
    difficulty=2,
    minutes=10,
    task="REINFORCE moves the policy along $\\nabla \\log \\pi(a)$, the *score*. For a softmax over logits $z$, "
    "work out "
    "$\\partial \\log \\pi(a) / \\partial z$ with pencil and paper, and write it without autograd.",
    cases=_score_cases,
    suspects={
        "The sign is wrong: it is the one-hot of the action minus the probabilities.": (
            lambda z, a: z.softmax(-1) - _hot(z, a)
        ),
        "The one-hot of the action is missing: its own logit appears in log pi(a) = z_a - logsumexp(z) as well.": (
            lambda z, a: -z.softmax(-1)
        ),
        "The probabilities are missing: logsumexp(z) depends on every logit.": lambda z, a: _hot(z, a),
        "This is the gradient of pi(a), not of log pi(a): divide by pi(a).": (
            lambda z, a: z.softmax(-1).gather(-1, a[:, None]) * (_hot(z, a) - z.softmax(-1))
        ),
        "The softmax runs over the rows, the states: each row is a distribution of its own, use softmax(-1).": (
            lambda z, a: _hot(z, a) - z.softmax(0)
        ),
        "Only the logit of the action taken moves: logsumexp(z) depends on the other logits too, and they get "
        "-pi(b).": lambda z, a: _hot(z, a) * (1 - z.softmax(-1)),
        "It subtracts log-probabilities: the derivative of logsumexp(z) is the probabilities, softmax(-1).": (
            lambda z, a: _hot(z, a) - z.log_softmax(-1)
        ),
        "It subtracts the logits: the derivative of logsumexp(z) is the probabilities, softmax(-1).": (
            lambda z, a: _hot(z, a) - z
        ),
        "This is the gradient of the mean over the rows: each row's own score is not divided by the number of rows.": (
            lambda z, a: (_hot(z, a) - z.softmax(-1)) / len(z)
        ),
    },
    hints=(
        "$\\log \\pi(a) = z_a - \\log \\sum_b e^{z_b}$. Differentiate the two terms one at a time.",
        "The first gives 1 for the action's own logit and 0 for others (`torch.nn.functional.one_hot`), the second "
        "gives "
        "`logits.softmax(-1)`.",
    ),
)
def score(logits: Tensor, actions: Tensor) -> Tensor:
    """The gradient of log pi(action) with respect to the logits: logits [N, A], actions [N] (int) give [N, A]."""
    return _hot(logits, actions) - logits.softmax(-1)


# 1.2 -----------------------------------------------------------------------------------------------------------------

DRAWS = 20_000


def _rows(*rows: list[float]) -> Tensor:
    return torch.tensor(rows).log().repeat_interleave(DRAWS, 0).requires_grad_()


def _sample_cases() -> list[Case]:
    half, third = [0.5, 0.25, 0.25], [0.2, 0.3, 0.5]
    return [
        Case(f"probabilities {half}, in {DRAWS} rows", (_rows(half),), rtol=0.08),
        Case("the same with 7 added to every logit", ((_rows(half) + 7).detach().requires_grad_(),), rtol=0.08),
        Case(f"half of the rows have probabilities {half}, half {third}", (_rows(half, third),), rtol=0.08),
    ]


def _sample_observe(result: Any, args: tuple[Any, ...]) -> Any:
    """How often each action came (a row per distribution), how far off the log-probs are, whether they can learn."""
    (logits,) = args
    shapes = [tuple(x.shape) for x in result] if isinstance(result, tuple | list) else None
    if shapes != [(len(logits),)] * 2:
        shape = f"({len(logits)},)"
        return f"It must return two tensors of shape {shape}, actions and logprobs: one of each per row of logits."
    actions, logprobs = result
    if actions.is_floating_point():
        return f"The actions must be integers, not {actions.dtype}."
    if not logprobs.isfinite().all():
        return "Some log-probabilities are infinite or NaN: an action whose probability is 0 was never drawn."
    frequencies = _hot(logits, actions).unflatten(0, (-1, DRAWS)).mean(1)
    truth = logits.log_softmax(-1).gather(-1, actions[:, None]).squeeze(-1)
    errors = (logprobs - truth).abs().detach()
    return {
        "the share of each action": (frequencies.detach() * 100).round() / 100,
        "the largest error of a log-probability": (errors.max() * 1e3).round() / 1e3,
        "the share of rows whose log-probability is right": ((errors < 1e-3).float().mean() * 100).round() / 100,
        "whether the log-probabilities carry a gradient (1) or not (0)": float(logprobs.requires_grad),
    }


def _drawn(logits: Tensor) -> Tensor:
    return torch.multinomial(logits.detach().softmax(-1), 1).squeeze(-1)


def _taken(table: Tensor, actions: Tensor) -> Tensor:
    return table.gather(-1, actions[:, None]).squeeze(-1)


def _sampled(table_of: Callable[[Tensor], Tensor], draw: Callable[[Tensor], Tensor], logits: Tensor) -> Any:
    actions = draw(logits)
    return actions, _taken(table_of(logits), actions)


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1)


def _by_position(logits: Tensor) -> Any:
    """What `Categorical(logits)` makes of logits that happen to have one sign."""
    policy = Categorical(probs=logits.abs())
    actions = policy.sample()
    return actions, policy.log_prob(actions)


def _twice(logits: Tensor) -> Any:
    actions, others = _drawn(logits), _drawn(logits)
    return actions, _taken(_log_softmax(logits), others)


def _over_rows(logits: Tensor) -> Any:
    actions = torch.multinomial(logits.detach().softmax(0), 1).squeeze(-1)
    return actions, _taken(logits.log_softmax(0), actions)


@exercise(
    "1.2",
    "drawing actions",
    difficulty=1,
    minutes=8,
    task="The policy must *draw* its actions, and remember the log-probability of each, with its gradient. "
    "The check draws many and looks at how often each came.",
    cases=_sample_cases,
    suspects={
        "It takes the likeliest action (argmax) instead of drawing one: the policy gradient holds for samples only.": (
            partial(_sampled, _log_softmax, lambda z: z.argmax(-1))
        ),
        "The actions are drawn evenly: draw them with the probabilities logits.softmax(-1).": (
            partial(_sampled, _log_softmax, lambda z: torch.randint(z.shape[-1], z.shape[:1]))
        ),
        "It returns probabilities: take their log.": partial(_sampled, lambda z: z.softmax(-1), _drawn),
        "It returns the action's logit, which is not yet a log-probability: use logits.log_softmax(-1).": (
            partial(_sampled, lambda z: z, _drawn)
        ),
        "The log-probs carry no gradient, so the policy could not learn: only the drawing may run without one.": (
            partial(_sampled, lambda z: z.detach().log_softmax(-1), _drawn)
        ),
        "One action was drawn for all rows: draw one for each.": (
            partial(_sampled, _log_softmax, lambda z: _drawn(z[:1]).expand(len(z)))
        ),
        "The sign of the log-probs is wrong: they are never above 0.": (
            partial(_sampled, lambda z: -z.log_softmax(-1), _drawn)
        ),
        "The logits were taken for probabilities: the first argument of Categorical is `probs`. "
        "Write Categorical(logits=logits).": _by_position,
        "It draws twice: the log-probs belong to other actions than those it returns. Draw once.": (_twice),
        "The softmax runs over the rows, the states: each row is a distribution of its own, use softmax(-1).": (
            _over_rows
        ),
        "The log-probs are normalised over the rows: each row is a distribution of its own, use log_softmax(-1).": (
            partial(_sampled, lambda z: z.log_softmax(0), _drawn)
        ),
        "The log-prob is that of the likeliest action, whichever was drawn: take the drawn action's.": (
            lambda z: (_drawn(z), z.log_softmax(-1).amax(-1))
        ),
        "The log-prob is that of the first action, whichever was drawn: take the drawn action's.": (
            lambda z: (_drawn(z), z.log_softmax(-1)[:, 0])
        ),
    },
    hints=(
        "`torch.distributions.Categorical(logits=logits)` does both; or `torch.multinomial` and `log_softmax`.",
        "`policy = Categorical(logits=logits)`, then `actions = policy.sample()` and `policy.log_prob(actions)`.",
    ),
    observe=_sample_observe,
)
def sample_actions(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one action per row: logits [N, A] give (actions [N] (int), logprobs [N] with their gradient)."""
    actions = torch.multinomial(logits.detach().softmax(-1), 1)
    return actions.squeeze(-1), logits.log_softmax(-1).gather(-1, actions).squeeze(-1)


# 1.3 -----------------------------------------------------------------------------------------------------------------


def _returns_cases() -> list[Case]:
    cases = [
        Case("one step", (tensor([2]), bools([1]), 0.5), tensor([2.0])),
        Case("one episode of three steps", (tensor([1, 2, 4]), bools([0, 0, 1]), 0.5), tensor([3.0, 4.0, 4.0])),
        Case("an episode ends at the second step", (tensor([1, 1, 1]), bools([0, 1, 0]), 0.5), tensor([1.5, 1.0, 1.0])),
        Case("two rows", (tensor([0, 1], [3, 0]), bools([0, 1], [1, 1]), 0.9), tensor([0.9, 1.0], [3.0, 0.0])),
    ]
    return cases + random_cases(lambda g, size: (normal(g, *size), flags(g, *size), 0.97))


def _returns_with(bug: str, rewards: Tensor, ends: Tensor, gamma: float) -> Tensor:
    """Exercise 1.3 with one mistake planted."""
    zeros, never = torch.zeros_like(rewards[:, :1]), torch.zeros_like(ends[:, :1])
    if bug == "early":
        rewards = torch.cat((rewards[:, 1:], zeros), 1)
    if bug == "late":
        rewards = torch.cat((zeros, rewards[:, :-1]), 1)
    if bug == "end's reward":
        rewards = rewards * ~ends
    if bug == "next end":
        ends = torch.cat((ends[:, 1:], never), 1)
    if bug == "crosses":
        ends = torch.zeros_like(ends)
    if bug == "no gamma":
        gamma = 1.0
    result, carry = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    columns = range(rewards.shape[1])
    for t in columns if bug == "forwards" else reversed(columns):
        cut = ends[:, t] if bug != "forwards" else ends[:, t - 1] if t > 0 else never[:, 0]
        following = torch.where(cut, 0, carry)
        carry = rewards[:, t] + (1.0 if bug == "gamma once" else gamma) * following
        once = rewards[:, t] + gamma * following
        result[:, t] = {"next reward": following, "gamma again": gamma * carry, "gamma once": once}.get(bug, carry)
    return result.flip(1) if bug == "flipped" else result


def _so_far(rewards: Tensor, ends: Tensor, gamma: float, *, total: bool = False) -> Tensor:
    """The discounted rewards of the episode from its start up to each step, or all of them at every step."""
    result = torch.zeros_like(rewards)
    for row in range(len(rewards)):
        first = 0
        for t in range(rewards.shape[1]):
            if total:
                last = (
                    first + int(ends[row, first:].long().argmax()) if ends[row, first:].any() else rewards.shape[1] - 1
                )
                steps = range(first, last + 1)
            else:
                steps = range(first, t + 1)
            result[row, t] = sum(gamma ** (k - first) * rewards[row, k] for k in steps)
            if ends[row, t]:
                first = t + 1
    return result


def _from_the_start(rewards: Tensor, ends: Tensor, gamma: float) -> Tensor:
    """Every reward discounted from the start of the row, then summed from t on."""
    powers = gamma ** torch.arange(rewards.shape[1], dtype=rewards.dtype)
    return _returns_with("no gamma", rewards * powers, ends, 1.0)


def _centred(rewards: Tensor, ends: Tensor, gamma: float) -> Tensor:
    result = returns.discounted_returns(rewards, ends, gamma)
    return result - result.mean()


@exercise(
    "1.3",
    "the return",
    difficulty=2,
    minutes=15,
    task="$G_t = R_{t+1} + \\gamma R_{t+2} + \\dots$ up to the end of the episode. A row may hold several episodes, "
    "one "
    "after the other. `rewards[:, t]` is what the action of step $t$ earned, and `ends[:, t]` says that the episode "
    "ended "
    "with it. An episode that the row's last column cuts off simply stops there.",
    cases=_returns_cases,
    suspects={
        "The return crosses the end of the episode and collects the next one's rewards: multiply by (1 - ends).": (
            partial(_returns_with, "crosses")
        ),
        "The reward is counted a step early: rewards[:, t] was earned by the action of step t and belongs to G_t.": (
            partial(_returns_with, "early")
        ),
        "Off by one: the sum starts at the next reward. G_t begins with rewards[:, t] itself.": (
            partial(_returns_with, "next reward")
        ),
        "Off by one in the discount: the first reward of G_t is not discounted.": partial(_returns_with, "gamma again"),
        "The reward is counted a step late: rewards[:, t] belongs to G_t, and not to the step after it.": (
            partial(_returns_with, "late")
        ),
        "The discount is missing: G_t = r_t + gamma * G_{t+1}.": partial(_returns_with, "no gamma"),
        "The reward of an episode's last step is lost: an end cuts off what follows, not the step itself.": (
            partial(_returns_with, "end's reward")
        ),
        "It looks up the end of the wrong step: it is ends[:, t] that cuts G_t off from G_{t+1}, not ends[:, t + 1].": (
            partial(_returns_with, "next end")
        ),
        "The result runs backwards in time: it was collected from the last step on; turn it round.": (
            partial(_returns_with, "flipped")
        ),
        "It sums what came before: the return looks forward, at the rewards still to come.": _so_far,
        "It goes through time forwards: G_t needs what is still to come, so start from the last column.": (
            partial(_returns_with, "forwards")
        ),
        "Every step gets the return of its whole episode: an action can't change rewards from before it.": (
            partial(_so_far, total=True)
        ),
        "The discount counts from the start of the row: in G_t it counts from t.": _from_the_start,
        "The discount is applied once, not once per step: it is r_t + gamma * (r_{t+1} + gamma * (r_{t+2} + ...)).": (
            partial(_returns_with, "gamma once")
        ),
        "The mean of the returns is subtracted: return G itself, baselines come in lesson 02.": _centred,
    },
    hints=(
        "Go backwards: the last return is the last reward, and each one before needs only the one after it.",
        "`carry = rewards[:, t] + gamma * torch.where(ends[:, t], 0, carry)` for t from the last column to the first; "
        "store it in a `torch.zeros_like(rewards)`.",
    ),
)
def discounted_returns(rewards: Tensor, ends: Tensor, gamma: float) -> Tensor:
    """The return of every step, within its episode: rewards [N, T] and ends [N, T] (bool) give [N, T]."""
    return returns.discounted_returns(rewards, ends, gamma)


# 1.4 -----------------------------------------------------------------------------------------------------------------


def _powers(like: Tensor, gamma: float, first: int = 0) -> Tensor:
    return gamma ** torch.arange(first, first + like.shape[1], dtype=like.dtype)


def _loss_cases() -> list[Case]:
    two = (tensor([-1, -2]), tensor([4, 2]), 0.5)
    cases = [
        Case("one step", (tensor([-1]), tensor([3]), 0.5), tensor(3.0)[0]),
        Case("one episode of two steps", two, tensor(3.0)[0]),
        Case("two episodes", (tensor([-1, -2], [-1, -1]), tensor([4, 2], [0, 4]), 0.5), tensor(2.0)[0]),
    ]
    return cases + random_cases(lambda g, size: (-normal(g, *size).abs(), normal(g, *size), 0.9))


@exercise(
    "1.4",
    "REINFORCE's loss",
    difficulty=2,
    minutes=10,
    task="An optimizer *minimises*. Write the loss whose gradient step is Sutton's "
    "$\\theta \\leftarrow \\theta + \\alpha\\,\\gamma^t G_t \\nabla \\log \\pi(A_t|S_t)$, averaged over all steps "
    "of the "
    "batch. Each row is one episode from its start, so the column is $t$.",
    cases=_loss_cases,
    suspects={
        "The minus sign is missing: the optimizer minimises, so this would make good actions rarer.": (
            lambda lp, g, gamma: (_powers(lp, gamma) * g.detach() * lp).mean()
        ),
        "gamma^t is missing: Sutton's update weighs step t by gamma^t, besides the discount inside G_t.": (
            lambda lp, g, gamma: -(g.detach() * lp).mean()
        ),
        "Off by one in gamma^t: the first step has t = 0 and weight 1.": (
            lambda lp, g, gamma: -(_powers(lp, gamma, 1) * g.detach() * lp).mean()
        ),
        "This is the sum over all steps: take the mean, or the learning rate depends on the batch.": (
            lambda lp, g, gamma: -(_powers(lp, gamma) * g.detach() * lp).sum()
        ),
        "This is the mean over episodes of their sums: here the mean is over all steps.": (
            lambda lp, g, gamma: -(_powers(lp, gamma) * g.detach() * lp).sum(1).mean()
        ),
        "A gradient flows into the returns: they are constants, use returns.detach().": (
            lambda lp, g, gamma: -(_powers(lp, gamma) * g * lp).mean()
        ),
        "It weighs probabilities: the score is the gradient of the log-probability, so leave exp out.": (
            lambda lp, g, gamma: -(_powers(lp, gamma) * g.detach() * lp.exp()).mean()
        ),
        "It multiplies two means: multiply step by step first, then take the mean.": (
            lambda lp, g, gamma: -(_powers(lp, gamma) * g.detach()).mean() * lp.mean()
        ),
        "gamma^t runs backwards: the first step has weight 1, the last one the smallest.": (
            lambda lp, g, gamma: -(_powers(lp, gamma).flip(0) * g.detach() * lp).mean()
        ),
        "The power counts rows: t is the column.": (
            lambda lp, g, gamma: -(_powers(lp.T, gamma)[:, None] * g.detach() * lp).mean()
        ),
        "The weight is gamma * t: it is the power gamma ** t.": (
            lambda lp, g, gamma: -(gamma * torch.arange(lp.shape[1], dtype=lp.dtype) * g.detach() * lp).mean()
        ),
        "The weight is gamma at every step: it is the power gamma ** t.": (
            lambda lp, g, gamma: -(gamma * g.detach() * lp).mean()
        ),
        "No gradient flows into logprobs: the policy can't learn.": (
            lambda lp, g, gamma: -(_powers(lp, gamma) * g * lp).mean().detach()
        ),
    },
    hints=(
        "The gradient of `-(weight * logprobs).mean()`, with a constant weight, is minus the mean of weight times "
        "score.",
        "`gamma ** torch.arange(T)` is [1, gamma, gamma^2, ...] and broadcasts over the rows; give it the dtype of "
        "`returns`. The weight is that times `returns.detach()`.",
    ),
    leaves=("logprobs", "returns"),
)
def reinforce_loss(logprobs: Tensor, returns: Tensor, gamma: float) -> Tensor:
    """REINFORCE's loss with gamma^t, the mean over all steps: logprobs and returns [N, T] give a 0-d tensor."""
    discounts = gamma ** torch.arange(logprobs.shape[1], dtype=logprobs.dtype, device=logprobs.device)
    return losses.policy_gradient_loss(logprobs, discounts * returns)
