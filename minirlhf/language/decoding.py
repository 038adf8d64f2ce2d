"""One token at a time, with a KV cache: what `sample` asks for logits.

`CachedDecoder` is any causal model of transformers. `PackedDecoder` is the Llama of `packed.py`: the prompts enter
without padding, the cache has room for the whole answer from the start (no layer copies it to append a column), and
each norm's weight is multiplied into the matrix that follows, once for the whole answer.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minirlhf.language.packed import can_pack, hidden_states, pack, paired, rms_norm, rotate, rotations

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm


class Decoder(Protocol):
    """Logits of the next token, [b, V] float32, for b running rows."""

    def prompt(self) -> Tensor:
        """After the prompts."""

    def step(self, token: Tensor) -> Tensor:
        """After one more token a row, [b]."""

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only, [new b]."""


def decoder_for(model: PreTrainedModel, tokens: Tensor, mask: Tensor, max_new_tokens: int) -> Decoder:
    """The quickest decoder for a causal model and its prompts: tokens [B, P] int64, mask [B, P] bool, left-padded."""
    kind = PackedDecoder if can_pack(model) else CachedDecoder
    return kind(model, tokens, mask, max_new_tokens)


class CachedDecoder:
    """A causal model of transformers with its own cache."""

    def __init__(self, model: PreTrainedModel, tokens: Tensor, mask: Tensor, max_new_tokens: int) -> None:
        from transformers import DynamicCache

        self._model, self._tokens = model, tokens
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._cache = DynamicCache(config=model.config)
        room = torch.ones(len(mask), max_new_tokens, dtype=torch.long, device=mask.device)
        self._attention, self._width = torch.cat([mask.long(), room], dim=1), mask.shape[1]
        self._positions = (mask.long().cumsum(1) - 1).clamp(min=0)

    def prompt(self) -> Tensor:
        return self._forward(self._tokens)

    def step(self, token: Tensor) -> Tensor:
        self._width += 1
        self._positions = self._positions[:, -1:] + 1
        return self._forward(token[:, None])

    def _forward(self, tokens: Tensor) -> Tensor:
        out = self._model(
            tokens,
            attention_mask=self._attention[:, : self._width],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            **({"position_ids": self._positions} if self._takes_positions else {}),
        )
        return out.logits[:, -1].float()

    def keep(self, rows: Tensor) -> None:
        self._cache.batch_select_indices(rows)
        self._attention, self._positions = self._attention[rows], self._positions[rows]


class _Layer(NamedTuple):
    qkv: Tensor
    """[3 D, D]"""
    qkv_bias: Tensor | None
    out: nn.Linear
    gate_up: Tensor
    """[2 I, D]"""
    gate_up_bias: Tensor | None
    down: nn.Linear
    floors: tuple[Tensor, Tensor]


class PackedDecoder:
    """A Llama that `can_pack` accepts."""

    def __init__(self, model: PreTrainedModel, tokens: Tensor, mask: Tensor, max_new_tokens: int) -> None:
        self._model, self._base = model, model.base_model
        self._tokens, self._mask = tokens, mask
        self._heads, self._width = model.config.num_attention_heads, mask.shape[1]
        self._layers = [_fused(layer, self._heads) for layer in self._base.layers]
        self._positions = mask.sum(dim=1)  # of the next token of each row
        self._rotations = rotations(self._base, int(self._positions.max()) + max_new_tokens).unsqueeze(1)
        room = (len(self._layers), 2, len(mask), self._heads, self._width + max_new_tokens, self._head_size())
        self._cache = torch.zeros(room, dtype=self._base.embed_tokens.weight.dtype)  # keys and values of each layer
        hidden = torch.zeros(mask.shape, dtype=self._cache.dtype).masked_fill_(~mask, -torch.inf)
        self._bias = F.pad(hidden, (0, max_new_tokens))[:, None, None]  # added to attention scores

    def _head_size(self) -> int:
        return self._base.layers[0].self_attn.q_proj.out_features // self._heads

    def prompt(self) -> Tensor:
        packed = pack(self._tokens, self._mask)
        kept: list[tuple[Tensor, Tensor]] = []
        last = packed.slots[:, -1]  # prompts are left-padded
        hidden = hidden_states(self._base, packed, wanted=last, kept=kept)
        rows, columns = self._mask.nonzero(as_tuple=True)
        places = packed.slots[self._mask]
        for cache, both in zip(self._cache, kept, strict=True):
            for part, x in zip(cache, both, strict=True):
                part[rows, :, columns] = x[places]
        return self._model.lm_head(hidden).float()

    def step(self, token: Tensor) -> Tensor:
        rows, heads, column = len(token), self._heads, self._width
        self._width += 1
        rotation = self._rotations[self._positions]
        self._positions = self._positions + 1
        x = self._base.embed_tokens(token)
        for layer, (keys, values) in zip(self._layers, self._cache, strict=True):
            qkv = F.linear(_unit(x, layer.floors[0]), layer.qkv, layer.qkv_bias)
            qk, v = qkv.split([2 * len(layer.qkv) // 3, len(layer.qkv) // 3], dim=-1)
            q, k = rotate(qk.contiguous(), rotation).chunk(2, dim=1)  # [b, H, d] both
            keys[:, :, column], values[:, :, column] = k, v.view(rows, heads, -1)
            mixed = F.scaled_dot_product_attention(
                q.unsqueeze(2),
                keys[:, :, : self._width],
                values[:, :, : self._width],
                attn_mask=self._bias[..., : self._width],
            )
            x = x + layer.out(mixed.reshape(rows, -1))
            gate, up = F.linear(_unit(x, layer.floors[1]), layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
            x = x + layer.down(F.silu(gate).mul_(up))
        return self._model.lm_head(rms_norm(x, self._base.norm)).float()

    def keep(self, rows: Tensor) -> None:
        self._cache = self._cache.index_select(2, rows)
        self._bias, self._positions = self._bias[rows], self._positions[rows]


def _fused(layer: LlamaDecoderLayer, heads: int) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    first, second = layer.input_layernorm, layer.post_attention_layernorm
    query, key = paired(attention.q_proj, heads), paired(attention.k_proj, heads)
    gate, up = (mlp.gate_proj.weight, mlp.gate_proj.bias), (mlp.up_proj.weight, mlp.up_proj.bias)
    qkv, qkv_bias = _stacked(query, key, (attention.v_proj.weight, attention.v_proj.bias))
    gate_up, gate_up_bias = _stacked(gate, up)
    return _Layer(
        qkv * first.weight * len(first.weight) ** 0.5,
        qkv_bias,
        attention.o_proj,
        gate_up * second.weight * len(second.weight) ** 0.5,
        gate_up_bias,
        mlp.down_proj,
        (_floor(first), _floor(second)),
    )


def _floor(norm: LlamaRMSNorm) -> Tensor:
    return torch.full((), (len(norm.weight) * norm.variance_epsilon) ** 0.5, dtype=norm.weight.dtype)


def _unit(x: Tensor, floor: Tensor) -> Tensor:
    """RMSNorm but for sqrt(D) and its weight: x / sqrt(|x|^2 + D eps), in three calls where rms_norm takes six."""
    return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor)


def _stacked(*linears: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    biases = [bias for _, bias in linears if bias is not None]
    return torch.cat([weight for weight, _ in linears]), torch.cat(biases) if biases else None
