"""Log-probabilities from hidden states and the head's weight: library matrix products, and a row kernel between them.

[rows, V] logits of a large vocabulary take more memory than everything else in a step, and are needed only once. So the
vocabulary is processed in slabs: a matrix product at the library's own speed computes the logits of one slab in
float32, and the row kernel reads them as the one of logprobs.py does, and merges a row's sums with those of earlier
slabs. After the last one the sums become log p and the entropy. Backward recomputes each slab, turns it into its
gradient, and feeds two more products: 8 M H V operations in all for M rows, and memory for one slab and its gradient.

Both gradients are accumulated in float32, the weight's slab by slab (a slab of [V, H] is finished before the next one
begins) and the hidden states' over all slabs: in bfloat16 every slab would lose small terms.
Rows that don't count take part in the products, in the backward with hidden states of 0: 0 * NaN would be NaN.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minirlhf_kernels.fused.common import compute_dtype, on_device_of, refuse_second_derivative
from minirlhf_kernels.fused.logprobs import configuration, launch_backward, read_row, read_token, store_row
from minirlhf_kernels.fused.rows import LOG2E, finish, merge
from minirlhf_kernels.reference import (
    IGNORED_TOKEN,
    _check_linear,
    _check_tokens,
    _checked_temperature,
    _counted_rows,
)

SLAB = 1 << 24  # logits in memory at once: 64 MiB of float32
ROWS = 4096  # per slab, at most


@triton.jit(do_not_specialize=["rows", "columns", "row_stride", "first_row", "first_column", "vocabulary"])
def fold_kernel(
    logits, tokens, mask, state, logprobs, entropies, stats,
    rows, columns, row_stride, first_row, first_column, vocabulary,
    per_temperature: tl.float64, IGNORED: tl.constexpr, HAS_MASK: tl.constexpr, WANT_ENTROPY: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, ACC: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row of a slab [.., columns]. state [5, rows]: peak, leaders, rest, slope, the token's logit."""
    row = tl.program_id(0)
    start_of_row = row.to(tl.int64) * row_stride
    row += first_row
    token, counts, _ = read_token(tokens, mask, row, vocabulary, IGNORED, HAS_MASK)
    scale, bits = tl.full((), per_temperature, ACC), tl.full((), per_temperature * LOG2E, ACC)
    skew = (start_of_row % GROUP).to(tl.int32)
    logits += tl.multiple_of(start_of_row - skew, GROUP)
    own = token - first_column
    here = counts & (own >= 0) & (own < columns)
    own = tl.where(here, skew + own, -1).to(tl.int32)
    end = tl.where(counts, skew + columns, 0)
    z_token = tl.load(logits + own, mask=here, other=float("nan")).to(ACC)
    peak, leaders, rest, slope = read_row(logits, skew, end, own, z_token, scale, bits, WANT_ENTROPY, ACC, GROUP, BLOCK)
    if not FIRST:
        z_token = tl.where(here, z_token, tl.load(state + 4 * rows + row))
        peak, leaders, rest, slope = merge(
            scale, peak, leaders, rest, slope, tl.load(state + row), tl.load(state + rows + row),
            tl.load(state + 2 * rows + row), tl.load(state + 3 * rows + row),
        )  # fmt: skip
    if LAST:
        logprob, entropy, top, log_sum, complement = finish(z_token, scale, peak, leaders, rest, slope)
        store_row(
            logprobs, entropies, stats, row, rows, counts, logprob, entropy, top, log_sum, complement, WANT_ENTROPY
        )  # fmt: skip
    else:
        tl.store(state + row, peak)
        tl.store(state + rows + row, leaders)
        tl.store(state + 2 * rows + row, rest)
        tl.store(state + 3 * rows + row, slope)
        tl.store(state + 4 * rows + row, z_token)


@functools.cache
def _multiplies_into_float32(device_type: str) -> bool:
    """Whether this device's library can multiply half precision into float32."""
    if device_type != "cuda":
        return False
    try:
        one = torch.ones(16, 16, dtype=torch.bfloat16, device=device_type)
        total = torch.zeros(16, 16, device=device_type)
        torch.addmm(total, one, one, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True


def product(a: Tensor, b: Tensor, into: Tensor | None = None) -> Tensor:
    """a @ b, added to `into` if given: float32 (or float64) out for any input type."""
    if a.dtype.itemsize == 2 and _multiplies_into_float32(a.device.type):
        if into is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(into, a, b, out_dtype=torch.float32, out=into)
    a, b = a.to(compute_dtype(a)), b.to(compute_dtype(b))
    # Autocast does not affect products with an `out` or in place.
    return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1])) if into is None else into.addmm_(a, b)


