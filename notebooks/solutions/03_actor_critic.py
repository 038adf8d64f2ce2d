"""Solutions of lesson 03: each function stands for the stub of its name."""

import torch


def my_td_errors(rewards, values, next_values, terminated, truncated, gamma):
    # A truncated episode would have gone on, so its last state keeps its value: `truncated` changes nothing here.
    return rewards + gamma * next_values * ~terminated - values


def my_actor_critic_losses(logprobs, values, next_values, rewards, terminated, gamma):
    targets = (rewards + gamma * next_values * ~terminated).detach()
    advantages = (targets - values).detach()
    return -(logprobs * advantages).mean(), 0.5 * (values - targets).square().mean()


def my_actor_critic_step(
    theta, w, discount, state, action, reward, next_state, terminated, alpha_theta, alpha_w, gamma
):
    theta, w = theta.clone(), w.clone()
    next_value = 0.0 if terminated else w[next_state]
    delta = reward + gamma * next_value - w[state]
    score = -theta[state].softmax(-1)
    score[action] += 1
    w[state] += alpha_w * delta
    theta[state] += alpha_theta * discount * delta * score
    return theta, w, gamma * discount


def my_entropy(logits):
    log_p = logits.log_softmax(-1)
    # An impossible action has log_p = -inf and p = 0: its product is 0, which 0 * -inf would not give.
    return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
