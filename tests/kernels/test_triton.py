"""Dispatch, registration, compilation and the corners of the Triton path that shapes drawn at random don't reach."""

import inspect
import runpy
import sys

import pytest
import torch
from minirlhf_kernels import fused, gae, linear_token_logprobs, ppo_loss, reference, token_logprobs
from minirlhf_kernels.dispatch import path_for
from minirlhf_kernels.fused import linear, logprobs, logprobs_backward
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.parametrize("backend", ["triton"], indirect=True),
]


def test_the_reference_runs_on_the_cpu_unless_triton_is_forced(monkeypatch):
    x = torch.zeros(2, 3, device="cpu")
    assert path_for(x) == "triton"  # this module forces it
    monkeypatch.setenv("MINIRLHF_KERNELS", "reference")
    assert path_for(x) == "reference"
    monkeypatch.delenv("MINIRLHF_KERNELS")
    assert path_for(x) == "reference"
    monkeypatch.setattr("minirlhf_kernels.dispatch.HAS_TRITON", False)
    assert path_for(x) == "reference"


def test_an_amd_gpu_gets_the_reference_unless_triton_is_forced(monkeypatch):
    """torch calls both makers' GPUs cuda, and no kernel has run on one of AMD's."""
    x = torch.zeros(2, 3)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.delenv("MINIRLHF_KERNELS")
    assert path_for(x) == "triton"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert path_for(x) == "reference"
    monkeypatch.setenv("MINIRLHF_KERNELS", "triton")
    assert path_for(x) == "triton"


