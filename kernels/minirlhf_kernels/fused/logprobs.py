"""Log-probabilities of tokens and the entropy of each row: one read forward; one read and one write backward.

A row of logits z is read once, block after block, each thread 16 bytes at a time: a group. Its token is set aside; of
all the OTHERS three numbers are kept, by every thread for the groups that it reads:

    peak      the highest logit so far
    total     sum of 2^w, w = (z - peak) log2(e) / temperature
    slope     sum of 2^w w                                          what the entropy needs

Where a group holds a higher peak, the old sums fade by 2^((old - new) log2(e) / temperature). Threads meet at the end
of the row, not before: the loop has no barrier. What it costs is instructions, so it has few: about ten a logit.

Why it is stable. Only differences of logits are ever scaled or exponentiated: adding 1000 to a row changes nothing.
No power is above 1. A peak begins at the lowest finite number, so that -inf - peak is -inf and never NaN.
The token is compared with the others, never subtracted from a sum that holds it:

    the token leads     log p = -log1p(odds),   odds = sum of the others / token        1 - p = odds / (1 + odds)
    another one leads   log p = u_token - log(leaders) - log1p((rest + exp(u_token)) / leaders)

with u = (z - peak) / temperature, `leaders` others at the peak and `rest` the sum of all below it. Both are sums of
terms of one sign: no cancellation, and never above 0. At a margin of 20 nats, where 1 - p is lost in float32 and
log_softmax gives 0, log p and its gradient keep all their digits. So does the entropy, with one detour: where another
logit leads by far, 1 + rest has lost the digits of rest, and the row is read again, with the leaders counted apart.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minirlhf_kernels.fused.common import as_rows, compute_dtype, on_device_of
from minirlhf_kernels.reference.logprobs import (
    IGNORED_TOKEN,
    _check_temperature,
    _check_tokens,
    _counted_rows,
    _refuse_second_derivative,
)

# Lanes of a block and warps of a program, for rows up to 1024 logits and for longer ones. Two variants, for any V.
SHORT, LONG = (1024, 4), (2048, 4)
SPAN = 4  # blocks of a program in backward
# Triton would compile again for a new divisibility of these, and for 1.
RUN_TIME = ["rows", "inner", "columns", "outer_stride", "row_stride"]

LN2, LOG2E = tl.constexpr(0.6931471805599453), tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32's finite numbers
NEVER = tl.constexpr(-1500.0)  # 2 to this power is 0 in float64 too
CLOSE = tl.constexpr(0.03)  # in a sum of 1 + this the rest keeps too few digits


def configuration(columns: int) -> tuple[int, int]:
    return SHORT if columns <= 1024 else LONG


@triton.jit
def log1p(y):
    """log(1 + y) for y >= 0, with all the digits of a y that 1 + y would round away: 2 atanh(y / (2 + y))."""
    s = y / (2.0 + y)
    q = s * s
    series = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))))))
    return tl.where(y < 0.25, 2.0 * s * series, tl.log(1.0 + y))


@triton.jit
def exp(x):
    """exp(x), x <= 0, to the last digit: 2^k exp(x - k ln 2). The hardware's is off by |x| / 2^24, 1e-6 at 20 nats."""
    x = tl.maximum(x, -1000.0, propagate_nan=tl.PropagateNan.ALL)
    k = (x * LOG2E + 12582912.0) - 12582912.0  # 1.5 2^23: no float32 near it has a fraction
    left = (x - k * 0.693359375) + k * 2.121944400546905827679e-4  # ln 2 in two parts, k times the first is exact
    return tl.exp2(k) * tl.exp2(left * LOG2E)


