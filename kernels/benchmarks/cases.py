"""What is measured, in order of worth: for each case its inputs, our call, the plain one, and who else has one.

Every call gets the same inputs and returns the tensors that are compared with float64 and differentiated. `plain` is
what everybody writes in PyTorch: on float64 inputs it is the truth, and it is what `torch.compile` gets.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import minirlhf_kernels as ours
import providers
import torch
from minirlhf_kernels import reference
from providers import Call, Inputs, Peer, Provider
from torch import Tensor

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Scale:
    """How large the cases are. `gpu` is what the tables show; `cpu` times the reference; `tiny` proves the scripts."""

    dtype: torch.dtype
    rows: int
    vocabularies: tuple[int, ...]
    linear: tuple[int, int, int]
    """Rows, hidden size, vocabulary."""
    tokens: int
    gae: tuple[tuple[int, int], ...]
    """Rows and steps; the first two are headlines, the last one is laid out as [T, N] too."""
    small: tuple[int, int]
    """Rows and vocabulary of eager calls so small that the host's part of them shows."""


GAE = ((8192, 4096), (32768, 8), (8192, 128), (8192, 1024))
SCALES = {
    "gpu": Scale(torch.bfloat16, 8192, (128256, 151936, 50257, 32000), (4096, 4096, 128256), 65536, GAE, (128, 2048)),
    "cpu": Scale(torch.float32, 256, (32000, 512), (512, 96, 4096), 5120, ((256, 1024), (32768, 8)), (128, 64)),
    "tiny": Scale(torch.bfloat16, 2, (40,), (2, 8, 40), 40, ((1, 5), (3, 2)), (2, 20)),
}


@dataclass
class Case:
    kernel: str
    shape: str
    dtype: torch.dtype
    make: Callable[[], Inputs]
    ours: Call
    plain: Call
    bytes_of: dict[str, float]
    """The fewest bytes that each mode can move."""
    learns: tuple[str, ...] = ()
    """Inputs that have a gradient; none: there is no backward."""
    per_row: tuple[str, ...] = ()
    """Inputs with one entry a row: of these the gate compares a few rows. None: it compares everything."""
    clock: str = "events"
    """events: each call between two events, its inputs far larger than the cache. graph: a replayed CUDA graph, for
    what takes microseconds. wall: an eager call as its user waits for it, one of many in a row."""
    name: str = "minirlhf"
    peers: dict[str, Peer] = field(default_factory=dict)
    plain_too: bool = True
    """Whether the plain call is a rival; a Python loop over thousands of steps isn't."""

    searched: bool = False
    """Whether other configurations of ours are tried."""
    compiles: bool = False
    """Whether torch.compile is a rival worth its minute."""

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def full_shape(self) -> str:
        return self.shape + (", eager calls" if self.clock == "wall" else "")

    @property
    def title(self) -> str:
        return f"{self.kernel} {self.full_shape} {self.dtype_name}"

    @property
    def own(self) -> Provider:
        return Provider(self.name, self.ours, ours=True)

    def with_candidates(self) -> list[Provider]:
        other = providers.candidates(self.kernel) if self.searched else {}
        return [self.own, *(replace(self.own, name=f"minirlhf, {label}", hook=hook) for label, hook in other.items())]

    def with_peers(self) -> list[Provider]:
        plain = [Provider("pytorch", self.plain)] if self.plain_too else []
        return [self.own, *plain, *(p for name, peer in self.peers.items() for p in peer.found(name))]

    def with_compiled(self, backend: str) -> list[Provider]:
        torch._dynamo.reset()  # else its shapes would count as another case's recompilations
        return [self.own, Provider("torch compile", torch.compile(self.plain, dynamic=False, backend=backend))]


# ---------------------------------------------------------------- token_logprobs, and straight from hidden states


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def plain_logprobs(x: Inputs, logits: Tensor, entropy: bool) -> list[Tensor]:
    log_p = wide(logits).log_softmax(-1)
    out = [log_p.gather(-1, x["tokens"].unsqueeze(-1)).squeeze(-1)]
    if entropy:
        out.append(-(log_p.exp() * log_p).sum(-1))
    return [torch.where(x["mask"], y, 0.0) for y in out] if "mask" in x else out


