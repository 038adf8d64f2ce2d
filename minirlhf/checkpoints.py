"""Files that are written atomically, and checkpoints whose checksums reveal damage.

Whatever is written gets the name ``NAME.partial`` first, is flushed to the disk, and is then renamed, so a name without
that ending is always whole: after a kill, a full disk or a power cut. Every such name belongs to this module:
`remove_partial` clears away what an ended process left.

A finished model is a folder in the Hugging Face layout plus ``checksums.json``. The state of an unfinished training is
one safetensors file with a checksum in its header. Nothing here reads or writes a pickle.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minirlhf import parallel
from minirlhf.errors import CheckpointError, TrainingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHECKSUMS, SUMMARY, STATE = "checksums.json", "summary.json", "state.safetensors"
PARTIAL = ".partial"
WINDOWS = os.name == "nt"
ADAPTER, SCALAR = "adapter_config.json", "scalar.json"
"""What tells peft's folder of an adapter from that of a whole model; and what peft does not save of a scalar model."""
PARTS = ("config.json", "*.safetensors", "tokenizer*")
"""File patterns that the checksums of a model must cover; those of an adapter, `ADAPTER` in place of config.json."""


def write_text(path: Path, text: str) -> None:
    """Write a text file to a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = partial(path)
    with open(aside, "x", encoding="utf-8") as file:
        file.write(text)
    replace(aside, path)


def partial(path: Path) -> Path:
    """The name to write a file to before `replace` gives it its own; what an ended process left there is removed.

    A link there is removed too, never followed: it could point anywhere.

    Raises:
        CheckpointError: a folder has that name.
    """
    aside = path.with_name(path.name + PARTIAL)
    if aside.is_dir() and not aside.is_symlink():
        raise CheckpointError(f"{aside}: a folder, where {path.name} is to be written first; remove it")
    aside.unlink(missing_ok=True)
    return aside


def partial_folder(folder: Path) -> Path:
    """The folder that `save_model` writes to before it is renamed; with the state of an unfinished training, if any.

    Raises:
        CheckpointError: it is a link or a file.
    """
    aside = folder.with_name(folder.name + PARTIAL)
    if aside.is_symlink() or (aside.exists() and not aside.is_dir()):
        raise CheckpointError(f"{aside}: must be a folder or not exist, and is a link or a file; remove it")
    return aside


def replace(aside: Path, path: Path) -> None:
    """Rename a file that was written aside, once the disk has it. Afterwards the disk has the new name too."""
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)


def remove_partial(folder: Path) -> None:
    """Remove the files that an ended process left half-written in a folder. Its subfolders stay."""
    for path in folder.glob(f"*{PARTIAL}"):
        if path.is_symlink() or not path.is_dir():
            path.unlink()


def keep_plain(folder: Path, names: Sequence[str] = ("*",)) -> None:
    """Remove from a folder all but plain files of these names: what an ended process left, or somebody planted.

    A library that opens a file to write it follows a link that has its name. Links are removed here, never followed.

    Args:
        folder: it need not exist.
        names: patterns, as the shell has them.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.is_symlink() or not path.is_file() or not any(fnmatch(path.name, name) for name in names):
            path.unlink()


