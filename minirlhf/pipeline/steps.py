"""The five steps of a run: what each one learns from, with which settings, and where its model is saved."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from minirlhf.checkpoints import partial_folder, save_model
from minirlhf.config import RunConfig
from minirlhf.language.models import clone, load_causal_model, tiny_llama
from minirlhf.language.pretraining import train_base
from minirlhf.language.reward_model import RewardModelScorer, train_reward_model
from minirlhf.language.rlhf import train_rlhf
from minirlhf.language.sft import train_sft
from minirlhf.pipeline.folder import find_device, load_policy, load_reward_model
from minirlhf.pipeline.inputs import Inputs
from minirlhf.pipeline.judges import find_judge
from minirlhf.pipeline.settings import made_with
from minirlhf.training import Recorder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHOWN = {
    "base": ("base/loss",),
    "sft": ("sft/loss",),
    "reward_model": ("reward_model/loss", "reward_model/accuracy"),
    "ppo": ("objective/score", "objective/kl", "objective/gold"),
    "ppo_ptx": ("objective/score", "objective/kl", "objective/gold"),
}


def train_step(
    step: str,
    config: RunConfig,
    inputs: Inputs,
    *,
    progress: bool = True,
    beside: bool = False,
    began: float | None = None,
) -> None:
    """Train one step and save it, resuming from the state of a killed run if there is one.

    Args:
        step: one of `STEPS`; the models it starts from are in the run's folder.
        config: of the run.
        inputs: its data.
        progress: whether to draw a progress bar.
        beside: whether another step trains at the same time, whose progress bar has the first line.
        began: when the work for it began, by `time.monotonic`; default: now.
    """
    aside = partial_folder(config.out / step)
    recorder = Recorder(
        step,
        aside,
        save_seconds=config.save_seconds,
        show=SHOWN[step],
        progress=progress,
        position=int(beside),
        began=began,
        tensorboard=config.tensorboard,
    )
    model = _train(step, config, inputs, recorder)
    parameters = sum(p.numel() for p in model.parameters())
    save_model(
        config.out / step,
        model,
        inputs.tokenizer,
        aside=aside,
        summary=lambda: {
            "seconds": recorder.lap(),
            "parameters": parameters,
            "beside": beside,
            "made_with": made_with(),
        },
    )


def _train(step: str, config: RunConfig, inputs: Inputs, recorder: Recorder) -> PreTrainedModel:
    """Train this step's model, starting from the models of earlier steps."""
    run, seed, device = config.out, config.seed, find_device(config.device)
    data, tokenizer = inputs.folder, inputs.tokenizer
    if config.previous is not None and step in ("base", "sft"):
        recorder.track({}, {})  # creates the folder
        metrics = config.previous / step / "metrics.jsonl"
        if metrics.is_file():
            shutil.copy(metrics, partial_folder(run / step))  # the report draws how the model was trained
        return load_policy(config.previous, step, device)
    if step == "base" and config.model is not None:
        recorder.track({}, {})  # creates the folder
        return load_causal_model(config.model, tokenizer, seed).to(device).eval()
    if step == "base":
        model = tiny_llama(config.model_size, tokenizer, inputs.context_length, seed).to(device)
        return train_base(model, inputs.corpus_blocks, config.base, seed=seed, recorder=recorder)
    if step == "sft":
        model = load_policy(run, "base", device)
        return train_sft(model, tokenizer, data.demonstrations, config.sft, seed=seed, recorder=recorder)
    sft = load_policy(run, "sft", device)
    if step == "reward_model":
        return train_reward_model(
            sft,
            tokenizer,
            data.comparisons,
            config.reward_model,
            demonstrations=data.demonstrations,
            seed=seed,
            recorder=recorder,
        )
    reward = RewardModelScorer(*load_reward_model(run, device))
    judge = find_judge(data, reward)

    def gold(prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool]) -> dict[str, float]:
        scores = judge.scores(prompts, responses, ended)
        return {"objective/gold": sum(scores) / len(scores)}

    return train_rlhf(
        clone(sft) if config.previous is None else load_policy(config.previous, step, device),
        clone(reward.model),
        sft,
        reward,
        reward.tokenizer,
        [row.text for row in data.prompts],
        replace(config.rlhf, ptx_coef=0.0) if step == "ppo" else config.rlhf,
        corpus_blocks=inputs.corpus_blocks,
        seed=seed,
        recorder=recorder,
        monitor=gold if judge.is_gold else None,
    )
