"""Wrong answers of lesson 01; test_museum.py says how to read them."""

import torch


def discounted_returns(rewards, ends, gamma):
    returns = rewards.clone()
    for t in range(rewards.shape[1] - 2, -1, -1):
        returns[:, t] += gamma * (1 - ends[:, t].to(rewards.dtype)) * returns[:, t + 1]
    return returns


def from_the_next_reward(rewards, ends, gamma):
    rows = []
    for row in range(len(rewards)):
        out, g = [], 0.0
        for r, end in zip(reversed(rewards[row]), reversed(ends[row]), strict=True):
            if end:
                g = 0.0
            out.append(gamma * g)
            g = r + gamma * g
        rows.append(torch.stack([torch.as_tensor(x, dtype=rewards.dtype) / gamma for x in reversed(out)]))
    return torch.stack(rows)


def reinforce_loss(logprobs, returns, gamma):
    steps = torch.arange(logprobs.shape[1], dtype=logprobs.dtype)
    return -torch.mean(logprobs * returns.detach() * gamma**steps)


WRONG = {
    "discounted_returns": [
        (10, "The reward is counted a step early", discounted_returns,
         ("rewards.clone()", "torch.zeros_like(rewards)\n    returns[:, :-1] = rewards[:, 1:]")),
        (21, "The return crosses the end of the episode", discounted_returns,
         (" * (1 - ends[:, t].to(rewards.dtype))", "")),
        ("-", "Off by one: the sum starts at the next reward", from_the_next_reward),
    ],
    "sample_actions": [
        (11, "It takes the likeliest action (argmax) instead of drawing one",
         lambda logits: tuple(reversed(torch.log_softmax(logits, dim=-1).max(dim=-1)))),
    ],
    "reinforce_loss": [
        ("-", "The minus sign is missing", reinforce_loss, ("return -", "return ")),
        ("-", "gamma^t is missing", reinforce_loss, (" * gamma**steps", "")),
    ],
}  # fmt: skip
