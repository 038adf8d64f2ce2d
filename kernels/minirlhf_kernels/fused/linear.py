"""Log-probabilities from hidden states and the head's weight: library matrix products, and a row kernel between them.

[M, V] logits of a large vocabulary outweigh everything else in a step, and nobody needs them twice. So the logits are
made slab by slab, in float32, by a matrix product at the library's own speed. The row kernel reads a slab as the one of
logprobs.py does, and merges a row's sums with those of the slabs before:

    hidden [M, H]  x  weight [V, H].T  =  logits   | slab 0 | slab 1 | ... |     a slab: up to ROWS rows and SLAB logits
                                          sums [5, M]  ->  merged  ->  log p, entropy

Backward makes each slab again, turns it into its gradient, and feeds two more products: 8 M H V operations in all.
Both gradients are summed in float32: in bfloat16 small terms would be lost, one slab after the other. Where all rows
fit one slab, as they mostly do, a slab of the weight's gradient is one product, written where it belongs.
Rows that don't count take part, with hidden states of 0 in the backward: 0 * NaN would be NaN.
"""

import functools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minirlhf_kernels.checks import (
    IGNORED_TOKEN,
    check_linear,
    check_tokens,
    checked_temperature,
    counted_rows,
    product_dtype,
)
from minirlhf_kernels.fused.common import compute_dtype, on_device_of, register
from minirlhf_kernels.fused.logprobs import configuration, read_row, store_row
from minirlhf_kernels.fused.logprobs_backward import launch_backward, read_token
from minirlhf_kernels.fused.rows import LOG2E, merge

SLAB = 1 << 26  # logits in memory at once: 256 MiB of float32
ROWS = 16384  # of a slab, at most


