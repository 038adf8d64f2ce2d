"""Log-probabilities of tokens and the entropy of each row: one read forward; one read and one write backward.

Forward, one program reads a row once, block after block, and every thread 16 bytes at a time: a group. Each group has
its own running max and sums (rows.py), which are reduced to the row's at its end, so the loop has no barrier:

    row in memory    | before | ........ the row's logits ..................................... | after |
    blocks           |<- skew, masked ->|<- whole ->|<- token's, masked ->|<- whole ->|<- tail, masked ->|

Whole blocks have no masks: while two bytes come from memory there is time for some fifteen instructions. Blocks begin
at multiples of 16 bytes also where the row does not. A row whose entropy would lose its digits, because one logit is
far above the rest, is read a second time with its max known. Backward (logprobs_backward.py) makes p again from the
logits: no other [rows, V] tensor waits between the two.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minirlhf_kernels.checks import IGNORED_TOKEN, check_tokens, checked_temperature, counted_rows
from minirlhf_kernels.fused.common import as_rows, compute_dtype, from_16_bytes, on_device_of, register
from minirlhf_kernels.fused.logprobs_backward import launch_backward, read_token, start_of
from minirlhf_kernels.fused.rows import (
    CLOSE,
    LOG2E,
    LOWEST,
    LOWEST64,
    accumulate,
    accumulate_below,
    finish,
    reduce_groups,
)

# Forward: lanes of a block, warps of a program, whether the next block is loaded early; rows up to 1024, and longer.
SHORT, LONG = (1024, 4, False), (2048, 4, False)
CANDIDATES = {
    "4 warps": LONG,
    "8 warps": (4096, 8, False),
    "prefetch": (2048, 4, True),
    "8 warps, prefetch": (4096, 8, True),
}
"""What LONG could be: none has run on a GPU yet."""


def configuration(columns: int) -> tuple[int, int, bool]:
    """One variant for short rows and one for long ones, whatever V is."""
    return SHORT if columns <= 1024 else LONG


@triton.jit
def load_others(logits, start, skew, end, token_at, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """A block [BLOCK] of a row that fills skew ... end; -inf in place of what is outside it, and of its token."""
    at = start + tl.arange(0, BLOCK)
    is_other = (at >= skew) & (at < end) & (at != token_at)
    return tl.load(logits + at, mask=is_other, other=float("-inf")).to(ACC)


@triton.jit
def load_whole(logits, i, stop, token_block, BLOCK: tl.constexpr):
    """The whole block [BLOCK] at i, or the next one once the token's is reached; past `stop`, nothing."""
    start = tl.where(i >= token_block, i + BLOCK, i)
    return tl.load(logits + start + tl.arange(0, BLOCK), mask=i < stop, other=0.0)


