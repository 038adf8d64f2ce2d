"""A run's folder: what is in it, how to load it, and the lock that keeps a second run out.

config.json  report.json  report.html  answers.json
base/  sft/  reward_model/      each a checkpoint with metrics.jsonl and summary.json
ppo/  ppo_ptx/  rloo/ ...       the same, one for each --method
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout

from minirlhf.checkpoints import is_whole, verify_model
from minirlhf.config import METHODS, RunConfig, config_from_dict
from minirlhf.errors import CheckpointError, UserError
from minirlhf.language.adapters import is_adapter, load_adapter
from minirlhf.language.models import context_in, half, load_causal_model, load_scalar_model, share
from minirlhf.language.tokenization import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STEPS = ("base", "sft", "reward_model", *METHODS)
"""All steps that a run can have; see `steps_of_run` for those that one has."""
POLICIES = ("base", "sft", *METHODS)
SECTIONS = ("model_size", "base", "sft", "reward_model", "rlhf", "evaluation")  # of config.json, one dataclass each
LOCK = "run.lock"
LONGEST_ANSWERS = 2**26
"""Bytes of answers.json, a few rows of text: a larger file is not of a run, and is never read."""
FORMAT = 2
"""Of a run's folder, in its config.json. It grows when an older run can't be continued or read; 0.1 wrote none."""


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold a run's folder for this process: two runs would write over each other's files.

    The operating system lets go of the lock when the process ends, however that happens, so the file that a killed run
    leaves holds nobody up. Folders that were made for the lock and are still empty afterwards are removed again.

    Args:
        out: the run's folder; made where it isn't there.

    Raises:
        UserError: another process works in the folder.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(
            f"another minirlhf run is working in {out}: wait until it is done, or choose another --out"
        ) from None
    try:
        yield
    finally:
        with contextlib.suppress(PermissionError):  # Windows removes no file that is open
            (out / LOCK).unlink(missing_ok=True)  # while it is held: nobody else's lock can be removed
        lock.release()
        for folder in made:
            if any(folder.iterdir()):
                break
            folder.rmdir()


def find_device(name: str) -> torch.device:
    """The device of ``--device``; auto takes CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}; use auto, cpu or cuda") from None
    return device


