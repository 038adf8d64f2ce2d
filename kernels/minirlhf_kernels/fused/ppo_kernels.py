"""PPO's loss, its gradients and every metric: one launch forward, one backward, no word back to the host.

At 45 bytes a token this op is bound by launches, so everything happens in one pass. A program loads a block of tokens,
works out every term in registers, and writes the two gradients that need it (before the division by the denominator,
which nobody knows yet) and its sums, a row of a table:

    tokens   [tokens]          block 0 | block 1 | ...             a program per block
    table    [programs, 16]    its sums, a column per metric       the last program to finish adds the rows up
    metrics  [11]              the sums / denominator, and of them the loss

Each program draws a ticket, an integer atomic; whoever draws the last one knows that the table is complete and adds it
up, always in the same order: the same bits on every run. Backward multiplies what was saved by (upstream gradient /
denominator), for all three inputs in one launch.

Why it is stable. Tokens that don't count are never loaded: NaN may lie there. NaN in one that counts reaches the loss:
`where` on a comparison passes it on where Triton's minimum and maximum would swallow it. log r stops at 80, above which
exp overflows and the clipped branch's gradient would be 0 * inf. k3 = exp(x) - 1 - x is a series near 0, where the
difference would leave nothing.
"""

import triton
import triton.language as tl

METRICS = (
    "policy/loss", "policy/clip_fraction", "policy/approx_kl", "policy/ratio_mean", "value/loss", "value/clip_fraction",
    "policy/entropy", "policy/ref_kl", "kl_loss", "denominator", "policy/ratio_max",
)  # fmt: skip
POLICY, VALUE, ENTROPY_MEAN = (tl.constexpr(METRICS.index(x)) for x in ("policy/loss", "value/loss", "policy/entropy"))
KL, COUNT = tl.constexpr(METRICS.index("kl_loss")), tl.constexpr(METRICS.index("denominator"))
RATIO_MEAN, RATIO_MAX = (tl.constexpr(METRICS.index(f"policy/ratio_{x}")) for x in ("mean", "max"))
COLUMNS = tl.constexpr(16)  # of the table: a power of two
BY_COUNT, BY_NUMBER, BY_TENSOR = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # where the denominator comes from


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
def stack(a, b, c, d, e, f, g, h):
    """Eight [BLOCK] as [BLOCK, 8]."""
    abcd = tl.join(tl.join(a, c), tl.join(b, d))
    efgh = tl.join(tl.join(e, g), tl.join(f, h))
    return tl.reshape(tl.permute(tl.join(abcd, efgh), (0, 3, 1, 2)), (a.shape[0], 8))


@triton.jit(
    do_not_specialize=["tokens", "programs", "columns"],
    do_not_specialize_on_alignment=[
        "logprobs", "old_logprobs", "advantages", "mask", "values", "old_values", "returns", "entropies",
        "ref_logprobs", "lengths", "denominators", "grad_logprobs", "grad_values", "table", "ticket", "loss", "metrics",
    ],
)  # fmt: skip
def forward_kernel(
    logprobs, old_logprobs, advantages, mask, values, old_values, returns, entropies, ref_logprobs, lengths,
    denominators, grad_logprobs, grad_values, table, ticket, loss, metrics, tokens, programs, columns,
    low: tl.float64, high: tl.float64, value_clip: tl.float64, value_coef: tl.float64, entropy_coef: tl.float64,
    kl_coef: tl.float64, denominator: tl.float64,
    VALUES: tl.constexpr, VALUE_CLIP: tl.constexpr, ENTROPY: tl.constexpr, REFERENCE: tl.constexpr, K3: tl.constexpr,
    SEQUENCE_MEAN: tl.constexpr, DENOMINATOR: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_range = at < tokens
    counts = in_range & (tl.load(mask + at, mask=in_range, other=0) != 0)
    weight = counts.to(ACC)
    if SEQUENCE_MEAN:  # a token's share of its sequence
        weight /= tl.load(lengths + at // columns, mask=counts, other=1).to(ACC)
    value_coef, entropy_coef = tl.full((), value_coef, ACC), tl.full((), entropy_coef, ACC)
    kl_coef = tl.full((), kl_coef, ACC)
    low, high = tl.full((), low, ACC), tl.full((), high, ACC)

    # -min(r A, clip(r) A): the clip stops the gradient where it makes the surrogate smaller.
    logprob = read(logprobs, at, counts, ACC)
    advantage = read(advantages, at, counts, ACC)
    difference = logprob - read(old_logprobs, at, counts, ACC)
    log_ratio = tl.where(difference > 80.0, 80.0, difference)
    ratio = tl.exp(log_ratio)
    surrogate = ratio * advantage
    clipped = tl.where(ratio > high, high, tl.where(ratio < low, low, ratio)) * advantage
    is_clipped = clipped < surrogate
    grad = tl.where(is_clipped | (difference > 80.0), 0.0, -surrogate)
    policy = -tl.where(is_clipped, clipped, surrogate)

    zero = tl.zeros((BLOCK,), ACC)
    value_error, value_is_clipped, entropy, ref_kl, kl_loss = zero, zero, zero, zero, zero
    if VALUES:
        value, target = read(values, at, counts, ACC), read(returns, at, counts, ACC)
        error, grad_value = (value - target) * (value - target), value - target
        if VALUE_CLIP:
            limit = tl.full((), value_clip, ACC)
            old = read(old_values, at, counts, ACC)
            move = value - old
            near = old + tl.where(move > limit, limit, tl.where(move < -limit, -limit, move))
            # Within the limit the value itself: old + move is off by a rounding, and would be counted as clipped.
            near = tl.where(tl.abs(move) <= limit, value, near)
            near_error = (near - target) * (near - target)
            value_is_clipped = (near_error > error).to(ACC)
            grad_near = tl.where(tl.abs(move) <= limit, near - target, 0.0)
            grad_value = tl.where(near_error > error, grad_near, grad_value)
            error = tl.where(near_error <= error, error, near_error)
        value_error = 0.5 * error
        tl.store(grad_values + at, value_coef * grad_value * weight, mask=in_range)
    if ENTROPY:
        entropy = read(entropies, at, counts, ACC)
    if REFERENCE:
        d = logprob - read(ref_logprobs, at, counts, ACC)
        ref_kl = k3(-d)
        kl_loss = ref_kl if K3 else 0.5 * d * d
        grad += tl.where(kl_coef == 0.0, 0.0, kl_coef * (1.0 - tl.exp(-d) if K3 else d))
    tl.store(grad_logprobs + at, grad * weight, mask=in_range)

    column = tl.arange(0, COLUMNS)
    first = stack(policy, is_clipped.to(ACC), k3(log_ratio), ratio, value_error, value_is_clipped, entropy, ref_kl)
    second = stack(kl_loss, zero + 1.0, zero, zero, zero, zero, zero, zero)  # the order of METRICS
    both = tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), (BLOCK, COLUMNS))
    sums = tl.sum(both * weight[:, None], 0)
    sums = tl.where(column == RATIO_MAX, tl.max(tl.where(counts, ratio, 0.0), 0), sums)
    tl.store(table + program * COLUMNS + column, sums)

    # What this program wrote must be seen by whoever draws the last ticket.
    tl.debug_barrier()
    if tl.atomic_add(ticket, 1, sem="acq_rel") == programs - 1:
        rows = tl.arange(0, BLOCK // COLUMNS)[:, None]
        total, highest = tl.zeros((BLOCK // COLUMNS, COLUMNS), ACC), tl.zeros((BLOCK // COLUMNS, COLUMNS), ACC)
        for start in range(0, programs, BLOCK // COLUMNS):
            places = (start + rows) * COLUMNS + column[None, :]
            # .cg reads past this processor's own cache, which knows nothing of the others' writes
            part = tl.load(table + places, mask=start + rows < programs, other=0.0, cache_modifier=".cg")
            total += part
            highest = tl.maximum(highest, part)
        total, highest = tl.sum(total, 0), tl.max(highest, 0)
        if DENOMINATOR == BY_COUNT:
            divisor = tl.sum(tl.where(column == COUNT, total, 0.0), 0)
        elif DENOMINATOR == BY_NUMBER:
            divisor = tl.full((), denominator, ACC)
        else:
            divisor = tl.load(denominators).to(ACC)
        means = total / divisor
        coef = tl.where(column == POLICY, 1.0, tl.where(column == VALUE, value_coef, 0.0))
        coef = tl.where(column == ENTROPY_MEAN, -entropy_coef, tl.where(column == KL, kl_coef, coef))
        # What has no coefficient stays out, NaN too; a value loss takes part as it does in the definition.
        used = (coef != 0.0) | ((column == VALUE) & VALUES)
        tl.store(loss, tl.sum(tl.where(used, coef * means, 0.0), 0))
        ratio_mean = tl.sum(tl.where(column == RATIO_MEAN, means, 0.0), 0)
        highest = tl.where(ratio_mean == ratio_mean, highest, ratio_mean)  # a max may swallow NaN
        means = tl.where(column == RATIO_MAX, highest, tl.where(column == COUNT, divisor, means))
        tl.store(metrics + column, means, mask=column <= RATIO_MAX)


@triton.jit(
    do_not_specialize=["tokens", "columns"],
    do_not_specialize_on_alignment=[
        "grad_loss", "metrics", "mask", "lengths", "saved_logprobs", "saved_values", "grad_logprobs", "grad_values",
        "grad_entropies",
    ],
)  # fmt: skip
def backward_kernel(
    grad_loss, metrics, mask, lengths, saved_logprobs, saved_values, grad_logprobs, grad_values, grad_entropies,
    tokens, columns, entropy_coef: tl.float64,
    LOGPROBS: tl.constexpr, VALUES: tl.constexpr, ENTROPY: tl.constexpr, SEQUENCE_MEAN: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each gradient times upstream / denominator; a store casts to the input's own type."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_range = at < tokens
    scale = tl.load(grad_loss).to(ACC) / tl.load(metrics + COUNT)
    counts = in_range & (tl.load(mask + at, mask=in_range, other=0) != 0)
    if LOGPROBS:
        tl.store(grad_logprobs + at, read(saved_logprobs, at, counts, ACC) * scale, mask=in_range)
    if VALUES:
        tl.store(grad_values + at, read(saved_values, at, counts, ACC) * scale, mask=in_range)
    if ENTROPY:
        weight = scale * counts.to(ACC)
        if SEQUENCE_MEAN:
            weight /= tl.load(lengths + at // columns, mask=counts, other=1).to(ACC)
        coef = tl.full((), entropy_coef, ACC)
        tl.store(grad_entropies + at, tl.where(counts, -coef * weight, 0.0), mask=in_range)