@triton.jit
def sum_row(
    logits, skew, end, token_at, scale_log2, WANT_ENTROPY: tl.constexpr, ACC: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """max, sum of exp(u) and sum of exp(u) u (rows.py) of a row that fills skew ... end, without its token."""
    lowest = LOWEST64 if ACC == tl.float64 else LOWEST  # noqa: SIM300 (ACC is the variable)
    row_max = tl.full((BLOCK // GROUP,), lowest, ACC)
    sum_exp, sum_exp_u = tl.zeros((BLOCK // GROUP,), ACC), tl.zeros((BLOCK // GROUP,), ACC)
    first, last = tl.where(skew > 0, BLOCK, 0), end & -BLOCK  # whole blocks begin at first ... last - BLOCK
    token_block = token_at & -BLOCK  # the one that holds the token; `last` where that block isn't whole
    token_block = tl.where((token_block >= first) & (token_block < last), token_block, last)
    stop = last - tl.where(token_block < last, BLOCK, 0)
    if PREFETCH:
        ahead = load_whole(logits, first, stop, token_block, BLOCK)
    for i in range(first, stop, BLOCK):
        if PREFETCH:
            block = ahead
            ahead = load_whole(logits, i + BLOCK, stop, token_block, BLOCK)
        else:
            block = load_whole(logits, i, stop, token_block, BLOCK)
        z = tl.reshape(block.to(ACC), (BLOCK // GROUP, GROUP))  # half precision ends here
        row_max, sum_exp, sum_exp_u = accumulate(z, scale_log2, row_max, sum_exp, sum_exp_u, WANT_ENTROPY)
    for i in range(3):  # the blocks that need masks: the first of a row that is skewed, the token's, and the tail
        start = tl.where(i == 0, 0, tl.where(i == 1, token_block, last))
        tail = (last < end) & ((last > 0) | (skew == 0))
        if tl.where(i == 0, skew > 0, tl.where(i == 1, token_block < last, tail)) & (end > 0):
            z = tl.reshape(load_others(logits, start, skew, end, token_at, ACC, BLOCK), (BLOCK // GROUP, GROUP))
            row_max, sum_exp, sum_exp_u = accumulate(z, scale_log2, row_max, sum_exp, sum_exp_u, WANT_ENTROPY)
    return reduce_groups(scale_log2, row_max, sum_exp, sum_exp_u)


@triton.jit
def read_row(
    logits, skew, end, token_at, z_token, scale, scale_log2, WANT_ENTROPY: tl.constexpr, ACC: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """max, ties, below and sum of exp(u) u of a row without its token; read again where the entropy needs it."""
    row_max, sum_exp, sum_exp_u = sum_row(
        logits, skew, end, token_at, scale_log2, WANT_ENTROPY, ACC, GROUP, BLOCK, PREFETCH
    )
    ties, below = tl.minimum(sum_exp, 1.0), tl.maximum(sum_exp - 1.0, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if WANT_ENTROPY:  # noqa: SIM102 (known when the kernel is compiled)
        if ((z_token > row_max) == 0) & (below < CLOSE):  # where the token is highest, the others are measured from it
            ties_of, below_of = tl.zeros((BLOCK // 4,), ACC), tl.zeros((BLOCK // 4,), ACC)
            sum_of = tl.zeros((BLOCK // 4,), ACC)
            for start in range(0, end, BLOCK // 4):
                z = load_others(logits, start, skew, end, token_at, ACC, BLOCK // 4)
                ties_of, below_of, sum_of = accumulate_below(z, scale, row_max, ties_of, below_of, sum_of)
            ties, below, sum_exp_u = tl.sum(ties_of, 0), tl.sum(below_of, 0), tl.sum(sum_of, 0)
    return row_max, ties, below, sum_exp_u


@triton.jit
def store_row(
    logprobs, entropies, stats, row, rows, counts, z_token, scale, row_max, ties, below, sum_exp_u,
    WANT_ENTROPY: tl.constexpr,
):  # fmt: skip
    """A row's results, and its stats [4, rows], from which backward starts; 0 where the row does not count."""
    logprob, entropy, row_max, log_sum, one_minus_p = finish(z_token, scale, row_max, ties, below, sum_exp_u)
    logprob = tl.where(counts, logprob, 0.0)
    tl.store(logprobs + row, logprob)
    if WANT_ENTROPY:
        tl.store(entropies + row, tl.where(counts, entropy, 0.0))
    tl.store(stats + row, tl.where(counts, row_max, 0.0))
    tl.store(stats + rows + row, tl.where(counts, log_sum, 0.0))
    tl.store(stats + 2 * rows + row, tl.where(counts, one_minus_p, 0.0))
    tl.store(stats + 3 * rows + row, logprob)


@triton.jit(
    # Triton would compile again for 1 or another divisibility of these, and for `tokens[1:]`.
    do_not_specialize=["rows", "inner", "columns", "outer_stride", "row_stride", "offset"],
    do_not_specialize_on_alignment=["tokens", "mask", "logprobs", "entropies", "stats"],
)
def forward_kernel(
    logits, tokens, mask, logprobs, entropies, stats,
    rows, inner, columns, outer_stride, row_stride, offset, inverse_temperature: tl.float64,
    IGNORED: tl.constexpr, HAS_MASK: tl.constexpr, WANT_ENTROPY: tl.constexpr,
    ACC: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """One program per row, on grid x. Offsets are int64: eight sequences of 4096 tokens and 150k words pass 2^31."""
    row = tl.program_id(0)
    token, counts, in_vocabulary = read_token(tokens, mask, row, columns, IGNORED, HAS_MASK)
    row_start = offset + start_of(row, inner, outer_stride, row_stride)
    # Blocks begin at multiples of 16 bytes wherever the row does, or a row of 50257 would be read number by number.
    skew = (row_start % GROUP).to(tl.int32)
    logits += tl.multiple_of(row_start - skew, GROUP)
    scale = tl.full((), inverse_temperature, ACC)
    scale_log2 = tl.full((), inverse_temperature * LOG2E, ACC)

    # A row that does not count is a row of no columns: nothing of it is read.
    end = tl.where(counts, skew + columns, 0)
    token_at = tl.where(in_vocabulary, skew + token, -1).to(tl.int32)
    # A token outside the vocabulary reads NaN in place of a logit: its row comes out NaN, and nothing is read.
    z_token = tl.load(logits + token_at, mask=counts & in_vocabulary, other=float("nan")).to(ACC)
    row_max, ties, below, sum_exp_u = read_row(
        logits, skew, end, token_at, z_token, scale, scale_log2, WANT_ENTROPY, ACC, GROUP, BLOCK, PREFETCH
    )
    store_row(
        logprobs, entropies, stats, row, rows, counts, z_token, scale, row_max, ties, below, sum_exp_u, WANT_ENTROPY
    )


def launch_forward(
    logits: Tensor, tokens: Tensor, mask: Tensor | None, temperature: float, want_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities and entropy in tokens' shape (empty unless wanted), and the rows' stats [4, rows]."""
    if not tokens.is_cuda:
        counted_rows(tokens, mask, logits.shape[-1])  # on the CPU, looking costs no sync
    logprobs, entropy, stats = empty_outputs(logits, tokens, mask, temperature, want_entropy)
    rows, columns = tokens.numel(), logits.shape[-1]
    x, inner, outer_stride, row_stride = as_rows(logits)
    if rows:
        block, warps, prefetch = configuration(columns)
        x, offset = from_16_bytes(x)
        with on_device_of(x):
            forward_kernel[(rows,)](
                x, tokens.contiguous(), stats if mask is None else mask.contiguous(), logprobs, entropy, stats,
                rows, inner, columns, outer_stride, row_stride, offset, 1.0 / temperature,
                IGNORED=IGNORED_TOKEN, HAS_MASK=mask is not None, WANT_ENTROPY=want_entropy,
                ACC=tl.float64 if stats.dtype == torch.float64 else tl.float32,
                GROUP=16 // x.dtype.itemsize, BLOCK=block, PREFETCH=prefetch, num_warps=warps,
            )  # fmt: skip
    return logprobs, entropy, stats


def empty_outputs(
    logits: Tensor, tokens: Tensor, mask: Tensor | None, temperature: float, want_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = torch.empty(tokens.shape, dtype=compute_dtype(logits), device=logits.device)
    entropy = logprobs.new_empty(tokens.shape if want_entropy else (0,))
    return logprobs, entropy, logprobs.new_empty((4, tokens.numel()))


def contiguous_backward(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    entropy: Tensor,
    stats: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
) -> Tensor:
    out = empty_gradient(logits)
    return launch_backward(logits, tokens, mask, entropy, stats, grad_logprobs, grad_entropy, temperature, out=out)


def empty_gradient(logits: Tensor, *others: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, tokens, mask, ctx.temperature, ctx.want_entropy = inputs
    ctx.save_for_backward(logits, tokens, mask, output[1], output[2])
    ctx.set_materialize_grads(False)


def gradients(call: Any, ctx: Any, needed: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_entropy = grads[1] if ctx.want_entropy else None
    return (call(*ctx.saved_tensors, grads[0], grad_entropy, ctx.temperature),)


_call, forward_op, backward_op = register(
    "token_logprobs", launch_forward, empty_outputs, launch_backward, empty_gradient, save, gradients,
    learns=(0,), differentiable_outputs=2, operator_backward=contiguous_backward,
)  # fmt: skip


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`reference.token_logprobs` in two kernels. On CUDA a token outside [0, V) makes its row NaN (no host sync)."""
    temperature = checked_temperature(temperature)
    check_tokens(tokens, mask, logits.shape[:-1])
    logprobs, entropy, _ = _call(logits, tokens, mask, temperature, return_entropy)
    return (logprobs, entropy) if return_entropy else logprobs
