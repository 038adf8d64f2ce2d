"""Answers sampled elsewhere: the mismatch is measured, weighted if asked, and doesn't stop the training."""

import math

import pytest
import torch

from minirlhf.errors import UserError
from minirlhf.kl import exact_kl
from minirlhf.language.generation import end_ids, sample
from minirlhf.language.models import clone, scalar_model_from
from minirlhf.language.rlhf import RLHFConfig, train_rlhf
from minirlhf.language.samplers import importance_weights, samples_of
from minirlhf.losses import ppo_loss, token_logprobs
from minirlhf.training import Recorder, generator_for

PROMPTS = ["Tell me about the otter.", "Hi", "Sing about the barn and the marsh!", "Go"]
SMALL = {"steps": 2, "batch_size": 8, "minibatch_size": 8, "max_response_tokens": 6, "warmup": 0}


class Elsewhere:
    """The built-in sampler with the seeds of `train_rlhf`, which reports each log-prob lower than it is."""

    def __init__(self, policy, tokenizer, off: float = 0.0) -> None:
        self.policy, self.tokenizer, self.off, self.step = policy, tokenizer, off, 0

    def __call__(self, prompts):
        samples = sample(
            self.policy,
            prompts,
            max_new_tokens=6,
            pad_id=self.tokenizer.pad_token_id,
            eos_id=end_ids(self.policy, self.tokenizer),
            generator=[generator_for(1, "rlhf/sample", self.step, place) for place in range(len(prompts))],
        )
        self.step += 1
        return samples._replace(logprobs=torch.where(samples.response_mask, samples.logprobs - self.off, 0.0))


def train(causal, tokenizer, sampler=None, cap: float | None = None, **settings):
    policy, value, recorder = clone(causal), scalar_model_from(causal, seed=2), Recorder("rlhf", progress=False)
    sampler = sampler and sampler(policy)
    words = lambda prompts, responses: [len(text) / 20 for text in responses]  # noqa: E731
    options = {"seed": 1, "recorder": recorder, "sampler": sampler, "importance_cap": cap}
    config = RLHFConfig(**(SMALL | settings))
    train_rlhf(policy, value, causal, words, tokenizer, PROMPTS, config, **options)
    return policy, recorder.history


