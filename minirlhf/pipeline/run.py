"""The pipeline, top to bottom: base model, SFT, reward model, the methods of step 3, evaluation.

Each step trains in ``runs/NAME/STEP.partial/``, which is renamed to ``runs/NAME/STEP/`` when it is complete. So a
folder with the final name is finished, and a finished step is never repeated.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import platform
import sys
import time
from typing import Any

import torch

from minirlhf import parallel
from minirlhf.checkpoints import STATE, SUMMARY, made_with, remove_partial, sealed, verify_model, write_json
from minirlhf.config import RunConfig
from minirlhf.errors import CheckpointError, visible
from minirlhf.pipeline.beside import step_beside
from minirlhf.pipeline.estimate import apart, models_held, said
from minirlhf.pipeline.evaluate import Evaluator, evaluate_run
from minirlhf.pipeline.fitting import answer_options
from minirlhf.pipeline.folder import find_device, hide_loading_bars, locked, read_report, steps_of_run
from minirlhf.pipeline.given import FileReward, told
from minirlhf.pipeline.inputs import find_data, load_inputs
from minirlhf.pipeline.settings import (
    changed_machine,
    changed_settings,
    check_context,
    check_previous,
    settings_of,
)
from minirlhf.pipeline.steps import train_step

UNFIT = (
    "note: the learning rates, batches and steps of this preset are made for a model of 0.5 million parameters and are "
    "about 100 times too fast for a pretrained one; --preset pretrained has the field's"
)


def run_pipeline(
    config: RunConfig, *, command: str = "", progress: bool = True, began: float | None = None
) -> dict[str, Any]:
    """Run or resume the whole pipeline, except for the report page, which `minirlhf.report.write_report` draws.

    A page that shows other measurements is removed. With several processes (see `minirlhf.parallel`) all call it, and
    rank 0 alone locks the folder and measures the finished models.

    Args:
        config: all settings.
        command: the command line, for the report.
        progress: whether to draw progress bars.
        began: when the command began, by `time.monotonic`, so that imports count too; default: now.

    Returns:
        The measurements, as report.json holds them. Rank 0 alone has them.

    Raises:
        DataError: malformed data; raised before any training.
        CheckpointError: the folder belongs to another run, or something in it is damaged.
        TrainingError: a loss became NaN or infinite.
        UserError: another run is using the folder, or a setting of a method that isn't trained was changed.
    """
    if config.previous is None:
        config.check_unused_methods()
    began = time.monotonic() if began is None else began
    if config.out.exists() and not config.out.is_dir():
        raise CheckpointError(f"--out {config.out}: is a file; give the folder of a run, or a new one")
    with locked(config.out) if parallel.rank() == 0 else contextlib.nullcontext():
        parallel.barrier()  # until rank 0 holds the folder
        return _run(config, command, progress, began)


def _run(config: RunConfig, command: str, progress: bool, began: float) -> dict[str, Any]:
    hide_loading_bars()
    out, device = config.out, find_device(config.device)
    if parallel.rank() == 0:
        find_data(config)  # which may write it
    parallel.barrier()
    data = find_data(config)
    reward = FileReward(config.reward) if config.reward is not None else None
    settings = settings_of(config, data, reward)
    changed = changed_settings(out, settings)
    if parallel.rank() == 0:
        remove_partial(out)
    if config.previous is not None:
        check_previous(config.previous, settings)
    steps = steps_of_run(config)
    left = [step for step in steps if not (out / step).is_dir()]
    for step in [step for step in steps if step not in left]:
        verify_model(out / step, required=True)
        (out / step / STATE).unlink(missing_ok=True)  # a kill between a step's last two operations leaves it
    if not changed and not left and (out / "report.json").is_file():
        return read_report(out)
    inputs = load_inputs(config, data)
    if reward is not None:
        rows = inputs.folder.demonstrations[:2]
        reward([row.prompt for row in rows], [row.completion for row in rows])  # a mistake shows before any training
    notes = [*inputs.folder.notes, *changed_machine(out, made_with())]
    if config.pretrained is not None and config.preset != "pretrained" and config.previous is None:
        notes.append(UNFIT)
    for note in notes if parallel.rank() == 0 else ():
        print(visible(note), file=sys.stderr)
    if "base" not in left:
        check_context(out, inputs.context_length, answer_options(config))
    if parallel.rank() == 0:
        print(said(config, inputs.size, left, device), file=sys.stderr)
    # Only now does the folder belong to this run, so a mistake in the data leaves nothing behind. An older report is
    # removed: if this run were killed now, it would be taken for this run's.
    parallel.barrier()  # until all have read the folder
    if parallel.rank() == 0:
        for name in ("report.html", "report.json"):
            (out / name).unlink(missing_ok=True)
        write_json(out / "config.json", sealed(settings))

    # Two small models at a time use two cores far better than one model with two threads. A step left over from a
    # killed run gets half of the threads too: the number of threads decides the last bits of a sum.
    threads = torch.get_num_threads()
    paired = apart(config, device)
    prepared = time.monotonic() - began
    for step in [step for step in left if step not in config.methods]:
        train_step(step, config, inputs, progress=progress)
    torch.set_num_threads(threads // 2 if paired else threads)
    methods = [step for step in left if step in config.methods]
    while methods:
        if paired and len(methods) > 1:
            child, step, *methods = methods
            with step_beside(config, child, step, inputs, threads // 2, progress):
                train_step(step, config, inputs, progress=progress)
        else:
            step, *methods = methods
            train_step(step, config, inputs, progress=progress)
    torch.set_num_threads(threads)
    if parallel.rank() > 0:
        return {}

    began = time.monotonic()
    gc.collect()  # as before each step, see `train_step`
    evaluator = Evaluator(
        out,
        inputs.folder,
        config.base.block_length,
        config.evaluation,
        config.seed,
        device,
        dtype=config.frozen_dtype,
        reward=reward,
    )
    measured, examples = evaluate_run(evaluator, config.methods, progress)
    write_json(out / "answers.json", examples)
    summaries = {step: json.loads((out / step / SUMMARY).read_text(encoding="utf-8")) for step in steps}
    seconds = {"preparation": prepared} | {step: summaries[step]["seconds"] for step in steps}
    seconds["evaluation"] = time.monotonic() - began
    side_by_side = _pairs({step: summaries[step].get("beside") for step in steps})
    # The longer of two steps counts.
    total = sum(seconds.values()) - sum(min(seconds[step] for step in pair) for pair in side_by_side)
    report = measured | {
        "parameters": summaries["base"]["parameters"],
        "seconds": seconds | {"total": total},
        "side_by_side": side_by_side,
        "models_held": models_held(config),
        "seed": config.seed,
        "preset": config.preset,
        "given": told(config, reward),
        "data": data.name,
        "command": command,
        "versions": {name: value for name, value in made_with().items() if name != "threads"},
        "made_with": {step: summaries[step].get("made_with") for step in steps},
        "begun_with": {step: before for step in steps if (before := summaries[step].get("begun_with"))},
        "machine": {
            "device": str(device),
            "processes": parallel.size(),
            "threads": torch.get_num_threads(),
            "platform": platform.platform(),
        },
    }
    report["answers_sha256"] = hashlib.sha256((out / "answers.json").read_bytes()).hexdigest()
    report = sealed(report)
    write_json(out / "report.json", report)
    return report


def _pairs(beside: dict[str, str | bool | None]) -> list[list[str]]:
    """The steps that were trained at the same time, from what each one's summary says of the other.

    Before there were more methods, it was True for PPO beside PPO-ptx.
    """
    named = {step: "ppo_ptx" if other is True else other for step, other in beside.items()}
    return [[step, other] for step, other in named.items() if isinstance(other, str) and other in named]
