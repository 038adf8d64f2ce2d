"""Wrong answers of lesson 03; test_museum.py says how to read them."""

import torch


def td_errors(rewards, values, next_values, terminated, truncated, gamma):
    done = terminated.to(rewards.dtype)
    return rewards + gamma * (1 - done) * next_values - values


def actor_critic_step(theta, w, discount, s, a, r, s_next, terminated, alpha_theta, alpha_w, gamma):
    theta, w = theta.clone(), w.clone()
    delta = r + gamma * w[s_next] * (not terminated) - w[s]
    w[s] = w[s] + alpha_w * delta
    grad = -torch.softmax(theta[s], -1)
    grad[a] = grad[a] + 1
    theta[s] = theta[s] + alpha_theta * discount * delta * grad
    return theta, w, discount * gamma


WRONG = {
    "td_errors": [
        (22, "Truncation is treated as termination", td_errors, ("terminated.to", "(terminated | truncated).to")),
        (22, "v(terminal) must be 0", td_errors, ("(1 - done) * ", "")),
        (12, "done and next_done are swapped", td_errors,
         ("    return", "    done = torch.nn.functional.pad(done[:, :-1], (1, 0))\n    return")),
    ],
    "actor_critic_step": [
        ("-", "I is missing", actor_critic_step, ("* discount * delta", "* delta")),
        ("-", "v(terminal) must be 0", actor_critic_step, (" * (not terminated)", "")),
    ],
}  # fmt: skip
