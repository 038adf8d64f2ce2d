"""Files of rows, read strictly: every row is checked before any training starts.

A folder holds one file per table, and may hold more beside them:

    corpus  demonstrations  comparisons  prompts      each .jsonl, .jsonl.gz or .parquet; `formats` says what a row is
    heldout/               optional: the same names, never trained on; without it a tenth is held out
    tokenizer.json         optional: a tokenizer that fits the text; without it one is trained on the corpus

A single file of comparisons is enough too: their prompts, and the best answers as demonstrations and as corpus.
A malformed row raises one `DataError` that names the file and the line, or is left out and counted.
"""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from minirlhf import formats
from minirlhf.errors import DataError, require_installed
from minirlhf.formats import Comparison, Demonstration, Prompt, Row, Text, kind_of

__all__ = ["Comparison", "DataErrors", "DataFolder", "Demonstration", "Prompt", "Text", "read_folder", "read_rankings"]

T = TypeVar("T")
DataErrors = Literal["stop", "skip"]

HELDOUT_FRACTION = 0.1
COMMON_TIES = 20  # this many rows with all scores equal are the judge's habit, not a mistake
ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")
TABLES = ("corpus", "demonstrations", "comparisons", "prompts")
SHOWN_REASONS = 6
LONGEST_ROW = 2**25
"""Bytes. A few MB of gzip can hold a line of many GB, so a line is never read beyond this."""


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


def read_folder(path: str | Path, seed: int = 0, errors: DataErrors = "stop") -> DataFolder:
    """Read and check a data folder, or a single file of comparisons.

    Args:
        path: the folder or the file.
        seed: chooses the tenth that is held out if the folder has no ``heldout/``.
        errors: "stop" raises at the first malformed row; "skip" leaves such rows out, with a note that counts them.

    Raises:
        DataError: the folder or a file is missing or damaged, a table has no rows, or a row is malformed.

    Example:
        >>> read_folder("no/such/folder")
        Traceback (most recent call last):
        minirlhf.errors.DataError: no/such/folder: not a folder; give a folder that holds corpus.jsonl, ...
    """
    folder, reader = Path(path), _Reader(errors == "skip")
    if folder.is_file() and folder.name.endswith(ENDINGS):
        return _one_file(folder, seed, reader)
    if not folder.is_dir():
        raise DataError(
            f"{folder}: not a folder; give a folder that holds corpus.jsonl, demonstrations.jsonl, comparisons.jsonl "
            f"and prompts.jsonl, or a file of comparisons (each may end in {', '.join(ENDINGS)})"
        )
    data = DataFolder(
        path=folder,
        corpus=reader.rows(_file(folder, "corpus"), formats.text),
        demonstrations=reader.rows(_file(folder, "demonstrations"), formats.demonstration),
        comparisons=[],
        prompts=reader.rows(_file(folder, "prompts"), formats.prompt),
        notes=reader.notes,
    )
    data.comparisons = reader.comparisons(_file(folder, "comparisons"))
    heldout = folder / "heldout"
    if heldout.is_file():
        raise DataError(f"{heldout}: a file; held-out rows are in a folder, in files of the same names")
    if heldout.is_dir():
        data.heldout_corpus = reader.rows(_file(heldout, "corpus"), formats.text)
        data.heldout_comparisons = reader.comparisons(_file(heldout, "comparisons"))
        data.heldout_prompts = reader.rows(_file(heldout, "prompts"), formats.prompt)
    else:
        data.corpus, data.heldout_corpus = _split(data.corpus, seed)
        _hold_out(data, seed)
    for name in ("tokenizer", "world"):
        file = folder / f"{name}.json"
        setattr(data, f"{name}_file", file if file.is_file() else None)
    return data


def read_rankings(file: Path, notes: list[str] | None = None) -> list[Comparison]:
    """Read a file of comparisons that stands by itself, such as one that `minirlhf label` wrote.

    Args:
        file: rows as in a folder's ``comparisons``. All-tied rows are kept.
        notes: if given, malformed rows are left out, and a note that counts them is added here.

    Raises:
        DataError: the file is missing or empty, or a row is malformed; names the line.
    """
    if not file.is_file():
        raise DataError(f"{file}: no such file; give a file of comparisons, such as one written by minirlhf label")
    reader = _Reader(notes is not None)
    found = reader.rows(file, formats.comparison)
    if notes is not None:
        notes += reader.notes
    return found


def _one_file(file: Path, seed: int, reader: _Reader) -> DataFolder:
    """A table of comparisons (and demonstrations, if it has rows of both kinds) in place of a folder."""

    def parse(row: Row) -> Comparison | Demonstration:
        compares = {"chosen", "rejected", "responses"} & row.values.keys()
        return formats.comparison(row) if compares else formats.demonstration(row)

    rows = reader.rows(file, parse)
    ranked = reader.without_ties([row for row in rows if isinstance(row, Comparison)])
    if not ranked:
        raise DataError(
            f"{file}: no row compares answers, and a reward model learns from nothing else: add rows with 'chosen' and "
            "'rejected', or put the file into a folder as demonstrations, beside corpus, comparisons and prompts"
        )
    best = [row.best() if isinstance(row, Comparison) else row for row in rows]
    data = DataFolder(
        path=file,
        corpus=[],
        demonstrations=list({(row.prompt, row.completion): row for row in best}.values()),
        comparisons=ranked,
        prompts=list({row.prompt: Prompt(row.prompt, row.where) for row in best}.values()),
        notes=reader.notes,
    )
    _hold_out(data, seed)
    data.corpus = [Text(row.completion, row.where) for row in data.demonstrations]
    trained = {row.text for row in data.corpus}
    heldout = [Text(row.best().completion, row.where) for row in data.heldout_comparisons]
    data.heldout_corpus = [row for row in heldout if row.text not in trained]
    data.notes.append(f"{file}: a single file; its best answers are the demonstrations and the corpus")
    return data


