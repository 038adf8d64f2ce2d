"""Answers to lesson 08 in other hands; test_corpus.py says how to read them."""

import itertools
import math
import random

import torch
import torch.nn.functional as F

from minirlhf.language import models
from minirlhf.language.tokenization import encode_prompts, encode_responses

# 8.1 pair_loss -------------------------------------------------------------------------------------------------------


def pair_by_cross_entropy(chosen, rejected):  # a choice between two classes, the first of which is right
    return F.cross_entropy(torch.stack((chosen, rejected), dim=1), torch.zeros(len(chosen), dtype=torch.long))


def pair_by_bce(chosen, rejected):
    d = chosen - rejected
    return F.binary_cross_entropy_with_logits(d, torch.ones_like(d))


def pair_by_bce_of_probabilities(chosen, rejected):
    probability = torch.sigmoid(chosen - rejected)
    return F.binary_cross_entropy(probability, torch.ones_like(probability))


# 8.2 ranking_loss ----------------------------------------------------------------------------------------------------


def ranking_by_combinations(rewards, scores):  # InstructGPT's own description, one prompt per batch element
    losses = []
    for r, s in zip(rewards, scores, strict=True):
        per_prompt = []
        for i, j in itertools.combinations(range(len(r)), 2):
            if s[i] == s[j]:
                continue
            w, l = (i, j) if s[i] > s[j] else (j, i)  # noqa: E741
            per_prompt.append(-F.logsigmoid(r[w] - r[l]))
        if per_prompt:
            losses.append(torch.stack(per_prompt).mean())
    return torch.stack(losses).mean()


def ranking_by_bool_index(rewards, scores):  # OpenRLHF's PairWiseLoss, on what is left of each prompt
    losses = []
    for r, s in zip(rewards, scores, strict=True):
        w, l = torch.nonzero(s[:, None] > s[None, :], as_tuple=True)  # noqa: E741
        if len(w):
            losses.append(-F.logsigmoid(r[w] - r[l]).mean())
    return sum(losses) / len(losses)


def ranking_by_sorting(rewards, scores):
    s, order = scores.sort(dim=1, descending=True)
    r = rewards.gather(1, order)
    i, j = torch.triu_indices(r.shape[1], r.shape[1], 1)
    differs = (s[:, i] != s[:, j]).to(r.dtype)
    nll = F.softplus(r[:, j] - r[:, i]) * differs
    kept = differs.sum(1) > 0
    return (nll[kept].sum(1) / differs[kept].sum(1)).mean()


def ranking_by_margin_sign(rewards, scores):  # the upper triangle, each pair turned by the sign of its score
    sign = (scores[:, :, None] - scores[:, None, :]).sign()
    d = sign * (rewards[:, :, None] - rewards[:, None, :])
    weight = sign.abs().triu(1)
    per_prompt = (weight * -F.logsigmoid(d)).sum((-1, -2)) / (weight.sum((-1, -2)) + 1e-10)
    return per_prompt.sum() / weight.any(-1).any(-1).sum()


def plackett_luce(rewards, scores):
    r = rewards.gather(1, scores.argsort(dim=1, descending=True, stable=True))
    left = r.flip(1).logcumsumexp(1).flip(1)
    return (left - r).sum(1).mean()


def plackett_luce_mean(rewards, scores):
    r = rewards.gather(1, scores.argsort(dim=1, descending=True, stable=True))
    nll = [torch.logsumexp(r[:, k:], 1) - r[:, k] for k in range(r.shape[1] - 1)]
    return torch.stack(nll).mean()


