"""Adapters of peft: what is sampled, trained and measured is what the adapted model itself computes."""

from __future__ import annotations

import pytest
import torch
import transformers

from minirlhf.checkpoints import save_model
from minirlhf.errors import CheckpointError, TrainingError, UserError
from minirlhf.language import forward
from minirlhf.language.generation import sample
from minirlhf.language.models import clone, response_logprobs, scalar_model_from, sequence_scores
from minirlhf.language.reward_model import RewardModelScorer
from minirlhf.language.rlhf import RLHFConfig, train_rlhf
from minirlhf.training import Recorder, generator_for

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:Model has `tie_word_embeddings=True`")

PROMPTS = ["Tell me about the otter.", "Hi", "Sing about the barn and the marsh!", "Go", "The newt", "Why?"]
SMALL = {"steps": 3, "batch_size": 8, "minibatch_size": 4, "max_response_tokens": 12, "warmup": 0, "lr": 1e-2}
KINDS = {
    "Llama": ({}, 5.0),
    "Qwen3": ({}, 5.0),
    "Gemma2": ({"sliding_window": 6}, 5.0),
    "Mistral": ({"sliding_window": 6}, 5.0),
    "GPT2": ({}, 12.0),  # its positions are learned, and start small
}


def made(kind: str, vocabulary: int, dtype: torch.dtype = torch.float32):
    """A tiny model of a kind, sharp enough that positions matter far above rounding."""
    own, scale = KINDS[kind]
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
    if kind != "GPT2":
        size |= {"intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 4}
    ids = {"vocab_size": vocabulary, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**size, **ids, **own)
    model = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(scale)
    return model.to(dtype)


def lora(model, task: str = "CAUSAL_LM", **options):
    options = {"target_modules": "all-linear", "r": 4, "lora_dropout": 0.1} | options
    return peft.get_peft_model(model, peft.LoraConfig(task_type=task, **options))


def length(prompts, responses) -> list[float]:
    return [len(text) / 20 for text in responses]


def train(policy, value, reference, tokenizer, *, reward=length, recorder=None, **settings):
    recorder = recorder or Recorder("rlhf", progress=False)
    config = RLHFConfig(**(SMALL | settings))
    train_rlhf(policy, value, reference, reward, tokenizer, PROMPTS, config, recorder=recorder)
    return recorder.history


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_ppo_of_adapters_starts_at_ratio_1_and_kl_0(kind: str, dtype: torch.dtype, tokenizer) -> None:
    """Policy and value network are adapters both; only what they add is trained."""
    base = made(kind, len(tokenizer), dtype)
    policy, value = lora(clone(base)), lora(scalar_model_from(base, seed=2), "SEQ_CLS")
    before = [{key: x.clone() for key, x in model.state_dict().items()} for model in (policy, value)]
    rows = train(policy, value, base, tokenizer)
    errors, kl = [row["policy/first_ratio_error"] for row in rows], abs(rows[0]["objective/kl"])
    print(f"{kind} with LoRA, {dtype}: first ratio off by {max(errors):.1e}, KL at step 0 {kl:.1e}")
    rounding = {torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]
    assert max(errors) < rounding and kl < rounding
    assert abs(rows[-1]["objective/kl"]) > 1e-3, "the policy has moved"
    for model, old in zip((policy, value), before, strict=True):
        moved = {key for key, x in model.state_dict().items() if not torch.equal(x, old[key])}
        assert moved and all("lora_" in key or "score" in key for key in moved), moved


def test_a_forward_without_positions_is_stopped_before_it_trains(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What went unnoticed once: GPT-2, whose position ids an adapter's wrapper hid."""
    base = made("GPT2", len(tokenizer))
    policy, value = lora(clone(base)), scalar_model_from(base, seed=2)
    before = [p.clone() for p in [*policy.parameters(), *value.parameters()]]
    with monkeypatch.context() as patch:
        patch.setattr(forward, "inputs", lambda model, t, mask: {"input_ids": t, "attention_mask": mask.long()})
        with pytest.raises(TrainingError, match=r"rlhf: before the first update .* largest error is [\d.]+ \(at most"):
            train(policy, value, base, tokenizer)
    after = [*policy.parameters(), *value.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    train(policy, value, base, tokenizer, steps=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_may_round_but_not_err(dtype: torch.dtype, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probs that are off by 0.01 are rounding in bfloat16, and an error in float32; off by 0.1 an error in both."""
    from minirlhf.language import rlhf

    base = made("Llama", len(tokenizer), dtype)
    real = rlhf.response_logprobs

    def off(model, tokens, mask, response_mask, *arguments, return_entropy=False):
        found = real(model, tokens, mask, response_mask, *arguments, return_entropy=return_entropy)
        return (found[0] + shift * response_mask, found[1]) if return_entropy else found

    monkeypatch.setattr(rlhf, "response_logprobs", off)
    for shift in (0.01, 0.1):
        if shift == 0.01 and dtype == torch.bfloat16:
            train(clone(base), scalar_model_from(base, seed=2), base, tokenizer, steps=1)
            continue
        with pytest.raises(TrainingError, match=f"at most {0.001 if dtype == torch.float32 else 0.05} in {dtype}"):
            train(clone(base), scalar_model_from(base, seed=2), base, tokenizer, steps=1)


def loud(**options):
    """LoRA whose matrices are all drawn, so that it changes the model before any training."""
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", "init_lora_weights": False, "r": 4} | options)


def merged(model):
    adapted = peft.get_peft_model(model, loud(target_modules="all-linear"))
    adapted.merge_adapter()
    return adapted


def disabled(model):
    adapted = peft.get_peft_model(model, loud(target_modules="all-linear"))
    adapted.base_model.disable_adapter_layers()
    return adapted


def second(model):
    adapted = peft.get_peft_model(model, loud(target_modules="all-linear"))
    adapted.add_adapter("other", loud(target_modules="all-linear", r=2))
    adapted.set_adapter("other")
    return adapted


def inside(model):
    """As transformers itself adds an adapter: nothing is wrapped around the model."""
    model.add_adapter(loud(target_modules="all-linear"))
    return model


def adapter(kind=loud, **options):
    """A function that puts an adapter on a model; peft writes into a config, so each model gets its own."""
    return lambda model: peft.get_peft_model(model, kind(**options))


MADE = {
    "lora": adapter(target_modules="all-linear"),
    "dora": adapter(target_modules="all-linear", use_dora=True),
    "on embedding and head": adapter(target_modules=["embed_tokens", "wte", "lm_head"]),
    "a head of its own": adapter(target_modules="all-linear", modules_to_save=["lm_head"]),
    "ia3": adapter(peft.IA3Config, task_type="CAUSAL_LM", init_ia3_weights=False),
    "loha": adapter(peft.LoHaConfig, task_type="CAUSAL_LM", target_modules=["q_proj"], init_weights=False),
    "merged": merged,
    "disabled": disabled,
    "second": second,
    "inside": inside,
}


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
@pytest.mark.parametrize("name", list(MADE))
@torch.no_grad()
def test_every_adapter_counts_as_peft_says(kind: str, name: str, tokenizer) -> None:
    if (kind, name) == ("GPT2", "loha"):
        pytest.skip("LoHa knows no Conv1D")
    plain = made(kind, len(tokenizer))
    adapted = MADE[name](clone(plain)).eval()
    tokens = torch.tensor([[0, 0, 7, 19, 33, 4], [5, 44, 2, 61, 9, 12]])
    mask = tokens != 0
    theirs = adapted(input_ids=tokens, attention_mask=mask.long(), position_ids=forward.positions(mask)).logits
    wanted = theirs[:, 2:-1].log_softmax(-1).gather(-1, tokens[:, 3:, None]).squeeze(-1)
    ours = response_logprobs(adapted, tokens, mask, mask[:, 3:])
    torch.testing.assert_close(ours, wanted, atol=2e-5, rtol=0)
    changed = float((ours - response_logprobs(plain, tokens, mask, mask[:, 3:])).abs().max())
    assert (changed < 1e-4) == (name == "disabled"), changed
    options = {"max_new_tokens": 8, "pad_id": 0, "eos_id": 1, "generator": generator_for(0, "t"), "temperature": 2.0}
    samples = sample(adapted, [[7, 19, 33], [5], [44, 2]], **options)
    forced = response_logprobs(adapted, samples.tokens, samples.mask, samples.response_mask, 2.0)
    torch.testing.assert_close(samples.logprobs, forced, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
        lambda: peft.PolyConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2, n_tasks=2, n_skills=2),
        lambda: loud(target_modules=["q_proj"], alora_invocation_tokens=[5, 6]),
    ],
    ids=["prompt tuning", "prefix tuning", "p-tuning", "poly", "alora"],
)
def test_adapters_that_do_more_than_replace_layers_are_refused(config, tokenizer) -> None:
    base = made("Llama", len(tokenizer))
    policy = peft.get_peft_model(clone(base), config()).eval()
    with pytest.raises(UserError, match=f"as LoRA does; {type(config()).__name__} does more"):
        train(policy, scalar_model_from(base, seed=2), base, tokenizer)
    with pytest.raises(UserError, match="as LoRA does"):
        scalar_model_from(policy, seed=0)


def test_a_clone_has_the_adapter_and_shares_nothing(tokenizer) -> None:
    policy = MADE["lora"](made("Llama", len(tokenizer)))
    twin = clone(policy)
    pairs = list(zip(policy.named_parameters(), twin.named_parameters(), strict=True))
    assert any("lora_" in name for (name, _), _ in pairs)
    for (name, own), (other, copy) in pairs:
        assert name == other and torch.equal(own, copy) and own.data_ptr() != copy.data_ptr()
        assert own.requires_grad == copy.requires_grad == ("lora_" in name)


@torch.no_grad()
def test_a_scalar_model_of_a_policy_has_its_adapter_merged(tokenizer) -> None:
    policy = MADE["lora"](made("GPT2", len(tokenizer))).eval()
    before = {key: x.clone() for key, x in policy.state_dict().items()}
    scalar = scalar_model_from(policy, seed=1)
    assert type(scalar).__name__ == "GPT2ForSequenceClassification" and not scalar.training
    assert all(p.requires_grad for p in scalar.parameters()) and not any("lora" in key for key in scalar.state_dict())
    assert all(torch.equal(before[key], x) for key, x in policy.state_dict().items())
    tokens, mask = torch.tensor([[7, 19, 33, 4]]), torch.ones(1, 4, dtype=torch.bool)
    theirs = policy(input_ids=tokens, output_hidden_states=True).hidden_states[-1][:, -1] @ scalar.score.weight.T
    torch.testing.assert_close(sequence_scores(scalar, tokens, mask), theirs.squeeze(1), atol=1e-4, rtol=1e-4)


def test_what_is_trained_belongs_to_one_model(tokenizer) -> None:
    base = made("Llama", len(tokenizer))
    value = scalar_model_from(base, seed=2)
    with pytest.raises(UserError, match=r"the policy and the reference share model\.embed_tokens"):
        train(base, value, base, tokenizer)
    with pytest.raises(UserError, match=r"the policy and the reference share .*lora_A"):
        train(lora(base), value, base, tokenizer)  # peft has put its layers into base itself
    base, policy = made("Llama", len(tokenizer)), made("Llama", len(tokenizer))
    value.base_model.embed_tokens.weight = policy.get_input_embeddings().weight
    with pytest.raises(UserError, match=r"the policy and the value model share model\.embed_tokens"):
        train(policy, value, base, tokenizer)
    value = scalar_model_from(base, seed=2)
    with pytest.raises(UserError, match="the value model and the reward model share"):
        train(policy, value, base, tokenizer, reward=RewardModelScorer(value, tokenizer))
    with pytest.raises(UserError, match="no tensor of the policy can be trained"):
        train(policy.requires_grad_(False), value, base, tokenizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_killed_run_of_adapters_continues_with_the_same_bits(dtype: torch.dtype, tokenizer, tmp_path) -> None:
    base = made("GPT2", len(tokenizer), dtype)

    def learners():
        torch.manual_seed(7)
        return lora(clone(base)), lora(scalar_model_from(base, seed=2), "SEQ_CLS")

    def killed(prompts, responses):
        killed.calls += 1
        if killed.calls == 3:
            raise KeyboardInterrupt
        return length(prompts, responses)

    killed.calls = 0
    whole = learners()
    train(*whole, base, tokenizer)
    options = {"save_seconds": 0.0, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        train(*learners(), base, tokenizer, reward=killed, recorder=Recorder("rlhf", tmp_path, **options))
    resumed = learners()
    rows = train(*resumed, base, tokenizer, recorder=Recorder("rlhf", tmp_path, **options))
    assert [row["step"] for row in rows] == [0, 1, 2]
    for one, other in zip(whole, resumed, strict=True):
        for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b), name


def test_the_model_inside_an_adapter_is_merged_before_it_is_saved(tokenizer, tmp_path) -> None:
    """The outer one is saved as peft does; the inner one alone would lose the adapter."""
    policy = MADE["lora"](made("Llama", len(tokenizer)))
    with pytest.raises(CheckpointError, match=r"merge it first \(model.merge_and_unload\(\)\)"):
        save_model(tmp_path / "policy", policy.get_base_model(), tokenizer)
    assert not list(tmp_path.iterdir())
    save_model(tmp_path / "adapter", policy, tokenizer)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    save_model(tmp_path / "policy", policy.merge_and_unload(), tokenizer)
    assert (tmp_path / "policy" / "model.safetensors").is_file()
