"""The bug museum, as learners would write it: every bug of lessons 01 to 05 is refused by a check, which names it.

Numbers are the museum's, as in tests/exact/test_bug_museum.py; "-" marks mistakes that are not in it. The code here is
independent of the suspects in minirlhf/checks, as a learner's is. Museum bugs 8, 15, 16, 18 to 20, 23 and 24 concern
language models, whose lessons are 06 to 09; 9, 14 and 17 are met here in small.
"""

from __future__ import annotations

import importlib
from typing import NamedTuple

import pytest
import torch

from minirlhf.kl import exact_kl


class Bug(NamedTuple):
    number: int | str
    check: str
    source: str
    named: str


BUGS = [
    # Lesson 00
    Bug(9, "lesson00.masked_mean", """
def f(x, mask):
    return (x.nan_to_num() * mask).sum() / x.numel()
""", "The sum is right, the count is not"),
    Bug(17, "lesson00.masked_mean", """
def f(x, mask):
    mask = torch.ones_like(mask)
    return x[mask].sum() / mask.sum()
""", "It averages over everything"),
    # Lesson 01
    Bug(10, "lesson01.discounted_returns", """
def f(rewards, ends, gamma):
    stored = torch.zeros_like(rewards)
    for t in range(1, rewards.shape[1]):
        stored[:, t - 1] = rewards[:, t]
    returns = stored.clone()
    for t in range(rewards.shape[1] - 2, -1, -1):
        returns[:, t] += gamma * (1 - ends[:, t].to(rewards.dtype)) * returns[:, t + 1]
    return returns
""", "The reward is counted a step early"),
    Bug(11, "lesson01.sample_actions", """
def f(logits):
    logprobs = torch.log_softmax(logits, dim=-1)
    best, actions = logprobs.max(dim=-1)
    return actions, best
""", "It takes the likeliest action (argmax) instead of drawing one"),
    Bug(21, "lesson01.discounted_returns", """
def f(rewards, ends, gamma):
    returns = rewards.clone()
    for t in range(rewards.shape[1] - 2, -1, -1):
        returns[:, t] += gamma * returns[:, t + 1]
    return returns
""", "The return crosses the end of the episode"),
    Bug("-", "lesson01.discounted_returns", """
def f(rewards, ends, gamma):
    rows = []
    for row in range(len(rewards)):
        out, g = [], 0.0
        for r, end in zip(reversed(rewards[row]), reversed(ends[row])):
            if end:
                g = 0.0
            out.append(gamma * g)
            g = r + gamma * g
        rows.append(torch.stack([torch.as_tensor(x, dtype=rewards.dtype) / gamma for x in reversed(out)]))
    return torch.stack(rows)
""", "Off by one: the sum starts at the next reward"),
    Bug("-", "lesson01.reinforce_loss", """
def f(logprobs, returns, gamma):
    steps = torch.arange(logprobs.shape[1])
    return torch.mean(logprobs * returns.detach() * (gamma ** steps).to(logprobs.dtype))
""", "The minus sign is missing"),
    Bug("-", "lesson01.reinforce_loss", """
def f(logprobs, returns, gamma):
    return -(logprobs * returns.detach()).sum() / logprobs.numel()
""", "gamma^t is missing"),
    # Lesson 02
    Bug(7, "lesson02.baseline_advantages", """
def f(rewards, values, ends, gamma):
    return (rewards - values).detach()
""", "This is r - V"),
    Bug("-", "lesson02.baseline_advantages", """
def f(rewards, values, ends, gamma):
    from minirlhf.returns import gae
    return gae(rewards, torch.zeros_like(rewards), ends, gamma=gamma, lam=1.0)[0] - values
""", "The gradient leaks into the baseline"),
    Bug("-", "lesson02.baseline_losses", """
def f(logprobs, values, returns):
    returns = returns.detach()
    advantages = returns - values
    return -torch.mean(advantages * logprobs), torch.mean((returns - values) ** 2) / 2
""", "leaks a gradient into the baseline"),
    Bug("-", "lesson02.baseline_losses", """
def f(logprobs, values, returns):
    returns = returns.detach()
    advantages = (returns - values).detach()
    scaled = (returns - returns.mean()) / (returns.std(correction=0) + 1e-8)
    return -torch.mean(advantages * logprobs), torch.mean((scaled - values) ** 2) / 2
""", "The baseline is trained on whitened returns"),
    Bug(1, "lesson02.baseline_losses", """
def f(logprobs, values, returns):
    raw = (returns - values).detach()
    white = (raw - raw.mean()) / (raw.var(correction=0) + 1e-8).sqrt()
    return -(raw * logprobs).mean(), 0.5 * (values - (white + values.detach())).square().mean()
""", "The baseline is trained on whitened advantages plus V"),
    Bug(6, "lesson02.baseline_losses", """
def f(logprobs, values, returns):
    return (logprobs * (returns - values).detach()).mean(), 0.5 * (values - returns.detach()).pow(2).mean()
""", "The minus sign of the policy's loss is missing"),
    # Lesson 03
    Bug(22, "lesson03.td_errors", """
def f(rewards, values, next_values, terminated, truncated, gamma):
    done = torch.logical_or(terminated, truncated).to(rewards.dtype)
    return rewards + gamma * (1 - done) * next_values - values
""", "Truncation is treated as termination"),
    Bug(22, "lesson03.td_errors", """
def f(rewards, values, next_values, terminated, truncated, gamma):
    return rewards + next_values * gamma - values
""", "v(terminal) must be 0"),
    Bug(12, "lesson03.td_errors", """
def f(rewards, values, next_values, terminated, truncated, gamma):
    alive = torch.ones_like(rewards)
    alive[:, 1:] = 1 - terminated[:, :-1].to(rewards.dtype)
    return rewards + gamma * alive * next_values - values
""", "done and next_done are swapped"),
    Bug("-", "lesson03.actor_critic_step", """
def f(theta, w, discount, s, a, r, s_next, terminated, alpha_theta, alpha_w, gamma):
    theta, w = theta.clone(), w.clone()
    delta = r + gamma * w[s_next] * (not terminated) - w[s]
    w[s] = w[s] + alpha_w * delta
    p = torch.softmax(theta[s], -1)
    grad = -p
    grad[a] = grad[a] + 1
    theta[s] = theta[s] + alpha_theta * delta * grad
    return theta, w, discount * gamma
""", "I is missing"),
    Bug("-", "lesson03.actor_critic_step", """
def f(theta, w, discount, s, a, r, s_next, terminated, alpha_theta, alpha_w, gamma):
    theta, w = theta.clone(), w.clone()
    delta = r + gamma * w[s_next] - w[s]
    w[s] = w[s] + alpha_w * delta
    grad = -torch.softmax(theta[s], -1)
    grad[a] = grad[a] + 1
    theta[s] = theta[s] + alpha_theta * discount * delta * grad
    return theta, w, discount * gamma
""", "v(terminal) must be 0"),
    # Lesson 04
    Bug(1, "lesson04.advantages_and_targets", """
def f(advantages, values):
    std, mean = torch.std_mean(advantages, correction=0)
    advantages = (advantages - mean) / (std + 1e-8)
    return advantages, advantages + values
""", "The value targets are made from whitened advantages"),
    Bug(12, "lesson04.gae", """
def f(rewards, values, ends, last_values, gamma, lam):
    done = ends.to(rewards.dtype)
    adv, last = torch.zeros_like(rewards), 0
    T = rewards.shape[1]
    for t in reversed(range(T)):
        if t == T - 1:
            alive, following = torch.ones_like(last_values), last_values
        else:
            alive, following = 1 - done[:, t + 1], values[:, t + 1]
        delta = rewards[:, t] + gamma * following * alive - values[:, t]
        last = delta + gamma * lam * alive * last
        adv[:, t] = last
    return adv
""", "done and next_done are swapped"),
    Bug(21, "lesson04.gae", """
def f(rewards, values, ends, last_values, gamma, lam):
    following = torch.cat([values[:, 1:], last_values.unsqueeze(1)], 1)
    delta = rewards + gamma * following * (1 - ends.to(rewards.dtype)) - values
    adv, last = torch.zeros_like(rewards), 0
    for t in reversed(range(rewards.shape[1])):
        last = adv[:, t] = delta[:, t] + gamma * lam * last
    return adv
""", "The sum crosses the end of the episode"),
    Bug(21, "lesson04.gae", """
def f(rewards, values, ends, last_values, gamma, lam):
    following = torch.cat([values[:, 1:], last_values.unsqueeze(1)], 1)
    delta = rewards + gamma * following - values
    adv, last = torch.zeros_like(rewards), 0
    for t in reversed(range(rewards.shape[1])):
        last = adv[:, t] = delta[:, t] + gamma * lam * last * (1 - ends[:, t].to(rewards.dtype))
    return adv
""", "The last step bootstraps from V after the episode ended: multiply by (1 - ends)."),
    Bug(21, "lesson04.gae", """
def f(rewards, values, ends, last_values, gamma, lam):
    following = torch.cat([values[:, 1:], last_values.unsqueeze(1)], 1)
    delta = rewards + gamma * following - values
    adv, last = torch.zeros_like(rewards), 0
    for t in reversed(range(rewards.shape[1])):
        last = adv[:, t] = delta[:, t] + gamma * lam * last
    return adv
""", "The ends are never used"),
    Bug("-", "lesson04.gae", """
def f(rewards, values, ends, last_values, gamma, lam):
    alive = 1 - ends.to(rewards.dtype)
    following = torch.cat([values[:, 1:], last_values.unsqueeze(1)], 1)
    gamma, lam = lam, gamma
    delta = rewards + gamma * following * alive - values
    adv, last = torch.zeros_like(rewards), 0
    for t in reversed(range(rewards.shape[1])):
        last = adv[:, t] = delta[:, t] + gamma * lam * last * alive[:, t]
    return adv
""", "lam and gamma are swapped"),
    Bug(21, "lesson04.n_step_advantages", """
def f(rewards, values, ends, last_values, gamma, n):
    T = rewards.shape[1]
    v = torch.cat([values, last_values.unsqueeze(1)], 1)
    adv = torch.zeros_like(rewards)
    for t in range(T):
        k = min(n, T - t)
        adv[:, t] = sum(gamma**i * rewards[:, t + i] for i in range(k)) + gamma**k * v[:, t + k] - v[:, t]
    return adv
""", "The sum crosses the end of the episode"),
    # Lesson 05
    Bug(2, "lesson05.approx_kl", """
def f(logprobs, old_logprobs):
    with torch.no_grad():
        log_ratio = logprobs - old_logprobs
        return torch.expm1(log_ratio) - log_ratio
""", "The KL is detached from the graph"),
    Bug(3, "lesson05.importance_ratio", """
def f(logprobs, old_logprobs):
    old_logprobs = logprobs.detach()
    return torch.exp(logprobs - old_logprobs)
""", "The ratio is always 1"),
    Bug(3, "lesson05.clipped_loss", """
def f(logprobs, old_logprobs, advantages, clip_range):
    advantages = advantages.detach()
    ratio = torch.exp(logprobs - logprobs.detach())
    clipped = torch.clamp(ratio, 1 - clip_range, 1 + clip_range)
    return -torch.min(ratio * advantages, clipped * advantages).mean()
""", "The ratio is always 1, so the clip never acts"),
    Bug(4, "lesson05.clipped_loss", """
def f(logprobs, old_logprobs, advantages, clip_range):
    advantages = advantages.detach()
    ratio = torch.exp(logprobs - old_logprobs.detach())
    clipped = torch.clamp(ratio, 1 - clip_range, 1 + clip_range)
    return -torch.max(ratio * advantages, clipped * advantages).mean()
""", "It takes the max where PPO takes the min"),
    Bug(4, "lesson05.clipped_loss", """
def f(logprobs, old_logprobs, advantages, clip_range):
    advantages = advantages.detach()
    ratio = torch.exp(logprobs - old_logprobs.detach())
    clipped = torch.clamp(ratio, 1 - clip_range, 1 + clip_range)
    return torch.min(-ratio * advantages, -clipped * advantages).mean()
""", "It takes the max where PPO takes the min"),
    Bug(5, "lesson05.clipped_loss", """
def f(logprobs, old_logprobs, advantages, clip_range):
    ratio = torch.exp(logprobs - old_logprobs.detach())
    clipped = torch.clamp(ratio, 1 - clip_range, 1 + clip_range)
    return -(torch.min(ratio, clipped) * advantages.detach()).mean()
""", "The min is taken before multiplying by A"),
    Bug(6, "lesson05.clipped_loss", """
def f(logprobs, old_logprobs, advantages, clip_range):
    advantages = advantages.detach()
    ratio = torch.exp(logprobs - old_logprobs.detach())
    clipped = torch.clamp(ratio, 1 - clip_range, 1 + clip_range)
    return torch.min(ratio * advantages, clipped * advantages).mean()
""", "The minus sign is missing"),
    Bug(13, "lesson05.approx_kl", """
def f(logprobs, old_logprobs):
    r = logprobs - old_logprobs.detach()
    return (torch.exp(r) - 1) - r
""", "The digits cancel"),
    Bug(14, "lesson05.approx_kl", """
def f(logprobs, old_logprobs, kind="k3"):
    r = logprobs - old_logprobs.detach()
    if kind == "k3":
        kl = torch.expm1(r) - r
    if kind == "k2":
        kl = r.square() / 2
    else:
        kl = -r
    return kl
""", "This is k1 = -rho"),
    Bug("-", "lesson05.approx_kl", """
def f(logprobs, old_logprobs):
    r = old_logprobs.detach() - logprobs
    return torch.expm1(r) - r
""", "It is reversed"),
    Bug("-", "lesson05.conjugate_gradient", """
def f(matvec, b, iterations):
    x, r = torch.zeros_like(b), b.clone()
    p = r.clone()
    for _ in range(iterations):
        Ap = matvec(p)
        alpha = r.dot(r) / p.dot(Ap)
        x = x + alpha * p
        new_r = r - alpha * Ap
        p = new_r + new_r.dot(new_r) / r.dot(r) * p
        r = new_r
    return x
""", "it divides 0 by 0: stop when r . r is tiny"),
    Bug("-", "lesson05.fisher_vector_product", """
def f(policy, theta, vector):
    theta = theta.clone().requires_grad_()
    kl = exact_kl(policy(theta), policy(theta)).mean()
    g, = torch.autograd.grad(kl, theta, create_graph=True)
    return torch.autograd.grad((g * vector).sum(), theta)[0]
""", "the policy that stays is not detached"),
    Bug("-", "lesson05.clipped_value_loss", """
def f(values, old_values, returns, clip_range):
    old, R = old_values.detach(), returns.detach()
    near = torch.max(torch.min(values, old + clip_range), old - clip_range)
    return 0.5 * torch.min((values - R) ** 2, (near - R) ** 2).mean()
""", "It takes the min: take the larger of the two errors"),
]  # fmt: skip

BELONGS_HERE = {1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 21, 22}


@pytest.mark.parametrize("bug", BUGS, ids=[f"{bug.number}-{bug.check}-{index}" for index, bug in enumerate(BUGS)])
def test_is_refused_and_named(bug):
    lesson, name = bug.check.split(".")
    check = getattr(importlib.import_module(f"minirlhf_course.checks.{lesson}"), name)
    space = {"torch": torch, "exact_kl": exact_kl}
    exec(bug.source, space)
    verdict = check.mark(space["f"])
    assert verdict.status == "failed"
    headline, _, case = verdict.message.partition("\n\n")
    assert bug.named in headline, verdict.message
    assert case.startswith("Smallest failing case: ")


def test_every_bug_of_these_lessons_is_here():
    assert {bug.number for bug in BUGS} >= BELONGS_HERE
