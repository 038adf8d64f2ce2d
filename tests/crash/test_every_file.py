"""Each file of a finished run, damaged in five ways: every command that reads it names it, and writes nothing."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from minirlhf.cli import main
from minirlhf.config import RunConfig
from minirlhf.pipeline.folder import steps_of_run

READ = {  # what each command reads, besides config.json
    "run": ("report.json", "answers.json", *steps_of_run(RunConfig())),
    "chat": ("base", "sft", "ppo", "ppo_ptx"),
    "evaluate": ("base", "sft", "reward_model", "ppo"),
}


def damaged(content: bytes, chance: random.Random) -> Iterator[bytes | None]:
    yield b""
    yield content[: len(content) // 2]
    yield content + b"x"
    place = chance.randrange(len(content))
    yield content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :]
    yield None  # gone


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_every_file(fast_run, refused, tmp_path: Path) -> None:
    run, chance, tried = tmp_path / "run", random.Random(0), 0
    assert main(fast_run(run)) == 0
    whole = contents(run)
    commands = {
        "run": fast_run(run),
        "chat": ["chat", "--run", str(run), "--prompt", "hello"],
        "evaluate": ["evaluate", "--run", str(run), "--checkpoint", "ppo"],
    }
    for name, content in whole.items():
        for replaced in damaged(content, chance):
            file = run / name
            file.unlink() if replaced is None else file.write_bytes(replaced)
            before = contents(run)
            for command, read in READ.items():
                if name != "config.json" and name.split("/")[0] not in read:
                    continue
                if name == "report.json" and replaced is None:
                    continue  # it is measured again
                message = refused(commands[command])
                tried += 1
                # A damaged checksum names the file that it was of; without its settings, the folder is no run.
                assert str(run if name == "config.json" else file.parent) in message, (name, message)
                assert file.name in ("checksums.json", "config.json") or str(file) in message, (name, message)
                assert contents(run) == before
            shutil.rmtree(run)
            for other, kept in whole.items():
                (run / other).parent.mkdir(parents=True, exist_ok=True)
                (run / other).write_bytes(kept)
    assert tried > 500
