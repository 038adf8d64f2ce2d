"""Real models and parts of one's own: --preset pretrained, --lora.rank, --sft, --reward-model, --reward, export."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minirlhf.cli import main
from minirlhf.config import RunConfig, preset
from minirlhf.errors import CheckpointError, UserError
from minirlhf.language.models import load_causal_model, load_scalar_model, scalar_model_from
from minirlhf.language.supported import check_scalar_model
from minirlhf.pipeline.given import FileReward
from minirlhf.pipeline.label import items_to_rank

pytest.importorskip("peft")

REWARD = """
def short(prompts, responses):
    assert len(prompts) == len(responses)
    return [-len(text) / 10 for text in responses]
"""
SMALL = {
    "--rlhf.steps": 2,
    "--rlhf.batch-size": 8,
    "--rlhf.minibatch-size": 4,
    "--rlhf.max-response-tokens": 8,
    "--rlhf.ptx-batch-size": 2,
    "--rlhf.warmup": 0,
    "--base.block-length": 32,
    "--evaluation.max-response-tokens": 8,
    "--evaluation.prompts": 8,
    "--evaluation.corpus-blocks": 4,
}
LESS_SFT = ("--sft.batch-size", "8", "--sft.epochs", "0.4")
LESS_RM = ("--reward-model.batch-size", "4", "--reward-model.epochs", "0.4")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, make_causal, tokenizer) -> dict[str, Path]:
    """Folders of small models and a reward's file, as a user would have them."""
    place = tmp_path_factory.mktemp("made")
    for architecture in ("llama", "gpt2"):
        make_causal(architecture, seed=5, scale=4.0).save_pretrained(place / architecture)
        tokenizer.save_pretrained(place / architecture)
    scalar_model_from(make_causal("gpt2", seed=6, scale=4.0), seed=0).save_pretrained(place / "rm")
    tokenizer.save_pretrained(place / "rm")
    (place / "rewards.py").write_text(REWARD)
    return {name: place / name for name in ("llama", "gpt2", "rm", "rewards.py")}


@pytest.fixture(scope="session")
def small(tiny_folder: Path) -> Callable[..., list[str]]:
    """A small run of the preset for pretrained models."""

    def command(out: Path, *options: str) -> list[str]:
        few = [part for name, value in SMALL.items() for part in (name, str(value))]
        where = ["--data", str(tiny_folder), "--out", str(out), "--device", "cpu"]
        return ["run", "--preset", "pretrained", *where, *few, *options]

    return command


@pytest.fixture(scope="module")
def adapted(made, small, tmp_path_factory) -> Path:
    """A run of adapters: bfloat16, layers computed again in backward."""
    out = tmp_path_factory.mktemp("adapted") / "run"
    assert main(small(out, *adapters(made))) == 0
    return out


def adapters(made: dict[str, Path]) -> list[str]:
    return ["--model", str(made["llama"]), "--lora.rank", "4", *LESS_SFT, *LESS_RM]


def read(file: Path) -> dict:
    return json.loads(file.read_text())


def sums(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*.safetensors"))
    }


