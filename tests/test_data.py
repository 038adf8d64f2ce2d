"""Every malformed row is named by file and line, before any training."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from minirlhf.data import Comparison, read_folder
from minirlhf.errors import DataError

ROWS = {
    "corpus": [{"text": f"the frog number {i} sits by the pond"} for i in range(20)],
    "demonstrations": [{"prompt": f"say {i}", "completion": f"number {i}"} for i in range(20)],
    "comparisons": [{"prompt": f"say {i}", "responses": ["one", "two"], "scores": [1, 0]} for i in range(20)],
    "prompts": [{"prompt": f"say {i}"} for i in range(20)],
}


def write_json_lines(path: Path, rows: list[dict]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.mkdir()
    for name, rows in ROWS.items():
        write_json_lines(path / f"{name}.jsonl", rows)
    return path


@pytest.fixture
def heldout(folder: Path) -> Path:
    """A folder of held-out rows in it."""
    path = folder / "heldout"
    path.mkdir()
    for name in ("corpus", "comparisons", "prompts"):
        write_json_lines(path / f"{name}.jsonl", ROWS[name][:4])
    return path


def put(folder: Path, name: str, row: object, line: int = 3) -> str:
    """Replace one line of a file; gives the place that the message must name."""
    file = folder / f"{name}.jsonl"
    lines = file.read_bytes().split(b"\n")
    lines[line - 1] = row if isinstance(row, bytes) else json.dumps(row).encode()
    file.write_bytes(b"\n".join(lines))
    return f"{file}:{line}"


def expect(folder: Path, where: str, *words: str) -> None:
    with pytest.raises(DataError) as caught:
        read_folder(folder)
    message = str(caught.value)
    assert message.startswith(where) and "\n" not in message and all(word in message for word in words), message


PAIR = {"prompt": "p", "responses": ["a", "b"]}
MALFORMED = [
    ("corpus", b'{"text": "cut', ["not valid JSON", "column"]),
    ("corpus", b"[1, 2]", ["JSON object", "a list"]),
    ("corpus", b'{"text": "caf\xe9"}', ["UTF-8"]),
    ("corpus", {"txt": "a"}, ["'text'", "missing", "txt"]),
    ("corpus", {"text": " \n"}, ["'text'", "empty"]),
    ("corpus", {"text": 3}, ["'text'", "string", "a number"]),
    ("corpus", {"text": None}, ["'text'", "string", "null"]),
    ("prompts", {"prompt": ["a"]}, ["'prompt'", "string", "a list"]),
    ("demonstrations", {"prompt": "a"}, ["'completion'", "missing"]),
    ("demonstrations", {"prompt": "a", "completion": "  "}, ["'completion'", "empty"]),
    ("demonstrations", {"prompt": True, "completion": "b"}, ["'prompt'", "true or false"]),
    ("comparisons", {"prompt": "p", "scores": [1, 2]}, ["'responses'", "list"]),
    ("comparisons", {"prompt": "p", "responses": "ab", "scores": [1, 2]}, ["'responses'", "list"]),
    ("comparisons", {"prompt": "p", "responses": ["a"], "scores": [1]}, ["1 response", "at least two"]),
    ("comparisons", {"prompt": "p", "responses": ["a", ""], "scores": [1, 0]}, ["responses[1]", "empty"]),
    ("comparisons", {"prompt": "p", "responses": ["a", 5], "scores": [1, 0]}, ["responses[1]", "a number"]),
    ("comparisons", PAIR | {"responses": ["a b", "a b"], "scores": [1, 0]}, ["same text"]),
    ("comparisons", PAIR | {"ranking": [1, 0]}, ["ranking[1]", "whole number, 1 (the best) or more, found 0"]),
    ("comparisons", PAIR | {"ranking": [1, 2.5]}, ["ranking[1]", "whole number", "2.5"]),
    ("comparisons", b'{"prompt": "p", "responses": ["a", "b"], "scores": [NaN, 1]}', ["scores[0]", "finite", "nan"]),
    ("comparisons", b'{"prompt": "p", "responses": ["a", "b"], "scores": [1, Infinity]}', ["scores[1]", "finite"]),
    ("comparisons", PAIR | {"scores": [1, "2"]}, ["scores[1]", "finite number"]),
    ("comparisons", PAIR | {"scores": [True, 0]}, ["scores[0]", "finite number"]),
    ("comparisons", PAIR | {"scores": [1, 2, 3]}, ["list of 2", "list of 3"]),
    ("comparisons", PAIR | {"scores": 4}, ["list of 2", "a number"]),
    ("comparisons", PAIR | {"scores": [1, 0], "ranking": [1, 2]}, ["either 'scores'", "'ranking'"]),
    ("comparisons", PAIR, ["either 'scores'", "'ranking'"]),
    ("comparisons", PAIR | {"scores": [1, 0], "labeler": 7}, ["'labeler'", "string"]),
    ("comparisons", {"prompt": "p", "chosen": "a"}, ["'rejected'", "missing"]),
    ("comparisons", {"prompt": "p", "rejected": "a"}, ["'chosen'", "missing"]),
    ("comparisons", {"prompt": "p", "chosen": "a", "rejected": "a"}, ["same text"]),
    ("comparisons", {"prompt": "p", "chosen": "a", "rejected": "b", "ranking": [2, 1]}, ["preference twice"]),
    ("comparisons", {"chosen": "plain", "rejected": "text"}, ["dialogues", "'prompt'"]),
    ("corpus", {"text": "\u200b\u2060 \ufeff"}, ["'text'", "invisible"]),
    ("comparisons", {"chosen": "Human: a\n\nAssistant: x", "rejected": "Human: b\n\nAssistant: y"}, ["share"]),
    ("comparisons", {"chosen": "Human: a\n\nAssistant: x", "rejected": "Human: a\n\nAssistant:"}, ["empty"]),
    ("comparisons", {"chosen": "Human: a\n\nAssistant: x", "rejected": "Human: a\n\nAssistant: x"}, ["same text"]),
    # Numbers that Python reads and float can't hold, or that Python refuses to read at all.
    ("comparisons", b'{"prompt": "p", "responses": ["a", "b"], "scores": [1, 1' + b"0" * 400 + b"]}", ["scores[1]"]),
    ("comparisons", b'{"prompt": "p", "responses": ["a", "b"], "scores": [1, 1' + b"0" * 5000 + b"]}", []),
    ("corpus", b"[" * 100_000, ["JSON"]),
    # Half of a surrogate pair is JSON, and no text that a tokenizer can take.
    ("corpus", b'{"text": "half a pair: \\ud83d"}', ["'text'"]),
]


@pytest.mark.parametrize(("name", "row", "words"), MALFORMED)
def test_malformed_row_names_file_and_line(folder: Path, name: str, row: object, words: list[str]) -> None:
    expect(folder, put(folder, name, row), *words)


def test_lines_are_counted_with_the_blank_ones(folder: Path) -> None:
    file = folder / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n\n   \n{"prompt": ""}\n', encoding="utf-8")
    expect(folder, f"{file}:4", "empty")


@pytest.mark.parametrize("content", ["", "\n", " \n\n", None])
@pytest.mark.parametrize("name", ROWS)
def test_empty_or_missing_file(folder: Path, name: str, content: str | None) -> None:
    file = folder / f"{name}.jsonl"
    if content is None:
        file.unlink()
        expect(folder, f"{file}: missing", f"{name}.jsonl.gz")
    else:
        file.write_text(content, encoding="utf-8")
        expect(folder, f"{file}:1: ", "empty")


def test_missing_folder_and_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name in ("none", "file"):
        expect(tmp_path / name, f"{tmp_path / name}: not a folder", "corpus.jsonl")


def test_plain_and_packed_side_by_side(folder: Path) -> None:
    write_json_lines(folder / "corpus.jsonl.gz", ROWS["corpus"])
    expect(folder, str(folder / "corpus.jsonl"), "corpus.jsonl.gz", "keep one")


PACKED = gzip.compress(b'{"text": "abc def"}\n' * 50)


DAMAGED = {
    "cut": PACKED[:-12],
    "not gzip": b"this is no gzip file",
    "checksum": PACKED[:-6] + bytes([PACKED[-6] ^ 0xFF]) + PACKED[-5:],
    "body": PACKED[:10] + b"\xff" * 10 + PACKED[20:],
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_gz(folder: Path, damage: str) -> None:
    (folder / "corpus.jsonl").unlink()
    file = folder / "corpus.jsonl.gz"
    file.write_bytes(DAMAGED[damage])
    with pytest.raises(DataError, match=re.escape(f"{file}:") + r"\d+: can't be read"):
        read_folder(folder)


def test_packed_rows_are_the_same_rows(folder: Path) -> None:
    plain = read_folder(folder)
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").unlink()
        write_json_lines(folder / f"{name}.jsonl.gz", rows)
    packed = read_folder(folder)
    assert [row.text for row in packed.corpus] == [row.text for row in plain.corpus]
    assert [row.scores for row in packed.comparisons] == [row.scores for row in plain.comparisons]
    assert packed.prompts[0].where.startswith(str(folder / "prompts.jsonl.gz:"))


HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why?\n\nAssistant:"
FORMATS = [
    (PAIR | {"scores": [0.5, 2]}, "p", ("a", "b"), (0.5, 2.0)),
    ({"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 1, 0]}, "p", ("a", "b", "c"), (1.0, 1.0, 0.0)),
    ({"prompt": "p", "responses": ["a", "b", "c"], "ranking": [2, 1, 3]}, "p", ("a", "b", "c"), (-2.0, -1.0, -3.0)),
    ({"prompt": "p", "chosen": "a", "rejected": "b"}, "p", ("a", "b"), (1.0, 0.0)),
    ({"chosen": "Human: q\n\nAssistant: a", "rejected": "Human: q\n\nAssistant: b"}, "q", ("a", "b"), (1.0, 0.0)),
    ({"chosen": f"{HH} yes", "rejected": f"{HH} no"}, HH[2:-12], ("yes", "no"), (1.0, 0.0)),
]


@pytest.mark.parametrize(("row", "prompt", "responses", "scores"), FORMATS)
def test_row_formats(folder: Path, heldout: Path, row: dict, prompt: str, responses: tuple, scores: tuple) -> None:
    where = put(folder, "comparisons", row | {"labeler": "ann"}, line=2)
    assert read_folder(folder).comparisons[1] == Comparison(prompt, responses, scores, "ann", where)


def test_split_shares_no_prompt(folder: Path) -> None:
    data = read_folder(folder)
    held = {row.text for row in data.heldout_prompts} | {row.prompt for row in data.heldout_comparisons}
    trained = {row.text for row in data.prompts} | {row.prompt for row in data.comparisons}
    trained |= {row.prompt for row in data.demonstrations}
    assert len(held) == 2 and not held & trained
    assert len(data.prompts) + len(data.heldout_prompts) == 20
    assert len(data.comparisons) + len(data.heldout_comparisons) == 20
    assert len(data.corpus) == 18 and len(data.heldout_corpus) == 2
    assert not {row.text for row in data.corpus} & {row.text for row in data.heldout_corpus}
    assert read_folder(folder) == data  # the same seed splits alike
    others = {tuple(sorted(row.text for row in read_folder(folder, seed=s).heldout_prompts)) for s in range(5)}
    assert len(others) > 1


@pytest.mark.parametrize("tied", [{"scores": [2, 2]}, {"ranking": [1, 1]}])
@pytest.mark.parametrize(("count", "total"), [(1, 40), (19, 40), (20, 40), (39, 40), (30, 30)])
def test_rows_that_prefer_nothing(folder: Path, heldout: Path, tied: dict, count: int, total: int) -> None:
    """A few are an error, and so is a file of nothing else; many are left out, with a note."""
    others = (ROWS["comparisons"] * 2)[: total - count]
    write_json_lines(folder / "comparisons.jsonl", [PAIR | tied] * count + others)
    where, words = f"{folder / 'comparisons.jsonl'}:1: ", ("equal", f"{count} of {total} rows")
    if count < 20 or count == total:
        return expect(folder, where, *words)
    data = read_folder(folder)
    assert len(data.comparisons) == total - count and len(data.heldout_comparisons) == 4
    (note,) = data.notes
    assert note.startswith(where) and all(word in note for word in (*words, "left out"))


def test_own_heldout_folder_is_used_and_checked(folder: Path, heldout: Path) -> None:
    data = read_folder(folder)
    assert len(data.prompts) == 20 and len(data.heldout_prompts) == 4 and len(data.heldout_comparisons) == 4
    expect(folder, put(heldout, "prompts", {"prompt": 1}, line=2), "string")


def test_too_few_rows_to_split(folder: Path) -> None:
    write_json_lines(folder / "prompts.jsonl", ROWS["prompts"][:1])
    expect(folder, str(folder), "too few rows", "heldout")


def test_the_shipped_folders_are_well_formed(tiny_folder: Path) -> None:
    data = read_folder(Path(__file__).parents[1] / "data" / "small_world")
    assert data.world_file is not None and data.tokenizer_file is not None
    assert not {row.text for row in data.heldout_prompts} & {row.text for row in data.prompts}
    assert read_folder(tiny_folder).world_file is None


class TestCommandLine:
    """A mistake in the data: one message, nothing trained."""

    @pytest.fixture
    def message(self, folder: Path, tmp_path: Path, fast_run, refused) -> Callable[..., str]:
        """What the command says of a folder that it must refuse."""

        def call(*options: str, data: Path = folder) -> str:
            said = refused(fast_run(tmp_path / "out", *options, data=data))
            assert not list((tmp_path / "out").glob("*"))
            return said

        return call

    def test_malformed_row(self, folder: Path, message) -> None:
        assert put(folder, "comparisons", PAIR | {"scores": [2, "2"]}) in message()

    def test_rows_longer_than_the_context(self, folder: Path, message) -> None:
        # Of a prompt that is not held out: the split is by the prompt's text.
        row = read_folder(folder).demonstrations[0]
        line = int(row.where.rsplit(":", 1)[1])
        where = put(folder, "demonstrations", {"prompt": row.prompt, "completion": "frog " * 300}, line)
        assert where in message("--context-length", "128")
        long = PAIR | {"responses": ["a", "frog pond " * 200], "scores": [1, 0]}
        put(folder, "demonstrations", ROWS["demonstrations"][line - 1], line)
        where, said = put(folder, "comparisons", long, line=7), message("--context-length", "128")
        assert where in said and "--context-length" in said and "128" in said

    def test_broken_tokenizer_file(self, folder: Path, message) -> None:
        (folder / "tokenizer.json").write_text("{}")
        assert str(folder / "tokenizer.json") in message()

    @pytest.mark.parametrize("content", ["{bad", "[1]", "{}", '{"seed": "zero"}', '{"seed": true}'])
    def test_broken_world_file(self, folder: Path, message, content: str) -> None:
        (folder / "world.json").write_text(content)
        assert f"{folder / 'world.json'}: " in message()

    def test_the_mistake_can_be_mended(self, folder: Path, tmp_path: Path, message) -> None:
        """A mistyped --data must not claim the folder: the corrected command may use the same --out."""
        assert "not a folder" in message(data=tmp_path / "mistyped")
        assert put(folder, "corpus", b"{") in message()
