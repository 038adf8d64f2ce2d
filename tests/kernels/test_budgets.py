"""Every kernel compiles for GPUs that aren't here, and its machine code costs no more than its budget.

The budgets are kernels/benchmarks/budgets.csv. compile_ahead.py counts, and says what the columns are; `make budgets`
makes what it counts the new budget.

The oldest triton that pyproject.toml allows is put into build/triton-oldest by `make proof`.
"""

import csv
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUDGETS = ROOT / "kernels" / "benchmarks" / "budgets.csv"
OLDEST = ROOT / "build" / "triton-oldest"
TARGETS = {"sm_80", "sm_89", "sm_90", "gfx942"}
KERNELS = {"logprobs.forward_kernel", "logprobs.backward_kernel", "linear.fold_kernel"}
KERNELS |= {"ppo.forward_kernel", "ppo.backward_kernel", "gae.gae_kernel"}
# At the memory's speed an H200 has time for 15 instructions a bfloat16 logit forward and 30 backward. With at most 40
# registers a processor holds 48 warps or more, whose loads hide each other's wait.
INSTRUCTIONS = {"logprobs.forward_kernel": 12, "logprobs.backward_kernel": 18, "linear.fold_kernel": 12}
REGISTERS = 40
pytestmark = pytest.mark.slow


def table(path):
    """The counts by triton, target, call and kernel."""
    names = "triton", "target", "call", "kernel"
    with path.open(encoding="utf-8", newline="") as file:
        return {
            tuple(row[name] for name in names): {k: float(x) for k, x in row.items() if k not in names and x}
            for row in csv.DictReader(file)
        }


@pytest.fixture(scope="module", params=["installed", "oldest"])
def counted(request, tmp_path_factory):
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    version = metadata.version("triton")
    if request.param == "oldest":
        if not OLDEST.exists():
            pytest.skip(f"{OLDEST.relative_to(ROOT)} is missing: `make proof` installs it")
        (version,) = re.findall(r'"triton>=([\d.]+)', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        env["PYTHONPATH"] = os.pathsep.join((str(OLDEST), env.get("PYTHONPATH", "")))
    elif f"triton=={version} " not in (ROOT / "constraints.txt").read_text(encoding="utf-8"):
        pytest.skip(f"budgets are of the triton in constraints.txt and of the oldest, not of {version}")
    path = tmp_path_factory.mktemp("budgets") / "counted.csv"
    options = ["--csv", path] + ["--headlines"] * (request.param == "oldest")
    command = [sys.executable, Path(__file__).with_name("compile_ahead.py"), *options]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=580)
    assert run.returncode == 0, run.stderr[-3000:]
    print(run.stdout)
    rows = table(path)
    assert {names[0] for names in rows} <= {version, f"{version}.0"}
    return rows


def test_no_kernel_costs_more_than_its_budget(counted):
    (version,) = {names[0] for names in counted}
    budgets = {names: counts for names, counts in table(BUDGETS).items() if names[0] == version}
    assert counted.keys() == budgets.keys(), "another set of kernels: `make budgets`"
    over = []
    for names, counts in counted.items():
        assert counts.keys() == budgets[names].keys()
        for count, x in counts.items():
            allowed = budgets[names][count]
            if x < allowed if count == "load_bits" else x > allowed:
                over.append(f"{', '.join(names)}: {count} {x:g}, {allowed:g} allowed")
    assert not over, "\n".join(over)


def test_every_kernel_compiles_for_every_target(counted):
    assert {(target, kernel.split()[0]) for _, target, _, kernel in counted} == {
        (t, k) for t in TARGETS for k in KERNELS
    }


def test_what_reads_logits_can_keep_up_with_hopper_s_memory(counted):
    """Nothing is spilled, 16 bytes are read at a time, and no thread waits for another inside of a loop over logits."""
    rows = {names[2:]: counts for names, counts in counted.items() if names[1] == "sm_90"}
    assert all(counts["spilled_bytes"] == 0 for counts in rows.values())
    logits = {names: counts for names, counts in rows.items() if names[1].split()[0] in INSTRUCTIONS}
    assert len(logits) >= 6
    for names, counts in logits.items():
        kernel = names[1].split()[0]
        assert counts["load_bits"] == 128, names
        assert counts["barriers"] == counts["shuffles"] == counts["waits_in_other_loops"] == 0, (names, counts)
        assert counts["instructions_per_element"] <= INSTRUCTIONS[kernel], (names, counts)
        assert counts["registers"] <= REGISTERS, (names, counts)
        assert counts["issue_share"] <= 0.7, (names, counts)