def hide_loading_bars() -> None:
    """Keep transformers from drawing a progress bar for each of the small models it loads and saves."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def read_config(run: Path) -> RunConfig:
    """The settings that a run was started with; its `data` is the folder that was found.

    Raises:
        CheckpointError: the folder is no run of minirlhf, or its config.json is damaged.
    """
    return config_from_dict(read_settings(run), run)


def read_settings(run: Path) -> dict[str, Any]:
    """The content of a run's config.json: its settings and the checksums of its data.

    Raises:
        CheckpointError: the folder is no run of minirlhf, or its config.json is damaged.
    """
    file = run / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{run}: not a run of minirlhf; begin one with: minirlhf run --out {run}")
    kinds = {"data": str, "seed": int} | dict.fromkeys(SECTIONS, dict)
    settings = _read_object(file, kinds, f"delete {run} and run again")
    settings.pop("sha256", None)
    found = settings.get("format")
    if found != FORMAT:
        made = "minirlhf 0.1" if found is None else "another version of minirlhf"
        raise CheckpointError(
            f"{run}: a run of {made}, which this version can neither continue nor read; choose another --out, or go "
            "back to the version that made it"
        )
    return settings


def next_round(run: Path, comparisons: Sequence[Path], out: Path) -> RunConfig:
    """The settings of the round after a run: steps 2 and 3 again, by the run's methods, with more rankings.

    The seed stays: in a folder of data without ``heldout/`` it decides which prompts were never trained on.

    Args:
        run: a finished run.
        comparisons: files of new rankings; those of the run stay.
        out: folder of the next round.

    Raises:
        CheckpointError: the run is not finished.
        UserError: no file of rankings is given, `out` is the run itself, or its reward is a function.
    """
    config, settings = read_config(run), read_settings(run)
    if settings.get("reward") is not None:
        raise UserError(f"{run}: its reward is a function, so there is no reward model to train on more rankings")
    missing = [step for step in steps_of_run(config) if not (run / step).is_dir()]
    if missing:
        raise CheckpointError(f"{run}: {missing[0]} is not finished; continue the run first")
    if not comparisons:
        raise UserError("--comparisons: give at least one file of new rankings, such as one written by minirlhf label")
    if out.resolve() == run.resolve():
        raise UserError(f"--out {out}: is the run itself; give the folder of the next round")
    return replace(
        config,
        out=out,
        previous=run,
        comparisons=(*config.comparisons, *comparisons),
        # What is too long for the models that are kept is refused by its line, before any training.
        context_length=config.context_length or context_of_run(run),
        given_reward_model=None,  # the rankings are for a new one, which starts from the SFT model as ever
    )


def context_of_run(run: Path) -> int | None:
    """The longest sequence in tokens that all finished policies of a run can read; None if there is no limit.

    An adapter reads what its body does, which is the base or the SFT model; PPO's policies read what SFT's does.
    """
    whole = [run / step for step in ("base", "sft") if (run / step).is_dir() and not is_adapter(run / step)]
    return min(filter(None, map(context_in, whole)), default=None)


def read_report(run: Path) -> dict[str, Any]:
    """The measurements of a finished run.

    Raises:
        CheckpointError: report.json is damaged.
    """
    advice = "delete it and run the same command again"
    kinds = {"judge": str, "parameters": int, "evaluation": dict, "reward_model": dict, "seconds": dict}
    report = _read_object(run / "report.json", kinds, advice)
    names = ("base", "sft", *read_config(run).methods)
    if not all(isinstance(report["evaluation"].get(name), dict) for name in names):
        raise CheckpointError(f"{run / 'report.json'}: damaged (not every policy is in it); {advice}")
    return report


def read_examples(run: Path) -> list[str]:
    """The prompts in answers.json, once a run is finished.

    Raises:
        CheckpointError: report.json or answers.json is damaged.
    """
    file = run / "answers.json"
    advice = f"delete {run / 'report.json'} and run again"
    kept = read_report(run).get("answers_sha256") if (run / "report.json").is_file() and file.is_file() else None
    if kept is None:
        return []
    content = file.read_bytes() if file.stat().st_size <= LONGEST_ANSWERS else b""
    if hashlib.sha256(content).hexdigest() != kept:
        raise CheckpointError(f"{file}: damaged (its checksum differs); {advice}")
    try:
        return [str(row["prompt"]) for row in json.loads(content)]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise CheckpointError(f"{file}: damaged (not a list of examples); {advice}") from None


def _read_object(file: Path, kinds: Mapping[str, type], advice: str) -> dict[str, Any]:
    """Read a JSON file that must be an object with these keys, each of its kind."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise CheckpointError(f"{file}: damaged (not JSON); {advice}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: damaged (not a JSON object); {advice}")
    if not is_whole(value):
        raise CheckpointError(f"{file}: damaged, or changed by hand (its checksum differs); {advice}")
    for key, kind in kinds.items():
        if not isinstance(value.get(key), kind):
            raise CheckpointError(f"{file}: damaged (no {key} in it that can be read); {advice}")
    return value


Bodies = dict[str, "PreTrainedModel"]
"""Frozen bodies in memory by the step that made them ("base" or "sft"), of one run or of rounds of it."""


def load_policy(
    run: Path,
    name: str,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    bodies: Bodies | None = None,
) -> PreTrainedModel:
    """A finished policy of a run, in eval mode, its checksums verified.

    Args:
        run: its folder.
        name: a policy.
        device: where the model goes.
        dtype: of its weights; of an adapter's body.
        bodies: those in memory already, on that device and in that dtype. An adapter uses one, or loads it into here.
    """
    verify_model(run / name, required=True)
    if is_adapter(run / name):
        return load_adapter(run / name, _body(run, device, dtype, {} if bodies is None else bodies))
    if bodies is not None and name == body_of(run):
        return share(_body(run, device, dtype, bodies))
    return load_causal_model(run / name, dtype=dtype).to(device).eval()


def load_reward_model(
    run: Path,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    bodies: Bodies | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The reward model of a run and its tokenizer, its checksums verified. Arguments as in `load_policy`."""
    folder = run / "reward_model"
    verify_model(folder, required=True)
    if is_adapter(folder):
        model = load_adapter(folder, _body(run, device, dtype, {} if bodies is None else bodies))
    else:
        model = half(load_scalar_model(folder), dtype)
    return model.to(device).eval(), load_tokenizer(folder)


def body_of(run: Path) -> str:
    """The step whose model the adapters of a run stand on: an SFT model that was given whole, else the base model."""
    return "base" if is_adapter(run / "sft") else "sft"


def _body(run: Path, device: torch.device, dtype: torch.dtype, bodies: Bodies) -> PreTrainedModel:
    name = body_of(run)
    if name not in bodies:
        verify_model(run / name, required=True)
        model = load_causal_model(run / name, dtype=dtype).to(device).eval()
        bodies[name] = model.requires_grad_(False)
    return bodies[name]


def steps_of_run(config: RunConfig) -> tuple[str, ...]:
    """The steps of a run: a reward function takes the place of the reward model's."""
    return ("base", "sft", *(("reward_model",) if config.reward is None else ()), *config.methods)
