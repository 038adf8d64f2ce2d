"""DPO in the small world: what its rankings show and what they don't, one round more, the failure lab. For lesson 13.

    .venv/bin/python benchmarks/figure_13_dpo.py                all of it
    .venv/bin/python benchmarks/figure_13_dpo.py --only rounds

All runs start from data/checkpoints/sft, which is their reference, too. RANKINGS rankings of the small world are gone
through as PUSH says, other ones for each seed. Gold, the KL and the length are taken on PROMPTS held-out prompts,
accuracies and log-probs on HELD rankings.

data/results/dpo_offline.csv      a row a measurement, at steps MEASURED of the three runs (step 0: the SFT model):
    accuracy of the implicit reward on the run's own rankings and on held-out ones by the training labelers; mean
    log-probability of the better and of the worse answer of a held-out pair (first over the pairs of a prompt, then
    over prompts), and of the best; gold, kl, length, ended; and own_accuracy, how often the implicit reward orders two
    sampled answers of the policy's own as gold does, beside judge_accuracy, the shipped reward model's on the same
    pairs (both only at step 0 and at the end)
data/results/dpo_rounds.csv       each of these policies after one more pass (AGAIN) over as many new rankings: of the
    small world's answers, of the SFT model's, or of its own
data/results/dpo_failure_lab.csv  DPO with one planted mistake (minirlhf_course.dpo_failure_lab), and healthy DPO; a row
    a step
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import torch
from minirlhf_course import dpo_failure_lab
from minirlhf_course.world import GoldLabeler, World, make_labelers
from tables import RESULTS, ROOT, Row, write_table

from minirlhf.checkpoints import save_model, write_json
from minirlhf.data import Comparison, read_folder
from minirlhf.intervals import mean_and_error
from minirlhf.language.dpo import DPOConfig, train_dpo
from minirlhf.language.evaluation import EvaluationConfig, accuracy, answer, ordered_pairs
from minirlhf.language.models import clone, load_causal_model, pad_answers, response_logprobs
from minirlhf.language.reward_model import RewardModelScorer
from minirlhf.language.tokenization import encode_prompts, encode_responses
from minirlhf.pipeline.folder import hide_loading_bars, load_policy, load_reward_model
from minirlhf.training import Recorder

CACHE = ROOT / "build" / "figure_13_dpo"
SEEDS = (0, 1, 2)
RANKINGS = 300
MEASURED = (20, 38, 75, 150)
PROMPTS, HELD, ANSWERS_EACH = 200, 100, 6
KINDS = ("the world's", "the SFT model's", "its own")
# Pushed: a few passes over few rankings, at three times the usual learning rate.
PUSH = DPOConfig(epochs=4, lr=1e-3, measured_prompts=0)
AGAIN = replace(PUSH, epochs=1)
LAB = DPOConfig(epochs=2, measure_every=5, measured_prompts=32)
LAB_RANKINGS, LAB_SEEDS, HEALTHY_SEEDS = 120, (10, 11), (0, 1, 2)
LAB_METRICS = (
    "dpo/loss",
    "dpo/accuracy",
    "dpo/margin",
    "dpo/best_logprob",
    "dpo/worst_logprob",
    "objective/kl",
    "objective/response_length",
)


class Bench:
    """Data, gold and the models, loaded once."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        hide_loading_bars()
        cpu = torch.device("cpu")
        self.world = World(0)
        self.gold = GoldLabeler(self.world)
        self.folder = read_folder(ROOT / "data" / "small_world", 0)
        self.sft = load_policy(ROOT / "data" / "checkpoints", "sft", cpu).eval()
        judge, self.tokenizer = load_reward_model(ROOT / "data" / "checkpoints", cpu)
        self.judge = RewardModelScorer(judge, self.tokenizer)
        heldout = sorted({row.text for row in self.folder.heldout_prompts})
        self.prompts = Random("dpo").sample(heldout, PROMPTS)
        training = {row.labeler for row in self.folder.comparisons}
        self.held = [row for row in self.folder.heldout_comparisons if row.labeler in training][:HELD]

    def rankings(self, seed: int, count: int, skip: int = 0) -> list[Comparison]:
        rows = Random(f"rankings {seed}").sample(self.folder.comparisons, skip + count)
        return rows[skip:]

    def golds(self, responses: Sequence[str], ended: Sequence[bool]) -> list[float]:
        return [self.gold.score(*row).total for row in zip(self.prompts, responses, ended, strict=True)]

    @torch.no_grad()
    def logprobs(self, model: Any, prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
        """The log-probability of each answer, [N]."""
        before, after = encode_prompts(self.tokenizer, prompts), encode_responses(self.tokenizer, responses)
        rows, out = [p + a for p, a in zip(before, after, strict=True)], []
        for at in range(0, len(rows), 64):
            starts = [len(p) for p in before[at : at + 64]]
            tokens, mask, answers = pad_answers(rows[at : at + 64], starts, self.tokenizer.pad_token_id)
            out.append(response_logprobs(model, tokens, mask, answers).sum(1))
        return torch.cat(out)

    def of_rankings(self, model: Any, rows: Sequence[Comparison]) -> list[torch.Tensor]:
        """The log-probabilities of each ranking's answers."""
        prompts = [row.prompt for row in rows for _ in row.responses]
        texts = [text for row in rows for text in row.responses]
        return list(self.logprobs(model, prompts, texts).split([len(row.responses) for row in rows]))

    def ranked(self, model: Any, rows: Sequence[Comparison]) -> Row:
        """Accuracy of the implicit reward, and log-probs of the better, the worse and the best answer."""
        own, ref = self.of_rankings(model, rows), self.of_rankings(self.sft, rows)
        rewards = [(a - b).tolist() for a, b in zip(own, ref, strict=True)]
        better, worse, best = [], [], []
        for logprobs, row in zip(own, rows, strict=True):
            scores = torch.tensor(row.scores)
            i, j = (scores[:, None] > scores).nonzero(as_tuple=True)
            if len(i):
                better.append(float(logprobs[i].mean()))
                worse.append(float(logprobs[j].mean()))
                best.append(float(logprobs[scores.argmax()]))
        means = {key: mean_and_error(values)[0] for key, values in
                 {"better": better, "worse": worse, "best": best}.items()}  # fmt: skip
        return {"accuracy": accuracy(ordered_pairs(rows, rewards).reward)} | means

    def spoken(self, model: Any, seed: int = 1) -> Row:
        found = answer(model, self.tokenizer, self.prompts, EvaluationConfig(), reference=self.sft, seed=seed)
        return {
            "gold": mean_and_error(self.golds(found.responses, found.ended))[0],
            "kl": mean_and_error(found.kl)[0],
            "length": sum(found.lengths) / PROMPTS,
            "ended": sum(found.ended) / PROMPTS,
        }

    def measure(self, model: Any, own: Sequence[Comparison], *, last: bool) -> Row:
        heldout = self.ranked(model, self.held)
        row = {"train_accuracy": self.ranked(model, own[:HELD])["accuracy"], "heldout_accuracy": heldout["accuracy"]}
        row |= {key: heldout[key] for key in ("better", "worse", "best")} | self.spoken(model)
        return row | (self.own_pairs(model) if last else {"own_accuracy": "", "judge_accuracy": ""})

    def own_pairs(self, model: Any) -> Row:
        """Two answers of the policy's own to each prompt: do the implicit reward and the judge order them as gold?"""
        texts, golds, implicit, judged = [], [], [], []
        for seed in (2, 3):
            found = answer(model, self.tokenizer, self.prompts, EvaluationConfig(), seed=seed)
            texts.append(found.responses)
            golds.append(torch.tensor(self.golds(found.responses, found.ended)))
            implicit.append(
                self.logprobs(model, self.prompts, texts[-1]) - self.logprobs(self.sft, self.prompts, texts[-1])
            )
            judged.append(self.judge(self.prompts, texts[-1]))
        differ = golds[0] != golds[1]
        sign = (golds[0] - golds[1])[differ].sign()

        def right(scores: Sequence[torch.Tensor]) -> float:
            return float((((scores[0] - scores[1])[differ].sign() * sign + 1) / 2).mean())

        return {"own_accuracy": right(implicit), "judge_accuracy": right(judged)}


class Measured(Recorder):
    """A recorder that measures the policy after the steps MEASURED."""

    def __init__(self, measure: Callable[[Any, bool], Row]) -> None:
        super().__init__("dpo", progress=False)
        self.measure, self.rows = measure, list[Row]()

    def log(self, metrics: Any) -> None:
        super().log(metrics)
        if len(self.history) in MEASURED:
            policy = self._models["policy"]
            found = self.measure(policy, len(self.history) == MEASURED[-1])
            self.rows.append({"step": len(self.history)} | found)


def offline(bench: Bench, seed: int) -> list[Row]:
    file, folder = CACHE / f"offline-{seed}.json", CACHE / f"offline-{seed}"
    if not file.is_file():
        rows = bench.rankings(seed, RANKINGS)
        recorder = Measured(lambda model, last: bench.measure(model, rows, last=last))
        policy = train_dpo(clone(bench.sft), bench.sft, bench.tokenizer, rows, PUSH, seed=seed,
                           recorder=recorder)  # fmt: skip
        save_model(folder, policy, bench.tokenizer)
        write_json(file, recorder.rows)
    return [{"seed": seed} | row for row in json.loads(file.read_text())]


def collect(bench: Bench, policy: Any, count: int, seed: int) -> list[Comparison]:
    """`count` training prompts with up to ANSWERS_EACH different answers of a policy, ranked by training labelers."""
    rng = Random(f"collect {seed}")
    prompts = rng.sample([row.text for row in bench.folder.prompts], count)
    asked = [prompt for prompt in prompts for _ in range(ANSWERS_EACH)]
    found = answer(policy, bench.tokenizer, asked, EvaluationConfig(), seed=1000 + seed)
    labelers, rows = make_labelers(bench.world), []
    for number, prompt in enumerate(prompts):
        texts = list(dict.fromkeys(found.responses[number * ANSWERS_EACH : (number + 1) * ANSWERS_EACH]))
        ranked = rng.choice(labelers).rank(prompt, texts, rng)
        rows.append(Comparison(prompt, tuple(texts), tuple(ranked["scores"]), ranked["labeler"]))
    return [row for row in rows if len(set(row.scores)) > 1]


def one_more(bench: Bench, kind: str, seed: int) -> Row:
    def run() -> Row:
        policy = load_causal_model(CACHE / f"offline-{seed}").eval()
        if kind == "the world's":
            rows = bench.rankings(seed, RANKINGS, skip=RANKINGS)
        else:
            rows = collect(bench, policy if kind == "its own" else bench.sft, RANKINGS, seed)
        quiet = Recorder("dpo", progress=False)
        policy = train_dpo(policy, bench.sft, bench.tokenizer, rows, AGAIN, seed=100 + seed, recorder=quiet)
        answers = sum(len(row.responses) for row in rows)
        heldout = bench.ranked(policy, bench.held)["accuracy"]
        return bench.spoken(policy) | bench.own_pairs(policy) | {"heldout_accuracy": heldout, "rankings": len(rows),
                                                                 "answers": answers}  # fmt: skip

    file = CACHE / f"round-{KINDS.index(kind)}-{seed}.json"
    if not file.is_file():
        write_json(file, run())
    return {"kind": kind, "seed": seed} | json.loads(file.read_text())


def lab_rows(bench: Bench, run: str, letter: str, seed: int) -> list[Row]:
    recorder = Recorder("dpo", progress=False)
    rows = bench.rankings(seed, LAB_RANKINGS)
    dpo_failure_lab.train(letter, clone(bench.sft), bench.sft, bench.tokenizer, rows, LAB, seed=seed, recorder=recorder)
    head = {"run": run, "seed": seed}
    return [
        head | {"step": int(row["step"])} | {key: row.get(key, "") for key in LAB_METRICS} for row in recorder.history
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="The runs of lesson 13.")
    parser.add_argument("--only", choices=("offline", "rounds", "lab"), help="a part; left out: all")
    only = parser.parse_args().only
    CACHE.mkdir(parents=True, exist_ok=True)
    bench = Bench()
    if only in (None, "offline"):
        start = bench.measure(bench.sft, bench.rankings(0, RANKINGS), last=True)
        rows = [{"seed": "", "step": 0} | start]
        for seed in SEEDS:
            rows += offline(bench, seed)
            print(rows[-1], flush=True)
        write_table(RESULTS / "dpo_offline.csv", rows)
    if only in (None, "rounds"):
        found = []
        for seed in SEEDS:
            for kind in KINDS:
                found.append(one_more(bench, kind, seed))
                print(found[-1], flush=True)
        write_table(RESULTS / "dpo_rounds.csv", found)
    if only in (None, "lab"):
        lab = [row for seed in HEALTHY_SEEDS for row in lab_rows(bench, "healthy", "D", seed)]
        for letter in dpo_failure_lab.RUNS:
            lab += [row for seed in LAB_SEEDS for row in lab_rows(bench, letter, letter, seed)]
        write_table(RESULTS / "dpo_failure_lab.csv", lab)


if __name__ == "__main__":
    main()
