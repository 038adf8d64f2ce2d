"""How often each call launches and how many variants of a kernel it compiles, counted on a GPU that isn't there.

A new length, vocabulary, temperature, discount, clip range, view or micro-batch must compile nothing: only types,
flags, and whether rows are short or long. Triton tells more apart unless it is told not to: whether an integer is 1 or
a multiple of 16, and whether a tensor begins at a multiple of 16 bytes, which the rows of a batch do by turns.
The counting needs triton's compiler in its process and the tests beside it need its interpreter: this file is a script
too, which prints what it counted.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from unittest import mock

import pytest
import torch
from minirlhf_kernels import gae, linear_token_logprobs, ppo_loss, token_logprobs
from torch.utils._python_dispatch import TorchDispatchMode

ROWS, STEPS = 6, 37  # of a batch; rows of 37 numbers begin at every alignment there is
WITHOUT_A_LAUNCH = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "alias", "promote_types"}
WITHOUT_A_LAUNCH |= {"as_strided", "view", "_unsafe_view", "expand", "select", "slice", "unbind", "unsqueeze", "t"}


def numbers(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()


def batch(*shape):
    """Tokens and a mask."""
    return torch.randint(2, shape), torch.ones(shape, dtype=torch.bool)


def micro_batches(*tensors):
    """Row by row, then the rows without the first one or the last one, then without the first step or the last one."""
    for i in range(ROWS):
        yield f"row {i}", [x[i : i + 1] for x in tensors]
    yield "rows 1 ...", [x[1:] for x in tensors]
    yield "rows ... 4", [x[:-1] for x in tensors]
    yield "steps 1 ...", [x[:, 1:] for x in tensors]
    yield "steps ... 35", [x[:, :-1] for x in tensors]


# Each of the following yields what a call is, the call, and what its gradients are taken of.


def calls_of_token_logprobs():
    def call(name, logits, tokens, mask, temperature=1.0):
        leaf, options = logits.detach().requires_grad_(), {"temperature": temperature, "mask": mask}
        return name, lambda: token_logprobs(leaf, tokens, return_entropy=True, **options), [leaf]

    half = torch.bfloat16
    for vocabulary in (2, 7, 16, 512, 513, 1023, 1024, 1025, 2048, 4099, 50257):
        yield call(f"whole, V={vocabulary}", numbers(2, 3, vocabulary, dtype=half), *batch(2, 3))
    for shape in ((1,), (16,), (17,), (1, 16), (2, 3, 4)):
        for vocabulary in (48, 1600):
            yield call(f"whole, {shape}, V={vocabulary}", numbers(*shape, vocabulary, dtype=half), *batch(*shape))
    for temperature in (1, 0.7, 16.0):
        yield call(f"temperature {temperature}", numbers(2, 3, 48, dtype=half), *batch(2, 3), temperature)
    for vocabulary in (48, 49, 1601):
        logits = numbers(ROWS, STEPS, vocabulary, dtype=half)
        for name, views in micro_batches(logits, *batch(ROWS, STEPS)):
            yield call(f"{name}, V={vocabulary}", *views)
        views = (x[:, 1:] for x in batch(ROWS, STEPS))
        yield call(f"a causal model's logits, V={vocabulary}", logits[:, :-1], *views)


def calls_of_linear_token_logprobs():
    def call(name, hidden, weight, tokens, mask, temperature=1.0):
        leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
        options = {"temperature": temperature, "mask": mask}
        return name, lambda: linear_token_logprobs(*leaves, tokens, return_entropy=True, **options), leaves

    for vocabulary in (2, 48, 513, 1024, 1025, 5001, 8192):
        for width in (4, 7):
            yield call(f"V={vocabulary}, H={width}", numbers(2, 3, width), numbers(vocabulary, width), *batch(2, 3))
    for temperature in (1, 0.7):
        yield call(f"one row, temperature {temperature}", numbers(1, 4), numbers(48, 4), *batch(1), temperature)
    hidden, weight = numbers(ROWS, STEPS, 4), numbers(49, 4)
    for name, (part, *rest) in micro_batches(hidden, *batch(ROWS, STEPS)):
        yield call(name, part, weight, *rest)


def calls_of_linear_token_logprobs_in_slabs():
    def call(rows, vocabulary):
        leaves, (tokens, mask) = [numbers(rows, 4), numbers(vocabulary, 4)], batch(rows)
        options = {"mask": mask, "return_entropy": True}
        return f"{rows} rows, V={vocabulary}", lambda: linear_token_logprobs(*leaves, tokens, **options), leaves

    with mock.patch("minirlhf_kernels.fused.linear.SLAB", 1):  # 256 words
        for rows, vocabulary in ((5, 900), (4, 901), (1, 1300), (16, 2048)):
            yield call(rows, vocabulary)


def calls_of_ppo_loss():
    def call(name, tensors, mask, number=0.2):
        names = "old_logprobs", "advantages", "old_values", "returns", "ref_logprobs"
        leaves = {
            k: x.detach().requires_grad_() for k, x in zip(("logprobs", "values", "entropy"), tensors, strict=False)
        }
        given = leaves | dict(zip(names, tensors[3:], strict=True)) | {"response_mask": mask}
        settings = ("clip_range", "value_clip_range", "value_coef", "entropy_coef", "kl_coef", "denominator")
        given |= dict.fromkeys(settings, number)
        return name, lambda: ppo_loss(**given)[0], list(leaves.values())

    for shape in ((1,), (16,), (2, 3), (512,), (8, 64), (7, 100)):
        yield call(f"whole, {shape}", [torch.randn(shape) for _ in range(8)], batch(*shape)[1])
    for number in (1, 1.0, 0.5, 16):
        yield call(f"whole, all settings {number}", [torch.randn(2, 3) for _ in range(8)], batch(2, 3)[1], number)
    for name, views in micro_batches(*(torch.randn(ROWS, STEPS) for _ in range(8)), batch(ROWS, STEPS)[1]):
        yield call(name, views[:8], views[8])


def calls_of_gae(lay=torch.clone):
    def call(name, rewards, ends, last, gamma=0.9):
        rewards, ends = (lay(x) if "whole" in name else x for x in (rewards, ends))
        options = {"last_values": last, "truncated_values": rewards, "mask": ends}
        return name, lambda: gae(rewards, rewards, ends, gamma=gamma, lam=gamma, **options), []

    for shape in ((1, 1), (1, 16), (16, 2), (3, 5), (64, 16), (3, 17), (5, 100), (2, 512), (2, 1000), (3, 1024)):
        yield call(f"whole, {shape}", torch.randn(shape), batch(*shape)[1], torch.randn(shape[0]))
    for gamma in (1, 1.0, 0, 0.5):
        yield call(f"whole, gamma {gamma}", torch.randn(3, 5), batch(3, 5)[1], torch.randn(3), gamma)
    last = torch.randn(ROWS)
    for name, views in micro_batches(lay(torch.randn(ROWS, STEPS)), lay(batch(ROWS, STEPS)[1])):
        yield call(name, *views, last[-len(views[0]) :])


def calls_of_gae_kept_as_steps_by_rows():
    yield from calls_of_gae(lambda x: x.t().contiguous().t())


class Operations(TorchDispatchMode):
    """Torch's own operations that would be a launch on a GPU."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name.partition("::")[2].rstrip("_")
        if name not in WITHOUT_A_LAUNCH:
            self.seen.append(name)
        return operation(*args, **(kwargs or {}))


