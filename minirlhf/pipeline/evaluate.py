"""All measurements of a finished run: what report.json holds."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from minirlhf.checkpoints import SUMMARY, verify_model, write_json
from minirlhf.config import RunConfig
from minirlhf.data import read_folder
from minirlhf.errors import CheckpointError, UserError
from minirlhf.language.evaluation import (
    Answers,
    EvaluationConfig,
    answer,
    evaluate_reward_model,
    mean_and_error,
    win_rate,
)
from minirlhf.language.models import context_of, load_causal_model
from minirlhf.language.pretraining import blocks_of, corpus_loss
from minirlhf.language.reward_model import RewardFunction, RewardModelScorer
from minirlhf.language.tokenization import encode_prompts, encode_texts, load_tokenizer
from minirlhf.pipeline.folder import (
    POLICIES,
    STEPS,
    find_device,
    hide_loading_bars,
    load_policy,
    load_reward_model,
    read_config,
)
from minirlhf.pipeline.inputs import Inputs
from minirlhf.pipeline.judges import Judge, find_judge


def evaluate_run(
    config: RunConfig,
    inputs: Inputs,
    judge: Judge,
    proxy: RewardModelScorer,
    device: torch.device,
    *,
    prepared: float,
    began: float,
    command: str,
    progress: bool,
) -> dict[str, Any]:
    """Answer the held-out prompts with every policy, judge the answers, and measure the reward model.

    Args:
        config: of the run.
        inputs: its data.
        judge: scores the answers: gold, or the reward model where no truth is known.
        proxy: the run's reward model.
        device: where the models run.
        prepared: seconds from the command's start to the first step.
        began: when the evaluation began, by `time.monotonic`: the reward model was loaded since.
        command: the command line.
        progress: whether to draw a progress bar.

    Returns:
        The content of report.json. ``answers.json`` is written beside it: the examples that the report shows.
    """
    from tqdm.auto import tqdm

    settings = config.evaluation
    prompts = [row.text for row in inputs.folder.heldout_prompts][: settings.prompts]
    models = {name: load_causal_model(config.out / name).to(device).eval() for name in POLICIES}
    answers, scores = {}, {}
    for name in tqdm(POLICIES, desc="evaluation", disable=not progress, dynamic_ncols=True):
        answers[name] = answer(
            models[name], inputs.tokenizer, prompts, settings, reference=models["sft"], seed=config.seed
        )
        scores[name] = judge.scores(prompts, answers[name].responses, answers[name].ended)

    best = judge.best(prompts)
    evaluation = {}
    for name in POLICIES:
        measured = _policy(prompts, answers[name], scores[name], scores, best)
        measured["proxy_mean"] = float(proxy(prompts, answers[name].responses).mean())
        measured["corpus_loss"] = corpus_loss(models[name], inputs.heldout_blocks)
        evaluation[name] = measured

    summaries = {step: json.loads((config.out / step / SUMMARY).read_text(encoding="utf-8")) for step in STEPS}
    reward_model = evaluate_reward_model(
        proxy,
        inputs.folder.heldout_comparisons,
        {row.labeler for row in inputs.folder.comparisons},
        _gold(judge),
    )
    _write_answers(config.out, config, prompts, answers, judge, inputs)
    seconds = {"preparation": prepared} | {step: summaries[step]["seconds"] for step in STEPS}
    seconds["evaluation"] = time.monotonic() - began
    side_by_side = summaries["ppo"].get("beside", False)  # then the longer of the two counts
    total = sum(seconds.values()) - (min(seconds["ppo"], seconds["ppo_ptx"]) if side_by_side else 0.0)
    return {
        "judge": "gold" if judge.is_gold else "reward_model",
        "heldout_prompts": len(prompts),
        "distinct_prompts": len(set(prompts)),
        "best_mean": mean_and_error(best)[0] if best else None,
        "evaluation": evaluation,
        "reward_model": reward_model,
        "alignment_tax": _alignment_tax(evaluation),
        "parameters": summaries["base"]["parameters"],
        "seconds": seconds | {"total": total},
        "side_by_side": side_by_side,
        "seed": config.seed,
        "preset": config.preset,
        "data": inputs.folder.path.name,
        "command": command,
        "versions": {name: version(name) for name in ("minirlhf", "torch", "transformers", "tokenizers", "safetensors")}
        | {"python": platform.python_version()},
        "machine": {"device": str(device), "threads": torch.get_num_threads(), "platform": platform.platform()},
    }


def _gold(judge: Judge) -> RewardFunction | None:
    if not judge.is_gold:
        return None

    def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return judge.scores(prompts, responses, [True] * len(prompts))

    return reward


def _policy(
    prompts: list[str], answers: Answers, own: list[float], scores: dict[str, list[float]], best: list[float] | None
) -> dict[str, Any]:
    mean, error = mean_and_error(own, prompts)
    measured: dict[str, Any] = {"gold_mean": mean, "gold_standard_error": error, "headroom_closed": None}
    if best is not None:
        base, top = mean_and_error(scores["base"])[0], mean_and_error(best)[0]
        measured["headroom_closed"] = (mean - base) / (top - base) if top > base else None
    for other in ("sft", "base"):
        rate, interval = win_rate(own, scores[other], prompts)
        measured[f"win_rate_vs_{other}"] = rate
        measured[f"win_rate_vs_{other}_interval"] = list(interval)
    measured["kl_to_sft"] = mean_and_error(answers.kl)[0]
    measured["mean_length"] = mean_and_error([float(n) for n in answers.lengths])[0]
    measured["ended_fraction"] = mean_and_error([float(e) for e in answers.ended])[0]
    return measured


def _alignment_tax(evaluation: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """What a model costs in corpus loss above the base model: SFT, and PPO; and the share PPO-ptx takes away."""
    base = evaluation["base"]["corpus_loss"]
    tax = evaluation["ppo"]["corpus_loss"] - base
    tax_ptx = evaluation["ppo_ptx"]["corpus_loss"] - base
    removed = 1 - tax_ptx / tax if tax > 0 else None
    sft = evaluation["sft"]["corpus_loss"] - base
    return {"sft": sft, "ppo": tax, "ppo_ptx": tax_ptx, "removed_by_ptx": removed}


def _write_answers(
    out: Path, config: RunConfig, prompts: list[str], answers: dict[str, Answers], judge: Judge, inputs: Inputs
) -> None:
    """The first prompts with every policy's answer and its score's parts, for the report."""
    count = min(config.evaluation.examples, len(prompts))
    # Spread over the whole list, so that every family of prompts has a chance to be shown.
    chosen = [i * len(prompts) // count for i in range(count)]
    texts = [prompts[i] for i in chosen]
    best = judge.best(texts)
    rows: list[dict[str, Any]] = [
        {"prompt": text, "best": best[k] if best else None, "answers": {}} for k, text in enumerate(texts)
    ]
    for name in POLICIES:
        responses = [answers[name].responses[i] for i in chosen]
        ended = [answers[name].ended[i] for i in chosen]
        parts = judge.parts(texts, responses, ended)
        for row, response, end, score in zip(rows, responses, ended, parts, strict=True):
            row["answers"][name] = {"response": response, "ended": end, "score": score}
    write_json(out / "answers.json", rows)


def evaluate_checkpoint(
    run: Path, checkpoint: str, settings: EvaluationConfig, seed: int, device_name: str
) -> dict[str, Any]:
    """Measure one policy on a run's held-out prompts, beside the run's base and SFT models.

    Args:
        run: a finished run; gives data, judge, base and SFT.
        checkpoint: a policy of the run, or a folder with a causal model that has the same vocabulary.
        settings: how many prompts, temperature, length limit.
        seed: of the sampling.
        device_name: cpu, cuda or auto.

    Returns:
        The same measurements as one entry of report.json's ``evaluation``, with ``judge`` and ``checkpoint``.

    Raises:
        CheckpointError: the run or the checkpoint is missing or damaged, is no causal model, or their vocabularies
            differ.
        UserError: prompt and answer together are longer than the models can read.
    """
    config = read_config(run)
    hide_loading_bars()
    device = find_device(device_name)
    folder = run / checkpoint if (run / checkpoint).is_dir() else Path(checkpoint)
    for needed in (run / "base", run / "sft", run / "reward_model", folder):
        verify_model(needed, required=needed.parent == run)
    data = read_folder(config["data"], config["seed"])
    proxy = RewardModelScorer(*load_reward_model(run, device))
    judge = find_judge(data, proxy)
    tokenizer = proxy.tokenizer
    if load_tokenizer(folder).get_vocab() != tokenizer.get_vocab():
        raise CheckpointError(f"{folder}: its tokenizer has another vocabulary than the run {run}")
    prompts = [row.text for row in data.heldout_prompts][: settings.prompts]
    blocks = blocks_of(
        encode_texts(tokenizer, [row.text for row in data.heldout_corpus]), config["base"]["block_length"]
    )[: settings.corpus_blocks]
    models = {"sft": load_policy(run, "sft", device), "base": load_policy(run, "base", device)}
    models[checkpoint] = load_causal_model(folder).to(device).eval()
    longest = max(len(ids) for ids in encode_prompts(tokenizer, prompts))
    context = min(filter(None, map(context_of, models.values())), default=None)
    if context is not None and longest + settings.max_response_tokens > context:
        raise UserError(
            f"--max-response-tokens {settings.max_response_tokens}: the models read {context} tokens, and the longest "
            f"prompt takes {longest} of them; give {context - longest} at most"
        )
    answers = {
        name: answer(model, tokenizer, prompts, settings, reference=models["sft"], seed=seed)
        for name, model in models.items()
    }
    scores = {name: judge.scores(prompts, a.responses, a.ended) for name, a in answers.items()}
    measured = _policy(prompts, answers[checkpoint], scores[checkpoint], scores, judge.best(prompts))
    measured["proxy_mean"] = float(proxy(prompts, answers[checkpoint].responses).mean())
    measured["corpus_loss"] = corpus_loss(models[checkpoint], blocks)
    return {"checkpoint": str(checkpoint), "judge": "gold" if judge.is_gold else "reward_model"} | measured
