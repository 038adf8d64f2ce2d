"""A reward that is checked, and one that is learned: the runs of lesson 12.

    .venv/bin/python benchmarks/figure_12_verifiable.py

Every run is GRPO as `GRPOConfig()` has it, with STEPS steps, from data/checkpoints/sft, on the training prompts whose
answers a rule can check (`minirlhf_course.verifiable`), three seeds of each reward: whether the answer is right, and
data/checkpoints/reward_model.

data/results/verifiable.csv: one row per run and measurement (the first is the SFT model, where all of them begin):

    reward, seed, step    "" is the SFT model
    right                 share of right answers of SAMPLES to each held-out prompt that can be checked
    closed_qa, classify   the same by family
    right_error           standard error of `right` over the prompts
    score, gold           means of the same answers: the reward model's, and the truth
    kl                    nats per answer from the SFT model, exact at each token of those answers
    length, ended         tokens per answer; share of them that ended by themselves

data/results/verifiable_answers.csv: what each policy answers, after its last step, to the first SHOWN held-out prompts
of each family, and whether that is right.

Each run uses one thread; the first line of the file names machine, date and command. Seeds make results repeat on one
machine; another processor rounds differently, and single runs come out differently there.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from minirlhf_course.verifiable import FAMILIES, RightAnswer
from minirlhf_course.world import GoldLabeler, World
from tables import RESULTS, ROOT, Row, write_table

from minirlhf.data import read_folder
from minirlhf.intervals import mean_and_error
from minirlhf.language.evaluation import EvaluationConfig, answer
from minirlhf.language.grpo import GRPOConfig, train_grpo
from minirlhf.language.models import clone
from minirlhf.language.reward_model import RewardFunction, RewardModelScorer
from minirlhf.pipeline.folder import hide_loading_bars, load_policy, load_reward_model
from minirlhf.training import Recorder

CHECKPOINTS = ROOT / "data" / "checkpoints"
STEPS, EVERY = 80, 20
SEEDS = (0, 1, 2)
SAMPLES = 4
SHOWN = 6


class Bench:
    """Models and prompts, loaded once."""

    def __init__(self) -> None:
        hide_loading_bars()
        cpu = torch.device("cpu")
        self.sft = load_policy(CHECKPOINTS, "sft", cpu)
        reward_model, self.tokenizer = load_reward_model(CHECKPOINTS, cpu)
        world = World(0)
        self.gold, self.right = GoldLabeler(world), RightAnswer(world)
        self.rewards: dict[str, RewardFunction] = {
            "right": self.right,
            "reward model": RewardModelScorer(reward_model, self.tokenizer),
        }
        folder = read_folder(ROOT / "data" / "small_world", 0)
        self.prompts = [row.text for row in folder.prompts if self.right.can_check(row.text)]
        self.heldout = [row.text for row in folder.heldout_prompts if self.right.can_check(row.text)]

    def measure(self, policy: Any) -> Row:
        asked = self.heldout * SAMPLES
        answers = answer(policy, self.tokenizer, asked, EvaluationConfig(), reference=self.sft, seed=0)
        golds = [
            self.gold.score(p, r, e).total for p, r, e in zip(asked, answers.responses, answers.ended, strict=True)
        ]
        right = torch.tensor(self.right(asked, answers.responses)).view(SAMPLES, -1).mean(0)  # by prompt
        families = [self.gold.family(prompt) for prompt in self.heldout]
        scores = torch.as_tensor(self.rewards["reward model"](asked, answers.responses))
        return {
            "right": float(right.mean()),
            **{name: float(right[[family == name for family in families]].mean()) for name in FAMILIES},
            "right_error": mean_and_error(right)[1],
            "score": float(scores.mean()),
            "gold": mean_and_error(golds)[0],
            "kl": mean_and_error(answers.kl)[0],
            "length": mean_and_error([float(n) for n in answers.lengths])[0],
            "ended": sum(answers.ended) / len(answers.ended),
        }

    def show(self, policy: Any, head: Row) -> list[Row]:
        families = {name: [p for p in self.heldout if self.gold.family(p) == name][:SHOWN] for name in FAMILIES}
        asked = [prompt for prompts in families.values() for prompt in prompts]
        answers = answer(policy, self.tokenizer, asked, EvaluationConfig(), seed=0)
        scores = self.rewards["reward model"](asked, answers.responses)
        rows = zip(asked, answers.responses, self.right(asked, answers.responses), scores, strict=True)
        return [
            head | {"prompt": prompt, "answer": text, "right": int(right), "score": float(score)}
            for prompt, text, right, score in rows
        ]

    def run(self, name: str, seed: int) -> tuple[list[Row], list[Row]]:
        policy, rows = clone(self.sft).eval(), []
        done = 0

        def measured(*_: Any) -> dict[str, float]:  # called at the end of each step
            nonlocal done
            done += 1
            if done % EVERY == 0:
                rows.append({"reward": name, "seed": seed, "step": done} | self.measure(policy.eval()))
                print(rows[-1], flush=True)
            return {}

        train_grpo(
            policy,
            self.sft,
            self.rewards[name],
            self.tokenizer,
            self.prompts,
            GRPOConfig(steps=STEPS),
            seed=seed,
            recorder=Recorder(f"{name}, seed {seed}", show=("objective/score", "objective/kl")),
            monitor=measured,
        )
        return rows, self.show(policy, {"reward": name, "seed": seed})


def main() -> None:
    argparse.ArgumentParser(description="The runs of lesson 12.").parse_args()
    torch.set_num_threads(1)
    bench = Bench()
    rows: list[Row] = [{"reward": "", "seed": "", "step": 0} | bench.measure(bench.sft)]
    shown = bench.show(bench.sft, {"reward": "", "seed": ""})
    for name in bench.rewards:
        for seed in SEEDS:
            measured, answers = bench.run(name, seed)
            rows, shown = rows + measured, shown + answers
    write_table(RESULTS / "verifiable.csv", rows)
    write_table(RESULTS / "verifiable_answers.csv", shown)


if __name__ == "__main__":
    main()
