"""PPO on language models: the ratio starts at 1, the KL at 0, and the two gradients of PPO-ptx are added."""

import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch

from minirlhf.errors import TrainingError, UserError
from minirlhf.kl import AdaptiveKLController
from minirlhf.language import rlhf
from minirlhf.language.generation import sample
from minirlhf.language.models import clone, scalar_model_from, token_values
from minirlhf.language.pretraining import language_model_loss
from minirlhf.language.reward_model import scores_tensor
from minirlhf.language.rlhf import RLHFConfig, train_rlhf
from minirlhf.language.rollouts import Rollouts
from minirlhf.language.tokenization import encode_prompts
from minirlhf.training import Recorder, generator_for

PROMPTS = ["Tell me about the otter.", "Hi", "Sing about the barn and the marsh!", "Go", "The newt", "Why?"]
SMALL = {"steps": 3, "batch_size": 8, "minibatch_size": 4, "max_response_tokens": 8, "warmup": 0}


def words(prompts, responses):
    return [float(len(text)) / 20 for text in responses]


class Trained(NamedTuple):
    result: torch.nn.Module
    policy: torch.nn.Module
    value: torch.nn.Module
    history: list[dict]


def train(causal, tokenizer, reward=words, *, blocks=None, monitor=None, **settings) -> Trained:
    policy, value = clone(causal), scalar_model_from(causal, seed=2)
    recorder, config = Recorder("rlhf", progress=False), RLHFConfig(**(SMALL | settings))
    options = {"corpus_blocks": blocks, "seed": 1, "recorder": recorder, "monitor": monitor}
    result = train_rlhf(policy, value, causal, reward, tokenizer, PROMPTS, config, **options)
    return Trained(result, policy, value, recorder.history)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_ratio_starts_at_one_and_the_kl_at_zero(causal, tokenizer, temperature: float) -> None:
    """The best single test there is: whatever is wrong with masks, positions or dropout shows here."""
    before = {key: value.clone() for key, value in causal.state_dict().items()}
    settings = {"steps": 4, "batch_size": 16, "lr": 1e-3, "temperature": temperature, "micro_batch_tokens": 100}
    _, policy, _, history = train(causal, tokenizer, **settings)
    assert len(history) == 4
    for row in history:
        assert row["policy/first_ratio_error"] < 1e-5
        assert abs(row["policy/first_approx_kl"]) < 1e-5
        assert row["policy/first_clip_fraction"] == 0
    assert abs(history[0]["objective/kl"]) < 1e-4
    assert history[0]["objective/rlhf_reward"] == pytest.approx(history[0]["objective/score"], abs=1e-4)
    # And it does move afterwards, the reference does not: the zeros are not those of a policy that stands still.
    assert max(row["policy/ratio_error"] for row in history) > 1e-3 and abs(history[-1]["objective/kl"]) > 1e-4
    assert all(torch.equal(before[key], value) for key, value in causal.state_dict().items())
    assert any(not torch.equal(before[key], value) for key, value in policy.state_dict().items())


@pytest.mark.parametrize("ptx_coef", [0.3, 27.8])
def test_ptx_gradient_is_the_sum_of_the_two(causal, tokenizer, gradients, ptx_coef: float) -> None:
    blocks = torch.randint(2, len(tokenizer), (12, 16), generator=generator_for(0))
    train(causal, tokenizer, steps=1)
    updates = len(gradients)
    train(causal, tokenizer, steps=1, blocks=blocks, ptx_coef=ptx_coef, ptx_batch_size=12)
    model = clone(causal).eval()
    language_model_loss(model, blocks).backward()  # 12 of 12 blocks: the order is of no matter
    ppo, both = gradients[0], gradients[updates]
    gradients.append([own + ptx_coef * p.grad for own, p in zip(ppo, model.parameters(), strict=True)])
    gradients.assert_same(-1, updates, 1e-5)
    assert max(float((total - own).abs().max()) for total, own in zip(both, ppo, strict=True)) > 1e-3


