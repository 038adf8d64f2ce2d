"""What is measured: inputs, and for each provider a call that takes them. A provider that cannot be imported is absent.

Every call gets the same inputs and returns the tensors that are compared with float64 and differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import minirlhf_kernels as ours
import torch
from minirlhf_kernels import reference
from torch import Tensor

Inputs = dict[str, Any]
Call = Callable[[Inputs], list[Tensor]]


@dataclass
class Case:
    kernel: str
    shape: str
    dtype: torch.dtype
    make: Callable[[], Inputs]
    calls: dict[str, Call]
    learns: tuple[str, ...]
    """Inputs that have a gradient; empty for a kernel without backward."""
    bytes_of: dict[str, float]
    """The fewest bytes each mode can move."""
    device: str = "cpu"
    small: bool = False
    """Bound by launches: timed as a replayed CUDA graph."""


def importable(load: Callable[[], Call]) -> Call | None:
    try:
        return load()
    except Exception as error:  # a peer may fail to import in many ways, and none of them is ours to repair
        print(f"  ({load.__name__} is not here: {type(error).__name__})")
        return None


def providers(**loaders: Callable[[], Call]) -> dict[str, Call]:
    found = {name.replace("_", " "): importable(load) for name, load in loaders.items()}
    return {name: call for name, call in found.items() if call is not None}


def compiled(call: Call) -> Callable[[], Call]:
    def torch_compile() -> Call:
        torch._dynamo.reset()  # a case starts afresh: its shapes shouldn't count as another's recompilations
        fast = torch.compile(call)
        return lambda x: fast(x)

    return torch_compile


# ---------------------------------------------------------------- token_logprobs


def naive_logprobs(x: Inputs) -> list[Tensor]:
    log_p = x["logits"].float().log_softmax(-1)
    out = [log_p.gather(-1, x["tokens"].unsqueeze(-1)).squeeze(-1)]
    return [*out, -(log_p.exp() * log_p).sum(-1)] if x["entropy"] else out


def our_logprobs(x: Inputs) -> list[Tensor]:
    out = ours.token_logprobs(x["logits"], x["tokens"], return_entropy=x["entropy"])
    return list(out) if x["entropy"] else [out]


def trl_logprobs() -> Call:
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    if not torch.cuda.is_available():
        raise ImportError("a Triton kernel")
    return lambda x: list(selective_log_softmax_and_entropy(x["logits"], x["tokens"]))[: 1 + x["entropy"]]


def liger_logprobs() -> Call:
    from liger_kernel.transformers.functional import liger_cross_entropy

    if not torch.cuda.is_available():
        raise ImportError("a Triton kernel")
    # Its backward is done in forward, over the logits: it gets its own copy, and no entropy.
    return lambda x: [-liger_cross_entropy(x["logits"].clone(), x["tokens"], reduction="none").float()]


def token_logprobs(rows: int, vocabulary: int, dtype: torch.dtype, device: str, entropy: bool, batch: int = 1) -> Case:
    def make() -> Inputs:
        g = torch.Generator(device).manual_seed(0)
        shape = (rows,) if batch == 1 else (batch, rows // batch)
        # As peaked as a trained policy's, with tokens drawn from it: the highest logit + Gumbel noise.
        logits = (4 * torch.randn(*shape, vocabulary, device=device, generator=g)).to(dtype)
        noise = torch.rand(*shape, vocabulary, device=device, generator=g).clamp_(1e-9).log_().neg_().log_()
        tokens = (logits - noise).argmax(-1)
        return {"logits": logits.requires_grad_(), "tokens": tokens, "entropy": entropy}

    read = rows * vocabulary * dtype.itemsize
    return Case(
        "token_logprobs" + (" + entropy" if entropy else ""), f"{rows} x {vocabulary}", dtype, make,
        providers(
            minirlhf=lambda: our_logprobs, pytorch=lambda: naive_logprobs, torch_compile=compiled(naive_logprobs),
            trl=trl_logprobs, liger=liger_logprobs,
        ),
        ("logits",), {"forward": read, "backward": 2 * read, "full": 3 * read}, device,
    )  # fmt: skip


# ---------------------------------------------------------------- linear_token_logprobs


def naive_linear(x: Inputs) -> list[Tensor]:
    log_p = (x["hidden"] @ x["weight"].t()).float().log_softmax(-1)
    return [log_p.gather(-1, x["tokens"].unsqueeze(-1)).squeeze(-1)]


def cut_cross_entropy() -> Call:
    from cut_cross_entropy import linear_cross_entropy

    return lambda x: [-linear_cross_entropy(x["hidden"], x["weight"], x["tokens"], reduction="none").float()]


def linear_token_logprobs(rows: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: str) -> Case:
    def make() -> Inputs:
        g = torch.Generator(device).manual_seed(0)
        x, w = (torch.randn(n, hidden, device=device, generator=g) for n in (rows, vocabulary))
        return {
            "hidden": x.to(dtype).requires_grad_(),
            "weight": (w / hidden**0.5).to(dtype).requires_grad_(),
            "tokens": torch.randint(vocabulary, (rows,), device=device, generator=g),
        }

    size = dtype.itemsize * hidden * (rows + vocabulary)
    return Case(
        "linear_token_logprobs", f"M={rows} H={hidden} V={vocabulary}", dtype, make,
        providers(
            minirlhf=lambda: lambda x: [ours.linear_token_logprobs(x["hidden"], x["weight"], x["tokens"])],
            pytorch=lambda: naive_linear, torch_compile=compiled(naive_linear), cut_cross_entropy=cut_cross_entropy,
        ),
        ("hidden", "weight"), {"forward": size, "backward": 2 * size, "full": 3 * size}, device,
    )  # fmt: skip


# ---------------------------------------------------------------- ppo_loss


def ppo_call(function: Callable[..., Any]) -> Call:
    def call(x: Inputs) -> list[Tensor]:
        loss, metrics = function(**x, value_clip_range=0.2, entropy_coef=0.01, kl_coef=0.05)
        return [loss, *(metrics[name] for name in sorted(metrics))]

    return call


def ppo_loss(tokens: int, device: str) -> Case:
    def make() -> Inputs:
        g = torch.Generator(device).manual_seed(0)
        names = ("old_logprobs", "advantages", "old_values", "returns", "ref_logprobs", "logprobs", "values", "entropy")
        x: Inputs = {name: torch.randn(tokens, device=device, generator=g) for name in names}
        for name in ("logprobs", "values"):
            x[name] = x["old_" + name] + 0.1 * x[name]
        for name in ("logprobs", "values", "entropy"):
            x[name].requires_grad_()
        return x | {"response_mask": torch.rand(tokens, device=device, generator=g) < 0.8, "denominator": 0.8 * tokens}

    return Case(
        "ppo_loss", f"{tokens} tokens", torch.float32, make,
        providers(
            minirlhf=lambda: ppo_call(ours.ppo_loss), pytorch=lambda: ppo_call(reference.ppo_loss),
            torch_compile=compiled(ppo_call(reference.ppo_loss)),
        ),
        ("logprobs", "values", "entropy"), {"forward": 41 * tokens, "backward": 21 * tokens, "full": 45 * tokens},
        device, small=True,
    )  # fmt: skip


# ---------------------------------------------------------------- gae


def gae_loop(x: Inputs) -> list[Tensor]:
    """The loop that every textbook and most projects have."""
    r, v, gamma, lam = x["rewards"], x["values"], 0.99, 0.95
    live, after, running = (~x["ends"]).to(r.dtype), x["last_values"], torch.zeros_like(x["last_values"])
    advantages = torch.zeros_like(r)
    for t in reversed(range(r.shape[1])):
        delta = r[:, t] + gamma * after * live[:, t] - v[:, t]
        running = delta + gamma * lam * live[:, t] * running
        advantages[:, t], after = running, v[:, t]
    return [advantages, advantages + v]


def our_gae(x: Inputs) -> list[Tensor]:
    return list(ours.gae(x["rewards"], x["values"], x["ends"], gamma=0.99, lam=0.95, last_values=x["last_values"]))


def torchrl_gae() -> Call:
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    def call(x: Inputs) -> list[Tensor]:
        following = torch.cat((x["values"][:, 1:], x["last_values"][:, None]), 1)
        v, n, r, e = (y.unsqueeze(-1) for y in (x["values"], following, x["rewards"], x["ends"]))
        return [y.squeeze(-1) for y in vec_generalized_advantage_estimate(0.99, 0.95, v, n, r, e, e)]

    return call


def gae(rows: int, steps: int, device: str) -> Case:
    def make() -> Inputs:
        g = torch.Generator(device).manual_seed(0)
        r, v = (torch.randn(rows, steps, device=device, generator=g) for _ in range(2))
        ends = torch.rand(rows, steps, device=device, generator=g) < 0.01
        return {
            "rewards": r,
            "values": v,
            "ends": ends,
            "last_values": torch.randn(rows, device=device, generator=g),
        }

    calls = providers(minirlhf=lambda: our_gae, python_loop=lambda: gae_loop, torchrl=torchrl_gae)
    return Case(
        "gae", f"{rows} x {steps}", torch.float32, make, calls, (), {"forward": 17.0 * rows * steps}, device, small=True
    )


def all_cases(device: str) -> Iterator[Callable[[], Case]]:
    """One at a time, so that no two cases' tensors are in memory together."""
    if device == "cuda":
        for vocabulary in (32000, 50257, 128256, 151936):
            for entropy in (True, False):
                yield lambda v=vocabulary, e=entropy: token_logprobs(8192, v, torch.bfloat16, device, e)
        yield lambda: linear_token_logprobs(4096, 4096, 128256, torch.bfloat16, device)
        yield lambda: ppo_loss(65536, device)
        for rows, steps in ((8192, 128), (8192, 1024), (8192, 4096), (32768, 8)):
            yield lambda n=rows, t=steps: gae(n, t, device)
    else:
        for rows, vocabulary, batch in ((5120, 113, 128), (5120, 301, 128), (5120, 512, 128), (256, 32000, 8)):
            for entropy in (False, True):
                yield lambda n=rows, v=vocabulary, e=entropy, b=batch: token_logprobs(n, v, torch.float32, device, e, b)
        yield lambda: linear_token_logprobs(512, 96, 4096, torch.float32, device)
        yield lambda: ppo_loss(5120, device)
        for rows, steps in ((8, 128), (128, 40), (8, 2048), (256, 1024), (32768, 8)):
            yield lambda n=rows, t=steps: gae(n, t, device)
