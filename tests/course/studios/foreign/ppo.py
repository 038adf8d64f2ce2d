"""Right trainers for `ppo`, in the styles of other courses and libraries; no code of theirs is copied."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn, optim
from torch.distributions import Categorical


def cleanrl(envs, policy, values, *, total_steps, rollout_steps, minibatch_size, **args):
    """CleanRL's habits: storage [T, N] allocated once, numpy's shuffle, unbiased std, flags as floats."""

    def parameters():
        seen = set()
        for p in (*policy.parameters(), *values.parameters()):
            if id(p) not in seen:
                seen.add(id(p))
                yield p

    optimizer = optim.Adam(parameters(), lr=args["lr"], eps=1e-5)
    next_obs = envs.reset()
    obs = torch.zeros((rollout_steps, *next_obs.shape))
    actions = torch.zeros((rollout_steps, envs.num_envs), dtype=torch.long)
    logprobs, rewards, terminations, dones, vals, finals = (
        torch.zeros((rollout_steps, envs.num_envs)) for _ in range(6)
    )
    batch_size, rows = rollout_steps * envs.num_envs, []
    while envs.steps < total_steps:
        for step in range(rollout_steps):
            obs[step] = next_obs
            with torch.no_grad():
                probs = Categorical(logits=policy(next_obs))
                action = probs.sample()
                vals[step] = values(next_obs)
            actions[step], logprobs[step] = action, probs.log_prob(action)
            next_obs, rewards[step], terminated, truncated, final_obs = envs.step(action.numpy())
            terminations[step] = terminated.float()
            dones[step] = torch.logical_or(terminated, truncated).float()
            with torch.no_grad():
                finals[step] = values(final_obs)
        advantages = torch.zeros_like(rewards)
        lastgaelam = 0
        for t in reversed(range(rollout_steps)):
            delta = rewards[t] + args["gamma"] * finals[t] * (1.0 - terminations[t]) - vals[t]
            lastgaelam = delta + args["gamma"] * args["lam"] * (1.0 - dones[t]) * lastgaelam
            advantages[t] = lastgaelam
        returns = advantages + vals
        b_obs = obs.reshape(-1, obs.shape[-1])
        b_actions, b_logprobs = actions.reshape(-1), logprobs.reshape(-1)
        b_advantages, b_returns = advantages.reshape(-1), returns.reshape(-1)
        b_inds, clipfracs, kls, first = np.arange(batch_size), [], [], None
        for _ in range(args["epochs"]):
            np.random.shuffle(b_inds)
            for mb_inds in np.array_split(b_inds, math.ceil(batch_size / minibatch_size)):
                probs = Categorical(logits=policy(b_obs[mb_inds]))
                logratio = probs.log_prob(b_actions[mb_inds]) - b_logprobs[mb_inds]
                ratio = logratio.exp()
                with torch.no_grad():
                    kls.append(((ratio - 1) - logratio).mean().item())
                    clipfracs.append(((ratio - 1.0).abs() > args["clip_range"]).float().mean().item())
                    first = first or ((ratio - 1).abs().max().item(), clipfracs[0])
                mb_advantages = b_advantages[mb_inds]
                mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
                pg_loss1 = -mb_advantages * ratio
                pg_loss2 = -mb_advantages * torch.clamp(ratio, 1 - args["clip_range"], 1 + args["clip_range"])
                pg_loss = torch.max(pg_loss1, pg_loss2).mean()
                v_loss = 0.5 * ((values(b_obs[mb_inds]) - b_returns[mb_inds]) ** 2).mean()
                loss = pg_loss - args["entropy_coef"] * probs.entropy().mean() + v_loss * args["value_coef"]
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters(), args["max_grad_norm"])
                optimizer.step()
        row = {"env_steps": envs.steps, "clip_fraction": np.mean(clipfracs), "approx_kl": np.mean(kls)}
        rows.append({**row, "first_ratio_error": first[0], "first_clip_fraction": first[1]})
    return rows


class Arena:
    """ARENA's habits: an agent and a trainer, small functions for each term of the objective, which is maximised."""

    def __init__(self, envs, policy, values, **args):
        self.envs, self.policy, self.values, self.args = envs, policy, values, args
        self.parameters = [*policy.parameters()]
        self.parameters += [p for p in values.parameters() if not any(p is q for q in self.parameters)]
        self.optimizer = optim.Adam(self.parameters, lr=args["lr"], eps=1e-5, maximize=True)
        self.next_obs = envs.reset()

    def rollout(self):
        memory = []
        for _ in range(self.args["rollout_steps"]):
            with torch.inference_mode():
                probs = Categorical(logits=self.policy(self.next_obs))
                actions = probs.sample()
            step = self.envs.step(actions)
            memory.append((self.next_obs, actions, probs.log_prob(actions), step))
            self.next_obs = step.observations
        return memory

    @torch.no_grad()
    def advantages(self, memory):
        gamma, lam = self.args["gamma"], self.args["lam"]
        v = torch.stack([self.values(obs) for obs, *_ in memory])
        v_next = torch.stack([self.values(step.next_observations) for *_, step in memory])
        over = torch.stack([step.terminated for *_, step in memory]).float()
        done = torch.stack([step.terminated | step.truncated for *_, step in memory]).float()
        deltas = torch.stack([step.rewards for *_, step in memory]) + gamma * v_next * (1 - over) - v
        found = deltas.clone()
        for t in reversed(range(len(memory) - 1)):
            found[t] = deltas[t] + gamma * lam * (1 - done[t]) * found[t + 1]
        return found, found + v

    def surrogate(self, ratio, adv):
        adv = (adv - adv.mean()) / (adv.std() + 1e-8)
        eps = self.args["clip_range"]
        return torch.where(adv > 0, ratio.clamp(max=1 + eps) * adv, ratio.clamp(min=1 - eps) * adv).mean()

    def learn(self, memory):
        adv, ret = self.advantages(memory)
        obs = torch.cat([row[0] for row in memory])
        act = torch.cat([row[1] for row in memory]).clone()
        old = torch.cat([row[2] for row in memory]).clone()
        adv, ret, rows = adv.flatten(), ret.flatten(), []
        parts = -(-len(act) // self.args["minibatch_size"])
        for _ in range(self.args["epochs"]):
            for inds in torch.randperm(len(act)).tensor_split(parts):
                probs = Categorical(logits=self.policy(obs[inds]))
                ratio = (probs.log_prob(act[inds]) - old[inds]).exp()
                value_term = 0.5 * self.args["value_coef"] * (self.values(obs[inds]) - ret[inds]).pow(2).mean()
                bonus = self.args["entropy_coef"] * probs.entropy().mean()
                objective = self.surrogate(ratio, adv[inds]) - value_term + bonus
                objective.backward()
                nn.utils.clip_grad_norm_(self.parameters, self.args["max_grad_norm"])
                self.optimizer.step()
                self.optimizer.zero_grad()
                r = ratio.detach()
                outside = ((r - 1).abs() > self.args["clip_range"]).float().mean()
                rows.append(torch.stack([(r - 1).abs().max(), outside, (r - 1 - r.log()).mean()]))
        rows = torch.stack(rows)
        return {
            "first_ratio_error": float(rows[0, 0]),
            "first_clip_fraction": float(rows[0, 1]),
            "clip_fraction": float(rows[:, 1].mean()),
            "approx_kl": float(rows[:, 2].mean()),
        }

    def train(self):
        log = []
        while self.envs.steps < self.args["total_steps"]:
            memory = self.rollout()
            log.append({"env_steps": self.envs.steps, **self.learn(memory)})
        return log


def arena(envs, policy, values, **args):
    return Arena(envs, policy, values, **args).train()


def spinning_up(envs, policy, values, *, generator, shuffle, **s):
    """Spinning Up's habits: paths of one environment at a time, in numpy, discounted sums of deltas."""
    parameters = list({id(p): p for p in [*policy.parameters(), *values.parameters()]}.values())
    optimizer = optim.Adam(parameters, lr=s["lr"], eps=1e-5)
    o, log = envs.reset(), []
    while envs.steps < s["total_steps"]:
        paths = [[] for _ in range(envs.num_envs)]
        for _ in range(s["rollout_steps"]):
            a = policy.sample(policy(o).detach(), generator)
            with torch.no_grad():
                v, logp = values(o), policy.logprobs(policy(o), a)
                answer = envs.step(a)
                v_next = values(answer.next_observations)
            for i, path in enumerate(paths):
                over, cut = bool(answer.terminated[i]), bool(answer.truncated[i])
                numbers = (float(answer.rewards[i]), v[i].item(), 0.0 if over else v_next[i].item(), over or cut)
                path.append((o[i], a[i], logp[i], numbers))
            o = answer.observations
        data = []
        for path in paths:
            running, tail = 0.0, []
            for obs, act, logp, (reward, v, v_next, done) in reversed(path):
                delta = reward + s["gamma"] * v_next - v
                running = delta + (0.0 if done else s["gamma"] * s["lam"] * running)
                tail.append((obs, act, logp, torch.tensor(running), torch.tensor(running + v)))
            data += tail[::-1]
        obs, act, logp_old, adv, ret = (torch.stack(column) for column in zip(*data, strict=True))
        info = []
        for _ in range(s["epochs"]):
            order = torch.randperm(len(act), generator=shuffle)
            for batch in torch.tensor_split(order, math.ceil(len(act) / s["minibatch_size"])):
                a = adv[batch]
                a = (a - a.mean()) / a.std(unbiased=False).clamp(min=1e-8)
                pi = policy(obs[batch])
                logp = policy.logprobs(pi, act[batch])
                ratio = torch.exp(logp - logp_old[batch])
                clip_adv = torch.clamp(ratio, 1 - s["clip_range"], 1 + s["clip_range"]) * a
                loss_pi = -(torch.min(ratio * a, clip_adv)).mean()
                loss_v = ((values(obs[batch]) - ret[batch]) ** 2).mean() / 2
                ent = policy.entropy(pi).mean()
                optimizer.zero_grad()
                (loss_pi + s["value_coef"] * loss_v - s["entropy_coef"] * ent).backward()
                nn.utils.clip_grad_norm_(parameters, s["max_grad_norm"])
                optimizer.step()
                clipped = ratio.gt(1 + s["clip_range"]) | ratio.lt(1 - s["clip_range"])
                kl = (ratio - 1 - (logp - logp_old[batch])).mean()
                info.append([(ratio - 1).abs().max().item(), clipped.float().mean().item(), kl.item()])
        mean = np.mean(info, 0)
        log.append(
            {
                "env_steps": envs.steps,
                "first_ratio_error": info[0][0],
                "first_clip_fraction": info[0][1],
                "clip_fraction": mean[1],
                "approx_kl": mean[2],
            }
        )
    return log


FOREIGN = {"CleanRL": cleanrl, "ARENA": arena, "Spinning Up": spinning_up}