@triton.jit
def fold(z, bits, peak, total, slope, WANT_ENTROPY: tl.constexpr):
    """A block z [groups, GROUP] of logits (-inf where none counts) into each group's own sums [groups]."""
    higher = tl.maximum(peak, tl.max(z, 1))
    step = tl.maximum((peak - higher) * bits, NEVER)
    w = (z - higher[:, None]) * bits
    if WANT_ENTROPY:
        w = tl.maximum(w, NEVER, propagate_nan=tl.PropagateNan.ALL)  # -inf * 2^-inf is NaN
    e = tl.exp2(w)
    fade = tl.exp2(step)
    total *= fade
    if WANT_ENTROPY:
        slope = slope * fade + step * total + tl.sum(e * w, 1)
    return higher, total + tl.sum(e, 1), slope


@triton.jit
def join(bits, peaks, totals, slopes):
    """The groups' sums as the row's: peak (-inf where nothing counts), total, and slope in nats."""
    peak = tl.max(peaks, 0)
    step = tl.maximum((peaks - peak) * bits, NEVER, propagate_nan=tl.PropagateNan.ALL)
    fade = tl.exp2(step)
    total = tl.sum(totals * fade, 0)
    slope = tl.sum(fade * (slopes + step * totals), 0) * LN2
    return tl.where(total == 0.0, float("-inf"), peak), total, slope


@triton.jit
def fold_apart(z, scale, peak, leaders, rest, slope):
    """A block z of logits into lanes of sums, of which the leaders are counted apart; in nats, to the last digit."""
    higher = tl.maximum(peak, tl.max(z, 0))
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    step = tl.where(peak == float("-inf"), 0.0, (peak - shift) * scale)
    fade = exp(step)
    old = leaders + rest
    slope = fade * (slope + step * old)
    rest = tl.where(higher > peak, fade * old, rest)
    leaders = tl.where(higher > peak, 0.0, leaders)
    u = (z - shift) * scale
    e = exp(u)
    leads = tl.where(z == shift, 1.0, 0.0)
    rest += e - leads  # exactly 0 for a leader
    slope += tl.where(e > 0.0, e * u, 0.0)  # 0 * -inf is NaN
    return higher, leaders + leads, rest, slope


@triton.jit
def finish(z_token, scale, peak, leaders, rest, slope):
    """log p, entropy, the row's highest logit, log of the sum below it, and 1 - p, from the sums of the others."""
    total = leaders + rest
    x = (z_token - tl.where(peak == float("-inf"), 0.0, peak)) * scale
    token_leads = z_token > peak
    # The token leads: every other one is measured from it.
    fade = tl.where(total > 0.0, exp(-tl.where(token_leads, x, 0.0)), 0.0)
    odds = total * fade
    log_odds = log1p(odds)
    spread = (fade * (tl.where(token_leads, x, 0.0) * total - slope)) / (1.0 + odds)
    # Another one leads.
    own = exp(tl.where(token_leads, 0.0, x))
    log_sum = tl.log(leaders) + log1p((rest + own) / leaders)
    slope += tl.where(own > 0.0, own * x, 0.0)
    logprob = tl.where(token_leads, 0.0 - log_odds, x - log_sum)
    entropy = tl.where(token_leads, log_odds + spread, log_sum - slope / (total + own))
    complement = tl.where(token_leads, odds / (1.0 + odds), total / (total + own))
    return logprob, entropy, tl.maximum(z_token, peak), tl.where(token_leads, log_odds, log_sum), complement


@triton.jit
def store_row(
    logprobs, entropies, stats, row, rows, counts, logprob, entropy, top, log_sum, complement,
    WANT_ENTROPY: tl.constexpr,
):  # fmt: skip
    """A row's results, and what its backward starts from; 0 where the row does not count."""
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
    """Where row [outer, inner] begins, in elements. Divided in int32, which is quick, and multiplied in int64."""
    return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * row_stride