@triton.jit(
    do_not_specialize=["rows", "columns", "row_stride", "first_row", "first_column", "vocabulary"],
    do_not_specialize_on_alignment=["tokens", "mask", "sums", "logprobs", "entropies", "stats"],
)
def fold_kernel(
    logits, tokens, mask, sums, logprobs, entropies, stats,
    rows, columns, row_stride, first_row, first_column, vocabulary, inverse_temperature: tl.float64,
    IGNORED: tl.constexpr, HAS_MASK: tl.constexpr, WANT_ENTROPY: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    ACC: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """A program per row of a slab [.., columns]. sums [5, rows]: max, ties, below, sum of exp(u) u, token's logit."""
    row = tl.program_id(0)
    row_start = row.to(tl.int64) * row_stride
    row += first_row
    token, counts, _ = read_token(tokens, mask, row, vocabulary, IGNORED, HAS_MASK)
    scale = tl.full((), inverse_temperature, ACC)
    scale_log2 = tl.full((), inverse_temperature * LOG2E, ACC)
    skew = (row_start % GROUP).to(tl.int32)
    logits += tl.multiple_of(row_start - skew, GROUP)
    column = token - first_column
    in_slab = counts & (column >= 0) & (column < columns)
    token_at = tl.where(in_slab, skew + column, -1).to(tl.int32)
    end = tl.where(counts, skew + columns, 0)
    z_token = tl.load(logits + token_at, mask=in_slab, other=float("nan")).to(ACC)
    row_max, ties, below, sum_exp_u = read_row(
        logits, skew, end, token_at, z_token, scale, scale_log2, WANT_ENTROPY, ACC, GROUP, BLOCK, PREFETCH
    )
    sums += row
    if not FIRST:
        z_token = tl.where(in_slab, z_token, tl.load(sums + 4 * rows))
        row_max, ties, below, sum_exp_u = merge(
            scale, row_max, ties, below, sum_exp_u,
            tl.load(sums), tl.load(sums + rows), tl.load(sums + 2 * rows), tl.load(sums + 3 * rows),
        )  # fmt: skip
    if LAST:
        store_row(
            logprobs, entropies, stats, row, rows, counts, z_token, scale, row_max, ties, below, sum_exp_u, WANT_ENTROPY
        )
    else:
        tl.store(sums, row_max)
        tl.store(sums + rows, ties)
        tl.store(sums + 2 * rows, below)
        tl.store(sums + 3 * rows, sum_exp_u)
        tl.store(sums + 4 * rows, z_token)


@functools.cache
def _float32_products(device_type: str) -> bool:
    """Whether this device's library multiplies half precision, on tensor cores, into float32. Says so once if not."""
    if device_type != "cuda":
        return False
    one = torch.ones(16, 16, dtype=torch.bfloat16, device=device_type)
    try:
        torch.addmm(one.float(), one, one, out_dtype=torch.float32, out=one.float())
    except (RuntimeError, TypeError):
        warnings.warn(
            "linear_token_logprobs multiplies in float32, without tensor cores, some 12 times slower: this torch "
            f"({torch.__version__}) has no product of half precision into float32; torch 2.8 for CUDA has",
            stacklevel=2,
        )
        return False
    return True


def product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """a @ b into `out`, or added to it, summed in float32 (float64 for float64) whatever the types are."""
    if a.dtype.itemsize == 2 and _float32_products(a.device.type):
        if out.dtype == a.dtype:
            return torch.mm(a, b, out=out)  # rounded once
        return torch.addmm(out, a, b, beta=int(add), out_dtype=torch.float32, out=out)
    a, b = a.to(compute_dtype(a)), b.to(compute_dtype(a))  # below: with beta=0 `out` is not read
    return torch.addmm(out, a, b, beta=int(add), out=out) if out.dtype == a.dtype else out.copy_(a @ b)


def slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def plan(rows: int, vocabulary: int) -> tuple[int, int]:
    """Rows and columns of a slab."""
    tall = max(1, min(rows, ROWS))
    return tall, max(1, min(vocabulary, max(256, SLAB // tall // 256 * 256)))


def launch_forward(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    temperature: float,
    want_entropy: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [M, H], weight [V, H], tokens and mask [M] give logprobs [M], entropy [M] or [0], stats [4, M]."""
    rows, vocabulary = len(tokens), len(weight)
    if not tokens.is_cuda:
        counted_rows(tokens, mask, vocabulary)
    logprobs, entropy, stats = empty_outputs(hidden, weight, tokens, mask, temperature, want_entropy, dtype)
    tall, wide = plan(rows, vocabulary)
    sums = logprobs.new_empty(5, rows if wide < vocabulary else 0)
    tokens, mask = tokens.contiguous(), None if mask is None else mask.contiguous()
    block, warps, prefetch = configuration(wide)
    with torch.autocast(hidden.device.type, enabled=False), on_device_of(hidden):
        x, w = hidden.to(dtype), weight.to(dtype)
        for part in slices(rows, tall):
            for words in slices(vocabulary, wide):
                logits = product(x[part], w[words].t(), stats.new_empty(len(x[part]), len(w[words])))
                fold_kernel[(len(logits),)](
                    logits, tokens, stats if mask is None else mask, sums, logprobs, entropy, stats,
                    rows, logits.shape[1], logits.stride(0), part.start, words.start, vocabulary, 1.0 / temperature,
                    IGNORED=IGNORED_TOKEN, HAS_MASK=mask is not None, WANT_ENTROPY=want_entropy,
                    FIRST=words.start == 0, LAST=words.stop == vocabulary,
                    ACC=tl.float64 if stats.dtype == torch.float64 else tl.float32, GROUP=16 // logits.dtype.itemsize,
                    BLOCK=block, PREFETCH=prefetch, num_warps=warps,
                )  # fmt: skip
    return logprobs, entropy, stats


def empty_outputs(
    hidden: Tensor, weight: Tensor, tokens: Tensor, mask: Any, temperature: float, want_entropy: bool, dtype: Any
) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = torch.empty(tokens.shape, dtype=compute_dtype(hidden, weight), device=hidden.device)
    return logprobs, logprobs.new_empty(tokens.shape if want_entropy else (0,)), logprobs.new_empty(4, len(tokens))


def launch_backwards(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    entropy: Tensor,
    stats: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    dtype: torch.dtype,
    of_hidden: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of hidden and weight, each empty unless asked for."""
    rows, vocabulary = len(tokens), len(weight)
    counts = tokens != IGNORED_TOKEN if mask is None else mask & (tokens != IGNORED_TOKEN)
    tall, wide = plan(rows, vocabulary)
    in_one_slab = tall >= rows
    grad_hidden = stats.new_zeros(hidden.shape if of_hidden else (0,))
    grad_weight = (weight.new_empty if rows else weight.new_zeros)(weight.shape if of_weight else (0,))
    with torch.autocast(hidden.device.type, enabled=False):
        x, w = torch.where(counts[:, None], hidden, 0).to(dtype), weight.to(dtype)
        for words in slices(vocabulary, wide):
            of_words = grad_weight[words] if in_one_slab else stats.new_empty(words.stop - words.start, x.shape[1])
            for part in slices(rows, tall):
                logits = product(x[part], w[words].t(), stats.new_empty(len(x[part]), len(w[words])))
                up_logprobs, up_entropy = (None if g is None else g[part] for g in (grad_logprobs, grad_entropy))
                grad = launch_backward(
                    logits, tokens[part], None if mask is None else mask[part], entropy[part],
                    stats[:, part].contiguous(), up_logprobs, up_entropy, temperature,
                    out=torch.empty_like(logits, dtype=dtype), first_column=words.start, vocabulary=vocabulary,
                )  # fmt: skip
                if of_hidden:
                    product(grad, w[words], grad_hidden[part], add=True)
                if of_weight:
                    product(grad.t(), x[part], of_words, add=part.start > 0)
            if of_weight and not in_one_slab:
                grad_weight[words] = of_words.to(weight.dtype)
    return grad_hidden.to(hidden.dtype), grad_weight


def empty_gradients(hidden: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    of_hidden, of_weight = others[-2:]
    return hidden.new_empty(hidden.shape if of_hidden else (0,)), weight.new_empty(weight.shape if of_weight else (0,))


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, tokens, mask, ctx.temperature, ctx.want_entropy, ctx.dtype = inputs
    ctx.save_for_backward(hidden, weight, tokens, mask, output[1], output[2])
    ctx.set_materialize_grads(False)


def gradients(call: Any, ctx: Any, needed: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_entropy = grads[1] if ctx.want_entropy else None
    out = call(*ctx.saved_tensors, grads[0], grad_entropy, ctx.temperature, ctx.dtype, *needed)
    return out[0] if needed[0] else None, out[1] if needed[1] else None


_call, forward_op, backward_op = register(
    "linear_token_logprobs", launch_forward, empty_outputs, launch_backwards, empty_gradients, save, gradients,
    learns=(0, 1), differentiable_outputs=2,
)  # fmt: skip


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`reference.linear_token_logprobs` by slabs. On CUDA a token outside [0, V) makes its row NaN (no host sync)."""
    temperature = checked_temperature(temperature)
    check_linear(hidden, weight)
    check_tokens(tokens, mask, hidden.shape[:-1])
    flat = hidden.reshape(-1, hidden.shape[-1]), weight, tokens.reshape(-1), None if mask is None else mask.reshape(-1)
    logprobs, entropy, _ = _call(*flat, temperature, return_entropy, product_dtype(hidden, weight))
    logprobs = logprobs.view(tokens.shape)
    return (logprobs, entropy.view(tokens.shape)) if return_entropy else logprobs
