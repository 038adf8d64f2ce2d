"""Generalised advantage estimation as a scan: one read of every input, one write of both results.

A_t = delta_t + a_t A_{t+1}, with a_t = gamma lam where the next step counts and 0 where it does not, is a chain of
straight lines x -> a x + b. Two in a row are again one line,

    (a, b) after (a', b')     x -> a (a' x + b') + b  =  (a a') x + (a b' + b)

so a tree of such pairs, an associative scan, gives every A_t of a block of steps in log2(block) rounds. A program holds
a tile of rows and steps and walks back from the last step; between tiles each row carries its newest advantage in
registers. Time runs backwards, so the tile's index is reversed and the scan itself runs forward. Short rows share a
program (one program per row would leave most of its lanes idle), long rows get a tile to themselves; a transposed view
differs only in its two strides. V(s_{t+1}) is read again one step later, from cache. Masked values are removed with
`where` before any arithmetic: a product with 0 would let a NaN through.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minirlhf_kernels.fused.common import INTERPRETED, compute_dtype, on_device_of
from minirlhf_kernels.reference import _check_gae


def configuration(steps: int) -> tuple[int, int, int]:
    """Rows and steps of a tile, and warps. The interpreter scans element by element, so its tiles are tiny."""
    if INTERPRETED:
        return (4, 4, 1)
    if steps <= 16:
        return (64, 16, 4)
    return (8, 128, 4) if steps <= 512 else (2, 1024, 8)


@triton.jit
def after(a_before, b_before, a, b):
    """The line (a, b) applied after the line before it."""
    return a * a_before, a * b_before + b


@triton.jit(do_not_specialize=["rows", "steps", "row_stride", "step_stride"])
def gae_kernel(
    rewards, values, ends, last_values, truncated_values, mask, advantages, returns,
    rows, steps, row_stride, step_stride, gamma: tl.float64, lam: tl.float64,
    LAST: tl.constexpr, TRUNCATED: tl.constexpr, MASKED: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    back = tl.arange(0, STEPS)[None, :]
    discount, decay = tl.full((), gamma, ACC), tl.full((), gamma * lam, ACC)
    carry = tl.zeros((ROWS, 1), ACC)
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
    """Both results, in rewards' layout; inputs with another one are copied into it."""
    dtype = compute_dtype(rewards, values)
    advantages, returns = (torch.empty_like(rewards, dtype=dtype) for _ in range(2))
    rows, steps = rewards.shape
    if rewards.numel() == 0:
        return advantages, returns

    def laid_out(x: Tensor | None) -> Tensor:
        if x is None or x.stride() == advantages.stride():
            return advantages if x is None else x  # a missing input is never read
        return torch.empty_like(advantages, dtype=x.dtype).copy_(x)

    last = advantages if last_values is None else last_values.contiguous()
    tile_rows, tile_steps, warps = configuration(steps)
    with on_device_of(rewards):
        gae_kernel[(triton.cdiv(rows, tile_rows),)](
            laid_out(rewards), laid_out(values), laid_out(ends), last, laid_out(truncated_values), laid_out(mask),
            advantages, returns, rows, steps, *advantages.stride(), gamma, lam,
            LAST=last_values is not None, TRUNCATED=truncated_values is not None, MASKED=mask is not None,
            ACC=tl.float64 if dtype == torch.float64 else tl.float32, ROWS=tile_rows, STEPS=tile_steps,
            num_warps=warps,
        )  # fmt: skip
    return advantages, returns


gae_op = torch.library.custom_op("minirlhf::gae", launch, mutates_args=())


@gae_op.register_fake
def _(rewards: Tensor, values: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    advantages = torch.empty_like(rewards, dtype=compute_dtype(rewards, values))
    return advantages, torch.empty_like(advantages)


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
    _check_gae(rewards, last_values, values=values, ends=ends, truncated_values=truncated_values, mask=mask)
    call = gae_op if torch.compiler.is_compiling() else launch
    return call(rewards, values, ends, last_values, truncated_values, mask, float(gamma), float(lam))
