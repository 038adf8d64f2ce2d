"""Write a model of a run as a plain folder of transformers, for any tool that loads one."""

from __future__ import annotations

from pathlib import Path

import torch

from minirlhf.checkpoints import save_model
from minirlhf.errors import CheckpointError, UserError
from minirlhf.language.adapters import is_adapter
from minirlhf.language.models import half
from minirlhf.language.tokenization import load_tokenizer
from minirlhf.pipeline.folder import STEPS, body_of, hide_loading_bars, load_policy, load_reward_model, read_config


def export_model(run: Path, step: str | None, out: Path) -> None:
    """Write one model of a run and its tokenizer. An adapter is merged in float32, then rounded to its body's type.

    Args:
        run: folder of a run; the step must be finished.
        step: one of `STEPS`; None for the run's last method.
        out: the folder to write; it appears whole or not at all.

    Raises:
        CheckpointError: the folder is not a run, the step is not finished, or something in it is damaged.
        UserError: there is no such step, or `out` is not empty.

    Example:
        >>> export_model(Path("runs/mine"), "ppo", Path("my-model"))  # doctest: +SKIP
    """
    from transformers import AutoConfig

    config = read_config(run)  # says what is wrong with a folder that is no run
    step = config.methods[-1] if step is None else step
    hide_loading_bars()
    if step not in STEPS:
        raise UserError(f"--step {step}: choose one of {', '.join(STEPS)}")
    folder = run / step
    if not folder.is_dir():
        raise CheckpointError(f"{run}: {step} is not finished; continue the run first")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: must be a folder that is empty or does not exist yet")
    cpu = torch.device("cpu")
    model = load_reward_model(run, cpu)[0] if step == "reward_model" else load_policy(run, step, cpu)
    stored = run / body_of(run) if is_adapter(folder) else folder
    if is_adapter(folder):
        model = model.merge_and_unload()
    half(model, AutoConfig.from_pretrained(stored, trust_remote_code=False).dtype or torch.float32)
    save_model(out, model, load_tokenizer(folder))
