"""The field's formats: each gives the rows that it means, and goes through all steps."""

import copy
import json
import pickle
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from minirlhf import formats
from minirlhf.cli import main
from minirlhf.data import Comparison, read_folder, read_rankings
from minirlhf.errors import DataError, UserError
from minirlhf.formats import Conversation, Row
from minirlhf.hub import fetch_rows
from minirlhf.labeling import Item, RankingFile

SAMPLES = Path(__file__).parent / "data" / "formats"
PREFERENCES = ("trl.jsonl", "trl_implicit.jsonl", "ultrafeedback.jsonl", "ultrafeedback.parquet", "hh.jsonl")
# Tiny steps: what is tested is that every step takes the rows.
TINY = {
    "--preset": "fast",
    "--base.steps": "2",
    "--base.batch-size": "4",
    "--base.block-length": "8",
    "--sft.epochs": "0.3",
    "--reward-model.epochs": "0.3",
    "--rlhf.steps": "1",
    "--rlhf.batch-size": "4",
    "--rlhf.minibatch-size": "4",
    "--rlhf.max-response-tokens": "4",
    "--rlhf.ptx-batch-size": "2",
    "--evaluation.prompts": "2",
    "--evaluation.max-response-tokens": "4",
    "--evaluation.corpus-blocks": "2",
    "--evaluation.examples": "1",
    "--model-size.hidden-size": "16",
    "--model-size.vocab-size": "300",
    "--device": "cpu",
}
TINY_OPTIONS = [*(word for pair in TINY.items() for word in pair), "--no-side-by-side"]


USER, OTHER, ANSWER = (
    {"role": role, "content": text} for role, text in (("user", "u"), ("user", "v"), ("assistant", "a"))
)
WORSE, EMPTY, SYSTEM = ({"role": r, "content": c} for r, c in (("assistant", "b"), ("assistant", " "), ("system", "s")))
TURNS = Conversation([("user", "u"), ("assistant", "a"), ("user", "v")])
HH = "\n\nHuman: u\n\nAssistant: a\n\nHuman: v\n\nAssistant:"


