"""The parts that all training loops share: steps that can be killed and resumed, metrics, batches.

All randomness of a step comes from a generator seeded by (seed, name of the learner, step), so a resumed run needs no
saved random state: weights, optimizer moments and the step number give bit-identical results.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from minirlhf import parallel
from minirlhf.checkpoints import (
    STATE,
    differing,
    for_rank_zero,
    laid_out_as,
    load_state,
    made_with,
    place_of,
    save_state,
    write_text,
)
from minirlhf.errors import CheckpointError, TrainingError, require_installed, visible

Metrics = dict[str, float]


class Stateful(Protocol):
    """An object with a few numbers to save, such as the adaptive KL controller."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Recorder:
    """Runs a learner's steps, records its metrics, and lets a killed run resume.

    Without a folder it keeps the metrics in memory (for notebooks and small projects); with one it also writes
    ``metrics.jsonl`` and, every few seconds, ``state.safetensors``. Of several processes rank 0 writes and draws.

    Args:
        name: of the learner; labels the progress bar.
        folder: where to write, or None.
        save_seconds: seconds between two saved states; 0 saves after every step.
        show: the metrics to show in the progress bar.
        progress: whether to draw the progress bar.
        position: the line of the progress bar, if several are drawn.
        began: when the work began, by `time.monotonic`; default: now.
        tensorboard: whether to write TensorBoard events into the folder too.

    Raises:
        UserError: tensorboard is requested but not installed.

    Example:
        >>> recorder = Recorder("demo", progress=False)
        >>> for step in recorder.steps(2):
        ...     recorder.log({"demo/loss": 1.0 / (step + 1)})
        >>> [row["demo/loss"] for row in recorder.history]
        [1.0, 0.5]
    """

    def __init__(
        self,
        name: str,
        folder: Path | None = None,
        *,
        save_seconds: float = 10.0,
        show: Sequence[str] = (),
        progress: bool = True,
        position: int = 0,
        began: float | None = None,
        tensorboard: bool = False,
    ) -> None:
        self.name, self.folder, self.save_seconds = name, folder, save_seconds
        self._writes = folder is not None and parallel.rank() == 0
        self.show, self.progress, self.position = tuple(show), progress and parallel.rank() == 0, position
        self.history: list[Metrics] = []
        self.first_step = 0
        self.machines: list[dict[str, Any]] = []
        """Versions and threads that the step was trained with (see `made_with`): one entry unless they changed."""
        self.seconds = 0.0  # since the recorder was created, and in earlier sessions of this run; see `lap`
        self._began, self._earlier = time.monotonic() if began is None else began, 0.0
        self._models: dict[str, nn.Module] = {}
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        self._extras: dict[str, Stateful] = {}
        self._step = 0
        self._batch = self._advice = ""  # of the last loss that was checked
        self._saved: int | None = None  # the step of the state in the folder
        self._bar: Any = None
        self._board: Any = None  # TensorBoard's writer
        if tensorboard:
            require_installed("tensorboard", "tensorboard")
        self._tensorboard = tensorboard

    def track(
        self,
        models: dict[str, nn.Module],
        optimizers: dict[str, torch.optim.Optimizer],
        extras: dict[str, Stateful] | None = None,
    ) -> None:
        """Register what belongs to the state, and load the state of a killed run if there is one.

        From here on no optimizer takes a step on a gradient that is NaN or infinite.

        Raises:
            CheckpointError: the state is damaged or belongs to other models.
        """
        self._models, self._optimizers, self._extras = models, optimizers, extras or {}
        for optimizer in optimizers.values():
            optimizer.register_step_pre_hook(self._check_gradient)
        if self.folder is None:
            return
        state = self.folder / STATE
        if state.is_file():
            self._load(state)
        parallel.barrier()  # rank 0 changes the folder only when all have read it
        if not self._writes:
            return
        self._enter(made_with())
        self.folder.mkdir(parents=True, exist_ok=True)
        metrics = self.folder / "metrics.jsonl"
        # Rows that were logged after the saved state will be logged again: drop them.
        lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines() if metrics.is_file() else []
        self.history = [row for row in map(_row, lines) if row is not None and row["step"] < self.first_step]
        write_text(metrics, "".join(json.dumps(row) + "\n" for row in self.history))

    def _enter(self, now: dict[str, Any]) -> None:
        """Record what the step goes on with, and say so where it began with something else."""
        differ = differing(self.machines[-1], now) if self.machines else None
        if differ is not None:
            said = f"{self.folder}: begun with {differ[0]}; goes on with {differ[1]}, so its last bits may differ"
            print(visible(said), file=sys.stderr)
        if differ is not None or not self.machines:
            self.machines.append(now)

    def steps(self, total: int, done: Callable[[], int] | None = None) -> Iterator[int]:
        """Yield the remaining steps, saving the state in between.

        Args:
            total: the number of steps; with ``done``, the amount of something else, such as environment steps.
            done: returns how much of the total is done, called after every step; default: one per step.
        """
        from tqdm.auto import tqdm

        self._bar = tqdm(
            total=total,
            initial=self.first_step,
            desc=self.name,
            disable=not self.progress,
            dynamic_ncols=True,
            position=self.position,
            mininterval=0.5,
        )
        saved = time.monotonic()
        try:
            step = self.first_step
            while (step if done is None else done()) < total:
                self._step = step
                yield step
                step += 1
                self._bar.update(min(total, step if done is None else done()) - self._bar.n)
                now = time.monotonic()
                if self.folder is not None and step < total and parallel.agreed(now - saved >= self.save_seconds):
                    self._save(step)
                    saved = now
        finally:
            self._bar.close()
            self.lap()
            if self._board is not None:
                self._board.close()
                self._board = None
        if self.folder is not None:
            self._save(total)

    def log(self, metrics: Mapping[str, float | Tensor]) -> None:
        """Record one row of metrics for the current step (and write it, if there is a folder)."""
        row: Metrics = {"step": self._step}
        row |= {key: float(value.detach() if isinstance(value, Tensor) else value) for key, value in metrics.items()}
        self.history.append(row)
        if self._bar is not None:
            shown = {key.split("/")[-1]: f"{row[key]:.3g}" for key in self.show if key in row}
            self._bar.set_postfix(shown, refresh=False)
        if self._writes:
            assert self.folder is not None
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            if self._tensorboard:
                for key, value in metrics.items():
                    self._writer().add_scalar(key, value, self._step)

    def lap(self) -> float:
        """Update `seconds` to the time up to now and return it: loading and encoding count as part of a step."""
        self.seconds = self._earlier + time.monotonic() - self._began
        return self.seconds

    def check_finite(self, loss: Tensor, batch: str, advice: str = "") -> None:
        """Stop before a NaN or infinite loss reaches the weights.

        Raises:
            TrainingError: names the step, the batch and what to try.
        """
        self._batch = batch
        self._advice = advice or "lower the learning rate (--help names it) or check that batch for odd rows"
        value = float(loss.detach())
        if not math.isfinite(value):
            raise self._failure(f"the loss is {value}")

    def _check_gradient(self, optimizer: torch.optim.Optimizer, arguments: object, keywords: object) -> None:
        """Check each optimizer step's gradient: a finite loss can have a gradient that is not finite."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = float(parallel.whole(torch.nn.utils.get_total_norm(gradients)))  # much faster than checking each number
        if not math.isfinite(norm):
            raise self._failure(f"the gradient's norm is {norm}")

    def _failure(self, what: str, *, after: bool = False) -> TrainingError:
        message = f"{self.name}: {what} at step {self._step}"
        if self._batch:
            message += f", {self._batch}; {self._advice}"
        if self._step == 0 and not after:
            message += " (at the first step: the model it starts from may be at fault)"
        message += "."
        if self._saved is not None and self.folder is not None:
            message += (
                f" Delete {self.folder} to restart this step; the weights before step {self._saved}, all finite, "
                f"are in {self.folder / STATE}."
            )
        elif self.folder is not None:
            message += f" No state of it is saved in {self.folder}: rerun it with other settings."
        return TrainingError(message)

    def _writer(self) -> Any:
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.folder), purge_step=self.first_step)
        return self._board

    def _save(self, step: int) -> None:
        assert self.folder is not None
        tensors: dict[str, Tensor] = {}
        for name, model in self._models.items():
            for key, value in _own_tensors(model).items():
                tensors[f"model/{name}/{key}"] = for_rank_zero(value)
        for name, optimizer in self._optimizers.items():
            for index, moments in optimizer.state_dict()["state"].items():
                for key, value in moments.items():
                    tensors[f"optimizer/{name}/{index}/{key}"] = for_rank_zero(value)
        if self._writes:
            if not _all_finite(tensors.values()):
                raise self._failure("the weights, or the optimizer's moments, became NaN or infinite", after=True)
            extras = {name: extra.state_dict() for name, extra in self._extras.items()}
            facts = {"name": self.name, "step": step, "seconds": self.lap(), "extras": extras}
            save_state(self.folder / STATE, tensors, facts | {"machines": self.machines})
        self._saved = step

    def _load(self, path: Path) -> None:
        tensors, facts = load_state(path)
        if not _all_finite(tensors.values()):
            raise CheckpointError(
                f"{path}: contains NaN or infinite weights; delete {path.parent} to restart this step"
            )
        for name, model in self._models.items():
            own = _own_tensors(model)
            prefix = f"model/{name}/"
            saved = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            wrong = [key for key, value in own.items() if key not in saved or saved[key].shape != value.shape]
            if wrong:
                raise CheckpointError(f"{path}: belongs to another model ({wrong[0]} of {name} doesn't fit); delete it")
            with torch.no_grad():
                for key, value in own.items():
                    value.copy_(laid_out_as(value, saved[key]))
        for name, optimizer in self._optimizers.items():
            state: dict[int, dict[str, Tensor]] = {}
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for key, value in tensors.items():
                if key.startswith(f"optimizer/{name}/"):
                    _, _, index, moment = key.split("/")
                    parameter = parameters[int(index)]
                    like = parameter if value.shape == parameter.shape else value  # Adam's count of steps is a scalar
                    state.setdefault(int(index), {})[moment] = laid_out_as(like, value)
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        for name, extra in self._extras.items():
            extra.load_state_dict(facts["extras"][name])
        self.first_step, self._earlier = facts["step"], facts["seconds"]
        self._saved = self.first_step
        self.machines = list(facts.get("machines", ()))


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, tied ones once, frozen ones never: they are what they were."""
    frozen = {key for key, value in model.named_parameters(remove_duplicate=False) if not value.requires_grad}
    seen: set[int] = set()
    own = {}
    for key, value in model.state_dict().items():
        if key in frozen:
            continue
        place = place_of(value)
        if place not in seen or not place:  # an empty tensor has no place
            seen.add(place)
            own[key] = value
    return own


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _row(line: str) -> Metrics | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None  # the last line of a killed run may be cut short
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def generator_for(seed: int, *keys: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator that depends only on the seed and the keys: ``generator_for(0, "rlhf", step)``.

    Example:
        >>> a, b = generator_for(0, "sft", 3), generator_for(0, "sft", 3)
        >>> bool(torch.rand(1, generator=a) == torch.rand(1, generator=b))
        True
    """
    digest = hashlib.sha256(repr((seed, *keys)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def epoch_batch(count: int, batch_size: int, step: int, seed: int, name: str) -> list[int]:
    """The rows of one step: shuffled epochs, concatenated and cut into batches of one size.

    Every row is seen once before any is seen again, even if batch_size does not divide count.
    """
    begin, rows = step * batch_size, list[int]()
    while len(rows) < batch_size:
        epoch, place = divmod(begin + len(rows), count)
        order = _epoch_order(count, seed, name, epoch)
        rows += order[place : place + batch_size - len(rows)].tolist()
    return rows


@functools.lru_cache(maxsize=16)  # drawn once per epoch, so a step's cost doesn't grow with count
def _epoch_order(count: int, seed: int, name: str, epoch: int) -> Tensor:
    return torch.randperm(count, generator=generator_for(seed, name, "epoch", epoch))


def length_grouped_batch(
    lengths: Sequence[int], batch_size: int, step: int, total: int, seed: int, name: str, pool: int = 16
) -> list[int]:
    """The rows of one step out of ``total``, all of similar length, so that little of the batch is padding.

    The batches of `epoch_batch` are pooled ``pool`` at a time (never more than one epoch), sorted by length, cut again,
    and returned in random order. So the rows seen are those of `epoch_batch`, and each batch depends only on the step.

    Example:
        >>> length_grouped_batch([9, 1, 9, 1], batch_size=2, step=0, total=2, seed=0, name="x") in ([1, 3], [0, 2])
        True
    """
    pool = max(1, min(pool, len(lengths) // batch_size))
    which, place = divmod(step, pool)
    first = which * pool
    steps = range(first, min(first + pool, total))
    rows = [row for each in steps for row in epoch_batch(len(lengths), batch_size, each, seed, name)]
    rows.sort(key=lambda row: (lengths[row], row))
    order = torch.randperm(len(steps), generator=generator_for(seed, name, "pool", which))
    begin = int(order[place]) * batch_size
    return rows[begin : begin + batch_size]


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group rows of similar length so that each group, padded to its longest row, holds at most max_tokens.

    The gradient of an optimizer step is the sum over its micro-batches; each loss is divided by a count of the whole
    step, so the grouping changes only speed and memory.

    Example:
        >>> micro_batches([3, 10, 4, 9], max_tokens=20)
        [[1, 3], [2, 0]]
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    for i in order:
        # The first row of a group is its longest.
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def learning_rate_factor(
    step: int, total: int, warmup: int = 0, final: float = 0.1, shape: Literal["cosine", "linear"] = "cosine"
) -> float:
    """Linear warm-up, then cosine or linear decay to ``final`` of the peak (InstructGPT, appendix C: 10 %).

    Example:
        >>> [round(learning_rate_factor(s, 100, warmup=10), 2) for s in (0, 9, 55, 100)]
        [0.1, 1.0, 0.55, 0.1]
    """
    if step < warmup:
        return (step + 1) / warmup
    left = max(1, total - warmup)
    if shape == "linear":
        return 1 - (1 - final) * (step - warmup) / left
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * ((step - warmup) / left)))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value


def adamw(
    model: nn.Module,
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> torch.optim.AdamW:
    """AdamW over all trainable parameters, with weight decay only on matrices."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
