"""Lesson 07, supervised fine-tuning: which tokens count, the shift by one, the loss and its mean over a batch."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.distributions.utils import probs_to_logits

from minirlhf import losses
from minirlhf_course.checks import write07
from minirlhf_course.checks.cases07 import loss_cases, mask_cases, micro_cases, perplexity_cases, shift_cases
from minirlhf_course.checks.exercise import exercise

EPSILONS = (1e-6, 1e-7, 1e-8, 1e-9, 1e-10, 1e-12)

# 7.1 -----------------------------------------------------------------------------------------------------------------


def _columns(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1])


def _earlier(mask: Tensor) -> Tensor:
    return torch.cat((mask[:, 1:], torch.zeros_like(mask[:, :1])), 1)


def _without_last(mask: Tensor) -> Tensor:
    return mask & _earlier(mask)


@exercise(
    "7.1",
    "which tokens count",
    difficulty=1,
    minutes=8,
    task="A row holds a prompt, its completion, one EOS, and padding up to the longest row. The loss counts the "
    "completion and its EOS. Make the mask.",
    cases=mask_cases,
    suspects={
        "A mask of all ones: prompt and padding count as well, and the model learns to ask and to pad.": (
            lambda tokens, starts, pad_id: torch.ones_like(tokens, dtype=torch.bool)
        ),
        "The padding counts: leave out what equals pad_id.": (
            lambda tokens, starts, pad_id: _columns(tokens) >= starts[:, None]
        ),
        "The prompt counts: begin at column prompt_lengths.": lambda tokens, starts, pad_id: tokens != pad_id,
        "EOS is left out: then nobody teaches the model to stop.": (
            lambda tokens, starts, pad_id: _without_last((tokens != pad_id) & (_columns(tokens) >= starts[:, None]))
        ),
        "Off by one: the completion's first token is left out. It stands in column prompt_lengths.": (
            lambda tokens, starts, pad_id: (tokens != pad_id) & (_columns(tokens) > starts[:, None])
        ),
        "Off by one: the prompt's last token counts. The mask says which tokens are predicted, and the shift "
        "between logits and tokens is made elsewhere (7.2).": (
            lambda tokens, starts, pad_id: (tokens != pad_id) & (_columns(tokens) >= starts[:, None] - 1)
        ),
        "It is the wrong way round: True says what counts.": (
            lambda tokens, starts, pad_id: ~((tokens != pad_id) & (_columns(tokens) >= starts[:, None]))
        ),
        "This is the prompt: the completion is what comes after it.": (
            lambda tokens, starts, pad_id: _columns(tokens) < starts[:, None]
        ),
        "The whole mask stands one column too early: it marks the tokens themselves, and the shift between logits and "
        "tokens is made elsewhere (7.2).": (
            lambda tokens, starts, pad_id: _earlier((tokens != pad_id) & (_columns(tokens) >= starts[:, None]))
        ),
        "`pad_id` is not used: padding need not be 0, and 0 may be a word.": (
            lambda tokens, starts, pad_id: (tokens != 0) & (_columns(tokens) >= starts[:, None])
        ),
        "It uses the longest prompt's length for all rows: compare with prompt_lengths[:, None].": (
            lambda tokens, starts, pad_id: (tokens != pad_id) & (_columns(tokens) >= starts.max())
        ),
        "It uses the first row's prompt length for all rows: compare with prompt_lengths[:, None].": (
            lambda tokens, starts, pad_id: (tokens != pad_id) & (_columns(tokens) >= starts[0])
        ),
    },
    hints=(
        "Two conditions joined by `&`: the token is no padding, and its column is not before the completion.",
        "`columns = torch.arange(tokens.shape[1])` is [L], and `prompt_lengths[:, None]` [B, 1]: comparing the two "
        "gives [B, L].",
    ),
)
def completion_mask(tokens: Tensor, prompt_lengths: Tensor, pad_id: int) -> Tensor:
    """True where a token is part of the completion, its EOS included: bool [B, L].

    tokens [B, L] are prompt, completion, EOS, then padding (pad_id, which is not EOS);
    prompt_lengths [B] says how many tokens of a row are prompt, the template included.
    """
    return (tokens != pad_id) & (_columns(tokens) >= prompt_lengths[:, None])


# 7.2 -----------------------------------------------------------------------------------------------------------------


def _gathered(log_probs: Tensor, tokens: Tensor) -> Tensor:
    return log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def _capped(epsilon: float, logits: Tensor, tokens: Tensor) -> Tensor:
    return _gathered((logits[:, :-1].softmax(-1) + epsilon).log(), tokens[:, 1:])


@exercise(
    "7.2",
    "the shift by one",
    difficulty=2,
    minutes=12,
    task="Column $t$ of the logits was made from the tokens up to and including $t$, so it speaks about token $t + 1$. "
    "What log-probability did the model give to each token that it could have predicted?",
    cases=shift_cases,
    suspects={
        "Off by one: logits[:, t] predict tokens[:, t + 1], and here they are asked for the token that they have just "
        "read. A model learns to copy it, and the loss goes to 0.": (
            lambda logits, tokens: _gathered(logits[:, :-1].log_softmax(-1), tokens[:, :-1])
        ),
        "Off by one, and by all columns: the last token is in, whose next one nobody knows, and each logit is asked "
        "for the token it has just read.": lambda logits, tokens: _gathered(logits.log_softmax(-1), tokens),
        "Off by one: each logit is asked for the token that it has just read. Drop the last column of the logits, not "
        "the first.": lambda logits, tokens: _gathered(logits[:, 1:].log_softmax(-1), tokens[:, 1:]),
        "Shifted the wrong way: it asks logits[:, t + 1] for tokens[:, t], which lie in the past.": (
            lambda logits, tokens: _gathered(logits[:, 1:].log_softmax(-1), tokens[:, :-1])
        ),
        "These are raw logits: log_softmax over the vocabulary makes log-probabilities of them.": (
            lambda logits, tokens: _gathered(logits[:, :-1], tokens[:, 1:])
        ),
        "These are probabilities: take log_softmax in place of softmax.": (
            lambda logits, tokens: _gathered(logits[:, :-1].softmax(-1), tokens[:, 1:])
        ),
        "log(softmax(x)) is -inf where the probability underflows: log_softmax does both at once.": (
            lambda logits, tokens: _gathered(logits[:, :-1].softmax(-1).log(), tokens[:, 1:])
        ),
        "The sign is flipped: a log-probability is never above 0.": (
            lambda logits, tokens: -_gathered(logits[:, :-1].log_softmax(-1), tokens[:, 1:])
        ),
        "The softmax runs over the time steps: it belongs over the vocabulary, the last dimension.": (
            lambda logits, tokens: _gathered(logits[:, :-1].log_softmax(1), tokens[:, 1:])
        ),
        "The softmax runs over the batch: it belongs over the vocabulary, the last dimension.": (
            lambda logits, tokens: _gathered(logits[:, :-1].log_softmax(0), tokens[:, 1:])
        ),
        "The probabilities are kept away from 0, as Categorical(probs=...) does: a token that is all but impossible "
        "looks likelier than it is, and gets no gradient. Use log_softmax, or Categorical(logits=...).": (
            lambda logits, tokens: _gathered(probs_to_logits(logits[:, :-1].softmax(-1)), tokens[:, 1:])
        ),
        "These are bits: PyTorch's logarithms are natural ones, and stay so.": (
            lambda logits, tokens: _gathered(logits[:, :-1].log_softmax(-1), tokens[:, 1:]) / math.log(2)
        ),
        "This is the log-probability of the likeliest token: that of the token that came is asked for.": (
            lambda logits, tokens: logits[:, :-1].log_softmax(-1).amax(-1)
        ),
        "`squeeze()` without a dimension drops the rows of a batch of one, too: `squeeze(-1)`.": (
            lambda logits, tokens: logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze()
        ),
        **{
            f"The epsilon of {epsilon:g} caps the log-probability at {math.log(epsilon):.0f} and kills the gradient "
            "where the model is most wrong: log_softmax needs none.": partial(_capped, epsilon)
            for epsilon in EPSILONS
        },
    },
    hints=(
        "Drop the last column of the logits and the first one of the tokens: now they stand side by side.",
        "`logits[:, :-1].log_softmax(-1)` is [B, T - 1, V]; `.gather(-1, tokens[:, 1:, None])` picks one number of "
        "each V, and `.squeeze(-1)` drops the dimension that is left over.",
    ),
    leaves=("logits",),
)
def next_token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """The log-probability of tokens 1 to T - 1, each given all before it: [B, T - 1].

    logits [B, T, V], where logits[:, t] is what the model says after it has read tokens[:, : t + 1];
    tokens [B, T], ids below V.
    """
    return losses.token_logprobs(logits[:, :-1], tokens[:, 1:])


# 7.3 -----------------------------------------------------------------------------------------------------------------


@exercise(
    "7.3",
    "the loss",
    difficulty=2,
    minutes=8,
    task="$L = -\\frac{1}{N}\\sum \\log \\pi(y_t)$ over the $N$ tokens of the batch that count. What lies under the "
    "mask must not matter, even if it is NaN, neither for the loss nor for its gradient.",
    cases=loss_cases,
    suspects={
        "It divides by all positions: divide by the number that count, mask.sum().": (
            lambda logprobs, mask: -torch.where(mask, logprobs, 0).sum() / mask.numel()
        ),
        "Each row is averaged first: then a token of a short answer weighs more than one of a long answer. One sum, "
        "one count, for the whole batch.": (
            lambda logprobs, mask: (
                -(torch.where(mask, logprobs, 0).sum(1) / mask.sum(1).clamp(min=1))[mask.any(1)].mean()
            )
        ),
        "It divides by the rows: divide by the tokens that count.": (
            lambda logprobs, mask: -torch.where(mask, logprobs, 0).sum() / len(mask)
        ),
        "The sign is missing: a loss is minus the log-probability.": (
            lambda logprobs, mask: torch.where(mask, logprobs, 0).sum() / mask.sum()
        ),
        "The mask is a factor, and 0 * NaN is NaN: choose with torch.where(mask, logprobs, 0).": (
            lambda logprobs, mask: -(logprobs * mask).sum() / mask.sum()
        ),
        "The mask is not used: prompt and padding count.": lambda logprobs, mask: -logprobs.mean(),
        "It is the sum: divide by the tokens that count.": (
            lambda logprobs, mask: -torch.where(mask, logprobs, 0).sum()
        ),
        "It counts what the mask leaves out: True says what counts.": (
            lambda logprobs, mask: -torch.where(mask, 0, logprobs).sum() / (~mask).sum().clamp(min=1)
        ),
        "It divides by the number of columns: divide by the tokens that count.": (
            lambda logprobs, mask: -torch.where(mask, logprobs, 0).sum() / mask.shape[1]
        ),
        "The shift is made twice: 7.2 has made it, and logprobs and mask stand side by side, column by column.": (
            lambda logprobs, mask: -torch.where(mask[:, 1:], logprobs[:, :-1], 0).sum() / mask[:, 1:].sum()
        ),
        "It is the log of the mean probability: take the mean of the logarithms.": (
            lambda logprobs, mask: -(torch.where(mask, logprobs, 0).exp() * mask).sum().div(mask.sum()).log()
        ),
        "These are probabilities: a log-likelihood is a sum of log-probabilities, as they come.": (
            lambda logprobs, mask: -(torch.where(mask, logprobs, 0).exp() * mask).sum() / mask.sum()
        ),
        "This is the perplexity (7.6): the loss is its logarithm.": (
            lambda logprobs, mask: losses.sft_loss(logprobs, mask).exp()
        ),
    },
    hints=(
        "A sum over what counts, by how much counts. A product with the mask does not get rid of NaN; a choice does.",
        "`torch.where(mask, logprobs, 0)` first, then the sum.",
    ),
    leaves=("logprobs",),
)
def sft_loss(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Nats per token of what counts: logprobs and mask (bool, True = counts) [B, T] give one number."""
    return losses.sft_loss(logprobs, mask)


