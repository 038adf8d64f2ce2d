"""How many demonstrations are enough? And how many times may one read them? The long runs of lesson 07.

    .venv/bin/python benchmarks/figure_07_sft.py                 both tables, on one thread
    .venv/bin/python benchmarks/figure_07_sft.py --only sizes

All runs start from data/checkpoints/base and train as the pipeline does (batches of 16, a peak rate of 2e-3, cosine).

sizes -> data/results/sft_sizes.csv: so many different demonstrations (SIZES), each run with the same UPDATES, so that
fewer demonstrations are read more often and nothing else differs. 0 demonstrations: the base model. A row a run.
epochs -> data/results/sft_epochs.csv: 512 demonstrations, read 16 times. A row for each epoch in MEASURED.

    epochs         times that each demonstration was read
    train_loss     nats per token of the completions trained on (at most 512 of them)
    heldout_loss   the same for demonstrations of held-out prompts, which the world's demonstrator writes for this file
    gold           the mean of gold over one sampled answer (temperature 1) to each of these held-out prompts
    proxy          the mean score of the shipped reward model for the same answers
    ended          the share of answers that ended before the limit of 40 tokens

Seeds draw the demonstrations and their order. They make results repeat on one machine.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from minirlhf_course.world import GoldLabeler, World
from minirlhf_course.world.writer import Writer
from tables import RESULTS, ROOT, Row, write_table

from minirlhf.data import DataFolder, Demonstration, read_folder
from minirlhf.language.evaluation import EvaluationConfig, answer
from minirlhf.language.models import clone, pad, response_logprobs
from minirlhf.language.reward_model import RewardModelScorer
from minirlhf.language.sft import SFTConfig, train_sft
from minirlhf.language.tokenization import encode_prompts, encode_responses
from minirlhf.pipeline.folder import hide_loading_bars, load_policy, load_reward_model
from minirlhf.training import Recorder, micro_batches

CHECKPOINTS = ROOT / "data" / "checkpoints"

SEEDS = (0, 1, 2)
BATCH = 16
SIZES, UPDATES = (32, 128, 512, 2048), 192
FEW, EPOCHS = 512, 16
MEASURED = (1, 2, 3, 4, 6, 8, 12, 16)
HELDOUT_PROMPTS = 400


class Judge:
    """Measures a model: its loss on demonstrations, and its answers to held-out prompts."""

    def __init__(self, folder: DataFolder) -> None:
        self.reward, self.tokenizer = load_reward_model(CHECKPOINTS, torch.device("cpu"))
        self.scorer = RewardModelScorer(self.reward, self.tokenizer)
        world = World(0)
        self.gold = GoldLabeler(world)
        self.prompts = [row.text for row in folder.heldout_prompts][:HELDOUT_PROMPTS]
        rng = random.Random("figure 07")
        self.heldout = [Demonstration(p, world.demonstrate(world.parse(p), Writer(rng))) for p in self.prompts]

    def __call__(self, model: Any, trained_on: Sequence[Demonstration], seed: int) -> Row:
        answers = answer(model, self.tokenizer, self.prompts, EvaluationConfig(), seed=seed)
        rows = zip(self.prompts, answers.responses, answers.ended, strict=True)
        gold = [self.gold.score(*row).total for row in rows]
        return {
            "train_loss": f"{self.loss(model, trained_on[:FEW]):.4f}" if trained_on else "",
            "heldout_loss": f"{self.loss(model, self.heldout):.4f}",
            "gold": f"{sum(gold) / len(gold):.4f}",
            "proxy": f"{float(self.scorer(self.prompts, answers.responses).mean()):.4f}",
            "ended": f"{sum(answers.ended) / len(answers.ended):.4f}",
        }

    @torch.no_grad()
    def loss(self, model: Any, rows: Sequence[Demonstration]) -> float:
        """Nats a token of the completions, EOS included: the sum over all of them by their count."""
        prompts = encode_prompts(self.tokenizer, [row.prompt for row in rows])
        completions = encode_responses(self.tokenizer, [row.completion for row in rows])
        total = 0.0
        for group in micro_batches([len(p) + len(c) for p, c in zip(prompts, completions, strict=True)], 4096):
            tokens, mask = pad([prompts[i] + completions[i] for i in group], self.tokenizer.pad_token_id)
            starts = torch.tensor([[len(prompts[i])] for i in group])
            targets = mask & (torch.arange(tokens.shape[1]) >= starts)
            total -= float(response_logprobs(model, tokens, mask, targets[:, 1:]).sum())
        return total / sum(map(len, completions))


class Watch(Recorder):
    """A recorder that measures the model after some of its steps."""

    def __init__(self, judge: Judge, trained_on: Sequence[Demonstration], steps: Mapping[int, int], seed: int) -> None:
        super().__init__("sft", progress=False)
        self.judge, self.trained_on, self.at, self.seed = judge, trained_on, steps, seed
        self.rows: list[Row] = []

    def log(self, metrics: Any) -> None:
        super().log(metrics)
        done = len(self.history)
        if done in self.at:
            measured = self.judge(self._models["policy"], self.trained_on, self.seed)
            self.rows.append({"epochs": self.at[done], **measured})


def drawn(folder: DataFolder, count: int, seed: int) -> list[Demonstration]:
    return random.Random(f"figure 07, {seed}").sample(folder.demonstrations, count)


def sizes(base: Any, folder: DataFolder, judge: Judge, seeds: Sequence[int]) -> list[Row]:
    from tqdm import tqdm

    table = []
    for seed, size in tqdm([(seed, size) for size in (0, *SIZES) for seed in seeds], desc="sizes"):
        rows = drawn(folder, size, seed)
        if not rows:
            table.append({"demonstrations": 0, "seed": seed, "epochs": 0, **judge(base, rows, seed)})
            continue
        epochs = UPDATES * BATCH / size
        watch = Watch(judge, rows, {UPDATES: round(epochs, 1)}, seed)
        config = SFTConfig(epochs=epochs, batch_size=BATCH)
        train_sft(clone(base), judge.tokenizer, rows, config, seed=seed, recorder=watch)
        table += [{"demonstrations": size, "seed": seed, **row} for row in watch.rows]
    return table


def epochs(base: Any, folder: DataFolder, judge: Judge, seeds: Sequence[int]) -> list[Row]:
    from tqdm import tqdm

    table = []
    for seed in tqdm(seeds, desc="epochs"):
        rows = drawn(folder, FEW, seed)
        watch = Watch(judge, rows, {epoch * FEW // BATCH: epoch for epoch in MEASURED}, seed)
        start = {"epochs": 0, **judge(base, rows, seed)}
        config = SFTConfig(epochs=EPOCHS, batch_size=BATCH)
        train_sft(clone(base), judge.tokenizer, rows, config, seed=seed, recorder=watch)
        table += [{"demonstrations": FEW, "seed": seed, **row} for row in (start, *watch.rows)]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["sizes", "epochs"], help="one of the two tables; both by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="default: 0 1 2")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV files")
    chosen = parser.parse_args()
    torch.set_num_threads(1)  # such small models gain nothing by a second one
    hide_loading_bars()
    base = load_policy(CHECKPOINTS, "base", torch.device("cpu"))
    folder = read_folder(ROOT / "data" / "small_world")
    judge = Judge(folder)
    for name, table_of in (("sizes", sizes), ("epochs", epochs)):
        if chosen.only not in (None, name):
            continue
        table = table_of(base, folder, judge, chosen.seeds)
        write_table(chosen.out / f"sft_{name}.csv", table)


if __name__ == "__main__":
    main()
