"""What the lessons' references promise: they are the package's, and what tasks, hints and suspects say is true."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from minirlhf_course.checks import lesson06, lesson07, lesson08, lesson10, lesson11
from minirlhf_course.checks.cases import F64, normal
from minirlhf_course.overoptimisation import EnsembleReward

from minirlhf import losses
from minirlhf.intervals import win_rate
from minirlhf.language.tokenization import encode_prompts, encode_responses, tokenizer_from_file

WORLD = Path(__file__).resolve().parents[3] / "data" / "small_world"
close = torch.testing.assert_close


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# 06 ----------------------------------------------------------------------------------------------------------------


def test_a_row_folded_block_by_block_has_log_softmaxs_sum():
    logits = 30 * normal(seeded(), 5, 23)
    logits[0, :8] = -torch.inf
    for width in (1, 4, 23):
        state = torch.full((5,), -torch.inf, dtype=F64), torch.zeros(5, dtype=F64)
        for block in logits.split(width, dim=1):
            state = lesson06.fold.reference(*state, block)
        close(state[0] + state[1].log(), logits.logsumexp(1), rtol=1e-12, atol=0)


def test_the_clips_gradient_is_autograds():
    g = seeded()
    old = -torch.rand(200, generator=g, dtype=F64)
    new = (old + 0.5 * normal(g, 200)).requires_grad_()
    advantages = normal(g, 200)
    ratio = (new - old).exp()
    torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum().neg().backward()
    close(lesson06.clip_gradient.reference(new.detach(), old, advantages, 0.2), new.grad)
    loss, gradient = lesson06.clipped_loss.reference(new.detach(), old, advantages, torch.ones(200).bool(), 0.2)
    close(gradient, new.grad)
    close(loss.mean(), losses.clipped_surrogate(new.detach(), old, advantages, clip_range=0.2))


def test_a_margin_is_the_difference_of_two_log_probabilities():
    logits, tokens = torch.randn(3, 7), torch.tensor([0, 6, 2])
    logprobs = logits.log_softmax(-1)
    expected = logprobs[range(3), tokens] - logprobs.max(-1).values
    close(lesson06.margin.reference(logits, tokens), expected)


def test_the_definition_of_the_log_probability_is_the_packages():
    logits, tokens = torch.randn(3, 7), torch.tensor([0, 6, 2])
    close(lesson06.token_logprobs.reference(logits, tokens), losses.token_logprobs(logits, tokens))


# 07 ----------------------------------------------------------------------------------------------------------------


def test_pieces_add_up_and_a_mean_of_means_does_not():
    logprobs = -torch.rand(7, 5, generator=seeded(), dtype=F64)
    mask = torch.arange(5) < torch.tensor([[1], [1], [1], [5], [5], [5], [2]])
    whole = lesson07.sft_loss.reference(logprobs, mask)
    for size in range(1, 9):
        close(lesson07.piece_losses.reference(logprobs, mask, size).sum(), whole)
    means = torch.stack([-x[m].mean() for x, m in zip(logprobs.split(3), mask.split(3), strict=True)])
    assert abs(float(means.mean() - whole)) > 0.02


def test_perplexity_of_a_fair_die():
    logprobs = torch.full((2, 4), 1 / 6, dtype=F64).log()
    assert abs(float(lesson07.perplexity.reference(logprobs, torch.ones(2, 4, dtype=torch.bool))) - 6) < 1e-12


# 08 ----------------------------------------------------------------------------------------------------------------


def test_k_is_two_is_the_pair_loss():
    chosen, rejected = normal(seeded(), 2, 6)
    rewards = torch.stack((rejected, chosen), 1)
    pair = lesson08.pair_loss.reference(chosen, rejected)
    close(lesson08.ranking_loss.reference(rewards, torch.tensor([[0.0, 1.0]] * 6)), pair)


def test_the_ceiling_is_right_for_independent_mistakes_and_an_upper_bound_for_others():
    """Two labelers of a known truth: mistakes that fall on any pair alike, then mistakes that fall on close pairs."""
    generator = seeded()
    truth = torch.tensor([[0.0, 1.0]]).expand(40_000, 2)

    def flipped(chance):
        wrong = torch.rand(len(truth), 1, generator=generator) < chance
        return torch.where(wrong, truth.flip(1), truth)

    agreement, ceiling = lesson08.noise_ceiling.reference(flipped(0.2), flipped(0.2))
    assert abs(float(agreement) - 0.68) < 0.01 and abs(float(ceiling) - 0.8) < 0.01
    hard = torch.where(torch.arange(len(truth))[:, None] % 2 == 0, 0.4, 0.0)
    agreement, ceiling = lesson08.noise_ceiling.reference(flipped(hard), flipped(hard))
    assert float(ceiling) > 0.8 + 0.05, "with the same 20 % of mistakes, all on the hard half"


# 10 ----------------------------------------------------------------------------------------------------------------


def test_the_kl_is_what_the_hint_integrates():
    u = (torch.arange(400_000, dtype=F64) + 0.5) / 400_000
    counts = torch.tensor([2.0, 3.0, 16.0], dtype=F64)
    for n, kl in zip(counts, lesson10.best_of_n_kl.reference(counts), strict=True):
        density = n * u ** (n - 1)
        assert float(torch.xlogy(density, density).mean()) == pytest.approx(float(kl), abs=1e-5)
        assert float((density * u.log()).mean()) == pytest.approx(-1 / float(n), abs=1e-5), "hint 1"


def test_the_pool_is_as_right_as_the_first_n_and_much_less_noisy():
    """Over many pools: the same mean, and the spread that the lesson's task promises to take away."""
    proxy, values = normal(seeded(), 2, 4000, 32)
    values += proxy
    n = 4
    pooled = lesson10.best_of_n.reference(proxy, values, n)
    first = values.gather(1, proxy[:, :n].argmax(1, keepdim=True))[:, 0]
    error = float(first.std()) / len(first) ** 0.5
    assert abs(float(pooled.mean() - first.mean())) < 4 * error
    assert float(pooled.std()) < 0.5 * float(first.std())


