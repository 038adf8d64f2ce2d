"""What is sampled is the distribution whose log-probability is kept."""

from __future__ import annotations

import pytest
import torch

from minirlhf.errors import UserError
from minirlhf.language import generation
from minirlhf.language.evaluation import EvaluationConfig, answer
from minirlhf.language.generation import Samples, end_ids, sample
from minirlhf.language.models import clone, response_logprobs, scalar_model_from
from minirlhf.language.rlhf import RLHFConfig, train_rlhf
from minirlhf.language.tokenization import encode_prompts
from minirlhf.training import generator_for

PROMPTS = [[7, 19, 33, 4, 90], [5], [44, 2, 61], [9, 9], [12, 13, 14, 15, 16, 17, 18], [3, 77]] * 3


def draw(model, prompts=PROMPTS, *, greedy=False, temperature=1.0, length: int = 12, eos: int | list[int] = 1, pad=0):
    return sample(
        model,
        prompts,
        max_new_tokens=length,
        pad_id=pad,
        eos_id=eos,
        generator=generator_for(0, "test"),
        temperature=temperature,
        greedy=greedy,
    )


@pytest.fixture
def stopping(causal):
    """A model that ends its answers often: the token that it likes best, after all, stands for EOS."""
    tokens = draw(causal, temperature=3.0).response_tokens
    values, counts = tokens[tokens != 0].unique(return_counts=True)  # 0 is the padding
    causal.eos = int(values[counts.argmax()])
    return causal


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_sampled_equals_teacher_forced(stopping, temperature: float) -> None:
    samples = draw(stopping, temperature=temperature, eos=stopping.eos)
    with torch.no_grad():
        forced = response_logprobs(stopping, samples.tokens, samples.mask, samples.response_mask, temperature)
    assert (samples.logprobs - forced).abs().max() < 1e-5
    assert (samples.logprobs[~samples.response_mask] == 0).all() and (samples.logprobs <= 0).all()


def test_mask_runs_up_to_eos_and_includes_it(stopping) -> None:
    samples = draw(stopping, temperature=3.0, eos=stopping.eos)
    assert samples.ended.any() and not samples.ended.all()
    for row, mask, ended in zip(
        samples.response_tokens.tolist(), samples.response_mask.tolist(), samples.ended.tolist(), strict=True
    ):
        length = sum(mask)
        assert mask == [True] * length + [False] * (len(mask) - length)
        assert (row[length - 1] == stopping.eos) == ended
        assert stopping.eos not in row[: length - 1]
        assert row[length:] == [0] * (len(row) - length)
        assert ended or length == 12
    for ids, length, ended in zip(samples.responses(), samples.lengths.tolist(), samples.ended.tolist(), strict=True):
        assert len(ids) == length - ended and stopping.eos not in ids


