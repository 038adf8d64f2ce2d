"""The mathematics of a row of logits: an online softmax over all its logits but the token's, and what it gives.

Of the row's logits z the token's is left out. Of the OTHERS three numbers are kept, for any part of the row:

    row_max     the highest logit so far (a running max)
    sum_exp     sum of exp(u), u = (z - row_max) / temperature
    sum_exp_u   sum of exp(u) u                                     what the entropy needs

Where another part has a higher max, the old sums are rescaled by exp((old max - new max) / temperature).

Why it is stable. Only differences of logits are ever scaled or exponentiated: adding 1000 to a row changes nothing.
No power is above 1. In `accumulate` a running max begins at the lowest finite number, so that -inf - max is -inf and
never NaN. The token is compared with the others, never subtracted from a sum that holds it:

    the token is highest   log p = -log1p(odds),   odds = sum of the others / token        1 - p = odds / (1 + odds)
    another one is         log p = u_token - log(ties) - log1p((below + exp(u_token)) / ties)

with `ties` others at the max and `below` the sum of all under it. Both are sums of terms of one sign: no cancellation,
and never above 0. At a margin of 20 nats, where 1 - p is lost in float32 and log_softmax gives 0, log p and its
gradient keep all their digits. So does the entropy, except where one of the others is far above the rest: there
1 + below has lost the digits of below, and the row is read again by `accumulate_below`, which sums the two separately.

How many digits that is depends on exp2 and log. In Triton's interpreter, where the tests of a machine without a GPU
run, they are numpy's and exact to a float32's last digit: errors of 1e-8 there are the algorithm's alone. A GPU's
ex2.approx and lg2.approx are good to 2^-22, so expect some 1e-7 on one.
"""

import triton
import triton.language as tl

LN2, LOG2E = tl.constexpr(0.6931471805599453), tl.constexpr(1.4426950408889634)
LOWEST, LOWEST64 = tl.constexpr(-3.4028234663852886e38), tl.constexpr(-1.7976931348623157e308)  # finite numbers
FAR = tl.constexpr(-1e30)  # a max that is further below is rescaled to nothing, and this can still be scaled
NEVER = tl.constexpr(-1500.0)  # 2 to this power is 0 in float64 too
CLOSE = tl.constexpr(0.03)  # in a sum of 1 + this, the rest keeps too few digits


@triton.jit
def log1p(y):
    """log(1 + y) for y >= 0, with all the digits of a y that 1 + y would round away: 2 atanh(y / (2 + y))."""
    s = y / (2.0 + y)
    q = s * s
    series = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))))))
    return tl.where(y < 0.25, 2.0 * s * series, tl.log(1.0 + y))


@triton.jit
def exp(x):
    """exp(x), x <= 0, to the last digit or two: 2^k exp(x - k ln 2). The hardware's is off by |x| / 2^24."""
    x = tl.maximum(x, -1000.0, propagate_nan=tl.PropagateNan.ALL)
    k = (x * LOG2E + 12582912.0) - 12582912.0  # 1.5 2^23: no float32 near it has a fraction
    remainder = (x - k * 0.693359375) + k * 2.121944400546905827679e-4  # ln 2 in two parts, k times the first is exact
    return tl.exp2(k) * tl.exp2(remainder * LOG2E)


@triton.jit
def accumulate(z, scale_log2, row_max, sum_exp, sum_exp_u, WANT_ENTROPY: tl.constexpr):
    """A block z [groups, GROUP] of logits (-inf where none counts) into each group's own sums [groups], u in bits."""
    new_max = tl.maximum(row_max, tl.max(z, 1))
    u_old = tl.maximum(tl.maximum(row_max - new_max, FAR) * scale_log2, NEVER)
    u = (z - new_max[:, None]) * scale_log2
    if WANT_ENTROPY:
        u = tl.maximum(u, NEVER, propagate_nan=tl.PropagateNan.ALL)  # -inf * 2^-inf is NaN
    e = tl.exp2(u)
    rescale = tl.exp2(u_old)
    sum_exp *= rescale
    if WANT_ENTROPY:
        sum_exp_u = sum_exp_u * rescale + u_old * sum_exp + tl.sum(e * u, 1)
    return new_max, sum_exp + tl.sum(e, 1), sum_exp_u


@triton.jit
def reduce_groups(scale_log2, row_max, sum_exp, sum_exp_u):
    """The groups' sums [groups] as the row's: max (-inf where nothing counts), sum, and sum of exp(u) u in nats."""
    top = tl.max(row_max, 0)
    gap = tl.maximum(row_max - top, FAR, propagate_nan=tl.PropagateNan.ALL)
    u = tl.maximum(gap * scale_log2, NEVER, propagate_nan=tl.PropagateNan.ALL)
    rescale = tl.exp2(u)
    total = tl.sum(sum_exp * rescale, 0)
    total_u = tl.sum(rescale * (sum_exp_u + u * sum_exp), 0) * LN2
    return tl.where(total == 0.0, float("-inf"), top), total, total_u


@triton.jit
def accumulate_below(z, scale, row_max, ties, below, sum_exp_u):
    """A block z of logits into lanes of sums, those at the row's max counted separately; in nats, to the last digit."""
    shift = tl.where(row_max == float("-inf"), 0.0, row_max)
    u = (z - shift) * scale
    e = exp(u)
    tie = tl.where(z == shift, 1.0, 0.0)
    below += e - tie  # exactly 0 at the max
    sum_exp_u += tl.where(e > 0.0, e * u, 0.0)  # 0 * -inf is NaN
    return ties + tie, below, sum_exp_u


@triton.jit
def rescaled(new_max, scale, row_max, ties, below, sum_exp_u):
    """A part's sums, measured from a max that is as high as its own or higher."""
    u = tl.where(row_max == float("-inf"), 0.0, (row_max - new_max) * scale)
    u = tl.maximum(u, -1000.0, propagate_nan=tl.PropagateNan.ALL)  # exp gives 0, and 0 * -inf is NaN
    rescale = exp(u)
    sum_exp = ties + below
    below = tl.where(new_max > row_max, rescale * sum_exp, below)
    ties = tl.where(new_max > row_max, 0.0, ties)
    return ties, below, rescale * (sum_exp_u + u * sum_exp)


@triton.jit
def merge(scale, max_a, ties_a, below_a, sum_exp_u_a, max_b, ties_b, below_b, sum_exp_u_b):
    """Two parts of a row as one: what is at the lower max is below the higher."""
    new_max = tl.maximum(max_a, max_b)
    ties_a, below_a, sum_exp_u_a = rescaled(new_max, scale, max_a, ties_a, below_a, sum_exp_u_a)
    ties_b, below_b, sum_exp_u_b = rescaled(new_max, scale, max_b, ties_b, below_b, sum_exp_u_b)
    return new_max, ties_a + ties_b, below_a + below_b, sum_exp_u_a + sum_exp_u_b


@triton.jit
def finish(z_token, scale, row_max, ties, below, sum_exp_u):
    """log p, entropy, the max of all logits, log of the sum of exp(u) under that max, and 1 - p."""
    sum_exp = ties + below
    u_token = (z_token - tl.where(row_max == float("-inf"), 0.0, row_max)) * scale
    token_is_max = z_token > row_max
    # The token is highest: the others are rescaled to it. `mean_gap` is how far below it they are, times their p.
    gap = tl.where(token_is_max, u_token, 0.0)
    rescale = tl.where(sum_exp > 0.0, exp(-gap), 0.0)
    odds = sum_exp * rescale
    log_odds = log1p(odds)
    mean_gap = tl.where(rescale > 0.0, rescale * (gap * sum_exp - sum_exp_u), 0.0) / (1.0 + odds)
    # Another one is.
    p_token = exp(tl.where(token_is_max, 0.0, u_token))
    log_sum = tl.log(ties) + log1p((below + p_token) / ties)
    sum_exp_u += tl.where(p_token > 0.0, p_token * u_token, 0.0)
    logprob = tl.where(token_is_max, 0.0 - log_odds, u_token - log_sum)
    entropy = tl.where(token_is_max, log_odds + mean_gap, log_sum - sum_exp_u / (sum_exp + p_token))
    one_minus_p = tl.where(token_is_max, odds / (1.0 + odds), sum_exp / (sum_exp + p_token))
    return logprob, entropy, tl.maximum(z_token, row_max), tl.where(token_is_max, log_odds, log_sum), one_minus_p


@triton.jit
def gradient(z, row_max, scale, intercept, slope, OF_ENTROPY: tl.constexpr):
    """exp(u) (intercept + slope u), u = (z - row_max) / temperature."""
    u = (z - row_max) * scale
    if OF_ENTROPY:
        u = tl.maximum(u, -1000.0, propagate_nan=tl.PropagateNan.ALL)  # exp(-inf) * -inf is NaN
        grad = exp(u) * (intercept + slope * u)
    else:
        grad = exp(u) * intercept
    return grad
