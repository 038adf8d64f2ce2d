"""Whose calls are timed: ours as it is launched by default, ours with other configurations, and other libraries."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
Call = Callable[[Inputs], list[Tensor]]


@dataclass(frozen=True)
class Hook:
    """A function of a module of `minirlhf_kernels.fused` that says how to launch, and a change of what it says."""

    module: str
    function: str
    change: Callable[[Any], Any]


@dataclass(frozen=True)
class Provider:
    name: str
    call: Call
    ours: bool = False
    """Held to more: the same bits twice, and no wait for the device."""
    writes_over: bool = False
    """It writes over its inputs, so it gets its own: no copy of them is timed."""
    hook: Hook | None = None

    @contextlib.contextmanager
    def active(self) -> Iterator[list[Any]]:
        """Its hook is in place; yields the list of the sizes for which the kernels ask it."""
        asked: list[Any] = []
        if self.hook is None:
            yield asked
            return
        module, name, change = self.hook.module, self.hook.function, self.hook.change
        place = importlib.import_module(f"minirlhf_kernels.fused.{module}")
        default = getattr(place, name)

        def candidate(*sizes: Any) -> Any:
            asked.append(sizes)
            return change(default(*sizes))

        setattr(place, name, candidate)
        try:
            yield asked
        finally:
            setattr(place, name, default)


# ---------------------------------------------------------------- ours, launched otherwise
# A module of fused/ may say what else is worth a try: its CANDIDATES, a name for each, are taken in place of what its
# `configuration(size)` gives. For the others the changes are here: `configuration` begins with the lanes of a block
# (gae: with a tile's rows) and ends with the warps; `linear.plan(rows, vocabulary)` gives a slab's rows and columns.


def warps(factor: float) -> Callable[[Any], Any]:
    return lambda default: (*default[:-1], max(1, int(factor * default[-1])))


def first(factor: float) -> Callable[[Any], Any]:
    return lambda default: (max(1, int(factor * default[0])), *default[1:])


def columns(factor: int) -> Callable[[Any], Any]:
    return lambda default: (default[0], factor * default[1])


CHANGES: dict[str, dict[str, tuple[str, Callable[[Any], Any]]]] = {
    "logprobs": {
        "twice the warps": ("configuration", warps(2)),
        "half the block": ("configuration", first(0.5)),
        "twice the block and the warps": ("configuration", lambda default: first(2)(warps(2)(default))),
    },
    "linear": {
        "twice the slab": ("plan", columns(2)),
        "4 times the slab": ("plan", columns(4)),
        "8 times the slab": ("plan", columns(8)),
    },
    "gae": {
        "half the warps": ("configuration", warps(0.5)),
        "twice the warps": ("configuration", warps(2)),
        "half the rows": ("configuration", first(0.5)),
        "twice the rows": ("configuration", first(2)),
    },
}
MODULES = {"token_logprobs": ("logprobs", "logprobs_backward"), "linear_token_logprobs": ("linear",), "gae": ("gae",)}


def candidates(kernel: str) -> dict[str, Hook]:
    """What else a kernel could be launched with, by name. None where it is the reference that runs."""
    found: dict[str, Hook] = {}
    for name in MODULES.get(kernel.split(" ")[0], ()) if has_triton() else ():
        try:
            module = importlib.import_module(f"minirlhf_kernels.fused.{name}")
        except ModuleNotFoundError:
            continue  # one file holds both directions
        default = module.configuration(1 << 20) if hasattr(module, "configuration") else None
        for label, value in getattr(module, "CANDIDATES", {}).items():
            if value != default:
                found[label] = Hook(name, "configuration", lambda _, value=value: value)
        for label, (function, change) in CHANGES.get(name, {}).items() if not hasattr(module, "CANDIDATES") else ():
            found[label] = Hook(name, function, change)
    return found


def has_triton() -> bool:
    """Whether Triton's kernels run here: on a GPU, or in the interpreter."""
    there = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
    return there and importlib.util.find_spec("triton") is not None


# ---------------------------------------------------------------- other libraries


@dataclass(frozen=True)
class Peer:
    load: Callable[[], Call]
    """Imports the library and returns the call."""
    writes_over: bool = False

    def found(self, name: str) -> list[Provider]:
        """The provider, or none where the library isn't here."""
        call = importable(self.load)
        return [] if call is None else [Provider(name, call, writes_over=self.writes_over)]


@functools.cache
def importable(load: Callable[[], Call]) -> Call | None:
    try:
        return load()
    except Exception as error:  # a library may fail to import in many ways, and none of them is ours to repair
        print(f"  ({load.__name__} is not here: {type(error).__name__}: {error})", flush=True)
        return None


def require_triton() -> None:
    if not has_triton():
        raise ImportError("a Triton kernel, and there is no GPU")


def trl() -> Call:
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    require_triton()
    return lambda x: list(selective_log_softmax_and_entropy(x["logits"], x["tokens"], row_mask=x.get("mask")))


def trl_logprobs_alone() -> Call:
    both = trl()
    return lambda x: both(x)[:1]


def liger() -> Call:
    from liger_kernel.transformers.functional import liger_cross_entropy

    require_triton()
    # Its backward is done in forward, over the logits, and there is no entropy.
    return lambda x: [-liger_cross_entropy(x["logits"], x["tokens"], reduction="none").float()]


def trl_linear() -> Call:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    require_triton()
    call = ChunkedLogProbFunction.apply
    # The last argument: no entropy, and nothing else. The one before the softcap: columns of a tile.
    return lambda x: [call(x["hidden"], x["weight"], None, x["tokens"], 1.0, 8192, None, 1.0, ())[0]]


def cut_cross_entropy() -> Call:
    from cut_cross_entropy import linear_cross_entropy

    require_triton()
    return lambda x: [-linear_cross_entropy(x["hidden"], x["weight"], x["tokens"], reduction="none").float()]


def torchrl() -> Call:
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    def call(x: Inputs) -> list[Tensor]:
        following = torch.cat((x["values"][:, 1:], x["last_values"][:, None]), 1)
        v, n, r, e = (y.unsqueeze(-1) for y in (x["values"], following, x["rewards"], x["ends"]))
        return [y.squeeze(-1) for y in vec_generalized_advantage_estimate(0.99, 0.95, v, n, r, e, e)]

    return call
