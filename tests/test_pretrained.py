"""--model: what can't be loaded or can't play every part is refused before any training."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minirlhf.config import preset
from minirlhf.errors import CheckpointError
from minirlhf.language import tokenization
from minirlhf.language.models import load_causal_model, load_scalar_model, scalar_model_from
from minirlhf.language.supported import check_model
from minirlhf.language.tokenization import load_tokenizer
from minirlhf.pipeline.inputs import load_inputs
from minirlhf.pipeline.steps import train_step


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, make_causal, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("made") / "model"
    make_causal("llama", seed=5).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def message(fast_run, refused, tmp_path: Path) -> Callable[..., str]:
    """What a run says to a model that it refuses."""

    def call(model: Path, *options: str) -> str:
        said = refused(fast_run(tmp_path / "run", "--model", str(model), *options))
        assert said.startswith("minirlhf: error: --") and str(model) in said
        assert not (tmp_path / "run").exists()
        return said

    return call


def missing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:3000])


def one_weight_less(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def other_shapes(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(re.sub(r'"hidden_size": \d+', '"hidden_size": 32', config.read_text()))


def damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def damaged_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text()[:500])


@pytest.mark.parametrize(
    "damage", [missing, truncated, one_weight_less, other_shapes, damaged_config, damaged_tokenizer]
)
def test_damaged(damage: Callable, made: Path, message, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "model")
    damage(tmp_path / "model")
    assert ("up_proj" in message(tmp_path / "model")) == (damage is one_weight_less)


def test_no_model_and_a_context_that_is_too_long(made: Path, message, tmp_path: Path) -> None:
    (tmp_path / "no_model").mkdir()
    message(tmp_path / "no_model")
    assert "128" in message(made, "--context-length", "4000")


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_model_without_a_tokenizer(architecture: str, make_causal, message, tmp_path: Path) -> None:
    make_causal(architecture).save_pretrained(tmp_path / "alone")
    assert "the tokenizer can't be loaded" in message(tmp_path / "alone")


@pytest.mark.parametrize("pad", ["<pad>", "<eos>", None])
def test_the_same_command_gives_the_same_weights(
    pad: str | None, make_causal, tokenizer, tiny_folder, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a pad token has to be added: transformers draws its embedding from torch's global generator."""
    monkeypatch.setattr(tokenization, "PAD", "<gap>")  # the tiny tokenizer knows <pad>
    given, folder = copy.deepcopy(tokenizer), tmp_path / "model"
    given.pad_token = pad
    make_causal("gpt2", seed=5).save_pretrained(folder)
    given.save_pretrained(folder)
    weights = []
    for out, seed in (("first", 3), ("again", 3), ("other", 4)):
        torch.manual_seed(len(weights))
        config = replace(preset("fast"), model=str(folder), out=tmp_path / out, seed=seed)
        train_step("base", config, load_inputs(config, tiny_folder), progress=False)
        weights.append((tmp_path / out / "base" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    added = len(load_tokenizer(tmp_path / "first" / "base")) > len(tokenizer)
    assert added == (pad != "<pad>") == (weights[0] != weights[2])


def test_a_kind_without_a_scalar_head(tokenizer, message, tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    size = {"vocab_size": len(tokenizer), "hidden_size": 8, "num_hidden_layers": 1, "pad_token_id": 0}
    MambaForCausalLM(MambaConfig(**size, eos_token_id=1)).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    assert "reward model" in message(tmp_path / "mamba")


def test_a_reward_model_is_no_policy(make_causal, tokenizer, message, tmp_path: Path) -> None:
    scalar_model_from(make_causal(), seed=0).save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    assert "scores texts" in message(tmp_path / "rm")
    load_scalar_model(tmp_path / "rm")


def test_a_policy_is_no_reward_model(made: Path) -> None:
    with pytest.raises(CheckpointError):
        load_scalar_model(made)


def test_a_model_that_sees_ahead(make_causal) -> None:
    model = make_causal("gpt2", scale=8.0)
    check_model(model)
    forward = model.forward

    def peeking(input_ids, attention_mask=None, position_ids=None, **others):
        out = forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, **others)
        out.logits = out.logits + input_ids[:, -1:, None]
        return out

    model.forward = peeking
    with pytest.raises(CheckpointError, match="predicted before it"):
        check_model(model)


def test_the_check_takes_no_second_copy_and_changes_nothing(causal) -> None:
    before = {key: value.clone() for key, value in causal.state_dict().items()}
    check_model(causal)
    after = causal.state_dict()
    assert all((before[key] == after[key]).all() and after[key].device.type == "cpu" for key in before)


@pytest.mark.parametrize(
    ("option", "value"), [("--model-size.layers", "3"), ("--base.steps", "7"), ("--base.lr", "0.1")]
)
def test_settings_that_would_do_nothing(option: str, value: str, made: Path, message) -> None:
    assert f"{option} {value}: not used together with --model" in message(made, option, value)


def test_load_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
        load_causal_model(tmp_path)
