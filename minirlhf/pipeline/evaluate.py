"""Measure finished models: all models of a run, for report.json, or one of them, for ``minirlhf evaluate``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minirlhf.checkpoints import verify_model
from minirlhf.data import DataFolder, read_folder
from minirlhf.errors import CheckpointError, UserError
from minirlhf.intervals import bootstrap, mean_and_error, win_rate
from minirlhf.language.evaluation import (
    Answers,
    EvaluationConfig,
    answer,
    evaluate_reward_model,
)
from minirlhf.language.forward import context_of
from minirlhf.language.models import context_in, load_causal_model
from minirlhf.language.pretraining import blocks_of, corpus_loss
from minirlhf.language.reward_model import RewardFunction, RewardModelScorer
from minirlhf.language.tokenization import encode_prompts, encode_texts, in_chunks, load_tokenizer
from minirlhf.pipeline.fitting import answer_room, fit
from minirlhf.pipeline.folder import (
    POLICIES,
    Bodies,
    context_of_run,
    find_device,
    hide_loading_bars,
    load_policy,
    load_reward_model,
    read_config,
    read_settings,
)
from minirlhf.pipeline.given import FileReward, reward_of
from minirlhf.pipeline.inputs import find_data
from minirlhf.pipeline.judges import find_judge
from minirlhf.pipeline.settings import check_data

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Row = dict[str, Any]
SEEN_AT_ONCE = 1024
"""Tokens of the corpus whose logits are computed at a time: of a large vocabulary they are GBs."""


@dataclass
class Evaluator:
    """Lets policies answer a run's held-out prompts, and compares each with the run's base and SFT models."""

    run: Path
    """The run's folder, with base, SFT and reward model."""
    data: DataFolder
    """The run's data."""
    block_length: int
    """Tokens per block of the corpus loss."""
    settings: EvaluationConfig
    """How many prompts, temperature, length limit."""
    seed: int
    """Random seed for sampling."""
    device: torch.device
    """Where the models run."""
    dtype: torch.dtype = torch.float32
    """Of their weights."""
    reward: FileReward | None = None
    """The reward of a run that has no reward model."""

    def __post_init__(self) -> None:
        self.bodies: Bodies = {}  # adapters share one
        self.proxy: RewardFunction = self.reward or RewardModelScorer(
            *load_reward_model(self.run, self.device, dtype=self.dtype, bodies=self.bodies)
        )
        self.tokenizer = load_tokenizer(self.run / "sft")
        self.judge = find_judge(self.data, self.proxy)
        self.judge_name = "gold" if self.judge.is_gold else "reward_model"
        self.prompts = [row.text for row in self.data.heldout_prompts][: self.settings.prompts]
        self.best = self.judge.best(self.prompts)
        corpus = in_chunks(encode_texts, self.tokenizer, (row.text for row in self.data.heldout_corpus))
        self.blocks = blocks_of(corpus, self.block_length, self.settings.corpus_blocks)
        self.models = {name: self.load(name) for name in ("base", "sft")}
        self.answers: dict[str, Answers] = {}
        self.scores: dict[str, list[float]] = {}

    def load(self, name: str) -> PreTrainedModel:
        """A policy of the run."""
        return load_policy(self.run, name, self.device, dtype=self.dtype, bodies=self.bodies)

    def ask(self, name: str) -> None:
        """Let one of the models answer the prompts and the judge score its answers."""
        model, sft = self.models[name], self.models["sft"]
        said = answer(model, self.tokenizer, self.prompts, self.settings, reference=sft, seed=self.seed)
        self.answers[name], self.scores[name] = said, self.judge.scores(self.prompts, said.responses, said.ended)

    def measure(self, name: str) -> Row:
        """The measurements of a model, after `ask` for it, base and SFT."""
        own, base, said = self.scores[name], self.scores["base"], self.answers[name]
        mean, error = mean_and_error(own, self.prompts)
        measured: Row = {"gold_mean": mean, "gold_standard_error": error if math.isfinite(error) else None}
        measured |= {"headroom_closed": None, "headroom_closed_interval": None}
        if self.best is not None and mean_and_error(self.best)[0] > mean_and_error(base)[0]:
            closed, interval = bootstrap(_headroom_closed, own, base, self.best, groups=self.prompts)
            measured |= {"headroom_closed": closed, "headroom_closed_interval": _ends(interval)}
        for other in ("sft", "base"):
            rate, interval = win_rate(own, self.scores[other], self.prompts)
            measured |= {f"win_rate_vs_{other}": rate, f"win_rate_vs_{other}_interval": list(interval)}
            gain, interval = bootstrap(torch.sub, own, self.scores[other], groups=self.prompts)
            measured |= {f"gold_gain_vs_{other}": gain, f"gold_gain_vs_{other}_interval": _ends(interval)}
        measured["kl_to_sft"] = mean_and_error(said.kl)[0]
        measured["mean_length"] = mean_and_error([float(n) for n in said.lengths])[0]
        measured["ended_fraction"] = mean_and_error([float(e) for e in said.ended])[0]
        measured["proxy_mean"] = float(torch.as_tensor(self.proxy(self.prompts, said.responses)).mean())
        rows = max(1, SEEN_AT_ONCE // self.block_length)
        measured["corpus_loss"] = corpus_loss(self.models[name], self.blocks, rows)
        return measured

    def examples(self) -> list[Row]:
        """Some prompts with every model's answer and the parts of its score, for the report."""
        count = min(self.settings.examples, len(self.prompts))
        # Spread over the whole list, so that every family of prompts has a chance to be shown.
        chosen = [i * len(self.prompts) // count for i in range(count)]
        rows: list[Row] = [
            {"prompt": self.prompts[i], "best": self.best[i] if self.best else None, "answers": {}} for i in chosen
        ]
        prompts = [row["prompt"] for row in rows]
        for name, said in self.answers.items():
            responses, ended = [said.responses[i] for i in chosen], [said.ended[i] for i in chosen]
            parts = self.judge.parts(prompts, responses, ended)
            for row, response, end, score in zip(rows, responses, ended, parts, strict=True):
                row["answers"][name] = {"response": response, "ended": end, "score": score}
        return rows


def _headroom_closed(own: Tensor, base: Tensor, best: Tensor) -> Tensor:
    return (own - base) / (best - base)


def _ends(interval: tuple[float, float]) -> list[float] | None:
    """The interval for JSON: null if a single prompt gives none."""
    return list(interval) if all(map(math.isfinite, interval)) else None


def evaluate_run(evaluator: Evaluator, methods: Sequence[str], progress: bool = True) -> tuple[Row, list[Row]]:
    """Answer the held-out prompts with every policy, judge the answers, and measure the reward model.

    Args:
        evaluator: of a run.
        methods: of its step 3; their policies are finished.
        progress: whether to draw a progress bar.

    Returns:
        The measurements for report.json, and the examples for answers.json.
    """
    from tqdm.auto import tqdm

    data, judge, best = evaluator.data, evaluator.judge, evaluator.best
    policies = ("base", "sft", *methods)
    for name in methods:
        evaluator.models[name] = evaluator.load(name)
    for name in tqdm(policies, desc="evaluation", disable=not progress, dynamic_ncols=True):
        evaluator.ask(name)
    evaluation = {name: evaluator.measure(name) for name in policies}

    def gold(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return judge.scores(prompts, responses, [True] * len(prompts))

    labelers = {row.labeler for row in data.comparisons}
    # Each model's corpus loss above the base model's, and the share of PPO's that PPO-ptx removes.
    base = evaluation["base"]["corpus_loss"]
    tax = {name: evaluation[name]["corpus_loss"] - base for name in policies[1:]}
    removed = 1 - tax["ppo_ptx"] / tax["ppo"] if {"ppo", "ppo_ptx"} <= set(tax) and tax["ppo"] > 0 else None
    measured = {
        "judge": evaluator.judge_name,
        "heldout_prompts": len(evaluator.prompts),
        "distinct_prompts": len(set(evaluator.prompts)),
        "best_mean": mean_and_error(best)[0] if best else None,
        "evaluation": evaluation,
        "reward_model": evaluate_reward_model(
            evaluator.proxy, data.heldout_comparisons, labelers, gold if judge.is_gold else None
        ),
        "alignment_tax": tax | {"removed_by_ptx": removed},
    }
    return measured, evaluator.examples()


def evaluate_checkpoint(
    run: Path,
    checkpoint: str | None,
    settings: EvaluationConfig,
    seed: int,
    device_name: str,
    reward: str | None = None,
) -> Row:
    """Measure one policy on a run's held-out prompts, compared with the run's base and SFT models.

    Args:
        run: a finished run; supplies data, judge, base and SFT.
        checkpoint: a policy of the run, or a folder with a causal model that has the same vocabulary; None for the
            policy of the run's last method.
        settings: how many prompts, temperature, length limit.
        seed: random seed for sampling.
        device_name: cpu, cuda or auto.
        reward: FILE.py:FUNCTION of a run whose reward is a function.

    Returns:
        The same measurements as one entry of report.json's ``evaluation``, with ``judge`` and ``checkpoint``.

    Raises:
        CheckpointError: the run or the checkpoint is missing or damaged, the checkpoint is not a causal model, the
            vocabularies differ, the run's data have changed, or it was trained with another reward function than the
            one named.
        UserError: prompt and answer together are longer than the models can read.
    """
    config = read_config(run)
    checkpoint = config.methods[-1] if checkpoint is None else checkpoint
    hide_loading_bars()
    device = find_device(device_name)
    function = reward_of(read_settings(run), reward, run)
    folder = run / checkpoint if (run / checkpoint).is_dir() else Path(checkpoint)
    scored = () if function is not None else (run / "reward_model",)
    for needed in (run / "base", run / "sft", *scored, folder):
        verify_model(needed, required=needed.parent == run)
    found = find_data(config)
    data = read_folder(found, config.seed, config.data_errors)
    check_data(run, found)
    if config.data_errors == "skip":  # the run left out what its models can't read
        context = config.context_length or context_of_run(run)
        fit(data, load_tokenizer(run / "base"), context, answer_room(config), skip=True)
        if (named := config.given_reward_model) is not None:
            own = run / "reward_model"
            fit(data, load_tokenizer(own), context_in(own), answer_room(config), skip=True, reward_model=named)
    evaluator = Evaluator(
        run, data, config.base.block_length, settings, seed, device, dtype=config.frozen_dtype, reward=function
    )
    if load_tokenizer(folder).get_vocab() != evaluator.tokenizer.get_vocab():
        raise CheckpointError(f"{folder}: its tokenizer's vocabulary differs from that of the run {run}")
    if folder.parent == run and folder.name in POLICIES:
        evaluator.models[checkpoint] = evaluator.load(folder.name)
    else:
        evaluator.models[checkpoint] = load_causal_model(folder, dtype=config.frozen_dtype).to(device).eval()
    readers = [(evaluator.tokenizer, list(evaluator.models.values()))]
    if isinstance(evaluator.proxy, RewardModelScorer):
        readers.append((evaluator.proxy.tokenizer, [evaluator.proxy.model]))
    for tokenizer, models in readers:
        longest = max(len(ids) for ids in encode_prompts(tokenizer, evaluator.prompts))
        context = min(filter(None, map(context_of, models)), default=None)
        if context is not None and longest + settings.max_response_tokens > context:
            raise UserError(
                f"--max-response-tokens {settings.max_response_tokens}: the models read {context} tokens, of which the "
                f"longest prompt takes {longest}; give at most {context - longest}"
            )
    for name in evaluator.models:
        evaluator.ask(name)
    return {"checkpoint": checkpoint, "judge": evaluator.judge_name} | evaluator.measure(checkpoint)
