"""Answers to lesson 11 in other hands; test_corpus.py says how to read them."""

import copy
import math
from statistics import NormalDist, fmean, mean, stdev

import torch

from minirlhf.language import evaluation
from minirlhf.language.reward_model import RewardModelScorer, train_reward_model
from minirlhf.language.rlhf import train_rlhf
from minirlhf.language.sft import train_sft
from minirlhf.training import Recorder

# 11.1 win_rate_interval ----------------------------------------------------------------------------------------------


def rate_of(scores, others):
    return ((scores > others).double() + 0.5 * (scores == others).double()).mean()


def wilson_of(p, n, z):
    denominator = 1 + z * z / n
    centre = p + z * z / (2 * n)
    half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return (centre - half) / denominator, (centre + half) / denominator


def wilson_unrounded(scores, others):  # statsmodels' proportion_confint(method="wilson")
    p, n = rate_of(scores, others), len(scores)
    return torch.stack((p, *wilson_of(p, n, NormalDist().inv_cdf(0.975))))


def wilson_of_numbers(scores, others):
    pairs = list(zip(scores.tolist(), others.tolist(), strict=True))
    p = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
    return torch.tensor([p, *wilson_of(p, len(pairs), 1.959964)])


def wilson_by_signs(scores, others):
    p = (1 + torch.sign(scores - others).mean()) / 2
    return torch.stack((p, *wilson_of(p, scores.numel(), 1.96)))


def wilson_by_roots(scores, others):  # the two p that the test just does not reject: (p - x)^2 = z^2 x (1 - x) / n
    p, n, z2 = rate_of(scores, others), len(scores), 1.96**2
    a, b, c = 1 + z2 / n, -(2 * p + z2 / n), p * p
    root = torch.sqrt((b * b - 4 * a * c).clamp(min=0))
    return torch.stack((p, (-b - root) / (2 * a), (-b + root) / (2 * a)))


def interval_with(change):
    """change(p, n) gives low and high."""

    def interval(scores, others):
        p = rate_of(scores, others)
        return torch.stack((p, *change(p, len(scores))))

    return interval


def agresti_coull(p, n, z=1.96):
    more = n + z * z
    shifted = (p * n + z * z / 2) / more
    half = z * (shifted * (1 - shifted) / more) ** 0.5
    return shifted - half, shifted + half


def plus_four(p, n):
    shifted = (p * n + 2) / (n + 4)
    half = 1.96 * (shifted * (1 - shifted) / (n + 4)) ** 0.5
    return shifted - half, shifted + half


def wilson_without_shrinking(p, n, z=1.96):
    centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return centre - half, centre + half


def wilson_without_second_term(p, n, z=1.96):
    centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n) ** 0.5
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def centre_for_rate(scores, others):
    low, high = wilson_of(rate_of(scores, others), len(scores), 1.96)
    return torch.stack(((low + high) / 2, low, high))


def students_interval(scores, others):
    outcomes = (scores > others).double() + 0.5 * (scores == others).double()
    p, error = outcomes.mean(), outcomes.std(correction=0) / len(outcomes) ** 0.5
    return torch.stack((p, p - 1.96 * error, p + 1.96 * error))  # fmt: skip


# 11.2 few_shot_prompt ------------------------------------------------------------------------------------------------


def few_shot_by_lengths(examples, prompt, newline, eos, limit):
    nl, end = torch.tensor([newline]), torch.tensor([eos])
    blocks = [torch.cat([q, nl, a, end]) for q, a in examples]
    used, kept = len(prompt) + 1, 0
    while kept < len(blocks) and used + len(blocks[kept]) <= limit:
        used += len(blocks[kept])
        kept += 1
    return torch.cat([*blocks[:kept], prompt, nl])


def few_shot_by_trying(examples, prompt, newline, eos, limit):
    best = None
    for count in range(len(examples) + 1):
        tokens = []
        for question, answer in examples[:count]:
            tokens.extend([*question.tolist(), newline, *answer.tolist(), eos])
        tokens.extend([*prompt.tolist(), newline])
        if count and len(tokens) > limit:
            break
        best = tokens
    return torch.tensor(best, dtype=torch.long)


def few_shot_with(block=None, ask=None, pick=None):
    def build(examples, prompt, newline, eos, limit):
        make = block or (lambda q, a: [*q, newline, *a, eos])
        blocks = [make(q.tolist(), a.tolist()) for q, a in examples]
        end = (ask or (lambda p: [*p, newline]))(prompt.tolist())
        return torch.tensor(pick(blocks, end, limit) + end, dtype=torch.long)

    return build


