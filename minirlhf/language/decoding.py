"""One token at a time, with a KV cache: what `sample` asks for logits.

`CachedDecoder` is any causal model of transformers. `PackedDecoder` is the Llama of `packed.py`: the prompts enter
without padding, the cache has room for the whole answer from the start (no layer copies it to append a column), and
each norm's weight is multiplied into the matrix that follows, once for the whole answer.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.language.layers import LayerWeights, rotate, swiglu, unit
from minirlhf.language.models import positions
from minirlhf.language.packed import can_pack, hidden_states, pack, plus, rms_norm, rotations

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


class PackedDecoder:
    """A Llama that `can_pack` accepts."""

    def __init__(self, model: PreTrainedModel, tokens: Tensor, mask: Tensor, max_new_tokens: int) -> None:
        self._model, self._base = model, model.base_model
        self._tokens, self._mask = tokens, mask
        self._heads, self._width = model.config.num_attention_heads, mask.shape[1]
        self._layers = [LayerWeights.of(layer, self._heads) for layer in self._base.layers]
        self._positions = mask.sum(dim=1)  # of the next token of each row
        self._rotations = rotations(self._base, int(self._positions.max()) + max_new_tokens)
        room = (len(self._layers), 2, len(mask), self._heads, self._width + max_new_tokens, self._head_size())
        self._cache = torch.zeros(room, dtype=self._base.embed_tokens.weight.dtype)  # keys and values of each layer
        hidden = torch.zeros(mask.shape, dtype=self._cache.dtype).masked_fill_(~mask, -torch.inf)
        self._bias = F.pad(hidden, (0, max_new_tokens))[:, None].repeat(1, self._heads, 1)  # added to attention scores

    def _head_size(self) -> int:
        return self._base.layers[0].self_attn.q_proj.out_features // self._heads

    def prompt(self) -> Tensor:
        packed = pack(self._tokens, self._mask)
        kept: list[Tensor] = []
        last = packed.slots[:, -1]  # prompts are left-padded
        hidden = hidden_states(self._base, packed, wanted=last, kept=kept)
        turn = self._rotations[positions(self._mask)].unsqueeze(2)  # [b, P, 1, d/2]
        for (keys, values), qkv in zip(self._cache, kept, strict=True):
            # 0 at padding: the bias takes its weight away, but 0 times another row's NaN would be NaN.
            standing = qkv[packed.slots].masked_fill(~self._mask[..., None, None, None], 0.0)
            _, k, v = standing.unbind(2)  # [b, P, H, d]
            keys[:, :, : self._width] = rotate(k, turn).transpose(1, 2)
            values[:, :, : self._width] = v.transpose(1, 2)
        return self._model.lm_head(hidden).float()

    def step(self, token: Tensor) -> Tensor:
        rows, column = len(token), self._width
        self._width += 1
        turn = self._rotations[self._positions][:, None, None]  # [b, 1, 1, d/2]
        self._positions = self._positions + 1
        bias = self._bias.flatten(0, 1)[:, None, : self._width]
        x = self._base.embed_tokens(token)
        for layer, (keys, values) in zip(self._layers, self._cache, strict=True):
            qkv = F.linear(unit(x, layer.floors[0]), layer.qkv, layer.qkv_bias).view(rows, 3, self._heads, -1)
            q, keys[:, :, column] = rotate(qkv[:, :2], turn).unbind(1)  # [b, H, d]
            values[:, :, column] = qkv[:, 2]
            k, v = keys.flatten(0, 1)[:, : self._width], values.flatten(0, 1)[:, : self._width]  # [b H, t, d]
            weights = torch.baddbmm(bias, q.reshape(len(k), 1, -1), k.mT).softmax(dim=-1)
            mixed = torch.bmm(weights, v)  # one query a row: too few for flash attention
            x = plus(x, mixed.view(rows, -1), layer.out)
            gate_up = F.linear(unit(x, layer.floors[1]), layer.gate_up, layer.gate_up_bias)
            x = plus(x, swiglu(gate_up), layer.down)
        return self._model.lm_head(rms_norm(x, self._base.norm)).float()

    def keep(self, rows: Tensor) -> None:
        self._cache = self._cache.index_select(2, rows)
        self._bias, self._positions = self._bias[rows], self._positions[rows]
