"""The gradient of log-probabilities and entropies with respect to logits: one read of them and one write.

Of a row, forward has left its max, the log of its sum and 1 - p of its token. So p = exp(u - log_sum) with
u = (z - max) / temperature, and with upstream gradients g of the log-probability and h of the entropy H

    d logit = (g ([token] - p) - h p (log p + H)) / temperature = exp(u) (intercept + slope u)    + the token's own

in a few instructions per logit: the row kernel has time for 30 while it reads and writes two bytes each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minirlhf_kernels.checks import IGNORED_TOKEN
from minirlhf_kernels.fused.common import as_rows, cdiv, compute_dtype, from_16_bytes, on_device_of
from minirlhf_kernels.fused.rows import exp, gradient

SHORT, LONG = (1024, 4), (2048, 4)  # lanes of a block and warps of a program: rows up to 1024 logits, and longer
SPAN = 4  # blocks of a program


def configuration(columns: int) -> tuple[int, int]:
    return SHORT if columns <= 1024 else LONG


@triton.jit
def read_token(tokens, mask, row, columns, IGNORED: tl.constexpr, HAS_MASK: tl.constexpr):
    """The row's token, whether the row counts, and whether the token is in the vocabulary (checked when debugging)."""
    token = tl.load(tokens + row)
    counts = token != IGNORED
    if HAS_MASK:
        counts = counts & (tl.load(mask + row) != 0)
    in_vocabulary = (token >= 0) & (token < columns)
    tl.device_assert(in_vocabulary | (counts == 0), "a token that counts is outside the vocabulary")
    return token, counts, in_vocabulary


@triton.jit
def start_of(row, inner, outer_stride, row_stride):
    """Where row [outer, inner] begins, in elements. Divided in int32, which is quick, and multiplied in int64."""
    return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * row_stride


