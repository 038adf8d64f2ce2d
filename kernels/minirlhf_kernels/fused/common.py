"""What every kernel's launcher needs: its device, its tensors' layout, the type to compute in, and its registration."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether Triton runs these kernels in Python, on numpy: TRITON_INTERPRET=1 when they were imported."""


def register(
    name: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    fake_backward: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
    gradients: Callable[..., tuple[Tensor | None, ...]] | None = None,
    differentiable: int = 1,
    operator_backward: Callable[..., Any] | None = None,
) -> tuple[Callable[..., Any], Any, Any]:
    """An operation as (the call, its forward operator, its backward operator), for eager and for compiled code.

    forward(*inputs) and backward(...) launch kernels; `fake` and `fake_backward` take the same and give empty tensors
    of the same shapes and types. save(ctx, inputs, outputs) keeps what backward needs, and
    gradients(backward, ctx, *grads) gives each input's gradient by one call of `backward` or of its operator. The first
    `differentiable` outputs have a gradient. Without a backward no gradient flows. An operator's outputs have the strides
    that its fake promises: operator_backward takes backward's place in it where backward has others.

    A compiled graph sees operators minirlhf::name, whose bodies it does not look into. They cost some 15 us a call, so
    eager calls go to the launchers through an autograd.Function, whose forward takes ctx (one with a setup_context of
    its own has its signature bound again by torch at every call).
    """
    forward_op = torch.library.custom_op(f"minirlhf::{name}", forward, mutates_args=())
    forward_op.register_fake(fake)
    if backward is None or fake_backward is None or save is None or gradients is None:
        return (lambda *inputs: (forward_op if torch.compiler.is_compiling() else forward)(*inputs)), forward_op, None
    backward_op = torch.library.custom_op(f"minirlhf::{name}_backward", operator_backward or backward, mutates_args=())
    backward_op.register_fake(fake_backward)
    forward_op.register_autograd(lambda ctx, *grads: gradients(backward_op, ctx, *grads), setup_context=save)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            outputs = forward(*inputs)
            save(ctx, inputs, outputs)
            ctx.mark_non_differentiable(*outputs[differentiable:])
            return outputs

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            # Only create_graph=True runs a backward with gradients on; once_differentiable would let some cases pass.
            if torch.is_grad_enabled():
                raise RuntimeError(f"{name} is differentiable once in Triton: set MINIRLHF_KERNELS=reference for more")
            return gradients(backward, ctx, *grads)

    eager = Eager.apply
    return (lambda *inputs: (forward_op if torch.compiler.is_compiling() else eager)(*inputs)), forward_op, backward_op


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Triton launches on the current device, which need not be the tensor's own."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float32, or float64 where any tensor is float64 (the proofs are)."""
    for x in tensors:
        if x is not None and x.dtype == torch.float64:
            return torch.float64
    return torch.float32


def as_rows(x: Tensor) -> tuple[Tensor, int, int, int]:
    """x [..., V] as a tensor whose row i starts at (i // inner) * outer_stride + (i % inner) * row_stride.

    Two strides describe `logits[:, :-1]`, the slice that every causal model takes, without copying it. What two
    strides can't describe, and rows whose elements are not neighbours, are copied once.
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
    """x's memory from the multiple of 16 bytes at or before its beginning, and how many numbers lie between.

    `logits[:, 1:]` of an odd vocabulary begins anywhere; the memory before it is still its own storage's.
    """
    numbers, bytes_left = divmod(x.data_ptr() % 16, x.element_size())
    if numbers == 0 or bytes_left or numbers > x.storage_offset():
        return x, 0
    return x.as_strided(x.shape, x.stride(), x.storage_offset() - numbers), numbers
