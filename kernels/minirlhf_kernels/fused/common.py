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
    learns: tuple[int, ...] = (),
    differentiable_outputs: int = 1,
    operator_backward: Callable[..., Any] | None = None,
) -> tuple[Callable[..., Any], Any, Any]:
    """An operation as (the call, its forward operator, its backward operator), for eager and for compiled code.

    forward(*inputs) and backward(...) launch kernels; `fake` and `fake_backward` take the same and give empty tensors
    of the same shapes, strides and types (for `operator_backward`, where backward's strides can't be promised).
    save(ctx, inputs, output) keeps what backward needs; gradients(call, ctx, needed, *grads) calls it, or its
    operator, and gives the gradients of the inputs numbered `learns`. The first `differentiable_outputs` of the outputs
    have one.

    A compiled graph sees operators minirlhf::name, whose bodies it does not look into. They cost some 15 us a call, so
    eager calls go to the launchers through an autograd.Function, whose forward takes ctx: torch would bind the
    signature of a setup_context again at every call. Of the inputs it is given those that learn; each costs half a
    microsecond.
    """
    forward_op = torch.library.custom_op(f"minirlhf::{name}", forward, mutates_args=())
    forward_op.register_fake(fake)
    if backward is None or fake_backward is None or save is None or gradients is None:
        return (lambda *inputs: (forward_op if torch.compiler.is_compiling() else forward)(*inputs)), forward_op, None
    backward_op = torch.library.custom_op(f"minirlhf::{name}_backward", operator_backward or backward, mutates_args=())
    backward_op.register_fake(fake_backward)
    keep, differentiate = save, gradients

    def gradients_of_operator(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = [ctx.needs_input_grad[i] for i in learns]
        given = dict(zip(learns, differentiate(backward_op, ctx, needed, *grads), strict=True))
        return tuple(given.get(i) for i in range(len(ctx.needs_input_grad)))

    forward_op.register_autograd(gradients_of_operator, setup_context=keep)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *learning_and_inputs: Any) -> Any:
            inputs = learning_and_inputs[-1]
            outputs = forward(*inputs)
            keep(ctx, inputs, outputs)
            ctx.mark_non_differentiable(*outputs[differentiable_outputs:])
            return outputs

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            # Only create_graph=True runs a backward with gradients on; once_differentiable would let some cases pass.
            if torch.is_grad_enabled():
                raise RuntimeError(
                    f"{name} is differentiable only once in Triton: set MINIRLHF_KERNELS=reference for more"
                )
            return (*differentiate(backward, ctx, ctx.needs_input_grad[:-1], *grads), None)

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward_op(*inputs)
        return Eager.apply(*[inputs[i] for i in learns], inputs)

    return call, forward_op, backward_op


def cdiv(total: int, size: int) -> int:
    """How many blocks of `size` cover `total` (triton.cdiv costs some microseconds on the host)."""
    return -(-total // size)


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
