"""Rankings by a person: a file that loses none and doubles none, and a labeler for the terminal.

Each row is a comparison as data folders hold them, with the labeler's name and the time:

    {"prompt": ..., "responses": [K], "ranking": [K], "labeler": "ada", "time": "2026-11-30T15:20:53+00:00"}
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from minirlhf.checkpoints import partial, replace, sync
from minirlhf.data import read_rankings
from minirlhf.errors import UserError, visible
from minirlhf.formats import prompt_to_json

MOST_ANSWERS = 9  # one key each
ROW = b'{"prompt": '  # how every row that is written here begins
LOCK_SECONDS = 30.0  # a ranking takes milliseconds: after this the holder hangs, and so would this process


@dataclass(frozen=True)
class Item:
    """A prompt and K answers to rank."""

    prompt: str
    responses: tuple[str, ...]


class RankingFile:
    """A JSON-lines file that rankings are appended to, one at a time.

    A ranking is on the disk when `append` returns. Several processes may use the same file: each call holds its lock,
    and an item that this labeler has already ranked, here or elsewhere, is not written twice.

    Args:
        path: the file; made with the first ranking.
        labeler: whose rankings these are.

    Raises:
        DataError: a row of the file is malformed; names file and line.
        UserError: the labeler has no name, or the path is a folder.

    Example:
        >>> import tempfile
        >>> file = RankingFile(Path(tempfile.mkdtemp()) / "mine.jsonl", "ada")
        >>> item = Item("name a fruit .", ("apple .", "granite ."))
        >>> file.append(item, (1, 2)), file.append(item, (2, 1)), file.left([item])
        (True, False, [])
    """

    def __init__(self, path: Path, labeler: str) -> None:
        if not labeler.strip():
            raise UserError("the labeler needs a name: give --labeler NAME")
        if path.is_dir():
            raise UserError(f"{path}: is a folder; give a file for the rankings")
        if path.suffix == ".gz":
            raise UserError(f"{path}: rankings are appended to a plain file; leave out .gz")
        # The file itself, whatever link or folder it was named from: each has one lock.
        self.path, self.labeler = path.resolve(), labeler
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked():
            self._ranked()

    def append(self, item: Item, ranking: Sequence[int]) -> bool:
        """Write a ranking.

        Args:
            item: what was ranked.
            ranking: the place of each response, 1 the best; equal places are ties.

        Returns:
            Whether it was written: False if this labeler has ranked the item before.

        Raises:
            ValueError: not one whole number from 1 to K per response.
        """
        count = len(item.responses)
        if len(ranking) != count or not all(type(place) is int and 1 <= place <= count for place in ranking):
            raise ValueError(f"{tuple(ranking)}: expected {count} places from 1 to {count}")
        row = {"prompt": prompt_to_json(item.prompt), "responses": list(item.responses), "ranking": list(ranking)}
        row |= {"labeler": self.labeler, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        with self._locked():
            if item in self._ranked():
                return False
            new = not self.path.exists()
            with self.path.open("ab") as file:
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            if new:
                sync(self.path.parent)  # so that the disk has its name too
        return True

    def undo(self, items: Collection[Item]) -> Item | None:
        """Take this labeler's last ranking of one of the items out of the file.

        Args:
            items: what can be ranked again now; a ranking of anything else stays.

        Returns:
            What it ranked; None if there is no such ranking.
        """
        with self._locked():
            if not self._ranked() & set(items):
                return None
            lines = self.path.read_bytes().splitlines(keepends=True)
            for index in reversed(range(len(lines))):
                row = json.loads(lines[index]) if lines[index].strip() else {}
                same = [i for i in items if prompt_to_json(i.prompt) == row.get("prompt")]
                item = next((i for i in same if list(i.responses) == row.get("responses")), None)
                if row.get("labeler") == self.labeler and item is not None:
                    aside = partial(self.path)
                    with aside.open("xb") as file:
                        file.write(b"".join(lines[:index] + lines[index + 1 :]))
                    shutil.copymode(self.path, aside)
                    replace(aside, self.path)
                    return item
        return None

    def left(self, items: Iterable[Item]) -> list[Item]:
        """The items that this labeler has not ranked yet, in their order."""
        with self._locked():
            ranked = self._ranked()
        return [item for item in items if item not in ranked]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the file, whose last line has an end."""
        lock = self.path.with_name(self.path.name + ".lock")
        try:
            held = FileLock(lock).acquire(timeout=LOCK_SECONDS)
        except Timeout:
            raise UserError(
                f"{self.path}: another process has held it for {LOCK_SECONDS:.0f} seconds ({lock})"
            ) from None
        with held:
            self._mend()
            yield

    def _ranked(self) -> set[Item]:
        rows = read_rankings(self.path) if self.path.is_file() and self.path.stat().st_size else []
        return {Item(row.prompt, row.responses) for row in rows if row.labeler == self.labeler}

    def _mend(self) -> None:
        """Deal with a last line without an end: a whole row from an editor, or a part that a power failure left.

        A part of anything but a row written here stays, for the reader to refuse: the file is not ours to cut.
        """
        if not self.path.is_file():
            return
        with self.path.open("r+b") as file:
            content = file.read()
            start = content.rfind(b"\n") + 1
            part = content[start:]
            if not part:
                return
            try:
                json.loads(part)
                file.write(b"\n")
            except ValueError:
                if part[: len(ROW)] == ROW[: len(part)]:
                    file.truncate(start)


