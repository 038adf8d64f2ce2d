"""Lesson 06, Triton kernels: tiles and masks, online softmax, a token's log-probability, the clip, GAE as a scan.

Four puzzles ask for a kernel (see `checks/kernels.py`). The wrong kernels are the right one with a line changed.
"""

from __future__ import annotations

import ast
from typing import Any

import torch
from torch import Tensor

from minirlhf import returns
from minirlhf_course.checks.cases import bools, flags, generators, normal, tensor
from minirlhf_course.checks.exercise import Case, exercise
from minirlhf_course.checks.kernels import (
    guarded,
    jit,
    loops,
    own_kernel,
    puzzle,
    tl,
    triton,
    untouched_beyond,
    variants,
    why_not,
)

__all__ = ["jit", "own_kernel", "tl", "triton", "why_not"]  # what the lesson takes from here, beside its exercises

INT = torch.int64
F32 = torch.float32
INF, NAN = float("inf"), float("nan")

after: Any = None
if triton is not None:
    from minirlhf_kernels.fused.gae import after

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
    "would have picked this token itself). A row is longer than BLOCK, so loop: `range(0, columns, BLOCK)`, and keep "
    "the maximum so far. `tl.max(z, 0)` reduces a block to one number, `tl.maximum(x, y)` takes the larger of two.",
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


# 6.4 -----------------------------------------------------------------------------------------------------------------


def _ratios(*ratios: float) -> tuple[Tensor, Tensor]:
    """log-probs that make these ratios; the old ones are not 0, so that leaving them out is seen."""
    old = torch.full((len(ratios),), -1.0)
    return tensor(*ratios).log() + old, old


def _clip_cases() -> list[Case]:
    cases = [
        Case("A > 0, r = 2: beyond the clip", (*_ratios(2.0), tensor(1.0), 0.25), tensor(0.0)),
        Case("A > 0, r = 1/2: below the clip", (*_ratios(0.5), tensor(1.0), 0.25), tensor(-0.5)),
        Case("A < 0, r = 2", (*_ratios(2.0), tensor(-1.0), 0.25), tensor(2.0)),
        Case("A < 0, r = 1/2", (*_ratios(0.5), tensor(-1.0), 0.25), tensor(0.0)),
        Case("nothing has moved", (*_ratios(1.0), tensor(3.0), 0.25), tensor(-3.0)),
    ]
    for count, generator in zip((3, 6, 40), generators(3), strict=True):
        old = -normal(generator, count).exp()
        case = old + 0.5 * normal(generator, count), old, normal(generator, count), 0.2
        cases.append(Case(f"random, {count} tokens", case))
    return cases


def _ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    return (logprobs - old_logprobs).exp()