@pytest.mark.parametrize("tokens", [1, 40, 100])
def test_micro_batches_change_nothing(causal, tokenizer, gradients, tokens: int) -> None:
    settings = {"steps": 1, "adam_eps": 1e-3}  # a large epsilon: rounding isn't blown up to a sign
    whole = train(causal, tokenizer, **settings).history[0]
    updates = len(gradients)
    parts = train(causal, tokenizer, micro_batch_tokens=tokens, **settings).history[0]
    for network in (0, 1):  # policy and value network, at the first update
        gradients.assert_same(network, updates + network, 1e-5)
    for key in ("policy/approx_kl", "value/loss", "policy/entropy", "objective/kl", "policy/clip_fraction"):
        assert whole[key] == pytest.approx(parts[key], rel=1e-3, abs=1e-4), key


def test_missing_eos_costs_a_fixed_penalty(causal, tokenizer) -> None:
    means = {}
    for penalty in (0.0, 3.0):
        # One step: the same answers.
        means[penalty] = train(causal, tokenizer, steps=1, missing_eos_penalty=penalty).history[0]
    unended = 1 - means[0.0]["objective/ended_fraction"]
    assert unended > 0
    assert means[0.0]["objective/score"] - means[3.0]["objective/score"] == pytest.approx(3.0 * unended, abs=1e-4)


def test_reward_sees_the_cut_answer_and_the_plain_prompt(make_causal, tokenizer) -> None:
    seen, asked = [], []

    def reward(prompts, responses):
        seen.extend(zip(prompts, responses, strict=True))
        return torch.ones(len(responses), dtype=torch.float64)

    def monitor(prompts, responses, ended):
        asked.append((list(zip(prompts, responses, strict=True)), ended))
        return {"objective/other": 7.0}

    history = train(make_causal(scale=3.0), tokenizer, reward, steps=1, monitor=monitor).history
    assert len(seen) == 8 and {prompt for prompt, _ in seen} <= set(PROMPTS)
    assert all("<eos>" not in text and "<pad>" not in text for _, text in seen)
    assert asked[0][0] == seen and len(asked[0][1]) == 8 and history[0]["objective/other"] == 7.0


def test_a_plain_function_is_learnt(make_causal, tokenizer) -> None:
    """Answers of three tokens are wanted; a fresh model never ends one by chance."""
    model = make_causal()
    lengths = lambda p, responses: [-abs(n - 3) / 4 for n in map(len, tokenizer(list(responses))["input_ids"])]  # noqa: E731
    settings = {"steps": 25, "batch_size": 64, "lr": 2e-2, "value_lr": 1e-2, "beta": 0.0, "warmup": 2}
    history = train(model, tokenizer, lengths, missing_eos_penalty=0.5, **settings).history
    scores = [row["objective/score"] for row in history]
    first, last = sum(scores[:3]) / 3, sum(scores[-3:]) / 3
    assert first < -1.2 and last > first + 0.6, scores
    assert history[-1]["objective/ended_fraction"] > history[0]["objective/ended_fraction"] + 0.3


