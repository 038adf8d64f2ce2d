"""Every access to memory of every launch that the tests beside this one make, looked at by itself.

Under the interpreter a kernel may read or write next to a tensor, or two programs of a launch may write to the same
place, and the numbers come out right all the same. ttsem executes what Triton's compiler made of the kernel (its TTIR),
on the CPU, and knows whose each address is: the test that launched fails, with the line of the kernel. Memory that
nobody has written holds NaN, so a kernel that reads it fails by its results.

ttsem is young and not among the dependencies: `make proof` installs it, and so does CI.

It needs triton's compiler in its process and the tests beside this one need the interpreter: this file is a script too,
which runs those tests and prints what it looked at. Its arguments are pytest's.
"""

import contextlib
import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch

HERE = Path(__file__).parent
KERNELS = {
    "logprobs.forward_kernel",
    "logprobs.backward_kernel",
    "linear.fold_kernel",
    "ppo.forward_kernel",
    "ppo.backward_kernel",
    "gae.gae_kernel",
}
# Not of memory: torch.compile, how operators are registered. And 4 GiB, of which ttsem would make a copy.
LEFT_OUT = "compile or opcheck or registered or overflow_int32"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ttsem") is None, reason="ttsem is not installed: `make proof`")
def test_no_launch_reaches_outside_its_tensors_and_no_two_of_its_programs_race():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
    env |= {
        "MINIRLHF_KERNELS": "triton",
        "MINIRLHF_KERNEL_CASES": "15",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, __file__, "-q", "-k", f"triton and not ({LEFT_OUT})", "-p", "no:cacheprovider", HERE]
    run = subprocess.run(command, env=env, cwd=HERE.parents[1], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    seen = json.loads(run.stdout.splitlines()[-1])
    assert set(seen["launches"]) == KERNELS
    assert min(seen["launches"].values()) >= 20 and seen["by a ticket"] >= 20
    assert seen["not checked for races"] == 0


class Looker:
    """Takes the place of two functions of ttsem, and counts. ttsem would compile a kernel at every launch, and it knows
    no order between the programs of a launch."""

    def __init__(self, harness, find_race):
        self.harness, self.find = harness, find_race
        self.launches, self.tickets, self.texts = Counter(), 0, {}

    def ir_for_launch(self, record, stage, target):
        """Once for each variant, and no machine code."""
        file = record.fn.__module__.rpartition(".")[2]
        self.kernel = f"{file.partition('_')[0]}.{record.fn_name}"
        self.launches[self.kernel] += 1
        variant = self.harness._specialize(record.fn, record.args, record.kwargs, target)
        key = self.kernel, *map(str, variant)
        if key not in self.texts:
            text = self.harness._stage_text(record, stage, target)
            self.texts[key] = self.harness.mlir.to_generic(text, None)
        return self.texts[key]

    def find_race(self, log):
        """Every race but the ticket's. Each program of ppo_loss' forward writes its sums to a table and then draws a
        ticket: an atomic that acquires and releases (4). Who draws the last one reads what all wrote before they drew.
        So that one program's loads after the last draw are not shown to ttsem; all its stores are, and all else."""
        draws = [i for i, (_, kind, operation, *_) in enumerate(log or ()) if kind == "a" and "sem = 4" in operation]
        if draws and self.kernel == "ppo.forward_kernel":
            self.tickets += 1
            log = [entry for i, entry in enumerate(log) if i < draws[-1] or entry[1] != "r"]
        return self.find(log)


def main(arguments):
    import triton
    import triton.language as tl
    from ttsem import _fakedriver, harness, mlir, pidraces, sanitize

    @triton.jit
    def count_programs(x):
        tl.store(x, tl.program_id(0))

    @triton.jit
    def number(x):
        tl.store(x + tl.program_id(0), 1)

    def fault(kernel, programs):
        try:
            kernel[(programs,)](torch.zeros(4))
        except sanitize.KernelFault as stop:
            return stop.fault.kind

    torch.use_deterministic_algorithms(True)  # which also fills torch.empty with NaN
    mlir.enable_generic_printing()
    looker = Looker(harness, pidraces.find_race)
    replaced = [
        mock.patch.object(harness, "ir_for_launch", looker.ir_for_launch),
        mock.patch.object(pidraces, "find_race", looker.find_race),
        mock.patch.object(mlir, "parse", functools.cache(mlir.parse)),
    ]
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(sanitize.session(cuda_is_cpu=False))
        _fakedriver.unstub_torch_cuda()  # the tests are to know that there is no GPU
        for one in replaced:
            stack.enter_context(one)
        assert [fault(number, 4), fault(number, 5), fault(count_programs, 2)] == [None, "oob_write", "race"]
        from minirlhf_kernels import fused  # noqa: F401

        looker.launches.clear()
        for name, module in list(sys.modules.items()):
            if name.startswith("minirlhf_kernels.fused.") and hasattr(module, "INTERPRETED"):
                module.INTERPRETED = True  # what runs without a GPU, and with small tiles
        code = pytest.main(arguments)
    seen = {"launches": looker.launches, "variants": len(looker.texts), "by a ticket": looker.tickets}
    print(json.dumps(seen | {"not checked for races": session.races_unchecked}))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
