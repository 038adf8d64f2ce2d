"""Log-probabilities of tokens, and the entropy of each row, from logits. What is computed of a row is in rows.py."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from minirlhf_kernels.reference.rows import Rows, read, write_gradient

IGNORED_TOKEN = -100
"""A token that never counts (torch's own convention for `cross_entropy`)."""
LEAST_TEMPERATURE = 1e-38  # float32 still holds log2(e) / T


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
        if lowest.item() >= 0 and highest.item() < vocabulary:
            return None
    counted = tokens != IGNORED_TOKEN if mask is None else mask & (tokens != IGNORED_TOKEN)
    outside = counted & ((tokens < 0) | (tokens >= vocabulary))
    if bool(outside.any()):
        bad = tokens[outside][0].item()
        raise ValueError(
            f"token {bad} is outside the vocabulary [0, {vocabulary}): mask the row, or give it {IGNORED_TOKEN}"
        )
    return None if bool(counted.all()) else counted


def _checked_temperature(temperature: float) -> float:
    if not LEAST_TEMPERATURE <= temperature < math.inf:
        raise ValueError(f"temperature must be a finite number of at least {LEAST_TEMPERATURE}, not {temperature}")
    return float(temperature)  # of a tensor: a number, through which no gradient goes


def _refuse_second_derivative() -> None:
    # Only create_graph=True runs a backward with gradients on; torch's once_differentiable would let some cases pass.
    if torch.is_grad_enabled():
        raise RuntimeError("token_logprobs is differentiable once: for a second derivative use logits.log_softmax(-1)")


def _spread(column: Tensor, which: Tensor | None, tokens: Tensor) -> Tensor:
    """A column [N, 1] of the rows that count in the shape of all tokens; the others have 0."""
    if which is None:
        return column.view_as(tokens)
    flat = column.new_zeros(tokens.numel())
    flat[which] = column.squeeze(-1)
    return flat.view_as(tokens)


def _values(rows: Rows, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    entropy = None if rows.entropy is None else _spread(rows.entropy, rows.which, tokens)
    return _spread(rows.logprobs, rows.which, tokens), entropy


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tensor, which: Tensor | None, temperature: float, want_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        rows = read(_flat(logits), tokens.reshape(-1, 1), which, temperature, want_entropy, keep=True)
        kept, rows.kept = rows.kept, None  # one [..., V] tensor waits, where autograd frees it after the backward
        ctx.save_for_backward(logits if kept is None else None, kept, tokens)  # tokens: an error if written over
        ctx.rows, ctx.shape, ctx.dtype = rows, logits.shape, logits.dtype
        ctx.set_materialize_grads(False)
        # Copies: what the caller writes into them must not change what the backward reads.
        logprobs, entropy = _values(rows, tokens)
        return logprobs.clone(), None if entropy is None else entropy.clone()

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        logits, kept, _ = ctx.saved_tensors
        logits, which = None if logits is None else logits.detach(), ctx.rows.which
        grad = torch.empty(ctx.shape, dtype=ctx.dtype, device=ctx.rows.rest.device)
        if which is not None:
            counts = torch.zeros(grad.shape[:-1].numel(), dtype=torch.bool, device=grad.device)
            counts[which] = True
            _flat(grad)[~counts] = 0
        up, up_entropy = (None if g is None else g.reshape(-1, 1) for g in (grad_logprobs, grad_entropy))
        write_gradient(_flat(grad), ctx.rows, None if logits is None else _flat(logits), up, up_entropy, kept)
        return grad, None, None, None, None


def _flat(logits: Tensor) -> Tensor:
    return logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])


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
    token outside [0, V) and for a temperature below 1e-38. Differentiable once; asking for a second derivative raises.

    >>> logits = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    >>> token_logprobs(logits, torch.tensor([1, 0]))
    tensor([-0.6931, -0.1269])
    >>> token_logprobs(logits, torch.tensor([1, 0]), mask=torch.tensor([True, False]))
    tensor([-0.6931,  0.0000])
    """
    temperature = _checked_temperature(temperature)
    counted = _counted_rows(tokens, mask, logits.shape[:-1], logits.shape[-1])
    which = None if counted is None else counted.reshape(-1).nonzero().squeeze(-1)
    if logits.requires_grad and torch.is_grad_enabled():
        logprobs, entropy = _TokenLogprobs.apply(logits, tokens, which, temperature, return_entropy)
    else:
        rows = read(_flat(logits), tokens.reshape(-1, 1), which, temperature, return_entropy, once=True)
        logprobs, entropy = _values(rows, tokens)
    return logprobs if entropy is None else (logprobs, entropy)