def ranking_with(weight=None, margin=0.0, guard=True, mean=True):
    def loss(rewards, scores):
        gap = scores[:, :, None] - scores[:, None, :]
        pairs = gap > 0
        nll = -F.logsigmoid(rewards[:, :, None] - rewards[:, None, :] - margin * gap)
        nll = torch.where(pairs, nll * gap if weight == "gap" else nll, 0)
        counts = pairs.sum((1, 2))
        if weight == "gap" and not mean:
            return (nll.sum((1, 2)) / torch.where(pairs, gap, 0).sum((1, 2)).clamp(min=1e-9)).sum() / (counts > 0).sum()
        if not guard:
            return (nll.sum((1, 2)) / counts).mean()
        return (nll.sum((1, 2)) / counts.clamp(min=1)).sum() / (counts > 0).sum()

    return loss


def ranking_of_best_against_rest(rewards, scores):
    losses = []
    for r, s in zip(rewards, scores, strict=True):
        best = s.argmax()
        worse = s < s[best]
        if worse.any():
            losses.append(-F.logsigmoid(r[best] - r[worse]).mean())
    return torch.stack(losses).mean()


def ranking_with_epsilon(rewards, scores):
    pairs = scores[:, :, None] > scores[:, None, :]
    nll = -(torch.sigmoid(rewards[:, :, None] - rewards[:, None, :]) + 1e-8).log()
    counts = pairs.sum((1, 2))
    return ((nll * pairs).sum((1, 2)) / counts.clamp(min=1)).sum() / (counts > 0).sum()


# 8.3 usable_pairs ----------------------------------------------------------------------------------------------------


def usable_one_by_one(tokens, scores):
    B, K = scores.shape
    usable = torch.zeros(B, K, K, dtype=torch.bool)
    for b in range(B):
        for i, j in itertools.permutations(range(K), 2):
            usable[b, i, j] = bool(scores[b, i] > scores[b, j]) and not torch.equal(tokens[b, i], tokens[b, j])
    return usable


def usable_by_counting(tokens, scores):
    better = scores.unsqueeze(2).gt(scores.unsqueeze(1))
    distance = tokens.unsqueeze(2).ne(tokens.unsqueeze(1)).sum(dim=-1)
    return better * (distance > 0)


def usable_by_same(tokens, scores):
    same = (tokens[:, :, None, :] == tokens[:, None, :, :]).all(dim=-1)
    return (scores[:, :, None] - scores[:, None, :] > 0) & ~same


def usable_by_sum(tokens, scores):
    sums = tokens.sum(-1)
    return (scores[:, :, None] > scores[:, None, :]) & (sums[:, :, None] != sums[:, None, :])


def usable_upper_only(tokens, scores):
    return usable_by_same(tokens, scores).triu(1)


def usable_without_duplicates(tokens, scores):
    same = (tokens[:, :, None] == tokens[:, None]).all(-1)
    alone = same.sum(2) == 1
    return usable_by_same(tokens, scores) & alone[:, :, None] & alone[:, None, :]


def usable_without_scores(tokens, scores):
    return ~(tokens[:, :, None] == tokens[:, None]).all(-1)


# 8.4 last_token_scores -----------------------------------------------------------------------------------------------


def last_by_flip(token_values, mask):  # OpenRLHF
    eos_indices = mask.size(1) - 1 - mask.long().fliplr().argmax(dim=1, keepdim=True)
    return token_values.gather(dim=1, index=eos_indices).squeeze(1)


def last_by_cumsum(token_values, mask):
    at = mask.long().cumsum(1).argmax(1)
    return token_values[torch.arange(len(token_values)), at]


def last_row_by_row(token_values, mask):
    return torch.stack([values[keep][-1] for values, keep in zip(token_values, mask, strict=True)])


def last_by_nonzero(token_values, mask):
    out = []
    for b in range(mask.shape[0]):
        out.append(token_values[b, mask[b].nonzero().max()])
    return torch.stack(out)


def last_by_pad(token_values, mask):  # Hugging Face's trick: the first pad, minus one
    lengths = (~mask).int().argmax(-1) - 1
    return token_values[torch.arange(len(mask)), lengths]


def last_discounted(token_values, mask):
    weights = 0.5 ** (mask.shape[1] - 1 - torch.arange(mask.shape[1]))
    return (torch.where(mask, token_values, 0) * weights).sum(1)


