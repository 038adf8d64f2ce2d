"""DPO on tiny models: against enumeration row by row, and what a run must not depend on."""

import itertools
import math
from pathlib import Path

import pytest
import torch

from minirlhf.data import Comparison
from minirlhf.errors import TrainingError, UserError
from minirlhf.language.dpo import DPOConfig, train_dpo
from minirlhf.language.models import clone, response_logprobs
from minirlhf.language.reward_model import encode_comparisons
from minirlhf.language.tokenization import encode_prompts
from minirlhf.training import Recorder

ROWS = [
    Comparison("Tell me about the otter.", ("The otter naps.", "No.", "The newt waits by the barn."), (2.0, 0.0, 1.0)),
    Comparison("Hi", ("The heron sings.", "The heron digs by the marsh."), (0.0, 1.0)),
    Comparison("Sing!", ("The magpie.", "The newt.", "The otter.", "The badger naps."), (1.0, 1.0, 0.5, 3.0)),
    Comparison("Tell me about the barn.", ("The barn.", "By the barn the otter naps."), (-1.0, -1.0)),  # a tie
]


def train(policy, reference, tokenizer, rows=ROWS, recorder=None, monitor=None, **settings):
    recorder = recorder or Recorder("dpo", progress=False)
    config = DPOConfig(
        **({"batch_size": len(rows), "warmup": 0, "lr": 1e-2, "beta": 0.1, "measured_prompts": 0} | settings)
    )
    train_dpo(policy, reference, tokenizer, rows, config, recorder=recorder, seed=4, monitor=monitor)
    return recorder.history


