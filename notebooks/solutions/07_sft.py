"""Solutions of lesson 07: each function stands for the stub of its name."""

import torch


def my_completion_mask(tokens, prompt_lengths, pad_id):
    columns = torch.arange(tokens.shape[1])
    return (tokens != pad_id) & (columns >= prompt_lengths[:, None])


def my_next_token_logprobs(logits, tokens):
    log_probs = logits[:, :-1].log_softmax(-1)  # what is said after token t ...
    return log_probs.gather(-1, tokens[:, 1:, None]).squeeze(-1)  # ... is about token t + 1


def my_sft_loss(logprobs, mask):
    return -torch.where(mask, logprobs, 0).sum() / mask.sum()


def my_piece_losses(logprobs, mask, size):
    total = mask.sum()  # of the whole batch, before the first piece
    pieces = zip(logprobs.split(size), mask.split(size), strict=True)
    return torch.stack([-torch.where(m, x, 0).sum() / total for x, m in pieces])


def my_perplexity(logprobs, mask):
    return (-torch.where(mask, logprobs, 0).sum() / mask.sum()).exp()
