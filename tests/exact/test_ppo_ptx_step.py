"""A whole step of PPO-ptx by hand: float64, one row at a time, without padding, masks, optimizer or any loss of ours.

Written from the papers: Ouyang et al. 2022 (equation 2), Schulman et al. 2016 (GAE) and 2017 (PPO), and Kingma &
Ba 2015 (Adam). The package does the same in padded float32 batches, micro-batches and two minibatches.
"""

import math

import pytest
import torch

from minirlhf.language import rollouts
from minirlhf.language.models import clone, scalar_model_from
from minirlhf.language.rlhf import RLHFConfig, train_rlhf
from minirlhf.training import Recorder, generator_for

PROMPTS = ["Tell me about the otter.", "Hi", "Sing about the barn and the marsh!", "Go", "The newt", "Why?"]
SETTINGS = {
    "steps": 1, "batch_size": 6, "minibatch_size": 3, "max_response_tokens": 7, "warmup": 0, "micro_batch_tokens": 60,
    "lr": 3e-3, "value_lr": 5e-3, "beta": 0.2, "gamma": 0.98, "lam": 0.9, "temperature": 1.5, "ptx_coef": 2.0,
    "ptx_batch_size": 3, "missing_eos_penalty": 0.7, "clip_range": 0.1, "value_clip_range": 0.05, "entropy_coef": 0.01,
    "adam_eps": 1e-2, "max_grad_norm": 0.5,
}  # fmt: skip


class Adam:
    """Adam with bias correction, no weight decay, after clipping the gradient's norm."""

    def __init__(self, parameters, lr: float) -> None:
        self.parameters, self.lr, self.t = list(parameters), lr, 0
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p in self.parameters]

    def step(self, loss: torch.Tensor) -> float:
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True, materialize_grads=True)
        norm = math.sqrt(sum(float((g * g).sum()) for g in gradients))
        scale = min(1.0, SETTINGS["max_grad_norm"] / (norm + 1e-6))
        self.t += 1
        with torch.no_grad():
            for p, g, m, v in zip(self.parameters, gradients, self.first, self.second, strict=True):
                m += (1 - 0.9) * (scale * g - m)
                v += (1 - 0.95) * ((scale * g) ** 2 - v)
                p -= self.lr * (m / (1 - 0.9**self.t)) / ((v / (1 - 0.95**self.t)).sqrt() + SETTINGS["adam_eps"])
        return norm


