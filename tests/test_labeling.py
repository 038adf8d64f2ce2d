"""Rankings by a person: parsed as typed, on the disk when acknowledged, never lost, never doubled."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from minirlhf.data import Prompt, read_folder, read_rankings
from minirlhf.errors import DataError, UserError
from minirlhf.labeling import Item, RankingFile, label_in_terminal, parse_ranking, visible
from minirlhf.pipeline.inputs import _add_rankings

ITEMS = [Item(f"prompt {i}", ("one", "two", "three")) for i in range(4)]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def typist(*lines: str):
    """Answers as a person at the terminal, then the end of the input."""
    waiting = list(lines)

    def ask(_: str) -> str:
        if not waiting:
            raise EOFError
        return waiting.pop(0)

    return ask


@pytest.fixture
def file(tmp_path: Path) -> RankingFile:
    return RankingFile(tmp_path / "mine.jsonl", "ada")


@given(st.integers(2, 9).flatmap(lambda k: st.lists(st.integers(1, k), min_size=k, max_size=k)))
def test_every_ranking_can_be_typed(wanted: list[int]) -> None:
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    typed = "".join(("=" if n and wanted[i] == wanted[order[n - 1]] else " ") + str(i + 1) for n, i in enumerate(order))
    places = parse_ranking(typed, len(wanted))
    assert all(
        (places[a] < places[b]) == (wanted[a] < wanted[b]) for a in range(len(wanted)) for b in range(len(wanted))
    )
    assert sorted(places)[0] == 1


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("2 1", "3 is missing"),
        ("", "1 is missing"),
        ("1 2 3 4", "4 is not one of the answers"),
        ("1 2 2 3", "2 is named twice"),
        ("best", "b is not one"),
        ("1 2 3=", "a tie is between two"),
        ("=1 2 3", "a tie is between two"),
    ],
)
def test_a_typing_mistake_is_named(typed: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_ranking(typed, 3)


def test_a_row_is_a_comparison_with_name_and_time(file: RankingFile) -> None:
    assert file.append(ITEMS[0], (2, 1, 2))
    (row,) = rows(file.path)
    assert row["labeler"] == "ada" and row["time"].endswith("+00:00")
    (read,) = read_rankings(file.path)
    assert (read.prompt, read.responses, read.labeler) == ("prompt 0", ("one", "two", "three"), "ada")
    assert read.scores[1] > read.scores[0] == read.scores[2]


def test_an_item_is_ranked_once_by_each_labeler(file: RankingFile) -> None:
    second, other = RankingFile(file.path, "ada"), RankingFile(file.path, "grace")
    assert file.append(ITEMS[0], (1, 2, 3)) and not second.append(ITEMS[0], (3, 2, 1))
    assert other.append(ITEMS[0], (3, 2, 1))
    assert [row["labeler"] for row in rows(file.path)] == ["ada", "grace"]
    assert file.left(ITEMS) == ITEMS[1:]


def test_undo_takes_back_only_the_labelers_own_last(file: RankingFile) -> None:
    other = RankingFile(file.path, "grace")
    assert file.append(ITEMS[0], (1, 2, 3)) and file.append(ITEMS[1], (1, 2, 3)) and other.append(ITEMS[1], (1, 1, 1))
    assert file.undo(ITEMS) == ITEMS[1]
    assert [(row["prompt"], row["labeler"]) for row in rows(file.path)] == [("prompt 0", "ada"), ("prompt 1", "grace")]
    assert file.undo(ITEMS[1:]) is None, "what can't be ranked again now stays"
    assert file.undo(ITEMS) == ITEMS[0] and file.undo(ITEMS) is None


@pytest.mark.parametrize("ranking", [(1, 2), (0, 1, 2), (1, 2, 4), (1, 2, 2.5), (True, 2, 3)])
def test_a_ranking_that_is_none_is_not_written(file: RankingFile, ranking: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="3 places from 1 to 3"):
        file.append(ITEMS[0], ranking)
    assert not file.path.exists()


def test_a_line_cut_by_a_power_failure_is_dropped_and_a_whole_one_kept(file: RankingFile) -> None:
    file.append(ITEMS[0], (1, 2, 3))
    whole = file.path.read_bytes()
    file.path.write_bytes(whole + whole[:40])
    again = RankingFile(file.path, "ada")
    assert file.path.read_bytes() == whole
    file.path.write_bytes(whole.rstrip(b"\n"))
    assert again.append(ITEMS[1], (1, 2, 3)) and len(rows(file.path)) == 2


@pytest.mark.parametrize("text", ["my thesis", '{\n  "a": 1\n}', '{"prompt": "a"}\n{"name": 1', "\ufeff{"])
def test_a_file_of_something_else_is_refused_as_it_was(tmp_path: Path, text: str) -> None:
    other = tmp_path / "other.txt"
    other.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"other.txt:\d: "):
        RankingFile(other, "ada")
    assert other.read_text(encoding="utf-8") == text


def test_a_line_cut_within_a_character_is_dropped_by_whoever_looks_next(file: RankingFile) -> None:
    file.append(Item("où ?", ("là", "ici")), (1, 2))
    whole = file.path.read_bytes()
    for cut in range(1, len(whole) - 2):
        file.path.write_bytes(whole + whole[:cut])
        assert file.left(ITEMS) == ITEMS and file.path.read_bytes() == whole


def test_a_link_and_another_folder_lead_to_the_same_file(
    tmp_path: Path, file: RankingFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link.jsonl").symlink_to(file.path)
    linked = RankingFile(tmp_path / "link.jsonl", "ada")
    assert linked.append(ITEMS[0], (1, 2, 3)) and linked.undo(ITEMS) == ITEMS[0] and file.left(ITEMS) == ITEMS
    assert (tmp_path / "link.jsonl").is_symlink()
    monkeypatch.chdir(tmp_path)
    relative = RankingFile(Path("mine.jsonl"), "ada")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert relative.append(ITEMS[0], (1, 2, 3)) and len(rows(file.path)) == 1


def test_the_disk_has_the_name_of_a_new_file_too(file: RankingFile, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        synced.append(file.path.parent if os.path.samestat(os.fstat(handle), file.path.parent.stat()) else file.path)
        real(handle)

    monkeypatch.setattr("os.fsync", fsync)
    for number in (0, 1):
        assert file.append(ITEMS[number], (1, 2, 3))
    assert synced == [file.path, file.path.parent, file.path]


def test_a_process_that_never_lets_go_is_named(file: RankingFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minirlhf.labeling.LOCK_SECONDS", 0.1)
    with FileLock(file.path.with_name("mine.jsonl.lock")), pytest.raises(UserError, match="another process"):
        file.append(ITEMS[0], (1, 2, 3))
    assert file.append(ITEMS[0], (1, 2, 3))


def test_what_is_refused(tmp_path: Path) -> None:
    for path, name, said in (
        (tmp_path, "ada", "is a folder"),
        (tmp_path / "x.jsonl", " ", "needs a name"),
        (tmp_path / "x.jsonl.gz", "ada", "plain file"),
    ):
        with pytest.raises(UserError, match=said):
            RankingFile(path, name)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"bad.jsonl:1: field 'responses'"):
        RankingFile(tmp_path / "bad.jsonl", "ada")


def test_the_terminal_ranks_skips_takes_back_and_goes_on(file: RankingFile, capsys: pytest.CaptureFixture) -> None:
    assert label_in_terminal(file, ITEMS, typist("3 2 1", "s", "1 2 9", "1=2=3", "u", "2 1 3", "q")) == 2
    assert [(row["prompt"], row["ranking"]) for row in rows(file.path)] == [
        ("prompt 0", [3, 2, 1]),
        ("prompt 2", [2, 1, 3]),
    ]
    assert "9 is not one of the answers" in capsys.readouterr().out
    assert label_in_terminal(file, ITEMS, typist("123", "123")) == 4
    shown = capsys.readouterr().out
    assert "prompt 1" in shown and "prompt 3" in shown and "prompt 0" not in shown


def test_an_answer_cannot_steer_the_terminal(file: RankingFile, capsys: pytest.CaptureFixture) -> None:
    label_in_terminal(file, [Item("\x1b[2J", ("\x1b]0;title\x07", "\u202egnp", "plain"))], typist())
    shown = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\u202e"} & set(shown) and "\\x1b[2J" in shown
    assert visible("äöü ✓ 漢字") == "äöü ✓ 漢字"


def test_taking_back_asks_only_what_was_taken_back(file: RankingFile, capsys: pytest.CaptureFixture) -> None:
    RankingFile(file.path, "ada").append(Item("of the last round", ("one", "two")), (1, 2))
    assert label_in_terminal(file, ITEMS[:1], typist("u", "1 2 3")) == 1
    assert "nothing to take back" in capsys.readouterr().out
    assert [row["prompt"] for row in rows(file.path)] == ["of the last round", "prompt 0"]


def test_the_second_line_of_an_answer_is_no_second_answer(file: RankingFile, capsys: pytest.CaptureFixture) -> None:
    label_in_terminal(file, [Item("p", ("one\n  2  false", "two"))], typist())
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("  2")] == ["  2  two"]


def test_held_out_prompts_and_a_file_that_is_given_twice_add_nothing(
    file: RankingFile, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = read_folder(tiny_folder)
    held = Item("asked at the end alone", ("one", "two"))
    folder.heldout_prompts.append(Prompt(held.prompt))
    assert file.append(ITEMS[0], (1, 2, 3)) and file.append(held, (1, 2)) and file.append(ITEMS[1], (1, 1, 1))
    before = list(folder.comparisons)
    monkeypatch.chdir(file.path.parent)
    _add_rankings(folder, (file.path, Path("mine.jsonl")))  # the last round's, and the same with more rows
    assert [row.prompt for row in folder.comparisons[len(before) :]] == ["prompt 0"]
    assert [note.split(": ")[-1] for note in folder.notes] == [
        "1 of 3 rows state no preference (all answers tied) and were left out",
        "1 of 3 rows are of held-out prompts and were left out",
    ]


def test_a_user_without_a_name_is_asked_for_one(tmp_path: Path, refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 4711")

    monkeypatch.setattr("getpass.getuser", nobody)
    label = ["label", "--run", str(tmp_path), "--out", str(tmp_path / "x.jsonl")]
    assert "give --labeler NAME" in refused(label)
    assert "not a run" in refused([*label, "--labeler", "ada"])


LABELER = """
import sys, time
from pathlib import Path
from minirlhf.labeling import Item, RankingFile
file = RankingFile(Path(sys.argv[1]), "ada")
items = file.left([Item(f"prompt {i}", ("one", "two")) for i in range(3000)][:: int(sys.argv[2])])
print("ready", flush=True)
for item in items:
    time.sleep(0.01)
    if file.append(item, (1, 2)):
        print(item.prompt, flush=True)
"""


def test_twenty_kills_and_a_second_window_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    path, draw, acknowledged = tmp_path / "mine.jsonl", random.Random(0), []
    for _ in range(10):
        windows = [
            subprocess.Popen([sys.executable, "-c", LABELER, path, order], stdout=subprocess.PIPE, text=True)
            for order in ("1", "-1")  # from the first item on, and from the last one back
        ]
        assert all(window.stdout.readline() == "ready\n" for window in windows)
        acknowledged.append(windows[0].stdout.readline().rstrip())
        time.sleep(0.1 * draw.random())
        for window in windows:
            window.send_signal(signal.SIGKILL)
        for window in windows:
            acknowledged += window.communicate()[0].split("\n")[:-1]
    RankingFile(path, "ada")
    written = Counter(row["prompt"] for row in rows(path))
    assert len(acknowledged) >= 10 and set(acknowledged) <= set(written) and set(written.values()) == {1}
