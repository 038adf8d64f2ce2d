"""Wrong answers of lesson 07; test_museum.py says how to read them."""

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from minirlhf.language.tokenization import encode_prompts, encode_responses
from minirlhf.training import learning_rate_factor


def completion_mask(tokens, prompt_lengths, pad_id):
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for row, start in enumerate(prompt_lengths.tolist()):
        length = int((tokens[row] != pad_id).sum())
        mask[row, start:length] = True
    return mask


def next_token_logprobs(logits, tokens):
    return logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]


def sft_loss(logprobs, mask):
    return -logprobs.masked_fill(~mask, 0.0).sum() / mask.sum()


def mean_of_rows(logprobs, mask):
    per_row = -torch.where(mask, logprobs, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)
    return per_row[mask.any(-1)].mean()


def fine_tune(model, tokenizer, demonstrations, config):
    before = encode_prompts(tokenizer, [row.prompt for row in demonstrations])
    after = encode_responses(tokenizer, [row.completion for row in demonstrations])
    ids = [torch.tensor(p + a) for p, a in zip(before, after, strict=True)]
    labels = [torch.tensor([-100] * len(p) + a) for p, a in zip(before, after, strict=True)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    total, losses, queue = int(config.epochs * len(ids) / config.batch_size), [], []
    for step in range(total):
        queue = queue or list(torch.randperm(len(ids)).split(config.batch_size))
        batch = queue.pop()
        inputs = pad_sequence([ids[i] for i in batch], batch_first=True, padding_value=tokenizer.pad_token_id)
        targets = pad_sequence([labels[i] for i in batch], batch_first=True, padding_value=-100)
        logits = model(input_ids=inputs).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.param_groups[0]["lr"] = config.lr * learning_rate_factor(step, total, config.warmup)
        optimizer.step()
        losses.append(loss.item())
    return losses


def piece_losses(logprobs, mask, size):
    return torch.stack([-x[m].sum() / mask.sum() for x, m in zip(logprobs.split(size), mask.split(size), strict=True)])


WRONG = {
    "completion_mask": [
        (17, "A mask of all ones", lambda tokens, prompt_lengths, pad_id: torch.ones(tokens.shape, dtype=torch.bool)),
        ("-", "The padding counts", completion_mask, ("start:length", "start:")),
        ("-", "EOS is left out", completion_mask, ("start:length", "start : length - 1")),
        ("-", "Off by one: the completion's first token is left out", completion_mask, ("start:", "start + 1 :")),
    ],
    "next_token_logprobs": [
        (23, "Off by one: logits[:, t] predict tokens[:, t + 1]", next_token_logprobs,
         ("[:, 1:, None]", "[:, :-1, None]")),
        (23, "Off by one, and by all columns", next_token_logprobs, ("[:, :-1]", ""), ("[:, 1:, None]", "[..., None]")),
        (23, "Shifted the wrong way", lambda logits, tokens: (
            -F.cross_entropy(logits[:, 1:].transpose(1, 2), tokens[:, :-1], reduction="none"))),
        ("-", "log(softmax(x)) is -inf", next_token_logprobs, ("log_softmax(-1)", "softmax(-1).log()")),
        ("-", "The sign is flipped", lambda logits, tokens: (
            F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"))),
    ],
    "sft_loss": [
        (17, "The mask is not used", sft_loss, ("    return", "    mask = torch.ones_like(mask)\n    return")),
        ("-", "The mask is a factor, and 0 * NaN is NaN", sft_loss,
         ("logprobs.masked_fill(~mask, 0.0)", "(logprobs * mask.to(logprobs.dtype))")),
        ("-", "Each row is averaged first", mean_of_rows),
        ("-", "It divides by all positions", sft_loss, (".sum() / mask.sum()", ".mean()")),
    ],
    "fine_tune": [
        (17, "The prompt is learned too", fine_tune, ("[-100] * len(p) + a", "p + a")),
        (23, "The labels are not shifted", fine_tune,
         ("logits[:, :-1].flatten(0, 1), targets[:, 1:]", "logits.flatten(0, 1), targets")),
    ],
    "piece_losses": [
        ("-", "A mean of means", piece_losses, ("x[m].sum() / mask.sum()", "x[m].mean() / -(-len(mask) // size)")),
        ("-", "Each piece is divided by its own tokens", piece_losses, ("x[m].sum() / mask.sum()", "x[m].mean()")),
    ],
    "perplexity": [
        ("-", "It is the mean of the rows' perplexities", lambda logprobs, mask: (
            torch.stack([(-row[keep].mean()).exp() for row, keep in zip(logprobs, mask, strict=True)]).mean())),
        ("-", "It is the exponential of the mean of the rows' means", lambda logprobs, mask: (
            torch.exp(-((logprobs * mask).sum(-1) / mask.sum(-1)).mean()))),
    ],
}  # fmt: skip
