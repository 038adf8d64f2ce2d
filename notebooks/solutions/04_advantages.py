"""Solutions of lesson 04: each function stands for the stub of its name."""

import torch


def my_advantages_from_q(q_values, probabilities):
    return q_values - (probabilities * q_values).sum(-1, keepdim=True)


def my_n_step_advantages(rewards, values, ends, last_values, gamma, n):
    advantages = torch.zeros_like(rewards)
    rows, columns = rewards.shape
    for row in range(rows):
        for t in range(columns):
            total = -values[row, t]
            for k in range(n):
                total = total + gamma**k * rewards[row, t + k]
                if ends[row, t + k]:
                    break  # nothing comes after, neither rewards nor a value
                if k == n - 1 or t + k == columns - 1:
                    value = last_values[row] if t + k == columns - 1 else values[row, t + k + 1]
                    total = total + gamma ** (k + 1) * value
                    break
            advantages[row, t] = total
    return advantages


def my_gae(rewards, values, ends, last_values, gamma, lam):
    next_values = torch.cat((values[:, 1:], last_values[:, None]), dim=1)
    deltas = rewards + gamma * next_values * ~ends - values  # the first cut: V(terminal) = 0
    advantages = torch.zeros_like(rewards)
    carry = torch.zeros_like(last_values)
    for t in reversed(range(rewards.shape[1])):
        carry = deltas[:, t] + gamma * lam * torch.where(ends[:, t], 0, carry)  # the second: no sum across the end
        advantages[:, t] = carry
    return advantages


def my_gae_with_truncation(rewards, values, terminated, truncated, final_values, last_values, gamma, lam):
    shifted = torch.cat((values[:, 1:], last_values[:, None]), dim=1)
    next_values = torch.where(truncated, final_values, torch.where(terminated, 0, shifted))  # two kinds of end
    deltas = rewards + gamma * next_values - values
    advantages = torch.zeros_like(rewards)
    carry = torch.zeros_like(last_values)
    for t in reversed(range(rewards.shape[1])):
        ended = terminated[:, t] | truncated[:, t]  # for the chain they are the same
        carry = deltas[:, t] + gamma * lam * torch.where(ended, 0, carry)
        advantages[:, t] = carry
    return advantages


def my_advantages_and_targets(advantages, values):
    targets = advantages + values  # from the raw advantages: the critic's targets are returns, in their own units
    whitened = (advantages - advantages.mean()) / (advantages.var(correction=0) + 1e-8).sqrt()
    return whitened, targets


def my_reverse_scan(x, decays):
    x, d = x.clone(), decays.clone()
    reach = 1
    while reach < x.shape[1]:
        x = torch.cat((x[:, :-reach] + d[:, :-reach] * x[:, reach:], x[:, -reach:]), dim=1)
        d = torch.cat((d[:, :-reach] * d[:, reach:], d[:, -reach:]), dim=1)
        reach *= 2
    return x
