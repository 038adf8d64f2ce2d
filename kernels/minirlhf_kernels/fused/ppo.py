"""PPO's loss on a GPU: what its two kernels (ppo_kernels.py) are launched with, and its registration."""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from minirlhf_kernels.checks import check_ppo, chosen
from minirlhf_kernels.fused.common import cdiv, compute_dtype, on_device_of, register
from minirlhf_kernels.fused.ppo_kernels import (
    BY_COUNT,
    BY_NUMBER,
    BY_TENSOR,
    COLUMNS,
    METRICS,
    backward_kernel,
    forward_kernel,
)

BLOCK = 512  # tokens of a program
LEARNS = 0, 4, 7  # logprobs, values, entropy


def launch_forward(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    entropy: Tensor | None,
    ref_logprobs: Tensor | None,
    denominator: Tensor | None,
    denominator_value: float | None,
    low: float,
    high: float,
    value_clip_range: float | None,
    value_coef: float,
    entropy_coef: float,
    kl_coef: float,
    k3_loss: bool,
    sequence_mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss (0-d), METRICS in one vector, and the gradients of logprobs and values times the denominator."""
    given = logprobs, old_logprobs, advantages, mask, values, old_values, returns, entropy, ref_logprobs
    if denominator is None and denominator_value is None and not mask.is_cuda and not bool(mask.any()):
        raise ValueError("no token counts: give the denominator of the whole optimizer step")
    if denominator is not None and denominator.device != mask.device:
        denominator_value, denominator = float(denominator), None
    mode = BY_TENSOR if denominator is not None else BY_COUNT if denominator_value is None else BY_NUMBER
    loss, metrics, grad_logprobs, grad_values = outputs = empty_outputs(*given)
    tokens, columns = mask.numel(), mask.shape[-1] if mask.dim() else 1
    programs = max(1, cdiv(tokens, BLOCK))
    table = metrics.new_empty((programs, COLUMNS.value))
    ticket = torch.zeros(1, dtype=torch.int32, device=mask.device)
    mask = mask.contiguous()
    with on_device_of(mask):
        forward_kernel[(programs,)](
            *(mask if x is None else x.contiguous() for x in given),
            mask.sum(-1) if sequence_mean else mask,
            mask if denominator is None else denominator,
            grad_logprobs, grad_values, table, ticket, loss, metrics, tokens, programs, columns,
            low, high, value_clip_range or 0.0, value_coef, entropy_coef, kl_coef, denominator_value or 0.0,
            VALUES=values is not None, VALUE_CLIP=value_clip_range is not None, ENTROPY=entropy is not None,
            REFERENCE=ref_logprobs is not None, K3=k3_loss, SEQUENCE_MEAN=sequence_mean,
            DENOMINATOR=mode.value,
            ACC=tl.float64 if loss.dtype == torch.float64 else tl.float32, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return outputs


def empty_outputs(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mask, values = inputs[3], inputs[4]
    loss = torch.empty((), dtype=compute_dtype(*inputs[:9]), device=mask.device)
    grad_values = loss.new_empty(mask.shape if values is not None else (0,))
    return loss, loss.new_empty(len(METRICS)), loss.new_empty(mask.shape), grad_values


def launch_backward(
    grad_loss: Tensor,
    metrics: Tensor,
    mask: Tensor,
    saved_logprobs: Tensor,
    saved_values: Tensor,
    entropy_coef: float,
    sequence_mean: bool,
    of_logprobs: torch.dtype | None,
    of_values: torch.dtype | None,
    of_entropy: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The three gradients in their inputs' types; one that isn't asked for is empty."""
    grads = empty_gradients(grad_loss, metrics, mask, of_logprobs, of_values, of_entropy)
    weighs = sequence_mean and of_entropy is not None  # the other gradients come with their weights
    if mask.numel() and (of_logprobs or of_values or of_entropy):
        with on_device_of(mask):
            backward_kernel[(cdiv(mask.numel(), BLOCK),)](
                grad_loss, metrics, mask.contiguous(), mask.sum(-1) if weighs else mask, saved_logprobs, saved_values,
                *grads,
                mask.numel(), mask.shape[-1] if mask.dim() else 1, entropy_coef,
                LOGPROBS=of_logprobs is not None, VALUES=of_values is not None, ENTROPY=of_entropy is not None,
                SEQUENCE_MEAN=weighs,
                ACC=tl.float64 if metrics.dtype == torch.float64 else tl.float32, BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
    return grads


def empty_gradients(grad_loss: Tensor, metrics: Tensor, mask: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    grads = [mask.new_empty(mask.shape if t else (0,), dtype=t or metrics.dtype) for t in others[-3:]]
    return grads[0], grads[1], grads[2]


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # the metrics have no gradient: zeros for them would be launches
    ctx.save_for_backward(output[1], inputs[3], output[2], output[3])
    ctx.entropy_coef, ctx.sequence_mean = inputs[15], inputs[18]
    ctx.dtypes = [None if inputs[i] is None else inputs[i].dtype for i in LEARNS]


def gradients(call: Any, ctx: Any, needed: Any, grad_loss: Tensor | None, *others: Any) -> tuple[Tensor | None, ...]:
    if grad_loss is None:  # nothing was made of the loss
        return (None,) * len(LEARNS)
    dtypes = [dtype if need else None for dtype, need in zip(ctx.dtypes, needed, strict=True)]
    grads = call(grad_loss, *ctx.saved_tensors, ctx.entropy_coef, ctx.sequence_mean, *dtypes)
    return tuple(None if dtype is None else grad for dtype, grad in zip(dtypes, grads, strict=True))


_call, forward_op, backward_op = register(
    "ppo_loss", launch_forward, empty_outputs, launch_backward, empty_gradients, save, gradients, learns=LEARNS
)


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    entropy: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    value_clip_range: float | None = None,
    value_coef: float = 0.5,
    entropy_coef: float = 0.0,
    kl_coef: float = 0.0,
    kl_estimator: str = "k2",
    loss_agg_mode: str = "token-mean",
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`reference.ppo_loss` in two kernels. On CUDA a mask that counts nothing gives NaN (no host sync)."""
    given = {"logprobs": logprobs, "old_logprobs": old_logprobs, "advantages": advantages, "values": values}
    given |= {"returns": returns, "old_values": old_values, "entropy": entropy, "ref_logprobs": ref_logprobs}
    check_ppo(given, response_mask, clip_range, clip_range_high, value_clip_range, entropy_coef, kl_coef)
    tensor = isinstance(denominator, Tensor)
    loss, metrics, *_ = _call(
        logprobs, old_logprobs, advantages, response_mask, values, old_values, returns, entropy, ref_logprobs,
        denominator if tensor else None, None if tensor or denominator is None else float(denominator),
        1.0 - clip_range, 1.0 + (clip_range if clip_range_high is None else clip_range_high),
        value_clip_range, float(value_coef), float(entropy_coef), float(kl_coef), *chosen(kl_estimator, loss_agg_mode),
    )  # fmt: skip
    absent = {"value/loss": values, "value/clip_fraction": value_clip_range}
    absent |= {"policy/entropy": entropy, "policy/ref_kl": ref_logprobs, "kl_loss": None, "denominator": None}
    pairs = zip(METRICS, metrics.unbind(), strict=True)
    return loss, {name: metric for name, metric in pairs if absent.get(name, loss) is not None}
