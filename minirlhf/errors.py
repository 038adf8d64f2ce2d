"""The errors that a user can cause and fix."""

import importlib.util
import unicodedata

SPELLED = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of control, format, surrogate, line and paragraph separator."""
SHOWN = "\n\t\u200c\u200d"
"""Of these: the last two join and part letters in Persian and Indic scripts, and join emoji."""


class UserError(Exception):
    """Invalid user input: the message says what was expected, where, and what to do.

    The command line prints it on one line and exits with its code.
    """

    exit_code = 2


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


def said_shortly(error: BaseException) -> str:
    """The first line of an error's message, or its name if it has none; a KeyError's message is a name alone.

    Example:
        >>> said_shortly(ValueError("no such word\\nin line 3")), said_shortly(KeyError("type"))
        ('no such word', "KeyError: 'type'")
    """
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return f"{type(error).__name__}: {lines[0]}" if isinstance(error, KeyError) else lines[0]


def visible(text: str) -> str:
    r"""The text with its control characters spelled out, so that what is printed can't clear the screen.

    So are line breaks other than \n, and what no terminal can print (half of a surrogate pair).

    Example:
        >>> visible("two\nlines \x1b[2J")
        'two\nlines \\x1b[2J'
    """
    return "".join(
        c if c in SHOWN or unicodedata.category(c) not in SPELLED else c.encode("unicode_escape").decode() for c in text
    )
