"""Solutions of lesson 06: each function stands for the stub of its name; kernels are launched by the checks."""

from __future__ import annotations

import torch
from minirlhf_course.checks.lesson06 import after, tl


def my_margin(logits, tokens, margins, columns, row_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    logits += row * row_stride
    highest = tl.full((), float("-inf"), tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(logits + at, mask=at < columns, other=float("-inf"))
        highest = tl.maximum(highest, tl.max(z, 0))
    z_token = tl.load(logits + tl.load(tokens + row))
    tl.store(margins + row, z_token - highest)


def my_fold(peak, total, block):
    top = torch.maximum(peak, block.amax(-1))
    shift = torch.where(top == -torch.inf, 0.0, top)  # -inf minus -inf is NaN
    return top, total * (peak - shift).exp() + (block - shift[:, None]).exp().sum(-1)


def my_token_logprobs(logits, tokens, logprobs, columns, row_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    logits += row * row_stride
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(logits + at, mask=at < columns, other=float("-inf"))
        top = tl.maximum(peak, tl.max(z, 0))
        shift = tl.where(top == float("-inf"), 0.0, top)
        total = total * tl.exp(peak - shift) + tl.sum(tl.exp(z - shift), 0)
        peak = top
    z_token = tl.load(logits + tl.load(tokens + row))
    tl.store(logprobs + row, (z_token - peak) - tl.log(total))


def my_clip_gradient(logprobs, old_logprobs, advantages, clip_range):
    ratio = (logprobs - old_logprobs).exp()
    surrogate = ratio * advantages
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    return torch.where(clipped < surrogate, 0.0, -surrogate)  # where min takes the held ratio, nothing moves


def my_clipped_loss(logprobs, old_logprobs, advantages, mask, losses, gradients, count, low, high, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    counts = there & (tl.load(mask + at, mask=there, other=0) != 0)
    logprob = tl.load(logprobs + at, mask=counts, other=0.0)
    old_logprob = tl.load(old_logprobs + at, mask=counts, other=0.0)
    advantage = tl.load(advantages + at, mask=counts, other=0.0)  # 0, and so are loss and gradient
    ratio = tl.exp(logprob - old_logprob)
    surrogate = ratio * advantage
    clipped = tl.where(ratio > high, high, tl.where(ratio < low, low, ratio)) * advantage
    stopped = clipped < surrogate
    tl.store(losses + at, -tl.where(stopped, clipped, surrogate), mask=there)
    tl.store(gradients + at, tl.where(stopped, 0.0, -surrogate), mask=there)


def my_gae(rewards, values, ends, last_values, advantages, steps, gamma, lam, STEPS: tl.constexpr):
    row = tl.program_id(0)
    t = steps - 1 - tl.arange(0, STEPS)  # the first lane is the last step
    there = t >= 0
    at = row * steps + t
    reward = tl.load(rewards + at, mask=there, other=0.0)
    value = tl.load(values + at, mask=there, other=0.0)
    end = tl.load(ends + at, mask=there, other=1) != 0
    following = tl.load(values + at + 1, mask=there & (t + 1 < steps), other=0.0)
    following = tl.where(t + 1 == steps, tl.load(last_values + row), following)
    delta = reward + gamma * tl.where(end, 0.0, following) - value
    decay = tl.where(end, 0.0, gamma * lam)
    _, advantage = tl.associative_scan((decay, delta), 0, after)
    tl.store(advantages + at, advantage, mask=there)
