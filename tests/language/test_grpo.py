"""RLOO and GRPO on language models: groups, means, where the KL is charged, and that no value network is missed."""

from typing import NamedTuple

import pytest
import torch

from minirlhf.errors import UserError
from minirlhf.language import grpo
from minirlhf.language.generation import sample
from minirlhf.language.grpo import GRPOConfig, RLOOConfig, token_shares, train_grpo
from minirlhf.language.models import clone, response_logprobs
from minirlhf.language.pretraining import language_model_loss
from minirlhf.language.rollouts import Rollout
from minirlhf.language.tokenization import encode_prompts
from minirlhf.training import Recorder, generator_for

PROMPTS = ["Tell me about the otter.", "Hi", "Sing about the barn and the marsh!", "Go", "The newt", "Why?"]
SMALL = {"steps": 3, "batch_size": 8, "minibatch_size": 4, "max_response_tokens": 8, "warmup": 0}
KINDS = {
    "rloo": RLOOConfig,
    "grpo": GRPOConfig,
    "dr_grpo": lambda **s: GRPOConfig(**({"divide_by_std": False, "loss_over": "constant"} | s)),
    "dapo": lambda **s: GRPOConfig(**({"loss_over": "tokens", "clip_range_high": 0.28, "beta": 0.0} | s)),
}


def words(prompts, responses):
    return [float(len(text)) / 20 for text in responses]


class Trained(NamedTuple):
    policy: torch.nn.Module
    history: list[dict]


def train(causal, tokenizer, kind="grpo", reward=words, *, blocks=None, folder=None, **settings) -> Trained:
    policy, config = clone(causal), KINDS[kind](**(SMALL | settings))
    recorder = Recorder(kind, folder, progress=False, save_seconds=0)
    options = {"corpus_blocks": blocks, "seed": 1, "recorder": recorder}
    return Trained(train_grpo(policy, causal, reward, tokenizer, PROMPTS, config, **options), recorder.history)