def test_drawing_with_putting_back_is_worse_than_the_best_of_n():
    proxy = torch.arange(8, dtype=F64)[None]
    place = torch.arange(1, 9, dtype=F64)
    for n in range(2, 9):
        again = float((proxy * ((place / 8) ** n - ((place - 1) / 8) ** n)).sum())
        every = [max(chosen) for chosen in itertools.combinations(range(8), n)]
        assert again < float(lesson10.best_of_n.reference(proxy, proxy, n)) == pytest.approx(sum(every) / len(every))


def test_the_peak_is_the_highest_point_of_the_fitted_curve():
    kl = torch.linspace(0, 9, 10, dtype=F64)
    gain = torch.tensor([0, 0.9, 1.3, 1.2, 1.3, 1.1, 0.9, 0.7, 0.6, 0.1], dtype=F64)
    alpha, beta, peak = lesson10.curve_and_peak.reference(kl, gain)
    d = torch.linspace(0, 3, 100_001, dtype=F64)
    highest = d[(d * (alpha - beta * d)).argmax()]
    assert float(highest**2) == pytest.approx(float(peak), rel=1e-3)


def test_who_chooses_by_a_noisy_number_and_reports_it_reports_too_much():
    """Exercise 10.4's third mistake: no run is better than another, and the highest of 20 noisy scores looks so."""
    validation, gold = (normal(seeded(seed), 500, 20) for seed in (1, 2))
    kl = torch.arange(20, dtype=F64).expand(500, 20)
    told = lesson10.gold_where_stopped.reference(kl, validation, validation, kl, 100.0)
    held = lesson10.gold_where_stopped.reference(kl, validation, gold, kl, 100.0)
    assert float(told.mean()) > 1.5 and abs(float(held.mean())) < 0.2


