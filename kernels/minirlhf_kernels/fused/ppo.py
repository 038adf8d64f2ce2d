"""PPO's loss, its gradients and every metric: one launch forward, one backward, no sync with the host.

At 45 bytes per token this op is bound by launches, so everything happens in one pass: a program loads a block of
tokens, computes each term in registers, writes the two gradients that need it (before the division by the denominator,
which is not known yet) and adds its eleven sums to a table. Then it draws a ticket, an integer atomic. The program that
draws the last one knows that the table is complete and adds it up, always in the same order: the same bits on every
run. Backward multiplies the saved gradients by (upstream gradient / denominator), for all three inputs in one launch.

Why it is stable. Tokens that don't count are never loaded, so they may be NaN. NaN in one that counts reaches the loss:
`where` on a comparison passes it on, while Triton's minimum and maximum would drop it. log r is capped at 80, above
which exp overflows and the clipped branch's gradient would be 0 * inf. k3 = exp(x) - 1 - x is a series near 0, where
the difference would lose all digits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minirlhf_kernels.fused.common import compute_dtype, on_device_of, refuse_second_derivative
from minirlhf_kernels.reference import _check_ppo

METRICS = (
    "policy/loss", "policy/clip_fraction", "policy/approx_kl", "policy/ratio_mean", "value/loss", "value/clip_fraction",
    "policy/entropy", "policy/ref_kl", "k2", "denominator", "policy/ratio_max",
)  # fmt: skip
BLOCK = 512
BY_COUNT, BY_NUMBER, BY_TENSOR = 0, 1, 2


@triton.jit
def k3(x):
    """exp(x) - 1 - x = x^2 / 2 (1 + x/3 (1 + x/4 (1 + ...)))."""
    series = tl.full(x.shape, 1.0, x.dtype)
    for i in tl.static_range(13):
        series = 1.0 + series * x * (1.0 / (15 - i))
    return tl.where(tl.abs(x) < 0.5, 0.5 * x * x * series, tl.exp(x) - 1.0 - x)


@triton.jit
def read(x, at, counts, ACC: tl.constexpr):
    return tl.load(x + at, mask=counts, other=0.0).to(ACC)


@triton.jit
def table_sum(table, programs, ACC: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), ACC)
    for start in range(0, programs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        # .cg bypasses this processor's own cache, which doesn't see the others' writes
        total += tl.load(table + at, mask=at < programs, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["tokens", "programs"])
def forward_kernel(
    logprobs, old_logprobs, advantages, mask, values, old_values, returns, entropies, ref_logprobs, denominators,
    grad_logprobs, grad_values, table, ticket, loss, metrics, tokens, programs,
    low: tl.float64, high: tl.float64, value_clip: tl.float64, value_coef: tl.float64, entropy_coef: tl.float64,
    kl_coef: tl.float64, denominator: tl.float64,
    VALUES: tl.constexpr, VALUE_CLIP: tl.constexpr, ENTROPY: tl.constexpr, REFERENCE: tl.constexpr,
    DENOMINATOR: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < tokens
    counts = there & (tl.load(mask + at, mask=there, other=0) != 0)
    kl_weight, entropy_weight = tl.full((), kl_coef, ACC), tl.full((), entropy_coef, ACC)
    value_weight = tl.full((), value_coef, ACC)
    low, high = tl.full((), low, ACC), tl.full((), high, ACC)
    mine = table + program

    # -min(r A, clip(r) A): the clip stops the gradient where it makes the surrogate smaller.
    logprob = read(logprobs, at, counts, ACC)
    advantage = read(advantages, at, counts, ACC)
    raw = logprob - read(old_logprobs, at, counts, ACC)
    log_ratio = tl.where(raw > 80.0, 80.0, raw)
    ratio = tl.exp(log_ratio)
    surrogate = ratio * advantage
    clipped = tl.where(ratio > high, high, tl.where(ratio < low, low, ratio)) * advantage
    stopped = clipped < surrogate
    grad = tl.where(stopped | (raw > 80.0), 0.0, -surrogate)
    tl.store(mine, tl.sum(-tl.where(stopped, clipped, surrogate), 0))
    tl.store(mine + programs, tl.sum(stopped.to(ACC), 0))
    tl.store(mine + 2 * programs, tl.sum(k3(log_ratio), 0))
    ratio = tl.where(counts, ratio, 0.0)
    tl.store(mine + 3 * programs, tl.sum(ratio, 0))
    tl.store(mine + 10 * programs, tl.max(ratio, 0))

    if VALUES:
        value, target = read(values, at, counts, ACC), read(returns, at, counts, ACC)
        error, slope = (value - target) * (value - target), value - target
        if VALUE_CLIP:
            reach = tl.full((), value_clip, ACC)
            old = read(old_values, at, counts, ACC)
            move = value - old
            near = old + tl.where(move > reach, reach, tl.where(move < -reach, -reach, move))
            # Within the range use the value itself: old + move is rounded, and would be counted as clipped.
            near = tl.where(tl.abs(move) <= reach, value, near)
            near_error = (near - target) * (near - target)
            tl.store(mine + 5 * programs, tl.sum((near_error > error).to(ACC), 0))
            near_slope = tl.where(tl.abs(move) <= reach, near - target, 0.0)
            slope = tl.where(near_error > error, near_slope, slope)
            error = tl.where(near_error <= error, error, near_error)
        tl.store(mine + 4 * programs, tl.sum(0.5 * error, 0))
        tl.store(grad_values + at, value_weight * slope, mask=there)
    if ENTROPY:
        tl.store(mine + 6 * programs, tl.sum(read(entropies, at, counts, ACC), 0))
    if REFERENCE:
        d = logprob - read(ref_logprobs, at, counts, ACC)
        tl.store(mine + 7 * programs, tl.sum(k3(-d), 0))
        tl.store(mine + 8 * programs, tl.sum(0.5 * d * d, 0))
        grad += tl.where(kl_weight == 0.0, 0.0, kl_weight * d)
    tl.store(grad_logprobs + at, grad, mask=there)
    tl.store(mine + 9 * programs, tl.sum(counts.to(ACC), 0))

    # What this program wrote must be visible to the one that draws the last ticket.
    tl.debug_barrier()
    if tl.atomic_add(ticket, 1, sem="acq_rel") == programs - 1:
        if DENOMINATOR == 0:
            divisor = table_sum(table + 9 * programs, programs, ACC, BLOCK)
        elif DENOMINATOR == 1:
            divisor = tl.full((), denominator, ACC)
        else:
            divisor = tl.load(denominators).to(ACC)
        policy = table_sum(table, programs, ACC, BLOCK) / divisor
        ratio_mean = table_sum(table + 3 * programs, programs, ACC, BLOCK) / divisor
        total = policy
        value_loss, value_clipped, entropy, ref_kl, k2 = divisor * 0, divisor * 0, divisor * 0, divisor * 0, divisor * 0
        if VALUES:
            value_loss = table_sum(table + 4 * programs, programs, ACC, BLOCK) / divisor
            total += value_weight * value_loss
            if VALUE_CLIP:
                value_clipped = table_sum(table + 5 * programs, programs, ACC, BLOCK) / divisor
        if ENTROPY:
            entropy = table_sum(table + 6 * programs, programs, ACC, BLOCK) / divisor
            total -= tl.where(entropy_weight == 0.0, 0.0, entropy_weight * entropy)
        if REFERENCE:
            ref_kl = table_sum(table + 7 * programs, programs, ACC, BLOCK) / divisor
            k2 = table_sum(table + 8 * programs, programs, ACC, BLOCK) / divisor
            total += tl.where(kl_weight == 0.0, 0.0, kl_weight * k2)
        tl.store(metrics, policy)
        tl.store(metrics + 1, table_sum(table + programs, programs, ACC, BLOCK) / divisor)
        tl.store(metrics + 2, table_sum(table + 2 * programs, programs, ACC, BLOCK) / divisor)
        tl.store(metrics + 3, ratio_mean)
        tl.store(metrics + 4, value_loss)
        tl.store(metrics + 5, value_clipped)
        tl.store(metrics + 6, entropy)
        tl.store(metrics + 7, ref_kl)
        tl.store(metrics + 8, k2)
        tl.store(metrics + 9, divisor)
        highest = tl.zeros((BLOCK,), ACC)
        for start in range(0, programs, BLOCK):
            at_max = start + tl.arange(0, BLOCK)
            there_max = at_max < programs
            seen = tl.load(table + 10 * programs + at_max, mask=there_max, other=0.0, cache_modifier=".cg")
            highest = tl.maximum(highest, seen)
        tl.store(metrics + 10, tl.where(ratio_mean == ratio_mean, tl.max(highest, 0), ratio_mean))
        tl.store(loss, total)


@triton.jit(do_not_specialize=["tokens"])
def backward_kernel(
    up, metrics, mask, saved_logprobs, saved_values, grad_logprobs, grad_values, grad_entropies, tokens,
    entropy_coef: tl.float64,
    LOGPROBS: tl.constexpr, VALUES: tl.constexpr, ENTROPY: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each gradient times upstream / denominator; a store casts to the input's own type."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < tokens
    scale = tl.load(up).to(ACC) / tl.load(metrics + 9)
    counts = there & (tl.load(mask + at, mask=there, other=0) != 0)
    if LOGPROBS:
        tl.store(grad_logprobs + at, read(saved_logprobs, at, counts, ACC) * scale, mask=there)
    if VALUES:
        tl.store(grad_values + at, read(saved_values, at, counts, ACC) * scale, mask=there)
    if ENTROPY:
        weight = tl.full((), entropy_coef, ACC)
        tl.store(grad_entropies + at, tl.where(counts, -weight * scale, 0.0), mask=there)


def launch_forward(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    entropy: Tensor | None,
    ref_logprobs: Tensor | None,
    clip_range: float,
    value_clip_range: float | None,
    value_coef: float,
    entropy_coef: float,
    kl_coef: float,
    denominator: Tensor | None,
    denominator_value: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss (0-d), METRICS in one vector, and the gradients of logprobs and values times the denominator."""
    given = logprobs, old_logprobs, advantages, mask, values, old_values, returns, entropy, ref_logprobs
    dtype = compute_dtype(*given)
    if denominator is None and denominator_value is None and not mask.is_cuda and not bool(mask.any()):
        raise ValueError("no token counts: give the denominator of the whole optimizer step")
    if denominator is not None and denominator.device != mask.device:
        denominator_value, denominator = float(denominator), None
    mode = BY_TENSOR if denominator is not None else BY_COUNT if denominator_value is None else BY_NUMBER
    new = torch.empty
    device, tokens = mask.device, mask.numel()
    grad_logprobs = new(mask.shape, dtype=dtype, device=device)
    grad_values = new(mask.shape if values is not None else (0,), dtype=dtype, device=device)
    metrics, loss = new(len(METRICS), dtype=dtype, device=device), new((), dtype=dtype, device=device)
    programs = max(1, triton.cdiv(tokens, BLOCK))
    table = new((len(METRICS), programs), dtype=dtype, device=device)
    ticket = torch.zeros(1, dtype=torch.int32, device=device)
    inputs = [None if x is None else x.contiguous() for x in given]
    with on_device_of(mask):
        forward_kernel[(programs,)](
            *(mask if x is None else x for x in (*inputs, denominator)),
            grad_logprobs, grad_values, table, ticket, loss, metrics, tokens, programs,
            1 - clip_range, 1 + clip_range, 0.0 if value_clip_range is None else value_clip_range,
            value_coef, entropy_coef, kl_coef, 0.0 if denominator_value is None else denominator_value,
            VALUES=values is not None, VALUE_CLIP=value_clip_range is not None, ENTROPY=entropy is not None,
            REFERENCE=ref_logprobs is not None, DENOMINATOR=mode,
            ACC=tl.float64 if dtype == torch.float64 else tl.float32, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return loss, metrics, grad_logprobs, grad_values


def launch_backward(
    up: Tensor,
    metrics: Tensor,
    mask: Tensor,
    saved_logprobs: Tensor,
    saved_values: Tensor,
    entropy_coef: float,
    of_logprobs: torch.dtype | None,
    of_values: torch.dtype | None,
    of_entropy: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The three gradients in their inputs' types; one that isn't needed is empty."""
    wanted = of_logprobs, of_values, of_entropy
    grads = tuple(torch.empty(mask.shape if t else (0,), dtype=t or metrics.dtype, device=mask.device) for t in wanted)
    if mask.numel() and any(wanted):
        with on_device_of(mask):
            backward_kernel[(triton.cdiv(mask.numel(), BLOCK),)](
                up, metrics, mask.contiguous(), saved_logprobs, saved_values, *grads, mask.numel(), entropy_coef,
                LOGPROBS=of_logprobs is not None, VALUES=of_values is not None, ENTROPY=of_entropy is not None,
                ACC=tl.float64 if metrics.dtype == torch.float64 else tl.float32, BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
    return grads[0], grads[1], grads[2]


forward_op = torch.library.custom_op("minirlhf::ppo_loss", launch_forward, mutates_args=())
backward_op = torch.library.custom_op("minirlhf::ppo_loss_backward", launch_backward, mutates_args=())


@forward_op.register_fake
def _(logprobs: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mask, values = others[2], others[3]
    new = torch.empty((), dtype=compute_dtype(logprobs, *others[:8]), device=mask.device)
    grad_values = new.new_empty(mask.shape if values is not None else (0,))
    return new, new.new_empty(len(METRICS)), new.new_empty(mask.shape), grad_values


@backward_op.register_fake
def _(up: Tensor, metrics: Tensor, mask: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    grads = [mask.new_empty(mask.shape if t else (0,), dtype=t or metrics.dtype) for t in others[3:]]
    return grads[0], grads[1], grads[2]


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, metrics, grad_logprobs, grad_values = output
    ctx.save_for_backward(metrics, inputs[3], grad_logprobs, grad_values)
    ctx.entropy_coef = inputs[12]
    ctx.types = [None if x is None else x.dtype for x in (inputs[0], inputs[4], inputs[7])]


def _gradients(call: Any, ctx: Any, up: Tensor) -> tuple[Tensor | None, ...]:
    needed = [t if ctx.needs_input_grad[i] else None for t, i in zip(ctx.types, (0, 4, 7), strict=True)]
    grads = call(up, *ctx.saved_tensors, ctx.entropy_coef, *needed)
    out: list[Tensor | None] = [None] * 16
    for i, grad, dtype in zip((0, 4, 7), grads, needed, strict=True):
        out[i] = None if dtype is None else grad
    return tuple(out)


class PPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = launch_forward(*inputs)
        setup_context(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[1:])
        return output

    @staticmethod
    def backward(ctx: Any, up: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("ppo_loss")
        return _gradients(launch_backward, ctx, up)


forward_op.register_autograd(lambda ctx, up, *_: _gradients(backward_op, ctx, up), setup_context=setup_context)


def named(metrics: Tensor, values: Any, value_clip_range: Any, entropy: Any, ref_logprobs: Any) -> dict[str, Tensor]:
    """Those of METRICS that the reference returns for these inputs."""
    needs = {"value/loss": values, "value/clip_fraction": value_clip_range, "policy/entropy": entropy}
    needs |= {"policy/ref_kl": ref_logprobs, "k2": None, "denominator": None}
    pairs = zip(METRICS, metrics.unbind(), strict=True)
    return {name: metric for name, metric in pairs if needs.get(name, metrics) is not None}


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    entropy: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    clip_range: float = 0.2,
    value_clip_range: float | None = None,
    value_coef: float = 0.5,
    entropy_coef: float = 0.0,
    kl_coef: float = 0.0,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`reference.ppo_loss` in two kernels. On CUDA a mask that counts nothing gives NaN (no host sync)."""
    given = {"logprobs": logprobs, "old_logprobs": old_logprobs, "advantages": advantages, "values": values}
    given |= {"returns": returns, "old_values": old_values, "entropy": entropy, "ref_logprobs": ref_logprobs}
    _check_ppo(given, response_mask, clip_range, value_clip_range, entropy_coef, kl_coef)
    call = forward_op if torch.compiler.is_compiling() else PPOLoss.apply
    tensor = isinstance(denominator, Tensor)
    loss, metrics, *_ = call(
        logprobs, old_logprobs, advantages, response_mask, values, old_values, returns, entropy, ref_logprobs,
        float(clip_range), value_clip_range, float(value_coef), float(entropy_coef), float(kl_coef),
        denominator if tensor else None, None if tensor or denominator is None else float(denominator),
    )  # fmt: skip
    return loss, named(metrics, values, value_clip_range, entropy, ref_logprobs)
