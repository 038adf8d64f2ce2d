"""Which half runs: Triton for tensors on a GPU where triton is installed, else the reference, silently.

`MINIRLHF_KERNELS=reference|triton` in the environment forces one of them. Triton on the CPU is its interpreter, slow
and exact, for tests: set TRITON_INTERPRET=1 as well, before triton is first imported.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import Tensor

from minirlhf_kernels import reference

F = TypeVar("F", bound=Callable[..., Any])

FORCE = "MINIRLHF_KERNELS"
HAS_TRITON = importlib.util.find_spec("triton") is not None


def path_for(x: Tensor) -> str:
    """Which half, reference or triton, runs for tensors on x's device. Raises if the forced one can't run there."""
    forced = os.environ.get(FORCE, "")
    if forced == "":
        return "triton" if HAS_TRITON and x.is_cuda else "reference"
    if forced == "reference":
        return "reference"
    if forced != "triton":
        raise ValueError(f"{FORCE} must be reference or triton, not {forced!r}")
    if not HAS_TRITON:
        raise RuntimeError(f"{FORCE}=triton, but triton is not installed: pip install triton, or unset {FORCE}")
    if not x.is_cuda and not _interpreted():
        raise RuntimeError(
            f"{FORCE}=triton, but the tensors are on {x.device}: move them to a GPU, unset {FORCE}, "
            "or set TRITON_INTERPRET=1 before Python starts (slow, for tests)"
        )
    return "triton"


def _interpreted() -> bool:
    from minirlhf_kernels.fused.common import INTERPRETED

    return INTERPRETED


def _either(definition: F) -> F:
    """The public call: `definition` from the reference, or its twin of the same name. Triton is imported when used."""

    @functools.wraps(definition)
    def call(*args: Any, **options: Any) -> Any:
        first = args[0] if args else next((x for x in options.values() if isinstance(x, Tensor)), None)
        if first is None or path_for(first) == "reference":
            return definition(*args, **options)
        from minirlhf_kernels import fused

        return getattr(fused, definition.__name__)(*args, **options)

    return cast(F, call)


token_logprobs = _either(reference.token_logprobs)
linear_token_logprobs = _either(reference.linear_token_logprobs)
ppo_loss = _either(reference.ppo_loss)
gae = _either(reference.gae)
