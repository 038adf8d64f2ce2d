"""Wrong folds, gradients and kernels as learners would write them: lesson 06's checks refuse them and name them.

Numbers are the museum's, "-" marks mistakes that are not in it; see test_museum.py for lessons 01 to 05.
"""

from __future__ import annotations

import ast
import linecache
from typing import NamedTuple

import pytest
import torch
from minirlhf_course.checks import kernels, lesson06
from minirlhf_course.checks.kernels import KernelExercise, guarded, untouched_beyond, variants, why_not
from minirlhf_course.checks.outcome import compare

from minirlhf.losses import clipped_surrogate
from minirlhf.losses import token_logprobs as package_logprobs


class Bug(NamedTuple):
    number: int | str
    check: str
    source: str
    named: str


BUGS = [
    Bug("-", "fold", """
def f(peak, total, block):
    peak = torch.max(peak, block.max(1).values)
    return peak, total + torch.exp(block).sum(1)
""", "The peak is not subtracted"),
    Bug("-", "fold", """
def f(peak, total, block):
    new = torch.max(peak, block.max(1).values)
    shift = torch.nan_to_num(new, neginf=0.0)
    return new, total + torch.exp(block - shift[:, None]).sum(1)
""", "The old sum is not rescaled"),
    Bug("-", "fold", """
def f(peak, total, block):
    new = torch.max(peak, block.max(1).values)
    return new, torch.exp(peak - new) * total + torch.exp(block - new.unsqueeze(1)).sum(1)
""", "-inf minus -inf is NaN"),
    Bug("-", "token_logprobs", """
def f(logits, tokens, logprobs, columns, row_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    peak = -float("inf")
    total = 0.0
    for start in range(0, columns, BLOCK):
        z = tl.load(logits + row * row_stride + start + tl.arange(0, BLOCK))
        top = tl.maximum(peak, tl.max(z, 0))
        shift = tl.where(top == -float("inf"), 0.0, top)
        total = total * tl.exp(peak - shift) + tl.sum(tl.exp(z - shift), 0)
        peak = top
    z_token = tl.load(logits + row * row_stride + tl.load(tokens + row))
    tl.store(logprobs + row, z_token - (peak + tl.log(total)))
""", "The tail has no mask"),
    Bug("-", "token_logprobs", """
def f(logits, tokens, logprobs, columns, row_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    total = 0.0
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.sum(tl.exp(tl.load(logits + row * row_stride + at, mask=at < columns, other=-float("inf"))), 0)
    tl.store(logprobs + row, tl.load(logits + row * row_stride + tl.load(tokens + row)) - tl.log(total))
""", "The peak is not subtracted"),
    Bug("-", "token_logprobs", """
def f(logits, tokens, logprobs, columns, row_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    peak = -float("inf")
    total = 0.0
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(logits + row * row_stride + at, mask=at < columns, other=-float("inf"))
        top = tl.maximum(peak, tl.max(z, 0))
        total = total * tl.exp(peak - top) + tl.sum(tl.exp(z - top), 0)
        peak = top
    tl.store(logprobs + row, tl.load(logits + row * row_stride + tl.load(tokens + row)) - peak - tl.log(total))
""", "-inf minus -inf is NaN"),
    Bug(4, "clip_gradient", """
def f(logprobs, old_logprobs, advantages, clip_range):
    ratio = torch.exp(logprobs - old_logprobs)
    inside = (ratio >= 1 - clip_range) & (ratio <= 1 + clip_range)
    return -ratio * advantages * inside
""", "It stops wherever the ratio is outside"),
    Bug("-", "clip_gradient", """
def f(logprobs, old_logprobs, advantages, clip_range):
    ratio = torch.exp(logprobs - old_logprobs)
    return -ratio * advantages * ~((advantages > 0) & (ratio > 1 + clip_range))
""", "It stops for A > 0 only"),
    Bug("-", "clip_gradient", """
def f(logprobs, old_logprobs, advantages, clip_range):
    ratio = torch.exp(logprobs - old_logprobs)
    stopped = ((advantages > 0) & (ratio > 1 + clip_range)) | ((advantages < 0) & (ratio < 1 - clip_range))
    return torch.where(stopped, 0.0, -advantages)
""", "This is the derivative with respect to r"),
    Bug(4, "clipped_loss", """
def f(logprobs, old_logprobs, advantages, mask, losses, gradients, count, low, high, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    counts = there & (tl.load(mask + at, mask=there, other=0) != 0)
    advantage = tl.load(advantages + at, mask=counts, other=0.0)
    log_ratio = tl.load(logprobs + at, mask=counts, other=0.0) - tl.load(old_logprobs + at, mask=counts, other=0.0)
    ratio = tl.exp(log_ratio)
    inside = (ratio >= low) & (ratio <= high)
    clipped = tl.minimum(tl.maximum(ratio, low), high) * advantage
    tl.store(losses + at, -tl.minimum(ratio * advantage, clipped), mask=there)
    tl.store(gradients + at, tl.where(inside, -ratio * advantage, 0.0), mask=there)
""", "The gradient stops wherever the ratio is outside"),
    Bug("-", "compose", """
def f(a_before, b_before, a, b):
    return a_before * a, a_before * b + b_before
""", "The operands are swapped"),
    Bug(21, "gae", """
def f(rewards, values, ends, last_values, advantages, steps, gamma, lam, STEPS: tl.constexpr):
    row = tl.program_id(0)
    t = steps - 1 - tl.arange(0, STEPS)
    at = row * steps + t
    v = tl.load(values + at, mask=t >= 0, other=0.0)
    v_next = tl.load(values + at + 1, mask=(t >= 0) & (t < steps - 1), other=0.0)
    v_next = tl.where(t == steps - 1, tl.load(last_values + row), v_next)
    goes_on = 1.0 - tl.load(ends + at, mask=t >= 0, other=1).to(tl.float32)
    delta = tl.load(rewards + at, mask=t >= 0, other=0.0) + gamma * goes_on * v_next - v
    decay = gamma * lam + 0.0 * delta
    pair = tl.associative_scan((decay, delta), 0, after)
    tl.store(advantages + at, pair[1], mask=t >= 0)
""", "An end does not cut the chain"),
    Bug(12, "gae", """
def f(rewards, values, ends, last_values, advantages, steps, gamma, lam, STEPS: tl.constexpr):
    row = tl.program_id(0)
    t = steps - 1 - tl.arange(0, STEPS)
    at = row * steps + t
    v = tl.load(values + at, mask=t >= 0, other=0.0)
    v_next = tl.load(values + at + 1, mask=(t >= 0) & (t < steps - 1), other=0.0)
    v_next = tl.where(t == steps - 1, tl.load(last_values + row), v_next)
    goes_on = 1.0 - tl.load(ends + at, mask=t >= 0, other=1).to(tl.float32)
    delta = tl.load(rewards + at, mask=t >= 0, other=0.0) + gamma * v_next - v
    pair = tl.associative_scan((gamma * lam * goes_on, delta), 0, after)
    tl.store(advantages + at, pair[1], mask=t >= 0)
""", "An end does not cut the value"),
    Bug("-", "gae", """
def f(rewards, values, ends, last_values, advantages, steps, gamma, lam, STEPS: tl.constexpr):
    row = tl.program_id(0)
    t = tl.arange(0, STEPS)
    at = row * steps + t
    v = tl.load(values + at, mask=t < steps, other=0.0)
    v_next = tl.load(values + at + 1, mask=t + 1 < steps, other=0.0)
    v_next = tl.where(t == steps - 1, tl.load(last_values + row), v_next)
    goes_on = 1.0 - tl.load(ends + at, mask=t < steps, other=1).to(tl.float32)
    delta = tl.load(rewards + at, mask=t < steps, other=0.0) + gamma * goes_on * v_next - v
    pair = tl.associative_scan((gamma * lam * goes_on, delta), 0, after)
    tl.store(advantages + at, pair[1], mask=t < steps)
""", "The scan runs forwards in time"),
]  # fmt: skip


