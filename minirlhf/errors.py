"""The errors that a user can cause and fix."""

import importlib.util
import unicodedata


class UserError(Exception):
    """Invalid user input: the message says what was expected, where, and what to do.

    The command line prints it on one line and exits with code 2.
    """


class DataError(UserError):
    """A row or a file of a data folder is malformed; the message begins with ``file:line``."""


class CheckpointError(UserError):
    """A saved model or training state is missing, damaged, or belongs to another run."""


class TrainingError(UserError):
    """Training can't continue: a loss became NaN or infinite."""


def require_installed(module: str, extra: str) -> None:
    """Check that a package is installed, and say how to install it if not.

    Raises:
        UserError: the package can't be imported.

    Example:
        >>> require_installed("no_such_package", "run")
        Traceback (most recent call last):
        minirlhf.errors.UserError: no_such_package is not installed: pip install "minirlhf[run]"
    """
    if importlib.util.find_spec(module) is None:
        raise UserError(f'{module} is not installed: pip install "minirlhf[{extra}]"')


def visible(text: str) -> str:
    """The text with its control characters spelled out, so that what is printed can't clear the screen.

    Example:
        >>> visible("two\\nlines \\x1b[2J")
        'two\\nlines \\\\x1b[2J'
    """
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf") else c.encode("unicode_escape").decode()
        for c in text
    )
