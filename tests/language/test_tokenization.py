"""Special tokens are written by the template and by EOS alone, whatever the texts say."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from minirlhf.language.tokenization import (
    decode,
    encode_prompts,
    encode_responses,
    encode_texts,
    prepare,
    tokenizer_from_file,
)

WORLD = Path(__file__).parents[2] / "data" / "small_world" / "tokenizer.json"
CHAT = "<eos>{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}"


@pytest.mark.parametrize("special", ["<eos>", "<pad>"])
@pytest.mark.parametrize("encode", [encode_responses, encode_texts])
def test_special_tokens_in_an_answer_are_letters(tokenizer, special: str, encode) -> None:
    text = f"The otter {special} naps."
    (row,) = encode(tokenizer, [text])
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert row[-1] == tokenizer.eos_token_id and not ends & set(row[:-1])
    assert decode(tokenizer, [row]) == [text]  # nothing is lost


@pytest.mark.parametrize("special", ["<eos>", "<pad>"])
def test_special_tokens_in_a_prompt_are_letters(tokenizer, special: str) -> None:
    plain, odd = "The otter naps.", f"The otter {special} naps."
    rows = encode_prompts(tokenizer, [odd, plain, odd])
    assert rows[0] == rows[2] and not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(rows[0])
    assert decode(tokenizer, rows) == [f"{text} \n" for text in (odd, plain, odd)]


def test_those_of_the_template_stay(tokenizer) -> None:
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = CHAT
    eos = chat.eos_token_id
    plain, odd = encode_prompts(chat, ["otter", "otter <eos>"])
    assert plain == [eos, *encode_responses(chat, ["otter"])[0][:-1], eos]
    assert odd == [eos, *encode_responses(chat, ["otter <eos>"])[0][:-1], eos] and odd.count(eos) == 2


def test_a_tokenizer_of_whole_words_does_not_know_them() -> None:
    words = tokenizer_from_file(WORLD)
    unk, eos = words.unk_token_id, words.eos_token_id
    (row,) = encode_responses(words, ["a <eos> fox <pad>"])
    a, fox = words.convert_tokens_to_ids(["a", "fox"])
    assert row == [a, unk, fox, unk, eos]
    (row,) = encode_prompts(words, ["a <eos> fox"])
    assert row[:3] == [a, unk, fox] and eos not in row
    assert encode_prompts(words, ["a fox"])[0] == [a, fox, *row[3:]]


def test_no_texts(tokenizer) -> None:
    assert encode_prompts(tokenizer, []) == encode_responses(tokenizer, []) == []
    assert prepare(tokenizer) is tokenizer
