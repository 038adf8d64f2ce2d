"""Wrong answers of lesson 08; test_museum.py says how to read them."""

import torch
import torch.nn.functional as F

from minirlhf.language.models import pad, token_values
from minirlhf.language.tokenization import encode_prompts, encode_responses
from minirlhf.training import learning_rate_factor


def pair_loss(chosen, rejected):
    return -F.logsigmoid(chosen - rejected).mean()


def ranking_loss(rewards, scores):
    total, prompts = 0.0, 0
    for r, s in zip(rewards, scores, strict=True):
        pairs = [(i, j) for i in range(len(r)) for j in range(len(r)) if s[i] > s[j]]
        if pairs:
            total, prompts = total + sum(-F.logsigmoid(r[i] - r[j]) for i, j in pairs) / len(pairs), prompts + 1
    return total / prompts


def answers_as_sorted(rewards, scores):
    K = rewards.shape[1]
    i, j = torch.triu_indices(K, K, 1)
    return -F.logsigmoid(rewards[:, i] - rewards[:, j]).mean(1).mean()


def mean_over_the_batch(rewards, scores):
    pairs = scores.unsqueeze(2) > scores.unsqueeze(1)
    d = rewards.unsqueeze(2) - rewards.unsqueeze(1)
    return -F.logsigmoid(d[pairs]).mean()


def ties_are_pairs(rewards, scores):
    better = scores.unsqueeze(2) > scores.unsqueeze(1)
    pairs = better | (scores.unsqueeze(2) == scores.unsqueeze(1)).triu(1)
    d = rewards.unsqueeze(2) - rewards.unsqueeze(1)
    means = torch.where(pairs, -F.logsigmoid(d), 0).sum((1, 2)) / pairs.sum((1, 2))
    return means.sum() / better.any(2).any(1).sum()


def noise_ceiling(scores, others):
    pairs = torch.combinations(torch.arange(scores.shape[1])).T
    a, b = ((x[:, pairs[0]] - x[:, pairs[1]]).sign() for x in (scores, others))
    agreement = (a == b)[(a != 0) & (b != 0)].double().mean()
    return agreement, 0.5 + (2 * agreement - 1).clamp(min=0).sqrt() / 2


def score_offset(model, rows, batch_size):
    scores = []
    for batch in rows.split(batch_size):
        scores.extend(model(batch))
    return torch.stack(scores).mean()


def fit_rewards(model, tokenizer, comparisons, demonstrations, config):
    def score(prompt, texts):
        (before,) = encode_prompts(tokenizer, [prompt])
        tokens, mask = pad([before + after for after in encode_responses(tokenizer, texts)], tokenizer.pad_token_id)
        values = token_values(model, tokens, mask)
        return values[torch.arange(len(texts)), mask.sum(1) - 1]

    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    total, losses, queue = int(config.epochs * len(comparisons) / config.batch_size), [], []
    for step in range(total):
        queue = queue or list(torch.randperm(len(comparisons)).split(config.batch_size))
        loss = 0.0
        for index in queue.pop():
            row = comparisons[index]
            r = score(row.prompt, row.responses)
            s = torch.tensor(row.scores)
            pairs = s[:, None] > s
            loss = loss - F.logsigmoid(r[:, None] - r)[pairs].mean() / config.batch_size
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.param_groups[0]["lr"] = config.lr * learning_rate_factor(step, total, config.warmup)
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        scores = torch.cat([score(row.prompt, [row.completion]) for row in demonstrations])
    model.config.score_offset = scores.mean().item()
    return losses


WRONG = {
    "pair_loss": [
        (19, "log(sigmoid(x)) is unstable", pair_loss,
         ("F.logsigmoid(chosen - rejected)", "torch.sigmoid(chosen - rejected).log()")),
        (19, "The log is missing", pair_loss, ("F.logsigmoid", "torch.sigmoid")),
        ("-", "The difference is the wrong way round", pair_loss, ("-F.logsigmoid", "F.softplus")),
        ("-", "The difference is the wrong way round", lambda chosen, rejected: (
            F.binary_cross_entropy_with_logits(chosen - rejected, torch.zeros_like(chosen)))),
        ("-", "The epsilon caps the loss at 18", lambda chosen, rejected: (
            -torch.log(torch.sigmoid(chosen - rejected) + 1e-8).mean())),
    ],
    "ranking_loss": [
        (19, "It is normalised twice", ranking_loss, ("/ len(pairs)", "/ len(pairs) / (len(r) * (len(r) - 1) / 2)")),
        (19, "The log is missing", ranking_loss, ("F.logsigmoid", "torch.sigmoid")),
        (19, "log(sigmoid(x)) is unstable", ranking_loss,
         ("-F.logsigmoid(r[i] - r[j])", "-torch.sigmoid(r[i] - r[j]).log()")),
        ("-", "It takes the answers as sorted", answers_as_sorted),
        ("-", "It is the mean over all pairs of the batch", mean_over_the_batch),
        ("-", "Tied answers are counted as pairs", ties_are_pairs),
    ],
    "usable_pairs": [
        (16, "Answers that became equal after truncation still make a pair",
         lambda tokens, scores: scores.unsqueeze(2) > scores.unsqueeze(1)),
    ],
    "last_token_scores": [
        (15, "The reward is read on every token and averaged",
         lambda token_values, mask: token_values.masked_fill(~mask, 0.0).sum(dim=1) / mask.sum(dim=1)),
        (15, "The reward is read on every token and added up",
         lambda token_values, mask: token_values.masked_fill(~mask, 0.0).sum(dim=1)),
        ("-", "It reads the last column", lambda token_values, mask: token_values[:, -1]),
        ("-", "It counts the real tokens",
         lambda token_values, mask: token_values[torch.arange(len(mask)), mask.long().sum(-1) - 1]),
    ],
    "noise_ceiling": [
        ("-", "The root of the agreement forgets", noise_ceiling,
         ("0.5 + (2 * agreement - 1).clamp(min=0).sqrt() / 2", "agreement.sqrt()")),
        ("-", "Below an agreement of 1/2 it turns", noise_ceiling, (".clamp(min=0)", ".abs()")),
    ],
    "score_offset": [
        (18, "The list is reset every batch", score_offset,
         ("        scores.extend", "        scores = []\n        scores.extend")),
        ("-", "It is the mean of the batches' means", score_offset,
         ("extend(model(batch))", "append(model(batch).mean())")),
    ],
    "fit_rewards": [
        (15, "The score is the mean over all tokens", fit_rewards,
         ("values[torch.arange(len(texts)), mask.sum(1) - 1]", "values.sum(1) / mask.sum(1)")),
        (18, "The offset is not set", fit_rewards, ("model.config.score_offset = scores.mean().item()", "scores = []")),
        (19, "The log is missing", fit_rewards, ("F.logsigmoid", "torch.sigmoid")),
        ("-", "Ties count", fit_rewards, ("s[:, None] > s\n", "(s[:, None] > s) | (s[:, None] == s).triu(1)\n")),
    ],
}  # fmt: skip
