"""Answers to lesson 06 in other hands; test_corpus.py says how to read them."""

from __future__ import annotations

import numpy as np
import torch
from minirlhf_course.checks.lesson06 import after, tl

# 6.1 -----------------------------------------------------------------------------------------------------------------


def margin_of_lanes(logits, tokens, margins, columns, row_stride, BLOCK: tl.constexpr):
    """A maximum per lane, reduced once, at the end."""
    row = tl.program_id(0)
    base = logits + row * row_stride
    lanes = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    for start in range(0, columns, BLOCK):
        best = tl.maximum(best, tl.load(base + start + lanes, mask=start + lanes < columns, other=-float("inf")))
    tl.store(margins + row, tl.load(base + tl.load(tokens + row)) - tl.max(best, 0))


def margin_on_the_way(logits, tokens, margins, columns, row_stride, BLOCK: tl.constexpr):
    """The token's logit is picked up while reading; differences are taken at once."""
    row = tl.program_id(0)
    token = tl.load(tokens + row)
    z_max = -float("inf")
    z_token = 0.0
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(logits + row * row_stride + at, mask=at < columns, other=-1e30)
        z_max = tl.maximum(z_max, tl.max(z, axis=0))
        z_token += tl.sum(tl.where(at == token, z, 0.0), axis=0)
    tl.store(margins + row, z_token - z_max)


# 6.2 -----------------------------------------------------------------------------------------------------------------


def fold_where(peak, total, block):
    new = torch.maximum(peak, block.max(dim=1).values)
    scale = torch.where(total > 0, torch.exp(peak - new), torch.zeros_like(total))
    terms = torch.where(torch.isinf(block), torch.zeros_like(block), torch.exp(block - new[:, None]))
    return new, total * scale + terms.sum(1)


def fold_by_logsumexp(peak, total, block):
    new = torch.maximum(peak, block.amax(1))
    shift = new.nan_to_num(neginf=0.0)
    log_total = torch.logaddexp(peak + total.log(), block.logsumexp(1))
    return [new, (log_total - shift).exp()]


def fold_by_hand(peak, total, block):
    m, s = torch.zeros(len(peak)), torch.zeros(len(peak))
    for i in range(len(peak)):
        a, b = float(peak[i]), float(total[i])
        for z in block[i].tolist():
            if z == -np.inf:
                continue
            top = max(a, z)
            b = b * np.exp(a - top) + np.exp(z - top)
            a = top
        m[i], s[i] = a, b
    return m, s


# 6.3 -----------------------------------------------------------------------------------------------------------------


