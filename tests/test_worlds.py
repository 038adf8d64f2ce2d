"""Worlds are guests: found by name among installed entry points, and a data folder can name nothing else."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from minirlhf_course.world import GoldLabeler, World
from minirlhf_course.world.corpus import CorpusWriter
from minirlhf_course.world.facts import Facts
from minirlhf_course.world.guest import SMALL_WORLD

from minirlhf import worlds
from minirlhf.cli import main
from minirlhf.data import Comparison, DataFolder, Prompt, Text
from minirlhf.errors import DataError
from minirlhf.pipeline import inputs
from minirlhf.pipeline.judges import gold_judge

GUEST = """
class Judge:
    is_gold = True

    def check(self, prompt):
        if "marsh" in prompt:
            raise ValueError("this world is dry")

    def scores(self, prompts, responses, ended):
        return [float(len(text)) for text in responses]

    def parts(self, prompts, responses, ended):
        return [{"total": score} for score in self.scores(prompts, responses, ended)]

    def best(self, prompts):
        return None


class Flat:
    def write(self, folder, seed):
        folder.mkdir()
        (folder / "seed.txt").write_text(str(seed))

    def judge(self, facts):
        if facts.get("height") != 0:
            raise ValueError("a flat world has the height 0")
        return Judge()

    def verify(self, facts, texts):
        if any("hill" in text for text in texts):
            raise ValueError("a flat world has no hills")


FLAT = Flat()
"""


@pytest.fixture
def flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package, installed, with one world that works and one whose module is gone."""
    site = tmp_path / "site"
    (site / "flatland-1.0.dist-info").mkdir(parents=True)
    (site / "flatland.py").write_text(GUEST)
    (site / "flatland-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: flatland\nVersion: 1.0\n")
    points = "[minirlhf.worlds]\nflat = flatland:FLAT\ngone = flatland.no_such_module:WORLD\n"
    (site / "flatland-1.0.dist-info" / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(site)


def judge(folder: Path, facts: object, *prompts: str, corpus: Sequence[str] = (), **rows) -> worlds.Judge:
    (folder / "world.json").write_text(json.dumps(facts))
    asked = [Prompt(text, f"prompts.jsonl:{line}") for line, text in enumerate(prompts, start=1)]
    corpus = [Text(text, f"corpus.jsonl:{line}") for line, text in enumerate(corpus, start=1)]
    found = gold_judge(DataFolder(folder, corpus, [], [], asked, world_file=folder / "world.json", **rows))
    assert found is not None and found.is_gold
    return found


def test_the_small_world_is_installed_under_its_name() -> None:
    assert worlds.find_world("small") is worlds.find_world(worlds.DEFAULT_WORLD) is SMALL_WORLD


@pytest.mark.parametrize("name", [{}, {"world": "small"}])
def test_the_small_worlds_judge_is_its_gold_labeler(tmp_path: Path, name: dict[str, str]) -> None:
    prompt, answer = "where does an owl live ?", "an owl lives in a tree ."
    found, gold = judge(tmp_path, {"seed": 3} | name, prompt), GoldLabeler(World(3))
    for ended in (True, False):
        score = gold.score(prompt, answer, ended)
        assert found.scores([prompt], [answer], [ended]) == [score.total]
        assert found.parts([prompt], [answer], [ended]) == [score._asdict()]
    assert found.best([prompt]) == [gold.best(prompt)]


def test_a_corpus_of_another_seed_is_noticed(tmp_path: Path) -> None:
    corpus = CorpusWriter(World(3)).documents(400, seed=3)
    judge(tmp_path, {"seed": 3}, corpus=corpus)
    with pytest.raises(DataError, match=r"world\.json: seed 4: in that world \d+ of \d+ tastes .* likes .*; write the"):
        judge(tmp_path, {"seed": 4}, corpus=corpus)
    judge(tmp_path, {"seed": 4}, corpus=["a text of somebody's own ."] * 400)
    same = next(seed for seed in range(4, 1000) if Facts(seed).values("joy") == Facts(3).values("joy"))
    judge(tmp_path, {"seed": same}, corpus=corpus)  # another number, the same world


STRANGE, WHERE = "what is a transistor ?", "heldout/file.jsonl:3"


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("heldout_prompts", Prompt(STRANGE, WHERE)),
        ("heldout_comparisons", Comparison(STRANGE, ("a", "b"), (1.0, 0.0), where=WHERE)),
    ],
)
def test_every_prompt_that_will_be_judged_must_be_one_of_the_world(tmp_path: Path, kind: str, row) -> None:
    with pytest.raises(DataError, match=rf"{WHERE}: the gold judge can't score this prompt .*transistor"):
        judge(tmp_path, {"seed": 0}, "where does an owl live ?", **{kind: [row]})


def test_a_world_of_another_package_writes_and_judges(flat, tmp_path: Path) -> None:
    assert main(["world", "--name", "flat", "--seed", "7", "--out", str(tmp_path / "new")]) == 0
    assert (tmp_path / "new" / "seed.txt").read_text() == "7"
    assert judge(tmp_path, {"world": "flat", "height": 0}, "meadow").scores(["a"], ["four"], [True]) == [4.0]
    with pytest.raises(DataError, match=r"world\.json: a flat world has the height 0; write the folder again"):
        judge(tmp_path, {"world": "flat"})
    with pytest.raises(DataError, match=r"world\.json: a flat world has no hills; write the folder again"):
        judge(tmp_path, {"world": "flat", "height": 0}, corpus=["up the hill"])
    with pytest.raises(
        DataError, match=r"prompts\.jsonl:2: the gold judge can't score this prompt \(this world is dry\)"
    ):
        judge(tmp_path, {"world": "flat", "height": 0}, "meadow", "marsh")


@pytest.mark.parametrize("name", ["os:system", "flatland:FLAT", "minirlhf_course.world.guest:SMALL_WORLD", None, []])
def test_only_what_is_installed_can_be_named(flat, tiny_folder: Path, tmp_path: Path, capsys, name: object) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "data"))
    (folder / "world.json").write_text(json.dumps({"seed": 0, "world": name}))
    assert main(["run", "--preset", "fast", "--data", str(folder), "--out", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"minirlhf: error: {folder / 'world.json'}: no world named {name!r} is installed")
    assert "(installed: flat, gone, small); install" in message and message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_world_whose_code_is_gone(flat, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"world\.json: the world 'gone' .* can't be loaded \(No module named 'flatland"
    ):
        judge(tmp_path, {"world": "gone"})


def test_without_the_small_world_one_sentence_says_so(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(worlds, "GROUP", "minirlhf.nothing")
    monkeypatch.setattr(inputs, "DEFAULT_DATA", tmp_path / "not_shipped")
    said = "no world named 'small' is installed (installed: none); install minirlhf again, with its course"
    for command, advice in (["world"], ""), (["run", "--preset", "fast"], ", or give a folder of your own with --data"):
        assert main([*command, "--out", str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err == f"minirlhf: error: {said}{advice}\n"
    with pytest.raises(DataError, match="or delete the file to have the reward model judge"):
        judge(tmp_path, {"seed": 0})
