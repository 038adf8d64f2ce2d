"""What a Llama's layer is made of, for rows without padding: each forward beside a backward written out.

    unit           RMSNorm without its weight, which goes into the matrix behind it (`LayerWeights`)
    attend         rotary embedding and causal attention of each row to itself
    swiglu         silu(gate) * up of the feed-forward half
    pick           some of the tokens

torch's autograd would compute the same gradients with more passes over memory; at these sizes the passes cost a CPU as
much as the matrix products. Tests hold every gradient to finite differences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

SHORTEST_IN_GROUP = 0.5  # of the group's longest row: the share of attention that may be padding
WIDEST_HELD = 256  # tokens a row: up to here all attention weights are held, beyond it flash attention is as quick


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that says so where a second derivative is asked for.

    Only create_graph=True runs a backward with gradients on; torch's once_differentiable would let some cases pass.
    """

    @wraps(backward)
    def checked(*args: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a packed Llama is differentiable once: for a second derivative call the model's own forward"
            )
        return backward(*args)

    return checked


class LayerWeights(NamedTuple):
    """One layer's parameters, as its matrix products take them; differentiable."""

    qkv: Tensor
    """[3 D, D]: queries, already divided by sqrt(d), and keys, both `paired`; values. Times sqrt(D) and the norm's."""
    qkv_bias: Tensor | None
    out: nn.Linear
    gate_up: Tensor
    """[2 I, D]. Times sqrt(D) and the norm's weight."""
    gate_up_bias: Tensor | None
    down: nn.Linear
    floors: tuple[float, float]
    """sqrt(D eps) of both norms."""

    @staticmethod
    def of(layer: LlamaDecoderLayer, heads: int) -> LayerWeights:
        """The weights of a layer as they are now: they don't follow an optimizer step."""
        attention, mlp = layer.self_attn, layer.mlp
        first, second = layer.input_layernorm, layer.post_attention_layernorm
        width = len(first.weight) ** 0.5
        query, key = paired(attention.q_proj, heads), paired(attention.k_proj, heads)
        scale = (attention.q_proj.out_features // heads) ** -0.5
        query = (query[0] * scale, None if query[1] is None else query[1] * scale)
        qkv, qkv_bias = _stacked(query, key, (attention.v_proj.weight, attention.v_proj.bias))
        gate, up = (mlp.gate_proj.weight, mlp.gate_proj.bias), (mlp.up_proj.weight, mlp.up_proj.bias)
        gate_up, gate_up_bias = _stacked(gate, up)
        return LayerWeights(
            qkv * (first.weight * width),
            qkv_bias,
            attention.o_proj,
            gate_up * (second.weight * width),
            gate_up_bias,
            mlp.down_proj,
            (floor(first), floor(second)),
        )


def paired(linear: nn.Linear, heads: int) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a query or key projection with those outputs beside each other that rotate together.

    Llama rotates output i of a head with output i + d/2. Queries and keys are only ever multiplied with each other,
    so that their common order is free, and neighbours are a complex number.
    """
    weight = linear.weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    bias = None if linear.bias is None else linear.bias.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten()
    return weight, bias


def _stacked(*linears: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    biases = [bias for _, bias in linears if bias is not None]
    return torch.cat([weight for weight, _ in linears]), torch.cat(biases) if biases else None


def floor(norm: LlamaRMSNorm) -> float:
    """sqrt(D eps): what `unit` adds to |x|, by Pythagoras."""
    return (len(norm.weight) * norm.variance_epsilon) ** 0.5


def unit(x: Tensor, floor: float) -> Tensor:
    """x / sqrt(|x|^2 + floor^2) over the last dimension: [N, D] -> [N, D]. Times sqrt(D) and a weight it is RMSNorm."""
    return _Unit.apply(x, floor) if torch.is_grad_enabled() else x * _unit_scale(x, floor)


def _unit_scale(x: Tensor, floor: float) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().add_(floor * floor).rsqrt_()


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, floor: float) -> Tensor:
        scale = _unit_scale(x, floor)
        out = x * scale
        ctx.save_for_backward(out, scale)
        return out

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out, scale = ctx.saved_tensors
        # x's own direction is taken out of the gradient: a longer x gives the same output.
        along = (grad * out).sum(dim=-1, keepdim=True)
        return torch.addcmul(grad, out, along, value=-1).mul_(scale), None


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, given beside each other: [N, 2 I] -> [N, I] (Shazeer 2020, "GLU variants improve ...")."""
    if torch.is_grad_enabled():
        return _SwiGLU.apply(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        active = F.silu(gate)
        ctx.save_for_backward(gate_up, active)
        return active * up

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        gate_up, active = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_both = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_both.chunk(2, dim=-1)
        torch.mul(grad, active, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_both


def pick(x: Tensor, index: Tensor) -> Tensor:
    """x[index] for places that are all different: [N, D], [W] int64 -> [W, D]."""
    return _Pick.apply(x, index)


class _Pick(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.length = len(x)
        return x.index_select(0, index)

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_zeros(ctx.length, grad.shape[1]).index_copy_(0, ctx.saved_tensors[0], grad), None


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of paired outputs: [.., d] real by [.., d/2] complex -> [.., d]."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * rotation).flatten(-2)


class Group(NamedTuple):
    """Neighbouring rows of like length, R of them, which attention stands beside each other, T tokens wide.

    A token has 3 H pieces of d numbers: a query, a key and a value for each head. They go straight to where the
    products want them, [3, H R, T, d], and come straight back.
    """

    tokens: int
    width: int
    standing: Tensor
    """[3 H, R T] int64, which piece of the group goes there; a row's gap is filled with its last token."""
    lying: Tensor
    """[tokens, 3 H] int64, where each piece went."""
    results: Tensor
    """[H, R T] int64, which head of which token belongs there: `standing`, had a token H pieces."""
    gaps: Tensor
    """[R T - tokens] int64, where no token went."""


def attention_groups(lengths: Sequence[int], heads: int) -> list[Group]:
    """Groups of rows whose lengths fall."""
    groups, row, pieces = [], 0, torch.arange(3 * heads)
    while row < len(lengths):
        width, end = lengths[row], row
        while end < len(lengths) and lengths[end] >= SHORTEST_IN_GROUP * width:
            end += 1
        own = torch.tensor(lengths[row:end])[:, None]
        starts, columns = own.cumsum(0) - own, torch.arange(width)
        token = (starts + torch.minimum(columns, own - 1)).flatten()
        real = (columns < own).flatten()
        lying = real.nonzero() + pieces * len(real)
        gaps = (~real).nonzero().squeeze(1)
        standing, results = token * 3 * heads + pieces[:, None], token * heads + pieces[:heads, None]
        groups.append(Group(len(lying), width, standing, lying, results, gaps))
        row = end
    return groups


def attend(qkv: Tensor, groups: Sequence[Group], rotations: Tensor) -> Tensor:
    """Causal attention of each row to itself: [N, 3 D], before the rotary embedding, -> [N, D].

    A row's gap stands behind it, where no real token looks, and nobody reads what it computes.

    Args:
        qkv: queries (divided by sqrt(d)), keys and values of rows end to end, as `LayerWeights.qkv` makes them.
        groups: of these rows.
        rotations: [T, d/2] complex, of each position.
    """
    parts = []
    for group, rows in zip(groups, qkv.split([group.tokens for group in groups]), strict=True):
        standing = _Stand.apply(rows, group, rotations)
        mixed = _Held.apply(standing) if group.width <= WIDEST_HELD else _flash(standing)
        parts.append(_Lie.apply(mixed, group))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Stand(torch.autograd.Function):
    """[tokens, 3 D] -> [3, H R, T, d], queries and keys with their rotary embedding (Su et al. 2021)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group, rotations: Tensor) -> Tensor:
        ctx.group, ctx.rotations = group, rotations
        size = rows.shape[1] // group.lying.shape[1]
        out = rows.view(-1, size).index_select(0, group.standing.flatten()).view(3, -1, group.width, size)
        _turn(out[:2], rotations[: group.width])
        return out

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        group, size = ctx.group, grad.shape[-1]
        out = grad.view(-1, size).index_select(0, group.lying.flatten()).view(group.tokens, -1, size)
        position = group.lying[:, 0] % group.width
        _turn(out[:, : 2 * out.shape[1] // 3], ctx.rotations[position].conj().unsqueeze(1))
        return out.view(group.tokens, -1), None, None


def _turn(pairs: Tensor, rotation: Tensor) -> None:
    torch.view_as_complex(pairs.unflatten(-1, (-1, 2))).mul_(rotation)


class _Lie(torch.autograd.Function):
    """[H R, T, d] -> [tokens, D]; what gaps computed counts for nothing."""

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.shape = group, mixed.shape
        heads = group.lying.shape[1] // 3
        return mixed.view(-1, mixed.shape[-1]).index_select(0, group.lying[:, :heads].flatten()).view(group.tokens, -1)

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        group, size = ctx.group, ctx.shape[-1]
        out = grad.reshape(-1, size).index_select(0, group.results.flatten()).view(len(group.results), -1, size)
        return out.index_fill_(1, group.gaps, 0.0).view(ctx.shape), None


class _Held(torch.autograd.Function):
    """The weights of all pairs of tokens are held, keys down and queries across: [3, H R, T, d] -> [H R, T, d]."""

    @staticmethod
    def forward(ctx: Any, standing: Tensor) -> Tensor:
        q, k, v = standing
        width = q.shape[1]
        later = torch.ones(width, width, dtype=torch.bool).tril(-1)  # a key behind the query
        allowed = torch.zeros(width, width, dtype=q.dtype).masked_fill_(later, -torch.inf)
        weights = torch.baddbmm(allowed, k, q.mT).softmax(dim=1)
        ctx.save_for_backward(standing, weights)
        return torch.bmm(weights.mT, v)

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        standing, weights = ctx.saved_tensors
        q, k, v = standing
        out = torch.empty_like(standing)
        torch.bmm(weights, grad, out=out[2])
        grad_weights = torch.bmm(v, grad.mT)
        grad_scores = torch._softmax_backward_data(grad_weights, weights, 1, weights.dtype)
        torch.bmm(grad_scores.mT, k, out=out[0])
        torch.bmm(grad_scores, q, out=out[1])
        return out


def _flash(standing: Tensor) -> Tensor:
    """Memory that does not grow with the square of a row's length: [3, H R, T, d] -> [H R, T, d]."""
    q, k, v = standing.unsqueeze(2)  # [H R, 1, T, d]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0).squeeze(1)
