"""All pairs of a prompt together, or shuffled? And how many rankings are enough? The long runs of lesson 08.

    .venv/bin/python benchmarks/figure_08_reward_model.py                 both tables, on one thread
    .venv/bin/python benchmarks/figure_08_reward_model.py --only pairs

pairs -> data/results/reward_model_pairs.csv: reward models trained from data/checkpoints/sft on the same rankings, 100
prompts with K = 9 answers and so 100 x 36 = 3,600 comparisons, in three ways (WAYS below). All see 72 comparisons an
update, with the same settings. K is 9 throughout: 1/C(K, 2) is one constant, and not a second difference. A row for
each quarter (PARTS) of a run:

    share             of the run that is done
    updates, answers  optimizer steps; answers that went forwards and backwards through the model
    batch_loss        mean loss of the batches since the row before, each before its own update
    heldout_loss, heldout_accuracy   on 80 prompts with other texts than the training prompts', from the same labelers
    train_loss, train_accuracy       on the 100 training prompts, in the last row of a run

sizes -> data/results/reward_model_sizes.csv: reward models as the pipeline trains them, on the rankings of so many
prompts; accuracy and calibration error on the first 200 prompts of data/small_world/heldout/comparisons, for training
labelers and for held-out ones.

Seeds draw the training prompts, the head's first weights and the order. They make results repeat on one machine.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Sequence
from itertools import permutations
from typing import Any

import torch
from tables import RESULTS, ROOT, Row, write_table

from minirlhf.data import Comparison, DataFolder, read_folder
from minirlhf.language.evaluation import accuracy, calibration_error, ordered_pairs, score_comparisons
from minirlhf.language.reward_model import RewardModelConfig, RewardModelScorer, train_reward_model
from minirlhf.language.tokenization import load_tokenizer
from minirlhf.losses import ranking_loss
from minirlhf.pipeline.folder import hide_loading_bars, load_policy
from minirlhf.training import Recorder

CHECKPOINTS = ROOT / "data" / "checkpoints"

SEEDS = (0, 1, 2)
K, PROMPTS, HELDOUT = 9, 100, 80
COMPARISONS_AN_UPDATE = 72
PARTS = 4
# Name -> epochs. "shuffled" cuts the rankings into single comparisons first.
WAYS: dict[str, float] = {"K-way": 1, "shuffled": 1, "K-way, 4 epochs": 4}
SIZES = (50, 150, 500)
MEASURED = 400  # rows of the held-out file: 200 prompts, each ranked by a training labeler and by a held-out one


def single_comparisons(rows: Sequence[Comparison]) -> list[Comparison]:
    """Every pair of every ranking as a row of its own, ties dropped."""
    return [
        Comparison(row.prompt, (row.responses[i], row.responses[j]), (1.0, 0.0), row.labeler)
        for row in rows
        for i, j in permutations(range(len(row.responses)), 2)
        if row.scores[i] > row.scores[j]
    ]


def split(folder: DataFolder) -> tuple[list[Comparison], list[Comparison]]:
    """Rankings of K answers to train on, and some to measure with; no prompt's text is in both."""
    rows = [row for row in folder.comparisons if len(row.responses) == K]
    random.Random(8).shuffle(rows)
    heldout = rows[:HELDOUT]
    texts = {row.prompt for row in heldout}
    return [row for row in rows if row.prompt not in texts], heldout


def loss_and_accuracy(model: Any, tokenizer: Any, rows: Sequence[Comparison]) -> tuple[float, float]:
    rewards = score_comparisons(RewardModelScorer(model, tokenizer), rows)
    scores = torch.tensor([row.scores for row in rows])
    return float(ranking_loss(torch.tensor(rewards), scores)), accuracy(ordered_pairs(rows, rewards).reward)


