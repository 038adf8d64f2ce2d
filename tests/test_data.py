"""Every malformed row is named by file and line, before any training."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from pathlib import Path

import pytest

from minirlhf.cli import main
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
    assert message.startswith(where), message
    assert "\n" not in message
    for word in words:
        assert word in message, message


PAIR = {"prompt": "p", "responses": ["a", "b"]}
MALFORMED = [
    ("corpus", b'{"text": "cut', ["not valid JSON", "column"]),
    ("corpus", b"[1, 2]", ["JSON object", "a list"]),
    ("corpus", b"12", ["JSON object", "a number"]),
    ("corpus", b'{"text": "caf\xe9"}', ["UTF-8"]),
    ("corpus", {"txt": "a"}, ["'text'", "missing", "txt"]),
    ("corpus", {"text": ""}, ["'text'", "empty"]),
    ("corpus", {"text": " \n"}, ["'text'", "empty"]),
    ("corpus", {"text": 3}, ["'text'", "string", "a number"]),
    ("corpus", {"text": None}, ["'text'", "string", "null"]),
    ("prompts", {}, ["'prompt'", "missing"]),
    ("prompts", {"prompt": ["a"]}, ["'prompt'", "string", "a list"]),
    ("demonstrations", {"prompt": "a"}, ["'completion'", "missing"]),
    ("demonstrations", {"prompt": "a", "completion": "  "}, ["'completion'", "empty"]),
    ("demonstrations", {"prompt": True, "completion": "b"}, ["'prompt'", "true or false"]),
    ("comparisons", {"prompt": "p", "scores": [1, 2]}, ["'responses'", "list"]),
    ("comparisons", {"prompt": "p", "responses": "ab", "scores": [1, 2]}, ["'responses'", "list"]),
    ("comparisons", {"prompt": "p", "responses": ["a"], "scores": [1]}, ["1 response", "at least two"]),
    ("comparisons", {"prompt": "p", "responses": [], "scores": []}, ["at least two"]),
    ("comparisons", {"prompt": "p", "responses": ["a", ""], "scores": [1, 0]}, ["responses[1]", "empty"]),
    ("comparisons", {"prompt": "p", "responses": ["a", 5], "scores": [1, 0]}, ["responses[1]", "a number"]),
    ("comparisons", PAIR | {"responses": ["a b", "a b"], "scores": [1, 0]}, ["same text"]),
    ("comparisons", PAIR | {"ranking": [-7, 1]}, ["ranking[0]", "1 (the best) or more", "-7"]),
    ("comparisons", PAIR | {"ranking": [1, 0]}, ["ranking[1]", "whole number"]),
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
    ("comparisons", {"chosen": "plain", "rejected": "text"}, ["dialogues", "'prompt'"]),
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


@pytest.mark.parametrize("content", ["", "\n", " \n\n"])
@pytest.mark.parametrize("name", list(ROWS))
def test_empty_file(folder: Path, name: str, content: str) -> None:
    (folder / f"{name}.jsonl").write_text(content, encoding="utf-8")
    expect(folder, f"{folder / name}.jsonl:1", "empty")


@pytest.mark.parametrize("name", list(ROWS))
def test_missing_file(folder: Path, name: str) -> None:
    (folder / f"{name}.jsonl").unlink()
    expect(folder, f"{folder / name}.jsonl", "missing", f"{name}.jsonl.gz")


def test_missing_folder_and_a_file_in_its_place(tmp_path: Path) -> None:
    expect(tmp_path / "none", str(tmp_path / "none"), "not a folder", "corpus.jsonl")
    (tmp_path / "file").write_text("x")
    expect(tmp_path / "file", str(tmp_path / "file"), "not a folder")


def test_plain_and_packed_side_by_side(folder: Path) -> None:
    write_json_lines(folder / "corpus.jsonl.gz", ROWS["corpus"])
    expect(folder, str(folder / "corpus.jsonl"), "corpus.jsonl.gz", "keep one")


@pytest.mark.parametrize("damage", ["cut", "not gzip", "checksum", "body"])
def test_damaged_gz(folder: Path, damage: str) -> None:
    (folder / "corpus.jsonl").unlink()
    file = folder / "corpus.jsonl.gz"
    payload = bytearray(gzip.compress(b'{"text": "abc def"}\n' * 50))
    if damage == "cut":
        payload = payload[:-12]
    elif damage == "not gzip":
        payload = bytearray(b"this is no gzip file")
    elif damage == "checksum":
        payload[-6] ^= 0xFF
    else:
        payload[10:20] = b"\xff" * 10
    file.write_bytes(payload)
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
def test_row_formats(folder: Path, row: dict, prompt: str, responses: tuple, scores: tuple) -> None:
    heldout = folder / "heldout"
    heldout.mkdir()
    for name in ("corpus", "comparisons", "prompts"):
        write_json_lines(heldout / f"{name}.jsonl", ROWS[name])
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


def with_ties(folder: Path, tied: dict, count: int, total: int) -> None:
    rows = [row | (tied if i < count else {}) for i, row in enumerate(ROWS["comparisons"] * 2)][:total]
    rows = [{k: v for k, v in row.items() if not ("ranking" in row and k == "scores")} for row in rows]
    heldout = folder / "heldout"
    heldout.mkdir()
    for name in ("corpus", "comparisons", "prompts"):
        write_json_lines(heldout / f"{name}.jsonl", ROWS[name])
    write_json_lines(folder / "comparisons.jsonl", rows)


@pytest.mark.parametrize("tied", [{"scores": [2, 2]}, {"ranking": [1, 1]}])
@pytest.mark.parametrize("count", [1, 19])
def test_a_few_rows_that_prefer_nothing_are_an_error(folder: Path, tied: dict, count: int) -> None:
    with_ties(folder, tied, count, 40)
    with pytest.raises(DataError) as caught:
        read_folder(folder)
    assert str(caught.value).startswith(f"{folder / 'comparisons.jsonl'}:1: ")
    assert "equal" in str(caught.value) and f"{count} of 40" in str(caught.value)


@pytest.mark.parametrize("tied", [{"scores": [2, 2]}, {"ranking": [1, 1]}])
@pytest.mark.parametrize("count", [20, 39])
def test_rows_that_often_prefer_nothing_are_left_out_with_a_note(folder: Path, tied: dict, count: int) -> None:
    with_ties(folder, tied, count, 40)
    data = read_folder(folder)
    assert len(data.comparisons) == 40 - count and len(data.heldout_comparisons) == 20
    (note,) = data.notes
    assert note.startswith(f"{folder / 'comparisons.jsonl'}:1: ") and "equal" in note
    assert f"{count} of 40" in note and "left out" in note


@pytest.mark.parametrize("tied", [{"scores": [2, 2]}, {"ranking": [1, 1]}])
def test_a_file_of_ties_alone_is_an_error(folder: Path, tied: dict) -> None:
    write_json_lines(folder / "comparisons.jsonl", [PAIR | tied] * 30)
    expect(folder, f"{folder / 'comparisons.jsonl'}:1: ", "equal", "30 of 30 rows")


def test_own_heldout_folder_is_used_and_checked(folder: Path) -> None:
    heldout = folder / "heldout"
    heldout.mkdir()
    for name in ("corpus", "comparisons", "prompts"):
        write_json_lines(heldout / f"{name}.jsonl", ROWS[name][:4])
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
    """A mistake in the data: exit code 2, one message, nothing trained."""

    def run(self, capsys: pytest.CaptureFixture, folder: Path, out: Path, *options: str) -> str:
        arguments = ["run", "--preset", "fast", "--data", str(folder), "--out", str(out), *options]
        assert main(arguments) == 2
        message = capsys.readouterr().err
        assert message.startswith("minirlhf: error: ") and message.count("\n") == 1, message
        if out.exists():
            assert {file.name for file in out.iterdir()} <= {"config.json"}
        return message

    def test_malformed_row(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        where = put(folder, "comparisons", PAIR | {"scores": [2, "2"]})
        assert where in self.run(capsys, folder, tmp_path / "out")

    def test_missing_folder(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        assert "not a folder" in self.run(capsys, tmp_path / "none", tmp_path / "out")

    def test_row_longer_than_the_context(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        long = PAIR | {"responses": ["a", "frog pond " * 200], "scores": [1, 0]}
        where = put(folder, "comparisons", long, line=7)
        message = self.run(capsys, folder, tmp_path / "out", "--context-length", "128")
        assert where in message and "--context-length" in message and "128" in message

    def test_long_demonstration(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        # Of a prompt that is not held out: the split is by the prompt's text.
        prompt = read_folder(folder).demonstrations[0]
        line = int(prompt.where.rsplit(":", 1)[1])
        where = put(folder, "demonstrations", {"prompt": prompt.prompt, "completion": "frog " * 300}, line)
        assert where in self.run(capsys, folder, tmp_path / "out", "--context-length", "128")

    def test_broken_tokenizer_file(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        (folder / "tokenizer.json").write_text("{}")
        assert str(folder / "tokenizer.json") in self.run(capsys, folder, tmp_path / "out")

    @pytest.mark.parametrize("content", ["{bad", "[1]", "{}", '{"seed": "zero"}', '{"seed": true}'])
    def test_broken_world_file(self, folder: Path, tmp_path: Path, capsys, content: str) -> None:
        (folder / "world.json").write_text(content)
        assert f"{folder / 'world.json'}: " in self.run(capsys, folder, tmp_path / "out")

    def test_prompt_of_another_world(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        (folder / "world.json").write_text('{"seed": 0}')
        heldout = folder / "heldout"
        heldout.mkdir()
        known = "where does an owl live ?"
        answered = {"prompt": known, "responses": ["a", "b"], "scores": [1, 0]}
        for place in (folder, heldout):
            write_json_lines(place / "corpus.jsonl", ROWS["corpus"] * 5)
            write_json_lines(place / "prompts.jsonl", [{"prompt": known}] * 4)
            write_json_lines(place / "comparisons.jsonl", [answered] * 4)
        for place, name in ((folder, "prompts"), (heldout, "prompts"), (heldout, "comparisons")):
            file = place / f"{name}.jsonl"
            before = file.read_bytes()
            where = put(place, name, answered | {"prompt": "what is a transistor ?"}, line=3)
            message = self.run(capsys, folder, tmp_path / "out")
            assert f"{where}: gold can't judge" in message and "transistor" in message
            file.write_bytes(before)

    def test_the_mistake_can_be_mended(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        """A mistyped --data must not claim the folder: the corrected command may use the same --out."""
        bad = tmp_path / "bad"
        shutil.copytree(folder, bad)
        put(bad, "corpus", b"{")
        out = tmp_path / "out"
        self.run(capsys, tmp_path / "mistyped", out)
        message = self.run(capsys, bad, out)
        assert f"{bad / 'corpus.jsonl'}:3" in message
