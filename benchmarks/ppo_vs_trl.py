"""PPO episodes a second: minirlhf against trl's PPOTrainer, in one run on one machine.

    .venv/bin/python benchmarks/ppo_vs_trl.py

trl lives in a throw-away environment that this script makes (build/trl-venv, about 1.5 GB, from the versions in
constraints.txt) and never in the project's own. Each side runs in a process of its own, in turns (ours, trl, ours,
trl, ...), so that a machine which slows down slows both. A turn warms up and then times every step from the end of
one to the end of the next; the figure is the median over turns of the median step of a turn.

The same on both sides, by construction or checked at run time (the run stops if it is not so):
    models        policy, value, reference and reward, each the same tiny Llama (3 layers, width 96) with the same
                  seeded weights (a checksum is compared); float32, SDPA attention, no dropout
    answers       64 a step. Work "full": each exactly 40 new tokens (<pad>, <eos> and <unk> get a logit of -10,000).
                  Work "ending": <eos> has a chance of 1 in 12 at every token, so that answers have 12 tokens on
                  average and end at different times, at most 40, as answers do
    prompts       the same 256, of 6 to 12 words, left-padded
    optimisation  2 epochs x 2 minibatches = 4 optimizer steps for each network, counted by a hook; fused AdamW
    forwards      token positions that enter each of the four models in one step, counted by hooks and printed
    threads       torch.set_num_threads and OMP_NUM_THREADS

What differs is how each library does it, at its defaults. trl sets `gradient_checkpointing=True` and `bf16=True` unless
told otherwise; both are off here, which is quicker on a CPU (`--trl-checkpointing` shows the price of the first). It
samples by transformers' `generate` with a KV cache and keeps the logits of every token; its forwards also build a KV
cache, the logits of the prompt and all hidden states, hold every answer at the width of the longest, and it collects
garbage twice a step. minirlhf computes the same Llama without padding (`minirlhf/language/packed.py`: rows end to end,
and after the last attention only the tokens that are asked for), leaves out the last token where it predicts nothing,
clips both gradients, logs more metrics, and sends answers as text, closed with EOS, to the reward.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import math
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import time
import venv
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / "build" / "trl-venv"
RESULTS = ROOT / "benchmarks" / "results" / "ppo_vs_trl.csv"
TRL = ("trl==1.12.0", "accelerate==1.15.0", "datasets==5.2.0")  # what constraints.txt does not name

EPISODES, NEW_TOKENS, EPOCHS, MINIBATCHES = 64, 40, 2, 2
PROMPTS, SHORTEST, LONGEST = 256, 6, 12
VOCABULARY = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(110))]
LLAMA = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
LR, BETA, CLIP_RANGE, LAM = 3e-4, 0.05, 0.2, 0.95
WORKS = ("full", "ending")
MEAN_LENGTH = 12  # of the work "ending"


# --- What both sides share: runs in either environment, so it imports neither minirlhf nor trl. ---


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def make_prompts() -> list[str]:
    rng = random.Random(0)
    words = VOCABULARY[3:]
    return [" ".join(rng.choices(words, k=rng.randint(SHORTEST, LONGEST))) for _ in range(PROMPTS)]


def make_models(work: str) -> dict[str, Any]:
    """Policy and reference with equal weights, value and reward with their own; all from fixed seeds."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    models = {}
    for name, seed in (("policy", 0), ("reference", 0), ("value", 1), ("reward", 2)):
        torch.manual_seed(seed)
        if name in ("policy", "reference"):
            models[name] = LlamaForCausalLM(LlamaConfig(**LLAMA))
            # A frozen bias says how often <eos> is sampled, and <pad> and <unk> never.
            bias = torch.zeros(len(VOCABULARY))
            bias[:3] = -1e4
            if work == "ending":  # the words' logits are close to 0 in a fresh model
                bias[1] = math.log((len(VOCABULARY) - 3) / (MEAN_LENGTH - 1))
            models[name].lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
        else:
            models[name] = LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=1))
    return models


