"""The kernels that a learner writes in lesson 06, on tensors of a real size: its solutions, beside the package's."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import replace
from typing import Any

import cases
import torch
from cases import Case, Scale, our_gae
from providers import Inputs, Peer
from torch import Tensor

SOLUTIONS = cases.ROOT / "notebooks" / "solutions" / "06_triton_kernels.py"
CLIP = 0.2


@functools.cache
def kernel(name: str) -> Any:
    """A solution, compiled by Triton."""
    import triton

    spec = importlib.util.spec_from_file_location("lesson06_solutions", SOLUTIONS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return triton.jit(getattr(module, name))


def token_logprobs(x: Inputs) -> list[Tensor]:
    logits = x["logits"]
    out = torch.empty(len(logits), device=logits.device)
    block = 1024 if logits.is_cuda else 16
    kernel("my_token_logprobs")[(len(logits),)](
        logits, x["tokens"], out, logits.shape[1], logits.stride(0), BLOCK=block
    )  # fmt: skip
    return [out]


def clipped_loss(x: Inputs) -> list[Tensor]:
    new = x["logprobs"]
    losses, gradients = torch.empty_like(new), torch.empty_like(new)
    kernel("my_clipped_loss")[(-(-len(new) // 1024),)](
        new, x["old_logprobs"], x["advantages"], x["mask"], losses, gradients, len(new), 1 - CLIP, 1 + CLIP, BLOCK=1024
    )
    return [losses, gradients]


def plain_clipped_loss(x: Inputs) -> list[Tensor]:
    ratio = (x["logprobs"] - x["old_logprobs"]).exp()
    surrogate, clipped = ratio * x["advantages"], ratio.clamp(1 - CLIP, 1 + CLIP) * x["advantages"]
    stopped = clipped < surrogate
    losses, gradients = -torch.where(stopped, clipped, surrogate), torch.where(stopped, 0.0, -surrogate)
    return [torch.where(x["mask"], y, 0.0) for y in (losses, gradients)]


def gae(x: Inputs) -> list[Tensor]:
    advantages = torch.empty_like(x["rewards"])
    rows, steps = advantages.shape
    inputs = x["rewards"], x["values"], x["ends"], x["last_values"]
    tile = 1 << (steps - 1).bit_length()
    kernel("my_gae")[(rows,)](*inputs, advantages, steps, 0.99, 0.95, STEPS=tile)
    return [advantages]


def tokens_of_a_batch(tokens: int, device: str) -> Inputs:
    x = cases.tokens_of_a_batch(tokens, device)
    return {name: x[name].detach() for name in ("logprobs", "old_logprobs", "advantages")} | {
        "mask": x["response_mask"]
    }


def lesson_cases(scale: Scale, device: str) -> list[Case]:
    """Forward only, as in the lesson; beside each the package's own kernel on the same inputs, where it has one."""
    n, steps = scale.gae[-1]
    rows, words, tokens = scale.rows, scale.vocabularies[-1], scale.tokens
    logprobs = cases.token_logprobs(rows, words, torch.float32, device, entropy=False)
    advantages, loop = cases.gae(n, steps, device), cases.gae_loop
    make = functools.partial(tokens_of_a_batch, tokens, device)
    loss = Case(
        "clipped_loss", f"{tokens} tokens", torch.float32, make, clipped_loss, plain_clipped_loss,
        {"forward": 21.0 * tokens}, clock="graph",
    )  # fmt: skip
    lessons = (
        (logprobs, token_logprobs, {"minirlhf": Peer(lambda: logprobs.ours)}),
        (loss, clipped_loss, {}),
        (replace(advantages, plain=lambda x: loop(x)[:1]), gae, {"minirlhf": Peer(lambda: lambda x: our_gae(x)[:1])}),
    )
    return [
        replace(case, kernel=f"{case.kernel} of lesson 06", ours=call, name="lesson 06", peers=peers, learns=())
        for case, call, peers in lessons
    ]
