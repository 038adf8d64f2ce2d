"""What linear_token_logprobs does besides what test_token_logprobs.py holds both ops to."""

import gc
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from minirlhf_kernels import linear_token_logprobs, token_logprobs
from minirlhf_kernels.reference import rows as rows_module
from test_token_logprobs import INF, oracle


@settings(max_examples=40, deadline=None)
@given(
    scales=st.lists(st.sampled_from([0.1, 3.0, 12.0, 60.0]), min_size=1, max_size=9),
    vocabulary=st.integers(2, 40),
    barred=st.booleans(),
    temperature=st.sampled_from([1.0, 0.6]),
    want_entropy=st.booleans(),
    chunk=st.sampled_from([1, 3, 64]),
    seed=st.integers(0, 1000),
)
def test_heads_rows_of_every_kind_side_by_side(scales, vocabulary, barred, temperature, want_entropy, chunk, seed):
    """Flat and peaked rows, likely and hopeless tokens, logits of -inf; in one chunk and in several, with a gradient
    and without: each has its own way through the reference, and all end within float32's reach of float64."""
    g = torch.Generator().manual_seed(seed)
    rows = len(scales)
    logits = torch.tensor(scales)[:, None] * torch.randn(rows, vocabulary, generator=g)
    # A head of ones on its diagonal makes hidden the logits, and one more column bars tokens.
    bars = torch.where((torch.rand(vocabulary, generator=g) < 0.3) & torch.tensor(barred), -INF, 0.0)
    weight = torch.cat((torch.eye(vocabulary), bars[:, None]), 1).requires_grad_()
    barred_logits = logits + bars
    tokens = torch.where(
        torch.rand(rows, generator=g) < 0.5, barred_logits.argmax(-1), torch.randint(vocabulary, (rows,), generator=g)
    )
    counted = barred_logits.gather(-1, tokens[:, None]).squeeze(-1) > -INF
    up = torch.rand(2, rows, generator=g) + 0.5
    hidden = torch.cat((logits, torch.ones(rows, 1)), 1).requires_grad_()
    options = {"temperature": temperature, "mask": counted, "chunk_size": chunk, "return_entropy": want_entropy}
    with torch.no_grad():
        alone = linear_token_logprobs(hidden, weight, tokens, **options)
    got = linear_token_logprobs(hidden, weight, tokens, **options)
    alone, got = (y if want_entropy else (y,) for y in (alone, got))
    grad_hidden, grad_weight = torch.autograd.grad(
        sum((u * y).sum() for u, y in zip(up, got, strict=False)), (hidden, weight)
    )
    truth = oracle(barred_logits, tokens, temperature)
    zero = torch.zeros((), dtype=torch.float64)
    # float32 rounds a logit, and so the exponent: the relative error of what is small because another is large.
    allowed = 3e-6 + 2.0**-21 * logits.abs().amax(-1).double() / temperature
    for outs in (alone, got):
        for y, exact in zip(outs, truth, strict=False):
            exact = torch.where(counted, exact, zero)
            assert ((y.detach().double() - exact).abs() <= allowed * exact.abs() + 1e-36).all(), (y, exact)
    exact = up[0, :, None] * truth[2] + (up[1, :, None] * truth[3] if want_entropy else 0.0)
    exact = torch.where(counted[:, None], exact, zero)
    reach = (4 * allowed[:, None] * (exact.abs() + 1.0)).expand_as(exact)
    assert ((grad_hidden[:, :-1].double() - exact).abs() <= reach).all()
    wide = hidden.detach().double()
    assert ((grad_weight.double() - exact.t() @ wide).abs() <= reach.t() @ wide.abs()).all()


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_half_precision_without_a_gradient(dtype, chunk, monkeypatch):
    """Flat and peaked rows, likely and hopeless tokens, all beside an offset. In eighths float32 holds each logit."""
    monkeypatch.setattr(rows_module, "_WORTH_IT", 0)  # one pass less even in a small call
    g = torch.Generator().manual_seed(11)
    scales = torch.tensor([0.5, 2.0, 8.0, 30.0]).repeat(4)
    hidden = (8 * scales[:, None] * torch.rand(16, 7, generator=g)).round() / 8
    weight = (8 * torch.randn(45, 7, generator=g)).round() / 8
    hidden[:, 6], weight[:, 6] = 100.0, 60.0
    hidden, weight, tokens = hidden.to(dtype), weight.to(dtype), torch.randint(45, (16,), generator=g)
    logits = hidden.double() @ weight.double().t()
    assert (logits == logits.float()).all() and logits.abs().min() > 5000
    tokens[:8] = logits[:8].argmax(-1)
    got = linear_token_logprobs(hidden, weight, tokens, temperature=0.7, chunk_size=chunk)
    exact = oracle(logits, tokens, 0.7)[0]
    allowed = 2e-6 + 2.0**-23 * exact.abs().clamp(min=1e-36).log().abs()
    assert ((got.double() - exact).abs() <= allowed * exact.abs() + 1e-36).all()


def test_words_barred_by_the_lowest_number_beside_a_lone_leader():
    """0 * (finfo.min / temperature) of many words together must not become 0 * -inf."""
    logits = torch.full((1, 1100), torch.finfo(torch.float32).min)
    logits[0, 1030:1040] = torch.linspace(-1, 1, 10)
    logits[0, 1035] = 12.0
    tokens = torch.tensor([1036])
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = logits.t().clone()
    logprobs, entropy, *_ = oracle(logits, tokens)
    for outs in both(hidden, weight, tokens, return_entropy=True):
        for y, exact in zip(outs, (logprobs, entropy), strict=True):
            torch.testing.assert_close(y.double(), exact, rtol=3e-6, atol=0)


