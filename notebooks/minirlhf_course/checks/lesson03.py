"""Lesson 03, actor-critic: the TD error, its two losses, Sutton's one-step update, the entropy."""

from __future__ import annotations

from functools import partial
from math import log

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from minirlhf import losses
from minirlhf_course.checks.cases import F64, SIZES, bools, flags, generators, normal, random_cases, tensor
from minirlhf_course.checks.exercise import Case, exercise

# 3.1 -----------------------------------------------------------------------------------------------------------------


def _td_cases() -> list[Case]:
    none, yes, half = bools([0]), bools([1]), 0.5
    cases = [
        Case("a step in mid-episode", (tensor([1]), tensor([2]), tensor([6]), none, none, half), tensor([2.0])),
        Case("a step that ends the episode", (tensor([1]), tensor([2]), tensor([6]), yes, none, half), tensor([-1.0])),
        Case("a step cut by the time limit", (tensor([1]), tensor([2]), tensor([6]), none, yes, half), tensor([2.0])),
        Case(
            "the second of three steps ends the episode",
            (tensor([1, 1, 1]), tensor([2, 2, 2]), tensor([6, 6, 6]), bools([0, 1, 0]), bools([0, 0, 0]), half),
            tensor([2.0, -1.0, 2.0]),
        ),
    ]
    for size, generator in zip(SIZES, generators(), strict=True):
        rewards, values, following = (normal(generator, *size) for _ in range(3))
        terminated = flags(generator, *size)
        truncated = flags(generator, *size) & ~terminated
        cases.append(Case(f"random, of shape {size}", (rewards, values, following, terminated, truncated, 0.97)))
    return cases


def _next_of(values: Tensor, last: Tensor) -> Tensor:
    """The values of the next column, and `last` [N, 1] after the last one."""
    return torch.cat((values[:, 1:], last), 1)


def _shifted(flag: Tensor, steps: int) -> Tensor:
    """The flags of the step before (1) or after (-1); False where there is none."""
    blank = torch.zeros_like(flag[:, :1])
    return torch.cat((blank, flag[:, :-1]), 1) if steps == 1 else torch.cat((flag[:, 1:], blank), 1)


@exercise(
    "3.1",
    "the TD error",
    difficulty=2,
    minutes=10,
    task="$\\delta = R + \\gamma V(S') - V(S)$, and **the value of a terminal state is 0**: nothing can be earned "
    "after it. "
    "The network doesn't know that. gymnasium tells two endings apart: `terminated` (the pole fell) and `truncated` "
    "(the "
    "clock ran out, though the pole stood). In which of the two is there still something to come?",
    cases=_td_cases,
    suspects={
        "v(terminal) must be 0: it bootstraps from next_values after the episode terminated. "
        "Multiply them by (1 - terminated).": lambda r, v, n, te, tr, gamma: r + gamma * n - v,
        "Truncation is treated as termination: the clock ran out, but the state had a value. Only `terminated` cuts.": (
            lambda r, v, n, te, tr, gamma: r + gamma * n * ~(te | tr) - v
        ),
        "Terminated and truncated are swapped: it bootstraps after a termination, and not after a truncation.": (
            lambda r, v, n, te, tr, gamma: r + gamma * n * ~tr - v
        ),
        "done and next_done are swapped: `terminated[:, t]` says that step t itself led to the end, so it belongs to "
        "next_values[:, t], not to the next step's.": lambda r, v, n, te, tr, gamma: (
            r + gamma * n * ~_shifted(te, 1) - v
        ),
        "done and next_done are swapped: it uses the next step's flag; next_values[:, t] goes with terminated[:, t].": (
            lambda r, v, n, te, tr, gamma: r + gamma * n * ~_shifted(te, -1) - v
        ),
        "The mask is the wrong way round: it bootstraps only where the episode terminated.": (
            lambda r, v, n, te, tr, gamma: r + gamma * n * te - v
        ),
        "The reward of the last step is lost: (1 - terminated) belongs to next_values alone.": (
            lambda r, v, n, te, tr, gamma: (r + gamma * n) * ~te - v
        ),
        "V(S) is missing: this is the target, the error is the target minus V(S).": (
            lambda r, v, n, te, tr, gamma: r + gamma * n * ~te
        ),
        "The sign is wrong: the error is the target minus V(S).": lambda r, v, n, te, tr, gamma: (
            v - r - gamma * n * ~te
        ),
        "The discount is missing: gamma * V(S').": lambda r, v, n, te, tr, gamma: r + n * ~te - v,
        "gamma stands at the wrong value: it discounts V(S'), which is one step away.": (
            lambda r, v, n, te, tr, gamma: r + n * ~te - gamma * v
        ),
        "It takes values[:, t + 1] for V(S'): after an end that is the next episode's first state. Use next_values.": (
            lambda r, v, n, te, tr, gamma: r + gamma * _next_of(v, n[:, -1:]) * ~te - v
        ),
        "It takes values[:, t + 1] for V(S'), and 0 in the last column: use next_values.": (
            lambda r, v, n, te, tr, gamma: r + gamma * _next_of(v, torch.zeros_like(n[:, -1:])) * ~te - v
        ),
        "It takes values[:, t + 1] for V(S'), and the row's first value in the last column: use next_values.": (
            lambda r, v, n, te, tr, gamma: r + gamma * v.roll(-1, 1) * ~te - v
        ),
        "next_values are shifted once more: next_values[:, t] already is the value of the state that step t led to.": (
            lambda r, v, n, te, tr, gamma: r + gamma * n.roll(-1, 1) * ~te - v
        ),
        "V(S) is cut as well: the state in which the last step was taken is not terminal, only the next one is.": (
            lambda r, v, n, te, tr, gamma: r + (gamma * n - v) * ~te
        ),
        "The whole error is cut where the episode ends: only V(S') is 0 there.": (
            lambda r, v, n, te, tr, gamma: (r + gamma * n - v) * ~te
        ),
        "The reward is discounted too: gamma belongs to V(S') alone.": (
            lambda r, v, n, te, tr, gamma: gamma * (r + n * ~te) - v
        ),
    },
    hints=(
        "After a termination nothing comes; after a truncation the episode would have gone on.",
        "`rewards + gamma * next_values * ~terminated - values`. And `truncated`? It is there to tempt you.",
    ),
)
def td_errors(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, truncated: Tensor, gamma: float
) -> Tensor:
    """The TD error of every step, all [N, T]. next_values[:, t] is what the network says of the state that step t led
    to, also where the episode ended there; terminated and truncated (bool) say how it ended, if it did."""
    return rewards + gamma * next_values * ~terminated - values


