"""Right trainers for `actor_critic`, in the styles of other courses and libraries; no code of theirs is copied."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.distributions import Categorical


def cleanrl(envs, policy, values, *, total_steps, n, **args):
    """CleanRL's habits: storage allocated once, float flags, one loss and one optimizer of two groups."""
    optimizer = optim.Adam(
        [
            {"params": policy.parameters(), "lr": args["lr"]},
            {"params": values.parameters(), "lr": args["value_lr"]},
        ],
        eps=1e-5,
    )
    next_obs = envs.reset()
    obs = torch.zeros((n, *next_obs.shape))
    actions = torch.zeros((n, envs.num_envs), dtype=torch.long)
    rewards, terminations, truncations, after_values = (torch.zeros((n, envs.num_envs)) for _ in range(4))
    weight, weights = torch.ones(envs.num_envs), torch.zeros((n, envs.num_envs))
    rows = []
    while envs.steps < total_steps:
        for step in range(n):
            obs[step] = next_obs
            with torch.no_grad():
                actions[step] = Categorical(logits=policy(next_obs)).sample()
            next_obs, rewards[step], termination, truncation, final_obs = envs.step(actions[step])
            terminations[step], truncations[step] = termination.float(), truncation.float()
            weights[step] = weight
            with torch.no_grad():
                after_values[step] = values(final_obs)
            if args["weigh_by_gamma_t"]:
                dones = torch.logical_or(termination, truncation).float()
                weight = weight * args["gamma"] * (1.0 - dones) + dones
        returns = torch.zeros_like(rewards)
        for t in reversed(range(n)):
            if t == n - 1:
                bootstrap = after_values[t]
            else:
                bootstrap = truncations[t] * after_values[t] + (1.0 - truncations[t]) * returns[t + 1]
            returns[t] = rewards[t] + args["gamma"] * (1.0 - terminations[t]) * bootstrap
        newvalue = values(obs)
        advantages = returns - newvalue.detach()
        newlogprob = Categorical(logits=policy(obs)).log_prob(actions)
        pg_loss = (-weights * advantages * newlogprob).mean()
        v_loss = 0.5 * ((newvalue - returns) ** 2).mean()
        optimizer.zero_grad()
        (pg_loss + v_loss).backward()
        nn.utils.clip_grad_norm_(policy.parameters(), args["max_grad_norm"])
        nn.utils.clip_grad_norm_(values.parameters(), args["max_grad_norm"])
        optimizer.step()
        rows.append({"env_steps": envs.steps, "value_loss": v_loss.item()})
    return rows


def a3c(envs, policy, values, *, total_steps, n, gamma, lr, value_lr, max_grad_norm, weigh_by_gamma_t, generator):
    """A worker's habits: environment by environment, Python floats, losses added up step by step."""
    actor, critic = optim.Adam(policy.parameters(), lr, eps=1e-5), optim.Adam(values.parameters(), value_lr, eps=1e-5)
    state, clocks, log = envs.reset(), [0] * envs.num_envs, []
    while envs.steps < total_steps:
        memory = [[] for _ in range(envs.num_envs)]
        for _ in range(n):
            action = policy.sample(policy(state).detach(), generator)
            answer = envs.step(action)
            for i in range(envs.num_envs):
                over, cut = bool(answer.terminated[i]), bool(answer.truncated[i])
                memory[i].append(
                    (state[i], action[i], float(answer.rewards[i]), over, cut, answer.next_observations[i], clocks[i])
                )
                clocks[i] = 0 if over or cut else clocks[i] + 1
            state = answer.observations
        policy_loss, value_loss = 0.0, 0.0
        for path in memory:
            R = float(values(path[-1][5]).detach())
            for s, a, r, over, cut, after, t in reversed(path):
                if over:
                    R = 0.0
                elif cut:
                    R = float(values(after).detach())
                R = r + gamma * R
                v = values(s)
                scale = gamma**t if weigh_by_gamma_t else 1.0
                policy_loss = policy_loss - scale * (R - v.item()) * F.log_softmax(policy(s), -1)[a]
                value_loss = value_loss + 0.5 * (R - v).pow(2)
        count = n * envs.num_envs
        for loss, optimizer, network in ((policy_loss, actor, policy), (value_loss, critic, values)):
            optimizer.zero_grad(set_to_none=True)
            (loss / count).backward()
            nn.utils.clip_grad_norm_(network.parameters(), max_grad_norm)
            optimizer.step()
        log.append({"env_steps": envs.steps, "value_loss": value_loss.item() / count})
    return log


class Agent:
    """A textbook's habits: a class, one-step errors summed up to n-step ones, in rows of environments."""

    def __init__(self, envs, policy, values, **s):
        self.envs, self.policy, self.values, self.s = envs, policy, values, s
        self.pi_opt = optim.Adam(policy.parameters(), lr=s["lr"], eps=1e-5)
        self.v_opt = optim.Adam(values.parameters(), lr=s["value_lr"], eps=1e-5)
        self.obs, self.age = envs.reset(), np.zeros(envs.num_envs)

    def collect(self):
        rows = []
        for _ in range(self.s["n"]):
            with torch.inference_mode():
                actions = self.policy.sample(self.policy(self.obs), self.s["generator"])
            step = self.envs.step(actions.numpy())
            ended = (step.terminated | step.truncated).numpy()
            rows.append(
                (
                    self.obs,
                    actions.clone(),
                    step.rewards,
                    step.terminated,
                    step.truncated,
                    step.next_observations,
                    torch.as_tensor(self.age.copy()),
                )
            )
            self.age = np.where(ended, 0, self.age + 1)
            self.obs = step.observations
        return [torch.stack(x, 1) for x in zip(*rows, strict=True)]

    def train(self):
        gamma, log = self.s["gamma"], []
        while self.envs.steps < self.s["total_steps"]:
            obs, actions, rewards, terminated, truncated, after, age = self.collect()
            v = self.values(obs)
            with torch.no_grad():
                deltas = rewards + gamma * torch.where(terminated, 0.0, self.values(after)) - v
                sums, go_on = deltas.clone(), (~(terminated | truncated)).float()
                for t in range(self.s["n"] - 2, -1, -1):
                    sums[:, t] += gamma * go_on[:, t] * sums[:, t + 1]
                target = sums + v
            discount = gamma**age if self.s["weigh_by_gamma_t"] else 1.0
            actor_loss = -(self.policy.logprobs(self.policy(obs), actions) * sums * discount).mean()
            critic_loss = F.mse_loss(v, target) / 2
            for optimizer, loss, network in (
                (self.v_opt, critic_loss, self.values),
                (self.pi_opt, actor_loss, self.policy),
            ):
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), self.s["max_grad_norm"])
                optimizer.step()
            log.append({"env_steps": self.envs.steps, "value_loss": float(critic_loss)})
        return log


def textbook(envs, policy, values, **settings):
    return Agent(envs, policy, values, **settings).train()


FOREIGN = {"CleanRL": cleanrl, "A3C": a3c, "a textbook": textbook}
