"""Right trainers for `reinforce`, in the styles of other courses and libraries; no code of theirs is copied."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn, optim
from torch.distributions import Categorical


class Buffer:
    """Spinning Up's habit: numpy, one environment's path after the other, `finish_path` with the value that follows."""

    def __init__(self, gamma):
        self.gamma = gamma
        self.obs, self.act, self.ret, self.time, self.plain = [], [], [], [], []

    def store_path(self, obs, act, rew, last_val):
        ret = np.zeros(len(rew), dtype=np.float64)
        running = last_val
        for i in range(len(rew) - 1, -1, -1):
            running = rew[i] + self.gamma * running
            ret[i] = running
        self.obs += obs
        self.act += act
        self.ret += list(ret)
        self.time += list(range(len(rew)))
        self.plain.append(sum(rew))


def spinning_up(
    envs,
    policy,
    values,
    *,
    total_steps,
    gamma,
    lr,
    value_lr,
    value_updates,
    max_grad_norm,
    weigh_by_gamma_t,
    generator,
):
    pi_optimizer = optim.Adam(policy.parameters(), lr=lr, eps=1e-5)
    vf_optimizer = optim.Adam(values.parameters(), lr=value_lr, eps=1e-5) if values is not None else None
    epochs = []
    while envs.steps < total_steps:
        buf = Buffer(gamma)
        paths = [([], [], []) for _ in range(envs.num_envs)]
        done = [False] * envs.num_envs
        o = envs.reset()
        while not all(done):
            with torch.no_grad():
                a = Categorical(logits=policy(o)).sample()
            answer = envs.step(a.numpy())
            for i in range(envs.num_envs):
                if done[i]:
                    continue
                obs, act, rew = paths[i]
                obs.append(o[i].numpy())
                act.append(int(a[i]))
                rew.append(float(answer.rewards[i]))
                if answer.terminated[i] or answer.truncated[i]:
                    done[i] = True
                    last_val = 0.0
                    if answer.truncated[i] and values is not None:
                        with torch.no_grad():
                            last_val = values(answer.next_observations[i]).item()
                    buf.store_path(obs, act, rew, last_val)
            o = answer.observations
        obs = torch.as_tensor(np.array(buf.obs), dtype=torch.float32)
        act = torch.as_tensor(np.array(buf.act))
        ret = torch.as_tensor(np.array(buf.ret), dtype=torch.float32)
        adv = ret - values(obs).detach() if values is not None else ret
        if weigh_by_gamma_t:
            adv = adv * torch.as_tensor(gamma ** np.array(buf.time), dtype=torch.float32)
        pi_optimizer.zero_grad()
        loss_pi = -(Categorical(logits=policy(obs)).log_prob(act) * adv).sum() / len(buf.plain)
        loss_pi.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
        pi_optimizer.step()
        if values is not None:
            for _ in range(value_updates):
                vf_optimizer.zero_grad()
                loss_v = ((values(obs) - ret) ** 2).mean() / 2
                loss_v.backward()
                nn.utils.clip_grad_norm_(values.parameters(), max_grad_norm)
                vf_optimizer.step()
        epochs.append({"env_steps": envs.steps, "episode_return": np.mean(buf.plain)})
    return epochs


def cleanrl(envs, policy, values, *, total_steps, gamma, lr, value_lr, value_updates, max_grad_norm, **args):
    """CleanRL's habits: flat code, float masks, `args`, buffers filled in place; gamma^t carried along as a product."""
    optimizer = optim.Adam(policy.parameters(), lr=lr, eps=1e-5)
    v_optimizer = optim.Adam(values.parameters(), lr=value_lr, eps=1e-5) if values is not None else None
    rows = []
    while envs.steps < total_steps:
        b_obs, b_actions, b_rewards, b_alive, b_boot, b_discount = [], [], [], [], [], []
        alive, discount = torch.ones(envs.num_envs), torch.ones(envs.num_envs)
        obs = envs.reset()
        while alive.sum() > 0:
            with torch.no_grad():
                action = policy.sample(policy(obs), args["generator"])
            next_obs, reward, termination, truncation, final_obs = envs.step(action)
            b_obs.append(obs)
            b_actions.append(action)
            b_rewards.append(reward * alive)
            b_alive.append(alive)
            b_discount.append(discount)
            boot = torch.zeros(envs.num_envs)
            if values is not None:
                with torch.no_grad():
                    boot = values(final_obs) * truncation.float()
            b_boot.append(boot * alive)
            alive = alive * (1.0 - torch.logical_or(termination, truncation).float())
            discount = discount * gamma if args["weigh_by_gamma_t"] else discount
            obs = next_obs
        obs, actions = torch.stack(b_obs), torch.stack(b_actions)
        rewards, masks, boots = torch.stack(b_rewards), torch.stack(b_alive), torch.stack(b_boot)
        returns = torch.zeros_like(rewards)
        nextreturn = torch.zeros(envs.num_envs)
        for t in reversed(range(rewards.shape[0])):
            # After the end rewards are zero, so nothing has to be cut.
            nextreturn = rewards[t] + gamma * boots[t] + gamma * nextreturn
            returns[t] = nextreturn
        advantages = returns
        if values is not None:
            with torch.no_grad():
                advantages = returns - values(obs)
        pg_loss = -Categorical(logits=policy(obs)).log_prob(actions) * advantages * torch.stack(b_discount)
        optimizer.zero_grad()
        (pg_loss * masks).sum().div(envs.num_envs).backward()
        nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
        optimizer.step()
        for _ in range(value_updates if values is not None else 0):
            v_loss = 0.5 * (((values(obs) - returns) ** 2) * masks).sum() / masks.sum()
            v_optimizer.zero_grad()
            v_loss.backward()
            nn.utils.clip_grad_norm_(values.parameters(), max_grad_norm)
            v_optimizer.step()
        rows.append({"env_steps": envs.steps, "episode_return": rewards.sum(0).mean().item()})
    return rows


