"""What PPO's studio sees of equation 9: V's targets, the weights of the three terms, the minibatches and the log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from minirlhf_course.studios import ledger
from minirlhf_course.studios.advantages import ADVANTAGES, clip_weights, gae
from minirlhf_course.studios.ledger import Batch, batch_of, errors_of, parallel, weights_of
from minirlhf_course.studios.mistakes import DEAD, DETACH, whitened
from minirlhf_course.studios.session import Iteration, Run, Trainer, Update, watch
from minirlhf_course.studios.studio import Failure, Notes, log_problem

GAMMA, LAM, CLIP = 0.5, 0.8, 0.2
N, T = 4, 6
SETTINGS: dict[str, Any] = {
    "rollout_steps": T,
    "epochs": 3,
    "minibatch_size": N * T,
    "gamma": GAMMA,
    "lam": LAM,
    "lr": 2e-3,
    "clip_range": CLIP,
    "value_coef": 0.5,
    "entropy_coef": 0.0,
    "max_grad_norm": 0.5,
}
FAST = {"lr": 0.3, "max_grad_norm": 1e9}
"""On a table of logits, ratios leave the clip's range with the first update."""


def watched(trainer: Trainer, **changes: Any) -> Run:
    problem = ledger.drawn(environments=N, steps=60, seed=5)
    return watch(
        trainer, problem.make, problem.networks(5, common=True), {**SETTINGS, "total_steps": 48, **changes}, num_envs=N
    )


def parts_of(size: int) -> int:
    return math.ceil(N * T / size)


def logprobs_of(update: Update, batch: Batch) -> Tensor:
    return ledger.probabilities(update)[batch.states, batch.actions].log()


def critic_is_right(trainer: Trainer, notes: Notes) -> Failure | None:
    run = watched(trainer, **FAST)
    if run.problem:
        return Failure(run.problem)
    seen: list[tuple[Tensor, Batch, Batch]] = []
    failing: tuple[Batch, Tensor, Tensor, str] | None = None
    for number, iteration in enumerate(run.iterations):
        batch = batch_of(iteration, iteration.updates[0].weights)
        targets = gae(batch, GAMMA, LAM) + batch.v
        if not iteration.of("values"):
            return Failure(f"In iteration {number + 1} no update has a gradient of the value network.", DEAD)
        for epoch, update in enumerate(iteration.updates, 1):
            now = batch_of(iteration, update.weights)
            right = ledger.at(batch.states, now.v - targets, len(batch.table))
            got = errors_of(update)
            got = torch.zeros_like(right) if got is None else got
            if not parallel(got, right):
                seen.append((got, batch, now))
                failing = failing or (batch, right, got, f"iteration {number + 1}, epoch {epoch}")
    if failing is None:
        return _coefficients(trainer)
    batch, right, got, where = failing
    rows = [x[batch.states] for x in (right, got)]
    case = ledger.shown_row(batch, rows[0], rows[1], "V - target", f"{where}, gamma {GAMMA}, lam {LAM}")
    return Failure(case, _critic_name(right, got, seen))


def _critic_name(right: Tensor, got: Tensor, seen: list[tuple[Tensor, Batch, Batch]]) -> str:
    def gives(targets: Any) -> bool:
        return all(parallel(x, ledger.at(b.states, now.v - targets(b, now), len(x))) for x, b, now in seen)

    if all(parallel(-x, ledger.at(b.states, now.v - gae(b, GAMMA, LAM) - b.v, len(x))) for x, b, now in seen):
        return "The value loss has the wrong sign (bug 6): V runs away from its targets."
    for correction in (0, 1):
        if gives(lambda b, now, n=correction: whitened(b, gae(b, GAMMA, LAM), n) + b.v):
            return "The targets are made of whitened advantages (bug 1): returns = A + V, A as it was before."
    if gives(lambda b, now: gae(now, GAMMA, LAM) + now.v):
        return "The targets are computed again in every epoch, by the V that is learning: compute them once."
    if gives(lambda b, now: gae(b, GAMMA, LAM)):
        return "The targets are advantages: returns = A + V."
    for sentence, give in ADVANTAGES.items():
        if gives(lambda b, now, give=give: give(b, GAMMA, LAM) + b.v):
            return f"In the targets: {sentence}"
    if ledger.combines(got, [right, (right != 0).double()]):
        return DETACH
    return ""


def _coefficients(trainer: Trainer) -> Failure | None:
    """Whether the three terms have the sizes that equation 9 gives them."""
    runs = [
        watched(trainer, **FAST, value_coef=c1, entropy_coef=c2) for c1, c2 in ((0.5, 0.0), (0.25, 0.0), (0.5, 0.1))
    ]
    fault = next((run.problem for run in runs if run.problem), None)
    if fault:
        return Failure(fault)
    plain, half, bonus = (run.iterations[0].updates[0] for run in runs)
    batch = batch_of(runs[0].iterations[0], plain.weights)
    policy, value = "policy.head.weight", "values.head.weight"
    # The policy's term sets the scale: a loss that is three times another one trains as well under Adam.
    advantages = whitened(batch, gae(batch, GAMMA, LAM))
    got = weights_of(plain, batch)
    assert got is not None
    scale = float(got.norm() / advantages.norm()) * N * T
    errors = ledger.at(batch.states, gae(batch, GAMMA, LAM), len(batch.table)) / (N * T)
    ratios = {
        "the value loss, value_coef=0.5": float(plain.gradients[value].norm() / (0.5 * errors.norm() * scale)),
        "the value loss, value_coef=0.25": float(half.gradients[value].norm() / (0.25 * errors.norm() * scale)),
    }
    for name, ratio in ratios.items():
        if not 0.9 < ratio < 1.1:
            return Failure(
                f"Beside the policy's, the gradient of {name}, is {ratio:.2f} times what equation 9 makes it.",
                "L_VF is half the squared error, (V - R)^2 / 2, and its weight is value_coef."
                if 0.45 < ratio < 0.55 or 1.9 < ratio < 2.1
                else "",
            )
    pi = ledger.probabilities(plain)
    entropy = -(pi * pi.log()).sum(-1, keepdim=True)
    slope = torch.zeros_like(pi)
    visited = batch.states.flatten()
    slope[visited] = -(pi * (pi.log() + entropy))[visited]
    added = (bonus.gradients[policy] - plain.gradients[policy]).double().t() / scale
    if parallel(added, -slope, 1e-3) and 0.9 < float(added.norm() / (0.1 * slope.norm() / (N * T))) < 1.1:
        return None
    if parallel(-added, -slope, 1e-3):
        return Failure(
            "With entropy_coef=0.1 the policy becomes more certain.", "The entropy bonus has the wrong sign."
        )
    change = float(added.norm() / (0.1 * slope.norm() / (N * T)))
    return Failure(f"With entropy_coef=0.1 the gradient changes by {change:.2f} times what the bonus c2 S makes.")


