"""What a run was started with, and what may change when it goes on.

A setting belongs to the steps that it changes: what stands was trained with it, and is not trained again behind the
user's back. A setting of steps that have not begun may change, and so may the evaluation's: it is measured again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minirlhf.checkpoints import CHECKSUMS, PARTIAL, STATE, SUMMARY, differing, partial_folder
from minirlhf.config import METHODS, SETTINGS, UNSAVED, RunConfig, users
from minirlhf.data import ENDINGS, TABLES
from minirlhf.errors import CheckpointError
from minirlhf.language.adapters import LoraConfig
from minirlhf.language.models import context_in
from minirlhf.pipeline.folder import FORMAT, LOCK, POLICIES, STEPS, read_settings
from minirlhf.pipeline.given import FileReward, given_sums
from minirlhf.pipeline.inputs import FROM_HUB, MADE_WORLD

DATA_SUMS = "data_sha256"
GIVEN_SUMS = "given_sha256"
Differences = dict[str, tuple[Any, Any]]
LATER: dict[str, Any] = {
    "comparisons": {},
    "data_errors": "stop",
    GIVEN_SUMS: {},
    "precision": "float32",
    "gradient_checkpointing": False,
}
LATER |= {"lora": asdict(LoraConfig()), "method": ["ppo", "ppo_ptx"]}
"""Settings that a run of format 2 may lack, because it began before they were there, with what it did."""


def settings_of(config: RunConfig, data: Path, reward: FileReward | None = None) -> dict[str, Any]:
    """What decides the weights and the report of a run on a folder of data, as it is written to config.json."""
    settings: dict[str, Any] = json.loads(json.dumps(asdict(config), default=str))
    for key in ("out", *UNSAVED):
        settings.pop(key)
    settings["format"] = FORMAT
    settings["method"] = list(config.methods)
    settings["data"] = str(data.resolve())
    settings[DATA_SUMS] = data_sums(data)
    settings["comparisons"] = {str(file.resolve()): _sha256(file) for file in config.comparisons}
    settings["reward"] = reward.facts() if reward is not None else None
    for key in ("given_sft", "given_reward_model"):
        if settings[key] is not None and Path(settings[key]).is_dir():
            settings[key] = str(Path(settings[key]).resolve())
    settings[GIVEN_SUMS] = given_sums(config)
    if config.previous is not None:
        settings["previous"] = str(config.previous.resolve())
        settings["previous_sha256"] = {step: _sha256(config.previous / step / CHECKSUMS) for step in POLICIES}
    return settings


def check_previous(previous: Path, settings: dict[str, Any]) -> None:
    """A round keeps models, a tokenizer and held-out prompts that came from the data of the last one.

    Args:
        previous: folder of the last round.
        settings: of this round, made by `settings_of`.

    Raises:
        CheckpointError: the previous folder is not a run, or its data has changed.
    """
    differences = _differences(read_settings(previous).get(DATA_SUMS), settings[DATA_SUMS], DATA_SUMS)
    if differences:
        name = min(differences)
        raise CheckpointError(
            f"{previous}: was trained with {_said(name, settings, *differences[name])}; a round needs the data of the "
            "last one: put it back, and give new rankings with --comparisons"
        )


def check_data(run: Path, data: Path) -> None:
    """Measurements compare with those of the run, so the data must be the run's.

    Args:
        run: its folder.
        data: the folder of data that is there now, wherever it stands.

    Raises:
        CheckpointError: names a file that was changed, or is missing, or is new.
    """
    differences = _differences(read_settings(run).get(DATA_SUMS), data_sums(data), DATA_SUMS)
    if differences:
        name = min(differences)
        old, new = differences[name]
        what = "has changed since" if old and new else "does not exist, as it did for" if old else "is new since"
        file = data / name.removeprefix(DATA_SUMS).removeprefix(".")
        raise CheckpointError(f"{file}: {what} the run {run}; put back the data that the run was trained with")


def changed_machine(out: Path, now: dict[str, Any]) -> list[str]:
    """Say which finished steps of a run were trained with other versions or another number of threads than now.

    Args:
        out: the run's folder.
        now: made by `checkpoints.made_with`.
    """
    notes = []
    for step in STEPS:
        file = out / step / SUMMARY
        before = json.loads(file.read_text(encoding="utf-8")).get("made_with", {}) if file.is_file() else {}
        if step in METHODS:  # side by side, each has half of the threads
            before.pop("threads", None)
        differ = differing(before, now)
        if differ is not None:
            then, today = differ
            notes.append(
                f"{out / step}: trained with {then}; the rest will be with {today}, so its last bits may differ"
            )
    return notes


def _sha256(file: Path) -> str | None:
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def data_sums(folder: Path) -> dict[str, str]:
    """The sha256 of each file that `read_folder` reads, by its name: a path says nothing of what it holds.

    A single file of comparisons has no name beside its path: "".

    Example:
        >>> sorted(data_sums(Path("data/small_world")))[:2]  # doctest: +SKIP
        ['comparisons.jsonl.gz', 'corpus.jsonl.gz']
    """
    if folder.is_file():
        return {"": _sha256(folder) or ""}
    names = [f"{part}{name}{ending}" for part in ("", "heldout/") for name in TABLES for ending in ENDINGS]
    files = [folder / name for name in (*names, "tokenizer.json", "world.json")]
    return {file.relative_to(folder).as_posix(): digest for file in files if (digest := _sha256(file)) is not None}


def changed_settings(out: Path, settings: dict[str, Any]) -> bool:
    """Compare the settings with those of the run that stands in a folder.

    Args:
        out: the run's folder; it need not exist.
        settings: made by `settings_of`; those of methods that are not trained are set to what they were.

    Returns:
        Whether any differs, so that config.json has to be written again (a new run: True).

    Raises:
        CheckpointError: the folder holds something else, or a step that was trained with other settings.
    """
    if not (out / "config.json").is_file():
        # What a run that was ended in its first second leaves.
        own = (MADE_WORLD, FROM_HUB, LOCK, f"config.json{PARTIAL}")
        if out.is_dir() and any(path.name not in own for path in out.iterdir()):
            raise CheckpointError(f"{out}: not empty and not a run of minirlhf; choose another --out")
        return True
    of_methods = {group: settings[group] for group in SETTINGS.values()}  # an older run was trained with none of them
    old_settings = LATER | of_methods | read_settings(out)
    _keep_unused(settings, old_settings)
    if old_settings.get("previous") is not None and settings["previous"] is None:
        raise CheckpointError(
            f"{out}: a round after {old_settings['previous']}; continue it with the minirlhf round that began it, or "
            "choose another --out"
        )
    differences = _differences(old_settings, settings)
    old_sums, new_sums = (sorted(each["comparisons"].values()) for each in (old_settings, settings))
    changed = [
        name
        for name in sorted(differences)
        if not (name.startswith("comparisons.") and old_sums == new_sums)  # the same files, moved
    ]
    standing = {name: [f for step in steps_of(name) if (f := _begun(out, step))] for name in changed}
    stands = [name for name, folders in standing.items() if folders]
    if stands:
        name = stands[0]
        said = f"{standing[name][0].stem} was trained with {_said(name, settings, *differences[name])}"
        if len(stands) > 1:
            said += f" (and {len(stands) - 1} more settings differ)"
        # All the folders that any of the changes touches, so that the advice has to be followed only once.
        folders = [f for step in STEPS if (f := _begun(out, step)) and any(f in standing[s] for s in stands)]
        raise CheckpointError(
            f"{out}: {said}; give the same settings and data to continue this run, delete {_listed(folders)} to train "
            "from there with the new ones, or choose another --out"
        )
    return bool(differences)


def _keep_unused(settings: dict[str, Any], old: dict[str, Any]) -> None:
    """Settings of methods that are not trained (any more) stay as they were: their models may stand in the folder."""
    for group in SETTINGS.values():
        for name in settings[group]:
            if not set(users(group, name)) & set(settings["method"]):
                settings[group][name] = old[group].get(name, settings[group][name])


def steps_of(name: str) -> tuple[str, ...]:
    """The steps whose weights a setting changes: its own and those that start from them.

    Example:
        >>> steps_of("rlhf.beta"), steps_of("rlhf.ptx_coef"), steps_of("evaluation.prompts")
        (('ppo', 'ppo_ptx'), ('ppo_ptx',), ())
    """
    section = name.split(".")[0]
    if section == GIVEN_SUMS:
        section = name.split(".")[1]
    # A preset's name only fills in the other settings; the data are known by what they hold, not by where they stand;
    # a method that is added is trained, and the model of one that is left out stays where it is.
    if section in ("evaluation", "preset", "data", "method"):
        return ()
    if section == "lora":
        return STEPS[1:]
    if section in ("comparisons", "reward", "given_reward_model", "reward_model"):
        steps = ("reward_model", *METHODS)
        return steps if section == "comparisons" else tuple(step for step in steps if step != "dpo")
    if section == "side_by_side":
        return METHODS
    if section in SETTINGS.values():
        return users(section, name.partition(".")[2])
    return STEPS[STEPS.index(section) :] if section in STEPS else STEPS


def check_context(out: Path, needed: int, options: list[str]) -> None:
    """The settings that may still change can ask for longer sequences than a finished base model was made for.

    Args:
        out: the run's folder, with a finished base model.
        needed: tokens of the longest sequence.
        options: that decide it.

    Raises:
        CheckpointError: says how long they are, and the options.
    """
    limit = context_in(out / "base")
    if limit is not None and needed > limit:
        raise CheckpointError(
            f"{out / 'base'}: was made for a context of {limit} tokens, and these settings need "
            f"{needed}; lower {' or '.join(options)}, or choose another --out"
        )


def _begun(out: Path, step: str) -> Path | None:
    """The folder in which something of a step stands: finished, or with a saved state."""
    aside = partial_folder(out / step)
    if (out / step).is_dir():
        return out / step
    return aside if (aside / STATE).is_file() else None


def _said(name: str, settings: dict[str, Any], old: Any, new: Any) -> str:
    if name == DATA_SUMS or name.startswith(f"{DATA_SUMS}."):
        return f"{_article(old, new)} {Path(settings['data']) / name.removeprefix(f'{DATA_SUMS}.')}"
    if name.startswith("previous_sha256."):
        return f"{_article(old, new)} {Path(settings['previous']) / name.removeprefix('previous_sha256.')}"
    if name.startswith(f"{GIVEN_SUMS}."):
        _, key, *file = name.split(".", 2)
        option = "--" + key.removeprefix("given_").replace("_", "-")
        return f"{_article(old, new)} {'/'.join([settings[key] or option, *file])}"
    if name.split(".")[0] == "reward":
        return f"{_article(old, new)} --reward {(settings['reward'] or {}).get('function', '')}".rstrip()
    if name.startswith("comparisons."):
        return f"{_article(old, new)} {name.removeprefix('comparisons.')}"
    return f"{name} = {old}, not {new}"


def _article(old: Any, new: Any) -> str:
    return "another" if old and new else "no" if new else "a"


def _listed(folders: list[Path]) -> str:
    names = [str(folder) for folder in folders]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _differences(old: Any, new: Any, name: str = "") -> Differences:
    if isinstance(old, dict) and isinstance(new, dict):
        found: Differences = {}
        for key in old.keys() | new.keys():
            found |= _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        return found
    return {} if old == new else {name: (old, new)}
