"""Log-probabilities of tokens and the entropy of each row: one read forward; one read and one write backward.

Forward, a program reads a row once, block after block, each thread 16 bytes at a time: a group. Every thread keeps
sums (rows.py) for the groups that it reads, and the threads combine them only at the end of the row: the loop has no
barrier. In the time that two bytes take from memory, some fifteen instructions fit, so it has few, about ten per logit:
it skips the block that has the token, and the row's ends, which are read with masks afterwards. A row whose entropy
would lose its digits (another logit leads by far) is read a second time, with the leaders summed separately.

Backward, a program recomputes p from a few blocks of logits: the logits are the only [rows, V] tensor kept in between.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minirlhf_kernels.fused.common import as_rows, compute_dtype, from_16_bytes, on_device_of, refuse_second_derivative
from minirlhf_kernels.fused.rows import CLOSE, LOG2E, LOWEST, LOWEST64, exp, finish, fold, fold_apart, gradient, join
from minirlhf_kernels.reference import IGNORED_TOKEN, _check_tokens, _checked_temperature, _counted_rows

# Lanes of a block and warps of a program, for rows up to 1024 logits and for longer ones. Two variants, for any V.
SHORT, LONG = (1024, 4), (2048, 4)
SPAN = 4  # blocks per program in backward
# Otherwise Triton would recompile for a new divisibility of these, and for 1.
RUN_TIME = ["rows", "inner", "columns", "outer_stride", "row_stride", "offset"]
GRAD_RUN_TIME = [*RUN_TIME, "grad_outer_stride", "grad_row_stride", "grad_offset", "first_column", "vocabulary"]


def configuration(columns: int) -> tuple[int, int]:
    return SHORT if columns <= 1024 else LONG


@triton.jit
def store_row(
    logprobs, entropies, stats, row, rows, counts, logprob, entropy, top, log_sum, complement,
    WANT_ENTROPY: tl.constexpr,
):  # fmt: skip
    """Store a row's results and what its backward needs; 0 if the row does not count."""
    logprob = tl.where(counts, logprob, 0.0)
    tl.store(logprobs + row, logprob)
    if WANT_ENTROPY:
        tl.store(entropies + row, tl.where(counts, entropy, 0.0))
    tl.store(stats + row, tl.where(counts, top, 0.0))
    tl.store(stats + rows + row, tl.where(counts, log_sum, 0.0))
    tl.store(stats + 2 * rows + row, tl.where(counts, complement, 0.0))
    tl.store(stats + 3 * rows + row, logprob)


@triton.jit
def read_token(tokens, mask, row, columns, IGNORED: tl.constexpr, HAS_MASK: tl.constexpr):
    """The row's token, whether the row counts, and whether the token is in the vocabulary (checked when debugging)."""
    token = tl.load(tokens + row)
    counts = token != IGNORED
    if HAS_MASK:
        counts = counts & (tl.load(mask + row) != 0)
    inside = (token >= 0) & (token < columns)
    tl.device_assert(inside | (counts == 0), "a token that counts is outside the vocabulary")
    return token, counts, inside


@triton.jit
def start_of(row, inner, outer_stride, row_stride):
    """Where row [outer, inner] starts, in elements. It divides in int32, which is fast, and multiplies in int64."""
    return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * row_stride


