"""CSV files with their origin in the first line: machine, versions, date and command."""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "data" / "results"
Row = dict[str, Any]


LANGUAGE = ("torch", "transformers", "minirlhf")


def write_table(path: Path, rows: Iterable[Row], packages: Sequence[str] = LANGUAGE, note: str = "") -> None:
    """Write rows as CSV (packed where the name ends in .gz), whole or not at all; floats to five digits.

    The columns are the first row's; the versions of `packages` and a note go into the first line.
    """
    rows = list(rows)
    text = io.StringIO()
    text.write(f"# {stamp(packages)}{note and '; '}{note}\n")
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    content = text.getvalue().encode()
    if path.suffix == ".gz":
        packed = io.BytesIO()
        with gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as file:  # the same bytes each time
            file.write(content)
        content = packed.getvalue()
    aside = path.with_name(path.name + ".partial")
    aside.write_bytes(content)
    os.replace(aside, path)
    print(f"{os.path.relpath(path)}: {len(rows)} rows", flush=True)


def stamp(packages: Sequence[str] = LANGUAGE) -> str:
    """Machine, versions, date, and the command that is running."""
    from importlib.metadata import version

    cpu = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    python = platform.python_version()
    return f"{cpu}, {os.cpu_count()} cores, Python {python}; {versions}; {datetime.date.today()}; {command}"
