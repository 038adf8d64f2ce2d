"""chat and evaluate keep to what the run was: its lengths, its context, its world."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minirlhf.cli import main
from minirlhf.language.evaluation import Answers
from minirlhf.language.tokenization import load_tokenizer, tokenizer_from_file

QUICK = ["--sft.epochs", "0.1", "--reward-model.epochs", "0.2", "--rlhf.steps", "1", "--rlhf.batch-size", "8"]
QUICK += ["--rlhf.max-response-tokens", "4", "--evaluation.max-response-tokens", "3"]
QUICK += ["--evaluation.prompts", "2", "--evaluation.temperature", "0.5", "--evaluation.corpus-blocks", "2"]
CONTEXT = 128


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, make_causal, tokenizer) -> Path:
    """Of a GPT-2, whose learned positions end where its context does."""
    folder = tmp_path_factory.mktemp("talk")
    make_causal("gpt2", seed=5).save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")
    command = ["run", "--preset", "fast", "--data", str(tiny_folder), "--out", str(folder / "run"), "--device", "cpu"]
    assert main([*command, "--model", str(folder / "gpt2"), *QUICK]) == 0
    return folder / "run"


def test_evaluate_measures_as_the_run_did(run: Path, capsys: pytest.CaptureFixture) -> None:
    report = json.loads((run / "report.json").read_text())["evaluation"]["ppo_ptx"]
    plain = ["evaluate", "--run", str(run), "--device", "cpu"]
    given = ["--prompts", "2", "--temperature", "0.5", "--max-response-tokens", "3"]
    said = []
    for command in (plain, [*plain, *given], [*plain, "--temperature", "4"]):
        assert main(command) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[0] == said[1] != said[2]
    assert said[0]["mean_length"] == report["mean_length"] <= 3
    assert said[0]["kl_to_sft"] == pytest.approx(report["kl_to_sft"], rel=1e-5)


def test_chat_answers_as_long_as_the_run_did(run: Path, capsys: pytest.CaptureFixture) -> None:
    said = []
    for options in ([], ["--max-response-tokens", "3"], ["--max-response-tokens", "9"]):
        assert main(["chat", "--run", str(run), "--prompt", "Hi", *options]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


def test_evaluate_is_bounded_by_the_context(run: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["evaluate", "--run", str(run), "--max-response-tokens"]
    assert main([*command, str(CONTEXT)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"minirlhf: error: --max-response-tokens {CONTEXT}: the models read {CONTEXT}")
    most = message.split("give ")[1].split(" ")[0]
    assert main([*command, most]) == 0
    assert json.loads(capsys.readouterr().out)["mean_length"] > 3


def test_chat_is_bounded_by_the_context(run: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["chat", "--run", str(run), "--prompt", "Hi", "--max-response-tokens", "1000"]) == 0
    assert f"the models read {CONTEXT}" in capsys.readouterr().out
    endless = "Tell me about the otter. " * CONTEXT
    assert main(["chat", "--run", str(run), "--prompt", endless]) == 2
    assert f"the models read {CONTEXT}" in capsys.readouterr().err
    typed = iter([endless, "hello", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    assert main(["chat", "--run", str(run)]) == 0
    said = capsys.readouterr().out
    assert "shorten it" in said and said.count("PPO-ptx") == 1


@pytest.mark.parametrize("option", ["--greedy", "--temperature=0.1"])
def test_an_answer_that_nobody_can_give(run: Path, option: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["chat", "--run", str(run), "--prompt", "Hi", option, "--temperature", "0"]) == 2
    assert "--temperature 0" in capsys.readouterr().err


def test_a_reward_model_is_not_measured_as_a_policy(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["evaluate", "--run", str(run), "--checkpoint", "reward_model"]) == 2
    shown = capsys.readouterr()
    assert "scores texts" in shown.err and "reward_model" in shown.err and not shown.out


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