@pytest.mark.parametrize("how", ["mean", "min"])
def test_the_ensemble_is_the_packages_on_one_scale(how):
    generator = seeded(4)
    known, scores = torch.randn(3, 40, generator=generator), torch.randn(3, 7, generator=generator)
    standard = (scores - known.mean(1, keepdim=True)) / known.std(1, keepdim=True)
    rewards = [lambda prompts, responses, row=row: row for row in standard]
    expected = EnsembleReward(rewards, how)(["?"] * 7, ["!"] * 7)
    got = lesson10.ensemble_reward.reference(scores.double(), known.double(), how)
    assert torch.allclose(got.float(), expected, atol=1e-6)


def test_a_ranking_of_k_answers_has_all_its_pairs():
    scores, same = torch.arange(7, dtype=F64), torch.zeros(7, dtype=torch.int64)
    assert int(lesson10.fresh_pairs.reference(same, same, scores).sum()) == 21


# 11 ----------------------------------------------------------------------------------------------------------------


def test_the_rate_is_the_packages_and_wilson_agrees_with_the_textbook_in_the_middle():
    scores, others = normal(seeded(), 2, 2000)
    rate, low, high = lesson11.win_rate_interval.reference(scores, others).tolist()
    package, (package_low, package_high) = win_rate(scores.tolist(), others.tolist())
    assert rate == package
    assert abs(low - package_low) < 1e-3 and abs(high - package_high) < 1e-3


@pytest.mark.parametrize("truth", [0.5, 0.9, 0.98])
def test_wilsons_interval_holds_the_truth_as_often_as_it_says(truth):
    won = (torch.rand(4000, 60, generator=seeded(1)) < truth).double()
    rows = [lesson11.win_rate_interval.reference(row, torch.full_like(row, 0.5)) for row in won]
    held = sum(bool(low <= truth <= high) for _, low, high in rows) / len(rows)
    assert 0.93 < held < 0.985


def test_the_seeds_interval_holds_the_truth_as_often_as_it_says_and_the_normal_one_does_not():
    rates = normal(seeded(2), 3, 20_000)
    for t, low, high in ((4.303, 0.94, 0.96), (1.96, 0.78, 0.84)):
        _, below, above = lesson11.seed_interval.reference(rates, t)
        assert low < float(((below <= 0) & (above >= 0)).double().mean()) < high
    inside = (rates.amin(0) <= 0) & (rates.amax(0) >= 0)
    assert abs(float(inside.double().mean()) - 0.75) < 0.01, "what the check says of the lowest and the highest run"


def test_the_paired_interval_is_narrower_than_the_unpaired_one():
    generator = seeded(3)
    easy = normal(generator, 400)
    first, second = (easy + 0.3 * normal(generator, 2, 400) > 0).double()
    rows = torch.randint(0, 400, (2000, 400), generator=generator)
    low, high = lesson11.paired_interval.reference(first, second, rows)
    unpaired = first[rows].mean(1) - second[rows.roll(1, 0)].mean(1)
    assert high - low < 0.8 * 4 * unpaired.std()


def test_examples_are_written_as_the_tokenizer_writes_them():
    tokenizer = tokenizer_from_file(WORLD / "tokenizer.json")
    pairs = [("where does a fox live ?", "a fox lives in the forest ."), ("i feel sad today", "do not cry !")]
    ask = "write a story about frogs"

    def ids(text):
        return torch.tensor(tokenizer.encode(text, add_special_tokens=False))

    newline, examples = tokenizer.convert_tokens_to_ids("\n"), [(ids(q), ids(a)) for q, a in pairs]
    got = lesson11.few_shot_prompt.reference(examples, ids(ask), newline, tokenizer.eos_token_id, 64)
    prompts = encode_prompts(tokenizer, [*(q for q, _ in pairs), ask])
    answers = encode_responses(tokenizer, [a for _, a in pairs])
    assert got.tolist() == [*prompts[0], *answers[0], *prompts[1], *answers[1], *prompts[2]]
