"""Answers to lesson 03 in other hands; test_corpus.py says how to read them."""

import torch
import torch.nn.functional as F
from torch.distributions import Categorical

# 3.1 -----------------------------------------------------------------------------------------------------------------


def td_cleanrl(rewards, values, next_values, terminated, truncated, gamma):
    nextnonterminal = 1.0 - terminated.float()
    return rewards + gamma * next_values * nextnonterminal - values


def td_masked(rewards, values, next_values, terminated, truncated, gamma):
    target = rewards + gamma * next_values.masked_fill(terminated, 0.0)
    return target - values


def td_by_hand(rewards, values, next_values, terminated, truncated, gamma):
    out = torch.zeros(rewards.shape)
    for n in range(rewards.shape[0]):
        for t in range(rewards.shape[1]):
            following = 0.0 if terminated[n, t] else next_values[n, t]
            out[n, t] = rewards[n, t] + gamma * following - values[n, t]
    return out


# 3.2 -----------------------------------------------------------------------------------------------------------------


def actor_critic_hands_on(logprobs, values, next_values, rewards, terminated, gamma):
    td_target = rewards + gamma * next_values * (1 - terminated.float())
    td_delta = td_target - values
    actor_loss = torch.mean(-logprobs * td_delta.detach())
    critic_loss = 0.5 * torch.mean(F.mse_loss(values, td_target.detach()))
    return actor_loss, critic_loss


def actor_critic_no_grad(logprobs, values, next_values, rewards, terminated, gamma):
    with torch.no_grad():
        target = torch.where(terminated, rewards, rewards + gamma * next_values)
        advantage = target - values
    return [-(advantage * logprobs).mean(), ((target - values) ** 2).mean() / 2]


def actor_critic_sums(logprobs, values, next_values, rewards, terminated, gamma):
    count = rewards.numel()
    target = (rewards + gamma * (1 - terminated.int()) * next_values).detach()
    error = target - values
    return -torch.dot(logprobs.flatten(), error.detach().flatten()) / count, error.pow(2).sum() / (2 * count)


# 3.3 -----------------------------------------------------------------------------------------------------------------


def step_autograd(theta, w, discount, state, action, reward, next_state, terminated, alpha_theta, alpha_w, gamma):
    theta = theta.detach().float().requires_grad_()
    w = w.detach().float().clone()
    v_next = 0.0 if terminated else w[next_state].item()
    delta = reward + gamma * v_next - w[state].item()
    w[state] += alpha_w * delta
    (score,) = torch.autograd.grad(theta.log_softmax(-1)[state, action], theta)
    return theta.detach() + alpha_theta * discount * delta * score, w, gamma * discount


def step_categorical(theta, w, decay, s, a, r, s_next, done, alpha_theta, alpha_w, gamma):
    theta, w = theta.clone(), w.clone()
    logits = theta[s].detach().clone().requires_grad_()
    Categorical(logits=logits).log_prob(torch.tensor(a)).backward()
    delta = r + gamma * w[s_next] * (1 - int(done)) - w[s]
    w[s] = w[s] + alpha_w * delta
    theta[s] = theta[s] + alpha_theta * decay * delta * logits.grad
    return [theta, w, decay * gamma]


def step_by_formula(theta, w, discount, state, action, reward, next_state, terminated, alpha_theta, alpha_w, gamma):
    delta = reward - w[state] + (0 if terminated else gamma * w[next_state])
    grad = torch.eye(theta.shape[1])[action] - theta[state].softmax(0)
    new_theta = theta.index_add(0, torch.tensor([state]), (alpha_theta * discount * delta * grad)[None].to(theta.dtype))
    new_w = w + alpha_w * delta * F.one_hot(torch.tensor(state), len(w))
    return new_theta, new_w, torch.tensor(gamma * discount)


# 3.4 -----------------------------------------------------------------------------------------------------------------


def entropy_categorical(logits):
    return Categorical(logits=logits).entropy()


def entropy_with_epsilon(logits):
    p = F.softmax(logits, dim=-1)
    return -(p * torch.log(p + 1e-10)).sum(dim=-1)


def entropy_clamped(logits):
    logp = torch.log_softmax(logits, -1).clamp(min=torch.finfo(logits.dtype).min)
    return -torch.einsum("...a,...a->...", logp.exp(), logp)


