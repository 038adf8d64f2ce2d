"""Before any training: does the data folder mean what its owner thinks? Notes with counts; the worst is refused."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minirlhf.data import ENDINGS, TABLES, DataFolder
from minirlhf.errors import DataError
from minirlhf.language.tokenization import decode, drops_prompt, encode_prompts, encode_responses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_SHARED = 0.05
"""Share of held-out rows that may also be in the training files."""
MOST_UNKNOWN = 0.1
"""Share of a text's tokens that may be <unk>."""
SAMPLE = 500
"""Texts that are encoded and decoded again."""
SHOWN = 3
"""Names of files that nothing reads."""
ABOUT = ("readme", "license", "licence", "notice", "citation", "dataset_info", ".git")


def audit(
    folder: DataFolder,
    tokenizer: PreTrainedTokenizerBase,
    *,
    allow_shared: bool = False,
    used: Collection[Path] = (),
) -> list[str]:
    """Look for what is well-formed and yet wrong.

    Args:
        folder: the data.
        tokenizer: of the models.
        allow_shared: accept any number of held-out rows that are also trained on.
        used: files and folders of this run that may be in the folder of data too, such as its own.

    Returns:
        Notes for the user.

    Raises:
        DataError: too many held-out rows are also in the training files; the tokenizer knows too little of the text; or
            its template leaves the prompt out.
    """
    return [
        *_shared_rows(folder, allow_shared),
        *_unread_files(folder.path, used),
        *_tokens(folder, tokenizer),
    ]


def _shared_rows(folder: DataFolder, allowed: bool) -> Iterator[str]:
    trained = {row.text for row in folder.prompts}
    trained.update(row.prompt for rows in (folder.demonstrations, folder.comparisons) for row in rows)
    held = {row.prompt for row in folder.heldout_comparisons}
    pairs = {(row.prompt, response) for row in folder.comparisons if row.prompt in held for response in row.responses}
    for name, rows in (
        ("prompts", [row.text in trained for row in folder.heldout_prompts]),
        ("comparisons", [all((row.prompt, x) in pairs for x in row.responses) for row in folder.heldout_comparisons]),
        ("corpus", _known({row.text for row in folder.corpus}, (row.text for row in folder.heldout_corpus))),
    ):
        if name == "corpus" and not (folder.path / "heldout").is_dir():
            continue  # we split the corpus ourselves, row by row, and a text may occur twice
        shared = sum(rows)
        if not shared:
            continue
        said = f"{folder.path}: {shared} of {len(rows)} held-out {name} are in the training files too"
        if shared > MOST_SHARED * len(rows) and not allowed:
            raise DataError(
                f"{said}, so what is measured on them says little about new ones; remove them from either, or allow it "
                "with --allow-shared-rows"
            )
        yield f"{said}; what is measured on them says little about new ones"


def _known(trained: set[str], texts: Iterable[str]) -> list[bool]:
    return [text in trained for text in texts]


def _unread_files(path: Path, used: Collection[Path]) -> Iterator[str]:
    tables = {f"{name}{ending}" for name in TABLES for ending in ENDINGS}
    ours = {part for each in used for part in (each.resolve(), *each.resolve().parents)}
    unread = []
    for part in (path, path / "heldout"):
        known = tables | ({"tokenizer.json", "world.json", "heldout"} if part == path else set())
        for file in sorted(part.iterdir()) if part.is_dir() else ():
            about = file.name.lower().startswith((*ABOUT, ".", "_")) or file.suffix == ".lock"
            if file.name not in known and not about and file.resolve() not in ours:
                unread.append(str(file.relative_to(path)))
    if unread:
        more = f" and {len(unread) - SHOWN} more" if len(unread) > SHOWN else ""
        names = ", ".join(f"{table}.jsonl" for table in TABLES)
        yield f"{path}: nothing reads {', '.join(unread[:SHOWN])}{more}; the files of a data folder are {names}"


def _tokens(folder: DataFolder, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """What the tokenizer makes of the texts: a sample of each table."""
    if drops_prompt(tokenizer):
        raise DataError(
            f"{folder.path}: the tokenizer's chat template writes the same for every prompt, so it leaves the prompt "
            "out; fix chat_template in the tokenizer's files"
        )
    pairs = [(row.where, row.completion) for row in folder.demonstrations]
    pairs += [(row.where, row.responses[0]) for row in folder.comparisons]
    texts = [*_some(pairs), *_some([(row.where, row.text) for row in folder.corpus])]
    rows = [row[:-1] for row in encode_responses(tokenizer, [text for _, text in texts])]
    asked = _some([(row.where, row.text) for row in folder.prompts])
    unknown = None if tokenizer.unk_token_id == tokenizer.eos_token_id else tokenizer.unk_token_id
    if unknown is not None:
        encoded = [*encode_prompts(tokenizer, [prompt for _, prompt in asked]), *rows]
        total, missing = sum(map(len, encoded)), sum(row.count(unknown) for row in encoded)
        if missing:
            where = next(where for (where, _), row in zip([*asked, *texts], encoded, strict=True) if unknown in row)
            said = f"{where}: the tokenizer has no token for some of the text"
            said += f" ({missing / total:.1%} of {total:,} tokens are <unk>)"
            if missing > MOST_UNKNOWN * total:
                raise DataError(f"{said}; give a tokenizer that knows the text, or none to have one trained")
            yield said
    # What can't be spelled at all is counted above; here, what comes back otherwise than it went in.
    spelled = [(where, text, row) for (where, text), row in zip(texts, rows, strict=True) if unknown not in row]
    back = decode(tokenizer, [row for _, _, row in spelled])
    changed = [w for (w, text, _), again in zip(spelled, back, strict=True) if text.strip() != again.strip()]
    if changed:
        yield (
            f"{changed[0]}: the text changes when it is encoded and decoded, and so do {len(changed) - 1} more of "
            f"{len(spelled)} that were tried; models learn what the tokenizer makes of it"
        )


def _some(rows: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Rows spread over the whole table."""
    return list(rows[:: max(1, len(rows) // SAMPLE)])
