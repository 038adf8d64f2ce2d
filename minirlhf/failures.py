"""What the command line says of a failure: one sentence and an exit code, never a traceback.

2 is for what a user can mend: input, settings, a full disk, too little memory, a file that the system refuses. 1 is for
everything that nobody foresaw: then the traceback goes to a file, to attach to a report. A ValueError is no user's,
unless it is of characters: the code that reads what a user gave turns it into a UserError.
"""

from __future__ import annotations

import errno
import os
import platform
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from minirlhf.errors import UserError, visible

NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory")
NO_SPACE = ("no space left", "disk quota exceeded")
TOO_LARGE = "file too large"


def say(error: Exception, arguments: Sequence[str] = (), *, aloud: bool = True) -> int:
    """Print one sentence about a failure to the standard error, and return the exit code.

    Args:
        error: what was raised.
        arguments: of the command, for the report of a bug.
        aloud: whether to print; of several processes that fail, one does.

    Example:
        >>> say(UserError("--steps 0: give at least 1"))
        2
    """
    message = known(error)
    code = getattr(error, "exit_code", 2 if message is not None else 1)
    if not aloud:
        return code
    if message is None:
        message = _unknown(error, arguments)
    print(f"minirlhf: error: {visible(' '.join(message.split()))}", file=sys.stderr)
    return code


def known(error: Exception) -> str | None:
    """What to say of a failure that a user can mend; None for one that nobody foresaw."""
    said = " ".join(str(error).split())
    if isinstance(error, UserError):
        return said
    if isinstance(error, ModuleNotFoundError):
        package = str(error.name).split(".")[0]
        return None if package.startswith("minirlhf") else f'{package} is not installed: pip install "minirlhf[run]"'
    # The Rust of safetensors and tokenizers knows no OSError: it gives the system's words in errors of its own.
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or any(words in said.lower() for words in NO_SPACE):
        return f"the disk is full ({said}): free some space, and run the same command again to continue"
    if (isinstance(error, OSError) and error.errno == errno.EFBIG) or TOO_LARGE in said.lower():
        return (
            f"a file is larger than this disk or ulimit -f allows ({said}): raise the limit, or write to another disk "
            "with --out, and run the same command again to continue"
        )
    if isinstance(error, MemoryError) or any(words in said.lower() for words in NO_MEMORY):
        return (
            f"not enough memory ({said or 'MemoryError'}): lower --rlhf.micro-batch-tokens and the batch sizes, or "
            "take a smaller model, and run the same command again to continue"
        )
    if isinstance(error, RecursionError):
        return "something is nested too deeply to be read: look for it in the data and in the tokenizer's template"
    kinds = {kind.__module__.split(".")[0] for kind in type(error).__mro__}
    if "jinja2" in kinds:
        return f"the tokenizer's chat template fails ({said}): fix chat_template in its files"
    if isinstance(error, IndexError) and "index out of range in self" in said:  # torch's embedding
        return "a token id is beyond the model's vocabulary: the tokenizer belongs to another model"
    if isinstance(error, UnicodeError):
        return f"text that is not UTF-8 was read, or can't be printed here ({said}): convert it, or set PYTHONUTF8=1"
    if isinstance(error, OSError):
        # Missing permissions, a broken network. Where it was raised is for bug reports.
        frames = traceback.extract_tb(error.__traceback__)
        where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        return f"{said} ({type(error).__name__}{where})"
    return None


def _unknown(error: Exception, arguments: Sequence[str]) -> str:
    """Write a report of a failure that nobody foresaw, and say where it is."""
    from minirlhf import __version__

    torch = sys.modules.get("torch")
    lines = [
        f"minirlhf {__version__}, torch {getattr(torch, '__version__', 'not imported')}, "
        f"Python {platform.python_version()}, {platform.platform()}",
        f"minirlhf {' '.join(arguments)}",
        "",
        *traceback.format_exception(error),
    ]
    what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    try:
        handle, name = tempfile.mkstemp(prefix="minirlhf-error-", suffix=".txt")
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("\n".join(lines))
    except OSError as failure:
        return f"a bug in minirlhf ({what}); its report could not be written either ({failure})"
    return f"a bug in minirlhf ({what}); please report it, and attach {name}"


def end_quietly() -> int:
    """The reader of a pipe is gone, as in ``minirlhf evaluate | head -1``: nobody is left to tell."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE
