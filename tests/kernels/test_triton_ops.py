"""Dispatch, registration, compilation and the corners of the Triton path that shapes drawn at random don't reach."""

import pytest
import torch
from minirlhf_kernels import fused, gae, linear_ppo_loss, linear_token_logprobs, ppo_loss, reference, token_logprobs
from minirlhf_kernels.dispatch import path_for
from minirlhf_kernels.fused import gae as gae_public
from minirlhf_kernels.fused import linear, linear_ppo, logprobs, ppo
from test_ppo_loss import DIFFERENTIABLE, OPTIONS, TENSORS, batch, values_within_reach
from test_token_logprobs import oracle
from torch.library import opcheck

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN = float("inf"), float("nan")
pytestmark = [
    pytest.mark.usefixtures("triton_path"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
gae_module = __import__("sys").modules[gae_public.__module__]


# ---------------------------------------------------------------- dispatch


def test_the_reference_runs_on_the_cpu_unless_triton_is_forced(monkeypatch):
    x = torch.zeros(2, 3)
    assert path_for(x) == "triton"  # this module forces it
    monkeypatch.setenv("MINIRLHF_KERNELS", "reference")
    assert path_for(x) == "reference"
    monkeypatch.delenv("MINIRLHF_KERNELS")
    assert path_for(x) == "reference"
    monkeypatch.setattr("minirlhf_kernels.dispatch.HAS_TRITON", False)
    assert path_for(x) == "reference"


def test_a_forced_path_that_cannot_run_says_why(monkeypatch):
    x = torch.zeros(2, 3)
    monkeypatch.setattr("minirlhf_kernels.dispatch._interpreted", lambda: False)
    with pytest.raises(RuntimeError, match=r"tensors are on cpu.*TRITON_INTERPRET=1"):
        token_logprobs(x, torch.zeros(2, dtype=torch.int64))
    monkeypatch.setattr("minirlhf_kernels.dispatch.HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        token_logprobs(logits=x, tokens=torch.zeros(2, dtype=torch.int64))
    monkeypatch.setenv("MINIRLHF_KERNELS", "cuda")
    with pytest.raises(ValueError, match="must be reference or triton, not 'cuda'"):
        gae(x, x, x > 0, gamma=1.0, lam=1.0)


@pytest.mark.parametrize("name", reference.__all__)
def test_both_halves_have_the_same_signature(name):
    import inspect

    if name in ("IGNORED_TOKEN", "linear_ppo_loss"):  # the second passes ppo_loss's options on
        return
    ours, theirs = (inspect.signature(getattr(half, name)).parameters for half in (fused, reference))
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]


# ---------------------------------------------------------------- registration


def rows(dtype=torch.float32, vocabulary=5):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, vocabulary, device=DEVICE).to(dtype).requires_grad_()
    return logits, torch.randint(vocabulary, (2, 3), device=DEVICE), torch.rand(2, 3, device=DEVICE) < 0.6


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
def test_opcheck_token_logprobs(masked, entropy):
    logits, tokens, mask = rows()
    mask = mask if masked else None
    opcheck(logprobs.forward_op, (logits, tokens, mask, 0.7, entropy, False))
    out, h, stats = logprobs.forward_op(logits.detach(), tokens, mask, 0.7, True, False)
    opcheck(logprobs.backward_op, (logits.detach(), tokens, mask, h, stats, out, h if entropy else None, 0.7))


def test_opcheck_linear_token_logprobs():
    _, tokens, mask = rows()
    tokens, mask = tokens.flatten(), mask.flatten()
    hidden, weight = (torch.randn(n, 4, device=DEVICE, requires_grad=True) for n in (6, 5))
    opcheck(linear.forward_op, (hidden, weight, tokens, mask, 0.7, True, 2))
    with torch.no_grad():
        out, h, stats = linear.forward_op(hidden, weight, tokens, mask, 0.7, True, 2)
        opcheck(linear.backward_op, (hidden, weight, tokens, mask, h, stats, out, h, 0.7, 2, True, True))


@pytest.mark.parametrize("denominator", [(None, None), (7.0, None), (None, 7.0)])
def test_opcheck_ppo_loss(denominator):
    tensor = None if denominator[0] is None else torch.tensor(denominator[0], device=DEVICE)
    data = {k: v.to(DEVICE).requires_grad_(k in DIFFERENTIABLE) for k, v in batch().items()}
    names = ("logprobs", "old_logprobs", "advantages", "response_mask", "values", "old_values", "returns", "entropy")
    given = tuple(data[name] for name in (*names, "ref_logprobs"))
    opcheck(ppo.forward_op, (*given, 0.2, 0.3, 0.7, 0.05, 0.4, tensor, denominator[1]))
    opcheck(
        ppo.forward_op, (*given[:4], None, None, None, None, None, 0.2, None, 0.5, 0.0, 0.0, tensor, denominator[1])
    )
    with torch.no_grad():
        loss, metrics, a, b = ppo.forward_op(*given, 0.2, 0.3, 0.7, 0.05, 0.4, tensor, denominator[1])
        opcheck(ppo.backward_op, (loss, metrics, given[3], a, b, 0.05, torch.float32, None, torch.float64))


def test_opcheck_linear_ppo_loss():
    _, tokens, _ = rows()
    hidden, weight = (torch.randn(n, 4, device=DEVICE, requires_grad=True) for n in (6, 5))
    x = [torch.randn(6, device=DEVICE) for _ in range(6)]
    mask = torch.tensor([True, False, True, True, True, False], device=DEVICE)
    options = (0.7, 0.2, 0.3, 0.5, 0.1, 0.2, None, 2, True, True)
    opcheck(
        linear_ppo.forward_op,
        (hidden, weight, tokens.flatten(), *x[:2], mask, x[2].requires_grad_(), *x[3:], *options),
    )


@pytest.mark.parametrize("time_dim", [0, 1])
def test_opcheck_gae(time_dim):
    r, v, after = (torch.randn(3, 5, device=DEVICE) for _ in range(3))
    ends, last = torch.rand(3, 5, device=DEVICE) < 0.3, torch.randn((5, 3)[time_dim], device=DEVICE)
    opcheck(gae_module.gae_op, (r, v, ends, last, after, ~ends, 0.9, 0.8, time_dim, True))
    opcheck(gae_module.gae_op, (r, v, ends, None, None, None, 0.9, 0.8, time_dim, False))


# ---------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("name", ["token_logprobs", "linear_token_logprobs", "ppo_loss", "gae", "linear_ppo_loss"])
def test_compile_fullgraph(name):
    """One graph with our operators in it, forward and backward, equal to the eager call."""
    logits, tokens, mask = rows()
    hidden, weight = torch.randn(2, 3, 4, device=DEVICE), torch.randn(5, 4, device=DEVICE, requires_grad=True)
    a, b = torch.randn(2, 3, device=DEVICE), torch.randn(2, 3, device=DEVICE)

    def step(logits, hidden):
        if name == "token_logprobs":
            out = token_logprobs(logits, tokens, temperature=0.7, mask=mask, return_entropy=True)
            return out[0].sum() + out[1].square().sum()
        if name == "linear_token_logprobs":
            out = linear_token_logprobs(hidden, weight, tokens, mask=mask, return_entropy=True)
            return out[0].sum() + out[1].square().sum()
        if name == "ppo_loss":
            loss, metrics = ppo_loss(logits[..., 0], a, b, mask, values=logits[..., 1], returns=a, denominator=4.0)
            return loss + metrics["policy/approx_kl"]
        if name == "linear_ppo_loss":
            return linear_ppo_loss(hidden, weight, tokens, a, b, mask, entropy_coef=0.1)[0]
        advantages, returns = gae(a, logits[..., 0], mask, gamma=0.9, lam=0.8)
        return (advantages * logits[..., 1]).sum() + (returns * logits[..., 2]).sum()

    results = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        inputs = [x.detach().clone().requires_grad_() for x in (logits, hidden)]
        loss = call(*inputs)
        results.append([loss.detach(), *torch.autograd.grad(loss, inputs, allow_unused=True)])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.slow
def test_compile_with_inductor():
    logits, tokens, mask = rows()

    def step(logits):
        return token_logprobs(2 * logits, tokens, mask=mask).exp().sum()

    x, y = (logits.detach().clone().requires_grad_() for _ in range(2))
    step(x).backward()
    torch.compile(step, fullgraph=True)(y).backward()
    torch.testing.assert_close(x.grad, y.grad)


# ---------------------------------------------------------------- corners


@pytest.mark.parametrize("inner", [True, False])
def test_inplace_backward_overwrites_the_logits_and_runs_once(inner, monkeypatch):
    for path in ("triton", "reference"):
        monkeypatch.setenv("MINIRLHF_KERNELS", path)
        x, tokens, mask = rows()
        logits = x * 1.0 if inner else x
        expected = torch.autograd.grad(token_logprobs(x, tokens, mask=mask).sum(), x)[0]
        memory = logits.data_ptr()
        out = token_logprobs(logits, tokens, mask=mask, inplace_backward=True).sum()
        grad = torch.autograd.grad(out, logits, retain_graph=True)[0]
        assert grad.data_ptr() == memory
        torch.testing.assert_close(grad, expected)
        with pytest.raises(RuntimeError):
            torch.autograd.grad(out, logits)


def test_the_gradient_begins_its_rows_where_a_causal_model_s_logits_do():
    """logits[:, :-1] of an odd vocabulary: only so do both move 16 bytes at a time."""
    whole = torch.randn(3, 5, 37, device=DEVICE, dtype=torch.float64)
    tokens = torch.randint(37, (3, 4), device=DEVICE)
    for view in (whole[:, :-1], whole[:, :-1, None], whole.expand(3, 5, 37)[:1].expand(3, 5, 37)[:, 1:]):
        leaf = view.detach().requires_grad_()
        index = tokens.view(leaf.shape[:-1])
        (grad,) = torch.autograd.grad(token_logprobs(leaf, index).sum(), leaf)
        exact = torch.autograd.grad(leaf.log_softmax(-1).gather(-1, index.unsqueeze(-1)).sum(), leaf)[0]
        torch.testing.assert_close(grad, exact)
    assert logprobs.room_like(whole[:, :-1]).stride() == whole.stride()
    later = whole[:, 1:]
    assert later.data_ptr() % 16 == 8 == logprobs.room_like(later).data_ptr() % 16
    assert logprobs.room_like(whole[:1].expand(3, 5, 37)).is_contiguous()
    assert logprobs.room_like(torch.empty(99999).as_strided((2, 3), (9999, 1))).is_contiguous()


def test_a_token_outside_the_vocabulary_reads_nothing_and_gives_nan():
    """What CUDA tensors get, where looking at the tokens first would cost a sync."""
    logits = torch.randn(4, 7)
    tokens = torch.tensor([3, 7, -1, 10**12])
    out = torch.empty(4), torch.empty(4), torch.empty(4, 4)
    logprobs.forward_kernel[(4,)](
        logits, tokens, out[2], *out, 4, 4, 7, 0, 7, 0, 1.0,
        IGNORED=-100, HAS_MASK=False, WANT_ENTROPY=True, ACC=logprobs.tl.float32, GROUP=4, BLOCK=16,
    )  # fmt: skip
    assert out[0][0].isfinite() and out[1][0].isfinite()
    assert out[0][1:].isnan().all() and out[1][1:].isnan().all()


def test_row_offsets_do_not_overflow_int32():
    """Rows 2^30 elements apart in memory that is reserved and never touched: the third begins at 2^31."""
    try:
        memory = torch.empty((1 << 31) + 64, dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError:
        pytest.skip("4 GiB of address space cannot be reserved here")
    far = memory.as_strided((3, 5), (1 << 30, 1))
    near = torch.randn(3, 5, device=DEVICE).bfloat16()
    far.copy_(near)
    tokens = torch.tensor([0, 4, 2], device=DEVICE)
    far.requires_grad_()
    outs = token_logprobs(far, tokens, return_entropy=True)
    torch.testing.assert_close(outs, token_logprobs(near, tokens, return_entropy=True))
    grad = torch.autograd.grad(outs[0].sum(), far)[0]
    torch.testing.assert_close(grad.double(), oracle(near, tokens)[2], rtol=1e-2, atol=1e-4)


def test_a_token_among_lowest_finite_logits_has_no_entropy():
    """What `masked_fill(finfo.min)` leaves of a row in which one token is allowed."""
    for dtype in (torch.float32, torch.float64):
        low = torch.finfo(dtype).min
        logits = torch.full((3, 9), low, dtype=dtype, device=DEVICE)
        logits[0, 3] = logits[1, 3] = 5.0
        x, tokens = logits.requires_grad_(), torch.tensor([3, 4, 4], device=DEVICE)
        out, entropy = token_logprobs(x, tokens, return_entropy=True)
        third = -torch.tensor(9.0, dtype=dtype, device=DEVICE).log()  # nothing but lowest ones: each is as likely
        torch.testing.assert_close(out, torch.stack((torch.zeros_like(third), third * 0 + low, third)))
        torch.testing.assert_close(entropy, torch.stack((third * 0, third * 0, -third)))
        assert torch.autograd.grad(entropy.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("margin", [15.0, 20.0, 25.0, 60.0])
def test_near_certainty_every_digit_is_kept(margin):
    """log p, its gradient and the entropy to 1e-6 of their own size, whether the token leads or another one does."""
    logits = torch.zeros(2, 1500, device=DEVICE)
    logits[:, 1200] = margin
    x, tokens = logits.requires_grad_(), torch.tensor([1200, 3], device=DEVICE)
    out, entropy = token_logprobs(x, tokens, return_entropy=True)
    exact = oracle(logits.detach(), tokens)
    torch.testing.assert_close(out.double(), exact[0], rtol=1e-6, atol=0)
    # By hand: at 60 nats float64's own -sum p log p has lost its digits.
    odds = torch.tensor(-margin, dtype=torch.float64).exp() * 1499
    by_hand = (odds.log1p() + odds * margin / (1 + odds)).to(DEVICE).expand(2)
    torch.testing.assert_close(entropy.double(), by_hand, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0].double(), exact[2], rtol=2e-6, atol=1e-37)


def test_nan_in_a_token_that_counts_reaches_the_loss_and_the_metrics():
    for name in TENSORS:
        data = {k: v.to(DEVICE) for k, v in batch().items()}
        data["response_mask"][0, 0] = True
        data[name][0, 0] = NAN
        loss, metrics = ppo_loss(**data, **OPTIONS)
        assert loss.isnan(), name
        if name in ("logprobs", "old_logprobs"):
            assert metrics["policy/ratio_max"].isnan() and metrics["policy/ratio_mean"].isnan()


def test_a_value_within_reach_is_not_counted_as_clipped():
    data = {name: x.to(DEVICE) for name, x in values_within_reach().items()}
    assert ppo_loss(**data, value_clip_range=1.0)[1]["value/clip_fraction"] == 0


def test_the_ticket_is_back_at_zero_after_every_call(monkeypatch):
    """Three programs or thirty: the last one adds up, once, and leaves the counter as it found it."""
    ticket = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(ppo, "_ticket", lambda device: ticket)
    monkeypatch.setattr(ppo, "BLOCK", 8)
    data = {k: v.to(DEVICE) for k, v in batch().items()}
    losses = [ppo_loss(**data, **OPTIONS)[0] for _ in range(3)]
    assert ticket.item() == 0 and losses[0] == losses[1] == losses[2]
    torch.testing.assert_close(losses[0], reference.ppo_loss(**data, **OPTIONS)[0])


def test_launches(monkeypatch):
    """ppo_loss: one launch forward and one backward; gae one; token_logprobs one each way."""
    count = {"n": 0}

    def counted(kernel):
        class Counting:
            def __getitem__(self, grid):
                count["n"] += 1
                return kernel[grid]

        return Counting()

    for module, names in (
        (logprobs, ("forward_kernel", "backward_kernel")),
        (ppo, ("forward_kernel", "backward_kernel")),
        (gae_module, ("gae_kernel", "moments_kernel")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, counted(getattr(module, name)))
    data = {k: v.to(DEVICE).requires_grad_(k in DIFFERENTIABLE) for k, v in batch().items()}
    ppo_loss(**data, **OPTIONS)[0].backward()
    assert count.pop("n") == 2
    count["n"] = 0
    logits, tokens, mask = rows()
    token_logprobs(logits, tokens, mask=mask).sum().backward()
    assert count["n"] == 2
    gae(logits[..., 0], logits[..., 1], mask, gamma=0.9, lam=0.9)
    assert count["n"] == 3


def test_the_linear_op_never_holds_all_logits(largest_made):
    x, weight = (torch.randn(n, 4, device=DEVICE, requires_grad=True) for n in (64, 100))
    with largest_made as made:
        linear_token_logprobs(x, weight, torch.randint(100, (64,), device=DEVICE), chunk_size=8)[0].sum().backward()
    assert made.largest == 8 * 100


def test_a_ppo_step_ends_with_the_same_weights_on_both_paths(monkeypatch):
    """Two epochs of a small policy and value net: log-probs, advantages, loss and both gradients, end to end."""
    ends = {}
    for path in ("reference", "triton"):
        monkeypatch.setenv("MINIRLHF_KERNELS", path)
        torch.manual_seed(0)
        embed, body, head = torch.nn.Embedding(30, 16), torch.nn.Linear(16, 16), torch.nn.Linear(16, 30, bias=False)
        value = torch.nn.Linear(16, 1)
        model = torch.nn.ModuleList([embed, body, head, value]).to(DEVICE)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, eps=1e-5)
        tokens = torch.randint(30, (3, 9), device=DEVICE)
        mask = (torch.rand(3, 8, device=DEVICE) < 0.9).cumprod(1).bool()
        mask[:, 0] = True
        rewards = torch.randn(3, 8, device=DEVICE)

        def outputs(model=model, tokens=tokens, mask=mask):
            hidden = torch.tanh(model[1](model[0](tokens)))
            options = {"temperature": 0.9, "mask": mask, "return_entropy": True}
            plain = token_logprobs(model[2](hidden)[:, :-1], tokens[:, 1:], **options)
            lean = linear_token_logprobs(hidden[:, :-1], model[2].weight, tokens[:, 1:], **options)
            torch.testing.assert_close(plain, lean, rtol=1e-4, atol=1e-5)
            return *plain, model[3](hidden)[:, :-1, 0]

        with torch.no_grad():
            old, _, old_values = outputs()
            advantages, returns = gae(rewards, old_values, ~mask, gamma=0.99, lam=0.95, mask=mask)
        for epoch in range(4):
            new, entropy, values = outputs()
            loss, metrics = ppo_loss(
                new, old, advantages, mask, values=values, old_values=old_values, returns=returns, entropy=entropy,
                ref_logprobs=old, value_clip_range=0.2, entropy_coef=0.01, kl_coef=0.05,
            )  # fmt: skip
            if epoch == 0:
                assert metrics["policy/ratio_mean"] == 1 and metrics["policy/approx_kl"] == 0
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ends[path] = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(ends["triton"], ends["reference"], rtol=0, atol=1e-5)
