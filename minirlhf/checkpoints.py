"""Files that are written atomically, and checkpoints whose checksums reveal damage.

A finished model is a folder in the Hugging Face layout plus ``checksums.json``; it is written to another folder that
is then renamed. The state of an unfinished training is one safetensors file with a checksum in its header.
Nothing here reads or writes a pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minirlhf.errors import CheckpointError, TrainingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHECKSUMS, SUMMARY, STATE = "checksums.json", "summary.json", "state.safetensors"
ADAPTER, SCALAR = "adapter_config.json", "scalar.json"
"""What tells peft's folder of an adapter from that of a whole model; and what peft does not save of a scalar model."""
PARTS = ("config.json", "*.safetensors", "tokenizer*")
"""File patterns that the checksums of a model must cover; those of an adapter, `ADAPTER` in place of config.json."""


def write_text(path: Path, text: str) -> None:
    """Write a text file to a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a temporary name, then rename it."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def save_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    aside: Path | None = None,
    summary: dict[str, Any] | Callable[[], dict[str, Any]] | None = None,
) -> None:
    """Save a model and its tokenizer atomically as one folder.

    Args:
        folder: must be empty or not exist yet.
        model: any transformers model; saved as safetensors. Of a peft model the adapter alone is saved, as peft does,
            with the offset of its scores, if it is a scalar model, in scalar.json.
        tokenizer: saved with it.
        aside: the folder to write to before it is renamed; files already in it (metrics, TensorBoard events) are kept,
            and a training state in it is deleted last, so that a kill at any time loses nothing.
        summary: facts about the training, written as summary.json. A function is called after the weights are written,
            so that it can include the time that took.

    Raises:
        CheckpointError: the model is the inner one of a peft model; nothing is written.
        TrainingError: a weight is NaN or infinite; nothing is written.
    """
    adapted = hasattr(model, "peft_config")
    if adapted and not hasattr(model, "get_base_model"):
        raise CheckpointError(
            f"{folder}: not saved, this is the model inside a peft adapter: give the peft model itself, or merge it "
            "first (model.merge_and_unload())"
        )
    broken = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    if broken or not math.isfinite(getattr(model.config, "score_offset", 0.0)):
        what = broken[0] if broken else "score_offset"
        raise TrainingError(
            f"{folder}: not saved, {what} of the trained model is NaN or infinite; lower that step's learning rate "
            f"(--help names it){f' and delete {aside} to retrain it' if aside is not None else ''}"
        )
    if aside is None:
        aside = folder.with_name(folder.name + ".partial")
        shutil.rmtree(aside, ignore_errors=True)
    if adapted:
        model.save_pretrained(aside, save_embedding_layers=False)  # no embedding is trained; "auto" would ask the hub
        if hasattr(model.config, "score_offset"):
            write_json(aside / SCALAR, {"score_offset": model.config.score_offset})
    else:
        model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    if summary is not None:
        write_json(aside / SUMMARY, summary() if callable(summary) else summary)
    files = [file for file in sorted(aside.iterdir()) if file.is_file() and file.name not in (STATE, CHECKSUMS)]
    write_json(aside / CHECKSUMS, {file.name: _sha256(file.read_bytes()) for file in files})
    os.replace(aside, folder)
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
    aside = path.with_name(path.name + ".partial")
    text = json.dumps(facts)
    header = {"facts": text, "sha256": _digest(tensors, text)}
    save_file(tensors, aside, metadata=header)
    os.replace(aside, path)


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


def _sha256(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


def _digest(tensors: dict[str, Tensor], facts: str) -> str:
    digest = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        whole = tensors[name].detach().cpu().contiguous()
        digest.update(whole.view(-1).view(torch.uint8).numpy().tobytes())  # numpy has no bfloat16
    return digest.hexdigest()
