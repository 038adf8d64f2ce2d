"""Compile every kernel for real GPUs on a machine that has none: `python compile_ahead.py` prints a line a kernel.

Run by test_compilation.py in a process of its own, because the other tests import triton as an interpreter. The
launchers run on CPU tensors; in place of each launch its kernel is compiled, with the signature the launch would have.

For Hopper the machine code is read too: registers, bytes spilled, and the instructions of each loop that moves 16 bytes
a thread at once. Such a loop is bound by the memory only if it has few of them: an H200 that reads bfloat16 at the
speed of its memory has time for about 15 instructions a number, 30 if it writes as many.
"""

import inspect
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from minirlhf_kernels import fused
from minirlhf_kernels.fused import linear
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
done = set()


def machine_code(binary: bytes) -> str:
    """What the disassembler says of a Hopper kernel, in one line."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)

        def tool(name, *options):
            command = [getattr(triton.knobs.nvidia, name).path, *options, path]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, listing = tool("cuobjdump", "-res-usage"), tool("nvdisasm", "-c")
    (registers,), (spilled,) = re.findall(r"REG:(\d+)", usage), re.findall(r"STACK:(\d+)", usage)
    labels, code, loops = {}, [], []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(instruction[1])
            if (back := re.search(r"BRA.*`\((\.L_\w+)\)", code[-1])) and back[1] in labels:
                body = code[labels[back[1]] :]
                if any("LDG.E.128" in x for x in body):
                    meets = any(re.search(r"\b(BAR|SHFL)\b", x) for x in body)
                    loops.append(f"{len(body)}{' with threads that wait' if meets else ''}")
    return f"{registers} registers, {spilled} bytes spilled, instructions of loops: {', '.join(loops) or 'none'}"


def compile_instead(self, *args, grid, warmup=False, num_warps=4, **options):
    names = list(inspect.signature(self.fn).parameters)
    bound = dict(zip(names, args, strict=False)) | options
    signature, constants, attrs = {}, {}, {}
    for i, parameter in enumerate(self.params):
        value = bound[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        else:
            signature[parameter.name] = parameter.annotation_type or mangle_type(value)
            if hasattr(value, "data_ptr") and value.data_ptr() % 16 == 0:  # as a launch would find it
                attrs[(i,)] = [["tt.divisibility", 16]]
    key = self.fn.__module__, self.fn.__name__, str(signature), str(constants), str(attrs)
    if key in done:
        return
    done.add(key)
    for name, target in TARGETS.items():
        source = ASTSource(self, signature, constants, attrs)
        binary = triton.compile(source, target=target, options={"num_warps": num_warps})
        shared = binary.metadata.shared
        types = "/".join(dict.fromkeys(t.strip("*") for t in signature.values() if t.startswith("*")))
        flags = [k for k, v in bound.items() if v is True and k.isupper()]
        said = f"{self.fn.__name__} {name} ok, {types}, {' '.join(flags)}, {num_warps} warps, {shared} bytes shared"
        print(said + (f", {machine_code(binary.asm['cubin'])}" if name == "sm_90" else ""))


JITFunction.run = compile_instead


def main() -> None:
    def numbers(*shape, dtype=torch.float32):
        return torch.randn(shape).to(dtype).requires_grad_()

    tokens, mask = torch.randint(64, (3, 5)), torch.ones(3, 5, dtype=torch.bool)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for columns in (64, 4096, 5001):
            outs = fused.token_logprobs(numbers(3, 5, columns, dtype=dtype), tokens, mask=mask, return_entropy=True)
            sum(o.sum() for o in outs).backward()
    for columns in (64, 5001):
        fused.token_logprobs(numbers(3, 5, columns, dtype=torch.bfloat16), tokens).sum().backward()
    whole = torch.randn(3, 6, 5001).bfloat16()  # a causal model's slices, of an odd vocabulary
    for sliced in (whole[:, :-1], whole[:, 1:]):
        outs = fused.token_logprobs(sliced.detach().requires_grad_(), tokens, mask=mask, return_entropy=True)
        sum(o.sum() for o in outs).backward()
    half = numbers(3, 5, 8, dtype=torch.bfloat16), numbers(600, 8, dtype=torch.bfloat16)
    fused.linear_token_logprobs(*half, tokens).sum().backward()
    outs = fused.linear_token_logprobs(numbers(3, 5, 8), numbers(600, 8), tokens, return_entropy=True)
    sum(o.sum() for o in outs).backward()
    linear.plan = lambda rows, vocabulary: (rows, 4096)  # a first slab, one between and a last one
    for entropy in (False, True):
        fused.linear_token_logprobs(numbers(3, 5, 8), numbers(9000, 8), tokens, return_entropy=entropy)
    x = [numbers(3, 5) for _ in range(8)]
    options = {"value_clip_range": 0.2, "entropy_coef": 0.1, "kl_coef": 0.1}
    named = {"values": x[3], "old_values": x[4], "returns": x[5], "entropy": x[6], "ref_logprobs": x[7]}
    fused.ppo_loss(*x[:3], mask, **named, **options)[0].backward()
    fused.ppo_loss(*x[:3], mask, denominator=3.0)[0].backward()
    fused.ppo_loss(*x[:3], mask, denominator=torch.tensor(3.0))[0].backward()
    for shape in ((3, 5), (3, 100), (3, 1000)):
        r, v, ends = torch.randn(shape), torch.randn(shape), torch.rand(shape) < 0.1
        fused.gae(r, v, ends, gamma=0.9, lam=0.9, last_values=r[:, 0], truncated_values=v, mask=~ends)
        fused.gae(r, v, ends, gamma=0.9, lam=0.9)


if __name__ == "__main__":
    main()