class Memory:
    def __init__(self):
        self.steps = []

    def stacked(self):
        return [torch.stack(column, dim=1) for column in zip(*self.steps, strict=True)]


class Arena:
    """ARENA's habits: an agent class with small methods, rows of environments, an indicator of time."""

    def __init__(self, envs, policy, values, **args):
        self.envs, self.policy, self.values, self.args = envs, policy, values, args
        self.optimizer = optim.Adam(policy.parameters(), lr=args["lr"], eps=1e-5)
        if values is not None:
            self.critic_optimizer = optim.Adam(values.parameters(), lr=args["value_lr"], eps=1e-5)

    def rollout(self):
        memory, over = Memory(), torch.zeros(self.envs.num_envs, dtype=torch.bool)
        obs = self.envs.reset()
        with torch.inference_mode():
            while not over.all():
                actions = Categorical(logits=self.policy(obs)).sample()
                step = self.envs.step(actions)
                tail = torch.zeros(self.envs.num_envs)
                if self.values is not None:
                    tail[step.truncated] = self.values(step.next_observations[step.truncated])
                memory.steps.append((obs, actions, step.rewards, ~over, tail))
                over = over | step.terminated | step.truncated
                obs = step.observations
        return [x.clone() for x in memory.stacked()]

    def returns(self, rewards, counted, tail):
        length = rewards.shape[1]
        powers = self.args["gamma"] ** (torch.arange(length)[None, :] - torch.arange(length)[:, None]).clamp(min=0)
        ahead = torch.triu(torch.ones(length, length)) * powers  # [t, k]: gamma^(k - t) for k >= t
        paid = torch.where(counted, rewards + self.args["gamma"] * tail, torch.zeros(()))
        return torch.einsum("tk,nk->nt", ahead, paid)

    def train(self):
        log = []
        while self.envs.steps < self.args["total_steps"]:
            obs, actions, rewards, counted, tail = self.rollout()
            returns = self.returns(rewards, counted, tail)
            weights = returns
            if self.values is not None:
                weights = returns - self.values(obs).detach()
            if self.args["weigh_by_gamma_t"]:
                weights = weights * self.args["gamma"] ** torch.arange(rewards.shape[1])
            objective = (Categorical(logits=self.policy(obs)).log_prob(actions) * weights)[counted].sum()
            self.policy.zero_grad()
            (-objective / len(rewards)).backward()
            nn.utils.clip_grad_norm_(self.policy.parameters(), self.args["max_grad_norm"])
            self.optimizer.step()
            if self.values is not None:
                for _ in range(self.args["value_updates"]):
                    self.values.zero_grad()
                    nn.functional.mse_loss(self.values(obs)[counted], returns[counted]).mul(0.5).backward()
                    nn.utils.clip_grad_norm_(self.values.parameters(), self.args["max_grad_norm"])
                    self.critic_optimizer.step()
            row = {"env_steps": self.envs.steps, "episode_return": (rewards * counted).sum(1).mean().item()}
            log.append(row)
        return log


def arena(envs, policy, values, **args):
    return Arena(envs, policy, values, **args).train()


def without_clipping(envs, policy, values, **settings):
    """A right trainer that does not clip its gradients: no bug, though not what the specification asks."""
    return spinning_up(envs, policy, values, **{**settings, "max_grad_norm": float("inf")})


FOREIGN = {"Spinning Up": spinning_up, "CleanRL": cleanrl, "ARENA": arena, "no clipping": without_clipping}
