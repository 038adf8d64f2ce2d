"""Answers to lesson 07 in other hands; test_corpus.py says how to read them."""

import math

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from minirlhf.language.tokenization import encode_prompts, encode_responses

# 7.1 completion_mask -------------------------------------------------------------------------------------------------


def mask_by_labels(tokens, prompt_lengths, pad_id):  # trl: labels of -100 count for nothing
    labels = tokens.clone()
    labels[tokens == pad_id] = -100
    positions = torch.arange(tokens.size(1)).unsqueeze(0)
    labels.masked_fill_(positions < prompt_lengths.unsqueeze(1), -100)
    return labels != -100


def mask_by_rows(tokens, prompt_lengths, pad_id):  # OpenRLHF: an attention mask, whose prompt is erased row by row
    loss_mask = tokens.ne(pad_id).long()
    for mask, source_len in zip(loss_mask, prompt_lengths, strict=True):
        mask[:source_len] = 0
    return loss_mask.bool()


def mask_by_lengths(tokens, prompt_lengths, pad_id):  # ARENA: everything expanded and named
    batch, seq = tokens.shape
    pos = torch.arange(seq).expand(batch, seq)
    total = tokens.ne(pad_id).sum(dim=-1, keepdim=True)
    return torch.logical_and(pos >= prompt_lengths.view(-1, 1), pos < total)


def mask_one_by_one(tokens, prompt_lengths, pad_id):
    rows = []
    for row, start in zip(tokens.tolist(), prompt_lengths.tolist(), strict=True):
        rows.append([t >= start and token != pad_id for t, token in enumerate(row)])
    return torch.tensor(rows)


def columns_of(tokens):
    return torch.arange(tokens.shape[1])[None]


# 7.2 next_token_logprobs ---------------------------------------------------------------------------------------------


def selective_log_softmax(logits, tokens):  # trl: never the whole matrix of log-probabilities
    logits, labels = logits[:, :-1], tokens[:, 1:]
    selected = torch.gather(logits, dim=-1, index=labels.unsqueeze(-1)).squeeze(-1)
    return selected - torch.stack([torch.logsumexp(row, dim=-1) for row in logits])


def log_probs_from_logits(logits, tokens):  # OpenRLHF, CPU branch
    per_row = []
    for row_logits, row_labels in zip(logits[:, :-1], tokens[:, 1:], strict=True):
        log_probs = F.log_softmax(row_logits, dim=-1)
        per_row.append(log_probs.gather(dim=-1, index=row_labels.unsqueeze(-1)).squeeze(-1))
    return torch.stack(per_row)


def by_cross_entropy(logits, tokens):  # nanoGPT's flattened call
    B, T, V = logits.shape
    nll = F.cross_entropy(logits[:, :-1].reshape(-1, V), tokens[:, 1:].reshape(-1), reduction="none")
    return -nll.view(B, T - 1)


def by_indexing(logits, tokens):  # ARENA
    log_probs = logits.log_softmax(dim=-1)
    B, T = tokens.shape
    return log_probs[torch.arange(B)[:, None], torch.arange(T - 1)[None, :], tokens[:, 1:]]


def by_one_hot(logits, tokens):
    chosen = F.one_hot(tokens[:, 1:], logits.shape[-1]).to(logits.dtype)
    return torch.einsum("btv,btv->bt", torch.log_softmax(logits[:, :-1], -1), chosen)


def pick(log_probs, tokens):
    return log_probs.gather(-1, tokens[..., None]).squeeze(-1)


# 7.3 sft_loss --------------------------------------------------------------------------------------------------------


def loss_by_masked_mean(logprobs, mask):  # OpenRLHF: masked_mean, of what was filled first
    filled = logprobs.masked_fill(~mask, 0)
    return -(filled.sum(dim=None) / mask.sum(dim=None))


def loss_one_by_one(logprobs, mask):
    total, count = 0.0, 0
    for row, keep in zip(logprobs, mask, strict=True):
        for x, counts in zip(row, keep, strict=True):
            if counts:
                total, count = total - x, count + 1
    return total / count


def loss_with_floats(logprobs, mask):
    weights = mask.float()
    return -(torch.nan_to_num(logprobs) * weights).sum() / (weights.sum() + 1e-8)


def loss_shifted_again(logprobs, mask):
    shifted = logprobs[:, :-1], mask[:, 1:]
    return -torch.where(shifted[1], shifted[0], 0.0).sum() / shifted[1].sum()


