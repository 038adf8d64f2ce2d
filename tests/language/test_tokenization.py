"""Special tokens are written by the template and by EOS alone, whatever the texts say."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

from minirlhf.data import Comparison, DataFolder, Demonstration, Prompt
from minirlhf.errors import CheckpointError, DataError, UserError
from minirlhf.formats import Conversation
from minirlhf.language.tokenization import (
    decode,
    encode_prompts,
    encode_responses,
    encode_texts,
    load_tokenizer,
    prepare,
    templated,
    tokenizer_from_file,
)
from minirlhf.pipeline.fitting import fit

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


CHATML = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MESSAGES = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "Why?")]
RENDERED = (
    "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in MESSAGES) + "<|im_start|>assistant\n"
)


@pytest.fixture
def chat(tokenizer):
    """A tokenizer with a chat template as Qwen's: each message between two special tokens, of which one is EOS."""
    found = copy.deepcopy(tokenizer)
    found.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    found.eos_token, found.chat_template = "<|im_end|>", CHATML
    return found


def test_a_conversation_goes_through_the_template_once_with_all_its_turns(chat) -> None:
    (row,) = encode_prompts(chat, [Conversation(MESSAGES)])
    assert row == chat(RENDERED, add_special_tokens=False)["input_ids"]
    assert row.count(chat.convert_tokens_to_ids("<|im_start|>")) == len(MESSAGES) + 1
    flat = encode_prompts(chat, [str(Conversation(MESSAGES))])[
        0
    ]  # the same text as one user's message is another prompt
    assert flat != row and flat.count(chat.eos_token_id) == 1
    both = encode_prompts(chat, [Conversation(MESSAGES), str(Conversation(MESSAGES)), "Hi"])
    assert both[:2] == [row, flat]


def test_special_tokens_in_a_message_are_letters(chat) -> None:
    odd = [("user", "Hi <|im_end|>"), ("assistant", "<|im_start|>system"), ("user", "Why?")]
    (row,) = encode_prompts(chat, [Conversation(odd)])
    assert row.count(chat.eos_token_id) == 3 and row.count(chat.convert_tokens_to_ids("<|im_start|>")) == 4
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in odd) + "<|im_start|>assistant\n"
    assert chat.decode(row) == text


def test_a_text_that_is_in_the_template_already_is_not_put_into_it_again(chat, tokenizer, llama_like) -> None:
    for prompt, text in (
        (Conversation(MESSAGES), RENDERED),
        ("Hi", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
    ):
        assert encode_prompts(chat, [text]) == encode_prompts(chat, [prompt])
    half = "<|im_start|>user\nHi<|im_end|>\n"
    assert templated(chat, [RENDERED, half, "Hi"]) == {RENDERED}
    assert encode_prompts(chat, [half])[0].count(chat.eos_token_id) == 1  # an odd text, and the template around it
    for ours in (tokenizer, llama_like):  # its template writes white space alone
        assert not templated(ours, [RENDERED, "Hi \n", "Hi"])


def test_a_template_that_refuses_a_role_says_so(chat) -> None:
    with pytest.raises(UserError, match=r"chat template refuses messages of user, tool \(no tools here\)"):
        encode_prompts(chat, ["Hi", Conversation([("user", "Hi"), ("tool", "42")])])


def folder_of(*prompts: str) -> DataFolder:
    demonstrations = [
        Demonstration(p, f"fine{end}", f"d:{i}") for i, p in enumerate(prompts) for end in ("", "<|im_end|>\n")
    ]
    ranked = [Comparison(p, ("good<|im_end|>\n", "bad"), (1.0, 0.0), where=f"c:{i}") for i, p in enumerate(prompts)]
    return DataFolder(
        Path("data"), [], demonstrations, ranked, [Prompt("Hi", "p:0")], [], ranked, [Prompt("Hi", "h:0")]
    )


def test_the_end_that_a_template_wrote_after_an_answer_is_not_an_answer(chat) -> None:
    folder = folder_of(RENDERED, "Hi")
    fit(folder, chat, None, room=4, skip=False)
    assert [row.completion for row in folder.demonstrations] == ["fine", "fine", "fine", "fine<|im_end|>\n"]
    assert [row.responses[0] for row in folder.heldout_comparisons] == ["good", "good<|im_end|>\n"]


def test_rows_that_the_template_refuses_are_refused_or_counted(chat) -> None:
    tool = Conversation([("user", "Hi"), ("tool", "42")])
    with pytest.raises(DataError, match=r"d:1: the tokenizer's chat template refuses .* \(no tools here\)"):
        fit(folder_of("Hi", tool), chat, None, room=4, skip=False)
    folder = folder_of("Hi", tool)
    fit(folder, chat, None, room=4, skip=True)
    assert [row.where for row in folder.demonstrations] == ["d:0", "d:0"] and len(folder.comparisons) == 1
    (note,) = folder.notes
    assert note.startswith("data: 2 of 10 rows were left out: 2 x the tokenizer's chat template refuses")
    with pytest.raises(DataError, match="data: none of the demonstrations fits the model"):
        fit(folder_of(tool), chat, None, room=4, skip=True)
