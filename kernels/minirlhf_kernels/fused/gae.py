"""Generalised advantage estimation as a scan: one read of every input, one write of both results.

A_t = delta_t + a_t A_{t+1}, with a_t = gamma lam where the next step is heard and 0 where it is not, is a chain of
straight lines x -> a x + b. Two in a row are again one line,

    (a, b) after (a', b')     x -> a (a' x + b') + b  =  (a a') x + (a b' + b)

so a tree of such pairs, an associative scan, gives every A_t of a block of steps in log2(block) rounds. A program holds
a tile of rows and steps and walks back from the last step; between tiles each row carries its newest advantage in
registers. Time runs backwards, so the tile's index is reversed and the scan itself runs forward. Short rows share a
program (one program a row would leave most of its lanes idle), long rows get a tile to themselves; [N, T] and [T, N]
differ in two strides only. V(s_{t+1}) is read again one step on, from cache. What must not leak is chosen with `where`
before any arithmetic: a product with 0 would let a NaN through.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minirlhf_kernels.fused.common import INTERPRETED, compute_dtype, on_device_of
from minirlhf_kernels.reference.gae import _check


def configuration(rows: int, steps: int, time_dim: int) -> tuple[int, int, int]:
    """Rows and steps of a tile, and warps. The interpreter scans element by element, so its tiles are tiny."""
    if INTERPRETED:
        return (4, 4, 1)
    if time_dim == 0:
        return (64, 16, 4)  # neighbours in memory are rows: read many of them
    if steps <= 16:
        return (64, 16, 4)
    return (8, 128, 4) if steps <= 512 else (2, 1024, 8)


@triton.jit
def after(a_before, b_before, a, b):
    """The line (a, b) applied after the line before it."""
    return a * a_before, a * b_before + b


@triton.jit
def pool(count, mean, spread, more, more_mean, more_spread):
    """Count, mean and sum of squared deviations of two groups together (Chan et al. 1979): no cancellation."""
    total = count + more
    share = tl.where(total > 0.0, more / tl.where(total > 0.0, total, 1.0), 0.0)
    gap = more_mean - mean
    return total, mean + gap * share, spread + more_spread + gap * gap * count * share


@triton.jit(do_not_specialize=["rows", "steps", "row_stride", "step_stride"])
def gae_kernel(
    rewards, values, ends, last_values, truncated_values, mask, advantages, returns, moments,
    rows, steps, row_stride, step_stride, gamma: tl.float64, lam: tl.float64,
    LAST: tl.constexpr, TRUNCATED: tl.constexpr, MASKED: tl.constexpr, MOMENTS: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    back = tl.arange(0, STEPS)[None, :]
    discount, decay = tl.full((), gamma, ACC), tl.full((), gamma * lam, ACC)
    carry = tl.zeros((ROWS, 1), ACC)
    count, mean, spread = tl.zeros((), ACC), tl.zeros((), ACC), tl.zeros((), ACC)
    for start in range(0, steps, STEPS):
        t = steps - 1 - start - back  # the tile's first column is its last step
        there = (row < rows) & (t >= 0)
        at = row * row_stride + t.to(tl.int64) * step_stride
        later = there & (t + 1 < steps)
        end = tl.load(ends + at, mask=there, other=1) != 0
        counts = there
        heard = later
        if MASKED:
            counts = there & (tl.load(mask + at, mask=there, other=0) != 0)
            heard = later & (tl.load(mask + at + step_stride, mask=later, other=0) != 0)
        reward = tl.where(counts, tl.load(rewards + at, mask=there, other=0.0).to(ACC), 0.0)
        value = tl.where(counts, tl.load(values + at, mask=there, other=0.0).to(ACC), 0.0)
        heard = heard & counts & (end == 0)
        following = tl.where(heard, tl.load(values + at + step_stride, mask=later, other=0.0).to(ACC), 0.0)
        if LAST:
            beyond = counts & (end == 0) & (t + 1 == steps)
            following = tl.where(beyond, tl.load(last_values + row, mask=row < rows, other=0.0).to(ACC), following)
        if TRUNCATED:
            cut = counts & end
            following = tl.where(cut, tl.load(truncated_values + at, mask=there, other=0.0).to(ACC), following)
        delta = reward + discount * following - value
        a, b = tl.associative_scan((tl.where(heard, decay, 0.0), delta), 1, after)
        advantage = a * carry + b
        tl.store(advantages + at, advantage, mask=there)
        tl.store(returns + at, advantage + value, mask=there)
        carry = tl.sum(tl.where(back == STEPS - 1, advantage, 0.0), 1, keep_dims=True)
        if MOMENTS:
            n = tl.sum(counts.to(ACC))
            m = tl.sum(tl.where(counts, advantage, 0.0)) / tl.maximum(n, 1.0)
            s = tl.sum(tl.where(counts, (advantage - m) * (advantage - m), 0.0))
            count, mean, spread = pool(count, mean, spread, n, m, s)
    if MOMENTS:
        tl.store(moments + 3 * program, count)
        tl.store(moments + 3 * program + 1, mean)
        tl.store(moments + 3 * program + 2, spread)


@triton.jit(do_not_specialize=["programs"])
def moments_kernel(partial, moments, programs, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Stage two: the programs' moments, always pooled in the same order: the same bits on every run."""
    lanes = tl.arange(0, BLOCK)
    count, mean, spread = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC)
    for start in range(0, programs, BLOCK):
        there = start + lanes < programs
        at = partial + 3 * (start + lanes)
        n, m = tl.load(at, mask=there, other=0.0), tl.load(at + 1, mask=there, other=0.0)
        count, mean, spread = pool(count, mean, spread, n, m, tl.load(at + 2, mask=there, other=0.0))
    total = tl.sum(count, 0)
    centre = tl.sum(count * mean, 0) / total
    around = tl.sum(spread + count * (mean - centre) * (mean - centre), 0)
    tl.store(moments, total)
    tl.store(moments + 1, centre)
    tl.store(moments + 2, around / total)


