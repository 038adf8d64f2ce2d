"""A folder of JSON lines, read strictly: every row is checked before any training starts.

    corpus.jsonl           {"text"}
    demonstrations.jsonl   {"prompt", "completion"}
    comparisons.jsonl      {"prompt", "responses": [K], "scores": [K]}  or  "ranking": [K] (1 = best)
                           {"prompt", "chosen", "rejected"}  or  {"chosen", "rejected"} (whole dialogues)
    prompts.jsonl          {"prompt"}
    heldout/               optional: the same names, never trained on; without it a tenth is held out
    tokenizer.json         optional: a tokenizer that fits the text; without it one is trained on the corpus

Each file may be plain or ``.gz``. A malformed row raises one `DataError` that names the file and the line.
"""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from minirlhf.errors import DataError

T = TypeVar("T")

HELDOUT_FRACTION = 0.1
COMMON_TIES = 20  # this many rows with all scores equal are the judge's habit, not a mistake
LARGEST_SCORE = 1e30  # fits float32 with room to spare; NaN and infinity fail the comparison too
LONGEST_ROW = 2**25
"""Bytes. A few MB of gzip can hold a line of many GB, so a line is never read beyond this."""
DIALOGUE_MARK = "\n\nAssistant:"


@dataclass(frozen=True)
class Demonstration:
    """A prompt and a completion that a labeler wrote for it."""

    prompt: str
    completion: str
    where: str = ""


@dataclass(frozen=True)
class Comparison:
    """K responses to one prompt, with a score for each: higher is better, equal scores are ties."""

    prompt: str
    responses: tuple[str, ...]
    scores: tuple[float, ...]
    labeler: str = ""
    where: str = ""


@dataclass(frozen=True)
class Prompt:
    """An instruction without an answer."""

    text: str
    where: str = ""


@dataclass(frozen=True)
class Text:
    """A document of the pretraining corpus."""

    text: str
    where: str = ""


@dataclass
class DataFolder:
    """All rows of a data folder, training and held-out separately."""

    path: Path
    corpus: list[Text]
    demonstrations: list[Demonstration]
    comparisons: list[Comparison]
    prompts: list[Prompt]
    heldout_corpus: list[Text] = field(default_factory=list)
    heldout_comparisons: list[Comparison] = field(default_factory=list)
    heldout_prompts: list[Prompt] = field(default_factory=list)
    tokenizer_file: Path | None = None
    world_file: Path | None = None
    notes: list[str] = field(default_factory=list)
    """What a reader should know about the rows, for example how many were left out."""


