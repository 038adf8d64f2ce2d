"""Solutions of lesson 07: each function stands for the stub of its name."""

import math

import torch

from minirlhf.language.models import pad
from minirlhf.language.tokenization import encode_prompts


def my_completion_mask(tokens, prompt_lengths, pad_id):
    columns = torch.arange(tokens.shape[1])
    return (tokens != pad_id) & (columns >= prompt_lengths[:, None])


def my_next_token_logprobs(logits, tokens):
    log_probs = logits[:, :-1].log_softmax(-1)  # what is said after token t ...
    return log_probs.gather(-1, tokens[:, 1:, None]).squeeze(-1)  # ... is about token t + 1


def my_sft_loss(logprobs, mask):
    return -torch.where(mask, logprobs, 0).sum() / mask.sum()


def my_fine_tune(model, tokenizer, demonstrations, config):
    prompts = encode_prompts(tokenizer, [row.prompt for row in demonstrations])
    completions = tokenizer([row.completion for row in demonstrations], add_special_tokens=False)["input_ids"]
    rows = [p + c + [tokenizer.eos_token_id] for p, c in zip(prompts, completions, strict=True)]
    starts = torch.tensor([len(p) for p in prompts])

    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95))
    per_epoch = len(rows) // config.batch_size
    total = round(config.epochs * per_epoch)
    model.eval()  # no dropout
    losses = []
    for step in range(total):
        place = step % per_epoch
        if place == 0:
            order = torch.randperm(len(rows))
        batch = order[place * config.batch_size : (place + 1) * config.batch_size]
        tokens, real = pad([rows[i] for i in batch], tokenizer.pad_token_id)
        counts = my_completion_mask(tokens, starts[batch], tokenizer.pad_token_id)

        logits = model(input_ids=tokens, attention_mask=real.long()).logits
        loss = my_sft_loss(my_next_token_logprobs(logits, tokens), counts[:, 1:])
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


def my_piece_losses(logprobs, mask, size):
    total = mask.sum()  # of the whole batch, before the first piece
    pieces = zip(logprobs.split(size), mask.split(size), strict=True)
    return torch.stack([-torch.where(m, x, 0).sum() / total for x, m in pieces])


def my_perplexity(logprobs, mask):
    return (-torch.where(mask, logprobs, 0).sum() / mask.sum()).exp()