fine_tune = write07.fine_tune  # 7.4

# 7.5 -----------------------------------------------------------------------------------------------------------------


def _parts(logprobs: Tensor, mask: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(logprobs.split(size), mask.split(size), strict=True))


@exercise(
    "7.5",
    "a batch in pieces",
    difficulty=3,
    minutes=12,
    task="The batch does not fit, so it goes through the model `size` rows at a time, with a `backward()` after each "
    "piece; the gradients add up. Give the loss of each piece, so that their **sum** is the loss of the whole batch.",
    cases=micro_cases,
    suspects={
        "Each piece is divided by its own tokens: the sum is about as many times too large as there are pieces. "
        "Divide by the tokens of the whole batch.": (
            lambda logprobs, mask, size: torch.stack([losses.sft_loss(x, m) for x, m in _parts(logprobs, mask, size)])
        ),
        "A mean of means: each piece is divided by its own tokens, and then by the number of pieces. A token in a "
        "piece of short answers weighs too much. Divide by the tokens of the whole batch, once.": (
            lambda logprobs, mask, size: torch.stack(
                [losses.sft_loss(x, m) / len(logprobs.split(size)) for x, m in _parts(logprobs, mask, size)]
            )
        ),
        "It weighs the pieces by their rows: weigh them by their tokens.": (
            lambda logprobs, mask, size: torch.stack(
                [losses.sft_loss(x, m) * len(x) / len(logprobs) for x, m in _parts(logprobs, mask, size)]
            )
        ),
        "It divides by the padding as well: by mask.sum() of the whole batch, not by mask.numel().": (
            lambda logprobs, mask, size: torch.stack(
                [-torch.where(m, x, 0).sum() / mask.numel() for x, m in _parts(logprobs, mask, size)]
            )
        ),
        "These are sums: divide each by the tokens of the whole batch.": (
            lambda logprobs, mask, size: torch.stack(
                [-torch.where(m, x, 0).sum() for x, m in _parts(logprobs, mask, size)]
            )
        ),
        "The sign is flipped: a loss is minus the log-probability.": (
            lambda logprobs, mask, size: torch.stack(
                [torch.where(m, x, 0).sum() / mask.sum() for x, m in _parts(logprobs, mask, size)]
            )
        ),
        "The last piece is lost where `size` does not divide the rows: `split` keeps it.": (
            lambda logprobs, mask, size: torch.stack(
                [
                    losses.sft_loss(x, m, denominator=mask.sum())
                    for x, m in _parts(logprobs, mask, size)
                    if len(x) == size
                ]
            )
        ),
        "It divides by the piece's own positions, padding included: by mask.sum() of the whole batch.": (
            lambda logprobs, mask, size: torch.stack(
                [-torch.where(m, x, 0).mean() for x, m in _parts(logprobs, mask, size)]
            )
        ),
        "It divides by the number of pieces: divide by the tokens of the whole batch.": (
            lambda logprobs, mask, size: torch.stack(
                [-torch.where(m, x, 0).sum() / len(logprobs.split(size)) for x, m in _parts(logprobs, mask, size)]
            )
        ),
        "It divides by the rows of the whole batch: divide by its tokens.": (
            lambda logprobs, mask, size: torch.stack(
                [-torch.where(m, x, 0).sum() / len(logprobs) for x, m in _parts(logprobs, mask, size)]
            )
        ),
        "Each row is averaged first: then a token of a short answer weighs more than one of a long answer. Divide by "
        "the tokens of the whole batch, once.": (
            lambda logprobs, mask, size: torch.stack(
                [-(torch.where(m, x, 0).sum(1) / m.sum(1)).mean() for x, m in _parts(logprobs, mask, size)]
            )
        ),
        "`chunk` is told the number of pieces, `split` the rows of each: use `split`.": (
            lambda logprobs, mask, size: torch.stack(
                [
                    losses.sft_loss(x, m, denominator=mask.sum())
                    for x, m in zip(logprobs.chunk(size), mask.chunk(size), strict=True)
                ]
            )
        ),
        "It weighs the pieces by their rows, and the last one as if it were full: weigh them by their tokens.": (
            lambda logprobs, mask, size: torch.stack(
                [losses.sft_loss(x, m) * size / len(logprobs) for x, m in _parts(logprobs, mask, size)]
            )
        ),
    },
    hints=(
        "What has to be counted before the first piece goes through the model?",
        "`total = mask.sum()`; then for each piece of `logprobs.split(size)` and `mask.split(size)` the sum that "
        "counts, by `total`; `torch.stack` makes one tensor of the list.",
    ),
    leaves=("logprobs",),
)
def piece_losses(logprobs: Tensor, mask: Tensor, size: int) -> Tensor:
    """The loss of each piece of `size` rows (the last may have fewer): [number of pieces].

    logprobs and mask (bool, True = counts) [B, T]. The pieces' losses add up to the loss of the batch.
    """
    total = mask.sum()
    return torch.stack([losses.sft_loss(x, m, denominator=total) for x, m in _parts(logprobs, mask, size)])