@triton.jit
def others(logits, start, skew, end, own, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Lanes start ... of a row that fills skew ... end; -inf outside the row, and at its token."""
    at = start + tl.arange(0, BLOCK)
    z = tl.load(logits + at, mask=(at >= skew) & (at < end), other=float("-inf")).to(ACC)
    return tl.where(at == own, float("-inf"), z)


@triton.jit
def read_others(
    logits, skew, end, own, bits, WANT_ENTROPY: tl.constexpr, ACC: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums (`join` of rows.py) of a row that fills skew ... end, without its token. Its loop has no barrier."""
    lanes = tl.arange(0, BLOCK)
    first, whole = tl.where(skew > 0, BLOCK, 0), end - end % BLOCK
    aside = own // BLOCK * BLOCK
    steps_over = (aside >= first) & (aside < whole)
    lowest = LOWEST64 if ACC == tl.float64 else LOWEST  # noqa: SIM300 (ACC is the variable)
    peaks = tl.full((BLOCK // GROUP,), lowest, ACC)
    totals, slopes = tl.zeros((BLOCK // GROUP,), ACC), tl.zeros((BLOCK // GROUP,), ACC)
    for i in range(first, tl.where(steps_over, whole - BLOCK, whole), BLOCK):
        start = tl.where(steps_over & (i >= aside), i + BLOCK, i)
        z = tl.load(logits + start + lanes).to(ACC)  # half precision ends here
        z = tl.reshape(z, (BLOCK // GROUP, GROUP))
        peaks, totals, slopes = fold(z, bits, peaks, totals, slopes, WANT_ENTROPY)
    if steps_over:
        z = tl.load(logits + aside + lanes).to(ACC)
        z = tl.where(lanes == own - aside, float("-inf"), z)
        z = tl.reshape(z, (BLOCK // GROUP, GROUP))
        peaks, totals, slopes = fold(z, bits, peaks, totals, slopes, WANT_ENTROPY)
    # Only the head of a row that starts between two multiples, and the tail, need a mask.
    for start in range(tl.where(skew > 0, 0, whole), end, tl.maximum(whole, BLOCK)):
        z = tl.reshape(others(logits, start, skew, end, own, ACC, BLOCK), (BLOCK // GROUP, GROUP))
        peaks, totals, slopes = fold(z, bits, peaks, totals, slopes, WANT_ENTROPY)
    return join(bits, peaks, totals, slopes)


@triton.jit
def read_apart(logits, skew, end, own, scale, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """The same with the leaders separate. It is rarely used: no registers are spent on its speed."""
    peak, each = tl.full((), float("-inf"), ACC), tl.zeros((BLOCK,), ACC)
    below, products = each, each
    for start in range(0, end, BLOCK):
        z = others(logits, start, skew, end, own, ACC, BLOCK)
        peak, each, below, products = fold_apart(z, scale, peak, each, below, products)
    return peak, tl.sum(each, 0), tl.sum(below, 0), tl.sum(products, 0)


@triton.jit
def read_row(
    logits, skew, end, own, z_token, scale, bits, WANT_ENTROPY: tl.constexpr, ACC: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """peak, leaders, rest and slope of a row without its token, read a second time if the entropy needs it."""
    peak, total, slope = read_others(logits, skew, end, own, bits, WANT_ENTROPY, ACC, GROUP, BLOCK)
    leaders, rest = tl.minimum(total, 1.0), tl.maximum(total - 1.0, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if WANT_ENTROPY:  # noqa: SIM102 (known when the kernel is compiled)
        if ((z_token > peak) == 0) & (rest < CLOSE):  # if the token leads, the others are summed relative to it
            peak, leaders, rest, slope = read_apart(logits, skew, end, own, scale, ACC, BLOCK // 4)
    return peak, leaders, rest, slope


@triton.jit(do_not_specialize=RUN_TIME)
def forward_kernel(
    logits, tokens, mask, logprobs, entropies, stats,
    rows, inner, columns, outer_stride, row_stride, offset, per_temperature: tl.float64,
    IGNORED: tl.constexpr, HAS_MASK: tl.constexpr, WANT_ENTROPY: tl.constexpr,
    ACC: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row, on grid x. Offsets are int64: 8 x 4096 tokens with a vocabulary of 150k exceed 2^31."""
    row = tl.program_id(0)
    token, counts, inside = read_token(tokens, mask, row, columns, IGNORED, HAS_MASK)
    start_of_row = offset + start_of(row, inner, outer_stride, row_stride)
    # Blocks start at multiples of 16 bytes even if the row doesn't; else 50257 logits would be read one by one.
    skew = (start_of_row % GROUP).to(tl.int32)
    row_logits = logits + tl.multiple_of(start_of_row - skew, GROUP)
    scale, bits = tl.full((), per_temperature, ACC), tl.full((), per_temperature * LOG2E, ACC)

    # A row that does not count has no columns here: nothing of it is read.
    end = tl.where(counts, skew + columns, 0)
    own = tl.where(inside, skew + token, -1).to(tl.int32)
    # A token outside the vocabulary gets NaN instead of a logit: nothing is read, and its row becomes NaN.
    z_token = tl.load(row_logits + own, mask=counts & inside, other=float("nan")).to(ACC)
    peak, leaders, rest, slope = read_row(
        row_logits, skew, end, own, z_token, scale, bits, WANT_ENTROPY, ACC, GROUP, BLOCK
    )
    logprob, entropy, top, log_sum, complement = finish(z_token, scale, peak, leaders, rest, slope)
    store_row(
        logprobs, entropies, stats, row, rows, counts, logprob, entropy, top, log_sum, complement, WANT_ENTROPY
    )  # fmt: skip


@triton.jit(do_not_specialize=GRAD_RUN_TIME)
def backward_kernel(
    logits, tokens, mask, entropies, stats, grad_logprobs, grad_entropies, grads,
    rows, inner, columns, outer_stride, row_stride, offset, grad_outer_stride, grad_row_stride, grad_offset,
    first_column, vocabulary, per_temperature: tl.float64,
    IGNORED: tl.constexpr, HAS_MASK: tl.constexpr, OF_LOGPROBS: tl.constexpr, OF_ENTROPY: tl.constexpr,
    ALIKE: tl.constexpr, ACC: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """One program per few blocks of a row: p from its logits, then (1 - p at the token, -p elsewhere) / temperature.

    The entropy adds -p (log p + H) / temperature: in total p times a linear function of log p. `logits` may hold
    columns first_column ... of a longer row (the linear op's slabs). ALIKE: rows of grads and of logits start at the
    same offset from a multiple of 16 bytes.
    """
    row = tl.program_id(0)
    token, counts, _ = read_token(tokens, mask, row, vocabulary, IGNORED, HAS_MASK)
    logits_at = offset + start_of(row, inner, outer_stride, row_stride)
    grads_at = grad_offset + start_of(row, inner, grad_outer_stride, grad_row_stride)
    skew = (logits_at % GROUP).to(tl.int32)
    logits += tl.multiple_of(logits_at - skew, GROUP)
    grads += tl.multiple_of(grads_at - skew, GROUP) if ALIKE else grads_at - skew

    scale = tl.full((), per_temperature, ACC)
    top, log_sum = tl.load(stats + row), tl.load(stats + rows + row)
    # With u = (z - top) / temperature, log p = u - log_sum, the gradient is exp(u) (level + slope u).
    level, slope = scale * 0.0, scale * 0.0
    if OF_LOGPROBS:
        level -= tl.load(grad_logprobs + row).to(ACC)
    if OF_ENTROPY:
        slope -= tl.load(grad_entropies + row).to(ACC)
        level += slope * (tl.load(entropies + row) - log_sum)
    outer = tl.where(counts, scale * exp(-log_sum), 0.0)
    level, slope = tl.where(counts, level * outer, 0.0), tl.where(counts, slope * outer, 0.0)
    first, end = tl.program_id(1) * SPAN, skew + columns
    last = tl.minimum(first + SPAN, end)
    low = first + tl.where(skew > first, BLOCK, 0)
    whole = tl.maximum((last - low) // BLOCK * BLOCK, 0)
    for start in range(low, low + whole, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(logits + at, mask=counts, other=float("-inf")).to(ACC)
        tl.store(grads + at, gradient(z, top, scale, level, slope, OF_ENTROPY))
    # Head and tail need masks: in smaller pieces, so that they cost the loop above no registers.
    for i in range(first, last - whole, BLOCK // 4):
        start = tl.where(i >= low, i + whole, i)
        at = start + tl.arange(0, BLOCK // 4)
        inside = (at >= skew) & (at < last)
        z = tl.load(logits + at, mask=inside & counts, other=float("-inf")).to(ACC)
        tl.store(grads + at, gradient(z, top, scale, level, slope, OF_ENTROPY), mask=inside)

    own = token - first_column + skew
    if counts & (own >= tl.maximum(first, skew)) & (own < last):
        at_token = scale * 0.0
        if OF_LOGPROBS:
            at_token += tl.load(grad_logprobs + row).to(ACC) * tl.load(stats + 2 * rows + row)
        if OF_ENTROPY:
            logprob = tl.load(stats + 3 * rows + row)
            of_entropy = tl.load(grad_entropies + row).to(ACC) * exp(logprob) * (logprob + tl.load(entropies + row))
            at_token -= tl.where(logprob == float("-inf"), 0.0, of_entropy)
        tl.debug_barrier()  # after the store of the block, which another thread did
        tl.store(grads + own, at_token * scale)


def room_like(x: Tensor) -> Tensor:
    """Memory for x's gradient, with rows aligned as in x, even if x is `logits[:, :-1]`: see ALIKE."""
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
    """The gradient with respect to logits, in their type; written into `out` if given."""
    x, inner, outer_stride, row_stride = as_rows(logits)
    out = room_like(x) if out is None else out
    _, _, grad_outer_stride, grad_row_stride = as_rows(out)
    rows, columns = tokens.numel(), logits.shape[-1]
    ups = [None if g is None else g.contiguous() for g in (grad_logprobs, grad_entropy)]
    if rows and columns:
        block, warps = configuration(columns)
        group = 16 // max(x.dtype.itemsize, out.dtype.itemsize)
        (x, offset), (base, grad_offset) = from_16_bytes(x), from_16_bytes(out)
        differ = outer_stride - grad_outer_stride, row_stride - grad_row_stride, offset - grad_offset
        with on_device_of(x):
            backward_kernel[(rows, triton.cdiv(columns + group - 1, SPAN * block))](
                x, tokens.contiguous(), stats if mask is None else mask.contiguous(), entropy, stats,
                *(stats if g is None else g for g in ups), base,
                rows, inner, columns, outer_stride, row_stride, offset, grad_outer_stride, grad_row_stride, grad_offset,
                first_column, columns if vocabulary is None else vocabulary, 1.0 / temperature,
                IGNORED=IGNORED_TOKEN, HAS_MASK=mask is not None,
                OF_LOGPROBS=ups[0] is not None, OF_ENTROPY=ups[1] is not None,
                ALIKE=all(d % group == 0 for d in differ),
                ACC=tl.float64 if compute_dtype(stats) == torch.float64 else tl.float32,
                GROUP=group, BLOCK=block, SPAN=SPAN * block, num_warps=warps,
            )  # fmt: skip
    return out


def launch_forward(
    logits: Tensor, tokens: Tensor, mask: Tensor | None, temperature: float, want_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities and entropy in tokens' shape (empty unless wanted), and the rows' stats [4, rows]."""
    if not tokens.is_cuda:
        _counted_rows(tokens, mask, logits.shape[-1])  # on the CPU, checking costs no sync
    dtype = compute_dtype(logits)
    logprobs = torch.empty(tokens.shape, dtype=dtype, device=logits.device)
    entropy = torch.empty(tokens.shape if want_entropy else (0,), dtype=dtype, device=logits.device)
    rows, columns = tokens.numel(), logits.shape[-1]
    stats = torch.empty((4, rows), dtype=dtype, device=logits.device)
    x, inner, outer_stride, row_stride = as_rows(logits)
    if rows:
        block, warps = configuration(columns)
        x, offset = from_16_bytes(x)
        with on_device_of(x):
            forward_kernel[(rows,)](
                x, tokens.contiguous(), stats if mask is None else mask.contiguous(), logprobs, entropy, stats,
                rows, inner, columns, outer_stride, row_stride, offset, 1.0 / temperature,
                IGNORED=IGNORED_TOKEN, HAS_MASK=mask is not None, WANT_ENTROPY=want_entropy,
                ACC=tl.float64 if dtype == torch.float64 else tl.float32,
                GROUP=16 // x.dtype.itemsize, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return logprobs, entropy, stats


# Eager calls go straight to the launchers through a plain autograd.Function; a compiled graph sees two opaque
# operators. Both save the same tensors and share the backward.


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, tokens, mask, temperature, _ = inputs
    _, entropy, stats = output
    ctx.save_for_backward(logits, tokens, mask, entropy, stats)
    ctx.temperature = temperature
    ctx.set_materialize_grads(False)


class TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = launch_forward(*inputs)
        setup_context(ctx, inputs, output)
        ctx.mark_non_differentiable(output[2])
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("token_logprobs")
        logits, tokens, mask, entropy, stats = ctx.saved_tensors
        grad = launch_backward(logits, tokens, mask, entropy, stats, grads[0], grads[1], ctx.temperature)
        return grad, None, None, None, None


@torch.library.custom_op("minirlhf::token_logprobs_backward", mutates_args=())
def backward_op(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    entropy: Tensor,
    stats: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
) -> Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    return launch_backward(logits, tokens, mask, entropy, stats, grad_logprobs, grad_entropy, temperature, out=out)


@backward_op.register_fake
def _(logits: Tensor, *others: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


forward_op = torch.library.custom_op("minirlhf::token_logprobs", launch_forward, mutates_args=())


@forward_op.register_fake
def _(
    logits: Tensor, tokens: Tensor, mask: Tensor | None, temperature: float, want_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    new = functools.partial(torch.empty, dtype=compute_dtype(logits), device=logits.device)
    return new(tokens.shape), new(tokens.shape if want_entropy else (0,)), new((4, tokens.numel()))


def _backward_of_op(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_entropy = grads[1] if ctx.saved_tensors[3].numel() else None
    grad = backward_op(*ctx.saved_tensors, grads[0], grad_entropy, ctx.temperature)
    return grad, None, None, None, None


forward_op.register_autograd(_backward_of_op, setup_context=setup_context)


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`reference.token_logprobs` in two kernels. On CUDA a token outside [0, V) makes its row NaN (no host sync)."""
    temperature = _checked_temperature(temperature)
    _check_tokens(tokens, mask, logits.shape[:-1])
    call = forward_op if torch.compiler.is_compiling() else TokenLogprobs.apply
    logprobs, entropy, _ = call(logits, tokens, mask, temperature, return_entropy)
    return (logprobs, entropy) if return_entropy else logprobs
