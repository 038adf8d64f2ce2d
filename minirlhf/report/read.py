"""Read the files of a finished run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minirlhf.errors import CheckpointError

STEPS = ("base", "sft", "reward_model", "ppo", "ppo_ptx")
POLICIES = ("base", "sft", "ppo", "ppo_ptx")

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A finished run: its measurements, sample answers, training curves and settings."""

    folder: Path
    report: Row
    answers: list[Row]
    metrics: dict[str, list[Row]]
    """The rows of each step's metrics.jsonl; empty if there are none."""
    config: Row

    @property
    def is_gold(self) -> bool:
        """Whether the judge knows the truth (else it is the reward model itself)."""
        return self.report["judge"] == "gold"

    def policy(self, name: str) -> Row:
        """The measurements of one policy."""
        return self.report["evaluation"][name]


def load_run(folder: Path) -> Run:
    """Read a run.

    Raises:
        CheckpointError: report.json is missing or damaged.
    """
    if not (folder / "report.json").is_file():
        raise CheckpointError(f"{folder}: no report.json; finish the run first: minirlhf run --out {folder}")
    return Run(
        folder,
        report=_json(folder / "report.json"),
        answers=_json(folder / "answers.json", missing=[]),
        metrics={step: _rows(folder / step / "metrics.jsonl") for step in STEPS},
        config=_json(folder / "config.json", missing={}),
    )


def _json(file: Path, missing: Any = None) -> Any:
    if not file.is_file():
        return missing
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise CheckpointError(f"{file}: damaged (not JSON); delete it and run the same command again") from None


def _rows(file: Path) -> list[Row]:
    """Rows of a JSON lines file; a base model that was given rather than trained has none."""
    if not file.is_file():
        return []
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue  # a line that a kill cut short
    return rows
