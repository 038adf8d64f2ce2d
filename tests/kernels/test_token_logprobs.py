"""token_logprobs, and what it shares with linear_token_logprobs, on the rows that break other kernels."""

import gc

import pytest
import torch
from minirlhf_kernels import linear_token_logprobs, reference, token_logprobs

INF, NAN = float("inf"), float("nan")
pytestmark = pytest.mark.usefixtures("backend")
reference_only = pytest.mark.parametrize("backend", ["reference"], indirect=True)
triton_only = pytest.mark.parametrize("backend", ["triton"], indirect=True)
both_ops = pytest.mark.parametrize("linear", [False, True])


def call(x, weight, tokens, linear, **options):
    """Either op on x: hidden states for the linear one, logits for the other."""
    if linear:
        return linear_token_logprobs(x, weight, tokens, **options)
    return token_logprobs(x, tokens, **options)


@pytest.fixture(scope="module")
def check_against_oracle(backend, oracle):
    """Triton's float32 is held to a relative error, also near p = 1: within a tolerance of the truth, or, where
    log_softmax is further off (long rows), near its error. In the interpreter exp2 and log are numpy's exact ones and
    errors stay near 1e-8; a GPU's approximations give some 1e-7, which these tolerances leave room for. The definition,
    which is log_softmax, is held to many digits in float64, and in float32 to what it can give there."""

    def results(way, logits, tokens, temperature):
        x = logits.clone().requires_grad_()
        out = way(x, tokens, temperature=temperature, return_entropy=True)
        assert (out[0] <= 0).all()
        grads = [torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for y in out]
        return [r.detach().double() for r in (*out, *grads)]

    def check(logits, tokens, temperature=1.0):
        truth = oracle(logits, tokens, temperature)
        own = results(reference.token_logprobs, logits, tokens, temperature)
        if backend == "reference":
            wide = results(reference.token_logprobs, logits.double(), tokens, temperature)
            for narrow, got, exact in zip(own, wide, truth, strict=True):
                torch.testing.assert_close(narrow, exact, rtol=1e-5, atol=2e-6)
                torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-14)
            return
        ours = results(token_logprobs, logits, tokens, temperature)
        own_error = max(
            ((o - t) / t).abs()[t.abs() > 0.1].nan_to_num(0.0).amax() if (t.abs() > 0.1).any() else 0.0
            for o, t in zip(own, truth, strict=True)
        )
        rtol = 3e-6 + 3 * min(own_error, 1e-5)
        for got, exact, atol in zip(ours, truth, (1e-37, 1e-37, 1e-12, 3e-6), strict=True):
            torch.testing.assert_close(got, exact, rtol=rtol, atol=atol)
        at_token, exact = (g.gather(-1, tokens.unsqueeze(-1)) for g in (ours[2], truth[2]))
        torch.testing.assert_close(at_token, exact, rtol=1e-5, atol=1e-37)

    return check


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 1023, 1024, 1025, 50257])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_vocabulary_size(check_against_oracle, vocabulary, temperature):
    torch.manual_seed(vocabulary)
    check_against_oracle(3 * torch.randn(4, vocabulary), torch.randint(vocabulary, (4,)), temperature)


@pytest.mark.parametrize("margin", [0.0, 1.0, 10.0, 15.0, 17.0, 20.0, 25.0, 40.0, 60.0, 80.0])
def test_near_one(backend, oracle, check_against_oracle, margin):
    """Whether the token leads or another does. From a margin of 25 nats on log_softmax in float32 gives exactly 0."""
    logits, tokens = torch.zeros(2, 1500), torch.tensor([1200, 8])
    logits[:, 1200] = margin
    check_against_oracle(logits, tokens)
    assert margin < 25.0 or logits.log_softmax(-1)[0, 1200] == 0.0
    if backend == "triton":  # no margin costs it a digit
        outs = token_logprobs(logits, tokens, return_entropy=True)
        for got, exact in zip(outs, oracle(logits, tokens), strict=False):
            torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1e-3, 1e-10, 1e-38])
