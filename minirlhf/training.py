"""What every learner's loop needs around its algorithm: steps that can be killed and resumed, metrics, batches.

All randomness of a step is drawn from a generator made of (seed, name of the learner, step), so a resumed run needs
no saved random state: weights, optimizer moments and the step are all there is, and they give the same bits.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from minirlhf.checkpoints import STATE, load_state, save_state, write_text
from minirlhf.errors import CheckpointError, TrainingError, require_installed

Metrics = dict[str, float]


class Stateful(Protocol):
    """Something with a few numbers to save: the adaptive KL controller, for one."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Recorder:
    """Walks a learner through its steps, keeps its metrics, and lets a killed run continue where it was.

    Without a folder it keeps the metrics in memory (for notebooks and small projects); with one it also writes
    ``metrics.jsonl`` and, every few seconds, ``state.safetensors``.

    Args:
        name: of the learner: the label of the progress bar.
        folder: where to write, or None.
        save_seconds: time between two saved states; 0 saves after every step.
        show: the metrics to show in the progress bar.
        progress: whether to draw the progress bar.
        position: the line of the progress bar, where several are drawn.
        began: when the work began, by `time.monotonic`; left out: now.
        tensorboard: whether to write TensorBoard events into the folder too.

    Raises:
        UserError: tensorboard is asked for and not installed.

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
        self.show, self.progress, self.position = tuple(show), progress, position
        self.history: list[Metrics] = []
        self.first_step = 0
        self.seconds = 0.0  # since the recorder was made, and in the earlier sessions of this run; see `lap`
        self._began, self._earlier = time.monotonic() if began is None else began, 0.0
        self._models: dict[str, nn.Module] = {}
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        self._extras: dict[str, Stateful] = {}
        self._step = 0
        self._batch = self._advice = ""  # of the loss that was checked last
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
        """Name what belongs to the state, and load it if a killed run left one.

        From here on no optimizer takes a step on a gradient that is NaN or infinite.

        Raises:
            CheckpointError: the state is damaged or belongs to other models.
        """
        self._models, self._optimizers, self._extras = models, optimizers, extras or {}
        for optimizer in optimizers.values():
            optimizer.register_step_pre_hook(self._check_gradient)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        state = self.folder / STATE
        if state.is_file():
            self._load(state)
        metrics = self.folder / "metrics.jsonl"
        # Rows that were logged after the saved state will be logged again: cut them off.
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
        self.history = [row for row in map(_row, lines) if row is not None and row["step"] < self.first_step]
        write_text(metrics, "".join(json.dumps(row) + "\n" for row in self.history))

    def steps(self, total: int, done: Callable[[], int] | None = None) -> Iterator[int]:
        """Yield the steps that are left, saving the state in between.

        Args:
            total: how many steps there are; with ``done``, how much of something else: environment steps, for one.
            done: how much of the total is done, asked after every step; left out: one per step.
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
                if self.folder is not None and now - saved >= self.save_seconds and step < total:
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
        """Keep one row of metrics for the current step (and write it, where there is a folder)."""
        row: Metrics = {"step": self._step}
        row |= {key: float(value.detach() if isinstance(value, Tensor) else value) for key, value in metrics.items()}
        self.history.append(row)
        if self._bar is not None:
            shown = {key.split("/")[-1]: f"{row[key]:.3g}" for key in self.show if key in row}
            self._bar.set_postfix(shown, refresh=False)
        if self.folder is not None:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            if self._tensorboard:
                for key, value in metrics.items():
                    self._writer().add_scalar(key, value, self._step)

    def lap(self) -> float:
        """Count the time up to now into `seconds`, and return it: loading and encoding are work of a step as well."""
        self.seconds = self._earlier + time.monotonic() - self._began
        return self.seconds

    def check_finite(self, loss: Tensor, batch: str, advice: str = "") -> None:
        """Stop before a NaN or infinite loss reaches the weights.

        Raises:
            TrainingError: names the step, the batch and what to try.
        """
        self._batch = batch
        self._advice = advice or "lower the learning rate (--help names it) or look at that batch for odd rows"
        value = float(loss.detach())
        if not math.isfinite(value):
            raise self._failure(f"the loss is {value}")

    def _check_gradient(self, optimizer: torch.optim.Optimizer, arguments: object, keywords: object) -> None:
        """Before each optimizer step: a finite loss can have a gradient that is not."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))  # much quicker than a look at each number
        if not math.isfinite(norm):
            raise self._failure(f"the gradient's norm is {norm}")

    def _failure(self, what: str, *, after: bool = False) -> TrainingError:
        message = f"{self.name}: {what} at step {self._step}"
        if self._batch:
            message += f", {self._batch}; {self._advice}"
        if self._step == 0 and not after:
            message += " (at its first step: the model it starts from may be at fault)"
        message += "."
        if self._saved is not None and self.folder is not None:
            message += (
                f" Delete {self.folder} to train this step anew; the weights before step {self._saved}, all finite, "
                f"are in {self.folder / STATE}."
            )
        elif self.folder is not None:
            message += f" No state of it is saved in {self.folder}: other settings begin it anew."
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
            tensors |= {f"model/{name}/{key}": value for key, value in _own_tensors(model).items()}
        for name, optimizer in self._optimizers.items():
            for index, moments in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{name}/{index}/{key}": value for key, value in moments.items()}
        if not _all_finite(tensors.values()):
            raise self._failure("the weights, or the optimizer's moments, became NaN or infinite", after=True)
        extras = {name: extra.state_dict() for name, extra in self._extras.items()}
        facts = {"name": self.name, "step": step, "seconds": self.lap(), "extras": extras}
        save_state(self.folder / STATE, tensors, facts)
        self._saved = step

    def _load(self, path: Path) -> None:
        tensors, facts = load_state(path)
        if not _all_finite(tensors.values()):
            raise CheckpointError(
                f"{path}: holds NaN or infinite weights; delete {path.parent} to begin this step anew"
            )
        for name, model in self._models.items():
            own = _own_tensors(model)
            prefix = f"model/{name}/"
            saved = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            wrong = [key for key, value in own.items() if key not in saved or saved[key].shape != value.shape]
            if wrong:
                raise CheckpointError(f"{path}: belongs to another model ({name} has no fitting {wrong[0]}); delete it")
            with torch.no_grad():
                for key, value in own.items():
                    value.copy_(saved[key])
        for name, optimizer in self._optimizers.items():
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith(f"optimizer/{name}/"):
                    _, _, index, moment = key.split("/")
                    state.setdefault(int(index), {})[moment] = value
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        for name, extra in self._extras.items():
            extra.load_state_dict(facts["extras"][name])
        self.first_step, self._earlier = facts["step"], facts["seconds"]
        self._saved = self.first_step


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, tied ones once."""
    seen: set[int] = set()
    own = {}
    for key, value in model.state_dict().items():
        if value.data_ptr() not in seen or value.numel() == 0:
            seen.add(value.data_ptr())
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
    """A random generator that depends on the seed and the keys alone: ``generator_for(0, "rlhf", step)``.

    Example:
        >>> a, b = generator_for(0, "sft", 3), generator_for(0, "sft", 3)
        >>> bool(torch.rand(1, generator=a) == torch.rand(1, generator=b))
        True
    """
    digest = hashlib.sha256(repr((seed, *keys)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def epoch_batch(count: int, batch_size: int, step: int, seed: int, name: str) -> list[int]:
    """The rows of one step: epochs of shuffled rows laid end to end and cut into batches of one size.

    Every row is seen once before any is seen again, also where batch_size does not divide count.
    """
    begin, rows = step * batch_size, list[int]()
    while len(rows) < batch_size:
        epoch, place = divmod(begin + len(rows), count)
        order = _epoch_order(count, seed, name, epoch)
        rows += order[place : place + batch_size - len(rows)].tolist()
    return rows


@functools.lru_cache(maxsize=16)  # drawn once an epoch: a step costs the same however many rows there are
def _epoch_order(count: int, seed: int, name: str, epoch: int) -> Tensor:
    return torch.randperm(count, generator=generator_for(seed, name, "epoch", epoch))


def length_grouped_batch(
    lengths: Sequence[int], batch_size: int, step: int, total: int, seed: int, name: str, pool: int = 16
) -> list[int]:
    """The rows of one step out of ``total``, all of like length, so that little of the batch is padding.

    The batches of `epoch_batch` are taken ``pool`` at a time (never more than an epoch holds), sorted by length, cut
    again, and come in random order. So the same rows are seen as without, and each batch depends on the step alone.

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
    """Group rows of like length so that each group, padded to its longest row, holds at most max_tokens.

    The gradient of an optimizer step is the sum over its micro-batches; each loss is divided by a count of the whole
    step, so how the rows are grouped changes speed and memory and nothing else.

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
    """Linear warm-up, then a cosine or a line down to ``final`` of the peak (InstructGPT, appendix C: 10 %).

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
    """Set the rate of every parameter group."""
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
    """AdamW over all parameters; matrices decay, gains and biases don't."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
