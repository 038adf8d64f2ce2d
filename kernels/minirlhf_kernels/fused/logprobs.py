"""Log-probabilities of tokens and the entropy of each row: one read forward; one read and one write backward.

A row of logits z is read once, block after block. Its token is set aside; of all the OTHERS four numbers are kept:

    peak      the highest logit so far
    leaders   how many logits equal it                             each adds exp(0) = 1 to the sum
    rest      sum of exp((z - peak) / temperature) of all below
    slope     sum of exp(u) u, u = (z - peak) / temperature        what the entropy needs

When a block holds a higher peak, the old sums fade by exp((old - new) / temperature). Blocks stay in registers.

Why it is stable. Only differences of logits are ever scaled or exponentiated: adding 1000 to a row changes nothing.
exp never sees a positive number. A row that begins with a block of -inf keeps a peak of -inf, for which 0 stands in.
The token is compared with the others, never subtracted from a sum that holds it:

    the token leads     log p = -log1p(odds),   odds = sum of the others / token        1 - p = odds / (1 + odds)
    another one leads   log p = u_token - log(leaders) - log1p((rest + exp(u_token)) / leaders)

Both are sums of terms of one sign: no cancellation, and never above 0. At a margin of 20 nats, where 1 - p is lost in
float32 and log_softmax gives 0, log p and its gradient keep all their digits; so does the entropy, because the leaders
are counted apart from the small numbers beside them.
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
SHORT, LONG = (1024, 4), (4096, 8)
# Triton would compile again for a new divisibility of these, and for 1.
RUN_TIME = ["rows", "inner", "columns", "outer_stride", "row_stride"]


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
    x = tl.where(x < -1000.0, -1000.0, x)
    k = tl.floor(x * 1.4426950408889634 + 0.5)
    left = (x - k * 0.693359375) + k * 2.121944400546905827679e-4  # ln 2 in two parts, k times the first is exact
    return tl.exp2(k) * tl.exp(left)


@triton.jit
def fold(z, scale, peak, leaders, rest, slope):
    """A block z of logits (-inf in the lanes that don't count) into a row's sums, which are lane by lane."""
    higher = tl.maximum(peak, tl.max(z, 0))
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    step = tl.where(peak == float("-inf"), 0.0, (peak - shift) * scale)
    fade = tl.exp(step)
    old = leaders + rest
    slope = fade * (slope + step * old)
    rest = tl.where(higher > peak, fade * old, rest)
    leaders = tl.where(higher > peak, 0.0, leaders)
    u = (z - shift) * scale
    e = tl.exp(u)
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
def read_token(tokens, mask, row, columns, IGNORED: tl.constexpr, HAS_MASK: tl.constexpr):
    """The row's token, whether the row counts, and whether the token is in the vocabulary (checked when debugging)."""
    token = tl.load(tokens + row)
    counts = token != IGNORED
    if HAS_MASK:
        counts = counts & (tl.load(mask + row) != 0)
    inside = (token >= 0) & (token < columns)
    tl.device_assert(inside | (counts == 0), "a token that counts is outside the vocabulary")
    return token, counts, inside


@triton.jit(do_not_specialize=RUN_TIME)
def forward_kernel(
    logits, tokens, mask, logprobs, entropies, stats,
    rows, inner, columns, outer_stride, row_stride, temperature: tl.float64,
    IGNORED: tl.constexpr, HAS_MASK: tl.constexpr, WANT_ENTROPY: tl.constexpr, ALIGNED: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row, on grid x. Offsets are int64: eight sequences of 4096 tokens and 150k words pass 2^31."""
    row = tl.program_id(0).to(tl.int64)
    token, counts, inside = read_token(tokens, mask, row, columns, IGNORED, HAS_MASK)
    start_of_row = (row // inner) * outer_stride + (row % inner) * row_stride
    if ALIGNED:  # a promise to the compiler: loads of 16 bytes a thread
        start_of_row = tl.multiple_of(start_of_row, 16)
    logits += start_of_row
    scale = tl.full((), 1.0 / temperature, ACC)
    lanes = tl.arange(0, BLOCK)

    # A row that does not count is a row of no columns: nothing of it is read.
    end = tl.where(counts, columns, 0)
    whole = end - end % BLOCK
    peak = tl.full((), float("-inf"), ACC)
    leaders, rest, slope = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC)
    for start in range(0, whole, BLOCK):
        z = tl.load(logits + start + lanes).to(ACC)  # half precision ends here
        z = tl.where(start + lanes == token, float("-inf"), z)
        peak, leaders, rest, slope = fold(z, scale, peak, leaders, rest, slope)
    # The tail alone pays for a mask.
    at = whole + lanes
    z = tl.load(logits + at, mask=at < end, other=float("-inf")).to(ACC)
    z = tl.where(at == token, float("-inf"), z)
    peak, leaders, rest, slope = fold(z, scale, peak, leaders, rest, slope)

    # A token outside the vocabulary reads NaN in place of a logit: its row comes out NaN, and nothing is read.
    z_token = tl.load(logits + token, mask=counts & inside, other=float("nan")).to(ACC)
    logprob, entropy, top, log_sum, complement = finish(
        z_token, scale, peak, tl.sum(leaders, 0), tl.sum(rest, 0), tl.sum(slope, 0)
    )
    tl.store(logprobs + row, tl.where(counts, logprob, 0.0))
    if WANT_ENTROPY:
        tl.store(entropies + row, tl.where(counts, entropy, 0.0))
    tl.store(stats + row, tl.where(counts, top, 0.0))
    tl.store(stats + rows + row, tl.where(counts, log_sum, 0.0))
    tl.store(stats + 2 * rows + row, tl.where(counts, complement, 0.0))


@triton.jit(do_not_specialize=[*RUN_TIME, "grad_outer_stride", "grad_row_stride", "first_column", "vocabulary"])
def backward_kernel(
    logits, tokens, mask, entropies, stats, grad_logprobs, grad_entropies, grads,
    rows, inner, columns, outer_stride, row_stride, grad_outer_stride, grad_row_stride, first_column, vocabulary,
    temperature: tl.float64,
    IGNORED: tl.constexpr, HAS_MASK: tl.constexpr, OF_LOGPROBS: tl.constexpr, OF_ENTROPY: tl.constexpr,
    ALIGNED: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a block of a row: p again from its logits, then (1 - p at the token, -p elsewhere) / temperature.

    The entropy adds -p (log p + H) / temperature. `logits` may hold columns first_column ... of a longer row (the
    linear op's chunks). The gradient may be written over the logits: each program reads only what it writes.
    """
    row = tl.program_id(0).to(tl.int64)
    token, counts, _ = read_token(tokens, mask, row, vocabulary, IGNORED, HAS_MASK)
    logits_at = (row // inner) * outer_stride + (row % inner) * row_stride
    grads_at = (row // inner) * grad_outer_stride + (row % inner) * grad_row_stride
    if ALIGNED:
        logits_at, grads_at = tl.multiple_of(logits_at, 16), tl.multiple_of(grads_at, 16)
    scale = tl.full((), 1.0 / temperature, ACC)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    whole = (tl.program_id(1) + 1) * BLOCK <= columns  # such blocks move 16 bytes a thread; the tail alone is masked
    if whole & counts:
        z = tl.load(logits + logits_at + at).to(ACC)
    else:
        z = tl.load(logits + logits_at + at, mask=(at < columns) & counts, other=float("-inf")).to(ACC)
    log_p = (z - tl.load(stats + row)) * scale - tl.load(stats + rows + row)
    p = tl.exp(log_p)
    grad = tl.zeros((BLOCK,), ACC)
    if OF_LOGPROBS:
        up = tl.load(grad_logprobs + row).to(ACC)
        grad += up * tl.where(at + first_column == token, tl.load(stats + 2 * rows + row), -p)
    if OF_ENTROPY:
        up = tl.load(grad_entropies + row).to(ACC)
        entropy = tl.load(entropies + row)
        grad -= up * tl.where(p == 0.0, 0.0, p * (log_p + entropy))
    grad = tl.where(counts, grad * scale, 0.0)
    if whole:
        tl.store(grads + grads_at + at, grad)
    else:
        tl.store(grads + grads_at + at, grad, mask=at < columns)


def aligned(*strides: int) -> bool:
    return all(stride % 16 == 0 for stride in strides)


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
        with on_device_of(x):
            backward_kernel[(rows, triton.cdiv(columns, block))](
                x, tokens.contiguous(), stats if mask is None else mask.contiguous(), entropy, stats,
                *(stats if g is None else g for g in ups), out,
                rows, inner, columns, outer_stride, row_stride, grad_outer_stride, grad_row_stride,
                first_column, columns if vocabulary is None else vocabulary, temperature,
                IGNORED=IGNORED_TOKEN, HAS_MASK=mask is not None,
                OF_LOGPROBS=ups[0] is not None, OF_ENTROPY=ups[1] is not None,
                ALIGNED=aligned(outer_stride, row_stride, grad_outer_stride, grad_row_stride),
                ACC=tl.float64 if compute_dtype(stats) == torch.float64 else tl.float32,
                BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return out


def launch_forward(
    logits: Tensor, tokens: Tensor, mask: Tensor | None, temperature: float, want_entropy: bool, inplace: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities and entropy in tokens' shape (empty unless wanted), and the rows' stats [3, rows]."""
    if not tokens.is_cuda:
        _counted_rows(tokens, mask, logits.shape[:-1], logits.shape[-1])  # on the CPU, looking costs no sync
    dtype = compute_dtype(logits)
    logprobs = torch.empty(tokens.shape, dtype=dtype, device=logits.device)
    entropy = torch.empty(tokens.shape if want_entropy else (0,), dtype=dtype, device=logits.device)
    rows, columns = tokens.numel(), logits.shape[-1]
    stats = torch.empty((3, rows), dtype=dtype, device=logits.device)
    x, inner, outer_stride, row_stride = as_rows(logits)
    if rows:
        block, warps = configuration(columns)
        with on_device_of(x):
            forward_kernel[(rows,)](
                x, tokens.contiguous(), stats if mask is None else mask.contiguous(), logprobs, entropy, stats,
                rows, inner, columns, outer_stride, row_stride, temperature,
                IGNORED=IGNORED_TOKEN, HAS_MASK=mask is not None, WANT_ENTROPY=want_entropy,
                ALIGNED=aligned(outer_stride, row_stride),
                ACC=tl.float64 if dtype == torch.float64 else tl.float32, BLOCK=block, num_warps=warps,
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
    return new(tokens.shape), new(tokens.shape if want_entropy else (0,)), new((3, tokens.numel()))


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