class Watch(Recorder):
    """A recorder that measures the model on held-out rankings at the end of each part of a run."""

    def __init__(self, tokenizer: Any, heldout: Sequence[Comparison], updates: int, answers: int) -> None:
        super().__init__("reward_model", progress=False)
        self.tokenizer, self.heldout, self.updates, self.answers = tokenizer, heldout, updates, answers
        self.ends = [round(updates * part / PARTS) for part in range(1, PARTS + 1)]
        self.rows: list[Row] = []

    def log(self, metrics: Any) -> None:
        super().log(metrics)
        done = len(self.history)
        if done not in self.ends:
            return
        first = self.ends[len(self.rows) - 1] if self.rows else 0
        batches = [row["reward_model/loss"] for row in self.history[first:done]]
        loss, right = loss_and_accuracy(self._models["reward_model"], self.tokenizer, self.heldout)
        self.rows.append(
            {
                "share": round(done / self.updates, 3),
                "updates": done,
                "answers": round(self.answers * done / self.updates),
                "batch_loss": f"{sum(batches) / len(batches):.4f}",
                "heldout_loss": f"{loss:.4f}",
                "heldout_accuracy": f"{right:.4f}",
                "train_loss": "",
                "train_accuracy": "",
            }
        )


def pairs_runs(sft: Any, tokenizer: Any, folder: DataFolder, seeds: Iterable[int]) -> list[Row]:
    from tqdm import tqdm

    pool, heldout = split(folder)
    table: list[Row] = []
    for way, seed in tqdm([(way, seed) for seed in seeds for way in WAYS], desc="pairs", unit=" runs"):
        rows = random.Random(seed).sample(pool, PROMPTS)
        each = K * (K - 1) // 2
        data = single_comparisons(rows) if way == "shuffled" else rows
        batch = COMPARISONS_AN_UPDATE if way == "shuffled" else COMPARISONS_AN_UPDATE // each
        config = RewardModelConfig(epochs=WAYS[way], batch_size=batch)
        updates = round(config.epochs * len(data) / batch)
        watch = Watch(tokenizer, heldout, updates, updates * batch * (2 if way == "shuffled" else K))
        model = train_reward_model(sft, tokenizer, data, config, seed=seed, recorder=watch)
        loss, right = loss_and_accuracy(model, tokenizer, rows)
        watch.rows[-1] |= {"train_loss": f"{loss:.4f}", "train_accuracy": f"{right:.4f}"}
        table += [{"way": way, "seed": seed, **row} for row in watch.rows]
    return table


def sizes_runs(sft: Any, tokenizer: Any, folder: DataFolder, seeds: Iterable[int]) -> list[Row]:
    from tqdm import tqdm

    training = {row.labeler for row in folder.comparisons}
    measured = folder.heldout_comparisons[:MEASURED]
    known = [row for row in measured if row.labeler in training]
    others = [row for row in measured if row.labeler not in training]
    table: list[Row] = []
    for size, seed in tqdm([(size, seed) for seed in seeds for size in SIZES], desc="sizes", unit=" runs"):
        rows = random.Random(seed).sample(folder.comparisons, size)
        recorder = Recorder("reward_model", progress=False)
        model = train_reward_model(sft, tokenizer, rows, RewardModelConfig(), seed=seed, recorder=recorder)
        # Both groups of labelers ranked the same answers: score these once.
        texts = score_comparisons(RewardModelScorer(model, tokenizer), known)
        found = {(row.prompt, row.responses): scores for row, scores in zip(known, texts, strict=True)}
        pairs = ordered_pairs(known, texts)
        held = ordered_pairs(others, [found[row.prompt, row.responses] for row in others])
        table.append(
            {
                "prompts": size,
                "comparisons": len(single_comparisons(rows)),
                "seed": seed,
                "accuracy": f"{accuracy(pairs.reward):.4f}",
                "accuracy_heldout_labelers": f"{accuracy(held.reward):.4f}",
                "calibration_error": f"{calibration_error(pairs.reward):.4f}",
            }
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="The long runs of lesson 08.")
    parser.add_argument("--only", choices=("pairs", "sizes"), help="one table; left out: both")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="default: 0 1 2")
    options = parser.parse_args()
    torch.set_num_threads(1)
    hide_loading_bars()
    sft, tokenizer = load_policy(CHECKPOINTS, "sft", torch.device("cpu")), load_tokenizer(CHECKPOINTS / "sft")
    folder = read_folder(ROOT / "data" / "small_world", 0)
    for name, function in {"pairs": pairs_runs, "sizes": sizes_runs}.items():
        if options.only in (None, name):
            write_table(RESULTS / f"reward_model_{name}.csv", function(sft, tokenizer, folder, options.seeds))


if __name__ == "__main__":
    main()
