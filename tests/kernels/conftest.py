"""Both halves are held to the same tests: the `backend` fixture runs them on the reference and on Triton.

Triton's kernels run on the GPU where there is one and in Triton's interpreter where there is none. triton reads
TRITON_INTERPRET once, when it is first imported. torch alone does not import it, so this file, loaded before any test
of the folder runs, is early enough. Nothing else in the test run is touched: without MINIRLHF_KERNELS=triton, tensors
on the CPU take the reference.
"""

import os
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.cuda.is_available()
if not GPU and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


@pytest.fixture(scope="module", params=["reference", "triton"])
def backend(request):
    """The public calls take this half; with Triton, new tensors are on the GPU where there is one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIRLHF_KERNELS", request.param)
        if request.param == "triton":
            pytest.importorskip("triton")
            # A vocabulary of a few hundred words is several slabs of the linear op.
            patch.setattr("minirlhf_kernels.fused.linear.SLAB", 1)
            if GPU:
                torch.set_default_device("cuda")
        yield request.param
        if GPU:
            torch.set_default_device(None)


@pytest.fixture(scope="module")
def small_blocks(backend):
    """Blocks of a few lanes, so that rows of a few logits cross many of them (GPUs need powers of two, 16 is one)."""
    with pytest.MonkeyPatch.context() as patch:
        if backend == "triton":
            patch.setattr("minirlhf_kernels.fused.logprobs.SHORT", (16, 1))
            patch.setattr("minirlhf_kernels.fused.logprobs.LONG", (1024, 4))
            patch.setattr("minirlhf_kernels.fused.ppo.BLOCK", 16)
            slabs = lambda rows, vocabulary, chunk: (max(1, min(rows, chunk or 4)), 21)  # noqa: E731
            patch.setattr("minirlhf_kernels.fused.linear.plan", slabs)
        yield


@pytest.fixture(scope="session")
def oracle():
    """Log-probabilities, entropy and both gradients (for upstream gradients of 1) in float64, with no cancellation."""

    def truth(logits, tokens, temperature=1.0):
        z = logits.double() / temperature
        u = z - z.amax(-1, keepdim=True)
        index = tokens.unsqueeze(-1)
        others = u.exp().scatter(-1, index, 0.0)
        rest, at = others.sum(-1), u.gather(-1, index).squeeze(-1)
        logprobs = -torch.nn.functional.softplus(rest.log() - at, beta=1, threshold=1e9)
        p = u.softmax(-1)
        below = u.exp().scatter(-1, u.argmax(-1, keepdim=True), 0.0)  # without the leader's 1
        u = u.clamp(min=-1e300)
        mean = (below * u).sum(-1) / (1 + below.sum(-1))
        entropy = below.sum(-1).log1p() - mean
        complement = (rest / (rest + at.exp())).unsqueeze(-1)
        grad = (-p).scatter(-1, index, complement) / temperature
        grad_entropy = -p * (u - mean.unsqueeze(-1)) / temperature  # log p + H = u - mean
        return logprobs, entropy, grad, grad_entropy

    return truth


@pytest.fixture(scope="session")
def within_float32():
    """Whether numbers are as near to exact ones as float32 can bring a small number's logarithm or exponent."""

    def check(got, exact, allowed=2e-6):
        # float32 holds an exponent of 70 to some 4e-6, so exp(-70) has that relative error whoever computes it.
        allowed = allowed + 2.0**-23 * exact.abs().clamp(min=1e-36).log().abs()
        near = (got.detach().double() - exact).abs() <= allowed * exact.abs() + 1e-36
        assert near.logical_or(got == exact.float()).all(), (got, exact)

    return check


class LargestMade(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation inside makes (not the interpreter's, of bytes)."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if torch.is_tensor(x) and x.dtype != torch.uint8:
                self.largest = max(self.largest, x.numel())
        return out


@pytest.fixture
def largest_made():
    return LargestMade()