def covers_its_minibatches(trainer: Trainer, notes: Notes) -> Failure | None:
    run = watched(trainer, minibatch_size=7)
    if run.problem:
        return Failure(run.problem)
    iteration, parts = run.iterations[0], parts_of(7)
    batch = batch_of(iteration, iteration.updates[0].weights)
    everything = sorted(batch.states.flatten().tolist())
    orders = []
    for epoch in range(SETTINGS["epochs"]):
        drawn = [_drawn(update) for update in iteration.updates[epoch * parts : (epoch + 1) * parts]]
        sizes = [len(x) for x in drawn]
        if sorted(chain.from_iterable(drawn)) != everything:
            return Failure(f"Epoch {epoch + 1}: its minibatches have {sizes} steps, and not each of the {N * T} once.")
        if max(sizes) - min(sizes) > 1:
            return Failure(f"The minibatches of epoch {epoch + 1} have {sizes} steps: equal parts are asked for.")
        orders.append(drawn)
    if orders[0] == orders[1] == orders[2]:
        return Failure("Every epoch has the same minibatches: draw a new order for each.")
    if any(part == sorted(part) and _together(part, batch) for part in orders[0]):
        return Failure("The minibatches are pieces of the rollout as it was played: shuffle the steps.")
    update = iteration.updates[0]
    inside = torch.isin(batch.states, torch.tensor(_drawn(update)))
    advantages = torch.where(inside, gae(batch, GAMMA, LAM), 0.0)
    right = torch.where(inside, whitened(batch._replace(mask=inside), advantages), 0.0)
    got = weights_of(update, batch)
    assert got is not None
    if parallel(got, right):
        return None
    case = ledger.shown_row(batch, right, got, "weight of log pi", "first minibatch of 6 steps; 0: not in it")
    whole = torch.where(inside, whitened(batch, gae(batch, GAMMA, LAM)), 0.0)
    named = "Advantages are normalised over the whole batch, not in each minibatch." if parallel(got, whole) else ""
    return Failure(case, named)


def _drawn(update: Update) -> list[int]:
    errors = errors_of(update)
    return [] if errors is None else errors.nonzero().flatten().tolist()


def _together(part: list[int], batch: Batch) -> bool:
    """Whether a minibatch is one environment's steps, one after the other."""
    rows = [row for row in batch.states.tolist() if set(row) & set(part)]
    return len(rows) == 1


def logs_what_happened(trainer: Trainer, notes: Notes) -> Failure | None:
    run = watched(trainer, **FAST)
    if run.problem:
        return Failure(run.problem)
    problem = log_problem(run.log, [{key: [0.0] for key in FIRST} for _ in run.iterations])
    if problem:
        return Failure(f"{problem} No weight has moved yet.", OLD if "says" in problem else "")
    right: list[dict[str, Sequence[float]]] = []
    for number, iteration in enumerate(run.iterations, 1):
        clips, kl = _measured(iteration)
        right.append({"env_steps": [float(number * N * T)], "clip_fraction": clips, "approx_kl": [kl]})
    problem = log_problem(run.log, right, 1e-3)
    if problem:
        return Failure(problem)
    notes.remarks += _lost_digits(trainer)
    return None


def _lost_digits(trainer: Trainer) -> list[str]:
    """A remark on a KL whose digits cancel: right trainers log one too, and it matters to whoever stops by it."""
    run = watched(trainer, lr=1e-5)
    if run.problem:
        return []
    for row, iteration in zip(run.log, run.iterations, strict=True):
        _, kl = _measured(iteration)
        got = float(row["approx_kl"])
        if abs(got - kl) > 0.2 * kl:
            return [
                f"With a tiny learning rate approx_kl is {kl:.1e}, and you log {got:.1e}: in float32 (exp(x) - 1) - x "
                "cancels when x is small (bug 13). x.expm1() - x does not."
            ]
    return []


FIRST = ("first_ratio_error", "first_clip_fraction")
OLD = "old_logprobs must be those of the policy that played, on the same observations and actions as the new ones."


def _measured(iteration: Iteration) -> tuple[tuple[float, float], float]:
    """The clip fraction, by both ways to count it, and the approximate KL, as means over an iteration's updates."""
    batch = batch_of(iteration, iteration.updates[0].weights)
    old = logprobs_of(iteration.updates[0], batch)
    advantages = whitened(batch, gae(batch, GAMMA, LAM))
    outside, acting, kl = 0.0, 0.0, 0.0
    for update in iteration.updates:
        log_ratio = logprobs_of(update, batch) - old
        ratio = log_ratio.exp()
        outside += float(((ratio - 1).abs() > CLIP).double().mean())
        acting += float((clip_weights(ratio, advantages, CLIP) == 0).double().mean())
        kl += float((ratio - 1 - log_ratio).mean())
    count = len(iteration.updates)
    return (outside / count, acting / count), kl / count
