"""transformers' Llama without padding: the same weights and the same numbers, in less time on a CPU.

Answers end when they end, so a batch of them is up to half padding, and transformers computes it all. Here the rows
lie end to end, [N] real tokens, through every matrix product; only attention, where tokens of a row meet, stands them
beside each other again, rows of like length together (Krell et al. 2021, "Efficient sequence packing without
cross-contamination"). After the last attention only the `wanted` tokens go on: a reward model reads one token of forty,
PPO none of the prompt's. What a layer is made of, with backwards written out, is `layers.py`.

A plain, small Llama in float32 or float64 on a CPU takes this path (`can_pack`); any other model, and any Llama with
adapters or hooks, goes through transformers' own forward. Tests hold both to the same outputs and gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minirlhf.language.layers import LayerWeights, attend, attention_groups, floor, pick, swiglu, unit

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.models.llama.modeling_llama import LlamaModel, LlamaRMSNorm

WIDEST = 512  # hidden size: beyond it a few tokens' activations are smaller than the matrices that take in the norms


class Packed(NamedTuple):
    """Rows end to end, the longest first."""

    tokens: Tensor
    """[N] int64."""
    lengths: list[int]
    """Tokens of each row, falling; rows without any are left out."""
    slots: Tensor
    """[B, T] int64: where in the N each token of the padded batch lies (at padding, no matter)."""


def pack(tokens: Tensor, mask: Tensor) -> Packed:
    """Leave out the padding, wherever it stands: tokens and mask, both [B, T], True at real tokens.

    Example:
        >>> packed = pack(torch.tensor([[0, 5], [6, 7]]), torch.tensor([[False, True], [True, True]]))
        >>> packed.tokens.tolist(), packed.lengths, packed.slots[0, 1].item()
        ([6, 7, 5], [2, 1], 2)
    """
    mask = mask.bool()
    lengths, order = mask.sum(dim=1).sort(descending=True, stable=True)
    sorted_mask = mask[order]
    slots = torch.empty(mask.shape, dtype=torch.long, device=mask.device)
    slots[order] = (sorted_mask.flatten().long().cumsum(0) - 1).view(mask.shape)
    return Packed(tokens[order][sorted_mask], [n for n in lengths.tolist() if n], slots)


def can_pack(model: PreTrainedModel) -> bool:
    """Whether a causal or scalar model is a Llama of exactly the kind that this file computes."""
    from transformers.activations import SiLUActivation
    from transformers.models.llama import modeling_llama as llama

    base, config = model.base_model, model.config
    if type(model) not in (llama.LlamaForCausalLM, llama.LlamaForSequenceClassification) or _is_hooked(model):
        return False  # a forward of its own, or a hook, has something to say
    if type(base) is not llama.LlamaModel or torch.is_autocast_enabled("cpu"):
        return False
    weight = base.embed_tokens.weight
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64):
        return False
    if config.num_key_value_heads != config.num_attention_heads or base.rotary_emb.rope_type != "default":
        return False
    if not getattr(config, "is_causal", True) or config._attn_implementation not in ("sdpa", "eager"):
        return False
    if len(base.layers) != config.num_hidden_layers or config.hidden_size > WIDEST:
        return False
    known = {llama.LlamaModel, llama.LlamaDecoderLayer, llama.LlamaAttention, llama.LlamaMLP, llama.LlamaRMSNorm}
    known |= {llama.LlamaRotaryEmbedding, nn.ModuleList, nn.Embedding, nn.Linear, nn.SiLU, SiLUActivation}
    for module in base.modules():  # an adapter or a quantised matrix is another type; a hook waits for its call
        if type(module) not in known or module.training or (module is not base.embed_tokens and _is_hooked(module)):
            return False
        if isinstance(module, llama.LlamaAttention):
            biases = [linear.bias is None for linear in (module.q_proj, module.k_proj, module.v_proj)]
            if len(set(biases)) > 1:
                return False
        if isinstance(module, llama.LlamaMLP) and (module.gate_proj.bias is None) != (module.up_proj.bias is None):
            return False
    return all(parameter.dtype == weight.dtype for parameter in base.parameters())


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)  # somebody's own
    )


def hidden_states(
    base: LlamaModel, packed: Packed, wanted: Tensor | None = None, kept: list[Tensor] | None = None
) -> Tensor:
    """The last hidden state, after the final norm, of every token [N, D], or of the wanted ones [W, D].

    Args:
        base: a LlamaModel that `can_pack` accepts.
        packed: the rows.
        wanted: [W] int64 places among the N, all different.
        kept: gets each layer's queries, keys and values, [N, 3, H, d], before the rotary embedding.
    """
    heads = base.config.num_attention_heads
    x = base.embed_tokens(packed.tokens)  # [N, D]
    if not packed.lengths:
        return rms_norm(x, base.norm)
    turns, groups = rotations(base, max(packed.lengths)), attention_groups(packed.lengths, heads)
    for i, layer in enumerate(base.layers):
        weights = LayerWeights.of(layer, heads)
        qkv = F.linear(unit(x, weights.floors[0]), weights.qkv, weights.qkv_bias)
        if kept is not None:
            kept.append(qkv.view(len(qkv), 3, heads, -1))
        mixed = attend(qkv, groups, turns)
        if wanted is not None and i == len(base.layers) - 1:  # no later layer reads the others
            x, mixed = pick(x, wanted), pick(mixed, wanted)
        x = plus(x, mixed, weights.out)
        gate_up = F.linear(unit(x, weights.floors[1]), weights.gate_up, weights.gate_up_bias)
        x = plus(x, swiglu(gate_up), weights.down)
    return rms_norm(x, base.norm)


def rotations(base: LlamaModel, length: int) -> Tensor:
    """exp(i position frequency) of the first `length` positions: [length, d/2] complex."""
    dtype = base.embed_tokens.weight.dtype
    angles = torch.arange(length)[:, None] * base.rotary_emb.inv_freq.to(dtype)
    return torch.polar(torch.ones_like(angles), angles)


def plus(x: Tensor, change: Tensor, linear: nn.Linear) -> Tensor:
    """x + linear(change), the sum made by the matrix product."""
    x = torch.addmm(x, change, linear.weight.T)
    return x if linear.bias is None else x + linear.bias


def rms_norm(x: Tensor, norm: LlamaRMSNorm) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension: [N, D] -> [N, D] (Zhang and Sennrich 2019)."""
    return unit(x, floor(norm)) * (norm.weight * len(norm.weight) ** 0.5)
