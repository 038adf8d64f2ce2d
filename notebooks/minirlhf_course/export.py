"""Ship a run of PPO and PPO-ptx: its five models as a small folder of checkpoints that lessons and projects start from.

    python -m minirlhf_course.export runs/checkpoints data/checkpoints

The weights are rounded to float16, which halves the files; they load as float32. The folder reads like a run's:
`load_policy(Path("data/checkpoints"), "sft", device)`. Beside the run's five models it may hold others, made by
`export_step`, such as data/checkpoints/tiny_ppo_ptx.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from minirlhf.checkpoints import save_model
from minirlhf.config import RunConfig
from minirlhf.errors import CheckpointError, UserError
from minirlhf.language.tokenization import load_tokenizer
from minirlhf.pipeline.folder import POLICIES, hide_loading_bars, load_policy, load_reward_model, steps_of_run

STEPS = steps_of_run(RunConfig())


def export_checkpoints(run: Path, out: Path) -> None:
    """Write the models of a finished run to `out`, in half precision, each with its tokenizer and checksums.

    Args:
        run: a folder made by `minirlhf run`.
        out: the folder to make; one that is there already is replaced, whole, but models in it that are no
            step of a run are kept.

    Raises:
        CheckpointError: a step of the run is missing or damaged.
    """
    missing = [step for step in STEPS if not (run / step).is_dir()]
    if missing:
        raise CheckpointError(f"{run}: has no {', '.join(missing)}; finish it first with: minirlhf run --out {run}")
    aside = out.with_name(out.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    for step in STEPS:
        # PPO's curves are few rows, and worth a look.
        export_step(run, step, aside / step, ["metrics.jsonl"] if step in ("ppo", "ppo_ptx") else [])
    for other in out.iterdir() if out.is_dir() else ():
        if other.is_dir() and other.name not in STEPS:
            shutil.copytree(other, aside / other.name)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(aside, out)


def export_step(run: Path, step: str, folder: Path, files: Sequence[str] = ()) -> None:
    """Write one model of a run to a folder, in half precision, with its tokenizer and checksums.

    Args:
        run: a run's folder.
        step: one of `STEPS`.
        folder: the folder to make; one that is there already is replaced.
        files: names of other files of the step to bring along.

    Raises:
        CheckpointError: the model is missing or damaged.
    """
    cpu = torch.device("cpu")
    model = load_policy(run, step, cpu) if step in POLICIES else load_reward_model(run, cpu)[0]
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for name in files:
        shutil.copyfile(run / step / name, aside / name)
    shutil.rmtree(folder, ignore_errors=True)
    save_model(folder, model.half(), load_tokenizer(run / step), aside=aside)


if __name__ == "__main__":
    hide_loading_bars()
    if len(sys.argv) != 3:
        sys.exit("usage: python -m minirlhf_course.export RUN OUT")
    try:
        export_checkpoints(Path(sys.argv[1]), Path(sys.argv[2]))
    except UserError as error:
        sys.exit(f"export: {error}")
    print(f"wrote {sys.argv[2]}")