# 7.4 fine_tune -------------------------------------------------------------------------------------------------------


def tuned_as_nanogpt(model, tokenizer, demonstrations, config):  # x, y, a get_lr of its own, ignore_index
    data = []
    for row in demonstrations:
        before = encode_prompts(tokenizer, [row.prompt])[0]
        after = tokenizer.encode(row.completion, add_special_tokens=False)
        after.append(tokenizer.eos_token_id)
        data.append((before + after, [-1] * len(before) + after))
    max_iters = int(config.epochs * len(data) / config.batch_size)

    def get_lr(it):
        if it < config.warmup:
            return config.lr * (it + 1) / config.warmup
        ratio = (it - config.warmup) / (max_iters - config.warmup)
        coeff = 0.5 * (1.0 + math.cos(math.pi * ratio))
        return 0.1 * config.lr + coeff * (config.lr - 0.1 * config.lr)

    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.1)
    history, queue = [], []
    model.train()
    for it in range(max_iters):
        for group in optimizer.param_groups:
            group["lr"] = get_lr(it)
        if len(queue) < config.batch_size:
            queue = torch.randperm(len(data)).tolist()
        picked, queue = queue[: config.batch_size], queue[config.batch_size :]
        longest = max(len(data[i][0]) for i in picked)
        x = torch.full((len(picked), longest), tokenizer.pad_token_id)
        y = torch.full((len(picked), longest), -1)
        for n, i in enumerate(picked):
            x[n, : len(data[i][0])] = torch.tensor(data[i][0])
            y[n, : len(data[i][1])] = torch.tensor(data[i][1])
        logits = model(x[:, :-1]).logits
        loss = F.cross_entropy(logits.reshape(-1, logits.size(-1)), y[:, 1:].reshape(-1), ignore_index=-1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        history.append(loss.item())
    model.eval()
    return history


def tuned_as_trl(model, tokenizer, demonstrations, config):  # a collator, labels of -100, the model's own loss
    def collate(rows):
        prompts = encode_prompts(tokenizer, [row.prompt for row in rows])
        answers = encode_responses(tokenizer, [row.completion for row in rows])
        width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        input_ids, labels, attention = [], [], []
        for p, a in zip(prompts, answers, strict=True):
            gap = width - len(p) - len(a)
            input_ids.append([tokenizer.eos_token_id] * gap + p + a)  # on the left, with EOS
            labels.append([-100] * (gap + len(p)) + a)
            attention.append([0] * gap + [1] * (len(p) + len(a)))
        return torch.tensor(input_ids), torch.tensor(labels), torch.tensor(attention)

    loader = DataLoader(demonstrations, batch_size=config.batch_size, shuffle=True, collate_fn=collate)
    total = round(config.epochs * len(loader))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.01)

    def factor(step):
        if step < config.warmup:
            return step / config.warmup
        progress = (step - config.warmup) / max(1, total - config.warmup)
        return 0.5 * (1 + math.cos(math.pi * progress))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses = []
    for _ in range(int(config.epochs)):
        for input_ids, labels, attention in loader:
            loss = model(input_ids=input_ids, attention_mask=attention, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            scheduler.step()
            losses.append(loss.detach())
    model.eval()
    return torch.stack(losses)


def tuned_row_by_row(model, tokenizer, demonstrations, config):  # one row at a time, gradients added up
    rows = []
    for row in demonstrations:
        (before,), (after,) = encode_prompts(tokenizer, [row.prompt]), encode_responses(tokenizer, [row.completion])
        rows.append((torch.tensor(before + after), len(before)))
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
    total = int(config.epochs * len(rows) / config.batch_size)
    losses = []
    for _ in range(int(config.epochs)):
        for batch in torch.randperm(len(rows)).split(config.batch_size):
            optimizer.zero_grad()
            count = sum(len(rows[i][0]) - rows[i][1] for i in batch)
            losses.append(0.0)
            for i in batch:
                ids, start = rows[i]
                logprobs = model(ids[None]).logits[0].log_softmax(-1)
                nll = -logprobs[torch.arange(start - 1, len(ids) - 1), ids[start:]].sum() / count
                nll.backward()
                losses[-1] += nll.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            step = len(losses)
            rise = step / max(1, config.warmup)
            fall = 0.55 + 0.45 * math.cos(math.pi * (step - config.warmup) / max(1, total - config.warmup))
            optimizer.param_groups[0]["lr"] = config.lr * min(rise, fall if step > config.warmup else 1.0)
            optimizer.step()
    return losses


# 7.5 piece_losses ----------------------------------------------------------------------------------------------------


def pieces_by_range(logprobs, mask, size):  # trl: num_items_in_batch, counted beforehand
    num_items_in_batch = mask.sum()
    losses = []
    for start in range(0, logprobs.shape[0], size):
        nll, keep = -logprobs[start : start + size], mask[start : start + size]
        losses.append((nll * keep).sum() / num_items_in_batch)
    return torch.stack(losses)


def pieces_by_index_add(logprobs, mask, size):
    per_row = -(logprobs * mask).sum(-1) / mask.sum()
    which = torch.arange(len(per_row)) // size
    return per_row.new_zeros(int(which[-1]) + 1).index_add(0, which, per_row)


def pieces_by_weight(logprobs, mask, size):  # each piece's mean, weighed by the share of tokens that it has
    batches = list(zip(torch.split(logprobs, size), torch.split(mask, size), strict=True))
    return torch.stack([-x[m].mean() * (m.sum() / mask.sum()) for x, m in batches])


def pieces_of_own_size(logprobs, mask, size):
    batches = zip(logprobs.split(size), mask.split(size), strict=True)
    return torch.stack([-(x * m).sum() / m.numel() for x, m in batches])


def pieces_by_count_of_pieces(logprobs, mask, size):
    batches = list(zip(logprobs.split(size), mask.split(size), strict=True))
    return torch.stack([-(x * m).sum() / len(batches) for x, m in batches])


def pieces_by_chunk(logprobs, mask, size):
    batches = zip(logprobs.chunk(size), mask.chunk(size), strict=True)
    return torch.stack([-(x * m).sum() / mask.sum() for x, m in batches])


def pieces_as_numbers(logprobs, mask, size):
    batches = zip(logprobs.split(size), mask.split(size), strict=True)
    return torch.tensor([-((x * m).sum() / mask.sum()).item() for x, m in batches])


def pieces_by_rows_of_full_ones(logprobs, mask, size):
    batches = zip(logprobs.split(size), mask.split(size), strict=True)
    return torch.stack([-(x * m).sum() / m.sum() * size / len(mask) for x, m in batches])


RIGHT = {
    "completion_mask": {
        "trl": mask_by_labels,
        "OpenRLHF": mask_by_rows,
        "ARENA": mask_by_lengths,
        "one by one": mask_one_by_one,
        "floats": lambda tokens, prompt_lengths, pad_id: (
            (tokens != pad_id).float() * (columns_of(tokens) >= prompt_lengths[:, None]).float()
        ),
    },
    "next_token_logprobs": {
        "trl": selective_log_softmax,
        "OpenRLHF": log_probs_from_logits,
        "nanoGPT": by_cross_entropy,
        "ARENA": by_indexing,
        "CleanRL": lambda logits, tokens: torch.distributions.Categorical(logits=logits[:, :-1]).log_prob(
            tokens[:, 1:]
        ),
        "one-hot": by_one_hot,
        "nll_loss": lambda logits, tokens: (
            -F.nll_loss(logits.log_softmax(-1)[:, :-1].permute(0, 2, 1), tokens[:, 1:], reduction="none")
        ),
    },
    "sft_loss": {
        "OpenRLHF": loss_by_masked_mean,
        "boolean index": lambda logprobs, mask: -logprobs[mask].mean(),
        "nanmean": lambda logprobs, mask: -torch.where(mask, logprobs, torch.nan).nanmean(),
        "one by one": loss_one_by_one,
        "CleanRL": loss_with_floats,
    },
    "fine_tune": {
        "nanoGPT": tuned_as_nanogpt,
        "trl": tuned_as_trl,
        "row by row": tuned_row_by_row,
    },
    "piece_losses": {
        "trl": pieces_by_range,
        "index_add": pieces_by_index_add,
        "weighed": pieces_by_weight,
        "list": lambda logprobs, mask, size: torch.stack(
            [-torch.where(mask, logprobs, 0.0)[i : i + size].sum() / mask.sum() for i in range(0, len(mask), size)]
        ),
    },
    "perplexity": {
        "trl": lambda logprobs, mask: torch.exp(-logprobs[mask].mean()),
        "two to the bits": lambda logprobs, mask: 2 ** ((-logprobs * mask).sum() / mask.sum() / math.log(2)),
        "geometric mean": lambda logprobs, mask: logprobs[mask].double().exp().prod() ** (-1 / int(mask.sum())),
        "nanoGPT": lambda logprobs, mask: math.exp(-logprobs[mask].mean().item()),
    },
}

WRONG = {
    "completion_mask": [
        ("This is the prompt", lambda tokens, prompt_lengths, pad_id: columns_of(tokens) < prompt_lengths[:, None]),
        ("The prompt counts", lambda tokens, prompt_lengths, pad_id: tokens.ne(pad_id)),
        ("It is the wrong way round", lambda tokens, prompt_lengths, pad_id: (
            ~mask_by_rows(tokens, prompt_lengths, pad_id))),
        ("It uses the longest prompt's length for all rows", lambda tokens, prompt_lengths, pad_id: (
            tokens.ne(pad_id) & (columns_of(tokens) >= prompt_lengths.max()))),
        ("`pad_id` is not used", lambda tokens, prompt_lengths, pad_id: (
            tokens.bool() & (columns_of(tokens) >= prompt_lengths[:, None]))),
        ("The result has the shape", lambda tokens, prompt_lengths, pad_id: (
            mask_by_rows(tokens, prompt_lengths, pad_id)[:, 1:])),
        ("The whole mask stands one column too early", lambda tokens, prompt_lengths, pad_id: (
            mask_by_rows(tokens, prompt_lengths, pad_id).roll(-1, 1))),
        ("This is the prompt", lambda tokens, prompt_lengths, pad_id: (
            (tokens != pad_id) & (columns_of(tokens) < prompt_lengths[:, None]))),
        (None, lambda tokens, prompt_lengths, pad_id: (
            (tokens != pad_id) & (columns_of(tokens) > prompt_lengths[:, None] + 1))),
    ],
    "next_token_logprobs": [
        ("Off by one", lambda logits, tokens: pick(logits[:, 1:].log_softmax(-1), tokens[:, 1:])),
        ("The softmax runs over the batch", lambda logits, tokens: (
            pick(logits[:, :-1].log_softmax(0), tokens[:, 1:]))),
        ("The probabilities are kept away from 0", lambda logits, tokens: (
            torch.distributions.Categorical(probs=logits[:, :-1].softmax(-1)).log_prob(tokens[:, 1:]))),
        ("The epsilon of 1e-08 caps", lambda logits, tokens: (
            pick((logits[:, :-1].softmax(-1) + 1e-8).log(), tokens[:, 1:]))),
        ("`squeeze()` without a dimension", lambda logits, tokens: (
            logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze())),
        ("It raises ValueError", lambda logits, tokens: (
            torch.distributions.Categorical(logits[:, :-1]).log_prob(tokens[:, 1:]))),
        ("These are raw logits", lambda logits, tokens: pick(logits[:, :-1], tokens[:, 1:])),
        ("The result has the shape", lambda logits, tokens: (
            -F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:]))),
        ("No gradient flows", lambda logits, tokens: selective_log_softmax(logits.detach(), tokens)),
        ("This is the log-probability of the likeliest token", lambda logits, tokens: (
            logits[:, :-1].log_softmax(-1).max(-1).values)),
        ("These are bits", lambda logits, tokens: selective_log_softmax(logits, tokens) / math.log(2)),
        (None, lambda logits, tokens: selective_log_softmax(logits, tokens).cumsum(1)),
    ],
    "sft_loss": [
        ("The shift is made twice", loss_shifted_again),
        ("It is the log of the mean probability", lambda logprobs, mask: -logprobs[mask].exp().mean().log()),
        ("This is the perplexity", lambda logprobs, mask: (-logprobs[mask]).mean().exp()),
        ("It divides by the number of columns", lambda logprobs, mask: -logprobs[mask].sum() / logprobs.shape[1]),
        ("It divides by the rows", lambda logprobs, mask: -logprobs[mask].sum() / logprobs.shape[0]),
        ("No gradient flows", lambda logprobs, mask: -logprobs[mask].mean().item()),
        ("These are probabilities", lambda logprobs, mask: -logprobs[mask].exp().mean()),
        (None, lambda logprobs, mask: -logprobs[mask].median()),
        ("Each row is averaged first", lambda logprobs, mask: (
            -(torch.where(mask, logprobs, 0).sum(1) / mask.sum(1).clamp(min=1)).mean())),
        ("It divides by the rows", lambda logprobs, mask: -torch.where(mask, logprobs, 0).sum(1).mean()),
        (None, lambda logprobs, mask: -logprobs[mask].sum() / (mask.sum() - 1).clamp(min=1)),
    ],
    "fine_tune": [
        ("The prompt is learned too", tuned_as_nanogpt, ("[-1] * len(before) + after)", "before + after)")),
        ("EOS is not learned", tuned_as_nanogpt, ("        after.append(tokenizer.eos_token_id)\n", "")),
        ("The padding is learned too", tuned_as_nanogpt,
         ("y = torch.full((len(picked), longest), -1)", "y = torch.full((len(picked), longest), 0)")),
        ("The labels are not shifted", tuned_as_nanogpt, ("y[:, 1:].reshape", "y[:, :-1].reshape")),
        ("optimizer.zero_grad() is missing", tuned_as_nanogpt,
         ("        optimizer.zero_grad(set_to_none=True)\n", "")),
        ("left in train mode", tuned_as_nanogpt, ("    model.eval()\n", "")),
        ("It raises", tuned_as_nanogpt, ("model(x[:, :-1])", "model(x)")),
        (None, tuned_as_nanogpt, ("ignore_index=-1)", "ignore_index=-1, label_smoothing=0.1)")),
        ("EOS is not learned", tuned_as_trl,
         ("[-100] * (gap + len(p)) + a)", "[-100] * (gap + len(p)) + a[:-1] + [-100])")),
        ("The labels are shifted twice", tuned_as_trl,
         ("labels=labels).loss", "labels=labels.roll(-1, 1)).loss")),
        ("The learning rate never changes", tuned_as_trl, ("            scheduler.step()\n", "")),
        ("in the order of the data", tuned_as_trl, ("shuffle=True", "shuffle=False")),
        ("The gradient is not clipped", tuned_as_trl,
         ("            torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)\n", "")),
        ("Each number of the gradient is clipped", tuned_as_trl, ("clip_grad_norm_", "clip_grad_value_")),
        ("Each row is averaged first", tuned_row_by_row,
         (".sum() / count", ".mean() / len(batch)")),
        ("The loss is a sum", tuned_row_by_row, (".sum() / count", ".sum()")),
        ("The sign is flipped", tuned_row_by_row, ("nll = -logprobs", "nll = logprobs")),
        ("The learning rate does not fall along a cosine", tuned_row_by_row,
         ("fall if step > config.warmup else 1.0", "1.0")),
        ("does not return a list", tuned_row_by_row, ("return losses", "return sum(losses)")),
        ("not in the optimizer", tuned_row_by_row, ("Adam(model.parameters()", "Adam(list(model.parameters())[1:]")),
    ],
    "piece_losses": [
        ("It divides by the piece's own positions", pieces_of_own_size),
        ("It divides by the number of pieces", pieces_by_count_of_pieces),
        ("`chunk` is told the number of pieces", pieces_by_chunk),
        ("No gradient flows", pieces_as_numbers),
        ("It weighs the pieces by their rows, and the last one as if it were full", pieces_by_rows_of_full_ones),
        ("The result has the shape", lambda logprobs, mask, size: pieces_by_range(logprobs, mask, size).sum()),
        ("It returns", lambda logprobs, mask, size: list(pieces_by_range(logprobs, mask, size))),
        ("It divides by the rows of the whole batch", lambda logprobs, mask, size: (
            pieces_by_range(logprobs, mask, size) * mask.sum() / len(mask))),
        ("Each row is averaged first", lambda logprobs, mask, size: torch.stack(
            [-((x * m).sum(1) / m.sum(1)).mean()
             for x, m in zip(logprobs.split(size), mask.split(size), strict=True)])),
        (None, lambda logprobs, mask, size: pieces_by_range(logprobs, mask, size).cumsum(0)),
    ],
    "perplexity": [
        ("It is 1 over the mean probability", lambda logprobs, mask: 1 / logprobs[mask].exp().mean()),
        ("These are bits", lambda logprobs, mask: 2 ** -logprobs[mask].mean()),
        ("It divides by all positions", lambda logprobs, mask: (-torch.where(mask, logprobs, 0).mean()).exp()),
        ("The sign is flipped", lambda logprobs, mask: logprobs[mask].mean().exp()),
        ("The base is 10", lambda logprobs, mask: 10 ** -logprobs[mask].mean()),
        ("The result has the shape", lambda logprobs, mask: (
            (-torch.where(mask, logprobs, 0).sum(1) / mask.sum(1)).exp())),
        (None, lambda logprobs, mask: (-(logprobs * mask).sum(1)).exp().mean()),
    ],
}  # fmt: skip