def sync(path: Path) -> None:
    """Wait until the disk has a file, or a folder's names where the system can say so of a folder."""
    folder = path.is_dir()
    if folder and WINDOWS:
        return
    handle = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)  # Windows only flushes what may be written
    try:
        os.fsync(handle)
    except OSError as error:
        if not folder or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a temporary name, then rename it."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with a checksum of all else in it, for a file that a later command relies on.

    Example:
        >>> row = sealed({"seed": 0})
        >>> is_whole(row), is_whole(row | {"seed": 1})
        (True, False)
    """
    return value | {"sha256": _seal(value)}


def is_whole(value: dict[str, Any]) -> bool:
    """Whether a JSON object agrees with its checksum. One that was written without any does."""
    rest = {key: content for key, content in value.items() if key != "sha256"}
    return value.get("sha256", _seal(rest)) == _seal(rest)


def _seal(value: dict[str, Any]) -> str:
    return _sha256(json.dumps(json.loads(json.dumps(value)), sort_keys=True).encode())


def save_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    aside: Path | None = None,
    summary: dict[str, Any] | Callable[[], dict[str, Any]] | None = None,
) -> None:
    """Save a model and its tokenizer atomically as one folder.

    With several processes all call it, rank 0 writes, and all return when the folder is complete.

    Args:
        folder: must be empty or not exist yet.
        model: any transformers model; saved as safetensors. Of a peft model the adapter alone is saved, as peft does,
            with the offset of its scores, if it is a scalar model, in scalar.json.
        tokenizer: saved with it.
        aside: the folder to write to before it is renamed; files already in it (metrics, TensorBoard events) are kept,
            links and folders are not, and a training state in it is deleted last, so that a kill at any time loses
            nothing.
        summary: facts about the training, written as summary.json. A function is called after the weights are written,
            so that it can include the time that took.

    Raises:
        CheckpointError: the model is the inner one of a peft model; nothing is written.
        TrainingError: a weight is NaN or infinite; nothing is written.
    """
    if hasattr(model, "peft_config") and not hasattr(model, "get_base_model"):
        raise CheckpointError(
            f"{folder}: not saved, this is the model inside a peft adapter: give the peft model itself, or merge it "
            "first (model.merge_and_unload())"
        )
    state = whole_state(model)
    if parallel.rank() == 0:
        _write_model(folder, model, state, tokenizer, aside, summary)
    parallel.barrier()


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """A model's state dict, gathered in rank 0 if the model is sharded. Tied tensors stay tied."""
    gathered: dict[int, Tensor] = {}
    state = model.state_dict()
    for name, value in state.items():
        place = place_of(value)
        if place not in gathered or not place:
            gathered[place] = for_rank_zero(value)
        state[name] = gathered[place]
    return state


def place_of(tensor: Tensor) -> int:
    """Where a tensor, or this process's part of it, is in memory: the same for tied ones, 0 for an empty one."""
    return int((tensor.to_local() if hasattr(tensor, "to_local") else tensor).data_ptr())


def for_rank_zero(tensor: Tensor) -> Tensor:
    """A tensor to be saved: a sharded one whole on the CPU of rank 0 (no GPU has room for all), empty elsewhere."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    return parallel.whole(tensor).cpu() if parallel.rank() == 0 else parallel.whole(tensor).new_empty(0)


def laid_out_as(like: Any, full: Tensor) -> Tensor:
    """A whole tensor, or this process's part of it if ``like`` is sharded."""
    if not hasattr(like, "full_tensor"):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _write_model(
    folder: Path,
    model: PreTrainedModel,
    state: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    aside: Path | None,
    summary: dict[str, Any] | Callable[[], dict[str, Any]] | None,
) -> None:
    broken = [name for name, value in state.items() if not value.isfinite().all()]
    if broken or not math.isfinite(getattr(model.config, "score_offset", 0.0)):
        what = broken[0] if broken else "score_offset"
        raise TrainingError(
            f"{folder}: not saved, {what} of the trained model is NaN or infinite; lower that step's learning rate "
            f"(--help names it){f' and delete {aside} to retrain it' if aside is not None else ''}"
        )
    if aside is None:
        aside = partial_folder(folder)
        if aside.exists():
            shutil.rmtree(aside)
        aside.mkdir(parents=True)
    keep_plain(aside)
    if hasattr(model, "peft_config"):
        model.save_pretrained(aside, save_embedding_layers=False)  # no embedding is trained; "auto" would ask the hub
        if hasattr(model.config, "score_offset"):
            write_json(aside / SCALAR, {"score_offset": model.config.score_offset})
    else:
        model.save_pretrained(aside, state_dict=state)
    tokenizer.save_pretrained(aside)
    if summary is not None:
        write_json(aside / SUMMARY, summary() if callable(summary) else summary)
    remove_partial(aside)
    files = [file for file in sorted(aside.iterdir()) if file.is_file() and file.name not in (STATE, CHECKSUMS)]
    for file in files:
        sync(file)
    write_json(aside / CHECKSUMS, {file.name: _sha256(file.read_bytes()) for file in files})
    replace(aside, folder)
    (folder / STATE).unlink(missing_ok=True)


