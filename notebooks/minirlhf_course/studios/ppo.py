"""Studio 3: PPO, with equation 9 whole."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from minirlhf.control.ppo import PPOConfig, train_ppo
from minirlhf_course.studios import ledger
from minirlhf_course.studios.advantages import ADVANTAGES, CLIPS, clip_weights, gae
from minirlhf_course.studios.ledger import Batch, batch_of, errors_of, parallel, weights_of
from minirlhf_course.studios.mistakes import DEAD, DETACH, KEPT, whitened
from minirlhf_course.studios.probes import TASKS, draws, networks, probe
from minirlhf_course.studios.referee import average_gradient, cartpole_runs, fixed_length, same_as_package
from minirlhf_course.studios.session import Iteration, Run, Trainer, Update, watch
from minirlhf_course.studios.studio import Failure, Notes, Property, Studio

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
    "Like the studio before this one up to the advantages: reset once, keep the `step`s of a rollout, go backwards. What an "
    "end stops is two things: V of what followed (only where it *terminated*), and the sum of deltas (at either end).",
    "`old_logprobs`, advantages and returns are computed once, under `torch.no_grad()`, before the first epoch. Then "
    "`x.flatten(0, 1)` of [N, T] tensors, and `for index in torch.randperm(count, generator=shuffle).tensor_split(parts)`.",
    "`torch.minimum(ratio * A, ratio.clamp(1 - clip_range, 1 + clip_range) * A).mean()`, to be maximised. With a shared "
    "trunk `[*policy.parameters(), *values.parameters()]` names some parameters twice: `dict.fromkeys` keeps each once.",
)


# --- The properties. ---


def _watched(trainer: Trainer, **changes: Any) -> Run:
    problem = ledger.drawn(environments=N, steps=60, seed=5)
    return watch(trainer, problem.make, problem.networks(5, common=True), {**SETTINGS, "total_steps": 48, **changes}, num_envs=N)


def _parts(size: int) -> int:
    return math.ceil(N * T / size)


def keeps_its_shape(trainer: Trainer, notes: Notes) -> Failure | None:
    for size in (N * T, 7):
        run = _watched(trainer, minibatch_size=size)
        problem = run.fault or _shape_problem(run, SETTINGS["epochs"] * _parts(size))
        if problem:
            return Failure(f"{problem}\nCalled with {N} environments, rollout_steps={T}, minibatch_size={size}, epochs=3.")
    task = TASKS[4]
    shared = networks(task.make().size, shared=True)
    run = watch(trainer, lambda n: task.make(), shared, {**SETTINGS, "total_steps": 24}, num_envs=N)
    if run.fault:
        return Failure(f"{run.fault}\nCalled with networks that share their trunk.")
    if any(update.twice for iteration in run.iterations for update in iteration.updates):
        return Failure("Called with networks that share their trunk.", TWICE)
    return None


TWICE = "The optimizer has the parameters of a shared trunk twice, and moves them twice: give it each of them once."


def _shape_problem(run: Run, updates: int) -> str:
    if not any(iteration.of("policy") for iteration in run.iterations):
        return "No optimizer of torch.optim has taken a step with a gradient of the policy that it was given."
    for number, iteration in enumerate(run.iterations):
        where = f"Iteration {number + 1}"
        if any(not bool(x.isfinite().all()) for update in iteration.updates for x in update.gradients.values()):
            return f"In iteration {number + 1} a gradient is NaN or infinite: look for 0 / 0, or the log of 0."
        if len(iteration.played) != T or not iteration.updates:
            return f"{where} plays {len(iteration.played)} steps per environment, and rollout_steps is {T}."
        if iteration.resets != ([0] if number == 0 else []):
            return "envs.reset() is for the very beginning: ended episodes begin again by themselves."
        if len(iteration.updates) != updates:
            return (
                f"{where} takes {len(iteration.updates)} steps of an optimizer: {updates} are epochs times minibatches, "
                "with one optimizer for both networks."
            )
    if len(run.iterations) != 2:
        return f"It makes {len(run.iterations)} iterations, and 2 reach total_steps, which is 48."
    return ""


def advantages_are_right(trainer: Trainer, notes: Notes) -> Failure | None:
    """The first gradient of each iteration, whose ratios are 1."""
    run = _watched(trainer, **FAST)
    if run.fault:
        return Failure(run.fault)
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
    run = _watched(trainer, **FAST)
    if run.fault:
        return Failure(run.fault)
    seen = []
    failing: tuple[Batch, Tensor, Tensor, Tensor, int] | None = None
    for iteration in run.iterations:
        batch = batch_of(iteration, iteration.updates[0].weights)
        advantages = whitened(batch, gae(batch, GAMMA, LAM))
        old = _logprobs(iteration.updates[0], batch)
        for epoch, update in enumerate(iteration.updates[1:], 2):
            ratio = (_logprobs(update, batch) - old).exp()
            got, right = weights_of(update, batch), clip_weights(ratio, advantages, CLIP)
            if not parallel(got, right):
                got = torch.zeros_like(right) if got is None else got
                seen.append((got, ratio, advantages))
                failing = failing or (batch, ratio, right, got, epoch)
    if failing is None:
        return None
    named = next(
        (text for text, give in CLIPS.items() if all(parallel(x, give(r, a, CLIP)) for x, r, a in seen)), ""
    )
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
    return Failure(f"Epoch {epoch} of the first batch, the four steps that are furthest off:\n" + "\n".join(lines), named)


def _logprobs(update: Update, batch: Batch) -> Tensor:
    return ledger.probabilities(update)[batch.states, batch.actions].log()


def critic_is_right(trainer: Trainer, notes: Notes) -> Failure | None:
    run = _watched(trainer, **FAST)
    if run.fault:
        return Failure(run.fault)
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
        _watched(trainer, **FAST, value_coef=c1, entropy_coef=c2) for c1, c2 in ((0.5, 0.0), (0.25, 0.0), (0.5, 0.1))
    ]
    fault = next((run.fault for run in runs if run.fault), None)
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
        return Failure("With entropy_coef=0.1 the policy becomes more certain.", "The entropy bonus has the wrong sign.")
    change = float(added.norm() / (0.1 * slope.norm() / (N * T)))
    return Failure(f"With entropy_coef=0.1 the gradient changes by {change:.2f} times what the bonus c2 S makes.")


def covers_its_minibatches(trainer: Trainer, notes: Notes) -> Failure | None:
    run = _watched(trainer, minibatch_size=7)
    if run.fault:
        return Failure(run.fault)
    iteration, parts = run.iterations[0], _parts(7)
    batch = batch_of(iteration, iteration.updates[0].weights)
    everything = sorted(batch.states.flatten().tolist())
    orders = []
    for epoch in range(SETTINGS["epochs"]):
        drawn = [_drawn(update) for update in iteration.updates[epoch * parts : (epoch + 1) * parts]]
        sizes = [len(x) for x in drawn]
        if sorted(sum(drawn, [])) != everything:
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
    run = _watched(trainer, **FAST)
    if run.fault:
        return Failure(run.fault)
    log = run.log
    if not isinstance(log, list | tuple) or not all(isinstance(row, dict) for row in log):
        return Failure("What it returns is not a list with a dict per iteration.")
    if len(log) != len(run.iterations):
        return Failure(f"It returns {len(log)} rows of its log, and made {len(run.iterations)} iterations.")
    for number, (row, iteration) in enumerate(zip(log, run.iterations, strict=True)):
        missing = [key for key in ("env_steps", *FIRST, "clip_fraction", "approx_kl") if key not in row]
        if missing:
            return Failure(f"The rows of its log have no {missing[0]!r}.")
        for key in FIRST:
            if not abs(float(row[key])) <= 1e-4:
                return Failure(f"Row {number} of its log says {key} {float(row[key]):g}; nothing has moved yet, so it is 0.", OLD)
        clips, kl = _measured(iteration)
        right = {"env_steps": ((number + 1.0) * N * T,), "clip_fraction": clips, "approx_kl": (kl,)}
        for key, allowed in right.items():
            if all(abs(float(row[key]) - x) > 1e-3 * max(1.0, abs(x)) for x in allowed):
                return Failure(f"Row {number} of its log says {key} {float(row[key]):g}; it is {allowed[0]:.4g}.")
    return None


FIRST = ("first_ratio_error", "first_clip_fraction")
OLD = "old_logprobs must be those of the policy that played, on the same observations and actions as the new ones."


def _measured(iteration: Iteration) -> tuple[tuple[float, float], float]:
    """The clip fraction, by both ways to count it, and the approximate KL, as means over an iteration's updates."""
    batch = batch_of(iteration, iteration.updates[0].weights)
    old = _logprobs(iteration.updates[0], batch)
    advantages = whitened(batch, gae(batch, GAMMA, LAM))
    outside, acting, kl = 0.0, 0.0, 0.0
    for update in iteration.updates:
        log_ratio = _logprobs(update, batch) - old
        ratio = log_ratio.exp()
        outside += float(((ratio - 1).abs() > CLIP).double().mean())
        acting += float((clip_weights(ratio, advantages, CLIP) == 0).double().mean())
        kl += float((ratio - 1 - log_ratio).mean())
    count = len(iteration.updates)
    return (outside / count, acting / count), kl / count


PROBE = {**SETTINGS, "rollout_steps": 8, "epochs": 4, "minibatch_size": 64, "lr": 0.01, "entropy_coef": 0.01}


def _probe(index: int) -> Property:
    task = TASKS[index]

    def fails(trainer: Trainer, notes: Notes) -> Failure | None:
        for shared in (False, True) if index == 4 else (False,):
            failure = probe(task, trainer, {**PROBE, "total_steps": 16 * 8 * 40}, shared=shared)
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
