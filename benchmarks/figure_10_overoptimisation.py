"""Over-optimisation in the small world: gold against proxy, and what helps. The runs of lesson 10.

    .venv/bin/python benchmarks/figure_10_overoptimisation.py              all of it, two processes
    .venv/bin/python benchmarks/figure_10_overoptimisation.py --only iterated

The policy that is pushed is always data/checkpoints/sft (0.47 million parameters). Its judges differ: reward models of
three sizes, trained on more or fewer rankings (Gao et al. 2022, sections 3.2 and 3.3). The smaller ones begin, as the
large one does, as an SFT model of their own size. A judge's score ("proxy") is brought to mean 0 and standard deviation
1 over the SFT model's own answers, so that scores of different judges, and beta, have one unit. Every figure is taken
on the same PROMPTS held-out prompts.

data/results/overoptimisation_reward_models.csv   a row a judge: accuracy on held-out rankings of the training labelers,
    and on the same pairs in gold's order
data/results/overoptimisation_best_of_n.csv       the best of n answers by proxy, from a pool of POOL a prompt: n, kl
    (nats, exact: log n - (n - 1) / n), proxy, gold, length in words
data/results/overoptimisation_ppo.csv             PPO by RUNS: after MEASURED_STEPS the policy's kl from the SFT model
    (nats per answer), proxy, gold, length in tokens, share of answers that ended; and validation, the score of a second
    judge, trained on VALIDATION rankings that the first has not seen (empty where it has seen all). Step 0 is SFT
data/results/overoptimisation_answers.csv         the first prompt of each family, answered by the SFT model, near
    gold's peak, and at the end of the run ANSWERS_OF
data/results/overoptimisation_iterated.csv        LABELS rankings of the policy's own answers, in one round (all of SFT
    answers) or in two (half of them of the policy after half of the PPO steps). "two runs" is the control: two judges
    and two halves of PPO as in two rounds, but all rankings are of SFT answers. Measured on all held-out prompts

Finished runs stand in build/figure_10 and are not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import torch
from figure_11_pipeline import SIZES
from minirlhf_course.overoptimisation import EnsembleReward, best_of_n, best_of_n_kl
from minirlhf_course.world import GoldLabeler, World, make_labelers
from tables import RESULTS, ROOT, Row, write_table

from minirlhf.checkpoints import save_model, verify_model, write_json
from minirlhf.data import Comparison, read_folder
from minirlhf.intervals import mean_and_error, win_rate
from minirlhf.language.evaluation import (
    EvaluationConfig,
    accuracy,
    answer,
    ordered_pairs,
    score_comparisons,
)
from minirlhf.language.models import clone, load_causal_model, load_scalar_model, tiny_llama
from minirlhf.language.pretraining import blocks_of, train_base
from minirlhf.language.reward_model import RewardFunction, RewardModelConfig, RewardModelScorer, train_reward_model
from minirlhf.language.rlhf import RLHFConfig, train_rlhf
from minirlhf.language.sft import train_sft
from minirlhf.language.tokenization import encode_texts, load_tokenizer
from minirlhf.pipeline.folder import hide_loading_bars
from minirlhf.training import Recorder

CACHE = ROOT / "build" / "figure_10"
SFT = ROOT / "data" / "checkpoints" / "sft"
SEEDS = (0, 1, 2)
PROMPTS, POOL = 200, 128
MEASURED_STEPS = (2, 4, 6, 8, 10, 12, 15, 18, 24, 30, 36, 48, 60, 72, 84, 96)
VALIDATION = 300
# The default run's PPO with half of its batch, more steps, and no KL penalty. (Twice the rate walks as far in a third
# of the steps, but most of it is noise: gold falls from the start.)
PUSH = replace(RLHFConfig(), steps=96, batch_size=64, minibatch_size=32, beta=0.0)


@dataclass(frozen=True)
class Judge:
    """A reward model: its size, the number of rankings, the seed of which, the seed of head and order.

    The rankings are the first of a shuffled list, or the last: those of a judge for validation.
    """

    size: str
    comparisons: int
    seed: int
    head: int = 0
    last: bool = False

    @property
    def folder(self) -> Path:
        kind = "validation" if self.last else f"head{self.head}"
        return CACHE / f"judge-{self.size}-{self.comparisons}-seed{self.seed}-{kind}"

    def rankings(self) -> list[Comparison]:
        rows = bench().folder.comparisons
        rows = Random(f"comparisons {self.seed}").sample(rows, len(rows))
        return rows[-self.comparisons :] if self.last else rows[: self.comparisons]


@dataclass(frozen=True)
class Push:
    """A PPO run: against one judge, or against several as one."""

    size: str = "large"
    comparisons: int = 300
    beta: float = 0.0
    reward: str = "single"
    models: int = 1

    def judges(self, seed: int) -> list[Judge]:
        return [Judge(self.size, self.comparisons, seed, head) for head in range(self.models)]

    def validation(self, seed: int) -> Judge | None:
        left = len(bench().folder.comparisons) - self.comparisons
        return Judge("large", VALIDATION, seed, last=True) if left >= VALIDATION else None


RUNS: dict[str, Push] = {
    "comparisons 300": Push(),
    "comparisons 1200": Push(comparisons=1200),
    "comparisons 6000": Push(comparisons=6000),
    "tiny": Push("tiny", 6000),
    "small": Push("small", 6000),
    "beta 0.05": Push(beta=0.05),
    "beta 0.2": Push(beta=0.2),
    "mean of 4": Push(reward="mean", models=4),
    "min of 4": Push(reward="min", models=4),
}
ANSWERS_OF = ("comparisons 300", 0)
# A smaller model wants larger steps (figure_11's factors between the sizes' rates for SFT).
JUDGE_LR = {"large": 1e-3, "small": 3e-3, "tiny": 8e-3}

LABELS, ANSWERS_EACH = 600, 4
ITERATED_SEEDS = (0, 1, 2, 3, 4)
ITERATED_HOWS = ("one round", "two rounds", "two runs")
# Steps of half the size, so that each of two rounds has 40 of them at the price of 20.
ITERATED = replace(RLHFConfig(), steps=80, batch_size=64, minibatch_size=32)


class Bench:
    """The data, gold and the SFT model, loaded once a process."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        hide_loading_bars()
        self.world = World(0)
        self.gold = GoldLabeler(self.world)
        self.folder = read_folder(ROOT / "data" / "small_world", 0)
        self.tokenizer = load_tokenizer(SFT)
        verify_model(SFT)
        self.sft = load_causal_model(SFT).eval()
        self.prompts = [row.text for row in self.folder.prompts]
        self.all_heldout = [row.text for row in self.folder.heldout_prompts]
        self.heldout = Random("over-optimisation").sample(self.all_heldout, PROMPTS)

    def golds(self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool]) -> list[float]:
        return [self.gold.score(*row).total for row in zip(prompts, responses, ended, strict=True)]

    def pool(self) -> dict[str, Any]:
        """POOL answers of the SFT model to each held-out prompt, and their gold: lists [PROMPTS * POOL]."""
        prompts = [prompt for prompt in self.heldout for _ in range(POOL)]

        def make() -> Any:
            found = answer(self.sft, self.tokenizer, prompts, EvaluationConfig(), seed=0)
            golds = self.golds(prompts, found.responses, found.ended)
            shares = {"length": sum(found.lengths) / len(prompts), "ended": sum(found.ended) / len(prompts)}
            return {"responses": found.responses, "gold": golds} | shares

        return {"prompts": prompts} | kept(CACHE / "pool.json", make)


