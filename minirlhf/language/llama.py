"""A Llama on one page: transformers' own weights, rows without padding, with and without a KV cache.

    x <- x + attention(norm(x))
    x <- x + mlp(norm(x))                     for every layer (Touvron et al. 2023)

Answers differ in length, so a padded batch of them is up to half padding, and transformers computes it all. Here the
real tokens are concatenated, [N, D], for every matrix product. Only attention, which mixes the tokens of a row, uses
padded rows, [B, H, T, d]: padded on the right, where causal attention never looks. After the last attention only the
wanted tokens are computed: PPO needs none of the prompt's, a reward model one token in forty.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from transformers.models.llama.modeling_llama import LlamaModel

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, queries [N, H, d], keys, values [N, K, d]) -> [N, H, d]. K is H, or fewer if heads share keys."""


class Packed(NamedTuple):
    """N real tokens of B rows, concatenated."""

    tokens: Tensor
    """[N] int64."""
    rows: Tensor
    """[N] int64, the row of each."""
    positions: Tensor
    """[N] int64, its place in the row, from 0."""


def pack(tokens: Tensor, mask: Tensor) -> Packed:
    """Remove the padding, wherever it is: tokens [B, T] int64, mask [B, T] bool, True at real tokens.

    Example:
        >>> packed = pack(torch.tensor([[0, 5], [6, 7]]), torch.tensor([[False, True], [True, True]]))
        >>> [part.tolist() for part in packed]
        [[5, 6, 7], [0, 1, 1], [0, 0, 1]]
    """
    return Packed(tokens[mask], mask.nonzero()[:, 0], (mask.long().cumsum(1) - 1)[mask])


def forward(
    base: LlamaModel, tokens: Tensor, positions: Tensor, attend: Attend, wanted: Tensor | None = None
) -> Tensor:
    """The last hidden states, after the final norm, of all N tokens or of the W wanted ones: [N, D] or [W, D].

    Args:
        base: the body of a Llama.
        tokens: [N] int64.
        positions: [N] int64, the place of each in its row.
        attend: attention between the tokens of a row: `causal`, or one of a `Cache`.
        wanted: [N] bool, True at W of the tokens.
    """
    x = base.embed_tokens(tokens)  # [N, D]
    cos, sin = (part[0, :, None] for part in base.rotary_emb(x, positions[None]))  # [N, 1, d]
    for i, layer in enumerate(base.layers):
        own, h = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (project(h).unflatten(1, (-1, own.head_dim)) for project in (own.q_proj, own.k_proj, own.v_proj))
        mixed = attend(i, rotate(q, cos, sin), rotate(k, cos, sin), v).flatten(1)  # [N, H d]
        if wanted is not None and i == len(base.layers) - 1:  # no later layer reads the others
            x, mixed = x[wanted], mixed[wanted]
        x = x + own.o_proj(mixed)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return base.norm(x)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i + d/2}) by an angle that grows with the position: [N, H, d] (Su et al. 2021)."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


def causal(packed: Packed, rows: int) -> Attend:
    """Attention of every token to itself and to those before it in its row."""
    place = (packed.rows, packed.positions)
    longest = int(packed.positions.max()) + 1 if len(packed.positions) else 0

    def side_by_side(x: Tensor) -> Tensor:
        return x.new_zeros(rows, longest, *x.shape[1:]).index_put(place, x).transpose(1, 2)  # [B, H, T, d]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = side_by_side(q), side_by_side(k), side_by_side(v)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape != k.shape)
        return mixed.transpose(1, 2)[place]

    return attend


class Cache:
    """Keys and values of every layer, for B rows of at most `room` tokens each."""

    def __init__(self, base: LlamaModel, rows: int, room: int) -> None:
        weight, head = base.embed_tokens.weight, base.layers[0].self_attn.head_dim
        self.kept = weight.new_zeros(len(base.layers), 2, rows, room, base.config.num_key_value_heads, head)
        self.lengths = torch.zeros(rows, dtype=torch.long)

    def prompts(self, packed: Packed) -> Attend:
        """Attention of the prompts to themselves; their keys and values are kept."""
        attend = causal(packed, len(self.lengths))
        self.lengths = torch.bincount(packed.rows, minlength=len(self.lengths))

        def keep(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for kept, new in zip(self.kept[layer], (k, v), strict=True):
                kept[packed.rows, packed.positions] = new
            return attend(layer, q, k, v)

        return keep

    def step(self) -> Attend:
        """Attention of one more token in each row to all cached tokens of the row."""
        rows, last = torch.arange(len(self.lengths)), self.lengths
        self.lengths = last + 1
        longest = int(self.lengths.max())
        seen = (torch.arange(longest) <= last[:, None])[:, None, None]  # [B, 1, 1, T]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for kept, new in zip(self.kept[layer], (k, v), strict=True):
                kept[rows, last] = new
            keys, values = self.kept[layer, :, :, :longest].transpose(2, 3)  # [B, K, T, d]
            shared = q.shape != k.shape
            mixed = scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=seen, enable_gqa=shared)
            return mixed[:, :, 0]

        return attend

    def select(self, rows: Tensor) -> None:
        """Keep only these rows."""
        self.kept, self.lengths = self.kept[:, :, rows], self.lengths[rows]