def test_leaders_far_apart_in_the_vocabulary_tie():
    logits = torch.zeros(2, 600)
    logits[:, [3, 300, 599]] = 30.0
    tokens = torch.tensor([10, 300])
    expected = oracle(logits, tokens)
    assert expected[0].tolist() == pytest.approx([-30 - math.log(3), -math.log(3)])
    for outs in both(torch.eye(2), logits.t().clone(), tokens, return_entropy=True):
        for y, exact in zip(outs, expected, strict=False):
            torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("want_entropy", [False, True])
@pytest.mark.parametrize("chunk", [64, 128])
def test_the_gradient_of_hopeless_tokens(chunk, want_entropy):
    """Forward and backward must see the same logits, to the last digit, where 2^w of another word is enormous: a
    library's product of a few rows differs there from its product of many."""
    g = torch.Generator().manual_seed(10)
    hidden, weight = torch.randn(128, 64, generator=g), torch.randn(2000, 64, generator=g)
    tokens = torch.randint(2000, (128,), generator=g)
    hidden[::64] = 6 * weight[7]  # a leader some hundreds of nats above all others
    hidden, weight = (x.requires_grad_() for x in (hidden, weight))
    logprobs = linear_token_logprobs(hidden, weight, tokens, chunk_size=chunk, return_entropy=want_entropy)
    logprobs = logprobs[0] if want_entropy else logprobs
    assert (logprobs[::64] < -200).all()
    grads = torch.autograd.grad(logprobs[::64].sum(), (hidden, weight))
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    loss = (wide[0] @ wide[1].t()).log_softmax(-1).gather(-1, tokens[:, None])[::64].sum()
    for got, exact in zip(grads, torch.autograd.grad(loss, wide), strict=True):
        assert (got.double() - exact).norm() <= 3e-7 * exact.norm()


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("want_entropy", [False, True])
def test_tokens_written_over_before_the_backward_are_an_error(linear, want_entropy):
    hidden, weight = torch.randn(5, 3, requires_grad=True), torch.randn(7, 3)
    tokens = torch.tensor([0, 1, 2, 3, 4])
    out = list(both(hidden, weight, tokens, return_entropy=want_entropy))[not linear]
    tokens.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (sum(y.sum() for y in out) if want_entropy else out.sum()).backward()


@pytest.mark.parametrize("want_entropy", [False, True])
@pytest.mark.parametrize("chunk", [8, 64])
def test_one_chunk_of_logits_waits_for_the_backward_several_do_not(chunk, want_entropy):
    hidden, weight = torch.randn(37, 3, requires_grad=True), torch.randn(53, 3, requires_grad=True)
    tokens, sizes, options = torch.randint(53, (37,)), [], {"chunk_size": chunk, "return_entropy": want_entropy}

    def pack(x):
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        linear_token_logprobs(hidden, weight, tokens, **options)
    assert sizes.count(37 * 53) == (chunk == 64)
    assert max(sizes) == (37 * 53 if chunk == 64 else 53 * 3)
    for rooms in (rows_module.scratch.kept, rows_module.scratch.last):
        rooms.clear()
    out = linear_token_logprobs(hidden, weight, tokens, **options)
    (sum(y.sum() for y in out) if want_entropy else out.sum()).backward()
    gc.collect()
    rooms = {id(room) for room in rows_module.scratch.last.values()}
    # `out` and its graph live on, and hold nothing of that size.
    assert not [x for x in gc.get_objects() if type(x) is torch.Tensor and x.shape == (37, 53) and id(x) not in rooms]


def test_no_rows():
    hidden, weight = torch.zeros(0, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    logprobs, entropy = linear_token_logprobs(hidden, weight, torch.zeros(0, dtype=torch.int64), return_entropy=True)
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert (weight.grad == 0).all()


def test_the_linear_op_never_holds_all_logits(largest_made):
    x, weight = torch.randn(64, 4, requires_grad=True), torch.randn(100, 4, requires_grad=True)
    with largest_made as made:
        outs = linear_token_logprobs(x, weight, torch.randint(100, (64,)), chunk_size=8, return_entropy=True)
        outs[0].sum().backward()
    assert made.largest == 8 * 100


@pytest.mark.parametrize("chunk", [1, 64])
def test_autocast_leaves_the_linear_op_in_float32(chunk):
    g = torch.Generator().manual_seed(8)
    hidden, weight = (torch.randn(n, 16, generator=g, requires_grad=True) for n in (5, 40))
    tokens = torch.randint(40, (5,), generator=g)

    def everything():
        out = linear_token_logprobs(hidden, weight, tokens, chunk_size=chunk, return_entropy=True)
        with torch.no_grad():
            alone = linear_token_logprobs(hidden, weight, tokens, chunk_size=chunk)
        return *out, alone, *torch.autograd.grad(sum(y.sum() for y in out), (hidden, weight))

    expected = everything()
    with torch.autocast("cpu", torch.bfloat16):
        got = everything()
    for y, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(y, exact, rtol=0, atol=0)
