"""Wrong answers of lesson 04; test_museum.py says how to read them."""

import torch


def advantages_and_targets(advantages, values):
    std, mean = torch.std_mean(advantages, correction=0)
    return (advantages - mean) / (std + 1e-8), advantages + values


def gae(rewards, values, ends, last_values, gamma, lam):
    alive = 1 - ends.to(rewards.dtype)
    following = torch.cat([values[:, 1:], last_values.unsqueeze(1)], 1)
    delta = rewards + gamma * following * alive - values
    adv, last = torch.zeros_like(rewards), 0
    for t in reversed(range(rewards.shape[1])):
        last = adv[:, t] = delta[:, t] + gamma * lam * last * alive[:, t]
    return adv


def gae_with_truncation(rewards, values, terminated, truncated, final_values, last_values, gamma, lam):
    over = terminated | truncated
    after = torch.cat([values[:, 1:], last_values.unsqueeze(1)], 1).where(~over, final_values * truncated)
    delta = rewards + gamma * after - values
    adv, last = torch.zeros_like(rewards), 0
    for t in reversed(range(rewards.shape[1])):
        last = adv[:, t] = delta[:, t] + gamma * lam * last * ~over[:, t]
    return adv


def gae_with_next_done(rewards, values, ends, last_values, gamma, lam):
    done = ends.to(rewards.dtype)
    adv, last = torch.zeros_like(rewards), 0
    T = rewards.shape[1]
    for t in reversed(range(T)):
        if t == T - 1:
            alive, following = torch.ones_like(last_values), last_values
        else:
            alive, following = 1 - done[:, t + 1], values[:, t + 1]
        delta = rewards[:, t] + gamma * following * alive - values[:, t]
        last = adv[:, t] = delta + gamma * lam * alive * last
    return adv


def n_steps_across_ends(rewards, values, ends, last_values, gamma, n):
    T = rewards.shape[1]
    v = torch.cat([values, last_values.unsqueeze(1)], 1)
    adv = torch.zeros_like(rewards)
    for t in range(T):
        k = min(n, T - t)
        adv[:, t] = sum(gamma**i * rewards[:, t + i] for i in range(k)) + gamma**k * v[:, t + k] - v[:, t]
    return adv


WRONG = {
    "advantages_and_targets": [
        (1, "The value targets are made from whitened advantages", advantages_and_targets,
         ("    return (advantages - mean) / (std + 1e-8), ",
          "    advantages = (advantages - mean) / (std + 1e-8)\n    return advantages, ")),
    ],
    "gae": [
        (12, "done and next_done are swapped", gae_with_next_done),
        (21, "The sum crosses the end of the episode", gae, (" * alive[:, t]", "")),
        (21, "The last step bootstraps from V after the episode ended: multiply by (1 - ends).", gae,
         ("following * alive", "following")),
        (21, "The ends are never used", gae, ("following * alive", "following"), (" * alive[:, t]", "")),
        ("-", "lam and gamma are swapped", gae, ("last_values, gamma, lam)", "last_values, lam, gamma)")),
    ],
    "gae_with_truncation": [
        (21, "The chain is not cut: delta is right, but advantages flow back over ends of both kinds.",
         gae_with_truncation, (" * ~over[:, t]", "")),
        (22, "A termination is treated as a truncation", gae_with_truncation,
         ("final_values * truncated", "final_values")),
        ("-", "A truncation is treated as a termination", gae_with_truncation,
         ("final_values * truncated", "torch.zeros_like(values)")),
    ],
    "n_step_advantages": [(21, "The sum crosses the end of the episode", n_steps_across_ends)],
}  # fmt: skip