# 8.5 noise_ceiling ---------------------------------------------------------------------------------------------------


def ceiling_one_by_one(scores, others):
    agree, total = 0, 0
    for a, b in zip(scores.tolist(), others.tolist(), strict=True):
        for i, j in itertools.combinations(range(len(a)), 2):
            if a[i] != a[j] and b[i] != b[j]:
                total += 1
                agree += (a[i] > a[j]) == (b[i] > b[j])
    share = agree / total
    p = 0.5 * (1 + max(0.0, 2 * share - 1) ** 0.5)
    return torch.tensor(share, dtype=torch.float64), torch.tensor(p, dtype=torch.float64)


def ceiling_by_quadratic(scores, others):
    K = scores.shape[1]
    i, j = torch.triu_indices(K, K, offset=1)
    x, y = (s[:, i] - s[:, j] for s in (scores, others))
    ordered = (x != 0) & (y != 0)
    a = ((x > 0) == (y > 0))[ordered].double().mean()
    discriminant = 4 - 8 * (1 - a)  # of 2 p^2 - 2 p + 1 - a = 0
    return a, ((2 + torch.clamp(discriminant, min=0.0).sqrt()) / 4)


def ceiling_by_kendall(scores, others):
    s = torch.sign(scores.unsqueeze(-1) - scores.unsqueeze(-2))
    o = torch.sign(others.unsqueeze(-1) - others.unsqueeze(-2))
    tau = (s * o).sum() / (s * o).abs().sum()
    return (tau + 1) / 2, (tau.relu().sqrt() + 1) / 2


def ceiling_with(change):
    def ceiling(scores, others):
        a, p = ceiling_by_quadratic(scores, others)
        return change(a, p)

    return ceiling


def ceiling_of_all_pairs_of_the_batch(scores, others):
    return ceiling_by_quadratic(scores.reshape(1, -1), others.reshape(1, -1))


def ceiling_with_half_ties(scores, others):
    i, j = torch.triu_indices(scores.shape[1], scores.shape[1], 1)
    x, y = ((s[:, i] - s[:, j]).sign() for s in (scores, others))
    a = torch.where((x == 0) | (y == 0), 0.5, (x == y).double()).mean()
    return a, 0.5 + (2 * a - 1).clamp(min=0).sqrt() / 2


# 8.6 score_offset ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def offset_by_running_sum(model, rows, batch_size):
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        scores = model(rows[start : start + batch_size])
        total += scores.sum()
        count += scores.numel()
    return total / count


def offset_by_list(model, rows, batch_size):  # trl: what the batches gave, gathered, then one mean
    gathered = []
    for start in range(0, len(rows), batch_size):
        gathered += model(rows[start : start + batch_size]).tolist()
    return torch.tensor(gathered, dtype=rows.dtype).mean()


def offset_of_weighed_means(model, rows, batch_size):
    offset = rows.new_zeros(())
    for batch in torch.split(rows, batch_size):
        offset = offset + model(batch).mean() * len(batch) / len(rows)
    return offset


def offset_of_full_batches(model, rows, batch_size):
    scores = [model(batch).sum() for batch in rows.split(batch_size)]
    return torch.stack(scores).sum() / (len(scores) * batch_size)


def offset_running(model, rows, batch_size):
    mean = None
    for batch in rows.split(batch_size):
        now = model(batch).mean()
        mean = now if mean is None else 0.9 * mean + 0.1 * now
    return mean


# 8.7 fit_rewards -----------------------------------------------------------------------------------------------------


