"""What a user reads when something fails: one sentence, never a traceback."""

import errno
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import jinja2
import pytest
import torch
from safetensors import SafetensorError

from minirlhf import cli
from minirlhf.checkpoints import save_state, write_text
from minirlhf.cli import main
from minirlhf.config import RunConfig
from minirlhf.errors import TrainingError, UserError, visible
from minirlhf.failures import say
from minirlhf.pipeline import beside
from minirlhf.pipeline.inputs import load_inputs

FORESEEN = {
    "a wrong setting": (UserError("--steps 0: give at least 1"), "--steps 0: give at least 1"),
    "a full disk": (OSError(errno.ENOSPC, "No space left on device", "out/x"), "the disk is full"),
    "a full disk, in Rust": (SafetensorError("Error: I/O error: No space left on device (os error 28)"), "free some"),
    "a size limit": (OSError(errno.EFBIG, "File too large"), "larger than this disk or ulimit -f allows"),
    "a quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full"),
    "memory": (MemoryError(), "not enough memory"),
    "memory, in torch": (
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        "not enough memory",
    ),
    "a template": (jinja2.TemplateSyntaxError("unexpected end", 3), "chat template"),
    "a vocabulary": (IndexError("index out of range in self"), "beyond the model's vocabulary"),
    "a terminal": (UnicodeEncodeError("ascii", "ä", 0, 1, "ordinal not in range"), "set PYTHONUTF8=1"),
    "nesting": (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
    "a package": (ModuleNotFoundError("No module named 'tyro'", name="tyro"), "tyro is not installed"),
    "a permission": (PermissionError(errno.EACCES, "Permission denied", "out/x"), "Permission denied: 'out/x'"),
}


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(arguments: list[str]) -> None:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "chat", fail)


@pytest.mark.parametrize("name", list(FORESEEN))
def test_what_can_be_mended_is_said_in_one_line(name: str, refused, monkeypatch: pytest.MonkeyPatch) -> None:
    error, words = FORESEEN[name]
    failing(monkeypatch, error)
    message = refused(["chat"])
    assert words in message and "bug" not in message


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        IndexError("list index out of range"),
        AssertionError(),
        RuntimeError("shapes differ"),
        ValueError("y"),
    ],
)
def test_a_bug_leaves_a_report(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    failing(monkeypatch, error)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["chat", "--prompt", "hello"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said and type(error).__name__ in said
    report = Path(re.search(r"attach (\S+)", said)[1])
    text = report.read_text(encoding="utf-8")
    assert report.parent == tmp_path and "Traceback" in text and "minirlhf chat --prompt hello" in text
    assert torch.__version__ in text


def test_a_report_that_can_not_be_written(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    failing(monkeypatch, KeyError("x"))
    monkeypatch.setattr("tempfile.tempdir", "/no/such/folder")
    assert main(["chat"]) == 1
    assert "could not be written" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="a limit of the file size is POSIX's")
@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_text(path, "x" * 100_000),
        lambda path: save_state(path, {"weight": torch.zeros(100_000)}, {}),  # in Rust
    ],
)
def test_a_limit_of_the_file_size(write, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import resource

    _, most = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, most))
    try:
        with pytest.raises(Exception, match=r"File too large") as caught:
            write(tmp_path / "state")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert say(caught.value) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "ulimit -f" in said and not (tmp_path / "state").exists()


@pytest.mark.parametrize(("code", "wanted"), [(2, 2), (1, 1), (3, 1)])
def test_the_command_exits_as_its_child_did(
    code: int, wanted: int, tmp_path: Path, tiny_folder: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(beside, "COMMAND", f"raise SystemExit({code})")
    config = RunConfig(data=tiny_folder, out=tmp_path)
    config = replace(config, base=replace(config.base, block_length=8))
    inputs = load_inputs(config, tiny_folder)
    with (
        pytest.raises(TrainingError, match=f"ppo stopped with exit code {code}") as caught,
        beside.step_beside(config, "ppo", "ppo_ptx", inputs, 1, False),
    ):
        for _ in range(6000):  # interrupted by the child's end
            time.sleep(0.01)
    assert say(caught.value) == wanted
    assert "Traceback" not in capsys.readouterr().err


def test_a_strange_number_of_processes(monkeypatch: pytest.MonkeyPatch, refused) -> None:
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert "chat is for one process" in refused(["chat"])


def test_nothing_that_a_file_holds_moves_the_cursor(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, UserError("row 3: \x1b[2J\x07 \u202e is no answer"))
    assert r"\x1b[2J\x07 \u202e is no answer" in refused(["chat"])
    assert visible("ä ✓ 漢字 \t") == "ä ✓ 漢字 \t"
    assert visible("one\u2028two\u2029 \x85 \ud83d") == r"one\u2028two\u2029 \x85 \ud83d"


@pytest.mark.parametrize("text", ["می\u200cخواهم", "क्\u200dष", "👩\u200d🚀"])
def test_joiners_belong_to_the_text(text: str) -> None:
    assert visible(text) == text
