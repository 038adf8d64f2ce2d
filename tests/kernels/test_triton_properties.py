"""Shapes, strides, types and settings drawn by hypothesis: each kernel against float64, at least 200 cases each."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from minirlhf_kernels import (
    gae_with_moments,
    linear_ppo_loss,
    linear_token_logprobs,
    ppo_loss,
    reference,
    token_logprobs,
)
from test_gae import loop
from test_token_logprobs import oracle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN = float("inf"), float("nan")
CASES = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
pytestmark = [
    pytest.mark.usefixtures("small_blocks"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
dtypes = st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])


@CASES
@given(
    outer=st.integers(1, 2),
    inner=st.integers(1, 3),
    vocabulary=st.integers(1, 50),
    view=st.sampled_from(["plain", "sliced rows", "sliced columns", "transposed", "four dimensions"]),
    dtype=dtypes,
    temperature=st.sampled_from([1.0, 0.7, 2.5]),
    masked=st.booleans(),
    entropy=st.booleans(),
    hole=st.sampled_from(["none", "some", "first block", "all but two"]),
    seed=st.integers(0, 10_000),
)
def test_token_logprobs(outer, inner, vocabulary, view, dtype, temperature, masked, entropy, hole, seed):
    g = torch.Generator().manual_seed(seed)
    big = 4 * torch.randn(outer, inner + 1, vocabulary + 3, generator=g).to(dtype)
    tokens = torch.randint(vocabulary, (outer, inner), generator=g)
    if hole != "none":
        out = torch.rand(big.shape, generator=g) < {"some": 0.3, "first block": 0.0, "all but two": 1.0}[hole]
        if hole == "first block":
            out[..., :16] = True
        out.scatter_(2, tokens[..., None].expand(outer, inner, 1), False)
        out[:, :inner, vocabulary - 1] = False
        big[out] = -INF
    big = big.to(DEVICE)
    if view == "transposed":
        logits = big[:, :inner, :vocabulary].transpose(1, 2).contiguous().transpose(1, 2)
    elif view == "sliced columns":
        logits = big[:, :inner, :vocabulary]
    elif view == "sliced rows":
        logits = big[..., :vocabulary].contiguous()[:, :inner]
    else:
        logits = big[:, :inner, :vocabulary].contiguous()
    if view == "four dimensions":
        logits, tokens = logits[:, None], tokens[:, None]
    tokens = tokens.to(DEVICE)
    mask = torch.rand(tokens.shape, generator=g).to(DEVICE) < 0.6 if masked else torch.ones_like(tokens).bool()
    logits = torch.where(mask[..., None], logits, NAN) if masked and view == "plain" else logits
    x = logits.detach().requires_grad_()
    options = {"temperature": temperature, "mask": mask if masked else None}
    outs = token_logprobs(x, tokens, return_entropy=True, **options)
    outs = outs if entropy else (token_logprobs(x, tokens, **options),)
    ups = [torch.randn(tokens.shape, generator=g).to(DEVICE) for _ in outs]
    sum((u * o).sum() for u, o in zip(ups, outs, strict=True)).backward()
    truth = oracle(logits, tokens, temperature)
    expected = sum(u.double()[..., None] * t for u, t in zip(ups, truth[2:], strict=False))
    assert (outs[0] <= 0).all() and x.grad.dtype == dtype and outs[0].dtype == torch.float32
    for got, exact in zip(outs, truth[:2], strict=False):
        exact = torch.where(mask, exact, 0.0)
        # A temperature rounds each difference once, and exp(difference) is as sensitive as the difference is large.
        rtol = 1e-6 if temperature == 1.0 else 4e-6
        torch.testing.assert_close(got.double(), exact, rtol=rtol, atol=1e-37)
    rtol = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    expected = torch.where(mask[..., None], expected, 0.0)
    torch.testing.assert_close(x.grad.double(), expected, rtol=rtol, atol=2e-6 if dtype == torch.float32 else 1e-4)


@CASES
@given(
    rows=st.integers(1, 5),
    hidden=st.integers(1, 5),
    vocabulary=st.integers(1, 45),
    dtype=dtypes,
    temperature=st.sampled_from([1.0, 0.7]),
    chunk=st.sampled_from([None, 1, 2, 3]),
    masked=st.booleans(),
    entropy=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_linear_token_logprobs(rows, hidden, vocabulary, dtype, temperature, chunk, masked, entropy, seed):
    g = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(n, hidden, generator=g).to(dtype).to(DEVICE) for n in (rows, vocabulary))
    tokens = torch.randint(vocabulary, (rows,), generator=g).to(DEVICE)
    mask = torch.rand(rows, generator=g).to(DEVICE) < 0.6 if masked else None
    if mask is not None:
        x = torch.where(mask[:, None], x, NAN)
    up = torch.randn(2, rows, generator=g).to(DEVICE)
    results = []
    for call, cast in ((linear_token_logprobs, dtype), (reference.linear_token_logprobs, torch.float64)):
        inputs = [y.to(cast, copy=True).requires_grad_() for y in (x, w)]
        options = {"temperature": temperature, "mask": mask, "chunk_size": chunk, "return_entropy": entropy}
        outs = call(*inputs, tokens, **options)
        outs = outs if entropy else (outs,)
        sum((u * o).sum() for u, o in zip(up, outs, strict=False)).backward()
        results.append([*outs, inputs[0].grad, inputs[1].grad])
    wide, head = x.double().nan_to_num(0.0), w.double()
    z = (wide @ head.t()).requires_grad_()
    outs = reference.token_logprobs(z, tokens, temperature=temperature, mask=mask, return_entropy=True)
    (of_logits,) = torch.autograd.grad(sum((u * o).sum() for u, o in zip(up, outs[: 1 + entropy], strict=False)), z)
    # Half precision rounds the gradient of each logit on its way to the two products, and what comes out of them.
    # The interpreter does not round: it cuts the digits off.
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / (2 if DEVICE == "cuda" else 1)
    terms = [0.0] * (1 + entropy) + [of_logits.abs() @ head.abs(), of_logits.abs().t() @ wide.abs()]
    for got, exact, size in zip(*results, terms, strict=True):
        error = (got.double() - exact).abs()
        assert (error <= 3e-6 + 1e-5 * exact.abs() + 1.01 * rounding * (size + exact.abs())).all(), (got, exact)


TENSORS = ("old_logprobs", "advantages", "values", "old_values", "returns", "entropy", "ref_logprobs")


@CASES
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 14),
    dtype=dtypes,
    value_clip=st.sampled_from([None, 0.2]),
    with_values=st.booleans(),
    with_entropy=st.booleans(),
    with_reference=st.booleans(),
    denominator=st.sampled_from(["count", "number", "tensor"]),
    view=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_ppo_loss(
    rows, columns, dtype, value_clip, with_values, with_entropy, with_reference, denominator, view, seed
):  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    shape = (columns, rows) if view else (rows, columns)
    data = {name: torch.randn(shape, generator=g).to(dtype).to(DEVICE) for name in TENSORS}
    data["logprobs"] = (data["old_logprobs"].float() + 0.3 * torch.randn(shape, generator=g).to(DEVICE)).to(dtype)
    mask = torch.rand(shape, generator=g) < 0.7
    mask[0, 0] = True
    data["response_mask"] = mask.to(DEVICE)
    data = {name: torch.where(data["response_mask"], x, NAN) if x.dtype == dtype else x for name, x in data.items()}
    data = {name: x.t() for name, x in data.items()} if view else data
    options = {"clip_range": 0.25, "value_coef": 0.7}
    if not with_values:
        data = {k: v for k, v in data.items() if k not in ("values", "old_values", "returns")}
    elif value_clip is None:
        del data["old_values"]
    else:
        options["value_clip_range"] = value_clip
    if with_entropy:
        options["entropy_coef"] = 0.05
    else:
        del data["entropy"]
    if with_reference:
        options["kl_coef"] = 0.4
    else:
        del data["ref_logprobs"]
    if denominator != "count":
        options["denominator"] = 7.5 if denominator == "number" else torch.tensor(7.5, device=DEVICE)
    differentiable = [k for k in ("logprobs", "values", "entropy") if k in data]
    results = []
    for call, cast in ((ppo_loss, dtype), (reference.ppo_loss, torch.float64)):
        copy = {k: v.to(cast, copy=True) if v.dtype == dtype else v for k, v in data.items()}
        for k in differentiable:
            copy[k].requires_grad_()
        loss, metrics = call(**copy, **options)
        (1.5 * loss).backward()
        results.append((loss, metrics, {k: copy[k].grad for k in differentiable}))
    (loss, metrics, grads), (exact, exact_metrics, exact_grads) = results
    assert set(metrics) == set(exact_metrics) and loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    for name, metric in metrics.items():
        assert metric.dim() == 0 and not metric.requires_grad
        # A clip decided the other way in the last bit would show as a whole token: the data never sits on the edge.
        torch.testing.assert_close(metric.double(), exact_metrics[name], rtol=1e-5, atol=1e-6, msg=name)
    for name, grad in grads.items():
        assert grad.dtype == dtype
        rtol = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(grad.double(), exact_grads[name], rtol=rtol, atol=1e-6 if rtol == 1e-5 else 1e-4)


@CASES
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 6),
    dtype=dtypes,
    time_dim=st.integers(0, 1),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
    last=st.booleans(),
    truncated=st.booleans(),
    masked=st.booleans(),
    view=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_gae(rows, columns, dtype, time_dim, gamma, lam, last, truncated, masked, view, seed):
    g = torch.Generator().manual_seed(seed)
    rewards, values, after = (torch.randn(rows, columns, generator=g).to(dtype) for _ in range(3))
    ends = torch.rand(rows, columns, generator=g) < 0.3
    mask = torch.rand(rows, columns, generator=g) < 0.7 if masked else None
    last_values = torch.randn(rows, generator=g).to(dtype) if last else None
    after[~ends] = NAN
    if mask is not None:
        mask[0, 0] = True
        rewards[~mask], values[~mask], after[~mask] = NAN, NAN, NAN
    expected = loop(rewards, values, ends, gamma, lam, last_values, after if truncated else None, mask)

    def laid_out(x):
        if x is None or x.dim() == 1:
            return x if x is None else x.to(DEVICE)
        x = x if time_dim == 1 else x.t()
        return (x.t().contiguous().t() if view else x.contiguous()).to(DEVICE)

    inputs = [laid_out(x) for x in (rewards, values, ends)]
    options = {"last_values": last_values, "truncated_values": after if truncated else None, "mask": mask}
    options = {name: laid_out(x) for name, x in options.items()}
    advantages, returns, moments = gae_with_moments(*inputs, gamma=gamma, lam=lam, time_dim=time_dim, **options)
    assert advantages.dtype == torch.float32
    for got, exact in zip((advantages, returns), expected, strict=True):
        got = got if time_dim == 1 else got.t()
        torch.testing.assert_close(got.double().cpu(), exact, rtol=1e-5, atol=1e-5)
    counted = expected[0] if mask is None else expected[0][mask]
    exact = torch.stack((torch.tensor(float(counted.numel())).double(), counted.mean(), counted.var(correction=0)))
    torch.testing.assert_close(moments.double().cpu(), exact, rtol=1e-5, atol=1e-5)


@settings(CASES, max_examples=40)
@given(
    rows=st.integers(1, 5),
    vocabulary=st.integers(1, 40),
    chunk=st.sampled_from([None, 1, 2]),
    full=st.booleans(),
    given_denominator=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_linear_ppo_loss_equals_the_two_calls(rows, vocabulary, chunk, full, given_denominator, seed):
    g = torch.Generator().manual_seed(seed)
    data = {name: torch.randn(rows, generator=g).double() for name in TENSORS if name != "entropy"}
    data |= {
        "hidden": torch.randn(rows, 3, generator=g).double(),
        "weight": torch.randn(vocabulary, 3, generator=g).double(),
    }
    mask = torch.rand(rows, generator=g) < 0.7
    mask[0] = True
    data |= {"tokens": torch.randint(vocabulary, (rows,), generator=g), "response_mask": mask}
    options = {"temperature": 0.8, "entropy_coef": 0.1, "kl_coef": 0.2, "chunk_size": chunk, "value_clip_range": 0.2}
    if not full:
        data = {k: v for k, v in data.items() if k not in ("values", "old_values", "returns", "ref_logprobs")}
        options = {"temperature": 0.8, "chunk_size": chunk}
    if given_denominator:
        options["denominator"] = 9.0
    data = {k: v.to(DEVICE) for k, v in data.items()}
    differentiable = [k for k in ("hidden", "weight", "values") if k in data]
    results = []
    for call in (linear_ppo_loss, reference.linear_ppo_loss):
        copy = {k: v.clone().requires_grad_(k in differentiable) for k, v in data.items()}
        loss, metrics = call(**copy, **options)
        (1.5 * loss).backward()
        results.append((loss, metrics, {k: copy[k].grad for k in differentiable}))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-11)
