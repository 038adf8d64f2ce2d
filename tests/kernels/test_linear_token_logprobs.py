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


@pytest.mark.parametrize("backward_too", [False, True])
def test_autocast_multiplies_in_its_type(backend, backward_too):
    """Tensor cores take bfloat16: the same bits as from hidden states and a weight that were cast by hand, also where
    Triton's backward runs inside of autocast (torch asks for it outside). What comes out, and Triton's gradients of
    float32 inputs, stays float32."""
    torch.manual_seed(8)
    hidden, weight = (torch.randn(n, 16, requires_grad=True) for n in (5, 40))
    tokens = torch.randint(40, (5,))

    def everything(autocast, hidden, weight):
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=autocast):
            out = linear_token_logprobs(hidden, weight, tokens, return_entropy=True)
            with torch.no_grad():
                alone = linear_token_logprobs(hidden, weight, tokens)
        with torch.autocast(
            hidden.device.type, torch.bfloat16, enabled=autocast and backward_too and backend == "triton"
        ):
            return *out, alone, *torch.autograd.grad(sum(y.sum() for y in out), (hidden, weight))

    expected = everything(False, *(x.detach().bfloat16().requires_grad_() for x in (hidden, weight)))
    got = everything(True, hidden, weight)
    assert all(x.dtype == torch.float32 for x in got)
    torch.testing.assert_close(got[:3], expected[:3], rtol=0, atol=0)
    torch.testing.assert_close(got[3:], tuple(x.float() for x in expected[3:]), rtol=1e-2, atol=1e-2)
    in_float32 = everything(False, hidden, weight)
    assert not torch.equal(got[0], in_float32[0])
    wide = everything(True, hidden.detach().double().requires_grad_(), weight)
    assert all(x.dtype == torch.float64 for x in wide[:3])  # autocast leaves float64 alone
    torch.testing.assert_close(wide[0], in_float32[0].double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_without_a_product_into_float32_it_says_so_once(monkeypatch):
    from minirlhf_kernels.fused import linear

    def refuse(*a, **options):
        raise TypeError("addmm() got an unexpected keyword argument 'out_dtype'")

    monkeypatch.setattr(torch, "addmm", refuse)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device, **options: ones(*shape, **options))
    linear._float32_products.cache_clear()
    with pytest.warns(UserWarning, match="multiplies in float32, without tensor cores") as warned:
        assert not linear._float32_products("cuda") and not linear._float32_products("cuda")
    assert len(warned) == 1
    linear._float32_products.cache_clear()


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("tall", [6, 4])
def test_a_slab_of_the_weight_s_gradient_is_one_product_where_all_rows_fit(monkeypatch, tall):
    from minirlhf_kernels.fused import linear

    products, product = [], linear.product

    def watched(a, b, out, add=False):
        products.append((tuple(out.shape), add))
        return product(a, b, out, add)

    monkeypatch.setattr(linear, "product", watched)
    monkeypatch.setattr(linear, "plan", lambda rows, vocabulary: (tall, 20))
    hidden, weight = (torch.randn(n, 3, requires_grad=True) for n in (6, 40))
    out = linear_token_logprobs(hidden, weight, torch.randint(40, (6,)))
    products.clear()
    out.sum().backward()
    of_weight = [add for shape, add in products if shape == (20, 3)]
    assert of_weight == ([False, False] if tall == 6 else [False, True] * 2)
