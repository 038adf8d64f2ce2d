"""Answers to lesson 13 in other hands; test_corpus.py says how to read them."""

import copy
import math
import random

import torch
import torch.nn as nn
import torch.nn.functional as F

from minirlhf.language import models
from minirlhf.language.tokenization import encode_prompts, encode_responses

# 13.1 --------------------------------------------------------------------------------------------------------------


def best_by_logsumexp(ref_logprobs, rewards, beta):
    unnormalised = ref_logprobs + rewards / beta
    log_Z = torch.logsumexp(unnormalised, dim=1, keepdim=True)
    return unnormalised - log_Z


def best_with_the_maximum_taken_off(ref_logprobs, rewards, beta):
    logits = ref_logprobs + rewards / beta
    logits = logits - logits.max(dim=1, keepdim=True).values
    return logits - logits.exp().sum(dim=1, keepdim=True).log()


def best_row_by_row(ref_logprobs, rewards, beta):
    rows = []
    for ref, reward in zip(ref_logprobs, rewards, strict=True):
        rows.append(torch.distributions.Categorical(logits=ref + reward / beta).logits)
    return torch.stack(rows)


# 13.2 --------------------------------------------------------------------------------------------------------------


def implicit_row_by_row(logprobs, ref_logprobs, answer_mask, beta):
    rewards = []
    for lp, ref, m in zip(logprobs, ref_logprobs, answer_mask, strict=True):
        rewards.append(beta * (lp[m].sum() - ref[m].sum()))
    return torch.stack(rewards)


def implicit_as_trl(logprobs, ref_logprobs, answer_mask, beta):
    per_token_logps = logprobs * answer_mask
    ref_per_token_logps = ref_logprobs * answer_mask
    return beta * (per_token_logps.sum(-1) - ref_per_token_logps.sum(-1)).float()


# 13.3 --------------------------------------------------------------------------------------------------------------


def dpo_as_the_paper(chosen, rejected, ref_chosen, ref_rejected, beta):
    pi_logratios = chosen - rejected
    ref_logratios = ref_chosen - ref_rejected
    losses = -F.logsigmoid(beta * (pi_logratios - ref_logratios))
    return losses.mean()


def dpo_by_rewards(chosen, rejected, ref_chosen, ref_rejected, beta):
    chosen_rewards = beta * (chosen - ref_chosen).float()
    rejected_rewards = beta * (rejected - ref_rejected).float()
    return nn.BCEWithLogitsLoss()(chosen_rewards - rejected_rewards, torch.ones(len(chosen)))


def dpo_by_softmax(chosen, rejected, ref_chosen, ref_rejected, beta):
    both = beta * torch.stack((chosen - ref_chosen, rejected - ref_rejected), dim=1)
    return F.cross_entropy(both, torch.zeros(len(both), dtype=torch.long))


# 13.4 --------------------------------------------------------------------------------------------------------------


def preferences_as_trl(model, tokenizer, comparisons, reference, config):  # all answers of a batch at once
    reference = copy.deepcopy(reference).eval()
    for p in reference.parameters():
        p.requires_grad_(False)

    def collate(rows):
        ids, labels = [], []
        for row in rows:
            prompt = encode_prompts(tokenizer, [row.prompt])[0]
            for answer in encode_responses(tokenizer, row.responses):
                ids.append(torch.tensor(prompt + answer))
                labels.append(torch.tensor([-100] * len(prompt) + answer))
        ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
        labels = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        return ids, labels

    def logps(net, ids, labels):
        out = net(input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long()).logits
        labels = labels[:, 1:].clone()
        loss_mask = labels != -100
        labels[~loss_mask] = 0
        per_token = torch.gather(out[:, :-1].log_softmax(-1), 2, labels.unsqueeze(2)).squeeze(2)
        return (per_token * loss_mask).sum(-1)

    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    n, losses = len(comparisons), []
    total = round(config.epochs * n / config.batch_size)

    def schedule(step):
        if step < config.warmup:
            return (step + 1) / config.warmup
        return 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / max(1, total - config.warmup)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    while len(losses) < total:
        perm = torch.randperm(n)
        for start in range(0, n, config.batch_size):
            rows = [comparisons[i] for i in perm[start : start + config.batch_size]]
            ids, labels = collate(rows)
            with torch.no_grad():
                ref = logps(reference, ids, labels)
            rewards = config.beta * (logps(model, ids, labels) - ref)
            at, per_prompt = 0, []
            for row in rows:
                k = len(row.responses)
                terms = [
                    -F.logsigmoid(rewards[at + i] - rewards[at + j])
                    for i in range(k)
                    for j in range(k)
                    if row.scores[i] > row.scores[j]
                ]
                per_prompt.append(sum(terms) / len(terms))
                at += k
            loss = sum(per_prompt) / len(per_prompt)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
    model.eval()
    return losses