def verify_model(folder: Path, *, required: bool = False) -> None:
    """Compare a checkpoint folder with its checksums.

    Args:
        folder: written by `save_model` or by other code.
        required: whether it must have checksums, as the models of a run do; if not, a folder without any passes.

    Raises:
        CheckpointError: a file is missing or differs, or the checksums are damaged or leave out what makes a model
            (its weights, its configuration, its tokenizer); names the file.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    advice = f"delete {folder} and run the same command again"
    record = folder / CHECKSUMS
    if not record.is_file():
        if required:
            raise CheckpointError(f"{record}: missing; {advice}")
        return
    try:
        sums = json.loads(record.read_text(encoding="utf-8"))
    except ValueError:
        raise CheckpointError(f"{record}: damaged (not JSON); {advice}") from None
    parts = (ADAPTER, *PARTS[1:]) if (folder / ADAPTER).is_file() else PARTS
    if not isinstance(sums, dict) or not all(any(fnmatch(name, part) for name in sums) for part in parts):
        raise CheckpointError(f"{record}: damaged (it must name {', '.join(parts)}); {advice}")
    for name, expected in sums.items():
        file = folder / name
        if not file.is_file() or _sha256(file.read_bytes()) != expected:
            what = "damaged (its checksum differs)" if file.is_file() else "missing"
            raise CheckpointError(f"{file}: {what}; {advice}")


def save_state(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write a training state atomically, as one safetensors file with its own checksum."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    aside = partial(path)
    text = json.dumps(facts)
    header = {"facts": text, "sha256": _digest(tensors, text)}
    save_file(tensors, aside, metadata=header)
    replace(aside, path)


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a training state.

    Raises:
        CheckpointError: the file is damaged.
    """
    from safetensors import safe_open

    advice = f"delete {path} to restart this step, then run the same command again"
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        facts = json.loads(header["facts"])
    except Exception as error:
        raise CheckpointError(f"{path}: damaged training state ({error}); {advice}") from error
    if _digest(tensors, header["facts"]) != header.get("sha256"):
        raise CheckpointError(f"{path}: damaged training state (its checksum differs); {advice}")
    return tensors, facts


def made_with() -> dict[str, Any]:
    """What decides the last bits of a result besides settings and data: versions, and the number of threads."""
    versions = {}
    for name in ("minirlhf", "torch", "transformers", "tokenizers", "safetensors"):
        with contextlib.suppress(PackageNotFoundError):  # control needs torch alone
            versions[name] = version(name)
    return versions | {"python": platform.python_version(), "threads": torch.get_num_threads()}


def differing(before: dict[str, Any], now: dict[str, Any]) -> tuple[str, str] | None:
    """What two results of `made_with` have differently, as a sentence says it; None if nothing.

    Example:
        >>> differing({"torch": "2.9.0", "threads": 2}, {"torch": "2.9.0", "threads": 1})
        ('threads 2', 'threads 1')
    """
    names = [name for name, value in before.items() if now.get(name) != value]
    then, today = (", ".join(f"{name} {kind.get(name)}" for name in names) for kind in (before, now))
    return (then, today) if names else None


def _sha256(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


def _digest(tensors: dict[str, Tensor], facts: str) -> str:
    digest = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        whole = tensors[name].detach().cpu().contiguous()
        digest.update(whole.view(-1).view(torch.uint8).numpy().tobytes())  # numpy has no bfloat16
    return digest.hexdigest()
