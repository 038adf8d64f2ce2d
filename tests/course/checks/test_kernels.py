"""The machine that marks kernels: what it refuses beside wrong numbers, and what it does where triton is not."""

from __future__ import annotations

import ast

import pytest
import torch
from minirlhf_course.checks import kernels, lesson06
from minirlhf_course.checks.kernels import guarded, tl, untouched_beyond, variants, why_not
from minirlhf_course.checks.outcome import compare

needs_triton = pytest.mark.skipif(bool(why_not()), reason=why_not())


@needs_triton
def test_writing_behind_the_last_token_is_refused():
    change = ("tl.store(gradients + at, gradient, mask=there)", "tl.store(gradients + at, gradient)")
    (kernel,) = variants(lesson06.clipped_loss.kernel, {"no mask": [change]}).values()
    verdict = lesson06.clipped_loss.mark(kernel)
    assert verdict.status == "failed" and "wrote behind the last token" in verdict.message, verdict.message


@needs_triton
def test_a_kernel_that_fails_shows_its_own_line():
    def fails(rewards, values, ends, last_values, advantages, steps, gamma, lam, STEPS: tl.constexpr):
        row = tl.program_id(0)
        x = row + unknown  # noqa: F821, F841

    verdict = lesson06.gae.mark(fails)
    assert "It raises NameError: name 'unknown' is not defined" in verdict.message
    assert "in the line: x = row + unknown" in verdict.message


def reads_twice(logits, tokens, logprobs, columns, row_stride, BLOCK: tl.constexpr):
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


def walks(rewards, values, ends, last_values, advantages, steps, gamma, lam, STEPS: tl.constexpr):
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


@pytest.mark.parametrize(
    ("check", "kernel", "said"),
    [
        (lesson06.token_logprobs, reads_twice, "It reads the row twice"),
        (lesson06.gae, walks, "Right, but it walks"),
    ],
)
def test_right_numbers_by_the_wrong_road_are_refused(check, kernel, said):
    verdict = check.mark(kernel)
    assert verdict.status == "failed" and verdict.message.startswith(said), verdict.message
    numbers, expected = (check.run(function, check.cases()[-1]) for function in (kernel, check.reference))
    assert compare(numbers, expected, 1e-5) is None, "it is right, all but the road"


def test_a_gae_without_a_scan_is_told_to_use_one():
    assert "not in one scan" in lesson06.gae.form(ast.parse("def f():\n    return tl.sum(weights * delta, 1)"))


@needs_triton
def test_other_arguments_are_refused_before_a_launch():
    verdict = lesson06.gae.mark(lambda rewards, STEPS: 1 * rewards)
    assert verdict.status == "failed" and "its arguments are (rewards, values, ends," in verdict.message


@needs_triton
def test_a_decorated_kernel_and_what_a_check_returned_are_taken_too():
    check = lesson06.token_logprobs
    verdict = check.mark(kernels.jit(check.kernel))
    assert verdict.status == "passed"
    assert check.mark(verdict).status == "passed"
    logits, tokens = torch.randn(2, 9), torch.tensor([8, 0])
    torch.testing.assert_close(verdict(logits, tokens), check.reference(logits, tokens))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("triton", None, "needs triton"), pytest.param("DEVICE", "cpu", "restart the kernel", marks=needs_triton)],
)
def test_without_triton_a_kernel_is_not_attempted_and_the_lesson_goes_on(monkeypatch, name, value, said):
    if value is not None:
        monkeypatch.setattr(kernels.triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(kernels, name, value)
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