# 3.2 -----------------------------------------------------------------------------------------------------------------


def _loss_cases() -> list[Case]:
    step = [tensor([x]) for x in (-1, 2, 6, 1)]
    cases = [
        Case("one step in mid-episode", (*step, bools([0]), 0.5), (tensor(2.0)[0], tensor(2.0)[0])),
        Case("one step that ends the episode", (*step, bools([1]), 0.5), (tensor(-1.0)[0], tensor(0.5)[0])),
    ]
    return cases + random_cases(
        lambda g, size: (-normal(g, *size).abs(), *(normal(g, *size) for _ in range(3)), flags(g, *size), 0.97)
    )


def _losses_with(
    bug: str,
    logprobs: Tensor,
    values: Tensor,
    next_values: Tensor,
    rewards: Tensor,
    terminated: Tensor,
    gamma: float,
) -> tuple[Tensor, Tensor]:
    """Exercise 3.2 with one mistake planted."""
    if bug == "shifted":
        next_values = _next_of(values, next_values[:, -1:])
    if bug == "no gamma":
        gamma = 1.0
    targets = rewards + gamma * (next_values if bug == "terminal" else next_values * ~terminated)
    if bug == "reward":
        targets = rewards
    if bug != "residual":
        targets = targets.detach()
    advantages = targets.detach() - values
    if bug == "return":
        advantages = targets
    if bug != "leak":
        advantages = advantages.detach()
    errors = (values.detach() if bug == "deaf" else values) - targets
    sign, half = (1.0 if bug == "sign" else -1.0), (1.0 if bug == "half" else 0.5)
    actor = (logprobs.mean() * advantages.mean()) if bug == "two means" else (logprobs * advantages).mean()
    critic = (errors.abs() if bug == "absolute" else errors.square()).mean()
    size = {"sums": rewards.numel(), "row sums": rewards.shape[1]}.get(bug, 1)
    return size * sign * actor, size * half * critic


