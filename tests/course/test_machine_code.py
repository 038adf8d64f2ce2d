"""Instructions are counted in a process of its own, for a GPU that isn't here, also where the interpreter is on."""

from __future__ import annotations

from pathlib import Path

import pytest
from minirlhf_course import machine_code
from minirlhf_course.checks.kernels import jit, tl, why_not

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


@jit
def largest(z, BLOCK: tl.constexpr):
    return tl.max(z, 0) if BLOCK > 0 else 0.0


def of_blocks(logits, tokens, results, columns, row_stride, BLOCK: tl.constexpr):
    best = tl.full((), -1e30, tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(logits + at, mask=at < columns, other=-1e30).to(tl.float32)
        best = tl.maximum(best, largest(z, BLOCK))
    tl.store(results, best)


def of_lanes(logits, tokens, results, columns, row_stride, BLOCK: tl.constexpr):
    best = tl.full((BLOCK,), -1e30, tl.float32)
    for start in range(0, columns - BLOCK, BLOCK):
        best = tl.maximum(best, tl.load(logits + start + tl.arange(0, BLOCK)).to(tl.float32))
    tl.store(results, tl.max(best, 0))


def test_a_maximum_per_block_waits_in_its_loop_and_one_per_lane_does_not():
    options = {"BLOCK": 2048, "num_warps": 4}
    counts = machine_code.count(ROOT, (largest,), {"blocks": (of_blocks, options), "lanes": (of_lanes, options)})
    blocks, lanes = counts["blocks"], counts["lanes"]
    assert blocks["barriers"] > 0 and blocks["shuffles"] > 0 and blocks["load_bits"] == 16
    assert lanes["barriers"] == lanes["shuffles"] == 0 and lanes["load_bits"] == 128
    assert 1 < lanes["instructions_per_element"] < blocks["instructions_per_element"]


def test_what_does_not_compile_says_what_the_compiler_said():
    def wrong(logits, tokens, results, columns, row_stride, BLOCK: tl.constexpr):
        tl.store(results, missing)  # noqa: F821

    with pytest.raises(RuntimeError, match="missing is not defined"):
        machine_code.count(ROOT, (), {"wrong": (wrong, {"BLOCK": 16})})


def test_a_learners_kernel_is_counted_or_the_compiler_speaks():
    options = {"BLOCK": 2048, "num_warps": 4}
    counted = machine_code.count(ROOT, (), {"lanes": (of_lanes, options)}, dtype="float32")
    each = counted["lanes"]["instructions_per_element"]
    assert machine_code.count_own(ROOT, of_lanes) == f"yours: {each:.1f} instructions per float32 logit;"

    def wrong(logits, tokens, results, columns, row_stride, BLOCK: tl.constexpr):
        tl.store(results, missing)  # noqa: F821

    assert machine_code.count_own(ROOT, wrong).startswith("it does not compile:")


def test_the_packages_kernels_are_counted_in_its_budgets():
    counts = machine_code.package_counts(ROOT)
    assert set(counts) == {
        f"{way}, {what}" for way in ("forward", "backward") for what in ("log-probs alone", "with the entropy")
    }
    assert (
        counts["forward, log-probs alone"] < counts["forward, with the entropy"] < counts["backward, with the entropy"]
    )
