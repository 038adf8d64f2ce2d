"""Sample answers with a KV cache; finished rows are dropped, and the log-probability of every token is kept.

Log-probabilities are those of the distribution that is sampled: the whole vocabulary at one temperature, without top-k
or top-p (transformers' ``generate`` applies top_k=50 by default, and then the ratio of the first PPO minibatch is not
1).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from minirlhf import parallel
from minirlhf.language.forward import decoder_for, without_adapter
from minirlhf.language.models import pad
from minirlhf.losses import token_logprobs
from minirlhf.training import micro_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COMPACT_BELOW = 0.8  # drop finished rows when less than this share of the computed rows is still running


class Samples(NamedTuple):
    """Prompts and sampled responses of B rows; P is the longest prompt, T the longest response."""

    prompt_tokens: Tensor
    """[B, P] int64, left-padded."""
    prompt_mask: Tensor
    """[B, P] bool, True at real tokens."""
    response_tokens: Tensor
    """[B, T] int64, right-padded."""
    response_mask: Tensor
    """[B, T] bool, True up to and including EOS, False after it."""
    logprobs: Tensor
    """[B, T] float32, log-probability under the sampling distribution; 0 where the mask is False."""
    ended: Tensor
    """[B] bool, True where the response ended with EOS, False where it was cut at the length limit."""

    @property
    def tokens(self) -> Tensor:
        """[B, P + T] prompt and response side by side."""
        return torch.cat([self.prompt_tokens, self.response_tokens], dim=1)

    @property
    def mask(self) -> Tensor:
        """[B, P + T] True at real tokens."""
        return torch.cat([self.prompt_mask, self.response_mask], dim=1)

    @property
    def lengths(self) -> Tensor:
        """[B] tokens of each response, EOS included."""
        return self.response_mask.sum(dim=1)

    def rows(self, index: Tensor) -> Samples:
        """The chosen rows, without the outer columns in which none of them has a real token."""
        prompt_mask, response_mask = self.prompt_mask[index], self.response_mask[index]
        start = self.prompt_mask.shape[1] - int(prompt_mask.sum(dim=1).max())
        stop = int(response_mask.sum(dim=1).max())
        return Samples(
            self.prompt_tokens[index, start:],
            prompt_mask[:, start:],
            self.response_tokens[index, :stop],
            response_mask[:, :stop],
            self.logprobs[index, :stop],
            self.ended[index],
        )

    def responses(self) -> list[list[int]]:
        """Token ids of each response without its EOS: what a reader and the reward model see."""
        lengths = (self.lengths - self.ended.long()).tolist()
        return [row[:length] for row, length in zip(self.response_tokens.tolist(), lengths, strict=True)]


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: the tokenizer's EOS and those of the model's generation config.

    Chat models have several, such as <|eot_id|> and <|end_of_text|> of Llama 3.
    """
    named = without_adapter(model).generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None})


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    pad_id: int,
    eos_id: int | Collection[int],
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    temperature: float = 1.0,
    greedy: bool = False,
    cache_tokens: int | None = None,
) -> Samples:
    """Sample an answer to every prompt.

    Each row has its own random numbers, one per token: an answer depends neither on which other rows have ended nor on
    `cache_tokens`. With one generator per row it does not depend on which rows are given together either.

    Args:
        model: a causal model of transformers, in eval mode (dropout would make the log-probabilities wrong).
        prompts: B rows of token ids, each at least one token.
        max_new_tokens: maximum tokens per response.
        pad_id: the padding token; must not be the only eos_id.
        eos_id: ends a response; one token or several, see `end_ids`.
        generator: of the random numbers, on the CPU; one for all rows or one per row. Not needed when greedy.
        temperature: logits are divided by it before sampling; the returned log-probabilities are those of that
            distribution.
        greedy: take the most likely token instead of sampling.
        cache_tokens: answer as many prompts at a time as fill a KV cache of so many tokens, each prompt and
            max_new_tokens of its answer; None for all at once. Affects memory and speed.

    Returns:
        The samples, T being the longest response.

    Raises:
        ValueError: no prompt, an empty prompt, a temperature that is not positive, pad_id == eos_id, or a model in
            training mode.
        UserError: a prompt has a token outside the vocabulary, or leaves no room for an answer in the context.

    Example:
        >>> samples = sample(model, [[5, 6, 7]], max_new_tokens=20, pad_id=0, eos_id=1)  # doctest: +SKIP
        >>> samples.response_tokens.shape  # doctest: +SKIP
        torch.Size([1, 13])
    """
    if not prompts or not all(len(row) for row in prompts):
        raise ValueError("sample() needs at least one prompt, and every prompt at least one token")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}; use greedy=True for the most likely token")
    ends = {eos_id} if isinstance(eos_id, int) else set(eos_id)
    if ends == {pad_id}:
        raise ValueError(f"pad_id and eos_id are both {pad_id}; give the tokenizer a pad token of its own")
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() before sampling")
    device = model.device
    prompt_tokens, prompt_mask = (part.to(device) for part in pad(prompts, pad_id, side="left"))
    rows = len(prompts)
    response_tokens = torch.full((rows, max_new_tokens), pad_id, device=device)
    response_mask = torch.zeros(rows, max_new_tokens, dtype=torch.bool, device=device)
    logprobs = torch.zeros(rows, max_new_tokens, dtype=torch.float32, device=device)

    end_tokens = torch.tensor(sorted(ends), device=device)
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    chances = _chances(generator, rows, max_new_tokens).to(device)
    lengths = [len(row) for row in prompts]
    groups = [list(range(rows))]
    if cache_tokens is not None:
        groups = micro_batches([length + max_new_tokens for length in lengths], cache_tokens)
    for group in groups:
        alive = torch.tensor(group, device=device)  # the rows of the result that the computed rows belong to
        running = torch.ones(len(group), dtype=torch.bool, device=device)  # of the computed rows, those not yet ended
        start = prompt_tokens.shape[1] - max(lengths[row] for row in group)
        decoder = decoder_for(model, prompt_tokens[alive, start:], prompt_mask[alive, start:], max_new_tokens)
        logits = decoder.prompt()
        for step in range(max_new_tokens):
            token = logits.argmax(dim=-1) if greedy else draw(logits / temperature, chances[alive, step])
            response_tokens[alive, step] = token.where(running, pad_id)
            response_mask[alive, step] = running
            logprobs[alive, step] = token_logprobs(logits, token, temperature=temperature).where(running, 0.0)
            ended[alive] |= running & torch.isin(token, end_tokens)
            running = ~ended[alive]
            count = int(running.sum())
            if count == 0 or step == max_new_tokens - 1:
                break
            if count < COMPACT_BELOW * len(running):
                keep = running.nonzero().squeeze(1)
                decoder.keep(keep)
                alive, token, running = alive[keep], token[keep], running[keep]
            logits = decoder.step(token)
        del decoder  # its cache, before the next group has one

    longest = int(response_mask.sum(dim=1).max())
    return Samples(
        prompt_tokens,
        prompt_mask,
        response_tokens[:, :longest],
        response_mask[:, :longest],
        logprobs[:, :longest],
        ended,
    )


