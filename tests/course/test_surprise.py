"""Lesson 08's reward model with surprise: what f adds, from which tokens, and that it learns."""

from __future__ import annotations

import pytest
import torch
from minirlhf_course.surprise import Surprise, SurpriseRewardModel, train_with_surprise
from transformers import LlamaConfig, LlamaForCausalLM

from minirlhf.data import Comparison
from minirlhf.language.reward_model import RewardModelConfig, RewardModelScorer, train_reward_model
from minirlhf.language.tokenization import encode_prompts, encode_responses
from minirlhf.losses import ranking_loss

PROMPTS = ["what is it", "a", "where is the hat"]
ANSWERS = ["a longer answer than the others", "b", "c d"]


@pytest.fixture
def surprised(make_causal, tokenizer) -> SurpriseRewardModel:
    model = SurpriseRewardModel(make_causal(scale=4.0), tokenizer, seed=1).eval()
    torch.nn.init.normal_(model.surprise.out.weight)
    return model


@torch.no_grad()
def test_the_score_is_the_head_and_f_of_the_answers_own_logprobs(surprised, tokenizer) -> None:
    scores = surprised(PROMPTS, ANSWERS)
    embedding = surprised.scalar.get_input_embeddings().weight
    prompts, answers = encode_prompts(tokenizer, PROMPTS), encode_responses(tokenizer, ANSWERS)
    for prompt, answer, score in zip(prompts, answers, scores, strict=True):
        row = torch.tensor([prompt + answer])
        hidden = surprised.scalar.base_model(input_ids=row).last_hidden_state[0]
        logprobs = (hidden @ embedding.T).log_softmax(-1)[len(prompt) - 1 : -1]
        logprobs = logprobs.gather(1, torch.tensor(answer)[:, None]).T
        expected = surprised.scalar.score(hidden[-1]) + surprised.surprise(logprobs, torch.ones_like(logprobs).bool())
        torch.testing.assert_close(score[None], expected, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_before_training_it_is_the_plain_model(make_causal, tokenizer) -> None:
    model = SurpriseRewardModel(make_causal(), tokenizer, seed=1).eval()
    plain = RewardModelScorer(model.scalar, tokenizer)
    torch.testing.assert_close(model(PROMPTS, ANSWERS), plain(PROMPTS, ANSWERS))


def test_its_gradient_reaches_the_body_and_f(surprised) -> None:
    surprised.scalar.score.weight.data.zero_()  # all that is left is f
    surprised(PROMPTS, ANSWERS).sum().backward()
    reached = {name for name, p in surprised.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert {"surprise.hidden.weight", "surprise.out.weight"} <= reached
    assert any(name.endswith("q_proj.weight") for name in reached)


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


def test_without_f_it_trains_what_train_reward_model_trains(make_causal, tokenizer, monkeypatch) -> None:
    """The same batches, loss and steps: with f held at 0 the two trainers give the same scores."""
    rows = [Comparison(p, (a, "x y", "z"), (2.0, 1.0, 1.0)) for p in PROMPTS for a in ANSWERS]
    config = RewardModelConfig(batch_size=2, epochs=2, warmup=1, lr=1e-2)
    plain = RewardModelScorer(train_reward_model(make_causal(), tokenizer, rows, config), tokenizer)
    learned = train_with_surprise(make_causal(), tokenizer, rows, config)
    monkeypatch.setattr(Surprise, "forward", lambda self, logprobs, mask: torch.zeros(len(logprobs)))
    same = train_with_surprise(make_causal(), tokenizer, rows, config)
    assert learned.surprise.out.weight.abs().max() > 1e-3  # and left alone f has its say
    with torch.no_grad():
        torch.testing.assert_close(same(PROMPTS, ANSWERS), plain(PROMPTS, ANSWERS), atol=1e-4, rtol=1e-4)


def test_a_wrong_order_costs_less_after_training(make_causal, tokenizer) -> None:
    rows = [Comparison(p, ("a b", "x y"), (1.0, 0.0)) for p in PROMPTS]
    model = train_with_surprise(make_causal(), tokenizer, rows, RewardModelConfig(batch_size=3, epochs=8, lr=1e-2))
    with torch.no_grad():
        rewards = model([p for p in PROMPTS for _ in (0, 1)], ["a b", "x y"] * 3).view(3, 2)
    assert ranking_loss(rewards, torch.tensor([[1.0, 0.0]] * 3)) < 0.3  # log 2 before


def test_an_output_head_of_its_own_is_refused(tokenizer) -> None:
    config = LlamaConfig(
        vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    with pytest.raises(ValueError, match="tie_word_embeddings=True"):
        SurpriseRewardModel(LlamaForCausalLM(config), tokenizer)
