"""Wrong answers of lesson 11; test_museum.py says how to read them."""

import torch


def win_rate_interval(scores, others):
    z, n = 1.96, len(scores)
    p = (scores > others).double().mean() + (scores == others).double().mean() / 2
    centre, half = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    return torch.stack((p, (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)))


def textbook_interval(scores, others):
    outcomes = torch.where(scores > others, 1.0, torch.where(scores < others, 0.0, 0.5)).double()
    p = outcomes.mean()
    half = 1.96 * (p * (1 - p) / len(outcomes)) ** 0.5
    return torch.stack((p, p - half, p + half))


def few_shot_prompt(examples, prompt, newline, eos, limit):
    ids, ask = [], [*prompt.tolist(), newline]
    for question, answer in examples:
        block = [*question.tolist(), newline, *answer.tolist(), eos]
        if len(ids) + len(block) + len(ask) > limit:
            break
        ids += block
    return torch.tensor(ids + ask)


def paired_interval(first, second, rows):
    differences = first[rows].mean(1) - second[rows].mean(1)
    return differences.quantile(torch.tensor([0.025, 0.975]).double())


def low_minus_high(first, second, rows):
    low, high = torch.tensor([0.025, 0.975]).double()
    a, b = first[rows].mean(1), second[rows].mean(1)
    return torch.stack((a.quantile(low) - b.quantile(high), a.quantile(high) - b.quantile(low)))


def seed_interval(rates, t):
    mean, error = rates.mean(0), rates.std(0) / len(rates) ** 0.5
    return torch.stack((mean, mean - t * error, mean + t * error))


WRONG = {
    "win_rate_interval": [
        ("-", "Ties count as won", win_rate_interval,
         ("(scores > others).double().mean() + (scores == others).double().mean() / 2",
          "(scores >= others).double().mean()")),
        ("-", "Ties are dropped", win_rate_interval,
         ("len(scores)", "max(int((scores != others).sum()), 1)"),
         ("(scores > others).double().mean() + (scores == others).double().mean() / 2",
          "(scores > others).double().sum() / n")),
        ("-", "This is the textbook interval: ", textbook_interval),
    ],
    "few_shot_prompt": [
        ("-", "It cuts the whole to its last tokens", few_shot_prompt,
         ("        if len(ids) + len(block) + len(ask) > limit:\n            break\n", ""),
         ("torch.tensor(ids + ask)", "torch.tensor(ids + ask)[-limit:]")),
        ("-", "The newline after the prompt is missing", few_shot_prompt, ("ids + ask)", "ids + ask[:-1])")),
        ("-", "EOS between the examples is missing", few_shot_prompt, (", eos]", "]")),
    ],
    "paired_interval": [
        ("-", "Each model is measured on a resample of its own", paired_interval,
         ("second[rows]", "second[rows.roll(1, 0)]")),
        ("-", "Low of one minus high of the other", low_minus_high),
    ],
    "seed_interval": [
        ("-", "1.96 is for many seeds", seed_interval,
         ("mean - t *", "mean - 1.96 *"), ("mean + t *", "mean + 1.96 *")),
        ("-", "The standard deviation divides by S", seed_interval, ("std(0)", "std(0, correction=0)")),
        ("-", "These are the lowest and the highest run",
         lambda rates, t: torch.stack((rates.mean(0), rates.min(0).values, rates.max(0).values))),
        ("-", "It divides by the root of S - 1", seed_interval, ("/ len(rates) **", "/ (len(rates) - 1) **")),
    ],
    "tax_repaired": [
        ("-", "It is a mean of the seeds' ratios", lambda base, ppo, ppo_ptx: ((ppo - ppo_ptx) / (ppo - base)).mean(0)),
        ("-", "This is the share that is left",
         lambda base, ppo, ppo_ptx: (ppo_ptx.mean(0) - base.mean(0)) / (ppo.mean(0) - base.mean(0))),
        ("-", "This compares losses, not taxes: ",
         lambda base, ppo, ppo_ptx: (ppo.mean(0) - ppo_ptx.mean(0)) / ppo.mean(0)),
    ],
}  # fmt: skip
