"""transformers' Llama without padding: the same weights and the same numbers, in less time on a CPU.

Answers end when they end, so a batch of them is up to half padding, and transformers computes it all. Here the rows
lie end to end, [N] real tokens, through every matrix product; only attention, where tokens of a row meet, stands them
beside each other again, rows of like length together (Krell et al. 2021, "Efficient sequence packing without
cross-contamination"). Beyond that:

    what nobody asked for is left out    after the last attention only the `wanted` tokens go on: a reward model reads
                                         one token of forty, PPO none of the prompt's
    rotary embedding                     one complex product in place of four products, two sums and a concatenation
    RMSNorm                              its backward written out

A plain Llama in float32 on a CPU takes this path (`can_pack`); any other model, and any Llama with adapters or hooks,
goes through transformers' own forward. Tests hold both to the same outputs and gradients.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.models.llama.modeling_llama import LlamaModel, LlamaRMSNorm

SHORTEST_IN_GROUP = 0.5  # of the group's longest row: the share of attention that may be padding


class Packed(NamedTuple):
    """Rows end to end, the longest first."""

    tokens: Tensor
    """[N] int64."""
    positions: Tensor
    """[N] int64, of each token in its row."""
    lengths: list[int]
    """Tokens of each row, falling; rows without any are left out."""
    slots: Tensor
    """[B, T] int64: where in the N each token of the padded batch lies (no meaning at padding)."""


def pack(tokens: Tensor, mask: Tensor) -> Packed:
    """Leave out the padding, wherever it stands: tokens and mask, both [B, T], True at real tokens.

    Example:
        >>> packed = pack(torch.tensor([[0, 5], [6, 7]]), torch.tensor([[False, True], [True, True]]))
        >>> packed.tokens.tolist(), packed.positions.tolist(), packed.lengths, packed.slots[0, 1].item()
        ([6, 7, 5], [0, 1, 0], [2, 1], 2)
    """
    mask = mask.bool()
    lengths, order = mask.sum(dim=1).sort(descending=True, stable=True)
    sorted_mask = mask[order]
    slots = torch.empty(mask.shape, dtype=torch.long, device=mask.device)
    slots[order] = (sorted_mask.flatten().long().cumsum(0) - 1).view(mask.shape)
    positions = (sorted_mask.long().cumsum(1) - 1)[sorted_mask]
    return Packed(tokens[order][sorted_mask], positions, [n for n in lengths.tolist() if n], slots)


def can_pack(model: PreTrainedModel) -> bool:
    """Whether a causal or scalar model is a Llama of exactly the kind that this file computes."""
    from transformers.activations import SiLUActivation
    from transformers.models.llama import modeling_llama as llama

    base, config = model.base_model, model.config
    if type(model) not in (llama.LlamaForCausalLM, llama.LlamaForSequenceClassification) or _is_hooked(model):
        return False  # a forward of its own, or a hook, has something to say
    if type(base) is not llama.LlamaModel or base.training or torch.is_autocast_enabled("cpu"):
        return False
    weight = base.embed_tokens.weight
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64):
        return False
    if config.num_key_value_heads != config.num_attention_heads or base.rotary_emb.rope_type != "default":
        return False
    known = {llama.LlamaModel, llama.LlamaDecoderLayer, llama.LlamaAttention, llama.LlamaMLP, llama.LlamaRMSNorm}
    known |= {llama.LlamaRotaryEmbedding, nn.ModuleList, nn.Embedding, nn.Linear, nn.SiLU, SiLUActivation}
    return all(  # an adapter or a quantised matrix is another type; a hook waits for a call that would not come
        type(module) in known and (module is base.embed_tokens or not _is_hooked(module)) for module in base.modules()
    )


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def hidden_states(
    base: LlamaModel, packed: Packed, wanted: Tensor | None = None, kept: list[tuple[Tensor, Tensor]] | None = None
) -> Tensor:
    """The last hidden state, after the final norm, of every token [N, D], or of the wanted ones [W, D].

    Args:
        base: a LlamaModel that `can_pack` accepts.
        packed: the rows.
        wanted: [W] int64 places among the N.
        kept: gets each layer's keys and values, [N, H, D/H] both, keys with their rotation.
    """
    tokens, positions, lengths, _ = packed
    x = base.embed_tokens(tokens)  # [N, D]
    rotation = rotations(base, max(lengths))[positions].unsqueeze(1)  # [N, 1, D/2H]
    groups = _attention_groups(lengths)
    last = len(base.layers) - 1
    for i, layer in enumerate(base.layers):
        attention, heads = layer.self_attn, base.config.num_attention_heads
        h = rms_norm(x, layer.input_layernorm)
        q = rotate(F.linear(h, *paired(attention.q_proj, heads)), rotation)
        k = rotate(F.linear(h, *paired(attention.k_proj, heads)), rotation)
        v = attention.v_proj(h).unflatten(-1, (heads, -1))
        if kept is not None:
            kept.append((k, v))
        mixed = _attend(q, k, v, groups)
        if i == last and wanted is not None:  # no later layer reads the others
            x, mixed = x[wanted], mixed[wanted]
        x = x + attention.o_proj(mixed)
        x = x + layer.mlp(rms_norm(x, layer.post_attention_layernorm))
    return rms_norm(x, base.norm)


def rotations(base: LlamaModel, length: int) -> Tensor:
    """exp(i position frequency) of the first `length` positions: [length, D/2H] complex."""
    dtype = base.embed_tokens.weight.dtype
    angles = torch.arange(length)[:, None] * base.rotary_emb.inv_freq.to(dtype)
    return torch.polar(torch.ones_like(angles), angles)


def paired(linear: nn.Linear, heads: int) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a query or key projection with those outputs beside each other that rotate together.

    Llama rotates output i of a head with output i + d/2. Queries and keys are only ever multiplied with each other,
    so that their common order is free, and neighbours are a complex number.
    """
    weight = linear.weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    bias = None if linear.bias is None else linear.bias.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten()
    return weight, bias


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of paired outputs [N, D] by [N, 1, D/2H]: -> [N, H, D/H]."""
    pairs = torch.view_as_complex(x.view(len(x), -1, rotation.shape[-1], 2))
    return torch.view_as_real(pairs * rotation).flatten(-2)


class _Group(NamedTuple):
    """Neighbouring rows of like length, for attention."""

    tokens: int
    rows: int
    width: int
    to_padded: Tensor | None
    """[rows * width] int64, which token of the group goes there; a row's last one fills its gap."""
    from_padded: Tensor | None
    """[tokens] int64, where each token went. Both None where all rows have one length."""


