"""What the softmax of a row of logits gives one token, and the gradient back into the row, to the last digits.

A row is summed WITHOUT one of its logits, the pivot:

    v_j = (z_j - z_pivot) / T                   rest = sum of exp(v_j) over all j but the pivot

    log p_token = v_token - log1p(rest)         p_j = exp(v_j) / (1 + rest)
    entropy     = log1p(rest) - mean            mean = sum of p_j v_j

The pivot's own exp(0) = 1 is in no sum, so that what the others add to it keeps its digits however small it is: at a
margin of 20 nats 1 - p has lost all of them. The token is the pivot (v_token = 0) unless another logit lies so far
above it that the entropy would be the small difference of two large numbers, or rest overflow. Such a row is done
again about its leader, the highest logit, where all terms have one sign.

For log p alone a pass is spared: logits as they are, summed without the token, give log p_token =
-log1p(rest / exp z_token), as long as both are within bounds.

One [R, V] tensor waits for the backward: the logits, from which it makes p again, as on a GPU; or, for log p alone,
their exponentials, which make it a single product. The entropy takes several passes, so its rows are taken a few at a
time: what one line writes is still in a core's own cache when the next one reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat

import torch
from torch import Tensor

# Logits of a part, with the entropy (several passes; for each thread: 512 KiB of float32) and without (two passes).
_PART, _BLOCK = 1 << 17, 1 << 22
# exp(z_token) and rest within these have a quotient in float32, and terms that vanish do not matter.
_LEAST, _MOST = 1e-20, 1e17
# exp of it is 0 in float64 too; -inf in its place would make 0 * -inf, NaN.
_NEVER = -1000.0


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@dataclass
class Rows:
    """N rows that were read: columns [N, 1], from which p_j = exp((z_j - shift) / temperature) / (own + rest)."""

    index: Tensor
    """Their tokens."""
    which: Tensor | None
    """Where they lie among the logits [R, V]; None: they are all of them."""
    temperature: float
    logprobs: Tensor = field(init=False)
    rest: Tensor = field(init=False)
    own: Tensor | float = 1.0
    """exp of what rest was summed without: the leader's, or the token's."""
    shift: Tensor | None = None
    """None: 0."""
    entropy: Tensor | None = None
    mean: Tensor | None = None
    kept: Tensor | None = None
    """p_j (own + rest) [N, V], anything at the token, on request."""
    barred: bool = False
    """Whether there may be logits of -inf (with the entropy: without, they do no harm)."""

    def take(self, logits: Tensor, some: Tensor) -> Tensor:
        """The logits of some of the N rows, in float32 or float64: a copy."""
        logits = logits[some if self.which is None else self.which[some]]
        return logits.to(at_least_float32(logits.dtype))

    def parts(self, logits: Tensor, size: int) -> Iterator[Tensor]:
        """The logits of all N rows, `size` rows at a time."""
        parts = _split(logits, size) if self.which is None else (logits[some] for some in _split(self.which, size))
        return (part.to(at_least_float32(part.dtype)) for part in parts)

    def exponent(self, logits: Tensor, shift: Tensor | None, out: Tensor) -> Tensor:
        """(logits - shift) / temperature, in that order: only differences are scaled, so that no digits are lost."""
        if shift is not None:
            logits = torch.sub(logits, shift, out=out)
        return logits if self.temperature == 1.0 else torch.div(logits, self.temperature, out=out)


def _split(x: Tensor, size: int) -> Sequence[Tensor]:
    return (x,) if x.shape[0] <= size else x.split(size)


def _part_size(rows: int, logits: Tensor, entropy: bool) -> int:
    """Rows of a part. On a GPU all: there a launch costs more than a cache saves."""
    if not logits.is_cuda:
        elements = _PART * torch.get_num_threads() if entropy else _BLOCK
        rows = min(rows, elements // max(1, logits.shape[-1]))
    return max(1, rows)


def read(
    logits: Tensor, tokens: Tensor, which: Tensor | None, temperature: float, want_entropy: bool, keep: bool = False
) -> Rows:
    """log p of the tokens [R] under softmax(logits [R, V] / temperature), and the entropy; of the rows `which` [N].

    With `keep`, log p alone leaves its exponentials in `kept`, for which `write_gradient` does not need the logits.
    """
    index = (tokens if which is None else tokens[which]).unsqueeze(-1)
    count, dtype = index.shape[0], at_least_float32(logits.dtype)
    rows = Rows(index, which, temperature)
    size = max(1, count) if keep and not want_entropy else _part_size(count, logits, want_entropy)
    e = torch.empty((size, logits.shape[-1]), dtype=dtype, device=logits.device)
    v = torch.empty_like(e) if want_entropy else e
    parts = []
    for z, at in zip(rows.parts(logits, size), _split(index, size), strict=True):
        if z.shape[0] < size:  # the last part
            e, v = e[: z.shape[0]], v[: z.shape[0]]
        parts.append(_about_token(rows, z, at, v, e) if want_entropy else _as_it_is(rows, z, at, e))
    columns = parts[0] if len(parts) == 1 else [torch.cat(column) for column in zip(*parts, strict=True)]
    if want_entropy:
        rows.shift, rest, moment = columns
        below, rows.rest, rows.mean = torch.log1p(rest), rest, moment.div_(rest + 1.0)
        rows.logprobs, rows.entropy = below.neg(), below - rows.mean
        good = rows.entropy * 4.0 >= below  # else too many digits cancel; false where anything is NaN
        if bool(good.all()):
            return rows
    else:
        own, rest = columns
        rows.logprobs, rows.rest, rows.own, rows.kept = (rest / own).log1p_().neg_(), rest, own, e if keep else None
        if count == 0 or _within_bounds(*torch.cat(columns).aminmax()):
            return rows
        good = (torch.minimum(own, rest) >= _LEAST) & (torch.maximum(own, rest) <= _MOST)
        rows.shift = torch.zeros_like(own)
    for some in _split(good.logical_not_().squeeze(-1).nonzero().squeeze(-1), size):
        _again(rows, logits, some)
    return rows


def _within_bounds(least: Tensor, most: Tensor) -> bool:
    return least.item() >= _LEAST and most.item() <= _MOST


def _as_it_is(rows: Rows, z: Tensor, index: Tensor, e: Tensor) -> tuple[Tensor, ...]:
    """exp z_token and the sum of the others', which are left in e."""
    own = torch.exp(rows.exponent(z, None, e), out=e).gather(-1, index)
    return own, e.scatter_(-1, index, 0.0).sum(-1, keepdim=True)


