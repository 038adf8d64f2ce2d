"""Several adapters on one body: what is shared, what is trained, and whose layers are computed again in backward."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minirlhf.checkpoints import save_model
from minirlhf.errors import CheckpointError, UserError
from minirlhf.language import models
from minirlhf.language.adapters import LoraConfig, add_lora, load_adapter, lora_scalar_from
from minirlhf.language.forward import compute_dtype, compute_in, is_plain_llama, recompute_layers
from minirlhf.language.generation import sample
from minirlhf.language.models import clone, half, response_logprobs, scalar_model_from, share, token_values
from minirlhf.language.rlhf import RLHFConfig, train_rlhf
from minirlhf.training import Recorder, adamw, generator_for

pytest.importorskip("peft")

LORA = LoraConfig(rank=4)
TOKENS = torch.tensor([[0, 0, 7, 19, 33, 4], [5, 44, 2, 61, 9, 12]])
MASK = TOKENS != 0
PROMPTS = ["Tell me about the otter.", "Hi", "Sing about the barn and the marsh!", "Go"]


def loud(model: Any) -> Any:
    """Draw the adapter's second factor too: at 0 it would hide which adapter was computed."""
    generator = generator_for(sum(p.numel() for p in model.parameters()) + len(list(model.children())), "loud")
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return model


@pytest.fixture
def four(causal) -> tuple[Any, ...]:
    """Policy, value network, reference and reward model on one body, and the body."""
    body = causal.requires_grad_(False)
    sft = loud(add_lora(share(body), LORA, seed=1, base="body"))
    reward = lora_scalar_from(sft, LORA, seed=2, base="body")
    policy, value = share(sft), share(reward)
    return policy, value, sft.requires_grad_(False), reward.requires_grad_(False), body


def test_one_set_of_weights_and_no_trained_tensor_in_common(four) -> None:
    *four, body = four
    places = {p.data_ptr() for p in body.parameters()}
    trained: list[int] = []
    for model in four:
        assert places - {body.get_output_embeddings().weight.data_ptr()} <= {p.data_ptr() for p in model.parameters()}
        trained += [p.data_ptr() for p in model.parameters() if p.requires_grad]
        rest = {name for name, p in model.named_parameters() if p.data_ptr() not in places}
        assert all("lora_" in name or "score" in name for name in rest), rest
    assert trained and len(set(trained)) == len(trained) and not set(trained) & places
    # The value network and the reward model start from what SFT has learned.
    policy, value, sft, reward = (dict(model.named_parameters()) for model in four)
    for name in (name for name in sft if "lora_" in name):
        assert all(torch.equal(sft[name], other[name]) for other in (policy, value, reward))


def gradients(loss: torch.Tensor, *learners: Any) -> list[torch.Tensor]:
    for model in learners:
        model.zero_grad()
    loss.backward()
    return [p.grad.clone() for model in learners for p in model.parameters() if p.requires_grad]


