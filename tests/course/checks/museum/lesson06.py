"""Wrong answers of lesson 06; test_museum.py says how to read them.

The kernels are not those of the check, whose suspects are its own kernel with a line changed.
"""

from __future__ import annotations

import torch
from minirlhf_course.checks.lesson06 import after, tl


def margin(logits, tokens, margins, columns, row_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    logits += row * row_stride
    top = tl.max(tl.load(logits + tl.arange(0, BLOCK), mask=tl.arange(0, BLOCK) < columns, other=float("-inf")), 0)
    for start in range(BLOCK, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        top = tl.maximum(top, tl.max(tl.load(logits + at, mask=at < columns, other=float("-inf")), 0))
    tl.store(margins + row, tl.load(logits + tl.load(tokens + row)) - top)


def fold(peak, total, block):
    new = torch.max(peak, block.max(1).values)
    shift = torch.nan_to_num(new, neginf=0.0)
    return new, torch.exp(peak - shift) * total + torch.exp(block - shift[:, None]).sum(1)


def token_logprobs(logits, tokens, logprobs, columns, row_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    peak = -float("inf")
    total = 0.0
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(logits + row * row_stride + at, mask=at < columns, other=-float("inf"))
        top = tl.maximum(peak, tl.max(z, 0))
        shift = tl.where(top == -float("inf"), 0.0, top)
        total = total * tl.exp(peak - shift) + tl.sum(tl.exp(z - shift), 0)
        peak = top
    z_token = tl.load(logits + row * row_stride + tl.load(tokens + row))
    tl.store(logprobs + row, z_token - peak - tl.log(total))


def clip_gradient(logprobs, old_logprobs, advantages, clip_range):
    ratio = torch.exp(logprobs - old_logprobs)
    stopped = ((advantages > 0) & (ratio > 1 + clip_range)) | ((advantages < 0) & (ratio < 1 - clip_range))
    return -ratio * advantages * ~stopped


def clipped_loss(logprobs, old_logprobs, advantages, mask, losses, gradients, count, low, high, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    counts = there & (tl.load(mask + at, mask=there, other=0) != 0)
    advantage = tl.load(advantages + at, mask=counts, other=0.0)
    log_ratio = tl.load(logprobs + at, mask=counts, other=0.0) - tl.load(old_logprobs + at, mask=counts, other=0.0)
    ratio = tl.exp(log_ratio)
    moves = ((advantage > 0) & (ratio <= high)) | ((advantage < 0) & (ratio >= low))
    clipped = tl.minimum(tl.maximum(ratio, low), high) * advantage
    tl.store(losses + at, -tl.minimum(ratio * advantage, clipped), mask=there)
    tl.store(gradients + at, tl.where(moves, -ratio * advantage, 0.0), mask=there)


def gae(rewards, values, ends, last_values, advantages, steps, gamma, lam, STEPS: tl.constexpr):
    row = tl.program_id(0)
    t = steps - 1 - tl.arange(0, STEPS)
    at = row * steps + t
    v = tl.load(values + at, mask=t >= 0, other=0.0)
    v_next = tl.load(values + at + 1, mask=(t >= 0) & (t < steps - 1), other=0.0)
    v_next = tl.where(t == steps - 1, tl.load(last_values + row), v_next)
    goes_on = 1.0 - tl.load(ends + at, mask=t >= 0, other=1).to(tl.float32)
    delta = tl.load(rewards + at, mask=t >= 0, other=0.0) + gamma * goes_on * v_next - v
    pair = tl.associative_scan((gamma * lam * goes_on, delta), 0, after)
    tl.store(advantages + at, pair[1], mask=t >= 0)


def gae_forwards(rewards, values, ends, last_values, advantages, steps, gamma, lam, STEPS: tl.constexpr):
    row = tl.program_id(0)
    t = tl.arange(0, STEPS)
    at = row * steps + t
    v = tl.load(values + at, mask=t < steps, other=0.0)
    v_next = tl.load(values + at + 1, mask=t + 1 < steps, other=0.0)
    v_next = tl.where(t == steps - 1, tl.load(last_values + row), v_next)
    goes_on = 1.0 - tl.load(ends + at, mask=t < steps, other=1).to(tl.float32)
    delta = tl.load(rewards + at, mask=t < steps, other=0.0) + gamma * goes_on * v_next - v
    pair = tl.associative_scan((gamma * lam * goes_on, delta), 0, after)
    tl.store(advantages + at, pair[1], mask=t < steps)


WRONG = {
    "margin": [
        ("-", "It reads the first block only", margin, ("range(BLOCK, columns, BLOCK)", "range(BLOCK, BLOCK, BLOCK)")),
        ("-", "The tail has no mask", margin, (", mask=at < columns", ", mask=at < columns + BLOCK")),
    ],
    "fold": [
        ("-", "The peak is not subtracted",
         lambda peak, total, block: (torch.max(peak, block.max(1).values), total + torch.exp(block).sum(1))),
        ("-", "The old sum is not rescaled", fold, ("torch.exp(peak - shift) * ", "")),
        ("-", "-inf minus -inf is NaN", fold, ("torch.nan_to_num(new, neginf=0.0)", "new")),
    ],
    "token_logprobs": [
        ("-", "The tail has no mask", token_logprobs, (', mask=at < columns, other=-float("inf")', "")),
        ("-", "The peak is not subtracted", token_logprobs,
         ("total * tl.exp(peak - shift) + tl.sum(tl.exp(z - shift), 0)", "total + tl.sum(tl.exp(z), 0)"),
         ("z_token - peak - ", "z_token - ")),
        ("-", "-inf minus -inf is NaN", token_logprobs, ('tl.where(top == -float("inf"), 0.0, top)', "top")),
    ],
    "clip_gradient": [
        (4, "It stops wherever the ratio is outside", clip_gradient,
         ("(advantages > 0) & ", ""), ("(advantages < 0) & ", "")),
        ("-", "It stops for A > 0 only", clip_gradient, (" | ((advantages < 0) & (ratio < 1 - clip_range))", "")),
        ("-", "This is the derivative with respect to r", clip_gradient, ("-ratio * advantages", "-advantages")),
    ],
    "clipped_loss": [
        (4, "The gradient stops wherever the ratio is outside", clipped_loss,
         ("((advantage > 0) & (ratio <= high)) | ((advantage < 0) & (ratio >= low))",
          "(ratio >= low) & (ratio <= high)")),
    ],
    "gae": [
        (21, "An end does not cut the chain", gae, ("gamma * lam * goes_on", "gamma * lam + 0.0 * delta")),
        (12, "An end does not cut the value", gae, ("gamma * goes_on * v_next", "gamma * v_next")),
        ("-", "The scan runs forwards in time", gae_forwards),
    ],
}  # fmt: skip
