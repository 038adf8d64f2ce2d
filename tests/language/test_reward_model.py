"""The K-way loss against enumeration on the model, the offset, and the figures of the evaluation."""

import itertools
import math
from pathlib import Path

import pytest
import torch

from minirlhf.checkpoints import save_model
from minirlhf.data import Comparison, Demonstration
from minirlhf.errors import CheckpointError
from minirlhf.intervals import win_rate
from minirlhf.language import reward_model as module
from minirlhf.language.evaluation import (
    accuracy,
    calibration_error,
    evaluate_reward_model,
)
from minirlhf.language.models import load_scalar_model, pad, scalar_model_from, sequence_scores
from minirlhf.language.reward_model import RewardModelConfig, RewardModelScorer, encode_comparisons, train_reward_model
from minirlhf.language.tokenization import encode_prompts, encode_responses
from minirlhf.training import Recorder, epoch_batch

ROWS = [
    Comparison("Tell me about the otter.", ("The otter naps.", "No.", "The newt waits by the barn."), (2.0, 0.0, 1.0)),
    Comparison("Hi", ("The heron sings.", "The heron digs by the marsh."), (0.0, 1.0)),
    Comparison("Sing!", ("The magpie.", "The newt.", "The otter.", "The badger naps."), (1.0, 1.0, 0.5, 3.0)),
    Comparison("Tell me about the barn.", ("The barn.", "By the barn the otter naps."), (-1.0, -3.0)),
]
DEMONSTRATIONS = [Demonstration("Hi", "The otter naps by the hedge."), Demonstration("Sing!", "The newt waits.")]


def train(model, tokenizer, rows=ROWS, **settings):
    recorder = Recorder("reward_model", progress=False)
    config = RewardModelConfig(**({"batch_size": len(rows), "warmup": 0, "lr": 1e-2} | settings))
    return train_reward_model(model, tokenizer, rows, config, recorder=recorder, seed=4), recorder.history


def test_loss_and_accuracy_equal_enumeration(make_causal, tokenizer) -> None:
    causal = make_causal(scale=4.0)
    scalar = scalar_model_from(causal, seed=4).eval()
    prompts, right, pairs = [], 0, 0
    for row, encoded in zip(ROWS, encode_comparisons(tokenizer, ROWS), strict=True):
        # Each answer alone, without any padding.
        with torch.no_grad():
            r = [float(sequence_scores(scalar, torch.tensor([e]), torch.ones(1, len(e)))) for e in encoded]
        losses = []
        for i, j in itertools.permutations(range(len(r)), 2):
            if row.scores[i] > row.scores[j]:
                losses.append(math.log1p(math.exp(-(r[i] - r[j]))))
                right += r[i] > r[j]
        prompts.append(sum(losses) / len(losses))
        pairs += len(losses)
    _, history = train(causal, tokenizer)
    assert len(history) == 1
    assert history[0]["reward_model/loss"] == pytest.approx(sum(prompts) / len(prompts), rel=1e-5)
    assert history[0]["reward_model/accuracy"] == pytest.approx(right / pairs)


def test_all_answers_of_a_prompt_are_in_one_step(make_causal, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Comparison]] = []
    original = module._score_group

    def spy(model, encoded, comparisons, tokenizer):
        assert [len(rows) for rows in encoded] == [len(row.responses) for row in comparisons]
        seen.append(list(comparisons))
        return original(model, encoded, comparisons, tokenizer)

    monkeypatch.setattr(module, "_score_group", spy)
    train(make_causal(), tokenizer, batch_size=2)
    assert len(seen) == 2  # one epoch of two steps: each prompt once
    assert sorted(row.prompt for rows in seen for row in rows) == sorted(row.prompt for row in ROWS)
    expected = [[ROWS[i].prompt for i in epoch_batch(4, 2, step, 4, "reward_model")] for step in range(2)]
    assert [sorted(row.prompt for row in rows) for rows in seen] == [sorted(rows) for rows in expected]


