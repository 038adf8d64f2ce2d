"""Language models that are nothing but tables: one row of weights for each text so far.

They answer to all that transformers models answer to, and every text so far has a row of its own. With a prompt that
comes once in a batch, the gradient in a token's row tells what weight just this token has in the loss. Padding has row
0, so that a trainer that listens to padding is heard.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minirlhf_course.words import word_tokenizer

ANSWER_WORDS = ("yes", "no", "so")
PROMPT_WORDS = ("why", "how", "who", "when", "may", "can", "is", "it", "we")
PROMPTS = ("why", "how is it", "who", "when may we", "may we", "can it", "is it so", "we can")
"""Eight prompts, of one to three words."""
ROWS = 800
FASTER = 3.0
"""What all texts have in common moves this much faster, so that one token's update moves others' ratios too."""


class Places:
    """The row of every text so far; new texts get the next row, and all models of a problem share them."""

    def __init__(self) -> None:
        self._rows: dict[tuple[int, ...], int] = {}

    def of(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """[B, L] -> [B, L] int64, 0 where mask is False."""
        rows = torch.zeros_like(tokens)
        for n, (row, real) in enumerate(zip(tokens.tolist(), mask.bool().tolist(), strict=True)):
            text: tuple[int, ...] = ()
            for column, token in enumerate(row):
                if real[column]:
                    text = (*text, token)
                    rows[n, column] = self._rows.setdefault(text, len(self._rows) + 1)
        if len(self._rows) >= ROWS:
            raise RuntimeError("more texts than this small problem has: are padding or prompts read as answers?")
        return rows


class _Body(nn.Module):
    def __init__(self, places: Places) -> None:
        super().__init__()
        self._places = places

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **_: Any
    ) -> Any:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = self._places.of(input_ids, mask)
        hidden = nn.functional.one_hot(rows, ROWS + 1).float()
        hidden[..., ROWS] = FASTER
        return SimpleNamespace(last_hidden_state=hidden)


class Table(nn.Module):
    """A causal model or, with one output, a scalar one."""

    def __init__(self, places: Places, vocabulary: int, outputs: Tensor) -> None:
        super().__init__()
        self.base_model = _Body(places)
        self.config = SimpleNamespace(max_position_embeddings=None, score_offset=0.0)
        self.register_buffer("_ids", torch.zeros(vocabulary, 1), persistent=False)
        head = nn.Linear(ROWS + 1, len(outputs), bias=False)
        head.weight.data.copy_(outputs)
        self.head = head

    @property
    def score(self) -> nn.Linear:
        return self.head

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    def get_input_embeddings(self) -> Any:
        return SimpleNamespace(weight=self._ids)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> Any:
        hidden = self.base_model(input_ids, attention_mask).last_hidden_state
        return SimpleNamespace(logits=self.head(hidden)[:, -logits_to_keep:], last_hidden_state=hidden)


class Trio(NamedTuple):
    """The three models of a trainer."""

    policy: Table
    value: Table
    reference: Table
    tokenizer: Any


UNLIKELY = -9.0


def trio(seed: int = 0, *, values: float = 1.0, even: bool = False, padding: float = 0.0) -> Trio:
    """Tables of random numbers.

    Args:
        seed: of the numbers.
        values: their size in the value table.
        even: whether the policy draws "<eos>", "yes" and "no" evenly, and never anything else.
        padding: is added to all that the tables say at padding.
    """
    tokenizer = word_tokenizer((*ANSWER_WORDS, *PROMPT_WORDS))
    size, places = len(tokenizer), Places()
    generator = torch.Generator().manual_seed(seed)
    likely = [1, *range(3, 3 + len(ANSWER_WORDS))]
    tables = []
    for _ in range(2):
        table = torch.full((size, ROWS + 1), UNLIKELY)
        table[likely] = 0.7 * torch.randn(len(likely), ROWS + 1, generator=generator)
        table[1] -= 0.5
        table[:, 0] = torch.randn(size, generator=generator) + padding
        table[:, ROWS] = 0.0
        tables.append(table)
    if even:
        tables[0] = torch.full((size, ROWS + 1), -40.0)
        tables[0][[1, 3, 4]] = 0.0
        tables[0][:, ROWS] = 0.0
    value = values * torch.randn(1, ROWS + 1, generator=generator)
    value[:, ROWS] = 0.0
    value[:, 0] += padding
    policy, reference = (Table(places, size, table) for table in tables)
    return Trio(policy, Table(places, size, value), reference, tokenizer)
