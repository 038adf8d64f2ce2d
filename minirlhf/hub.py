"""Rows of a data set on the Hugging Face hub, streamed into a file of JSON lines through the package ``datasets``.

hub:OWNER/NAME                          the split "train"
hub:OWNER/NAME:train_prefs[:2000]       another split, and its first 2,000 rows
hub:OWNER/NAME/SUBSET:train             a subset (datasets calls it a configuration)
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from minirlhf.checkpoints import partial, replace
from minirlhf.errors import DataError, UserError, require_installed
from minirlhf.formats import COLUMNS

SCHEME = "hub:"
NAME = re.compile(
    r"hub:(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<subset>[\w.-]+))?(?::(?P<split>[\w.-]+))?(?:\[:(?P<count>[1-9]\d*)\])?"
)


def is_hub_name(name: str | Path) -> bool:
    """Whether a name of data is one of the hub's, and not a path.

    Example:
        >>> is_hub_name("hub:Anthropic/hh-rlhf"), is_hub_name("data/small_world")
        (True, False)
    """
    return str(name).startswith(SCHEME)


def fetch_rows(name: str | Path, folder: Path) -> Path:
    """Write the rows of a data set to a file in a folder, unless they are there already: a run reads its rows once.

    Only the columns that `formats` knows are kept. No code of the data set is run.

    Args:
        name: see the top of this file.
        folder: made where it isn't there.

    Returns:
        The file.

    Raises:
        UserError: the name can't be read as one, or ``datasets`` is not installed.
        DataError: the hub can't be reached, or has no such data set or split, or no rows in it.
    """
    found = NAME.fullmatch(str(name))
    if found is None:
        raise UserError(f"--data {name}: expected hub:OWNER/NAME, with :SPLIT, :SPLIT[:ROWS] or /SUBSET:SPLIT after it")
    file = folder / (re.sub(r"[^\w.-]+", "--", str(name).removeprefix(SCHEME)).strip("-") + ".jsonl")
    if file.is_file():
        return file
    require_installed("datasets", "data")
    import datasets

    split, wanted, count = found["split"] or "train", int(found["count"] or 0), 0
    try:
        rows = datasets.load_dataset(found["name"], found["subset"], split=split, streaming=True)
        folder.mkdir(parents=True, exist_ok=True)
        aside = partial(file)
        with aside.open("x", encoding="utf-8") as stream:
            for row in rows.take(wanted) if wanted else rows:
                known = {key: value for key, value in row.items() if key in COLUMNS and value is not None}
                stream.write(json.dumps(known) + "\n")
                count += 1
    except Exception as error:  # of datasets, huggingface_hub, its HTTP client, pyarrow: they share no base class
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"--data {name}: can't be read from the hub ({reason})") from error
    if not count:
        raise DataError(f"--data {name}: has no rows")
    replace(aside, file)
    return file