def in_order(blocks, end, limit):
    out = []
    for b in blocks:
        if len(out) + len(b) + len(end) > limit:
            break
        out = out + b
    return out


def last_ones(blocks, end, limit):
    out = []
    for b in reversed(blocks):
        if len(out) + len(b) + len(end) > limit:
            break
        out = b + out
    return out


def reversed_order(blocks, end, limit):
    out = []
    for b in blocks:
        if len(out) + len(b) + len(end) > limit:
            break
        out = b + out
    return out


def with_a_piece(blocks, end, limit):
    return all_of_them(blocks, end, limit)[: max(limit - len(end), 0)]


def all_of_them(blocks, end, limit):
    return [token for block in blocks for token in block]


def ends_twice(examples, prompt, newline, eos, limit):
    blocks = [[*q.tolist(), newline, *a.tolist(), newline, eos] for q, a in examples]
    end = [*prompt.tolist(), newline]
    return torch.tensor(in_order(blocks, end, limit) + end)


def asks_and_ends(examples, prompt, newline, eos, limit):
    blocks = [[*q.tolist(), newline, *a.tolist(), eos] for q, a in examples]
    end = [*prompt.tolist(), newline, eos]
    return torch.tensor(in_order(blocks, end, limit) + end)


# 11.3 paired_interval ------------------------------------------------------------------------------------------------


def paired_by_loop(first, second, rows):
    differences = []
    for drawn in rows:
        differences.append((first[drawn] - second[drawn]).mean())
    return torch.quantile(torch.stack(differences), torch.tensor([0.025, 0.975], dtype=first.dtype))


def paired_by_numpy(first, second, rows):
    d = (first - second).numpy()[rows.numpy()].mean(axis=1)
    import numpy

    return torch.from_numpy(numpy.percentile(d, [2.5, 97.5]))


def paired_by_sorting(first, second, rows):  # the quantile by hand: between its two neighbours
    d = (first[rows].mean(1) - second[rows].mean(1)).sort().values
    ends = []
    for q in (0.025, 0.975):
        at = q * (len(d) - 1)
        low = math.floor(at)
        high = min(low + 1, len(d) - 1)
        ends.append(d[low] + (at - low) * (d[high] - d[low]))
    return torch.stack(ends)


def paired_with(change):
    """change(differences of the resamples, the difference itself) gives low and high."""

    def interval(first, second, rows):
        d = (first - second)[rows].mean(1)
        return torch.stack(change(d, (first - second).mean()))

    return interval


def textbook_of_differences(first, second, rows):
    d = first - second
    error = d.std() / len(d) ** 0.5
    return torch.stack((d.mean() - 1.96 * error, d.mean() + 1.96 * error))


def bias_of_medians(first, second, rows):
    marks = torch.tensor([0.025, 0.975], dtype=first.dtype)
    return (first[rows].median(1).values - second[rows].median(1).values).quantile(marks)


# 11.4 seed_interval --------------------------------------------------------------------------------------------------


def seeds_by_columns(rates, t):
    columns = []
    for column in rates.T.tolist():
        half = t * stdev(column) / math.sqrt(len(column))
        columns.append([fmean(column), fmean(column) - half, fmean(column) + half])
    return torch.tensor(columns, dtype=rates.dtype).T


def seeds_by_sums(rates, t):
    S = rates.shape[0]
    mu = rates.sum(0) / S
    s = (((rates - mu) ** 2).sum(0) / (S - 1)) ** 0.5
    return torch.stack([mu, mu - t * s / S**0.5, mu + t * s / S**0.5])


def seeds_with(half, centre=lambda rates: rates.mean(0)):
    def interval(rates, t):
        m, h = centre(rates), half(rates, t)
        return torch.stack((m, m - h, m + h))

    return interval


def right_half(rates, t):
    return t * rates.std(0) / len(rates) ** 0.5


# 11.5 tax_repaired ---------------------------------------------------------------------------------------------------


def repaired_by_means(base, ppo, ppo_ptx):
    b, p, x = base.mean(0), ppo.mean(0), ppo_ptx.mean(0)
    return (p - x) / (p - b)


def repaired_by_columns(base, ppo, ppo_ptx):
    shares = []
    for b, p, x in zip(base.T.tolist(), ppo.T.tolist(), ppo_ptx.T.tolist(), strict=True):
        shares.append(1 - (mean(x) - mean(b)) / (mean(p) - mean(b)))
    return torch.tensor(shares)


# 11.6 pipeline -------------------------------------------------------------------------------------------------------