def read_folder(path: str | Path, seed: int = 0) -> DataFolder:
    """Read and check a data folder.

    Args:
        path: the folder.
        seed: chooses the tenth that is held out if the folder has no ``heldout/``.

    Raises:
        DataError: the folder or a file is missing, a file is empty, or a row is malformed.

    Example:
        >>> read_folder("no/such/folder")
        Traceback (most recent call last):
        minirlhf.errors.DataError: no/such/folder: not a folder; give a folder that holds corpus.jsonl, ...
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(
            f"{folder}: not a folder; give a folder that holds corpus.jsonl, demonstrations.jsonl, "
            "comparisons.jsonl and prompts.jsonl (each may end in .gz)"
        )
    data = DataFolder(
        path=folder,
        corpus=_read(folder, "corpus", _text),
        demonstrations=_read(folder, "demonstrations", _demonstration),
        comparisons=[],
        prompts=_read(folder, "prompts", _prompt),
    )
    data.comparisons = _read_comparisons(folder, data.notes)
    heldout = folder / "heldout"
    if heldout.is_dir():
        data.heldout_corpus = _read(heldout, "corpus", _text)
        data.heldout_comparisons = _read_comparisons(heldout, data.notes)
        data.heldout_prompts = _read(heldout, "prompts", _prompt)
    else:
        data.corpus, data.heldout_corpus = _split(data.corpus, seed)
        # Prompts and comparisons are split by the prompt's text, so that no held-out prompt was ever trained on.
        texts = sorted({row.text for row in data.prompts} | {row.prompt for row in data.comparisons})
        held = set(_split(texts, seed)[1])
        data.heldout_prompts = [row for row in data.prompts if row.text in held]
        data.prompts = [row for row in data.prompts if row.text not in held]
        data.heldout_comparisons = [row for row in data.comparisons if row.prompt in held]
        data.comparisons = [row for row in data.comparisons if row.prompt not in held]
        data.demonstrations = [row for row in data.demonstrations if row.prompt not in held]
        parts = {name: getattr(data, name) for name in ("demonstrations", "comparisons", "prompts")}
        parts |= {f"held-out {name}": getattr(data, f"heldout_{name}") for name in ("comparisons", "prompts")}
        for name, rows in parts.items():
            if not rows:
                raise DataError(
                    f"{folder}: too few rows: after holding out a tenth of the prompts, no {name} are left; "
                    "add rows, or a heldout/ folder of your own"
                )
    for name in ("tokenizer", "world"):
        file = folder / f"{name}.json"
        setattr(data, f"{name}_file", file if file.is_file() else None)
    return data


def read_rankings(file: Path) -> list[Comparison]:
    """Read a file of comparisons that stands by itself, such as one that `minirlhf label` wrote.

    Args:
        file: JSON lines, plain or ``.gz``; rows as in a folder's ``comparisons``. All-tied rows are kept.

    Raises:
        DataError: the file is missing or empty, or a row is malformed; names the line.
    """
    if not file.is_file():
        raise DataError(f"{file}: no such file; give a file of comparisons, such as one written by minirlhf label")
    return _rows(file, _comparison)


def _split(rows: list[T], seed: int) -> tuple[list[T], list[T]]:
    if len(rows) < 2:
        return rows, []
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    held = set(order[: max(1, round(HELDOUT_FRACTION * len(rows)))])
    return [r for i, r in enumerate(rows) if i not in held], [r for i, r in enumerate(rows) if i in held]


def _read(folder: Path, name: str, parse: Callable[[_Row], T]) -> list[T]:
    plain, packed = folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz"
    if plain.is_file() and packed.is_file():
        raise DataError(f"{plain}: {packed.name} exists too; keep one of the two")
    file = packed if packed.is_file() else plain
    if not file.is_file():
        raise DataError(f"{plain}: missing, and so is {packed.name}; every data folder needs one of them")
    return _rows(file, parse)


def _rows(file: Path, parse: Callable[[_Row], T]) -> list[T]:
    rows = [parse(row) for row in _json_lines(file)]
    if not rows:
        raise DataError(f"{file}:1: the file is empty; expected one JSON object per line")
    return rows


def _read_comparisons(folder: Path, notes: list[str]) -> list[Comparison]:
    """Read the comparisons that state a preference.

    A row whose scores are all equal teaches nothing. A few such rows are most likely a mistake in the file, so they are
    an error; if they are common (a judge that often gives 0 to all) they are left out, and a note says so.
    """
    rows = _read(folder, "comparisons", _comparison)
    tied = [row for row in rows if len(set(row.scores)) == 1]
    if not tied:
        return rows
    count = len(tied[0].scores)
    first = f"{tied[0].where}: all {count} scores (or places in the ranking) are equal, so the row states no preference"
    if len(tied) == len(rows) or len(tied) < COMMON_TIES:
        raise DataError(f"{first} ({len(tied)} of {len(rows)} rows are like this); remove such rows")
    notes.append(f"{first}; {len(tied)} of {len(rows)} rows are like this and were left out")
    return [row for row in rows if len(set(row.scores)) > 1]


def _json_lines(file: Path) -> Iterator[_Row]:
    opener = gzip.open if file.suffix == ".gz" else open
    number = 0
    try:
        with opener(file, "rb") as stream:
            for number, line in enumerate(iter(lambda: stream.readline(LONGEST_ROW + 1), b""), 1):
                where = f"{file}:{number}"
                if len(line) > LONGEST_ROW:
                    raise DataError(f"{where}: longer than {LONGEST_ROW:,} bytes; a row is a JSON object on one line")
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(f"{where}: not valid UTF-8 (byte {error.start} of the line)") from None
                if not text.strip():
                    continue
                try:
                    row = json.loads(text)
                except json.JSONDecodeError as error:
                    raise DataError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from None
                except (ValueError, RecursionError) as error:  # a number with thousands of digits; very deep nesting
                    raise DataError(f"{where}: JSON that can't be read ({error})") from None
                if not isinstance(row, dict):
                    raise DataError(f"{where}: expected a JSON object, found {_kind(row)}")
                yield _Row(row, where)
    except (gzip.BadGzipFile, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{file}:{number + 1}: can't be read ({error}); write the file again") from None


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


class _Row:
    """One JSON object of a file, and its file and line."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def require(self, fits: bool, message: str) -> None:
        if not fits:
            raise DataError(f"{self.where}: {message}")

    def string(self, key: str) -> str:
        self.require(key in self.values, f"field {key!r} is missing; the row has {sorted(self.values)}")
        value = self.values[key]
        self.require(isinstance(value, str), f"field {key!r} must be a string, found {_kind(value)}")
        self.require(bool(value.strip()), f"field {key!r} is empty")
        return self.characters(value, f"field {key!r}")

    def characters(self, value: str, what: str) -> str:
        try:
            value.encode()
        except UnicodeEncodeError:
            self.require(False, f"{what} contains half a surrogate pair, which is not a character")
        return value


