"""Exercises of lesson 06: where the clip stops the gradient, the clipped loss as a kernel, GAE as a scan."""

from __future__ import annotations

import ast
from typing import Any

import torch
from torch import Tensor

from minirlhf import returns
from minirlhf_course.checks.cases import bools, flags, generators, normal, tensor
from minirlhf_course.checks.exercise import Case, exercise
from minirlhf_course.checks.kernels import guarded, jit, loops, puzzle, tl, triton, untouched_beyond, variants

F32 = torch.float32
NAN = float("nan")

after: Any = None
if triton is not None:
    from minirlhf_kernels.fused.gae import after

# 6.4 -----------------------------------------------------------------------------------------------------------------


def _ratios(*ratios: float) -> tuple[Tensor, Tensor]:
    """log-probs that make these ratios; the old ones are not 0, so that leaving them out is seen."""
    old = torch.full((len(ratios),), -1.0)
    return tensor(*ratios).log() + old, old


def _clip_cases() -> list[Case]:
    cases = [
        Case("A > 0, r = 2: beyond the clip", (*_ratios(2.0), tensor(1.0), 0.25), tensor(0.0)),
        Case("A > 0, r = 1/2: below the clip", (*_ratios(0.5), tensor(1.0), 0.25), tensor(-0.5)),
        Case("A < 0, r = 2", (*_ratios(2.0), tensor(-1.0), 0.25), tensor(2.0)),
        Case("A < 0, r = 1/2", (*_ratios(0.5), tensor(-1.0), 0.25), tensor(0.0)),
        Case("nothing has moved", (*_ratios(1.0), tensor(3.0), 0.25), tensor(-3.0)),
    ]
    for count, generator in zip((3, 6, 40), generators(3), strict=True):
        old = -normal(generator, count).exp()
        case = old + 0.5 * normal(generator, count), old, normal(generator, count), 0.2
        cases.append(Case(f"random, {count} tokens", case))
    return cases


def _ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    return (logprobs - old_logprobs).exp()


