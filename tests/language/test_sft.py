"""The supervised loss counts the completion and its EOS, and nothing of the prompt."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from minirlhf.data import Demonstration
from minirlhf.language.models import clone
from minirlhf.language.sft import SFTConfig, train_sft
from minirlhf.language.tokenization import encode_prompts, encode_responses
from minirlhf.training import Recorder

ROWS = [
    Demonstration("Tell me about the otter.", "The otter naps by the hedge."),
    Demonstration("Hi", "The newt waits."),
    Demonstration("Tell me about the magpie and the barn.", "No."),
    Demonstration("Sing!", "The heron digs by the marsh. The magpie sings by the barn."),
]


def train(model, tokenizer, **settings):
    recorder = Recorder("sft", progress=False)
    config = SFTConfig(**({"epochs": 1.0, "batch_size": 4, "warmup": 0, "lr": 1e-2} | settings))
    return train_sft(model, tokenizer, ROWS, config, recorder=recorder), recorder.history


def test_loss_counts_completions_and_their_eos(make_causal, tokenizer) -> None:
    model = make_causal(scale=4.0)
    total, count, everything, all_count = 0.0, 0, 0.0, 0
    prompts = encode_prompts(tokenizer, [r.prompt for r in ROWS])
    completions = encode_responses(tokenizer, [r.completion for r in ROWS])
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion[-1] == tokenizer.eos_token_id and prompt[-1] != tokenizer.eos_token_id
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            losses = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        total, count = total + float(losses[-len(completion) :].sum()), count + len(completion)
        everything, all_count = everything + float(losses.sum()), all_count + len(losses)
    _, history = train(model, tokenizer)
    assert len(history) == 1
    assert history[0]["sft/loss"] == pytest.approx(total / count, rel=1e-5)
    # Museum 17: a loss mask of all ones is another number.
    assert abs(total / count - everything / all_count) > 1e-2


@pytest.mark.parametrize("tokens", [1, 60, 90])
def test_micro_batches_change_nothing(make_causal, tokenizer, tokens: int) -> None:
    whole, history = train(make_causal(scale=4.0), tokenizer, epochs=2.0)
    _, others = train(make_causal(scale=4.0), tokenizer, epochs=2.0, micro_batch_tokens=tokens)
    for a, b in zip(history, others, strict=True):
        assert a["sft/loss"] == pytest.approx(b["sft/loss"], rel=1e-5)
        assert a["sft/grad_norm"] == pytest.approx(b["sft/grad_norm"], rel=1e-4)
    fresh = make_causal(scale=4.0)
    assert any(not torch.equal(p, q) for p, q in zip(whole.parameters(), fresh.parameters(), strict=True))
    _same_first_gradient(make_causal, tokenizer, tokens)


def _same_first_gradient(make_causal, tokenizer, tokens: int) -> None:
    """Adam's first step is lr * sign(gradient), which blows rounding up: compare the gradients themselves."""
    gradients = []
    for size in (8192, tokens):
        model = make_causal(scale=4.0)
        train(model, tokenizer, micro_batch_tokens=size, lr=0.0, max_grad_norm=1e9)
        gradients.append([p.grad.clone() for p in model.parameters()])
    scale = max(float(g.abs().max()) for g in gradients[0])
    for a, b in zip(*gradients, strict=True):
        assert float((a - b).abs().max()) < 1e-6 * max(1.0, scale)


def test_it_learns(make_causal, tokenizer) -> None:
    _, history = train(make_causal(), tokenizer, epochs=60.0)
    assert history[-1]["sft/loss"] < 0.3 * history[0]["sft/loss"]
    assert history[-1]["sft/lr"] < 0.2 * history[0]["sft/lr"]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_seed_decides_all(make_causal, tokenizer, architecture: str) -> None:
    """Twice the same weights, whatever the global random state: dropout included, or off."""
    results = []
    for state in (1, 2):
        torch.manual_seed(state)
        model, _ = train(make_causal(architecture), tokenizer, epochs=2.0)
        results.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_returns_the_same_model_in_eval_mode(make_causal, tokenizer) -> None:
    model = clone(make_causal())
    trained, _ = train(model, tokenizer)
    assert trained is model and not trained.training
