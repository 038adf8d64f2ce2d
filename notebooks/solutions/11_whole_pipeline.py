"""Solutions of lesson 11: each function stands for the stub of its name."""

import torch

from minirlhf.language.evaluation import answer
from minirlhf.language.models import clone
from minirlhf.language.reward_model import RewardModelScorer, train_reward_model
from minirlhf.language.rlhf import train_rlhf
from minirlhf.language.sft import train_sft


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
    for question, text in examples:
        block = torch.cat((question, line, text, end))
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


def my_pipeline(base, tokenizer, folder, settings):
    # Step 1. train_sft works in place, and base is the caller's.
    sft = train_sft(clone(base), tokenizer, folder.demonstrations, settings.sft)

    # Step 2, on top of the SFT model; train_reward_model works on a copy.
    reward_model = train_reward_model(
        sft, tokenizer, folder.comparisons, settings.reward_model, demonstrations=folder.demonstrations
    )
    reward = RewardModelScorer(reward_model, tokenizer)

    # Step 3. Policy and value network learn, so they are clones; reference and reward model stay as they are.
    policy, value_model = clone(sft), clone(reward_model)
    prompts = [row.text for row in folder.prompts]
    train_rlhf(policy, value_model, sft, reward, tokenizer, prompts, settings.rlhf)

    # What it is measured on, no training has seen.
    asked = [row.text for row in folder.heldout_prompts]
    said = answer(policy, tokenizer, asked, settings.evaluation)
    return sft, reward_model, policy, reward(asked, said.responses).mean()
