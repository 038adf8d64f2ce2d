"""token_logprobs and linear_token_logprobs against a float64 oracle, on the rows that break other kernels."""

import gc
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from minirlhf_kernels import linear_token_logprobs, token_logprobs
from minirlhf_kernels.reference import rows as rows_module

INF, NAN = float("inf"), float("nan")


def oracle(logits, tokens, temperature=1.0):
    """Log-probabilities, entropy and both gradients (for upstream gradients of 1) in float64, with no cancellation."""
    z = logits.double() / temperature
    u = z - z.amax(-1, keepdim=True)
    index = tokens.unsqueeze(-1)
    others = u.exp().scatter(-1, index, 0.0)
    rest, at = others.sum(-1), u.gather(-1, index).squeeze(-1)
    log_rest = others.scatter(-1, index, 0.0).sum(-1).log()
    logprobs = -torch.nn.functional.softplus(log_rest - at, beta=1, threshold=1e9)
    p = u.softmax(-1)
    below = u.exp().scatter(-1, u.argmax(-1, keepdim=True), 0.0)  # without the leader's 1
    u = u.clamp(min=-1e300)
    mean = (below * u).sum(-1) / (1 + below.sum(-1))
    entropy = below.sum(-1).log1p() - mean
    complement = (rest / (rest + at.exp())).unsqueeze(-1)
    grad = (-p).scatter(-1, index, complement) / temperature
    grad_entropy = -p * (u - mean.unsqueeze(-1)) / temperature  # log p + H = u - mean
    return logprobs, entropy, grad, grad_entropy


def naive(logits, tokens, temperature=1.0):
    log_p = (logits / temperature).log_softmax(-1)
    p_log_p = log_p.exp() * log_p.masked_fill(log_p == -INF, 0.0)
    return log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), -p_log_p.sum(-1)


def check_against_oracle(logits, tokens, temperature=1.0):
    """Within a tolerance of the truth, or, where PyTorch's own softmax is further off (long rows), near its error."""
    results = []
    for call in (token_logprobs, naive):
        x = logits.clone().requires_grad_()
        options = {"return_entropy": True} if call is token_logprobs else {}
        logprobs, entropy = call(x, tokens, temperature=temperature, **options)
        grads = [torch.autograd.grad(out.sum(), x, retain_graph=True)[0] for out in (logprobs, entropy)]
        results.append([r.detach().double() for r in (logprobs, entropy, *grads)])
    ours, own = results
    truth = oracle(logits, tokens, temperature)
    assert (ours[0] <= 0).all()
    own_error = max(
        ((o - t) / t).abs()[t.abs() > 0.1].nan_to_num(0.0).amax() if (t.abs() > 0.1).any() else 0.0
        for o, t in zip(own, truth, strict=True)
    )
    rtol = 3e-6 + 3 * min(own_error, 1e-5)
    for got, exact, atol in zip(ours, truth, (1e-37, 3e-6, 1e-12, 3e-6), strict=True):
        torch.testing.assert_close(got, exact, rtol=rtol, atol=atol)
    at_token, exact = (g.gather(-1, tokens.unsqueeze(-1)) for g in (ours[2], truth[2]))
    torch.testing.assert_close(at_token, exact, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 1023, 1024, 1025, 50257])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_vocabulary_size(vocabulary, temperature):
    torch.manual_seed(vocabulary)
    check_against_oracle(3 * torch.randn(4, vocabulary), torch.randint(vocabulary, (4,)), temperature)


@pytest.mark.parametrize("margin", [0.0, 1.0, 10.0, 17.0, 25.0, 40.0, 80.0])
def test_near_one_the_relative_accuracy_holds(margin):
    """At a margin of 25 nats log_softmax in float32 gives exactly 0; the truth is -1023 exp(-25)."""
    logits = torch.zeros(2, 1024)
    logits[:, 7] = margin
    check_against_oracle(logits, torch.tensor([7, 8]))
    if margin == 25.0:
        assert logits.log_softmax(-1)[0, 7] == 0.0
        got = token_logprobs(logits, torch.tensor([7, 8]))[0]
        assert got.item() == pytest.approx(-1023 * math.exp(-25), rel=1e-6)


