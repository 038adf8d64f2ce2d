"""The command line: help, mistakes, exit codes."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Union, get_args, get_origin, get_type_hints

import pytest

import minirlhf
from minirlhf import cli
from minirlhf.cli import COMMANDS, ChatConfig, EvaluateConfig, WorldConfig, _preset_name, main
from minirlhf.config import preset
from minirlhf.control.actor_critic import A2CConfig
from minirlhf.control.ppo import PPOConfig
from minirlhf.errors import UserError


def test_usage_and_version(capsys: pytest.CaptureFixture) -> None:
    for arguments in ([], ["-h"], ["--help"]):
        assert main(arguments) == 0
        said = capsys.readouterr().out
        assert all(command in said for command in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"minirlhf {minirlhf.__version__}\n"


def test_unknown_command(refused) -> None:
    message = refused(["fly"])
    assert "'fly'" in message and all(command in message for command in COMMANDS)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_of_each_command(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    seedless = command in ("round", "export")  # a round keeps its run's seed
    assert ("--seed" in said or seedless) and f"minirlhf {command}" in said


@pytest.mark.parametrize(("name", "seconds"), [("fast", 10.0), ("pretrained", 600.0)])
def test_a_round_is_saved_as_often_as_its_run(name: str, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """And may be sharded."""
    from minirlhf.pipeline import folder

    started = []
    monkeypatch.setattr(folder, "next_round", lambda run, comparisons, out: preset(name))  # as config.json gives it
    monkeypatch.setattr(cli, "_run_to_report", lambda config, command, began: started.append(config))
    command = ["round", "--run", "x", "--comparisons", "y", "--out", "z"]
    assert main(command) == main([*command, "--save-seconds", "5", "--shard"]) == 0
    assert [(one.save_seconds, one.shard) for one in started] == [(seconds, False), (5.0, True)]


def test_help_shows_the_defaults_of_the_preset(capsys: pytest.CaptureFixture) -> None:
    for arguments in (["--preset", "fast"], ["--preset=fast"]):
        with pytest.raises(SystemExit):
            main(["run", *arguments, "--help"])
        assert "runs/fast" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--no-such-option", "1"], ["--seed", "many"], ["--rlhf.stepz", "3"]])
def test_wrong_options_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run", *arguments])
    assert caught.value.code == 2
    shown = capsys.readouterr()
    assert arguments[0] in shown.err + shown.out


@pytest.mark.parametrize("arguments", [["--preset", "slow"], ["--preset=slow"], ["--preset"]])
def test_wrong_preset(arguments: list[str], refused) -> None:
    message = refused(["run", *arguments])
    assert "--preset" in message and "fast" in message


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("--model-size.hidden-size", "30", "hidden-size"),
        ("--base.block-length", "100000", "block-length"),
    ],
)
def test_settings_that_do_not_fit_are_one_message(tmp_path: Path, fast_run, refused, option, value, word) -> None:
    assert word in refused(fast_run(tmp_path / "run", option, value))


WRONG = [
    ("--rlhf.temperature", "0", "0.01 or more"),
    ("--rlhf.clip-range", "0", "above 0"),
    ("--rlhf.value-clip-range", "-1", "above 0"),
    ("--rlhf.beta", "-1", "0 or more"),
    ("--rlhf.target-kl", "0", "above 0"),
    ("--rlhf.kl-horizon", "0", "above 0"),
    ("--rlhf.minibatch-size", "0", "1 or more"),
    ("--rlhf.micro-batch-tokens", "0", "1 or more"),
    ("--rlhf.gamma", "1.5", "from 0 to 1"),
    ("--rlhf.ema-decay", "2", "from 0 to 1"),
    ("--rlhf.lr", "nan", "0 or more"),
    ("--rlhf.warmup", "-1", "0 or more"),
    ("--base.batch-size", "0", "1 or more"),
    ("--base.block-length", "1", "2 or more"),
    ("--base.lr", "inf", "0 or more"),
    ("--sft.epochs", "0", "above 0"),
    ("--sft.batch-size", "-3", "1 or more"),
    ("--reward-model.epochs", "inf", "above 0"),
    ("--reward-model.weight-decay", "-0.1", "0 or more"),
    ("--evaluation.prompts", "0", "1 or more"),
    ("--evaluation.temperature", "0", "0.01 or more"),
    ("--evaluation.corpus-blocks", "0", "1 or more"),
    ("--model-size.heads", "0", "1 or more"),
    ("--model-size.vocab-size", "100", "258 or more"),
    ("--context-length", "0", "2 or more"),
    ("--save-seconds", "-1", "0 or more"),
    ("--seed", "-1", "0 or more"),
    ("--seed", str(2**63), "below 2**63"),
]


@pytest.mark.parametrize(("option", "value", "wanted"), WRONG)
def test_settings_out_of_range_are_named_before_anything_is_made(
    option: str, value: str, wanted: str, tmp_path: Path, fast_run, refused
) -> None:
    message = refused(fast_run(tmp_path / "run", option, value))
    assert message.startswith(f"minirlhf: error: {option} ") and wanted in message
    assert not (tmp_path / "run").exists()


def test_every_numeric_setting_has_a_range() -> None:
    """A new setting whose type says no range fails here; so does one that takes what lies outside its range."""
    run = preset("default")
    parts = [getattr(run, one.name) for one in fields(run) if is_dataclass(getattr(run, one.name))]
    for part in (run, *parts, ChatConfig(), EvaluateConfig(), WorldConfig(Path("none")), PPOConfig(), A2CConfig()):
        for name, hint in get_type_hints(type(part)).items():
            kinds = {hint, *(get_args(hint) if get_origin(hint) in (Union, UnionType) else ())} & {int, float}
            for value in {int: (-1, 0.5, True), float: (-1.0, math.nan)}[kinds.pop()] if kinds else ():
                with pytest.raises(UserError, match=f"{name}|{name.replace('_', '-')} {value}: must be"):
                    replace(part, **{name: value})


@pytest.mark.parametrize("command", ["chat", "evaluate"])
@pytest.mark.parametrize("option", ["--temperature", "--max-response-tokens"])
def test_chat_and_evaluate_name_what_is_out_of_range(command: str, option: str, refused) -> None:
    assert refused([command, option, "0"]).startswith(f"minirlhf: error: {option} 0")


def test_out_is_a_file(tmp_path: Path, fast_run, refused) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    for out in (file, file / "below"):
        assert str(file) in refused(fast_run(out))
    assert file.read_text() == "precious"


def test_keyboard_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def interrupted(arguments: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "run", interrupted)
    assert main(["run"]) == 130
    assert "to continue" in capsys.readouterr().err


def test_world_refuses_a_folder_that_exists(tmp_path: Path, refused) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    assert str(tmp_path) in refused(["world", "--out", str(tmp_path)])
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_module_and_exit_code() -> None:
    done = subprocess.run([sys.executable, "-m", "minirlhf.cli", "fly"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("minirlhf: error:")


def test_presets() -> None:
    fast, default = preset("fast"), preset("default")
    assert fast.out != default.out and fast.rlhf.steps < default.rlhf.steps
    assert fast.rlhf.ptx_coef > 0 and default.rlhf.ptx_coef > 0


def test_preset_on_the_command_line() -> None:
    assert _preset_name([]) == _preset_name(["--seed"]) == "default"
    assert _preset_name(["--preset", "fast"]) == _preset_name(["--seed", "1", "--preset=fast"]) == "fast"
