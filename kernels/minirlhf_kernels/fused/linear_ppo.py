"""PPO's loss from hidden states, the logits made once: forward already knows the loss, so it takes the gradient too.

For a few hundred rows at a time: one product makes their logits, the row kernel reads log p and entropy off them, the
PPO kernel gives the loss and its derivative by both, the backward kernel turns the logits into their gradient, and two
products carry it on to hidden states and weight. 6 M H V operations for M rows; the price is that the weight's gradient
is accumulated over all of them, in float32 [V, H]. What is kept is the gradient times the denominator, which is not
known before the last row; backward scales it by upstream gradient / denominator.
"""

from typing import Any

import torch
from torch import Tensor

from minirlhf_kernels.fused import logprobs as rows_of
from minirlhf_kernels.fused import ppo
from minirlhf_kernels.fused.linear import _operands, product, slices
from minirlhf_kernels.reference.linear import _check_linear
from minirlhf_kernels.reference.logprobs import _check_tokens, _checked_temperature, _counted_rows
from minirlhf_kernels.reference.ppo import _check

SLAB = 1 << 26  # logits in memory at once: 256 MiB of float32, and half of that again for their gradient


def launch_forward(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    ref_logprobs: Tensor | None,
    temperature: float,
    clip_range: float,
    value_clip_range: float | None,
    value_coef: float,
    entropy_coef: float,
    kl_coef: float,
    denominator: Tensor | None,
    chunk_size: int,
    of_hidden: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss (0-d), ppo.METRICS in one vector, and denominator times the gradients of hidden, weight and values."""
    if not tokens.is_cuda:
        _counted_rows(tokens, mask, tokens.shape, len(weight))
    if denominator is None and not mask.is_cuda and not bool(mask.any()):
        raise ValueError("no token counts: give the denominator of the whole optimizer step")
    x, w = _operands(torch.where(mask[:, None], hidden, 0), weight)
    dtype = ppo.compute_dtype(x, old_logprobs, advantages, values, old_values, returns, ref_logprobs)
    chunk = chunk_size or max(64, SLAB // len(weight))
    grad_hidden = x.new_zeros(x.shape if of_hidden else (0,), dtype=dtype)
    grad_weight = x.new_zeros(w.shape if of_weight else (0,), dtype=dtype)
    grad_values = x.new_zeros(mask.shape if values is not None else (0,), dtype=dtype)
    sums = []
    for part in slices(len(tokens), chunk):
        logits = product(x[part], w.t())
        logprobs, entropy, stats = rows_of.launch_forward(logits, tokens[part], mask[part], temperature, True, False)
        v, v_old, r, ref = (None if y is None else y[part] for y in (values, old_values, returns, ref_logprobs))
        loss, metrics, up, up_values = ppo.launch_forward(
            logprobs, old_logprobs[part], advantages[part], mask[part], v, v_old, r, entropy, ref,
            clip_range, value_clip_range, value_coef, entropy_coef, kl_coef, None, 1.0,
        )  # fmt: skip
        sums.append(torch.cat((metrics, loss[None])))
        if values is not None:
            grad_values[part] = up_values
        if of_hidden or of_weight:
            up_entropy = torch.full_like(up, -entropy_coef) if entropy_coef else None
            grad = rows_of.launch_backward(
                logits, tokens[part], mask[part], entropy, stats, up, up_entropy, temperature,
                out=torch.empty_like(logits, dtype=x.dtype),
            )  # fmt: skip
            if of_hidden:
                product(grad, w, into=grad_hidden[part])
            if of_weight:
                product(grad.t(), x[part], into=grad_weight)
    table = torch.stack(sums) if sums else grad_hidden.new_zeros(1, len(ppo.METRICS) + 1)
    divisor = (mask.sum() if denominator is None else denominator).to(dtype)
    total = table.sum(0) / divisor
    total[9], total[10] = divisor, table[:, 10].amax()
    return total[-1].clone(), total[:-1].clone(), grad_hidden, grad_weight, grad_values


forward_op = torch.library.custom_op("minirlhf::linear_ppo_loss", launch_forward, mutates_args=())


@forward_op.register_fake
def _(hidden: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    mask, values, (of_hidden, of_weight) = others[3], others[4], others[-2:]
    x = torch.promote_types(hidden.dtype, weight.dtype)
    floats = (others[1], others[2], *others[4:8])
    new = torch.empty((), dtype=ppo.compute_dtype(hidden.to(x), *floats), device=hidden.device)
    return (
        new,
        new.new_empty(len(ppo.METRICS)),
        new.new_empty(hidden.shape if of_hidden else (0,)),
        new.new_empty(weight.shape if of_weight else (0,)),
        new.new_empty(mask.shape if values is not None else (0,)),
    )


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.types = [None if x is None else x.dtype for x in (inputs[0], inputs[1], inputs[6])]


def _gradients(ctx: Any, up: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
    metrics, *saved = ctx.saved_tensors
    out: list[Tensor | None] = [None] * 20
    for i, grad, dtype in zip((0, 1, 6), saved, ctx.types, strict=True):
        if ctx.needs_input_grad[i]:
            out[i] = (grad * (up / metrics[9])).to(dtype)
    return tuple(out)


class LinearPPOLoss(torch.autograd.Function):
    forward = staticmethod(launch_forward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        setup_context(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, up: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("linear_ppo_loss is differentiable once: set MINIRLHF_KERNELS=reference for more")
        return _gradients(ctx, up)


forward_op.register_autograd(_gradients, setup_context=setup_context)


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    temperature: float = 1.0,
    clip_range: float = 0.2,
    value_clip_range: float | None = None,
    value_coef: float = 0.5,
    entropy_coef: float = 0.0,
    kl_coef: float = 0.0,
    denominator: Tensor | float | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`reference.linear_ppo_loss` with the logits made once."""
    temperature = _checked_temperature(temperature)
    _check_linear(hidden, weight, chunk_size)
    _check_tokens(tokens, response_mask, hidden.shape[:-1])
    given = {"old_logprobs": old_logprobs, "advantages": advantages, "values": values, "old_values": old_values}
    given |= {"returns": returns, "ref_logprobs": ref_logprobs, "entropy": old_logprobs}
    _check(given, response_mask, clip_range, value_clip_range, entropy_coef, kl_coef)
    if denominator is not None and not isinstance(denominator, Tensor):
        denominator = torch.full((), float(denominator), device=hidden.device)  # filled there: a copy would sync
    call = forward_op if torch.compiler.is_compiling() else LinearPPOLoss.apply
    tensors = (tokens, old_logprobs, advantages, response_mask, values, old_values, returns, ref_logprobs)
    wanted = (torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    loss, metrics, *_ = call(
        hidden.reshape(-1, hidden.shape[-1]), weight, *(None if x is None else x.reshape(-1) for x in tensors),
        temperature, float(clip_range), value_clip_range, float(value_coef), float(entropy_coef),
        float(kl_coef), denominator, chunk_size or 0, *wanted,
    )  # fmt: skip
    return loss, ppo.named(metrics, values, value_clip_range, old_logprobs, ref_logprobs)
