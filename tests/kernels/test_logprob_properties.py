"""token_logprobs and linear_token_logprobs at shapes, strides, types and settings drawn by hypothesis, each against
float64: 200 cases of each op on each path."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from minirlhf_kernels import linear_token_logprobs, token_logprobs

INF, NAN = float("inf"), float("nan")
CASES = settings.get_profile("kernels")
pytestmark = pytest.mark.usefixtures("backend", "small_blocks")
dtypes = st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
VIEWS = {  # of logits [N, T + 1, V] and of tokens [N, T + 1]
    "plain": lambda x, n: x[:, :n].contiguous(),
    "sliced rows": lambda x, n: x.contiguous()[:, :n],
    "sliced columns": lambda x, n: x[:, :n],
    "transposed": lambda x, n: x[:, :n].transpose(0, -1).contiguous().transpose(0, -1),
    "four dimensions": lambda x, n: x[:, None, :n],
    "one row": lambda x, n: x[0, 0],
}
OUTPUTS = {"logprobs": (1.0, 0.0), "entropy": (0.0, 1.0), "both": (1.0, 1.0)}
TOLERANCES = {
    torch.float64: (1e-9, 1e-12), torch.float32: (1e-5, 3e-6), torch.bfloat16: (1e-2, 1e-4), torch.float16: (2e-3, 1e-4)
}  # fmt: skip


@CASES
@given(
    outer=st.integers(1, 2),
    inner=st.integers(1, 3),
    vocabulary=st.integers(1, 50),
    view=st.sampled_from(sorted(VIEWS)),
    dtype=dtypes,
    temperature=st.sampled_from([1.0, 0.6, 2.5]),
    masked=st.booleans(),
    of=st.sampled_from(sorted(OUTPUTS)),
    hole=st.sampled_from(["none", "some", "first block", "all but two"]),
    seed=st.integers(0, 10_000),
)
def test_token_logprobs(
    oracle, within_float32, rounding, outer, inner, vocabulary, view, dtype, temperature, masked, of, hole, seed
):
    """Flat, peaked and shifted rows in one call, some tokens likely and some hopeless, some logits -inf."""
    torch.manual_seed(seed)
    kinds = torch.tensor([[0.1, 3.0, 12.0, 60.0], [0.0, 0.0, -100.0, 3000.0]])
    scale, offset = (some[torch.randint(4, (outer, inner + 1, 1))] for some in kinds)
    big = (scale * torch.randn(outer, inner + 1, vocabulary + 3) + offset).to(dtype)
    likely = big[..., :vocabulary].argmax(-1)
    tokens = torch.where(torch.rand(likely.shape) < 0.5, likely, torch.randint(vocabulary, likely.shape))
    if hole != "none":
        out = torch.rand(big.shape) < {"some": 0.3, "first block": 0.0, "all but two": 1.0}[hole]
        if hole == "first block":
            out[..., :16] = True
        out.scatter_(2, tokens[..., None], False)
        out[..., vocabulary - 1] = False
        big[out] = -INF
    logits, tokens = (VIEWS[view](y, inner) for y in (big[..., :vocabulary], tokens))
    mask = torch.rand(tokens.shape) < 0.6 if masked else torch.ones_like(tokens).bool()
    logits = torch.where(mask[..., None], logits, NAN) if masked and view == "plain" else logits
    options = {"temperature": temperature, "mask": mask if masked else None}
    x = logits.detach().requires_grad_()
    alone = token_logprobs(logits, tokens, **options)
    outs = token_logprobs(x, tokens, return_entropy=of != "logprobs", **options)
    outs = (outs,) if of == "logprobs" else outs
    ups = [u * (torch.rand(tokens.shape) + 0.5) for u in OUTPUTS[of]]
    (grad,) = torch.autograd.grad(sum((u * o).sum() for u, o in zip(ups, outs, strict=False) if u.any()), x)
    truth = oracle(logits, tokens, temperature)
    for got, exact in zip((alone, *outs), (truth[0], *truth), strict=False):
        exact = torch.where(mask, exact, 0.0)
        if dtype == torch.float64:
            rtol, atol = rounding(torch.float64, 1e-9)
            torch.testing.assert_close(got, exact, rtol=rtol, atol=atol)
        else:  # a temperature rounds each difference once, and exp(difference) is as sensitive as that is large
            assert got.dtype == torch.float32
            within_float32(got, exact, 1e-6 if temperature == 1.0 else 4e-6)
    assert (alone <= 0).all() and (outs[0] <= 0).all() and grad.dtype == dtype
    exact = sum(u.double()[..., None] * t for u, t in zip(ups, truth[2:], strict=True))
    exact = torch.where(mask[..., None], exact, 0.0)
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(grad.double(), exact, rtol=rtol, atol=atol)


@CASES
@given(
    rows=st.integers(1, 5),
    hidden=st.integers(1, 5),
    vocabulary=st.integers(1, 45),
    dtype=dtypes,
    temperature=st.sampled_from([1.0, 0.6]),
    masked=st.booleans(),
    barred=st.booleans(),
    of=st.sampled_from(sorted(OUTPUTS)),
    seed=st.integers(0, 10_000),
)
def test_linear_token_logprobs(
    oracle, rounding, rows, hidden, vocabulary, dtype, temperature, masked, barred, of, seed
):
    """The same rows, of a head that may bar words by -inf."""
    torch.manual_seed(seed)
    scale = torch.tensor([0.1, 1.0, 5.0, 25.0])[torch.randint(4, (rows, 1))]
    x, weight = (scale * torch.randn(rows, hidden)).to(dtype), torch.randn(vocabulary, hidden).to(dtype)
    bars = torch.where((torch.rand(vocabulary) < 0.3) & barred, -INF, 0.0)
    logits = x.double() @ weight.double().t() + bars  # a last column of hidden, all ones, meets the bars
    x, weight = (torch.cat((y, z.to(dtype)[:, None]), 1) for y, z in ((x, torch.ones(rows)), (weight, bars)))
    tokens = torch.where(torch.rand(rows) < 0.5, logits.argmax(-1), torch.randint(vocabulary, (rows,)))
    counts = torch.rand(rows) < 0.6 if masked else torch.ones(rows, dtype=torch.bool)
    counts &= logits.gather(-1, tokens[:, None]).squeeze(-1) > -INF
    x = torch.where(counts[:, None], x, NAN if masked else 1.0)
    ups = [u * (torch.rand(rows) + 0.5) for u in OUTPUTS[of]]
    leaves = x.requires_grad_(), weight.requires_grad_()
    options = {"temperature": temperature, "return_entropy": of != "logprobs"}
    options["mask"] = None if counts.all() else counts
    with torch.no_grad():
        alone = linear_token_logprobs(*leaves, tokens, **options)
    outs = linear_token_logprobs(*leaves, tokens, **options)
    alone, outs = ((y,) if of == "logprobs" else y for y in (alone, outs))
    grads = torch.autograd.grad(sum((u * o).sum() for u, o in zip(ups, outs, strict=False) if u.any()), leaves)

    *truth, of_logprobs, of_entropy = oracle(logits, tokens, temperature)
    of_logits = ups[0].double()[:, None] * of_logprobs + ups[1].double()[:, None] * of_entropy
    of_logits = torch.where(counts[:, None], of_logits, 0.0)
    # float32 rounds a logit, and so the exponent: the relative error of what is small because another is large.
    wide, head = torch.where(counts[:, None], x, 0.0).detach().double(), weight.detach().double()
    eps = torch.finfo(alone[0].dtype).eps
    allowed, absolute = 25 * eps, rounding(alone[0].dtype, 0.0)[1]
    allowed = allowed + 4 * eps * (wide.abs() @ head.abs().nan_to_num(posinf=0.0).t()).amax(-1) / temperature
    for y, exact in zip((*alone, *outs), (*truth[: len(outs)],) * 2, strict=True):
        exact = torch.where(counts, exact, 0.0)
        assert ((y.detach().double() - exact).abs() <= allowed * exact.abs() + absolute).all(), (y, exact)
    # Half precision rounds the gradient of each logit on its way to the two products, and what comes out of them.
    # The interpreter does not round: it cuts the digits off.
    rounding = 1.01 * torch.finfo(dtype).eps / (2 if x.is_cuda else 1) if dtype.itemsize == 2 else 0.0
    reach = 4 * allowed[:, None] * (of_logits.abs() + ups[0].abs().max() + ups[1].abs().max())
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    reach = reach + rounding * of_logits.abs() + least
    head = head.masked_fill(head == -INF, 0.0)  # of the last column no gradient can be asked
    for got, a, b, c in (
        (grads[0][:, :-1], of_logits, head[:, :-1], reach),
        (grads[1], of_logits.t(), wide, reach.t()),
    ):
        exact = a @ b
        assert ((got.double() - exact).abs() <= c @ b.abs() + rounding * exact.abs() + least).all(), (got, exact)
