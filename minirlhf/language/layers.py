"""What a Llama's layer is made of, for rows without padding: each forward beside a backward written out.

    unit           RMSNorm without its weight, which goes into the matrix behind it (`LayerWeights`)
    attend         rotary embedding and causal attention of each row to itself
    swiglu         silu(gate) * up of the feed-forward half
    pick           some of the tokens

torch's autograd would compute the same gradients with more passes over memory; at these sizes the passes cost a CPU as
much as the matrix products. Tests hold every gradient to finite differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

SHORTEST_IN_GROUP = 0.5  # of the group's longest row: the share of attention that may be padding
WIDEST_HELD = 256  # tokens a row: up to here all attention weights are held, beyond it flash attention is as quick


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
    return _Unit.apply(x, floor)


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, floor: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.hypot(length, length.new_full((), floor)).reciprocal_()
        out = x * scale
        ctx.save_for_backward(out, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out, scale = ctx.saved_tensors
        # x's own direction is taken out of the gradient: a longer x gives the same output.
        along = (grad * out).sum(dim=-1, keepdim=True)
        return torch.addcmul(grad, out, along, value=-1).mul_(scale), None


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, given beside each other: [N, 2 I] -> [N, I] (Shazeer 2020, "GLU variants improve transformer")."""
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        active = F.silu(gate)
        ctx.save_for_backward(gate_up, active)
        return active * up

    @staticmethod
    @once_differentiable
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
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _placed(grad, ctx.saved_tensors[0], ctx.length), None


def _placed(x: Tensor, index: Tensor, length: int) -> Tensor:
    return x.new_zeros(length, *x.shape[1:]).index_copy_(0, index, x)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of paired outputs: [.., d] real by [.., d/2] complex -> [.., d]."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * rotation).flatten(-2)


class Group(NamedTuple):
    """Neighbouring rows of like length, for attention."""

    tokens: int
    rows: int
    width: int
    to_padded: Tensor | None
    """[rows * width] int64, which token of the group goes there; a row's last one fills its gap."""
    from_padded: Tensor | None
    """[tokens] int64, where each token went. Both None where all rows have one length."""


def attention_groups(lengths: Sequence[int]) -> list[Group]:
    """Groups of rows whose lengths fall."""
    groups, row = [], 0
    while row < len(lengths):
        width, end = lengths[row], row
        while end < len(lengths) and lengths[end] >= SHORTEST_IN_GROUP * width:
            end += 1
        own = lengths[row:end]
        to_padded = from_padded = None
        if own[-1] != width:
            starts, columns = torch.tensor([0, *accumulate(own[:-1])])[:, None], torch.arange(width)
            real = columns < torch.tensor(own)[:, None]
            to_padded = (starts + torch.minimum(columns, torch.tensor(own)[:, None] - 1)).flatten()
            from_padded = real.flatten().nonzero().squeeze(1)
        groups.append(Group(sum(own), len(own), width, to_padded, from_padded))
        row = end
    return groups


def attend(qkv: Tensor, groups: Sequence[Group], rotations: Tensor, heads: int) -> Tensor:
    """Causal attention of each row to itself: [N, 3 D], before the rotary embedding, -> [N, D].

    A row's gap stands behind it, where no real token looks, and nobody reads what it computes.

    Args:
        qkv: queries (divided by sqrt(d)), keys and values of rows end to end, as `LayerWeights.qkv` makes them.
        groups: of these rows.
        rotations: [T, d/2] complex, of each position.
        heads: of attention.
    """
    parts = []
    for group, rows in zip(groups, qkv.split([group.tokens for group in groups]), strict=True):
        if group.width <= WIDEST_HELD:
            parts.append(_Attention.apply(rows, group, rotations, heads))
        else:
            parts.append(_flash(rows, group, rotations, heads))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _flash(rows: Tensor, group: Group, rotations: Tensor, heads: int) -> Tensor:
    """`scaled_dot_product_attention`, whose memory does not grow with the square of a row's length."""
    padded = rows if group.to_padded is None else rows[group.to_padded]
    q, k, v = padded.view(group.rows, group.width, 3, heads, -1).transpose(1, 3).unbind(2)  # [R, H, T, d]
    turn = rotations[: group.width]
    mixed = F.scaled_dot_product_attention(rotate(q, turn), rotate(k, turn), v, is_causal=True, scale=1.0)
    mixed = mixed.transpose(1, 2).flatten(2).flatten(0, 1)
    return mixed if group.from_padded is None else mixed[group.from_padded]


class _Attention(torch.autograd.Function):
    """The weights of all pairs of tokens, keys down and queries across: [H, R, T, T]. A product is one call a head."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group, rotations: Tensor, heads: int) -> Tensor:
        _, count, width, to_padded, from_padded = group
        padded = rows.clone() if to_padded is None else rows.index_select(0, to_padded)
        padded = padded.view(count, width, 3, heads, -1)
        turn = rotations[:width, None, None]
        torch.view_as_complex(padded[:, :, :2].unflatten(-1, (-1, 2))).mul_(turn)
        q, k, v = padded.unbind(2)  # [R, T, H, d]
        scores = rows.new_empty(heads, count, width, width)
        for head in range(heads):
            torch.bmm(k[:, :, head], q[:, :, head].mT, out=scores[head])
        later = torch.ones(width, width, dtype=torch.bool).tril(-1)  # a key behind the query
        scores += torch.zeros(width, width, dtype=rows.dtype).masked_fill_(later, -torch.inf)
        weights = torch.softmax(scores, dim=2)
        mixed = rows.new_empty(heads, count, width, padded.shape[-1])
        for head in range(heads):
            torch.bmm(weights[head].mT, v[:, :, head], out=mixed[head])
        ctx.save_for_backward(padded, weights, turn)
        ctx.group = group
        out = mixed.permute(1, 2, 0, 3).reshape(count * width, -1)
        return out if from_padded is None else out.index_select(0, from_padded)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        padded, weights, turn = ctx.saved_tensors
        _, count, width, _, from_padded = ctx.group
        if from_padded is not None:  # what a gap computes counts for nothing
            grad = _placed(grad, from_padded, count * width)
        q, k, v = padded.unbind(2)
        heads, size = q.shape[2:]
        grad = grad.view(count, width, heads, size)
        grads = grad.new_empty(3, heads, count, width, size)
        grad_weights = torch.empty_like(weights)
        for head in range(heads):
            torch.bmm(weights[head], grad[:, :, head], out=grads[2, head])
            torch.bmm(v[:, :, head], grad[:, :, head].mT, out=grad_weights[head])
        grad_scores = torch._softmax_backward_data(grad_weights, weights, 2, weights.dtype)
        for head in range(heads):
            torch.bmm(grad_scores[head].mT, k[:, :, head], out=grads[0, head])
            torch.bmm(grad_scores[head], q[:, :, head], out=grads[1, head])
        out = torch.empty_like(padded)
        pairs = torch.view_as_complex(grads[:2].unflatten(-1, (-1, 2))).permute(2, 3, 0, 1, 4)
        torch.mul(pairs, turn.conj(), out=torch.view_as_complex(out[:, :, :2].unflatten(-1, (-1, 2))))
        out[:, :, 2] = grads[2].permute(1, 2, 0, 3)
        out = out.view(count * width, -1)
        return (out if from_padded is None else out.index_select(0, from_padded)), None, None, None