def _text(row: _Row) -> Text:
    return Text(row.string("text"), row.where)


def _prompt(row: _Row) -> Prompt:
    return Prompt(row.string("prompt"), row.where)


def _demonstration(row: _Row) -> Demonstration:
    return Demonstration(row.string("prompt"), row.string("completion"), row.where)


def _comparison(row: _Row) -> Comparison:
    labeler = row.string("labeler") if "labeler" in row.values else ""
    if "chosen" in row.values or "rejected" in row.values:
        chosen, rejected = row.string("chosen"), row.string("rejected")
        if "prompt" in row.values:
            prompt = row.string("prompt")
        else:
            prompt, chosen, rejected = _split_dialogue(row, chosen, rejected)
        row.require(chosen != rejected, "'chosen' and 'rejected' are the same text, so the row states no preference")
        return Comparison(prompt, (chosen, rejected), (1.0, 0.0), labeler, row.where)
    prompt = row.string("prompt")
    responses = _responses(row)
    return Comparison(prompt, responses, _scores(row, len(responses)), labeler, row.where)


def _responses(row: _Row) -> tuple[str, ...]:
    responses: Any = row.values.get("responses")
    message = "field 'responses' must be a list of strings, or give 'chosen' and 'rejected'"
    row.require(isinstance(responses, list), message)
    for i, response in enumerate(responses):
        found = "an empty string" if isinstance(response, str) else _kind(response)
        fits = isinstance(response, str) and bool(response.strip())
        row.require(fits, f"responses[{i}] must be a non-empty string, found {found}")
        row.characters(response, f"responses[{i}]")
    row.require(len(responses) >= 2, f"{len(responses)} response; a comparison needs at least two")
    message = f"all {len(responses)} responses are the same text, so the row states no preference"
    row.require(len(set(responses)) > 1, message)
    return tuple(responses)


def _scores(row: _Row, count: int) -> tuple[float, ...]:
    one = ("scores" in row.values) != ("ranking" in row.values)
    row.require(one, "give either 'scores' (higher is better) or 'ranking' (1 = best)")
    key = "scores" if "scores" in row.values else "ranking"
    numbers: Any = row.values[key]
    found = f"a list of {len(numbers)}" if isinstance(numbers, list) else _kind(numbers)
    fits = isinstance(numbers, list) and len(numbers) == count
    row.require(fits, f"field {key!r} must be a list of {count} numbers, found {found}")
    for i, number in enumerate(numbers):
        fits = isinstance(number, (int, float)) and not isinstance(number, bool) and abs(number) <= LARGEST_SCORE
        row.require(fits, f"{key}[{i}] must be a finite number, found {number!r}")
        fits = key == "scores" or (number >= 1 and number == int(number))
        row.require(fits, f"ranking[{i}] must be a whole number, 1 (the best) or more, found {number!r}")
    sign = 1.0 if key == "scores" else -1.0
    return tuple(sign * float(number) for number in numbers)


def _split_dialogue(row: _Row, chosen: str, rejected: str) -> tuple[str, str, str]:
    """Split two dialogues (the Anthropic HH format) into their common prompt and their last answers."""
    start = chosen.rfind(DIALOGUE_MARK)
    cut = start + len(DIALOGUE_MARK)
    row.require(
        start >= 0 and rejected.startswith(chosen[:cut]),
        "without a 'prompt', 'chosen' and 'rejected' must be dialogues that share everything up to the last "
        f"{DIALOGUE_MARK.strip()!r}; give the field 'prompt' instead",
    )
    prompt = chosen[:start].strip()
    if prompt.startswith("Human:") and prompt.count("Human:") == 1:
        prompt = prompt.removeprefix("Human:").strip()
    answers = chosen[cut:].strip(), rejected[cut:].strip()
    row.require(bool(prompt) and all(answers), "the dialogue has an empty prompt or an empty last answer")
    return prompt, *answers
