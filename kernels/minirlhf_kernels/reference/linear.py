"""The same straight from hidden states and the head's weight, a few rows at a time."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from minirlhf_kernels.reference.logprobs import (
    _checked_temperature,
    _counted_rows,
    _flat,
    _refuse_second_derivative,
    _spread,
)
from minirlhf_kernels.reference.rows import (
    BASE_2,
    COLD,
    KEPT,
    Rows,
    _split,
    at_least_float32,
    read,
    scratch,
    write_gradient,
)

# Rows of a chunk are chosen so that its logits hold about this many elements: 64 MiB of float32, or, where no backward
# would have to make them again, 4 MiB for each thread, which stay in the cache.
_CHUNK_ELEMENTS, _CACHED_ELEMENTS = 1 << 24, 1 << 20


def _check_linear(hidden: Tensor, weight: Tensor, chunk_size: int | None) -> None:
    if hidden.shape[-1] != weight.shape[-1] or weight.dim() != 2:
        raise ValueError(f"weight must be [V, {hidden.shape[-1]}] for this hidden, not {tuple(weight.shape)}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 row, not {chunk_size}")


def _product(h: Tensor, head: Tensor, out: Tensor | None = None) -> Tensor:
    """h @ head; with an `out`, which autocast leaves alone: forward and backward see the same logits."""
    return torch.mm(h, head, out=h.new_empty(len(h), head.shape[-1]) if out is None else out)


def _scale(dtype: torch.dtype, temperature: float) -> tuple[float, float]:
    """What hidden is multiplied by, so that no pass over the logits has to, and the temperature that is left for them.

    Not half precision, whose products float32 holds exactly; nor what of a temperature is below COLD, lest logits of
    an ordinary size overflow.
    """
    if dtype.itemsize == 2:
        return 1.0, temperature
    if temperature >= COLD:
        return BASE_2 / temperature, BASE_2
    return BASE_2 / COLD, BASE_2 * (temperature / COLD)


def _read(
    hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float, want_entropy: bool, chunk: int, learns: bool
) -> tuple[list[Rows], Tensor | None]:
    """What was read of each chunk, and the logits of an only one if its backward will need them."""
    dtype = at_least_float32(torch.promote_types(hidden.dtype, weight.dtype))
    head, scale, unit = weight.to(dtype).t(), *_scale(hidden.dtype, temperature)
    chunks, logits = [], None
    keep = learns and len(tokens) <= chunk
    for some, at in zip(_split(hidden, chunk), _split(tokens, chunk), strict=True):
        h = some.to(dtype) * scale
        logits = _product(h, head, None if keep and want_entropy else scratch.room(2, len(h), dtype, head))
        # A backward would make all of a chunk's logits again, and they may differ in their last digit from a few rows'.
        again = None if learns or want_entropy else lambda few, h=h: _product(h.index_select(0, few), head)
        chunks.append(read(logits, at, None, unit, want_entropy, keep=keep, again=again))
    return chunks, logits if keep and want_entropy else None


def _columns(chunks: list[Rows]) -> tuple[Tensor, Tensor | None]:
    entropy = [rows.entropy for rows in chunks if rows.entropy is not None]
    return _column([rows.logprobs for rows in chunks]), _column(entropy) if entropy else None


def _column(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float, want_entropy: bool, chunk: int
    ) -> tuple[Tensor, Tensor | None]:
        # Where all rows are one chunk, what is kept of its logits spares the backward a product.
        ctx.chunks, logits = _read(hidden, weight, tokens, temperature, want_entropy, chunk, learns=True)
        kept, ctx.chunks[0].kept = ctx.chunks[0].kept, None
        ctx.save_for_backward(hidden, weight, logits, kept, tokens)  # tokens: an error if they are written over
        ctx.chunk, ctx.scale = chunk, _scale(hidden.dtype, temperature)[0]
        ctx.set_materialize_grads(False)
        # Copies: what the caller writes into them must not change what the backward reads.
        logprobs, entropy = _columns(ctx.chunks)
        return logprobs.clone(), None if entropy is None else entropy.clone()

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        hidden, weight, logits, kept, _ = ctx.saved_tensors
        head = weight.to(at_least_float32(torch.promote_types(hidden.dtype, weight.dtype)))
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Accumulated in float32 (or float64): bfloat16 would lose small terms chunk after chunk.
        grad_weight = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        for number, rows in enumerate(ctx.chunks):
            part = slice(number * ctx.chunk, (number + 1) * ctx.chunk)
            h = hidden[part].to(head.dtype) * ctx.scale
            if logits is None and kept is None:
                grad = z = _product(h, head.t())
            else:
                grad, z = h.new_empty(len(h), len(head)), logits
            up, up_entropy = (None if g is None else g[part] for g in (grad_logprobs, grad_entropy))
            write_gradient(grad, rows, z, up, up_entropy, kept)
            if grad_hidden is not None:
                grad_hidden[part] = _product(grad, head).mul_(ctx.scale).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight.addmm_(grad.t(), h)
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None


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
    the logits again. `chunk_size` counts rows; by default as many as make about sixteen million logits (on a CPU
    without a gradient one million for each thread, four at most), but at least 64.

    >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 5.0], [0.0, 7.0]])
    >>> linear_token_logprobs(hidden, weight, torch.tensor([0]))
    tensor([-0.1269])
    """
    temperature = _checked_temperature(temperature)
    _check_linear(hidden, weight, chunk_size)
    counted = _counted_rows(tokens, mask, hidden.shape[:-1], weight.shape[0])
    # Only the rows that count go through the head.
    if counted is None:
        hidden, kept = _flat(hidden), tokens.reshape(-1, 1)
    else:
        hidden, kept = hidden[counted], tokens[counted].unsqueeze(-1)
    learns = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    cached = min(_CACHED_ELEMENTS * torch.get_num_threads(), KEPT)
    elements = cached if weight.is_cpu and not learns else _CHUNK_ELEMENTS
    chunk = chunk_size or max(64, elements // weight.shape[0])
    logprobs: Tensor
    entropy: Tensor | None
    if learns:
        logprobs, entropy = _LinearTokenLogprobs.apply(hidden, weight, kept, temperature, return_entropy, chunk)
    else:
        chunks, _ = _read(hidden, weight, kept, temperature, return_entropy, chunk, learns=False)
        logprobs, entropy = _columns(chunks)
    which = None if counted is None else counted.reshape(-1).nonzero().squeeze(-1)
    logprobs = _spread(logprobs, which, tokens)
    entropy = None if entropy is None else _spread(entropy, which, tokens)
    return logprobs if entropy is None else (logprobs, entropy)
