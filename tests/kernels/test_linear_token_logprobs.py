"""What linear_token_logprobs does besides what the files of token_logprobs hold both ops to."""

import math

import pytest
import torch
from minirlhf_kernels import linear_token_logprobs, token_logprobs
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.usefixtures("backend")


def both(hidden, weight, tokens, **options):
    """The linear op and the plain one on the same rows."""
    yield linear_token_logprobs(hidden, weight, tokens, **options)
    yield token_logprobs(hidden @ weight.t(), tokens, **options)


@pytest.mark.parametrize("temperature", [1e-6, 1e-12, 1e-30, 1e-37])
def test_the_coldest_policy_is_the_greedy_one(temperature):
    hidden = torch.tensor([[300.0, -200.0], [100.0, 400.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.5], [-1.0, 2.0], [0.25, 1.0]])
    best = (hidden @ weight.t()).argmax(-1)
    for outs in both(hidden, weight, best, temperature=temperature, return_entropy=True):
        assert [y.tolist() for y in outs] == [[0.0, 0.0], [0.0, 0.0]]
        if temperature > 1e-31:  # below, the entropy's gradient is an infinite number times 0
            (grad,) = torch.autograd.grad(sum(y.sum() for y in outs), hidden)
            assert (grad == 0).all()


def test_words_barred_by_the_lowest_number_beside_a_lone_leader(oracle, within_float32):
    """0 * (finfo.min / temperature) of many words together must not become 0 * -inf."""
    logits = torch.full((1, 1100), torch.finfo(torch.float32).min)
    logits[0, 1030:1040] = torch.linspace(-1, 1, 10)
    logits[0, 1035] = 12.0
    tokens = torch.tensor([1036])
    expected = oracle(logits, tokens)
    for outs in both(torch.ones(1, 1, requires_grad=True), logits.t().clone(), tokens, return_entropy=True):
        for y, exact in zip(outs, expected, strict=False):
            within_float32(y, exact)


def test_leaders_far_apart_in_the_vocabulary_tie(oracle, within_float32):
    logits = torch.zeros(2, 600)
    logits[:, [3, 300, 599]] = 30.0
    tokens = torch.tensor([10, 300])
    expected = oracle(logits, tokens)
    assert expected[0].tolist() == pytest.approx([-30 - math.log(3), -math.log(3)])
    for outs in both(torch.eye(2), logits.t().clone(), tokens, return_entropy=True):
        for y, exact in zip(outs, expected, strict=False):
            within_float32(y, exact, 1e-6)


def test_no_rows():
    hidden, weight = torch.zeros(0, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    logprobs, entropy = linear_token_logprobs(hidden, weight, torch.zeros(0, dtype=torch.int64), return_entropy=True)
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert (weight.grad == 0).all()


class LargestMade(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation inside makes (not the interpreter's, of bytes)."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if torch.is_tensor(x) and x.dtype != torch.uint8:
                self.largest = max(self.largest, x.numel())
        return out


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_on_a_gpu_the_linear_op_never_holds_all_logits(monkeypatch):
    monkeypatch.setattr("minirlhf_kernels.fused.linear.plan", lambda rows, vocabulary: (16, 50))
    x, weight = torch.randn(64, 4, requires_grad=True), torch.randn(100, 4, requires_grad=True)
    with LargestMade() as made:
        outs = linear_token_logprobs(x, weight, torch.randint(100, (64,)), return_entropy=True)
        outs[0].sum().backward()
    assert made.largest == 16 * 50


def test_autocast_leaves_the_linear_op_in_float32(backend):
    """Forward, and backward outside of autocast, as torch asks for; Triton's also inside."""
    torch.manual_seed(8)
    hidden, weight = (torch.randn(n, 16, requires_grad=True) for n in (5, 40))
    tokens = torch.randint(40, (5,))

    def everything(forward, backward):
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=forward):
            out = linear_token_logprobs(hidden, weight, tokens, return_entropy=True)
            with torch.no_grad():
                alone = linear_token_logprobs(hidden, weight, tokens)
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=backward):
            return *out, alone, *torch.autograd.grad(sum(y.sum() for y in out), (hidden, weight))

    expected = everything(forward=False, backward=False)
    got = everything(forward=True, backward=backend == "triton")
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
