"""The folder of data: whole or not at all, and the same bytes each time."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from minirlhf_course.world import World, write_world
from minirlhf_course.world import write as writing

SMALL = {"corpus": 200, "demonstrations": 60, "comparisons": 30, "prompts": 60}
SMALL |= {"heldout_corpus": 40, "heldout_prompts": 50, "heldout_comparisons": 20}
FILES = {f"{part}{name}.jsonl.gz" for part in ("", "heldout/") for name in ("comparisons", "corpus", "prompts")}
FILES |= {"demonstrations.jsonl.gz", "tokenizer.json", "world.json"}


def rows(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "world"
    write_world(out, seed=0, **SMALL)
    return out


def test_the_folder_holds_what_the_pipeline_reads(folder: Path, labelers) -> None:
    assert set(digests(folder)) == FILES
    assert len(rows(folder / "corpus.jsonl.gz")) == 200
    assert set(rows(folder / "demonstrations.jsonl.gz")[0]) == {"prompt", "completion"}
    assert set(rows(folder / "comparisons.jsonl.gz")[0]) == {"prompt", "responses", "scores", "labeler"}
    about = json.loads((folder / "world.json").read_text())
    assert about["seed"] == 0 and about["sizes"] == SMALL
    heldout = rows(folder / "heldout/comparisons.jsonl.gz")
    names = {labeler.name for labeler in labelers}
    assert len(heldout) == 40
    for ours, theirs in zip(heldout[::2], heldout[1::2], strict=True):
        assert ours["responses"] == theirs["responses"] and ours["prompt"] == theirs["prompt"]
        assert ours["labeler"] in names and theirs["labeler"] not in names
    train = {row["text"] for row in rows(folder / "corpus.jsonl.gz")}
    assert not train & {row["text"] for row in rows(folder / "heldout/corpus.jsonl.gz")}


def test_the_same_seed_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_world(tmp_path / "empty", seed=0, **SMALL)
    assert digests(tmp_path / "empty") == digests(folder)
    write_world(tmp_path / "other_seed", seed=1, **SMALL)
    assert digests(tmp_path / "other_seed") != digests(folder)


@pytest.mark.slow
def test_the_shipped_folder_is_what_is_written_today(tmp_path: Path) -> None:
    write_world(tmp_path / "today")
    assert digests(tmp_path / "today") == digests(Path(__file__).parents[3] / "data" / "small_world")


def test_the_tokenizer_knows_every_word(folder: Path, world: World) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == len(world.vocabulary) + 3 <= 512
    assert [tokenizer.token_to_id(token) for token in ("<pad>", "<eos>", "<unk>")] == [0, 1, 2]
    encoded = tokenizer.encode("where do frogs live ? \n frogs live in a pond . <eos> zebra")
    assert encoded.tokens[-2:] == ["<eos>", "<unk>"] and "\n" in encoded.tokens
    text = "say this in a polite way : give me the cake \n please give me the cake ."
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_full_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        write_world(tmp_path / "mine", **SMALL)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.txt"]


def test_an_unknown_size_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown size\(s\) \['prompt'\]"):
        write_world(tmp_path / "new", prompt=3)


def test_nothing_is_left_behind_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(writing, "_tokenizer", fail)
    with pytest.raises(RuntimeError, match="disk on fire"):
        write_world(tmp_path / "new", **SMALL)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_the_same_bytes_in_any_process_and_then_refuses(tmp_path: Path, folder: Path) -> None:
    sizes = [f"--{name.replace('_', '-')}={size}" for name, size in SMALL.items()]
    command = [sys.executable, "-m", "minirlhf_course.world", str(tmp_path / "out"), *sizes]
    environment = os.environ | {"PYTHONHASHSEED": "1"}  # this process draws its own
    subprocess.run(command, env=environment, check=True)
    assert digests(tmp_path / "out") == digests(folder)
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 1 and "not an empty folder" in again.stderr