def fitted_as_trl(model, tokenizer, comparisons, demonstrations, config):  # transformers' own scores, pairs by name
    def collate(prompts, responses):
        before, after = encode_prompts(tokenizer, prompts), encode_responses(tokenizer, responses)
        rows = [torch.tensor(p + a) for p, a in zip(before, after, strict=True)]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
        return {"input_ids": ids, "attention_mask": (ids != tokenizer.pad_token_id).long()}

    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    total = int(config.epochs * len(comparisons) / config.batch_size)

    def factor(step):
        if step < config.warmup:
            return (step + 1) / config.warmup
        return 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / (total - config.warmup)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    losses = []
    for _ in range(int(config.epochs)):
        for batch in torch.randperm(len(comparisons)).split(config.batch_size):
            rows = [comparisons[i] for i in batch]
            prompts = [row.prompt for row in rows for _ in row.responses]
            rewards = model(**collate(prompts, [text for row in rows for text in row.responses])).logits.squeeze(-1)
            loss, start = 0.0, 0
            for row in rows:
                pairs = []
                for i, j in itertools.combinations(range(len(row.responses)), 2):
                    if row.scores[i] == row.scores[j]:
                        continue
                    w, r = (i, j) if row.scores[i] > row.scores[j] else (j, i)
                    pairs.append(-F.logsigmoid(rewards[start + w] - rewards[start + r]))
                loss = loss + torch.stack(pairs).mean() / len(rows)
                start += len(row.responses)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            scheduler.step()
            losses.append(float(loss.detach()))
    model.eval()
    with torch.no_grad():
        shown = collate([row.prompt for row in demonstrations], [row.completion for row in demonstrations])
        model.config.score_offset = model(**shown).logits.mean().item()
    return losses


def fitted_prompt_by_prompt(model, tokenizer, comparisons, demonstrations, config):  # gradients added up
    def reward(prompt, text):
        (before,), (after,) = encode_prompts(tokenizer, [prompt]), encode_responses(tokenizer, [text])
        ids = torch.tensor([before + after])
        return models.token_values(model, ids, torch.ones_like(ids).bool())[0, -1]

    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    total = int(config.epochs * len(comparisons)) // config.batch_size
    order, losses = [], []
    for step in range(total):
        if len(order) < config.batch_size:
            order = list(range(len(comparisons)))
            random.Random(step).shuffle(order)
        total_loss = 0.0
        for _ in range(config.batch_size):
            row = comparisons[order.pop()]
            rewards = torch.stack([reward(row.prompt, text) for text in row.responses])
            targets = torch.tensor(row.scores)
            signs = (targets.unsqueeze(1) - targets.unsqueeze(0)).sign()
            upper = torch.triu(signs, diagonal=1)
            nll = F.softplus(-upper * (rewards.unsqueeze(1) - rewards.unsqueeze(0)))
            loss = nll[upper != 0].mean() / config.batch_size
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
    with torch.no_grad():
        mean = sum(float(reward(row.prompt, row.completion)) for row in demonstrations) / len(demonstrations)
    model.config.score_offset += mean
    return losses