def test_backward_computes_the_layers_of_the_right_adapter_again(four) -> None:
    """The bug of one module with several adapters: at backward another one is active. Here each has its own modules."""
    policy, value, reference, reward, _ = four
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            for model in (policy, value, reference, reward):
                recompute_layers(model)
            assert not is_plain_llama(policy.get_base_model())
        logprobs = response_logprobs(policy, TOKENS, MASK, MASK[:, 3:])
        values = token_values(value, TOKENS, MASK)
        with torch.no_grad():  # others run before backward does
            response_logprobs(reference, TOKENS, MASK, MASK[:, 3:])
            token_values(reward, TOKENS, MASK)
        found.append(gradients(logprobs.sum() + values.square().sum(), policy, value))
    assert any(float(own.abs().max()) > 0.1 for own in found[0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_clone_recomputes_with_its_own_weights(causal) -> None:
    recompute_layers(causal)
    twin = clone(causal)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(0.5)
    plain = copy.deepcopy(twin)
    for layer in plain.modules():
        vars(layer).pop("forward", None)
    ours, theirs = (
        gradients(response_logprobs(model, TOKENS, MASK, MASK[:, 3:]).sum(), model) for model in (twin, plain)
    )
    assert all(p.grad is None for p in causal.parameters())
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_less_is_kept_for_backward(make_causal) -> None:
    kept = {}
    for checkpointing in (False, True):
        model, sizes = make_causal("gpt2"), {}
        if checkpointing:
            recompute_layers(model)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: sizes.setdefault(x.data_ptr(), x.numel()) and x, lambda x: x
        ):
            response_logprobs(model, TOKENS, MASK, MASK[:, 3:]).sum()
        weights = {p.data_ptr() for p in model.parameters()}
        kept[checkpointing] = sum(size for place, size in sizes.items() if place not in weights)
    assert kept[True] < kept[False] / 4, kept


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logits_a_few_at_a_time(causal, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(model: Any) -> list[torch.Tensor]:
        options: Any = {"temperature": temperature, "return_entropy": True}
        logprobs, entropy = response_logprobs(model, TOKENS, MASK, MASK[:, 3:], **options)
        return [logprobs, entropy, *gradients(logprobs.sum() + 0.3 * entropy.sum(), model)]

    whole = measured(causal)
    recompute_layers(causal)
    vocabulary, seen = causal.config.vocab_size, []
    monkeypatch.setattr(models, "LOGITS_AT_ONCE", 2 * vocabulary + 1)
    real = models.linear_token_logprobs
    monkeypatch.setattr(models, "linear_token_logprobs", lambda x, *a, **o: seen.append(len(x)) or real(x, *a, **o))
    parts = measured(causal)
    assert seen[:3] == [2, 2, 2] and len(seen) == 6  # forward, and once more in backward
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_layers_that_transformers_cannot_checkpoint() -> None:
    with pytest.raises(UserError, match="no layers that transformers can checkpoint"):
        recompute_layers(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_bfloat16_with_float32_weights(causal) -> None:
    """Autocast keeps its copies of the weights for one forward only: a step of the optimizer is seen by the next."""
    exact = response_logprobs(causal, TOKENS, MASK, MASK[:, 3:])
    compute_in(causal, torch.bfloat16)
    twin = scalar_model_from(causal, seed=0)
    assert compute_dtype(causal) == compute_dtype(clone(causal)) == compute_dtype(twin) == torch.bfloat16
    assert twin.score(torch.zeros(1, causal.config.hidden_size)).dtype == torch.float32
    optimizer = adamw(causal, 0.1)
    before = response_logprobs(causal, TOKENS, MASK, MASK[:, 3:])
    assert 0 < float((before - exact).detach().abs().max()) < 0.5
    assert all(g.dtype == torch.float32 for g in gradients(before.sum(), causal))
    optimizer.step()
    after = response_logprobs(causal, TOKENS, MASK, MASK[:, 3:])
    assert float((after - before).detach().abs().max()) > 0.1
    assert {p.dtype for p in causal.parameters()} == {torch.float32}
    samples = sample(causal, [[7, 19]], max_new_tokens=4, pad_id=0, eos_id=1, generator=generator_for(0, "t"))
    forced = response_logprobs(causal, samples.tokens, samples.mask, samples.response_mask)
    assert float((forced - samples.logprobs).detach().abs().max()) < 0.3


def test_half_keeps_the_head(causal) -> None:
    scalar = scalar_model_from(causal, seed=0)
    head = scalar.score.weight.clone()
    half(scalar, torch.bfloat16)
    assert scalar.dtype == torch.bfloat16 and torch.equal(scalar.score.weight, head)
    assert token_values(scalar, TOKENS, MASK).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("ema", [None, 0.5])
def test_ppo_on_one_body(dtype: torch.dtype, ema: float | None, make_causal, tokenizer) -> None:
    body = make_causal("gpt2", seed=3, scale=8.0).to(dtype).requires_grad_(False)
    sft = loud(add_lora(share(body), LORA, seed=1, base="body"))
    value = lora_scalar_from(sft, LORA, seed=2, base="body")
    policy, reference = share(sft), sft.requires_grad_(False)
    for model in (policy, value, reference):
        recompute_layers(model)
    assert {p.dtype for model in (policy, value) for p in model.parameters() if p.requires_grad} == {torch.float32}
    before = {key: x.clone() for key, x in reference.state_dict().items()}
    small: Any = {"steps": 3, "batch_size": 4, "minibatch_size": 2, "max_response_tokens": 8, "warmup": 0, "lr": 1e-2}
    recorder = Recorder("rlhf", progress=False)
    settings = RLHFConfig(**small, ema_decay=ema)
    reward = lambda prompts, responses: [len(text) / 20 for text in responses]  # noqa: E731
    trained = train_rlhf(policy, value, reference, reward, tokenizer, PROMPTS, settings, recorder=recorder)
    first = recorder.history[0]
    limit = {torch.float32: 1e-4, torch.bfloat16: 0.2}[dtype]
    assert first["policy/first_ratio_error"] < limit and abs(first["objective/kl"]) < limit
    assert abs(recorder.history[-1]["objective/kl"]) > 1e-3
    assert all(torch.equal(before[key], x) for key, x in reference.state_dict().items())
    assert (trained is policy) == (ema is None)
    assert {p.data_ptr() for p in body.parameters()} <= {p.data_ptr() for p in trained.parameters()}


@pytest.mark.parametrize("kind", ["causal", "scalar"])
def test_saved_by_peft_and_loaded_by_peft_and_transformers(kind: str, causal, tokenizer, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
    from transformers import AutoModelForCausalLM

    causal.save_pretrained(tmp_path / "body")
    tokenizer.save_pretrained(tmp_path / "body")
    body, base = causal.requires_grad_(False), str(tmp_path / "body")
    adapted = loud(add_lora(share(body), LORA, seed=1, base=base))
    if kind == "scalar":
        adapted = lora_scalar_from(adapted, LORA, seed=2, base=base)
        adapted.config.score_offset = 0.25
    save_model(tmp_path / "adapter", adapted, tokenizer)
    files = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files
    assert "model.safetensors" not in files
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == base and settings["r"] == 4 and settings["lora_alpha"] == 8

    again = load_adapter(tmp_path / "adapter", body)
    for (name, one), other in zip(adapted.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other) or "original_module" in name, name
    inputs = {"input_ids": TOKENS[1:], "attention_mask": MASK[1:].long()}
    ours = adapted(**inputs).logits
    if kind == "causal":
        others = [AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")]
        others += [AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")]
        others += [models.load_causal_model(tmp_path / "adapter")]  # merged
    else:
        assert again.config.score_offset == 0.25
        with pytest.raises(RuntimeError, match=r"size mismatch for .*score"):  # as docs/pretrained.md says
            AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
        others = [AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=1)]
        others += [models.load_scalar_model(tmp_path / "adapter")]
        assert others[1].config.score_offset == 0.25
    for other in others:
        torch.testing.assert_close(other.eval()(**inputs).logits, ours, atol=2e-4, rtol=1e-4)
    assert not hasattr(others[-1], "peft_config")

    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"half an adapter")
    with pytest.raises(CheckpointError, match=r"adapter: the adapter can't be loaded"):
        load_adapter(tmp_path / "adapter", body)
    with pytest.raises(CheckpointError, match=r"adapter: the adapter or its base model can't be loaded"):
        (models.load_causal_model if kind == "causal" else models.load_scalar_model)(tmp_path / "adapter")


def test_targets_that_are_not_there(make_causal) -> None:
    with pytest.raises(UserError, match=r"--lora\.targets query: "):
        add_lora(make_causal(), LoraConfig(rank=4, targets="query"), seed=0, base="body")
    adapted = add_lora(make_causal(), LoraConfig(rank=4, targets="q_proj,v_proj"), seed=0, base="body")
    names = {name.split(".")[-4] for name, p in adapted.named_parameters() if p.requires_grad}
    assert names == {"q_proj", "v_proj"}
    for tied in ("lm_head", "embed_tokens"):
        with pytest.raises(UserError, match=rf"--lora\.targets q_proj,{tied}: \S*{tied} is tied: .* give all-linear"):
            add_lora(make_causal(), LoraConfig(rank=4, targets=f"q_proj,{tied}"), seed=0, base="body")
    apart = clone(make_causal())
    apart.config.tie_word_embeddings, apart.lm_head.weight = False, torch.nn.Parameter(apart.lm_head.weight.clone())
    assert add_lora(apart, LoraConfig(rank=4, targets="q_proj,lm_head"), seed=0, base="body")
    with pytest.raises(UserError, match=r"--lora\.alpha 3: has no effect without --lora\.rank"):
        LoraConfig(alpha=3)
