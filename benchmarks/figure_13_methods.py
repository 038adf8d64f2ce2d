"""PPO, PPO-ptx, RLOO, GRPO, DPO and best-of-n on one picture: the runs of lesson 13.

    .venv/bin/python benchmarks/figure_13_methods.py              all of it, two processes

Every policy begins as data/checkpoints/sft. The first four sample 100 steps of 128 answers against
data/checkpoints/reward_model; DPO sees the rankings that this reward model learned from, once, and samples nothing;
best-of-n chooses among POOL answers of the SFT model by the reward model. Each with its default settings; DPO with its
paper's beta too (dpo_paper), because the default was chosen after a look at this run's gold. So the budget of labels is
equal for all, that of sampled tokens for the first four; seconds are measured, one thread each, and compare only if
nothing else ran on the machine.

data/results/methods.csv: a row per method, seed and measured step (for best-of-n the step is n), on PROMPTS held-out
prompts:

    kl                nats per answer from the SFT model, exact at each token (best-of-n: log n - (n - 1) / n)
    proxy, gold       means of the reward model's score and of the truth
    win_rate          share of prompts where gold prefers the answer to the SFT model's; a tie counts half
    length, ended     tokens of an answer; share of them that ended by themselves
    corpus_loss       nats per token of the held-out corpus; at the last step
    seconds           of training up to here, without these measurements
    sampled_tokens    up to here
    labels            rankings that the method needs
    models            in memory while it trains

Finished runs stand in build/figure_13 and are not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import torch
from minirlhf_course.overoptimisation import best_of_n, best_of_n_kl
from minirlhf_course.world import GoldLabeler, World
from tables import RESULTS, ROOT, Row, write_table

from minirlhf.checkpoints import write_json
from minirlhf.data import read_folder
from minirlhf.intervals import mean_and_error, win_rate
from minirlhf.language.dpo import DPOConfig, train_dpo
from minirlhf.language.evaluation import EvaluationConfig, answer
from minirlhf.language.grpo import GRPOConfig, RLOOConfig, train_grpo
from minirlhf.language.models import clone
from minirlhf.language.pretraining import blocks_of, corpus_loss
from minirlhf.language.reward_model import RewardModelScorer
from minirlhf.language.rlhf import RLHFConfig, train_rlhf
from minirlhf.language.tokenization import encode_texts
from minirlhf.pipeline.folder import hide_loading_bars, load_policy, load_reward_model
from minirlhf.training import Recorder

CACHE = ROOT / "build" / "figure_13"
CHECKPOINTS = ROOT / "data" / "checkpoints"
SEEDS = (0, 1, 2)
PROMPTS, POOL = 400, 64
METHODS = ("ppo", "ppo_ptx", "rloo", "grpo", "dpo", "dpo_paper")
MODELS = {"ppo": 4, "ppo_ptx": 4, "rloo": 3, "grpo": 3, "dpo": 2, "dpo_paper": 2, "best_of_n": 2, "sft": 1}
PAPER_BETA = 0.1
SHARES = (0.04, 0.08, 0.15, 0.25, 0.4, 0.55, 0.75, 1.0)  # of the training steps, where the policy is measured


class Bench:
    """Models and data, loaded once a process."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        hide_loading_bars()
        cpu = torch.device("cpu")
        self.sft = load_policy(CHECKPOINTS, "sft", cpu)
        self.reward_model, self.tokenizer = load_reward_model(CHECKPOINTS, cpu)
        self.reward = RewardModelScorer(self.reward_model, self.tokenizer)
        self.gold = GoldLabeler(World(0))
        self.folder = read_folder(ROOT / "data" / "small_world", 0)
        self.prompts = [row.text for row in self.folder.prompts]
        self.heldout = Random("methods").sample([row.text for row in self.folder.heldout_prompts], PROMPTS)
        self.corpus, self.heldout_corpus = (
            blocks_of(encode_texts(self.tokenizer, [row.text for row in rows]), 64)
            for rows in (self.folder.corpus, self.folder.heldout_corpus)
        )
        self.sft_golds = self.golds(answer(self.sft, self.tokenizer, self.heldout, EvaluationConfig(), seed=2))

    def golds(self, found: Any) -> list[float]:
        rows = zip(self.heldout, found.responses, found.ended, strict=True)
        return [self.gold.score(*row).total for row in rows]

    def measure(self, policy: Any, *, last: bool) -> Row:
        found = answer(policy, self.tokenizer, self.heldout, EvaluationConfig(), reference=self.sft, seed=1)
        golds = self.golds(found)
        return {
            "kl": mean_and_error(found.kl)[0],
            "proxy": float(self.reward(self.heldout, found.responses).mean()),
            "gold": mean_and_error(golds)[0],
            "win_rate": win_rate(golds, self.sft_golds, self.heldout)[0],
            "length": sum(found.lengths) / PROMPTS,
            "ended": sum(found.ended) / PROMPTS,
            "corpus_loss": corpus_loss(policy, self.heldout_corpus) if last else "",
        }


@cache
def bench() -> Bench:
    return Bench()


