"""Studio 3: PPO, with equation 9 whole."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from minirlhf.control.ppo import PPOConfig, train_ppo
from minirlhf_course.studios import ledger
from minirlhf_course.studios.advantages import ADVANTAGES, CLIPS, clip_weights, gae
from minirlhf_course.studios.equation9 import (
    CLIP,
    FAST,
    GAMMA,
    LAM,
    SETTINGS,
    N,
    T,
    covers_its_minibatches,
    critic_is_right,
    logprobs_of,
    logs_what_happened,
    parts_of,
    watched,
)
from minirlhf_course.studios.ledger import Batch, batch_of, parallel, weights_of
from minirlhf_course.studios.mistakes import KEPT, whitened
from minirlhf_course.studios.probes import TASKS, draws, networks, probe
from minirlhf_course.studios.referee import average_gradient, cartpole_runs, fixed_length, same_as_package
from minirlhf_course.studios.session import Run, Trainer, watch
from minirlhf_course.studios.studio import Failure, Notes, Property, Studio

STUB = '''
def my_ppo(
    envs, policy, values, *, total_steps, rollout_steps, epochs, minibatch_size,
    gamma, lam, lr, clip_range, value_coef, entropy_coef, max_grad_norm,
    generator, shuffle,
):
    """PPO: trains in place, returns the log."""
    ...  # your code here
'''.strip()

HINTS = (
    "Like the studio before this one up to the advantages: reset once, keep the `step`s of a rollout, go backwards. "
    "What an end stops is two things: V of what followed (only where it *terminated*), and the sum of deltas (always).",
    "`old_logprobs`, advantages and returns are computed once, under `torch.no_grad()`, before the first epoch. Then "
    "`x.flatten(0, 1)` makes [N T] of [N, T], and an epoch goes through "
    "`torch.randperm(count, generator=shuffle).tensor_split(parts)`.",
    "`torch.minimum(ratio * A, ratio.clamp(1 - clip_range, 1 + clip_range) * A).mean()` is to be maximised. With a "
    "shared trunk `[*policy.parameters(), *values.parameters()]` names some twice: `dict.fromkeys` keeps each once.",
)


# --- The properties. ---


def keeps_its_shape(trainer: Trainer, notes: Notes) -> Failure | None:
    for size in (N * T, 7):
        run = watched(trainer, minibatch_size=size)
        problem = run.problem or _shape_problem(run, SETTINGS["epochs"] * parts_of(size))
        if problem:
            return Failure(f"{problem}\n{N} environments, rollout_steps={T}, minibatch_size={size}, epochs=3.")
    task = TASKS[4]
    shared = networks(task.make().size, shared=True)
    run = watch(trainer, lambda n: task.make(), shared, {**SETTINGS, "total_steps": 24}, num_envs=N)
    if run.problem:
        return Failure(f"{run.problem}\nCalled with networks that share their trunk.")
    if any(update.twice for iteration in run.iterations for update in iteration.updates):
        return Failure("Called with networks that share their trunk.", TWICE)
    return None


TWICE = "The optimizer has the parameters of a shared trunk twice, and moves them twice: give it each of them once."


def _shape_problem(run: Run, updates: int) -> str:
    for number, iteration in enumerate(run.iterations):
        where = f"Iteration {number + 1}"
        if len(iteration.played) != T:
            return f"{where} plays {len(iteration.played)} steps per environment, and rollout_steps is {T}."
        if iteration.resets != ([0] if number == 0 else []):
            return "envs.reset() is for the very beginning: ended episodes begin again by themselves."
        if len(iteration.updates) != updates:
            return (
                f"{where} takes {len(iteration.updates)} steps of an optimizer; {updates} is epochs times minibatches, "
                "with one optimizer for both networks."
            )
    if len(run.iterations) != 2:
        return f"It makes {len(run.iterations)} iterations, and 2 reach total_steps, which is 48."
    return ""


def advantages_are_right(trainer: Trainer, notes: Notes) -> Failure | None:
    """The first gradient of each iteration, whose ratios are 1."""
    run = watched(trainer, **FAST)
    if run.problem:
        return Failure(run.problem)
    failing: tuple[Batch, Tensor, Tensor, str] | None = None
    seen: list[tuple[Tensor, Batch]] = []
    kept = True
    for number, iteration in enumerate(run.iterations):
        update = iteration.updates[0]
        batch = batch_of(iteration, update.weights)
        got, right = weights_of(update, batch), whitened(batch, gae(batch, GAMMA, LAM))
        if got is None:
            return Failure("The policy gets no gradient.")
        stray = ledger.outside(update, batch)
        if parallel(got, right) and not stray:
            kept = kept and number == 0
            continue
        kept = kept and stray
        seen.append((got, batch))
        where = f"iteration {number + 1}, first minibatch, gamma {GAMMA}, lam {LAM}"
        failing = failing or (batch, right, got, where)
    if failing is None:
        return None
    named = KEPT if kept else _advantage_name(seen)
    return Failure(ledger.shown_row(failing[0], failing[1], failing[2], "weight of log pi", failing[3]), named)


def _advantage_name(seen: list[tuple[Tensor, Batch]]) -> str:
    right = [gae(batch, GAMMA, LAM) for _, batch in seen]
    if all(parallel(-x, whitened(b, a)) for (x, b), a in zip(seen, right, strict=True)):
        return "The minus sign is missing, or the ratio is upside down: good actions become rarer (bug 6)."
    if all(parallel(x, a) for (x, _), a in zip(seen, right, strict=True)):
        return "Advantages are not normalised: mean 0 and standard deviation 1 in each minibatch."
    for sentence, give in ADVANTAGES.items():
        for change in (lambda b, a: whitened(b, a), lambda b, a: a):
            if all(parallel(x, change(b, give(b, GAMMA, LAM))) for x, b in seen):
                return sentence
    return ""


def clip_is_right(trainer: Trainer, notes: Notes) -> Failure | None:
    """The gradients of later epochs, from the ratios that the weights have then."""
    run = watched(trainer, **FAST)
    if run.problem:
        return Failure(run.problem)
    seen = []
    failing: tuple[Batch, Tensor, Tensor, Tensor, int] | None = None
    for iteration in run.iterations:
        batch = batch_of(iteration, iteration.updates[0].weights)
        advantages = whitened(batch, gae(batch, GAMMA, LAM))
        old = logprobs_of(iteration.updates[0], batch)
        for epoch, update in enumerate(iteration.updates[1:], 2):
            ratio = (logprobs_of(update, batch) - old).exp()
            got, right = weights_of(update, batch), clip_weights(ratio, advantages, CLIP)
            if not parallel(got, right):
                got = torch.zeros_like(right) if got is None else got
                seen.append((got, ratio, advantages))
                failing = failing or (batch, ratio, right, got, epoch)
    if failing is None:
        return None
    named = next((text for text, give in CLIPS.items() if all(parallel(x, give(r, a, CLIP)) for x, r, a in seen)), "")
    batch, ratio, right, got, epoch = failing
    advantages = seen[0][2]
    got = ledger.scaled(got, right)
    order = (got - right).abs().flatten().argsort(descending=True)[:4]
    table = [
        ("ratio", ratio),
        ("A, normalised", advantages),
        ("weight of log pi: right", right),
        ("weight of log pi: yours", got),
    ]
    lines = [f"  {name:<24}" + " ".join(f"{v:9.3f}" for v in x.flatten()[order].tolist()) for name, x in table]
    return Failure(
        f"Epoch {epoch} of the first batch, the four steps that are furthest off:\n" + "\n".join(lines), named
    )


PROBE = {**SETTINGS, "rollout_steps": 8, "epochs": 4, "minibatch_size": 64, "lr": 0.01, "entropy_coef": 0.01}


def _probe(index: int) -> Property:
    task = TASKS[index]

    def fails(trainer: Trainer, notes: Notes) -> Failure | None:
        for shared in (False, True) if index == 4 else (False,):
            failure = probe(task, trainer, {**PROBE, "total_steps": 16 * 8 * 25}, shared=shared)
            if failure:
                return replace(failure, case=f"{failure.case}\n({'one trunk' if shared else 'two trunks'})")
        return None

    return Property(task.title, fails, task.look, task.bugs)


def exact_on_average(trainer: Trainer, notes: Notes) -> Failure | None:
    settings = {**SETTINGS, "rollout_steps": 3, "epochs": 1, "minibatch_size": 10**6, "lam": 0.9}
    return average_gradient(trainer, settings, fixed_length(3, gamma=1.0), values=True)


def equals_the_package(trainer: Trainer, notes: Notes) -> Failure | None:
    options = {**SETTINGS, "rollout_steps": 8, "minibatch_size": 10, "entropy_coef": 0.02}
    for shared in (False, True):
        failure = same_as_package(
            trainer,
            train_ppo,
            lambda **given: PPOConfig(**given, anneal_lr=False),
            options,
            {},
            notes,
            length=10**6,
            total_steps=96,
            rtol=0.02,
            shared=shared,
        )
        if failure:
            return replace(failure, case=f"{failure.case}\n({'one trunk' if shared else 'two trunks'})")
    return None


CARTPOLE = {**SETTINGS, "rollout_steps": 128, "epochs": 10, "minibatch_size": 256, "gamma": 0.99, "lam": 0.95}


def solves_cartpole(trainer: Trainer, notes: Notes) -> Failure | None:
    return cartpole_runs(trainer, {**CARTPOLE, "total_steps": 50_000}, notes, "ppo", level=475.0)


ppo = Studio(
    "ppo",
    STUB,
    HINTS,
    (
        Property(
            "plays T steps, takes K epochs of minibatches, stops",
            keeps_its_shape,
            "the order of things: one reset before the loop, the rollout, the two inner loops.",
            gate=True,
        ),
        Property(
            "draws its actions from the policy",
            lambda trainer, notes: draws(
                trainer, {**SETTINGS, "lr": 1e-9, "epochs": 1, "minibatch_size": 10**6, "total_steps": 64 * 40}
            ),
            "how the action is drawn: policy.sample(policy(observations), generator).",
            (11, 28),
        ),
        Property(
            "first minibatch: a step is weighted by its advantage, GAE, normalised",
            advantages_are_right,
            "delta, the sum of deltas, what stops each of the two, and the sign of the loss.",
            (6, 7, 10, 12, 22, 26),
        ),
        Property(
            "later epochs: the clip takes away what it should, and no more",
            clip_is_right,
            "old_logprobs, the ratio, and min(r A, clip(r) A).",
            (3, 4, 5),
        ),
        Property(
            "V learns A + V, and the three terms have equation 9's weights",
            critic_is_right,
            "the returns, the value loss, value_coef and entropy_coef.",
            (1, 6, 22, 25, 26),
        ),
        Property(
            "every epoch goes once through all steps, in another order",
            covers_its_minibatches,
            "randperm, the split into equal parts, and where advantages are normalised.",
        ),
        Property(
            "its log tells what happened; first ratio 1, first clip fraction 0",
            logs_what_happened,
            "the rows that it returns, and old_logprobs.",
            (3,),
        ),
        Property(
            "with the true V, the mean of its gradients is the exact one",
            exact_on_average,
            "V(terminal), the sum of deltas, and how actions are drawn.",
            (6, 7, 10, 11, 22, 28),
        ),
        Property(
            "from the same draws, the same weights as the package's trainer, with one trunk and with two",
            equals_the_package,
            "one Adam over every parameter once, one norm for all of them, and entropy_coef.",
        ),
        *(_probe(index) for index in range(len(TASKS))),
        Property(
            "CartPole: 475 on 3 seeds",
            solves_cartpole,
            "the settings: are they all those that were given?",
            last=True,
        ),
    ),
)
"""The studio of PPO."""