def distributions(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Log-probs over the vocabulary for each token of an answer, [T, V]."""
    logits = model(torch.tensor([prompt + answer])).logits[0]
    return torch.stack(
        [(logits[len(prompt) - 1 + t] / SETTINGS["temperature"]).log_softmax(-1) for t in range(len(answer))]
    )


def values(model, prompt: list[int], answer: list[int]) -> list[torch.Tensor]:
    hidden = model.base_model(torch.tensor([prompt + answer])).last_hidden_state[0]
    return [model.score(hidden[len(prompt) - 1 + t])[0] - model.config.score_offset for t in range(len(answer))]


def advantages(rewards: list[float], old_values: list[float]) -> list[float]:
    found, following = [], 0.0
    for t in reversed(range(len(rewards))):
        after = old_values[t + 1] if t + 1 < len(rewards) else 0.0
        following = (
            rewards[t] + SETTINGS["gamma"] * after - old_values[t] + SETTINGS["gamma"] * SETTINGS["lam"] * following
        )
        found.append(following)
    return found[::-1]


def by_hand(policy, value, reference, rows, scores, updates) -> dict[str, list[float]]:
    """Train policy and value network in place on rows of (prompt, answer, old log-probs, ended)."""
    with torch.no_grad():
        experience = []
        for (prompt, answer, old, ended), score in zip(rows, scores, strict=True):
            ref = distributions(reference, prompt, answer)
            rewards = [-SETTINGS["beta"] * (old[t] - float(ref[t, token])) for t, token in enumerate(answer)]
            rewards[-1] += score - (0.0 if ended else SETTINGS["missing_eos_penalty"])
            before = [float(v) for v in values(value, prompt, answer)]
            experience.append((before, advantages(rewards, before)))
    every = [a for _, own in experience for a in own]
    mean = sum(every) / len(every)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in every) / len(every) + 1e-8)
    actor, critic = Adam(policy.parameters(), SETTINGS["lr"]), Adam(value.parameters(), SETTINGS["value_lr"])
    norms = {"policy": [], "value": []}
    for index, blocks in updates:
        count = sum(len(rows[i][1]) for i in index)
        policy_loss = value_loss = torch.zeros((), dtype=torch.float64)
        for i in index:
            prompt, answer, old, _ = rows[i]
            before, gained = experience[i]
            now, predicted = distributions(policy, prompt, answer), values(value, prompt, answer)
            for t, token in enumerate(answer):
                ratio, advantage = (now[t, token] - old[t]).exp(), (gained[t] - mean) / deviation
                clipped = min(max(ratio, 1 - SETTINGS["clip_range"]), 1 + SETTINGS["clip_range"])
                entropy = -(now[t].exp() * now[t]).sum()
                policy_loss = policy_loss - (
                    min(ratio * advantage, clipped * advantage) + SETTINGS["entropy_coef"] * entropy
                )
                target = gained[t] + before[t]
                limit = SETTINGS["value_clip_range"]
                near = before[t] + min(max(predicted[t] - before[t], -limit), limit)
                value_loss = value_loss + 0.5 * max((predicted[t] - target) ** 2, (near - target) ** 2)
        text = torch.zeros((), dtype=torch.float64)
        for block in blocks:
            logprobs = policy(torch.tensor([block])).logits[0].log_softmax(-1)
            text = text - sum(logprobs[t, token] for t, token in enumerate(block[1:])) / (len(block) - 1)
        norms["policy"].append(actor.step(policy_loss / count + SETTINGS["ptx_coef"] * text / len(blocks)))
        norms["value"].append(critic.step(value_loss / count))
    return norms


def test_two_optimizer_steps_are_those_made_by_hand(causal, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, value = clone(causal), scalar_model_from(causal, seed=2)
    value.config.score_offset = 0.3
    theirs = {name: clone(model).double().eval() for name, model in (("policy", policy), ("value", value))}
    reference = clone(causal).double()
    before = [p.clone() for p in theirs["policy"].parameters()]
    blocks = torch.randint(2, len(tokenizer), (12, 10), generator=generator_for(0))
    config, recorder, taken = RLHFConfig(**SETTINGS), Recorder("rlhf", progress=False), []
    sample = rollouts.sample_by_rank
    monkeypatch.setattr(rollouts, "sample_by_rank", lambda *a, **k: taken.append(sample(*a, **k)) or taken[-1])
    words = lambda prompts, responses: [len(text) / 20 for text in responses]  # noqa: E731
    options = {"corpus_blocks": blocks, "seed": 1, "recorder": recorder}
    train_rlhf(policy, value, causal, words, tokenizer, PROMPTS, config, **options)

    (samples,) = taken
    rows = []
    for i, length in enumerate(samples.lengths.tolist()):
        prompt = samples.prompt_tokens[i][samples.prompt_mask[i]].tolist()
        old = samples.logprobs[i, :length].double().tolist()
        rows.append((prompt, samples.response_tokens[i, :length].tolist(), old, bool(samples.ended[i])))
    texts = tokenizer.batch_decode(samples.responses(), skip_special_tokens=True)
    minibatches = rollouts.Rollouts(causal, words, tokenizer, PROMPTS, config, 1, blocks).minibatches(0)
    order = [(index.tolist(), chosen.tolist()) for index, chosen in minibatches]
    norms = by_hand(theirs["policy"], theirs["value"], reference, rows, words(None, texts), order)

    (row,) = recorder.history
    assert len(order) == 2 and len({len(answer) for _, answer, _, _ in rows} | {len(p) for p, _, _, _ in rows}) > 2
    for name, model in (("policy", policy), ("value", value)):
        assert row[f"{name}/grad_norm"] == pytest.approx(sum(norms[name]) / 2, rel=1e-4)
        for own, exact in zip(model.parameters(), theirs[name].parameters(), strict=True):
            torch.testing.assert_close(own.double(), exact.detach(), atol=2e-6, rtol=1e-5)
    moved = max(float((a - b).detach().abs().max()) for a, b in zip(theirs["policy"].parameters(), before, strict=True))
    assert moved > 1e-3