# 7.6 -----------------------------------------------------------------------------------------------------------------


def _nats(logprobs: Tensor, mask: Tensor) -> Tensor:
    return losses.sft_loss(logprobs, mask)


@exercise(
    "7.6",
    "perplexity",
    difficulty=1,
    minutes=5,
    task="A loss of 0.9 nats per token says little to most people. Its exponential says more: the model is as unsure "
    "as if it rolled a fair die with that many sides for each token.",
    cases=perplexity_cases,
    suspects={
        "It is the mean of the rows' perplexities: take the mean over all tokens first, the exponential last.": (
            lambda logprobs, mask: (-torch.where(mask, logprobs, 0).sum(1) / mask.sum(1)).exp().mean()
        ),
        "It is the exponential of the mean of the rows' means: short rows weigh too much. One count for the whole "
        "batch.": lambda logprobs, mask: (-torch.where(mask, logprobs, 0).sum(1) / mask.sum(1)).mean().exp(),
        "It is the mean of the tokens' perplexities, 1/p: take the mean first, the exponential last.": (
            lambda logprobs, mask: torch.where(mask, (-logprobs).exp(), 0).sum() / mask.sum()
        ),
        "It is the loss in nats: take its exponential.": _nats,
        "These are bits: logprobs are in nats, so the base is e and not 2.": (
            lambda logprobs, mask: 2 ** _nats(logprobs, mask)
        ),
        "The sign is flipped: this is the typical probability of a token, and perplexity is 1 over it.": (
            lambda logprobs, mask: (-_nats(logprobs, mask)).exp()
        ),
        "The mask is not used: prompt and padding count.": lambda logprobs, mask: (-logprobs.mean()).exp(),
        "It is the exponential of the sum: divide by the tokens first.": (
            lambda logprobs, mask: (-torch.where(mask, logprobs, 0).sum()).exp()
        ),
        "It divides by all positions: divide by the number that count, mask.sum().": (
            lambda logprobs, mask: (-torch.where(mask, logprobs, 0).mean()).exp()
        ),
        "It is 1 over the mean probability: take the mean of the logarithms, the exponential last.": (
            lambda logprobs, mask: mask.sum() / torch.where(mask, logprobs.exp(), 0).sum()
        ),
        "The base is 10: logprobs are natural logarithms, so it is e.": lambda logprobs, mask: (
            10 ** _nats(logprobs, mask)
        ),
    },
    hints=("$\\exp(L)$ with the $L$ of 7.3.", "One count for the whole batch, then `.exp()`, in this order."),
)
def perplexity(logprobs: Tensor, mask: Tensor) -> Tensor:
    """exp of the loss in nats per token: logprobs and mask (bool, True = counts) [B, T] give one number."""
    return losses.sft_loss(logprobs, mask).exp()
