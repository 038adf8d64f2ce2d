"""Answers to lesson 01 in other hands; test_corpus.py says how to read them."""

import numpy as np
import torch
import torch.nn.functional as F
from torch.distributions import Categorical

# 1.1 -----------------------------------------------------------------------------------------------------------------


def score_by_scatter(logits, actions):
    probs = F.softmax(logits, dim=-1)
    grad = -probs.clone()
    grad[torch.arange(len(actions)), actions] += 1.0
    return grad


def score_by_eye(logits, actions):
    return torch.eye(logits.shape[1])[actions] - torch.exp(logits - torch.logsumexp(logits, 1, keepdim=True))


def score_by_autograd(logits, actions):
    logits = logits.detach().clone().requires_grad_(True)
    Categorical(logits=logits).log_prob(actions).sum().backward()
    return logits.grad


def score_in_numpy(logits, actions):
    z = logits.numpy()
    p = np.exp(z - z.max(1, keepdims=True))
    p = p / p.sum(1, keepdims=True)
    return np.eye(z.shape[1], dtype=np.float32)[actions.numpy()] - p


# 1.2 -----------------------------------------------------------------------------------------------------------------


def sample_cleanrl(logits):
    probs = Categorical(logits=logits)
    action = probs.sample()
    return action, probs.log_prob(action)


def sample_gumbel(logits):
    with torch.no_grad():
        noise = -torch.log(-torch.log(torch.rand(logits.shape)))
        actions = torch.argmax(logits + noise, dim=-1)
    return actions, -F.cross_entropy(logits, actions, reduction="none")


def sample_inverse(logits):
    logp = F.log_softmax(logits, dim=-1)
    below = logp.exp().cumsum(-1)[:, :-1]
    actions = (torch.rand(len(logits), 1) > below).sum(-1).to(torch.int32)
    return [actions.long(), logp[torch.arange(len(logits)), actions.long()]]


def sample_twice(logits):
    pi = Categorical(logits=logits)
    return pi.sample(), pi.log_prob(pi.sample())


def sample_over_states(logits):
    probs = torch.softmax(logits, dim=0)
    a = torch.multinomial(probs, 1)[:, 0]
    return a, torch.log(probs)[range(len(a)), a]


def sample_normalised_over_states(logits):
    a = Categorical(logits=logits).sample()
    return a, torch.log_softmax(logits, 0).gather(1, a.view(-1, 1)).view(-1)


def sample_by_position(logits):
    pi = Categorical(logits)
    a = pi.sample()
    return a, pi.log_prob(a)


def sample_shifted(logits):
    pi = Categorical(logits=logits)
    a = pi.sample()
    return a + 1, pi.log_prob(a)


# 1.3 -----------------------------------------------------------------------------------------------------------------


def returns_cleanrl(rewards, ends, gamma):
    result = torch.zeros_like(rewards)
    following = 0
    for t in reversed(range(rewards.shape[1])):
        nextnonterminal = 1.0 - ends[:, t].float()
        result[:, t] = rewards[:, t] + gamma * nextnonterminal * following
        following = result[:, t]
    return result


def returns_by_hand(rewards, ends, gamma):
    rows = []
    for r, e in zip(rewards.tolist(), ends.tolist(), strict=True):
        G, row = 0.0, []
        for x, end in zip(r[::-1], e[::-1], strict=True):
            G = x if end else gamma * G + x
            row.insert(0, G)
        rows.append(row)
    return torch.tensor(rows)


def returns_by_matrix(rewards, ends, gamma):
    T = rewards.shape[1]
    episode = F.pad(ends.long().cumsum(1)[:, :-1], (1, 0))
    lag = torch.arange(T)[None, :] - torch.arange(T)[:, None]
    weight = torch.where(lag >= 0, gamma ** lag.clamp(min=0).float(), torch.zeros(()))
    same = episode[:, :, None] == episode[:, None, :]
    return torch.einsum("ntk,nk->nt", weight * same.float(), rewards.float())


def returns_segments(rewards, ends, gamma):
    out = rewards.clone()
    for n in range(out.shape[0]):
        start = 0
        cuts = [int(t) + 1 for t in ends[n].nonzero()]
        for stop in [*cuts, out.shape[1]]:
            for t in range(stop - 2, start - 1, -1):
                out[n, t] += gamma * out[n, t + 1]
            start = stop
    return out


def returns_late(rewards, ends, gamma):
    out = torch.zeros_like(rewards)
    G = torch.zeros(len(rewards), dtype=rewards.dtype)
    for t in range(rewards.shape[1] - 1, -1, -1):
        G = rewards[:, t] + gamma * G
        out[:, t] = G
        G = G * (1 - ends[:, t].to(G.dtype))
    return out


def returns_whitened(rewards, ends, gamma):
    G = returns_cleanrl(rewards, ends, gamma)
    return (G - G.mean()) / (G.std() + 1e-8)


# 1.4 -----------------------------------------------------------------------------------------------------------------


def loss_spinning_up(logprobs, returns, gamma):
    weights = returns.detach() * gamma ** torch.arange(returns.shape[1])
    return -(logprobs * weights).mean()


def loss_by_hand(logprobs, returns, gamma):
    loss = 0.0
    for n in range(logprobs.shape[0]):
        for t in range(logprobs.shape[1]):
            loss = loss - gamma**t * float(returns[n, t]) * logprobs[n, t]
    return loss / logprobs.numel()


def loss_with_powers_in_python(logprobs, returns, gamma):
    powers = torch.tensor([gamma**t for t in range(logprobs.size(1))])
    with torch.no_grad():
        weight = powers * returns
    return torch.mean(-logprobs * weight)