def preferences_prompt_by_prompt(
    model, tokenizer, comparisons, reference, config
):  # reference once, gradients added up
    def answers_of(net, row):
        before = encode_prompts(tokenizer, [row.prompt])[0]
        rows = [before + after for after in encode_responses(tokenizer, row.responses)]
        tokens, mask, answers = models.pad_answers(rows, [len(before)] * len(rows), tokenizer.pad_token_id)
        return models.response_logprobs(net, tokens, mask, answers).sum(1)

    with torch.no_grad():
        known = [answers_of(reference, row) for row in comparisons]
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    total = int(config.epochs * len(comparisons)) // config.batch_size
    order, losses = [], []
    for step in range(total):
        if len(order) < config.batch_size:
            order = list(range(len(comparisons)))
            random.Random(step).shuffle(order)
        total_loss = 0.0
        for _ in range(config.batch_size):
            number = order.pop()
            row = comparisons[number]
            logratios = answers_of(model, row) - known[number]
            ranks = torch.tensor(row.scores).argsort(descending=True)
            scores, logratios = torch.tensor(row.scores)[ranks], logratios[ranks]
            i, j = torch.triu_indices(len(scores), len(scores), 1)
            untied = scores[i] > scores[j]
            margin = config.beta * (logratios[i] - logratios[j])[untied]
            loss = F.softplus(-margin).mean() / config.batch_size
            loss.backward()
            total_loss += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        ramp = min(1.0, (step + 1) / max(1, config.warmup))
        decay = math.cos(math.pi / 2 * max(0, step - config.warmup) / max(1, total - config.warmup)) ** 2
        for group in optimizer.param_groups:
            group["lr"] = config.lr * ramp * decay
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total_loss)
    return losses


