"""What all kernel launchers share: the choice of device, layout and compute type."""

import contextlib

import torch
import triton
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether Triton interprets these kernels in numpy: TRITON_INTERPRET=1 was set when they were imported."""


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Make x's device the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def refuse_second_derivative(name: str) -> None:
    # Only create_graph=True runs a backward with gradients on; torch's once_differentiable would let some cases pass.
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} is differentiable only once in Triton: set MINIRLHF_KERNELS=reference for more")


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float32, or float64 if any tensor is float64 (as in exact tests)."""
    wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32


def as_rows(x: Tensor) -> tuple[Tensor, int, int, int]:
    """x [..., V] as a tensor whose row i starts at (i // inner) * outer_stride + (i % inner) * row_stride.

    Two strides describe `logits[:, :-1]`, the slice that every causal model takes, without copying it. Layouts
    that two strides can't describe, and rows whose elements are not contiguous, are copied once.
    """
    if x.numel() == 0:
        return x, 1, 0, 0
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    shape, strides = x.shape[:-1], x.stride()[:-1]
    if len(shape) == 0:
        return x, 1, 0, 0
    if len(shape) == 1:
        return x, shape[0], 0, strides[0]
    if len(shape) > 2:
        for dim in range(len(shape) - 2):
            if shape[dim] > 1 and strides[dim] != strides[dim + 1] * shape[dim + 1]:
                x = x.contiguous()
                break
        strides = x.stride()[:-1]
    return x, shape[-1], strides[-2], strides[-1]


def from_16_bytes(x: Tensor) -> tuple[Tensor, int]:
    """x's memory from the multiple of 16 bytes at or before its start, and the number of elements in between.

    `logits[:, 1:]` of an odd vocabulary starts anywhere; the memory before it still belongs to its storage.
    """
    numbers, bytes_left = divmod(x.data_ptr() % 16, x.element_size())
    if numbers == 0 or bytes_left or numbers > x.storage_offset():
        return x, 0
    return x.as_strided(x.shape, x.stride(), x.storage_offset() - numbers), numbers
