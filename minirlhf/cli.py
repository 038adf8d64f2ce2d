"""The command line: ``minirlhf run | chat | evaluate | label | round | export | world``.

A user error prints one message and exits with code 2. Heavy imports are deferred until a command needs them.
"""

from __future__ import annotations

import getpass
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, get_args

from minirlhf.errors import UserError
from minirlhf.failures import end_quietly, say
from minirlhf.settings import Count, NotNegative, Seed, Settings, Temperature
from minirlhf.worlds import DEFAULT_WORLD, find_world

if TYPE_CHECKING:
    from minirlhf.config import PresetName, RunConfig

T = TypeVar("T")
USAGE = """usage: minirlhf COMMAND [OPTIONS]

commands:
  run        train an aligned model from a folder of text and write a report
  chat       type an instruction and compare the answers of a run's models
  evaluate   evaluate one policy of a run on the held-out prompts
  label      rank answers of a run's policy; the rankings are comparisons to train on
  round      train the reward model on more rankings, and the policies on from where a run ended
  export     write a model of a run as a plain folder of transformers, its adapter merged
  world      write a data folder with known ground truth: the small world or another installed world

minirlhf COMMAND --help explains its options.
"""


@dataclass(frozen=True)
class WorldConfig(Settings, option=""):
    """Write a folder of JSON lines with known ground truth."""

    out: Path
    """Folder to write; must be empty or not exist yet."""
    seed: Seed = 0
    """Each seed makes a different world."""
    name: str = DEFAULT_WORLD
    """An installed world: "small", or one from another package."""


@dataclass(frozen=True)
class ChatConfig(Settings, option=""):
    """Type instructions and compare the answers of a run's models."""

    run: Path = Path("runs/default")
    """Folder of a finished run."""
    prompt: tuple[str, ...] = ()
    """Answer these and exit instead of asking."""
    temperature: Temperature = 0.7
    """Sampling temperature; lower is safer."""
    greedy: bool = False
    """Always take the most likely token."""
    max_response_tokens: Count | None = None
    """Maximum tokens per answer; default: as in the run's evaluation."""
    seed: Seed = 0
    """Random seed for sampling."""


@dataclass(frozen=True)
class EvaluateConfig(Settings, option=""):
    """Evaluate one policy of a run, or any causal model, on the held-out prompts and print JSON."""

    run: Path = Path("runs/default")
    """Folder of a finished run: supplies the data, the judge and the SFT model to compare with."""
    checkpoint: str | None = None
    """A policy of the run (base, sft, ppo, ppo_ptx, rloo, grpo, dpo) or the folder of a causal model with the same
    vocabulary; default: of its methods, the last in this list."""
    prompts: Count | None = None
    """Held-out prompts to answer; default, here and below: as in the run's evaluation."""
    temperature: Temperature | None = None
    """Sampling temperature."""
    max_response_tokens: Count | None = None
    """Maximum tokens per answer."""
    seed: Seed = 0
    """Random seed for sampling."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    reward: str | None = None
    """FILE.py:FUNCTION of a run whose reward is a function: the one that it was trained with."""


@dataclass(frozen=True)
class ExportConfig(Settings, option=""):
    """Write a model of a run as a plain folder of transformers; an adapter is merged into its body."""

    out: Path
    """Folder to write; must be empty or not exist yet."""
    run: Path = Path("runs/default")
    """Folder of a run."""
    step: str | None = None
    """base, sft, reward_model, ppo, ppo_ptx, rloo, grpo or dpo; default: of its methods, the last in this list."""


@dataclass(frozen=True)
class LabelConfig(Settings, option=""):
    """Rank the answers that a policy of a run gives to training prompts, and append each ranking to a file."""

    out: Path
    """JSON-lines file to append the rankings to, for minirlhf run --comparisons or minirlhf round."""
    run: Path = Path("runs/default")
    """Folder of a run."""
    data: Path | None = None
    """Folder whose training prompts are answered; default: the run's."""
    policy: str | None = None
    """base, sft, ppo, ppo_ptx, rloo, grpo or dpo; default: the last of these that is finished."""
    prompts: Count = 20
    """Prompts to rank answers for."""
    answers: Count = 4
    """K, answers per prompt: 2 to 9."""
    temperature: Temperature = 1.0
    """Sampling temperature."""
    labeler: str | None = None
    """Your name, written with every ranking; default: your user name."""
    seed: Seed = 0
    """Chooses prompts and answers; the same seed goes on where you stopped."""


