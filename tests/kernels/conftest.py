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
from hypothesis import HealthCheck, settings

GPU = torch.cuda.is_available()
if not GPU and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"

# Programs for processes of their own. --doctest-modules would import them here.
collect_ignore = ["compile_ahead.py", "fake_driver.py"]

# How many cases hypothesis draws for a property of a kernel; test_memory.py asks for fewer.
CASES = int(os.environ.get("MINIRLHF_KERNEL_CASES", "200"))
settings.register_profile(
    "kernels", max_examples=CASES, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=CASES < 200
)


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


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
            patch.setattr("minirlhf_kernels.fused.logprobs.SHORT", (16, 1, False))
            patch.setattr("minirlhf_kernels.fused.logprobs.LONG", (1024, 4, False))
            patch.setattr("minirlhf_kernels.fused.logprobs_backward.SHORT", (16, 1))
            patch.setattr("minirlhf_kernels.fused.logprobs_backward.LONG", (1024, 4))
            patch.setattr("minirlhf_kernels.fused.ppo.BLOCK", 16)
            plan = "minirlhf_kernels.fused.linear.plan"
            patch.setattr(plan, lambda rows, vocabulary: (max(1, min(rows, 4)), 21))
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


@pytest.fixture(scope="module")
def rounding(backend):
    """Bounds of log-probs and entropies in a type: relative, absolute. Near p = 1, where both are small, the definition
    log_softmax(z) is the difference of two numbers around 1; Triton's kernels keep all digits there."""

    def bounds(dtype, relative):
        return relative, 1e-36 if backend == "triton" else 8 * torch.finfo(dtype).eps

    return bounds


@pytest.fixture(scope="module")
def within_float32(rounding):
    """Whether numbers are as near to exact ones as float32 can bring a small number's logarithm or exponent."""

    def check(got, exact, allowed=2e-6):
        relative, absolute = rounding(torch.float32, allowed)
        # float32 holds an exponent of 70 to some 4e-6, so exp(-70) has that relative error whoever computes it.
        relative = relative + 2.0**-23 * exact.abs().clamp(min=1e-36).log().abs()
        near = (got.detach().double() - exact).abs() <= relative * exact.abs() + absolute
        assert near.logical_or(got == exact.float()).all(), (got, exact)

    return check
