"""How far does this code go? Seconds, memory and share of the machine's speed of a PPO step, as it grows.

    .venv/bin/python benchmarks/scaling.py             five minutes on two quiet cores
    .venv/bin/python benchmarks/scaling.py --plot      only the picture and the table of docs/scaling.md

From one middle size (BASE) the width, the answers per step and the length of an answer are varied, one at a time. Each
point is measured with one process that uses two threads and with two processes of one thread each (as `torchrun
--nproc-per-node 2` starts them), so both have the same two cores. A point runs in processes of its own: one step to
warm up, then the median of STEPS steps. Policy, value, reference and reward model are one Llama of LAYERS layers with
random weights; all answers take their whole length; one epoch, two minibatches; float32.

benchmarks/results/scaling.csv, a row a point:

    varied         the size that differs from BASE
    width, batch, answer_tokens, processes, threads (of each process)
    seconds        of a PPO step, the median
    memory_mib     most memory that a process held at once, of the process that held most
    gflops         floating-point operations that the step needs, a second, in thousands of millions: see `operations`
    peak_gflops    the same for products of two square matrices of side 2048, as many at once as there are processes
    share          gflops / peak_gflops

The first line ends with the machine's load average before and after: up to 2 of the latter is the benchmark's own.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from tables import ROOT, Row, write_table

RESULTS = ROOT / "benchmarks" / "results" / "scaling.csv"
PICTURE = ROOT / "docs" / "scaling.svg"
PAGE = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- measured -->\n", "<!-- /measured -->"
LAYERS, HEAD, STEPS = 4, 24, 3
VOCABULARY = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(2045))]


class Point(NamedTuple):
    """One measurement."""

    width: int = 192
    batch: int = 16
    answer_tokens: int = 40
    processes: int = 1
    threads: int = 2


BASE = Point()
SIZES = {"width": (96, 192, 384, 768), "batch": (8, 16, 32, 64), "answer_tokens": (10, 20, 40, 80)}
WAYS = {"one process, two threads": (1, 2), "two processes, one thread each": (2, 1)}


def points() -> list[tuple[str, Point]]:
    """What is varied, and the point; the middle size is in all three series."""
    return [
        (varied, BASE._replace(**{varied: size}, processes=processes, threads=threads))
        for varied, sizes in SIZES.items()
        for size in sizes
        for processes, threads in WAYS.values()
    ]


def operations(point: Point, prompt_tokens: int) -> float:
    """Floating-point operations that a PPO step needs: the products of matrices, two for each multiplication.

    A token's forward costs 2 per weight of a layer, and attention 4 x width per token before it. Prompt and answer go
    through policy (sampling), reference, value and reward model once, and forward and backward (3 forwards) through
    policy and value network in the update. The head is needed at the answers' tokens, for sampling, the reference and
    the update.
    """
    intermediate = 8 * point.width // 3
    length = prompt_tokens + point.answer_tokens
    layer = 2 * (4 * point.width**2 + 3 * point.width * intermediate) + 4 * point.width * length / 2
    body = LAYERS * layer * length
    head = 2 * point.width * len(VOCABULARY) * point.answer_tokens
    return point.batch * ((4 + 2 * 3) * body + (2 + 3) * head)


def measure(point: Point) -> Row:
    """One point, here and now: called in each of its processes."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from minirlhf import parallel
    from minirlhf.language.models import clone, scalar_model_from
    from minirlhf.language.reward_model import RewardModelScorer
    from minirlhf.language.rlhf import RLHFConfig, train_rlhf
    from minirlhf.language.tokenization import encode_prompts, prepare
    from minirlhf.training import Recorder

    torch.set_num_threads(point.threads)
    with parallel.joined(torch.device("cpu")):
        torch.manual_seed(0)
        words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
        tokenizer = prepare(PreTrainedTokenizerFast(tokenizer_object=words, **special))
        config = LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=point.width,
            intermediate_size=8 * point.width // 3,
            num_hidden_layers=LAYERS,
            num_attention_heads=point.width // HEAD,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
        policy = LlamaForCausalLM(config).eval()
        bias = torch.zeros(len(VOCABULARY))
        bias[:3] = -1e4  # every answer takes its whole length
        policy.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
        value = scalar_model_from(policy, seed=1)
        reward = RewardModelScorer(clone(value), tokenizer)
        peak = peak_flops(point.threads)
        ends = [time.perf_counter()]

        class Timed(Recorder):
            def log(self, metrics: Any) -> None:
                super().log(metrics)
                ends.append(time.perf_counter())

        settings = RLHFConfig(
            steps=1 + STEPS,
            batch_size=point.batch,
            minibatch_size=max(1, point.batch // 2),
            max_response_tokens=point.answer_tokens,
            micro_batch_tokens=4096,
        )
        prompts = [" ".join(f"w{(7 * i + j) % 2045}" for j in range(10)) for i in range(64)]
        recorder = Timed("scaling", progress=False)
        train_rlhf(policy, value, clone(policy), reward, tokenizer, prompts, settings, recorder=recorder)
        lengths = {row["objective/response_length"] for row in recorder.history}
        assert lengths == {float(point.answer_tokens)}, lengths
        seconds = statistics.median(after - before for before, after in itertools.pairwise(ends[1:]))
        memory = max(parallel.gather([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
        peak = sum(parallel.gather([peak]))
    flops = operations(point, len(encode_prompts(tokenizer, prompts[:1])[0])) / seconds
    return {
        **point._asdict(),
        "seconds": seconds,
        "memory_mib": memory,
        "gflops": flops / 1e9,
        "peak_gflops": peak / 1e9,
        "share": flops / peak,
    }


def peak_flops(threads: int, side: int = 2048) -> float:
    """Operations a second of a product of two square matrices in float32: the best of several."""
    import torch

    a, b = torch.randn(side, side), torch.randn(side, side)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - began)
    return 2 * side**3 / min(times)


def run(point: Point) -> Row:
    """Measure a point in processes of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"OMP_NUM_THREADS": str(point.threads), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(Path(__file__).resolve()), "--point", json.dumps(point)]
    running = [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"WORLD_SIZE": str(point.processes), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(point.processes)
    ]
    said = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        sys.exit(f"{point} failed")
    row: Row = json.loads(said[0].splitlines()[-1])
    return row


def read() -> tuple[str, list[Row]]:
    """The table's first line (machine, versions, date and command) and its rows."""
    with open(RESULTS, newline="", encoding="utf-8") as file:
        return file.readline().removeprefix("# ").strip(), list(csv.DictReader(file))


def write_page(stamp: str, rows: list[Row]) -> None:
    """Put the picture and the series over the width into docs/scaling.md."""
    names = {ways: way for way, ways in WAYS.items()}
    lines = [
        "![Seconds per PPO step against width, answers per step and tokens per answer, for one process and two, and "
        "the share of the matrix-product peak against width](scaling.svg)",
        "",
        f"{BASE.batch} answers of {BASE.answer_tokens} tokens per step, a Llama of {LAYERS} layers.",
        f"Measured on: {stamp}.",
        "Up to 2 of the load average is the benchmark's own. What is above that is other work, which makes times",
        "longer, above all those of two processes, where one waits for the other.",
        "",
        "| width | with | seconds per step | most memory of a process, MiB | GFLOP/s | share of the product's peak |",
        "|---|---|---|---|---|---|",
    ]
    for row in (row for row in rows if row["varied"] == "width"):
        way = names[int(row["processes"]), int(row["threads"])]
        numbers = f"{float(row['seconds']):.3g} | {float(row['memory_mib']):.0f} | {float(row['gflops']):.0f}"
        lines.append(f"| {row['width']} | {way} | {numbers} | {100 * float(row['share']):.0f} % |")
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}{chr(10).join(lines)}\n{END}{after}", encoding="utf-8")


def draw(rows: list[Row]) -> None:
    """docs/scaling.svg: what a step takes along each size, and which share of the machine it uses."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator
    from minirlhf_course.plotting import curve, label_axes, panels, style

    names = {
        "width": "width of the model",
        "batch": "answers per step",
        "answer_tokens": "tokens per answer",
    }
    colours = dict(zip(WAYS, ("#0072b2", "#d55e00"), strict=True))
    with style():
        figure, axes = panels(2, 2, width=4.6, height=3.0)
        for panel, varied in zip(axes.flat, (*SIZES, "width"), strict=True):
            shown = "share" if panel is axes[1, 1] else "seconds"
            for way, (processes, threads) in WAYS.items():
                found = [
                    (int(row[varied]), float(row[shown]) * (100 if shown == "share" else 1))
                    for row in rows
                    if row["varied"] == varied and (int(row["processes"]), int(row["threads"])) == (processes, threads)
                ]
                if found:
                    x, y = zip(*sorted(found), strict=True)
                    curve(panel, x, y, colours[way], label=way)
                    panel.plot(x, y, "o", color=colours[way], markersize=3.5)
            panel.set_xscale("log")
            panel.set_xticks(SIZES[varied], [str(size) for size in SIZES[varied]])
            if shown == "seconds":
                panel.set_yscale("log")
                panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
                panel.yaxis.set_major_formatter(FormatStrFormatter("%g"))
                label_axes(panel, names[varied], "seconds per PPO step")
            else:
                panel.set_ylim(0, 100)
                label_axes(panel, names[varied], "% of matrix-product peak")
            panel.minorticks_off()
        axes[0, 0].legend()
        figure.savefig(PICTURE, format="svg", metadata={"Date": None})
    print(f"{PICTURE.relative_to(ROOT)}: drawn from {RESULTS.relative_to(ROOT)}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds, memory and share of the machine of a PPO step, as it grows.")
    parser.add_argument("--plot", action="store_true", help="only draw the picture from the table")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        print(json.dumps(measure(Point(*json.loads(args.point)))))
        return
    if not args.plot:
        rows, known, before = [], {}, os.getloadavg()[0]
        for varied, point in points():
            known[point] = known.get(point) or run(point)
            rows.append({"varied": varied} | known[point])
            print(", ".join(f"{key} {value:.4g}" for key, value in known[point].items()), flush=True)
        note = f"load average {before:.1f} before, {os.getloadavg()[0]:.1f} after"
        write_table(RESULTS, rows, note=note)
    stamp, rows = read()
    draw(rows)
    write_page(stamp, rows)


if __name__ == "__main__":
    main()
