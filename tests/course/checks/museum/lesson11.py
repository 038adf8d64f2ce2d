"""Wrong answers of lesson 11; test_museum.py says how to read them."""

import torch

from minirlhf.language import evaluation
from minirlhf.language.models import clone, scalar_model_from  # noqa: F401 (an edit below uses it)
from minirlhf.language.reward_model import RewardModelScorer, train_reward_model
from minirlhf.language.rlhf import train_rlhf
from minirlhf.language.sft import train_sft


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


def all_steps(base, tokenizer, folder, settings):
    sft = reference = train_sft(clone(base), tokenizer, folder.demonstrations, settings.sft)
    known = {"demonstrations": folder.demonstrations}
    judge = train_reward_model(sft, tokenizer, folder.comparisons, settings.reward_model, **known)
    reward = RewardModelScorer(judge, tokenizer)
    policy = clone(sft)
    value = clone(judge)
    asked, heldout = ([row.text for row in rows] for rows in (folder.prompts, folder.heldout_prompts))
    train_rlhf(policy, value, reference, reward, tokenizer, asked, settings.rlhf)
    scores = reward(heldout, evaluation.answer(policy, tokenizer, heldout, settings.evaluation).responses)
    return sft, judge, policy, scores.mean()


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
    "pipeline": [
        ("-", "The value network starts with a fresh head", all_steps,
         ("value = clone(judge)", "value = scalar_model_from(sft, seed=0)")),
        ("-", "The policy starts from the base model", all_steps, ("policy = clone(sft)", "policy = clone(base)")),
        ("-", "The SFT model is trained as the policy", all_steps,
         ("policy = clone(sft)", "policy, reference = sft, clone(sft)")),
        ("-", "The reward model is trained as the value network", all_steps,
         ("value = clone(judge)", "value = judge"), ("reward = RewardModelScorer(judge, tokenizer)",
                                                     "reward = RewardModelScorer(clone(judge), tokenizer)")),
    ],
}  # fmt: skip
