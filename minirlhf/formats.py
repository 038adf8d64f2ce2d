"""Rows as the field writes them, each turned into one of four kinds: one short function per table.

Texts are strings, or lists of messages ``{"role", "content"}``. docs/data_formats.md lists the columns.

    text             {"text"}
    demonstration    {"prompt", "completion"}; {"messages"} that end with an answer; the best answer of a comparison
    comparison       {"prompt", "responses": [K], "scores": [K]}, or "ranking": [K] (1 = best)
                     {"prompt", "chosen", "rejected"}; {"chosen", "rejected"} that begin with the same prompt:
                     messages (trl, UltraFeedback, also with "score_chosen" and "score_rejected") or dialogues (HH)
    prompt           {"prompt"}; {"messages"}, without the answer at the end; the prompt of a comparison

A prompt is a string. One of several messages is a `Conversation`: the tokenizer's chat template is given its messages.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from minirlhf.errors import DataError

Message = tuple[str, str]
"""A role (system, user, assistant ...) and a content."""

LARGEST_SCORE = 1e30  # fits float32 with room to spare; NaN and infinity fail the comparison too
NAMES = {"user": "Human", "assistant": "Assistant", "system": "System"}  # as HH writes them
DIALOGUE_MARK = "\n\nAssistant:"
TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
SAME = "'chosen' and 'rejected' are the same text, so the row states no preference"
COLUMNS = (
    *("text", "prompt", "completion", "messages", "chosen", "rejected", "score_chosen", "score_rejected"),
    *("responses", "scores", "ranking", "labeler", "label"),
)
"""All columns that are read; others may be there and are not."""


class Conversation(str):
    """A prompt of several messages. It is the text that people and reward functions read; models get the messages.

    Example:
        >>> prompt = Conversation([("user", "Hi"), ("assistant", "Hello!"), ("user", "Why?")])
        >>> prompt, prompt.messages[1]
        ('Human: Hi\\n\\nAssistant: Hello!\\n\\nHuman: Why?', ('assistant', 'Hello!'))
    """

    messages: tuple[Message, ...]

    def __new__(cls, messages: Iterable[Message]) -> Conversation:
        messages = tuple(messages)
        text = "\n\n".join(f"{NAMES.get(role, role.capitalize())}: {content}" for role, content in messages)
        self = super().__new__(cls, text)
        self.messages = messages
        return self

    def __getnewargs__(self) -> tuple[tuple[Message, ...]]:  # type: ignore[override]
        return (self.messages,)  # copies and pickles keep the messages


def prompt_of(messages: Iterable[Message]) -> str:
    """Messages as a prompt: a single one of a user's is its text.

    Example:
        >>> prompt_of([("user", "Hi")])
        'Hi'
    """
    messages = tuple(messages)
    return messages[0][1] if [role for role, _ in messages] == ["user"] else Conversation(messages)


def messages_of(prompt: str) -> tuple[Message, ...]:
    """The messages of a prompt: a plain text is a user's message.

    Example:
        >>> messages_of("Hi")
        (('user', 'Hi'),)
    """
    return prompt.messages if isinstance(prompt, Conversation) else (("user", prompt),)


def prompt_to_json(prompt: str) -> str | list[dict[str, str]]:
    """A prompt as a row holds it: a text, or a list of messages.

    Example:
        >>> prompt_to_json(Conversation([("system", "Be brief."), ("user", "Hi")]))
        [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Hi'}]
    """
    if not isinstance(prompt, Conversation):
        return prompt
    return [{"role": role, "content": content} for role, content in prompt.messages]


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt and a completion that a labeler wrote for it."""

    prompt: str
    completion: str
    where: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """K responses to one prompt, with a score for each: higher is better, equal scores are ties."""

    prompt: str
    responses: tuple[str, ...]
    scores: tuple[float, ...]
    labeler: str = ""
    where: str = ""

    def best(self) -> Demonstration:
        """The prompt with the response that scored highest."""
        return Demonstration(self.prompt, self.responses[self.scores.index(max(self.scores))], self.where)


@dataclass(frozen=True, slots=True)
class Prompt:
    """An instruction without an answer."""

    text: str
    where: str = ""


@dataclass(frozen=True, slots=True)
class Text:
    """A document of the pretraining corpus."""

    text: str
    where: str = ""


def kind_of(value: object) -> str:
    """What a value of a row is, in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


class Row:
    """One row of a file, and its file and line. Each method raises a `DataError` that names them."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def require(self, fits: bool, message: str) -> None:
        if not fits:
            raise DataError(f"{self.where}: {message}")

    def string(self, key: str) -> str:
        """A field that must be a text with something in it."""
        self._require_key(key)
        value = self.values[key]
        self.require(isinstance(value, str), f"field {key!r} must be a string, found {kind_of(value)}")
        self.require(bool(value.strip()), f"field {key!r} is empty")
        # A zero-width character is no whitespace to Python, but nobody can see it.
        seen = value.isascii() or any(unicodedata.category(character)[0] not in "CZ" for character in value)
        self.require(seen, f"field {key!r} has only invisible characters")
        return self.characters(value, f"field {key!r}")

    def characters(self, value: str, what: str) -> str:
        try:
            value.encode()
        except UnicodeEncodeError:
            self.require(False, f"{what} contains half a surrogate pair, which is not a character")
        return value

    def is_list(self, key: str) -> bool:
        return isinstance(self.values.get(key), list)

    def messages(self, key: str) -> tuple[Message, ...]:
        """A field that must be a list of messages, none of them empty."""
        self._require_key(key)
        found: list[Message] = []
        wanted = f"field {key!r} must be a string or a list of messages, each with a role and a content, both strings"
        self.require(self.is_list(key), f"{wanted}; found {kind_of(self.values[key])}")
        for i, message in enumerate(self.values[key]):
            given: dict[str, Any] = message if isinstance(message, dict) else {}
            role, content = given.get("role"), given.get("content")
            self.require(isinstance(role, str) and isinstance(content, str), f"{wanted}; found another {key}[{i}]")
            found.append((str(role), self.characters(str(content), f"{key}[{i}]")))
        self.require(bool(found), f"field {key!r} is an empty list")
        empty = [role for role, content in found if not content.strip()]
        self.require(empty != ["assistant"] or bool(found[-1][1].strip()), f"the last answer of {key!r} is empty")
        self.require(not empty, f"a message of {key!r} is empty")
        return tuple(found)

    def answer(self, key: str) -> tuple[tuple[Message, ...], str]:
        """A list of messages that must end with an assistant's: those before it, and its text."""
        *before, (role, content) = self.messages(key)
        self.require(role == "assistant", f"the last message of {key!r} must be the assistant's answer, found {role!r}")
        return tuple(before), content

    def _require_key(self, key: str) -> None:
        self.require(key in self.values, f"field {key!r} is missing; the row has {sorted(self.values)}")


def text(row: Row) -> Text:
    """{"text"}: a document of the corpus."""
    return Text(row.string("text"), row.where)


def prompt(row: Row) -> Prompt:
    """{"prompt"}, as text, messages or HH dialogue; or what is asked in {"messages"} or in a comparison."""
    if "prompt" not in row.values and "messages" in row.values:
        messages = row.messages("messages")
        return Prompt(_asked(row, messages[:-1] if messages[-1][0] == "assistant" else messages), row.where)
    if "prompt" not in row.values and "chosen" in row.values:
        return Prompt(comparison(row).prompt, row.where)
    return Prompt(_prompt(row), row.where)


def demonstration(row: Row) -> Demonstration:
    """{"prompt", "completion"}, as texts or messages; the last answer of {"messages"}; or a comparison's best."""
    row.require(row.values.get("label") is not False, "'label' is false: a completion that was rejected is no example")
    if "completion" not in row.values and "messages" in row.values:
        before, completion = row.answer("messages")
        return Demonstration(_asked(row, before), completion, row.where)
    if "completion" not in row.values and "chosen" in row.values:
        return comparison(row).best()
    question = _prompt(row)
    if not row.is_list("completion"):
        return Demonstration(question, row.string("completion"), row.where)
    before, completion = row.answer("completion")
    row.require(not before, "'completion' must be one message; give the messages before it in 'prompt'")
    return Demonstration(question, completion, row.where)


def comparison(row: Row) -> Comparison:
    """K answers to one prompt with scores or a ranking, or a chosen and a rejected one."""
    labeler = row.string("labeler") if "labeler" in row.values else ""
    pair, several = {"chosen", "rejected"} & row.values.keys(), {"scores", "ranking"} & row.values.keys()
    row.require(not (pair and several), "states its preference twice: 'chosen' and 'rejected', and scores or a ranking")
    if not pair:
        question = _prompt(row)
        responses = _responses(row)
        return Comparison(question, responses, _scores(row, len(responses)), labeler, row.where)
    alike = row.is_list("chosen") == row.is_list("rejected") or not {"chosen", "rejected"} <= row.values.keys()
    row.require(alike, "'chosen' and 'rejected' must both be texts or both be lists of messages")
    question, chosen, rejected = (_messages_pair if row.is_list("chosen") else _text_pair)(row)
    row.require(chosen != rejected, SAME)
    return Comparison(question, (chosen, rejected), _pair_scores(row), labeler, row.where)


def _prompt(row: Row) -> str:
    if row.is_list("prompt"):
        return _asked(row, row.messages("prompt"))
    found = row.string("prompt")
    turns = _dialogue(found.strip().removesuffix(DIALOGUE_MARK)) if found.strip().endswith(DIALOGUE_MARK) else None
    return found if turns is None else _asked_in_dialogue(row, turns)


def _asked(row: Row, messages: tuple[Message, ...]) -> str:
    row.require(any(role == "user" for role, _ in messages), "no user turn: nothing is asked")
    row.require(messages[-1][0] != "assistant", "the prompt ends with an answer, not with what is asked")
    return prompt_of(messages)


def _messages_pair(row: Row) -> tuple[str, str, str]:
    """'chosen' and 'rejected' as messages: with the prompt in front of both answers, or in a field of its own."""
    (before, chosen), (other, rejected) = row.answer("chosen"), row.answer("rejected")
    row.require(before == other, "'chosen' and 'rejected' must be alike up to the last message")
    if not before:
        return _prompt(row), chosen, rejected
    if row.is_list("prompt"):
        row.require(row.messages("prompt") == before, "'prompt' and the messages before the answers differ")
    return _asked(row, before), chosen, rejected


def _text_pair(row: Row) -> tuple[str, str, str]:
    """'chosen' and 'rejected' as texts: with a prompt, or as two dialogues (the Anthropic HH format)."""
    chosen, rejected = row.string("chosen"), row.string("rejected")
    if "prompt" in row.values:
        return _prompt(row), chosen, rejected
    start = chosen.rfind(DIALOGUE_MARK)
    cut = start + len(DIALOGUE_MARK)
    row.require(
        start >= 0 and rejected.startswith(chosen[:cut]),
        "without a 'prompt', 'chosen' and 'rejected' must be dialogues that share everything up to the last "
        f"{DIALOGUE_MARK.strip()!r}; give the field 'prompt' instead",
    )
    before, answers = chosen[:start].strip(), (chosen[cut:].strip(), rejected[cut:].strip())
    row.require(bool(before) and all(answers), "the dialogue has an empty prompt or an empty last answer")
    turns = _dialogue(before)
    return before if turns is None else _asked_in_dialogue(row, turns), *answers


def _dialogue(found: str) -> list[Message] | None:
    """The turns of a dialogue that begins with a person's; None for any other text."""
    _, *parts = TURN.split(found.strip())
    roles = {name: role for role, name in NAMES.items()}
    turns = [(roles[name], said.strip()) for name, said in zip(parts[::2], parts[1::2], strict=True)]
    return turns if found.strip().startswith("Human:") else None


def _asked_in_dialogue(row: Row, turns: list[Message]) -> str:
    row.require(all(said for _, said in turns), "a turn of the dialogue is empty")
    return _asked(row, tuple(turns))


def _pair_scores(row: Row) -> tuple[float, float]:
    """Those of UltraFeedback, where equal ones state no preference; otherwise 1 and 0."""
    if not {"score_chosen", "score_rejected"} <= row.values.keys():
        return 1.0, 0.0
    better, worse = (_number(row, row.values[key], f"field {key!r}") for key in ("score_chosen", "score_rejected"))
    row.require(better >= worse, "'score_chosen' is below 'score_rejected'")
    return better, worse


def _responses(row: Row) -> tuple[str, ...]:
    responses: Any = row.values.get("responses")
    message = "field 'responses' must be a list of strings, or give 'chosen' and 'rejected'"
    row.require(isinstance(responses, list), message)
    for i, response in enumerate(responses):
        found = "an empty string" if isinstance(response, str) else kind_of(response)
        fits = isinstance(response, str) and bool(response.strip())
        row.require(fits, f"responses[{i}] must be a non-empty string, found {found}")
        row.characters(response, f"responses[{i}]")
    row.require(len(responses) >= 2, f"{len(responses)} response; a comparison needs at least two")
    message = f"all {len(responses)} responses are the same text, so the row states no preference"
    row.require(len(set(responses)) > 1, message)
    return tuple(responses)


def _scores(row: Row, count: int) -> tuple[float, ...]:
    one = ("scores" in row.values) != ("ranking" in row.values)
    row.require(one, "give either 'scores' (higher is better) or 'ranking' (1 = best)")
    key = "scores" if "scores" in row.values else "ranking"
    numbers: Any = row.values[key]
    found = f"a list of {len(numbers)}" if isinstance(numbers, list) else kind_of(numbers)
    fits = isinstance(numbers, list) and len(numbers) == count
    row.require(fits, f"field {key!r} must be a list of {count} numbers, found {found}")
    for i, number in enumerate(numbers):
        _number(row, number, f"{key}[{i}]")
        fits = key == "scores" or (number >= 1 and number == int(number))
        row.require(fits, f"ranking[{i}] must be a whole number, 1 (the best) or more, found {number!r}")
    sign = 1.0 if key == "scores" else -1.0
    return tuple(sign * float(number) for number in numbers)


def _number(row: Row, number: Any, what: str) -> float:
    fits = isinstance(number, (int, float)) and not isinstance(number, bool) and abs(number) <= LARGEST_SCORE
    row.require(fits, f"{what} must be a finite number, found {number!r}")
    return float(number)
