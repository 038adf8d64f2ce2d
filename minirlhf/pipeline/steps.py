"""The steps of a run: what each one learns from, with which settings, and where its model is saved."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minirlhf import parallel
from minirlhf.checkpoints import STATE, keep_plain, partial_folder, save_model
from minirlhf.config import SETTINGS, RunConfig
from minirlhf.data import DataFolder
from minirlhf.language.adapters import add_lora, is_adapter, lora_scalar_from
from minirlhf.language.dpo import train_dpo
from minirlhf.language.forward import compute_in, recompute_layers
from minirlhf.language.grpo import train_grpo
from minirlhf.language.models import half, load_causal_model, scalar_model_from, share, tiny_llama
from minirlhf.language.pretraining import train_base
from minirlhf.language.reward_model import RewardModelScorer, train_reward_model
from minirlhf.language.rlhf import train_rlhf
from minirlhf.language.rollouts import Monitor
from minirlhf.language.sft import train_sft
from minirlhf.language.tokenization import load_tokenizer
from minirlhf.pipeline.folder import Bodies, find_device, load_policy, load_reward_model
from minirlhf.pipeline.given import FileReward, load_given_reward_model
from minirlhf.pipeline.inputs import Inputs
from minirlhf.pipeline.judges import gold_judge
from minirlhf.training import Recorder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KEPT = (STATE, "metrics.jsonl", "events.*")
"""What a step that goes on takes from its unfinished folder: the last are TensorBoard's."""
SHOWN = {
    "base": ("base/loss",),
    "sft": ("sft/loss",),
    "reward_model": ("reward_model/loss", "reward_model/accuracy"),
    **dict.fromkeys(("ppo", "ppo_ptx", "rloo", "grpo"), ("objective/score", "objective/kl", "objective/gold")),
    "dpo": ("dpo/loss", "dpo/accuracy", "objective/gold"),
}


def train_step(
    step: str,
    config: RunConfig,
    inputs: Inputs,
    *,
    progress: bool = True,
    beside: str | None = None,
    began: float | None = None,
) -> None:
    """Train one step and save it, resuming from the state of a killed run if there is one.

    Args:
        step: one of `STEPS`; the models it starts from are in the run's folder.
        config: of the run.
        inputs: its data.
        progress: whether to draw a progress bar.
        beside: the step that trains at the same time, if one does; its progress bar has the first line.
        began: when the work for it began, by `time.monotonic`; default: now.
    """
    aside = partial_folder(config.out / step)
    if parallel.rank() == 0:
        keep_plain(aside, KEPT)
    recorder = Recorder(
        step,
        aside,
        save_seconds=config.save_seconds,
        show=SHOWN[step],
        progress=progress,
        position=int(beside is not None),
        began=began,
        tensorboard=config.tensorboard,
    )
    gc.collect()  # the last step's gradients and moments are in cycles of references, and this one needs their memory
    model = _train(step, config, inputs, recorder)
    parameters = sum(p.numel() for p in model.parameters())
    *before, now = recorder.machines or [{}]  # of several processes, rank 0 alone has them, and writes
    save_model(
        config.out / step,
        model,
        _tokenizer(step, config, inputs),
        aside=aside,
        summary=lambda: {
            "seconds": recorder.lap(),
            "parameters": parameters,
            "beside": beside,
            "made_with": now,
            "begun_with": before,
        },
    )


def _tokenizer(step: str, config: RunConfig, inputs: Inputs) -> PreTrainedTokenizerBase:
    if step == "reward_model" and config.given_reward_model is not None:
        return load_tokenizer(config.given_reward_model)
    return inputs.tokenizer