def logprob_one_lane_at_a_time(logits, tokens, logprobs, columns, row_stride, BLOCK: tl.constexpr):
    """Each lane keeps a peak and a sum of its own; they are joined at the end."""
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    peaks = tl.full((BLOCK,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        z = tl.load(logits + row * row_stride + start + lanes, mask=start + lanes < columns, other=float("-inf"))
        new = tl.maximum(peaks, z)
        base = tl.where(new == float("-inf"), 0.0, new)
        sums = sums * tl.exp(peaks - base) + tl.exp(z - base)
        peaks = new
    peak = tl.max(peaks, 0)
    total = tl.sum(sums * tl.exp(peaks - peak), 0)
    z_token = tl.load(logits + row * row_stride + tl.load(tokens + row))
    tl.store(logprobs + row, z_token - (peak + tl.log(total)))


def logprob_picks_up_the_token(logits, tokens, logprobs, columns, row_stride, BLOCK: tl.constexpr):
    """The token's logit is picked up on the way."""
    row = tl.program_id(0)
    token = tl.load(tokens + row)
    base = logits + row * row_stride
    m = tl.full((), -1e30, tl.float32)
    s = tl.full((), 0.0, tl.float32)
    z_token = tl.full((), 0.0, tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(base + at, mask=at < columns, other=-float("inf"))
        new = tl.maximum(m, tl.max(z, 0))
        s = s * tl.exp(m - new) + tl.sum(tl.exp(z - new), 0)
        z_token += tl.sum(tl.where(at == token, z, 0.0), 0)
        m = new
    tl.store(logprobs + row, z_token - m - tl.log(s))


# 6.4 -----------------------------------------------------------------------------------------------------------------


def clip_by_corners(logprobs, old_logprobs, advantages, clip_range):
    r = torch.exp(logprobs - old_logprobs)
    flat = ((advantages > 0) & (r > 1 + clip_range)) | ((advantages < 0) & (r < 1 - clip_range))
    return torch.where(flat, torch.zeros_like(r), -r * advantages)


def clip_by_autograd(logprobs, old_logprobs, advantages, clip_range):
    x = logprobs.detach().float().requires_grad_()
    ratio = (x - old_logprobs.float()).exp()
    surr1, surr2 = ratio * advantages.float(), ratio.clamp(1 - clip_range, 1 + clip_range) * advantages.float()
    (-torch.min(surr1, surr2)).sum().backward()
    return x.grad


def clip_in_numpy(logprobs, old_logprobs, advantages, clip_range):
    r, a = np.exp(logprobs.numpy() - old_logprobs.numpy()), advantages.numpy()
    moves = np.where(a >= 0, r <= 1 + clip_range, r >= 1 - clip_range)
    return -(moves * r * a)


# 6.5 -----------------------------------------------------------------------------------------------------------------


def loss_by_corners(logprobs, old_logprobs, advantages, mask, losses, gradients, count, low, high, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    on = inside & (tl.load(mask + at, mask=inside, other=0).to(tl.int32) == 1)
    new = tl.load(logprobs + at, mask=on, other=0.0)
    old = tl.load(old_logprobs + at, mask=on, other=0.0)
    a = tl.load(advantages + at, mask=on, other=0.0)
    r = tl.exp(new - old)
    flat = ((a > 0) & (r > high)) | ((a < 0) & (r < low))
    bound = tl.where(a > 0, high, low)
    tl.store(losses + at, tl.where(flat, -bound * a, -r * a), mask=inside)
    tl.store(gradients + at, tl.where(flat, 0.0, -r * a), mask=inside)


def loss_cleanrl(logprobs, old_logprobs, advantages, mask, losses, gradients, count, low, high, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = tl.load(mask + at, mask=at < count, other=0) != 0
    keep = keep & (at < count)
    new = tl.load(logprobs + at, mask=keep, other=0.0)
    old = tl.load(old_logprobs + at, mask=keep, other=0.0)
    adv = tl.load(advantages + at, mask=keep, other=0.0)
    ratio = tl.exp(new - old)
    loss1 = -adv * ratio
    loss2 = -adv * tl.minimum(tl.maximum(ratio, low), high)
    tl.store(losses + at, tl.maximum(loss1, loss2), mask=at < count)
    tl.store(gradients + at, tl.where(loss2 > loss1, 0.0, loss1), mask=at < count)


# 6.6 -----------------------------------------------------------------------------------------------------------------


def gae_scan(rewards, values, ends, last_values, advantages, steps, gamma, lam, STEPS: tl.constexpr):
    row = tl.program_id(0)
    t = steps - 1 - tl.arange(0, STEPS)
    at = row * steps + t
    inside = t >= 0
    nonterminal = 1.0 - tl.load(ends + at, mask=inside, other=1).to(tl.float32)
    v = tl.load(values + at, mask=inside, other=0.0)
    v_next = tl.load(values + at + 1, mask=inside & (t < steps - 1), other=0.0)
    v_next = tl.where(t == steps - 1, tl.load(last_values + row), v_next)
    delta = tl.load(rewards + at, mask=inside, other=0.0) + gamma * v_next * nonterminal - v
    _, result = tl.associative_scan((gamma * lam * nonterminal, delta), 0, after)
    tl.store(advantages + at, result, mask=inside)


def gae_reversed_scan(rewards, values, ends, last_values, advantages, steps, gamma, lam, STEPS: tl.constexpr):
    """Time runs forwards in the lanes, and the scan backwards."""
    row = tl.program_id(0)
    t = tl.arange(0, STEPS)
    inside = t < steps
    at = row * steps + t
    goes_on = tl.where(tl.load(ends + at, mask=inside, other=1) != 0, 0.0, 1.0)
    v = tl.load(values + at, mask=inside, other=0.0)
    v_next = tl.load(values + at + 1, mask=t + 1 < steps, other=0.0)
    v_next = tl.where(t + 1 == steps, tl.load(last_values + row), v_next)
    delta = tl.load(rewards + at, mask=inside, other=0.0) + gamma * goes_on * v_next - v
    decay = gamma * lam * goes_on
    _, result = tl.associative_scan((decay, delta), 0, after, reverse=True)
    tl.store(advantages + at, result, mask=inside)


RIGHT = {
    "margin": {"a maximum per lane": margin_of_lanes, "picks up the token": margin_on_the_way},
    "fold": {"where": fold_where, "logsumexp, a list": fold_by_logsumexp, "a loop in float32": fold_by_hand},
    "token_logprobs": {"a peak per lane": logprob_one_lane_at_a_time, "picks up the token": logprob_picks_up_the_token},
    "clip_gradient": {"corners": clip_by_corners, "autograd in float32": clip_by_autograd, "numpy": clip_in_numpy},
    "clipped_loss": {"corners": loss_by_corners, "CleanRL: the max of two losses": loss_cleanrl},
    "gae": {"CleanRL's names": gae_scan, "a scan in reverse": gae_reversed_scan},
}

WRONG = {
    "margin": [
        ("The tail has no mask", margin_on_the_way, (", mask=at < columns, other=-1e30", "")),
        ("Beyond the last column it reads 0", margin_on_the_way, ("other=-1e30", "other=0.0")),
        ("The maximum begins at 0", margin_on_the_way, ('z_max = -float("inf")', "z_max = 0.0")),
        (
            "This is the maximum of the last block",
            margin_on_the_way,
            ("tl.maximum(z_max, tl.max(z, axis=0))", "tl.max(z, axis=0)"),
        ),
        ("It reads the first block only", margin_of_lanes, ("range(0, columns, BLOCK)", "range(0, BLOCK, BLOCK)")),
        ("Rows begin row_stride apart", margin_of_lanes, ("row * row_stride", "row * columns")),
        ("Every program reads the first row", margin_of_lanes, ("logits + row * row_stride", "logits")),
        (
            "The token is looked up in the first row",
            margin_of_lanes,
            ("tl.load(base + tl.load(tokens + row))", "tl.load(logits + tl.load(tokens + row))"),
        ),
        (
            "The token's number is taken for its logit",
            margin_of_lanes,
            ("tl.load(base + tl.load(tokens + row))", "tl.load(tokens + row)"),
        ),
        ("The sign is wrong", margin_on_the_way, ("z_token - z_max", "z_max - z_token")),
        (None, margin_on_the_way, ("z_token - z_max", "0.5 * (z_token - z_max)")),
    ],
    "fold": [
        ("The old sum is not rescaled", fold_where, ("total * scale", "total")),
        ("The new peak forgets the old one", lambda peak, total, block: _newest(peak, total, block)),
        (
            "-inf minus -inf is NaN",
            fold_where,
            ("torch.where(total > 0, torch.exp(peak - new), torch.zeros_like(total))", "torch.exp(peak - new)"),
            (
                "torch.where(torch.isinf(block), torch.zeros_like(block), torch.exp(block - new[:, None]))",
                "torch.exp(block - new[:, None])",
            ),
        ),
        ("Both results are right, but swapped", lambda *args: fold_where(*args)[::-1]),
        ("The block is not added", fold_where, (" + terms.sum(1)", "")),
        (
            "The second result is the log of the sum",
            fold_by_logsumexp,
            ("(log_total - shift).exp()", "log_total - shift"),
        ),
        ("One peak for all rows", fold_where, ("block.max(dim=1).values", "block.max()")),
        ("has the shape", fold_where, ("terms.sum(1)", "terms.sum(1, keepdim=True)")),
        (None, fold_where, ("total * scale +", "total * scale + 0.5 *")),
    ],
    "token_logprobs": [
        ("The tail has no mask", logprob_picks_up_the_token, (', mask=at < columns, other=-float("inf")', "")),
        ("Beyond the last column it reads 0", logprob_picks_up_the_token, ('other=-float("inf")', "other=0.0")),
        ("The old sum is not rescaled", logprob_picks_up_the_token, ("s * tl.exp(m - new)", "s")),
        ("Rows begin row_stride apart", logprob_picks_up_the_token, ("row * row_stride", "row * columns")),
        (
            "The peak is not in the result",
            logprob_picks_up_the_token,
            ("z_token - m - tl.log(s)", "z_token - tl.log(s)"),
        ),
        (
            "This is the probability",
            logprob_picks_up_the_token,
            ("z_token - m - tl.log(s)", "tl.exp(z_token - m - tl.log(s))"),
        ),
        ("The sign is wrong", logprob_picks_up_the_token, ("z_token - m - tl.log(s)", "m + tl.log(s) - z_token")),
        (
            "It reads the first block only",
            logprob_one_lane_at_a_time,
            ("range(0, columns, BLOCK)", "range(0, BLOCK, BLOCK)"),
        ),
        (None, logprob_picks_up_the_token, ("z_token - m - tl.log(s)", "z_token - m - 0.5 * tl.log(s)")),
    ],
    "clip_gradient": [
        (
            "It stops wherever the ratio is outside",
            clip_by_corners,
            ("(advantages > 0) & ", ""),
            ("(advantages < 0) & ", ""),
        ),
        ("It stops for A > 0 only", clip_by_corners, (" | ((advantages < 0) & (r < 1 - clip_range))", "")),
        (
            "It stops on the wrong side",
            clip_by_corners,
            ("(advantages > 0) & (r >", "(advantages < 0) & (r >"),
            ("(advantages < 0) & (r <", "(advantages > 0) & (r <"),
        ),
        ("This is the derivative with respect to r", clip_by_corners, ("-r * advantages", "-advantages")),
        ("The sign is wrong", clip_by_corners, ("-r * advantages", "r * advantages")),
        ("This is the gradient of the mean", clip_by_autograd, (".sum()", ".mean()")),
        (
            "It never stops",
            clip_by_corners,
            ("torch.where(flat, torch.zeros_like(r), -r * advantages)", "-r * advantages"),
        ),
        (
            "The ratio is upside down",
            clip_in_numpy,
            ("logprobs.numpy() - old_logprobs.numpy()", "old_logprobs.numpy() - logprobs.numpy()"),
        ),
        (
            "The old log-probability is missing",
            clip_in_numpy,
            ("logprobs.numpy() - old_logprobs.numpy()", "logprobs.numpy()"),
        ),
        (
            "This is the loss, not its derivative",
            clip_by_corners,
            ("torch.zeros_like(r)", "-r.clamp(1 - clip_range, 1 + clip_range) * advantages"),
        ),
        (None, clip_by_corners, ("-r * advantages", "-r * r * advantages")),
    ],
    "clipped_loss": [
        (
            "Both results are right, but swapped",
            loss_by_corners,
            ("tl.store(losses", "tl.store(first"),
            ("tl.store(gradients", "tl.store(losses"),
            ("tl.store(first", "tl.store(gradients"),
        ),
        (
            "The gradient stops wherever the ratio is outside",
            loss_by_corners,
            ("((a > 0) & (r > high)) | ((a < 0) & (r < low))", "(r > high) | (r < low)"),
            (
                "tl.where(flat, -bound * a, -r * a)",
                "tl.where(((a > 0) & (r > high)) | ((a < 0) & (r < low)), -bound * a, -r * a)",
            ),
        ),
        ("The gradient never stops", loss_by_corners, ("tl.where(flat, 0.0, -r * a)", "-r * a")),
        (
            "It takes the max where PPO takes the min",
            loss_cleanrl,
            ("tl.maximum(loss1, loss2)", "tl.minimum(loss1, loss2)"),
            ("loss2 > loss1", "loss2 < loss1"),
        ),
        ("The clip has no lower bound", loss_cleanrl, ("tl.maximum(ratio, low)", "ratio")),
        (
            "The clip has no upper bound",
            loss_cleanrl,
            ("tl.minimum(tl.maximum(ratio, low), high)", "tl.maximum(ratio, low)"),
        ),
        ("The mask is not used", loss_cleanrl, ("    keep = keep & (at < count)", "    keep = at < count")),
        ("The ratio is upside down", loss_cleanrl, ("new - old", "old - new")),
        (
            "it wrote behind the last token",
            loss_cleanrl,
            ("tl.where(loss2 > loss1, 0.0, loss1), mask=at < count", "tl.where(loss2 > loss1, 0.0, loss1)"),
        ),
        (
            "Every program works on the first BLOCK tokens",
            loss_cleanrl,
            ("tl.program_id(0) * BLOCK + tl.arange", "tl.arange"),
        ),
        (None, loss_cleanrl, ("tl.where(loss2 > loss1, 0.0, loss1)", "tl.where(loss2 > loss1, loss2, loss1)")),
    ],
    "gae": [
        (
            "An end does not cut the chain",
            gae_scan,
            ("(gamma * lam * nonterminal, delta)", "(gamma * lam + 0.0 * nonterminal, delta)"),
        ),
        ("An end does not cut the value", gae_scan, ("gamma * v_next * nonterminal", "gamma * v_next")),
        ("The scan runs forwards in time", gae_reversed_scan, (", reverse=True", "")),
        (
            "The value after the last column is missing",
            gae_scan,
            ("tl.where(t == steps - 1, tl.load(last_values + row), v_next)", "v_next"),
        ),
        ("The decay is gamma alone", gae_scan, ("gamma * lam * nonterminal", "gamma * nonterminal")),
        ("The decay is lam alone", gae_scan, ("gamma * lam * nonterminal", "lam * nonterminal")),
        ("There is no scan", gae_scan, ("tl.store(advantages + at, result", "tl.store(advantages + at, delta")),
        ("V(s) is missing in delta", gae_scan, ("* nonterminal - v", "* nonterminal")),
        (
            "The ends are read the wrong way round",
            gae_scan,
            (
                "1.0 - tl.load(ends + at, mask=inside, other=1).to(tl.float32)",
                "tl.load(ends + at, mask=inside, other=1).to(tl.float32)",
            ),
        ),
        (None, gae_scan, ("(gamma * lam * nonterminal, delta)", "(gamma * lam * lam * nonterminal, delta)")),
    ],
}


def _newest(peak, total, block):
    top = block.max(dim=1).values
    shift = torch.nan_to_num(top, neginf=0.0)
    old = torch.where(total > 0, total * torch.exp(peak - shift), torch.zeros_like(total))
    return top, old + torch.exp(block - shift[:, None]).sum(1)