@dataclass(frozen=True)
class RoundConfig(Settings, option=""):
    """Steps 2 and 3 once more: the reward model on old and new rankings, its methods on from the policies of a run."""

    run: Path
    """Folder of a finished run."""
    comparisons: tuple[Path, ...]
    """Files of new rankings, beside those that the run was trained on."""
    out: Path
    """Folder of the next round; the same command resumes it."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    save_seconds: NotNegative | None = None
    """Seconds between saves of the training state; default: as in the preset of the run."""
    shard: bool = False
    """With several processes (torchrun), split every model that is trained over them (FSDP2)."""
    allow_shared_rows: bool = False
    """Train although more than 5 % of the held-out rows are in the training files too."""
    allow_oversize: bool = False
    """Start although the round would take more memory than is free, by the estimate made before training."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0 on success, 2 on a user error, 1 on a bug of ours, 130 on Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if arguments[0] == "--version":
        from minirlhf import __version__

        print(f"minirlhf {__version__}")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        print(f"minirlhf: error: unknown command {command!r}; use one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if _several() and command not in ("run", "round"):
        _say(f"error: {command} is for one process; start it without torchrun")
        return 2
    try:
        COMMANDS[command](rest)
    except KeyboardInterrupt:
        _say("stopped; run the same command again to continue", before="\n")
        return 128 + signal.SIGINT
    except BrokenPipeError:
        return end_quietly()
    except Exception as error:  # every other failure becomes one sentence; none is hidden
        return say(error, arguments, aloud=_speaks())
    return 0


def _several() -> bool:
    return os.environ.get("WORLD_SIZE", "") not in ("", "0", "1")  # torchrun sets it


def _speaks() -> bool:
    """Whether this process says why the command ends: of several that fail, one does."""
    if not _several():
        return True
    from minirlhf import parallel

    return parallel.speaks()


def _say(message: str, before: str = "") -> None:
    if _speaks():
        print(f"{before}minirlhf: {message}", file=sys.stderr)


def _parse(cls: type[T], command: str, arguments: Sequence[str], default: T | None = None) -> T:
    import tyro

    prog, prints = f"minirlhf {command}", not _several() or os.environ.get("RANK") == "0"
    if default is None:
        return tyro.cli(cls, prog=prog, args=arguments, console_outputs=prints)
    return tyro.cli(cls, prog=prog, args=arguments, default=default, console_outputs=prints)


def _run(arguments: list[str]) -> None:
    began = time.monotonic()  # before the heavy imports: the user waits for them too
    from minirlhf.config import RunConfig, preset

    default = preset(_preset_name(arguments), lora=any(given.split("=")[0] == "--lora.rank" for given in arguments))
    config = _parse(RunConfig, "run", arguments, default)
    _run_to_report(config, "minirlhf run " + shlex.join(arguments), began)


def _run_to_report(config: RunConfig, command: str, began: float) -> None:
    from minirlhf import parallel
    from minirlhf.pipeline import run_pipeline
    from minirlhf.pipeline.folder import find_device, locked
    from minirlhf.report import summary_table, write_report

    with parallel.joined(find_device(config.device), shard=config.shard):
        run_pipeline(config, command=command, began=began)
        if parallel.rank() > 0:
            return
    page = config.out / "report.html"
    with locked(config.out):
        if not page.is_file():  # an existing page shows these measurements
            write_report(config.out)
    print(summary_table(config.out))
    print(f"report: {page}")
    print(f"talk to the models: minirlhf chat --run {config.out}")


def _label(arguments: list[str]) -> None:
    config = _parse(LabelConfig, "label", arguments)
    from minirlhf.labeling import RankingFile, label_in_terminal
    from minirlhf.pipeline.label import items_to_rank

    file = RankingFile(config.out, _user() if config.labeler is None else config.labeler)
    items = items_to_rank(
        config.run,
        data=config.data,
        policy=config.policy,
        prompts=config.prompts,
        answers=config.answers,
        temperature=config.temperature,
        seed=config.seed,
    )
    done = label_in_terminal(file, items)
    print(f"{done} of {len(items)} ranked in {config.out}")
    if done:
        following = ["--run", config.run, "--comparisons", config.out, "--out", f"{config.run}-next"]
        print("train on them: minirlhf round " + shlex.join(map(str, following)))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, ImportError, OSError):  # a container's user may have no name
        return ""


