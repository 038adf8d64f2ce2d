"""Several processes: each takes its share of every batch's rows, and together they compute what one computes.

    torchrun --nproc-per-node 2 -m minirlhf run ...

A step's rows and random numbers depend only on (seed, name, step, row), so the processes agree on a batch without a
message. Each takes every N-th row. Losses are divided by the counts of the whole step, so gradients are summed (DDP
averages them, which is right only for equal shares). What must be known of all rows, such as advantages before they are
whitened, is filled in by the process that computed it and added up. With one process every function is the identity.

Sharding is FSDP2: each process keeps its part of every weight, gradient and Adam moment; a layer's weights are gathered
while it computes. So a sharded model's forwards and backwards must be as many in every process (`even`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minirlhf.errors import TrainingError, UserError

T = TypeVar("T")
Rows = TypeVar("Rows", list[int], Tensor)


class _Joined(NamedTuple):
    rank: int
    size: int
    store: dist.Store
    mesh: Any = None  # over which models are sharded


_joined: _Joined | None = None


@contextlib.contextmanager
def joined(device: torch.device, *, shard: bool = False) -> Iterator[None]:
    """Join the processes that torchrun started while the ``with`` body runs: gloo on CPUs, NCCL on GPUs.

    Args:
        device: of the models; each process takes the GPU of its local rank.
        shard: whether `shard` splits models over the processes.

    Raises:
        UserError: there is no GPU for each process, or there is only one process to shard over.
        TrainingError: another process ended.
    """
    global _joined
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        if shard:
            raise UserError("--shard: needs several processes: torchrun --nproc-per-node N -m minirlhf run ... --shard")
        yield
        return
    try:
        store, rank, size = next(dist.rendezvous("env://"))
        _joined = _Joined(rank, size, store)
        if device.type == "cuda":
            local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if device.index is not None:
                raise UserError(f"--device {device}: each of several processes has its own GPU; give --device cuda")
            if local >= gpus:
                raise UserError(f"each process needs its own GPU: torchrun --nproc-per-node {gpus}, or --device cpu")
            torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        if shard:
            _joined = _joined._replace(mesh=dist.device_mesh.init_device_mesh(device.type, (size,)))
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise TrainingError("another process of this run ended; run the same command again to continue") from error
    dist.destroy_process_group()
    _joined = None


def size() -> int:
    """The number of processes."""
    return 1 if _joined is None else _joined.size


def rank() -> int:
    """The number of this process, from 0. Rank 0 alone writes, prints and draws."""
    return 0 if _joined is None else _joined.rank


def speaks() -> bool:
    """Whether this process says what went wrong: of several that fail, the first."""
    if _joined is None:  # a wrong option, which every process sees
        return os.environ.get("RANK", "0") == "0"
    with contextlib.suppress(RuntimeError):  # if torchrun, which keeps the store, has ended
        return bool(_joined.store.add("failed", 1) == 1)
    return True


def agreed(value: bool) -> bool:
    """What rank 0 says."""
    return value if _joined is None else bool(sum_over_ranks(torch.tensor(int(value and rank() == 0))))


def barrier() -> None:
    """Wait until all processes are here."""
    sum_over_ranks(torch.zeros(()))


def my_rows(rows: Rows) -> Rows:
    """Every N-th of some rows: this process's share, which may be empty."""
    return rows if _joined is None else rows[_joined.rank :: _joined.size]


def sum_over_ranks(tensor: Tensor, op: str = "SUM") -> Tensor:
    """The sum (or MAX ...) of the processes' tensors, which have one shape."""
    if _joined is None:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total, getattr(dist.ReduceOp, op))
    return total


def gather(items: list[T]) -> list[T]:
    """The items of all processes, by rank."""
    if _joined is None:
        return items
    lists: list[list[T]] = [[] for _ in range(_joined.size)]
    dist.all_gather_object(lists, items)
    return [item for each in lists for item in each]


def even(groups: list[T], filler: T) -> list[tuple[T, float]]:
    """This process's micro-batches, of weight 1; if models are sharded, as many as anywhere: the rest of weight 0."""
    weighted = [(group, 1.0) for group in groups]
    if _joined is None or _joined.mesh is None:
        return weighted
    most = int(sum_over_ranks(torch.tensor(len(groups)), "MAX"))
    return weighted + [(filler, 0.0)] * (most - len(groups))


def clip_grad_norm_(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Sum the gradients over the processes, clip them to a norm, and return the norm before clipping."""
    parameters = list(parameters)
    own = [p for p in parameters if not hasattr(p, "full_tensor")]  # the others were summed in the backward
    if _joined is not None and own:
        # A parameter without a gradient anywhere keeps None, so that no optimizer decays it.
        used = sum_over_ranks(torch.tensor([int(p.grad is not None) for p in own])).tolist()
        works = []
        for parameter in [p for p, count in zip(own, used, strict=True) if count]:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
            works.append(dist.all_reduce(parameter.grad, async_op=True))
        for work in works:
            work.wait()
    return whole(torch.nn.utils.clip_grad_norm_(parameters, max_norm))


def shard(*models: Any) -> None:
    """Split models over the processes in place, where that was asked for: after the last copy, before the optimizer."""
    mesh = None if _joined is None else _joined.mesh
    if mesh is None:
        return
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for model in [model for model in models if not hasattr(model, "_compute")]:  # those that are not yet
        if hasattr(model, "peft_config"):
            raise UserError("--shard: not for adapters, whose gradients and moments are small; leave it out")
        layers = getattr(model, "_no_split_modules", None) or ()
        for module in (*(m for m in model.modules() if type(m).__name__ in layers), model):
            part = fully_shard(module, mesh=mesh, reshard_after_forward=True)
            part.set_gradient_divide_factor(1.0)  # a sum, as everywhere
            part.set_force_sum_reduction_for_comms(True)  # gloo has no other
        model._compute = lambda compute: compute()
        register_fsdp_forward_method(model, "_compute")


def within(model: Any, compute: Callable[[], T]) -> T:
    """What ``compute`` returns, computed where a sharded model's weights outside its layers are gathered."""
    result: T = model._compute(compute) if hasattr(model, "_compute") else compute()
    return result


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Gather all weights of a sharded model: inside, its forward does not involve the other processes."""
    parts: list[Any] = [m for m in model.modules() if hasattr(m, "unshard")] if hasattr(model, "_compute") else []
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    yield
    for part in parts:
        part.set_reshard_after_forward(True, recurse=False)
        part.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor, gathered; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
