"""The probes of lesson 09: each starts from the same model, and changes what it is given alone."""

from __future__ import annotations

from pathlib import Path

import torch
from minirlhf_course.probes import PROMPTS, fresh, probe

from minirlhf.language.tokenization import tokenizer_from_file

WORLD = Path(__file__).resolve().parents[2] / "data" / "small_world"


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_probe_starts_from_one_model_and_trains_a_copy_or_what_it_is_given():
    tokenizer = tokenizer_from_file(WORLD / "tokenizer.json")
    asked = []

    def reward(prompts, responses):
        asked.extend(prompts)
        return [float(len(text)) for text in responses]

    policy, history = probe(reward, tokenizer, steps=1, batch_size=8, max_response_tokens=2)
    assert set(asked) == set(PROMPTS) and len(asked) == 8
    assert len(history) == 1 and abs(history[0]["objective/kl"]) < 1e-4, "it begins as the reference"
    assert history[0]["objective/beta"] == 0.0
    assert not torch.equal(weights(policy), weights(fresh(tokenizer)))
    own = fresh(tokenizer)
    again, _ = probe(reward, tokenizer, policy=own, steps=1, batch_size=8, max_response_tokens=2)
    assert again is own and torch.equal(weights(own), weights(policy))