def our_logprobs(x: Inputs, entropy: bool) -> list[Tensor]:
    out = ours.token_logprobs(x["logits"], x["tokens"], mask=x.get("mask"), return_entropy=entropy)
    return list(out) if entropy else [out]


def rows_of_logits(rows: int, vocabulary: int, dtype: torch.dtype, device: str, kind: str) -> Inputs:
    """As a trained policy's: tokens are drawn from their rows. `peaked`: one word has 98 % of each row, and every
    fiftieth token is another one. `half masked`: every second row doesn't count."""
    g = torch.Generator(device).manual_seed(0)
    logits = torch.empty(rows, vocabulary, dtype=dtype, device=device)
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    for z, t in zip(logits.split(512), tokens.split(512), strict=True):  # float32 of all of them might not fit
        part = 4 * torch.randn(z.shape, device=device, generator=g)
        if kind == "peaked":
            leaders = torch.randint(vocabulary, (len(z), 1), device=device, generator=g)
            part.scatter_(1, leaders, part.logsumexp(-1, keepdim=True) + 3.9)  # 1 / (1 + exp(-3.9)) = 0.98
        z.copy_(part)
        t.copy_(z.float().softmax(-1).multinomial(1, generator=g).squeeze(-1))
    x: Inputs = {"logits": logits.requires_grad_(), "tokens": tokens}
    return x | ({"mask": torch.arange(rows, device=device) % 2 == 0} if kind == "half masked" else {})


def token_logprobs(
    rows: int, vocabulary: int, dtype: torch.dtype, device: str, entropy: bool = True, kind: str = "", **options: Any
) -> Case:
    peers = {"trl": Peer(providers.trl if entropy else providers.trl_logprobs_alone)}
    if kind != "half masked":
        peers["liger, no entropy" if entropy else "liger"] = Peer(providers.liger, writes_over=True)
    once, read = rows * vocabulary * dtype.itemsize, 0.5 if kind == "half masked" else 1.0
    return Case(
        "token_logprobs + entropy" if entropy else "token_logprobs",
        f"{rows} x {vocabulary}" + (f", {kind}" if kind else ""),
        dtype,
        functools.partial(rows_of_logits, rows, vocabulary, dtype, device, kind),
        lambda x: our_logprobs(x, entropy),
        lambda x: plain_logprobs(x, x["logits"], entropy),
        {"forward": read * once, "backward": (1 + read) * once, "full": (1 + 2 * read) * once},
        learns=("logits",),
        per_row=("logits", "tokens", "mask"),
        searched=entropy and kind != "half masked" and "clock" not in options,
        peers=peers,
        **options,
    )


def hidden_states(rows: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: str) -> Inputs:
    g = torch.Generator(device).manual_seed(0)
    x, w = (torch.randn(n, hidden, device=device, generator=g) for n in (rows, vocabulary))
    return {
        "hidden": x.to(dtype).requires_grad_(),
        "weight": (w / hidden**0.5).to(dtype).requires_grad_(),
        "tokens": torch.randint(vocabulary, (rows,), device=device, generator=g),
    }


def linear_token_logprobs(rows: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: str) -> Case:
    once = dtype.itemsize * hidden * (rows + vocabulary)
    return Case(
        "linear_token_logprobs",
        f"M={rows} H={hidden} V={vocabulary}",
        dtype,
        functools.partial(hidden_states, rows, hidden, vocabulary, dtype, device),
        lambda x: [ours.linear_token_logprobs(x["hidden"], x["weight"], x["tokens"])],
        lambda x: plain_logprobs(x, x["hidden"] @ x["weight"].t(), False),
        {"forward": once, "backward": 2 * once, "full": 3 * once},
        learns=("hidden", "weight"),
        per_row=("hidden", "tokens"),
        peers={"trl": Peer(providers.trl_linear), "cut cross entropy": Peer(providers.cut_cross_entropy)},
        searched=True,
        compiles=True,
    )


