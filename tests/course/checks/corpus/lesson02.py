"""Answers to lesson 02 in other hands; test_corpus.py says how to read them."""

import torch
import torch.nn.functional as F

# 2.1 -----------------------------------------------------------------------------------------------------------------


def advantages_cleanrl(rewards, values, ends, gamma):
    with torch.no_grad():
        returns = torch.zeros_like(rewards)
        for t in reversed(range(rewards.shape[1])):
            nextnonterminal = 1.0 - ends[:, t].float()
            following = returns[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
            returns[:, t] = rewards[:, t] + gamma * nextnonterminal * following
        return returns - values


def advantages_by_hand(rewards, values, ends, gamma):
    out = torch.zeros(rewards.shape)
    for n in range(len(rewards)):
        G = 0.0
        for t in reversed(range(rewards.shape[1])):
            G = rewards[n, t].item() + gamma * G * (not ends[n, t])
            out[n, t] = G - values[n, t].item()
    return out


def advantages_arena(rewards, values, ends, gamma):
    T = rewards.shape[1]
    result = torch.empty_like(rewards)
    g = torch.zeros_like(rewards[:, 0])
    for t in range(T - 1, -1, -1):
        g = rewards[:, t] + gamma * g.masked_fill(ends[:, t], 0.0)
        result[:, t] = g
    return result - values.detach()


# 2.2 -----------------------------------------------------------------------------------------------------------------


def losses_spinning_up(logprobs, values, returns):
    adv = returns.detach() - values.detach()
    loss_pi = -(logprobs * adv).mean()
    loss_v = ((values - returns.detach()) ** 2).mean() / 2
    return loss_pi, loss_v


def losses_hands_on(logprobs, values, returns):
    delta = (returns - values).detach()
    return torch.mean(-logprobs * delta), 0.5 * F.mse_loss(values, returns.detach())


def losses_cleanrl(logprobs, values, returns):
    b_advantages, newvalue, b_returns = (returns - values).data, values.view(-1), returns.data.view(-1)
    pg_loss = (-b_advantages.view(-1) * logprobs.view(-1)).mean()
    return [pg_loss, 0.5 * ((newvalue - b_returns) ** 2).mean()]


# 2.3 -----------------------------------------------------------------------------------------------------------------


def best_by_norm(scores, returns):
    w = torch.linalg.norm(scores, dim=1) ** 2
    return torch.mean(w * returns) / torch.mean(w)


def best_einsum(scores, returns):
    return torch.einsum("sp,sp,s->", scores, scores, returns) / (torch.einsum("sp,sp->", scores, scores) + 1e-8)


def best_by_hand(scores, returns):
    above, below = 0.0, 0.0
    for s, g in zip(scores, returns, strict=True):
        above += float(s @ s) * float(g)
        below += float(s @ s)
    return above / below


def best_least_squares(scores, returns):
    s = scores.reshape(-1, 1)
    target = (scores * returns[:, None]).reshape(-1, 1)
    return torch.linalg.lstsq(s, target).solution.squeeze()


# 2.4 -----------------------------------------------------------------------------------------------------------------


def explained_sb3(values, returns):
    y_pred, y_true = values.flatten().numpy(), returns.flatten().numpy()
    return 1 - (y_true - y_pred).var() / y_true.var()


def explained_with_epsilon(values, returns):
    return 1 - torch.var(returns - values) / (torch.var(returns) + 1e-8)


def explained_by_hand(values, returns):
    error = returns - values
    left = ((error - error.mean()) ** 2).sum()
    return (1 - left / ((returns - returns.mean()) ** 2).sum()).item()


# 2.5 -----------------------------------------------------------------------------------------------------------------


def whiten_cleanrl(x, mask):
    counted = x[mask]
    white = (x - counted.mean()) / (counted.std(unbiased=False) + 1e-8)
    return torch.where(mask, white, 0.0)


def whiten_trl(x, mask):
    inside = x.masked_fill(~mask, 0.0)
    count = mask.sum()
    mean = inside.sum() / count
    var = ((inside - mean).masked_fill(~mask, 0.0) ** 2).sum() / count
    return ((inside - mean) * torch.rsqrt(var + 1e-8)).masked_fill(~mask, 0.0)


def whiten_in_place(x, mask):
    out = torch.zeros(x.shape)
    values = x[mask].float()
    out[mask] = (values - values.mean()) / (values.var(correction=0) + 1e-5).sqrt()
    return out


def whiten_as_published_by_trl(x, mask):
    counted = x[mask]
    return (x - counted.mean()) * torch.rsqrt(counted.var() + 1e-8)


RIGHT = {
    "baseline_advantages": {
        "CleanRL": advantages_cleanrl,
        "Hands-on-RL: numbers": advantages_by_hand,
        "ARENA": advantages_arena,
    },
    "baseline_losses": {
        "Spinning Up": losses_spinning_up,
        "Hands-on-RL: mse_loss": losses_hands_on,
        "CleanRL: a list, .data": losses_cleanrl,
    },
    "best_baseline": {
        "norms": best_by_norm,
        "einsum, an epsilon": best_einsum,
        "a Python float": best_by_hand,
        "least squares": best_least_squares,
    },
    "explained_variance": {
        "Stable-Baselines: numpy": explained_sb3,
        "an epsilon, n - 1": explained_with_epsilon,
        "a Python float": explained_by_hand,
    },
    "whiten": {
        "CleanRL": whiten_cleanrl,
        "trl: rsqrt": whiten_trl,
        "in float32, with epsilon 1e-5": whiten_in_place,
    },
}

WRONG = {
    "baseline_advantages": [
        ("This is r - V", lambda r, v, ends, gamma: r - v.data),
        ("The gradient leaks into the baseline", advantages_arena, (".detach()", "")),
        ("The sign is wrong", advantages_arena, ("result - values.detach()", "values.detach() - result")),
        ("The return crosses the end", advantages_arena, ("g.masked_fill(ends[:, t], 0.0)", "g")),
        ("The return is not discounted", advantages_arena, ("gamma * g.", "g.")),
        ("The baseline is missing", advantages_by_hand, (" - values[n, t].item()", "")),
        ("the mean value", advantages_arena, ("values.detach()", "values.detach().mean()")),
        ("It subtracts the mean return", advantages_arena, ("values.detach()", "result.mean()")),
        ("The advantage is whitened", lambda r, v, ends, gamma: _white(advantages_cleanrl(r, v, ends, gamma))),
        ("The baseline is added", advantages_arena, ("result - ", "result + ")),
        ("has the shape", advantages_arena, ("result - values.detach()", "(result - values.detach()).mean(1)")),
        (None, advantages_by_hand, ("G - values[n, t].item()", "G - gamma * values[n, t].item()")),
    ],
    "baseline_losses": [
        (
            "The policy's loss leaks a gradient",
            losses_spinning_up,
            ("returns.detach() - values.detach()", "returns.detach() - values"),
        ),
        (
            "The returns are not constant",
            losses_spinning_up,
            ("returns.detach() - values.detach()", "returns - values.detach()"),
            ("(values - returns.detach())", "(values - returns)"),
        ),
        ("The half is missing", losses_hands_on, ("0.5 * ", "")),
        (
            "These are sums",
            losses_spinning_up,
            ("(logprobs * adv).mean()", "(logprobs * adv).sum()"),
            ("** 2).mean()", "** 2).sum()"),
        ),
        (
            "means over rows of sums",
            losses_spinning_up,
            ("(logprobs * adv).mean()", "(logprobs * adv).sum(1).mean()"),
            ("** 2).mean()", "** 2).sum(1).mean()"),
        ),
        (
            "The policy's loss multiplies two means",
            losses_spinning_up,
            ("(logprobs * adv).mean()", "logprobs.mean() * adv.mean()"),
        ),
        ("Both results are right, but swapped", lambda *args: losses_spinning_up(*args)[::-1]),
        ("The baseline can't learn", losses_spinning_up, ("(values - returns.detach())", "adv")),
        ("It returns one tensor, not 2 results", lambda *args: sum(losses_spinning_up(*args))),
        ("The policy's loss has no baseline", losses_hands_on, ("-logprobs * delta", "-logprobs * returns.detach()")),
        (
            "The minus sign of the policy's loss",
            losses_hands_on,
            ("(returns - values).detach()", "(values - returns).detach()"),
        ),
        (
            "weight is the whitened advantage",
            lambda lp, v, g: (-(lp * _white((g - v).detach())).mean(), losses_spinning_up(lp, v, g)[1]),
        ),
        (None, losses_hands_on, ("F.mse_loss", "F.smooth_l1_loss")),
    ],
    "best_baseline": [
        ("This is the mean return", lambda scores, returns: returns.mean()),
        ("It weighs by the length", best_by_norm, (" ** 2", "")),
        ("The weights are not normalised", lambda s, g: (s.pow(2).sum(1) * g).mean()),
        ("a mean above and a sum below", best_by_norm, ("/ torch.mean(w)", "/ torch.sum(w)")),
        ("This is a baseline for each parameter", lambda s, g: (s**2 * g.unsqueeze(1)).sum(0) / (s**2).sum(0)),
        (
            "This averages the best baseline of each",
            lambda s, g: ((s**2 * g.unsqueeze(1)).sum(0) / (s**2).sum(0)).mean(),
        ),
        ("It squares the squared length once more", best_by_norm, ("** 2", "** 4")),
        ("It weighs by the score itself", lambda s, g: torch.einsum("sp,s->", s, g) / s.sum()),
        (
            "It is upside down",
            best_by_norm,
            ("torch.mean(w * returns) / torch.mean(w)", "w.mean() / (w * returns).mean()"),
        ),
        (None, best_by_norm, ("dim=1", "dim=1, ord=1")),
        (None, lambda scores, returns: returns.median()),
    ],
    "explained_variance": [
        ("The two are swapped", explained_with_epsilon, ("(torch.var(returns) + 1e-8)", "torch.var(values)")),
        ("It uses the squared error", explained_sb3, ("(y_true - y_pred).var()", "((y_true - y_pred) ** 2).mean()")),
        ("This is the unexplained share", explained_by_hand, ("1 - left", "left")),
        (
            "It divides standard deviations",
            explained_with_epsilon,
            (
                "torch.var(returns - values) / (torch.var(returns) + 1e-8)",
                "torch.std(returns - values) / torch.std(returns)",
            ),
        ),
        ("row by row", lambda v, g: (1 - (g - v).var(1, correction=0) / g.var(1, correction=0)).mean()),
        ("It uses the variance of the values", explained_with_epsilon, ("returns - values)", "values)")),
        (
            "This is the squared correlation",
            lambda v, g: torch.corrcoef(torch.stack([v.view(-1), g.view(-1)]))[0, 1] ** 2,
        ),
        ("has the shape", explained_with_epsilon, ("torch.var(returns - values)", "torch.var(returns - values, 1)")),
        (None, lambda v, g: 1 - (g - v).abs().mean() / g.abs().mean()),
    ],
    "whiten": [
        ("include what does not count", whiten_cleanrl, ("counted = x[mask]", "counted = x")),
        ("What does not count must become 0: torch.where", whiten_cleanrl, ("torch.where(mask, white, 0.0)", "white")),
        ("0 * NaN is NaN", whiten_cleanrl, ("torch.where(mask, white, 0.0)", "white * mask")),
        ("The variance divides by n - 1", whiten_cleanrl, ("std(unbiased=False)", "std()")),
        ("It divides by the variance", whiten_cleanrl, ("std(unbiased=False)", "var(unbiased=False)")),
        ("and the variance divides by n, not by n - 1", whiten_as_published_by_trl),
        (
            "Every row is whitened by itself",
            lambda x, mask: torch.stack([whiten_trl(r, m) for r, m in zip(x, mask, strict=True)]),
        ),
        ("It subtracts the mean only", whiten_trl, (" * torch.rsqrt(var + 1e-8)", "")),
        ("The mean is still there", whiten_trl, ("((inside - mean) * torch", "(inside * torch")),
        ("It is measured around 0", whiten_in_place, ("values.var(correction=0)", "(values**2).mean()")),
        ("NaN where a number is expected", whiten_trl, ("inside = x.masked_fill(~mask, 0.0)", "inside = x * mask")),
        (None, whiten_trl, ("var + 1e-8", "var + 1.0")),
    ],
}


def _white(x):
    return (x - x.mean()) / (x.std(correction=0) + 1e-8)