@triton.jit
def others(logits, start, skew, end, own, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Lanes start ... of a row that fills skew ... end; -inf in place of what is outside it, and of its token."""
    at = start + tl.arange(0, BLOCK)
    z = tl.load(logits + at, mask=(at >= skew) & (at < end), other=float("-inf")).to(ACC)
    return tl.where(at == own, float("-inf"), z)


@triton.jit(do_not_specialize=RUN_TIME)
def forward_kernel(
    logits, tokens, mask, logprobs, entropies, stats,
    rows, inner, columns, outer_stride, row_stride, per_temperature: tl.float64,
    IGNORED: tl.constexpr, HAS_MASK: tl.constexpr, WANT_ENTROPY: tl.constexpr,
    ACC: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row, on grid x. Offsets are int64: eight sequences of 4096 tokens and 150k words pass 2^31."""
    row = tl.program_id(0)
    token, counts, inside = read_token(tokens, mask, row, columns, IGNORED, HAS_MASK)
    start_of_row = start_of(row, inner, outer_stride, row_stride)
    # Blocks begin at multiples of 16 bytes wherever the row does, or a row of 50257 would be read number by number.
    skew = (start_of_row % GROUP).to(tl.int32)
    row_logits = logits + tl.multiple_of(start_of_row - skew, GROUP)
    scale, bits = tl.full((), per_temperature, ACC), tl.full((), per_temperature * LOG2E, ACC)

    # A row that does not count is a row of no columns: nothing of it is read.
    end = tl.where(counts, skew + columns, 0)
    own = tl.where(inside, skew + token, -1).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    first, whole = tl.where(skew > 0, BLOCK, 0), end - end % BLOCK
    aside = own // BLOCK * BLOCK
    steps_over = (aside >= first) & (aside < whole)
    peaks = tl.full((BLOCK // GROUP,), LOWEST, ACC)
    totals, slopes = tl.zeros((BLOCK // GROUP,), ACC), tl.zeros((BLOCK // GROUP,), ACC)
    for i in range(first, tl.where(steps_over, whole - BLOCK, whole), BLOCK):
        start = tl.where(steps_over & (i >= aside), i + BLOCK, i)
        z = tl.load(row_logits + start + lanes).to(ACC)  # half precision ends here
        z = tl.reshape(z, (BLOCK // GROUP, GROUP))
        peaks, totals, slopes = fold(z, bits, peaks, totals, slopes, WANT_ENTROPY)
    if steps_over:
        z = tl.load(row_logits + aside + lanes).to(ACC)
        z = tl.where(lanes == own - aside, float("-inf"), z)
        z = tl.reshape(z, (BLOCK // GROUP, GROUP))
        peaks, totals, slopes = fold(z, bits, peaks, totals, slopes, WANT_ENTROPY)
    # The head of a row that begins between two multiples, and the tail: they alone pay for a mask.
    for start in range(tl.where(skew > 0, 0, whole), end, tl.maximum(whole, BLOCK)):
        z = tl.reshape(others(row_logits, start, skew, end, own, ACC, BLOCK), (BLOCK // GROUP, GROUP))
        peaks, totals, slopes = fold(z, bits, peaks, totals, slopes, WANT_ENTROPY)
    peak, total, slope = join(bits, peaks, totals, slopes)

    # A token outside the vocabulary reads NaN in place of a logit: its row comes out NaN, and nothing is read.
    z_token = tl.load(row_logits + own, mask=counts & inside, other=float("nan")).to(ACC)
    leaders, rest = tl.minimum(total, 1.0), tl.maximum(total - 1.0, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if WANT_ENTROPY:  # noqa: SIM102 (known when the kernel is compiled)
        if (z_token <= peak) & (rest < CLOSE):
            peak, each = tl.full((), float("-inf"), ACC), tl.zeros((BLOCK // 4,), ACC)
            below, products = each, each
            for start in range(0, end, BLOCK // 4):  # rare, so no registers are spent on its speed
                z = others(row_logits, start, skew, end, own, ACC, BLOCK // 4)
                peak, each, below, products = fold_apart(z, scale, peak, each, below, products)
            leaders, rest, slope = tl.sum(each, 0), tl.sum(below, 0), tl.sum(products, 0)

    logprob, entropy, top, log_sum, complement = finish(z_token, scale, peak, leaders, rest, slope)
    store_row(
        logprobs, entropies, stats, row, rows, counts, logprob, entropy, top, log_sum, complement, WANT_ENTROPY
    )  # fmt: skip


@triton.jit
def gradient(z, top, scale, level, slope, OF_ENTROPY: tl.constexpr):
    """exp(u) (level + slope u), u = (z - top) / temperature."""
    u = (z - top) * scale
    if OF_ENTROPY:
        u = tl.maximum(u, -1000.0, propagate_nan=tl.PropagateNan.ALL)  # exp(-inf) * -inf is NaN
        grad = exp(u) * (level + slope * u)
    else:
        grad = exp(u) * level
    return grad


@triton.jit(do_not_specialize=[*RUN_TIME, "grad_outer_stride", "grad_row_stride", "first_column", "vocabulary"])
def backward_kernel(
    logits, tokens, mask, entropies, stats, grad_logprobs, grad_entropies, grads,
    rows, inner, columns, outer_stride, row_stride, grad_outer_stride, grad_row_stride, first_column, vocabulary,
    per_temperature: tl.float64,
    IGNORED: tl.constexpr, HAS_MASK: tl.constexpr, OF_LOGPROBS: tl.constexpr, OF_ENTROPY: tl.constexpr,
    ALIKE: tl.constexpr, ACC: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """A program a few blocks of a row: p again from its logits, then (1 - p at the token, -p elsewhere) / temperature.

    The entropy adds -p (log p + H) / temperature: in all p times a line in log p. `logits` may hold columns
    first_column ... of a longer row (the linear op's chunks). The gradient may be written over the logits: each program
    reads only what it writes. ALIKE: grads begin their rows between two multiples of 16 bytes where logits do.
    """
    row = tl.program_id(0)
    token, counts, _ = read_token(tokens, mask, row, vocabulary, IGNORED, HAS_MASK)
    logits_at = start_of(row, inner, outer_stride, row_stride)
    grads_at = start_of(row, inner, grad_outer_stride, grad_row_stride)
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
    # Head and tail, which pay for masks: in pieces, so that they cost the loop above no registers.
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
        tl.debug_barrier()  # after the block's own store, which another thread has done
        tl.store(grads + own, at_token * scale)


def launch_backward(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    entropy: Tensor,
    stats: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    inplace: bool = False,
    out: Tensor | None = None,
    first_column: int = 0,
    vocabulary: int | None = None,
) -> Tensor:
    """The gradient with respect to logits, in their type; written over them in place, or into `out`, on request."""
    x, inner, outer_stride, row_stride = as_rows(logits)
    if out is None:
        out = logits if inplace and x is logits else torch.empty(logits.shape, dtype=logits.dtype, device=x.device)
    _, _, grad_outer_stride, grad_row_stride = as_rows(out)
    rows, columns = tokens.numel(), logits.shape[-1]
    ups = [None if g is None else g.contiguous() for g in (grad_logprobs, grad_entropy)]
    if rows and columns:
        block, warps = configuration(columns)
        group = 16 // max(x.dtype.itemsize, out.dtype.itemsize)
        differ = outer_stride - grad_outer_stride, row_stride - grad_row_stride
        with on_device_of(x):
            backward_kernel[(rows, triton.cdiv(columns + group - 1, SPAN * block))](
                x, tokens.contiguous(), stats if mask is None else mask.contiguous(), entropy, stats,
                *(stats if g is None else g for g in ups), out,
                rows, inner, columns, outer_stride, row_stride, grad_outer_stride, grad_row_stride,
                first_column, columns if vocabulary is None else vocabulary, 1.0 / temperature,
                IGNORED=IGNORED_TOKEN, HAS_MASK=mask is not None,
                OF_LOGPROBS=ups[0] is not None, OF_ENTROPY=ups[1] is not None,
                ALIKE=x.dtype == out.dtype and all(d % group == 0 for d in differ),
                ACC=tl.float64 if compute_dtype(stats) == torch.float64 else tl.float32,
                GROUP=group, BLOCK=block, SPAN=SPAN * block, num_warps=warps,
            )  # fmt: skip
    return out


def launch_forward(
    logits: Tensor, tokens: Tensor, mask: Tensor | None, temperature: float, want_entropy: bool, inplace: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities and entropy in tokens' shape (empty unless wanted), and the rows' stats [4, rows]."""
    if not tokens.is_cuda:
        _counted_rows(tokens, mask, logits.shape[:-1], logits.shape[-1])  # on the CPU, looking costs no sync
    dtype = compute_dtype(logits)
    logprobs = torch.empty(tokens.shape, dtype=dtype, device=logits.device)
    entropy = torch.empty(tokens.shape if want_entropy else (0,), dtype=dtype, device=logits.device)
    rows, columns = tokens.numel(), logits.shape[-1]
    stats = torch.empty((4, rows), dtype=dtype, device=logits.device)
    x, inner, outer_stride, row_stride = as_rows(logits)
    if rows:
        block, warps = configuration(columns)
        with on_device_of(x):
            forward_kernel[(rows,)](
                x, tokens.contiguous(), stats if mask is None else mask.contiguous(), logprobs, entropy, stats,
                rows, inner, columns, outer_stride, row_stride, 1.0 / temperature,
                IGNORED=IGNORED_TOKEN, HAS_MASK=mask is not None, WANT_ENTROPY=want_entropy,
                ACC=tl.float64 if dtype == torch.float64 else tl.float32,
                GROUP=16 // x.dtype.itemsize, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return logprobs, entropy, stats


# Eager calls go straight to the launchers through a plain autograd.Function; a compiled graph sees two operators,
# whose bodies it doesn't look into. Both share what they save and how they turn back.


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, tokens, mask, temperature, _, inplace = inputs
    _, entropy, stats = output
    ctx.save_for_backward(logits, tokens, mask, entropy, stats)
    ctx.temperature, ctx.inplace, ctx.spent = temperature, inplace, False
    ctx.set_materialize_grads(False)


class TokenLogprobs(torch.autograd.Function):
    forward = staticmethod(launch_forward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        setup_context(ctx, inputs, output)
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        if ctx.spent:
            raise RuntimeError("inplace_backward=True has overwritten the logits: this backward can run only once")
        ctx.spent = ctx.inplace
        logits, tokens, mask, entropy, stats = ctx.saved_tensors
        of = grads[0], grads[1]
        grad = launch_backward(logits, tokens, mask, entropy, stats, *of, ctx.temperature, ctx.inplace)
        return grad, None, None, None, None, None


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
    return launch_backward(logits, tokens, mask, entropy, stats, grad_logprobs, grad_entropy, temperature)


@backward_op.register_fake
def _(logits: Tensor, *others: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


forward_op = torch.library.custom_op("minirlhf::token_logprobs", launch_forward, mutates_args=())


@forward_op.register_fake
def _(
    logits: Tensor, tokens: Tensor, mask: Tensor | None, temperature: float, want_entropy: bool, inplace: bool
) -> tuple[Tensor, Tensor, Tensor]:
    new = functools.partial(torch.empty, dtype=compute_dtype(logits), device=logits.device)
    return new(tokens.shape), new(tokens.shape if want_entropy else (0,)), new((4, tokens.numel()))


def _backward_of_op(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_entropy = grads[1] if ctx.saved_tensors[3].numel() else None
    grad = backward_op(*ctx.saved_tensors, grads[0], grad_entropy, ctx.temperature)
    return grad, None, None, None, None, None


forward_op.register_autograd(_backward_of_op, setup_context=setup_context)


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`reference.token_logprobs` in two kernels. On CUDA a token outside [0, V) makes its row NaN (no host sync)."""
    _check_temperature(temperature)
    _check_tokens(tokens, mask, logits.shape[:-1])
    call = forward_op if torch.compiler.is_compiling() else TokenLogprobs.apply
    logprobs, entropy, _ = call(logits, tokens, mask, float(temperature), return_entropy, inplace_backward)
    return (logprobs, entropy) if return_entropy else logprobs