def _gradient(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    ratio = (logprobs - old_logprobs).exp()
    surrogate = ratio * advantages
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    return torch.where(clipped < surrogate, 0.0, -surrogate)


def _outside(ratio: Tensor, clip_range: float) -> Tensor:
    return (ratio < 1 - clip_range) | (ratio > 1 + clip_range)


@exercise(
    "6.4",
    "where the clip stops the gradient",
    difficulty=3,
    minutes=15,
    task="A kernel has no autograd: it writes the gradient itself. The loss of one token is $-\\min\\big(rA,\\; "
    "\\mathrm{clip}(r, 1 - \\varepsilon, 1 + \\varepsilon) A\\big)$ with $r = e^{\\ell - \\ell_{\\text{old}}}$. What "
    "is its derivative with respect to the log-probability $\\ell$? Of the four corners in the picture above, two are "
    "flat.",
    cases=_clip_cases,
    suspects={
        "It stops wherever the ratio is outside: but where min takes the other side, r A, the gradient flows. A bad "
        "step beyond the clip must be able to come back.": (
            lambda n, o, a, c: torch.where(_outside(_ratio(n, o), c), 0.0, -_ratio(n, o) * a)
        ),
        "It stops on the wrong side: the flat corners are r > 1 + eps for A > 0 and r < 1 - eps for A < 0.": (
            lambda n, o, a, c: torch.where(
                torch.where(a > 0, _ratio(n, o) < 1 - c, _ratio(n, o) > 1 + c), 0.0, -_ratio(n, o) * a
            )
        ),
        "It never stops: where the clipped term is the smaller one, r is held and the derivative is 0.": (
            lambda n, o, a, c: -_ratio(n, o) * a
        ),
        "This is the derivative with respect to r: one with respect to its log has another factor r.": (
            lambda n, o, a, c: torch.where(_ratio(n, o).clamp(1 - c, 1 + c) * a < _ratio(n, o) * a, 0.0, -a)
        ),
        "The sign is wrong: the loss is minus the objective.": (
            lambda n, o, a, c: torch.where(
                _ratio(n, o).clamp(1 - c, 1 + c) * a < _ratio(n, o) * a, 0.0, _ratio(n, o) * a
            )
        ),
        "It stops for A > 0 only: a bad action that has become less likely than 1 - eps has a flat corner, too.": (
            lambda n, o, a, c: torch.where((a > 0) & (_ratio(n, o) > 1 + c), 0.0, -_ratio(n, o) * a)
        ),
        "It stops for r > 1 + eps only, whatever the sign of A.": (
            lambda n, o, a, c: torch.where(_ratio(n, o) > 1 + c, 0.0, -_ratio(n, o) * a)
        ),
        "Beyond the clip stands the gradient at its edge: there the objective is flat, so 0.": (
            lambda n, o, a, c: -_ratio(n, o).clamp(1 - c, 1 + c) * a
        ),
        "This is the gradient of the mean: each token's derivative is not divided by the number of tokens.": (
            lambda n, o, a, c: _gradient(n, o, a, c) / len(n)
        ),
        "The ratio is upside down: exp(logprobs - old_logprobs).": lambda n, o, a, c: _gradient(o, n, a, c),
        "This is the loss, not its derivative.": lambda n, o, a, c: (
            -torch.minimum(_ratio(n, o) * a, _ratio(n, o).clamp(1 - c, 1 + c) * a)
        ),
        "The old log-probability is missing: r = exp(logprobs - old_logprobs).": (
            lambda n, o, a, c: _gradient(n, 0 * o, a, c)
        ),
        "The log-ratio is compared with the bounds of the ratio: r = exp(logprobs - old_logprobs) is clipped.": (
            lambda n, o, a, c: torch.where(
                ((a > 0) & (n - o > 1 + c)) | ((a < 0) & (n - o < 1 - c)), 0.0, -_ratio(n, o) * a
            )
        ),
    },
    hints=(
        "Where the min takes $rA$: $\\partial r / \\partial \\ell = r$. Where it takes the clipped term and $r$ is "
        "outside, nothing moves.",
        "`surrogate = ratio * advantages`, `clipped = ratio.clamp(1 - clip_range, 1 + clip_range) * advantages`: the "
        "gradient is 0 where `clipped < surrogate`, and `-surrogate` elsewhere.",
    ),
)
def clip_gradient(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """The derivative of each token's clipped loss with respect to its log-probability, without autograd.

    Three tensors [N] give [N].
    """
    return _gradient(logprobs, old_logprobs, advantages, clip_range)


# 6.5 -----------------------------------------------------------------------------------------------------------------


def _loss_cases() -> list[Case]:
    cases = [
        Case("r = 2 and r = 1/2, A > 0", (*_ratios(2.0, 0.5), tensor(1.0, 1.0), bools(1, 1), 0.25),
             (tensor(-1.25, -0.5), tensor(0.0, -0.5))),
        Case("the same, A < 0", (*_ratios(2.0, 0.5), tensor(-1.0, -1.0), bools(1, 1), 0.25),
             (tensor(2.0, 0.75), tensor(2.0, 0.0))),
        Case("padding that holds NaN", (tensor(0.0, NAN, 0.0), tensor(0.0, 0.0, NAN), tensor(1.0, NAN, 2.0),
                                        bools(1, 0, 0), 0.25), (tensor(-1.0, 0.0, 0.0), tensor(-1.0, 0.0, 0.0))),
        Case("two tokens of unequal weight", (*_ratios(1.0, 1.0), tensor(1.0, 3.0), bools(1, 1), 0.25),
             (tensor(-1.0, -3.0), tensor(-1.0, -3.0))),
    ]  # fmt: skip
    for count, generator in zip((4, 6, 13), generators(3), strict=True):
        old = -normal(generator, count, dtype=F32).exp()
        moved = old + 0.5 * normal(generator, count, dtype=F32)
        case = moved, old, normal(generator, count, dtype=F32), flags(generator, count, share=0.8), 0.2
        cases.append(Case(f"random, {count} tokens", case))
    return cases


def launch_clipped_loss(
    kernel: Any, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    """Four tensors [N] -> loss and gradient of each token [N]: one program for 4 tokens, the last one half empty."""
    count = len(logprobs)
    inputs = [guarded(x, beyond=NAN) for x in (logprobs, old_logprobs, advantages)]
    losses, gradients = (guarded(torch.zeros(count), beyond=7.0) for _ in range(2))
    programs = triton.cdiv(count, 4)
    kernel[(programs,)](
        *inputs, guarded(mask, beyond=True), losses, gradients, count, 1 - clip_range, 1 + clip_range, BLOCK=4
    )
    for x in (losses, gradients):
        untouched_beyond(x, 7.0)
    return losses.cpu(), gradients.cpu()


def _clipped_loss(  # type: ignore[no-untyped-def]
    logprobs, old_logprobs, advantages, mask, losses, gradients, count, low, high, BLOCK: tl.constexpr
):
    """Loss and gradient of BLOCK tokens, by one program.

    Pointers to `count` numbers each: logprobs, old_logprobs, advantages, mask (1 counts, 0
    does not); to be written: losses, and gradients, their derivatives with respect to
    logprobs. Both are 0 where mask is 0, whatever lies there. low, high: the clip's bounds.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    counts = there & (tl.load(mask + at, mask=there, other=0) != 0)
    logprob = tl.load(logprobs + at, mask=counts, other=0.0)
    old_logprob = tl.load(old_logprobs + at, mask=counts, other=0.0)
    advantage = tl.load(advantages + at, mask=counts, other=0.0)
    ratio = tl.exp(logprob - old_logprob)
    surrogate = ratio * advantage
    held = tl.where(ratio > high, high, tl.where(ratio < low, low, ratio))
    clipped = held * advantage
    stopped = clipped < surrogate
    loss = -tl.where(stopped, clipped, surrogate)
    gradient = tl.where(stopped, 0.0, -surrogate)
    tl.store(losses + at, loss, mask=there)
    tl.store(gradients + at, gradient, mask=there)


_STOPPED = "gradient = tl.where(stopped, 0.0, -surrogate)"


@puzzle(
    "6.5",
    "the clipped loss",
    difficulty=3,
    minutes=25,
    task="One pass over the tokens: read four numbers, write two. The last program has fewer than BLOCK tokens, and "
    "what the mask leaves out may be NaN: don't even load it.",
    kernel=_clipped_loss,
    launch=launch_clipped_loss,
    cases=_loss_cases,
    suspects=variants(
        _clipped_loss,
        {
            "The gradient stops wherever the ratio is outside: where min takes the other side, r A, it flows.": [
                (_STOPPED, "gradient = tl.where((ratio > high) | (ratio < low), 0.0, -surrogate)")
            ],
            "The gradient never stops: it is 0 where the clipped term is the smaller one.": [
                (_STOPPED, "gradient = -surrogate")
            ],
            "The gradient lacks the factor r: d r / d logprob = r.": [
                (_STOPPED, "gradient = tl.where(stopped, 0.0, -advantage)")
            ],
            "It takes the max where PPO takes the min.": [
                ("stopped = clipped < surrogate", "stopped = clipped > surrogate")
            ],
            "The loss is not clipped: it is minus the smaller one of r A and clip(r) A.": [
                ("loss = -tl.where(stopped, clipped, surrogate)", "loss = -surrogate")
            ],
            "The clip has no lower bound.": [("tl.where(ratio < low, low, ratio)", "ratio")],
            "The sign of both is wrong: the loss is minus the objective.": [
                ("loss = -tl.where", "loss = tl.where"),
                (_STOPPED, "gradient = tl.where(stopped, 0.0, surrogate)"),
            ],
            "The mask is not used: load with mask=counts, so that nothing of what does not count is read.": [
                ("there & (tl.load(mask + at, mask=there, other=0) != 0)", "there")
            ],
            "The mask is a factor, and 0 * NaN is NaN: load with mask=counts.": [
                ("tl.load(logprobs + at, mask=counts", "tl.load(logprobs + at, mask=there"),
                ("tl.load(old_logprobs + at, mask=counts", "tl.load(old_logprobs + at, mask=there"),
                ("tl.load(advantages + at, mask=counts", "tl.load(advantages + at, mask=there"),
                (
                    "loss = -tl.where(stopped, clipped, surrogate)",
                    "loss = -tl.where(stopped, clipped, surrogate) * counts.to(tl.float32)",
                ),
                (_STOPPED, "gradient = tl.where(stopped, 0.0, -surrogate) * counts.to(tl.float32)"),
            ],
            "The ratio is upside down: exp(logprob - old_logprob).": [
                ("tl.exp(logprob - old_logprob)", "tl.exp(old_logprob - logprob)")
            ],
            "The clip has no upper bound.": [("tl.where(ratio > high, high,", "tl.where(ratio > high, ratio,")],
            "The sign of the gradient is wrong: it is the derivative of the loss, not of the objective.": [
                (_STOPPED, "gradient = tl.where(stopped, 0.0, surrogate)")
            ],
            "The sign of the loss is wrong: it is minus the objective.": [("loss = -tl.where", "loss = tl.where")],
            "Every program works on the first BLOCK tokens: its own tokens begin at tl.program_id(0) * BLOCK.": [
                ("tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)", "tl.arange(0, BLOCK)")
            ],
            "This is the gradient of the mean: each token's derivative is not divided by the number of tokens.": [
                (_STOPPED, "gradient = tl.where(stopped, 0.0, -surrogate / count)")
            ],
        },
    ),
    hints=(
        "`at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)`, `there = at < count`. A token counts if it is there "
        "and its mask is not 0. Three loads with `mask=counts, other=0.0`: then ratio 1 and advantage 0 give 0 anyway.",
        "`surrogate = ratio * advantage`; `clipped = tl.where(ratio > high, high, tl.where(ratio < low, low, ratio)) * "
        "advantage`; `stopped = clipped < surrogate` chooses for the loss and for the gradient (6.4). Both stores have "
        "`mask=there`.",
    ),
)
def clipped_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    """Loss of each token and its derivative with respect to its log-probability: four tensors [N] -> two [N]."""
    ratio = (torch.where(mask, logprobs, 0.0) - torch.where(mask, old_logprobs, 0.0)).exp()
    advantages = torch.where(mask, advantages, 0.0)
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)
    gradient = _gradient(ratio.log(), torch.zeros_like(ratio), advantages, clip_range)
    return loss, gradient


# 6.6 -----------------------------------------------------------------------------------------------------------------


def _gae_cases() -> list[Case]:
    none, zero = bools([0, 0]), tensor(0.0)
    cases = [
        Case("two steps, no values", (tensor([1, 2]), tensor([0, 0]), none, zero, 1.0, 0.5), tensor([2.0, 2.0])),
        Case("the value after the last column", (tensor([0, 0]), tensor([0, 0]), none, tensor(8.0), 0.5, 0.5),
             tensor([1.0, 4.0])),
        Case("an end after the first step", (tensor([1, 2]), tensor([3, 5]), bools([1, 1]), tensor(9.0), 0.5, 0.5),
             tensor([-2.0, -3.0])),
        Case("three steps, an end in the middle",
             (tensor([1, 2, 3]), tensor([2, 1, 1]), bools([0, 1, 0]), tensor(4.0), 0.5, 0.5),
             tensor([-0.25, 1.0, 4.0])),
    ]  # fmt: skip
    for (rows, steps), generator in zip(((1, 4), (2, 5), (3, 7)), generators(3), strict=True):
        rewards, values = (normal(generator, rows, steps, dtype=F32) for _ in range(2))
        rest = flags(generator, rows, steps), normal(generator, rows, dtype=F32), 0.9, 0.8
        cases.append(Case(f"random, of shape {rows, steps}", (rewards, values, *rest)))
    return cases


def launch_gae(
    kernel: Any, rewards: Tensor, values: Tensor, ends: Tensor, last_values: Tensor, gamma: float, lam: float
) -> Tensor:
    """Three tensors [N, T], last_values [N] -> advantages [N, T]: one program per row, a tile of 4 or 8 steps."""
    rows, steps = rewards.shape
    inputs = guarded(rewards, beyond=50.0), guarded(values, beyond=50.0), guarded(ends, beyond=False)
    advantages = guarded(torch.zeros(rows, steps), beyond=7.0)
    tile = max(4, triton.next_power_of_2(steps))
    kernel[(rows,)](*inputs, last_values.to(advantages.device), advantages, steps, gamma, lam, STEPS=tile)
    untouched_beyond(advantages, 7.0)
    return advantages.cpu()


def _gae(  # type: ignore[no-untyped-def]
    rewards, values, ends, last_values, advantages, steps, gamma, lam, STEPS: tl.constexpr
):
    """The advantages of one row, by one program, in one scan.

    Pointers: rewards, values and ends (1: the episode ends with this step), whose row i begins
    at i * steps; last_values [N], the value after the last column; advantages, to be written.
    STEPS: lanes of the tile, a power of two, at least `steps`.
    """
    row = tl.program_id(0)
    back = tl.arange(0, STEPS)
    t = steps - 1 - back  # the first lane is the last step
    there = t >= 0
    at = row * steps + t
    reward = tl.load(rewards + at, mask=there, other=0.0)
    value = tl.load(values + at, mask=there, other=0.0)
    end = tl.load(ends + at, mask=there, other=1) != 0
    following = tl.load(values + at + 1, mask=there & (t + 1 < steps), other=0.0)
    following = tl.where(t + 1 == steps, tl.load(last_values + row), following)
    delta = reward + gamma * tl.where(end, 0.0, following) - value
    decay = tl.where(end, 0.0, gamma * lam)
    _, b = tl.associative_scan((decay, delta), 0, after)
    tl.store(advantages + at, b, mask=there)


def _scans(tree: ast.AST) -> str | None:
    """What is wrong with the form of a kernel for 6.6."""
    if loops(tree):
        return "Right, but it walks: 1,024 steps wait for each other. Use tl.associative_scan."
    if not any(getattr(node, "attr", None) == "associative_scan" for node in ast.walk(tree)):
        return "Right, but not in one scan: join the lines of the steps with tl.associative_scan."
    return None


@jit
def _swapped(a_before, b_before, a, b):  # type: ignore[no-untyped-def]
    return a * a_before, a_before * b + b_before


@jit
def _added(a_before, b_before, a, b):  # type: ignore[no-untyped-def]
    return a * a_before, b_before + b


@puzzle(
    "6.6",
    "GAE as a scan",
    difficulty=5,
    minutes=40,
    task="$A_t = \\delta_t + d_t A_{t+1}$, where $d_t = \\gamma\\lambda$, or 0 where an episode ends. "
    "`tl.associative_scan((a, b), 0, after)` joins lane 0 with 1, with 2, ... by `after`, which makes one line of two. "
    "It runs from the first lane to the last, and time has to run the other way.",
    kernel=_gae,
    launch=launch_gae,
    form=_scans,
    cases=_gae_cases,
    suspects=variants(
        _gae,
        {
            "The scan runs forwards in time: A_t needs what comes after t, so lane 0 must hold the last step.": [
                ("t = steps - 1 - back", "t = back"),
                ("there = t >= 0", "there = t < steps"),
            ],
            "The operands of the scan's function are swapped: after(a', b', a, b) puts the line (a', b'), of the lanes "
            "before, into (a, b).": [("after)", "_swapped)")],
            "The scan only adds: what came before has to be scaled by this lane's decay.": [("after)", "_added)")],
            "An end does not cut the chain: the decay there is 0, or advantages leak from one episode into another.": [
                ("decay = tl.where(end, 0.0, gamma * lam)", "decay = tl.where(there, gamma * lam, 0.0)")
            ],
            "An end does not cut the value: after it there is no next state, so delta has no gamma V.": [
                ("tl.where(end, 0.0, following)", "following")
            ],
            "An end cuts neither the value nor the chain.": [
                ("tl.where(end, 0.0, following)", "following"),
                ("decay = tl.where(end, 0.0, gamma * lam)", "decay = tl.where(there, gamma * lam, 0.0)"),
            ],
            "The decay is gamma alone: gamma * lam.": [
                ("decay = tl.where(end, 0.0, gamma * lam)", "decay = tl.where(end, 0.0, gamma)")
            ],
            "The value after the last column is missing: at t = steps - 1 it is last_values.": [
                ("tl.where(t + 1 == steps, tl.load(last_values + row), following)", "following")
            ],
            "There is no scan: these are the TD errors.": [("advantages + at, b,", "advantages + at, delta,")],
            "This is the slope of each line: what is wanted is the other result of the scan.": [("_, b = ", "b, _ = ")],
            "The decay is lam alone: gamma * lam.": [
                ("decay = tl.where(end, 0.0, gamma * lam)", "decay = tl.where(end, 0.0, lam)")
            ],
            "V(s) is missing in delta: reward + gamma V(s') - V(s).": [
                ("tl.where(end, 0.0, following) - value", "tl.where(end, 0.0, following)")
            ],
            "gamma is missing in delta: reward + gamma V(s') - V(s).": [
                ("gamma * tl.where(end, 0.0, following)", "tl.where(end, 0.0, following)")
            ],
            "The ends are read the wrong way round: 1 says that the episode ends with this step.": [
                ("mask=there, other=1) != 0", "mask=there, other=1) == 0")
            ],
        },
    ),
    hints=(
        "`t = steps - 1 - tl.arange(0, STEPS)` turns time round; what lies before step 0 is masked with `t >= 0`. "
        "$V(s_{t+1})$ is `values` one step on, except in the last column.",
        "`delta = reward + gamma * tl.where(end, 0.0, following) - value`, `decay = tl.where(end, 0.0, gamma * lam)`, "
        "`a, b = tl.associative_scan((decay, delta), 0, after)`: nothing comes before the first lane, so `b` is $A_t$.",
    ),
)
def gae(rewards: Tensor, values: Tensor, ends: Tensor, last_values: Tensor, gamma: float, lam: float) -> Tensor:
    """rewards, values, ends (bool) [N, T], last_values [N] -> advantages [N, T]."""
    return returns.gae(rewards, values, ends, last_values=last_values, gamma=gamma, lam=lam)[0]
