"""Lesson 05's cases, and its answers with one mistake planted: what its checks know by name."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minirlhf import losses
from minirlhf.control import trpo
from minirlhf.kl import exact_kl
from minirlhf_course.checks.cases import F64, SIZES, generators, normal, row, tensor
from minirlhf_course.checks.exercise import Case

# 5.2, conjugate gradient ---------------------------------------------------------------------------------------------


def _product(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    def matvec(vector: Tensor) -> Tensor:
        return matrix.to(vector.dtype) @ vector

    return matvec


def solver_cases() -> list[Case]:
    eye, bent = _product(torch.eye(2)), _product(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    cases = [
        Case("matvec(v) = 2 v", (_product(2 * torch.eye(1)), tensor(6), 1), tensor(3.0)),
        Case("matvec(v) = (2 v_1, v_2), one iteration", (bent, tensor(1, 1), 1), tensor(2 / 3, 2 / 3)),
        Case("matvec(v) = (2 v_1, v_2), two iterations", (bent, tensor(1, 1), 2), tensor(0.5, 1.0)),
        Case("matvec(v) = v, solved after one of three iterations", (eye, tensor(1, 2), 3), tensor(1.0, 2.0)),
    ]
    for (size, iterations), generator in zip(((3, 2), (5, 3), (8, 5), (8, 8)), generators(4), strict=True):
        root = normal(generator, size, size)
        matrix = root @ root.T / size + torch.eye(size, dtype=F64)
        b = 30 * normal(generator, size)  # beside it an epsilon in a denominator is small to the last iteration
        cases.append(Case(f"random, {size} unknowns", (_product(matrix), b, iterations)))
    return cases


def solve_with(bug: str, matvec: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """Exercise 5.2 with one mistake planted."""
    x, residual = torch.zeros_like(b), b.clone()
    if bug == "starts at b":
        x, residual = b.clone(), b - matvec(b)
    direction = residual.clone()
    squared = residual @ residual
    for _ in range(iterations):
        if bug != "never stops" and squared < 1e-20:
            break
        product = matvec(direction)
        alpha = squared / (direction @ (direction if bug == "no curvature" else product))
        if bug == "norm":
            alpha = squared.sqrt() / (direction @ product)
        x = x + (alpha if bug != "no step" else 1.0) * direction
        residual = residual + {"residual grows": alpha, "stale residual": 0.0 * alpha}.get(bug, -alpha) * product
        new_squared = residual @ residual
        beta = {"steepest": 0.0 * squared, "beta": squared / new_squared, "beta 1": squared / squared}.get(
            bug, new_squared / squared
        )
        if bug == "root":
            beta = beta.sqrt()
        if bug != "one direction":
            direction = (direction if bug == "old residual" else residual) + beta * direction
        squared = new_squared
    return residual if bug == "residual" else x


# 5.3, the Fisher-vector product --------------------------------------------------------------------------------------


def _linear(features: Tensor, actions: int) -> Callable[[Tensor], Tensor]:
    def policy(theta: Tensor) -> Tensor:
        return (features.to(theta.dtype) @ theta.reshape(features.shape[1], actions)).tanh() * 2

    return policy


def _table(theta: Tensor) -> Tensor:
    return theta[None]


def _twice(theta: Tensor) -> Tensor:
    return theta.expand(2, -1)


def fisher_cases() -> list[Case]:
    cases = [
        Case("one state, two equal logits theta", (_table, tensor(0, 0), tensor(1, 0)), tensor(0.25, -0.25)),
        Case("the same in two states alike", (_twice, tensor(0, 0), tensor(1, 0)), tensor(0.25, -0.25)),
    ]
    for (states, inputs, actions), generator in zip(((3, 2, 2), (5, 3, 4)), generators(2), strict=True):
        policy = _linear(normal(generator, states, inputs), actions)
        theta, vector = normal(generator, inputs * actions), normal(generator, inputs * actions)
        cases.append(Case(f"random, {states} states and {actions} actions", (policy, theta, vector)))
    return cases


def fisher_with(bug: str, policy: Callable[[Tensor], Tensor], theta: Tensor, vector: Tensor) -> Tensor:
    """Exercise 5.3 with one mistake planted."""
    theta = theta.detach().clone().requires_grad_()
    logits = policy(theta)
    kl = exact_kl(logits.detach(), logits)
    kl = kl.sum() if bug == "sum" else kl.mean()
    if bug == "entropy":
        kl = -losses.entropy_from_logits(logits).mean()
    (gradient,) = torch.autograd.grad(kl, theta, create_graph=True)
    if bug == "zero":
        return torch.zeros_like(vector)
    (product,) = torch.autograd.grad(gradient @ vector, theta)
    return product + 0.1 * vector if bug == "damped" else product


def fisher_without_product(policy: Callable[[Tensor], Tensor], theta: Tensor, vector: Tensor) -> Tensor:
    """F v without the -p p^T of the softmax: J^T diag(p) J v."""
    jacobian = torch.autograd.functional.jacobian(policy, theta)
    probabilities = policy(theta).softmax(-1)
    return torch.einsum("sap,sa,saq,q->p", jacobian, probabilities, jacobian, vector) / len(probabilities)


# 5.4, TRPO's step ----------------------------------------------------------------------------------------------------

Scores = Callable[[Tensor], Tensor]
"""A number, or logits, of a vector of weights."""


def _against_zero(*inputs: float) -> Scores:
    """Two actions: the first has the logit 0, the second in each state its input times the only weight."""

    def policy(theta: Tensor) -> Tensor:
        logit = theta * theta.new_tensor(inputs)
        return torch.stack((torch.zeros_like(logit), logit), -1)

    return policy


def _pays(policy: Scores, *of_second: float) -> Scores:
    """The mean reward where the second action pays this in each state, and the first nothing."""

    def surrogate(theta: Tensor) -> Tensor:
        return (policy(theta).softmax(-1)[:, 1] * theta.new_tensor(of_second)).mean()

    return surrogate


def _top_is_near(theta: Tensor) -> Tensor:
    return 1 - 1000 * (theta - 1e-4).square().sum()


def _of_a_batch(seed: int, states: int, inputs: int, actions: int) -> tuple[Scores, Scores, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features, theta = normal(generator, states, inputs), normal(generator, inputs * (actions - 1))

    def policy(theta: Tensor) -> Tensor:
        logits = features.to(theta.dtype) @ theta.reshape(inputs, actions - 1)
        return torch.cat((torch.zeros_like(logits[:, :1]), logits), -1)

    chosen = torch.multinomial(policy(theta).softmax(-1), 1, generator=generator)
    advantages = 30 * normal(generator, states)  # beside its slope an epsilon in a denominator is small
    old_logprobs = policy(theta).log_softmax(-1).gather(1, chosen)[:, 0]

    def surrogate(theta: Tensor) -> Tensor:
        logprobs = policy(theta).log_softmax(-1).gather(1, chosen)[:, 0]
        return ((logprobs - old_logprobs.to(theta.dtype)).exp() * advantages.to(theta.dtype)).mean()

    return policy, surrogate, theta


def step_cases() -> list[Case]:
    one, two = _against_zero(1.0), _against_zero(1.0, 4.0)
    half = math.sqrt(1 / (math.exp(3) / (1 + math.exp(3)) ** 2)) / 2  # of the step: F = p (1 - p), x = -1
    quarter = math.sqrt(4 / 2.125) / 4  # F = (1 + 16) / 8
    cases = [
        Case("the first length fits", (one, _pays(one, 1.0), row(0.0), 0.01, 0.0), row(math.sqrt(0.08))),
        Case("no length that it tries helps", (one, _top_is_near, row(0.0), 0.5, 0.0), row(0.0)),
        Case("the first length goes too far", (one, _pays(one, -10.0), row(3.0), 0.5, 0.0), row(3 - half)),
        Case("L falls again along the step", (two, _pays(two, -3.0, 1.0), row(0.0), 2.0, 0.0), row(quarter)),
    ]
    for seed, size, max_kl, damping in (
        (22, (4, 2, 2), 0.5, 0.1),
        (35, (6, 2, 3), 0.3, 0.1),
        (13, (8, 3, 3), 0.8, 0.1),
        (3, (5, 2, 4), 0.01, 0.1),
    ):
        name = "random, {} states, {} inputs and {} actions".format(*size)
        # A looser tolerance: a solver that stops at r . r < 1e-10 is right too.
        cases.append(Case(name, (*_of_a_batch(seed, *size), max_kl, damping), rtol=1e-3))
    return cases


def step_with(
    bug: str, policy: Scores, surrogate: Scores, theta: Tensor, max_kl: float, damping: float, halvings: int = 10
) -> Tensor:
    """Exercise 5.4 with one mistake planted."""

    def fisher(vector: Tensor, damping: float = damping) -> Tensor:
        return fisher_with("sum" if bug == "sum in F" else "", policy, theta, vector) + damping * vector

    def curved(vector: Tensor) -> Tensor:
        return fisher(vector, 0.0 if bug == "undamped" else damping)

    leaf = theta.clone().requires_grad_()
    L_old = surrogate(leaf)
    (g,) = torch.autograd.grad(L_old, leaf)
    x = g if bug == "plain" else trpo.conjugate_gradient(curved, -g if bug == "downhill" else g, 10, tolerance=1e-20)
    curvature = float(x @ (fisher(x, 0.0) if bug == "length undamped" else curved(x)))
    length = {
        "no root": 2 * max_kl / curvature,
        "no two": math.sqrt(max_kl / curvature),
        "no length": 1.0,
        "delta": max_kl,
        "inverse": math.sqrt(curvature / (2 * max_kl)),
        "norm": math.sqrt(2 * max_kl) / float(x.norm()),
    }.get(bug, math.sqrt(2 * max_kl / curvature))
    before, new = policy(theta), theta + length * x
    if bug == "no search":
        return new
    for k in range(halvings + 1):
        new = theta + 0.5 ** (k * (k + 1) / 2 if bug == "pile up" else k) * length * x
        after = policy(new)
        kl = exact_kl(after, before) if bug == "reversed" else exact_kl(before, after)
        near = bool((kl.sum() if bug == "sum" else kl.max() if bug == "max" else kl.mean()) <= max_kl)
        better = bool(surrogate(new) > (0.0 if bug == "against 0" else L_old))
        if {"any L": near, "any KL": better, "worse": near and not better}.get(bug, near and better):
            return new
    return new if bug == "not restored" else theta.clone()


# 5.5, the clipped loss -----------------------------------------------------------------------------------------------


def clip_cases() -> list[Case]:
    def corner(ratio: float, advantage: float, loss: float) -> Case:
        new = tensor([ratio]).log() - 1
        return Case(f"ratio {ratio}, A = {advantage:g}", (new, tensor([-1]), tensor([advantage]), 0.2), tensor(loss)[0])

    cases = [
        corner(1.5, 2.0, -2.4),
        corner(0.5, 2.0, -1.0),
        corner(1.5, -2.0, 3.0),
        corner(0.5, -2.0, 1.6),
        corner(1.1, 2.0, -2.2),
        corner(0.9, -2.0, 1.8),
    ]
    for size, generator in zip(SIZES, generators(), strict=True):
        old = -normal(generator, *size).abs()
        new, advantages = old + 0.4 * normal(generator, *size), normal(generator, *size)
        cases.append(Case(f"random, of shape {size}", (new, old, advantages, 0.2)))
    return cases


def clipped_with(bug: str, new: Tensor, old: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """Exercise 5.5 with one mistake planted."""
    old = new.detach() if bug == "ratio 1" else old.detach()
    advantages = advantages if bug == "leak" else advantages.detach()
    ratio = (old - new).exp() if bug == "inverse" else (new - old).exp()
    if bug == "row":
        ratio = (new - old).sum(-1, keepdim=True).exp()
    if bug == "white":
        spread = advantages.std(correction=0) if advantages.numel() > 1 else torch.zeros(())
        advantages = (advantages - advantages.mean()) / (spread + 1e-8)
    near = ratio.clamp(1 - clip_range, 1 + clip_range)
    if bug == "log":
        near = (new - old).clamp(-clip_range, clip_range).exp()
    if bug == "above":
        near = ratio.clamp(max=1 + clip_range)
    if bug == "around 0":
        near = ratio.clamp(-clip_range, clip_range)
    gain = torch.minimum(ratio * advantages, near * advantages)
    if bug == "max":
        gain = torch.maximum(ratio * advantages, near * advantages)
    if bug == "before A":
        gain = torch.minimum(ratio, near) * advantages
    if bug == "clip alone":
        gain = near * advantages
    if bug == "no clip":
        gain = ratio * advantages
    if bug == "product":
        gain = torch.minimum(ratio * advantages, (ratio * advantages).clamp(1 - clip_range, 1 + clip_range))
    if bug == "two means":
        gain = torch.minimum((ratio * advantages).mean(), (near * advantages).mean())
    if bug == "both sides":
        gain = torch.where(near == ratio, gain, gain.detach())
    if bug == "detached":
        gain = gain.detach()
    total = gain.sum() if bug == "sum" else gain.mean()
    return total if bug == "sign" else -total


# 5.7, the clipped value loss -----------------------------------------------------------------------------------------


def value_cases() -> list[Case]:
    def one(name: str, value: float, old: float, target: float, loss: float) -> Case:
        return Case(name, (tensor([value]), tensor([old]), tensor([target]), 0.2), tensor(loss)[0])

    cases = [
        one("the value has hardly moved", 1.1, 1.0, 2.0, 0.405),
        one("the value has moved far, towards the return", 1.5, 1.0, 2.0, 0.32),
        one("the value has moved far, away from the return", 0.5, 1.0, 2.0, 1.125),
    ]
    for size, generator in zip(SIZES, generators(), strict=True):
        old, target = normal(generator, *size), normal(generator, *size)
        cases.append(Case(f"random, of shape {size}", (old + 0.5 * normal(generator, *size), old, target, 0.2)))
    return cases


def value_with(bug: str, values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> Tensor:
    """Exercise 5.7 with one mistake planted."""
    old, target = old_values if bug == "leak" else old_values.detach(), returns.detach()
    if bug == "around 0":
        near = values.clamp(-clip_range, clip_range)
    elif bug == "factor":
        near = old * (values / old).clamp(1 - clip_range, 1 + clip_range)
    else:
        near = old + (values - old).clamp(-clip_range, clip_range)
    if bug == "return":
        near = old + (target - old).clamp(-clip_range, clip_range)
    if bug == "no centre":
        near = (values - old).clamp(-clip_range, clip_range)
    if bug == "swapped":
        near = values + (old - values).clamp(-clip_range, clip_range)
    plain, clipped = (values - target).square(), (near - target).square()
    if bug == "return":
        clipped = (values - near).square()
    if bug == "absolute":
        plain, clipped = plain.sqrt(), clipped.sqrt()
    if bug == "two means":
        plain, clipped = plain.mean(), clipped.mean()
    if bug == "before squaring":
        plain = clipped = (torch.maximum(values, near) - target).square()
    error = torch.minimum(plain, clipped) if bug == "min" else torch.maximum(plain, clipped)
    error = {"clip alone": clipped, "no clip": plain}.get(bug, error)
    return (1.0 if bug == "half" else 0.5) * error.mean()