@triton.jit(
    do_not_specialize=[
        "rows", "inner", "columns", "outer_stride", "row_stride", "offset", "grad_outer_stride", "grad_row_stride",
        "grad_offset", "first_column", "vocabulary",
    ],
    do_not_specialize_on_alignment=["tokens", "mask", "entropies", "stats", "grad_logprobs", "grad_entropies"],
)  # fmt: skip
def backward_kernel(
    logits, tokens, mask, entropies, stats, grad_logprobs, grad_entropies, grads,
    rows, inner, columns, outer_stride, row_stride, offset, grad_outer_stride, grad_row_stride, grad_offset,
    first_column, vocabulary, inverse_temperature: tl.float64,
    IGNORED: tl.constexpr, HAS_MASK: tl.constexpr, OF_LOGPROBS: tl.constexpr, OF_ENTROPY: tl.constexpr,
    ALIKE: tl.constexpr, ACC: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """A program per row and SPAN logits. `logits` may hold columns first_column ... of a longer row (the linear op's).

    ALIKE: the rows of `grads` begin between two multiples of 16 bytes where the rows of `logits` do.
    """
    row = tl.program_id(0)
    token, counts, _ = read_token(tokens, mask, row, vocabulary, IGNORED, HAS_MASK)
    row_start = offset + start_of(row, inner, outer_stride, row_stride)
    grad_start = grad_offset + start_of(row, inner, grad_outer_stride, grad_row_stride)
    skew = (row_start % GROUP).to(tl.int32)
    logits += tl.multiple_of(row_start - skew, GROUP)
    grads += tl.multiple_of(grad_start - skew, GROUP) if ALIKE else grad_start - skew

    scale = tl.full((), inverse_temperature, ACC)
    row_max, log_sum = tl.load(stats + row), tl.load(stats + rows + row)
    intercept, slope = scale * 0.0, scale * 0.0
    if OF_LOGPROBS:
        intercept -= tl.load(grad_logprobs + row).to(ACC)
    if OF_ENTROPY:
        slope -= tl.load(grad_entropies + row).to(ACC)
        intercept += slope * (tl.load(entropies + row) - log_sum)
    factor = tl.where(counts, scale * exp(-log_sum), 0.0)
    intercept, slope = tl.where(counts, intercept * factor, 0.0), tl.where(counts, slope * factor, 0.0)

    first, end = tl.program_id(1) * SPAN, skew + columns
    last = tl.minimum(first + SPAN, end)
    whole_first = first + tl.where(skew > first, BLOCK, 0)
    whole = tl.maximum((last - whole_first) // BLOCK * BLOCK, 0)
    for start in range(whole_first, whole_first + whole, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(logits + at, mask=counts, other=float("-inf")).to(ACC)
        tl.store(grads + at, gradient(z, row_max, scale, intercept, slope, OF_ENTROPY))
    # Head and tail, which pay for masks: in pieces, so that they cost the loop above no registers.
    for i in range(first, last - whole, BLOCK // 4):
        start = tl.where(i >= whole_first, i + whole, i)
        at = start + tl.arange(0, BLOCK // 4)
        in_row = (at >= skew) & (at < last)
        z = tl.load(logits + at, mask=in_row & counts, other=float("-inf")).to(ACC)
        tl.store(grads + at, gradient(z, row_max, scale, intercept, slope, OF_ENTROPY), mask=in_row)

    token_at = token - first_column + skew
    if counts & (token_at >= tl.maximum(first, skew)) & (token_at < last):
        grad = scale * 0.0
        if OF_LOGPROBS:
            grad += tl.load(grad_logprobs + row).to(ACC) * tl.load(stats + 2 * rows + row)
        if OF_ENTROPY:
            logprob = tl.load(stats + 3 * rows + row)
            of_entropy = tl.load(grad_entropies + row).to(ACC) * exp(logprob) * (logprob + tl.load(entropies + row))
            grad -= tl.where(logprob == float("-inf"), 0.0, of_entropy)
        tl.debug_barrier()  # after the block's own store, which another thread has done
        tl.store(grads + token_at, grad * scale)


def room_like(x: Tensor) -> Tensor:
    """Room for x's gradient, which begins its rows where x does, also where x is `logits[:, :-1]`: see ALIKE."""
    strides = x.stride()
    in_order = all(a >= b * n for a, b, n in zip(strides[:-1], strides[1:], x.shape[1:], strict=True))
    span = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True))
    if x.numel() and strides[-1] == 1 and in_order and span <= 2 * x.numel():
        _, offset = from_16_bytes(x)
        return torch.empty(offset + span, dtype=x.dtype, device=x.device).as_strided(x.shape, strides, offset)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def launch_backward(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    entropy: Tensor,
    stats: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    out: Tensor | None = None,
    first_column: int = 0,
    vocabulary: int | None = None,
) -> Tensor:
    """The gradient with respect to logits, in their type; into `out` on request."""
    x, inner, outer_stride, row_stride = as_rows(logits)
    out = room_like(x) if out is None else out
    _, _, grad_outer_stride, grad_row_stride = as_rows(out)
    rows, columns = tokens.numel(), logits.shape[-1]
    grads = [None if g is None else g.contiguous() for g in (grad_logprobs, grad_entropy)]
    if rows and columns:
        block, warps = configuration(columns)
        group = 16 // max(x.dtype.itemsize, out.dtype.itemsize)
        (x, offset), (base, grad_offset) = from_16_bytes(x), from_16_bytes(out)
        differences = outer_stride - grad_outer_stride, row_stride - grad_row_stride, offset - grad_offset
        with on_device_of(x):
            backward_kernel[(rows, cdiv(columns + group - 1, SPAN * block))](
                x, tokens.contiguous(), stats if mask is None else mask.contiguous(), entropy, stats,
                *(stats if g is None else g for g in grads), base,
                rows, inner, columns, outer_stride, row_stride, offset, grad_outer_stride, grad_row_stride, grad_offset,
                first_column, columns if vocabulary is None else vocabulary, 1.0 / temperature,
                IGNORED=IGNORED_TOKEN, HAS_MASK=mask is not None,
                OF_LOGPROBS=grads[0] is not None, OF_ENTROPY=grads[1] is not None,
                ALIKE=all(d % group == 0 for d in differences),
                ACC=tl.float64 if compute_dtype(stats) == torch.float64 else tl.float32,
                GROUP=group, BLOCK=block, SPAN=SPAN * block, num_warps=warps,
            )  # fmt: skip
    return out
