"""A GPU that isn't there: Triton binds, specialises and caches for it as for a real one, and nothing runs.

    with FakeDevice(GPUTarget("cuda", 90, 32)) as device:
        gae(...)                        # tensors are on the CPU and say that they are on a GPU; the results are garbage
    device.launched                     # a Variant per launch
    device.compiled                     # the variants that had to be compiled for them

It needs a process in which triton was imported without TRITON_INTERPRET, so not that of the tests beside it.
"""

import contextlib
import itertools
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HOPPER = GPUTarget("cuda", 90, 32)


@dataclass
class Variant:
    """A kernel in the place of the compiled one in Triton's cache: what would be compiled, and `run` to launch it."""

    device: "FakeDevice"
    source: ASTSource
    options: dict[str, Any]
    function = packed_metadata = None  # a launch hands them on

    @property
    def kernel(self) -> str:
        """Of logprobs.py and of logprobs_backward.py: logprobs.forward_kernel, logprobs.backward_kernel."""
        file = self.source.fn.__module__.rpartition(".")[2]
        return f"{file.partition('_')[0]}.{self.source.fn.__name__}"

    @property
    def constants(self) -> dict[str, Any]:
        """The constexprs, and what Triton has made one: an integer that is 1."""
        return {self.source.fn.arg_names[path[0]]: value for path, value in self.source.constants.items()}

    def __str__(self) -> str:
        """Everything in which it may differ from another variant."""
        aligned = {self.source.fn.arg_names[path[0]] for path, attributes in self.source.attrs.items() if attributes}
        types = {name: kind for name, kind in self.source.signature.items() if kind != "constexpr"}
        said = [f"{name}: {kind}{' from 16' if name in aligned else ''}" for name, kind in types.items()]
        said += [f"{name}={value}" for name, value in self.constants.items()]
        return f"{self.kernel}({', '.join(said)}), {self.options['num_warps']} warps"

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *_: Any) -> None:
        self.device.launched.append(self)


class FakeDevice(contextlib.AbstractContextManager["FakeDevice"]):
    """Triton's driver and its compiler while open, and torch's one CUDA device."""

    numbers = itertools.count()  # every kernel keeps a cache per number

    def __init__(self, target: GPUTarget = HOPPER):
        self.target, self.number = target, next(self.numbers)
        self.launched: list[Variant] = []
        self.compiled: list[Variant] = []

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0

    def compile(self, source: ASTSource, target: GPUTarget, options: dict[str, Any], **_: Any) -> Variant:
        assert target == self.target
        self.compiled.append(Variant(self, source, options))
        return self.compiled[-1]

    def __enter__(self) -> "FakeDevice":
        triton.runtime.driver.set_active(self)
        self.patches = contextlib.ExitStack()
        # Where a kernel looks for its compiler when it first meets a device.
        self.patches.enter_context(mock.patch.object(triton.compiler, "compile", self.compile))
        self.patches.enter_context(mock.patch.object(torch.Tensor, "is_cuda", True))
        self.patches.enter_context(mock.patch.object(torch.cuda, "device", lambda _: contextlib.nullcontext()))
        return self

    def __exit__(self, *_: Any) -> None:
        self.patches.close()