def sample_by_rank(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, generator: Sequence[torch.Generator], **options: Any
) -> Samples:
    """`sample`, where each of several processes answers its share of the prompts, and all get all answers.

    Args:
        model: the same in every process; sharded or not.
        prompts: B rows of token ids, those of all processes.
        generator: one per row, so that the answers don't depend on the number of processes.
        options: the other arguments of `sample`.
    """
    if parallel.size() == 1:
        return sample(model, prompts, generator=generator, **options)
    mine, own = parallel.my_rows(list(range(len(prompts)))), None
    with parallel.gathered(model):
        if mine:  # there may be fewer prompts than processes
            own = sample(model, [prompts[i] for i in mine], generator=[generator[i] for i in mine], **options)
    longest = max(parallel.gather([0 if own is None else own.response_mask.shape[1]]))

    def together(name: str, width: int, dtype: torch.dtype = torch.long) -> Tensor:
        found = torch.zeros(len(prompts), width, dtype=dtype, device=model.device)
        if own is not None:
            part = getattr(own, name).to(dtype).reshape(len(mine), -1)
            found[mine, : part.shape[1]] = part
        return parallel.sum_over_ranks(found)

    prompt_tokens, prompt_mask = (part.to(model.device) for part in pad(prompts, options["pad_id"], side="left"))
    response_mask = together("response_mask", longest).bool()
    return Samples(
        prompt_tokens,
        prompt_mask,
        together("response_tokens", longest).where(response_mask, options["pad_id"]),
        response_mask,
        together("logprobs", longest, torch.float32),
        together("ended", 1)[:, 0].bool(),
    )


def _chances(generator: torch.Generator | Sequence[torch.Generator] | None, rows: int, tokens: int) -> Tensor:
    """[rows, tokens] float64 from [0, 1)."""
    if isinstance(generator, Sequence):
        return torch.stack([torch.rand(tokens, dtype=torch.float64, generator=own) for own in generator])
    return torch.rand(rows, tokens, dtype=torch.float64, generator=generator)


def draw(logits: Tensor, chances: Tensor) -> Tensor:
    """Draw one token per row from softmax(logits), by inverting the cumulative distribution: [B, V] -> [B] int64.

    `chances` [B] float64 are uniform in [0, 1). Sums are in float64, so that a token of probability 1e-12 can still
    be drawn; one of probability 0 never is.

    Raises:
        ValueError: a row has no distribution: it contains NaN or +inf, or only -inf.

    Example:
        >>> draw(torch.tensor([[0.0, 0.0], [-torch.inf, 0.0]]), torch.tensor([0.4, 0.1], dtype=torch.float64)).tolist()
        [0, 1]
    """
    below = logits.softmax(dim=-1).double().cumsum(dim=-1)
    broken = below[:, -1].isnan()
    if broken.any():
        raise ValueError(
            f"row {int(broken.nonzero()[0])} of {len(logits)}: the logits contain NaN or +inf, or only -inf, so "
            "no token can be drawn; check the model's weights and what masks its logits"
        )
    # Strictly below the total, which rounding may have left on either side of 1.
    chosen = chances[:, None] * (1 - 2**-50) * below[:, -1:]
    return torch.searchsorted(below, chosen, right=True).squeeze(1)