def loss_cumprod(logprobs, returns, gamma):
    discount = torch.cumprod(torch.full_like(logprobs.detach(), gamma), 1) / gamma
    return -torch.sum(logprobs * returns.detach() * discount) / logprobs.numel()


RIGHT = {
    "score": {
        "ARENA: scatter": score_by_scatter,
        "float32 eye": score_by_eye,
        "autograd": score_by_autograd,
        "numpy": score_in_numpy,
    },
    "sample_actions": {"CleanRL": sample_cleanrl, "Gumbel": sample_gumbel, "inverse, a list": sample_inverse},
    "discounted_returns": {
        "CleanRL": returns_cleanrl,
        "Hands-on-RL: lists": returns_by_hand,
        "matrix in float32": returns_by_matrix,
        "Spinning Up: episode by episode": returns_segments,
    },
    "reinforce_loss": {
        "Spinning Up: float32 powers": loss_spinning_up,
        "Hands-on-RL: a loop": loss_by_hand,
        "powers in Python": loss_with_powers_in_python,
        "cumprod": loss_cumprod,
    },
}

WRONG = {
    "score": [
        ("The softmax runs over the rows", score_by_scatter, ("dim=-1", "dim=0")),
        (
            "Only the logit of the action taken moves",
            lambda z, a: F.one_hot(a, z.shape[1]) * (1 - z.softmax(1).gather(1, a[:, None])),
        ),
        ("The sign is wrong", score_by_scatter, ("return grad", "return -grad")),
        ("The one-hot of the action is missing", score_by_scatter, ("+= 1.0", "+= 0.0")),
        ("It subtracts log-probabilities", score_by_scatter, ("F.softmax", "F.log_softmax")),
        ("gradient of the mean over the rows", score_by_autograd, (".sum()", ".mean()")),
        ("This is the gradient of pi(a)", score_by_autograd, (".log_prob(actions)", ".log_prob(actions).exp()")),
        ("has the shape", lambda z, a: Categorical(logits=z).log_prob(a)),
        (None, score_by_scatter, ("+= 1.0", "+= 2.0")),
    ],
    "sample_actions": [
        ("The logits were taken for probabilities", sample_by_position),
        ("It draws twice", sample_twice),
        ("The softmax runs over the rows", sample_over_states),
        ("The log-probs are normalised over the rows", sample_normalised_over_states),
        ("Both results are right, but swapped", lambda z: sample_cleanrl(z)[::-1]),
        ("It takes the likeliest action", sample_gumbel, ("logits + noise", "logits")),
        ("The log-probs carry no gradient", lambda z: sample_cleanrl(z.detach())),
        ("It returns probabilities", sample_inverse, ("logp[torch", "logp.exp()[torch")),
        ("The sign of the log-probs is wrong", sample_gumbel, ("-F.cross", "F.cross")),
        ("It must return two tensors of shape", sample_cleanrl, ("log_prob(action)", "log_prob(action).sum()")),
        ("It must return two tensors of shape", lambda z: Categorical(logits=z).sample()),
        (None, lambda z: ((sample_cleanrl(z)[0] + 1) % z.shape[1], sample_cleanrl(z)[1])),
    ],
    "discounted_returns": [
        ("It looks up the end of the wrong step", returns_late),
        ("The return crosses the end", returns_cleanrl, ("1.0 - ends[:, t].float()", "1.0")),
        (
            "The reward of an episode's last step is lost",
            returns_cleanrl,
            (
                "rewards[:, t] + gamma * nextnonterminal * following",
                "nextnonterminal * (rewards[:, t] + gamma * following)",
            ),
        ),
        ("The discount is missing", returns_by_hand, ("gamma * G + x", "G + x")),
        ("Off by one in the discount", lambda r, e, gamma: gamma * returns_cleanrl(r, e, gamma)),
        ("The result runs backwards", returns_by_hand, ("row.insert(0, G)", "row.append(G)")),
        ("It goes through time forwards", returns_by_matrix, ("ntk,nk->nt", "nkt,nk->nt")),
        (
            "The discount is applied once",
            returns_cleanrl,
            ("        following = result[:, t]", "        following = rewards[:, t] + nextnonterminal * following"),
        ),
        ("NaN where a number is expected", returns_whitened),
        ("writes into its argument `rewards`", returns_segments, ("rewards.clone()", "rewards")),
        (None, returns_cleanrl, ("rewards[:, t] + gamma *", "(1 - gamma) * rewards[:, t] + gamma *")),
    ],
    "reinforce_loss": [
        ("The minus sign is missing", loss_spinning_up, ("return -", "return ")),
        ("gamma^t is missing", loss_spinning_up, (" * gamma ** torch.arange(returns.shape[1])", "")),
        ("A gradient flows into the returns", loss_spinning_up, (".detach()", "")),
        ("This is the sum over all steps", loss_by_hand, (" / logprobs.numel()", "")),
        ("mean over episodes of their sums", loss_by_hand, ("logprobs.numel()", "len(logprobs)")),
        ("Off by one in gamma^t", loss_cumprod, (" / gamma", "")),
        ("gamma^t runs backwards", loss_with_powers_in_python, ("(logprobs.size(1))]", "(logprobs.size(1))][::-1]")),
        ("The power counts rows", loss_by_hand, ("gamma**t", "gamma**n")),
        ("No gradient flows into logprobs", loss_with_powers_in_python, ("-logprobs *", "-logprobs.detach() *")),
        ("It weighs probabilities", loss_spinning_up, ("(logprobs *", "(logprobs.exp() *")),
        ("has the shape", loss_spinning_up, (".mean()", ".mean(1)")),
        (None, loss_spinning_up, ("-(logprobs", "-(logprobs - logprobs.mean().detach()")),
    ],
}
