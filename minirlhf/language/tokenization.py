"""From text to token ids and back: one prompt template, and a pad token that is never EOS.

transformers is imported when first used, so that ``import minirlhf.language.sft`` stays quick.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from minirlhf.errors import CheckpointError, UserError, said_shortly
from minirlhf.formats import Conversation, Message, messages_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
PLACE = "THE-PROMPT-STANDS-HERE"  # in a template, to find what is written around a prompt
CHUNK = 4096  # texts that are encoded at a time
NUMBERED = re.compile(rf"{PLACE}-(\d+)-")  # and around each of several messages
# The prompt ends in a line break, followed by the answer. This is stored as the tokenizer's chat template, so that a
# pretrained chat model uses its own and every saved checkpoint records how its prompts were written.
TEMPLATE = "{% for message in messages %}{{ message['content'] + ' \n' }}{% endfor %}"


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint (a folder or a hub name) and prepare it for training.

    Raises:
        CheckpointError: there is no tokenizer, or it is damaged.
        UserError: the tokenizer has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if not tokenizer(PLACE, add_special_tokens=False)["input_ids"]:  # transformers may create an empty one
            raise ValueError("it encodes text to no tokens")
    except MemoryError:
        raise
    except Exception as error:  # of a damaged file: KeyError, TypeError, and plain Exception from tokenizers
        raise CheckpointError(
            f"{_damaged(Path(path))}: the tokenizer can't be loaded ({said_shortly(error)}); "
            "give a folder made by save_pretrained, tokenizer included, or a hub name"
        ) from None
    return prepare(tokenizer)


def _damaged(folder: Path) -> str:
    """The file of a tokenizer's folder that can't be read, as far as that can be told; else the folder."""
    from tokenizers import Tokenizer

    for name in ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"):
        if (folder / name).is_file():
            try:
                if isinstance(json.loads((folder / name).read_text(encoding="utf-8")), dict):
                    continue
            except (ValueError, OSError, RecursionError):
                pass
            return str(folder / name)
    file, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    try:
        if file.is_file():
            Tokenizer.from_file(str(file))
            return f"{file} or {config.name}"  # how transformers reads the one depends on the other
    except Exception:
        return str(file)
    return str(folder)


def tokenizer_from_file(file: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer from a ``tokenizer.json`` that has the special tokens <pad>, <eos> and <unk>."""
    from transformers import PreTrainedTokenizerFast

    return prepare(PreTrainedTokenizerFast(tokenizer_file=str(file), pad_token=PAD, eos_token=EOS, unk_token=UNK))


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer (it can encode any text, so <unk> never occurs)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return prepare(PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS))


