"""What is well-formed and yet wrong is noticed before any training."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from minirlhf_course.world import write_world

from minirlhf.data import DataFolder, read_folder
from minirlhf.errors import CheckpointError, DataError
from minirlhf.language.supported import check_model
from minirlhf.pipeline.audit import audit


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny folder with held-out files of its own, whose rows are in no training file."""
    out = Path(shutil.copytree(tiny_folder, tmp_path / "data"))
    for name in ("prompts", "comparisons", "corpus"):
        rows = lines(out / f"{name}.jsonl")
        count = len(rows) // 4
        write(out / "heldout" / f"{name}.jsonl", rows[:count])
        write(out / f"{name}.jsonl", rows[count:])
    held = [row for name in ("prompts", "comparisons") for row in lines(out / "heldout" / f"{name}.jsonl")]
    asked = {row.get("prompt") for row in held}
    for name in ("prompts", "comparisons", "demonstrations"):
        write(out / f"{name}.jsonl", [row for row in lines(out / f"{name}.jsonl") if row.get("prompt") not in asked])
    texts = {row["text"] for row in lines(out / "heldout" / "corpus.jsonl")}
    write(out / "corpus.jsonl", [row for row in lines(out / "corpus.jsonl") if row["text"] not in texts])
    return out


def test_a_sound_folder_gives_no_note(folder: Path, tokenizer) -> None:
    assert audit(read_folder(folder), tokenizer) == []


def test_a_folder_without_heldout_shares_no_prompt(tiny_folder: Path, tokenizer) -> None:
    data = read_folder(tiny_folder)
    data.corpus = [row for row in data.corpus if row.text not in {held.text for held in data.heldout_corpus}]
    assert audit(data, tokenizer) == []


@pytest.mark.parametrize("name", ["prompts", "comparisons", "corpus"])
def test_rows_in_training_and_held_out_files(name: str, folder: Path, tokenizer, refused, fast_run, tmp_path) -> None:
    held = [row | {"prompt": f"asked {i}"} for i, row in enumerate(lines(folder / "heldout" / f"{name}.jsonl"))]
    trained = lines(folder / f"{name}.jsonl")
    write(folder / f"{name}.jsonl", trained + held[:1])
    many = held + [held[-1] | {"prompt": f"new {i}", "text": f"new {i}"} for i in range(40)]
    write(folder / "heldout" / f"{name}.jsonl", many)
    said = f"1 of {len(many)} held-out {name} are in the training files too"
    notes = audit(read_folder(folder), tokenizer)
    assert len(notes) == 1 and said in notes[0]
    write(folder / f"{name}.jsonl", trained + held)
    with pytest.raises(DataError, match=rf"{len(held)} of {len(many)} held-out {name}.*--allow-shared-rows"):
        audit(read_folder(folder), tokenizer)
    (note,) = audit(read_folder(folder), tokenizer, allow_shared=True)
    assert f"{len(held)} of {len(many)}" in note
    out = tmp_path / "run"
    assert "--allow-shared-rows" in refused(fast_run(out, data=folder)) and not out.exists()


def test_files_that_nothing_reads(folder: Path, tokenizer) -> None:
    (folder / "comparison.jsonl").write_text("{}")
    (folder / "heldout" / "demonstrations2.jsonl").write_text("{}")
    for name in ("README.md", ".gitattributes", "LICENSE", "mine.jsonl.lock"):
        (folder / name).write_text("about")
    (note,) = audit(read_folder(folder), tokenizer)
    assert note.startswith(f"{folder}: nothing reads comparison.jsonl, heldout/demonstrations2.jsonl; the files of a")
    for number in range(50):
        (folder / f"part-{number:02d}.jsonl").write_text("{}")
    (note,) = audit(read_folder(folder), tokenizer)
    assert "nothing reads comparison.jsonl, part-00.jsonl, part-01.jsonl and 49 more; the files" in note


