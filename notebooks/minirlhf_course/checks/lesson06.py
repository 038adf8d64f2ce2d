"""Lesson 06, Triton kernels: tiles and masks, online softmax, a token's log-probability, the clip, GAE as a scan.

Those about the loss and GAE are in loss_and_scan.py. Four puzzles ask for a kernel (see `checks/kernels.py`); their
wrong kernels are the right one with a line changed.
"""

from __future__ import annotations

import ast
from typing import Any

import torch
from torch import Tensor

from minirlhf_course.checks import loss_and_scan
from minirlhf_course.checks.cases import flags, generators, normal, tensor
from minirlhf_course.checks.exercise import Case, exercise
from minirlhf_course.checks.kernels import (
    guarded,
    jit,
    loops,
    own_kernel,
    puzzle,
    tl,
    triton,
    variants,
    why_not,
)

__all__ = ["jit", "own_kernel", "tl", "triton", "why_not"]  # what the lesson takes from here, beside its exercises

INT = torch.int64
F32 = torch.float32
INF = float("inf")

after = loss_and_scan.after

# 6.1 -----------------------------------------------------------------------------------------------------------------


def _margin_cases() -> list[Case]:
    cases = [
        Case("one block", (tensor([3, 1, 2, 0]), tensor(1, dtype=INT)), tensor(-2.0)),
        Case("the token is the highest", (tensor([3, 1, 2, 0]), tensor(0, dtype=INT)), tensor(0.0)),
        Case("four negative logits", (tensor([-5, -2, -3, -4]), tensor(0, dtype=INT)), tensor(-3.0)),
        Case("three negative logits: a lane is empty", (tensor([-5, -2, -3]), tensor(0, dtype=INT)), tensor(-3.0)),
        Case("the highest in the first of two blocks", (tensor([7, 1, 1, 1, 2, 3]), tensor(4, dtype=INT)),
             tensor(-5.0)),
        Case("the highest in the second", (tensor([1, 2, 1, 1, 9]), tensor(1, dtype=INT)), tensor(-7.0)),
        Case("a block of -inf first", (tensor([-INF] * 4 + [0, 2]), tensor(4, dtype=INT)), tensor(-2.0)),
    ]  # fmt: skip
    for (rows, words), generator in zip(((2, 3), (3, 8), (2, 11)), generators(3), strict=True):
        tokens = torch.randint(0, words, (rows,), generator=generator)
        logits = 3 * normal(generator, rows, words, dtype=F32) - 6
        cases.append(Case(f"random, {rows} rows of {words}", (logits, tokens)))
    return cases


def launch_on_rows(kernel: Any, logits: Tensor, tokens: Tensor) -> Tensor:
    """logits [N, V], tokens [N] -> [N]: one program per row, blocks of 4 logits."""
    rows, columns = logits.shape
    # The rows of a wider table: behind a row's last logit lies somebody else's number.
    wide = guarded(torch.nn.functional.pad(logits, (0, 3), value=60.0), beyond=60.0)
    result = torch.empty(rows, device=wide.device)
    kernel[(rows,)](wide, tokens.to(wide.device), result, columns, wide.stride(0), BLOCK=4)
    return result.cpu()


