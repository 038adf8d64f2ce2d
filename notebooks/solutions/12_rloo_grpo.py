"""Solutions of lesson 12: each function stands for the stub of its name."""

import torch

from minirlhf.language.models import response_logprobs


def my_leave_one_out(rewards):
    k = rewards.shape[1]
    others = (rewards.sum(1, keepdim=True) - rewards) / (k - 1)
    return rewards - others


def my_rloo(policy, reference, batches, answers, reward, config):
    optimizer = torch.optim.Adam(policy.parameters(), lr=config.lr)
    means = []
    for prompts in batches:
        asked = [prompt for prompt in prompts for _ in range(config.group_size)]
        samples, texts = answers(policy, asked)
        scores = torch.tensor(reward(asked, texts))
        where = samples.tokens, samples.mask, samples.response_mask
        with torch.no_grad():
            ref_logprobs = response_logprobs(reference, *where)
        kl = (samples.logprobs - ref_logprobs).sum(1)

        rewards = (scores - config.beta * kl).view(-1, config.group_size)
        advantages = my_leave_one_out(rewards).flatten()
        loss = -(advantages * response_logprobs(policy, *where).sum(1)).mean()

        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        optimizer.step()
        means.append(scores.mean().item())
    return means


def my_group_relative(rewards):
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)


def my_grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, response_mask, beta):
    d = logprobs - ref_logprobs
    ratio = (logprobs - old_logprobs).exp()
    per_token = beta * (torch.expm1(-d) + d) - ratio * advantages[:, None]
    kept = torch.where(response_mask, per_token, 0.0)
    return (kept.sum(1) / response_mask.sum(1)).mean()
