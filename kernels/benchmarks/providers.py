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
# A module of fused/ may say what else is worth a try: each of its CANDIDATES takes the place of what its function
# `configuration` gives. For others the changes are here. `gae.configuration` gives a tile's rows and steps, and warps;
# `logprobs_backward.configuration` ends with the warps; `linear.plan` gives a slab's rows and columns.


def scaled(*factors: float) -> Callable[[Any], Any]:
    """Of a tuple of counts, each times its factor, from the last one back."""

    def change(default: Any) -> Any:
        ones = [1.0] * (len(default) - len(factors))
        return tuple(max(1, int(n * f)) for n, f in zip(default, [*ones, *factors], strict=True))

    return change


CHANGES: dict[str, tuple[str, dict[str, Callable[[Any], Any]]]] = {
    "logprobs_backward": ("configuration", {"backward: twice the warps": scaled(2)}),
    "linear": (
        "plan",
        {"a quarter of the slab": scaled(0.25), "half the slab": scaled(0.5), "twice the slab": scaled(2)},
    ),
    "gae": (
        "configuration",
        {
            "half the warps": scaled(0.5),
            "twice the warps": scaled(2),
            "half the rows": scaled(0.5, 1, 1),
            "twice the rows": scaled(2, 1, 1),
            "half the rows, twice the steps": scaled(0.5, 2, 1),
        },
    ),
}
MODULES = {"token_logprobs": ("logprobs", "logprobs_backward"), "linear_token_logprobs": ("linear",), "gae": ("gae",)}


def candidates(kernel: str) -> dict[str, Hook]:
    """What else a kernel could be launched with, by name. None where it is the reference that runs."""
    found: dict[str, Hook] = {}
    for name in MODULES.get(kernel.split(" ")[0], ()) if has_triton() else ():
        if importlib.util.find_spec(f"minirlhf_kernels.fused.{name}") is None:
            continue
        module = importlib.import_module(f"minirlhf_kernels.fused.{name}")
        for label, value in getattr(module, "CANDIDATES", {}).items():
            if value != getattr(module, "LONG", None):  # the default of long rows
                found[label] = Hook(name, "configuration", lambda _, value=value: value)
        function, changes = CHANGES.get(name, ("", {}))
        found |= {label: Hook(name, function, change) for label, change in changes.items()}
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
