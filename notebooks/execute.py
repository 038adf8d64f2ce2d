"""Run the lessons and studios from top to bottom, in place, and leave nothing in them that names a machine or a moment.

    python notebooks/execute.py                       every lesson and studio
    python notebooks/execute.py notebooks/01_*.ipynb  some of them
    python notebooks/execute.py --clean               clean only, run nothing

`make notebooks` calls it. A cell that fails stops the run with its traceback, and that lesson's file stays as it was.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).resolve().parent
CELL_SECONDS = 600
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "pygments_lexer": "ipython3",
    },
}


def clean(notebook: Any) -> None:
    """Keep sources, tags, folds, outputs and counts; drop timestamps, widget state and progress bars."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        kept = {"tags": cell.metadata["tags"]} if "tags" in cell.metadata else {}
        if cell.metadata.get("jupyter", {}).get("source_hidden"):
            kept["jupyter"] = {"source_hidden": True}
        cell.metadata = nbformat.from_dict(kept)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_passing(output)]


def _is_passing(output: Any) -> bool:
    """A progress bar: text that overwrites itself, or a widget."""
    if output.output_type == "stream":
        return output.name == "stderr" and "\r" in output.text
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def execute(path: Path, *, run: bool = True) -> None:
    """Run and clean one lesson."""
    notebook = nbformat.read(path, as_version=4)
    started = time.perf_counter()
    if run:
        client = NotebookClient(
            notebook, timeout=CELL_SECONDS, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
        )
        client.execute()
    seconds = time.perf_counter() - started
    clean(notebook)
    nbformat.validate(notebook)
    aside = path.with_suffix(".ipynb.partial")
    nbformat.write(notebook, aside)
    os.replace(aside, path)
    print(f"{path.name:<32} {seconds:6.1f} s   {path.stat().st_size / 1000:6.1f} kB", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the lessons in place and clean their metadata.")
    parser.add_argument("lessons", nargs="*", type=Path, help="notebooks; left out: all of them")
    parser.add_argument("--clean", action="store_true", help="clean only, run nothing")
    options = parser.parse_args()
    lessons = options.lessons or sorted(HERE.glob("[0-9]*.ipynb")) + sorted((HERE / "studios").glob("[0-9]*.ipynb"))
    for path in lessons:
        try:
            execute(path, run=not options.clean)
        except CellExecutionError as error:
            print(f"{path.name}: a cell failed; the file is unchanged\n{error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