def parse_ranking(typed: str, count: int) -> tuple[int, ...]:
    """Read a ranking as it is typed: the answers' numbers, best first, with = between ties.

    Args:
        typed: such as "2 1=3 4"; "21=34" says the same.
        count: K, the number of answers.

    Returns:
        The place of each answer, 1 the best.

    Raises:
        ValueError: an answer is missing, named twice, or not there, or ties with nothing; the message says which.

    Example:
        >>> parse_ranking("2 1=3 4", 4), parse_ranking("21=34", 4), parse_ranking("1=2", 2)
        ((2, 1, 2, 4), (2, 1, 2, 4), (1, 1))
    """
    numbers = [c for c in typed if c not in " ,="]
    known = [str(k) for k in range(1, count + 1)]
    for what, wrong in (
        ("is not one of the answers", [c for c in numbers if c not in known]),
        ("is named twice", [c for c in known if numbers.count(c) > 1]),
        ("is missing", [c for c in known if c not in numbers]),
    ):
        if wrong:
            raise ValueError(f"{wrong[0]} {what}; type the {count} numbers, best first, with = between ties")
    if typed.strip(" ,")[-1] == "=" or typed.strip(" ,")[0] == "=":
        raise ValueError("a tie is between two answers: 2=3 says that answers 2 and 3 tie")
    groups: list[list[int]] = []
    tied = False
    for character in typed:
        if character == "=":
            tied = True
        elif character in known:
            if not tied:
                groups.append([])
            groups[-1].append(int(character))
            tied = False
    places: dict[int, int] = {}
    for group in groups:
        places |= dict.fromkeys(group, len(places) + 1)
    return tuple(places[k] for k in range(1, count + 1))


def label_in_terminal(file: RankingFile, items: Sequence[Item], ask: Callable[[str], str] = input) -> int:
    """Show item after item and write what is typed, until all are ranked or the person stops.

    Args:
        file: where the rankings go; what it holds already is not asked again.
        items: what to rank.
        ask: reads a line; raises EOFError at the end of the input.

    Returns:
        How many items of the list are ranked in the file now.
    """
    print("Type the numbers, best first: 2 1=3 4 (= for a tie). s skips, u takes back the last one, q stops.")
    waiting = file.left(items)
    while waiting:
        item = waiting[0]
        print(f"\n{len(items) - len(waiting) + 1} of {len(items)}   {visible(item.prompt)}")
        for number, response in enumerate(item.responses, 1):
            print(f"  {number}  {visible(response)}".replace("\n", "\n       "))  # a second line is no second answer
        try:
            typed = ask("> ").strip().lower()
        except EOFError:
            print()
            break
        if typed == "q":
            break
        if typed == "s":
            waiting.append(waiting.pop(0))
            if len(waiting) == 1:
                print("(this is the last one left)")
        elif typed == "u":
            undone = file.undo(items)
            if undone is None:
                print("(nothing to take back)")
            else:
                waiting = [undone, *(item for item in waiting if item != undone)]
        else:
            try:
                ranking = parse_ranking(typed, len(item.responses))
            except ValueError as error:
                print(f"({error})")
                continue
            if not file.append(item, ranking):
                print("(ranked already, in another window)")
            waiting.pop(0)
    return len(items) - len(file.left(items))
