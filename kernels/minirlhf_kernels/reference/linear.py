"""The same straight from hidden states and the head's weight, a few rows at a time."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from minirlhf_kernels.reference.logprobs import _check_temperature, _counted_rows, _refuse_second_derivative
from minirlhf_kernels.reference.rows import at_least_float32, read, scratch, write_gradient

# Rows of a chunk are chosen so that its logits hold about this many elements: 64 MiB of float32, or 4 MiB that stay in
# the cache where no backward would have to make them again.
_CHUNK_ELEMENTS, _CACHED_ELEMENTS = 1 << 24, 1 << 20


def _check_linear(hidden: Tensor, weight: Tensor, chunk_size: int | None) -> None:
    if hidden.shape[-1] != weight.shape[-1] or weight.dim() != 2:
        raise ValueError(f"weight must be [V, {hidden.shape[-1]}] for this hidden, not {tuple(weight.shape)}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 row, not {chunk_size}")


def _product(h: Tensor, head: Tensor, out: Tensor | None = None) -> Tensor:
    """h @ head; with an `out`, which autocast leaves alone: forward and backward see the same logits."""
    return torch.mm(h, head, out=h.new_empty(len(h), head.shape[-1]) if out is None else out)


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float, want_entropy: bool, chunk: int,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        dtype = at_least_float32(torch.promote_types(hidden.dtype, weight.dtype))
        head = weight.to(dtype).t()
        logprobs = torch.empty(len(tokens), dtype=dtype, device=hidden.device)
        entropy = torch.empty_like(logprobs) if want_entropy else None
        ctx.chunks, logits = [], None
        for start in range(0, len(tokens), chunk):
            part = slice(start, start + chunk)
            h = hidden[part].to(dtype)
            logits = _product(h, head, None if keep else scratch.room(2, len(h), dtype, head))
            rows = read(logits, tokens[part], None, temperature, want_entropy)
            logprobs[part] = rows.logprobs.squeeze(-1)
            if entropy is not None and rows.entropy is not None:
                entropy[part] = rows.entropy.squeeze(-1)
            if keep:
                ctx.chunks.append(rows)
        # Where all rows are one chunk, its logits spare the backward a product.
        ctx.save_for_backward(hidden, weight, logits if keep and len(tokens) <= chunk else None)
        ctx.chunk = chunk
        ctx.set_materialize_grads(False)
        return logprobs, logprobs.new_zeros(()) if entropy is None else entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        hidden, weight, kept = ctx.saved_tensors
        head = weight.to(at_least_float32(torch.promote_types(hidden.dtype, weight.dtype)))
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Accumulated in float32 (or float64): bfloat16 would lose small terms chunk after chunk.
        grad_weight = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        for number, rows in enumerate(ctx.chunks):
            part = slice(number * ctx.chunk, (number + 1) * ctx.chunk)
            h = hidden[part].to(head.dtype)
            logits = _product(h, head.t()) if kept is None else kept
            grad = logits if kept is None else torch.empty_like(logits)
            up, up_entropy = (None if g is None else g[part] for g in (grad_logprobs, grad_entropy))
            write_gradient(grad, rows, logits, up, up_entropy)
            if grad_hidden is not None:
                grad_hidden[part] = _product(grad, head).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight.addmm_(grad.t(), h)
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


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
    as `token_logprobs` does, with the same masks and the same errors. Of several chunks the backward computes
    the logits again. `chunk_size` counts rows; by default as many as make about sixteen million logits (one
    million on a CPU without a gradient), but at least 64.

    >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 5.0], [0.0, 7.0]])
    >>> linear_token_logprobs(hidden, weight, torch.tensor([0]))
    tensor([-0.1269])
    """
    _check_temperature(temperature)
    _check_linear(hidden, weight, chunk_size)
    counted = _counted_rows(tokens, mask, hidden.shape[:-1], weight.shape[0])
    # Only the rows that count go through the head.
    if counted is None:
        rows, kept = hidden.reshape(-1, hidden.shape[-1]), tokens.reshape(-1)
    else:
        rows, kept = hidden[counted], tokens[counted]
    keep = torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad)
    elements = _CACHED_ELEMENTS if weight.is_cpu and not keep else _CHUNK_ELEMENTS
    chunk = chunk_size or max(64, elements // weight.shape[0])
    both = _LinearTokenLogprobs.apply(rows, weight, kept, temperature, return_entropy, chunk, keep)
    if counted is None:
        logprobs, entropy = (x.view(tokens.shape) if x.dim() else x for x in both)
    else:
        empty = both[0].new_zeros(tokens.shape)
        logprobs, entropy = (empty.masked_scatter(counted, x) if x.dim() else x for x in both)
    return (logprobs, entropy) if return_entropy else logprobs
