"""Log-probabilities of tokens, from logits or from hidden states and the head's weight.

With p = softmax(logits / temperature), the log-probability of a token is log p_token, except where p_token is near 1:
there p has rounded most digits away (at a margin of 20 nats, all of them), and

    log p_token = log1p(-rest),      rest = sum over j != token of p_j        (positive terms: no cancellation)

keeps them; so log p is never above 0. Its gradient is 1 - p_token = -expm1(log p_token) at the token, again without
cancellation, and -p_j elsewhere; that of the entropy H = -sum p_j log p_j is -p_j (log p_j + H). p is kept for the
backward (log p too when the entropy is wanted), and rows that do not count are never read.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

IGNORED_TOKEN = -100
"""A token that never counts (torch's own convention for `cross_entropy`)."""

# Rows of a chunk are chosen so that its logits hold about this many elements (64 MiB of float32).
_CHUNK_ELEMENTS = 1 << 24


def _check_tokens(tokens: Tensor, mask: Tensor | None, shape: torch.Size) -> None:
    if tokens.shape != shape:
        raise ValueError(f"tokens must have the shape of the rows, {tuple(shape)}, not {tuple(tokens.shape)}")
    if tokens.dtype != torch.int64:
        raise TypeError(f"tokens must be int64, not {tokens.dtype}")
    if mask is not None and (mask.shape != shape or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool of shape {tuple(shape)}, not {mask.dtype} of {tuple(mask.shape)}")


def _counted_rows(tokens: Tensor, mask: Tensor | None, shape: torch.Size, vocabulary: int) -> Tensor | None:
    """Which rows count, or None where all do. Raises on any token that counts and is outside the vocabulary."""
    _check_tokens(tokens, mask, shape)
    if mask is None and tokens.numel():
        lowest, highest = tokens.aminmax()
        if lowest >= 0 and highest < vocabulary:
            return None
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


def _check_linear(hidden: Tensor, weight: Tensor, chunk_size: int | None) -> None:
    if hidden.shape[-1] != weight.shape[-1] or weight.dim() != 2:
        raise ValueError(f"weight must be [V, {hidden.shape[-1]}] for this hidden, not {tuple(weight.shape)}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 row, not {chunk_size}")


def _refuse_second_derivative() -> None:
    # Only create_graph=True runs a backward with gradients on; torch's once_differentiable would let some cases pass.
    if torch.is_grad_enabled():
        raise RuntimeError("token_logprobs is differentiable once: for a second derivative use logits.log_softmax(-1)")


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _probabilities(logits: Tensor, temperature: float) -> Tensor:
    return (logits if temperature == 1.0 else logits / temperature).softmax(-1)


def _at_tokens(p: Tensor, logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """log p_token [...] of rows p [..., V], to the last digits."""
    index = tokens.unsqueeze(-1)
    p_token = p.gather(-1, index)
    logprobs = p_token.log().squeeze(-1)
    if p_token.numel() == 0:
        return logprobs
    lowest, highest = p_token.aminmax()
    if highest > 0.5:
        rest = p.scatter_(-1, index, 0.0).sum(-1)
        p.scatter_(-1, index, p_token)
        logprobs = torch.where(p_token.squeeze(-1) > 0.5, torch.log1p(-rest), logprobs)
    if lowest < 1e-30:  # p has underflowed: its logarithm has not
        faint = p_token.squeeze(-1) < 1e-30
        log_p = (logits[faint] / temperature).log_softmax(-1)
        logprobs[faint] = log_p.gather(-1, index[faint]).squeeze(-1)
    return logprobs


def _without_gradient(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """The same with nothing to keep for a backward: log_softmax, mended where p_token is near 1."""
    log_p = (logits if temperature == 1.0 else logits / temperature).log_softmax(-1)
    index = tokens.unsqueeze(-1)
    logprobs = log_p.gather(-1, index).squeeze(-1)
    if logprobs.numel() == 0 or logprobs.max() <= -0.25:
        return logprobs
    near_one = logprobs > -0.25
    if near_one.sum() > logprobs.numel() // 4:
        return _at_tokens(_probabilities(logits, temperature), logits, tokens, temperature)
    others = log_p[near_one].exp_().scatter_(-1, index[near_one], 0.0)
    logprobs[near_one] = torch.log1p(-others.sum(-1))
    return logprobs


def _log_probabilities(logits: Tensor, tokens: Tensor, logprobs: Tensor, temperature: float) -> Tensor:
    """log p [..., V], exact at the tokens, finite at p = 0 so that p log p is 0 there and not NaN."""
    log_p = (logits if temperature == 1.0 else logits / temperature).log_softmax(-1)
    log_p.scatter_(-1, tokens.unsqueeze(-1), logprobs.unsqueeze(-1))
    return log_p.clamp_(min=torch.finfo(log_p.dtype).min)


def _entropy(p: Tensor, log_p: Tensor) -> Tensor:
    return -(p * log_p).sum(-1)


def _backward(
    p: Tensor,
    log_p: Tensor | None,
    logprobs: Tensor,
    entropy: Tensor,
    tokens: Tensor,
    grads: tuple[Tensor | None, ...],
    scale: float,
) -> Tensor:
    """scale times the gradient with respect to logits / temperature; an output without gradient is skipped."""
    grad_logprobs, grad_entropy = (None if g is None else g.unsqueeze(-1) * scale for g in grads)
    grad = torch.zeros_like(p) if grad_logprobs is None else p * -grad_logprobs
    if grad_logprobs is not None:
        rest = -torch.expm1(logprobs).unsqueeze(-1)
        grad.scatter_(-1, tokens.unsqueeze(-1), rest * grad_logprobs)
    if grad_entropy is not None and log_p is not None:
        grad -= (log_p + entropy.unsqueeze(-1)).mul_(p).mul_(grad_entropy)
    return grad


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        tokens: Tensor,
        counted: Tensor | None,
        temperature: float,
        want_entropy: bool,
        inplace: bool,
    ) -> tuple[Tensor, Tensor]:
        rows, kept = (logits, tokens) if counted is None else (logits[counted], tokens[counted])
        rows = rows.to(_at_least_float32(logits.dtype))
        p = _probabilities(rows, temperature)
        logprobs = _at_tokens(p, rows, kept, temperature)
        log_p = _log_probabilities(rows, kept, logprobs, temperature) if want_entropy else None
        entropy = logprobs.new_zeros(()) if log_p is None else _entropy(p, log_p)
        ctx.save_for_backward(p, log_p, logprobs, entropy, kept, counted, logits if inplace else None)
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
        p, log_p, kept_logprobs, entropy, kept, counted, logits = ctx.saved_tensors
        grads: tuple[Tensor | None, ...] = (grad_logprobs, grad_entropy)
        if counted is not None:
            grads = tuple(None if g is None else g[counted] for g in grads)
        grad = _backward(p, log_p, kept_logprobs, entropy, kept, grads, 1 / ctx.temperature).to(ctx.dtype)
        if counted is not None:
            rows, grad = grad, grad.new_zeros(ctx.shape)
            grad[counted] = rows
        if logits is not None:
            grad = logits.detach().copy_(grad)
        return grad, None, None, None, None, None


@overload
def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float = ...,
    mask: Tensor | None = ...,
    return_entropy: Literal[False] = ...,
    inplace_backward: bool = ...,
) -> Tensor: ...
@overload
def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float = ...,
    mask: Tensor | None = ...,
    return_entropy: Literal[True],
    inplace_backward: bool = ...,
) -> tuple[Tensor, Tensor]: ...
def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability, in nats, that softmax(logits / temperature) gives each token.

    logits [..., V] and tokens [...] (int64) give logprobs [...]: float64 for float64 logits, float32 for any other
    (bfloat16 and float16 are computed in float32). `logits[..., i, :]` must be the distribution that `tokens[..., i]`
    was drawn from; for a causal model that is `token_logprobs(logits[:, :-1], input_ids[:, 1:])`.

    Rows where mask is False or the token is -100 give 0 and no gradient, whatever their logits hold. Logits of -inf are
    tokens that cannot be drawn. `return_entropy=True` returns (logprobs, entropy), both [...]. Raises ValueError for a
    token outside [0, V). Differentiable once; asking for a second derivative raises. `inplace_backward=True` lets the
    backward write the gradient over the logits (no second [..., V] tensor): they are lost, and it can run once.

    >>> logits = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    >>> token_logprobs(logits, torch.tensor([1, 0]))
    tensor([-0.6931, -0.1269])
    >>> token_logprobs(logits, torch.tensor([1, 0]), mask=torch.tensor([True, False]))
    tensor([-0.6931,  0.0000])
    """
    _check_temperature(temperature)
    counted = _counted_rows(tokens, mask, logits.shape[:-1], logits.shape[-1])
    if counted is None and not return_entropy and not (logits.requires_grad and torch.is_grad_enabled()):
        return _without_gradient(logits.to(_at_least_float32(logits.dtype)), tokens, temperature)
    logprobs, entropy = _TokenLogprobs.apply(logits, tokens, counted, temperature, return_entropy, inplace_backward)
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
            logprobs[rows] = _at_tokens(p, logits, tokens[rows], temperature)
            if want_entropy:
                entropy[rows] = _entropy(p, _log_probabilities(logits, tokens[rows], logprobs[rows], temperature))
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
            logprobs = _at_tokens(p, logits, kept, ctx.temperature)
            log_p = None if grad_entropy is None else _log_probabilities(logits, kept, logprobs, ctx.temperature)
            entropy = logprobs if log_p is None else _entropy(p, log_p)
            grads = tuple(None if g is None else g[rows] for g in (grad_logprobs, grad_entropy))
            grad = _backward(p, log_p, logprobs, entropy, kept, grads, 1 / ctx.temperature)
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
    _check_linear(hidden, weight, chunk_size)
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