def _operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    return hidden.to(dtype), weight.to(dtype)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [M, H], weight [V, H], tokens and mask [M] give logprobs [M], entropy [M] or [0], stats [4, M]."""
    rows, vocabulary = len(tokens), len(weight)
    if not tokens.is_cuda:
        _counted_rows(tokens, mask, vocabulary)
    x, w = _operands(hidden, weight)
    dtype = compute_dtype(x)
    logprobs = torch.empty(rows, dtype=dtype, device=x.device)
    entropy, stats = logprobs.new_empty(rows if want_entropy else 0), logprobs.new_empty(4, rows)
    tall, wide = plan(rows, vocabulary)
    state = logprobs.new_empty(5, rows if wide < vocabulary else 0)
    tokens, mask = tokens.contiguous(), None if mask is None else mask.contiguous()
    block, warps = configuration(wide)
    for part in slices(rows, tall):
        for words in slices(vocabulary, wide):
            logits = product(x[part], w[words].t())
            with on_device_of(x):
                fold_kernel[(len(logits),)](
                    logits, tokens, stats if mask is None else mask, state, logprobs, entropy, stats,
                    rows, logits.shape[1], logits.stride(0), part.start, words.start, vocabulary, 1.0 / temperature,
                    IGNORED=IGNORED_TOKEN, HAS_MASK=mask is not None, WANT_ENTROPY=want_entropy,
                    FIRST=words.start == 0, LAST=words.stop == vocabulary,
                    ACC=tl.float64 if dtype == torch.float64 else tl.float32, GROUP=16 // logits.dtype.itemsize,
                    BLOCK=block, num_warps=warps,
                )  # fmt: skip
    return logprobs, entropy, stats


def launch_backward_of(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    entropy: Tensor,
    stats: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    of_hidden: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of hidden and weight, each empty unless needed."""
    rows, vocabulary = len(tokens), len(weight)
    counts = tokens != IGNORED_TOKEN if mask is None else mask & (tokens != IGNORED_TOKEN)
    x, w = _operands(torch.where(counts[:, None], hidden, 0), weight)
    dtype = compute_dtype(x)
    tall, wide = plan(rows, vocabulary)
    total_hidden = torch.zeros(hidden.shape if of_hidden else (0,), dtype=dtype, device=x.device)
    grad_weight = weight.new_empty(weight.shape if of_weight else (0,))
    for words in slices(vocabulary, wide):
        total_weight = torch.zeros_like(w[words], dtype=dtype) if of_weight else None
        for part in slices(rows, tall):
            logits = product(x[part], w[words].t())
            up_logprobs, up_entropy = (None if g is None else g[part] for g in (grad_logprobs, grad_entropy))
            grad = launch_backward(
                logits,
                tokens[part],
                None if mask is None else mask[part],
                entropy[part],
                stats[:, part].contiguous(),
                up_logprobs,
                up_entropy,
                temperature,
                out=torch.empty_like(logits, dtype=x.dtype),
                first_column=words.start,
                vocabulary=vocabulary,
            )
            if of_hidden:
                product(grad, w[words], into=total_hidden[part])
            if total_weight is not None:
                product(grad.t(), x[part], into=total_weight)
        if total_weight is not None:
            grad_weight[words] = total_weight.to(weight.dtype)
    return total_hidden.to(hidden.dtype), grad_weight


forward_op = torch.library.custom_op("minirlhf::linear_token_logprobs", launch_forward, mutates_args=())
backward_op = torch.library.custom_op("minirlhf::linear_token_logprobs_backward", launch_backward_of, mutates_args=())


@forward_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, tokens: Tensor, mask: Any, temperature: float, want_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = torch.empty(tokens.shape, dtype=compute_dtype(hidden, weight), device=hidden.device)
    return logprobs, logprobs.new_empty(tokens.shape if want_entropy else (0,)), logprobs.new_empty(4, len(tokens))


@backward_op.register_fake
def _(hidden: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    of_hidden, of_weight = others[-2:]
    return hidden.new_empty(hidden.shape if of_hidden else (0,)), weight.new_empty(weight.shape if of_weight else (0,))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, tokens, mask, temperature, want_entropy = inputs
    ctx.save_for_backward(hidden, weight, tokens, mask, output[1], output[2])
    ctx.temperature, ctx.want_entropy = temperature, want_entropy
    ctx.set_materialize_grads(False)


def _gradients(call: Any, ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    of_hidden, of_weight = ctx.needs_input_grad[:2]
    grad_entropy = grads[1] if ctx.want_entropy else None
    out = call(*ctx.saved_tensors, grads[0], grad_entropy, ctx.temperature, of_hidden, of_weight)
    return out[0] if of_hidden else None, out[1] if of_weight else None, None, None, None, None


class LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = launch_forward(*inputs)
        setup_context(ctx, inputs, output)
        ctx.mark_non_differentiable(output[2])
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_token_logprobs")
        return _gradients(launch_backward_of, ctx, grads)


forward_op.register_autograd(lambda ctx, *g: _gradients(backward_op, ctx, g), setup_context=setup_context)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`reference.linear_token_logprobs` in slabs. On CUDA a token outside [0, V) makes its row NaN (no host sync)."""
    temperature = _checked_temperature(temperature)
    _check_linear(hidden, weight)
    _check_tokens(tokens, mask, hidden.shape[:-1])
    call = forward_op if torch.compiler.is_compiling() else LinearTokenLogprobs.apply
    flat = hidden.reshape(-1, hidden.shape[-1]), weight, tokens.reshape(-1), None if mask is None else mask.reshape(-1)
    logprobs, entropy, _ = call(*flat, temperature, return_entropy)
    logprobs = logprobs.view(tokens.shape)
    return (logprobs, entropy.view(tokens.shape)) if return_entropy else logprobs
