"""Special tokens are written by the template and by EOS alone, whatever the texts say."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

from minirlhf.errors import CheckpointError, UserError
from minirlhf.language.tokenization import (
    decode,
    encode_prompts,
    encode_responses,
    encode_texts,
    load_tokenizer,
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


@pytest.fixture
def llama_like(tokenizer):
    """A tokenizer whose post-processor begins every text with BOS, and ends it with EOS, which is no prompt's."""
    found = copy.deepcopy(tokenizer)
    found.add_special_tokens({"bos_token": "<s>"})
    parts = [("<s>", found.bos_token_id), ("<eos>", found.eos_token_id)]
    found.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A <eos>", special_tokens=parts)
    return found


def test_bos_stands_where_the_tokenizer_s_own_post_processor_puts_it(tokenizer, llama_like) -> None:
    texts = ["The otter naps.", "<s> <eos>", "Hi"]
    bos, eos = llama_like.bos_token_id, llama_like.eos_token_id
    without = [encode(llama_like, texts) for encode in (encode_prompts, encode_texts)]
    llama_like_no_bos = copy.deepcopy(llama_like)
    llama_like_no_bos.backend_tokenizer.post_processor = tokenizer.backend_tokenizer.post_processor
    for rows, encode in zip(without, (encode_prompts, encode_texts), strict=True):
        assert rows == [[bos, *row] for row in encode(llama_like_no_bos, texts)]
        assert all(row.count(bos) == 1 for row in rows)
    prompts, documents = without
    assert not any(eos in row for row in prompts) and all(row[-1] == eos for row in documents)
    assert all(bos not in row for row in encode_responses(llama_like, texts))
    assert encode_prompts(llama_like, []) == encode_texts(llama_like, []) == []


def test_bos_that_the_template_writes_is_not_written_twice(llama_like) -> None:
    bare = encode_prompts(llama_like, ["The otter naps.", "odd <s> one"])
    llama_like.chat_template = "{{ bos_token }}" + llama_like.chat_template
    assert encode_prompts(llama_like, ["The otter naps.", "odd <s> one"]) == bare
    assert all(row.count(llama_like.bos_token_id) == 1 for row in bare)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_model_s_folder_without_a_tokenizer(architecture: str, make_causal, tmp_path) -> None:
    make_causal(architecture).save_pretrained(tmp_path)  # transformers makes an empty tokenizer for GPT-2's
    with pytest.raises(CheckpointError, match=f"{tmp_path}: the tokenizer can't be loaded"):
        load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere: the tokenizer can't be loaded"):
        load_tokenizer(tmp_path / "nowhere")


def test_a_tokenizer_without_eos(tokenizer) -> None:
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        prepare(endless)


def test_no_texts(tokenizer) -> None:
    assert encode_prompts(tokenizer, []) == encode_responses(tokenizer, []) == []
    assert prepare(tokenizer) is tokenizer
