"""Compile every kernel for GPUs that this machine doesn't have, and count in the code what its speed depends on.

    python tests/kernels/compile_ahead.py            # print the table
    make budgets                                     # and make it the budget: kernels/benchmarks/budgets.csv and .svg

Triton's own binder says what each call would compile (fake_driver.py); the compiler and the disassembler that come with
triton do the rest. A row is a kernel of a call. Its registers and its spilled and shared bytes are those of the whole
kernel; all else is counted in its loop over what it reads, or from beginning to end if it has none, like ppo_loss.

issue_share: an H200 has 132 x 4 schedulers which at 1.98 GHz start 1.045e12 instructions a second, each of 32 lanes.
This share of them is needed to keep up with a memory of 4.3 TB/s. Above 1, the kernel is slower than the memory.
"""

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from fake_driver import FakeDevice, Variant
from minirlhf_kernels import gae, linear_token_logprobs, ppo_loss, token_logprobs
from triton.backends.compiler import GPUTarget

ROOT = Path(__file__).resolve().parents[2]
BUDGETS = ROOT / "kernels" / "benchmarks" / "budgets.csv"
OLDEST = ROOT / "build" / "triton-oldest"
NAMES = ("triton", "target", "call", "kernel")
COUNTS = ("registers", "spilled_bytes", "shared_bytes", "load_bits", "barriers", "shuffles", "waits_in_other_loops")
COUNTS += ("instructions_per_element", "issue_share")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MEMORY, ISSUE = 4.3e12, 132 * 4 * 1.98e9
TOKENS, MASK = torch.randint(64, (3, 5)), torch.ones(3, 5, dtype=torch.bool)


def numbers(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()


def backward(outs):
    sum(y.sum() for y in (outs if isinstance(outs, tuple) else (outs,))).backward()


def plain(columns, dtype=torch.bfloat16, entropy=True):
    options = {"mask": MASK, "return_entropy": True} if entropy else {}
    backward(token_logprobs(numbers(3, 5, columns, dtype=dtype), TOKENS, **options))


def linear(words, dtype=torch.float32, entropy=True):
    hidden, weight = numbers(3, 5, 8, dtype=dtype), numbers(words, 8, dtype=dtype)
    backward(linear_token_logprobs(hidden, weight, TOKENS, return_entropy=entropy))


def in_slabs(entropy):
    with mock.patch("minirlhf_kernels.fused.linear.SLAB", 15 * 2048):  # a first one, one between, a last one
        linear(5001, entropy=entropy)


def ppo(every_term, **options):
    x = [numbers(3, 5) for _ in range(8)]
    if every_term:
        options |= {"values": x[3], "old_values": x[4], "returns": x[5], "entropy": x[6], "ref_logprobs": x[7]}
        options |= {"value_clip_range": 0.2, "entropy_coef": 0.1, "kl_coef": 0.1}
    backward(ppo_loss(*x[:3], MASK, **options)[0])


def advantages(steps, turned=False, everything=False):
    x, ends = torch.randn(3, steps), torch.rand(3, steps) < 0.1
    if turned:
        x, ends = (y.t().contiguous().t() for y in (x, ends))
    options = {"last_values": torch.randn(3), "truncated_values": x, "mask": ends} if everything else {}
    gae(x, x, ends, gamma=0.9, lam=0.9, **options)


# These are compiled for every target, and by the oldest triton too.
HEADLINES = {
    "token_logprobs with entropy, bfloat16, long rows": lambda: plain(5001),
    "token_logprobs with entropy, bfloat16, short rows": lambda: plain(512),
    "linear_token_logprobs with entropy": lambda: linear(5001),
    "ppo_loss with every term": lambda: ppo(True),
    "gae, long rows": lambda: advantages(1000),
    "gae, short rows": lambda: advantages(16),
    "gae of [T, N], long rows": lambda: advantages(1000, turned=True),
}
OTHERS = {
    "token_logprobs with entropy, float32, long rows": lambda: plain(5001, torch.float32),
    "token_logprobs with entropy, float32, short rows": lambda: plain(512, torch.float32),
    "token_logprobs with entropy, float16, long rows": lambda: plain(5001, torch.float16),
    "token_logprobs with entropy, float16, short rows": lambda: plain(512, torch.float16),
    "token_logprobs, bfloat16, long rows": lambda: plain(5001, entropy=False),
    "token_logprobs, bfloat16, short rows": lambda: plain(512, entropy=False),
    "linear_token_logprobs with entropy, slabs": lambda: in_slabs(True),
    "linear_token_logprobs, slabs": lambda: in_slabs(False),
    "linear_token_logprobs, bfloat16, short rows": lambda: linear(600, torch.bfloat16, False),
    "ppo_loss": lambda: ppo(False),
    "ppo_loss with a number for denominator": lambda: ppo(False, denominator=3.0),
    "ppo_loss with a tensor for denominator": lambda: ppo(False, denominator=torch.tensor(3.0)),
    "gae, middling rows": lambda: advantages(100),
    "gae with all it may take, long rows": lambda: advantages(1000, everything=True),
    "gae with all it may take, short rows": lambda: advantages(16, everything=True),
    "gae of [T, N], short rows": lambda: advantages(16, turned=True),
}


def what_is_compiled(target: GPUTarget, calls: dict) -> dict[tuple[str, str], Variant]:
    """By call and kernel. Where a call needs a kernel twice, the flags that are set tell one from the other."""
    found = {}
    with FakeDevice(target) as device:
        for call, function in calls.items():
            device.compiled.clear()
            function()
            names = [variant.kernel for variant in device.compiled]
            for variant in device.compiled:
                flags = " ".join(name for name, value in variant.constants.items() if value is True)
                name = variant.kernel if names.count(variant.kernel) == 1 else f"{variant.kernel} {flags}".strip()
                found[call, name] = variant
    return found


def nvidia(tool: str, option: str, compiled) -> str:
    """What a tool that comes with triton says of the binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [getattr(triton.knobs.nvidia, tool).path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def usage_of(compiled) -> tuple[int, int]:
    """Registers, and bytes spilled."""
    if "amdgcn" in compiled.asm:
        named = r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)"
        found = dict(re.findall(named, compiled.asm["amdgcn"]))
        return int(found["vgpr_count"]), int(found["private_segment_fixed_size"])
    found = dict(re.findall(r"(REG|STACK):(\d+)", nvidia("cuobjdump", "-res-usage", compiled)))
    return int(found["REG"]), int(found["STACK"])


def code_of(compiled) -> tuple[list[str], dict[str, int]]:
    """Its instructions, and where each label stands among them."""
    if "amdgcn" in compiled.asm:
        listing, label_of, instruction_of = compiled.asm["amdgcn"], r"(\.LBB\w+):", r"\t([a-z]\w+.*)"
    else:
        listing, label_of = nvidia("nvdisasm", "-c", compiled), r"(\.L_\w+):"
        instruction_of = r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);"
    code, labels = [], {}
    for line in listing.splitlines():
        if label := re.match(label_of, line):
            labels[label[1]] = len(code)
        elif (instruction := re.match(instruction_of, line)) and instruction[1].strip() not in ("NOP", "s_nop 0"):
            code.append(instruction[1])
    return code, labels


def moved(code: list[str], way: str) -> list[int]:
    """The bits of each load from, or store to, global memory."""
    widths = []
    for instruction in code:
        if nvidia := re.search(r"\b(?:LDG|STG)\.E((?:\.\w+)*)", instruction):
            if ("LDG" in instruction) == (way == "load"):
                (width,) = re.findall(r"(?<=\.)[US]?(8|16|64|128)\b", nvidia[1]) or [32]
                widths.append(int(width))
        elif amd := re.search(rf"\b(?:global|buffer)_{way}_(dword|[a-z]+)(?:_d16\w*)?(?:x(\d))?", instruction):
            kind = amd[1]
            widths.append(8 if "byte" in kind else 16 if "short" in kind else 32 * int(amd[2] or 1))
    return widths


def loops_of(code: list[str], labels: dict[str, int]) -> list[range]:
    """Those that load. The hot one comes first: the shortest of those with the widest loads."""
    loops = []
    for at, instruction in enumerate(code):
        to = re.search(r"(?:BRA|s_c?branch).*?(\.L\w+)", instruction)
        if to and labels.get(to[1], at + 1) <= at and moved(code[labels[to[1]] : at], "load"):
            loops.append(range(labels[to[1]], at + 1))
    return sorted(loops, key=lambda loop: (-max(moved(code[loop.start : loop.stop], "load")), len(loop)))


def waits(code: list[str]) -> tuple[int, int]:
    """Barriers, and shuffles."""
    patterns = r"\bBAR\b|\bs_barrier\b", r"\bSHFL\b|_dpp\b|\bds_b?permute|\bds_swizzle"
    barriers, shuffles = (sum(bool(re.search(pattern, x)) for x in code) for pattern in patterns)
    return barriers, shuffles


def count(call: str, variant: Variant) -> dict[str, int | float | None]:
    target, kernel, traffic = variant.device.target, variant.kernel, None
    compiled = triton.compile(variant.source, target=target, options=variant.options)
    registers, spilled = usage_of(compiled)
    counts = {"registers": registers, "spilled_bytes": spilled, "shared_bytes": compiled.metadata.shared}
    if target.arch == 80 and call not in HEADLINES:  # the disassembler takes as long as the compiler
        return dict.fromkeys(COUNTS) | counts
    code, labels = code_of(compiled)
    loops = [range(len(code))] if kernel.startswith("ppo.") else loops_of(code, labels) or [range(len(code))]
    part = [code[i] for i in loops[0]]
    others = [code[i] for i in sorted(set().union(*loops[1:]) - set(loops[0]))]

    loaded, stored = (sum(moved(part, way)) / 8 for way in ("load", "store"))
    pointers = [kind for kind in variant.source.signature.values() if kind.startswith("*")]
    first, last = (int(re.sub(r".*?(\d+)$", r"\1", kind)) // 8 for kind in (pointers[0], pointers[-1]))
    if kernel.startswith("ppo."):
        elements = variant.constants["BLOCK"] / (target.warp_size * variant.options["num_warps"])
    elif kernel.startswith("gae."):  # two float32 a step
        elements, traffic = stored / 8, 22 if "all it may take" in call else 17
    elif kernel == "logprobs.backward_kernel":
        elements, traffic = stored / last, first + last
    else:
        elements, traffic = loaded / first, first
    each = len(part) / elements
    hopper = traffic and target.arch == 90
    barriers, shuffles = waits(part)
    return counts | {
        "load_bits": max(moved(part, "load")),
        "barriers": barriers,
        "shuffles": shuffles,
        "waits_in_other_loops": sum(waits(others)),
        "instructions_per_element": round(each, 2),
        "issue_share": round(MEMORY / traffic * each / 32 / ISSUE, 3) if hopper else None,
    }


def measure(headlines: bool) -> dict[tuple[str, ...], dict[str, int | float | None]]:
    rows = {}
    for name, target in TARGETS.items():
        calls = HEADLINES if headlines or name == "sm_89" else HEADLINES | OTHERS
        for (call, kernel), variant in what_is_compiled(target, calls).items():
            rows[triton.__version__, name, call, kernel] = count(call, variant)
    return rows


def write(path: Path, rows: dict) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow((*NAMES, *COUNTS))
        for names, counts in sorted(rows.items()):
            table.writerow((*names, *("" if x is None else f"{x:g}" for x in counts.values())))


def read(path: Path) -> dict:
    with path.open(encoding="utf-8", newline="") as file:
        return {
            tuple(line[name] for name in NAMES): {name: float(line[name]) if line[name] else None for name in COUNTS}
            for line in csv.DictReader(file)
        }


def by_the_oldest(path: Path) -> dict:
    """The headlines, measured by this file in a process of its own."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(OLDEST), os.environ.get("PYTHONPATH", "")))}
    subprocess.run([sys.executable, __file__, "--headlines", "--csv", path], env=env, check=True, capture_output=True)
    return read(path)


def show(rows: dict) -> None:
    width = max(len(f"{call}: {kernel}") for _, _, call, kernel in rows)
    print(" " * (width + 8), *(f"{name.replace('_', ' '):>10.10s}" for name in COUNTS))
    for (version, target, call, kernel), counts in sorted(rows.items()):
        numbers = ("" if x is None else f"{x:g}" for x in counts.values())
        print(f"{version} {target:6s} {f'{call}: {kernel}':{width}s}", *(f"{x:>10s}" for x in numbers))


def draw(path: Path, rows: dict) -> None:
    """Where Hopper stands by the newest triton."""
    import matplotlib
    from matplotlib import pyplot

    newest = max((names[0] for names in rows), key=lambda version: [int(x) for x in version.split(".")])
    shown = [(*names[2:], x) for names, x in rows.items() if names[:2] == (newest, "sm_90") and x["issue_share"]]
    shown = sorted(shown, key=lambda one: one[:2], reverse=True)
    with matplotlib.rc_context({"svg.hashsalt": "budgets", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(10, 0.6 + 0.27 * len(shown)), layout="constrained")
        labels = [f"{call}: {kernel.partition('.')[2].replace('_kernel', '')}" for call, kernel, _ in shown]
        shares = [100 * x["issue_share"] for *_, x in shown]
        axes.barh(range(len(shown)), shares, color=["#4c78a8" if share <= 100 else "#e45756" for share in shares])
        for at, (_, _, x) in enumerate(shown):
            text = f"{x['instructions_per_element']:.1f} instructions, {x['registers']:.0f} registers"
            axes.text(shares[at] + 1, at, text, va="center", fontsize=7.5)
        axes.axvline(100, color="black", linewidth=0.8, zorder=0)
        axes.set_yticks(range(len(shown)), labels)
        axes.set_xlim(0, max(*shares, 100) * 1.3)
        axes.set_ylim(-0.6, len(shown) - 0.4)
        axes.set_xlabel("% of an H200's issue slots, needed to keep up with 4.3 TB/s (compiled, not measured)")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--headlines", action="store_true", help="only what the oldest triton compiles too")
    parser.add_argument("--csv", type=Path, help="write the table into this file")
    parser.add_argument("--write", action="store_true", help="rewrite the budgets, of both tritons, and draw them")
    chosen = parser.parse_args()
    os.environ["MINIRLHF_KERNELS"] = "triton"
    rows = measure(chosen.headlines)
    if chosen.write:
        if not OLDEST.exists():
            raise SystemExit(f"{OLDEST} is missing: `make proof` installs it")
        with tempfile.TemporaryDirectory() as folder:
            rows |= by_the_oldest(Path(folder) / "oldest.csv")
        write(BUDGETS, rows)
        draw(BUDGETS.with_suffix(".svg"), rows)
    if chosen.csv:
        write(chosen.csv, rows)
    show(rows)


if __name__ == "__main__":
    main()