def entropy_plain(logits):
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


RIGHT = {
    "td_errors": {"CleanRL": td_cleanrl, "Spinning Up: masked_fill": td_masked, "a loop in float32": td_by_hand},
    "actor_critic_losses": {
        "Hands-on-RL": actor_critic_hands_on,
        "CleanRL: no_grad, a list": actor_critic_no_grad,
        "sums divided": actor_critic_sums,
    },
    "actor_critic_step": {
        "autograd in float32": step_autograd,
        "Hands-on-RL: Categorical, a list": step_categorical,
        "the formula, a float32 one-hot": step_by_formula,
    },
    "entropy": {
        "CleanRL: Categorical": entropy_categorical,
        "Hands-on-RL: an epsilon": entropy_with_epsilon,
        "ARENA: clamp": entropy_clamped,
    },
}

WRONG = {
    "td_errors": [
        ("v(terminal) must be 0", td_masked, (".masked_fill(terminated, 0.0)", "")),
        ("Truncation is treated as termination", td_masked, ("(terminated, 0.0)", "(terminated | truncated, 0.0)")),
        (
            "It takes values[:, t + 1] for V(S')",
            td_cleanrl,
            ("gamma * next_values", "gamma * torch.cat([values[:, 1:], next_values[:, -1:]], 1)"),
        ),
        (
            "It takes values[:, t + 1] for V(S'), and 0",
            td_cleanrl,
            ("gamma * next_values", "gamma * F.pad(values[:, 1:], (0, 1))"),
        ),
        (
            "It takes values[:, t + 1] for V(S'), and the row's first",
            td_cleanrl,
            ("gamma * next_values", "gamma * torch.roll(values, -1, 1)"),
        ),
        ("V(S) is cut as well", lambda r, v, n, te, tr, gamma: r + (gamma * n - v) * (1 - te.float())),
        (
            "The whole error is cut",
            td_by_hand,
            (
                "rewards[n, t] + gamma * following - values[n, t]",
                "0.0 if terminated[n, t] else rewards[n, t] + gamma * following - values[n, t]",
            ),
        ),
        ("The sign is wrong", td_masked, ("target - values", "values - target")),
        ("V(S) is missing", td_masked, ("target - values", "target")),
        ("The discount is missing", td_by_hand, ("gamma * following", "following")),
        (
            "The reward is discounted too",
            td_by_hand,
            ("rewards[n, t] + gamma * following", "gamma * (rewards[n, t] + following)"),
        ),
        (
            "done and next_done are swapped",
            td_cleanrl,
            ("terminated.float()", "F.pad(terminated[:, :-1], (1, 0)).float()"),
        ),
        (None, td_masked, ("target - values", "target - 2 * values")),
    ],
    "actor_critic_losses": [
        (
            "A gradient flows through the target",
            actor_critic_hands_on,
            ("F.mse_loss(values, td_target.detach())", "F.mse_loss(values, td_target)"),
        ),
        (
            "The actor's loss leaks a gradient",
            actor_critic_hands_on,
            ("td_delta.detach()", "(td_target.detach() - values)"),
        ),
        ("The half is missing", actor_critic_hands_on, ("0.5 * ", "")),
        (
            "or the TD error is V(S) - target",
            actor_critic_hands_on,
            ("td_delta = td_target - values", "td_delta = values - td_target"),
        ),
        ("These are sums", actor_critic_sums, ("count = rewards.numel()", "count = 1")),
        ("means over rows of sums", actor_critic_sums, ("count = rewards.numel()", "count = len(rewards)")),
        ("Both results are right, but swapped", lambda *args: actor_critic_no_grad(*args)[::-1]),
        ("v(terminal) must be 0", actor_critic_hands_on, (" * (1 - terminated.float())", "")),
        (
            "It takes values[:, t + 1] for V(S')",
            lambda lp, v, n, r, te, gamma: actor_critic_hands_on(
                lp, v, torch.cat([v[:, 1:], n[:, -1:]], 1).detach(), r, te, gamma
            ),
        ),
        ("The discount is missing", lambda lp, v, n, r, te, gamma: actor_critic_hands_on(lp, v, n, r, te, 1.0)),
        (
            "The actor's weight is the whole target",
            actor_critic_hands_on,
            ("-logprobs * td_delta.detach()", "-logprobs * td_target.detach()"),
        ),
        (
            "The actor's loss multiplies two means",
            actor_critic_no_grad,
            ("-(advantage * logprobs).mean()", "-advantage.mean() * logprobs.mean()"),
        ),
        (
            "The critic can't learn: no gradient flows",
            actor_critic_no_grad,
            ("((target - values) ** 2)", "(advantage**2)"),
        ),
        (None, actor_critic_hands_on, ("-logprobs *", "-logprobs.exp() *")),
    ],
    "actor_critic_step": [
        (
            "Only the action taken moves",
            step_by_formula,
            ("- theta[state].softmax(0)", "* (1 - theta[state].softmax(0))"),
        ),
        ("The softmax runs over the states", step_by_formula, ("theta[state].softmax(0)", "theta.softmax(0)[state]")),
        ("I is missing", step_categorical, ("alpha_theta * decay * delta", "alpha_theta * delta")),
        ("I is in the critic's step too", step_categorical, ("alpha_w * delta", "alpha_w * decay * delta")),
        ("I is returned unchanged", step_categorical, ("decay * gamma", "decay")),
        ("v(terminal) must be 0", step_categorical, (" * (1 - int(done))", "")),
        (
            "The actor uses a delta made with the new w",
            step_categorical,
            (
                "    theta[s] = theta[s]",
                "    delta = r + gamma * w[s_next] * (1 - int(done)) - w[s]\n    theta[s] = theta[s]",
            ),
        ),
        ("The score is the one-hot alone", step_by_formula, (" - theta[state].softmax(0)", "")),
        (
            "The actor's step has the critic's learning rate",
            step_autograd,
            ("alpha_theta * discount", "alpha_w * discount"),
        ),
        (
            "All results are right, but in the wrong order",
            lambda *args: (lambda th, w, i: (i, th, w))(*step_autograd(*args)),
        ),
        ("writes into its argument", step_categorical, ("theta, w = theta.clone(), w.clone()", "pass")),
        ("delta has no discount", step_categorical, ("r + gamma * w[s_next]", "r + w[s_next]")),
        (
            "The actor's step is weighed with the reward",
            step_categorical,
            ("decay * delta * logits.grad", "decay * r * logits.grad"),
        ),
        (None, step_categorical, ("alpha_w * delta", "alpha_w * alpha_theta * delta")),
    ],
    "entropy": [
        ("The softmax runs over the wrong dimension", lambda z: -(z.softmax(0) * (z.softmax(0) + 1e-12).log()).sum(-1)),
        ("infinite. Start from log_softmax", lambda z: -torch.xlogy(z.softmax(-1), z.softmax(-1)).sum(-1)),
        ("infinite. Start from log_softmax", lambda z: torch.special.entr(torch.softmax(z, -1)).sum(-1)),
        (
            "torch.where takes the -inf out of the result",
            lambda z: torch.where(z.softmax(-1) > 0, -z.softmax(-1) * z.log_softmax(-1), 0.0).sum(-1),
        ),
        ("0 * -inf is NaN", entropy_plain),
        (
            "It takes the log of a softmax that rounds to 0",
            lambda z: -(F.softmax(z, -1) * F.softmax(z, -1).log()).sum(-1),
        ),
        ("It averages over the actions", entropy_with_epsilon, (".sum(dim=-1)", ".mean(dim=-1)")),
        ("It sums over everything", entropy_with_epsilon, (".sum(dim=-1)", ".sum()")),
        ("The minus sign is missing", entropy_with_epsilon, ("return -", "return ")),
        (
            "This is the perplexity",
            entropy_with_epsilon,
            (
                "return -(p * torch.log(p + 1e-10)).sum(dim=-1)",
                "return torch.exp(-(p * torch.log(p + 1e-10)).sum(dim=-1))",
            ),
        ),
        ("It is in bits", entropy_with_epsilon, ("torch.log(", "torch.log2(")),
        ("No gradient flows", lambda z: entropy_clamped(z.detach() + 0.0 * z.detach())),
        (None, entropy_with_epsilon, ("F.softmax(logits", "F.softmax(logits / 2")),
    ],
}
