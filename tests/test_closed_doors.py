"""A stranger's model runs no code: not from its own files, not from a pickle, not after a "y" on standard input."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minirlhf.errors import CheckpointError, UserError
from minirlhf.language.adapters import LoraConfig, add_lora, load_adapter
from minirlhf.language.models import context_in, load_causal_model, load_scalar_model
from minirlhf.language.tokenization import encode_prompts, load_tokenizer


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


@pytest.fixture
def adapter(tmp_path: Path, model: Path, make_causal) -> Path:
    """A peft adapter of that model."""
    pytest.importorskip("peft")
    folder = tmp_path / "adapter"
    add_lora(make_causal("llama"), LoraConfig(rank=2), 0, str(model)).save_pretrained(folder)
    return folder


def test_an_adapter_in_a_pickle_is_refused(adapter: Path, make_causal, trap: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    load_causal_model(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(weights, adapter / "adapter_model.bin")  # which peft would load
    for load in (load_causal_model, lambda folder: load_adapter(folder, make_causal("llama"))):
        with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: missing; weights in other formats"):
            load(adapter)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"base_model_name_or_path": null}', "\xff", "[" * 10_000])
@pytest.mark.parametrize("load", [context_in, load_causal_model, load_scalar_model])
def test_a_damaged_adapter_is_one_sentence(load: Callable, content: str, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match="can't be loaded") as caught:
        load(adapter)
    assert str(caught.value).startswith(f"{adapter}: ") and "\n" not in str(caught.value)


def test_an_adapter_of_an_adapter_is_refused(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(adapter)}))
    with pytest.raises(CheckpointError, match=r"is an adapter too: merge one into the other"):
        load_causal_model(adapter)


DAMAGED = [
    ("tokenizer.json", lambda value: value.pop("model")),  # a plain Exception of the tokenizers library
    ("tokenizer.json", lambda value: value.pop("added_tokens")),  # KeyError
    ("tokenizer.json", lambda value: value["added_tokens"].append({"content": "<x>"})),  # KeyError
    ("tokenizer.json", lambda value: value["added_tokens"].append(3)),  # AttributeError or TypeError
    ("tokenizer.json", lambda value: value["model"].update(merges=[["no such", "token"]])),
    ("tokenizer_config.json", lambda value: value.update(eos_token=["<eos>"])),
    ("tokenizer_config.json", lambda value: value.update(model_max_length="long")),
    ("tokenizer_config.json", lambda value: value.update(tokenizer_class=7)),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGED)
def test_a_damaged_tokenizer_is_one_sentence(name: str, damage: Callable, model: Path) -> None:
    value = json.loads((model / name).read_text(encoding="utf-8"))
    damage(value)
    (model / name).write_text(json.dumps(value), encoding="utf-8")
    try:
        encode_prompts(load_tokenizer(model), ["one", "two"])
    except UserError as error:
        file, reason = str(error).split(": the tokenizer can't be loaded (")
        named = (str(model / name), f"{model / 'tokenizer.json'} or tokenizer_config.json")
        assert file in named and reason and "\n" not in str(error)
    else:
        pytest.skip("this version of transformers reads it all the same")


@pytest.mark.parametrize(("name", "content"), [("tokenizer.json", "{"), ("tokenizer_config.json", "[]")])
def test_a_tokenizer_that_is_no_json_object(name: str, content: str, model: Path) -> None:
    (model / name).write_text(content)
    with pytest.raises(CheckpointError, match=f"{name}: the tokenizer can't be loaded"):
        load_tokenizer(model)


@pytest.mark.parametrize("template", ["{{ messages[9]['content'] }}", "{{ 1 / 0 }}", "{{ messages + 1 }}", "{% if %}"])
def test_a_template_that_fails_is_one_sentence(template: str, model: Path) -> None:
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=r"the tokenizer's chat template (refuses|fails on) messages of user"):
        encode_prompts(tokenizer, ["one"])


def test_the_commands_refuse_it(model: Path, trap: Path, fast_run, refused, tmp_path: Path) -> None:
    bring_code(model, trap)
    assert "can't be loaded" in refused(fast_run(tmp_path / "run", "--model", str(model)))
    run = tmp_path / "done"
    shutil.copytree(model, run / "sft")
    assert "minirlhf run" in refused(["chat", "--run", str(run)])  # no config.json: not a run
    assert not trap.exists()
