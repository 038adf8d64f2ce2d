"""Train one step of a run in a process of its own, beside another step.

Models of this size keep one core busy and hardly two: on two cores, two trainings side by side take little longer than
one. PPO and PPO-ptx both start from the SFT model and the reward model and don't need each other.

The child reads its settings from the run's config.json. It ends when its parent does, however that ends: the parent
holds the other end of its standard input.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from minirlhf.config import RunConfig, config_from_dict
from minirlhf.errors import TrainingError, UserError


class StepBeside:
    """One step of a run, training in another process.

    Args:
        config: of the run; its folder has a config.json already.
        step: its name, such as "ppo".
        threads: for the child.
        progress: whether the child draws a bar.
    """

    def __init__(self, config: RunConfig, step: str, threads: int, progress: bool) -> None:
        self.step = step
        arguments = [str(config.out), step, str(threads), str(int(progress)), str(config.save_seconds)]
        arguments.append(str(time.time()))  # the clock that two processes share
        # A parent whose threads are bound would bind the child to the same core.
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_PROC_BIND": "false"}
        # Not -m: this module is imported by its package already, and Python would warn of running it twice.
        command = [sys.executable, "-c", "from minirlhf.pipeline.beside import child; child()", *arguments]
        with _deaf_to_the_keyboard():
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)

    def __enter__(self) -> StepBeside:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        """Wait for the child; where the parent's own step failed, end it: it goes on when the run does.

        Raises:
            TrainingError: the child failed; its own message stands above.
        """
        assert self._process.stdin is not None
        if kind is not None:
            self._process.terminate()
        try:
            code = self._process.wait()
        except KeyboardInterrupt:  # the own step is done already
            self._process.terminate()
            self._process.wait()
            raise
        finally:
            self._process.stdin.close()
        if kind is None and code != 0:
            raise TrainingError(f"{self.step} stopped with exit code {code}: see its message above")


@contextlib.contextmanager
def _deaf_to_the_keyboard() -> Iterator[None]:
    """Ctrl-C reaches every process of a terminal. A child that is started in here inherits that it is ignored: the
    parent ends it, and says the one thing that there is to say."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may decide about signals
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def main(run: Path, step: str, threads: int, progress: bool, save_seconds: float, began: float) -> None:
    """The child: train the step and save it, as `run_pipeline` would. What it loads is part of the step's time."""
    started = time.monotonic() - max(0.0, time.time() - began)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    import torch

    from minirlhf.pipeline.folder import find_device, hide_loading_bars
    from minirlhf.pipeline.inputs import find_data, load_inputs
    from minirlhf.pipeline.run import train_step

    torch.set_num_threads(threads)
    hide_loading_bars()
    settings = json.loads((run / "config.json").read_text(encoding="utf-8"))
    config = replace(config_from_dict(settings, run), save_seconds=save_seconds)
    inputs = load_inputs(config, find_data(config))
    train_step(step, config, inputs, find_device(config.device), progress, beside=True, began=started)


def _end_with_parent() -> None:
    os.read(0, 1)  # returns when the parent is gone, or closes its end
    os._exit(1)


def child() -> None:
    """Entry point of the child: its arguments are those of `main`."""
    try:
        main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "1", *map(float, sys.argv[5:]))
    except UserError as failure:
        print(f"minirlhf: error: {failure}", file=sys.stderr)
        sys.exit(2)