@pytest.mark.parametrize("tokens", [1, 120, 250])
def test_micro_batches_change_nothing(make_causal, tokenizer, gradients, tokens: int) -> None:
    _, history = train(make_causal(scale=4.0), tokenizer)
    _, others = train(make_causal(scale=4.0), tokenizer, micro_batch_tokens=tokens)
    assert history[0]["reward_model/loss"] == pytest.approx(others[0]["reward_model/loss"], rel=1e-5)
    assert history[0]["reward_model/accuracy"] == others[0]["reward_model/accuracy"]
    gradients.assert_same(0, 1, 1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_demonstrations_average_zero_and_the_checkpoint_is_plain_transformers(
    make_causal, tokenizer, tmp_path, architecture: str
) -> None:
    from transformers import AutoModelForSequenceClassification

    causal = make_causal(architecture)
    before = {key: value.clone() for key, value in causal.state_dict().items()}
    config = RewardModelConfig(batch_size=2, epochs=4, lr=1e-2)
    model = train_reward_model(
        causal, tokenizer, ROWS, config, demonstrations=DEMONSTRATIONS, recorder=Recorder("rm", progress=False)
    )
    assert not model.training
    assert all(torch.equal(before[key], value) for key, value in causal.state_dict().items())
    scorer = RewardModelScorer(model, tokenizer)
    scores = scorer([d.prompt for d in DEMONSTRATIONS], [d.completion for d in DEMONSTRATIONS])
    assert abs(float(scores.mean())) < 1e-5 and float(scores.std()) > 0
    offset = model.config.score_offset
    assert offset != 0

    save_model(tmp_path / "rm", model, tokenizer)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    assert loaded.config.score_offset == pytest.approx(offset)
    tokens, mask = pad(encode_comparisons(tokenizer, ROWS)[0], tokenizer.pad_token_id)
    with torch.no_grad():
        plain = loaded(input_ids=tokens, attention_mask=mask.long()).logits.squeeze(-1)
    ours = scorer([ROWS[0].prompt] * 3, ROWS[0].responses)
    torch.testing.assert_close(plain - offset, ours, atol=1e-5, rtol=0)
    torch.testing.assert_close(RewardModelScorer(loaded, tokenizer)([ROWS[0].prompt] * 3, ROWS[0].responses), ours)


def test_tied_prompts_count_for_nothing(make_causal, tokenizer) -> None:
    tied = Comparison("Hi", ("The otter.", "The newt."), (1.0, 1.0))
    model, history = train(make_causal(scale=4.0), tokenizer, ROWS, max_grad_norm=1e9)
    mixed, with_ties = train(make_causal(scale=4.0), tokenizer, [*ROWS, *[tied] * 3], max_grad_norm=1e9)
    for key in ("reward_model/loss", "reward_model/accuracy", "reward_model/grad_norm"):
        assert with_ties[0][key] == pytest.approx(history[0][key], rel=1e-5), key
    for own, other in zip(model.parameters(), mixed.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-5)
    _, nothing = train(make_causal(), tokenizer, [tied] * 2)
    assert nothing[0]["reward_model/loss"] == 0 and nothing[0]["reward_model/grad_norm"] == 0


def test_scorer_reads_no_further_than_the_model_can(make_causal, tokenizer) -> None:
    scorer = RewardModelScorer(scalar_model_from(make_causal("gpt2", scale=4.0), seed=0), tokenizer)
    endless = "The otter naps. " * 60
    fits = tokenizer.decode(
        encode_responses(tokenizer, [endless])[0][: 127 - len(encode_prompts(tokenizer, ["Hi"])[0])]
    )
    scores = scorer(["Hi", "Hi", "Hi"], [endless, fits, "No."])
    assert scores[0] == pytest.approx(float(scores[1]), rel=1e-4) and scores[0] != scores[2]


def test_scorer_is_a_function_of_each_text_alone(make_causal, tokenizer) -> None:
    scalar = scalar_model_from(make_causal(scale=4.0), seed=0)
    prompts = [row.prompt for row in ROWS for _ in row.responses]
    responses = [text for row in ROWS for text in row.responses]
    together = RewardModelScorer(scalar, tokenizer)(prompts, responses)
    small = RewardModelScorer(scalar, tokenizer, micro_batch_tokens=1)(prompts, responses)
    assert together.shape == (len(prompts),) and not together.requires_grad
    torch.testing.assert_close(small, together, atol=1e-5, rtol=0)


def test_it_learns_to_rank(make_causal, tokenizer) -> None:
    _, history = train(make_causal(), tokenizer, epochs=40)
    assert history[-1]["reward_model/accuracy"] == 1.0
    assert history[-1]["reward_model/loss"] < 0.2


COMPARED = [
    Comparison("1", ("a", "b b", "c c c"), (3.0, 2.0, 1.0), "ann"),
    Comparison("2", ("a a", "b"), (1.0, 0.0), "bob"),
    Comparison("3", ("a", "b b"), (0.0, 1.0), "eve"),
    Comparison("4", ("a", "b", "c c"), (1.0, 1.0, 0.0), "eve"),
]
REWARD = {("1", "a"): 2.0, ("1", "b b"): 0.0, ("1", "c c c"): 1.0, ("2", "a a"): 0.5, ("2", "b"): 0.5}
REWARD |= {("3", "a"): 4.0, ("3", "b b"): 1.0, ("4", "a"): 1.0, ("4", "b"): -1.0, ("4", "c c"): 0.0}


def reward(prompts, responses):
    return [REWARD[pair] for pair in zip(prompts, responses, strict=True)]


def gold(prompts, responses):
    truth = {("1", "a"): 3.0, ("1", "b b"): 2.0, ("1", "c c c"): 2.5}
    return [truth.get(pair, 0.0) for pair in zip(prompts, responses, strict=True)]


def test_figures_on_hand_made_comparisons() -> None:
    found = evaluate_reward_model(reward, COMPARED, {"ann", "bob"}, gold)
    # ann: a>b right, a>c right, b>c wrong; bob: a>b equal, half.
    assert found["pairs"] == 4 and found["accuracy"] == pytest.approx(2.5 / 4)
    # Words: a-b -1, a-c -2, b-c -1 wrong all; bob: 2 > 1 right.
    assert found["length_baseline"] == pytest.approx(1 / 4)
    # Gold orders ann's pairs right, right, wrong; bob's equal.
    assert found["ceiling"] == pytest.approx(2.5 / 4)
    # eve: 4 > 1 on the wrong side; ties dropped, then 1 > 0 right, -1 > 0 wrong.
    assert found["pairs_heldout_labelers"] == 3
    assert found["accuracy_heldout_labelers"] == pytest.approx(1 / 3)
    assert found["length_baseline_heldout_labelers"] == pytest.approx(1 / 3)
    assert found["ceiling_heldout_labelers"] == pytest.approx(0.5)
    # The outcome of each pair and the prompt of each: pairs of one prompt are a cluster.
    for suffix, outcomes, prompts in (("", [1, 1, 0, 0.5], "1112"), ("_heldout_labelers", [0, 1, 0], "344")):
        expected = win_rate(outcomes, [0.5] * len(outcomes), prompts)
        assert found[f"accuracy{suffix}_interval"] == pytest.approx(list(expected[1]))
    # sigmoid of +-2, +-1, +-1, 0, all apart in bins of a tenth but the two of +-1: by hand.
    s = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    expected = 2 * (1 - s(2.0)) / 8 + 2 * 2 * abs(s(1.0) - 0.5) / 8 + 0.0
    assert found["calibration_error"] == pytest.approx(expected)


def test_figures_without_held_out_labelers_or_truth() -> None:
    found = evaluate_reward_model(reward, COMPARED[:2], {"ann", "bob"})
    assert found["ceiling"] is None and found["ceiling_heldout_labelers"] is None
    assert found["accuracy_heldout_labelers"] is None and found["pairs_heldout_labelers"] == 0
    assert found["accuracy_heldout_labelers_interval"] is None
    assert evaluate_reward_model(reward, COMPARED[2:], {"ann"})["accuracy"] is None


def test_accuracy_and_calibration_of_known_cases() -> None:
    assert accuracy(torch.tensor([1.0, -1.0, 0.0, 2.0])) == pytest.approx(2.5 / 4)
    assert math.isnan(accuracy(torch.tensor([])))
    # Nine of ten pairs right at a predicted 0.9: calibrated.
    difference = math.log(0.9 / 0.1) + 1e-9
    assert calibration_error(torch.tensor([difference] * 9 + [-difference], dtype=torch.float64)) < 1e-6
    assert calibration_error(torch.tensor([9.0] * 5 + [-9.0] * 5, dtype=torch.float64)) == pytest.approx(0.5, abs=1e-3)


def test_a_reward_model_of_0_1_with_surprise_is_refused(tmp_path: Path, make_causal) -> None:
    """Its score was more than its scalar head: loaded without the rest it would score differently, in silence."""
    model = scalar_model_from(make_causal(), seed=0)
    model.config.surprise = "embedding"
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"reward model of minirlhf 0\.1 .*config\.surprise.*train it again"):
        load_scalar_model(tmp_path)
