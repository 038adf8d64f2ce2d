"""chat and evaluate keep to what the run was: its lengths, its context, its world."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, GPT2Config

from minirlhf.checkpoints import sealed
from minirlhf.cli import main
from minirlhf.language.evaluation import Answers
from minirlhf.language.tokenization import load_tokenizer, tokenizer_from_file
from minirlhf.pipeline.folder import LONGEST_ANSWERS, context_of_run, read_examples

QUICK = ["--sft.epochs", "0.1", "--reward-model.epochs", "0.2", "--rlhf.steps", "1", "--rlhf.batch-size", "8"]
QUICK += ["--rlhf.max-response-tokens", "4", "--evaluation.max-response-tokens", "3"]
QUICK += ["--evaluation.prompts", "2", "--evaluation.temperature", "0.5", "--evaluation.corpus-blocks", "2"]
CONTEXT = 128


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, make_causal, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    make_causal("gpt2", seed=5).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, fast_run, gpt2: Path) -> Path:
    """Of a GPT-2, whose learned positions end where its context does."""
    out = tmp_path_factory.mktemp("talk") / "run"
    assert main(fast_run(out, "--model", str(gpt2), *QUICK)) == 0
    return out


@pytest.fixture
def said(run: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What chat or evaluate prints about that run: ``said("chat", "--prompt", "Hi")``."""

    def call(command: str, *options: str) -> str:
        assert main([command, "--run", str(run), *options]) == 0
        return capsys.readouterr().out

    return call


@pytest.fixture
def measured(said) -> Callable[..., dict]:
    """What evaluate prints, as other programs read it: without NaN and Infinity."""

    def call(*options: str) -> dict:
        text = said("evaluate", "--device", "cpu", *options)
        assert "NaN" not in text and "Infinity" not in text
        return json.loads(text)

    return call


def report_of(run: Path) -> dict:
    return json.loads((run / "report.json").read_text())