def _about_token(rows: Rows, z: Tensor, index: Tensor, v: Tensor, e: Tensor) -> tuple[Tensor, ...]:
    """z_token, the sum of exp(v_j) over the others, and that of exp(v_j) v_j, with v_j = (z_j - z_token) / T."""
    z_token = z.gather(-1, index)
    rest = torch.exp(rows.exponent(z, z_token, v), out=e).scatter_(-1, index, 0.0).sum(-1, keepdim=True)
    return z_token, rest, e.mul_(v).sum(-1, keepdim=True)


def _again(rows: Rows, logits: Tensor, some: Tensor) -> None:
    """Rows that cannot be summed without their token, summed without their leader."""
    z = rows.take(logits, some)
    top = z.amax(-1, keepdim=True)
    v = rows.exponent(z, top, z)
    v_token = v.gather(-1, rows.index[some])
    e = v.exp()
    rest = e.sum(-1, keepdim=True).sub_(1.0)
    if rows.kept is not None:
        rows.kept[some] = e
    if rows.mean is not None:
        v.clamp_(min=_NEVER)
        rows.mean[some] = (e * v).sum(-1, keepdim=True).div_(rest + 1.0)
        rows.barred = True
    # The 1 has cost rest its last digits where it is small, but there is only one 1 then, and the others are below it.
    rest = torch.where(rest < 0.5, e.frac_().sum(-1, keepdim=True), rest)
    below = torch.log1p(rest)
    if rows.mean is not None and rows.entropy is not None:
        rows.entropy[some] = below - rows.mean[some]
    if isinstance(rows.own, Tensor):
        rows.own[some] = 1.0
    if rows.shift is not None:
        rows.shift[some] = top
    rows.logprobs[some], rows.rest[some] = v_token - below, rest


def write_gradient(
    out: Tensor,
    rows: Rows,
    logits: Tensor | None,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    kept: Tensor | None = None,
) -> None:
    """The gradient into those rows of out [R, V], in out's type, from the logits or what `read` kept of them.

    -p_j (g + (log p_j + H) g_H) / temperature, log p_j + H = v_j - mean; with (1 - p_token) g for -p_token g.
    out may be the logits themselves. Upstream gradients are [R].
    """
    up, up_entropy = (
        None if g is None else (g if rows.which is None else g[rows.which]).unsqueeze(-1) / rows.temperature
        for g in (grad_logprobs, grad_entropy)
    )
    up = torch.zeros_like(rows.rest) if up is None else up
    at_token = torch.expm1(rows.logprobs).mul_(up).neg_()
    total = rows.rest + rows.own
    if up_entropy is not None and rows.entropy is not None:
        log_p = rows.logprobs.clamp(min=_NEVER)
        at_token -= log_p.exp().mul_(log_p + rows.entropy).mul_(up_entropy)
        up_entropy = (up_entropy / total).neg_()
    up = up.div(total).neg_()

    size = _part_size(total.shape[0], out, rows.entropy is not None)
    direct = rows.which is None and out.dtype == total.dtype
    v = torch.empty((size, out.shape[-1]), dtype=total.dtype, device=out.device)
    scratch = v if direct else torch.empty_like(v)
    targets = _split(out, size) if rows.which is None else repeat(out)
    zs = repeat(v) if logits is None else rows.parts(logits, size)  # what is kept stands for them
    columns = (
        repeat(None) if c is None else _split(c, size)
        for c in (rows.which, rows.index, at_token, up, up_entropy, rows.shift, rows.mean, kept)
    )
    for target, z, which, index, at, g, g_entropy, shift, mean, e in zip(targets, zs, *columns, strict=False):
        if index.shape[0] < size:  # the last part
            scratch, v = scratch[: index.shape[0]], v[: index.shape[0]]
        grad = target if direct else scratch
        if e is not None:
            torch.mul(e, g, out=grad)
        elif g_entropy is None:
            torch.exp(rows.exponent(z, shift, grad), out=grad).mul_(g)
        else:
            rows.exponent(z, shift, v)
            if rows.barred:
                v.clamp_(min=_NEVER)
            torch.exp(v, out=grad).mul_(v.sub_(mean).mul_(g_entropy).add_(g))
        grad.scatter_(-1, index, at)
        if which is not None:
            target[which] = grad.to(target.dtype)
        elif not direct:
            target.copy_(grad)
