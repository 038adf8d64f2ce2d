"""One run at a time works in a folder: two would write over each other's files."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from minirlhf.errors import UserError

LOCK = "run.lock"


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold a run's folder for this process.

    The operating system lets go of the lock when the process ends, however that happens; the file that a killed run
    leaves holds nobody up. Folders that were made for the lock and are still empty afterwards are taken away again. On
    Windows there is no such lock, and nothing is held.

    Args:
        out: the run's folder; made where it isn't there.

    Raises:
        UserError: another process works in the folder.
    """
    if sys.platform == "win32":
        yield
        return
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    descriptor = _acquire(out)
    try:
        yield
    finally:
        # Taken away while it is held: who opened it meanwhile sees in `_acquire` that it is another file by now.
        (out / LOCK).unlink(missing_ok=True)
        os.close(descriptor)
        for folder in made:
            if any(folder.iterdir()):
                break
            folder.rmdir()


if sys.platform != "win32":
    import fcntl

    def _acquire(out: Path) -> int:
        file = out / LOCK
        while True:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise UserError(
                    f"another minirlhf run is working in {out}: wait until it is done, or choose another --out"
                ) from None
            if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
            os.close(descriptor)