@cache
def bench() -> Bench:
    return Bench()


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What `make` gave the first time, from a JSON file."""
    if not path.is_file():
        write_json(path, make())
    return json.loads(path.read_text(encoding="utf-8"))


def start_of(size: str) -> Any:
    """An SFT model of a size: the shipped one, or trained here, base and all."""
    if size == "large":
        return bench().sft
    folder, config, b = CACHE / f"sft-{size}", SIZES[size], bench()
    if not folder.is_dir():
        quiet = Recorder(size, progress=False)
        model = tiny_llama(config.model_size, b.tokenizer, b.sft.config.max_position_embeddings, 0)
        blocks = blocks_of(encode_texts(b.tokenizer, [row.text for row in b.folder.corpus]), config.base.block_length)
        model = train_base(model, blocks, config.base, seed=0, recorder=quiet)
        quiet = Recorder(size, progress=False)
        model = train_sft(model, b.tokenizer, b.folder.demonstrations, config.sft, seed=0, recorder=quiet)
        save(folder, model)
    verify_model(folder)
    return load_causal_model(folder).eval()


def save(folder: Path, model: Any) -> None:
    aside = folder.with_name(folder.name + ".partial")
    aside.mkdir(parents=True, exist_ok=True)
    save_model(folder, model, bench().tokenizer, aside=aside, summary={})


def train_judge(start: Any, comparisons: Sequence[Comparison], lr: float, seed: int) -> Any:
    """A reward model in the unit of all judges: mean 0 and standard deviation 1 over the pool of SFT answers."""
    config, quiet = RewardModelConfig(lr=lr), Recorder("reward_model", progress=False)
    model = train_reward_model(start, bench().tokenizer, comparisons, config, seed=seed, recorder=quiet)
    pool = bench().pool()
    scores = RewardModelScorer(model, bench().tokenizer)(pool["prompts"], pool["responses"])
    mean, deviation = float(scores.mean()), float(scores.std())
    with torch.no_grad():
        model.score.weight /= deviation
    model.config.score_offset = (model.config.score_offset + mean) / deviation
    return model


def make_judge(judge: Judge) -> dict[str, Any]:
    """Train one judge and its best-of-n curve; gives its rows in the first two tables."""
    if not judge.folder.is_dir():
        seed = 100 * judge.head + judge.seed
        save(judge.folder, train_judge(start_of(judge.size), judge.rankings(), JUDGE_LR[judge.size], seed))
    if judge.head or judge.last:
        return {}  # one of an ensemble, or for validation: not in the tables
    return kept(judge.folder.with_suffix(".json"), lambda: measure_judge(judge))


def measure_judge(judge: Judge) -> dict[str, Any]:
    b, model = bench(), load_scalar_model(judge.folder).eval()
    reward = RewardModelScorer(model, b.tokenizer)
    training = {row.labeler for row in b.folder.comparisons}
    rows = [row for row in b.folder.heldout_comparisons if row.labeler in training]
    scores = score_comparisons(reward, rows)
    true = [replace(row, scores=tuple(b.gold.score(row.prompt, text).total for text in row.responses)) for row in rows]
    about = {"size": judge.size, "comparisons": judge.comparisons, "seed": judge.seed}
    pool = b.pool()
    table = {"gold": torch.tensor(pool["gold"]), "proxy": reward(pool["prompts"], pool["responses"])}
    table["length"] = torch.tensor([float(len(text.split())) for text in pool["responses"]])
    table = {key: column.view(PROMPTS, POOL) for key, column in table.items()}
    curve = []
    for n in (2**power for power in range(POOL.bit_length())):
        means = {key: float(best_of_n(table["proxy"], table[key], n).mean()) for key in ("proxy", "gold", "length")}
        curve.append(about | {"n": n, "kl": best_of_n_kl(n)} | means)
    measured = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy": accuracy(ordered_pairs(rows, scores).reward),
        "gold_accuracy": accuracy(ordered_pairs(true, scores).reward),
    }
    head = {"size": judge.size, "parameters": measured.pop("parameters")}
    return {"judge": head | about | measured, "best_of_n": curve}


class Measured(Recorder):
    """A recorder that measures the policy on held-out prompts after MEASURED_STEPS."""

    def __init__(self, reward: RewardFunction, validation: RewardFunction | None) -> None:
        super().__init__("ppo", progress=False)
        self.reward, self.validation = reward, validation
        self.rows: list[Row] = []

    def log(self, metrics: Any) -> None:
        super().log(metrics)
        if len(self.history) in MEASURED_STEPS:
            found = measure(self._models["policy"], self.reward, self.validation)
            self.rows.append({"step": len(self.history)} | found)


def measure(policy: Any, reward: RewardFunction, validation: RewardFunction | None) -> Row:
    b = bench()
    found = answer(policy, b.tokenizer, b.heldout, EvaluationConfig(), reference=b.sft, seed=1)
    golds = b.golds(b.heldout, found.responses, found.ended)
    scores = torch.as_tensor(reward(b.heldout, found.responses))
    return {
        "kl": mean_and_error(found.kl)[0],
        "proxy": float(scores.mean()),
        "validation": float(torch.as_tensor(validation(b.heldout, found.responses)).mean()) if validation else "",
        "gold": mean_and_error(golds)[0],
        "length": sum(found.lengths) / PROMPTS,
        "ended": sum(found.ended) / PROMPTS,
        "answers": found.responses,
        "scores": scores.tolist(),
        "answers_ended": found.ended,
    }


def reward_of(models: Sequence[Any], how: str) -> RewardFunction:
    scorers = [RewardModelScorer(model, bench().tokenizer) for model in models]
    return scorers[0] if how == "single" else EnsembleReward(scorers, how)


def make_push(name: str, seed: int) -> list[Row]:
    """One PPO run; gives its rows, answers included."""
    push, b = RUNS[name], bench()

    def run() -> list[Row]:
        models = [load_scalar_model(judge.folder).eval() for judge in push.judges(seed)]
        reward, second = reward_of(models, push.reward), push.validation(seed)
        validation = reward_of([load_scalar_model(second.folder).eval()], "single") if second else None
        recorder = Measured(reward, validation)
        train(clone(b.sft), clone(models[0]), reward, replace(PUSH, beta=push.beta), seed, recorder)
        return recorder.rows

    return kept(CACHE / f"push-{name.replace(' ', '-')}-seed{seed}.json", run)


def train(policy: Any, value: Any, reward: RewardFunction, config: RLHFConfig, seed: int, recorder: Recorder) -> Any:
    b = bench()
    return train_rlhf(
        policy.eval(), value.eval(), b.sft, reward, b.tokenizer, b.prompts, config, seed=seed, recorder=recorder
    )


def collect(policy: Any, count: int, seed: int, label: str) -> list[Comparison]:
    """`count` training prompts with ANSWERS_EACH answers of a policy, ranked by the training labelers."""
    b, rng = bench(), Random(f"{label} {seed}")
    prompts = rng.sample(b.prompts, count)
    asked = [prompt for prompt in prompts for _ in range(ANSWERS_EACH)]
    found = answer(policy, b.tokenizer, asked, EvaluationConfig(), seed=1000 + seed)
    labelers, rows = make_labelers(b.world), []
    for number, prompt in enumerate(prompts):
        texts = dict.fromkeys(found.responses[number * ANSWERS_EACH : (number + 1) * ANSWERS_EACH])
        ranked = rng.choice(labelers).rank(prompt, texts, rng)
        rows.append(Comparison(prompt, tuple(texts), tuple(ranked["scores"]), ranked["labeler"]))
    return [row for row in rows if len(row.responses) > 1]


def make_iterated(how: str, seed: int) -> Row:
    """Steps 2 and 3 once, or twice with half of the rankings and half of the PPO steps each."""
    rounds = 1 if how == "one round" else 2

    def run() -> Row:
        b = bench()
        policy, comparisons = b.sft, list[Comparison]()
        config = replace(ITERATED, steps=ITERATED.steps // rounds)
        for number in range(rounds):
            asked = policy if how == "two rounds" else b.sft
            comparisons += collect(asked, LABELS // rounds, seed, f"round {number}")
            judge = train_judge(b.sft, comparisons, JUDGE_LR["large"], seed)
            reward = RewardModelScorer(judge, b.tokenizer)
            quiet = Recorder("ppo", progress=False)
            policy = train(clone(policy), clone(judge), reward, config, 10 * number + seed, quiet)
        settings = EvaluationConfig()
        ours = answer(policy, b.tokenizer, b.all_heldout, settings, reference=b.sft, seed=seed)
        theirs = answer(b.sft, b.tokenizer, b.all_heldout, settings, seed=seed)
        golds, before = (b.golds(b.all_heldout, x.responses, x.ended) for x in (ours, theirs))
        mean, error = mean_and_error(golds)
        return {
            "how": how,
            "labels": LABELS,
            "seed": seed,
            "gold": mean,
            "standard_error": error,
            "kl": mean_and_error(ours.kl)[0],
            "proxy": float(reward(b.all_heldout, ours.responses).mean()),
            "win_rate_vs_sft": win_rate(golds, before)[0],
        }

    return kept(CACHE / f"iterated-{how.replace(' ', '-')}-seed{seed}.json", run)


def shown_answers(rows: Sequence[Row]) -> list[Row]:
    """The first held-out prompt of each family, answered by SFT, near gold's peak, and at the end."""
    b, pool = bench(), bench().pool()
    first: dict[str, int] = {}
    for index, prompt in enumerate(b.heldout):
        first.setdefault(b.gold.family(prompt), index)
    sft = {"step": 0, "kl": 0.0, "answers": pool["responses"][::POOL], "answers_ended": None}
    sft["scores"] = reward_of([load_scalar_model(RUNS[ANSWERS_OF[0]].judges(ANSWERS_OF[1])[0].folder)], "single")(
        b.heldout, sft["answers"]
    ).tolist()
    peak = max(rows, key=lambda row: row["gold"])
    table = []
    for index in first.values():
        for row in (sft, peak, rows[-1]):
            ended = row["answers_ended"] is None or row["answers_ended"][index]
            gold = b.gold.score(b.heldout[index], row["answers"][index], ended)
            about = {"prompt": b.heldout[index], "step": row["step"], "kl": row["kl"], "answer": row["answers"][index]}
            parts = {part: getattr(gold, part) for part in ("helpful", "truthful", "harmless", "well_formed")}
            table.append(about | {"proxy": row["scores"][index], "gold": gold.total} | parts)
    return table


