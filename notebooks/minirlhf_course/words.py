"""A tokenizer for texts of a few known words."""

from __future__ import annotations

from typing import Any

from minirlhf.language.tokenization import prepare


def word_tokenizer(words: tuple[str, ...]) -> Any:
    """A tokenizer with one token a word; 0 is <pad>, 1 is <eos>."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: n for n, word in enumerate(("<pad>", "<eos>", "<unk>", *words))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return prepare(
        PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    )
