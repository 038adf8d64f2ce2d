"""A stranger's model runs no code: not from its own files, not from a pickle, not after a "y" on standard input."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minirlhf.errors import CheckpointError
from minirlhf.language.models import context_in, load_causal_model, load_scalar_model
from minirlhf.language.tokenization import load_tokenizer


@pytest.fixture
def model(tmp_path: Path, make_causal, tokenizer) -> Path:
    folder = tmp_path / "model"
    make_causal("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that the stranger's code would write; and somebody who consents to everything."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    return tmp_path / "it-ran"


def bring_code(folder: Path, trap: Path) -> None:
    code = f"open({str(trap)!r}, 'w').close()\nfrom transformers import LlamaConfig, LlamaForCausalLM, GPT2Tokenizer\n"
    code += "class StrangeConfig(LlamaConfig):\n    model_type = 'strange'\n"
    code += "class StrangeModel(LlamaForCausalLM):\n    config_class = StrangeConfig\n"
    code += "class StrangeTokenizer(GPT2Tokenizer):\n    pass\n"
    (folder / "strange.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    names = {
        f"Auto{kind}": f"strange.{made}" for kind, made in (("Config", "StrangeConfig"), ("Model", "StrangeModel"))
    }
    names |= {f"AutoModelFor{kind}": "strange.StrangeModel" for kind in ("CausalLM", "SequenceClassification")}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "strange", "auto_map": names}))
    file = folder / "tokenizer_config.json"
    tokens = json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": [None, "strange.StrangeTokenizer"]}}
    file.write_text(json.dumps(tokens | {"tokenizer_class": "StrangeTokenizer"}))


@pytest.mark.parametrize("load", [context_in, load_causal_model, load_scalar_model])
def test_code_in_a_model_folder_never_runs(load: Callable, model: Path, trap: Path) -> None:
    bring_code(model, trap)
    with pytest.raises(CheckpointError, match="brings code of its own, which minirlhf never runs"):
        load(model)
    assert not trap.exists()


def test_code_of_a_tokenizer_never_runs(model: Path, trap: Path) -> None:
    bring_code(model, trap)
    with pytest.raises(CheckpointError, match="tokenizer can't be loaded"):
        load_tokenizer(model)
    assert not trap.exists()


@pytest.mark.parametrize("load", [load_causal_model, load_scalar_model])
def test_weights_in_a_pickle_are_refused(load: Callable, model: Path, trap: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (trap,))

    (model / "model.safetensors").unlink()
    torch.save({"weight": Evil()}, model / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors"):
        load(model)
    assert not trap.exists()


def test_the_commands_refuse_it(model: Path, trap: Path, fast_run, refused, tmp_path: Path) -> None:
    bring_code(model, trap)
    assert "can't be loaded" in refused(fast_run(tmp_path / "run", "--model", str(model)))
    run = tmp_path / "done"
    shutil.copytree(model, run / "sft")
    assert "minirlhf run" in refused(["chat", "--run", str(run)])  # no config.json: not a run
    assert not trap.exists()