def count(calls):
    from fake_driver import FakeDevice

    seen = []
    with FakeDevice() as device:
        for name, call, leaves in calls():
            device.launched, device.compiled = [], []
            with Operations() as operations:
                outs = call()
            if leaves:
                outs = outs if isinstance(outs, tuple) else (outs,)
                ups = [torch.ones_like(y) for y in outs]
                with operations:
                    torch.autograd.grad(outs, leaves, ups)
            launched, compiled = ([v.kernel for v in some] for some in (device.launched, device.compiled))
            said = [str(v) for v in device.compiled]
            seen.append(
                {"call": name, "launched": launched, "compiled": compiled, "said": said, "torch": operations.seen}
            )
    return seen


@pytest.fixture(scope="module")
def counts():
    """Of each function above, what was seen of its calls."""
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"MINIRLHF_KERNELS": "triton", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize(
    ("calls", "variants"),
    [  # two: for short rows and for long ones
        ("token_logprobs", {"logprobs.forward_kernel": 2, "logprobs.backward_kernel": 2}),
        ("linear_token_logprobs", {"linear.fold_kernel": 2, "logprobs.backward_kernel": 2}),
        # for the first slab of the vocabulary, those between, and the last
        ("linear_token_logprobs_in_slabs", {"linear.fold_kernel": 3, "logprobs.backward_kernel": 1}),
        ("ppo_loss", {"ppo.forward_kernel": 1, "ppo.backward_kernel": 1}),
        ("gae", {"gae.gae_kernel": 2}),
        # One of its own; a single row or number of it is contiguous again, and takes the two of [N, T].
        ("gae_kept_as_steps_by_rows", {"gae.gae_kernel": 3}),
    ],
)
def test_no_size_setting_view_or_micro_batch_compiles_a_variant_of_its_own(counts, calls, variants):
    seen = counts[calls]
    assert len(seen) >= 4 and all(one["launched"] for one in seen)
    said = sorted(f"{variant}, for {one['call']}" for one in seen for variant in one["said"])
    assert Counter(kernel for one in seen for kernel in one["compiled"]) == variants, "\n".join(said)


@pytest.mark.parametrize(
    ("calls", "launches", "of_torch"),
    [
        ("token_logprobs", ["logprobs.forward_kernel", "logprobs.backward_kernel"], []),
        ("ppo_loss", ["ppo.forward_kernel", "ppo.backward_kernel"], ["zeros"]),  # the ticket's 4 bytes
        ("gae", ["gae.gae_kernel"], []),
        ("gae_kept_as_steps_by_rows", ["gae.gae_kernel"], []),
    ],
)
def test_a_call_is_one_launch_and_its_backward_another(counts, calls, launches, of_torch):
    """And where nothing has to be copied because it is a view, none of torch's own comes with them."""
    assert {one["call"]: one["launched"] for one in counts[calls] if one["launched"] != launches} == {}
    whole = {one["call"]: one["torch"] for one in counts[calls] if one["call"].startswith("whole")}
    assert len(whole) >= 10 and {call: seen for call, seen in whole.items() if seen != of_torch} == {}


if __name__ == "__main__":
    prefix = "calls_of_"
    found = {name.removeprefix(prefix): calls for name, calls in list(globals().items()) if name.startswith(prefix)}
    print(json.dumps({name: count(calls) for name, calls in found.items()}))