def test_pretrained_model_takes_the_base_steps_place(gpt2: Path, run: Path) -> None:
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (run / "base", gpt2)]
    base, given = (model.state_dict() for model in models)
    assert all((base[key] == given[key]).all() for key in given)
    assert json.loads((run / "ppo_ptx" / "config.json").read_text())["model_type"] == "gpt2"
    assert (run / "report.html").is_file()
    assert report_of(run)["parameters"] == sum(p.numel() for p in models[1].parameters())
    row = json.loads((run / "ppo" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["policy/first_ratio_error"] < 1e-5


def test_evaluate_repeats_the_report(gpt2: Path, run: Path, measured) -> None:
    evaluation = report_of(run)["evaluation"]
    for checkpoint, expected in (*evaluation.items(), (str(gpt2), evaluation["base"])):
        row = measured("--checkpoint", checkpoint)
        assert row.pop("checkpoint") == checkpoint and row.pop("judge") == "reward_model"
        assert row.keys() == expected.keys() and row["headroom_closed"] is None
        for key, value in expected.items():
            assert row[key] == (value if value is None else pytest.approx(value, rel=1e-5)), (checkpoint, key)


def test_evaluate_measures_as_the_run_did(measured) -> None:
    given = ["--prompts", "2", "--temperature", "0.5", "--max-response-tokens", "3"]
    rows = [measured(*options) for options in ([], given, ["--temperature", "4"])]
    assert rows[0] == rows[1] != rows[2]
    assert rows[0]["mean_length"] <= 3
    alone = measured("--prompts", "1")  # which says nothing of other prompts
    assert alone["gold_standard_error"] is None and alone["gold_gain_vs_base_interval"] is None
    assert alone["win_rate_vs_base_interval"][1] - alone["win_rate_vs_base_interval"][0] > 0.7


def test_chat_answers_with_every_policy_as_long_as_the_run_did(said) -> None:
    answers = [said("chat", "--prompt", "Hi", *o) for o in ([], ["--max-response-tokens", "3"])]
    for name in ("base", "SFT", "PPO", "PPO-ptx"):
        assert any(line.split()[:1] == [name] for line in answers[0].splitlines()), answers[0]
    assert answers[0] == answers[1]  # the same seed says the same, and the run's own limit is 3
    assert said("chat", "--prompt", "Hi", "--max-response-tokens", "9") != answers[0]
    assert said("chat", "--prompt", "Hi", "--greedy")


def test_evaluate_is_bounded_by_the_context(run: Path, refused, measured) -> None:
    message = refused(["evaluate", "--run", str(run), "--max-response-tokens", str(CONTEXT)])
    assert message.startswith(f"minirlhf: error: --max-response-tokens {CONTEXT}: the models read {CONTEXT}")
    most = message.split("give at most ")[1].split()[0]
    assert measured("--max-response-tokens", most)["mean_length"] > 3


def test_evaluate_is_bounded_by_what_the_reward_model_reads(run: Path, refused, monkeypatch) -> None:
    from minirlhf.pipeline import evaluate

    def shorter(*arguments, **options):
        model, tokenizer = load_reward_model(*arguments, **options)
        model.config.n_positions = CONTEXT // 2
        return model, tokenizer

    load_reward_model = evaluate.load_reward_model
    monkeypatch.setattr(evaluate, "load_reward_model", shorter)
    said = refused(["evaluate", "--run", str(run), "--max-response-tokens", "60", "--device", "cpu"])
    assert f"the models read {CONTEXT // 2} tokens" in said


def test_the_context_of_a_run_is_the_shortest_of_its_policies(tmp_path: Path) -> None:
    folders = tmp_path / "base", tmp_path / "sft"
    for folder, context in zip(folders, (96, 64), strict=True):
        GPT2Config(n_positions=context).save_pretrained(folder)
    assert context_of_run(tmp_path) == 64
    (folders[1] / "adapter_config.json").write_text("{}")  # on the base model, wherever the user's copy is now
    assert context_of_run(tmp_path) == 96


def test_a_checkpoint_smaller_than_its_tokenizer(run: Path, refused, make_causal, tokenizer, tmp_path) -> None:
    make_causal("gpt2", vocab_size=20).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    message = refused(["evaluate", "--run", str(run), "--checkpoint", str(tmp_path / "small")])
    assert "is outside the model's vocabulary of 20" in message


def test_chat_is_bounded_by_the_context(run: Path, refused, said, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"the models read {CONTEXT}" in said("chat", "--prompt", "Hi", "--max-response-tokens", "1000")
    endless = "Tell me about the otter. " * CONTEXT
    assert f"the models read {CONTEXT}" in refused(["chat", "--run", str(run), "--prompt", endless])
    typed = iter([endless, "hello", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    answers = said("chat")
    assert "shorten it" in answers and answers.count("PPO-ptx") == 1


@pytest.mark.parametrize(
    ("command", "word"),
    [
        (["evaluate", "--checkpoint", "nonsense"], "nonsense"),
        (["evaluate", "--checkpoint", "reward_model"], "scores texts"),
        (["evaluate", "--device", "toaster"], "toaster"),
        (["evaluate", "--run", "no_run"], "no_run"),
        (["chat", "--run", "no_run", "--prompt", "a"], "no_run"),
        (["chat", "--prompt", "Hi \udcff"], r"the prompt Hi \udcff is not UTF-8"),
        (["chat", "--prompt", "Hi", "--greedy", "--temperature", "0"], "--temperature 0"),
        (["chat", "--prompt", "Hi", "--temperature=0.1", "--temperature", "0"], "--temperature 0"),
    ],
)
def test_mistakes(run: Path, refused, capsys: pytest.CaptureFixture[str], command: list[str], word: str) -> None:
    message = refused([command[0], "--run", str(run), *command[1:]])
    assert word in message and ("reward_model" in message) == ("reward_model" in command)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "damage",
    [
        lambda run, text: text.replace("Tell", "Yell"),
        lambda run, text: text[:-9],
        lambda run, text: " " * (LONGEST_ANSWERS + 1),
        lambda run, text: sealed_again(run, "[3]"),
        lambda run, text: sealed_again(run, "[" * 10_000),
    ],
)
def test_examples_that_are_not_the_runs_are_not_shown(damage, run: Path, refused, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    file = copy / "answers.json"
    assert read_examples(copy) == [row["prompt"] for row in json.loads(file.read_text())]
    file.write_text(damage(copy, file.read_text()))
    assert f"{file}: damaged" in refused(["chat", "--run", str(copy)])


def sealed_again(run: Path, text: str) -> str:
    """Another content of answers.json, and a report that says it is its own."""
    report = report_of(run) | {"answers_sha256": hashlib.sha256(text.encode()).hexdigest()}
    del report["sha256"]
    (run / "report.json").write_text(json.dumps(sealed(report)))
    return text


@pytest.mark.parametrize("words", [False, True])
def test_only_a_vocabulary_of_words_has_no_capitals_and_lacks_some(run: Path, capsys, monkeypatch, words: bool) -> None:
    small_world = Path(__file__).parents[1] / "data" / "small_world" / "tokenizer.json"
    tokenizer = tokenizer_from_file(small_world) if words else load_tokenizer(run / "base")
    tokenizer.unk_token = "<unk>" if words else "<eos>"  # GPT-2's tokenizers have one, and it is the end of text
    typed = "Where does a Frog live in Paris ?"
    asked, lines = set(), iter([typed, ""])

    def answer(model, tokenizer, prompts, *arguments, **settings) -> Answers:
        asked.update(prompts)
        return Answers(["yes"], [True], [1], [])

    monkeypatch.setattr("minirlhf.pipeline.chat.answer", answer)
    monkeypatch.setattr("minirlhf.pipeline.chat.load_tokenizer", lambda path: tokenizer)
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    for command in ([], ["--prompt", typed]):
        assert main(["chat", "--run", str(run), *command]) == 0
        said = capsys.readouterr().out
        assert ("no word for: paris)" in said) == words
        assert ("for example: Tell me about" in said) == (not command)
    assert asked == ({typed.lower()} if words else {typed})
