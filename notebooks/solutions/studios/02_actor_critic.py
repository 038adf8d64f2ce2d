"""The solution of the studio `actor_critic`: one plain way to write it. Others are as right."""

import torch
from torch import nn


def my_actor_critic(
    envs,
    policy,
    values,
    *,
    total_steps,
    n,
    gamma,
    lr,
    value_lr,
    max_grad_norm,
    weigh_by_gamma_t,
    generator,
):
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr, eps=1e-5)
    value_optimizer = torch.optim.Adam(values.parameters(), lr=value_lr, eps=1e-5)
    now = envs.reset()
    I = torch.ones(envs.num_envs)  # noqa: E741 (Sutton's name): gamma^t, t from the start of each one's episode
    log = []

    while envs.steps < total_steps:
        # n steps in every environment, from where the last ones stopped.
        observations, actions, factors, steps = [], [], [], []
        for _ in range(n):
            with torch.no_grad():
                action = policy.sample(policy(now), generator)
            step = envs.step(action)
            observations.append(now)
            actions.append(action)
            factors.append(I)
            steps.append(step)
            now = step.observations
            if weigh_by_gamma_t:
                I = torch.where(step.terminated | step.truncated, 1.0, gamma * I)  # noqa: E741
        observations, actions, factors = torch.stack(observations), torch.stack(actions), torch.stack(factors)  # [n, N]

        # R + gamma R' + ... + gamma^k v: v where the episode was cut, by a time limit or by the last of the n steps;
        # nothing where it terminated.
        targets = torch.zeros(n, envs.num_envs)
        with torch.no_grad():
            following = values(steps[-1].next_observations)
            for t in reversed(range(n)):
                following = torch.where(steps[t].truncated, values(steps[t].next_observations), following)
                following = torch.where(steps[t].terminated, 0.0, following)
                following = steps[t].rewards + gamma * following
                targets[t] = following

        # The critic: the target is held fixed ("semi-gradient"). The actor: delta is a constant.
        v = values(observations)
        deltas = (targets - v).detach()
        value_loss = 0.5 * (v - targets).square().mean()
        logprobs = policy.logprobs(policy(observations), actions)
        loss = -(factors * deltas * logprobs).mean()

        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
        optimizer.step()
        value_optimizer.zero_grad()
        value_loss.backward()
        nn.utils.clip_grad_norm_(values.parameters(), max_grad_norm)
        value_optimizer.step()

        log.append({"env_steps": envs.steps, "value_loss": value_loss.item()})
    return log