def prepare(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give a tokenizer a pad token of its own, a chat template, and left padding; it must already have an EOS."""
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token; set tokenizer.eos_token before training")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        # GPT-2 has no pad token, and many recipes reuse EOS: then a model never learns when to stop.
        tokenizer.add_special_tokens({"pad_token": PAD})
    if tokenizer.chat_template is None:
        tokenizer.chat_template = TEMPLATE
    tokenizer.padding_side = "left"
    return tokenizer


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt, in the tokenizer's template, up to where the answer begins.

    A text is a user's message, a `Conversation` the messages that it holds. BOS comes first if the tokenizer starts
    every text with it. The template writes its own special tokens; none is added twice, and a special token inside a
    message is plain text. A text that is in the template already (see `templated`) is taken as it is.

    Raises:
        UserError: the template refuses a conversation, as Gemma's does a system message.
    """
    chats = [messages_of(prompt) for prompt in prompts]
    unique = list(dict.fromkeys(chats))
    specials = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    specials |= set(tokenizer.all_special_tokens)
    odd = {chat for chat in unique if any(special in content for _, content in chat for special in specials)}
    done = {messages_of(prompt) for prompt in templated(tokenizer, prompts)}
    texts = [chat[0][1] if chat in done else _in_template(tokenizer, chat) for chat in unique]
    rows = _ids(tokenizer, texts)
    ids = dict(zip(unique, rows, strict=True))
    for chat in odd - done:
        marked = [(role, f"{PLACE}-{i}-") for i, (role, _) in enumerate(chat)]
        parts = NUMBERED.split(_in_template(tokenizer, marked))  # template, number, template, number ... template
        written = _ids(tokenizer, parts[::2])
        plain = _encode_plain(tokenizer, [chat[int(number)][1] for number in parts[1::2]])
        ids[chat] = sum(([*said, *part] for said, part in zip(plain, written[1:], strict=True)), list(written[0]))
    bos = _bos(tokenizer)
    return [list(row) if row[: len(bos)] == bos else [*bos, *row] for row in map(ids.__getitem__, chats)]


def drops_prompt(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's chat template writes the same for any prompt. No token is needed to tell."""
    first, second = (_in_template(tokenizer, [("user", f"{PLACE}-{number}")]) for number in (1, 2))
    return first == second


def templated(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[str]) -> set[str]:
    """Those of the prompts that are texts in the chat template already, as some data sets hold them.

    They begin with the template's first special token (or all that it opens with) and end with its generation prompt.
    Where a template writes only white space around a prompt, as ours does, no text is taken for one in it.
    """
    before, _, after = (part.strip() for part in _in_template(tokenizer, [("user", PLACE)]).partition(PLACE))
    if not before or not after:
        return set()
    specials = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    first = next((special for special in specials if before.startswith(special)), before)
    texts = {prompt for prompt in prompts if not isinstance(prompt, Conversation)}
    return {text for text in texts if text.strip().startswith(first) and text.strip().endswith(after)}


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer's own post-processor writes before a text: BOS for Llama and Gemma, nothing for GPT-2."""
    written = tokenizer(PLACE, return_special_tokens_mask=True)
    return written["input_ids"][: written["special_tokens_mask"].index(0)]


def _in_template(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    from jinja2 import TemplateError

    chat = [{"role": role, "content": content} for role, content in messages]
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except MemoryError:
        raise
    except Exception as error:  # a template is a program, and may be damaged: TypeError, ValueError, anything
        does = "refuses" if isinstance(error, TemplateError) else "fails on"
        roles = ", ".join(role for role, _ in messages)
        raise UserError(f"the tokenizer's chat template {does} messages of {roles} ({said_shortly(error)})") from None


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], plain: bool = False) -> list[list[int]]:
    """Token ids of each text, with nothing added; if ``plain``, special tokens inside it are plain text."""
    if not texts:
        return []
    plain = plain or tokenizer.split_special_tokens
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # written in Python
        return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=plain)["input_ids"]
    # As transformers calls it, but for the ids alone: masks and places in the text take as long as they do.
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = plain
    return [found.ids for found in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def _encode_plain(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts in which "<eos>" is plain text, not a token: only this module ends an answer."""
    rows = _ids(tokenizer, texts, plain=True)
    ends = {tokenizer.pad_token_id, tokenizer.eos_token_id}
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in ends:
        return rows
    # A word-level tokenizer can't spell "<eos>": to it, that is an unknown word.
    return [[unknown if token in ends else token for token in row] for row in rows]


def encode_responses(tokenizer: PreTrainedTokenizerBase, responses: Sequence[str]) -> list[list[int]]:
    """Token ids of each response, followed by EOS; a special token inside the text is plain text."""
    eos = tokenizer.eos_token_id  # looking it up takes longer than adding it
    return [[*row, eos] for row in _encode_plain(tokenizer, responses)]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each document of a corpus, followed by EOS, and after BOS if the tokenizer writes one."""
    bos = _bos(tokenizer)
    return [[*bos, *row] for row in encode_responses(tokenizer, texts)]


def in_chunks(
    encode: Callable[[PreTrainedTokenizerBase, list[str]], list[list[int]]],
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
) -> Iterator[array[int]]:
    """What a function such as `encode_prompts` makes of any number of texts, in four bytes per token.

    It is given a few thousand texts at a time: of all at once, its result would take up to 36 bytes per token.
    """
    texts = iter(texts)
    while some := list(islice(texts, CHUNK)):
        yield from (array("i", row) for row in encode(tokenizer, some))


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[Sequence[int]]) -> list[str]:
    """Texts of token rows, without special tokens."""
    return tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
