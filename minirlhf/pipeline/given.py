"""What a user brings in place of a step: an SFT model, a reward model, or a reward as a Python function.

A reward's file is the user's own code, named on the command line. A run's config.json remembers its name and checksum,
and is never a reason to run it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from minirlhf.config import RunConfig
from minirlhf.errors import CheckpointError, UserError
from minirlhf.language.models import load_scalar_model
from minirlhf.language.reward_model import scores_tensor
from minirlhf.language.tokenization import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PARTS = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
"""The files that make a model and its tokenizer."""


class FileReward:
    """The reward function of ``--reward FILE.py:FUNCTION``.

    As in a script, modules beside the file can be imported. What goes wrong in the file is one sentence with the line,
    so that a typo in it doesn't look like a bug of minirlhf.

    Args:
        named: as on the command line.

    Raises:
        UserError: the file or the function is not there, or an error was raised while the file was read.
    """

    def __init__(self, named: str) -> None:
        file, _, name = named.rpartition(":")
        self.named, self.name, self.file = named, name, Path(file)
        if not file or not name.isidentifier():
            raise UserError(f"--reward {named}: must be FILE.py:FUNCTION")
        if not self.file.is_file():
            raise UserError(f"--reward {named}: no such file: {file}")
        self.file = self.file.resolve()
        spec = importlib.util.spec_from_file_location(f"minirlhf_reward_{self.file.stem}", self.file)
        if spec is None or spec.loader is None:
            raise UserError(f"--reward {named}: {file} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their own module up
        self._call(spec.loader.exec_module, module)
        self._function: Any = getattr(module, name, None)
        if not callable(self._function):
            raise UserError(f"--reward {named}: {file} has no function {name}")

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """Score each response to its prompt: -> [B] float32 on the CPU.

        Raises:
            UserError: the function raised an error, or returned anything but one number per response.
        """
        returned = self._call(self._function, list(prompts), list(responses))
        try:
            return scores_tensor(returned, len(prompts))
        except UserError as error:
            raise UserError(f"--reward {self.named}: {error}") from None

    def facts(self) -> dict[str, str]:
        """What a run remembers of it."""
        return {"function": f"{self.file.name}:{self.name}", "sha256": _sha256(self.file)}

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        sys.path.insert(0, str(self.file.parent))
        try:
            return function(*arguments)
        except (Exception, SystemExit) as error:  # it is the user's code: it may raise anything
            lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(self.file)]
            line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None
            line = lines[-1].lineno if lines else line
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(f"--reward {self.named}: {self.file}:{line or '?'}: {said}") from error
        finally:
            with contextlib.suppress(ValueError):  # the code may have taken it off itself
                sys.path.remove(str(self.file.parent))


def reward_of(settings: dict[str, Any], named: str | None, run: Path) -> FileReward | None:
    """The reward function of a finished run, named again by the user; None for a run with a reward model.

    Args:
        settings: the run's config.json.
        named: FILE.py:FUNCTION, or None.
        run: for messages.

    Raises:
        CheckpointError: the run has a reward function and none or another is named, or it has a reward model.
    """
    kept = settings.get("reward")
    if kept is None:
        if named is not None:
            raise CheckpointError(f"--reward {named}: {run} has a reward model, which judges; leave the option out")
        return None
    if not isinstance(kept, dict) or not all(isinstance(kept.get(key), str) for key in ("function", "sha256")):
        raise CheckpointError(f"{run / 'config.json'}: damaged (reward); delete {run} and run again")
    if named is None:
        raise CheckpointError(f"{run}: its reward is a function; name its file with --reward {kept['function']}")
    reward = FileReward(named)
    if reward.facts() != kept:
        raise CheckpointError(f"--reward {named}: {run} was trained with another: {kept['function']} as it was then")
    return reward


def load_given_reward_model(named: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The reward model of ``--reward-model`` and its own tokenizer.

    Raises:
        CheckpointError: it can't be loaded, or has no single score.
    """
    try:
        return load_scalar_model(named), load_tokenizer(named)
    except CheckpointError as error:
        raise CheckpointError(f"--reward-model {error}") from None


def given_sums(config: RunConfig) -> dict[str, dict[str, str]]:
    """The sha256 of each file of the folders that are given in place of a step; a hub name stands for itself."""
    given = {"given_sft": config.given_sft, "given_reward_model": config.given_reward_model}
    return {key: _sums(Path(name)) for key, name in given.items() if name is not None and Path(name).is_dir()}


def told(config: RunConfig, reward: FileReward | None) -> dict[str, str]:
    """What the report says was given, by step; the file of a function by its name and checksum."""
    given = {"base": config.pretrained, "sft": config.given_sft, "reward_model": config.given_reward_model}
    named = {step: Path(name).name if Path(name).is_dir() else name for step, name in given.items() if name is not None}
    if reward is not None:
        facts = reward.facts()
        named["reward"] = f"{facts['function']} (sha256 {facts['sha256'][:12]})"
    return named


def _sums(folder: Path) -> dict[str, str]:
    files = sorted(file for pattern in PARTS for file in folder.glob(pattern) if file.is_file())
    return {file.name: _sha256(file) for file in files}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
