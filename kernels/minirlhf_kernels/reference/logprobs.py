"""Log-probabilities of tokens, from logits or from hidden states and the head's weight.

With p = softmax(logits / temperature), the log-probability of a token is log p_token where p_token <= 1/2, and
log1p(-rest) above, where

    rest = sum over j != token of p_j        (a sum of positive numbers: no cancellation)

is 1 - p_token exact to its last digits even where `log_softmax` has already rounded to 0; so log p is never above 0.
Its gradient is `rest` at the token (again no difference) and -p_j elsewhere; that of the entropy H = -sum p_j log p_j
is -p_j (log p_j + H). Only p is kept for the backward, and rows that do not count are never read.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

IGNORED_TOKEN = -100
"""A token that never counts (torch's own convention for `cross_entropy`)."""

# Rows of a chunk are chosen so that its logits hold about this many elements (64 MiB of float32).
_CHUNK_ELEMENTS = 1 << 24


def _counted_rows(tokens: Tensor, mask: Tensor | None, shape: torch.Size, vocabulary: int) -> Tensor | None:
    """Which rows count, or None where all do. Raises on any token that counts and is outside the vocabulary."""
    if tokens.shape != shape:
        raise ValueError(f"tokens must have the shape of the rows, {tuple(shape)}, not {tuple(tokens.shape)}")
    if tokens.dtype != torch.int64:
        raise TypeError(f"tokens must be int64, not {tokens.dtype}")
    if mask is not None and (mask.shape != shape or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool of shape {tuple(shape)}, not {mask.dtype} of {tuple(mask.shape)}")
    counted = tokens != IGNORED_TOKEN if mask is None else mask & (tokens != IGNORED_TOKEN)
    outside = counted & ((tokens < 0) | (tokens >= vocabulary))
    if bool(outside.any()):
        bad = tokens[outside][0].item()
        raise ValueError(
            f"token {bad} is outside the vocabulary [0, {vocabulary}): mask the row, or give it {IGNORED_TOKEN}"
        )
    return None if bool(counted.all()) else counted


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")


def _refuse_second_derivative() -> None:
    # Only create_graph=True runs a backward with gradients on; torch's once_differentiable would let some cases pass.
    if torch.is_grad_enabled():
        raise RuntimeError("token_logprobs is differentiable once: for a second derivative use logits.log_softmax(-1)")


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _probabilities(logits: Tensor, temperature: float) -> Tensor:
    return (logits if temperature == 1.0 else logits / temperature).softmax(-1)


def _log(p: Tensor) -> Tensor:
    """log p, finite at p = 0 so that p log p is 0 there and not NaN."""
    return p.clamp(min=torch.finfo(p.dtype).tiny).log_()


def _forward(p: Tensor, logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities [...] and rest = 1 - p_token [..., 1] of rows p [..., V]."""
    index = tokens.unsqueeze(-1)
    p_token = p.gather(-1, index)
    rest = p.scatter_(-1, index, 0.0).sum(-1, keepdim=True)
    p.scatter_(-1, index, p_token)
    logprobs = torch.where(p_token > 0.5, torch.log1p(-rest), p_token.log()).squeeze(-1)
    faint = p_token.squeeze(-1) < 1e-30
    if bool(faint.any()):  # p has underflowed: its logarithm has not
        log_p = (logits[faint] / temperature).log_softmax(-1)
        logprobs[faint] = log_p.gather(-1, index[faint]).squeeze(-1)
    return logprobs, rest


def _entropy(p: Tensor) -> Tensor:
    return -_log(p).mul_(p).sum(-1)


def _backward(
    p: Tensor, rest: Tensor, entropy: Tensor, tokens: Tensor, grads: tuple[Tensor | None, ...], scale: float
) -> Tensor:
    """scale times the gradient with respect to logits / temperature; an output without gradient is skipped."""
    grad_logprobs, grad_entropy = (None if g is None else g.unsqueeze(-1) * scale for g in grads)
    grad = torch.zeros_like(p) if grad_logprobs is None else p * -grad_logprobs
    if grad_logprobs is not None:
        grad.scatter_(-1, tokens.unsqueeze(-1), rest * grad_logprobs)
    if grad_entropy is not None:
        grad -= _log(p).add_(entropy.unsqueeze(-1)).mul_(p).mul_(grad_entropy)
    return grad


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tensor, counted: Tensor | None, temperature: float, want_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        rows, kept = (logits, tokens) if counted is None else (logits[counted], tokens[counted])
        rows = rows.to(_at_least_float32(logits.dtype))
        p = _probabilities(rows, temperature)
        logprobs, rest = _forward(p, rows, kept, temperature)
        entropy = _entropy(p) if want_entropy else logprobs.new_zeros(())
        ctx.save_for_backward(p, rest, entropy, kept, counted)
        ctx.temperature, ctx.shape, ctx.dtype = temperature, logits.shape, logits.dtype
        ctx.set_materialize_grads(False)
        if counted is not None:
            empty = logprobs.new_zeros(tokens.shape)
            logprobs = empty.masked_scatter(counted, logprobs)
            entropy = empty.masked_scatter(counted, entropy) if want_entropy else entropy
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        p, rest, entropy, kept, counted = ctx.saved_tensors
        grads: tuple[Tensor | None, ...] = (grad_logprobs, grad_entropy)
        if counted is not None:
            grads = tuple(None if g is None else g[counted] for g in grads)
        grad = _backward(p, rest, entropy, kept, grads, 1 / ctx.temperature).to(ctx.dtype)
        if counted is not None:
            rows, grad = grad, grad.new_zeros(ctx.shape)
            grad[counted] = rows
        return grad, None, None, None, None


@overload
def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float = ...,
    mask: Tensor | None = ...,
    return_entropy: Literal[False] = ...,
) -> Tensor: ...
@overload
def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float = ...,
    mask: Tensor | None = ...,
    return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability, in nats, that softmax(logits / temperature) gives each token.

    logits [..., V] and tokens [...] (int64) give logprobs [...]: float64 for float64 logits, float32 for any other
    (bfloat16 and float16 are computed in float32). `logits[..., i, :]` must be the distribution that `tokens[..., i]`
    was drawn from; for a causal model that is `token_logprobs(logits[:, :-1], input_ids[:, 1:])`.

    Rows where mask is False or the token is -100 give 0 and no gradient, whatever their logits hold. Logits of -inf are
    tokens that cannot be drawn. `return_entropy=True` returns (logprobs, entropy), both [...]. Raises ValueError for a
    token outside [0, V). Differentiable once; asking for a second derivative raises.

    >>> logits = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    >>> token_logprobs(logits, torch.tensor([1, 0]))
    tensor([-0.6931, -0.1269])
    >>> token_logprobs(logits, torch.tensor([1, 0]), mask=torch.tensor([True, False]))
    tensor([-0.6931,  0.0000])
    """
    _check_temperature(temperature)
    counted = _counted_rows(tokens, mask, logits.shape[:-1], logits.shape[-1])
    logprobs, entropy = _TokenLogprobs.apply(logits, tokens, counted, temperature, return_entropy)
    return (logprobs, entropy) if return_entropy else logprobs


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float, want_entropy: bool, chunk: int
    ) -> tuple[Tensor, Tensor]:
        dtype = _at_least_float32(torch.promote_types(hidden.dtype, weight.dtype))
        head = weight.to(dtype).t()
        logprobs = torch.empty(len(tokens), dtype=dtype, device=hidden.device)
        entropy = torch.empty_like(logprobs) if want_entropy else logprobs.new_zeros(())
        for start in range(0, len(tokens), chunk):
            rows = slice(start, start + chunk)
            logits = hidden[rows].to(dtype) @ head
            p = _probabilities(logits, temperature)
            logprobs[rows], _ = _forward(p, logits, tokens[rows], temperature)
            if want_entropy:
                entropy[rows] = _entropy(p)
        ctx.save_for_backward(hidden, weight, tokens)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        hidden, weight, tokens = ctx.saved_tensors
        dtype = _at_least_float32(torch.promote_types(hidden.dtype, weight.dtype))
        head = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Accumulated in float32 (or float64): bfloat16 would lose small terms chunk after chunk.
        grad_weight = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        for start in range(0, len(tokens), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            h, kept = hidden[rows].to(dtype), tokens[rows]
            logits = h @ head.t()
            p = _probabilities(logits, ctx.temperature)
            _, rest = _forward(p, logits, kept, ctx.temperature)
            entropy = rest.squeeze(-1) if grad_entropy is None else _entropy(p)
            grads = tuple(None if g is None else g[rows] for g in (grad_logprobs, grad_entropy))
            grad = _backward(p, rest, entropy, kept, grads, 1 / ctx.temperature)
            if grad_hidden is not None:
                grad_hidden[rows] = (grad @ head).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight.addmm_(grad.t(), h)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    temperature: float = ...,
    mask: Tensor | None = ...,
    return_entropy: Literal[False] = ...,
    chunk_size: int | None = ...,
) -> Tensor: ...
@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    temperature: float = ...,
    mask: Tensor | None = ...,
    return_entropy: Literal[True],
    chunk_size: int | None = ...,
) -> tuple[Tensor, Tensor]: ...
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`token_logprobs(hidden @ weight.T, tokens)` that never holds the logits of more than `chunk_size` rows.

    hidden [..., H], weight [V, H] (a head without bias) and tokens [...] give logprobs [...], with entropy on request,
    as `token_logprobs` does, with the same masks and the same errors. The backward computes the logits again, chunk by
    chunk. `chunk_size` counts rows; by default as many as make about sixteen million logits.

    >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 5.0], [0.0, 7.0]])
    >>> linear_token_logprobs(hidden, weight, torch.tensor([0]))
    tensor([-0.1269])
    """
    _check_temperature(temperature)
    if hidden.shape[-1] != weight.shape[-1] or weight.dim() != 2:
        raise ValueError(f"weight must be [V, {hidden.shape[-1]}] for this hidden, not {tuple(weight.shape)}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 row, not {chunk_size}")
    chunk = chunk_size or max(64, _CHUNK_ELEMENTS // weight.shape[0])
    counted = _counted_rows(tokens, mask, hidden.shape[:-1], weight.shape[0])
    # Only the rows that count go through the head.
    if counted is None:
        rows, kept = hidden.reshape(-1, hidden.shape[-1]), tokens.reshape(-1)
    else:
        rows, kept = hidden[counted], tokens[counted]
    both = _LinearTokenLogprobs.apply(rows, weight, kept, temperature, return_entropy, chunk)
    if counted is None:
        logprobs, entropy = (x.view(tokens.shape) if x.dim() else x for x in both)
    else:
        empty = both[0].new_zeros(tokens.shape)
        logprobs, entropy = (empty.masked_scatter(counted, x) if x.dim() else x for x in both)
    return (logprobs, entropy) if return_entropy else logprobs