@pytest.mark.parametrize("kind", KINDS)
def test_the_ratio_starts_at_one_and_the_kl_at_zero(causal, tokenizer, kind: str) -> None:
    before = {key: value.clone() for key, value in causal.state_dict().items()}
    settings = {"batch_size": 16, "epochs": 2, "lr": 1e-3, "temperature": 0.7, "micro_batch_tokens": 100}
    policy, history = train(causal, tokenizer, kind, **settings)
    for row in history:
        assert row["policy/first_ratio_error"] < 1e-5
        assert abs(row["policy/first_approx_kl"]) < 1e-5
        assert row["policy/first_clip_fraction"] == 0
    assert abs(history[0]["objective/kl"]) < 1e-4
    assert max(row["policy/ratio_error"] for row in history) > 1e-3
    assert all(torch.equal(before[key], value) for key, value in causal.state_dict().items())
    assert any(not torch.equal(before[key], value) for key, value in policy.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_change_nothing(causal, tokenizer, gradients, kind: str) -> None:
    whole = train(causal, tokenizer, kind, steps=1, adam_eps=1e-3).history[0]
    updates = len(gradients)
    parts = train(causal, tokenizer, kind, steps=1, adam_eps=1e-3, micro_batch_tokens=40).history[0]
    assert any(float(part.abs().max()) > 1e-4 for part in gradients[0])
    gradients.assert_same(0, updates, 1e-5)
    for key in ("policy/approx_kl", "policy/entropy", "objective/kl", "objective/group_std"):
        assert whole[key] == pytest.approx(parts[key], rel=1e-3, abs=1e-4), key


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_the_first_gradient_is_reinforce_written_by_hand(causal, tokenizer, gradients, monkeypatch, kind: str) -> None:
    """At ratio 1, answer by answer and without padding: weight times advantage times the gradient of its log-probs."""
    taken: list[Rollout] = []
    real = grpo._experience
    monkeypatch.setattr(grpo, "_experience", lambda *a: taken.append(a[0]) or real(*a))
    train(causal, tokenizer, kind, steps=1, minibatch_size=8, missing_eos_penalty=0.25, beta=0.0)
    (rollout,) = taken
    assert [rollout.prompts[i] for i in range(0, 8, 4)] == [rollout.prompts[i + 3] for i in range(0, 8, 4)]
    words_of = torch.tensor(words(None, rollout.responses)) - 0.25 * (~rollout.samples.ended).float()
    model, samples = clone(causal), rollout.samples
    loss = torch.zeros(())
    for i, length in enumerate(samples.lengths.tolist()):
        group = words_of[4 * (i // 4) : 4 * (i // 4) + 4]
        others = torch.cat([group[: i % 4], group[i % 4 + 1 :]])
        if kind == "rloo":
            advantage, weight = words_of[i] - others.mean(), 1 / 8
        else:
            advantage, weight = (words_of[i] - group.mean()) / (group.std() + 1e-6), 8 / length / 8
        prompt = samples.prompt_tokens[i][samples.prompt_mask[i]]
        row = torch.cat([prompt, samples.response_tokens[i, :length]])[None]
        logprobs = model(row).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        own = logprobs.gather(1, samples.response_tokens[i, :length, None]).sum()
        loss = loss - weight * advantage * own / 8
    loss.backward()
    gradients.append([p.grad for p in model.parameters()])
    assert max(float(part.abs().max()) for part in gradients[0]) > 1e-3
    gradients.assert_same(0, -1, 1e-5)


def test_ptx_gradient_is_added(causal, tokenizer, gradients) -> None:
    blocks = torch.randint(2, len(tokenizer), (12, 16), generator=generator_for(0))
    train(causal, tokenizer, steps=1, minibatch_size=8)
    train(causal, tokenizer, steps=1, minibatch_size=8, blocks=blocks, ptx_coef=3.0, ptx_batch_size=12)
    train(causal, tokenizer, steps=1, minibatch_size=8, blocks=blocks, ptx_coef=3.0, ptx_batch_size=12)
    model = clone(causal).eval()
    language_model_loss(model, blocks).backward()
    gradients.append([own + 3.0 * p.grad for own, p in zip(gradients[0], model.parameters(), strict=True)])
    gradients.assert_same(-1, 1, 1e-5)
    with pytest.raises(UserError, match="corpus_blocks"):
        train(causal, tokenizer, ptx_coef=0.3)


def test_a_group_without_variance_teaches_nothing(causal, tokenizer) -> None:
    for kind in ("grpo", "rloo"):
        reward = lambda prompts, responses: [0.7] * len(responses)  # noqa: E731
        policy, history = train(causal, tokenizer, kind, reward, beta=0.0, missing_eos_penalty=0.0)
        assert all(row["objective/equal_groups"] == 1 and row["objective/group_std"] == 0 for row in history)
        assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), causal.parameters(), strict=True))


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_the_kl_as_a_loss_pulls_back(make_causal, tokenizer, kl: str) -> None:
    """Away from the reference, with no reward."""
    policy, recorder = make_causal(seed=5), Recorder("grpo", progress=False)
    settings = {"steps": 30, "batch_size": 64, "minibatch_size": 16, "lr": 1e-2, "missing_eos_penalty": 0.0}
    config = GRPOConfig(**(SMALL | settings), kl=kl, beta=1.0, divide_by_std=False)
    nothing = lambda prompts, responses: [0.0] * len(responses)  # noqa: E731
    train_grpo(policy, make_causal(seed=3, scale=8.0), nothing, tokenizer, PROMPTS, config, seed=1, recorder=recorder)
    kls = [row["objective/kl"] for row in recorder.history]
    first, last = sum(kls[:3]) / 3, sum(kls[-3:]) / 3
    assert recorder.history[0]["policy/kl_loss"] != 0
    if kl == "k1":
        assert last > 0.9 * first, kls  # its gradient has mean 0
    else:
        assert last < 0.8 * first, kls