def _attention_groups(lengths: list[int]) -> list[_Group]:
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
        groups.append(_Group(sum(own), len(own), width, to_padded, from_padded))
        row = end
    return groups


def _attend(q: Tensor, k: Tensor, v: Tensor, groups: list[_Group]) -> Tensor:
    """Causal attention of each row to itself: three of [N, H, d] -> [N, H d].

    A gap stands behind its row, where no real token looks, and nobody reads what it computes.
    """
    sizes = [group.tokens for group in groups]
    parts = []
    for group, *rows in zip(groups, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        if group.to_padded is not None:
            rows = [_Padded.apply(x, group.to_padded, group.from_padded) for x in rows]
        query, key, value = (x.view(group.rows, group.width, *x.shape[1:]).transpose(1, 2) for x in rows)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)  # [rows, H, width, d]
        mixed = mixed.transpose(1, 2).flatten(2).flatten(0, 1)
        parts.append(mixed if group.from_padded is None else mixed[group.from_padded])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Padded(torch.autograd.Function):
    """x[to_padded], whose gradient is read back and not summed: what fills a gap has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, to_padded: Tensor, from_padded: Tensor) -> Tensor:
        ctx.save_for_backward(from_padded)
        return x.index_select(0, to_padded)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


def rms_norm(x: Tensor, norm: LlamaRMSNorm) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension: [N, D] -> [N, D] (Zhang and Sennrich 2019)."""
    return _RMSNorm.apply(x, norm.weight, norm.variance_epsilon)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        along = grad * normed
        grad_weight = along.sum(dim=0)
        # x's own direction is taken out of the gradient: a longer x gives the same output.
        share = along.mv(weight).div_(x.shape[-1]).unsqueeze(1)
        return torch.addcmul(grad * weight, normed, share, value=-1).mul_(scale), grad_weight, None
