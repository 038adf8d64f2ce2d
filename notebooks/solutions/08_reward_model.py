"""Solutions of lesson 08: each function stands for the stub of its name."""

import math

import torch
import torch.nn.functional as F

from minirlhf.language import models
from minirlhf.language.tokenization import encode_prompts, encode_responses


def my_pair_loss(chosen, rejected):
    return -F.logsigmoid(chosen - rejected).mean()


def my_ranking_loss(rewards, scores):
    differences = rewards[:, :, None] - rewards[:, None, :]
    pairs = scores[:, :, None] > scores[:, None, :]  # strictly: ties are out, and each pair is there once
    losses = torch.where(pairs, -F.logsigmoid(differences), 0).sum((1, 2))
    counts = pairs.sum((1, 2))
    return (losses / counts.clamp(min=1)).sum() / (counts > 0).sum()


def my_usable_pairs(tokens, scores):
    better = scores[:, :, None] > scores[:, None, :]
    differ = (tokens[:, :, None] != tokens[:, None, :]).any(-1)  # after the cut, as the model reads them
    return better & differ


def my_last_token_scores(token_values, mask):
    columns = torch.arange(token_values.shape[1])
    last = torch.where(mask, columns, -1).amax(1)  # the largest index that counts, wherever the padding stands
    return token_values.gather(1, last[:, None]).squeeze(1)


def my_noise_ceiling(scores, others):
    first = (scores[:, :, None] - scores[:, None, :]).sign()
    second = (others[:, :, None] - others[:, None, :]).sign()
    agreement = (first * second > 0).sum().double() / (first * second != 0).sum()
    return agreement, (1 + (2 * agreement - 1).clamp(min=0).sqrt()) / 2


def my_score_offset(model, rows, batch_size):
    scores = []  # once, before the loop
    for batch in rows.split(batch_size):
        scores.append(model(batch))
    return torch.cat(scores).mean()


def my_fit_rewards(model, tokenizer, comparisons, demonstrations, config):
    def score(prompts, answers):  # each answer once
        before, after = encode_prompts(tokenizer, prompts), encode_responses(tokenizer, answers)
        tokens, mask = models.pad([p + a for p, a in zip(before, after, strict=True)], tokenizer.pad_token_id)
        return my_last_token_scores(models.token_values(model, tokens, mask), mask)

    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95))
    per_epoch = len(comparisons) // config.batch_size
    total = round(config.epochs * per_epoch)
    model.eval()  # no dropout
    losses = []
    for step in range(total):
        place = step % per_epoch
        if place == 0:
            order = torch.randperm(len(comparisons)).tolist()
        batch = [comparisons[i] for i in order[place * config.batch_size : (place + 1) * config.batch_size]]
        prompts = [row.prompt for row in batch for _ in row.responses]
        rewards = score(prompts, [text for row in batch for text in row.responses])

        per_prompt = []
        for ours, row in zip(rewards.split([len(row.responses) for row in batch]), batch, strict=True):
            per_prompt.append(my_ranking_loss(ours[None], torch.tensor([row.scores])))  # [1, K]
        loss = torch.stack(per_prompt).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)

        if step < config.warmup:
            factor = (step + 1) / config.warmup
        else:
            share = (step - config.warmup) / (total - config.warmup)
            factor = 0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2
        for group in optimizer.param_groups:
            group["lr"] = config.lr * factor
        optimizer.step()
        losses.append(loss.item())

    rows = [demonstrations[i : i + 64] for i in range(0, len(demonstrations), 64)]
    with torch.no_grad():
        scores = [score([row.prompt for row in part], [row.completion for row in part]) for part in rows]
    model.config.score_offset = torch.cat(scores).mean().item()
    return losses