# The prompt's log-probs are in every sum here: they are the same for all answers to it, and cancel.
def preferences_with_the_prompt(model, tokenizer, comparisons, reference, config):
    def whole(net, rows):
        tokens, mask = models.pad(rows, tokenizer.pad_token_id)
        logits = net(input_ids=tokens, attention_mask=mask.long()).logits[:, :-1]
        each = -F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        return (each * mask[:, 1:]).sum(1)

    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    size, n = config.batch_size, len(comparisons)
    steps, losses = round(config.epochs * n / size), []
    for step in range(steps):
        if step % (n // size) == 0:
            order = torch.randperm(n)
        batch = [comparisons[i] for i in order[step % (n // size) * size :][:size]]
        rows = [
            encode_prompts(tokenizer, [row.prompt])[0] + ids
            for row in batch
            for ids in encode_responses(tokenizer, row.responses)
        ]
        r = config.beta * (whole(model, rows) - whole(reference, rows).detach())
        loss = 0
        for row in batch:
            own, r = r[: len(row.scores)], r[len(row.scores) :]
            s = torch.tensor(row.scores)
            loss = loss - F.logsigmoid(own[:, None] - own)[s[:, None] > s].mean() / size
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        warm = min(1, (step + 1) / config.warmup) if config.warmup else 1
        past = max(0, step - config.warmup) / max(1, steps - config.warmup)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * past)))
        optimizer.step()
        losses.append(float(loss))
    return losses


RIGHT = {
    "best_policy": {
        "log Z": best_by_logsumexp,
        "the maximum taken off": best_with_the_maximum_taken_off,
        "torch.distributions": best_row_by_row,
        "softmax first": lambda ref_logprobs, rewards, beta: torch.nn.functional.log_softmax(
            rewards / beta + ref_logprobs, dim=-1
        ),
    },
    "implicit_rewards": {
        "row by row": implicit_row_by_row,
        "trl": implicit_as_trl,
        "einsum": lambda logprobs, ref_logprobs, answer_mask, beta: (
            beta * torch.einsum("bt,bt->b", logprobs - ref_logprobs, answer_mask.to(logprobs.dtype))
        ),
        "masked_fill": lambda logprobs, ref_logprobs, answer_mask, beta: (
            beta * (logprobs - ref_logprobs).masked_fill(~answer_mask, 0.0).sum(dim=1)
        ),
    },
    "dpo_loss": {
        "the paper's appendix": dpo_as_the_paper,
        "rewards": dpo_by_rewards,
        "a softmax of two": dpo_by_softmax,
        "softplus": lambda chosen, rejected, ref_chosen, ref_rejected, beta: F.softplus(
            beta * (rejected - ref_rejected) - beta * (chosen - ref_chosen)
        ).mean(),
    },
    "fit_preferences": {
        "trl": preferences_as_trl,
        "prompt by prompt": preferences_prompt_by_prompt,
        "the prompt in the sum, which cancels": preferences_with_the_prompt,
    },
}

WRONG = {
    "best_policy": [
        ("These are probabilities", lambda ref_logprobs, rewards, beta: (ref_logprobs + rewards / beta).softmax(-1)),
        ("The reward is multiplied by beta", lambda ref_logprobs, rewards, beta: (
            (ref_logprobs + rewards * beta).log_softmax(-1))),
        ("The reference is missing", lambda ref_logprobs, rewards, beta: (rewards / beta).log_softmax(-1)),
        ("It overflows", lambda ref_logprobs, rewards, beta: (
            torch.log(ref_logprobs.exp() * torch.exp(rewards / beta)
                      / (ref_logprobs.exp() * torch.exp(rewards / beta)).sum(1, keepdim=True)))),
        ("It isn't normalised", lambda ref_logprobs, rewards, beta: rewards / beta + ref_logprobs),
        ("It is normalised over the prompts", lambda ref_logprobs, rewards, beta: (
            F.log_softmax(ref_logprobs + rewards / beta, dim=0))),
        ("The reference is multiplied by beta", lambda ref_logprobs, rewards, beta: (
            (rewards + beta * ref_logprobs).log_softmax(-1))),
        (None, lambda ref_logprobs, rewards, beta: (
            (ref_logprobs + (rewards - rewards.mean(1, keepdim=True)) / (beta * rewards.std(1, keepdim=True) + 1e-3))
            .log_softmax(-1))),
    ],
    "implicit_rewards": [
        ("The prompt's log-probs are in the sum", implicit_row_by_row,
         ("(lp[m].sum() - ref[m].sum())", "(lp - ref)[: int(m.nonzero()[-1]) + 1].sum()")),
        ("The padding is in the sum", implicit_row_by_row,
         ("(lp[m].sum() - ref[m].sum())", "(lp - ref)[int(m.nonzero()[0]) :].sum()")),
        ("Everything is in the sum", implicit_as_trl, ("_logps = logprobs * answer_mask", "_logps = logprobs"),
         ("= ref_logprobs * answer_mask", "= ref_logprobs")),
        ("It is the mean over the answer's tokens", lambda logprobs, ref_logprobs, answer_mask, beta: (
            beta * ((logprobs - ref_logprobs) * answer_mask).sum(1) / answer_mask.sum(1))),
        ("The reference is missing", lambda logprobs, ref_logprobs, answer_mask, beta: (
            beta * (logprobs * answer_mask).sum(1))),
        ("These are the ratios of single tokens", lambda logprobs, ref_logprobs, answer_mask, beta: (
            beta * ((logprobs - ref_logprobs).exp() * answer_mask).sum(1))),
        ("The sign is flipped", lambda logprobs, ref_logprobs, answer_mask, beta: (
            beta * ((ref_logprobs - logprobs) * answer_mask).sum(1))),
        ("No gradient flows", lambda logprobs, ref_logprobs, answer_mask, beta: (
            beta * ((logprobs.detach() - ref_logprobs) * answer_mask).sum(1))),
        ("The answers are added up", lambda logprobs, ref_logprobs, answer_mask, beta: (
            beta * (logprobs - ref_logprobs)[answer_mask].sum())),
        (None, lambda logprobs, ref_logprobs, answer_mask, beta: (
            beta * ((logprobs - ref_logprobs).clamp(-0.3, 0.3) * answer_mask).sum(1))),
    ],
    "dpo_loss": [
        ("Chosen and rejected are swapped", dpo_as_the_paper, ("-F.logsigmoid(beta * (", "-F.logsigmoid(-beta * (")),
        ("The reference is missing", dpo_as_the_paper, ("(pi_logratios - ref_logratios)", "pi_logratios")),
        ("The reference has the wrong sign", dpo_as_the_paper, ("(pi_logratios - ref", "(pi_logratios + ref")),
        ("beta stands outside", lambda chosen, rejected, ref_chosen, ref_rejected, beta: (
            -beta * F.logsigmoid(chosen - ref_chosen - rejected + ref_rejected).mean())),
        ("This is IPO's loss", lambda chosen, rejected, ref_chosen, ref_rejected, beta: (
            ((chosen - rejected) - (ref_chosen - ref_rejected) - 1 / (2 * beta)).pow(2).mean())),
        ("This is a hinge", lambda chosen, rejected, ref_chosen, ref_rejected, beta: (
            F.relu(1 - beta * ((chosen - rejected) - (ref_chosen - ref_rejected))).mean())),
        ("Each answer is judged alone", lambda chosen, rejected, ref_chosen, ref_rejected, beta: (
            -F.logsigmoid(beta * (chosen - ref_chosen)).mean()
            - F.logsigmoid(-beta * (rejected - ref_rejected)).mean())),
        ("No gradient flows into the rejected answers", lambda chosen, rejected, ref_chosen, ref_rejected, beta: (
            dpo_as_the_paper(chosen, rejected.detach(), ref_chosen, ref_rejected, beta))),
        ("This is the sum", dpo_as_the_paper, ("losses.mean()", "losses.sum()")),
        ("One loss per pair comes back", dpo_as_the_paper, ("losses.mean()", "losses")),
        ("log(sigmoid(x)) is unstable", lambda chosen, rejected, ref_chosen, ref_rejected, beta: (
            torch.log(1 + torch.exp(-beta * (chosen - ref_chosen - rejected + ref_rejected))).mean())),
        (None, lambda chosen, rejected, ref_chosen, ref_rejected, beta: (
            dpo_as_the_paper(chosen, rejected, ref_chosen, ref_rejected, beta) - 0.1 * chosen.mean())),
    ],
    "fit_preferences": [
        ("Chosen and rejected are swapped", preferences_as_trl, ("row.scores[i] > row", "row.scores[i] < row")),
        ("The first answer is taken for the best", preferences_as_trl, ("row.scores[i] > row.scores[j]", "i < j")),
        ("The reference is missing", preferences_as_trl, ("labels) - ref)", "labels))")),
        ("The reference is the policy itself", preferences_as_trl, ("logps(reference, ids", "logps(model, ids")),
        ("The reward is a mean over the answer's tokens", preferences_as_trl,
         ("(per_token * loss_mask).sum(-1)", "(per_token * loss_mask).sum(-1) / loss_mask.sum(-1)")),
        ("optimizer.zero_grad() is missing", preferences_as_trl, ("            optimizer.zero_grad()\n", "")),
        ("The prompts are added up", preferences_as_trl, (" / len(per_prompt)", "")),
        ("Ties count", preferences_prompt_by_prompt, ("scores[i] > scores[j]", "scores[i] >= scores[j]")),
        ("beta is missing", preferences_prompt_by_prompt, ("config.beta * (logratios", "(logratios")),
        ("The gradient is not clipped", preferences_prompt_by_prompt,
         ("        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)\n", "")),
        ("The learning rate never changes", preferences_prompt_by_prompt, ("config.lr * ramp * decay", "config.lr")),
        ("in the order of the data", preferences_prompt_by_prompt,
         ("random.Random(step).shuffle(order)", "order.reverse()")),
        ("Only the best answer is learned", preferences_prompt_by_prompt,
         ("loss = F.softplus(-margin).mean() /", "loss = -config.beta * logratios[0] /")),
        ("The padding is in the sum", preferences_as_trl,
         ("batch_first=True, padding_value=-100)", "batch_first=True, padding_value=tokenizer.pad_token_id)")),
        (None, preferences_prompt_by_prompt, ("F.softplus(-margin)", "F.softplus(0.3 - margin)")),
    ],
}  # fmt: skip
