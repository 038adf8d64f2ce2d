"""What mistakes in GRPO look like: the failure lab of lesson 12.

    .venv/bin/python benchmarks/figure_12_failure_lab.py

Every run is a short one: GRPO from data/checkpoints/sft against data/checkpoints/reward_model, SETTINGS below.

data/results/group_failure_lab.csv: every run of `minirlhf_course.group_failure_lab`, two seeds, and five healthy ones;
one row per step, with the metrics that lesson 12 draws.

Each run uses one thread; the first line of the file names machine, date and command. Seeds make results repeat on one
machine; another processor rounds differently, and single runs come out differently there.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from minirlhf_course import group_failure_lab
from tables import RESULTS, ROOT, Row, write_table

from minirlhf.data import read_folder
from minirlhf.language.grpo import GRPOConfig, train_grpo
from minirlhf.language.models import clone
from minirlhf.language.reward_model import RewardModelScorer
from minirlhf.pipeline.folder import hide_loading_bars, load_policy, load_reward_model
from minirlhf.training import Recorder

CHECKPOINTS = ROOT / "data" / "checkpoints"
SETTINGS: dict[str, Any] = {"steps": 24, "batch_size": 64, "minibatch_size": 32, "lr": 1e-3, "warmup": 4}
HEALTHY_SEEDS, LAB_SEEDS = (0, 1, 2, 3, 4), (10, 11)
METRICS = (
    "objective/score",
    "objective/kl",
    "objective/entropy",
    "objective/group_std",
    "objective/response_length",
    "policy/kl_loss",
    "policy/grad_norm",
)


def main() -> None:
    argparse.ArgumentParser(description="The failure lab of lesson 12.").parse_args()
    torch.set_num_threads(1)
    hide_loading_bars()
    cpu = torch.device("cpu")
    sft = load_policy(CHECKPOINTS, "sft", cpu)
    reward_model, tokenizer = load_reward_model(CHECKPOINTS, cpu)
    reward = RewardModelScorer(reward_model, tokenizer)
    prompts = [row.text for row in read_folder(ROOT / "data" / "small_world", 0).prompts]
    config = GRPOConfig(**SETTINGS)

    rows: list[Row] = []
    for run, seeds in {"healthy": HEALTHY_SEEDS, **dict.fromkeys(group_failure_lab.RUNS, LAB_SEEDS)}.items():
        for seed in seeds:
            recorder = Recorder(run, show=("objective/score", "objective/kl"))
            models = clone(sft).eval(), sft, reward, tokenizer, prompts, config
            if run == "healthy":
                train_grpo(*models, seed=seed, recorder=recorder)
            else:
                group_failure_lab.train(run, *models, seed=seed, recorder=recorder)
            head = {"run": run, "seed": seed}
            rows += [head | {"step": int(row["step"])} | {key: row[key] for key in METRICS} for row in recorder.history]
    write_table(RESULTS / "group_failure_lab.csv", rows)


if __name__ == "__main__":
    main()
