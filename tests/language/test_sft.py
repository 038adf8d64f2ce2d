"""The supervised loss counts the completion and its EOS, and nothing of the prompt."""

import pytest
import torch
from torch.nn import functional as F

from minirlhf.data import Demonstration
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
    trained, history = train(model, tokenizer)
    assert trained is model and not trained.training and len(history) == 1
    assert history[0]["sft/loss"] == pytest.approx(total / count, rel=1e-5)
    # Museum 17: a loss mask of all ones is another number.
    assert abs(total / count - everything / all_count) > 1e-2


@pytest.mark.parametrize("tokens", [1, 60, 90])
def test_micro_batches_change_nothing(make_causal, tokenizer, gradients, tokens: int) -> None:
    _, whole = train(make_causal(scale=4.0), tokenizer, epochs=2.0)
    _, parts = train(make_causal(scale=4.0), tokenizer, epochs=2.0, micro_batch_tokens=tokens)
    assert [row["sft/loss"] for row in parts] == pytest.approx([row["sft/loss"] for row in whole], rel=1e-5)
    gradients.assert_same(0, len(whole), 1e-6)


def test_it_learns(make_causal, tokenizer) -> None:
    _, history = train(make_causal(), tokenizer, epochs=60.0)
    assert history[-1]["sft/loss"] < 0.3 * history[0]["sft/loss"]
    assert history[-1]["sft/lr"] < 0.2 * history[0]["sft/lr"]
