"""Generalised advantage estimation as a scan: one read of every input, one write of both results.

A_t = delta_t + a_t A_{t+1}, with a_t = gamma lam where the next step belongs to the episode and 0 where it does not, is
a chain of straight lines x -> a x + b. Two in a row are again one line,

    (a, b) after (a', b')     x -> a (a' x + b') + b  =  (a a') x + (a b' + b)

so a tree of such pairs, an associative scan, gives every A_t in log2(steps) rounds. A program holds a tile of rows and
steps and walks back from the last step. Four neighbouring steps make a group, which one thread composes by itself; only
the groups' lines are scanned across threads, a quarter of the exchanges:

    step (from the last)   0  1  2  3 | 4  5  6  7 | 8 ...     tile [ROWS, STEPS], as four tensors [ROWS, STEPS // 4]
    in a thread            ---------> | ---------> |
    scan over groups       ---------------------------->       then each group starts from the end of the one before
    next tile                                                  starts from the last A of this one, its carry

Time runs backwards, so the tile's index is reversed and the scan itself runs forward. What is kept as [T, N] comes as
a transposed view and has a tile whose threads lie along rows, where its memory is contiguous. V(s_{t+1}) is read again
one step on, from cache. What must not leak is chosen with `where` before any arithmetic: 0 * NaN would be NaN.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minirlhf_kernels.checks import check_gae
from minirlhf_kernels.fused.common import INTERPRETED, cdiv, compute_dtype, on_device_of, register


def configuration(steps: int, time_first: bool) -> tuple[int, int, int]:
    """Rows and steps of a tile, and warps. The interpreter scans element by element, so its tiles are tiny."""
    if INTERPRETED:
        return 2, 8, 1
    return (32, 16, 4) if steps <= 16 or time_first else (4, 128, 4)


@triton.jit
def after(a_before, b_before, a, b):
    """The line (a, b) applied after the line before it."""
    return a * a_before, a * b_before + b


@triton.jit
def split_groups(x):
    """x [ROWS, STEPS] as the four steps of every group, each [ROWS, STEPS // 4]."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 4, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def scan(a, b, carry):
    """A [ROWS, STEPS] from its lines and the A [ROWS, 1] that comes before the first; and the last A of each row."""
    a0, a1, a2, a3 = split_groups(a)
    b0, b1, b2, b3 = split_groups(b)
    a1, b1 = after(a0, b0, a1, b1)
    a2, b2 = after(a1, b1, a2, b2)
    a3, b3 = after(a2, b2, a3, b3)
    slope, intercept = tl.associative_scan((a3, b3), 1, after)
    last = slope * carry + intercept  # of each group [ROWS, STEPS // 4]
    group = tl.arange(0, last.shape[1])[None, :]
    previous = tl.gather(last, tl.broadcast_to(tl.maximum(group - 1, 0), last.shape), 1)
    start = tl.where(group == 0, carry, previous)
    even = tl.join(a0 * start + b0, a2 * start + b2)
    odd = tl.join(a1 * start + b1, a3 * start + b3)
    carry = tl.sum(tl.where(group == last.shape[1] - 1, last, 0.0), 1, keep_dims=True)
    return tl.reshape(tl.join(even, odd), a.shape), carry


@triton.jit(
    do_not_specialize=["rows", "steps", "stride"],
    do_not_specialize_on_alignment=[
        "rewards", "values", "ends", "last_values", "truncated_values", "mask", "advantages", "returns",
    ],
)  # fmt: skip
def gae_kernel(
    rewards, values, ends, last_values, truncated_values, mask, advantages, returns,
    rows, steps, stride, gamma: tl.float64, lam: tl.float64,
    LAST: tl.constexpr, TRUNCATED: tl.constexpr, MASKED: tl.constexpr, TIME_FIRST: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    step = tl.arange(0, STEPS)[None, :]
    discount, decay = tl.full((), gamma, ACC), tl.full((), gamma * lam, ACC)
    carry = tl.zeros((ROWS, 1), ACC)
    for start in range(0, steps, STEPS):
        t = steps - 1 - start - step  # the tile's first column is its last step
        # Only one stride is a run-time argument: the compiler sees along which dimension memory is contiguous.
        if TIME_FIRST:
            at = row + t.to(tl.int64) * stride
            next_at = at + stride
        else:
            at = row.to(tl.int64) * stride + t
            next_at = at + 1
        in_range = (row < rows) & (t >= 0)
        has_next = in_range & (t + 1 < steps)
        end = tl.load(ends + at, mask=in_range, other=1) != 0
        counts, continues = in_range, has_next
        if MASKED:
            counts = in_range & (tl.load(mask + at, mask=in_range, other=0) != 0)
            continues = has_next & (tl.load(mask + next_at, mask=has_next, other=0) != 0)
        continues = continues & counts & (end == 0)
        reward = tl.where(counts, tl.load(rewards + at, mask=in_range, other=0.0).to(ACC), 0.0)
        value = tl.where(counts, tl.load(values + at, mask=in_range, other=0.0).to(ACC), 0.0)
        next_value = tl.where(continues, tl.load(values + next_at, mask=has_next, other=0.0).to(ACC), 0.0)
        if LAST:  # the bootstrap of a row that goes on after its last column
            bootstrap = tl.load(last_values + row, mask=row < rows, other=0.0).to(ACC)
            next_value = tl.where(counts & (end == 0) & (t + 1 == steps), bootstrap, next_value)
        if TRUNCATED:  # and of an episode that was cut off here
            bootstrap = tl.load(truncated_values + at, mask=in_range, other=0.0).to(ACC)
            next_value = tl.where(counts & end, bootstrap, next_value)
        delta = reward + discount * next_value - value
        advantage, carry = scan(tl.where(continues, decay, 0.0), delta, carry)
        tl.store(advantages + at, advantage, mask=in_range)
        tl.store(returns + at, advantage + value, mask=in_range)


def launch(
    rewards: Tensor,
    values: Tensor,
    ends: Tensor,
    last_values: Tensor | None,
    truncated_values: Tensor | None,
    mask: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Both results, in rewards' layout, [N, T] or [T, N]; what has another one is copied into it."""
    advantages, returns = empty_outputs(rewards, values)
    rows, steps = rewards.shape
    if rewards.numel() == 0:
        return advantages, returns
    strides = advantages.stride()

    def laid_out(x: Tensor | None) -> Tensor:
        if x is None or x.stride() == strides:
            return advantages if x is None else x  # what isn't there isn't read
        return torch.empty_like(advantages, dtype=x.dtype).copy_(x)

    last = advantages if last_values is None else last_values.contiguous()
    time_first = strides[1] != 1
    tile_rows, tile_steps, warps = configuration(steps, time_first)
    with on_device_of(rewards):
        gae_kernel[(cdiv(rows, tile_rows),)](
            laid_out(rewards), laid_out(values), laid_out(ends), last, laid_out(truncated_values), laid_out(mask),
            advantages, returns, rows, steps, strides[1] if time_first else strides[0], gamma, lam,
            LAST=last_values is not None, TRUNCATED=truncated_values is not None, MASKED=mask is not None,
            TIME_FIRST=time_first, ACC=tl.float64 if advantages.dtype == torch.float64 else tl.float32,
            ROWS=tile_rows, STEPS=tile_steps, num_warps=warps,
        )  # fmt: skip
    return advantages, returns


def empty_outputs(rewards: Tensor, values: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    advantages = torch.empty_like(rewards, dtype=compute_dtype(rewards, values))
    return advantages, torch.empty_like(advantages)


_call, gae_op, _ = register("gae", launch, empty_outputs)


@torch.no_grad()
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
) -> tuple[Tensor, Tensor]:
    """`reference.gae` in one kernel."""
    check_gae(rewards, last_values, values=values, ends=ends, truncated_values=truncated_values, mask=mask)
    return _call(rewards, values, ends, last_values, truncated_values, mask, float(gamma), float(lam))
