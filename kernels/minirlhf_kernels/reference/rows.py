"""What the softmax of a row of logits gives one token, and the gradient back into the row, as near as float32 gets.

A row is summed WITHOUT one of its logits, the pivot:

    w_j = (z_j - z_pivot) log2(e) / T           rest = sum of 2^w_j over all j but the pivot

    log p_token = ln 2 w_token - log1p(rest)    p_j = 2^w_j / (1 + rest)
    entropy     = log1p(rest) - mean            mean = ln 2 sum of p_j w_j

The pivot's own 2^0 = 1 is in no sum, so that what the others add to it keeps its digits however small it is: at a
margin of 20 nats 1 - p has lost all of them. The token is the pivot (w_token = 0). A row that does not suit it is done
again about its leader, the highest logit, in float64: where the token is all but certain, since 2^w has as many wrong
digits as w has before its point; where another logit lies so far above the token that the entropy would be the small
difference of two large numbers, or rest overflow.

Powers of 2, because 1 / T has to be multiplied in all the same, and exp2 is the cheaper function.

One [R, V] tensor waits for the backward: the logits, from which it makes p again, as on a GPU; or, for log p alone,
their powers, which make it a single product. Rows are taken a few at a time: what one line writes is still in a core's
own cache when the next one reads it.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat

import torch
from torch import Tensor

# Numbers in each room of a part that takes one or two, for each thread.
_PART = {1: 1 << 20, 2: 1 << 18}
_WORTH_IT = 1 << 18  # numbers above which a pass takes longer than four operations on columns
KEPT = 1 << 22  # the largest room that waits for the next call
# At a smaller rest (20.7 nats of margin) float32 no longer holds w to 2e-6; above the larger one sums near overflow.
_LEAST, _MOST = 1e-9, 1e30
# 2 to this power is 0 in float64 too; -inf in its place would make 0 * -inf, NaN.
_NEVER = -2000.0
_LN2 = math.log(2.0)
COLD = 1e-9  # a temperature below which an ordinary w may overflow
BASE_2 = 1.0 / _LN2  # the temperature at which w is a plain difference of logits

# glibc keeps for later calls what is no larger than the largest piece, of up to 32 MiB, that was ever given back to it.
# Without one, tensors of a few MiB go back to the system after each step and come again page by page.
torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@dataclass(slots=True)
class Rows:
    """N rows that were read: columns [N, 1], from which p_j = 2^w_j / (1 + rest), w_j = (z_j - shift) log2(e) / T."""

    index: Tensor
    """Their tokens."""
    which: Tensor | None
    """Where they lie among the logits [R, V]; None: they are all of them."""
    temperature: float
    logprobs: Tensor = field(init=False)
    rest: Tensor = field(init=False)
    shift: Tensor | None = None
    """None: no gradient can be asked of them."""
    entropy: Tensor | None = None
    mean: Tensor | None = None
    kept: Tensor | None = None
    """2^w_j [N, V], anything at the token, on request."""
    barred: bool = False
    """Whether a w may be -inf and has to be held above it (for the entropy: without it -inf does no harm)."""

    def parts(self, logits: Tensor, size: int) -> Iterator[Tensor]:
        """The logits of all N rows, `size` rows at a time."""
        if self.which is None:
            return (_wide(part) for part in _split(logits, size))
        return (_wide(logits.index_select(0, some)) for some in _split(self.which, size))

    def exponent(self, logits: Tensor, shift: Tensor, out: Tensor) -> Tensor:
        """w, from differences: so no digits are lost to an offset that all logits share."""
        w = torch.sub(logits, shift, out=out)
        w = w if self.temperature == BASE_2 else w.mul_(1.0 / (_LN2 * self.temperature))
        return w.clamp_(min=_NEVER) if self.barred else w


def _traced(logits: Tensor) -> bool:
    """Under a tracer: what it makes up must not stay here, nor what is here go into its graph."""
    return type(logits) not in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling()


class _Scratch(threading.local):
    """Room to work in on the CPU, kept from call to call: fresh memory costs more to get than to compute in."""

    def __init__(self) -> None:
        self.kept: dict[tuple[int, torch.dtype], Tensor] = {}
        self.last: dict[tuple[int, torch.dtype], Tensor] = {}  # the same in the shape asked for last

    def room(self, number: int, rows: int, dtype: torch.dtype, logits: Tensor) -> Tensor:
        """An uninitialised [rows, V]; two that are in use at the same time have different numbers."""
        shape = (rows, logits.shape[-1])
        size = shape[0] * shape[1]
        if size > KEPT or not logits.is_cpu or _traced(logits):
            return torch.empty(shape, dtype=dtype, device=logits.device)
        last = self.last.get((number, dtype))
        if last is not None and last.shape == shape:
            return last
        found = self.kept.get((number, dtype))
        with torch.inference_mode(False):  # or it could not be written outside of that mode
            if found is None or found.numel() < size:
                found = self.kept[number, dtype] = torch.empty(size, dtype=dtype, device="cpu")
            last = self.last[number, dtype] = found[:size].view(shape)
        return last


scratch = _Scratch()


@functools.cache
def _adds_at_once() -> bool:
    """Whether a + c b rounds once on this CPU: where a row fills vectors (32 numbers at a time) and in its rest."""
    for dtype in (torch.float32, torch.float64):
        b = torch.full((2, 2 * 32 + 13), 1.0 / 3.0, dtype=dtype, device="cpu")
        a = b[:, :1] * -BASE_2
        lost = torch.add(a, b, alpha=BASE_2)  # 0, or what a lost when it was rounded
        if not lost.all():
            return False
    return True


def _wide(z: Tensor) -> Tensor:
    return z if z.dtype in (torch.float32, torch.float64) else z.float()


def _split(x: Tensor, size: int) -> Sequence[Tensor]:
    return (x,) if x.shape[0] <= size else x.split(size)


def _part_size(rows: int, logits: Tensor, rooms: int) -> int:
    """Rows of a part that takes so many rooms: the number of parts is rounded, so that none is a small rest.

    On a GPU all rows: there a launch costs more than a cache saves.
    """
    numbers = rows * logits.shape[-1]
    if numbers > _PART[rooms] and not logits.is_cuda:
        parts = round(numbers / min(_PART[rooms] * torch.get_num_threads(), KEPT // 3 * 2))
        rows = -(-rows // parts) if parts > 1 else rows
    return max(1, rows)


def read(
    logits: Tensor,
    tokens: Tensor,
    which: Tensor | None,
    temperature: float,
    want_entropy: bool,
    keep: bool = False,
    barred: bool = False,
    again: Callable[[Tensor], Tensor] | None = None,
    once: bool = False,
) -> Rows:
    """log p of the tokens [R, 1] under softmax(logits [R, V] / temperature), and the entropy; of the rows `which` [N].

    With `keep`, log p alone leaves its powers in `kept`, for which `write_gradient` does not need the logits.
    With `again`, which makes the logits of some rows once more, log p alone writes w over the logits: they are lost.
    With `again` or `once` no gradient can be asked of the rows, and log p alone is read in a pass less where it can be.
    """
    if torch.jit.is_tracing():
        raise RuntimeError("torch.jit.trace would keep the way of one batch's rows for all: use torch.compile")
    index = tokens if which is None else tokens[which]
    count, dtype = index.shape[0], at_least_float32(logits.dtype)
    rows = Rows(index, which, temperature, barred=barred or temperature < COLD)
    size, keep = _part_size(count, logits, 1 + want_entropy), keep and not want_entropy
    once = (once or again is not None) and not want_entropy and _at_once(logits, count, temperature)
    if again:
        w = logits
    elif keep:
        w = torch.empty((count, logits.shape[-1]), dtype=dtype, device=logits.device)
    else:
        w = scratch.room(0, size, dtype, logits)
    e = scratch.room(1, size, dtype, logits) if want_entropy else None
    if count == size:  # few operations for a small call
        z = _wide(logits if which is None else logits[which])
        sums = _about_token_at_once(rows, z, index, w) if once else _about_token(rows, z, index, w, e)
    else:
        parts = []
        for z, at, into in zip(
            rows.parts(logits, size), _split(index, size), _split(w, size) if keep or again else repeat(w), strict=False
        ):
            n = at.shape[0]
            if n < size:  # the last part
                into, e = into[:n], None if e is None else e[:n]
            parts.append(_about_token_at_once(rows, z, at, into) if once else _about_token(rows, z, at, into, e))
        sums = tuple(torch.cat(column) for column in zip(*parts, strict=True))
    rows.rest, rows.shift, rows.kept = sums[0], None if once else sums[1], w if keep else None
    below = rows.rest.log1p()
    if not want_entropy:
        rows.logprobs = below.neg_()
        if count == 0 or _within_bounds(*rows.rest.aminmax()):
            return rows
        suits = (rows.rest >= _LEAST) & (rows.rest <= _MOST)
    else:
        rows.logprobs = -below
        rows.mean = sums[2].mul_(_LN2).div_(rows.rest + 1.0)
        rows.entropy = below - rows.mean
        # Else too many digits cancel; false where anything is NaN.
        suits = (rows.entropy >= below.mul_(0.25)).logical_and_(rows.rest >= _LEAST)
        if bool(suits.all()):
            return rows
        if not barred and bool(rows.mean.isnan().any()):
            return read(logits, tokens, which, temperature, want_entropy, barred=True)
    for some in _split(suits.logical_not_().squeeze(-1).nonzero().squeeze(-1), size):
        place = some if which is None else which[some]
        _about_leader(rows, again(some) if again else logits.index_select(0, place), some)
    return rows


def _within_bounds(least: Tensor, most: Tensor) -> bool:
    return least.item() >= _LEAST and most.item() <= _MOST


def _at_once(logits: Tensor, count: int, temperature: float) -> bool:
    """Whether `_about_token_at_once` is the shorter way, and as exact."""
    if count * logits.shape[-1] < _WORTH_IT or temperature == BASE_2 or not logits.is_cpu:
        return False
    return not _traced(logits) and _adds_at_once()  # a compiler's a + c b rounds twice


def _about_token(rows: Rows, z: Tensor, index: Tensor, w: Tensor, e: Tensor | None) -> tuple[Tensor, ...]:
    """The sum of 2^w_j over the others, z_token and, with room e for the powers, the sum of 2^w_j w_j."""
    z_token = z.gather(-1, index)
    rows.exponent(z, z_token, w)
    powers = torch.exp2(w, out=w if e is None else e).scatter_(-1, index, torch.zeros_like(z_token))
    rest = powers.sum(-1, keepdim=True)
    return (rest, z_token) if e is None else (rest, z_token, e.mul_(w).sum(-1, keepdim=True))


def _about_token_at_once(rows: Rows, z: Tensor, index: Tensor, w: Tensor) -> tuple[Tensor]:
    """The sum alone, from w + off, which takes one pass where w takes two.

    A fused multiply-add rounds c z - c z_token only once, so an offset that all logits share costs no digits here
    either. Only c z_token is rounded before. What it lost then is off, one number a row, which the same operation gives
    exactly at the token; the sum is divided by 2^off.
    """
    c = 1.0 / (_LN2 * rows.temperature)
    z_token = z.gather(-1, index)
    minus = z_token * -c
    torch.add(minus, z, alpha=c, out=w)
    off = minus.add_(z_token, alpha=c)
    w.exp2_().scatter_(-1, index, z_token.zero_())  # zeros: z_token is not needed any more
    return (w.sum(-1, keepdim=True).div_(off.exp2_()),)


def _about_leader(rows: Rows, logits: Tensor, some: Tensor) -> None:
    """Rows that cannot be summed without their token, summed without their leader, in float64."""
    z = logits.double()
    top, leader = z.max(-1, keepdim=True)
    v_token = (z.gather(-1, rows.index.index_select(0, some)) - top).div_(rows.temperature)
    w = rows.exponent(z, top, z)
    e = torch.exp2(w).scatter_(-1, leader, 0.0)
    rest = e.sum(-1, keepdim=True)
    below = rest.log1p()
    values = [(rows.rest, rest), (rows.logprobs, v_token - below)]
    if rows.shift is not None:
        values.append((rows.shift, top))
    if rows.kept is not None:
        values.append((rows.kept, e.scatter(-1, leader, 1.0)))
    if rows.mean is not None and rows.entropy is not None:
        mean = e.mul_(w).sum(-1, keepdim=True).mul_(_LN2).div_(rest + 1.0)
        values += [(rows.mean, mean), (rows.entropy, below - mean)]
    for column, value in values:
        column.index_copy_(0, some, value.to(column.dtype))


def write_gradient(
    out: Tensor,
    rows: Rows,
    logits: Tensor | None,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    kept: Tensor | None = None,
) -> None:
    """The gradient into those rows of out [R, V], in out's type, from the logits or what `read` kept of them.

    -p_j (g + (log p_j + H) g_H) / T, log p_j + H = ln 2 w_j - mean; with (1 - p_token) g for -p_token g.
    out may be the logits themselves. Upstream gradients are [R, 1].
    """
    up, up_entropy = (
        None if g is None else (g if rows.which is None else g[rows.which]).mul(-1.0 / rows.temperature)
        for g in (grad_logprobs, grad_entropy)
    )
    up = torch.zeros_like(rows.rest) if up is None else up
    at_token, level = torch.expm1(rows.logprobs).mul_(up), up
    slope = None  # of what p_j is multiplied by, along w_j
    total = rows.rest + 1.0
    if up_entropy is not None and rows.entropy is not None and rows.mean is not None:
        log_p = rows.logprobs.clamp(min=_NEVER)
        at_token += (log_p + rows.entropy).mul_(log_p.exp_()).mul_(up_entropy)
        level, slope = torch.addcmul(up, rows.mean, up_entropy, value=-1.0), up_entropy.mul_(_LN2).div_(total)
    level = level / total

    size = _part_size(level.shape[0], out, 1 if slope is None else 2)
    direct = rows.which is None and out.dtype == level.dtype
    w = None if slope is None else scratch.room(0, size, level.dtype, out)
    room = None if direct else scratch.room(1, size, level.dtype, out)
    targets = _split(out, size) if rows.which is None else repeat(out)
    zs = repeat(level) if logits is None else rows.parts(logits, size)  # the first only stands for what was kept
    columns = (
        repeat(None) if c is None else _split(c, size)
        for c in (rows.which, rows.index, at_token, level, slope, rows.shift, kept)
    )
    for target, z, which, index, at, base, rise, shift, e in zip(targets, zs, *columns, strict=False):
        if (n := index.shape[0]) < size:  # the last part
            w, room = (None if x is None else x[:n] for x in (w, room))
        grad = target if room is None else room
        if e is not None:
            torch.mul(e, base, out=grad)
        elif w is None:
            rows.exponent(z, shift, grad).exp2_().mul_(base)
        else:
            torch.exp2(rows.exponent(z, shift, w), out=grad)
            grad.mul_(w.mul_(rise).add_(base))
        grad.scatter_(-1, index, at)
        if which is not None:
            target[which] = grad.to(target.dtype)
        elif room is not None:
            target.copy_(grad)
