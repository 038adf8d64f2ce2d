"""Studio 2: actor-critic, one step or n steps before an update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minirlhf.control.actor_critic import A2CConfig, ActorCriticConfig, train_a2c, train_actor_critic
from minirlhf_course.studios import ledger
from minirlhf_course.studios.ledger import Batch, batch_of, errors_of, parallel, weights_of
from minirlhf_course.studios.mistakes import DEAD, DETACH, EARLY, KEPT, whitened
from minirlhf_course.studios.probes import TASKS, draws, probe
from minirlhf_course.studios.referee import average_gradient, cartpole_runs, fixed_length, same_as_package
from minirlhf_course.studios.session import Run, Trainer, Update, watch
from minirlhf_course.studios.studio import Failure, Notes, Property, Studio, log_problem
from minirlhf_course.studios.targets import GAMMA, KNOWN, MOVING, TARGETS, right_targets, right_weights

SETTINGS: dict[str, Any] = {
    "n": 1,
    "gamma": GAMMA,
    "lr": 1e-3,
    "value_lr": 3e-3,
    "max_grad_norm": 0.5,
    "weigh_by_gamma_t": False,
}

STUB = '''
def my_actor_critic(
    envs, policy, values, *, total_steps, n, gamma, lr, value_lr,
    max_grad_norm, weigh_by_gamma_t, generator,
):
    """Actor-critic with an update every n steps: trains in place, returns the log."""
    ...  # your code here
'''.strip()

HINTS = (
    "Reset once, before the loop; then `now = step.observations` carries each environment on, from one iteration into "
    "the next. Keep the n `step`s, `torch.stack` observations and actions to [n, N].",
    "Backwards over the n steps, beginning with `following = values(steps[-1].next_observations)`. In each step: where "
    "it was truncated, `following` is `values(step.next_observations)`; where it terminated, 0; then it becomes "
    "`step.rewards + gamma * following`, which is the target. All under `torch.no_grad()`.",
    "`v = values(observations)`, `deltas = (targets - v).detach()`. The critic's loss is "
    "`0.5 * (v - targets).square().mean()`, the actor's `-(I * deltas * logprobs).mean()`. After a step, "
    "`I = torch.where(ended, 1, gamma * I)`.",
)


# --- The properties. ---

SIZES = ((1, 24), (5, 60))
"""(n, total_steps) of the runs on the ledger, with 4 environments."""


def _watched(trainer: Trainer, n: int, total_steps: int, by_gamma_t: bool = False) -> Run:
    problem = ledger.drawn(environments=4, steps=40, seed=n)
    settings = {**SETTINGS, "n": n, "weigh_by_gamma_t": by_gamma_t, "total_steps": total_steps}
    return watch(trainer, problem.make, problem.networks(n), settings, num_envs=4)


def keeps_its_shape(trainer: Trainer, notes: Notes) -> Failure | None:
    for n, total_steps in SIZES:
        problem = _shape_problem(_watched(trainer, n, total_steps), n, total_steps)
        if problem:
            return Failure(f"{problem}\nCalled with 4 environments, n={n}, total_steps={total_steps}.")
    return None


def _shape_problem(run: Run, n: int, total_steps: int) -> str:
    if run.problem:
        return run.problem
    for number, iteration in enumerate(run.iterations):
        if len(iteration.played) != n:
            return f"Iteration {number + 1} plays {len(iteration.played)} steps per environment, not {n}."
        if iteration.resets != ([0] if number == 0 else []):
            return "envs.reset() is for the very beginning: ended episodes begin again by themselves."
        for part, name in (("policy", "policy"), ("values", "value network")):
            if len(iteration.of(part)) > 1:
                return f"Iteration {number + 1} has {len(iteration.of(part))} updates of the {name}, not one."
    right = -(-total_steps // (4 * n))
    if len(run.iterations) != right:
        return f"It makes {len(run.iterations)} iterations, and {right} reach total_steps."
    return ""


def logs_what_happened(trainer: Trainer, notes: Notes) -> Failure | None:
    for n, total_steps in SIZES:
        run = _watched(trainer, n, total_steps)
        right = []
        for number, iteration in enumerate(run.iterations if not run.problem else [], 1):
            batch = batch_of(iteration, iteration.updates[0].weights)
            loss = 0.5 * (batch.v - right_targets(batch, GAMMA)).square().mean()
            right.append({"env_steps": [4.0 * n * number], "value_loss": [float(loss)]})
        problem = run.problem or log_problem(run.log, right)
        if problem:
            return Failure(problem)
    return None


def _times(run: Run) -> list[Tensor]:
    """The time of every step since the start of its episode, [N, T] for each iteration."""
    clock, found = torch.zeros(4, dtype=torch.int64), []
    for iteration in run.iterations:
        columns = []
        for row in iteration.played:
            columns.append(clock)
            clock = torch.where(row.step.terminated | row.step.truncated, 0, clock + 1)
        found.append(torch.stack(columns, 1))
    return found


def actor_is_right(trainer: Trainer, notes: Notes) -> Failure | None:
    failing: tuple[Batch, Tensor, Tensor, str] | None = None
    seen = []
    kept = early = True
    for n, total_steps in SIZES:
        for by_gamma_t in (False, True):
            run = _watched(trainer, n, total_steps, by_gamma_t)
            if run.problem:
                return Failure(run.problem)
            for number, (iteration, times) in enumerate(zip(run.iterations, _times(run), strict=True)):
                batch = batch_of(iteration, iteration.updates[0].weights)
                update = iteration.of("policy")[0]
                got, right = weights_of(update, batch), right_weights(batch, times, by_gamma_t)
                assert got is not None
                stray = ledger.outside(update, batch)
                if parallel(got, right) and not stray:
                    kept = kept and number == 0
                    continue
                kept = kept and stray
                learned = batch_of(iteration, update.weights)
                early = early and parallel(got, right_weights(learned, times, by_gamma_t))
                seen.append((got, (batch, times, by_gamma_t)))
                where = f"iteration {number + 1}, n={n}, gamma {GAMMA}, weigh_by_gamma_t={by_gamma_t}"
                failing = failing or (batch, right, got, where)
    if failing is None:
        return None
    batch, right, got, where = failing
    named = KEPT if kept else EARLY if early else ledger.suspect(KNOWN, seen)
    return Failure(ledger.shown_row(batch, right, got, "weight of log pi", where), named)


def critic_is_right(trainer: Trainer, notes: Notes) -> Failure | None:
    failing: tuple[Batch, Tensor, Tensor, str, Update] | None = None
    seen = []
    for n, total_steps in SIZES:
        run = _watched(trainer, n, total_steps)
        if run.problem:
            return Failure(run.problem)
        for number, iteration in enumerate(run.iterations):
            where = f"iteration {number + 1}, n={n}, gamma {GAMMA}"
            if not iteration.of("values"):
                return Failure(f"In {where} no update has a gradient of the value network.", DEAD)
            update = iteration.of("values")[0]
            batch = batch_of(iteration, update.weights)
            got, size = errors_of(update), len(batch.table)
            assert got is not None
            right = ledger.at(batch.states, batch.v - right_targets(batch, GAMMA), size)
            if not parallel(got, right):
                seen.append((got, batch))
                failing = failing or (batch, right, got, where, iteration.updates[0])
    if failing is None:
        return None
    batch, right, got, where, first = failing
    rows = [x[batch.states] for x in (right, got)]
    return Failure(
        ledger.shown_row(batch, rows[0], rows[1], "v - target", where), _critic_name(batch, right, got, first, seen)
    )


def _critic_name(batch: Batch, right: Tensor, got: Tensor, first: Update, seen: list[tuple[Tensor, Batch]]) -> str:
    if all(parallel(x, moving_gradient(b)) for x, b in seen):
        return MOVING
    logprobs = ledger.probabilities(first)[batch.states, batch.actions].log()
    if ledger.combines(got, [right, ledger.at(batch.states, logprobs, len(got))]):
        return DETACH
    if all(parallel(-x, ledger.at(b.states, b.v - right_targets(b, GAMMA), len(x))) for x, b in seen):
        return "The value loss has the wrong sign (bug 6): the value network runs away from its targets."
    whole = {
        **TARGETS,
        "The targets are advantages: R - v for R.": lambda b, g: right_targets(b, g) - b.v,
        "The targets are whitened (bug 1): v learns numbers of another size.": lambda b, g: whitened(
            b, right_targets(b, g)
        ),
        "The targets are whitened advantages plus v (bug 1).": lambda b, g: (
            whitened(b, right_targets(b, g) - b.v) + b.v
        ),
    }
    for sentence, targets in whole.items():
        if all(parallel(x, ledger.at(b.states, b.v - targets(b, GAMMA), len(x))) for x, b in seen):
            return f"In the critic: {sentence}"
    return ""


def moving_gradient(batch: Batch) -> Tensor:
    """The gradient [S] of the value loss if the targets are not held fixed."""
    table = batch.table.clone().requires_grad_()
    moving = batch._replace(v=table[batch.states], v_after=table[batch.after])
    loss = (moving.v - right_targets(moving, GAMMA)).square().sum()
    return torch.autograd.grad(loss, table)[0]


PROBE = {**SETTINGS, "lr": 0.02, "value_lr": 0.03, "max_grad_norm": 10.0}


def _probe(index: int) -> Property:
    task = TASKS[index]

    def fails(trainer: Trainer, notes: Notes) -> Failure | None:
        return probe(task, trainer, {**PROBE, "total_steps": 16 * 250})

    return Property(task.title, fails, task.look, task.bugs)


def exact_on_average(trainer: Trainer, notes: Notes) -> Failure | None:
    problem = fixed_length(3)
    return average_gradient(trainer, {**SETTINGS, "n": 3, "weigh_by_gamma_t": True}, problem, values=True)


def equals_the_package(trainer: Trainer, notes: Notes) -> Failure | None:
    options = {name: SETTINGS[name] for name in ("gamma", "lr", "value_lr", "max_grad_norm")}
    endless: dict[str, Any] = {"length": 10**6, "total_steps": 256}
    plain = {"value_updates": 1, "lam": None, "n_step": 4, "rollout_steps": 4, "whiten_advantages": False}
    return same_as_package(
        trainer,
        train_actor_critic,
        ActorCriticConfig,
        {**options, "weigh_by_gamma_t": True},
        {"n": 1},
        notes,
        **endless,
    ) or same_as_package(
        trainer,
        train_a2c,
        lambda **given: A2CConfig(**given, **plain),  # type: ignore[arg-type]
        options,
        {"n": 4, "weigh_by_gamma_t": False},
        notes,
        **endless,
    )


CARTPOLE = {**SETTINGS, "n": 5, "gamma": 0.99, "total_steps": 80_000}


def solves_cartpole(trainer: Trainer, notes: Notes) -> Failure | None:
    return cartpole_runs(trainer, CARTPOLE, notes, "a2c", level=475.0, num_envs=16)


actor_critic = Studio(
    "actor_critic",
    STUB,
    HINTS,
    (
        Property(
            "plays n steps, updates once, plays on, stops",
            keeps_its_shape,
            "the order of things: one reset before the loop, n steps, one step of the actor and one of the critic.",
            gate=True,
        ),
        Property(
            "draws its actions from the policy",
            lambda trainer, notes: draws(trainer, {**SETTINGS, "lr": 1e-9, "total_steps": 64 * 40}),
            "how the action is drawn: policy.sample(policy(observations), generator).",
            (11, 28),
        ),
        Property(
            "the actor: every step's log-probability is weighted by I delta",
            actor_is_right,
            "the targets, backwards; what follows an end; and where I begins again.",
            (6, 7, 10, 12, 22, 26),
        ),
        Property(
            "the critic: v moves to a target that is held fixed",
            critic_is_right,
            "the value loss: its targets, its sign, and through what its gradient flows.",
            (1, 6, 22, 25, 26),
        ),
        Property("its log tells what happened", logs_what_happened, "the rows that it returns."),
        Property(
            "with the true v, the mean of its gradients is the exact one",
            exact_on_average,
            "gamma^t, v(terminal), and how actions are drawn.",
            (6, 7, 10, 11, 22, 28),
        ),
        Property(
            "from the same draws, the same weights as the package's two trainers",
            equals_the_package,
            "Adam's eps, the clipping of each gradient, and what the losses are divided by.",
        ),
        *(_probe(index) for index in range(len(TASKS))),
        Property(
            "CartPole: 475 on 3 seeds, with n = 5",
            solves_cartpole,
            "the settings: are n, lr, gamma and max_grad_norm those that were given?",
            last=True,
        ),
    ),
)
"""The studio of actor-critic."""
