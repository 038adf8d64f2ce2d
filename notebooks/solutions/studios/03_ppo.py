"""The solution of the studio `ppo`: one plain way to write it. Others are as right."""

import math

import torch
from torch import nn


def my_ppo(
    envs,
    policy,
    values,
    *,
    total_steps,
    rollout_steps,
    epochs,
    minibatch_size,
    gamma,
    lam,
    lr,
    clip_range,
    value_coef,
    entropy_coef,
    max_grad_norm,
    generator,
    shuffle,
):
    # Every parameter once, also if the two share their trunk.
    parameters = list(dict.fromkeys([*policy.parameters(), *values.parameters()]))
    optimizer = torch.optim.Adam(parameters, lr=lr, eps=1e-5)
    now = envs.reset()
    log = []

    while envs.steps < total_steps:
        # N actors play pi_old for T steps.
        observations, actions, steps = [], [], []
        for _ in range(rollout_steps):
            with torch.no_grad():
                action = policy.sample(policy(now), generator)
            step = envs.step(action)
            observations.append(now)
            actions.append(action)
            steps.append(step)
            now = step.observations
        observations, actions = torch.stack(observations, 1), torch.stack(actions, 1)  # [N, T, D], [N, T]

        # GAE: delta_t = R + gamma V(what followed) - V, A_t = delta_t + gamma lam A_{t+1} inside of an episode.
        with torch.no_grad():
            old_values = values(observations)
            old_logprobs = policy.logprobs(policy(observations), actions)
            advantages = torch.zeros_like(old_values)
            following = torch.zeros(envs.num_envs)
            for t in reversed(range(rollout_steps)):
                v_after = torch.where(steps[t].terminated, 0.0, values(steps[t].next_observations))
                delta = steps[t].rewards + gamma * v_after - old_values[:, t]
                ended = steps[t].terminated | steps[t].truncated
                following = delta + gamma * lam * torch.where(ended, 0.0, following)
                advantages[:, t] = following
            returns = advantages + old_values

        # A flat batch, environment by environment.
        batch = [x.flatten(0, 1) for x in (observations, actions, advantages, returns, old_logprobs)]
        count = len(batch[1])
        rows = []
        for _ in range(epochs):
            order = torch.randperm(count, generator=shuffle)
            for index in order.tensor_split(math.ceil(count / minibatch_size)):
                obs, act, adv, ret, old = (x[index] for x in batch)
                adv = (adv - adv.mean()) / (adv.std(correction=0) + 1e-8)
                outputs = policy(obs)
                ratio = (policy.logprobs(outputs, act) - old).exp()
                clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
                L_clip = torch.minimum(ratio * adv, clipped * adv).mean()
                L_value = 0.5 * (values(obs) - ret).square().mean()
                S = policy.entropy(outputs).mean()
                loss = -(L_clip - value_coef * L_value + entropy_coef * S)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, max_grad_norm)
                optimizer.step()
                ratio = ratio.detach()
                rows.append(
                    (
                        (ratio - 1).abs().max().item(),
                        ((ratio - 1).abs() > clip_range).float().mean().item(),
                        ((ratio - 1) - ratio.log()).mean().item(),
                    )
                )
        ratio_errors, clip_fractions, kls = zip(*rows, strict=True)
        log.append(
            {
                "env_steps": envs.steps,
                "first_ratio_error": ratio_errors[0],
                "first_clip_fraction": clip_fractions[0],
                "clip_fraction": sum(clip_fractions) / len(rows),
                "approx_kl": sum(kls) / len(rows),
            }
        )
    return log
