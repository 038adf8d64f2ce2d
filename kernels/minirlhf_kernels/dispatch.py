"""Choose the implementation: Triton for tensors on an NVIDIA GPU if triton is installed, else, silently, the reference.

`MINIRLHF_KERNELS=reference|triton` in the environment forces one of them, on an AMD GPU too, where nobody has run the
kernels yet. On the CPU Triton runs in its interpreter, slow but exact, for tests: also set TRITON_INTERPRET=1 before
triton is first imported.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from minirlhf_kernels import reference

F = TypeVar("F", bound=Callable[..., Any])

FORCE = "MINIRLHF_KERNELS"
HAS_TRITON = importlib.util.find_spec("triton") is not None


def path_for(x: Tensor) -> str:
    """The implementation, reference or triton, for tensors on x's device. Raises if the forced one can't run there."""
    forced = os.environ.get(FORCE, "")
    if forced == "":
        return "triton" if HAS_TRITON and x.is_cuda and torch.version.hip is None else "reference"
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
    """The public function: the reference `definition` or its Triton version. Triton is imported when first used."""

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
