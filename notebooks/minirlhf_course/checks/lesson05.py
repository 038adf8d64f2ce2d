"""Lesson 05, from TRPO to PPO: the ratio, TRPO's step and its two parts, the clip, two details."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from minirlhf import losses
from minirlhf.control import trpo
from minirlhf.kl import exact_kl, kl_k3
from minirlhf_course.checks.cases import tensor, two_logprobs
from minirlhf_course.checks.exercise import Case, exercise
from minirlhf_course.checks.mistakes05 import (
    Scores,
    clip_cases,
    clipped_with,
    fisher_cases,
    fisher_with,
    fisher_without_product,
    solve_with,
    solver_cases,
    step_cases,
    step_with,
    value_cases,
    value_with,
)

# 5.1 -----------------------------------------------------------------------------------------------------------------


def _ratio_cases() -> list[Case]:
    cases = [
        Case("the same policy", (tensor([-1]), tensor([-1])), tensor([1.0])),
        Case("probabilities 1/2 now and 1/4 before", (tensor([0.5]).log(), tensor([0.25]).log()), tensor([2.0])),
    ]
    return cases + two_logprobs()


@exercise(
    "5.1",
    "the importance ratio",
    difficulty=1,
    minutes=4,
    task="The samples are the old policy's, the objective is the new one's. The weight that mends this is "
    "$r = \\pi_\\theta(a|s) / \\pi_{\\text{old}}(a|s)$, from log-probabilities. Which of the two is a constant?",
    cases=_ratio_cases,
    suspects={
        "This is the log of the ratio: take exp.": lambda new, old: new - old.detach(),
        "The ratio is upside down: the new policy's probability stands above, the old one's below.": (
            lambda new, old: (old.detach() - new).exp()
        ),
        "The ratio is always 1: it compares the new policy with itself. Use old_logprobs, kept from when the data were "
        "drawn.": lambda new, old: (new - new.detach()).exp(),
        "No gradient flows into logprobs: the new policy must be able to learn, only the old one is a constant.": (
            lambda new, old: (new - old).detach().exp()
        ),
        "The old policy is a constant: use old_logprobs.detach().": lambda new, old: (new - old).exp(),
        "It divides log-probabilities: the ratio of probabilities is exp of their difference.": (
            lambda new, old: new / old.detach()
        ),
        "It sums over the row: that is the ratio of whole trajectories. Here every action has a ratio of its own.": (
            lambda new, old: (new - old.detach()).sum(-1).exp()
        ),
        "It sums over the row, and so every action gets the ratio of the whole trajectory: one of its own each.": (
            lambda new, old: (new - old.detach()).sum(-1, keepdim=True).exp().expand_as(new)
        ),
        "It subtracts probabilities: divide them, or take exp of the difference of their logs.": (
            lambda new, old: new.exp() - old.detach().exp()
        ),
        "It detaches the wrong one: old_logprobs is the constant, and the new policy must be able to learn.": (
            lambda new, old: (new.detach() - old).exp()
        ),
    },
    hints=("$a / b = e^{\\log a - \\log b}$.", "`(logprobs - old_logprobs.detach()).exp()`"),
    leaves=("logprobs", "old_logprobs"),
)
def importance_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """pi_new / pi_old of the actions taken: logprobs (with gradient) and old_logprobs (a constant) [...] give [...]."""
    return (logprobs - old_logprobs.detach()).exp()


# 5.2 -----------------------------------------------------------------------------------------------------------------


@exercise(
    "5.2",
    "conjugate gradient",
    difficulty=4,
    minutes=30,
    task="TRPO steps along $x = F^{-1} g$, with a matrix $F$ far too large to write down. All you have is its product "
    "with a vector, `matvec(v)`. Conjugate gradient needs no more: start from $x = 0$, and stop after `iterations` or "
    "when the residual is zero ($r \\cdot r < 10^{-20}$).",
    cases=solver_cases,
    suspects={
        "After it has converged, r is 0 and it divides 0 by 0: stop when r . r is tiny.": (
            partial(solve_with, "never stops")
        ),
        "This is steepest descent: the new direction is r + beta * p, with beta = (new r . r) / (old r . r).": (
            partial(solve_with, "steepest")
        ),
        "beta is upside down: it is (new r . r) / (old r . r).": partial(solve_with, "beta"),
        "beta is always 1: it is (new r . r) / (old r . r). Was r . r overwritten too early?": (
            partial(solve_with, "beta 1")
        ),
        "The step length misses the curvature: alpha = (r . r) / (p . matvec(p)).": partial(solve_with, "no curvature"),
        "x moves by the whole direction: x + alpha * p.": partial(solve_with, "no step"),
        "The residual has the wrong sign: r - alpha * matvec(p).": partial(solve_with, "residual grows"),
        "It starts at x = b: start at 0, where the residual is b.": partial(solve_with, "starts at b"),
        "The new direction is built on the old one alone: it is the new residual plus beta times the old direction.": (
            partial(solve_with, "old residual")
        ),
        "It runs one iteration too many.": lambda matvec, b, n: solve_with("", matvec, b, n + 1),
        "It runs one iteration too few.": lambda matvec, b, n: solve_with("", matvec, b, n - 1),
        "It goes on to the solution: stop after `iterations`.": lambda matvec, b, n: solve_with(
            "", matvec, b, 2 * len(b)
        ),
        "The direction never changes: after each step, p = r + beta * p.": partial(solve_with, "one direction"),
        "The residual is not updated: r - alpha * matvec(p).": partial(solve_with, "stale residual"),
        "This is the residual: return x.": partial(solve_with, "residual"),
        "beta is the square root of what it should be: (new r . r) / (old r . r), without norms.": partial(
            solve_with, "root"
        ),
        "The step length has a norm where the square belongs: alpha = (r . r) / (p . matvec(p)).": partial(
            solve_with, "norm"
        ),
    },
    hints=(
        "Five lines a round, with direction `p` (first `r`, which is first `b`): `alpha`, `x`, `r`, `beta`, `p`.",
        "`alpha = (r @ r) / (p @ matvec(p))`; `x = x + alpha * p`; `new_r = r - alpha * matvec(p)`; "
        "`beta = (new_r @ new_r) / (r @ r)`; `p = new_r + beta * p`.",
    ),
)
def conjugate_gradient(matvec: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """Solve F x = b, F symmetric and positive, from x = 0: matvec(v) [P] is F v [P], b is [P]; gives x [P]."""
    return trpo.conjugate_gradient(matvec, b, iterations, tolerance=1e-20)


# 5.3 -----------------------------------------------------------------------------------------------------------------


@exercise(
    "5.3",
    "the Fisher-vector product",
    difficulty=4,
    minutes=30,
    task="$F$ is the Hessian, at $\\theta$, of the mean KL from the policy as it is now to a policy that may move. "
    "Its product "
    "with $v$ needs no Hessian: differentiate once, multiply the gradient by $v$, differentiate again.",
    cases=fisher_cases,
    suspects={
        "Everything came out 0. Either the policy that stays is not detached (KL(theta || theta) is 0 wherever "
        "theta goes), "
        "or it is differentiated once only: use create_graph=True and differentiate gradient @ vector.": (
            partial(fisher_with, "zero")
        ),
        "It sums over the states: F is the Hessian of the mean KL.": partial(fisher_with, "sum"),
        "Damping is added here: leave it out, the caller adds damping * vector.": partial(fisher_with, "damped"),
        "This is the Hessian of the entropy: take the KL from the fixed policy to the moving one.": (
            partial(fisher_with, "entropy")
        ),
        "The softmax's own curvature is diag(p) - p p^T: the second part is missing.": fisher_without_product,
        "The sign is wrong: F is positive, the Hessian of the KL and not of minus the KL.": (
            lambda *args: -fisher_with("", *args)
        ),
        "It is twice F v: F is the Hessian of one KL, not of the KL both ways.": (
            lambda *args: 2 * fisher_with("", *args)
        ),
        "The Fisher matrix is missing: this is v itself.": lambda policy, theta, vector: vector.clone(),
    },
    hints=(
        "`logits = policy(theta)`, and the policy that stays is `logits.detach()`. "
        "`minirlhf.kl.exact_kl(logits.detach(), logits).mean()` is the KL.",
        "`(g,) = torch.autograd.grad(kl, theta, create_graph=True)`, then `torch.autograd.grad(g @ vector, "
        "theta)[0]`, on "
        "`theta = theta.detach().clone().requires_grad_()`.",
    ),
)
def fisher_vector_product(policy: Callable[[Tensor], Tensor], theta: Tensor, vector: Tensor) -> Tensor:
    """F v, F the Hessian of the mean KL over states: policy(theta [P]) gives logits [N, A]; vector, result are [P]."""
    theta = theta.detach().clone().requires_grad_()
    logits = policy(theta)
    return trpo.fisher_product(lambda: exact_kl(logits.detach(), logits).mean(), [theta], damping=0.0)(vector)


# 5.4 -----------------------------------------------------------------------------------------------------------------


@exercise(
    "5.4",
    "TRPO's step",
    difficulty=4,
    minutes=40,
    task="The whole update. The direction is $x = F^{-1} g$, with $g = \\nabla L$ at $\\theta$; the length "
    "$\\sqrt{2 \\delta / x^\\top F x}$ uses up the budget if the KL is a perfect bowl. It isn't: so try this length, "
    "then half of it, and so on, up to ten halvings, and take the first that makes $L$ larger *and* keeps the mean "
    "$\\mathrm{KL}(\\pi_\\text{old} \\| \\pi_\\theta)$ within $\\delta$ (`max_kl`). If none does, $\\theta$ stays as "
    "it was. Add `damping` times $v$ to every $F v$: it stops a nearly flat direction from giving a huge step. For ten "
    "rounds of conjugate gradient and for $F v$ you have the functions that you have just written, "
    "`conjugate_gradient` and `fisher_vector_product`.",
    cases=step_cases,
    suspects={
        "It comes back to the old parameters every time. Either the step goes downhill (L is to grow: F x = +g), or "
        "the line search refuses what it should accept.": partial(step_with, "downhill"),
        "The square root is missing: the length is sqrt(2 max_kl / (x . F x)).": partial(step_with, "no root"),
        "The KL is not checked: a step that goes further than max_kl must be halved, however much L promises.": (
            partial(step_with, "any KL")
        ),
        "The line search accepts a step that makes L worse: it must be larger than at the old parameters.": (
            partial(step_with, "any L")
        ),
        "When no length helps, the last one tried stays: give back the old parameters.": (
            partial(step_with, "not restored")
        ),
        "There is no line search: the length is right only for a perfect bowl. Halve it until L is larger and the KL "
        "within max_kl.": partial(step_with, "no search"),
        "The 2 is missing: the KL is x . F x / 2, so the length is sqrt(2 max_kl / (x . F x)).": (
            partial(step_with, "no two")
        ),
        "The direction is the plain gradient: it is x, with F x = g.": partial(step_with, "plain"),
        "x is taken as it is: its length must be sqrt(2 max_kl / (x . F x)).": partial(step_with, "no length"),
        "max_kl is used as a learning rate: the length is sqrt(2 max_kl / (x . F x)).": partial(step_with, "delta"),
        "The length is upside down: sqrt(2 max_kl / (x . F x)).": partial(step_with, "inverse"),
        "The step is measured in weights: its length is sqrt(2 max_kl / (x . F x)), with F between.": (
            partial(step_with, "norm")
        ),
        "The damping is missing: F v + damping * v wherever F is applied.": partial(step_with, "undamped"),
        "The damping is missing in the length: there, too, F x is F x + damping * x.": (
            partial(step_with, "length undamped")
        ),
        "The halvings pile up (1, 1/2, 1/8, 1/64): each length is half of the one before.": partial(
            step_with, "pile up"
        ),
        "L is compared with 0: compare it with L at the old parameters, which need not be 0.": (
            partial(step_with, "against 0")
        ),
        "The line search takes a step because L is worse there: L is to grow.": partial(step_with, "worse"),
        "The KL is measured the other way round: it is the mean of KL(old || new).": partial(step_with, "reversed"),
        "The KL is summed over the states: the bound is on its mean.": partial(step_with, "sum"),
        "The bound is on the mean KL over the states, not on the largest.": partial(step_with, "max"),
    },
    hints=(
        "Three parts: `g` by `torch.autograd.grad` of `surrogate` at a leaf made from `theta`; `x` by "
        "`conjugate_gradient(curved, g, 10)`, where `curved(v)` is your product plus `damping * v`; a loop over "
        "`range(11)` with two conditions. After the loop: `return theta`.",
        "`step = (2 * max_kl / (x @ curved(x))).sqrt() * x`. In the loop: `new = theta + 0.5**k * step`; `kl = "
        "exact_kl(policy(theta), policy(new)).mean()`, from `minirlhf.kl`; `if surrogate(new) > surrogate(theta) and "
        "kl <= max_kl: return new`.",
    ),
)
def trpo_step(policy: Scores, surrogate: Scores, theta: Tensor, max_kl: float, damping: float) -> Tensor:
    """TRPO's update of theta [P], or theta itself where no step helps: policy(theta) gives logits [N, A],
    surrogate(theta) the 0-d L. The step is halved up to ten times.
    """
    return step_with("", policy, surrogate, theta, max_kl, damping)


# 5.5 -----------------------------------------------------------------------------------------------------------------


@exercise(
    "5.5",
    "the clipped loss",
    difficulty=3,
    minutes=15,
    task="PPO's one line: $-\\mathbb{E}\\big[\\min(r A,\\; \\mathrm{clip}(r, 1 - \\varepsilon, 1 + "
    "\\varepsilon)\\,A)\\big]$. Before you "
    "write it, draw it: for $A > 0$ and for $A < 0$, where is the slope in $r$ zero?",
    cases=clip_cases,
    suspects={
        "It takes the max where PPO takes the min: the min is the pessimist's choice.": partial(clipped_with, "max"),
        "The min is taken before multiplying by A: for A < 0 that chooses the wrong one. Multiply both by A first.": (
            partial(clipped_with, "before A")
        ),
        "The minus sign is missing: the optimizer minimises.": partial(clipped_with, "sign"),
        "The ratio is always 1, so the clip never acts: it compares the new policy with itself. Use old_logprobs.": (
            partial(clipped_with, "ratio 1")
        ),
        "Only the clipped term is there: without the min with r * A, a bad step beyond the clip gets no gradient "
        "back.": (partial(clipped_with, "clip alone")),
        "Nothing is clipped: take the min of r * A and clip(r) * A.": partial(clipped_with, "no clip"),
        "The log of the ratio is clipped: clip the ratio itself to [1 - eps, 1 + eps].": partial(clipped_with, "log"),
        "The clip has no lower bound: [1 - eps, 1 + eps].": partial(clipped_with, "above"),
        "The ratio is upside down: exp(logprobs - old_logprobs).": partial(clipped_with, "inverse"),
        "A gradient flows into the advantages: they are constants, use advantages.detach().": (
            partial(clipped_with, "leak")
        ),
        "No gradient flows into logprobs: the policy can't learn.": partial(clipped_with, "detached"),
        "This is the sum: take the mean.": partial(clipped_with, "sum"),
        "This is the mean over rows of sums over steps: take one mean over all steps.": (
            lambda new, *rest: new.shape[-1] * clipped_with("", new, *rest)
        ),
        "The log-ratios are summed over the row, which gives one ratio per trajectory: every action has its own.": (
            partial(clipped_with, "row")
        ),
        "The product r * A is clipped: clip the ratio to [1 - eps, 1 + eps], and multiply by A afterwards.": (
            partial(clipped_with, "product")
        ),
        "The min is taken of two means: take it step by step, then the mean.": partial(clipped_with, "two means"),
        "The advantages are whitened: a good trick, but the caller does that. Here they are used as they are.": (
            partial(clipped_with, "white")
        ),
        "The clip's bounds are -eps and +eps: the ratio is kept within [1 - eps, 1 + eps].": (
            partial(clipped_with, "around 0")
        ),
        "The clip stops the gradient wherever the ratio is outside: where min takes r * A, it must flow.": (
            partial(clipped_with, "both sides")
        ),
    },
    hints=(
        "Two candidates, `ratio * A` and `ratio.clamp(1 - clip_range, 1 + clip_range) * A`.",
        "`-torch.minimum(first, second).mean()`, with `ratio = (logprobs - old_logprobs.detach()).exp()` and a "
        "detached A.",
    ),
    leaves=("logprobs", "old_logprobs", "advantages"),
)
def clipped_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """PPO's clipped policy loss, the mean over all steps: three tensors [N, T] give a 0-d tensor to minimise."""
    return losses.clipped_surrogate(logprobs, old_logprobs, advantages, clip_range=clip_range)