RIGHT = {
    "pair_loss": {
        "trl": lambda chosen, rejected: -F.logsigmoid(chosen - rejected).mean(),
        "cross-entropy": pair_by_cross_entropy,
        "OpenRLHF's LogExpLoss, made stable": lambda chosen, rejected: torch.logaddexp(
            torch.zeros_like(chosen), rejected - chosen
        ).mean(),
        "softplus": lambda chosen, rejected: F.softplus(rejected - chosen).mean(),
        "BCE with logits": pair_by_bce,
        "a softmax of two": lambda chosen, rejected: (
            -torch.log_softmax(torch.stack((chosen, rejected), dim=-1), dim=-1)[..., 0].mean()
        ),
        "Bradley and Terry": lambda chosen, rejected: (
            -(chosen - torch.logsumexp(torch.stack((chosen, rejected)), 0)).mean()
        ),
    },
    "ranking_loss": {
        "InstructGPT": ranking_by_combinations,
        "OpenRLHF": ranking_by_bool_index,
        "sorted": ranking_by_sorting,
        "signs, epsilon below": ranking_by_margin_sign,
    },
    "usable_pairs": {
        "one by one": usable_one_by_one,
        "counting": usable_by_counting,
        "not the same": usable_by_same,
        "lists": lambda tokens, scores: torch.tensor(
            [
                [[bool(si > sj) and ti != tj for sj, tj in zip(s, t, strict=True)] for si, ti in zip(s, t, strict=True)]
                for s, t in zip(scores, tokens.tolist(), strict=True)
            ]
        ),
    },
    "last_token_scores": {
        "OpenRLHF": last_by_flip,
        "cumsum": last_by_cumsum,
        "row by row": last_row_by_row,
        "nonzero": last_by_nonzero,
        "one-hot": lambda token_values, mask: torch.where(
            F.one_hot((mask * torch.arange(1, mask.shape[1] + 1)).argmax(1), mask.shape[1]).bool(), token_values, 0.0
        ).sum(1),
    },
    "noise_ceiling": {
        "one by one": ceiling_one_by_one,
        "quadratic": ceiling_by_quadratic,
        "Kendall's tau": ceiling_by_kendall,
    },
    "score_offset": {
        "running sum": offset_by_running_sum,
        "trl": offset_by_list,
        "weighed": offset_of_weighed_means,
        "floats": lambda model, rows, batch_size: (
            sum(float(score) for batch in rows.split(batch_size) for score in model(batch)) / len(rows)
        ),
    },
    "fit_rewards": {"trl": fitted_as_trl, "prompt by prompt": fitted_prompt_by_prompt},
}