def _gradient(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    ratio = (logprobs - old_logprobs).exp()
    surrogate = ratio * advantages
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    return torch.where(clipped < surrogate, 0.0, -surrogate)


def _outside(ratio: Tensor, clip_range: float) -> Tensor:
    return (ratio < 1 - clip_range) | (ratio > 1 + clip_range)


@exercise(
    "6.4",
    "where the clip stops the gradient",
    difficulty=3,
    minutes=15,
    task="A kernel has no autograd: it writes the gradient itself. The loss of one token is $-\\min\\big(rA,\\; "
    "\\mathrm{clip}(r, 1 - \\varepsilon, 1 + \\varepsilon) A\\big)$ with $r = e^{\\ell - \\ell_{\\text{old}}}$. What "
    "is its derivative with respect to the log-probability $\\ell$? Of the four corners in the picture above, two are "
    "flat.",
    cases=_clip_cases,
    suspects={
        "It stops wherever the ratio is outside: but where min takes the other side, r A, the gradient flows. A bad "
        "step beyond the clip must be able to come back.": (
            lambda n, o, a, c: torch.where(_outside(_ratio(n, o), c), 0.0, -_ratio(n, o) * a)
        ),
        "It stops on the wrong side: the flat corners are r > 1 + eps for A > 0 and r < 1 - eps for A < 0.": (
            lambda n, o, a, c: torch.where(
                torch.where(a > 0, _ratio(n, o) < 1 - c, _ratio(n, o) > 1 + c), 0.0, -_ratio(n, o) * a
            )
        ),
        "It never stops: where the clipped term is the smaller one, r is held and the derivative is 0.": (
            lambda n, o, a, c: -_ratio(n, o) * a
        ),
        "This is the derivative with respect to r: one with respect to its log has another factor r.": (
            lambda n, o, a, c: torch.where(_ratio(n, o).clamp(1 - c, 1 + c) * a < _ratio(n, o) * a, 0.0, -a)
        ),
        "The sign is wrong: the loss is minus the objective.": (
            lambda n, o, a, c: torch.where(
                _ratio(n, o).clamp(1 - c, 1 + c) * a < _ratio(n, o) * a, 0.0, _ratio(n, o) * a
            )
        ),
        "It stops for A > 0 only: a bad action that has become less likely than 1 - eps has a flat corner, too.": (
            lambda n, o, a, c: torch.where((a > 0) & (_ratio(n, o) > 1 + c), 0.0, -_ratio(n, o) * a)
        ),
        "It stops for r > 1 + eps only, whatever the sign of A.": (
            lambda n, o, a, c: torch.where(_ratio(n, o) > 1 + c, 0.0, -_ratio(n, o) * a)
        ),
        "Beyond the clip stands the gradient at its edge: there the objective is flat, so 0.": (
            lambda n, o, a, c: -_ratio(n, o).clamp(1 - c, 1 + c) * a
        ),
        "This is the gradient of the mean: each token's derivative is not divided by the number of tokens.": (
            lambda n, o, a, c: _gradient(n, o, a, c) / len(n)
        ),
        "The ratio is upside down: exp(logprobs - old_logprobs).": lambda n, o, a, c: _gradient(o, n, a, c),
        "This is the loss, not its derivative.": lambda n, o, a, c: (
            -torch.minimum(_ratio(n, o) * a, _ratio(n, o).clamp(1 - c, 1 + c) * a)
        ),
        "The old log-probability is missing: r = exp(logprobs - old_logprobs).": (
            lambda n, o, a, c: _gradient(n, 0 * o, a, c)
        ),
        "The log-ratio is compared with the bounds of the ratio: r = exp(logprobs - old_logprobs) is clipped.": (
            lambda n, o, a, c: torch.where(
                ((a > 0) & (n - o > 1 + c)) | ((a < 0) & (n - o < 1 - c)), 0.0, -_ratio(n, o) * a
            )
        ),
    },
    hints=(
        "Where the min takes $rA$: $\\partial r / \\partial \\ell = r$. Where it takes the clipped term and $r$ is "
        "outside, nothing moves.",
        "`surrogate = ratio * advantages`, `clipped = ratio.clamp(1 - clip_range, 1 + clip_range) * advantages`: the "
        "gradient is 0 where `clipped < surrogate`, and `-surrogate` elsewhere.",
    ),
)
def clip_gradient(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """The derivative of each token's clipped loss with respect to its log-probability, without autograd.

    Three tensors [N] give [N].
    """
    return _gradient(logprobs, old_logprobs, advantages, clip_range)


# 6.5 -----------------------------------------------------------------------------------------------------------------


def _loss_cases() -> list[Case]:
    cases = [
        Case("r = 2 and r = 1/2, A > 0", (*_ratios(2.0, 0.5), tensor(1.0, 1.0), bools(1, 1), 0.25),
             (tensor(-1.25, -0.5), tensor(0.0, -0.5))),
        Case("the same, A < 0", (*_ratios(2.0, 0.5), tensor(-1.0, -1.0), bools(1, 1), 0.25),
             (tensor(2.0, 0.75), tensor(2.0, 0.0))),
        Case("padding that holds NaN", (tensor(0.0, NAN, 0.0), tensor(0.0, 0.0, NAN), tensor(1.0, NAN, 2.0),
                                        bools(1, 0, 0), 0.25), (tensor(-1.0, 0.0, 0.0), tensor(-1.0, 0.0, 0.0))),
        Case("two tokens of unequal weight", (*_ratios(1.0, 1.0), tensor(1.0, 3.0), bools(1, 1), 0.25),
             (tensor(-1.0, -3.0), tensor(-1.0, -3.0))),
    ]  # fmt: skip
    for count, generator in zip((4, 6, 13), generators(3), strict=True):
        old = -normal(generator, count, dtype=F32).exp()
        moved = old + 0.5 * normal(generator, count, dtype=F32)
        case = moved, old, normal(generator, count, dtype=F32), flags(generator, count, share=0.8), 0.2
        cases.append(Case(f"random, {count} tokens", case))
    return cases


def launch_clipped_loss(
    kernel: Any, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    """Four tensors [N] -> loss and gradient of each token [N]: one program for 4 tokens, the last one half empty."""
    count = len(logprobs)
    inputs = [guarded(x, beyond=NAN) for x in (logprobs, old_logprobs, advantages)]
    losses, gradients = (guarded(torch.zeros(count), beyond=7.0) for _ in range(2))
    programs = triton.cdiv(count, 4)
    kernel[(programs,)](
        *inputs, guarded(mask, beyond=True), losses, gradients, count, 1 - clip_range, 1 + clip_range, BLOCK=4
    )
    for x in (losses, gradients):
        untouched_beyond(x, 7.0)
    return losses.cpu(), gradients.cpu()


def _clipped_loss(  # type: ignore[no-untyped-def]
    logprobs, old_logprobs, advantages, mask, losses, gradients, count, low, high, BLOCK: tl.constexpr
):
    """Loss and gradient of BLOCK tokens, by one program.

    Pointers to `count` numbers each: logprobs, old_logprobs, advantages, mask (1 counts, 0
    does not); to be written: losses, and gradients, their derivatives with respect to
    logprobs. Both are 0 where mask is 0, whatever lies there. low, high: the clip's bounds.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    counts = there & (tl.load(mask + at, mask=there, other=0) != 0)
    logprob = tl.load(logprobs + at, mask=counts, other=0.0)
    old_logprob = tl.load(old_logprobs + at, mask=counts, other=0.0)
    advantage = tl.load(advantages + at, mask=counts, other=0.0)
    ratio = tl.exp(logprob - old_logprob)
    surrogate = ratio * advantage
    held = tl.where(ratio > high, high, tl.where(ratio < low, low, ratio))
    clipped = held * advantage
    stopped = clipped < surrogate
    loss = -tl.where(stopped, clipped, surrogate)
    gradient = tl.where(stopped, 0.0, -surrogate)
    tl.store(losses + at, loss, mask=there)
    tl.store(gradients + at, gradient, mask=there)


_STOPPED = "gradient = tl.where(stopped, 0.0, -surrogate)"


@puzzle(
    "6.5",
    "the clipped loss",
    difficulty=3,
    minutes=25,
    task="One pass over the tokens: read four numbers, write two. The last program has fewer than BLOCK tokens, and "
    "what the mask leaves out may be NaN: don't even load it.",
    kernel=_clipped_loss,
    launch=launch_clipped_loss,
    cases=_loss_cases,
    suspects=variants(
        _clipped_loss,
        {
            "The gradient stops wherever the ratio is outside: where min takes the other side, r A, it flows.": [
                (_STOPPED, "gradient = tl.where((ratio > high) | (ratio < low), 0.0, -surrogate)")
            ],
            "The gradient never stops: it is 0 where the clipped term is the smaller one.": [
                (_STOPPED, "gradient = -surrogate")
            ],
            "The gradient lacks the factor r: d r / d logprob = r.": [
                (_STOPPED, "gradient = tl.where(stopped, 0.0, -advantage)")
            ],
            "It takes the max where PPO takes the min.": [
                ("stopped = clipped < surrogate", "stopped = clipped > surrogate")
            ],
            "The loss is not clipped: it is minus the smaller one of r A and clip(r) A.": [
                ("loss = -tl.where(stopped, clipped, surrogate)", "loss = -surrogate")
            ],
            "The clip has no lower bound.": [("tl.where(ratio < low, low, ratio)", "ratio")],
            "The sign of both is wrong: the loss is minus the objective.": [
                ("loss = -tl.where", "loss = tl.where"),
                (_STOPPED, "gradient = tl.where(stopped, 0.0, surrogate)"),
            ],
            "The mask is not used: load with mask=counts, so that nothing of what does not count is read.": [
                ("there & (tl.load(mask + at, mask=there, other=0) != 0)", "there")
            ],
            "The mask is a factor, and 0 * NaN is NaN: load with mask=counts.": [
                ("tl.load(logprobs + at, mask=counts", "tl.load(logprobs + at, mask=there"),
                ("tl.load(old_logprobs + at, mask=counts", "tl.load(old_logprobs + at, mask=there"),
                ("tl.load(advantages + at, mask=counts", "tl.load(advantages + at, mask=there"),
                (
                    "loss = -tl.where(stopped, clipped, surrogate)",
                    "loss = -tl.where(stopped, clipped, surrogate) * counts.to(tl.float32)",
                ),
                (_STOPPED, "gradient = tl.where(stopped, 0.0, -surrogate) * counts.to(tl.float32)"),
            ],
            "The ratio is upside down: exp(logprob - old_logprob).": [
                ("tl.exp(logprob - old_logprob)", "tl.exp(old_logprob - logprob)")
            ],
            "The clip has no upper bound.": [("tl.where(ratio > high, high,", "tl.where(ratio > high, ratio,")],
            "The sign of the gradient is wrong: it is the derivative of the loss, not of the objective.": [
                (_STOPPED, "gradient = tl.where(stopped, 0.0, surrogate)")
            ],
            "The sign of the loss is wrong: it is minus the objective.": [("loss = -tl.where", "loss = tl.where")],
            "Every program works on the first BLOCK tokens: its own tokens begin at tl.program_id(0) * BLOCK.": [
                ("tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)", "tl.arange(0, BLOCK)")
            ],
            "This is the gradient of the mean: each token's derivative is not divided by the number of tokens.": [
                (_STOPPED, "gradient = tl.where(stopped, 0.0, -surrogate / count)")
            ],
        },
    ),
    hints=(
        "`at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)`, `there = at < count`. A token counts if it is there "
        "and its mask is not 0. Three loads with `mask=counts, other=0.0`: then ratio 1 and advantage 0 give 0 anyway.",
        "`surrogate = ratio * advantage`; `clipped = tl.where(ratio > high, high, tl.where(ratio < low, low, ratio)) * "
        "advantage`; `stopped = clipped < surrogate` chooses for the loss and for the gradient (6.4). Both stores have "
        "`mask=there`.",
    ),
)
def clipped_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    """Loss of each token and its derivative with respect to its log-probability: four tensors [N] -> two [N]."""
    ratio = (torch.where(mask, logprobs, 0.0) - torch.where(mask, old_logprobs, 0.0)).exp()
    advantages = torch.where(mask, advantages, 0.0)
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)
    gradient = _gradient(ratio.log(), torch.zeros_like(ratio), advantages, clip_range)
    return loss, gradient


# 6.6 -----------------------------------------------------------------------------------------------------------------


def _gae_cases() -> list[Case]:
    none, zero = bools([0, 0]), tensor(0.0)
    cases = [
        Case("two steps, no values", (tensor([1, 2]), tensor([0, 0]), none, zero, 1.0, 0.5), tensor([2.0, 2.0])),
        Case("the value after the last column", (tensor([0, 0]), tensor([0, 0]), none, tensor(8.0), 0.5, 0.5),
             tensor([1.0, 4.0])),
        Case("an end after the first step", (tensor([1, 2]), tensor([3, 5]), bools([1, 1]), tensor(9.0), 0.5, 0.5),
             tensor([-2.0, -3.0])),
        Case("three steps, an end in the middle",
             (tensor([1, 2, 3]), tensor([2, 1, 1]), bools([0, 1, 0]), tensor(4.0), 0.5, 0.5),
             tensor([-0.25, 1.0, 4.0])),
    ]  # fmt: skip
    for (rows, steps), generator in zip(((1, 4), (2, 5), (3, 7)), generators(3), strict=True):
        rewards, values = (normal(generator, rows, steps, dtype=F32) for _ in range(2))
        rest = flags(generator, rows, steps), normal(generator, rows, dtype=F32), 0.9, 0.8
        cases.append(Case(f"random, of shape {rows, steps}", (rewards, values, *rest)))
    return cases


def launch_gae(
    kernel: Any, rewards: Tensor, values: Tensor, ends: Tensor, last_values: Tensor, gamma: float, lam: float
) -> Tensor:
    """Three tensors [N, T], last_values [N] -> advantages [N, T]: one program per row, a tile of 4 or 8 steps."""
    rows, steps = rewards.shape
    inputs = guarded(rewards, beyond=50.0), guarded(values, beyond=50.0), guarded(ends, beyond=False)
    advantages = guarded(torch.zeros(rows, steps), beyond=7.0)
    tile = max(4, triton.next_power_of_2(steps))
    kernel[(rows,)](*inputs, last_values.to(advantages.device), advantages, steps, gamma, lam, STEPS=tile)
    untouched_beyond(advantages, 7.0)
    return advantages.cpu()


def _gae(  # type: ignore[no-untyped-def]
    rewards, values, ends, last_values, advantages, steps, gamma, lam, STEPS: tl.constexpr
):
    """The advantages of one row, by one program, in one scan.

    Pointers: rewards, values and ends (1: the episode ends with this step), whose row i begins
    at i * steps; last_values [N], the value after the last column; advantages, to be written.
    STEPS: lanes of the tile, a power of two, at least `steps`.
    """
    row = tl.program_id(0)
    back = tl.arange(0, STEPS)
    t = steps - 1 - back  # the first lane is the last step
    there = t >= 0
    at = row * steps + t
    reward = tl.load(rewards + at, mask=there, other=0.0)
    value = tl.load(values + at, mask=there, other=0.0)
    end = tl.load(ends + at, mask=there, other=1) != 0
    following = tl.load(values + at + 1, mask=there & (t + 1 < steps), other=0.0)
    following = tl.where(t + 1 == steps, tl.load(last_values + row), following)
    delta = reward + gamma * tl.where(end, 0.0, following) - value
    decay = tl.where(end, 0.0, gamma * lam)
    _, b = tl.associative_scan((decay, delta), 0, after)
    tl.store(advantages + at, b, mask=there)


def _scans(tree: ast.AST) -> str | None:
    """What is wrong with the form of a kernel for 6.6."""
    if loops(tree):
        return "Right, but it walks: 1,024 steps wait for each other. Use tl.associative_scan."
    if not any(getattr(node, "attr", None) == "associative_scan" for node in ast.walk(tree)):
        return "Right, but not in one scan: join the lines of the steps with tl.associative_scan."
    return None


@jit
def _swapped(a_before, b_before, a, b):  # type: ignore[no-untyped-def]
    return a * a_before, a_before * b + b_before


@jit
def _added(a_before, b_before, a, b):  # type: ignore[no-untyped-def]
    return a * a_before, b_before + b


@puzzle(
    "6.6",
    "GAE as a scan",
    difficulty=5,
    minutes=40,
    task="$A_t = \\delta_t + d_t A_{t+1}$, where $d_t = \\gamma\\lambda$, or 0 where an episode ends. "
    "`tl.associative_scan((a, b), 0, after)` joins lane 0 with 1, with 2, ... by `after`, which makes one line of two. "
    "It runs from the first lane to the last, and time has to run the other way.",
    kernel=_gae,
    launch=launch_gae,
    form=_scans,
    cases=_gae_cases,
    suspects=variants(
        _gae,
        {
            "The scan runs forwards in time: A_t needs what comes after t, so lane 0 must hold the last step.": [
                ("t = steps - 1 - back", "t = back"),
                ("there = t >= 0", "there = t < steps"),
            ],
            "The operands of the scan's function are swapped: after(a', b', a, b) puts the line (a', b'), of the lanes "
            "before, into (a, b).": [("after)", "_swapped)")],
            "The scan only adds: what came before has to be scaled by this lane's decay.": [("after)", "_added)")],
            "An end does not cut the chain: the decay there is 0, or advantages leak from one episode into another.": [
                ("decay = tl.where(end, 0.0, gamma * lam)", "decay = tl.where(there, gamma * lam, 0.0)")
            ],
            "An end does not cut the value: after it there is no next state, so delta has no gamma V.": [
                ("tl.where(end, 0.0, following)", "following")
            ],
            "An end cuts neither the value nor the chain.": [
                ("tl.where(end, 0.0, following)", "following"),
                ("decay = tl.where(end, 0.0, gamma * lam)", "decay = tl.where(there, gamma * lam, 0.0)"),
            ],
            "The decay is gamma alone: gamma * lam.": [
                ("decay = tl.where(end, 0.0, gamma * lam)", "decay = tl.where(end, 0.0, gamma)")
            ],
            "The value after the last column is missing: at t = steps - 1 it is last_values.": [
                ("tl.where(t + 1 == steps, tl.load(last_values + row), following)", "following")
            ],
            "There is no scan: these are the TD errors.": [("advantages + at, b,", "advantages + at, delta,")],
            "This is the slope of each line: what is wanted is the other result of the scan.": [("_, b = ", "b, _ = ")],
            "The decay is lam alone: gamma * lam.": [
                ("decay = tl.where(end, 0.0, gamma * lam)", "decay = tl.where(end, 0.0, lam)")
            ],
            "V(s) is missing in delta: reward + gamma V(s') - V(s).": [
                ("tl.where(end, 0.0, following) - value", "tl.where(end, 0.0, following)")
            ],
            "gamma is missing in delta: reward + gamma V(s') - V(s).": [
                ("gamma * tl.where(end, 0.0, following)", "tl.where(end, 0.0, following)")
            ],
            "The ends are read the wrong way round: 1 says that the episode ends with this step.": [
                ("mask=there, other=1) != 0", "mask=there, other=1) == 0")
            ],
        },
    ),
    hints=(
        "`t = steps - 1 - tl.arange(0, STEPS)` turns time round; what lies before step 0 is masked with `t >= 0`. "
        "$V(s_{t+1})$ is `values` one step on, except in the last column.",
        "`delta = reward + gamma * tl.where(end, 0.0, following) - value`, `decay = tl.where(end, 0.0, gamma * lam)`, "
        "`a, b = tl.associative_scan((decay, delta), 0, after)`: nothing comes before the first lane, so `b` is $A_t$.",
    ),
)
def gae(rewards: Tensor, values: Tensor, ends: Tensor, last_values: Tensor, gamma: float, lam: float) -> Tensor:
    """rewards, values, ends (bool) [N, T], last_values [N] -> advantages [N, T]."""
    return returns.gae(rewards, values, ends, last_values=last_values, gamma=gamma, lam=lam)[0]
