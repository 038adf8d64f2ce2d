"""Steps 2 and 3 again, on a lesson's models: a run's folder to go on from, labelers for its answers, and the command.

run_of(folder / "first", data, rankings, heldout, {"base": base, "sft": sft, ...}, tokenizer, RunConfig())
rank_all(folder / "new.jsonl", items_to_rank(folder / "first"), make_labelers(world), Random(0))
at_terminal("minirlhf round --run first --comparisons new.jsonl --out second", folder)
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from minirlhf.checkpoints import save_model, sealed, write_json
from minirlhf.cli import main
from minirlhf.config import RunConfig
from minirlhf.data import Comparison
from minirlhf.labeling import Item, RankingFile
from minirlhf.pipeline.settings import settings_of
from minirlhf_course.world import SimulatedLabeler

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["at_terminal", "rank_all", "run_of"]

DEMONSTRATIONS = 200


def run_of(
    out: Path,
    data: Path,
    rankings: Sequence[Comparison],
    heldout: Sequence[Comparison],
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
) -> None:
    """Write the folder of a finished run, as if `minirlhf run` had trained these models.

    Args:
        out: the run's folder; must not exist yet.
        data: a folder of packed data with held-out rows; the run's is a copy of it, but for the rankings, and with the
            first DEMONSTRATIONS alone: every new reward model scores them all, to find its zero.
        rankings: what the run's reward model has learned from.
        heldout: what the next reward models are measured on.
        models: base, sft, reward_model, ppo and ppo_ptx.
        tokenizer: of all of them.
        config: the settings that the next rounds take over.
    """
    own = out / "data"
    shutil.copytree(data, own)
    for part, rows in ((own, rankings), (own / "heldout", heldout)):
        (part / "comparisons.jsonl.gz").unlink()
        with (part / "comparisons.jsonl").open("w", encoding="utf-8") as stream:
            for row in rows:
                fields = {"prompt": row.prompt, "responses": row.responses, "scores": row.scores}
                stream.write(json.dumps(fields | {"labeler": row.labeler}) + "\n")
    with gzip.open(own / "demonstrations.jsonl.gz", "rt", encoding="utf-8") as packed:
        (own / "demonstrations.jsonl").write_text("".join(islice(packed, DEMONSTRATIONS)), encoding="utf-8")
    (own / "demonstrations.jsonl.gz").unlink()
    for step, model in models.items():
        save_model(out / step, model, tokenizer)
    write_json(out / "config.json", sealed(settings_of(replace(config, out=out, data=own), own)))


def rank_all(file: Path, items: Sequence[Item], labelers: Sequence[SimulatedLabeler], draw: Random) -> None:
    """Rank each item by one of the labelers, and append the rankings to a file, as `minirlhf label` does.

    Args:
        file: JSON lines.
        items: prompts with K answers.
        labelers: one of them is drawn for each item.
        draw: of labelers and of their noise.
    """
    files = {labeler.name: RankingFile(file, labeler.name) for labeler in labelers}
    for item in items:
        labeler = draw.choice(labelers)
        scores = labeler.rank(item.prompt, item.responses, draw)["scores"]
        files[labeler.name].append(item, [1 + sum(other > score for other in scores) for score in scores])


def at_terminal(command: str, folder: Path) -> None:
    """Run a `minirlhf` command as a terminal in that folder would; print it, and what it says but for its time.

    Raises:
        RuntimeError: the command failed; what it said stands above.
    """
    print(f"$ {command}", flush=True)
    said = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(said):
        code = main(shlex.split(command)[1:])
    print("\n".join(line for line in said.getvalue().splitlines() if not line.startswith("time: ")))
    if code != 0:
        raise RuntimeError(f"exit code {code}: {command}")
