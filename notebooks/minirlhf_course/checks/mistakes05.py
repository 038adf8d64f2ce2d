"""Lesson 05's cases, and its answers with one mistake planted: what its checks know by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minirlhf import losses
from minirlhf.kl import exact_kl
from minirlhf_course.checks.cases import F64, SIZES, generators, normal, tensor
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


# 5.4, the clipped loss -----------------------------------------------------------------------------------------------


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
    """Exercise 5.4 with one mistake planted."""
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


# 5.6, the clipped value loss -----------------------------------------------------------------------------------------


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
    """Exercise 5.6 with one mistake planted."""
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
