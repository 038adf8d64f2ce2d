"""The pipeline, top to bottom: base model, SFT, reward model, PPO, PPO-ptx, evaluation, report.

Each step trains in ``runs/NAME/STEP.partial/`` and is renamed to ``runs/NAME/STEP/`` when it is whole, so what
stands is finished, and what is finished is never done again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minirlhf.checkpoints import save_model, verify_model, write_json
from minirlhf.config import RunConfig
from minirlhf.errors import CheckpointError
from minirlhf.language.models import clone, load_causal_model, tiny_llama
from minirlhf.language.pretraining import train_base
from minirlhf.language.reward_model import RewardModelScorer, train_reward_model
from minirlhf.language.rlhf import train_rlhf
from minirlhf.language.sft import train_sft
from minirlhf.pipeline.beside import StepBeside
from minirlhf.pipeline.evaluate import evaluate_run
from minirlhf.pipeline.folder import STEPS, check_report, find_device, hide_loading_bars, load_policy, load_reward_model
from minirlhf.pipeline.inputs import Inputs, find_data, load_inputs
from minirlhf.pipeline.judges import find_judge
from minirlhf.pipeline.lock import locked
from minirlhf.pipeline.settings import changed_settings, check_context, settings_of
from minirlhf.training import Recorder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BESIDE = {"ppo", "ppo_ptx"}  # steps that need what stands before them, and not each other
SHOWN = {
    "base": ("base/loss",),
    "sft": ("sft/loss",),
    "reward_model": ("reward_model/loss", "reward_model/accuracy"),
    "ppo": ("objective/score", "objective/kl", "objective/gold"),
    "ppo_ptx": ("objective/score", "objective/kl", "objective/gold"),
}


def run_pipeline(config: RunConfig, *, command: str = "", progress: bool = True, began: float | None = None) -> Path:
    """Run or continue the whole pipeline.

    Args:
        config: all settings.
        command: the command line, for the report.
        progress: whether to draw progress bars.
        began: when the command began, by `time.monotonic`, so that imports count as well; left out: now.

    Returns:
        The path of the report.

    Raises:
        DataError: malformed data; raised before any training.
        CheckpointError: the folder belongs to another run, or something in it is damaged.
        TrainingError: a loss became NaN or infinite.
        UserError: another run works in the folder.
    """
    began = time.monotonic() if began is None else began
    if config.out.exists() and not config.out.is_dir():
        raise CheckpointError(f"--out {config.out}: is a file; give a folder that holds a run, or none yet")
    with locked(config.out):
        return _run(config, command, progress, began)


def _run(config: RunConfig, command: str, progress: bool, began: float) -> Path:
    hide_loading_bars()
    device = find_device(config.device)
    report = config.out / "report.html"
    settings = settings_of(config)
    changed = changed_settings(config.out, settings)
    left = [step for step in STEPS if not (config.out / step).is_dir()]
    for step in STEPS:
        if step not in left:
            verify_model(config.out / step, required=True)
    if not changed and not left and report.is_file() and (config.out / "report.json").is_file():
        check_report(config.out)
        return report
    inputs = load_inputs(config, find_data(config))
    for note in inputs.folder.notes:
        print(note, file=sys.stderr)
    if "base" not in left:
        check_context(config.out, inputs)
    # Only now does the folder belong to this run: a mistake in the data leaves nothing behind. And a report of what
    # stood here before would be taken for this run's if it were killed now.
    for name in ("report.html", "report.json"):
        (config.out / name).unlink(missing_ok=True)
    write_json(config.out / "config.json", settings)

    # Two small models at a time use two cores far better than one model with two threads. A step that was left over by
    # a killed run gets its half of the threads too: the number of threads decides the last bits of a sum.
    threads = torch.get_num_threads()
    apart = config.side_by_side and device.type == "cpu" and threads > 1
    prepared = time.monotonic() - began
    for step in [step for step in left if step not in BESIDE]:
        train_step(step, config, inputs, device, progress)
    torch.set_num_threads(threads // 2 if apart else threads)
    if apart and set(left) >= BESIDE:
        with StepBeside(config, "ppo", threads // 2, progress):
            train_step("ppo_ptx", config, inputs, device, progress)
    else:
        for step in [step for step in left if step in BESIDE]:
            train_step(step, config, inputs, device, progress)
    torch.set_num_threads(threads)

    began = time.monotonic()
    # Here, not at the top: drawing needs matplotlib, which the training doesn't; and loading it counts as evaluation.
    import matplotlib.pyplot  # noqa: F401

    from minirlhf.report import write_report

    proxy = RewardModelScorer(*load_reward_model(config.out, device))
    judge = find_judge(inputs.folder, proxy)
    results = evaluate_run(
        config, inputs, judge, proxy, device, prepared=prepared, began=began, command=command, progress=progress
    )
    write_json(config.out / "report.json", results)
    write_report(config.out)
    return report


def train_step(
    step: str,
    config: RunConfig,
    inputs: Inputs,
    device: torch.device,
    progress: bool,
    *,
    beside: bool = False,
    began: float | None = None,
) -> None:
    """Train one step and save it, going on from the state that a killed run left.

    Args:
        step: one of `STEPS`; the models it starts from stand in the run's folder.
        config, inputs, device, progress: as in `run_pipeline`.
        beside: another step trains at the same time, and has the first line for its progress bar.
        began: when the work for it began, by `time.monotonic`; left out: now.
    """
    aside = config.out / f"{step}.partial"
    recorder = Recorder(
        step,
        aside,
        save_seconds=config.save_seconds,
        show=SHOWN[step],
        progress=progress,
        position=int(beside),
        began=began,
    )
    model = TRAINERS[step](config, inputs, recorder, device)
    parameters = sum(p.numel() for p in model.parameters())
    save_model(
        config.out / step,
        model,
        inputs.tokenizer,
        aside=aside,
        summary=lambda: {"seconds": recorder.lap(), "parameters": parameters, "beside": beside},
    )


def _base(config: RunConfig, inputs: Inputs, recorder: Recorder, device: torch.device) -> PreTrainedModel:
    if config.model is not None:
        model = load_causal_model(config.model, inputs.tokenizer)
        recorder.track({}, {})  # makes the folder
        for _ in recorder.steps(0):
            pass
        return model.to(device).eval()
    model = tiny_llama(config.model_size, inputs.tokenizer, inputs.context_length, config.seed).to(device)
    return train_base(model, inputs.corpus_blocks, config.base, seed=config.seed, recorder=recorder)


def _sft(config: RunConfig, inputs: Inputs, recorder: Recorder, device: torch.device) -> PreTrainedModel:
    model = load_policy(config.out, "base", device)
    rows = inputs.folder.demonstrations
    return train_sft(model, inputs.tokenizer, rows, config.sft, seed=config.seed, recorder=recorder)


def _reward_model(config: RunConfig, inputs: Inputs, recorder: Recorder, device: torch.device) -> PreTrainedModel:
    return train_reward_model(
        load_policy(config.out, "sft", device),
        inputs.tokenizer,
        inputs.folder.comparisons,
        config.reward_model,
        demonstrations=inputs.folder.demonstrations,
        seed=config.seed,
        recorder=recorder,
    )


def _rlhf(
    config: RunConfig, inputs: Inputs, recorder: Recorder, device: torch.device, ptx_coef: float
) -> PreTrainedModel:
    reward_model, tokenizer = load_reward_model(config.out, device)
    sft = load_policy(config.out, "sft", device)
    reward = RewardModelScorer(reward_model, tokenizer)
    judge = find_judge(inputs.folder, reward)

    def monitor(prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool]) -> dict[str, float]:
        scores = judge.scores(prompts, responses, ended)
        return {"objective/gold": sum(scores) / len(scores)}

    return train_rlhf(
        clone(sft),
        clone(reward_model),
        sft,
        reward,
        tokenizer,
        [row.text for row in inputs.folder.prompts],
        replace(config.rlhf, ptx_coef=ptx_coef),
        corpus_blocks=inputs.corpus_blocks,
        seed=config.seed,
        recorder=recorder,
        monitor=monitor if judge.is_gold else None,
    )


def _ppo(config: RunConfig, inputs: Inputs, recorder: Recorder, device: torch.device) -> PreTrainedModel:
    return _rlhf(config, inputs, recorder, device, ptx_coef=0.0)


def _ppo_ptx(config: RunConfig, inputs: Inputs, recorder: Recorder, device: torch.device) -> PreTrainedModel:
    return _rlhf(config, inputs, recorder, device, ptx_coef=config.rlhf.ptx_coef)


Trainer = Callable[[RunConfig, Inputs, Recorder, torch.device], "PreTrainedModel"]
TRAINERS: dict[str, Trainer] = {
    "base": _base,
    "sft": _sft,
    "reward_model": _reward_model,
    "ppo": _ppo,
    "ppo_ptx": _ppo_ptx,
}