@pytest.mark.parametrize(
    ("reward", "kind", "words_"),
    [
        (lambda p, r: [1.0] * (len(r) - 1), UserError, ["(7,)", "8 responses"]),
        (lambda p, r: 1.0, UserError, ["one number each"]),
        (lambda p, r: torch.ones(len(r), 1), UserError, ["(8, 1)"]),
        (lambda p, r: np.ones((len(r), 2)), UserError, ["(8, 2)"]),
        (lambda p, r: None, UserError, ["NoneType", "8 responses"]),
        (lambda p, r: [0.5] * 7 + [None], UserError, ["None", "index 7"]),
        (lambda p, r: ["1.0"] * 8, UserError, ["'1.0' (str)", "index 0"]),
        (lambda p, r: "12345678", UserError, ["str '12345678'"]),
        (lambda p, r: [[1.0]] * 4 + [[1.0, 2.0]] * 4, UserError, ["[1.0] (list)"]),
        (lambda p, r: dict.fromkeys(range(8)), UserError, ["dict"]),
        (lambda p, r: np.array([1.0] * 7 + [None], dtype=object), UserError, ["None", "index 7"]),
        (lambda p, r: itertools.repeat(1.0), UserError, ["(9,)"]),
        (lambda p, r: torch.ones(8, dtype=torch.complex64), UserError, ["complex"]),
        (lambda p, r: [0.0] * 7 + [float("nan")], TrainingError, ["nan", "step 0", "finite"]),
        (lambda p, r: [float("-inf")] + [0.0] * 7, TrainingError, ["-inf", "step 0"]),
    ],
)
def test_a_bad_reward_is_named_and_leaves_the_weights(make_causal, tokenizer, reward, kind, words_) -> None:
    causal, recorder = make_causal(), Recorder("rlhf", progress=False)
    policy, value = clone(causal), scalar_model_from(causal, seed=2)
    with pytest.raises(kind) as caught:
        train_rlhf(policy, value, causal, reward, tokenizer, PROMPTS, RLHFConfig(**SMALL), recorder=recorder)
    assert all(word in str(caught.value) for word in words_), caught.value
    for model, start in ((policy, causal), (value, scalar_model_from(causal, seed=2))):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))


@pytest.fixture
def experience_of(causal, tokenizer):
    """Experience of the same six answers, scored 0 to 5, and the value network that judged them."""
    prompts, scores = encode_prompts(tokenizer, PROMPTS), torch.arange(6.0)
    generator, value = generator_for(3), scalar_model_from(causal, seed=2).eval()
    samples = sample(causal, prompts, max_new_tokens=9, pad_id=0, eos_id=1, generator=generator, temperature=4.0)

    def make(**settings):
        config = RLHFConfig(micro_batch_tokens=60, temperature=4.0, **settings)
        return rlhf._experience(samples, scores, value, causal, 0.1, config), value

    return make


def test_shapes_and_masks_of_the_experience(experience_of) -> None:
    experience, value = experience_of(whiten_advantages=False)
    samples = experience.samples
    mask = samples.response_mask
    for part in (experience.ref_logprobs, experience.old_values, experience.advantages, experience.returns):
        assert part.shape == mask.shape
    for part in (experience.ref_logprobs, experience.old_values, experience.advantages):
        assert (part[~mask] == 0).all()
    torch.testing.assert_close(experience.ref_logprobs, samples.logprobs, atol=1e-5, rtol=0)
    with torch.no_grad():
        full = token_values(value, samples.tokens, samples.mask)
    prompt = samples.prompt_tokens.shape[1]
    for row, length in enumerate(samples.lengths.tolist()):
        # V before the first answer token is read at the last prompt token.
        expected = full[row, prompt - 1 : prompt - 1 + length]
        torch.testing.assert_close(experience.old_values[row, :length], expected, atol=2e-5, rtol=0)
        # The last return: nothing follows the last token, so it is the score itself (the KL is 0 here).
        assert float(experience.returns[row, length - 1]) == pytest.approx(row, abs=1e-3)
        assert float(experience.advantages[row, length - 1]) == pytest.approx(row - float(expected[-1]), abs=1e-3)
    part = experience.rows(torch.tensor([int(samples.lengths.argmin())]))
    assert part.advantages.shape == part.samples.response_mask.shape == (1, int(samples.lengths.min()))


def test_returns_come_from_raw_advantages(experience_of) -> None:
    """Museum 1."""
    raw, white = (experience_of(whiten_advantages=flag)[0] for flag in (False, True))
    assert torch.equal(raw.returns, white.returns)
    counted = white.advantages[white.samples.response_mask]
    assert abs(float(counted.mean())) < 1e-5 and float(counted.std(unbiased=False)) == pytest.approx(1.0, abs=1e-3)
    assert not torch.allclose(raw.advantages, white.advantages)