# 5.6 -----------------------------------------------------------------------------------------------------------------


def _kl_cases() -> list[Case]:
    near = torch.tensor([[-1.0, -1.002, -1.005, -1.01]])
    cases = [
        Case("the same policy", (tensor([-1]), tensor([-1])), tensor([0.0])),
        Case("log-ratio log 2", (tensor([0.5]).log(), tensor([0.25]).log()), tensor([0.30685282])),
        Case("nearly the same policy, in float32", (near, torch.full_like(near, -1.0)), rtol=1e-3),
    ]
    return cases + two_logprobs()


@exercise(
    "5.6",
    "how far has the policy moved?",
    difficulty=2,
    minutes=12,
    task="The actions were drawn from the **old** policy. With $\\rho = \\log \\pi_\\theta - \\log "
    "\\pi_{\\text{old}}$, Schulman's "
    "estimate of $\\mathrm{KL}(\\pi_{\\text{old}} \\| \\pi_\\theta)$ is $e^{\\rho} - 1 - \\rho$: unbiased, never "
    "negative. Near "
    "$\\rho = 0$ the two large terms cancel; `torch.expm1` knows a way.",
    cases=_kl_cases,
    suspects={
        "The digits cancel: exp(rho) - 1 loses in float32 what is left after subtracting rho. Use torch.expm1(rho) "
        "- rho.": (lambda new, old: (new - old.detach()).exp() - 1 - (new - old.detach())),
        "It is reversed: the samples are the old policy's, so rho = logprobs - old_logprobs, not the other way "
        "round.": (lambda new, old: torch.expm1(old.detach() - new) - (old.detach() - new)),
        "This is k1 = -rho: unbiased, but noisy and often negative.": lambda new, old: old.detach() - new,
        "This is +rho, whose mean is minus the KL.": lambda new, old: new - old.detach(),
        "This is k2 = rho^2 / 2: never negative, but biased.": lambda new, old: (new - old.detach()).square() / 2,
        "The KL is detached from the graph: as a penalty it would have no gradient, and PPO would not feel it.": (
            lambda new, old: (torch.expm1(new - old) - (new - old)).detach()
        ),
        "The old policy is a constant: use old_logprobs.detach().": lambda new, old: (
            torch.expm1(new - old) - (new - old)
        ),
        "This is the mean: one estimate a step, the caller averages (and may have a mask).": (
            lambda new, old: (torch.expm1(new - old.detach()) - (new - old.detach())).mean()
        ),
        "This is the sum over the row: one estimate per step, the caller adds or averages.": (
            lambda new, old: (torch.expm1(new - old.detach()) - (new - old.detach())).sum(-1)
        ),
        "This is rho squared, twice k2: never negative, but biased.": lambda new, old: (new - old.detach()).square(),
        "This is |rho|: never negative, but biased.": lambda new, old: (new - old.detach()).abs(),
        "rho has the wrong sign in one place: exp(rho) - 1 - rho.": (
            lambda new, old: torch.expm1(new - old.detach()) + (new - old.detach())
        ),
        "Only exp(rho) - 1 is there: subtract rho, or its mean is 0 whatever the policies are.": (
            lambda new, old: torch.expm1(new - old.detach())
        ),
        "The 1 is missing: exp(rho) - 1 - rho is 0 where the policies agree.": (
            lambda new, old: (new - old.detach()).exp() - (new - old.detach())
        ),
        "This is p log(p / q), a term of the exact KL: the actions were drawn from p already, so leave it out.": (
            lambda new, old: old.detach().exp() * (old.detach() - new)
        ),
    },
    hints=(
        "`expm1(x)` is exp(x) - 1, computed without the cancellation.",
        "`rho = logprobs - old_logprobs.detach()`, `torch.expm1(rho) - rho`.",
    ),
    leaves=("logprobs", "old_logprobs"),
)
def approx_kl(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """The k3 estimate of KL(old || new) from actions of the old policy, one a step, with gradient: [...] to [...]."""
    return kl_k3(old_logprobs.detach(), logprobs)


# 5.7 -----------------------------------------------------------------------------------------------------------------


@exercise(
    "5.7",
    "the clipped value loss",
    difficulty=2,
    minutes=10,
    task="One of PPO's details that the paper never mentions: the new value may not run away from the old one either. "
    "$\\tfrac12 \\max\\big[(V - R)^2, (V_{\\text{clip}} - R)^2\\big]$, where $V_{\\text{clip}}$ is $V$ kept within "
    "`clip_range` of "
    "$V_{\\text{old}}$. (Whether it helps is another question: see the ablation.)",
    cases=value_cases,
    suspects={
        "It takes the min: take the larger of the two errors, as the pessimist would.": partial(value_with, "min"),
        "Only the clipped error is there: take the larger of it and the plain one.": partial(value_with, "clip alone"),
        "Nothing is clipped, or around the return, where it never acts: the clip is around the old value.": partial(
            value_with, "no clip"
        ),
        "The half is missing: 1/2 of the larger error.": partial(value_with, "half"),
        "The value itself is clipped: clip how far it moved, V_old + clip(V - V_old).": partial(value_with, "around 0"),
        "It clips the quotient V / V_old: the value clip is a distance, V_old + clip(V - V_old).": (
            partial(value_with, "factor")
        ),
        "This is the sum: take the mean.": lambda v, *rest: v.numel() * value_with("", v, *rest),
        "This is the mean over rows of sums over steps: take one mean over all steps.": (
            lambda v, *rest: v.shape[-1] * value_with("", v, *rest)
        ),
        "The max is taken of two means: take it step by step, then the mean.": partial(value_with, "two means"),
        "The max is taken of the values, before squaring: take the larger of the two squared errors.": (
            partial(value_with, "before squaring")
        ),
        "The errors are not squared: 1/2 of the larger squared error.": partial(value_with, "absolute"),
        "The return is clipped: the value is what must stay near the old one, V_old + clip(V - V_old).": (
            partial(value_with, "return")
        ),
        "How far it moved is clipped, and the old value not added: V_old + clip(V - V_old).": (
            partial(value_with, "no centre")
        ),
        "A gradient flows into old_values: they are a constant, use old_values.detach().": partial(value_with, "leak"),
        "The clip is around V, and moves V_old: keep V within clip_range of V_old.": partial(value_with, "swapped"),
    },
    hints=(
        "First `near`, the value kept close to the old one. Then two squared errors, and the larger of them.",
        "`near = old + (values - old).clamp(-clip_range, clip_range)`; "
        "`0.5 * torch.maximum((values - R) ** 2, (near - R) ** 2).mean()`, with `old` and R detached.",
    ),
    leaves=("values", "old_values", "returns"),
)
def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> Tensor:
    """PPO's clipped value loss, the mean over all steps: three tensors [N, T] give a 0-d tensor."""
    return losses.value_loss(values, returns, old_values=old_values, clip_range=clip_range)