def launch(
    rewards: Tensor,
    values: Tensor,
    ends: Tensor,
    last_values: Tensor | None,
    truncated_values: Tensor | None,
    mask: Tensor | None,
    gamma: float,
    lam: float,
    time_dim: int,
    want_moments: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(rewards, values)
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    advantages = torch.empty(rewards.shape, dtype=dtype, device=rewards.device)
    returns = torch.empty_like(advantages)
    moments = advantages.new_empty(3 if want_moments else 0)
    rows, steps = rewards.shape[1 - time_dim], rewards.shape[time_dim]
    row_stride, step_stride = (steps, 1) if time_dim == 1 else (1, rows)
    given = [
        None if x is None else x.contiguous() for x in (rewards, values, ends, last_values, truncated_values, mask)
    ]
    tile_rows, tile_steps, warps = configuration(rows, steps, time_dim)
    programs = triton.cdiv(rows, tile_rows)
    partial = advantages.new_empty(3 * programs if want_moments else 0)
    if rewards.numel() == 0:
        return advantages, returns, moments.fill_(float("nan"))
    with on_device_of(rewards):
        gae_kernel[(programs,)](
            *(advantages if x is None else x for x in given), advantages, returns, partial,
            rows, steps, row_stride, step_stride, gamma, lam,
            LAST=last_values is not None, TRUNCATED=truncated_values is not None, MASKED=mask is not None,
            MOMENTS=want_moments, ACC=acc, ROWS=tile_rows, STEPS=tile_steps, num_warps=warps,
        )  # fmt: skip
        if want_moments:
            moments_kernel[(1,)](partial, moments, programs, ACC=acc, BLOCK=1024, num_warps=4)
    return advantages, returns, moments


gae_op = torch.library.custom_op("minirlhf::gae", launch, mutates_args=())


@gae_op.register_fake
def _(rewards: Tensor, values: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    advantages = torch.empty(rewards.shape, dtype=compute_dtype(rewards, values), device=rewards.device)
    return advantages, torch.empty_like(advantages), advantages.new_empty(3 if others[-1] else 0)


def _run(rewards: Tensor, values: Tensor, ends: Tensor, want_moments: bool, **o: Any) -> tuple[Tensor, ...]:
    _check(rewards, values, ends, o["last_values"], o["truncated_values"], o["mask"], o["time_dim"])
    call = gae_op if torch.compiler.is_compiling() else launch
    rest = o["last_values"], o["truncated_values"], o["mask"], float(o["gamma"]), float(o["lam"]), o["time_dim"]
    with torch.no_grad():
        return call(rewards, values, ends, *rest, want_moments)


def gae(
    rewards: Tensor,
    values: Tensor,
    ends: Tensor,
    *,
    gamma: float,
    lam: float,
    last_values: Tensor | None = None,
    truncated_values: Tensor | None = None,
    mask: Tensor | None = None,
    time_dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """`reference.gae` in one kernel."""
    given = {"last_values": last_values, "truncated_values": truncated_values, "mask": mask, "time_dim": time_dim}
    advantages, returns, _ = _run(rewards, values, ends, False, gamma=gamma, lam=lam, **given)
    return advantages, returns


def gae_with_moments(
    rewards: Tensor,
    values: Tensor,
    ends: Tensor,
    *,
    gamma: float,
    lam: float,
    last_values: Tensor | None = None,
    truncated_values: Tensor | None = None,
    mask: Tensor | None = None,
    time_dim: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.gae_with_moments` in two kernels."""
    given = {"last_values": last_values, "truncated_values": truncated_values, "mask": mask, "time_dim": time_dim}
    advantages, returns, moments = _run(rewards, values, ends, True, gamma=gamma, lam=lam, **given)
    return advantages, returns, moments
