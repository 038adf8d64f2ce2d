"""Which of PPO's details matter, and what its mistakes look like: the long runs of lesson 05.

    .venv/bin/python benchmarks/ppo_ablation.py                  all tables; about 20 minutes with two processes
    .venv/bin/python benchmarks/ppo_ablation.py --only details
    .venv/bin/python benchmarks/ppo_ablation.py --only bugs
    .venv/bin/python benchmarks/ppo_ablation.py --only methods

details -> data/results/ppo_ablation.csv: PPO as shipped, and with one detail changed at a time (DETAILS below), 5 seeds
on CartPole-v1 and 3 on Pendulum-v1. One row a run:

    mean_return   of all evaluations (20 greedy episodes each, on a schedule): high for what learns early and keeps it
    final_return  of the last three evaluations
    solved_at     environment steps at the first evaluation of at least 475 (CartPole-v1; empty if never)
    policy_kl, clip_fraction   means over all updates

bugs -> data/results/failure_lab.csv: every run of `minirlhf_course.failure_lab`, and PPO as shipped ("healthy"), on
CartPole-v1; one row an update, with the metrics that lesson 05 draws.

methods -> data/results/trust_regions.csv: TRPO, PPO with its clip and PPO with the adaptive KL penalty, 5 seeds each on
CartPole-v1; one row an update.

A command that was stopped goes on where it was (build/ppo_ablation holds the runs that are done, as long as neither
`minirlhf.control` nor this script changes). Each run uses one thread; the first line of a file names machine, date and
command. Seeds make results repeat on one machine; another processor rounds differently, and single runs come out
differently there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tables import RESULTS, ROOT, Row, write_table

BUDGET = {"CartPole-v1": 50_000, "Pendulum-v1": 100_000}
SEEDS = {"CartPole-v1": range(5), "Pendulum-v1": range(3)}
EVERY = {"CartPole-v1": 2_048, "Pendulum-v1": 4_096}
LAST = 3
"""Evaluations that final_return averages."""

# One detail at a time: a name, and what it changes in the config. {}: it depends on the task or is no setting, see
# `_trained`.
DETAILS: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "advantages not normalized": {"whiten_advantages": False},
    "lambda 1 (Monte Carlo)": {"lam": 1.0},
    "lambda 0 (one step)": {"lam": 0.0},
    "no clip": {"clip_range": None},
    "no clip, adaptive KL penalty": {"clip_range": None, "beta": 1.0, "target_kl": 0.01},
    "1 epoch": {"epochs": 1},
    "30 epochs": {"epochs": 30},
    "30 epochs, no clip": {"epochs": 30, "clip_range": None},
    "whole batch, no minibatches": {},
    "learning rate 3e-4": {"lr": 3e-4},
    "learning rate not annealed": {"anneal_lr": False},
    "value clip 0.2": {"value_clip_range": 0.2},
    "entropy bonus 0.01": {"entropy_coef": 0.01},
    "no gradient clip": {"max_grad_norm": float("inf")},
    "Adam epsilon 1e-8": {"adam_eps": 1e-8},
    "ReLU": {"activation": "relu"},
    "shared trunk": {"shared": True},
    "PyTorch's own start": {},
    "policy head started at 1": {},
    "truncation as termination": {},
}

FAILURE_METRICS = (
    "policy/approx_kl",
    "policy/clip_fraction",
    "policy/entropy",
    "value/explained_variance",
    "value/loss",
)


METHODS: dict[str, dict[str, Any]] = {
    "TRPO": {},
    "PPO, clip": {},
    "PPO, adaptive KL": DETAILS["no clip, adaptive KL penalty"],
}

METHOD_METRICS = (
    "policy/kl",
    "policy/approx_kl",
    "policy/clip_fraction",
    "policy/entropy",
    "policy/ratio_max",
    "value/explained_variance",
    "policy/grad_norm",
    "policy/beta",
    "policy/backtracks",
    "policy/accepted",
)


def start_as_pytorch(networks: Any, seed: int) -> None:
    """nn.Linear's own first weights in place of orthogonal ones."""
    import torch

    torch.manual_seed(seed)
    for module in torch.nn.ModuleList(networks).modules():
        if isinstance(module, torch.nn.Linear):
            module.reset_parameters()


def start_head_at_one(networks: Any, seed: int) -> None:
    """The policy's head with gain 1 in place of 0.01: actions are unequal from the start."""
    networks.policy.head.weight.data.mul_(100)


STARTS: dict[str, Callable[[Any, int], None]] = {
    "PyTorch's own start": start_as_pytorch,
    "policy head started at 1": start_head_at_one,
}


def _trained(env: str, seed: int, detail: str = "as shipped", letter: str | None = None) -> tuple[Any, Any]:
    import torch
    from minirlhf_course import failure_lab

    from minirlhf.control.evaluation import Evaluator
    from minirlhf.control.policies import make_networks
    from minirlhf.control.ppo import PENDULUM, PPOConfig, train_ppo

    torch.set_num_threads(1)
    shipped = {"CartPole-v1": PPOConfig(), "Pendulum-v1": PENDULUM}[env]
    config = replace(shipped, total_steps=BUDGET[env], **DETAILS[detail])
    if detail == "whole batch, no minibatches":
        config = replace(config, minibatch_size=config.num_envs * config.rollout_steps)
    evaluator = Evaluator(env, every=EVERY[env])
    options: dict[str, Any] = {"seed": seed, "callback": evaluator}
    if letter is not None:
        return failure_lab.train(letter, env, config, **options), evaluator
    if detail in STARTS:
        networks = make_networks(env, config.hidden, activation=config.activation, shared=config.shared, seed=seed)
        STARTS[detail](networks, seed)
        options["networks"] = networks
    instead = {"gae": failure_lab.truncation_as_termination} if detail == "truncation as termination" else {}
    with failure_lab.planted(instead):
        return train_ppo(env, config, **options), evaluator