def in_four_copies(base, tokenizer, folder, settings):  # as trl's scripts have it: each model with a name of its own
    sft_model = copy.deepcopy(base)
    train_sft(sft_model, tokenizer, folder.demonstrations, settings.sft)
    reward_model = train_reward_model(
        copy.deepcopy(sft_model),
        tokenizer,
        folder.comparisons,
        settings.reward_model,
        demonstrations=folder.demonstrations,
    )
    policy, ref_policy = copy.deepcopy(sft_model), copy.deepcopy(sft_model)
    value_model = copy.deepcopy(reward_model)
    train_rlhf(
        policy,
        value_model,
        ref_policy,
        RewardModelScorer(reward_model, tokenizer),
        tokenizer,
        [p.text for p in folder.prompts],
        settings.rlhf,
        recorder=Recorder("ppo", progress=False),
    )
    prompts = [p.text for p in folder.heldout_prompts]
    scores = RewardModelScorer(reward_model, tokenizer)(
        prompts, evaluation.answer(policy, tokenizer, prompts, settings.evaluation).responses
    )
    return [sft_model, reward_model, policy, sum(scores.tolist()) / len(prompts)]


def judged_by_a_function(base, tokenizer, folder, settings):
    def texts(rows):
        return [row.text for row in rows]

    step_1 = train_sft(copy.deepcopy(base), tokenizer, folder.demonstrations, settings.sft)
    step_2 = train_reward_model(
        step_1, tokenizer, folder.comparisons, settings.reward_model, demonstrations=folder.demonstrations, seed=0
    )
    judge = RewardModelScorer(step_2, tokenizer)
    start = copy.deepcopy(step_1), copy.deepcopy(step_2), step_1
    step_3 = train_rlhf(
        *start, lambda x, y: judge(x, y).tolist(), tokenizer, texts(folder.prompts), settings.rlhf, seed=0
    )
    said = evaluation.answer(step_3, tokenizer, texts(folder.heldout_prompts), settings.evaluation)
    return step_1, step_2, step_3, judge(texts(folder.heldout_prompts), said.responses).mean().item()


RIGHT = {
    "win_rate_interval": {
        "statsmodels": wilson_unrounded,
        "numbers": wilson_of_numbers,
        "signs": wilson_by_signs,
        "roots": wilson_by_roots,
        "ndtri": interval_with(lambda p, n: wilson_of(p, n, float(torch.special.ndtri(torch.tensor(0.975))))),
    },
    "few_shot_prompt": {
        "lengths": few_shot_by_lengths,
        "trying": few_shot_by_trying,
        "int32": lambda *args: few_shot_by_lengths(*args).int(),
    },
    "paired_interval": {
        "loop": paired_by_loop,
        "numpy": paired_by_numpy,
        "sorting": paired_by_sorting,
        "one quantile at a time": lambda first, second, rows: torch.stack(
            [(first[rows].mean(1) - second[rows].mean(1)).quantile(q) for q in (0.025, 0.975)]
        ),
    },
    "seed_interval": {
        "statistics": seeds_by_columns,
        "sums": seeds_by_sums,
        "variance": lambda rates, t: torch.stack(
            [rates.mean(0) + side * t * (rates.var(0) / len(rates)).sqrt() for side in (0, -1, 1)]
        ),
    },
    "tax_repaired": {
        "means": repaired_by_means,
        "columns": repaired_by_columns,
        "sums": lambda base, ppo, ppo_ptx: (ppo - ppo_ptx).sum(0) / (ppo - base).sum(0),
    },
    "pipeline": {
        "trl": in_four_copies,
        "a function as the judge": judged_by_a_function,
    },
}

