"""The one family of errors that a user can cause and mend, and the ranges that every setting must keep."""

from __future__ import annotations

import math
from collections.abc import Sequence


class UserError(Exception):
    """Something the user gave can't be used: the message says what was expected, where, and what to do.

    The command line prints it on one line and exits with code 2.
    """


class DataError(UserError):
    """A row or a file of a data folder is malformed; the message begins with ``file:line``."""


class CheckpointError(UserError):
    """A saved model or training state is missing, damaged, or belongs to another run."""


class TrainingError(UserError):
    """Training can't go on: a loss became NaN or infinite."""


def check_ranges(
    config: object,
    group: str = "",
    *,
    counts: Sequence[str] = (),
    positive: Sequence[str] = (),
    not_negative: Sequence[str] = (),
    fractions: Sequence[str] = (),
    least: int = 1,
) -> None:
    """Refuse settings that no training could use, before any training starts. None, where a setting has it, passes.

    Args:
        config: the dataclass that holds them.
        group: its place on the command line: "rlhf" for ``--rlhf.beta``.
        counts: names of settings that must be whole numbers, ``least`` or more.
        positive, not_negative: finite numbers above 0; 0 or more.
        fractions: numbers from 0 to 1, both ends included.
        least: the smallest count that is allowed.

    Raises:
        UserError: names the option, what was given, and what it must be.

    Example:
        >>> from types import SimpleNamespace
        >>> check_ranges(SimpleNamespace(clip_range=0.0), "rlhf", positive=["clip_range"])
        Traceback (most recent call last):
        minirlhf.errors.UserError: --rlhf.clip-range 0.0: must be a number above 0
    """
    rules = (
        (counts, f"a whole number, {least} or more", lambda x: isinstance(x, int) and x >= least),
        (positive, "a number above 0", lambda x: x > 0),
        (not_negative, "a number, 0 or more", lambda x: x >= 0),
        (fractions, "a number from 0 to 1", lambda x: 0 <= x <= 1),
    )
    for names, wanted, fits in rules:
        for name in names:
            value = getattr(config, name)
            if value is None:
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or value in (math.inf, -math.inf) or not fits(value):  # NaN fits nothing
                option = f"{group}.{name}" if group else name
                raise UserError(f"--{option.replace('_', '-')} {value}: must be {wanted}")