def written(source: str, name: str = "f"):
    """A function from its text, as a notebook's cell would make it: Triton reads its source."""
    file = f"<cell {abs(hash(source))}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    space = {"torch": torch, "tl": lesson06.tl, "after": lesson06.after}
    exec(compile(source, file, "exec"), space)
    return space[name]


def needs_triton(check: str) -> None:
    if isinstance(getattr(lesson06, check), KernelExercise) and why_not():
        pytest.skip(why_not())


@pytest.mark.parametrize("bug", BUGS, ids=[f"{bug.number}-{bug.check}-{index}" for index, bug in enumerate(BUGS)])
def test_is_refused_and_named(bug):
    needs_triton(bug.check)
    verdict = getattr(lesson06, bug.check).mark(written(bug.source))
    assert verdict.status == "failed"
    headline, _, case = verdict.message.partition("\n\n")
    assert bug.named in headline, verdict.message
    assert case.startswith("Smallest failing case: ")


def test_every_bug_of_this_lesson_is_here():
    assert {bug.number for bug in BUGS} >= {4, 12, 21}


# The definitions are the package's --------------------------------------------------------------------------------


def test_a_row_folded_block_by_block_has_log_softmaxs_sum():
    logits = 30 * torch.randn(5, 23, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits[0, :8] = -torch.inf
    for width in (1, 4, 23):
        state = torch.full((5,), -torch.inf, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
        for block in logits.split(width, dim=1):
            state = lesson06.fold.reference(*state, block)
        torch.testing.assert_close(state[0] + state[1].log(), logits.logsumexp(1), rtol=1e-12, atol=0)


def test_the_clips_gradient_is_autograds():
    g = torch.Generator().manual_seed(0)
    old = -torch.rand(200, generator=g, dtype=torch.float64)
    new = (old + 0.5 * torch.randn(200, generator=g, dtype=torch.float64)).requires_grad_()
    advantages = torch.randn(200, generator=g, dtype=torch.float64)
    ratio = (new - old).exp()
    torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum().neg().backward()
    torch.testing.assert_close(lesson06.clip_gradient.reference(new.detach(), old, advantages, 0.2), new.grad)
    loss, gradient = lesson06.clipped_loss.reference(new.detach(), old, advantages, torch.ones(200).bool(), 0.2)
    torch.testing.assert_close(gradient, new.grad)
    package = clipped_surrogate(new.detach(), old, advantages, clip_range=0.2)
    torch.testing.assert_close(loss.mean(), package)


def test_composing_is_associative_and_not_commutative():
    g = torch.Generator().manual_seed(0)
    f, h, k = (tuple(torch.randn(2, 50, generator=g, dtype=torch.float64)) for _ in range(3))
    after = lesson06.compose.reference
    left, right = after(*after(*f, *h), *k), after(*f, *after(*h, *k))
    for x, y in zip(left, right, strict=True):
        torch.testing.assert_close(x, y)
    assert not torch.allclose(after(*f, *h)[1], after(*h, *f)[1])


def test_the_definition_of_the_log_probability_is_the_packages():
    logits, tokens = torch.randn(3, 7), torch.tensor([0, 6, 2])
    torch.testing.assert_close(lesson06.token_logprobs.reference(logits, tokens), package_logprobs(logits, tokens))


# The machine ------------------------------------------------------------------------------------------------------


def test_writing_behind_the_last_token_is_refused():
    needs_triton("clipped_loss")
    right = lesson06.clipped_loss.kernel
    text = "tl.store(gradients + at, gradient, mask=there)"
    (kernel,) = variants(right, {"no mask": [(text, "tl.store(gradients + at, gradient)")]}).values()
    verdict = lesson06.clipped_loss.mark(kernel)
    assert verdict.status == "failed" and "wrote behind the last token" in verdict.message, verdict.message


def test_a_kernel_that_fails_shows_its_own_line():
    needs_triton("gae")
    arguments = "rewards, values, ends, last_values, advantages, steps, gamma, lam, STEPS: tl.constexpr"
    verdict = lesson06.gae.mark(written(f"def f({arguments}):\n    row = tl.program_id(0)\n    x = row + unknown\n"))
    assert "It raises NameError: name 'unknown' is not defined" in verdict.message
    assert "in the line: x = row + unknown" in verdict.message


TWICE = """
def f(logits, tokens, logprobs, columns, row_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    peak = tl.full((), float("-inf"), tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(logits + row * row_stride + at, mask=at < columns, other=float("-inf"))
        peak = tl.maximum(peak, tl.max(z, 0))
    total = tl.zeros((), tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(logits + row * row_stride + at, mask=at < columns, other=float("-inf"))
        total += tl.sum(tl.exp(z - peak), 0)
    tl.store(logprobs + row, tl.load(logits + row * row_stride + tl.load(tokens + row)) - peak - tl.log(total))
"""
WALKS = """
def f(rewards, values, ends, last_values, advantages, steps, gamma, lam, STEPS: tl.constexpr):
    row = tl.program_id(0)
    following = tl.load(last_values + row)
    carry = 0.0
    for back in range(0, steps):
        at = row * steps + steps - 1 - back
        goes_on = tl.where(tl.load(ends + at) != 0, 0.0, 1.0)
        value = tl.load(values + at)
        delta = tl.load(rewards + at) + gamma * goes_on * following - value
        carry = delta + gamma * lam * goes_on * carry
        following = value
        tl.store(advantages + at, carry)
"""


@pytest.mark.parametrize(
    ("check", "source", "named"),
    [("token_logprobs", TWICE, "It reads the row twice"), ("gae", WALKS, "Right, but it walks")],
)
def test_right_numbers_by_the_wrong_road_are_refused(check, source, named):
    needs_triton(check)
    item = getattr(lesson06, check)
    verdict = item.mark(written(source))
    assert verdict.status == "failed" and verdict.message.startswith(named), verdict.message
    numbers = item.run(written(source), item.cases()[-1])
    assert compare(numbers, item.run(item.reference, item.cases()[-1]), 1e-5) is None, "it is right, all but the road"


def test_a_gae_without_a_scan_is_told_to_use_one():
    assert "not in one scan" in lesson06.gae.form(ast.parse("def f():\n    return tl.sum(weights * delta, 1)"))


def test_other_arguments_are_refused_before_a_launch():
    needs_triton("gae")
    verdict = lesson06.gae.mark(written("def f(rewards, STEPS):\n    x = 1\n    return x\n"))
    assert verdict.status == "failed" and "its arguments are (rewards, values, ends," in verdict.message


def test_a_decorated_kernel_and_what_a_check_returned_are_taken_too():
    needs_triton("token_logprobs")
    check = lesson06.token_logprobs
    verdict = check.mark(kernels.jit(check.kernel))
    assert verdict.status == "passed"
    assert check.mark(verdict).status == "passed"
    logits, tokens = torch.randn(2, 9), torch.tensor([8, 0])
    torch.testing.assert_close(verdict(logits, tokens), check.reference(logits, tokens))


@pytest.mark.parametrize(
    ("name", "value", "said"), [("triton", None, "needs triton"), ("DEVICE", "cpu", "restart the kernel")]
)
def test_without_triton_a_kernel_is_not_attempted_and_the_lesson_goes_on(monkeypatch, name, value, said):
    if value is None:
        monkeypatch.setattr(kernels, name, value)
    else:
        needs_triton("gae")
        monkeypatch.setattr(kernels, name, value)
        monkeypatch.setattr(kernels.triton.knobs.runtime, "interpret", False)
    check = lesson06.token_logprobs
    verdict = check.mark(check.kernel)
    assert verdict.status == "not attempted" and said in verdict.message
    assert verdict(torch.zeros(1, 2), torch.tensor([0])).exp().item() == pytest.approx(0.5)


def test_guarded_tensors_know_what_lies_behind_them():
    x = guarded(torch.arange(6.0).view(2, 3), beyond=9.0)
    assert x.shape == (2, 3) and x.is_contiguous()
    untouched_beyond(x, 9.0)
    torch.as_strided(x, (7,), (1,))[6] = 1.0
    with pytest.raises(IndexError, match="behind the last token"):
        untouched_beyond(x, 9.0)


def test_a_variant_must_change_something():
    with pytest.raises(ValueError, match="once, not 0 times"):
        variants(lesson06.gae.kernel, {"nothing": [("not in it", "")]})
