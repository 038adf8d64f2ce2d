"""The solution of the studio `reinforce`: one plain way to write it. Others are as right."""

import torch
from torch import nn


def my_reinforce(
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
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr, eps=1e-5)
    if values is not None:
        value_optimizer = torch.optim.Adam(values.parameters(), lr=value_lr, eps=1e-5)
    log = []

    while envs.steps < total_steps:
        # One whole episode in every environment, a column per time step. Who is through early plays on, uncounted.
        observations, actions, rewards, counts, bootstraps = [], [], [], [], []
        running = torch.ones(envs.num_envs, dtype=torch.bool)
        now = envs.reset()
        while running.any():
            with torch.no_grad():
                action = policy.sample(policy(now), generator)
            step = envs.step(action)
            observations.append(now)
            actions.append(action)
            rewards.append(step.rewards)
            counts.append(running)
            # Where a time limit cut the episode, more would have come: v says how much.
            bootstrap = torch.zeros(envs.num_envs)
            if values is not None:
                with torch.no_grad():
                    bootstrap = torch.where(step.truncated, values(step.next_observations), 0.0)
            bootstraps.append(bootstrap)
            running = running & ~(step.terminated | step.truncated)
            now = step.observations
        observations, actions = torch.stack(observations), torch.stack(actions)  # [T, N, D], [T, N]
        rewards, counts = torch.stack(rewards), torch.stack(counts)  # [T, N]
        rewards = torch.where(counts, rewards, 0.0)

        # G_t = R + gamma G_{t+1}, backwards; what lies after the end counts 0.
        returns, following = torch.zeros_like(rewards), torch.zeros(envs.num_envs)
        for t in reversed(range(len(rewards))):
            following = torch.where(counts[t], rewards[t] + gamma * (following + bootstraps[t]), 0.0)
            returns[t] = following

        weights = returns
        if values is not None:
            with torch.no_grad():
                weights = returns - values(observations)
        if weigh_by_gamma_t:
            weights = weights * gamma ** torch.arange(len(rewards)).unsqueeze(1)

        logprobs = policy.logprobs(policy(observations), actions)
        loss = -torch.where(counts, weights * logprobs, 0.0).sum() / envs.num_envs
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
        optimizer.step()

        # v learns after it has judged.
        if values is not None:
            for _ in range(value_updates):
                value_loss = 0.5 * (values(observations) - returns)[counts].square().mean()
                value_optimizer.zero_grad()
                value_loss.backward()
                nn.utils.clip_grad_norm_(values.parameters(), max_grad_norm)
                value_optimizer.step()

        log.append({"env_steps": envs.steps, "episode_return": float(rewards.sum(0).mean())})
    return log