class Probe:
    """Counts optimizer steps and the token positions that enter each model, and notes when each PPO step ends."""

    def __init__(self, models: dict[str, Any]) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.ends: list[tuple[float, float]] = []  # wall and CPU seconds
        self.tokens: Counter[str] = Counter()
        self.updated: Counter[str] = Counter()
        owner = {id(p): name for name, model in models.items() for p in model.parameters() if p.requires_grad}
        self._hooks = [register_optimizer_step_post_hook(lambda optimizer, *_: self._count_update(optimizer, owner))]
        for name, model in models.items():
            hook = lambda module, args, name=name: self._count_tokens(name, args[0])  # noqa: E731
            self._hooks.append(model.base_model.embed_tokens.register_forward_pre_hook(hook))
        self.checksum = {name: float(sum(p.double().abs().sum() for p in m.parameters())) for name, m in models.items()}

    def _count_update(self, optimizer: Any, owner: dict[int, str]) -> None:
        self.updated.update({owner[id(p)] for group in optimizer.param_groups for p in group["params"]})

    def _count_tokens(self, name: str, tokens: Any) -> None:
        self.tokens[name] += tokens.numel()

    def step_ended(self) -> None:
        """Count the first step only: hooks are not timed."""
        if not self.ends:
            for hook in self._hooks:
                hook.remove()
        self.ends.append((time.perf_counter(), time.process_time()))

    def report(self, warmup: int) -> dict[str, Any]:
        steps = list(zip(self.ends[warmup - 1 :], self.ends[warmup:], strict=False))
        return {
            "seconds": [after[0] - before[0] for before, after in steps],
            "cpu_seconds": [after[1] - before[1] for before, after in steps],
            "tokens": dict(self.tokens),
            "updates": dict(self.updated),
            "checksum": self.checksum,
        }


# --- One turn of each side: runs in a process of its own and prints one line of JSON. ---


def run_minirlhf(work: str, steps: int, warmup: int) -> dict[str, Any]:
    from minirlhf.language.reward_model import RewardModelScorer
    from minirlhf.language.rlhf import RLHFConfig, train_rlhf
    from minirlhf.language.tokenization import prepare
    from minirlhf.training import Recorder

    models, tokenizer = make_models(work), prepare(make_tokenizer())
    probe = Probe(models)

    class TimedRecorder(Recorder):
        def log(self, metrics: Any) -> None:  # the last thing that a PPO step does
            super().log(metrics)
            probe.step_ended()

    config = RLHFConfig(
        steps=steps,
        batch_size=EPISODES,
        epochs=EPOCHS,
        minibatch_size=EPISODES // MINIBATCHES,
        lr=LR,
        value_lr=LR,
        beta=BETA,
        clip_range=CLIP_RANGE,
        value_clip_range=CLIP_RANGE,
        lam=LAM,
        temperature=1.0,
        max_response_tokens=NEW_TOKENS,
        missing_eos_penalty=0.0,
    )
    recorder = TimedRecorder("ppo", progress=False)
    reward = RewardModelScorer(models["reward"], tokenizer)
    train_rlhf(
        models["policy"],
        models["value"],
        models["reference"],
        reward,
        tokenizer,
        make_prompts(),
        config,
        recorder=recorder,
    )
    lengths = [row["objective/response_length"] for row in recorder.history]
    return probe.report(warmup) | {"new_tokens": statistics.mean(lengths)}


