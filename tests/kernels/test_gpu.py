"""What only a GPU can show: size, determinism, CUDA graphs, no host syncs, no recompilation. Skipped without one."""

import pytest
import torch
from minirlhf_kernels import gae, linear_token_logprobs, ppo_loss, reference, token_logprobs

pytestmark = pytest.mark.gpu


def rows(count=64, vocabulary=32000, dtype=torch.bfloat16):
    torch.manual_seed(0)
    logits = (3 * torch.randn(count, vocabulary, device="cuda")).to(dtype).requires_grad_()
    return logits, torch.randint(vocabulary, (count,), device="cuda")


def everything(logits, tokens, temperature=0.9, clip=0.2, gamma=0.99):
    """One call of every op, forward and backward; returns every result."""
    logprobs, entropy = token_logprobs(logits, tokens, temperature=temperature, return_entropy=True)
    x = logits[:, :32].detach().requires_grad_()
    weight = logits[:7, :32].detach().repeat(10, 1).requires_grad_()
    lean = linear_token_logprobs(x, weight, tokens % 70, temperature=temperature)
    shape, ends = (8, len(tokens) // 8), tokens % 7 == 0
    per_step = (y.detach().view(shape) for y in (entropy, logprobs, ends))
    advantages, returns = gae(*per_step, gamma=gamma, lam=0.95)
    loss, metrics = ppo_loss(
        logprobs, logprobs.detach(), advantages.flatten(), tokens % 5 != 0, values=lean, old_values=lean.detach(),
        returns=returns.flatten(), entropy=entropy, ref_logprobs=lean.detach(), clip_range=clip, value_clip_range=clip,
        entropy_coef=0.1, kl_coef=0.1,
    )  # fmt: skip
    grads = torch.autograd.grad(loss, (logits, x, weight))
    return [logprobs, entropy, lean, advantages, returns, loss, *metrics.values(), *grads]


def test_the_last_slab_of_an_odd_vocabulary():
    """Its rows begin at every place between two multiples of 16 bytes."""
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 64, device="cuda", requires_grad=True) for n in (4096, 5001))
    words = torch.randint(5001, (4096,), device="cuda")
    results = []
    for call, dtype in ((linear_token_logprobs, torch.float32), (reference.linear_token_logprobs, torch.float64)):
        outs = call(hidden.to(dtype), weight.to(dtype), words, return_entropy=True)
        results.append([*outs, *torch.autograd.grad(outs[0].sum() + outs[1].sum(), (hidden, weight))])
    for got, exact in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), exact.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("vocabulary", [32000, 50257, 128256, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_vocabularies(oracle, vocabulary, dtype):
    logits, tokens = rows(16, vocabulary, dtype)
    outs = token_logprobs(logits, tokens, return_entropy=True)
    exact = oracle(logits.detach(), tokens)
    for got, truth in zip(outs, exact, strict=False):
        torch.testing.assert_close(got.double(), truth, rtol=2e-6, atol=1e-30)
    grad = torch.autograd.grad(outs[0].sum(), logits)[0]
    torch.testing.assert_close(grad.double(), exact[2], rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)


def test_more_than_two_to_the_31_elements(oracle):
    count, vocabulary = 16400, 131072
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    logits = torch.zeros(count, vocabulary, dtype=torch.bfloat16, device="cuda")
    logits[-1, 5], logits[-1, vocabulary - 1] = 3.0, 2.0
    tokens = torch.full((count,), vocabulary - 1, device="cuda")
    out = token_logprobs(logits.requires_grad_(), tokens)
    exact = oracle(logits[-1:].detach(), tokens[-1:])
    torch.testing.assert_close(out[-1:].double(), exact[0], rtol=2e-6, atol=0)
    grad = torch.autograd.grad(out.sum(), logits)[0]
    torch.testing.assert_close(grad[-1:].double(), exact[2], rtol=1e-2, atol=1e-9)


def test_the_same_bits_every_time():
    first = everything(*rows())
    for _ in range(20):
        for a, b in zip(first, everything(*rows()), strict=True):
            assert torch.equal(a, b)


def test_no_host_sync():
    logits, tokens = rows()
    everything(logits, tokens)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # from here on a sync raises
    try:
        assert torch.cuda.get_sync_debug_mode() == 2
        everything(logits, tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_replays_them():
    logits, tokens = rows()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        everything(logits, tokens)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = everything(logits, tokens)
    for seed in range(3):
        torch.manual_seed(seed)
        logits.data.normal_()
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(captured, everything(logits, tokens), strict=True):
            torch.testing.assert_close(a, b)


def test_nothing_is_compiled_again_when_a_size_or_a_setting_changes(monkeypatch):
    import triton

    compiled = []
    for vocabulary in (2048, 2049, 512, 513):  # long and short rows, aligned and not: the variants there are
        everything(*rows(64, vocabulary))
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda *a, **k: compiled.append(k))
    for vocabulary, count in ((32000, 64), (50257, 128), (4096, 72), (999, 64), (512, 8)):
        everything(*rows(count, vocabulary), temperature=0.31, clip=0.13, gamma=0.5)
    assert not compiled


def test_a_token_outside_the_vocabulary_makes_its_row_nan_and_nothing_else():
    logits, tokens = rows(4, 1000)
    tokens[1], tokens[2] = 1000, -7
    out = token_logprobs(logits, tokens)
    assert out.isnan().tolist() == [False, True, True, False]


def test_another_device_than_the_current_one(oracle):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    logits = torch.randn(4, 100, device="cuda:1")
    tokens = torch.randint(100, (4,), device="cuda:1")
    torch.testing.assert_close(token_logprobs(logits, tokens).double(), oracle(logits, tokens)[0], rtol=2e-6, atol=0)