def _round(arguments: list[str]) -> None:
    began = time.monotonic()
    config = _parse(RoundConfig, "round", arguments)
    from minirlhf.config import preset
    from minirlhf.pipeline.folder import next_round

    following = next_round(config.run, config.comparisons, config.out)
    seconds = preset(following.preset).save_seconds if config.save_seconds is None else config.save_seconds
    kept = {name: getattr(config, name) for name in ("device", "shard", "allow_shared_rows", "allow_oversize")}
    following = replace(following, save_seconds=seconds, **kept)
    _run_to_report(following, "minirlhf round " + shlex.join(arguments), began)


def _preset_name(arguments: Sequence[str]) -> PresetName:
    """The preset on the command line: it sets the defaults that --help shows and other options override."""
    from minirlhf.config import PresetName

    chosen = "default"
    for flag, value in zip(arguments, [*arguments, ""][1:], strict=True):
        if flag == "--preset":
            chosen = value
        elif flag.startswith("--preset="):
            chosen = flag.split("=", 1)[1]
    for name in get_args(PresetName):
        if name == chosen:
            return name
    raise UserError(f"--preset {chosen}: choose one of {', '.join(get_args(PresetName))}")


def _world(arguments: list[str]) -> None:
    config = _parse(WorldConfig, "world", arguments)
    try:
        find_world(config.name).write(config.out, config.seed)
    except FileExistsError as error:
        raise UserError(str(error)) from None
    print(f"wrote {config.out}")


def _chat(arguments: list[str]) -> None:
    config = _parse(ChatConfig, "chat", arguments)
    from minirlhf.pipeline.chat import chat

    chat(
        config.run,
        prompts=config.prompt,
        temperature=config.temperature,
        greedy=config.greedy,
        max_response_tokens=config.max_response_tokens,
        seed=config.seed,
    )


def _evaluate(arguments: list[str]) -> None:
    config = _parse(EvaluateConfig, "evaluate", arguments)
    import json

    from minirlhf.pipeline.evaluate import evaluate_checkpoint
    from minirlhf.pipeline.folder import read_config

    names = ("prompts", "temperature", "max_response_tokens")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    settings = replace(read_config(config.run).evaluation, **given)
    measured = evaluate_checkpoint(config.run, config.checkpoint, settings, config.seed, config.device, config.reward)
    print(json.dumps(measured, indent=2))


def _export(arguments: list[str]) -> None:
    config = _parse(ExportConfig, "export", arguments)
    from minirlhf.pipeline.export import export_model

    export_model(config.run, config.step, config.out)
    print(f"wrote {config.out}")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "run": _run,
    "chat": _chat,
    "evaluate": _evaluate,
    "label": _label,
    "round": _round,
    "export": _export,
    "world": _world,
}

if __name__ == "__main__":
    sys.exit(main())
