"""Read the files of a finished run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minirlhf.errors import CheckpointError

METHODS = ("ppo", "ppo_ptx", "rloo", "grpo", "dpo")
STEPS = ("base", "sft", "reward_model", *METHODS)

MEASURE = "run the same command again"
AGAIN = f"delete it and {MEASURE}"

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

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods by which step 3 trained a policy."""
        return tuple(name for name in METHODS if name in self.report["evaluation"])

    @property
    def policies(self) -> tuple[str, ...]:
        """Every model that answers."""
        return ("base", "sft", *self.methods)

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
    # Here, not at the top: checkpoints imports torch, and importing the report should be fast.
    from minirlhf.checkpoints import is_whole

    report, answers = _json(folder / "report.json"), folder / "answers.json"
    if isinstance(report, dict) and not is_whole(report):
        raise CheckpointError(f"{folder / 'report.json'}: damaged, or changed by hand (its checksum differs); {AGAIN}")
    kept = report.get("answers_sha256") if isinstance(report, dict) else None
    if kept is not None and (not answers.is_file() or hashlib.sha256(answers.read_bytes()).hexdigest() != kept):
        what = "its checksum differs" if answers.is_file() else "missing"
        raise CheckpointError(f"{answers}: damaged ({what}); delete {folder / 'report.json'} and {MEASURE}")
    return Run(
        folder,
        report=report,
        answers=_json(answers, missing=[]),
        metrics={step: _rows(folder / step / "metrics.jsonl") for step in STEPS},
        config=_json(folder / "config.json", missing={}),
    )


def _json(file: Path, missing: Any = None) -> Any:
    if not file.is_file():
        return missing
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise CheckpointError(f"{file}: damaged (not JSON); {AGAIN}") from None


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