def _train(step: str, config: RunConfig, inputs: Inputs, recorder: Recorder) -> PreTrainedModel:
    """Train this step's model, starting from the models of earlier steps."""
    run, seed, device = config.out, config.seed, find_device(config.device)
    data, tokenizer = inputs.folder, inputs.tokenizer
    lora = config.lora.rank is not None
    bodies: Bodies = {}
    options: Any = {"dtype": config.body_dtype, "bodies": bodies if lora else None}
    if config.previous is not None and step in ("base", "sft"):
        recorder.track({}, {})  # creates the folder
        metrics = config.previous / step / "metrics.jsonl"
        if metrics.is_file() and parallel.rank() == 0:
            shutil.copy(metrics, partial_folder(run / step))  # the report draws how the model was trained
        return load_policy(config.previous, step, device, **options)
    given = config.pretrained if step == "base" else config.given_sft if step == "sft" else None
    if given is not None:
        recorder.track({}, {})  # creates the folder
        return load_causal_model(given, tokenizer, seed, dtype=config.body_dtype).to(device).eval()
    if step == "base":
        model = tiny_llama(config.model_size, tokenizer, inputs.context_length, seed).to(device)
        return train_base(_learner(model, config), inputs.corpus_blocks, config.base, seed=seed, recorder=recorder)
    if step == "sft":
        model = load_policy(run, "base", device, **options)
        if lora:
            model = add_lora(model, config.lora, seed, _body_name(config))
        model = _learner(model, config)
        return train_sft(model, tokenizer, data.demonstrations, config.sft, seed=seed, recorder=recorder)
    if step == "reward_model" and config.given_reward_model is not None:
        recorder.track({}, {})
        return load_given_reward_model(config.given_reward_model)[0]
    sft = load_policy(run, "sft", device, **options)
    if step == "reward_model":
        start = lora_scalar_from(sft.requires_grad_(False), config.lora, seed, _body_name(config)) if lora else sft
        return train_reward_model(
            _learner(start, config),
            tokenizer,
            data.comparisons,
            config.reward_model,
            demonstrations=data.demonstrations,
            seed=seed,
            recorder=recorder,
        )
    policy = share(sft) if config.previous is None else load_policy(config.previous, step, device, **options)
    if lora and not hasattr(policy, "peft_config"):
        policy = add_lora(policy, config.lora, seed, _body_name(config))
    common: Any = {"seed": seed, "recorder": recorder, "monitor": _gold_monitor(data)}
    if step == "dpo":
        policy = _learner(policy, config)
        return train_dpo(policy, _freeze(sft, config), tokenizer, data.comparisons, config.dpo, **common)
    reward: FileReward | RewardModelScorer
    value = None
    if config.reward is not None:
        reward = FileReward(config.reward)
    else:
        tokens = getattr(config, SETTINGS[step]).micro_batch_tokens
        reward = RewardModelScorer(*load_reward_model(run, device, **options), tokens)
        same = hasattr(reward.model, "peft_config") == lora and reward.tokenizer.get_vocab() == tokenizer.get_vocab()
        if step in ("ppo", "ppo_ptx") and same:
            value = share(reward.model)
        _freeze(reward.model, config)
    prompts, common["corpus_blocks"] = [row.text for row in data.prompts], inputs.corpus_blocks
    if step in ("rloo", "grpo"):
        settings = config.rloo if step == "rloo" else config.grpo
        policy = _learner(policy, config)
        return train_grpo(policy, _freeze(sft, config), reward, tokenizer, prompts, settings, **common)
    if value is None:  # the reward is a function, or a model with another body or vocabulary
        value = lora_scalar_from(sft, config.lora, seed, _body_name(config)) if lora else scalar_model_from(sft, seed)
    return train_rlhf(
        _learner(policy, config),
        _learner(value, config),
        _freeze(sft, config),
        reward,
        tokenizer,
        prompts,
        replace(config.rlhf, ptx_coef=0.0) if step == "ppo" else config.rlhf,
        **common,
    )


def _gold_monitor(data: DataFolder) -> Monitor | None:
    """Measures the gold score of sampled answers, where the truth is known."""
    judge = gold_judge(data)
    if judge is None:
        return None

    def gold(prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool]) -> dict[str, float]:
        scores = judge.scores(prompts, responses, ended)
        return {"objective/gold": sum(scores) / len(scores)}

    return gold


def _learner(model: PreTrainedModel, config: RunConfig) -> PreTrainedModel:
    """The same model, ready to be trained in the run's precision; of a frozen body only the adapter is."""
    if config.precision == "bfloat16" and config.lora.rank is None:
        compute_in(model, torch.bfloat16)
    if config.gradient_checkpointing:
        recompute_layers(model)
    return model


def _freeze(model: PreTrainedModel, config: RunConfig) -> PreTrainedModel:
    """The same model, not to be trained; without adapters it needs no float32 weights any more."""
    if config.lora.rank is None:
        half(model, config.frozen_dtype)
    if config.gradient_checkpointing:
        recompute_layers(model)  # so that it too never holds all logits at once
    return model.requires_grad_(False)


def _body_name(config: RunConfig) -> str:
    """The body of this run's adapters, for adapter_config.json: where the user has it, or the run's copy of it."""
    name = config.given_sft if config.given_sft is not None else config.model
    if name is None or is_adapter(name):  # merged into its base, which stands in the run alone
        return str((config.out / ("base" if config.given_sft is None else "sft")).resolve())
    return str(Path(name).resolve()) if Path(name).is_dir() else name
