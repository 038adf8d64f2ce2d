"""Studio 4: RLHF, step 3 of InstructGPT, from the samples to PPO-ptx."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import torch

from minirlhf.language.rlhf import RLHFConfig
from minirlhf_course.studios.credit import gae, pairs_of, text_of, weights_of, whitened
from minirlhf_course.studios.dictation import Run, watch
from minirlhf_course.studios.equation2 import (
    BASE,
    FAST,
    PLAIN,
    advantages_are_right,
    exact_on_average,
    kl_is_charged,
    only_answers_learn,
)
from minirlhf_course.studios.given import Trainer
from minirlhf_course.studios.ledger import parallel
from minirlhf_course.studios.studio import Failure, Notes, Property, Studio
from minirlhf_course.studios.tables import trio
from minirlhf_course.studios.text_losses import (
    clip_is_right,
    critic_is_right,
    drawn,
    first_ratio_is_one,
    log_shape,
    ptx_is_the_sum,
)
from minirlhf_course.studios.text_probes import TASKS, equals_the_package, probe

STUB = '''
def my_rlhf(
    policy, value_model, reference, reward, tokenizer, batches, config,
    *, sample, corpus, generator,
):
    """Step 3 of InstructGPT: trains policy and value model in place, returns the log."""
    ...  # your code here
'''.strip()

HINTS = (
    "Write two helpers first, and use them wherever a log-probability or a value is needed: `logprobs_of(model, "
    "tokens, mask)` and `values_of(tokens, mask)`, each [B, T]. With `T = samples.response_mask.shape[1]`, both read "
    "the columns `[:, -T - 1 : -1]`: what stands in a column is said by the one to its left.",
    "`d = torch.where(response_mask, samples.logprobs - ref_logprobs, 0.0)`; the rewards are `-beta * d`, and "
    "`rewards[torch.arange(B), samples.lengths - 1] += scores`. Old values set to 0 at padding, and a sum that is set "
    "to 0 there, keep GAE clean.",
    "In the update, take what counts before any mean: `ratio = (new[keep] - old[keep]).exp()` with `keep = "
    "response_mask[rows]`. Two optimizers, one backward pass for each model; PPO-ptx is added to the policy's loss "
    "before that.",
)


# --- The properties. ---


def keeps_its_shape(trainer: Trainer, notes: Notes) -> Failure | None:
    for config in (BASE, replace(BASE, minibatch_size=3, epochs=2, ptx_coef=0.1)):
        run = watch(trainer, config)
        problem = run.problem or _shape_problem(run, config)
        if problem:
            return Failure(
                f"{problem}\n{config.steps} batches of 8 prompts, minibatch_size={config.minibatch_size}, "
                f"epochs={config.epochs}, ptx_coef={config.ptx_coef}."
            )
    return None


def _shape_problem(run: Run, config: RLHFConfig) -> str:
    updates = config.epochs * math.ceil(config.batch_size / config.minibatch_size)
    for number, step in enumerate(run.steps, 1):
        if not step.heard:
            return f"The reward is not asked in batch {number}."
        if len(step.of("policy")) != updates:
            found = len(step.of("policy"))
            said = f"In batch {number} the policy takes {found} steps, and epochs times minibatches is {updates}."
            twice = found == 2 * updates and config.ptx_coef > 0
            return said + (" PPO-ptx is one step on the sum of two gradients, not a step on each." if twice else "")
    return ""


def reward_hears_answers(trainer: Trainer, notes: Notes) -> Failure | None:
    run = watch(trainer, BASE, garbage=True)
    if run.problem:
        return Failure(run.problem)
    for step in run.steps:
        right = Counter(pairs_of(run, step))
        wrong = [pair for pair in step.heard if pair not in right]
        if wrong:
            prompt, heard = min(wrong, key=lambda pair: len(pair[1]))
            said = next((answer for text, answer in right if text == prompt), None)
            named = ""
            if said is not None and heard.startswith(said) and heard != said:
                named = "It hears what stands behind the answer's end: decode samples.responses(), which are cut there."
            elif said is not None and any(answer == heard for _, answer in right):
                named = "Prompts and answers are not in the same order."
            elif said is not None and said in heard:
                named = "It hears more than the answer."
            return Failure(f'Of "{prompt}" the reward hears {heard!r}; the answer is {said!r}.', named)
        if Counter(step.heard) != right:
            return Failure(f"The reward is asked {len(step.heard)} times for {len(step.texts)} answers.")
    return None


def reference_stays(trainer: Trainer, notes: Notes) -> Failure | None:
    run = watch(trainer, replace(FAST, ptx_coef=0.1))
    if run.problem:
        return Failure(run.problem)
    trained = any(step.of("reference") for step in run.steps)
    if run.moved or trained:
        return Failure(
            "After two batches the reference has other weights than at the beginning."
            if run.moved
            else "The reference gets a gradient, and is in an optimizer.",
            "It is the SFT model, frozen: in no optimizer, under torch.no_grad(). If it is trained too, it follows "
            "the policy, and the KL holds nothing back.",
        )
    return None


def covers_its_minibatches(trainer: Trainer, notes: Notes) -> Failure | None:
    config = replace(BASE, minibatch_size=3, epochs=3, lr=1e-6, value_lr=1e-6)  # nothing leaves the clip range
    run = watch(trainer, config)
    if run.problem:
        return Failure(run.problem)
    step = run.steps[0]
    orders: list[list[list[int]]] = []
    for epoch in range(3):
        parts = [drawn(run, step, place) for place in range(3 * epoch, 3 * epoch + 3)]
        sizes = [len(rows) for rows in parts]
        if sorted(row for rows in parts for row in rows) != list(range(8)):
            return Failure(f"Epoch {epoch + 1}: its minibatches have {sizes} answers, and not each of the 8 once.")
        if max(sizes) - min(sizes) > 1:
            return Failure(f"The minibatches of epoch {epoch + 1} have {sizes} answers: equal parts are asked for.")
        orders.append(parts)
    if orders[0] == orders[1] == orders[2]:
        return Failure("Every epoch has the same minibatches: draw a new order for each.")
    text = text_of(run, step, step.updates[0], config, config.beta)
    got = weights_of(step.of("policy")[0], text, config.temperature)
    inside = text.mask & torch.isin(torch.arange(8), torch.tensor(orders[0][0]))[:, None]
    if not parallel(got, torch.where(inside, whitened(text.mask, gae(text)), 0.0)):
        own = torch.where(inside, whitened(inside, torch.where(inside, gae(text), 0.0)), 0.0)
        named = (
            "Advantages are whitened in each minibatch, not once over the whole batch." if parallel(got, own) else ""
        )
        return Failure(
            f"First minibatch, answers {orders[0][0]} of the batch: other advantages than in one of all 8.", named
        )
    expected = torch.randperm(8, generator=torch.Generator().manual_seed(0)).tensor_split(3)
    if [sorted(rows.tolist()) for rows in expected] != orders[0]:
        notes.remarks.append(
            "You draw minibatches in another order than the specification says, so equality with train_rlhf was not "
            "looked at."
        )
    return None


def beta_is_steered(trainer: Trainer, notes: Notes) -> Failure | None:
    config = replace(PLAIN, steps=4, lr=0.05, target_kl=1.2, kl_horizon=20.0)
    run = watch(trainer, config, models=trio(values=0.0), seed=2)
    problem = run.problem or log_shape(run)
    if problem:
        return Failure(problem)
    beta, betas = config.beta, []
    for step in run.steps:
        betas.append(beta)
        text = text_of(run, step, step.updates[0], config, beta)
        kl = float(text.d.sum(1).mean())
        beta *= 1 + min(max(kl / 1.2 - 1, -0.2), 0.2) * 8 / 20.0
    said = [float(row["beta"]) for row in run.log]
    rows = "target_kl 1.2, kl_horizon 20, 8 answers a batch, error within ±0.2"
    rows += f"\n  beta: right {_row(betas)}\n  beta: yours {_row(said)}"
    off = [abs(x - y) > 1e-3 * y for x, y in zip(said, betas, strict=True)]
    if any(off):
        return Failure(rows, _beta_name(run, config, said, betas))
    for step, right in zip(run.steps, betas, strict=True):
        update = step.of("policy")[0]
        text = text_of(run, step, update, config, right)
        if not parallel(weights_of(update, text, config.temperature), gae(text)):
            fixed = text._replace(beta=config.beta)
            named = ""
            if parallel(weights_of(update, fixed, config.temperature), gae(fixed)):
                named = "Rewards are charged config.beta in every batch: charge the beta that is steered."
            return Failure(f"{rows}\nThe log says so, but the rewards do not hear of it.", named)
    return None


def _row(numbers: list[float]) -> str:
    return " ".join(f"{x:.4f}" for x in numbers)


def _beta_name(run: Run, config: RLHFConfig, said: list[float], right: list[float]) -> str:
    if len(set(said)) == 1:
        return "beta stays where it was."
    if abs(said[0] - right[1]) < 1e-4:
        return "The log says the beta of the next batch: log the one that was charged."
    beta, tokens = config.beta, []
    for step in run.steps:
        tokens.append(beta)
        text = text_of(run, step, step.updates[0], config, beta)
        beta *= 1 + min(max(float(text.d[text.mask].mean()) / 1.2 - 1, -0.2), 0.2) * 8 / 20.0
    if all(abs(x - y) < 1e-3 for x, y in zip(said, tokens, strict=True)):
        return "The KL is a mean over tokens: target_kl is in nats per answer (bug 9)."
    if (said[1] - said[0]) * (right[1] - right[0]) < 0:
        return "beta is steered the wrong way: more KL than the target makes it larger."
    return ""


def garbage_changes_nothing(trainer: Trainer, notes: Notes) -> Failure | None:
    """The same answers twice; the second time padding holds other tokens, and the models say other things there."""
    config = replace(FAST, minibatch_size=4, epochs=2, ptx_coef=0.1)
    clean = watch(trainer, config, seed=3)
    other = watch(trainer, config, models=trio(padding=3.0), seed=3, garbage=True)
    for run in (clean, other):
        if run.problem:
            return Failure(run.problem)
    for number, (first, second) in enumerate(zip(clean.steps, other.steps, strict=True), 1):
        for place, (x, y) in enumerate(zip(first.updates, second.updates, strict=False), 1):
            for model, gradient in x.gradients.items():
                changed = y.gradients.get(model, torch.zeros_like(gradient)) - gradient
                if float(changed.abs().max()) > 1e-4 * float(gradient.abs().max()):
                    share = float(changed.norm() / gradient.norm())
                    return Failure(
                        f"Batch {number}, update {place}: with other tokens and numbers in padded slots the "
                        f"gradient of the {model} model changes by {share:.1%}."
                    )
    logs = [log_shape(run) for run in (clean, other)]
    if not any(logs):
        for row, again in zip(clean.log, other.log, strict=True):
            for key in ("score", "kl"):
                if abs(float(row[key]) - float(again[key])) > 1e-4:
                    return Failure(
                        f"With other tokens and numbers in padded slots the log's {key} changes from "
                        f"{float(row[key]):.4f} to {float(again[key]):.4f}."
                    )
    return None


def logs_what_happened(trainer: Trainer, notes: Notes) -> Failure | None:
    run = watch(trainer, BASE)
    problem = run.problem or log_shape(run)
    if problem:
        return Failure(problem)
    for number, (row, step) in enumerate(zip(run.log, run.steps, strict=True)):
        text = text_of(run, step, step.updates[0], BASE, BASE.beta)
        kl = float(text.d.sum(1).mean())
        right = {"score": float(text.score.mean()), "kl": kl, "beta": BASE.beta}
        others = {
            float(text.d[text.mask].mean()): "That is a mean over tokens.",
            float(text.d.mean()): "That is a mean over all columns, padding included (bug 9).",
            float(text.d_padded.sum(1).mean()): "That has the log-ratios of padding in it (bug 8).",
            float(text.raw.mean()): "That is without the penalty of answers that did not end.",
        }
        for key, expected in right.items():
            got = float(row[key])
            if abs(got - expected) > 1e-3 * max(1.0, abs(expected)):
                named = next((said for x, said in others.items() if abs(x - got) < 1e-3), "")
                return Failure(f"Row {number} of its log says {key} {got:.4f}; it is {expected:.4f}.", named)
    return None


def _probe(index: int) -> Property:
    task = TASKS[index]
    return Property(task.title, lambda trainer, notes: probe(task, trainer), task.look, task.bugs)


def _equals(trainer: Trainer, notes: Notes) -> Failure | None:
    return None if notes.remarks else equals_the_package(trainer, notes)


rlhf = Studio(
    "rlhf",
    STUB,
    HINTS,
    (
        Property(
            "one sample, one scoring, epochs times minibatches updates for each batch",
            keeps_its_shape,
            "the order of things: sample, score, then learn.",
            gate=True,
        ),
        Property(
            "the reward hears each prompt with its own answer, cut after its end",
            reward_hears_answers,
            "what is decoded, and in which order.",
            (16,),
        ),
        Property("the reference is never trained", reference_stays, "what the optimizers hold.", (2,)),
        Property(
            "only tokens of answers learn: neither prompts nor padding",
            only_answers_learn,
            "the columns of logits and values, and the mask of the losses.",
            (9, 23),
        ),
        Property(
            "in the first minibatch every ratio is 1, and nothing is clipped",
            first_ratio_is_one,
            "the two log-probabilities of the ratio: the same temperature and columns, before any step, no dropout.",
            (3, 23, 24, 28),
        ),
        Property(
            "the KL is charged token by token, the score paid at the last",
            kl_is_charged,
            "the rewards: their sign, whose d, which column.",
            (2, 6, 8, 9, 10, 14, 30),
        ),
        Property("advantages are GAE's", advantages_are_right, "GAE: its direction, V's column, the end.", (1, 7, 8)),
        Property("the clip acts where it should", clip_is_right, "the ratio, and min and max.", (3, 4, 5)),
        Property(
            "V learns the returns of the raw advantages, clipped",
            critic_is_right,
            "the value loss: its targets, its sign, its clip.",
            (1, 4, 6, 25),
        ),
        Property(
            "the mean gradient is exactly that of E[r - beta log(pi / pi_ref)], all 15 answers listed",
            exact_on_average,
            "what the gradient is made of besides the rewards.",
            (2, 30),
        ),
        Property(
            "each epoch has every answer once, and advantages are the batch's",
            covers_its_minibatches,
            "how an epoch is split, and where advantages are whitened.",
        ),
        Property("PPO-ptx: one step on the sum of two gradients", ptx_is_the_sum, "the loss of the text, its weight."),
        Property("its log tells what happened", logs_what_happened, "the rows that it returns.", (8, 9)),
        Property("beta is steered towards target_kl", beta_is_steered, "the last lines of a batch.", (9,)),
        Property(
            "what stands in padded slots changes nothing",
            garbage_changes_nothing,
            "every mean, sum and loop over columns: what of padding is in it?",
            (8, 9),
        ),
        Property(
            "one batch moves the weights as `train_rlhf` does under the same seed",
            _equals,
            "Adam's betas and eps, the two learning rates, the norms that are clipped.",
        ),
        *(_probe(index) for index in range(len(TASKS))),
    ),
)
