"""Write the world as a folder of data that the pipeline reads like any other."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from minirlhf_course.world.corpus import CorpusWriter
from minirlhf_course.world.labelers import SimulatedLabeler, make_labelers
from minirlhf_course.world.mistakes import response_set
from minirlhf_course.world.world import World

FORMAT_VERSION = 1
SPECIAL_TOKENS: tuple[str, ...] = ("<pad>", "<eos>", "<unk>")
DEFAULT_SIZES: dict[str, int] = {
    "corpus": 20_000,
    "demonstrations": 24_000,
    "comparisons": 6_000,
    "prompts": 4_000,
    "heldout_corpus": 500,
    "heldout_prompts": 800,
    "heldout_comparisons": 600,
}


def write_world(out_dir: str | os.PathLike[str], seed: int = 0, **sizes: int) -> None:
    """Write corpus, demonstrations, comparisons, prompts, the tokenizer, `world.json`, and the held-out split.

    The folder appears whole or not at all: it is written aside and then renamed. The same seed and sizes give the same
    bytes.

    Args:
        out_dir: where to. May be absent or empty; raises FileExistsError if there is anything in it.
        seed: of the world and of everything drawn from it.
        sizes: other numbers of rows than `DEFAULT_SIZES`; raises ValueError for a name that is not there.

    Example:
        >>> write_world("data/small_world", seed=0, corpus=100)  # doctest: +SKIP
    """
    unknown = sorted(set(sizes) - set(DEFAULT_SIZES))
    if unknown:
        raise ValueError(f"unknown size(s) {unknown}; known are {sorted(DEFAULT_SIZES)}")
    target = Path(out_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not an empty folder: remove it first, or write elsewhere")
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.parent / f".{target.name}.{os.getpid()}.part"
    try:
        (aside / "heldout").mkdir(parents=True)
        _write_files(aside, World(seed), {**DEFAULT_SIZES, **sizes})
        if target.exists():
            target.rmdir()  # empty, or it would have been refused
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_files(folder: Path, world: World, sizes: Mapping[str, int]) -> None:
    seed = world.seed
    corpus = CorpusWriter(world).documents(sizes["corpus"], seed)
    _rows(folder / "corpus.jsonl.gz", ({"text": text} for text in corpus))
    _rows(
        folder / "demonstrations.jsonl.gz",
        ({"prompt": p, "completion": c} for p, c in world.demonstrations(sizes["demonstrations"], seed)),
    )
    _rows(folder / "comparisons.jsonl.gz", comparisons(world, sizes["comparisons"], seed, make_labelers(world)))
    _rows(folder / "prompts.jsonl.gz", ({"prompt": p} for p in world.prompts(sizes["prompts"], seed)))
    heldout = folder / "heldout"
    fresh = heldout_corpus(world, sizes["heldout_corpus"], seed, frozenset(corpus))
    _rows(heldout / "corpus.jsonl.gz", ({"text": text} for text in fresh))
    _rows(heldout / "prompts.jsonl.gz", ({"prompt": p} for p in heldout_prompts(world, sizes["heldout_prompts"], seed)))
    _rows(heldout / "comparisons.jsonl.gz", heldout_comparisons(world, sizes["heldout_comparisons"], seed))
    _tokenizer(folder / "tokenizer.json", world.vocabulary)
    about = {"format_version": FORMAT_VERSION, "seed": seed, "sizes": dict(sizes), "families": list(world.families)}
    (folder / "world.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def comparisons(
    world: World, n: int, seed: int, labelers: Sequence[SimulatedLabeler], heldout: bool = False
) -> list[dict[str, Any]]:
    """`n` prompts with 4 to 9 answers each, scored by one labeler (drawn at random for each prompt).

    Returns:
        Rows `{"prompt", "responses": [K], "scores": [K], "labeler"}`; no answer occurs twice in a row.
    """
    rng = Random(f"comparisons {world.seed} {seed} {heldout}")
    rows = []
    for _ in range(n):
        task = world.task(rng, heldout)
        responses = response_set(world, task, rng.randint(4, 9), rng)
        rows.append(rng.choice(labelers).rank(task.prompt, responses, rng))
    return rows


def heldout_corpus(world: World, n: int, seed: int, seen: frozenset[str]) -> list[str]:
    """`n` documents, none of which is in `seen` (a short one may well have been drawn twice)."""
    return [text for text in CorpusWriter(world).documents(2 * n, seed, heldout=True) if text not in seen][:n]


def heldout_prompts(world: World, n: int, seed: int) -> list[str]:
    """`n` prompts of the held-out split in the families' shares, distinct as far as a family has so many."""
    rng = Random(f"heldout prompts {seed}")
    found: dict[str, int] = {}
    for _ in range(n):
        task = world.task(rng, heldout=True)
        for _ in range(20):
            if task.prompt not in found:
                break
            task = world.task(rng, heldout=True, family=task.family)
        found[task.prompt] = found.get(task.prompt, 0) + 1
    return [prompt for prompt, count in found.items() for _ in range(count)]


def heldout_comparisons(world: World, n: int, seed: int) -> list[dict[str, Any]]:
    """Each held-out prompt with its answers twice: scored by a training labeler, then by a held-out one."""
    rng = Random(f"heldout comparisons {seed}")
    strangers = make_labelers(world, heldout=True)
    rows = []
    for row in comparisons(world, n, seed, make_labelers(world), heldout=True):
        rows.append(row)
        rows.append(rng.choice(strangers).rank(row["prompt"], row["responses"], rng))
    return rows


def _rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Gzipped JSON lines, the same bytes each time: no time stamp and no file name in the header."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0, compresslevel=9) as file:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    path.write_bytes(buffer.getvalue())


def _tokenizer(path: Path, vocabulary: list[str]) -> None:
    """A word-level tokenizer: text is split at single spaces, and the newline is a word."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split

    words = [*SPECIAL_TOKENS, *vocabulary]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(" ", "removed")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    path.write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
