"""Padding changes nothing; logits and tokens are paired right; a scalar head is read at the last real token."""

from __future__ import annotations

import copy

import pytest
import torch

from minirlhf.errors import CheckpointError, UserError
from minirlhf.language import forward, models
from minirlhf.language.forward import positions
from minirlhf.language.models import (
    ModelConfig,
    clone,
    load_causal_model,
    load_scalar_model,
    pad,
    response_logits,
    response_logprobs,
    scalar_model_from,
    sequence_scores,
    tiny_llama,
    token_values,
)

PROMPT, RESPONSE = [7, 19, 33, 4, 90], [12, 5, 61, 1]


def padded(left: int, right: int, pad_id: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, mask and response mask of the one sequence between pads."""
    tokens = torch.tensor([[pad_id] * left + PROMPT + RESPONSE + [pad_id] * right])
    real = len(PROMPT) + len(RESPONSE)
    mask = torch.tensor([[False] * left + [True] * real + [False] * right])
    response_mask = torch.tensor([[True] * len(RESPONSE) + [False] * right])
    return tokens, mask, response_mask


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 4), (11, 6)])
@torch.no_grad()
def test_padding_changes_no_logprob(causal, left: int, right: int) -> None:
    plain = response_logprobs(causal, *padded(0, 0))
    other = response_logprobs(causal, *padded(left, right, pad_id=25))  # garbage for pads
    assert plain.abs().min() > 1e-3
    torch.testing.assert_close(other[:, : len(RESPONSE)], plain, atol=2e-5, rtol=0)
    assert (other[:, len(RESPONSE) :] == 0).all()


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 4), (11, 6)])
@torch.no_grad()
def test_padding_changes_no_value_and_no_score(causal, left: int, right: int) -> None:
    scalar = scalar_model_from(causal, seed=1).eval()
    real = len(PROMPT) + len(RESPONSE)
    tokens, mask, _ = padded(0, 0)
    values, scores = token_values(scalar, tokens, mask), sequence_scores(scalar, tokens, mask)
    other_tokens, other_mask, _ = padded(left, right, pad_id=25)
    other = token_values(scalar, other_tokens, other_mask)[:, left : left + real]
    assert values.std() > 1e-2
    torch.testing.assert_close(other, values, atol=2e-5, rtol=0)
    torch.testing.assert_close(sequence_scores(scalar, other_tokens, other_mask), scores, atol=2e-5, rtol=0)
    torch.testing.assert_close(scores, values[:, -1])


@torch.no_grad()
def test_what_fills_the_gaps_needs_no_embedding(causal) -> None:
    """So a model can be loaded without its tokenizer, to which a pad token may have been added."""
    scalar = scalar_model_from(causal, seed=1)
    for read in (response_logprobs, lambda m, t, mask, _: token_values(scalar, t, mask)):
        outside, inside = (read(causal, *padded(3, 2, pad_id=pad)) for pad in (10**6, 25))
        assert torch.equal(outside, inside)


def test_what_can_not_be_read_is_one_sentence(causal) -> None:
    scalar = scalar_model_from(causal, seed=1)
    tokens = torch.full((2, 130), 5)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    for read in (response_logprobs, response_logits, lambda m, t, mask, _: token_values(scalar, t, mask)):
        shorter = slice(0, 129) if read in (response_logprobs, response_logits) else slice(0, 128)  # the last is unread
        read(causal, tokens[:, shorter], mask[:, shorter], mask[:, :2])
        with pytest.raises(UserError, match=r"a row takes 1(29|30) tokens, but the model reads 128; shorten"):
            read(causal, tokens, mask, mask[:, :2])
        wrong = tokens[:, :9].clone()
        wrong[1, 3] = 320
        with pytest.raises(UserError, match="token 320 is outside the model's vocabulary of 320; load"):
            read(causal, wrong, mask[:, :9], mask[:, :2])


@torch.no_grad()
def test_gpt2_without_positions_would_be_wrong(make_causal) -> None:
    """The reason for position_ids: proof that the padding tests above can fail."""
    model = make_causal("gpt2", seed=3, scale=8.0)
    tokens, mask, _ = padded(11, 0)
    bare = model(input_ids=tokens, attention_mask=mask.long()).logits[:, -5:-1]
    ours = response_logits(model, tokens, mask, torch.ones(1, len(RESPONSE), dtype=torch.bool))
    assert (bare[0] - ours).abs().max() > 0.1


def test_positions() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    assert positions(mask).tolist() == [[0, 0, 0, 1, 2, 2], [0, 1, 2, 3, 4, 5]]


@torch.no_grad()
def test_logits_are_those_that_predict_the_token(causal) -> None:
    """Museum 23: an off-by-one between logits and tokens, against a loop of growing prefixes."""
    got = response_logprobs(causal, *padded(2, 0))[0]
    wrong = []
    for t, token in enumerate(RESPONSE):
        prefix = torch.tensor([PROMPT + RESPONSE[:t]])
        logprobs = causal(input_ids=prefix).logits[0, -1].log_softmax(-1)
        assert float(got[t]) == pytest.approx(float(logprobs[token]), abs=2e-5)
        after = torch.tensor([PROMPT + RESPONSE[: t + 1]])
        wrong.append(float(causal(input_ids=after).logits[0, -1].log_softmax(-1)[token]))
    assert (got - torch.tensor(wrong)).abs().max() > 0.1


@torch.no_grad()
def test_temperature_and_entropy(causal) -> None:
    tokens, mask, response_mask = padded(2, 3)
    logprobs, entropy = response_logprobs(causal, tokens, mask, response_mask, 0.7, return_entropy=True)
    expected = (response_logits(causal, tokens, mask, response_mask) / 0.7).log_softmax(-1)  # [W, V]
    picked = expected.gather(-1, torch.tensor(RESPONSE)[:, None]).squeeze(-1)
    torch.testing.assert_close(logprobs[response_mask], picked, atol=1e-5, rtol=0)
    full = -(expected.exp() * expected).sum(-1)
    torch.testing.assert_close(entropy[response_mask], full, atol=1e-4, rtol=1e-5)
    assert not logprobs[~response_mask].any() and not entropy[~response_mask].any()


def test_where_logits_are_dear_the_head_s_weight_gives_the_same(causal, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does, on the CPU: values, entropy and every gradient without [B, T, V] logits."""
    rows = [torch.cat((row, row.roll(2, 1))) for row in padded(3, 2)]  # padding at either end

    def results():
        causal.zero_grad()
        logprobs, entropy = response_logprobs(causal, *rows, 0.7, return_entropy=True)
        alone = response_logprobs(causal, *rows, 0.7)
        (logprobs.square().sum() + entropy.sum() + alone.sum()).backward()
        return [logprobs, entropy, alone, *(parameter.grad.clone() for parameter in causal.parameters())]

    expected = results()
    monkeypatch.setattr(forward, "LOGITS_ARE_DEAR", {"cpu"})
    monkeypatch.setattr(models, "response_logits", None)  # nobody may ask for them
    for got, exact in zip(results(), expected, strict=True):
        assert exact.abs().max() > 1e-3
        torch.testing.assert_close(got, exact, atol=1e-5 * exact.abs().max().item(), rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "bent"),
    [
        ("Gemma2", {"final_logit_softcapping": 0.5}),
        ("Granite", {"logits_scaling": 8.0}),
        ("Cohere", {"logit_scale": 0.0625}),
        ("Phi", {}),  # a head with a bias
        ("Granite", None),
        ("Qwen2", None),
    ],
)
def test_a_head_that_does_more_than_multiply_keeps_its_logits(kind, bent, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=101, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=2, eos_token_id=1, **(bent or {}),
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
        expected = response_logprobs(model, *padded(2, 1))
        monkeypatch.setattr(forward, "LOGITS_ARE_DEAR", {"cpu"})
        assert (forward.bare_head(model) is None) == (bent is not None)
        torch.testing.assert_close(response_logprobs(model, *padded(2, 1)), expected, atol=2e-5, rtol=1e-5)


def test_score_is_read_by_the_mask_and_not_by_the_pad_token(causal) -> None:
    """A pad id inside the text is a token like any other where the mask says so."""
    scalar = scalar_model_from(causal, seed=1).eval()
    tokens = torch.tensor([[7, 19, 33, 0, 0]])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        assert float(sequence_scores(scalar, tokens, mask)) == pytest.approx(
            float(token_values(scalar, tokens, mask)[0, 4]), abs=1e-6
        )


def test_new_head_and_offset(causal) -> None:
    scalar = scalar_model_from(causal, seed=1).eval()
    width = scalar.score.in_features
    many = torch.cat([scalar_model_from(causal, seed=s).score.weight.detach().flatten() for s in range(40)])
    assert float(many.std()) == pytest.approx((width + 1) ** -0.5, rel=0.1)
    tokens, mask, _ = padded(0, 0)
    with torch.no_grad():
        before = sequence_scores(scalar, tokens, mask)
        scalar.config.score_offset = 2.5
        torch.testing.assert_close(sequence_scores(scalar, tokens, mask), before - 2.5)
    again = scalar_model_from(causal, seed=1)
    assert torch.equal(again.score.weight, scalar.score.weight)
    for own, body in zip(again.base_model.parameters(), causal.base_model.parameters(), strict=True):
        assert torch.equal(own, body) and own.data_ptr() != body.data_ptr()
    causal.requires_grad_(False)
    assert all(p.requires_grad for p in scalar_model_from(causal, seed=1).parameters()), "a new model is to be trained"


def test_clone_shares_nothing(causal) -> None:
    twin = clone(causal)
    for own, other in zip(twin.parameters(), causal.parameters(), strict=True):
        assert torch.equal(own, other) and own.data_ptr() != other.data_ptr()
    causal.generation_config.eos_token_id = [1, 7]
    assert clone(causal).generation_config.eos_token_id == [1, 7]


def test_models_leave_the_global_randomness_alone(causal, tokenizer) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    scalar_model_from(causal, seed=1)
    tiny_llama(ModelConfig(16, 1, 2, 32), tokenizer, 64, seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_tiny_llama_refuses_a_width_that_does_not_fit(tokenizer) -> None:
    with pytest.raises(UserError, match="hidden-size 30"):
        tiny_llama(ModelConfig(hidden_size=30, heads=4), tokenizer, 64, seed=0)


def test_load_checks_the_head(causal, tmp_path) -> None:
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(causal.config)
    config.num_labels = 3
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="num_labels=1"):
        load_scalar_model(tmp_path)


def test_load_grows_the_embedding_for_a_larger_tokenizer(make_causal, tokenizer, tmp_path) -> None:
    make_causal("gpt2", vocab_size=len(tokenizer) - 4).save_pretrained(tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model, again, other = (load_causal_model(tmp_path, tokenizer, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected), "the global randomness is left alone"
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    rows = [m.get_input_embeddings().weight for m in (model, again, other)]
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0][:-4], rows[2][:-4])
    assert not (rows[0][-4:] == rows[2][-4:]).any()
    alone = load_causal_model(tmp_path)
    assert alone.get_input_embeddings().num_embeddings == len(tokenizer) - 4


def test_pad() -> None:
    tokens, mask = pad([[5, 6, 7], [8]], pad_id=0)
    assert tokens.tolist() == [[5, 6, 7], [8, 0, 0]] and mask.tolist() == [[True] * 3, [True, False, False]]
    tokens, mask = pad([[5, 6, 7], [8]], pad_id=0, side="left")
    assert tokens.tolist() == [[5, 6, 7], [0, 0, 8]] and mask.tolist() == [[True] * 3, [False, False, True]]