def products_alone(rows: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: str) -> Case:
    """The linear op's floor: the library's three products and nothing else (the op makes a fourth in backward)."""
    case = linear_token_logprobs(rows, hidden, vocabulary, dtype, device)
    product: Call = lambda x: [x["hidden"] @ x["weight"].t()]  # noqa: E731
    options = {"name": "library", "peers": {}, "plain_too": False, "searched": False, "compiles": False}
    return replace(case, kernel="the linear op's products alone", ours=product, plain=product, **options)


# ---------------------------------------------------------------- ppo_loss and gae


def ppo_call(function: Callable[..., Any]) -> Call:
    def call(x: Inputs) -> list[Tensor]:
        loss, metrics = function(**x, value_clip_range=0.2, entropy_coef=0.01, kl_coef=0.05)
        return [loss, *(metrics[name] for name in sorted(metrics))]

    return call


def tokens_of_a_batch(tokens: int, device: str) -> Inputs:
    g = torch.Generator(device).manual_seed(0)
    names = ("old_logprobs", "advantages", "old_values", "returns", "ref_logprobs", "logprobs", "values", "entropy")
    x: Inputs = {name: torch.randn(tokens, device=device, generator=g) for name in names}
    for name in ("logprobs", "values"):
        x[name] = x["old_" + name] + 0.1 * x[name]
    for name in ("logprobs", "values", "entropy"):
        x[name].requires_grad_()
    return x | {"response_mask": torch.rand(tokens, device=device, generator=g) < 0.8, "denominator": 0.8 * tokens}


def ppo_loss(tokens: int, device: str, clock: str = "graph") -> Case:
    return Case(
        "ppo_loss",
        f"{tokens} tokens",
        torch.float32,
        functools.partial(tokens_of_a_batch, tokens, device),
        ppo_call(ours.ppo_loss),
        ppo_call(reference.ppo_loss),
        {"forward": 41 * tokens, "backward": 21 * tokens, "full": 45 * tokens},
        learns=("logprobs", "values", "entropy"),
        clock=clock,
        compiles=True,
    )


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


def episodes(rows: int, steps: int, device: str, turned: bool) -> Inputs:
    """[N, T], or a view of it in memory laid out as [T, N], as a collector of environments writes it."""
    g = torch.Generator(device).manual_seed(0)
    r, v, e = (torch.randn(rows, steps, device=device, generator=g) for _ in range(3))
    x: Inputs = {"rewards": r, "values": v, "ends": e > 2.3}  # one in a hundred
    if turned:
        x = {name: y.t().contiguous().t() for name, y in x.items()}
    return x | {"last_values": torch.randn(rows, device=device, generator=g)}


def gae(rows: int, steps: int, device: str, turned: bool = False, clock: str = "graph") -> Case:
    return Case(
        "gae",
        f"{rows} x {steps}" + (", laid out as [T, N]" if turned else ""),
        torch.float32,
        functools.partial(episodes, rows, steps, device, turned),
        our_gae,
        gae_loop,
        {"forward": 17.0 * rows * steps},
        clock=clock,
        searched=clock == "graph",
        peers={"torchrl": Peer(providers.torchrl)},
        plain_too=steps <= 1024,
    )


def all_cases(scale: Scale, device: str) -> list[Case]:
    """In the order of their worth; their tensors are made when they are measured."""
    rows, dtype, words, (n, v) = scale.rows, scale.dtype, scale.vocabularies, scale.small
    return [
        token_logprobs(rows, words[0], dtype, device, compiles=True),
        linear_token_logprobs(*scale.linear, dtype, device),
        *(gae(*shape, device) for shape in scale.gae[:2]),
        ppo_loss(scale.tokens, device),
        *(token_logprobs(rows, w, dtype, device) for w in words[1:]),
        *(token_logprobs(rows, words[0], dtype, device, kind=kind) for kind in ("peaked", "half masked")),
        gae(*scale.gae[-1], device, turned=True),
        *(gae(*shape, device) for shape in scale.gae[2:]),
        token_logprobs(n, v, dtype, device, clock="wall"),
        ppo_loss(32 * n, device, clock="wall"),
        gae(n, 32, device, clock="wall"),
        token_logprobs(rows, words[0], dtype, device, entropy=False),
        products_alone(*scale.linear, dtype, device),
    ]