def test_far_below_the_leader_the_probability_underflows_and_its_logarithm_does_not():
    logits = torch.tensor([[0.0, -60.0, -100.0, -5000.0]])
    for token, expected in enumerate([-8.756510763e-27, -60.0, -100.0, -5000.0]):
        got = token_logprobs(logits, torch.tensor([token]))
        torch.testing.assert_close(got, torch.tensor([expected]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("offset", [1e4, -1e4, 1000.0])
def test_adding_a_constant_to_a_row_changes_nothing(offset):
    torch.manual_seed(0)
    logits = torch.randint(-64, 64, (5, 300)) / 8  # exact in float32 at every offset
    tokens = torch.randint(300, (5,))
    for a, b in zip(
        token_logprobs(logits, tokens, return_entropy=True),
        token_logprobs(logits + offset, tokens, return_entropy=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.fixture(params=[True, False])
def at_once(request, monkeypatch):
    """Small calls too take the pass less; and so as on a CPU that has no fused multiply-add."""
    monkeypatch.setattr(rows_module, "_WORTH_IT", 0)
    if not request.param:
        monkeypatch.setattr(rows_module, "_adds_at_once", lambda: False)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1e-3, 1e-10, 1e-38])
def test_log_p_alone_is_right_at_every_offset(temperature):
    """In vectors, in what is left of a row, in views."""
    torch.manual_seed(10)
    offsets = torch.tensor([0.0, 1e4, -3e6, 1e9, -3e12, 3e38]).repeat_interleave(4).unsqueeze(-1)
    for vocabulary in (1, 5, 37, 130):
        logits, tokens = 4 * torch.randn(24, vocabulary) + offsets, torch.randint(vocabulary, (24,))
        tokens[::3] = logits[::3].argmax(-1)
        exact = oracle(logits, tokens, temperature)[0]
        # What float32 makes of a logarithm so far below 1, or of an exponent so far below 0.
        allowed = 2e-6 + 2.0**-23 * exact.abs().clamp(min=1e-36).log().abs()
        for x in (logits, logits.t().contiguous().t()):
            got = token_logprobs(x, tokens, temperature=temperature).double()
            assert ((got - exact).abs() <= allowed * exact.abs() + 1e-36).logical_or(got == exact.float()).all()


def test_what_is_read_in_a_pass_less(monkeypatch):
    """Log p alone, without a gradient, in a large call; not in a compiler's hands, whose a + c b rounds twice."""
    calls, at_once = [], rows_module._about_token_at_once
    monkeypatch.setattr(rows_module, "_about_token_at_once", lambda *args: calls.append(args) or at_once(*args))
    monkeypatch.setattr(rows_module, "_adds_at_once", lambda: True)
    logits, tokens = torch.randn(600, 600), torch.randint(600, (600,))

    def times(call, *args, **options):
        calls.clear()
        call(*args, **options)
        return len(calls)

    assert times(token_logprobs, logits, tokens) == 1
    with torch.inference_mode():
        assert times(token_logprobs, logits, tokens) == 1
    assert times(linear_token_logprobs, logits.bfloat16(), torch.eye(600).bfloat16(), tokens) == 1
    assert times(token_logprobs, logits[:99], tokens[:99]) == 0
    assert times(token_logprobs, logits, tokens, return_entropy=True) == 0
    assert times(token_logprobs, logits.clone().requires_grad_(), tokens) == 0
    assert times(torch.compile(token_logprobs, backend="aot_eager"), logits, tokens) == 0


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize("call", [token_logprobs, linear_token_logprobs])
def test_a_temperature_may_be_a_tensor_and_learns_nothing(call):
    temperature = torch.nn.Parameter(torch.tensor([0.7]))
    inputs = torch.randn(6, 7), *([torch.randn(7, 7)] if call is linear_token_logprobs else [])
    tokens = torch.randint(7, (6,))
    for _ in range(2):
        got = call(*inputs, tokens, temperature=temperature)
        assert not got.requires_grad
        torch.testing.assert_close(got, call(*inputs, tokens, temperature=0.7))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_of_one_batch_is_refused():
    logits, tokens = torch.randn(6, 37), torch.randint(37, (6,))
    with pytest.raises(RuntimeError, match=r"use torch\.compile"):
        torch.jit.trace(token_logprobs, (logits, tokens))


@pytest.mark.parametrize("case", ["first block", "one", "all but the token", "all but one"])
def test_minus_infinity_is_a_token_that_cannot_be_drawn(case):
    torch.manual_seed(1)
    logits, tokens = torch.randn(3, 2000), torch.tensor([1500, 1999, 1024])
    if case == "first block":
        logits[:, :1024] = -INF
    elif case == "one":
        logits[:, 3] = -INF
    else:
        kept = logits.gather(1, tokens[:, None])
        logits = torch.full_like(logits, -INF).scatter_(1, tokens[:, None], kept)
        if case == "all but one":
            logits[:, 5] = 0.25
    check_against_oracle(logits, tokens)
    if case == "all but the token":
        logprobs, entropy = token_logprobs(logits, tokens, return_entropy=True)
        assert (logprobs == 0).all() and (entropy == 0).all()


def test_a_token_that_cannot_be_drawn_has_minus_infinity():
    assert token_logprobs(torch.tensor([0.0, -INF]), torch.tensor(1)) == -INF


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
def test_rows_that_do_not_count_give_zero_and_no_gradient(linear, garbage):
    torch.manual_seed(2)
    weight = torch.randn(11, 6)
    x = torch.randn(2, 4, 6 if linear else 11)
    tokens, mask = torch.randint(11, (2, 4)), torch.ones(2, 4, dtype=torch.bool)
    x[0, 1], x[1, 3] = garbage, garbage
    mask[0, 1] = False
    tokens[0, 1] = 999  # under the mask anything goes
    tokens[1, 3] = -100
    x.requires_grad_()
    inputs = (x, weight.requires_grad_()) if linear else (x,)
    call = linear_token_logprobs if linear else token_logprobs
    logprobs, entropy = call(*inputs, tokens, mask=mask, return_entropy=True)
    assert logprobs[0, 1] == entropy[0, 1] == logprobs[1, 3] == entropy[1, 3] == 0
    (logprobs.sum() + entropy.sum()).backward()
    assert (x.grad[0, 1] == 0).all() and (x.grad[1, 3] == 0).all()
    assert all(i.grad.isfinite().all() for i in inputs)
    counted = mask & (tokens != -100)
    alone = call(*(i.detach() if i is not x else x.detach()[counted] for i in inputs), tokens[counted])
    torch.testing.assert_close(logprobs[counted].detach(), alone)


@pytest.mark.parametrize("linear", [False, True])
def test_an_empty_micro_batch_has_a_gradient_of_zero(linear):
    x, weight = torch.full((2, 3, 5), NAN, requires_grad=True), torch.randn(7, 5)
    tokens = torch.full((2, 3), -100)
    out = linear_token_logprobs(x, weight, tokens) if linear else token_logprobs(x, tokens)
    out.sum().backward()
    assert (out == 0).all() and (x.grad == 0).all()


def test_what_is_refused():
    logits, tokens = torch.zeros(2, 3), torch.tensor([0, 2])
    for bad in (3, -1, -101, 10**12):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            token_logprobs(logits, torch.tensor([0, bad]))
        with pytest.raises(ValueError, match="outside the vocabulary"):
            linear_token_logprobs(torch.zeros(2, 4), torch.zeros(3, 4), torch.tensor([0, bad]))
    with pytest.raises(ValueError, match="shape"):
        token_logprobs(logits, tokens[:1])
    with pytest.raises(TypeError, match="int64"):
        token_logprobs(logits, tokens.int())
    with pytest.raises(ValueError, match="mask must be bool"):
        token_logprobs(logits, tokens, mask=torch.ones(2))
    for temperature in (0.0, -1.0, 1e-39, INF, NAN):
        with pytest.raises(ValueError, match="temperature"):
            token_logprobs(logits, tokens, temperature=temperature)
    with pytest.raises(ValueError, match="weight must be"):
        linear_token_logprobs(torch.zeros(2, 4), torch.zeros(3, 5), tokens)
    with pytest.raises(ValueError, match="chunk_size"):
        linear_token_logprobs(torch.zeros(2, 4), torch.zeros(3, 4), tokens, chunk_size=0)


def test_a_second_derivative_is_refused_and_not_silently_wrong():
    logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.eye(3, dtype=torch.float64)
    for out in (
        token_logprobs(logits, torch.tensor([0, 1])),
        linear_token_logprobs(logits, weight, torch.tensor([0, 1])),
    ):
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(out.sum(), logits, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_half_precision_is_computed_in_float32(dtype):
    torch.manual_seed(3)
    logits, tokens = (4 * torch.randn(6, 500)).to(dtype).requires_grad_(), torch.randint(500, (6,))
    logprobs = token_logprobs(logits, tokens)
    assert logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(logprobs.double(), oracle(logits.detach(), tokens)[0], rtol=3e-6, atol=1e-12)
    logprobs.sum().backward()
    assert logits.grad.dtype == dtype
    expected = oracle(logits.detach(), tokens)[2]
    torch.testing.assert_close(logits.grad.double(), expected, rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    vocabulary=st.integers(1, 70),
    hidden=st.integers(1, 9),
    temperature=st.sampled_from([1.0, 0.5, 3.0]),
    chunk=st.integers(1, 9),
    seed=st.integers(0, 1000),
    masked=st.booleans(),
)
def test_any_shape_and_the_linear_op_equals_the_plain_one(rows, vocabulary, hidden, temperature, chunk, seed, masked):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*rows, hidden, dtype=torch.float64, generator=g, requires_grad=True)
    weight = torch.randn(vocabulary, hidden, dtype=torch.float64, generator=g, requires_grad=True)
    tokens = torch.randint(vocabulary, rows, generator=g)
    mask = torch.rand(rows, generator=g) < 0.6 if masked else None
    up = torch.randn(2, *rows, dtype=torch.float64, generator=g)  # non-uniform upstream gradients
    common = {"temperature": temperature, "mask": mask, "return_entropy": True}
    results = []
    z = x @ weight.t()
    log_p = (z / temperature).log_softmax(-1)
    zero = torch.zeros((), dtype=torch.float64)
    counted = torch.ones(rows, dtype=torch.bool) if mask is None else mask
    naive = log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)
    naive = tuple(torch.where(counted, n, zero) for n in naive)
    linear = linear_token_logprobs(x, weight, tokens, chunk_size=chunk, **common)
    for logprobs, entropy in (naive, token_logprobs(z, tokens, **common), linear):
        loss = (up[0] * logprobs).sum() + (up[1] * entropy).sum()
        results.append((logprobs, entropy, *torch.autograd.grad(loss, (x, weight), retain_graph=True)))
    for result in results[1:]:
        for a, b in zip(results[0], result, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.lists(
        st.tuples(st.sampled_from([0.1, 3.0, 12.0, 60.0]), st.sampled_from([0.0, -100.0, 3000.0])), min_size=1
    ),
    vocabulary=st.integers(2, 40),
    barred=st.booleans(),
    temperature=st.sampled_from([1.0, 0.6]),
    want_entropy=st.booleans(),
    inplace=st.booleans(),
    masked=st.booleans(),
    parts=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_rows_of_every_kind_side_by_side(
    kinds, vocabulary, barred, temperature, want_entropy, inplace, masked, parts, seed
):
    """Flat, peaked and shifted rows in one call, some tokens likely and some hopeless, some logits -inf: each has its
    own way through the reference, and all end within float32's reach of float64."""
    g = torch.Generator().manual_seed(seed)
    rows = len(kinds)
    scale, offset = (torch.tensor(column)[:, None] for column in zip(*kinds, strict=True))
    logits = scale * torch.randn(rows, vocabulary, generator=g) + offset
    if barred:
        logits[torch.rand(logits.shape, generator=g) < 0.3] = -INF
    tokens = torch.where(
        torch.rand(rows, generator=g) < 0.5, logits.argmax(-1), torch.randint(vocabulary, (rows,), generator=g)
    )
    counted = torch.rand(rows, generator=g) < 0.7 if masked else torch.ones(rows, dtype=torch.bool)
    counted &= logits.gather(-1, tokens[:, None]).squeeze(-1) > -INF
    up = torch.rand(2, rows, generator=g) + 0.5
    leaf = logits.clone().requires_grad_()
    x = leaf * 1.0
    options = {"temperature": temperature, "mask": counted, "inplace_backward": inplace}
    with pytest.MonkeyPatch.context() as patch:
        if parts:  # several parts even of so few rows
            patch.setattr(rows_module, "_PART", {1: 1, 2: 1})
            patch.setattr(rows_module, "_WORTH_IT", 0)
        with torch.no_grad():
            alone = token_logprobs(logits, tokens, **options)
        got = token_logprobs(x, tokens, return_entropy=want_entropy, **options)
        got = got if want_entropy else (got,)
        (grad,) = torch.autograd.grad(sum((u * y).sum() for u, y in zip(up, got, strict=False)), leaf)
    logprobs, entropy, grad_logprobs, grad_entropy = oracle(logits, tokens, temperature)
    zero = torch.zeros((), dtype=torch.float64)
    for y, exact in zip((alone, *got), (logprobs, logprobs, entropy), strict=False):
        exact = torch.where(counted, exact, zero)
        # float32 holds an exponent of 70 to some 4e-6, so exp(-70) has that relative error whoever computes it.
        allowed = 2e-6 + 2.0**-23 * exact.abs().clamp(min=1e-36).log().abs()
        assert ((y.detach().double() - exact).abs() <= allowed * exact.abs() + 1e-36).all(), (y, exact)
    exact = up[0, :, None] * grad_logprobs + (up[1, :, None] * grad_entropy if want_entropy else 0.0)
    torch.testing.assert_close(grad.double(), torch.where(counted[:, None], exact, zero), rtol=1e-5, atol=1e-6)


def test_the_room_that_is_kept_is_nobody_else_s():
    """Calls under inference_mode, compiled ones and other threads' leave this thread's later calls as they were."""
    torch.manual_seed(8)
    logits, tokens = torch.randn(40, 301), torch.randint(301, (40,))
    expected = token_logprobs(logits, tokens, return_entropy=True)
    compiled = torch.compile(lambda z: token_logprobs(z, tokens, return_entropy=True), backend="aot_eager")
    with torch.inference_mode():
        results = [compiled(logits), token_logprobs(logits, tokens, return_entropy=True)]
    with ThreadPoolExecutor(4) as threads:
        results += threads.map(lambda _: token_logprobs(logits.clone(), tokens, return_entropy=True), range(16))
    first, second = (logits.clone().requires_grad_() for _ in range(2))
    outs = [token_logprobs(x, tokens, return_entropy=True) for x in (first, second * 2)]  # both, then both backwards
    sum(y.sum() for out in outs for y in out).backward()
    (alone,) = torch.autograd.grad(sum(token_logprobs(first, tokens, return_entropy=True)).sum(), first)
    torch.testing.assert_close(first.grad, alone, rtol=0, atol=0)
    for result in results:
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("want_entropy", [False, True])
def test_writing_into_the_outputs_does_not_reach_the_backward(linear, want_entropy):
    """The gradient stays what it was, or torch says that something it needs has been written over."""
    torch.manual_seed(9)
    x, tokens = torch.randn(5, 7, requires_grad=True), torch.randint(7, (5,))
    inputs = (x, torch.randn(7, 7, requires_grad=True)) if linear else (x,)
    call = linear_token_logprobs if linear else token_logprobs

    def gradients(write):
        outs = call(*inputs, tokens, return_entropy=want_entropy)
        outs = outs if want_entropy else (outs,)
        loss = sum(scale * y.sum() for scale, y in enumerate(outs, 1))
        if write:
            with torch.no_grad():
                for y in outs:
                    y.zero_()
        return torch.autograd.grad(loss, inputs)

    expected = gradients(write=False)
    try:
        torch.testing.assert_close(gradients(write=True), expected, rtol=0, atol=0)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)


@pytest.mark.parametrize("want_entropy", [False, True])
def test_one_tensor_of_the_logits_size_waits_for_the_backward_and_none_after_it(want_entropy):
    leaf, tokens, sizes = torch.randn(37, 53, requires_grad=True), torch.randint(53, (37,)), []
    rooms = rows_module.scratch.kept, rows_module.scratch.last
    for kept in rooms:
        kept.clear()

    def alive():
        gc.collect()
        return sum(type(o) is torch.Tensor and o.numel() == leaf.numel() and o is not leaf for o in gc.get_objects())

    def pack(x):
        sizes.append(x.numel())
        return x.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = token_logprobs(leaf, tokens, return_entropy=want_entropy)
    assert sizes.count(leaf.numel()) == 1
    (sum(y.sum() for y in out) if want_entropy else out.sum()).backward()
    del out
    leaf.grad = None
    room = alive()  # what the reference works in, kept for all calls
    assert room == sum(len(kept) for kept in rooms) <= 4 * want_entropy
    out = token_logprobs(leaf, tokens, return_entropy=want_entropy)
    out = sum(y.sum() for y in out) if want_entropy else out.sum()
    assert alive() <= room + 1
    out.backward()
    leaf.grad = None
    assert alive() == room  # though `out`, and its graph, live on


def test_sliced_and_transposed_views():
    torch.manual_seed(4)
    logits, tokens = torch.randn(3, 6, 20), torch.randint(20, (3, 6))
    expected = logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(token_logprobs(logits[:, :-1], tokens[:, 1:]), expected)
    swapped = logits.transpose(1, 2).contiguous().transpose(1, 2)  # last stride is not 1
    torch.testing.assert_close(token_logprobs(swapped[:, :-1], tokens[:, 1:]), expected)


def test_each_output_alone_has_its_own_gradient():
    torch.manual_seed(5)
    logits, tokens = torch.randn(4, 9, dtype=torch.float64, requires_grad=True), torch.randint(9, (4,))
    logprobs, entropy = token_logprobs(logits, tokens, return_entropy=True)
    log_p = logits.log_softmax(-1)
    for ours, naive in ((logprobs, log_p[torch.arange(4), tokens]), (entropy, -(log_p.exp() * log_p).sum(-1))):
        a, b = (torch.autograd.grad(x.square().sum(), logits, retain_graph=True)[0] for x in (ours, naive))
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("linear", [False, True])
def test_gradcheck(linear):
    torch.manual_seed(6)
    tokens, mask = torch.randint(5, (2, 3)), torch.tensor([[True, False, True], [True, True, False]])
    x = torch.randn(2, 3, 4 if linear else 5, dtype=torch.float64, requires_grad=True)
    inputs = (x, torch.randn(5, 4, dtype=torch.float64, requires_grad=True)) if linear else (x,)
    extra = {"chunk_size": 2} if linear else {}
    call = linear_token_logprobs if linear else token_logprobs
    for m in (None, mask):
        assert torch.autograd.gradcheck(
            lambda *a, m=m: call(*a, tokens, temperature=0.8, mask=m, return_entropy=True, **extra), inputs
        )


def test_a_default_device_does_not_reach_the_room_that_is_kept():
    logits, tokens = torch.randn(41, 23), torch.randint(23, (41,))
    for rooms in (rows_module.scratch.kept, rows_module.scratch.last):
        rooms.clear()
    with torch.device("meta"):
        inside = token_logprobs(logits, tokens, return_entropy=True)
    torch.testing.assert_close(inside, token_logprobs(logits, tokens, return_entropy=True), rtol=0, atol=0)