def test_log_p_alone_is_right_at_every_offset(oracle, within_float32, temperature):
    """In whole blocks, in what is left of a row, in views."""
    torch.manual_seed(10)
    offsets = torch.tensor([0.0, 1e4, -3e6, 1e9, -3e12, 3e38]).repeat_interleave(4).unsqueeze(-1)
    for vocabulary in (1, 5, 37, 130):
        logits, tokens = 4 * torch.randn(24, vocabulary) + offsets, torch.randint(vocabulary, (24,))
        tokens[::3] = logits[::3].argmax(-1)
        for x in (logits, logits.t().contiguous().t()):
            got = token_logprobs(x, tokens, temperature=temperature)
            within_float32(got, oracle(x, tokens, temperature)[0])


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@both_ops
def test_a_temperature_may_be_a_tensor_and_learns_nothing(linear):
    temperature = torch.nn.Parameter(torch.tensor([0.7]))
    x, weight, tokens = torch.randn(6, 7), torch.randn(7, 7), torch.randint(7, (6,))
    got = call(x, weight, tokens, linear, temperature=temperature)
    assert not got.requires_grad
    torch.testing.assert_close(got, call(x, weight, tokens, linear, temperature=0.7))


@pytest.mark.parametrize("case", ["first block", "one", "all but one", "all but the token"])
def test_minus_infinity_is_a_token_that_cannot_be_drawn(check_against_oracle, case):
    torch.manual_seed(1)
    logits, tokens, at = torch.randn(3, 2000), torch.tensor([1500, 1999, 1024]), torch.arange(2000)
    barred = {"first block": at < 1024, "one": at == 3, "all but one": at != 5, "all but the token": at >= 0}[case]
    logits = logits.masked_fill(barred & (at != tokens[:, None]), -INF)
    check_against_oracle(logits, tokens)
    if case == "all but the token":
        logprobs, entropy = token_logprobs(logits, tokens, return_entropy=True)
        assert (logprobs == 0).all() and (entropy == 0).all()


def test_a_token_that_cannot_be_drawn_has_minus_infinity():
    assert token_logprobs(torch.tensor([0.0, -INF]), torch.tensor(1)) == -INF


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_among_lowest_finite_logits_has_no_entropy(dtype):
    """What `masked_fill(finfo.min)` leaves of a row in which one token is allowed."""
    low = torch.finfo(dtype).min
    logits = torch.full((3, 9), low, dtype=dtype)
    logits[0, 3] = logits[1, 3] = 5.0
    x, tokens = logits.requires_grad_(), torch.tensor([3, 4, 4])
    out, entropy = token_logprobs(x, tokens, return_entropy=True)
    third = -torch.tensor(9.0, dtype=dtype).log()  # nothing but lowest ones: each is as likely
    torch.testing.assert_close(out, torch.stack((torch.zeros_like(third), third * 0 + low, third)))
    torch.testing.assert_close(entropy, torch.stack((third * 0, third * 0, -third)))
    assert torch.autograd.grad(entropy.sum(), x)[0].isfinite().all()


@both_ops
@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
def test_rows_that_do_not_count_give_zero_and_no_gradient(linear, garbage):
    torch.manual_seed(2)
    weight = torch.randn(11, 6, requires_grad=True)
    x = torch.randn(2, 4, 6 if linear else 11)
    tokens, mask = torch.randint(11, (2, 4)), torch.ones(2, 4, dtype=torch.bool)
    x[0, 1], x[1, 3] = garbage, garbage
    mask[0, 1] = False
    tokens[0, 1] = 999  # under the mask anything goes
    tokens[1, 3] = -100
    x.requires_grad_()
    logprobs, entropy = call(x, weight, tokens, linear, mask=mask, return_entropy=True)
    assert logprobs[0, 1] == entropy[0, 1] == logprobs[1, 3] == entropy[1, 3] == 0
    (logprobs.sum() + entropy.sum()).backward()
    assert (x.grad[0, 1] == 0).all() and (x.grad[1, 3] == 0).all() and x.grad.isfinite().all()
    assert not linear or weight.grad.isfinite().all()
    counted = mask & (tokens != -100)
    alone = call(x.detach()[counted], weight, tokens[counted], linear)
    torch.testing.assert_close(logprobs[counted], alone)


@both_ops
def test_an_empty_micro_batch_has_a_gradient_of_zero(linear):
    x, weight = torch.full((2, 3, 5), NAN, requires_grad=True), torch.randn(7, 5)
    out = call(x, weight, torch.full((2, 3), -100), linear)
    out.sum().backward()
    assert (out == 0).all() and (x.grad == 0).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU a look at the tokens would stop the host")
@pytest.mark.parametrize("bad", [3, -1, -101, 10**12])
def test_a_token_outside_the_vocabulary_is_refused(bad):
    for linear, x in ((False, torch.zeros(2, 3)), (True, torch.zeros(2, 4))):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            call(x, torch.zeros(3, 4), torch.tensor([0, bad]), linear)


def test_what_is_refused():
    logits, tokens = torch.zeros(2, 3), torch.tensor([0, 2])
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


@triton_only
@both_ops
def test_a_second_derivative_is_refused_and_not_silently_wrong(linear):
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    out = call(x, torch.eye(3, dtype=torch.float64), torch.tensor([0, 1]), linear)
    with pytest.raises(RuntimeError, match="differentiable only once"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


@both_ops
@pytest.mark.parametrize("want_entropy", [False, True])
@pytest.mark.parametrize("written", ["outputs", "tokens"])
def test_writing_over_a_tensor_does_not_reach_the_backward(linear, want_entropy, written):
    """The gradient stays what it was, or torch says that something it needs has been written over."""
    torch.manual_seed(9)
    x, weight = (torch.randn(n, 7, requires_grad=True) for n in (5, 7))
    drawn = torch.randint(7, (5,))

    def gradients(write):
        tokens = drawn.clone()
        outs = call(x, weight, tokens, linear, return_entropy=want_entropy)
        outs = outs if want_entropy else (outs,)
        loss = sum(scale * y.sum() for scale, y in enumerate(outs, 1))
        if write:
            with torch.no_grad():
                for y in outs if written == "outputs" else (tokens,):
                    y.zero_()
        return torch.autograd.grad(loss, (x, weight) if linear else x)

    expected = gradients(write=False)
    try:
        torch.testing.assert_close(gradients(write=True), expected, rtol=0, atol=0)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)


@triton_only
@both_ops
@pytest.mark.parametrize("want_entropy", [False, True])
def test_of_the_logits_size_nothing_but_the_logits_waits_for_the_backward(linear, want_entropy):
    """And not even they where the linear op makes them again."""
    leaf, weight = (torch.randn(n, 3 if linear else 53, requires_grad=True) for n in (11, 53))
    size, tokens, sizes = 11 * 53, torch.randint(53, (11,)), []

    def loss():
        out = call(leaf, weight, tokens, linear, return_entropy=want_entropy)
        return sum(y.sum() for y in out) if want_entropy else out.sum()

    def alive():
        gc.collect()
        return sum(type(o) is torch.Tensor and o.numel() == size and o is not leaf for o in gc.get_objects())

    def pack(x):
        sizes.append(x.numel())
        return x.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss().backward()
    assert sizes.count(size) == (not linear) and (not linear or max(sizes) <= 53 * 3)
    leaf.grad = None
    out = loss()
    assert alive() <= (not linear)
    out.backward()
    leaf.grad = None
    assert alive() == 0  # though `out`, and its graph, live on


@reference_only  # the interpreter takes its time, and test_logprob_properties.py has Triton's gradients in float64
@both_ops
def test_gradcheck(linear):
    torch.manual_seed(6)
    tokens, mask = torch.randint(5, (2, 3)), torch.tensor([[True, False, True], [True, True, False]])
    x = torch.randn(2, 3, 4 if linear else 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    for m in (None, mask):

        def both(x, weight, m=m):
            return call(x, weight, tokens, linear, temperature=0.8, mask=m, return_entropy=True)

        assert torch.autograd.gradcheck(both, (x, weight)) and torch.autograd.gradgradcheck(both, (x, weight))