def run_trl(work: str, steps: int, warmup: int, checkpointing: bool) -> dict[str, Any]:
    import tempfile

    import torch
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental import ppo
    from trl.experimental.ppo import ppo_trainer

    models, tokenizer = make_models(work), make_tokenizer()
    probe = Probe(models)
    lengths: list[float] = []
    generate = ppo_trainer.batch_generation

    def measured(model: Any, queries: Any, *args: Any) -> Any:
        answered, logits = generate(model, queries, *args)
        lengths.append(float((answered[:, queries.shape[1] :] != tokenizer.pad_token_id).sum(1).float().mean()))
        return answered, logits

    ppo_trainer.batch_generation = measured

    class StepTimer(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            probe.step_ended()

    with tempfile.TemporaryDirectory() as folder:
        args = ppo.PPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=checkpointing,
            # Accumulating over 1 micro-batch: with 2 x 32, accelerate would make 1 optimizer step of 2 minibatches.
            per_device_train_batch_size=EPISODES,
            gradient_accumulation_steps=1,
            num_mini_batches=MINIBATCHES,
            num_ppo_epochs=EPOCHS,
            local_rollout_forward_batch_size=EPISODES,
            total_episodes=steps * EPISODES,
            response_length=NEW_TOKENS,
            stop_token="eos",
            temperature=1.0,
            learning_rate=LR,
            kl_coef=BETA,
            cliprange=CLIP_RANGE,
            cliprange_value=CLIP_RANGE,
            lam=LAM,
            num_sample_generations=0,
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
            seed=0,
        )
        rows = tokenizer(make_prompts(), add_special_tokens=False)["input_ids"]
        trainer = ppo.PPOTrainer(
            args=args,
            processing_class=tokenizer,
            model=models["policy"],
            ref_model=models["reference"],
            reward_model=models["reward"],
            value_model=models["value"],
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            callbacks=[StepTimer()],
        )
        trainer.train()
    versions = {"trl": trl.__version__, "torch": torch.__version__}
    return probe.report(warmup) | {"new_tokens": statistics.mean(lengths), "versions": versions}


def worker(args: argparse.Namespace) -> None:
    import torch
    import transformers

    torch.set_num_threads(args.threads[0])
    began = time.perf_counter()
    steps = args.warmup + args.steps
    if args.worker == "minirlhf":
        result = run_minirlhf(args.work[0], steps, args.warmup)
    else:
        result = run_trl(args.work[0], steps, args.warmup, args.trl_checkpointing)
    result["versions"] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **result.get("versions", {}),
    }
    result["turn_seconds"] = time.perf_counter() - began
    print("RESULT " + json.dumps(result))


# --- The comparison. ---


def make_environment() -> Path:
    """The throw-away environment of trl, made once; a half-made one is made again."""
    python = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = VENV / "installed.txt"
    wanted = "\n".join(TRL)
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    print(f"making {VENV.relative_to(ROOT)} with {', '.join(TRL)}: a few minutes, once")
    venv.create(VENV, with_pip=True, clear=True)
    constraints = ROOT / "constraints.txt"
    pins = constraints.read_text(encoding="utf-8").splitlines()
    exact = [line for line in pins if line.startswith(("torch==", "transformers=="))]
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # torch first and by its exact number, so that an installer with a CPU build at hand takes that one.
    subprocess.run([*pip, exact[0]], check=True)
    subprocess.run([*pip, "-c", str(constraints), *exact, *TRL], check=True)
    stamp.write_text(wanted, encoding="utf-8")
    return python


