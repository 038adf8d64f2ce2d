"""Solutions of lesson 13: each function stands for the stub of its name."""

import math

import torch
import torch.nn.functional as F

from minirlhf.language import models
from minirlhf.language.tokenization import encode_prompts, encode_responses


def my_best_policy(ref_logprobs, rewards, beta):
    return (ref_logprobs + rewards / beta).log_softmax(-1)


def my_implicit_rewards(logprobs, ref_logprobs, answer_mask, beta):
    return beta * torch.where(answer_mask, logprobs - ref_logprobs, 0).sum(1)


def my_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -F.logsigmoid(margin).mean()


def my_fit_preferences(model, tokenizer, comparisons, reference, config):
    def logprobs_of(which, batch):
        prompts = encode_prompts(tokenizer, [row.prompt for row in batch for _ in row.responses])
        answers = encode_responses(tokenizer, [text for row in batch for text in row.responses])  # with EOS
        rows = [p + a for p, a in zip(prompts, answers, strict=True)]
        tokens, mask, response_mask = models.pad_answers(rows, [len(p) for p in prompts], tokenizer.pad_token_id)
        return models.response_logprobs(which, tokens, mask, response_mask), response_mask

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
        logprobs, response_mask = logprobs_of(model, batch)
        with torch.no_grad():
            ref_logprobs, _ = logprobs_of(reference, batch)
        rewards = my_implicit_rewards(logprobs, ref_logprobs, response_mask, config.beta)

        per_prompt = []
        for ours, row in zip(rewards.split([len(row.responses) for row in batch]), batch, strict=True):
            scores = torch.tensor(row.scores)
            better = scores[:, None] > scores[None, :]
            per_prompt.append(-F.logsigmoid(ours[:, None] - ours[None, :])[better].mean())
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
    return losses
