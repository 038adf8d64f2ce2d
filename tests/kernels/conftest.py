"""The Triton half is tested on real kernels where there is a GPU and in Triton's interpreter where there is none.

triton reads TRITON_INTERPRET once, when it is first imported. torch alone does not import it, so this file, loaded
before any test of the folder runs, is early enough. Nothing else in the test run is touched: without
MINIRLHF_KERNELS=triton, tensors on the CPU take the reference.
"""

import os
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.cuda.is_available()
if not GPU and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


@pytest.fixture(scope="module")
def triton_path():
    """The public calls take the Triton path, whatever the device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIRLHF_KERNELS", "triton")
        yield patch


@pytest.fixture(scope="module")
def small_blocks(triton_path):
    """Blocks of a few lanes, so that rows of a few logits cross many of them (GPUs need powers of two, 16 is one)."""
    from minirlhf_kernels.fused import linear, logprobs, ppo

    triton_path.setattr(logprobs, "SHORT", (16, 1))
    triton_path.setattr(logprobs, "LONG", (1024, 4))
    triton_path.setattr(ppo, "BLOCK", 16)
    triton_path.setattr(linear, "plan", lambda rows, vocabulary, chunk: (max(1, min(rows, chunk or 4)), 21))


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