class Measured(Recorder):
    """A recorder that measures the policy at SHARES of the steps, and leaves out the time that this takes."""

    def __init__(self, method: str, seed: int, total: int) -> None:
        super().__init__(method, progress=False)
        self.head, self.total = {"method": method, "seed": seed}, total
        self.at = {max(1, round(share * total)) for share in SHARES}
        self.rows: list[Row] = []
        self.tokens, self.began, self.measuring = 0.0, time.monotonic(), 0.0

    def log(self, metrics: Any) -> None:
        super().log(metrics)
        step, before = len(self.history), time.monotonic()
        if "perf/seconds" in metrics:  # DPO's own samples only measure
            self.tokens += metrics["perf/response_tokens_per_second"] * metrics["perf/seconds"]
        if step in self.at:
            seconds = before - self.began - self.measuring
            found = bench().measure(self._models["policy"], last=step == self.total)
            about = {"seconds": seconds, "sampled_tokens": round(self.tokens)}
            self.rows.append(self.head | {"step": step} | found | about)
            self.measuring += time.monotonic() - before


def train(method: str, seed: int) -> list[Row]:
    """The rows of one run."""
    b = bench()
    policy, options = clone(b.sft).eval(), {"seed": seed}
    if method in ("dpo", "dpo_paper"):
        config = DPOConfig(measured_prompts=0, beta=PAPER_BETA if method == "dpo_paper" else DPOConfig().beta)
        total = round(config.epochs * len(b.folder.comparisons) / config.batch_size)
        recorder = Measured(method, seed, total)
        train_dpo(policy, b.sft, b.tokenizer, b.folder.comparisons, config, recorder=recorder, **options)
    elif method in ("ppo", "ppo_ptx"):
        ppo = RLHFConfig(ptx_coef=0.05 if method == "ppo_ptx" else 0.0)
        recorder, value = Measured(method, seed, ppo.steps), clone(b.reward_model).eval()
        parts = (b.reward, b.tokenizer, b.prompts, ppo)
        train_rlhf(policy, value, b.sft, *parts, corpus_blocks=b.corpus, recorder=recorder, **options)
    else:
        grpo = RLOOConfig() if method == "rloo" else GRPOConfig()
        recorder = Measured(method, seed, grpo.steps)
        train_grpo(policy, b.sft, b.reward, b.tokenizer, b.prompts, grpo, recorder=recorder, **options)
    return recorder.rows


def choose() -> list[Row]:
    """The best of n answers of the SFT model by the reward model, for several n."""
    b, rows = bench(), []
    prompts = [prompt for prompt in b.heldout for _ in range(POOL)]
    began = time.monotonic()
    found = answer(b.sft, b.tokenizer, prompts, EvaluationConfig(), seed=3)
    proxy = b.reward(prompts, found.responses).view(PROMPTS, POOL)
    seconds = time.monotonic() - began
    golds = [b.gold.score(*row).total for row in zip(prompts, found.responses, found.ended, strict=True)]
    sft = torch.tensor(b.sft_golds)[:, None]
    gold = torch.tensor(golds).view(PROMPTS, POOL)
    table = {
        "proxy": proxy,
        "gold": gold,
        "win_rate": (gold > sft).float() + 0.5 * (gold == sft).float(),
        "length": torch.tensor(found.lengths).float().view(PROMPTS, POOL),
        "ended": torch.tensor(found.ended).float().view(PROMPTS, POOL),
    }
    for n in (2**power for power in range(POOL.bit_length())):
        means = {key: float(best_of_n(proxy, values, n).mean()) for key, values in table.items()}
        share = n / POOL  # what answering one question per prompt takes
        about = {"seconds": seconds * share, "sampled_tokens": round(sum(found.lengths) * share), "corpus_loss": ""}
        rows.append({"method": "best_of_n", "seed": 0, "step": n, "kl": best_of_n_kl(n)} | means | about)
    return rows


def start() -> list[Row]:
    """The SFT model, where all begin."""
    found = bench().measure(bench().sft, last=True)
    return [{"method": "sft", "seed": 0, "step": 0} | found | {"seconds": 0.0, "sampled_tokens": 0}]


def make(job: tuple[str, int]) -> list[Row]:
    method, seed = job
    path = CACHE / f"{method}-seed{seed}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = choose() if method == "best_of_n" else start() if method == "sft" else train(method, seed)
        write_json(path, rows)
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))
    print(f"{method} {seed}: gold {rows[-1]['gold']:.3f}, kl {rows[-1]['kl']:.2f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="The runs of lesson 13.")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes")
    parser.add_argument("--only", choices=METHODS, nargs="*", help="make these runs, and write no table")
    arguments = parser.parse_args()
    jobs = [("sft", 0), ("best_of_n", 0)] if arguments.only is None else []
    jobs += [(method, seed) for seed in SEEDS for method in arguments.only or METHODS]
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        rows = [row for found in pool.map(make, jobs) for row in found]
    if arguments.only is not None:
        return
    labels = len(bench().folder.comparisons)
    order = ("sft", *METHODS, "best_of_n")
    for row in rows:
        row |= {"labels": 0 if row["method"] == "sft" else labels, "models": MODELS[row["method"]]}
    rows.sort(key=lambda row: (order.index(row["method"]), row["seed"], row["step"]))
    write_table(Path(RESULTS / "methods.csv"), rows)


if __name__ == "__main__":
    main()