def _hold_out(data: DataFolder, seed: int) -> None:
    """Hold out a tenth of the prompts, by their text, so that no held-out prompt was ever trained on."""
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
                f"{data.path}: too few rows: after holding out a tenth of the prompts, no {name} are left; "
                "add rows, or a heldout/ folder of your own"
            )


def _split(rows: list[T], seed: int) -> tuple[list[T], list[T]]:
    if len(rows) < 2:
        return rows, []
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    held = set(order[: max(1, round(HELDOUT_FRACTION * len(rows)))])
    return [r for i, r in enumerate(rows) if i not in held], [r for i, r in enumerate(rows) if i in held]


def _file(folder: Path, name: str) -> Path:
    """The one file of a table."""
    names = [f"{name}{ending}" for ending in ENDINGS]
    found = [folder / file for file in names if (folder / file).is_file()]
    if len(found) > 1:
        raise DataError(f"{found[0]}: {found[1].name} exists too; keep one of them")
    if not found:
        missing = f"{folder / names[0]}: missing, and so are {names[1]} and {names[2]}"
        raise DataError(f"{missing}; every data folder needs one of them")
    return found[0]


class _Reader:
    """Reads files of rows, and either stops at a bad row or leaves it out and counts it by reason."""

    def __init__(self, skip: bool) -> None:
        self.skip, self.notes = skip, list[str]()

    def rows(self, file: Path, parse: Callable[[Row], T]) -> list[T]:
        rows: list[T] = []
        left_out: list[tuple[str, str]] = []
        for row in _raw_rows(file):
            try:
                rows.append(parse(row))
            except DataError as error:
                if not self.skip:
                    raise
                left_out.append((row.where, str(error).removeprefix(f"{row.where}: ")))
        if left_out:
            self.notes.append(counted(str(file), left_out, len(rows) + len(left_out)))
        if left_out and not rows:
            raise DataError(f"{self.notes[-1]}; no row is left")
        if not rows:
            raise DataError(f"{file}:1: the file is empty; expected one JSON object per line")
        return rows

    def comparisons(self, file: Path) -> list[Comparison]:
        return self.without_ties(self.rows(file, formats.comparison))

    def without_ties(self, rows: list[Comparison]) -> list[Comparison]:
        """The comparisons that state a preference.

        A row whose scores are all equal teaches nothing. A few such rows are most likely a mistake in the file, so they
        are an error; if they are common (a judge that often gives 0 to all) they are left out, and a note says so.
        """
        tied = [row for row in rows if len(set(row.scores)) == 1]
        if not tied:
            return rows
        count = len(tied[0].scores)
        first = (
            f"{tied[0].where}: all {count} scores (or places in the ranking) are equal, so the row states no preference"
        )
        if len(tied) == len(rows) or (len(tied) < COMMON_TIES and not self.skip):
            raise DataError(f"{first} ({len(tied)} of {len(rows)} rows are like this); remove such rows")
        self.notes.append(f"{first}; {len(tied)} of {len(rows)} rows are like this and were left out")
        return [row for row in rows if len(set(row.scores)) > 1]


def counted(what: str, left_out: list[tuple[str, str]], total: int) -> str:
    """Say how many rows were left out, by reason, the most common first.

    Args:
        what: the file or the folder.
        left_out: the place of each such row and the reason.
        total: of how many rows.

    Example:
        >>> counted("a.jsonl", [("a.jsonl:3", "empty"), ("a.jsonl:4", "odd"), ("a.jsonl:7", "odd")], 9)
        'a.jsonl: 3 of 9 rows were left out: 2 x odd (first: a.jsonl:4); 1 x empty (first: a.jsonl:3)'
    """
    places: dict[str, list[str]] = {}
    for where, reason in left_out:
        places.setdefault(reason, []).append(where)
    common = sorted(places.items(), key=lambda item: -len(item[1]))
    said = [f"{len(wheres)} x {reason} (first: {wheres[0]})" for reason, wheres in common[:SHOWN_REASONS]]
    rest = sum(len(wheres) for _, wheres in common[SHOWN_REASONS:])
    said += [f"{rest} x another reason"] if rest else []
    return f"{what}: {len(left_out)} of {total} rows were left out: {'; '.join(said)}"


def _raw_rows(file: Path) -> Iterator[Row]:
    return _parquet(file) if file.suffix == ".parquet" else _json_lines(file)


def _json_lines(file: Path) -> Iterator[Row]:
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
                    raise DataError(f"{where}: expected a JSON object, found {kind_of(row)}")
                yield Row(row, where)
    except (gzip.BadGzipFile, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{file}:{number + 1}: can't be read ({error}); write the file again") from None


def _parquet(file: Path) -> Iterator[Row]:
    """The rows of a parquet file, which has a value in every column: a missing one is null."""
    require_installed("pyarrow", "data")
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(file) as stream:
            for batch in stream.iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    given = {key: value for key, value in values.items() if value is not None}
                    yield Row(given, f"{file}:{number}")
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{file}:{number + 1}: can't be read ({reason}); write the file again") from None
