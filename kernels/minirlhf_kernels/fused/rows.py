"""The mathematics of one row for the kernels: partial sums that can be merged, and the results computed from them.

In a row of logits z the token is set aside; for the OTHERS three numbers are kept, for any part of the row:

    peak      the highest logit so far
    total     sum of 2^w, w = (z - peak) log2(e) / temperature
    slope     sum of 2^w w                                          what the entropy needs

If another part has a higher peak, the old sums are scaled by 2^((old - new) log2(e) / temperature).

Why it is stable. Only differences of logits are ever scaled or exponentiated: adding 1000 to a row changes nothing.
No power is above 1. In `fold` a peak starts at the lowest finite number, so that -inf - peak is -inf and never NaN.
The token is compared with the others, never subtracted from a sum that includes it:

    the token leads     log p = -log1p(odds),   odds = sum of the others / token        1 - p = odds / (1 + odds)
    another one leads   log p = u_token - log(leaders) - log1p((rest + exp(u_token)) / leaders)

with u = (z - peak) / temperature, `leaders` others at the peak and `rest` the sum of all below it. Both are sums of
terms of one sign: no cancellation, and never above 0. At a margin of 20 nats, where 1 - p is lost in float32 and
log_softmax gives 0, log p and its gradient keep all their digits. So does the entropy, except if another logit leads
by far: then 1 + rest has lost the digits of rest, and the row needs `fold_apart`, which sums the leaders separately.
"""

import triton
import triton.language as tl

LN2, LOG2E = tl.constexpr(0.6931471805599453), tl.constexpr(1.4426950408889634)
LOWEST, LOWEST64 = tl.constexpr(-3.4028234663852886e38), tl.constexpr(-1.7976931348623157e308)  # finite numbers
FAR = tl.constexpr(-1e30)  # a peak further below than this adds nothing, and this can still be scaled
NEVER = tl.constexpr(-1500.0)  # 2 to this power is 0 in float64 too
CLOSE = tl.constexpr(0.03)  # below this, 1 + rest keeps too few digits of rest


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
    left = (x - k * 0.693359375) + k * 2.121944400546905827679e-4  # ln 2 in two parts, k times the first is exact
    return tl.exp2(k) * tl.exp2(left * LOG2E)


@triton.jit
def fold(z, bits, peak, total, slope, WANT_ENTROPY: tl.constexpr):
    """Add a block z [groups, GROUP] of logits (-inf where none counts) to each group's own sums [groups]."""
    higher = tl.maximum(peak, tl.max(z, 1))
    step = tl.maximum(tl.maximum(peak - higher, FAR) * bits, NEVER)
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
    """Join the groups' sums into the row's: peak (-inf if nothing counts), total, and slope in nats."""
    peak = tl.max(peaks, 0)
    apart = tl.maximum(peaks - peak, FAR, propagate_nan=tl.PropagateNan.ALL)
    step = tl.maximum(apart * bits, NEVER, propagate_nan=tl.PropagateNan.ALL)
    fade = tl.exp2(step)
    total = tl.sum(totals * fade, 0)
    slope = tl.sum(fade * (slopes + step * totals), 0) * LN2
    return tl.where(total == 0.0, float("-inf"), peak), total, slope


@triton.jit
def seen_from(higher, scale, peak, leaders, rest, slope):
    """Sums of a part, with its `leaders` separate, relative to a peak that is as high or higher."""
    step = tl.where(peak == float("-inf"), 0.0, (peak - higher) * scale)
    step = tl.maximum(step, -1000.0, propagate_nan=tl.PropagateNan.ALL)  # it fades to 0, and 0 * -inf is NaN
    fade = exp(step)
    old = leaders + rest
    rest = tl.where(higher > peak, fade * old, rest)
    leaders = tl.where(higher > peak, 0.0, leaders)
    return leaders, rest, fade * (slope + step * old)


@triton.jit
def fold_apart(z, scale, peak, leaders, rest, slope):
    """Add a block z of logits to lanes of sums, with the leaders summed separately; in nats, to the last digit."""
    higher = tl.maximum(peak, tl.max(z, 0))
    leaders, rest, slope = seen_from(higher, scale, peak, leaders, rest, slope)
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    u = (z - shift) * scale
    e = exp(u)
    leads = tl.where(z == shift, 1.0, 0.0)
    rest += e - leads  # exactly 0 for a leader
    slope += tl.where(e > 0.0, e * u, 0.0)  # 0 * -inf is NaN
    return higher, leaders + leads, rest, slope


@triton.jit
def merge(scale, peak, leaders, rest, slope, other_peak, other_leaders, other_rest, other_slope):
    """Merge two parts of a row: the leaders of the lower one join the rest."""
    higher = tl.maximum(peak, other_peak)
    leaders, rest, slope = seen_from(higher, scale, peak, leaders, rest, slope)
    other_leaders, other_rest, other_slope = seen_from(
        higher, scale, other_peak, other_leaders, other_rest, other_slope
    )
    return higher, leaders + other_leaders, rest + other_rest, slope + other_slope


@triton.jit
def finish(z_token, scale, peak, leaders, rest, slope):
    """log p, entropy, the row's highest logit, log of the sum below it, and 1 - p, from the sums of the others."""
    total = leaders + rest
    x = (z_token - tl.where(peak == float("-inf"), 0.0, peak)) * scale
    token_leads = z_token > peak
    # The token leads: all others are relative to it.
    fade = tl.where(total > 0.0, exp(-tl.where(token_leads, x, 0.0)), 0.0)
    odds = total * fade
    log_odds = log1p(odds)
    spread = tl.where(fade > 0.0, fade * (tl.where(token_leads, x, 0.0) * total - slope), 0.0) / (1.0 + odds)
    # Another logit leads.
    own = exp(tl.where(token_leads, 0.0, x))
    log_sum = tl.log(leaders) + log1p((rest + own) / leaders)
    slope += tl.where(own > 0.0, own * x, 0.0)
    logprob = tl.where(token_leads, 0.0 - log_odds, x - log_sum)
    entropy = tl.where(token_leads, log_odds + spread, log_sum - slope / (total + own))
    complement = tl.where(token_leads, odds / (1.0 + odds), total / (total + own))
    return logprob, entropy, tl.maximum(z_token, peak), tl.where(token_leads, log_odds, log_sum), complement


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
