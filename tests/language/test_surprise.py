"""The surprise of a reward model: what it adds, from which tokens, and that it is saved, cloned and loaded with it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from minirlhf.errors import CheckpointError
from minirlhf.language.models import (
    answer_scores,
    clone,
    load_scalar_model,
    pad,
    scalar_model_from,
    sequence_scores,
    token_values,
)
from minirlhf.language.reward_model import RewardModelScorer
from minirlhf.language.surprise import Surprise, add_surprise, has_surprise

ROWS = [[7, 19, 33, 4, 90, 12, 5, 61, 1], [9, 9, 1], [3, 44, 2, 61, 1]]
STARTS = [5, 1, 4]  # answers of 4, 2 and 1 tokens


def surprised(causal, *, noise: float = 1.0):
    scalar = scalar_model_from(causal, seed=1).eval()
    add_surprise(scalar, causal, seed=2)
    scalar.config.score_offset = 0.25
    with torch.no_grad():
        scalar.surprise.out.weight.normal_(std=noise) if noise else None
    return scalar


def untied():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_the_score_is_the_head_and_f_of_the_answers_own_logprobs(causal, tied: bool) -> None:
    causal = causal if tied else untied()
    scalar = surprised(causal)
    tokens, mask = pad(ROWS, 0)
    scores = answer_scores(scalar, tokens, mask, torch.tensor(STARTS))
    for row, start, score in zip(ROWS, STARTS, scores, strict=True):
        one = torch.tensor([row])
        hidden = scalar.base_model(input_ids=one).last_hidden_state[0]
        logits = hidden @ causal.get_output_embeddings().weight.T
        logprobs = logits.log_softmax(-1)[start - 1 : -1].gather(1, one[0, start:, None])[None, :, 0]
        everything = torch.ones_like(logprobs, dtype=torch.bool)
        expected = scalar.score(hidden[-1]) - 0.25 + scalar.surprise(logprobs, everything)
        torch.testing.assert_close(score[None], expected, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_before_training_it_adds_nothing(causal) -> None:
    scalar = surprised(causal, noise=0.0)
    tokens, mask = pad(ROWS, 0)
    torch.testing.assert_close(
        answer_scores(scalar, tokens, mask, torch.tensor(STARTS)), sequence_scores(scalar, tokens, mask)
    )


def test_its_gradient_reaches_the_body_and_f(causal) -> None:
    scalar = surprised(causal)
    tokens, mask = pad(ROWS, 0)
    scalar.score.weight.data.zero_()  # all that is left is f
    answer_scores(scalar, tokens, mask, torch.tensor(STARTS)).sum().backward()
    reached = {name for name, p in scalar.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert {"surprise.hidden.weight", "surprise.out.weight"} <= reached
    assert any(name.endswith(("q_proj.weight", "c_attn.weight")) for name in reached)


def test_features_by_hand() -> None:
    """Logprobs -1, -6, -0.5 and a masked -90: smallest three, mean, mean cut at -4, log of the count."""
    surprise = Surprise()
    seen = []
    surprise.hidden.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    surprise(torch.tensor([[-1.0, -6.0, -0.5, -90.0]]), torch.tensor([[True, True, True, False]]))
    expected = [-6 / 5, -1 / 5, -0.5 / 5, -7.5 / 3, -5.5 / 3, torch.tensor(3.0).log().item() / 3]
    assert seen[0][0].tolist() == pytest.approx(expected)
    surprise(torch.tensor([[-2.0, torch.nan]]), torch.tensor([[True, False]]))  # two columns, one of them garbage
    assert seen[1][0].tolist() == pytest.approx([-2 / 5, 0, 0, -2, -2, 0])


def test_values_are_those_of_the_head_alone(causal) -> None:
    """PPO's value network starts as a copy of the reward model, and reads its head."""
    scalar, (tokens, mask) = surprised(causal), pad(ROWS, 0)
    before = token_values(scalar, tokens, mask)
    scalar.surprise.out.weight.data.add_(10.0)
    assert torch.equal(token_values(scalar, tokens, mask), before)


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_saved_loaded_and_cloned_it_scores_the_same(kind: str, make_causal, tmp_path, tokenizer, caplog, capfd) -> None:
    causal = make_causal(scale=4.0) if kind == "tied" else untied()
    scalar = surprised(causal)
    assert (scalar.surprise.vocabulary is None) == (kind == "tied")
    if kind == "untied":
        torch.testing.assert_close(scalar.surprise.vocabulary, causal.lm_head.weight)
    tokens, mask = pad(ROWS, 0)
    scores = answer_scores(scalar, tokens, mask, torch.tensor(STARTS))
    assert (scores - sequence_scores(scalar, tokens, mask)).abs().min() > 1e-3
    torch.testing.assert_close(answer_scores(clone(scalar).eval(), tokens, mask, torch.tensor(STARTS)), scores)
    scalar.save_pretrained(tmp_path)
    caplog.clear()
    loaded = load_scalar_model(tmp_path).eval()
    assert "UNEXPECTED" not in caplog.text + "".join(capfd.readouterr())
    assert type(loaded) is type(scalar)
    torch.testing.assert_close(answer_scores(loaded, tokens, mask, torch.tensor(STARTS)), scores)
    if kind == "tied":
        reward = RewardModelScorer(loaded, tokenizer)
        alone = [float(reward([p], [r])) for p, r in (("a b", "c"), ("what is it", "a longer answer"))]
        together = reward(["a b", "what is it"], ["c", "a longer answer"])
        assert together.tolist() == pytest.approx(alone, abs=2e-5)


def test_a_checkpoint_that_lost_it_is_refused(make_causal, tmp_path) -> None:
    surprised(make_causal()).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "surprise.out.weight"}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"surprise can't be loaded.*out\.weight"):
        load_scalar_model(tmp_path)


def test_a_plain_reward_model_stays_plain(make_causal, tmp_path) -> None:
    scalar = scalar_model_from(make_causal(), seed=1).eval()
    assert not has_surprise(scalar) and not has_surprise(clone(scalar))
    scalar.save_pretrained(tmp_path)
    assert not has_surprise(load_scalar_model(tmp_path))
    tokens, mask = pad(ROWS, 0)
    assert torch.equal(answer_scores(scalar, tokens, mask, torch.tensor(STARTS)), sequence_scores(scalar, tokens, mask))
