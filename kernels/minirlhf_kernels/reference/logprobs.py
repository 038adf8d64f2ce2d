"""Log-probabilities of tokens, from logits or from hidden states and the head's weight.

With p = softmax(logits / temperature), the log-probability of a token is log p_token, except where p_token is near 1:
there p has rounded most digits away (at a margin of 20 nats, all of them), and

    log p_token = log1p(-rest),      rest = sum over j != token of p_j        (positive terms: no cancellation)

keeps them; so log p is never above 0. Its gradient is 1 - p_token = -expm1(log p_token) at the token, again without
cancellation, and -p_j elsewhere; that of the entropy H = -sum p_j log p_j is -p_j (log p_j + H).

For the backward p is kept, or log p where the entropy is wanted; rows that do not count are never read. The entropy
takes several passes, so its rows are read a few at a time (`_parts`) and stay in a core's own cache in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor

IGNORED_TOKEN = -100
"""A token that never counts (torch's own convention for `cross_entropy`)."""

# Rows of a chunk are chosen so that its logits hold about this many elements (64 MiB of float32).
_CHUNK_ELEMENTS = 1 << 24
# Logits of a part, for each thread: 512 KiB of float32, which a core's own cache holds from one line to the next.
_PART_ELEMENTS = 1 << 17
# Where one pass is all: 16 MiB, which the next part finds still mapped; a block beyond 32 MiB is new pages every time.
_BLOCK_ELEMENTS = 1 << 22


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


def _parts(rows: int, logits: Tensor, entropy: bool) -> Iterator[slice]:
    """Some rows at a time for the entropy, else all; all on a GPU too, where a launch costs more than a cache saves."""
    size = _PART_ELEMENTS * torch.get_num_threads() // max(1, logits.shape[-1])
    return _slices(rows, size if entropy and not logits.is_cuda else rows)


def _slices(rows: int, size: int) -> Iterator[slice]:
    size = max(1, size)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _read_part(
    logits: Tensor, tokens: Tensor, temperature: float, want_entropy: bool, kept: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """log p_token and the entropy [R] of rows [R, V]; p (log p with the entropy) goes to `kept` for the backward."""
    z = logits.to(_at_least_float32(logits.dtype))
    z = z if temperature == 1.0 else z / temperature
    if kept is not None and not want_entropy:
        return _at_tokens(torch.softmax(z, -1, out=kept), z, tokens), None
    log_p = torch.log_softmax(z, -1, out=kept)
    logprobs = _mended(log_p, tokens)
    if not want_entropy:
        return logprobs, None
    log_p.clamp_(min=torch.finfo(log_p.dtype).min)  # finite at p = 0, so that p log p is 0 there and not NaN
    return logprobs, log_p.exp().mul_(log_p).sum(-1).neg_()


def _at_tokens(p: Tensor, z: Tensor, tokens: Tensor) -> Tensor:
    """log p_token [R] of rows p = softmax(z) [R, V], to the last digits."""
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
        logprobs[faint] = z[faint].log_softmax(-1).gather(-1, index[faint]).squeeze(-1)
    return logprobs


def _mended(log_p: Tensor, tokens: Tensor) -> Tensor:
    """log p_token [R] of rows log p [R, V], to the last digits; where p_token is near 1, log_p gets them too."""
    index = tokens.unsqueeze(-1)
    logprobs = log_p.gather(-1, index).squeeze(-1)
    if logprobs.numel() and logprobs.amax().item() > -0.25:
        near_one = logprobs > -0.25
        others = log_p[near_one].exp_().scatter_(-1, index[near_one], 0.0)
        logprobs[near_one] = torch.log1p(-others.sum(-1))
        log_p.scatter_(-1, index, logprobs.unsqueeze(-1))
    return logprobs


def _read(
    logits: Tensor, tokens: Tensor, which: Tensor | None, temperature: float, want_entropy: bool, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """log p_token and the entropy [R] of logits [R, V], for the rows `which` [N]; the others are 0.

    Third comes, with `keep`, what the backward needs: [N, V].
    """
    count = len(logits) if which is None else len(which)
    dtype = _at_least_float32(logits.dtype)
    kept = torch.empty((count, logits.shape[-1]), dtype=dtype, device=logits.device) if keep else None
    logprobs = torch.zeros(len(logits), dtype=dtype, device=logits.device)
    entropy = torch.zeros_like(logprobs) if want_entropy else None
    for part in _parts(count, logits, want_entropy):
        index = part if which is None else which[part]
        saved = None if kept is None else kept[part]
        logprobs[index], h = _read_part(logits[index], tokens[index], temperature, want_entropy, saved)
        if entropy is not None and h is not None:
            entropy[index] = h
    return logprobs, entropy, kept


def _write_gradient(
    out: Tensor,
    kept: Tensor,
    logprobs: Tensor,
    entropy: Tensor | None,
    tokens: Tensor,
    which: Tensor | None,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
) -> None:
    """The gradient into the rows `which` of out [R, V], in out's type; an output without gradient is skipped.

    -p_j (g + (log p_j + H) g_H) / temperature, with (1 - p_token) g in place of -p_token g at the token.
    """
    direct = which is None and out.dtype == kept.dtype
    for part in _parts(len(kept), kept, entropy is not None):
        index = part if which is None else which[part]
        target, token_logprobs = out[part] if direct else None, logprobs[index].unsqueeze(-1)
        up = 0.0 if grad_logprobs is None else (grad_logprobs[index] / temperature).unsqueeze(-1)
        at_token = -torch.expm1(token_logprobs) * up
        if entropy is None:
            grad = torch.mul(kept[part], -up, out=target)
        else:
            grad = torch.exp(kept[part], out=target)
            if grad_entropy is None:
                grad.mul_(-up)
            else:
                h, up_entropy = entropy[index].unsqueeze(-1), (grad_entropy[index] / temperature).unsqueeze(-1)
                grad.mul_((kept[part] + h).mul_(-up_entropy).sub_(up))
                at_token -= token_logprobs.exp() * (token_logprobs + h) * up_entropy
        grad.scatter_(-1, tokens[index].unsqueeze(-1), at_token)
        if not direct:
            out[index] = grad.to(out.dtype)


def _forward_alone(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """log p_token [...] of logits [..., V], for which no gradient and no entropy is wanted."""
    if logits.is_cuda or logits.numel() <= 2 * _BLOCK_ELEMENTS:
        return _read_part(logits, tokens, temperature, False, None)[0]
    rows, flat = logits.reshape(-1, logits.shape[-1]), tokens.reshape(-1)
    parts = _slices(len(rows), _BLOCK_ELEMENTS // logits.shape[-1])
    return torch.cat([_read_part(rows[p], flat[p], temperature, False, None)[0] for p in parts]).view(tokens.shape)


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
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        rows, flat_tokens = logits.reshape(-1, logits.shape[-1]), tokens.reshape(-1)
        which = None if counted is None else counted.reshape(-1).nonzero().squeeze(-1)
        logprobs, entropy, kept = _read(rows, flat_tokens, which, temperature, want_entropy, keep)
        ctx.save_for_backward(kept, logprobs, entropy, flat_tokens, which, logits if inplace else None)
        ctx.temperature, ctx.shape, ctx.dtype = temperature, logits.shape, logits.dtype
        ctx.set_materialize_grads(False)
        shaped = logprobs.new_zeros(()) if entropy is None else entropy.view(tokens.shape)
        return logprobs.view(tokens.shape), shaped

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        kept, logprobs, entropy, tokens, which, logits = ctx.saved_tensors
        up, up_entropy = (None if g is None else g.reshape(-1) for g in (grad_logprobs, grad_entropy))
        inplace = logits is not None and logits.is_contiguous()
        grad = logits.detach() if inplace else torch.empty(ctx.shape, dtype=ctx.dtype, device=kept.device)
        if which is not None:
            grad.zero_()
        out = grad.view(-1, ctx.shape[-1])
        _write_gradient(out, kept, logprobs, entropy, tokens, which, up, up_entropy, ctx.temperature)
        if logits is not None and not inplace:
            grad = logits.detach().copy_(grad)
        return grad, None, None, None, None, None, None


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
    keep = logits.requires_grad and torch.is_grad_enabled()
    if counted is None and not keep and not return_entropy:
        return _forward_alone(logits.detach(), tokens, temperature)
    options = temperature, return_entropy, inplace_backward, keep
    logprobs, entropy = _TokenLogprobs.apply(logits, tokens, counted, *options)
    return (logprobs, entropy) if return_entropy else logprobs


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float, want_entropy: bool, chunk: int,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        dtype = _at_least_float32(torch.promote_types(hidden.dtype, weight.dtype))
        head = weight.to(dtype).t()
        logprobs = torch.empty(len(tokens), dtype=dtype, device=hidden.device)
        entropy = torch.empty_like(logprobs) if want_entropy else None
        kept = None
        for start in range(0, len(tokens), chunk):
            rows = slice(start, start + chunk)
            logits = hidden[rows].to(dtype) @ head
            one = keep and len(tokens) <= chunk  # all rows are one chunk: its log p spares the backward a product
            logprobs[rows], h, kept = _read(logits, tokens[rows], None, temperature, want_entropy, one)
            if entropy is not None and h is not None:
                entropy[rows] = h
        ctx.save_for_backward(hidden, weight, tokens, kept, logprobs, entropy)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)
        return logprobs, logprobs.new_zeros(()) if entropy is None else entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        hidden, weight, tokens, kept, logprobs, entropy = ctx.saved_tensors
        head = weight.to(logprobs.dtype)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Accumulated in float32 (or float64): bfloat16 would lose small terms chunk after chunk.
        grad_weight = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        for start in range(0, len(tokens), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            h = hidden[rows].to(logprobs.dtype)
            log_p = kept
            if kept is None:  # the logits again
                log_p = _read(h @ head.t(), tokens[rows], None, ctx.temperature, entropy is not None, True)[2]
            grad = torch.empty_like(log_p)
            h_rows, up, up_entropy = (None if x is None else x[rows] for x in (entropy, grad_logprobs, grad_entropy))
            _write_gradient(grad, log_p, logprobs[rows], h_rows, tokens[rows], None, up, up_entropy, ctx.temperature)
            if grad_hidden is not None:
                grad_hidden[rows] = (grad @ head).to(hidden.dtype)
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
    the logits again. `chunk_size` counts rows; by default as many as make about sixteen million logits.

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
    keep = torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad)
    both = _LinearTokenLogprobs.apply(rows, weight, kept, temperature, return_entropy, chunk, keep)
    if counted is None:
        logprobs, entropy = (x.view(tokens.shape) if x.dim() else x for x in both)
    else:
        empty = both[0].new_zeros(tokens.shape)
        logprobs, entropy = (empty.masked_scatter(counted, x) if x.dim() else x for x in both)
    return (logprobs, entropy) if return_entropy else logprobs