def _margin(logits, tokens, margins, columns, row_stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """How far a token's logit is below its row's highest, by one program per row.

    Pointers: logits, whose row i begins at i * row_stride and holds `columns` numbers in a row;
    tokens [N], int64; margins [N], to be written: the token's logit minus the highest, so
    never above 0. BLOCK: how many logits to read at once; a row may be longer.
    """
    row = tl.program_id(0)
    start_of_row = row * row_stride
    highest = tl.full((), float("-inf"), tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(logits + start_of_row + at, mask=at < columns, other=float("-inf"))
        highest = tl.maximum(highest, tl.max(z, 0))
    token = tl.load(tokens + row)
    z_token = tl.load(logits + start_of_row + token)
    tl.store(margins + row, z_token - highest)


_LOAD = ', mask=at < columns, other=float("-inf"))'


@puzzle(
    "6.1",
    "how far below the highest",
    difficulty=2,
    minutes=20,
    task="Your first kernel: for each row, the logit of its token minus the highest logit of the row (0 if the model "
    "would have picked this token itself). A row may be longer than BLOCK, so loop, `range(0, columns, BLOCK)`, and "
    "keep the maximum so far. `tl.max(z, 0)` reduces a block to one number, `tl.maximum(x, y)` takes the larger of "
    "two.",
    kernel=_margin,
    launch=launch_on_rows,
    cases=_margin_cases,
    suspects=variants(
        _margin,
        {
            "The tail has no mask: beyond the last column it reads a number that is not of this row. "
            'Load with mask=at < columns, other=float("-inf").': [(_LOAD, ")")],
            "Beyond the last column it reads 0, which is higher than a row of negative logits: the number that never "
            'wins a maximum is other=float("-inf").': [(_LOAD, ", mask=at < columns, other=0.0)")],
            "The maximum begins at 0, and a row of negative logits never gets below it: begin at -inf.": [
                ('tl.full((), float("-inf"), tl.float32)', "tl.full((), 0.0, tl.float32)")
            ],
            "This is the maximum of the last block: keep the larger of it and what the blocks before had.": [
                ("tl.maximum(highest, tl.max(z, 0))", "tl.max(z, 0)")
            ],
            "It reads the first block only: loop over the row, range(0, columns, BLOCK).": [
                ("range(0, columns, BLOCK)", "range(0, BLOCK, BLOCK)")
            ],
            "Rows begin row_stride apart, not columns: a row may be a slice of a longer one.": [
                ("row * row_stride", "row * columns")
            ],
            "Every program reads the first row: its own begins at tl.program_id(0) * row_stride.": [
                ("row * row_stride", "0")
            ],
            "The token is looked up in the first row: its logit is at row * row_stride + token.": [
                ("tl.load(logits + start_of_row + token)", "tl.load(logits + token)")
            ],
            "Every row takes the first row's token: load it from tokens + row.": [
                ("tl.load(tokens + row)", "tl.load(tokens)")
            ],
            "The token's number is taken for its logit: load the logit, from logits + row * row_stride + token.": [
                ("z_token - highest", "token - highest")
            ],
            "The sign is wrong: the token's logit minus the highest is never above 0.": [
                ("z_token - highest", "highest - z_token")
            ],
            "This is the token's logit alone: subtract the row's highest.": [("z_token - highest", "z_token")],
            "This is the row's highest logit alone: subtract it from the token's.": [("z_token - highest", "highest")],
        },
    ),
    hints=(
        "`row = tl.program_id(0)`; the row's logits begin at `logits + row * row_stride`. Before the loop, "
        '`highest = tl.full((), float("-inf"), tl.float32)`. After it, two loads: the token, and the logit at the '
        "place that the token names.",
        "In the loop: `at = start + tl.arange(0, BLOCK)`, `z = tl.load(logits + row * row_stride + at, "
        'mask=at < columns, other=float("-inf"))`, `highest = tl.maximum(highest, tl.max(z, 0))`. After it: '
        "`token = tl.load(tokens + row)`, `z_token = tl.load(logits + row * row_stride + token)`.",
    ),
)
def margin(logits: Tensor, tokens: Tensor) -> Tensor:
    """logits [N, V], tokens [N] (int) -> how far each token's logit is below its row's highest [N]."""
    return logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.amax(-1)


# 6.2 -----------------------------------------------------------------------------------------------------------------


def _fold_cases() -> list[Case]:
    log = torch.log
    empty, nothing = tensor(-INF), tensor(0.0)
    cases = [
        Case("a first block", (empty, nothing, log(tensor([1, 4, 2]))), (log(tensor(4)), tensor(1.75))),
        Case("a block below the peak", (log(tensor(4)), tensor(1.75), log(tensor([1]))), (log(tensor(4)), tensor(2.0))),
        Case("a block with a higher peak", (log(tensor(4)), tensor(2.0), log(tensor([8]))),
             (log(tensor(8)), tensor(2.0))),
        Case("logits of 1000", (tensor(999.0), tensor(1.0), tensor([1000, 1000])), (tensor(1000.0), tensor(2.3679))),
        Case("a masked logit", (tensor(0.0), tensor(1.0), tensor([-INF, 0])), (tensor(0.0), tensor(2.0))),
        Case("a row that begins with -inf", (empty, nothing, tensor([-INF, -INF])), (empty, nothing)),
        Case("and goes on after it", (empty, nothing, tensor([3, -INF])), (tensor(3.0), tensor(1.0))),
    ]  # fmt: skip
    for (rows, width), generator in zip(((1, 3), (2, 2), (3, 5), (4, 8)), generators(4), strict=True):
        block = 5 * normal(generator, rows, width)
        block[flags(generator, rows, width)] = -INF
        state = 5 * normal(generator, rows), 1 + normal(generator, rows).abs()
        cases.append(Case(f"random, {rows} rows, a block of {width}", (*state, block)))
    return cases


def _fold(peak: Tensor, total: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    top = torch.maximum(peak, block.amax(-1))
    shift = _safe(top)
    return top, total * (peak - shift).exp() + (block - shift[:, None]).exp().sum(-1)


def _plain_fold(peak: Tensor, total: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    top = torch.maximum(peak, block.amax(-1))
    return top, total * (peak - top).exp() + (block - top[:, None]).exp().sum(-1)


def _safe(x: Tensor) -> Tensor:
    return torch.where(x == -INF, 0.0, x)


def _kept(peak: Tensor, total: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    top = torch.maximum(peak, block.amax(-1))
    return top, total + (block - _safe(top)[:, None]).exp().sum(-1)


def _upside_down(peak: Tensor, total: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    top = torch.maximum(peak, block.amax(-1))
    grow = torch.where(total == 0, 0.0, total * (_safe(top) - _safe(peak)).exp())
    return top, grow + (block - _safe(top)[:, None]).exp().sum(-1)


def _newest_peak(peak: Tensor, total: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    top = block.amax(-1)
    fade = torch.where(total == 0, 0.0, total * (peak - _safe(top)).exp())
    return top, fade + (block - _safe(top)[:, None]).exp().sum(-1)


def _own_peak(peak: Tensor, total: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    top, own = torch.maximum(peak, block.amax(-1)), _safe(block.amax(-1))
    return top, total * (peak - _safe(top)).exp() + (block - own[:, None]).exp().sum(-1)


def _twice_scaled(peak: Tensor, total: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    top = torch.maximum(peak, block.amax(-1))
    return top, (total + (block - _safe(top)[:, None]).exp().sum(-1)) * (peak - _safe(top)).exp()


def _one_peak(peak: Tensor, total: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    top = torch.maximum(peak, block.amax())
    return top, total * (peak - _safe(top)).exp() + (block - _safe(top)[:, None]).exp().sum(-1)


@exercise(
    "6.2",
    "a fold",
    difficulty=3,
    minutes=20,
    task="A row of logits comes block by block, and each is seen once. Two numbers per row are kept: the highest "
    "logit so far, and $\\sum e^{z - \\text{peak}}$ over all that was seen. Fold the next block in. An empty row is "
    "$(-\\infty, 0)$, and a masked logit is $-\\infty$: a row may begin with many.",
    cases=_fold_cases,
    suspects={
        "The peak is not subtracted: exp overflows from 89 in float32. Sum exp(z - peak).": (
            lambda peak, total, block: (torch.maximum(peak, block.amax(-1)), total + block.exp().sum(-1))
        ),
        "The old sum is not rescaled: it was measured from the old peak. Times exp(old peak - new peak).": _kept,
        "-inf minus -inf is NaN: while a row has seen nothing but -inf, subtract 0 in place of its peak.": _plain_fold,
        "The old sum is rescaled the wrong way: when the peak grows, it shrinks, by exp(old peak - new peak).": (
            _upside_down
        ),
        "The new peak forgets the old one: take the larger of the two.": _newest_peak,
        "One peak for all rows: each row has its own, block.amax(-1).": _one_peak,
        "The block is not added: the new sum is the old one, rescaled, plus the block's.": (
            lambda peak, total, block: (
                torch.maximum(peak, block.amax(-1)),
                total * (peak - _safe(torch.maximum(peak, block.amax(-1)))).exp(),
            )
        ),
        "The block is measured from its own peak: old sum and block must be measured from the same, the new peak.": (
            _own_peak
        ),
        "The new sum is rescaled twice: only the old sum was measured from the old peak.": _twice_scaled,
        "The second result is the log of the sum: return the sum, the log is taken once, at the end.": (
            lambda peak, total, block: (
                _fold(peak, total, block)[0],
                _fold(peak, total, block)[1].log(),
            )
        ),
        "This is the sum over one block: fold it into what was there before.": (
            lambda peak, total, block: _fold(torch.full_like(peak, -INF), torch.zeros_like(total), block)
        ),
    },
    hints=(
        "First the new peak, `torch.maximum(peak, block.amax(-1))`. Then both sums, old and new, measured from it. "
        "What does $-\\infty - (-\\infty)$ give, and when does it come up?",
        "`shift = torch.where(top == -inf, 0, top)` is a peak that may be subtracted: "
        "`total * (peak - shift).exp() + (block - shift[:, None]).exp().sum(-1)`, and the new peak is still `top`.",
    ),
)
def fold(peak: Tensor, total: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """The new (peak, total) of each row, both [N], after a block [N, B] of its logits.

    peak [N] is the highest logit so far, total [N] the sum of exp(z - peak) over all so far.
    Before anything was seen they are -inf and 0.
    """
    return _fold(peak, total, block)


# 6.3 -----------------------------------------------------------------------------------------------------------------


def _logprob_cases() -> list[Case]:
    log = torch.log
    cases = [
        Case("probabilities 1/4 and 3/4", (log(tensor([1, 3])), tensor(1, dtype=INT)), log(tensor(0.75))),
        Case("1, 2, 4, 1, 8: one more than a block", (log(tensor([1, 2, 4, 1, 8])), tensor(2, dtype=INT)),
             log(tensor(0.25))),
        Case("five logits of 1000", (tensor([1000] * 5), tensor(4, dtype=INT)), -log(tensor(5))),
        Case("a block of -inf first", (tensor([-INF] * 4 + [0, 0]), tensor(5, dtype=INT)), -log(tensor(2))),
    ]  # fmt: skip
    for (rows, words), generator in zip(((2, 3), (3, 8), (2, 11)), generators(3), strict=True):
        tokens = torch.randint(0, words, (rows,), generator=generator)
        cases.append(
            Case(f"random, {rows} rows of {words}", (3 * normal(generator, rows, words, dtype=F32), tokens), rtol=1e-5)
        )
    return cases


def _token_logprobs(logits, tokens, logprobs, columns, row_stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The log-probability of one token, by one program per row.

    Pointers: logits, whose row i begins at i * row_stride and holds `columns` numbers in a row;
    tokens [N], int64; logprobs [N], to be written. BLOCK: how many logits to read at once.
    """
    row = tl.program_id(0)
    start_of_row = row * row_stride
    lanes = tl.arange(0, BLOCK)
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + lanes
        z = tl.load(logits + start_of_row + at, mask=at < columns, other=float("-inf"))
        top = tl.maximum(peak, tl.max(z, 0))
        shift = tl.where(top == float("-inf"), 0.0, top)
        total = total * tl.exp(peak - shift) + tl.sum(tl.exp(z - shift), 0)
        peak = top
    token = tl.load(tokens + row)
    z_token = tl.load(logits + start_of_row + token)
    tl.store(logprobs + row, z_token - peak - tl.log(total))


def _reads_once(tree: ast.AST) -> str | None:
    """What is wrong with the form of a kernel for 6.3."""
    if loops(tree) > 1:
        return "It reads the row twice: one loop, and correct the sum when the peak grows."
    return None


_SUM = "total * tl.exp(peak - shift) + tl.sum(tl.exp(z - shift), 0)"


@puzzle(
    "6.3",
    "the log-probability of a token",
    difficulty=4,
    minutes=40,
    task="The same fold, now by a GPU's rules: $\\log \\pi(y) = z_y - \\log \\sum_b e^{z_b}$ for one token per row. "
    "Each logit is read once, and one number per row is written. Begin with your 6.1: where it keeps one number, keep "
    "two; `tl.sum(z, 0)` reduces a block to its sum.",
    kernel=_token_logprobs,
    launch=launch_on_rows,
    form=_reads_once,
    cases=_logprob_cases,
    suspects=variants(
        _token_logprobs,
        {
            "The tail has no mask: beyond the last column it reads a number that is not of this row. "
            'Load with mask=at < columns, other=float("-inf").': [(_LOAD, ")")],
            'Beyond the last column it reads 0, and exp(0) counts: the neutral logit is -inf, other=float("-inf").': [
                (_LOAD, ", mask=at < columns, other=0.0)")
            ],
            "The old sum is not rescaled when the peak grows: times exp(old peak - new peak).": [
                (_SUM, "total + tl.sum(tl.exp(z - shift), 0)")
            ],
            "The peak is not subtracted: exp overflows from 89 in float32. Sum exp(z - peak).": [
                (_SUM, "total + tl.sum(tl.exp(z), 0)"),
                ("z_token - peak - tl.log(total)", "z_token - tl.log(total)"),
            ],
            "-inf minus -inf is NaN: while a row has seen nothing but -inf, subtract 0 in place of its peak.": [
                ('tl.where(top == float("-inf"), 0.0, top)', "top")
            ],
            "It reads the first block only: loop over the row, range(0, columns, BLOCK).": [
                ("range(0, columns, BLOCK)", "range(0, BLOCK, BLOCK)")
            ],
            "Rows begin row_stride apart, not columns: a row may be a slice of a longer one.": [
                ("row * row_stride", "row * columns")
            ],
            "The peak is not in the result: log sum exp(z) = peak + log(total).": [
                ("z_token - peak - tl.log(total)", "z_token - tl.log(total)")
            ],
            "This is minus the log of the sum alone: the token's own logit is missing.": [
                ("z_token - peak - tl.log(total)", "-peak - tl.log(total)")
            ],
            "This is the probability: store its log.": [
                ("z_token - peak - tl.log(total)", "tl.exp(z_token - peak - tl.log(total))")
            ],
            "The sign is wrong: it is the token's logit minus the log of the sum, never above 0.": [
                ("z_token - peak - tl.log(total)", "peak + tl.log(total) - z_token")
            ],
            "The log is missing: log sum exp(z) = peak + log(total).": [
                ("z_token - peak - tl.log(total)", "z_token - peak - total")
            ],
            "The token is looked up in the first row: its logit is at row * row_stride + token.": [
                ("tl.load(logits + start_of_row + token)", "tl.load(logits + token)")
            ],
        },
    ),
    hints=(
        "`row = tl.program_id(0)`; the row's logits begin at `logits + row * row_stride`. Two scalars before the "
        'loop, `tl.full((), float("-inf"), tl.float32)` and `tl.zeros((), tl.float32)`, and 6.2 inside. Load the '
        "token's own logit once more, at the end.",
        "In the loop: `at = start + tl.arange(0, BLOCK)`, `z = tl.load(logits + row * row_stride + at, "
        'mask=at < columns, other=float("-inf"))`, `top = tl.maximum(peak, tl.max(z, 0))`, '
        '`shift = tl.where(top == float("-inf"), 0.0, top)`. After it: '
        "`tl.store(logprobs + row, z_token - peak - tl.log(total))`.",
    ),
)
def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """logits [N, V], tokens [N] (int) -> log-probabilities [N]."""
    return logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)


# 6.4 to 6.6 ----------------------------------------------------------------------------------------------------------

clip_gradient, clipped_loss, gae = loss_and_scan.clip_gradient, loss_and_scan.clipped_loss, loss_and_scan.gae