WRONG = {
    "pair_loss": [
        ("log(sigmoid(x)) is unstable, and so is log(1 + exp(-x))", lambda chosen, rejected: (
            torch.log(1 + torch.exp(rejected - chosen)).mean())),
        ("exp of a large reward", lambda chosen, rejected: (
            -torch.log(chosen.exp() / (chosen.exp() + rejected.exp())).mean())),
        ("`binary_cross_entropy` cuts", pair_by_bce_of_probabilities),
        ("The epsilon caps the loss at 18", lambda chosen, rejected: (
            -torch.log(torch.sigmoid(chosen - rejected).clamp(min=1e-8)).mean())),
        ("This is a regression", lambda chosen, rejected: (
            F.mse_loss(torch.sigmoid(chosen - rejected), torch.ones_like(chosen)))),
        ("This is a regression", lambda chosen, rejected: (1 - (chosen - rejected)).square().mean()),
        ("Each answer is judged alone", lambda chosen, rejected: (
            -(F.logsigmoid(chosen) + F.logsigmoid(-rejected)).mean())),
        ("One loss per pair comes back", lambda chosen, rejected: F.softplus(rejected - chosen)),
        (None, lambda chosen, rejected: -F.logsigmoid(0.1 * (chosen - rejected)).mean()),
        ("The mean is taken before", lambda chosen, rejected: -F.logsigmoid((chosen - rejected).mean())),
        ("This is a hinge at 0", lambda chosen, rejected: F.relu(rejected - chosen).mean()),
        ("Every chosen answer is compared with every rejected one", lambda chosen, rejected: (
            -F.logsigmoid(chosen[:, None] - rejected[None]).mean())),
        ("No gradient flows", lambda chosen, rejected: -F.logsigmoid(chosen.detach() - rejected).mean()),
        ("log(sigmoid(x)) is unstable, and so is log(1 + exp(-x))", lambda chosen, rejected: (
            F.soft_margin_loss(chosen - rejected, torch.ones_like(chosen)))),
        (None, lambda chosen, rejected: -torch.tanh(chosen - rejected).mean()),
    ],
    "ranking_loss": [
        ("This is Plackett-Luce", plackett_luce),
        ("This is Plackett-Luce", plackett_luce_mean),
        ("The pairs are weighed by how far apart", ranking_with(weight="gap")),
        ("The pairs are weighed by how far apart", ranking_with(weight="gap", mean=False)),
        ("The difference of the labeler's scores stands inside the sigmoid", ranking_with(margin=1.0)),
        ("A prompt whose answers are all tied divides 0 by 0", ranking_with(guard=False)),
        ("This is a regression", lambda rewards, scores: F.mse_loss(rewards, scores)),
        ("Only the best answer is compared", ranking_of_best_against_rest),
        ("This is a softmax over all answers", lambda rewards, scores: (
            F.cross_entropy(rewards, scores.argmax(1)))),
        ("The epsilon caps", ranking_with_epsilon),
        ("The result has the shape", lambda rewards, scores: torch.stack(
            [ranking_by_bool_index(r[None], s[None]) if s.unique().numel() > 1 else r.sum() * 0
             for r, s in zip(rewards, scores, strict=True)])),
        ("No gradient flows", lambda rewards, scores: ranking_by_combinations(rewards.detach(), scores)),
        ("This is ListNet", lambda rewards, scores: (
            -(scores.softmax(1) * rewards.log_softmax(1)).sum(1).mean())),
        ("Ties, and each answer against itself", lambda rewards, scores: F.binary_cross_entropy_with_logits(
            rewards[:, :, None] - rewards[:, None], ((scores[:, :, None] - scores[:, None]).sign() + 1) / 2)),
        (None, lambda rewards, scores: F.cross_entropy(rewards, scores.argmin(1))),
    ],
    "usable_pairs": [
        ("Only i < j is looked at", usable_upper_only),
        ("An answer that has a twin is dropped altogether", usable_without_duplicates),
        ("The scores are not looked at", usable_without_scores),
        ("Only the sums", usable_by_sum),
        ("Ties are pairs here", lambda tokens, scores: (
            (scores[:, :, None] >= scores[:, None]) & usable_without_scores(tokens, scores))),
        ("The pairs are upside down", lambda tokens, scores: usable_by_same(tokens, -scores)),
        ("The order of the tokens is not looked at", lambda tokens, scores: (
            usable_by_same(tokens.sort(-1).values, scores))),
        ("These are the pairs that teach nothing", lambda tokens, scores: (
            (scores[:, :, None] > scores[:, None]) & (tokens[:, :, None] == tokens[:, None]).all(-1))),
        ("One of the two conditions is enough", lambda tokens, scores: (
            (scores[:, :, None] > scores[:, None]) | (tokens[:, :, None] != tokens[:, None]).any(-1))),
    ],
    "last_token_scores": [
        ("It looks for the first padding", last_by_pad),
        ("This is the highest value", lambda token_values, mask: token_values.masked_fill(~mask, -torch.inf).amax(1)),
        (None, lambda token_values, mask: (
            (token_values * (mask & ~mask.roll(-1, 1))).sum(1))),
        ("It raises IndexError", lambda token_values, mask: token_values[torch.arange(len(mask)), mask.sum(1)]),
        ("The result has the shape", lambda token_values, mask: (
            token_values.gather(1, mask.size(1) - 1 - mask.long().fliplr().argmax(1, keepdim=True)))),
        (None, last_discounted),
        ("This is the lowest value", lambda token_values, mask: token_values.masked_fill(~mask, torch.inf).amin(1)),
        (None, lambda token_values, mask: token_values[:, 0]),
        (None, lambda token_values, mask: torch.stack([row[~row.isnan()][-1] for row in token_values])),
    ],
    "noise_ceiling": [
        ("Both results are right, but swapped", ceiling_with(lambda a, p: (p, a))),
        ("This is the agreement beyond chance", ceiling_with(lambda a, p: (a, 2 * a - 1))),
        ("The half is missing", ceiling_with(lambda a, p: (a, 2 * p))),
        ("Answers to different prompts are compared", ceiling_of_all_pairs_of_the_batch),
        ("A tie counts as half", ceiling_with_half_ties),
        ("Below an agreement of 1/2", ceiling_with(lambda a, p: (a, (1 + (2 * a - 1) ** 0.5) / 2))),
        ("It returns", ceiling_with(lambda a, p: p)),
        ("The ceiling is not the agreement", ceiling_with(lambda a, p: (a, a.clamp(min=0.5)))),
        ("The second number is the agreement again", ceiling_with(lambda a, p: (a, a))),
        ("Half way between the agreement and 1", ceiling_with(lambda a, p: (a, 1 - (1 - a) / 2))),
        ("Below an agreement of 1/2 it turns", ceiling_with(lambda a, p: (a, (1 + (2 * a - 1).abs() ** 0.5) / 2))),
    ],
    "score_offset": [
        ("The last batch is counted as if it were full", offset_of_full_batches),
        (None, offset_running),
        ("It is the mean of the batches' means", lambda model, rows, batch_size: (
            torch.stack([model(b).mean() for b in rows.split(batch_size)]).mean())),
        ("This is the highest score", lambda model, rows, batch_size: (
            torch.cat([model(b) for b in rows.split(batch_size)]).max())),
        ("The sign is flipped", lambda model, rows, batch_size: (
            -torch.cat([model(b) for b in rows.split(batch_size)]).mean())),
        ("The result has the shape", lambda model, rows, batch_size: (
            torch.cat([model(b) for b in rows.split(batch_size)]))),
        ("The first batch is left out", lambda model, rows, batch_size: (
            model(rows[batch_size:]).mean() if len(rows) > batch_size else model(rows).mean())),
        ("The model is not asked", lambda model, rows, batch_size: rows.mean()),
        (None, lambda model, rows, batch_size: (
            torch.cat([model(rows[i : i + batch_size]) for i in range(len(rows))]).mean())),
    ],
    "fit_rewards": [
        ("Ties count", fitted_as_trl, ("                        continue\n", "                        pass\n"),
         ("row.scores[i] > row.scores[j] else", "row.scores[i] >= row.scores[j] else")),
        ("The first answer is taken for the best", fitted_as_trl,
         ("w, r = (i, j) if row.scores[i] > row.scores[j] else (j, i)", "w, r = i, j"),
         ("== row.scores[j]", "is None")),
        ("The sign is flipped", fitted_as_trl, ("> row.scores[j] else", "< row.scores[j] else")),
        ("The prompts are added up", fitted_as_trl, (".mean() / len(rows)", ".mean()")),
        ("1/C(K, 2) is missing", fitted_as_trl, ("torch.stack(pairs).mean()", "torch.stack(pairs).sum()")),
        ("optimizer.zero_grad() is missing", fitted_as_trl, ("            optimizer.zero_grad()\n", "")),
        ("The offset was measured before training", fitted_as_trl,
         ("    model.train()\n", "    model.train()\n    early = models.clone(model)\n"),
         ("score_offset = model(**shown)", "score_offset = early(**shown)")),
        ("The offset is not set", fitted_as_trl, ("        model.config.score_offset = ", "        offset = ")),
        ("left in train mode", fitted_as_trl, ("    model.eval()\n", "")),
        ("The offset has the wrong sign", fitted_prompt_by_prompt, ("score_offset += mean", "score_offset -= mean")),
        ("The gradient is not clipped", fitted_prompt_by_prompt,
         ("        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)\n", "")),
        ("The log is missing", fitted_prompt_by_prompt, ("F.softplus(-upper * (", "-torch.sigmoid(upper * (")),
        ("An answer goes through the model twice", fitted_prompt_by_prompt,
         ("for text in row.responses])", "for text in row.responses for _ in (0, 1)][::2])")),
        ("in the order of the data", fitted_prompt_by_prompt,
         ("random.Random(step).shuffle(order)", "order.reverse()")),
        ("The score is read one token before the end", fitted_prompt_by_prompt, ("[0, -1]", "[0, -2]")),
        (None, fitted_prompt_by_prompt, ("F.softplus(-upper * (", "F.softplus(0.1 - upper * (")),
    ],
}  # fmt: skip
