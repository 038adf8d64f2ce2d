"""Train one step of a run in its own process, in parallel with another step.

Models of this size keep one core busy, but hardly two: on two cores, two trainings in parallel take little longer than
one. The methods of step 3 all start from the SFT model and the reward model and don't need each other.

The child is handed its settings and its rows through its standard input, so the data is read and checked once. It exits
when its parent does, for whatever reason: the parent holds the other end of that pipe.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

import torch

from minirlhf import PROCESSORS
from minirlhf.config import SETTINGS, RunConfig
from minirlhf.errors import TrainingError
from minirlhf.failures import say
from minirlhf.pipeline.folder import hide_loading_bars
from minirlhf.pipeline.inputs import Inputs
from minirlhf.pipeline.steps import train_step

COMMAND = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal: the parent alone answers it
from minirlhf.pipeline.beside import child
child()
"""


@contextlib.contextmanager
def step_beside(
    config: RunConfig, step: str, other: str, inputs: Inputs, threads: int, progress: bool
) -> Iterator[None]:
    """Train one step of a run in another process while the ``with`` body runs, then wait for it.

    If the body fails or Ctrl-C is pressed, the child is terminated; its step resumes when the run does. If the child
    fails, the body is interrupted at once.

    Args:
        config: of the run.
        step: its name, such as "ppo".
        other: the step that the body trains.
        inputs: the run's data.
        threads: for the child.
        progress: whether the child draws a bar.

    Raises:
        TrainingError: the child failed, and has printed its own message, or it was killed, and the signal is named. The
            command then exits with the child's code: 1 for a bug.
    """
    work = _Work(config, step, other, _read_by(step, config, inputs), threads, progress, time.time(), PROCESSORS)
    handed = pickle.dumps(work)
    command = [sys.executable, "-c", COMMAND, str(config.out), step]  # these two for people who list the processes
    # A parent whose threads are bound would bind the child to the same core.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_PROC_BIND": "false"}
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, env=environment) as process,
        _interruptible() as (interrupt, over),
    ):
        threading.Thread(target=lambda: interrupt() if process.wait() else None, daemon=True).start()
        assert process.stdin is not None
        stream = open(os.dup(process.stdin.fileno()), "wb")  # noqa: SIM115 (the thread closes it)
        threading.Thread(target=_hand_over, args=(stream, handed), daemon=True).start()
        del handed, work  # the thread has them
        try:
            yield
            over()
            code = process.wait()
        except BaseException as failure:
            over()
            code = process.poll() or 0  # not 0 where the child failed first
            process.terminate()
            process.wait()
            if not isinstance(failure, _ChildFailedError):
                raise
    if code < 0:
        raise TrainingError(
            f"the process that trained {step} was ended by {signal.Signals(-code).name}"
            f"{' (as the system does where memory runs out)' if -code == signal.SIGKILL else ''}; "
            "run the same command again to continue"
        )
    if code != 0:
        failed = TrainingError(f"{step} stopped with exit code {code}: see its message above")
        failed.exit_code = 2 if code == 2 else 1
        raise failed


@dataclass(frozen=True)
class _Work:
    """What the child is handed."""

    config: RunConfig
    step: str
    other: str
    inputs: Inputs
    threads: int
    progress: bool
    began: float
    """By time.time, the clock that two processes share."""
    processors: set[int] | None


def _read_by(step: str, config: RunConfig, inputs: Inputs) -> Inputs:
    """The inputs without what a method of step 3 doesn't read: of large data, most of it."""
    folder = replace(inputs.folder, corpus=[], demonstrations=[], heldout_corpus=[])
    if step != "dpo":
        folder = replace(folder, comparisons=[])
    mixes = step not in ("ppo", "dpo") and getattr(config, SETTINGS[step]).ptx_coef > 0
    return replace(inputs, folder=folder, corpus_blocks=inputs.corpus_blocks[: None if mixes else 0].clone())


def _hand_over(stream: BinaryIO, handed: bytes) -> None:
    with contextlib.suppress(BrokenPipeError), stream:  # of a child that is gone
        stream.write(handed)


class _ChildFailedError(BaseException):
    """Raised in the main thread when the child has failed: no ``except Exception`` of the body must catch it."""


@contextlib.contextmanager
def _interruptible() -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """Give two functions: one for another thread, which interrupts the ``with`` body, and one that says it is over.

    Only a body in the main thread can be interrupted. The signal is not Ctrl-C's, which may be ignored: it is in a job
    that a shell started with ``&``.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None, lambda: None
        return
    number, open_ = getattr(signal, "SIGUSR1", signal.SIGINT), True

    def answer(*_: object) -> None:
        if open_:
            over()
            raise _ChildFailedError

    def over() -> None:
        nonlocal open_
        open_ = False

    before = signal.signal(number, answer)
    try:
        yield lambda: _thread.interrupt_main(number), over
    finally:
        over()
        signal.signal(number, before)


def child() -> None:
    """Entry point of the child: it trains its step and saves it, as `run_pipeline` would."""
    try:
        work: _Work = pickle.load(sys.stdin.buffer)
    except (EOFError, pickle.UnpicklingError):  # cut short: the parent is gone
        os._exit(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Loading counts as part of the step's time.
    began = time.monotonic() - max(0.0, time.time() - work.began)
    if work.processors is not None:  # the parent's first thread may be bound to one of them, and so is its child
        os.sched_setaffinity(0, work.processors)
    torch.set_num_threads(work.threads)
    hide_loading_bars()
    try:
        train_step(work.step, work.config, work.inputs, progress=work.progress, beside=work.other, began=began)
    except Exception as failure:  # as the command line does it: one sentence
        sys.exit(say(failure, [work.step, "beside", str(work.config.out)]))


def _end_with_parent() -> None:
    os.read(0, 1)  # returns when the parent is gone, or closes its end
    os._exit(1)