def needs_pyarrow(name: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")


def parse(kind: str, values: dict):
    return getattr(formats, kind)(Row(values, "file:1"))


UNDERSTOOD = [
    ("comparison", {"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]}, "u"),
    ("comparison", {"prompt": [USER, ANSWER, OTHER], "chosen": [ANSWER], "rejected": [WORSE]}, TURNS),
    ("comparison", {"chosen": [USER, ANSWER], "rejected": [USER, WORSE]}, "u"),
    ("comparison", {"chosen": [USER, ANSWER, OTHER, ANSWER], "rejected": [USER, ANSWER, OTHER, WORSE]}, TURNS),
    ("comparison", {"prompt": "u", "chosen": [ANSWER], "rejected": [WORSE]}, "u"),
    ("comparison", {"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, WORSE]}, "u"),
    ("comparison", {"prompt": "u", "chosen": [USER, ANSWER], "rejected": [USER, WORSE], "messages": [USER]}, "u"),
    ("comparison", {"prompt": [USER], "chosen": "a", "rejected": "b"}, "u"),
    ("comparison", {"chosen": f"{HH} a", "rejected": f"{HH} b"}, TURNS),
    ("comparison", {"prompt": HH, "chosen": " a", "rejected": " b"}, TURNS),
    ("comparison", {"prompt": [USER, ANSWER, OTHER], "responses": ["a", "b"], "scores": [1, 0]}, TURNS),
    ("demonstration", {"prompt": "u", "completion": "a"}, "u"),
    (
        "demonstration",
        {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
        Conversation([("system", "s"), ("user", "u")]),
    ),
    ("demonstration", {"messages": [USER, ANSWER, OTHER, ANSWER]}, TURNS),
    ("demonstration", {"prompt": "u", "prompt_id": "1", "messages": [USER, ANSWER]}, "u"),
    (
        "demonstration",
        {"chosen": [USER, WORSE], "rejected": [USER, ANSWER], "score_chosen": 2, "score_rejected": 2},
        "u",
    ),
    ("prompt", {"prompt": [USER, ANSWER, OTHER]}, TURNS),
    ("prompt", {"messages": [USER, ANSWER]}, "u"),
    ("prompt", {"messages": [USER, ANSWER, OTHER]}, TURNS),
    ("prompt", {"chosen": [USER, ANSWER], "rejected": [USER, WORSE]}, "u"),
    ("prompt", {"prompt": HH}, TURNS),
    ("prompt", {"prompt": "Human: not a dialogue"}, "Human: not a dialogue"),
]


@pytest.mark.parametrize(("kind", "values", "asked"), UNDERSTOOD)
def test_what_is_asked_and_answered(kind: str, values: dict, asked: str) -> None:
    row = parse(kind, values)
    got = row.text if kind == "prompt" else row.prompt
    assert formats.messages_of(got) == formats.messages_of(asked) and row.where == "file:1"
    if kind == "comparison":
        assert [text.strip() for text in row.responses] == ["a", "b"] and row.scores == (1.0, 0.0)
    if kind == "demonstration":
        assert row.completion == ("b" if "chosen" in values else "a")


def test_scores_of_ultrafeedback_are_kept() -> None:
    pair = {"chosen": [USER, ANSWER], "rejected": [USER, WORSE]}
    assert parse("comparison", pair | {"score_chosen": 8.5, "score_rejected": 3}).scores == (8.5, 3.0)


PAIR = {"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]}
REFUSED = [
    ("comparison", PAIR | {"rejected": [ANSWER]}, "are the same text"),
    ("comparison", PAIR | {"rejected": [EMPTY]}, "the last answer of 'rejected' is empty"),
    ("comparison", PAIR | {"rejected": "b"}, "both be texts or both be lists"),
    ("comparison", PAIR | {"rejected": []}, "'rejected' is an empty list"),
    ("comparison", {"prompt": [USER], "chosen": [ANSWER]}, "'rejected' is missing"),
    ("comparison", PAIR | {"chosen": [USER]}, "the last message of 'chosen' must be the assistant's answer"),
    ("comparison", PAIR | {"prompt": [SYSTEM]}, "no user turn"),
    ("comparison", PAIR | {"prompt": [USER, ANSWER]}, "the prompt ends with an answer"),
    ("comparison", PAIR | {"prompt": [{"role": "user", "content": " "}]}, "a message of 'prompt' is empty"),
    ("comparison", PAIR | {"prompt": [{"role": "user"}]}, "each with a role and a content, both strings"),
    ("comparison", PAIR | {"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, r"found another prompt\[0\]"),
    ("comparison", PAIR | {"prompt": [OTHER], "chosen": [USER, ANSWER], "rejected": [USER, WORSE]}, "differ"),
    ("comparison", {"chosen": [USER, ANSWER], "rejected": [OTHER, WORSE]}, "alike up to the last message"),
    ("comparison", PAIR | {"score_chosen": 1, "score_rejected": 2}, "'score_chosen' is below"),
    ("comparison", PAIR | {"score_chosen": 1, "score_rejected": "2"}, "'score_rejected' must be a finite number"),
    ("comparison", {"chosen": f"{HH} a", "rejected": f"{HH} "}, "empty last answer"),
    (
        "comparison",
        {"chosen": "\n\nHuman:\n\nAssistant: a", "rejected": "\n\nHuman:\n\nAssistant: b"},
        "turn .* is empty",
    ),
    ("demonstration", {"prompt": [USER], "completion": [USER, ANSWER]}, "'completion' must be one message"),
    ("demonstration", {"messages": [USER]}, "the last message of 'messages' must be"),
    ("demonstration", {"messages": [ANSWER]}, "no user turn"),
    ("demonstration", {"prompt": "u", "completion": "a", "label": False}, "'label' is false"),
    ("prompt", {"messages": [SYSTEM]}, "no user turn"),
    ("prompt", {"prompt": [{"role": "user", "content": "\ud83d"}]}, "half a surrogate pair"),
]


@pytest.mark.parametrize(("kind", "values", "words"), REFUSED)
def test_what_teaches_nothing_is_refused_by_its_line(kind: str, values: dict, words: str) -> None:
    with pytest.raises(DataError, match=rf"^file:1: .*{words}"):
        parse(kind, values)


def test_a_conversation_is_a_text_and_its_messages() -> None:
    assert TURNS == "Human: u\n\nAssistant: a\n\nHuman: v" and isinstance(TURNS, str)
    for other in (copy.deepcopy(TURNS), pickle.loads(pickle.dumps(TURNS))):
        assert other == TURNS and other.messages == TURNS.messages
    assert formats.prompt_of([("user", "u")]) == "u" and not isinstance(
        formats.prompt_of([("user", "u")]), Conversation
    )


def test_a_ranked_conversation_keeps_its_messages(tmp_path: Path) -> None:
    file, item = RankingFile(tmp_path / "mine.jsonl", "ada"), Item(TURNS, ("a", "b"))
    assert file.append(item, (2, 1)) and not file.append(item, (1, 2))
    (row,) = read_rankings(file.path)
    assert row.prompt.messages == TURNS.messages and row.scores == (-2.0, -1.0)
    assert file.undo([Item("u", ("a", "b")), item]) == item and file.left([item]) == [item]


@pytest.mark.parametrize("name", PREFERENCES)
def test_one_file_of_comparisons_is_enough(name: str) -> None:
    needs_pyarrow(name)
    data = read_folder(SAMPLES / name)
    assert len(data.comparisons) + len(data.heldout_comparisons) == 24 and len(data.heldout_comparisons) == 2
    assert all("behind the door" in row.completion for row in data.demonstrations) and len(data.demonstrations) == 22
    held = {row.text for row in data.heldout_prompts}
    assert len(held) == 2 and not held & {row.prompt for row in (*data.comparisons, *data.demonstrations)}
    assert {row.text for row in data.corpus} == {row.completion for row in data.demonstrations}
    assert not {row.text for row in data.corpus} & {row.text for row in data.heldout_corpus}
    assert data.comparisons[0].where.startswith(f"{SAMPLES / name}:")


def test_parquet_holds_the_rows_of_the_json_lines() -> None:
    needs_pyarrow("x.parquet")
    one, two = (read_folder(SAMPLES / f"ultrafeedback.{ending}") for ending in ("jsonl", "parquet"))
    for a, b in zip(one.comparisons, two.comparisons, strict=True):
        assert (a.prompt, a.responses, a.scores) == (b.prompt, b.responses, b.scores)


def test_damaged_parquet(tmp_path: Path) -> None:
    needs_pyarrow("x.parquet")
    (tmp_path / "rows.parquet").write_bytes((SAMPLES / "ultrafeedback.parquet").read_bytes()[:-40])
    with pytest.raises(DataError, match=r"rows.parquet:1: can't be read"):
        read_folder(tmp_path / "rows.parquet")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "rows.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=re.escape('pyarrow is not installed: pip install "minirlhf[data]"')):
        read_folder(tmp_path / "rows.parquet")


def rows_with(tmp_path: Path, *bad: dict) -> Path:
    """UltraFeedback's sample with bad rows in front."""
    file = tmp_path / "rows.jsonl"
    good = (SAMPLES / "ultrafeedback.jsonl").read_text()
    file.write_text("".join(json.dumps(row) + "\n" for row in bad) + good)
    return file


def test_skipped_rows_are_counted_by_reason(tmp_path: Path) -> None:
    same, tie = PAIR | {"rejected": [ANSWER]}, PAIR | {"score_chosen": 1, "score_rejected": 1}
    file = rows_with(tmp_path, same, same, PAIR | {"rejected": [EMPTY]}, tie)
    with pytest.raises(DataError, match=rf"^{file}:1: .*same text"):
        read_folder(file)
    data = read_folder(file, errors="skip")
    assert len(data.comparisons) + len(data.heldout_comparisons) == 24
    left_out, ties, single = data.notes
    assert left_out.startswith(f"{file}: 3 of 28 rows were left out: 2 x 'chosen' and 'rejected' are the same text")
    assert f"(first: {file}:1); 1 x the last answer of 'rejected' is empty (first: {file}:3)" in left_out
    assert ties.startswith(f"{file}:4: all 2 scores") and ties.endswith("1 of 25 rows are like this and were left out")
    assert "single file" in single


def test_skip_keeps_something_and_forgives_no_damaged_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(PAIR | {"rejected": [ANSWER]}) + "\n")
    with pytest.raises(DataError, match=r"1 of 1 rows were left out: 1 x .* no row is left"):
        read_folder(file, errors="skip")
    file.write_text("{")
    with pytest.raises(DataError, match=f"{file}:1: not valid JSON"):
        read_folder(file, errors="skip")


def test_a_file_of_demonstrations_alone_says_what_is_missing() -> None:
    with pytest.raises(DataError, match="no row compares answers"):
        read_folder(SAMPLES / "messages.jsonl")


def report_of(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


@pytest.mark.parametrize("name", PREFERENCES)
def test_comparisons_go_through_all_steps(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs_pyarrow(name)
    assert main(["run", "--data", str(SAMPLES / name), "--out", str(tmp_path / "run"), *TINY_OPTIONS]) == 0
    report = report_of(tmp_path / "run")
    assert report["heldout_prompts"] == 2 and report["reward_model"]["pairs"] == 2
    assert "single file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["messages.jsonl", "prompt_completion.jsonl"])
def test_demonstrations_go_through_all_steps(name: str, tmp_path: Path, tiny_folder: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for table, source in (
        ("corpus", tiny_folder / "corpus.jsonl"),
        ("demonstrations", SAMPLES / name),
        ("comparisons", SAMPLES / "trl.jsonl"),
        ("prompts", SAMPLES / name),
    ):
        shutil.copy(source, data / f"{table}.jsonl")
    assert main(["run", "--data", str(data), "--out", str(tmp_path / "run"), *TINY_OPTIONS]) == 0
    assert report_of(tmp_path / "run")["reward_model"]["pairs"] > 0


def test_a_run_leaves_out_what_is_too_long_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = {"prompt": [USER], "chosen": [{"role": "assistant", "content": "word " * 400}], "rejected": [WORSE]}
    file, out = rows_with(tmp_path, PAIR | {"rejected": [ANSWER]}, long), tmp_path / "run"
    command = ["run", "--data", str(file), "--out", str(out), *TINY_OPTIONS, "--context-length", "256"]
    assert main(command) == 2
    assert f"{file}:1: " in capsys.readouterr().err and not out.exists()
    assert main([*command, "--data-errors", "skip"]) == 0
    said = capsys.readouterr().err
    assert "1 x 'chosen' and 'rejected' are the same text" in said
    assert f"are longer than the context of 256 tokens (first: {file}:2)" in said
    assert main(["evaluate", "--run", str(out), "--checkpoint", "ppo"]) == 0
    capsys.readouterr()
    assert main(command) == 2, "the same folder with other rows is another run"
    assert "data_errors = skip, not stop" in capsys.readouterr().err


def hub(rows: list[dict], asked: list) -> SimpleNamespace:
    """A module `datasets` that streams rows; with none, a hub that can't be reached."""

    class Stream(list):
        def take(self, count: int) -> list[dict]:
            return self[:count]

    def load_dataset(name, subset, *, split, streaming):
        asked.append((name, subset, split, streaming))
        if not rows:
            raise ConnectionError("no route\nto the hub")
        return Stream(rows)

    return SimpleNamespace(load_dataset=load_dataset)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    """Whether `datasets` seems to be installed is not this machine's business."""
    monkeypatch.setattr("minirlhf.hub.require_installed", lambda module, extra: None)


def test_rows_of_the_hub_are_read_once(installed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list = []
    rows = [json.loads(line) | {"image": b"x"} for line in (SAMPLES / "ultrafeedback.jsonl").open()]
    monkeypatch.setitem(sys.modules, "datasets", hub(rows, asked))
    name = "hub:some/feedback_binarized:train_prefs[:20]"
    file = fetch_rows(name, tmp_path / "hub")
    assert file.name == "some--feedback_binarized--train_prefs--20.jsonl"
    assert [json.loads(line)["prompt"] for line in file.open()] == [row["prompt"] for row in rows[:20]]
    assert fetch_rows(name, tmp_path / "hub") == file
    fetch_rows("hub:some/zen/subset:train", tmp_path / "hub")
    fetch_rows("hub:some/zen", tmp_path / "hub")
    assert asked == [
        ("some/feedback_binarized", None, "train_prefs", True),
        ("some/zen", "subset", "train", True),
        ("some/zen", None, "train", True),
    ]
    data = read_folder(file)
    assert isinstance(data.comparisons[0], Comparison) and len(data.comparisons) == 18


def test_a_run_on_a_data_set_of_the_hub(installed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    rows = [json.loads(line) for line in (SAMPLES / "hh.jsonl").open()]
    monkeypatch.setitem(sys.modules, "datasets", hub(rows, []))
    command = ["run", "--data", "hub:some/hh", "--out", str(tmp_path / "run"), *TINY_OPTIONS]
    assert main(command) == 0
    monkeypatch.setitem(sys.modules, "datasets", hub([], []))
    (tmp_path / "run" / "report.json").unlink()
    assert main(command) == 0, "the same command goes on without the hub"
    other = ["run", "--data", "hub:some/other", "--out", str(tmp_path / "other"), *TINY_OPTIONS]
    capsys.readouterr()
    assert main(other) == 2
    assert "--data hub:some/other: can't be read from the hub (no route to the hub)" in capsys.readouterr().err


def test_names_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("hub:", "hub:alone", "hub:a/b:train[5]", "hub:a/b:train[:0]", "hub:../b/c/d"):
        with pytest.raises(UserError, match="expected hub:OWNER/NAME"):
            fetch_rows(name, tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'datasets is not installed: pip install "minirlhf\[data\]"'):
        fetch_rows("hub:a/b", tmp_path)
