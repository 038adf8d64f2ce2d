"""What only the reference's way through rows on a CPU does: passes that it spares, room that it keeps between calls."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from minirlhf_kernels.reference import linear_token_logprobs, rows, token_logprobs


def test_what_is_read_in_a_pass_less(monkeypatch):
    """Log p alone, without a gradient, in a large call; not in a compiler's hands, whose a + c b rounds twice."""
    calls, at_once = [], rows._about_token_at_once
    monkeypatch.setattr(rows, "_about_token_at_once", lambda *args: calls.append(args) or at_once(*args))
    monkeypatch.setattr(rows, "_adds_at_once", lambda: True)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_half_precision_in_a_pass_less(oracle, within_float32, dtype, chunk, monkeypatch):
    """Flat and peaked rows, likely and hopeless tokens, all beside an offset. In eighths float32 holds each logit."""
    monkeypatch.setattr(rows, "_WORTH_IT", 0)  # one pass less even in a small call
    torch.manual_seed(11)
    scales = torch.tensor([0.5, 2.0, 8.0, 30.0]).repeat(4)
    hidden = (8 * scales[:, None] * torch.rand(16, 7)).round() / 8
    weight = (8 * torch.randn(45, 7)).round() / 8
    hidden[:, 6], weight[:, 6] = 100.0, 60.0
    hidden, weight, tokens = hidden.to(dtype), weight.to(dtype), torch.randint(45, (16,))
    logits = hidden.double() @ weight.double().t()
    assert (logits == logits.float()).all() and logits.abs().min() > 5000
    tokens[:8] = logits[:8].argmax(-1)
    got = linear_token_logprobs(hidden, weight, tokens, temperature=0.7, chunk_size=chunk)
    within_float32(got, oracle(logits, tokens, 0.7)[0])


@pytest.mark.parametrize("want_entropy", [False, True])
@pytest.mark.parametrize("chunk", [64, 128])
def test_the_gradient_of_hopeless_tokens(chunk, want_entropy):
    """Forward and backward must see the same logits, to the last digit, where 2^w of another word is enormous: a
    library's product of a few rows differs there from its product of many."""
    torch.manual_seed(10)
    hidden, weight, tokens = torch.randn(128, 64), torch.randn(2000, 64), torch.randint(2000, (128,))
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


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_of_one_batch_is_refused():
    with pytest.raises(RuntimeError, match=r"use torch\.compile"):
        torch.jit.trace(token_logprobs, (torch.randn(6, 37), torch.randint(37, (6,))))


def test_the_room_that_is_kept_is_nobody_else_s():
    """Calls under inference_mode or another default device, compiled ones and other threads' leave this thread's later
    calls as they were."""
    torch.manual_seed(8)
    logits, tokens = torch.randn(40, 301), torch.randint(301, (40,))
    for rooms in (rows.scratch.kept, rows.scratch.last):
        rooms.clear()
    with torch.device("meta"):
        results = [token_logprobs(logits, tokens, return_entropy=True)]
    expected = token_logprobs(logits, tokens, return_entropy=True)
    compiled = torch.compile(lambda z: token_logprobs(z, tokens, return_entropy=True), backend="aot_eager")
    with torch.inference_mode():
        results += [compiled(logits), token_logprobs(logits, tokens, return_entropy=True)]
    with ThreadPoolExecutor(4) as threads:
        results += threads.map(lambda _: token_logprobs(logits.clone(), tokens, return_entropy=True), range(16))
    first, second = (logits.clone().requires_grad_() for _ in range(2))
    outs = [token_logprobs(x, tokens, return_entropy=True) for x in (first, second * 2)]  # both, then both backwards
    sum(y.sum() for out in outs for y in out).backward()
    (alone,) = torch.autograd.grad(sum(token_logprobs(first, tokens, return_entropy=True)).sum(), first)
    torch.testing.assert_close(first.grad, alone, rtol=0, atol=0)
    for result in results:
        torch.testing.assert_close(result, expected)