def test_the_kl_in_the_reward_is_charged_once_per_answer(causal, make_causal, tokenizer) -> None:
    prompts = [prompt for prompt in encode_prompts(tokenizer, PROMPTS[:2]) for _ in range(4)]
    samples = sample(causal, prompts, max_new_tokens=8, pad_id=0, eos_id=1, generator=generator_for(3))
    rollout, other = Rollout([], [], samples, torch.arange(8.0), None, {}), make_causal(seed=5)
    experience, _ = grpo._experience(rollout, other, RLOOConfig(beta=0.3))
    ref = response_logprobs(other, samples.tokens, samples.mask, samples.response_mask)
    rewards = (torch.arange(8.0) - 0.3 * (samples.logprobs - ref).sum(1)).view(2, 4)
    by_hand = torch.stack([row[i] - torch.cat([row[:i], row[i + 1 :]]).mean() for row in rewards for i in range(4)])
    expected = by_hand[:, None] * samples.response_mask
    torch.testing.assert_close(experience.advantages, expected, atol=1e-4, rtol=1e-4)
    history = train(causal, tokenizer, "rloo", steps=1).history
    assert "policy/kl_loss" not in history[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_function_is_learnt(make_causal, tokenizer, kind: str) -> None:
    """Answers of three tokens are wanted; a fresh model never ends one by chance."""
    lengths = lambda p, responses: [-abs(n - 3) / 4 for n in map(len, tokenizer(list(responses))["input_ids"])]  # noqa: E731
    settings = {"steps": 25, "batch_size": 64, "minibatch_size": 16, "lr": 2e-2, "beta": 0.0, "warmup": 2}
    history = train(make_causal(), tokenizer, kind, lengths, missing_eos_penalty=0.5, **settings).history
    scores = [row["objective/score"] for row in history]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.6, scores


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_killed_and_resumed_the_weights_are_the_same_bits(make_causal, tokenizer, tmp_path, kind: str) -> None:
    options = {"steps": 4, "ema_decay": 0.9}
    whole = train(make_causal(), tokenizer, kind, **options).policy
    calls = []

    def stopped(prompts, responses):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return words(prompts, responses)

    with pytest.raises(KeyboardInterrupt):
        train(make_causal(), tokenizer, kind, stopped, folder=tmp_path, **options)
    resumed, history = train(make_causal(), tokenizer, kind, folder=tmp_path, **options)
    assert [row["step"] for row in history] == [0, 1, 2, 3]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_shares_of_tokens_add_up_to_one() -> None:
    mask = torch.tensor([[True] * 4, [True] * 3 + [False], [True] + [False] * 3])
    for loss_over in ("tokens", "sequences"):
        shares = token_shares(mask, 8, 3, GRPOConfig(loss_over=loss_over))
        assert float(shares.sum()) == pytest.approx(1) and (shares[~mask] == 0).all()
    constant = token_shares(mask, 8, 3, GRPOConfig(loss_over="constant", max_response_tokens=10))
    assert constant[mask].unique().tolist() == pytest.approx([1 / 30])
    by_sequence = token_shares(mask, 8, 3, GRPOConfig(loss_over="sequences"))
    torch.testing.assert_close(by_sequence.sum(1), torch.full((3,), 1 / 3))


def test_what_lies_under_the_mask_changes_no_gradient(causal, tokenizer, gradients) -> None:
    prompts = encode_prompts(tokenizer, PROMPTS[:2])
    options = {"max_new_tokens": 8, "pad_id": 0, "eos_id": 1, "generator": generator_for(3), "temperature": 4.0}
    samples = sample(causal, [prompt for prompt in prompts for _ in range(4)], **options)
    cut = torch.arange(8)[None] < torch.arange(1, 9)[:, None]  # answers of 1 to 8 tokens
    samples = samples._replace(response_mask=cut, logprobs=samples.logprobs * cut)
    config, everything = GRPOConfig(temperature=4.0, kl="k3"), torch.arange(8)
    found = []
    for filler in (0.0, float("nan")):
        model = clone(causal)
        rollout = Rollout([], [], samples, torch.arange(8.0), None, {})
        experience, _ = grpo._experience(rollout, causal, config)
        ref = experience.ref_logprobs.masked_fill(~samples.response_mask, filler)
        advantages = experience.advantages.masked_fill(~samples.response_mask, filler)
        experience = experience._replace(ref_logprobs=ref, advantages=advantages)
        loss, _ = grpo._loss(model, experience, config, everything, everything)
        loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert response_logprobs(causal, samples.tokens, samples.mask, samples.response_mask).isfinite().all()


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"--grpo.batch-size 10: must be a multiple of 4"):
        GRPOConfig(batch_size=10)
    with pytest.raises(UserError, match=r"--rloo.group-size 1"):
        RLOOConfig(group_size=1)


def test_policy_and_reference_share_nothing(causal, tokenizer) -> None:
    with pytest.raises(UserError, match="the policy and the reference share"):
        train_grpo(causal, causal, words, tokenizer, PROMPTS, GRPOConfig(**SMALL))
