"""Worlds with known ground truth: other packages provide them, and this one finds them by name.

A package registers a world in the entry-point group ``minirlhf.worlds``; the course's own pyproject has these lines:

    [project.entry-points."minirlhf.worlds"]
    small = "minirlhf_course.world.guest:SMALL_WORLD"

A data folder with known ground truth has a file ``world.json``, such as ``{"world": "small", "seed": 0}``; the name may
be left out if it is "small". It is only compared with the names of the installed entry points, so nothing in a
data folder can name code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from minirlhf.errors import UserError

GROUP = "minirlhf.worlds"
DEFAULT_WORLD = "small"


class Judge(Protocol):
    """Scores answers; higher is better."""

    is_gold: bool
    """Whether the scores are the ground truth, not an estimate."""

    def check(self, prompt: str) -> None:
        """Raise ValueError, with the reason, for a prompt whose answers it can't score."""

    def scores(self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool]) -> list[float]:
        """Score an answer to each prompt; `ended` is False where an answer hit the token limit."""
        ...

    def parts(self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool]) -> list[dict[str, float]]:
        """The parts of each score, with the score itself as "total"."""
        ...

    def best(self, prompts: Sequence[str]) -> list[float] | None:
        """The best reachable score of each prompt, if known."""
        ...


class WorldGuest(Protocol):
    """What an entry point of the group loads: a world that writes data and judges answers by its ground truth."""

    def write(self, folder: Path, seed: int) -> None:
        """Write a data folder, `world.json` included. The same seed gives the same bytes.

        Raises:
            FileExistsError: the folder is not empty.
        """

    def judge(self, facts: Mapping[str, Any]) -> Judge:
        """The judge that knows the ground truth of the world that a folder's `world.json` describes.

        Args:
            facts: the JSON object in that file.

        Raises:
            ValueError: they don't describe a world of this kind; the message says what was expected.
        """
        ...

    def verify(self, facts: Mapping[str, Any], texts: Iterable[str]) -> None:
        """Compare what texts of a folder's corpus state with its `world.json`, as far as they state anything.

        Raises:
            ValueError: they are of another world, such as one of another seed; the message says how that shows.
        """
        ...


def find_world(name: object) -> WorldGuest:
    """Load an installed world by its name.

    Raises:
        UserError: no installed package provides a world of this name, or its code can't be loaded.

    Example:
        >>> find_world("flat")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        minirlhf.errors.UserError: no world named 'flat' is installed (installed: ...
    """
    found = entry_points(group=GROUP)
    for point in found:
        if point.name == name:
            try:
                guest: WorldGuest = point.load()
            except (ImportError, AttributeError) as error:
                raise UserError(
                    f"the world {name!r} is installed as {point.value} but can't be loaded ({error}); install its "
                    "package again"
                ) from None
            return guest
    names = ", ".join(sorted(found.names)) or "none"
    package = "minirlhf again, with its course" if name == DEFAULT_WORLD else "the package that provides it"
    raise UserError(f"no world named {name!r} is installed (installed: {names}); install {package}")