def test_a_forced_path_that_cannot_run_says_why(monkeypatch):
    x = torch.zeros(2, 3, device="cpu")
    monkeypatch.setattr("minirlhf_kernels.dispatch._interpreted", lambda: False)
    with pytest.raises(RuntimeError, match=r"tensors are on cpu.*TRITON_INTERPRET=1"):
        token_logprobs(x, torch.zeros(2, dtype=torch.int64))
    monkeypatch.setattr("minirlhf_kernels.dispatch.HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        token_logprobs(logits=x, tokens=torch.zeros(2, dtype=torch.int64))
    monkeypatch.setenv("MINIRLHF_KERNELS", "cuda")
    with pytest.raises(ValueError, match="must be reference or triton, not 'cuda'"):
        gae(x, x, x > 0, gamma=1.0, lam=1.0)


def test_importing_the_definitions_makes_no_tensor():
    class Refused(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            raise AssertionError(operation)

    with Refused():
        assert "gae" in runpy.run_path(reference.__file__)


@pytest.mark.parametrize("name", fused.__all__)
def test_both_halves_have_the_same_signature(name):
    ours, theirs = (inspect.signature(getattr(half, name)).parameters.values() for half in (fused, reference))
    assert [(p.name, p.default, p.kind) for p in ours] == [(p.name, p.default, p.kind) for p in theirs]


def rows(dtype=torch.float32, vocabulary=5):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, vocabulary).to(dtype).requires_grad_()
    return logits, torch.randint(vocabulary, (2, 3)), torch.rand(2, 3) < 0.6


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
def test_opcheck_token_logprobs(masked, entropy):
    logits, tokens, mask = rows()
    mask = mask if masked else None
    opcheck(logprobs.forward_op, (logits, tokens, mask, 0.7, entropy))
    out, h, stats = logprobs.forward_op(logits.detach(), tokens, mask, 0.7, True)
    opcheck(logprobs.backward_op, (logits.detach(), tokens, mask, h, stats, out, h if entropy else None, 0.7))


def test_opcheck_linear_token_logprobs():
    _, tokens, mask = rows()
    tokens, mask = tokens.flatten(), mask.flatten()
    hidden, weight = (torch.randn(n, 4, requires_grad=True) for n in (6, 5))
    opcheck(linear.forward_op, (hidden, weight, tokens, mask, 0.7, True, torch.float32))
    with torch.no_grad():
        out, h, stats = linear.forward_op(hidden, weight, tokens, mask, 0.7, True, torch.float32)
        opcheck(linear.backward_op, (hidden, weight, tokens, mask, h, stats, out, h, 0.7, torch.float32, True, True))


@pytest.mark.parametrize("name", fused.__all__)
def test_compile_fullgraph(name):
    """One graph with our operators in it, forward and backward, equal to the eager call."""
    logits, tokens, mask = rows()
    hidden, weight = torch.randn(2, 3, 4), torch.randn(5, 4, requires_grad=True)
    a, b = torch.randn(2, 3), torch.randn(2, 3)

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


def test_the_gradient_begins_its_rows_where_a_causal_model_s_logits_do():
    """logits[:, :-1] of an odd vocabulary: only so do both move 16 bytes at a time."""
    whole, tokens = torch.randn(3, 5, 37, dtype=torch.float64), torch.randint(37, (3, 4))
    for view in (whole[:, :-1], whole[:, :-1, None], whole.expand(3, 5, 37)[:1].expand(3, 5, 37)[:, 1:]):
        leaf = view.detach().requires_grad_()
        index = tokens.view(leaf.shape[:-1])
        (grad,) = torch.autograd.grad(token_logprobs(leaf, index).sum(), leaf)
        exact = torch.autograd.grad(leaf.log_softmax(-1).gather(-1, index.unsqueeze(-1)).sum(), leaf)[0]
        torch.testing.assert_close(grad, exact)
    assert logprobs_backward.room_like(whole[:, :-1]).stride() == whole.stride()
    later = whole[:, 1:]
    assert later.data_ptr() % 16 == 8 == logprobs_backward.room_like(later).data_ptr() % 16
    assert logprobs_backward.room_like(whole[:1].expand(3, 5, 37)).is_contiguous()
    assert logprobs_backward.room_like(torch.empty(99999).as_strided((2, 3), (9999, 1))).is_contiguous()


def test_a_token_outside_the_vocabulary_reads_nothing_and_gives_nan():
    """What CUDA tensors get, where looking at the tokens first would cost a sync."""
    logits = torch.randn(4, 7)
    tokens = torch.tensor([3, 7, -1, 10**12])
    out = torch.empty(4), torch.empty(4), torch.empty(4, 4)
    logprobs.forward_kernel[(4,)](
        logits, tokens, out[2], *out, 4, 4, 7, 0, 7, 0, 1.0,
        IGNORED=-100, HAS_MASK=False, WANT_ENTROPY=True, ACC=logprobs.tl.float32, GROUP=4, BLOCK=16, PREFETCH=False,
    )  # fmt: skip
    assert out[0][0].isfinite() and out[1][0].isfinite()
    assert out[0][1:].isnan().all() and out[1][1:].isnan().all()


def test_row_offsets_do_not_overflow_int32(oracle):
    """Rows 2^30 elements apart in memory that is reserved and never touched: the third begins at 2^31."""
    try:
        memory = torch.empty((1 << 31) + 64, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("4 GiB of address space cannot be reserved here")
    far = memory.as_strided((3, 5), (1 << 30, 1))
    near, tokens = torch.randn(3, 5).bfloat16(), torch.tensor([0, 4, 2])
    far.copy_(near)
    far.requires_grad_()
    outs = token_logprobs(far, tokens, return_entropy=True)
    torch.testing.assert_close(outs, token_logprobs(near, tokens, return_entropy=True))
    grad = torch.autograd.grad(outs[0].sum(), far)[0]
    torch.testing.assert_close(grad.double(), oracle(near, tokens)[2], rtol=1e-2, atol=1e-4)


def test_launches(monkeypatch):
    """token_logprobs and ppo_loss: one launch forward and one backward; gae one."""
    launched = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launched.append(self.kernel)
            return self.kernel[grid]

    kernels = ("logprobs", "forward"), ("logprobs_backward", "backward"), ("ppo", "forward"), ("ppo", "backward")
    for file, kernel in (*kernels, ("gae", "gae")):
        module = sys.modules[f"minirlhf_kernels.fused.{file}"]
        monkeypatch.setattr(module, f"{kernel}_kernel", Counted(getattr(module, f"{kernel}_kernel")))
    logits, tokens, mask = rows()
    token_logprobs(logits, tokens, mask=mask).sum().backward()
    assert len(launched) == 2
    a, b, c = (logits[..., i] for i in range(3))
    ppo_loss(a, b, c, mask, values=b, returns=c, entropy=c, ref_logprobs=b, kl_coef=0.1)[0].backward()
    assert len(launched) == 4
    gae(a, b, mask, gamma=0.9, lam=0.9)
    assert len(launched) == 5


KERNELS = [(file, name) for file, name in (
    ("logprobs", "forward"), ("logprobs_backward", "backward"), ("linear", "fold"), ("ppo", "forward"),
    ("ppo", "backward"), ("gae", "gae"),
)]  # fmt: skip


def test_views_and_micro_batches_compile_nothing_new(monkeypatch):
    """Rows of a micro-batch, tokens[1:] and mask[1:] begin anywhere: Triton's own binder gives them the same key."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    backend, keys = make_backend(GPUTarget("cuda", 90, 32)), {}

    class Bound:
        def __init__(self, kernel):
            options = ("do_not_specialize", "do_not_specialize_on_alignment")
            function = JITFunction(kernel.fn, **{k: kernel.kwargs[k] for k in options})
            self.binder = create_function_from_signature(function.signature, function.params, backend)
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, num_warps, **constants):
                bound, specialization, _ = self.binder(*args, **constants)
                flags = {k: v for k, v in bound.items() if k.isupper()}
                keys.setdefault(self.kernel.fn.__name__, set()).add(str((specialization, flags)))
                return self.kernel[grid](*args, num_warps=num_warps, **constants)

            return launch

    for file, name in KERNELS:
        module = sys.modules[f"minirlhf_kernels.fused.{file}"]
        monkeypatch.setattr(module, f"{name}_kernel", Bound(getattr(module, f"{name}_kernel")))
    monkeypatch.setattr(linear, "plan", lambda rows, vocabulary: (rows, vocabulary))
    logits, tokens, mask = torch.randn(7, 8), torch.randint(8, (7,)), torch.ones(7, 3, dtype=torch.bool)
    x, weight = torch.randn(8, 7, 3), torch.randn(8, 8)
    counts = []
    for rows in (slice(0, 4), slice(1, 3), slice(2, 7), slice(3, 4)):  # aligned to 16 bytes and not
        z, y, m = logits[rows].requires_grad_(), tokens[rows], mask[rows]
        token_logprobs(z, y, mask=m[:, 0], return_entropy=True)[0].sum().backward()
        linear_token_logprobs(z, weight, y, mask=m[:, 0]).sum().backward()
        a, b, c, d, e, f, g, h = (t[rows] for t in x)
        a, d, g = (t.detach().requires_grad_() for t in (a, d, g))
        loss, _ = ppo_loss(a, b, c, m, values=d, old_values=e, returns=f, entropy=g, ref_logprobs=h, denominator=9.0)
        loss.backward()
        gae(b, c, m, gamma=0.9, lam=0.9, mask=m)
        counts.append({name: len(found) for name, found in keys.items()})
    assert len(counts[0]) == 4 and counts[-1] == counts[0], counts


def test_an_eager_ppo_loss_costs_the_host_few_calls(monkeypatch):
    """Counted, because a time depends on the machine: Python functions that run on the host in one call, the kernel's
    launch left out. (49; 90 when every input was handed to autograd and triton.cdiv counted the blocks.)"""
    from minirlhf_kernels.fused import ppo

    class Launch:
        def __getitem__(self, grid):
            return lambda *args, **constants: None

    monkeypatch.setattr(ppo, "forward_kernel", Launch())
    data = [torch.randn(4, 6) for _ in range(8)]
    data[0].requires_grad_()
    names = []

    def watch(frame, event, arg):
        if event == "call":
            names.append(frame.f_code.co_name)

    options = dict(zip(("values", "old_values", "returns", "entropy", "ref_logprobs"), data[3:], strict=True))
    mask = torch.ones(4, 6, dtype=torch.bool)
    for profile in (None, watch):
        sys.setprofile(profile)
        try:
            ppo_loss(*data[:3], mask, **options, value_clip_range=0.2, denominator=3.0)
        finally:
            sys.setprofile(None)
    assert len(names) <= 60 and not {"bind", "apply_defaults"} & set(names), names


@pytest.mark.parametrize("name", sorted(logprobs.CANDIDATES))
def test_every_candidate_configuration_gives_the_same_numbers(monkeypatch, name, oracle):
    """Tiny blocks in the proportions of the candidate: 1 to 9 of them per row, the token in each, rows with a skew."""
    block, warps, prefetch = logprobs.CANDIDATES[name]
    monkeypatch.setattr(logprobs, "SHORT", (block // 128, warps, prefetch))
    torch.manual_seed(3)
    for columns in (5, 37, 145):
        logits = 3 * torch.randn(9, columns + 1)[:, 1:]
        tokens = torch.linspace(0, columns - 1, 9).long()
        outs = token_logprobs(logits, tokens, return_entropy=True)
        for got, exact in zip(outs, oracle(logits, tokens), strict=False):
            torch.testing.assert_close(got.double(), exact, rtol=2e-6, atol=1e-30)


def test_a_ppo_step_ends_with_the_same_weights_on_both_paths(monkeypatch):
    """Four epochs of a small policy and value net: log-probs, advantages, loss and both gradients, end to end."""
    ends = []
    for path in ("reference", "triton"):
        monkeypatch.setenv("MINIRLHF_KERNELS", path)
        torch.manual_seed(0)
        body = torch.nn.Sequential(torch.nn.Embedding(30, 16), torch.nn.Linear(16, 16), torch.nn.Tanh())
        model = torch.nn.ModuleList([body, torch.nn.Linear(16, 30, bias=False), torch.nn.Linear(16, 1)])
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, eps=1e-5)
        tokens, rewards = torch.randint(30, (3, 9)), torch.randn(3, 8)
        mask = (torch.rand(3, 8) < 0.9).cumprod(1).bool() | (torch.arange(8) == 0)

        def outputs(model=model, tokens=tokens, mask=mask):
            hidden = model[0](tokens)[:, :-1]
            options = {"temperature": 0.9, "mask": mask, "return_entropy": True}
            plain = token_logprobs(model[1](hidden), tokens[:, 1:], **options)
            lean = linear_token_logprobs(hidden, model[1].weight, tokens[:, 1:], **options)
            torch.testing.assert_close(plain, lean, rtol=1e-4, atol=1e-5)
            return *plain, model[2](hidden).squeeze(-1)

        with torch.no_grad():
            old, _, old_values = outputs()
            advantages, returns = gae(rewards, old_values, ~mask, gamma=0.99, lam=0.95, mask=mask)
        for _ in range(4):
            new, entropy, values = outputs()
            loss, _ = ppo_loss(
                new, old, advantages, mask, values=values, old_values=old_values, returns=returns, entropy=entropy,
                ref_logprobs=old, value_clip_range=0.2, entropy_coef=0.01, kl_coef=0.05,
            )  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ends.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-5)