def turn(side: str, python: Path, work: str, threads: int, args: argparse.Namespace) -> dict[str, Any]:
    command = [str(python), str(Path(__file__).resolve()), "--worker", side, "--work", work]
    command += ["--threads", str(threads), "--steps", str(args.steps), "--warmup", str(args.warmup)]
    command += ["--trl-checkpointing"] if args.trl_checkpointing else []
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        sys.exit(f"{side} failed with exit code {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def check_same_work(work: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Stop if the two sides did not do what the header promises."""
    updates = {"policy": EPOCHS * MINIBATCHES, "value": EPOCHS * MINIBATCHES}
    for side, result in (("minirlhf", ours), ("trl", theirs)):
        expected, tolerance = (NEW_TOKENS, 0.0) if work == "full" else (MEAN_LENGTH, 2.0)
        if abs(result["new_tokens"] - expected) > tolerance:
            sys.exit(f"{side} sampled {result['new_tokens']} tokens per answer, not {expected}")
        if result["updates"] != updates:
            sys.exit(f"{side} made these optimizer steps in a PPO step: {result['updates']}, not {updates}")
    if ours["checksum"] != theirs["checksum"]:
        sys.exit(f"the initial weights differ: {ours['checksum']} and {theirs['checksum']}")


def machine() -> str:
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass  # no Linux
    return f"{model}, {os.cpu_count()} cores, {platform.system()}"


def csv_row(
    side: str, work: str, threads: int, repeat: int, result: dict[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    seconds = result["seconds"]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "side": side,
        "work": work,
        "threads": threads,
        "repeat": repeat,
        "episodes_per_second": round(EPISODES / statistics.median(seconds), 2),
        "seconds_median": round(statistics.median(seconds), 4),
        "seconds_min": round(min(seconds), 4),
        "seconds_max": round(max(seconds), 4),
        "cpu_seconds_median": round(statistics.median(result["cpu_seconds"]), 4),
        "steps": len(seconds),
        "warmup": args.warmup,
        "trl_checkpointing": args.trl_checkpointing,
        "torch": result["versions"]["torch"],
        "transformers": result["versions"]["transformers"],
        "trl": result["versions"].get("trl", ""),
        "python": platform.python_version(),
        "machine": machine(),
    }


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    """One row of the table: the median over turns of each side, and the ratio of the medians."""
    mine, other = ([EPISODES / statistics.median(turn["seconds"]) for turn in side] for side in (ours, theirs))
    ratios = [a / b for a, b in zip(mine, other, strict=True)]
    ratio = statistics.median(mine) / statistics.median(other)
    return f"{spread(mine):22s}  {spread(other):22s}  {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def spread(numbers: list[float]) -> str:
    return f"{statistics.median(numbers):.1f} ({min(numbers):.1f} to {max(numbers):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="PPO episodes a second: minirlhf against trl's PPOTrainer.")
    both = sorted({1, os.cpu_count() or 1})
    parser.add_argument("--threads", type=int, nargs="+", default=both, help="thread counts to compare")
    parser.add_argument(
        "--work", choices=WORKS, nargs="+", default=list(WORKS), help="what kind of answers (see above)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="turns of each side")
    parser.add_argument("--steps", type=int, default=8, help="timed PPO steps a turn")
    parser.add_argument("--warmup", type=int, default=2, help="PPO steps before them (at least 1)")
    parser.add_argument("--trl-checkpointing", action="store_true", help="trl with gradient checkpointing, its default")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the CSV to write")
    parser.add_argument("--worker", choices=("minirlhf", "trl"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.warmup < 1 or args.steps < 1 or args.repeats < 1:
        parser.error("--warmup, --steps and --repeats must be at least 1")
    if args.worker:
        worker(args)
        return

    pythons = {"minirlhf": Path(sys.executable), "trl": make_environment()}
    command = shlex.join(["python", "benchmarks/ppo_vs_trl.py", *sys.argv[1:]])
    rows: list[dict[str, Any]] = []
    table: list[str] = []
    counts: list[str] = []
    busiest = 0.0
    for work in args.work:
        for threads in args.threads:
            results: dict[str, list[dict[str, Any]]] = {side: [] for side in pythons}
            for repeat in range(args.repeats):
                for side, python in pythons.items():
                    result = turn(side, python, work, threads, args)
                    results[side].append(result)
                    rows.append(csv_row(side, work, threads, repeat, result, args) | {"command": command})
                    rate = rows[-1]["episodes_per_second"]
                    print(f"{work}, {threads} threads, turn {repeat + 1}, {side:8s} {rate:7.1f} episodes/s", flush=True)
                    if threads == 1:
                        busiest = max(busiest, sum(result["seconds"]) / sum(result["cpu_seconds"]))
                check_same_work(work, results["minirlhf"][-1], results["trl"][-1])
            table.append(f"{work:7s} {threads:7d}   {compare(results['minirlhf'], results['trl'])}")
        for side in pythons:
            last = results[side][-1]
            entered = "  ".join(f"{name} {count:,}" for name, count in sorted(last["tokens"].items()))
            counts.append(f"{work:7s} {side:9s} {entered}  (answers of {last['new_tokens']:.1f} tokens)")

    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)

    print(f"\nPPO episodes a second, median over turns (least to most); {machine()}")
    print("work    threads   minirlhf                trl                     ratio (least to most of a turn)")
    print("\n".join(table))
    print("\ntoken positions that entered each model in the first PPO step, padding included")
    print("\n".join(counts))
    if busiest > 1.1:
        print(
            f"\nThe machine was busy: a step waited {busiest - 1:.0%} longer than it computed. Run this on a quiet one."
        )


if __name__ == "__main__":
    main()