def test_what_a_run_keeps_in_its_data_folder_is_no_stray_file(folder: Path, tokenizer) -> None:
    (folder / "mine.jsonl").write_text("{}")
    (folder / "runs" / "first").mkdir(parents=True)
    assert audit(read_folder(folder), tokenizer, used=(folder / "runs" / "first", folder / "mine.jsonl")) == []
    (note,) = audit(read_folder(folder), tokenizer, used=(folder / "runs" / "first",))
    assert "nothing reads mine.jsonl;" in note


def word_tokenizer(words: list[str], lower: bool = False):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from minirlhf.language.tokenization import prepare

    known = {word: number for number, word in enumerate(["<unk>", "<eos>", *dict.fromkeys(words)])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if lower:
        tokenizer.normalizer = normalizers.Lowercase()
    return prepare(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>"))


def words_of(data: DataFolder) -> list[str]:
    texts = [row.text for row in (*data.corpus, *data.prompts)] + [row.completion for row in data.demonstrations]
    texts += [response for row in data.comparisons for response in row.responses]
    return " ".join(texts).split()


def test_unknown_words(folder: Path) -> None:
    data = read_folder(folder)
    words = words_of(data)
    rare = min(set(words), key=words.count)
    (note,) = audit(data, word_tokenizer([word for word in words if word != rare]))
    assert "are <unk>" in note and "jsonl:" in note
    for few in (words[:5], []):  # with no word at all every prompt has the same tokens, and no template is to blame
        with pytest.raises(DataError, match=r"are <unk>.*give a tokenizer that knows the text"):
            audit(data, word_tokenizer(few))


def test_unknown_words_of_prompts_count(folder: Path) -> None:
    data = read_folder(folder)
    words = words_of(data)
    data.prompts = [replace(row, text=f"zyzzyva {row.text}") for row in data.prompts]
    (note,) = audit(data, word_tokenizer(words))
    assert note.startswith(f"{data.prompts[0].where}: the tokenizer has no token for some of the text")


def test_a_word_tokenizer_that_changes_the_text(folder: Path) -> None:
    data = read_folder(folder)
    words = words_of(data)
    assert audit(data, word_tokenizer(words)) == []
    (note,) = audit(data, word_tokenizer([word.lower() for word in words], lower=True))
    assert "jsonl:1: the text changes when it is encoded" in note


def test_a_template_that_drops_the_prompt(folder: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{% for message in messages %}user: {% endfor %}")
    with pytest.raises(DataError, match="leaves the prompt out"):
        audit(read_folder(folder), tokenizer)


def test_texts_that_do_not_survive_the_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from minirlhf.language.tokenization import prepare

    small = Tokenizer(models.BPE())
    small.normalizer = normalizers.Lowercase()
    small.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    small.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    small.train_from_iterator([], trainers.BpeTrainer(special_tokens=["<eos>"], initial_alphabet=alphabet))
    demonstrations = lines(folder / "demonstrations.jsonl")
    write(folder / "demonstrations.jsonl", [row | {"completion": "An ANSWER."} for row in demonstrations])
    notes = audit(read_folder(folder), prepare(PreTrainedTokenizerFast(tokenizer_object=small, eos_token="<eos>")))
    assert len(notes) == 1 and "demonstrations.jsonl:1: the text changes when it is encoded" in notes[0]


def test_weights_that_are_not_finite(make_causal) -> None:
    model = make_causal("gpt2")
    check_model(model)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r"h\.1\.mlp\.c_fc\.weight is NaN or infinite"):
        check_model(model)


def test_a_world_of_another_version(tmp_path: Path, fast_run, refused) -> None:
    world = tmp_path / "world"
    write_world(world, corpus=200, demonstrations=60, comparisons=30, prompts=60, heldout_comparisons=20)
    file = world / "world.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 7}))
    assert "format_version 7" in refused(fast_run(tmp_path / "run", data=world))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 1, "seed": 1}))
    assert f"{file}: seed 1: in that world" in refused(fast_run(tmp_path / "run", data=world))


def test_heldout_that_is_a_file(tiny_folder: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(tiny_folder, tmp_path / "data"))
    (data / "heldout").write_text("rows")
    with pytest.raises(DataError, match="heldout: a file"):
        read_folder(data)