def test_a_run_of_adapters(adapted: Path, made, tiny_folder: Path, capsys) -> None:
    from peft import AutoPeftModelForCausalLM

    config, report = read(adapted / "config.json"), read(adapted / "report.json")
    assert config["precision"] == "bfloat16" and config["gradient_checkpointing"] and config["lora"]["rank"] == 4
    assert config["rlhf"]["lr"] == pytest.approx(3e-5) and config["sft"]["lr"] == pytest.approx(1e-4)
    assert report["given"] == {"base": "llama"}
    page = (adapted / "report.html").read_text()
    assert "Given, not trained here: base (llama)." in page
    for step in ("sft", "reward_model", "ppo", "ppo_ptx"):
        settings = read(adapted / step / "adapter_config.json")
        assert settings["base_model_name_or_path"] == str(made["llama"].resolve())
        assert settings["task_type"] == ("SEQ_CLS" if step == "reward_model" else "CAUSAL_LM")
        size = sum(file.stat().st_size for file in (adapted / step).glob("*.safetensors"))
        assert size < (made["llama"] / "model.safetensors").stat().st_size
    assert report["evaluation"]["ppo"]["kl_to_sft"] > 0
    rows = [json.loads(line) for line in (adapted / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and abs(rows[0]["objective/kl"]) < 0.2

    # The other commands read it, and so does peft from the place where the user has the model.
    capsys.readouterr()
    assert main(["chat", "--run", str(adapted), "--prompt", "Hi"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("base", "SFT", "PPO", "PPO-ptx"))
    assert main(["evaluate", "--run", str(adapted), "--checkpoint", "ppo", "--device", "cpu"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["kl_to_sft"] == pytest.approx(report["evaluation"]["ppo"]["kl_to_sft"])
    assert items_to_rank(adapted, prompts=2, answers=2)
    theirs = AutoPeftModelForCausalLM.from_pretrained(adapted / "ppo", dtype=torch.float32).eval()
    tokens = {"input_ids": torch.tensor([[5, 44, 2, 61, 9, 12]])}

    out = adapted.parent / "exported"
    assert main(["export", "--run", str(adapted), "--step", "ppo", "--out", str(out)]) == 0
    assert not (out / "adapter_config.json").exists() and read(out / "config.json")["dtype"] == "bfloat16"
    ours = load_causal_model(out)(**tokens).logits.log_softmax(-1)  # rounded to bfloat16, unlike peft's
    torch.testing.assert_close(ours, theirs(**tokens).logits.log_softmax(-1), atol=2e-2, rtol=0)
    assert main(["export", "--run", str(adapted), "--step", "reward_model", "--out", str(out) + "-rm"]) == 0
    assert load_scalar_model(Path(str(out) + "-rm")).config.score_offset != 0


@pytest.mark.slow
def test_a_run_of_adapters_that_is_stopped_continues_with_the_same_bits(
    adapted: Path, made, small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minirlhf.language import rlhf

    run = Path(shutil.copytree(adapted, tmp_path / "run"))
    for name in ("ppo", "ppo_ptx"):
        shutil.rmtree(run / name)
    (run / "report.json").unlink()
    command = [*small(run, *adapters(made)), "--save-seconds", "0"]
    real, calls = rlhf._measure, []

    def stopped(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(rlhf, "_measure", stopped)
        assert main(command) == 130
    from safetensors.torch import load_file

    state = load_file(run / "ppo.partial" / "state.safetensors")
    assert not [key for key in state if "embed_tokens" in key], "the frozen body is in no state"
    assert main(command) == 0
    assert sums(run) == sums(adapted)


@pytest.mark.slow
def test_a_round_of_adapters(adapted: Path, tiny_folder: Path, tmp_path: Path) -> None:
    rankings = tmp_path / "rankings.jsonl"
    rankings.write_text((tiny_folder / "comparisons.jsonl").read_text())
    out = tmp_path / "round"
    assert main(["round", "--run", str(adapted), "--comparisons", str(rankings), "--out", str(out)]) == 0
    old, new = sums(adapted), sums(out)
    assert old["sft/adapter_model.safetensors"] == new["sft/adapter_model.safetensors"]
    assert old["ppo/adapter_model.safetensors"] != new["ppo/adapter_model.safetensors"]


def test_the_reward_model_scores_in_micro_batches_of_the_run(adapted: Path, made, small, tmp_path, monkeypatch) -> None:
    from minirlhf.pipeline import steps

    def stopped(model, tokenizer, micro_batch_tokens):
        assert micro_batch_tokens == 300
        raise KeyboardInterrupt

    run = Path(shutil.copytree(adapted, tmp_path / "run"))
    for name in ("ppo", "ppo_ptx"):
        shutil.rmtree(run / name)
    monkeypatch.setattr(steps, "RewardModelScorer", stopped)
    assert main([*small(run, *adapters(made)), "--rlhf.micro-batch-tokens", "300"]) == 130


@pytest.fixture(scope="module")
def brought(made, small, tmp_path_factory) -> Path:
    """Full fine-tuning in bfloat16 of an SFT model that was given, for a reward that is a function."""
    out = tmp_path_factory.mktemp("brought") / "run"
    assert main(small(out, "--sft", str(made["gpt2"]), "--reward", f"{made['rewards.py']}:short")) == 0
    return out


def test_an_sft_model_and_a_function_of_ones_own(brought: Path, made, small, refused, capsys, tmp_path: Path) -> None:
    report = read(brought / "report.json")
    assert not (brought / "reward_model").exists() and "reward_model" not in report["seconds"]
    assert report["given"]["sft"] == "gpt2" and report["given"]["reward"].startswith("rewards.py:short (sha256 ")
    page = (brought / "report.html").read_text()
    assert "SFT (gpt2). The reward is the function rewards.py:short (sha256 " in page
    weights = {step: load_causal_model(brought / step).state_dict() for step in ("base", "sft", "ppo")}
    moved = {key for key, x in weights["ppo"].items() if not torch.equal(x, weights["sft"][key])}
    assert moved and all(torch.equal(x, weights["base"][key]) for key, x in weights["sft"].items())
    assert {x.dtype for x in weights["ppo"].values()} == {torch.float32}
    config = read(brought / "config.json")
    assert set(config["reward"]) == {"function", "sha256"} and str(made["rewards.py"]) not in json.dumps(config)

    ask = ["evaluate", "--run", str(brought), "--checkpoint", "ppo", "--device", "cpu"]
    assert "its reward is a function; name its file with --reward rewards.py:short" in refused(ask)
    other = tmp_path / "rewards.py"
    other.write_text(REWARD.replace("10", "11"))
    assert "was trained with another" in refused([*ask, "--reward", f"{other}:short"])
    capsys.readouterr()
    assert main([*ask, "--reward", f"{made['rewards.py']}:short"]) == 0
    assert json.loads(capsys.readouterr().out)["proxy_mean"] == report["evaluation"]["ppo"]["proxy_mean"]

    # The run remembers what it was given, by content.
    command = ["--sft", str(made["gpt2"]), "--reward"]
    said = refused(small(brought, *command, f"{other}:short"))
    assert "was trained with another --reward rewards.py:short" in said and f"delete {brought / 'ppo'}" in said
    copied = Path(shutil.copytree(brought, tmp_path / "run"))
    model = Path(shutil.copytree(made["gpt2"], tmp_path / "gpt2"))
    config["given_sft"] = str(model)
    del config["sha256"]
    (copied / "config.json").write_text(json.dumps(config))
    (model / "generation_config.json").write_text('{"eos_token_id": 1, "pad_token_id": 0, "temperature": 0.5}')
    said = refused(small(copied, "--sft", str(model), "--reward", f"{made['rewards.py']}:short"))
    assert f"base was trained with another {model}/generation_config.json" in said

    message = refused(["round", "--run", str(brought), "--comparisons", "x.jsonl", "--out", str(tmp_path / "next")])
    assert "its reward is a function, so there is no reward model" in message
    out = tmp_path / "exported"
    assert main(["export", "--run", str(brought), "--step", "ppo", "--out", str(out)]) == 0
    assert sums(out)["model.safetensors"] == sums(brought)["ppo/model.safetensors"]
    assert "--out" in refused(["export", "--run", str(brought), "--out", str(out)])
    assert "choose one of" in refused(["export", "--run", str(brought), "--step", "best", "--out", str(out)])


@pytest.mark.slow
def test_a_reward_model_of_ones_own_beside_adapters(made, small, tmp_path: Path) -> None:
    """Its body is another, so the value network starts from the SFT model."""
    out = tmp_path / "run"
    options = ["--model", str(made["llama"]), "--lora.rank", "4", *LESS_SFT, "--reward-model", str(made["rm"])]
    assert main(small(out, *options)) == 0
    report = read(out / "report.json")
    assert report["given"] == {"base": "llama", "reward_model": "rm"}
    assert read(out / "reward_model" / "config.json")["architectures"] == ["GPT2ForSequenceClassification"]
    given, kept = (load_scalar_model(folder).state_dict() for folder in (made["rm"], out / "reward_model"))
    assert all(torch.equal(x, kept[key]) for key, x in given.items())
    assert (out / "ppo" / "adapter_config.json").is_file()


def test_defaults_of_a_small_model_are_named(made, fast_run, tmp_path: Path, capsys, monkeypatch) -> None:
    from minirlhf.pipeline import run

    def reached(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train_step", reached)
    assert main(fast_run(tmp_path / "run", "--model", str(made["llama"]))) == 130
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(said) == 1 and "a model of 0.5 million parameters" in said[0] and "--preset pretrained" in said[0]


@pytest.mark.parametrize(
    ("body", "line", "said"),
    [
        ("def f(p, r):\n    return [1.0]\n", None, "the reward returned (1,) for 2 responses"),
        ("x = 1\ndef f(p, r):\n    return r[0].score\n", 3, "AttributeError: 'str' object has no attribute 'score'"),
        ("x = 1\ny = x +\n", 2, "SyntaxError"),
        ("import no_such_module\n", 1, "No module named 'no_such_module'"),
        ("import sys\ndef f(p, r):\n    sys.exit('no key')\n", 3, "SystemExit: no key"),
        ("g = 1\n", None, "has no function f"),
    ],
)
def test_mistakes_in_a_rewards_file(body: str, line: int | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(body)
    with pytest.raises(UserError) as caught:
        FileReward(f"{file}:f")(["a", "b"], ["c", "d"])
    message = str(caught.value)
    assert message.startswith(f"--reward {file}:f: ") and said in message and "\n" not in message
    assert line is None or f"{file}:{line}: " in message


def test_a_target_that_the_value_network_lacks(made, small, refused, tmp_path: Path) -> None:
    model = load_causal_model(made["llama"])
    model.config.tie_word_embeddings, model.lm_head.weight = False, torch.nn.Parameter(model.lm_head.weight.clone())
    untied = Path(shutil.copytree(made["llama"], tmp_path / "untied"))
    model.save_pretrained(untied)
    options = ["--model", str(untied), "--lora.rank", "4", "--lora.targets", "lm_head"]
    assert "--lora.targets lm_head: in LlamaForSequenceClassification: No modules were targeted" in refused(
        small(tmp_path / "run", *options, *LESS_SFT)
    )


def test_a_rewards_file_imports_what_is_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "words_of_mine.py").write_text("GOOD = {'otter'}\n")
    (tmp_path / "later_of_mine.py").write_text("BAD = {'newt'}\n")
    (tmp_path / "mine.py").write_text(
        "from words_of_mine import GOOD\n"
        "def f(prompts, responses):\n"
        "    from later_of_mine import BAD\n"
        "    return [float(text in GOOD) - (text in BAD) for text in responses]\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = list(sys.path)
    assert FileReward(f"{tmp_path / 'mine.py'}:f")(["a"] * 3, ["otter", "newt", "owl"]).tolist() == [1, -1, 0]
    assert sys.path == before


@pytest.mark.parametrize("skip", [False, True])
def test_the_context_of_a_given_reward_model(skip: bool, made, small, refused, tmp_path: Path, monkeypatch) -> None:
    """It must read what it will score, and is tested as the policy is; before anything is trained."""
    from minirlhf.pipeline import run

    short = Path(shutil.copytree(made["rm"], tmp_path / "short"))
    model = load_scalar_model(short)
    model.transformer.wpe.weight = torch.nn.Parameter(model.transformer.wpe.weight[:44].clone())
    model.config.n_positions = 44
    model.save_pretrained(short)
    command = small(tmp_path / "run", "--model", str(made["llama"]), *LESS_SFT, "--reward-model", str(short))
    if not skip:
        said = refused(command)
        assert re.search(r"(prompts|comparisons)\.jsonl:\d+: ", said)
        assert f"but --reward-model {short} reads 44; shorten the row, or give another reward model" in said
        return

    def reached(step, config, inputs, **others):
        assert any(f"the context of 44 tokens of --reward-model {short}" in note for note in inputs.folder.notes)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train_step", reached)
    assert main([*command, "--data-errors", "skip"]) == 130


def test_a_given_reward_model_is_tested(made, small, refused, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(made["rm"], tmp_path / "broken"))
    model = load_scalar_model(broken)
    with torch.no_grad():
        model.score.weight[0, 0] = torch.nan
    model.save_pretrained(broken)
    said = refused(small(tmp_path / "run", "--model", str(made["llama"]), *LESS_SFT, "--reward-model", str(broken)))
    assert f"--reward-model {broken}: GPT2ForSequenceClassification: its weight score.weight is NaN" in said
    model = load_scalar_model(made["rm"])
    check_scalar_model(model)
    forward = model.transformer.forward

    def peeking(input_ids, **others):
        out = forward(input_ids, **others)
        out.last_hidden_state = out.last_hidden_state + input_ids[:, -1:, None]
        return out

    model.transformer.forward = peeking
    with pytest.raises(CheckpointError, match=r"padding changes its scores|a token changes the values before it"):
        check_scalar_model(model)


def test_a_rewards_file_that_is_not_there(tmp_path: Path) -> None:
    for named in (f"{tmp_path}/none.py:f", "none.py", f"{tmp_path}:f", "x.py:a b"):
        with pytest.raises(UserError, match=f"--reward {re.escape(named)}: "):
            FileReward(named)


def test_a_folder_of_a_run_names_no_code_to_run(brought: Path, tmp_path: Path, refused, monkeypatch) -> None:
    """Whoever made it: reading a run imports nothing."""
    run = Path(shutil.copytree(brought, tmp_path / "run"))
    (run / "evil.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    config = {key: value for key, value in read(run / "config.json").items() if key != "sha256"}
    (run / "config.json").write_text(json.dumps(config | {"reward": f"{run / 'evil.py'}:short"}))
    assert main(["chat", "--run", str(run), "--prompt", "Hi"]) == 0
    monkeypatch.chdir(run)
    refused(["evaluate", "--run", str(run), "--checkpoint", "ppo", "--device", "cpu"])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--lora.rank", "4"], "--lora.rank needs a pretrained model"),
        (["--model", "no_such", "--lora.rank", "4", "--shard"], "--shard: not with --lora.rank"),
        (["--reward-model", "x", "--reward", "y.py:f"], "both take the place of step 2"),
        (["--sft", "llama", "--sft.lr", "1"], "--sft.lr 1.0: not used together with --sft llama"),
        (["--reward", "y.py:f", "--reward-model.lr", "1"], "--reward-model.lr 1.0: not used together with --reward"),
        (["--sft", "llama", "--base.steps", "3"], "--base.steps 3: not used together with --sft llama"),
        (["--reward", "y.py:f"], "--reward y.py:f: no such file: y.py"),
    ],
)
def test_settings_that_contradict_each_other(options: list[str], said: str, fast_run, refused, tmp_path: Path) -> None:
    assert said in refused(fast_run(tmp_path / "run", *options))
    assert not (tmp_path / "run").exists()


def test_the_preset_is_of_the_fields_order() -> None:
    full, lora = preset("pretrained"), preset("pretrained", lora=True)
    steps = ("sft", "reward_model", "rlhf", "rloo", "grpo", "dpo")
    for step in steps:
        slow, fast, tiny = (getattr(config, step).lr for config in (full, lora, RunConfig()))
        assert 5e-7 <= slow <= 2e-5 and fast == pytest.approx(10 * slow) and tiny >= 100 * slow
    assert replace(lora, **{step: getattr(full, step) for step in steps}) == full