WRONG = {
    "win_rate_interval": [
        ("This is Agresti and Coull's interval", interval_with(agresti_coull)),
        ("This is Agresti and Coull's interval", interval_with(plus_four)),
        ("z is 1.645", interval_with(lambda p, n: wilson_of(p, n, 1.645))),
        ("The division by 1 + z^2 / n is missing", interval_with(wilson_without_shrinking)),
        ("z^2 / (4 n^2) is missing", interval_with(wilson_without_second_term)),
        ("The first number is the interval's centre", centre_for_rate),
        ("The order is rate, low, high", lambda scores, others: wilson_unrounded(scores, others)[[1, 0, 2]]),
        ("This is mean ± 1.96 standard errors of the outcomes", students_interval),
        ("These are per cent", lambda scores, others: 100 * wilson_unrounded(scores, others)),
        ("z is 2", interval_with(lambda p, n: wilson_of(p, n, 2.0))),
        ("It has z where z^2 is meant", interval_with(lambda p, n: (
            (p + 0.98 / n - 1.96 * (p * (1 - p) / n + 0.49 / n**2) ** 0.5) / (1 + 1.96 / n),
            (p + 0.98 / n + 1.96 * (p * (1 - p) / n + 0.49 / n**2) ** 0.5) / (1 + 1.96 / n)))),
        ("Under the root it has z^2 / (4 n)", interval_with(lambda p, n: (
            (p + 1.9208 / n - 1.96 * (p * (1 - p) / n + 0.9604 / n) ** 0.5) / (1 + 3.8416 / n),
            (p + 1.9208 / n + 1.96 * (p * (1 - p) / n + 0.9604 / n) ** 0.5) / (1 + 3.8416 / n)))),
        ("Each end is moved outwards by 1 / (2n)", interval_with(lambda p, n: (
            (wilson_of(p, n, 1.96)[0] - 0.5 / n).clamp(min=0), (wilson_of(p, n, 1.96)[1] + 0.5 / n).clamp(max=1)))),
        ("These are the distances from the rate", interval_with(lambda p, n: (
            p - wilson_of(p, n, 1.96)[0], wilson_of(p, n, 1.96)[1] - p))),
        ("It returns 3 results", lambda scores, others: tuple(wilson_by_signs(scores, others))),
        (None, interval_with(lambda p, n: wilson_of(p, 2 * n, 1.96))),
    ],
    "few_shot_prompt": [
        ("It keeps the last examples", few_shot_with(pick=last_ones)),
        ("The examples stand in reverse order", few_shot_with(pick=reversed_order)),
        ("The last example is cut", few_shot_with(pick=with_a_piece)),
        ("A newline stands before EOS", ends_twice),
        ("EOS stands behind the prompt", asks_and_ends),
        ("There are no examples in it", lambda examples, prompt, newline, eos, limit: torch.tensor(
            [*prompt.tolist(), newline])),
        ("It does not look at the limit", few_shot_with(pick=all_of_them)),
        ("The result has the shape", lambda examples, prompt, newline, eos, limit: torch.tensor(
            [eos, *prompt.tolist(), newline])),
    ],
    "paired_interval": [
        ("This is the basic bootstrap", paired_with(
            lambda d, seen: (2 * seen - d.quantile(0.975), 2 * seen - d.quantile(0.025)))),
        ("It takes the next lower resample", paired_with(
            lambda d, seen: (d.quantile(0.025, interpolation="lower"), d.quantile(0.975, interpolation="lower")))),
        ("It takes the nearest resample, or the one in place int(q * R)", paired_with(
            lambda d, seen: (d.sort().values[int(0.025 * len(d))], d.sort().values[int(0.975 * len(d))]))),
        ("It is moved", paired_with(
            lambda d, seen: (d.quantile(0.025) - d.mean() + seen, d.quantile(0.975) - d.mean() + seen))),
        ("The high end comes first", paired_with(lambda d, seen: (d.quantile(0.975), d.quantile(0.025)))),
        ("These are differences of medians", bias_of_medians),
        ("This is mean ± 1.96 standard deviations", paired_with(
            lambda d, seen: (seen - 1.96 * d.std(), seen + 1.96 * d.std()))),
        ("This is mean ± 1.96 standard deviations", paired_with(
            lambda d, seen: (d.mean() - 1.96 * d.std(), d.mean() + 1.96 * d.std()))),
        ("These are the 5 % and 95 % quantiles", paired_with(
            lambda d, seen: (d.quantile(0.05), d.quantile(0.95)))),
        ("It is the wrong way round", lambda first, second, rows: paired_by_loop(second, first, rows)),
        ("This is the textbook interval of the mean difference", textbook_of_differences),
        ("This is mean ± one standard deviation", paired_with(
            lambda d, seen: (d.mean() - d.std(), d.mean() + d.std()))),
        ("The mean runs over the resamples", lambda first, second, rows: (
            (first - second)[rows].mean(0).quantile(torch.tensor([0.025, 0.975], dtype=first.dtype)))),
        ("These are sums", lambda first, second, rows: len(first) * paired_by_loop(first, second, rows)),
        ("This is the first model alone", lambda first, second, rows: paired_by_loop(first, 0 * second, rows)),
        ("These are absolute differences", lambda first, second, rows: (
            paired_by_loop((first - second).abs(), 0 * second, rows))),
        (None, paired_with(lambda d, seen: (d.quantile(0.05), d.quantile(0.975)))),
    ],
    "seed_interval": [
        ("The order is mean, low, high", lambda rates, t: seeds_by_sums(rates, t)[[0, 2, 1]]),
        ("This is the median", seeds_with(right_half, lambda rates: rates.median(0).values)),
        ("It is twice too wide", seeds_with(lambda rates, t: 2 * right_half(rates, t))),
        ("This is the mean absolute deviation", seeds_with(
            lambda rates, t: t * (rates - rates.mean(0)).abs().mean(0) / len(rates) ** 0.5)),
        ("The result has the shape", lambda rates, t: torch.stack(
            (rates.mean(1), rates.amin(1), rates.amax(1)))),
        ("The result has the shape", lambda rates, t: seeds_by_sums(rates, t).T),
        ("1.96 is for many seeds", seeds_with(lambda rates, t: 1.96 * right_half(rates, 1.0))),
        ("It returns", lambda rates, t: tuple(seeds_by_sums(rates, t))),
        ("This is the variance by S", seeds_with(lambda rates, t: t * rates.var(0) / len(rates))),
        ("These are half-widths", lambda rates, t: torch.stack(
            (rates.mean(0), right_half(rates, t), right_half(rates, t)))),
        ("The ends are cut to [0, 1]", lambda rates, t: torch.cat(
            (rates.mean(0)[None], seeds_by_sums(rates, t)[1:].clamp(0, 1)))),
        (None, seeds_with(lambda rates, t: rates.std(0) / t)),
    ],
    "tax_repaired": [
        ("It is a median of the seeds' ratios", lambda base, ppo, ppo_ptx: (
            ((ppo - ppo_ptx) / (ppo - base)).median(0).values)),
        ("These are per cent", lambda base, ppo, ppo_ptx: 100 * repaired_by_means(base, ppo, ppo_ptx)),
        ("The sign is flipped", lambda base, ppo, ppo_ptx: -repaired_by_means(base, ppo, ppo_ptx)),
        ("This is the absolute value", lambda base, ppo, ppo_ptx: repaired_by_means(base, ppo, ppo_ptx).abs()),
        ("This is PPO-ptx's tax alone", lambda base, ppo, ppo_ptx: (ppo_ptx - base).mean(0)),
        ("The result has the shape", lambda base, ppo, ppo_ptx: (ppo - ppo_ptx).mean() / (ppo - base).mean()),
        ("The result has the shape", lambda base, ppo, ppo_ptx: (ppo - ppo_ptx) / (ppo - base)),
        ("This is the share that is left", lambda base, ppo, ppo_ptx: repaired_by_means(ppo, base, ppo_ptx)),
        ("It is cut at 0", lambda base, ppo, ppo_ptx: repaired_by_means(base, ppo, ppo_ptx).relu()),
        ("This compares losses, not taxes", lambda base, ppo, ppo_ptx: 1 - ppo_ptx.sum(0) / ppo.sum(0)),
        (None, lambda base, ppo, ppo_ptx: (ppo - ppo_ptx)[0] / (ppo - base)[0]),
        (None, lambda base, ppo, ppo_ptx: (ppo - ppo_ptx).mean(0) / (ppo_ptx - base).mean(0)),
    ],
    "pipeline": [
        ("It raises UserError: the policy and the reference share", in_four_copies,
         ("policy, ref_policy = copy.deepcopy(sft_model), copy.deepcopy(sft_model)",
          "policy = ref_policy = copy.deepcopy(sft_model)")),
        ("It raises UserError: the value model and the reward model share", in_four_copies,
         ("value_model = copy.deepcopy(reward_model)", "value_model = reward_model")),
        ("The reference is the base model", judged_by_a_function,
         ("copy.deepcopy(step_2), step_1", "copy.deepcopy(step_2), base")),
        ("The base model itself is trained", judged_by_a_function,
         ("train_sft(copy.deepcopy(base)", "train_sft(base")),
        ("PPO trains on the held-out prompts:", in_four_copies,
         ("for p in folder.prompts", "for p in folder.heldout_prompts")),
        ("The reward model's scores are not centred", in_four_copies,
         ("        demonstrations=folder.demonstrations,\n", "")),
        ("It does not return four things", judged_by_a_function, ("return step_1, step_2, step_3,", "return step_3,")),
        ("All results are right, but in the wrong order", judged_by_a_function,
         ("return step_1, step_2,", "return step_2, step_1,")),
        (None, judged_by_a_function, ("settings.rlhf, seed=0", "settings.rlhf, seed=1")),
    ],
}  # fmt: skip