@pytest.mark.parametrize("cap", [None, 2.0])
def test_the_built_in_sampler_from_outside_trains_the_same_weights(causal, tokenizer, cap: float | None) -> None:
    own, history = train(causal, tokenizer)
    other, outside = train(causal, tokenizer, lambda policy: Elsewhere(policy, tokenizer), cap, adam_eps=1e-5)
    assert not any(key.startswith("sampler/") for row in history for key in row)
    for row, same in zip(outside, history, strict=True):
        assert row["sampler/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
        assert row["sampler/ratio_max"] == pytest.approx(1.0, abs=1e-4) and abs(row["sampler/kl"]) < 1e-5
        assert row["objective/score"] == pytest.approx(same["objective/score"], abs=1e-6)
        assert row["policy/loss"] == pytest.approx(same["policy/loss"], abs=1e-4)
    for a, b in zip(own.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("cap", "weight"), [(None, 1.0), (5.0, math.exp(0.3)), (1.2, 1.2)])
def test_a_known_mismatch_is_measured_and_weighs_what_it_must(
    causal, tokenizer, gradients, cap: float | None, weight: float
) -> None:
    settings = {"steps": 1, "beta": 0.0}
    train(causal, tokenizer, **settings)
    updates = len(gradients)
    _, (row,) = train(causal, tokenizer, lambda policy: Elsewhere(policy, tokenizer, 0.3), cap, **settings)
    assert row["sampler/ratio_mean"] == pytest.approx(math.exp(0.3), rel=1e-5)
    assert row["sampler/ratio_max"] == pytest.approx(math.exp(0.3), rel=1e-4)
    assert row["sampler/kl"] == pytest.approx(-0.3, abs=1e-5)
    assert row["policy/first_ratio_error"] < 1e-4, "the trainer's own log-probs are PPO's old ones"
    gradients.append([weight * own for own in gradients[0]])
    gradients.assert_same(-1, updates, 1e-5)  # the policy's is that of the built-in sampler times the weight
    gradients.assert_same(1, updates + 1, 1e-5)  # the value network's has no weight
    assert max(float(g.abs().max()) for g in gradients[0]) > 1e-3


def test_weights_make_the_expected_gradient_the_trainer_s() -> None:
    """All answers of one token, each at the sampler's probability: with weights, the gradient of E_train[A]."""
    torch.manual_seed(0)
    theta = torch.randn(5, dtype=torch.float64, requires_grad=True)
    theirs, advantages = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    own, drawn = (token_logprobs(table.expand(5, 5), torch.arange(5)) for table in (theta, theirs))
    ratio = (own.detach() - drawn).exp()
    (exact,) = torch.autograd.grad((theta.softmax(-1) * advantages).sum(), theta, retain_graph=True)

    def gradient(cap: float | None) -> torch.Tensor:
        weights = torch.ones_like(ratio) if cap is None else importance_weights(ratio, cap)
        mask = torch.ones(5, dtype=torch.bool)
        loss, _ = ppo_loss(own, own.detach(), drawn.exp() * weights * advantages, mask, denominator=1)
        return -torch.autograd.grad(loss, theta, retain_graph=True)[0]

    torch.testing.assert_close(gradient(math.inf), exact)
    assert float(exact_kl(theirs, theta.detach())) > 0.1 and float(ratio.max()) > 1.5
    errors = [float((gradient(cap) - exact).norm()) for cap in (None, 1.5, math.inf)]
    assert errors[0] > errors[1] > errors[2], "a cap trades bias for variance"


def broken(**changes):
    """A sampler that answers each prompt with the tokens 5 and 6, except for what is changed."""

    def make(policy):
        def sampler(prompts):
            count = len(prompts)
            samples = samples_of(prompts, [[5, 6]] * count, [[-1.0, -2.0]] * count, [False] * count, pad_id=0)
            return samples._replace(**{key: change(samples) for key, change in changes.items()})

        return sampler

    return make


@pytest.mark.parametrize(
    ("sampler", "words"),
    [
        (broken(prompt_tokens=lambda s: s.prompt_tokens.flip(0)), "answers to the prompts that it was given"),
        (broken(logprobs=lambda s: s.logprobs + 1.5), "finite log-probs, 0 or below"),
        (broken(logprobs=lambda s: s.logprobs / 0), "finite log-probs, 0 or below"),
        (broken(logprobs=lambda s: s.logprobs[:, :1]), "tokens, mask and log-probs of one shape"),
        (broken(response_mask=lambda s: torch.tensor([[False, True]] * 8)), "answers without gaps"),
        (broken(response_mask=lambda s: torch.zeros_like(s.response_mask)), "answers of 1 to 6 tokens"),
    ],
)
def test_what_is_no_answer_is_refused(make_causal, tokenizer, sampler, words: str) -> None:
    with pytest.raises(UserError, match=f"the sampler must return {words}"):
        train(make_causal(), tokenizer, sampler)


def test_answers_that_are_too_long_and_settings_that_would_do_nothing(make_causal, tokenizer) -> None:
    with pytest.raises(UserError, match="answers of 1 to 1 tokens"):
        train(make_causal(), tokenizer, broken(), max_response_tokens=1)
    with pytest.raises(UserError, match=r"importance_cap weights .* give sampler too"):
        train(make_causal(), tokenizer, cap=2.0)
    for cap in (0.0, -1.0, math.nan):
        with pytest.raises(UserError, match=f"importance_cap {cap}: must be a number above 0"):
            train(make_causal(), tokenizer, broken(), cap)


def test_samples_from_lists() -> None:
    samples = samples_of([[3, 4], [5]], [[6], [7, 1]], [[-0.5], [-0.25, -1.0]], [False, True], pad_id=0)
    assert samples.tokens.tolist() == [[3, 4, 6, 0], [0, 5, 7, 1]] and samples.ended.tolist() == [False, True]
    assert samples.logprobs.tolist() == [[-0.5, 0.0], [-0.25, -1.0]] and samples.lengths.tolist() == [1, 2]
    assert samples.responses() == [[6], [7]]
    with pytest.raises(UserError, match="one response per prompt"):
        samples_of([[3]], [[6], [7]], [[-0.5], [-0.5]], [False, True], pad_id=0)
    with pytest.raises(UserError, match="one log-prob per token"):
        samples_of([[3]], [[6, 7]], [[-0.5]], [False], pad_id=0)
    with pytest.raises(UserError, match="empty answer"):
        samples_of([[3]], [[]], [[]], [False], pad_id=0)