def sequence_logprobs(model, tokenizer, rows=ROWS) -> list[list[float]]:
    """The log-prob of each answer, EOS included, every one alone and without padding."""
    starts = [len(ids) for ids in encode_prompts(tokenizer, [row.prompt for row in rows])]
    found = []
    with torch.no_grad():
        for start, encoded in zip(starts, encode_comparisons(tokenizer, rows), strict=True):
            found.append([])
            for ids in encoded:
                tokens, mask = torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool)
                answer = torch.ones(1, len(ids) - start, dtype=torch.bool)
                found[-1].append(float(response_logprobs(model, tokens, mask, answer).sum()))
    return found


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_metrics_equal_enumeration(make_causal, tokenizer, smoothing: float) -> None:
    policy, reference = make_causal(scale=4.0, seed=1), make_causal(scale=4.0, seed=2)
    own, ref = sequence_logprobs(policy, tokenizer), sequence_logprobs(reference, tokenizer)
    prompts, right, margins, best, worst = [], 0, [], [], []
    for row, a, b in zip(ROWS, own, ref, strict=True):
        r = [0.1 * (x - y) for x, y in zip(a, b, strict=True)]
        losses = []
        for i, j in itertools.permutations(range(len(r)), 2):
            if row.scores[i] > row.scores[j]:
                d = r[i] - r[j]
                losses.append((1 - smoothing) * math.log1p(math.exp(-d)) + smoothing * math.log1p(math.exp(d)))
                right += d > 0
                margins.append(d)
        if losses:
            prompts.append(sum(losses) / len(losses))
            best.append(a[row.scores.index(max(row.scores))])
            worst.append(a[row.scores.index(min(row.scores))])
    (measured,) = train(policy, reference, tokenizer, label_smoothing=smoothing)
    assert len(prompts) == 3
    assert measured["dpo/loss"] == pytest.approx(sum(prompts) / 3, rel=1e-5)
    assert measured["dpo/accuracy"] == pytest.approx(right / len(margins))
    assert measured["dpo/margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-6)
    assert measured["dpo/best_logprob"] == pytest.approx(sum(best) / 3, rel=1e-5)
    assert measured["dpo/worst_logprob"] == pytest.approx(sum(worst) / 3, rel=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_it_learns_the_rankings(make_causal, tokenizer, architecture: str) -> None:
    policy = make_causal(architecture)
    reference = clone(policy)
    before = {key: value.clone() for key, value in reference.state_dict().items()}
    history = train(policy, reference, tokenizer, epochs=40)
    first, last = history[0], history[-1]
    assert first["dpo/loss"] == pytest.approx(math.log(2), rel=1e-6) and first["dpo/accuracy"] == 0.5
    assert first["dpo/margin"] == pytest.approx(0.0, abs=1e-6)
    assert last["dpo/accuracy"] == 1.0 and last["dpo/loss"] < 0.3
    assert last["dpo/best_logprob"] > last["dpo/worst_logprob"] + 5
    assert all(torch.equal(value, before[key]) for key, value in reference.state_dict().items())


@pytest.mark.parametrize("tokens", [1, 120, 250])
def test_micro_batches_change_nothing(make_causal, tokenizer, gradients, tokens: int) -> None:
    rows = [train(make_causal(scale=4.0), make_causal(scale=4.0, seed=2), tokenizer, sft_coef=0.5)[0]]
    rows += train(
        make_causal(scale=4.0), make_causal(scale=4.0, seed=2), tokenizer, sft_coef=0.5, micro_batch_tokens=tokens
    )
    gradients.assert_same(0, 1, 1e-5)
    one, two = rows
    assert all(one[key] == pytest.approx(two[key], rel=1e-4, abs=1e-6) for key in one if key != "policy/grad_norm")


def test_the_sft_term_is_the_best_answers_mean_token(make_causal, tokenizer) -> None:
    policy, reference = make_causal(scale=4.0), make_causal(scale=4.0, seed=2)
    starts = [len(ids) for ids in encode_prompts(tokenizer, [row.prompt for row in ROWS])]
    best = [row.scores.index(max(row.scores)) if len(set(row.scores)) > 1 else None for row in ROWS]
    assert best.count(None) == 1, "a prompt whose answers are all tied has no best answer"
    rows = zip(encode_comparisons(tokenizer, ROWS), sequence_logprobs(policy, tokenizer), best, starts, strict=True)
    teaching = [(len(ids[b]) - start, logprobs[b]) for ids, logprobs, b, start in rows if b is not None]
    mean = sum(logprob for _, logprob in teaching) / sum(tokens for tokens, _ in teaching)
    losses = [train(clone(policy), reference, tokenizer, sft_coef=c)[0]["dpo/loss"] for c in (0.0, 2.0)]
    assert losses[1] - losses[0] == pytest.approx(-2.0 * mean, rel=1e-5)


def test_a_killed_run_ends_with_the_same_bits(make_causal, tokenizer, tmp_path: Path) -> None:
    whole, policy, reference = make_causal(seed=1), make_causal(seed=1), make_causal(seed=2)
    train(whole, reference, tokenizer, epochs=6)

    class Killed(Exception):
        pass

    class Stops(Recorder):
        def log(self, metrics) -> None:
            super().log(metrics)
            if len(self.history) == 4 and not (tmp_path / "again").exists():
                raise Killed

    with pytest.raises(Killed):
        train(
            policy,
            reference,
            tokenizer,
            epochs=6,
            recorder=Stops("dpo", tmp_path / "run", save_seconds=0, progress=False),
        )
    (tmp_path / "again").touch()
    resumed = make_causal(seed=1)
    recorder = Recorder("dpo", tmp_path / "run", save_seconds=0, progress=False)
    history = train(resumed, reference, tokenizer, epochs=6, recorder=recorder)
    assert recorder.first_step == 3 and len(history) == 6
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_samples_are_measured_now_and_then(make_causal, tokenizer) -> None:
    asked: list[int] = []

    def monitor(prompts, responses, ended):
        asked.append(len(prompts))
        return {"objective/gold": float(len(responses))}

    settings = {"epochs": 6, "measured_prompts": 3, "measure_every": 4, "max_response_tokens": 5}
    history = train(make_causal(), make_causal(), tokenizer, monitor=monitor, **settings)
    measured = [row["step"] for row in history if "objective/kl" in row]
    assert measured == [0, 4, 5] and asked == [3, 3, 3] and history[4]["objective/gold"] == 3.0
    assert history[0]["objective/kl"] == pytest.approx(0.0, abs=1e-5) and history[5]["objective/kl"] != 0.0
    assert 1 <= history[0]["objective/response_length"] <= 5


def test_mistakes_are_named(make_causal, tokenizer) -> None:
    policy = make_causal()
    with pytest.raises(UserError, match="the policy and the reference share"):
        train(policy, policy, tokenizer)
    broken = make_causal()
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    with pytest.raises(TrainingError, match=r"dpo: the loss is nan at step 0.*lower --dpo.lr"):
        train(broken, make_causal(), tokenizer)
    with pytest.raises(UserError, match="beta"):
        DPOConfig(beta=0.0)
