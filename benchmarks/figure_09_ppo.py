"""How much KL, how much pretraining, and what mistakes look like: the runs of lesson 09.

    .venv/bin/python benchmarks/figure_09_ppo.py

Every run is a short one: PPO from data/checkpoints/sft against data/checkpoints/reward_model, SETTINGS below.

data/results/ppo_kl_ptx_sweep.csv: each pair of (beta, ptx_coef) in SWEEP, three seeds; one row a run, measured after
it (the first row is the SFT model, where all of them begin):

    score, gold       means of EVALUATED held-out prompts answered once: the reward model's, and the truth
    gold_error        standard error of that mean over the prompts
    kl                nats per answer from the SFT model, exact at each token of those answers
    length, ended     tokens of an answer; share of them that ended by themselves
    corpus_loss       nats per token of the held-out corpus

data/results/text_failure_lab.csv: every run of `minirlhf_course.text_failure_lab`, two seeds, and five healthy ones:
the sweep's at beta BETA without PPO-ptx, and two more; one row per step, with the metrics that lesson 09 draws.

Each run uses one thread; the first line of a file names machine, date and command. Seeds make results repeat on one
machine; another processor rounds differently, and single runs come out differently there.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from minirlhf_course import text_failure_lab
from minirlhf_course.world import GoldLabeler, World
from tables import RESULTS, ROOT, Row, write_table

from minirlhf.data import read_folder
from minirlhf.intervals import mean_and_error
from minirlhf.language.evaluation import EvaluationConfig, answer
from minirlhf.language.models import clone
from minirlhf.language.pretraining import blocks_of, corpus_loss
from minirlhf.language.reward_model import RewardModelScorer
from minirlhf.language.rlhf import RLHFConfig
from minirlhf.language.tokenization import encode_texts
from minirlhf.pipeline.folder import hide_loading_bars, load_policy, load_reward_model
from minirlhf.training import Recorder

CHECKPOINTS = ROOT / "data" / "checkpoints"

# Two epochs at a rate above the default run's: short runs must go far enough for beta to matter.
SETTINGS: dict[str, Any] = {"steps": 20, "batch_size": 64, "minibatch_size": 32, "epochs": 2, "lr": 1e-3, "warmup": 4}
BETA = 0.1
SWEEP = (
    (0.0, 0.0),
    (0.03, 0.0),
    (BETA, 0.0),
    (0.3, 0.0),
    (1.0, 0.0),
    (BETA, 0.01),
    (BETA, 0.05),
    (BETA, 0.3),
)
SEEDS = (0, 1, 2)
HEALTHY_SEEDS, LAB_SEEDS = (3, 4), (10, 11)
EVALUATED = 400
LAB_METRICS = (
    "objective/score",
    "objective/kl",
    "objective/entropy",
    "policy/first_ratio_error",
    "value/loss",
    "value/explained_variance",
)


class Bench:
    """Models and data, loaded once."""

    def __init__(self) -> None:
        hide_loading_bars()
        cpu = torch.device("cpu")
        self.sft = load_policy(CHECKPOINTS, "sft", cpu)
        self.reward_model, self.tokenizer = load_reward_model(CHECKPOINTS, cpu)
        self.reward = RewardModelScorer(self.reward_model, self.tokenizer)
        self.gold = GoldLabeler(World(0))
        folder = read_folder(ROOT / "data" / "small_world", 0)
        self.prompts = [row.text for row in folder.prompts]
        self.heldout = [row.text for row in folder.heldout_prompts][:EVALUATED]
        self.corpus, self.heldout_corpus = (
            blocks_of(encode_texts(self.tokenizer, [row.text for row in rows]), 64)
            for rows in (folder.corpus, folder.heldout_corpus)
        )

    def train(self, letter: str, seed: int, name: str, **settings: Any) -> tuple[Any, list[dict[str, float]]]:
        recorder = Recorder(name, show=("objective/score", "objective/kl"))
        policy = text_failure_lab.train(
            letter,
            clone(self.sft).eval(),
            clone(self.reward_model).eval(),
            self.sft,
            self.reward,
            self.tokenizer,
            self.prompts,
            replace(RLHFConfig(), **(SETTINGS | {"beta": BETA} | settings)),
            corpus_blocks=self.corpus,
            seed=seed,
            recorder=recorder,
        )
        return policy, recorder.history

    def measure(self, policy: Any) -> Row:
        answers = answer(policy, self.tokenizer, self.heldout, EvaluationConfig(), reference=self.sft, seed=0)
        golds = [
            self.gold.score(p, r, e).total
            for p, r, e in zip(self.heldout, answers.responses, answers.ended, strict=True)
        ]
        return {
            "score": mean_and_error(self.reward(self.heldout, answers.responses).tolist())[0],
            "gold": mean_and_error(golds)[0],
            "gold_error": mean_and_error(golds)[1],
            "kl": mean_and_error(answers.kl)[0],
            "length": mean_and_error([float(n) for n in answers.lengths])[0],
            "ended": sum(answers.ended) / len(answers.ended),
            "corpus_loss": corpus_loss(policy, self.heldout_corpus),
        }


def lab_rows(name: str, seed: int, history: Iterable[dict[str, float]]) -> list[Row]:
    head = {"run": name, "seed": seed}
    return [head | {"step": int(row["step"])} | {key: row[key] for key in LAB_METRICS} for row in history]


def main() -> None:
    argparse.ArgumentParser(description="The runs of lesson 09.").parse_args()
    torch.set_num_threads(1)
    bench = Bench()
    sweep: list[Row] = [{"beta": "", "ptx_coef": "", "seed": ""} | bench.measure(bench.sft)]
    lab: list[Row] = []
    for beta, ptx_coef in SWEEP:
        for seed in SEEDS:
            # Letter C is no mistake at all: plain train_rlhf.
            policy, history = bench.train("C", seed, f"beta {beta} ptx {ptx_coef}", beta=beta, ptx_coef=ptx_coef)
            sweep.append({"beta": beta, "ptx_coef": ptx_coef, "seed": seed} | bench.measure(policy))
            if (beta, ptx_coef) == (BETA, 0.0):
                lab += lab_rows("healthy", seed, history)
    write_table(RESULTS / "ppo_kl_ptx_sweep.csv", sweep)
    for seed in HEALTHY_SEEDS:
        lab += lab_rows("healthy", seed, bench.train("C", seed, "healthy")[1])
    for letter in text_failure_lab.RUNS:
        for seed in LAB_SEEDS:
            lab += lab_rows(letter, seed, bench.train(letter, seed, letter)[1])
    write_table(RESULTS / "text_failure_lab.csv", lab)


if __name__ == "__main__":
    main()