@pytest.mark.parametrize(("decay", "steps", "tolerance"), [(0.0, 3, 0.0), (0.5, 1, 1e-5), (1.0, 3, 0.0)])
def test_moving_average(make_causal, tokenizer, decay: float, steps: int, tolerance: float) -> None:
    causal = make_causal()
    average, policy, _, _ = train(causal, tokenizer, ema_decay=decay, steps=steps)
    assert average is not policy and not average.training
    for a, b, c in zip(average.parameters(), policy.parameters(), causal.parameters(), strict=True):
        torch.testing.assert_close(a, (1 - decay) * b + decay * c, atol=tolerance / 100, rtol=tolerance)


def test_without_an_average_the_last_policy_is_returned(make_causal, tokenizer) -> None:
    last, policy, _, _ = train(make_causal(), tokenizer)
    assert last is policy and not last.training


def test_adaptive_kl_is_the_controller(make_causal, tokenizer) -> None:
    settings = {"target_kl": 0.5, "kl_horizon": 40.0, "beta": 0.1, "steps": 4}
    history = train(make_causal(), tokenizer, **settings).history
    controller = AdaptiveKLController(0.1, target=0.5, horizon=40.0)
    for row in history:
        assert row["objective/beta"] == pytest.approx(controller.beta, rel=1e-6)
        controller.update(kl=row["objective/kl"], episodes=8)
    assert history[1]["objective/beta"] == pytest.approx(0.1 * (1 - 0.2 * 8 / 40), rel=1e-6)


def test_ptx_without_text_is_refused(make_causal, tokenizer) -> None:
    with pytest.raises(UserError, match="corpus_blocks"):
        train(make_causal(), tokenizer, ptx_coef=0.3)


def test_an_epoch_is_cut_into_equal_minibatches_that_hold_every_row_once(causal, tokenizer) -> None:
    def minibatches(config, step, blocks=None):
        return Rollouts(causal, len, tokenizer, PROMPTS, config, 0, blocks).minibatches(step)

    config = RLHFConfig(batch_size=10, minibatch_size=4, epochs=2, ptx_coef=1.0, ptx_batch_size=3)
    blocks = torch.arange(30)[:, None]
    updates = [u for step in range(2) for u in minibatches(config, step, blocks)]
    assert [len(rows) for rows, _ in updates] == [4, 3, 3] * 4
    for epoch in range(4):
        rows = torch.cat([rows for rows, _ in updates[3 * epoch : 3 * epoch + 3]])
        assert sorted(rows.tolist()) == list(range(10))
    mixed = torch.cat([chosen for _, chosen in updates]).flatten().tolist()  # 12 updates of 3 blocks: 30 and 6 more
    assert sorted(mixed[:30]) == list(range(30))
    whole = list(minibatches(RLHFConfig(batch_size=3, minibatch_size=64), 0))
    assert [(len(rows), chosen) for rows, chosen in whole] == [(3, None)]


def test_learning_rate_falls_to_a_tenth(make_causal, tokenizer) -> None:
    history = train(make_causal(), tokenizer, steps=11, warmup=2, lr=1e-3, max_response_tokens=2).history
    rates = [row["policy/lr"] for row in history]
    assert rates[0] == pytest.approx(0.5e-3) and rates[1] == rates[2] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(2e-4) and all(a > b for a, b in itertools.pairwise(rates[2:]))


@pytest.mark.parametrize(
    "returned",
    [
        [1, 2.0, np.float32(3.0)],
        (1.0, torch.tensor(2.0), True + 2),
        np.array([3.0, 2.0, 1.0])[::-1],
        np.array([1, 2, 3], dtype=object),
        np.array([1, 2, 3], dtype=np.int64),
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True),
        (float(n) for n in (1, 2, 3)),
        range(1, 4),
    ],
    ids=lambda x: type(x).__name__,
)
def test_all_that_is_one_number_a_response_is_taken(returned) -> None:
    scores = scores_tensor(returned, 3)
    assert scores.dtype == torch.float32 and scores.tolist() == [1.0, 2.0, 3.0] and not scores.requires_grad
