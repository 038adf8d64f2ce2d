"""Solutions of lesson 11: each function stands for the stub of its name."""

import torch


def my_win_rate_interval(scores, others):
    z, n = 1.96, len(scores)
    p = ((scores > others) + (scores == others) / 2).to(scores.dtype).mean()
    shrink = 1 + z**2 / n
    centre = (p + z**2 / (2 * n)) / shrink
    half = z / shrink * (p * (1 - p) / n + z**2 / (4 * n**2)).sqrt()
    return torch.stack((p, centre - half, centre + half))


def my_few_shot_prompt(examples, prompt, newline, eos, limit):
    line, end = prompt.new_tensor([newline]), prompt.new_tensor([eos])
    ask = torch.cat((prompt, line))  # the prompt's own room comes first
    room, kept = limit - len(ask), []
    for question, answer in examples:
        block = torch.cat((question, line, answer, end))
        if len(block) > room:
            break
        kept.append(block)
        room -= len(block)
    return torch.cat((*kept, ask))


def my_paired_interval(first, second, rows):
    differences = (first - second)[rows].mean(1)  # the same prompts for both, so that their difficulty cancels
    return differences.quantile(torch.tensor([0.025, 0.975], dtype=first.dtype))


def my_seed_interval(rates, t):
    mean = rates.mean(0)
    half = t * rates.std(0) / len(rates) ** 0.5  # torch's std has S - 1 below
    return torch.stack((mean, mean - half, mean + half))


def my_tax_repaired(base, ppo, ppo_ptx):
    return 1 - (ppo_ptx - base).mean(0) / (ppo - base).mean(0)
