"""InstructGPT's Figure 1 in miniature: three sizes of model, five methods, three seeds. The runs of lesson 11.

    .venv/bin/python benchmarks/figure_11_pipeline.py                 train what is missing, then measure
    .venv/bin/python benchmarks/figure_11_pipeline.py --only tiny small --no-measure
    .venv/bin/python benchmarks/figure_11_pipeline.py --examples      try 0 to 4 examples before a prompt, and stop

Each size and seed is a run of the pipeline in build/figure_11/SIZE-seedN; a killed one goes on where it was, a finished
one is taken as it stands. "large" is the default run; data/checkpoints holds the one of seed 0. It may be made outside
this script, with all the threads of the machine:

    minirlhf run --out build/figure_11/large-seed0 --seed 0

As in the paper (appendix C.2 and C.4), one reward model serves policies of all sizes, and the value network starts from
it: "tiny" and "small" take the reward model of the large run of their seed. They differ from it in the model and in
what a size needs, SIZES. That was chosen with seed 100 by gold on training prompts, not on held-out ones.

Methods: base, few_shot (base with SHOTS demonstrations before each prompt), sft, ppo, ppo_ptx. Every model answers each
held-out prompt once, at temperature 1, and TRAINING training prompts.

data/results/pipeline_gold.csv.gz    a row per prompt; gold of each model's answer in columns SIZE/METHOD/SEED. kind:
                                     phrasing, pair or being (what is new about a held-out prompt), or training
data/results/pipeline_models.csv     a row a model: parameters, mean gold, tokens and share of answers that ended, and
                                     preferred: the share of held-out prompts where gold prefers its answer to the large
                                     SFT model's of the same seed, ties half
data/results/pipeline_corpus.csv     nats per token of fresh documents, a row for each kind of document
data/results/pipeline_labelers.csv   how often each simulated labeler prefers an answer to the SFT model's of the same
                                     size and seed, on held-out prompts; heldout: no labeler of the training data
data/checkpoints/tiny_ppo_ptx        the tiny PPO-ptx model of seed 0, in half precision: the lesson talks to it
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from minirlhf_course.export import export_step
from minirlhf_course.world import GoldLabeler, World, make_labelers
from minirlhf_course.world.corpus import CorpusWriter
from minirlhf_course.world.vocabulary import heldout_words
from tables import RESULTS, ROOT, Row, write_table

from minirlhf.checkpoints import verify_model, write_json
from minirlhf.config import RunConfig
from minirlhf.data import Demonstration, read_folder
from minirlhf.intervals import win_rate
from minirlhf.language.evaluation import Answers, EvaluationConfig, answer
from minirlhf.language.models import ModelConfig
from minirlhf.language.pretraining import PretrainingConfig, blocks_of, corpus_loss
from minirlhf.language.sft import SFTConfig
from minirlhf.language.tokenization import encode_prompts, encode_responses, encode_texts, load_tokenizer
from minirlhf.pipeline import run_pipeline
from minirlhf.pipeline.folder import hide_loading_bars, load_policy, steps_of_run
from minirlhf.pipeline.inputs import find_data, load_inputs
from minirlhf.pipeline.steps import train_step

RUNS = ROOT / "build" / "figure_11"
Table = dict[str, list[float]]

SEEDS = (0, 1, 2)
# The smaller sizes are the default run with another model, and with learning rates that suit it.
SIZES: dict[str, RunConfig] = {
    "large": RunConfig(),
    "tiny": RunConfig(
        model_size=ModelConfig(hidden_size=24, layers=1, heads=2, intermediate_size=72, init_std=0.1),
        base=PretrainingConfig(lr=2e-2),
        sft=SFTConfig(lr=1.2e-2),
        rlhf=replace(RunConfig().rlhf, lr=3e-3),
    ),
    "small": RunConfig(
        model_size=ModelConfig(hidden_size=48, layers=4, heads=4, intermediate_size=128, init_std=0.07),
        base=PretrainingConfig(lr=6e-3),
        sft=SFTConfig(lr=4e-3),
        rlhf=replace(RunConfig().rlhf, lr=8e-4),
    ),
}
FIXED = ("large", "sft")
METHODS = ("base", "few_shot", "sft", "ppo", "ppo_ptx")
SHOTS = 1  # no better with more (--examples): the base model reads 64 tokens
TRAINING = 400
DOCUMENTS = 60  # of each kind
KINDS = ("facts", "story", "ramble", "chatter", "encyclopedia", "rude", "ideas", "unanswered", "answered")


def run_of(size: str, seed: int) -> Path:
    return RUNS / f"{size}-seed{seed}"


def train(size: str, seed: int) -> None:
    """Run or continue one run of the pipeline."""
    config = replace(SIZES[size], out=run_of(size, seed), seed=seed)
    print(f"{size}, seed {seed}", flush=True)
    if size == "large":
        run_pipeline(config, command="minirlhf run")
        return
    settings = json.loads(json.dumps(asdict(config), default=str))
    file = config.out / "config.json"
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != settings:
        sys.exit(f"{config.out}: made with other settings than this script has now; delete the folder")
    write_json(file, settings)
    inputs = load_inputs(config, find_data(config))
    for step in steps_of_run(config):
        if (config.out / step).is_dir():
            verify_model(config.out / step)
        elif step == "reward_model":
            if not (run_of("large", seed) / step).is_dir():
                sys.exit(f"{run_of('large', seed)}: has no reward model yet, and {size} takes it; train large first")
            aside = config.out / f"{step}.partial"
            shutil.rmtree(aside, ignore_errors=True)
            shutil.copytree(run_of("large", seed) / step, aside)
            os.replace(aside, config.out / step)
        else:
            train_step(step, config, inputs)


def with_examples(
    tokenizer: Any, prompts: Sequence[str], pool: Sequence[Demonstration], shots: int, seed: int
) -> list[list[int]]:
    """Token ids of each prompt behind `shots` demonstrations drawn for it, as the web writes an answered question.

    The demonstrations are of the shorter half, and none has the prompt itself: the base model reads 64 tokens.
    """
    sizes = sorted(len(f"{row.prompt} {row.completion}".split(" ")) for row in pool)
    short = [row for row in pool if len(f"{row.prompt} {row.completion}".split(" ")) <= sizes[len(sizes) // 2]]
    rows = []
    for number, (prompt, ids) in enumerate(zip(prompts, encode_prompts(tokenizer, prompts), strict=True)):
        drawn = Random(f"examples {seed} {number}").sample(short, shots + 1)
        shown = [row for row in drawn if row.prompt != prompt][:shots]
        asked = encode_prompts(tokenizer, [row.prompt for row in shown])
        answered = encode_responses(tokenizer, [row.completion for row in shown])
        rows.append([token for pair in zip(asked, answered, strict=True) for part in pair for token in part] + ids)
    return rows


class Bench:
    """The data, and gold."""

    def __init__(self) -> None:
        self.world = World(0)
        self.gold = GoldLabeler(self.world)
        self.folder = read_folder(ROOT / "data" / "small_world", 0)
        heldout = [row.text for row in self.folder.heldout_prompts]
        training = Random("training prompts").sample([row.text for row in self.folder.prompts], TRAINING)
        self.prompts = heldout + training
        self.heldout = len(heldout)
        self.kinds = [self.kind(prompt) for prompt in self.prompts]

    def kind(self, prompt: str) -> str:
        """What is new about a prompt: its phrasing, a being nobody was asked about, or its family with that subject."""
        task = self.world.parse(prompt)
        if not task.heldout:
            return "training"
        family = self.world.families[task.family]
        if any(phrasing.heldout and phrasing.text == task.phrasing for phrasing in family.phrasings):
            return "phrasing"
        strange = not family.may_mention_heldout and not heldout_words().isdisjoint(prompt.split(" "))
        return "being" if strange else "pair"

    def scores(self, prompts: Sequence[str], answers: Answers) -> list[float]:
        rows = zip(prompts, answers.responses, answers.ended, strict=True)
        # Rounded: sums of the same parts in another order are a tie.
        return [round(self.gold.score(*row).total, 4) for row in rows]

    def documents(self) -> dict[str, list[str]]:
        """Fresh documents of each kind of the web, none of which any model has read."""
        writer, seen = CorpusWriter(self.world), {row.text for row in self.folder.corpus}
        found: dict[str, list[str]] = {}
        for kind in KINDS:
            rng = Random(f"documents {kind}")
            drawn = (getattr(writer, kind)(rng) for _ in range(40 * DOCUMENTS))
            found[kind] = [text for text in drawn if text not in seen][:DOCUMENTS]
        return found


def measure(seeds: Sequence[int]) -> None:
    from tqdm import tqdm

    bench, settings = Bench(), EvaluationConfig()
    documents = bench.documents()
    golds: Table = {}
    models: list[Row] = []
    corpus: list[Row] = []
    labelers: list[Row] = []
    names = [(size, seed, method) for seed in seeds for size in SIZES for method in METHODS]
    answers: dict[str, Answers] = {}
    for size, seed, method in tqdm(names, desc="measure", unit=" models"):
        run = run_of(size, seed)
        model = load_policy(run, "base" if method == "few_shot" else method, torch.device("cpu"))
        tokenizer = load_tokenizer(run / "base")
        prompts: Sequence[Any] = bench.prompts
        if method == "few_shot":
            prompts = with_examples(tokenizer, prompts, bench.folder.demonstrations, SHOTS, seed)
            model.config.max_position_embeddings *= 2  # example and answer may go past what it was trained to read
        name = f"{size}/{method}/{seed}"
        answers[name] = answer(model, tokenizer, prompts, settings, seed=seed)
        golds[name] = bench.scores(bench.prompts, answers[name])
        count = bench.heldout
        about = {"size": size, "method": method, "seed": seed}
        models.append(
            about
            | {
                "parameters": sum(p.numel() for p in model.parameters()),
                "gold": sum(golds[name][:count]) / count,
                "length": sum(answers[name].lengths[:count]) / count,
                "ended": sum(answers[name].ended[:count]) / count,
            }
        )
        if method != "few_shot":
            for kind, texts in documents.items():
                blocks = blocks_of(encode_texts(tokenizer, texts), 64)
                corpus.append(about | {"kind": kind, "loss": corpus_loss(model, blocks)})
    for row in models:
        name, fixed = f"{row['size']}/{row['method']}/{row['seed']}", "/".join((*FIXED, str(row["seed"])))
        row["preferred"] = win_rate(golds[name][: bench.heldout], golds[fixed][: bench.heldout])[0]
    for seed in seeds:
        for size in SIZES:
            for method in ("base", "ppo", "ppo_ptx"):
                ours, theirs = (answers[f"{size}/{m}/{seed}"].responses[: bench.heldout] for m in (method, "sft"))
                about = {"size": size, "method": method, "seed": seed}
                labelers += [about | row for row in preferences(bench, ours, theirs, seed)]
    write_table(RESULTS / "pipeline_models.csv", models)
    write_table(RESULTS / "pipeline_corpus.csv", corpus)
    write_table(RESULTS / "pipeline_labelers.csv", labelers)
    write_table(
        RESULTS / "pipeline_gold.csv.gz",
        [
            {"kind": bench.kinds[i], "family": bench.gold.family(prompt), "prompt": prompt}
            | {name: f"{values[i]:.4f}".rstrip("0").rstrip(".") for name, values in golds.items()}
            for i, prompt in enumerate(bench.prompts)
        ],
    )


def preferences(bench: Bench, ours: Sequence[str], theirs: Sequence[str], seed: int) -> list[Row]:
    """How often each labeler prefers our answers; every labeler reads every pair once, with noise, ties half."""
    rows = []
    for heldout in (False, True):
        for labeler in make_labelers(bench.world, heldout):
            rng = Random(f"{labeler.name} {seed}")
            pairs = [
                (labeler.score(prompt, a, rng), labeler.score(prompt, b, rng))
                for prompt, a, b in zip(bench.prompts, ours, theirs, strict=False)
            ]
            rate = win_rate(*zip(*pairs, strict=True))[0]
            rows.append({"labeler": labeler.name, "heldout": int(heldout), "preferred": rate})
    return rows


def try_examples(run: Path) -> None:
    """Gold of a base model's answers behind 0 to 4 examples, on training prompts."""
    bench = Bench()
    tokenizer, prompts = load_tokenizer(run / "base"), bench.prompts[bench.heldout :]
    base, sft = (load_policy(run, name, torch.device("cpu")) for name in ("base", "sft"))
    target = bench.scores(prompts, answer(sft, tokenizer, prompts, EvaluationConfig(), seed=100))
    for shots in range(5):
        rows = with_examples(tokenizer, prompts, bench.folder.demonstrations, shots, 100)
        scores = bench.scores(prompts, answer(base, tokenizer, rows, EvaluationConfig(), seed=100))
        rate, (low, high) = win_rate(scores, target)
        mean = sum(scores) / len(scores)
        print(f"{shots} examples: gold {mean:.2f}, preferred to SFT {100 * rate:.1f} % ({low:.3f} to {high:.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(description="The runs of lesson 11.")
    parser.add_argument("--only", choices=list(SIZES), nargs="+", default=list(SIZES), help="sizes to train")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="default: 0 1 2")
    parser.add_argument("--no-measure", action="store_true", help="train, and stop there")
    parser.add_argument("--examples", action="store_true", help="try 0 to 4 examples before a prompt, and stop")
    options = parser.parse_args()
    torch.set_num_threads(1)
    hide_loading_bars()
    if options.examples:
        try_examples(run_of("large", options.seeds[0]))
        return
    for seed in options.seeds:
        for size in (size for size in SIZES if size in options.only):  # the large one first
            train(size, seed)
    if 0 in options.seeds and "tiny" in options.only:
        export_step(run_of("tiny", 0), "ppo_ptx", ROOT / "data" / "checkpoints" / "tiny_ppo_ptx")
    if not options.no_measure:
        measure(options.seeds)


if __name__ == "__main__":
    main()