@exercise(
    "3.2",
    "actor and critic, what may move",
    difficulty=3,
    minutes=15,
    task="The losses of actor and critic, as means over all steps. The critic's is $\\tfrac12 (V(S) - "
    "\\text{target})^2$ with "
    "the target $R + \\gamma V(S')$; the target is **not** moved towards the guess (a *semi-gradient*). The actor's "
    "weight is "
    "the TD error.",
    cases=_loss_cases,
    suspects={
        "A gradient flows through the target into next_values: the target is a constant (semi-gradient), detach it.": (
            partial(_losses_with, "residual")
        ),
        "The actor's loss leaks a gradient into the critic: detach the TD error.": partial(_losses_with, "leak"),
        "v(terminal) must be 0: multiply next_values by (1 - terminated).": partial(_losses_with, "terminal"),
        "The actor's weight is the whole target: subtract V(S), the weight is the TD error.": (
            partial(_losses_with, "return")
        ),
        "The minus sign of the actor's loss is missing, or the TD error is V(S) - target: the optimizer minimises.": (
            partial(_losses_with, "sign")
        ),
        "The half is missing: the critic's loss is 1/2 (V - target)^2.": partial(_losses_with, "half"),
        "The critic can't learn: no gradient flows from its loss into `values`.": partial(_losses_with, "deaf"),
        "It takes values[:, t + 1] for V(S'): after an end that is the next episode's first state. Use next_values.": (
            partial(_losses_with, "shifted")
        ),
        "The discount is missing: the target is R + gamma V(S').": partial(_losses_with, "no gamma"),
        "The critic's target is the reward alone: it is R + gamma V(S').": partial(_losses_with, "reward"),
        "These are sums: take means over all steps.": partial(_losses_with, "sums"),
        "These are means over rows of sums over steps: take one mean over all steps.": partial(
            _losses_with, "row sums"
        ),
        "The actor's loss multiplies two means: multiply step by step first, then take the mean.": (
            partial(_losses_with, "two means")
        ),
        "The mask is the wrong way round: it bootstraps only where the episode terminated.": (
            lambda lp, v, n, r, te, gamma: _losses_with("", lp, v, n, r, ~te, gamma)
        ),
        "The critic's error is not squared: its loss is 1/2 (V - target)^2.": partial(_losses_with, "absolute"),
    },
    hints=(
        "Write the target once, detached; both losses use it.",
        "`targets = (rewards + gamma * next_values * ~terminated).detach()`, `advantages = (targets - "
        "values).detach()`.",
    ),
    leaves=("logprobs", "values", "next_values"),
)
def actor_critic_losses(
    logprobs: Tensor, values: Tensor, next_values: Tensor, rewards: Tensor, terminated: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    """(actor's loss, critic's loss), means over all steps; all [N, T], terminated is bool."""
    targets = (rewards + gamma * next_values * ~terminated).detach()
    return losses.policy_gradient_loss(logprobs, targets - values), losses.value_loss(values, targets)


# 3.3 -----------------------------------------------------------------------------------------------------------------


def _step_cases() -> list[Case]:
    flat = torch.zeros(1, 2), torch.tensor([1.0]), 1.0
    two = torch.zeros(2, 2), torch.tensor([1.0, 4.0])
    cases = [
        Case(
            "the first step, which ends the episode",
            (*flat, 0, 1, 2.0, 0, True, 0.5, 0.25, 0.5),
            (tensor([-0.25, 0.25]), tensor(1.25), 0.5),
        ),
        Case(
            "a later step, I = 1/2",
            (*two, 0.5, 0, 1, 1.0, 1, False, 0.5, 0.25, 0.5),
            (tensor([-0.25, 0.25], [0.0, 0.0]), tensor(1.5, 4.0), 0.25),
        ),
    ]
    for number, generator in enumerate(generators(6)):
        states, actions = 2 + number % 4, 2 + number % 3
        s, s_next = (int(torch.randint(states, (), generator=generator)) for _ in range(2))
        action = int(torch.randint(actions, (), generator=generator))
        theta, w = normal(generator, states, actions), normal(generator, states)
        rest = (0.9**number, s, action, float(normal(generator, 1)), s_next, number % 3 == 2, 0.3, 0.1, 0.9)
        cases.append(Case(f"random, {states} states and {actions} actions", (theta, w, *rest)))
    return cases


def _step_with(
    bug: str,
    theta: Tensor,
    w: Tensor,
    discount: float,
    state: int,
    action: int,
    reward: float,
    next_state: int,
    terminated: bool,
    alpha_theta: float,
    alpha_w: float,
    gamma: float,
) -> tuple[Tensor, Tensor, float]:
    """Exercise 3.3 with one mistake planted."""
    following = 0.0 if terminated and bug != "terminal" else (1.0 if bug == "no gamma" else gamma) * w[next_state]
    delta = reward + following - (0.0 if bug == "no V" else w[state])
    new_w, new_theta = w.clone(), theta.clone()
    if bug == "I first":
        discount = gamma * discount
    new_w[state] += alpha_w * delta * (discount if bug == "I in critic" else -1.0 if bug == "critic's sign" else 1.0)
    if bug == "late delta":
        following = 0.0 if terminated else gamma * new_w[next_state]
        delta = reward + following - new_w[state]
    hot = one_hot(torch.tensor(action), theta.shape[1]).to(theta.dtype)
    probabilities = theta.softmax(0)[state] if bug == "over states" else theta[state].softmax(-1)
    score = hot if bug == "hot" else hot * (1 - probabilities) if bug == "taken" else hot - probabilities
    if bug in ("no delta", "reward"):
        delta = torch.ones_like(w[state]) if bug == "no delta" else torch.ones_like(w[state]) * reward
    weight = 1.0 if bug == "no I" else -discount if bug == "actor's sign" else discount
    moved = slice(None) if bug == "all states" else state
    new_theta[moved] += (alpha_w if bug == "alphas" else alpha_theta) * weight * delta * score
    if bug in ("I first", "I kept"):
        return new_theta, new_w, discount
    return new_theta, new_w, 1.0 if bug == "reset" and terminated else gamma * discount


@exercise(
    "3.3",
    "one step of actor-critic",
    difficulty=3,
    minutes=20,
    task="Sutton & Barto's box in section 13.5, one pass through its loop, with tables in place of networks: "
    "$\\pi(\\cdot|s) = \\mathrm{softmax}(\\theta_s)$ and $\\hat v(s) = w_s$. `discount` is the book's $I$. You wrote "
    "$\\nabla \\log \\pi$ in exercise 1.1.",
    cases=_step_cases,
    suspects={
        "I is missing: the actor's step is alpha * I * delta * score, and I = gamma^t.": partial(_step_with, "no I"),
        "I is in the critic's step too: in the book only the actor's step has it.": partial(_step_with, "I in critic"),
        "I is updated too early: this step uses the old I, and I <- gamma * I comes last.": partial(
            _step_with, "I first"
        ),
        "I is returned unchanged: I <- gamma * I comes last.": partial(_step_with, "I kept"),
        "I is reset here: the loop that starts the next episode does that; return gamma * I.": partial(
            _step_with, "reset"
        ),
        "v(terminal) must be 0: it bootstraps from w[next_state] after the episode terminated.": (
            partial(_step_with, "terminal")
        ),
        "The actor uses a delta made with the new w: compute delta once, before anything moves.": (
            partial(_step_with, "late delta")
        ),
        "The actor moves the wrong way: theta + alpha * I * delta * score.": partial(_step_with, "actor's sign"),
        "The critic moves the wrong way: w + alpha * delta.": partial(_step_with, "critic's sign"),
        "The score is the one-hot alone: subtract the probabilities, softmax(theta[state]).": partial(
            _step_with, "hot"
        ),
        "The actor's step has the critic's learning rate: it is alpha_theta.": partial(_step_with, "alphas"),
        "Only the action taken moves: subtract the probabilities of the other actions too, one_hot - softmax.": (
            partial(_step_with, "taken")
        ),
        "The softmax runs over the states: the policy in a state is softmax(theta[state]).": partial(
            _step_with, "over states"
        ),
        "Every state moves: the policy of a state depends on its own row alone, theta[state].": partial(
            _step_with, "all states"
        ),
        "delta has no discount: reward + gamma * w[next_state] - w[state].": partial(_step_with, "no gamma"),
        "delta is taken at the new state only: reward + gamma * w[next_state] - w[state].": partial(_step_with, "no V"),
        "The actor's step ignores delta: alpha_theta * I * delta * score.": partial(_step_with, "no delta"),
        "The actor's step is weighed with the reward: alpha_theta * I * delta * score.": partial(_step_with, "reward"),
    },
    hints=(
        "In the book's order: delta, w, theta, I. Work on copies (`theta.clone()`).",
        "`theta[state] += alpha_theta * discount * delta * (one_hot - theta[state].softmax(-1))`; "
        "`w[state] += alpha_w * delta`; return `gamma * discount`.",
    ),
)
def actor_critic_step(
    theta: Tensor,
    w: Tensor,
    discount: float,
    state: int,
    action: int,
    reward: float,
    next_state: int,
    terminated: bool,
    alpha_theta: float,
    alpha_w: float,
    gamma: float,
) -> tuple[Tensor, Tensor, float]:
    """One step of one-step actor-critic: returns new (theta [S, A], w [S], discount) and leaves the old as they are."""
    return _step_with(
        "", theta, w, discount, state, action, reward, next_state, terminated, alpha_theta, alpha_w, gamma
    )


# 3.4 -----------------------------------------------------------------------------------------------------------------


def _entropy_cases() -> list[Case]:
    inf = float("inf")
    cases = [
        Case("two equal logits", (tensor(0, 0),), tensor(log(2))[0]),
        Case("certain of one action", (torch.tensor([1000.0, 0.0]),), tensor(0.0)[0]),
        Case("a forbidden action, logit -inf", (tensor(0, 0, -inf),), tensor(log(2))[0]),
        Case("two rows", (tensor([0, 0], [0, log(3)]),), tensor(log(2), log(4) - 0.75 * log(3))),
    ]
    for shape, generator in zip(((1, 2), (3, 4), (2, 3, 5)), generators(3), strict=True):
        cases.append(Case(f"random, of shape {shape}", (2 * normal(generator, *shape, dtype=F64),)))
    return cases


def _terms(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    return -log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)


@exercise(
    "3.4",
    "entropy",
    difficulty=2,
    minutes=8,
    task="How undecided is the policy? $-\\sum_a \\pi(a) \\log \\pi(a)$, in nats. PPO pays a small bonus for it, "
    "and you will "
    "watch it fall in every healthy run. Impossible actions (logit $-\\infty$) add nothing.",
    cases=_entropy_cases,
    suspects={
        "The minus sign is missing: entropy is never below 0.": lambda z: -_terms(z).sum(-1),
        "0 * -inf is NaN: an impossible action adds 0. Fill its log-probability with 0 (masked_fill) before the "
        "product.": (lambda z: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)),
        "It takes the log of a softmax that rounds to 0: use log_softmax.": (
            lambda z: -(z.softmax(-1) * z.softmax(-1).log()).sum(-1)
        ),
        "It averages over the actions: sum them.": lambda z: _terms(z).mean(-1),
        "It sums over everything: one entropy per row of logits, sum over the last dimension alone.": (
            lambda z: _terms(z).sum()
        ),
        "It is in bits: use the natural logarithm.": lambda z: _terms(z).sum(-1) / log(2),
        "Logits are not log-probabilities: normalise them with log_softmax first.": (
            lambda z: -(z.softmax(-1) * z.masked_fill(z == -torch.inf, 0.0)).sum(-1)
        ),
        "The softmax runs over the wrong dimension: the actions are the last one.": (
            lambda z: -(z.softmax(0) * z.log_softmax(0).masked_fill(z == -torch.inf, 0.0)).sum(-1)
        ),
        "The numbers are right, but the gradient is NaN where a probability is 0: the derivative of p log p there is "
        "infinite. Start from log_softmax, and fill what is -inf with 0 (masked_fill).": (
            lambda z: torch.special.entr(z.softmax(-1)).sum(-1)
        ),
        "The numbers are right, but the gradient is NaN where a probability is 0: torch.where takes the -inf out of "
        "the result, not out of the derivative. Fill the log-probability with 0 before the product.": (
            lambda z: -torch.where(z == -torch.inf, 0.0, z.softmax(-1) * z.log_softmax(-1)).sum(-1)
        ),
        "This is the perplexity, exp of the entropy: leave exp out.": lambda z: _terms(z).sum(-1).exp(),
        "The probability is missing: it is the mean of -log p under the policy, so weigh by p.": (
            lambda z: -z.log_softmax(-1).masked_fill(z == -torch.inf, 0.0).sum(-1)
        ),
        "The entropy is detached from the graph: as a bonus it would have no gradient.": (
            lambda z: _terms(z.detach()).sum(-1)
        ),
    },
    hints=(
        "`log_p = logits.log_softmax(-1)` is safe; what does `log_p.exp() * log_p` give for -inf?",
        "`-(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)`",
    ),
    leaves=("logits",),
)
def entropy(logits: Tensor) -> Tensor:
    """The entropy of softmax(logits) in nats: [..., A] gives [...]."""
    return losses.entropy_from_logits(logits)