def run_jobs(what: str, job: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], processes: int) -> list[Any]:
    from tqdm import tqdm

    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(job, *row) for row in arguments]
        return [future.result() for future in tqdm(waiting, desc=what, unit=" runs", file=sys.stdout)]


def main() -> None:
    parser = argparse.ArgumentParser(description="The runs of lesson 10.")
    parser.add_argument("--only", choices=("judges", "ppo", "iterated"), help="a part; left out: all")
    parser.add_argument("--runs", choices=list(RUNS), nargs="+", default=list(RUNS), help="of PPO; left out: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="default: 0 1 2")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    options = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.only != "iterated":
        bench().pool()
        pushes = [(RUNS[name], seed) for seed in options.seeds for name in options.runs]
        needed = [(*push.judges(seed), push.validation(seed)) for push, seed in pushes]
        judges = list(dict.fromkeys(judge for row in needed for judge in row if judge is not None))
        run_jobs("SFT models", start_of_size, [(size,) for size in dict.fromkeys(j.size for j in judges)], options.jobs)
        made = run_jobs("judges", make_judge, [(judge,) for judge in judges], options.jobs)
        shown = [row for row in made if row]
        write_table(RESULTS / "overoptimisation_reward_models.csv", [row["judge"] for row in shown])
        write_table(RESULTS / "overoptimisation_best_of_n.csv", [r for row in shown for r in row["best_of_n"]])
    if options.only in (None, "ppo"):
        names = [(name, seed) for seed in options.seeds for name in options.runs]
        found = dict(zip(names, run_jobs("PPO", make_push, names, options.jobs), strict=True))
        write_table(
            RESULTS / "overoptimisation_ppo.csv", [row for key, rows in found.items() for row in plain(*key, rows)]
        )
        if ANSWERS_OF in found:
            write_table(RESULTS / "overoptimisation_answers.csv", shown_answers(found[ANSWERS_OF]))
    if options.only in (None, "iterated"):
        names = [(how, seed) for seed in ITERATED_SEEDS for how in ITERATED_HOWS]
        rows = run_jobs("iterated", make_iterated, names, options.jobs)
        write_table(RESULTS / "overoptimisation_iterated.csv", rows)


def start_of_size(size: str) -> None:
    start_of(size)


def sft_proxy(push: Push, seed: int) -> float:
    """The mean score of SFT answers: 0 for a judge and for a mean of judges, and lower for the lowest of several."""
    if push.reward != "min":
        return 0.0
    models = [load_scalar_model(judge.folder).eval() for judge in push.judges(seed)]
    pool = bench().pool()
    return float(reward_of(models, push.reward)(pool["prompts"][::8], pool["responses"][::8]).mean())


def plain(name: str, seed: int, rows: Sequence[Row]) -> list[Row]:
    """The rows of a run as the table has them, the SFT model first."""
    push = RUNS[name]
    about = {"run": name, "size": push.size, "comparisons": push.comparisons, "beta": push.beta}
    about |= {"reward": push.reward, "seed": seed}
    keys = ("step", "kl", "proxy", "validation", "gold", "length", "ended")
    pool = bench().pool()
    validation = "" if push.validation(seed) is None else 0.0
    start = {"step": 0, "kl": 0.0, "proxy": sft_proxy(push, seed), "validation": validation}
    start |= {"gold": sum(pool["gold"]) / len(pool["gold"])} | {key: pool[key] for key in ("length", "ended")}
    return [about | {key: row[key] for key in keys} for row in (start, *rows)]


if __name__ == "__main__":
    main()