def test_dropping_finished_rows_changes_nothing(stopping, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = draw(stopping, greedy=True, eos=_greedy_stop(stopping))
    assert kept.ended.any() and not kept.ended.all()
    for share in (0.0, 1.01):  # never drop, always drop
        monkeypatch.setattr(generation, "COMPACT_BELOW", share)
        other = draw(stopping, greedy=True, eos=_greedy_stop(stopping))
        assert torch.equal(other.response_tokens, kept.response_tokens)
        assert torch.equal(other.response_mask, kept.response_mask) and torch.equal(other.ended, kept.ended)
        assert (other.logprobs - kept.logprobs).abs().max() < 1e-5


def _greedy_stop(model) -> int:
    """A token that some greedy answers hold and some do not."""
    tokens = draw(model, greedy=True, eos=319).response_tokens
    for token in tokens.unique().tolist():
        rows = (tokens == token).any(1)
        if rows.any() and not rows.all():
            return token
    raise AssertionError("the greedy answers are all alike")


def test_greedy_equals_transformers(stopping) -> None:
    eos = _greedy_stop(stopping)
    samples = draw(stopping, greedy=True, eos=eos)
    theirs = stopping.generate(
        samples.prompt_tokens,
        attention_mask=samples.prompt_mask.long(),
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=eos,
        pad_token_id=0,
    )[:, samples.prompt_tokens.shape[1] :]
    assert torch.equal(samples.response_tokens, theirs)


@pytest.mark.parametrize("pad_is_an_end", [False, True])
def test_each_of_several_tokens_ends_an_answer(stopping, pad_is_an_end: bool) -> None:
    """As with transformers; the pad token may be one of them (Qwen's is), and an answer still ends where it does."""
    ends = [stopping.eos, _greedy_stop(stopping), 319]
    pad = ends[0] if pad_is_an_end else 0
    samples = draw(stopping, greedy=True, eos=ends, pad=pad)
    theirs = stopping.generate(
        samples.prompt_tokens,
        attention_mask=samples.prompt_mask.long(),
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=ends,
        pad_token_id=pad,
    )[:, samples.prompt_tokens.shape[1] :]
    assert torch.equal(samples.response_tokens, theirs)
    assert samples.ended.any() and not samples.ended.all()
    lengths = samples.lengths.tolist()
    rows = zip(samples.response_tokens.tolist(), samples.responses(), lengths, samples.ended.tolist(), strict=True)
    for row, cut, length, ended in rows:
        assert (row[length - 1] in ends) == ended and not set(ends) & set(row[: length - 1])
        assert cut == row[: length - ended] and (ended or length == 12)


def test_evaluation_and_ppo_stop_at_every_end_of_the_generation_config(make_causal, tokenizer) -> None:
    model = make_causal(seed=3, scale=8.0)
    settings = EvaluationConfig(max_response_tokens=6)
    prompts = ["say something", "and once more"]
    free = [draw(model, [row], eos=319, length=1, greedy=True) for row in encode_prompts(tokenizer, prompts)]
    firsts = [int(samples.response_tokens[0, 0]) for samples in free]
    assert end_ids(model, tokenizer) == [1]
    assert not any(answer(model, tokenizer, prompts, settings, greedy=True).ended)
    model.generation_config.eos_token_id = firsts
    assert end_ids(model, tokenizer) == sorted({1, *firsts})
    said = answer(model, tokenizer, prompts, settings, greedy=True)
    assert said.ended == [True, True] and said.lengths == [1, 1] and said.responses == ["", ""]

    seen = []
    model.generation_config.eos_token_id = list(range(2, len(tokenizer)))
    config = RLHFConfig(steps=1, batch_size=4, minibatch_size=4, max_response_tokens=6)
    value = scalar_model_from(model, seed=1)
    train_rlhf(clone(model), value, model, lambda p, r: seen.extend(r) or [0.0] * len(r), tokenizer, prompts, config)
    assert seen == [""] * 4
    model.generation_config.eos_token_id = None
    assert end_ids(model, tokenizer) == [1]


def test_what_a_model_can_not_read_is_refused(causal) -> None:
    for prompts, length in (([[5] * 100, [7]], 29), ([[5] * 128], 1)):
        with pytest.raises(UserError, match=f"a row takes 129 tokens, {length} of them its answer, .* reads 128"):
            draw(causal, prompts, length=length)
    assert draw(causal, [[5] * 100, [7]], length=28).tokens.shape == (2, 128)
    for token in (320, -1):
        with pytest.raises(UserError, match=f"token {token} is outside the model's vocabulary of 320"):
            draw(causal, [[5, 6], [7, token]])
    assert draw(causal, [[5, 6], [7]], pad=10**6).response_mask.all()  # a pad token never reaches the model


def test_a_row_does_not_depend_on_its_neighbours(causal) -> None:
    together = draw(causal, greedy=True)
    for i in range(6):
        alone = draw(causal, [PROMPTS[i]], greedy=True)
        width = alone.response_tokens.shape[1]
        assert torch.equal(alone.response_tokens[0], together.response_tokens[i, :width])


def test_the_seed_decides(causal) -> None:
    assert torch.equal(draw(causal, temperature=3.0).tokens, draw(causal, temperature=3.0).tokens)
    torch.manual_seed(0)
    first = torch.rand(1)
    torch.manual_seed(0)
    draw(causal)
    assert torch.equal(torch.rand(1), first)  # the global randomness is left alone


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_nothing_is_cut_off_the_distribution(make_causal, temperature: float) -> None:
    """Museum 24: 320 tokens, one draw for each of 20000 rows; top_k=50 would leave 270 of them unseen."""
    model = make_causal("llama", seed=3, scale=3.0)
    rows = 20_000
    tokens = draw(model, [[7, 19]] * rows, length=1, temperature=temperature).response_tokens[:, 0]
    with torch.no_grad():
        probabilities = (model(torch.tensor([[7, 19]])).logits[0, -1] / temperature).softmax(-1)
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    expected = probabilities.double() * rows
    big = expected >= 5
    observed = torch.cat([counts[big], counts[~big].sum()[None]])
    wanted = torch.cat([expected[big], expected[~big].sum()[None]])
    freedom = int(big.sum())
    chi_square = float(((observed - wanted) ** 2 / wanted.clamp(min=1e-9)).sum())
    assert freedom > 60
    assert abs(chi_square - freedom) < 6 * (2 * freedom) ** 0.5
    assert int((counts > 0).sum()) > 60


def test_rows_cuts_empty_columns_on_both_sides(stopping) -> None:
    samples = draw(stopping, temperature=3.0, eos=stopping.eos)
    short = int(samples.lengths.argmin())
    index = torch.tensor([short])
    part = samples.rows(index)
    prompt, answer = int(samples.prompt_mask[short].sum()), int(samples.lengths[short])
    assert part.prompt_tokens.shape == (1, prompt) and part.response_tokens.shape == (1, answer)
    assert part.prompt_mask.all() and part.response_mask.all()
    assert part.tokens[0].tolist() == samples.tokens[short][samples.mask[short]].tolist()
    assert torch.equal(part.logprobs[0], samples.logprobs[short, :answer])
    assert torch.equal(part.ended, samples.ended[index])
    everything = samples.rows(torch.arange(len(samples.ended)))
    assert all(torch.equal(a, b) for a, b in zip(everything, samples, strict=True))
    assert isinstance(everything, Samples)


def test_all_end_at_once(make_causal) -> None:
    model = make_causal()
    eos = int(draw(model, [[5, 6]], greedy=True, eos=319).response_tokens[0, 0])
    samples = draw(model, [[5, 6]] * 3, greedy=True, eos=eos)
    assert samples.response_tokens.shape == (3, 1) and samples.ended.all()
    assert samples.responses() == [[], [], []]


def test_errors(make_causal) -> None:
    model = make_causal()
    for prompts in ([], [[]], [[5], []]):
        with pytest.raises(ValueError, match="at least one"):
            draw(model, prompts)
    for temperature in (0.0, -1.0):
        with pytest.raises(ValueError, match="temperature"):
            draw(model, temperature=temperature)
    for eos in (0, [0], [0, 0]):
        with pytest.raises(ValueError, match="pad"):
            draw(model, eos=eos)
    model.train()
    with pytest.raises(ValueError, match="eval"):
        draw(model)


def test_answers_to_texts_and_to_their_ids_are_the_same(causal, tokenizer) -> None:
    prompts, settings = ["say something", "and once more"], EvaluationConfig(max_response_tokens=6)
    by_text = answer(causal, tokenizer, prompts, settings, seed=3)
    assert answer(causal, tokenizer, encode_prompts(tokenizer, prompts), settings, seed=3) == by_text
    assert all(length > 0 for length in by_text.lengths)


@pytest.mark.parametrize("one_generator", [True, False])
def test_a_small_cache_changes_no_answer(stopping, one_generator: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompts are answered a few at a time; every row keeps its own random numbers, and its place."""
    sizes, real = [], generation.decoder_for

    def counted(model, tokens, mask, room):
        sizes.append((len(tokens), len(tokens) * (tokens.shape[1] + room)))
        return real(model, tokens, mask, room)

    monkeypatch.setattr(generation, "decoder_for", counted)

    def sampled(cache_tokens: int | None) -> Samples:
        rows = [generator_for(0, "row", i) for i in range(len(PROMPTS))]
        options = {"max_new_tokens": 12, "pad_id": 0, "eos_id": stopping.eos, "temperature": 3.0}
        generator = generator_for(0, "test") if one_generator else rows
        return sample(stopping, PROMPTS, generator=generator, cache_tokens=cache_tokens, **options)

    whole = sampled(None)
    assert [rows for rows, _ in sizes] == [len(PROMPTS)] and whole.ended.any() and not whole.ended.all()
    sizes.clear()
    parts = sampled(60)
    assert sum(rows for rows, _ in sizes) == len(PROMPTS) and len(sizes) > 4 and max(held for _, held in sizes) <= 60
    for name in ("prompt_tokens", "prompt_mask", "response_tokens", "response_mask", "ended"):
        assert torch.equal(getattr(whole, name), getattr(parts, name)), name
    assert (whole.logprobs - parts.logprobs).abs().max() < 1e-5