def detail_run(job: tuple[str, str, int]) -> list[Row]:
    env, detail, seed = job
    result, evaluator = _trained(env, seed, detail)
    returns = [row.mean_return for row in evaluator.rows]
    solved = [row.env_steps for row in evaluator.rows if row.mean_return >= 475]
    return [
        {
            "env": env,
            "detail": detail,
            "seed": seed,
            "mean_return": round(sum(returns) / len(returns), 1),
            "final_return": round(sum(returns[-LAST:]) / LAST, 1),
            "solved_at": solved[0] if solved and env == "CartPole-v1" else "",
            "policy_kl": _mean(result.history, "policy/kl"),
            "clip_fraction": _mean(result.history, "policy/clip_fraction"),
        }
    ]


def bug_run(job: tuple[str, int]) -> list[Row]:
    letter, seed = job
    result, evaluator = _trained("CartPole-v1", seed, letter=None if letter == "healthy" else letter)
    # An update that was not evaluated has an empty return.
    returns = {row.env_steps: round(row.mean_return, 1) for row in evaluator.rows}
    return [
        {
            "run": letter,
            "seed": seed,
            "env_steps": int(row["perf/env_steps"]),
            "return": returns.get(int(row["perf/env_steps"]), ""),
            **{metric: f"{row[metric]:.4g}" for metric in FAILURE_METRICS},
        }
        for row in result.history
    ]


def method_run(job: tuple[str, int]) -> list[Row]:
    import torch

    from minirlhf.control.evaluation import Evaluator
    from minirlhf.control.ppo import PPOConfig, train_ppo
    from minirlhf.control.trpo import TRPOConfig, train_trpo

    torch.set_num_threads(1)
    method, seed = job
    evaluator = Evaluator("CartPole-v1", every=2_500)  # as in lessons 01 to 05
    options: dict[str, Any] = {"seed": seed, "callback": evaluator}
    if method == "TRPO":
        result = train_trpo("CartPole-v1", TRPOConfig(total_steps=BUDGET["CartPole-v1"]), **options)
    else:
        config = PPOConfig(total_steps=BUDGET["CartPole-v1"], **METHODS[method])
        result = train_ppo("CartPole-v1", config, **options)
    returns = {row.env_steps: round(row.mean_return, 1) for row in evaluator.rows}
    return [
        {
            "method": method,
            "seed": seed,
            "env_steps": int(row["perf/env_steps"]),
            "return": returns.get(int(row["perf/env_steps"]), ""),
            **{metric: f"{row[metric]:.4g}" if metric in row else "" for metric in METHOD_METRICS},
        }
        for row in result.history
    ]


def _mean(history: list[dict[str, float]], metric: str) -> str:
    return f"{sum(row[metric] for row in history) / len(history):.4g}"


def bug_jobs() -> list[tuple[str, int]]:
    from minirlhf_course.failure_lab import RUNS

    healthy = [("healthy", seed) for seed in SEEDS["CartPole-v1"]]
    # The lab has a healthy run among its letters: other seeds, or it would lie on the band's own lines.
    return healthy + [(letter, seed) for letter in RUNS for seed in range(5, 8)]


class Done:
    """The runs that are done, kept in a file whose name tells which code made them."""

    def __init__(self, name: str) -> None:
        sources = [Path(__file__), *sorted((ROOT / "minirlhf" / "control").glob("*.py"))]
        code = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
        self.path = ROOT / "build" / "ppo_ablation" / f"{name}-{code}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, list[Row]] = {}
        if self.path.exists():
            # A last line that was cut off has no line break yet.
            whole = self.path.read_text(encoding="utf-8").rpartition("\n")[0]
            self.rows = dict(json.loads(line) for line in whole.splitlines())
            self.path.write_text(whole and whole + "\n", encoding="utf-8")

    def add(self, job: Any, rows: list[Row]) -> None:
        self.rows[str(job)] = rows
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([str(job), rows]) + "\n")


def main() -> None:
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description="The long runs of lesson 05.")
    parser.add_argument("--only", choices=("details", "bugs", "methods"), help="one table; left out: all")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    details = [(env, detail, seed) for env in BUDGET for detail in DETAILS for seed in SEEDS[env]]
    methods = [(method, seed) for method in METHODS for seed in SEEDS["CartPole-v1"]]
    tables: dict[str, tuple[str, Callable[[Any], list[Row]], list[Any]]] = {
        "bugs": ("failure_lab.csv", bug_run, bug_jobs()),
        "details": ("ppo_ablation.csv", detail_run, details),
        "methods": ("trust_regions.csv", method_run, methods),
    }
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        for name, (file, function, jobs) in tables.items():
            if options.only in (None, name):
                done = Done(name)
                todo = [job for job in jobs if str(job) not in done.rows]
                runs = zip(todo, pool.map(function, todo), strict=True)
                for job, rows in tqdm(runs, total=len(todo), desc=name, unit=" runs"):
                    done.add(job, rows)
                rows = [row for job in jobs for row in done.rows[str(job)]]
                write_table(RESULTS / file, rows, ("torch", "gymnasium", "minirlhf"))


if __name__ == "__main__":
    main()
