"""Answers to lesson 04 in other hands; test_corpus.py says how to read them."""

import numpy as np
import torch
import torch.nn.functional as F

# 4.1 -----------------------------------------------------------------------------------------------------------------


def advantages_einsum(q_values, probabilities):
    v = torch.einsum("sa,sa->s", probabilities, q_values)
    return q_values - v.unsqueeze(-1)


def advantages_by_hand(q_values, probabilities):
    rows = []
    for q, p in zip(q_values.tolist(), probabilities.tolist(), strict=True):
        v = sum(a * b for a, b in zip(q, p, strict=True))
        rows.append([x - v for x in q])
    return torch.tensor(rows)


def advantages_matmul(q_values, probabilities):
    return q_values - torch.diag(probabilities @ q_values.T)[:, None]


# 4.2 -----------------------------------------------------------------------------------------------------------------


def n_step_from_errors(rewards, values, ends, last_values, gamma, n):
    alive = 1.0 - ends.float()
    following = torch.cat((values[:, 1:], last_values[:, None]), 1)
    delta = rewards + gamma * following * alive - values
    adv = delta.clone()
    for _ in range(n - 1):
        adv = delta + gamma * alive * F.pad(adv[:, 1:], (0, 1))
    return adv


def n_step_hands_on(rewards, values, ends, last_values, gamma, n):
    N, T = rewards.shape
    out = torch.zeros(N, T)
    for i in range(N):
        for t in range(T):
            G, k = 0.0, t
            while True:
                G += gamma ** (k - t) * float(rewards[i, k])
                k += 1
                if ends[i, k - 1]:
                    break
                if k - t == n or k == T:
                    G += gamma ** (k - t) * float(values[i, k] if k < T else last_values[i])
                    break
            out[i, t] = G - values[i, t]
    return out


def n_step_from_the_last_value(rewards, values, ends, last_values, gamma, n):
    """Bootstrapped targets, rolled back n times from V itself."""
    target = torch.cat([values, last_values[:, None]], 1)
    last = last_values[:, None]
    for _ in range(n):
        target = rewards + gamma * torch.where(ends, 0.0, target[:, 1:])
        target = torch.cat([target, last], 1)
    return target[:, :-1] - values


# 4.3 -----------------------------------------------------------------------------------------------------------------


def gae_cleanrl(rewards, values, ends, last_values, gamma, lam):
    advantages = torch.zeros_like(rewards)
    lastgaelam = 0
    for t in reversed(range(rewards.shape[1])):
        nextnonterminal = 1.0 - ends[:, t].float()
        nextvalues = last_values if t == rewards.shape[1] - 1 else values[:, t + 1]
        delta = rewards[:, t] + gamma * nextvalues * nextnonterminal - values[:, t]
        advantages[:, t] = lastgaelam = delta + gamma * lam * nextnonterminal * lastgaelam
    return advantages


def gae_spinning_up(rewards, values, ends, last_values, gamma, lam):
    def discount_cumsum(x, discount):
        y = np.array(x, dtype=np.float64)
        for t in range(len(y) - 2, -1, -1):
            y[t] += discount * y[t + 1]
        return y

    out = np.zeros(rewards.shape, dtype=np.float32)
    for i, (r, v, e) in enumerate(zip(rewards.numpy(), values.numpy(), ends.numpy(), strict=True)):
        start = 0
        for stop in [*(np.flatnonzero(e) + 1), len(r)]:
            if stop == start:
                continue
            last = 0.0 if e[stop - 1] else float(last_values[i])
            vals = np.append(v[start:stop], last)
            out[i, start:stop] = discount_cumsum(r[start:stop] + gamma * vals[1:] - vals[:-1], gamma * lam)
            start = stop
    return out


def gae_hands_on(rewards, values, ends, last_values, gamma, lam):
    next_values = torch.cat([values[:, 1:], last_values.view(-1, 1)], 1)
    td_delta = rewards + gamma * next_values * (1 - ends.int()) - values
    advantage_list, advantage = [], torch.zeros(len(rewards))
    for delta, end in zip(td_delta.T.flip(0), ends.T.flip(0), strict=True):
        advantage = gamma * lam * advantage * (~end) + delta
        advantage_list.append(advantage)
    advantage_list.reverse()
    return torch.stack(advantage_list, dim=1)


def gae_arena(rewards, values, ends, last_values, gamma, lam):
    T = rewards.shape[1]
    terminated = ends.float()
    next_values = torch.cat([values[:, 1:], last_values[:, None]], dim=1)
    deltas = rewards + gamma * next_values * (1.0 - terminated) - values
    advantages = torch.zeros_like(deltas)
    advantages[:, -1] = deltas[:, -1]
    for s in reversed(range(T - 1)):
        advantages[:, s] = deltas[:, s] + gamma * lam * (1.0 - terminated[:, s]) * advantages[:, s + 1]
    return advantages


# 4.4 -----------------------------------------------------------------------------------------------------------------


def clock_cleanrl(rewards, values, terminated, truncated, final_values, last_values, gamma, lam):
    dones = torch.logical_or(terminated, truncated).float()
    advantages = torch.zeros_like(rewards)
    lastgaelam = 0
    for t in reversed(range(rewards.shape[1])):
        nextvalues = last_values if t == rewards.shape[1] - 1 else values[:, t + 1]
        nextvalues = torch.where(truncated[:, t], final_values[:, t], nextvalues)
        delta = rewards[:, t] + gamma * nextvalues * (1.0 - terminated[:, t].float()) - values[:, t]
        advantages[:, t] = lastgaelam = delta + gamma * lam * (1.0 - dones[:, t]) * lastgaelam
    return advantages


def clock_stable_baselines(rewards, values, terminated, truncated, final_values, last_values, gamma, lam):
    """What follows a truncation is put into the reward; after that an end is an end."""
    rewards = rewards + gamma * final_values * truncated
    alive = 1.0 - (terminated | truncated).float()
    advantages = torch.zeros_like(rewards)
    last_gae_lam = torch.zeros_like(last_values)
    for step in reversed(range(rewards.shape[1])):
        next_values = values[:, step + 1] if step + 1 < rewards.shape[1] else last_values
        delta = rewards[:, step] + gamma * next_values * alive[:, step] - values[:, step]
        last_gae_lam = delta + gamma * lam * alive[:, step] * last_gae_lam
        advantages[:, step] = last_gae_lam
    return advantages


def clock_spinning_up(rewards, values, terminated, truncated, final_values, last_values, gamma, lam):
    N, T = rewards.shape
    adv_buf = np.zeros((N, T), dtype=np.float32)

    def finish_path(i, path, last_val):
        rews, vals = rewards[i, path].numpy(), np.append(values[i, path].numpy(), last_val)
        deltas, adv = rews + gamma * vals[1:] - vals[:-1], 0.0
        for t in reversed(range(len(deltas))):
            adv = deltas[t] + gamma * lam * adv
            adv_buf[i, path.start + t] = adv

    for i in range(N):
        path_start = 0
        for t in range(T):
            timeout, terminal, epoch_ended = truncated[i, t], terminated[i, t], t == T - 1
            if timeout or terminal or epoch_ended:
                last_val = last_values[i].item()
                if timeout:
                    last_val = final_values[i, t].item()
                if terminal:
                    last_val = 0.0
                finish_path(i, slice(path_start, t + 1), last_val)
                path_start = t + 1
    return adv_buf


def clock_hands_on(rewards, values, terminated, truncated, final_values, last_values, gamma, lam):
    next_values = torch.hstack([values[:, 1:], last_values.reshape(-1, 1)])
    next_values[truncated] = final_values[truncated]
    td_delta = rewards + gamma * next_values * (1 - terminated.int()) - values
    alive, advantage = 1 - terminated.int() - truncated.int(), 0.0
    advantage_list = []
    for t in range(rewards.shape[1] - 1, -1, -1):
        advantage = gamma * lam * alive[:, t] * advantage + td_delta[:, t]
        advantage_list.append(advantage)
    return torch.stack(advantage_list[::-1], 1)


# 4.5 -----------------------------------------------------------------------------------------------------------------


def targets_cleanrl(advantages, values):
    returns = advantages + values
    advantages = (advantages - advantages.mean()) / (advantages.std(unbiased=False) + 1e-8)
    return advantages, returns


def targets_numpy(advantages, values):
    a = advantages.numpy().astype(np.float32)
    return (a - a.mean()) / np.sqrt(a.var() + 1e-8), a + values.numpy()


def targets_layer_norm(advantages, values):
    return F.layer_norm(advantages, advantages.shape, eps=1e-8), values + advantages


# 4.6 -----------------------------------------------------------------------------------------------------------------


def scan_padded(x, decays):
    T = x.shape[1]
    y, d = x, decays
    shift = 1
    while shift < T:
        d = torch.cat([d[:, : T - shift], torch.zeros_like(d[:, :shift])], 1)
        y = y + d * F.pad(y[:, shift:], (0, shift))
        d = d * F.pad(d[:, shift:], (0, shift))
        shift *= 2
    return y


def scan_recursive(x, decays):
    T = x.shape[1]
    if T == 1:
        return x
    if T % 2:
        head = scan_recursive(x[:, 1:], decays[:, 1:])
        return torch.cat([x[:, :1] + decays[:, :1] * head[:, :1], head], 1)
    even = scan_recursive(x[:, ::2] + decays[:, ::2] * x[:, 1::2], decays[:, ::2] * decays[:, 1::2])
    odd = x[:, 1::2] + decays[:, 1::2] * F.pad(even[:, 1:], (0, 1))
    return torch.stack([even, odd], 2).reshape(x.shape)


def scan_matrix(x, decays):
    """All products at once: a triangle of cumulative products, in float32."""
    T = x.shape[1]
    steps = decays.float()[:, None, :].expand(-1, T, -1)
    later = torch.arange(T)[None, :] >= torch.arange(T)[:, None]
    weights = torch.where(later, steps, 1.0).cumprod(-1)
    weights = torch.cat([torch.ones_like(weights[..., :1]), weights[..., :-1]], -1) * later
    return torch.einsum("ntk,nk->nt", weights, x.float())


RIGHT = {
    "advantages_from_q": {
        "einsum": advantages_einsum,
        "Hands-on-RL: lists": advantages_by_hand,
        "matmul": advantages_matmul,
    },
    "n_step_advantages": {
        "from errors": n_step_from_errors,
        "Hands-on-RL: a loop in float32": n_step_hands_on,
        "n backups": n_step_from_the_last_value,
    },
    "gae": {
        "CleanRL": gae_cleanrl,
        "Spinning Up: numpy": gae_spinning_up,
        "Hands-on-RL": gae_hands_on,
        "ARENA": gae_arena,
    },
    "gae_with_truncation": {
        "CleanRL": clock_cleanrl,
        "Stable-Baselines3: the value goes into the reward": clock_stable_baselines,
        "Spinning Up: one path at a time, numpy": clock_spinning_up,
        "Hands-on-RL": clock_hands_on,
    },
    "advantages_and_targets": {
        "CleanRL": targets_cleanrl,
        "numpy, float32": targets_numpy,
        "layer_norm": targets_layer_norm,
    },
    "reverse_scan": {"padded": scan_padded, "recursive": scan_recursive, "a triangle in float32": scan_matrix},
}

WRONG = {
    "advantages_from_q": [
        ("V is not the plain mean of Q", lambda q, p: q - q.mean(1)[:, None]),
        ("V is not the best Q", lambda q, p: q - q.max(1, keepdim=True).values),
        ("The sum runs over the states", advantages_einsum, ("sa,sa->s", "sa,sa->a"), ("v.unsqueeze(-1)", "v")),
        ("The sign is wrong", advantages_einsum, ("q_values - v.unsqueeze(-1)", "v.unsqueeze(-1) - q_values")),
        ("V is one number per state: sum", lambda q, p: q * (1 - p)),
        ("It averages over the states too", advantages_einsum, ("v.unsqueeze(-1)", "v.mean()")),
        ("V is one sum over everything", advantages_einsum, ("sa,sa->s", "sa,sa->"), ("v.unsqueeze(-1)", "v")),
        ("The products are averaged", lambda q, p: q - (p * q).mean(1, True)),
        ("This weighs the advantages by the probabilities", lambda q, p: p * advantages_einsum(q, p)),
        (None, lambda q, p: q - (p.square() * q).sum(1, True)),
    ],
    "n_step_advantages": [
        (
            "The sum crosses the end",
            n_step_from_errors,
            ("+ gamma * alive * F.pad", "+ gamma * F.pad"),
            ("gamma * following * alive", "gamma * following"),
        ),
        (
            "It bootstraps from V after the episode ended",
            n_step_from_errors,
            ("gamma * following * alive", "gamma * following"),
        ),
        ("Off by one: it adds up n + 1 rewards", n_step_from_errors, ("range(n - 1)", "range(n)")),
        (
            "beyond the row's end is discounted with gamma^n",
            n_step_hands_on,
            ("G += gamma ** (k - t) * float(values", "G += gamma ** n * float(values"),
        ),
        ("It never bootstraps", n_step_hands_on, ("float(values[i, k] if k < T else last_values[i])", "0.0")),
        ("The last state's value is missing", n_step_hands_on, ("else last_values[i]", "else 0.0")),
        ("The value is not discounted", n_step_hands_on, ("G += gamma ** (k - t) * float(values", "G += float(values")),
        (
            "The value is discounted once",
            n_step_hands_on,
            ("G += gamma ** (k - t) * float(values", "G += gamma * float(values"),
        ),
        ("The rewards are not discounted", n_step_hands_on, ("gamma ** (k - t) * float(rewards", "float(rewards")),
        ("V(S_t) is missing", n_step_hands_on, ("G - values[i, t]", "G")),
        ("It adds up to the end", n_step_hands_on, ("k - t == n or ", "")),
        ("Where fewer than n steps are left in the row it gives 0", n_step_hands_on, ("range(T)", "range(T - n + 1)")),
        (
            "The sum is cut a step late",
            n_step_from_errors,
            ("+ gamma * alive * F.pad", "+ gamma * F.pad(alive[:, 1:], (0, 1), value=1.0) * F.pad"),
        ),
        (
            "The end is noticed a step late",
            n_step_hands_on,
            ("if ends[i, k - 1]:", "if k - 2 >= t and ends[i, k - 2]:"),
        ),
        (None, n_step_hands_on, ("G - values[i, t]", "G - gamma * values[i, t]")),
    ],
    "gae": [
        ("The last step bootstraps from V", gae_cleanrl, ("nextvalues * nextnonterminal", "nextvalues")),
        ("The sum crosses the end", gae_cleanrl, ("lam * nextnonterminal * lastgaelam", "lam * lastgaelam")),
        (
            "The sum is cut a step late",
            gae_hands_on,
            ("advantage = gamma * lam * advantage * (~end) + delta", "advantage = gamma * lam * advantage + delta"),
            (
                "advantage_list.append(advantage)",
                "advantage_list.append(advantage)\n        advantage = advantage * (~end)",
            ),
        ),
        (
            "The sum is cut a step early",
            gae_arena,
            ("lam * (1.0 - terminated[:, s])", "lam * (1.0 - F.pad(terminated, (1, 0))[:, s])"),
        ),
        (
            "(torch.roll goes round)",
            gae_arena,
            ("torch.cat([values[:, 1:], last_values[:, None]], dim=1)", "values.roll(-1, 1)"),
        ),
        ("the row's own last value", gae_arena, ("last_values[:, None]", "values[:, -1:]")),
        ("last_values are never used", gae_arena, ("last_values[:, None]", "0 * last_values[:, None]")),
        (
            "The values are not shifted",
            gae_arena,
            ("torch.cat([values[:, 1:], last_values[:, None]], dim=1)", "values"),
        ),
        ("done and next_done are swapped", gae_cleanrl, ("1.0 - ends[:, t]", "1.0 - F.pad(ends, (1, 0))[:, t]")),
        ("lam is missing", gae_cleanrl, ("gamma * lam * nextnonterminal", "gamma * nextnonterminal")),
        ("gamma is missing in the recursion", gae_cleanrl, ("gamma * lam * nextnonterminal", "lam * nextnonterminal")),
        ("These are the TD errors", gae_cleanrl, (" + gamma * lam * nextnonterminal * lastgaelam", "")),
        (
            "It sums forwards in time",
            gae_hands_on,
            ("td_delta.T.flip(0), ends.T.flip(0)", "td_delta.T, ends.T"),
            ("    advantage_list.reverse()\n", ""),
        ),
        ("The result runs backwards", gae_hands_on, ("    advantage_list.reverse()\n", "")),
        ("These are the value targets", gae_cleanrl, ("return advantages", "return advantages + values")),
        (
            "The sign of delta is wrong",
            gae_arena,
            (
                "rewards + gamma * next_values * (1.0 - terminated) - values",
                "values - rewards - gamma * next_values * (1.0 - terminated)",
            ),
        ),
        (
            "It returns 2 results, not one tensor",
            gae_cleanrl,
            ("return advantages", "return advantages, advantages + values"),
        ),
        (None, gae_cleanrl, ("gamma * lam * nextnonterminal", "gamma * lam**2 * nextnonterminal")),
    ],
    "gae_with_truncation": [
        (
            "A truncation is treated as a termination",
            clock_stable_baselines,
            (" + gamma * final_values * truncated", ""),
        ),
        ("A truncation is treated as a termination", clock_spinning_up, ("if terminal:", "if terminal or timeout:")),
        (
            "A termination is treated as a truncation",
            clock_stable_baselines,
            ("final_values * truncated", "final_values * (terminated | truncated)"),
        ),
        (
            "terminated and truncated are swapped",
            clock_hands_on,
            ("next_values[truncated] = final_values[truncated]", "next_values[terminated] = final_values[terminated]"),
            ("(1 - terminated.int()) - values", "(1 - truncated.int()) - values"),
        ),
        (
            "After a truncation it bootstraps from the reset observation",
            clock_cleanrl,
            ("torch.where(truncated[:, t], final_values[:, t], nextvalues)", "nextvalues"),
        ),
        (
            "After a truncation it bootstraps from values[:, t]",
            clock_hands_on,
            ("= final_values[truncated]", "= values[truncated]"),
        ),
        (
            "The chain is not cut at a truncation",
            clock_cleanrl,
            ("(1.0 - dones[:, t])", "(1.0 - terminated[:, t].float())"),
        ),
        (
            "The chain is not cut at a termination",
            clock_hands_on,
            ("1 - terminated.int() - truncated", "1 - truncated"),
        ),
        ("The chain is not cut: delta is right", clock_cleanrl, (" * (1.0 - dones[:, t])", "")),
        (
            "The truncations are ignored",
            clock_stable_baselines,
            (" + gamma * final_values * truncated", ""),
            ("(terminated | truncated)", "terminated"),
        ),
        (
            "V of the last observation is added to the reward, but the row goes on",
            clock_stable_baselines,
            ("(terminated | truncated)", "terminated"),
        ),
        (
            "The ends are never used",
            clock_cleanrl,
            ("torch.where(truncated[:, t], final_values[:, t], nextvalues)", "nextvalues"),
            (" * (1.0 - terminated[:, t].float())", ""),
            (" * (1.0 - dones[:, t])", ""),
        ),
        (
            "V of the last observation is not discounted",
            clock_stable_baselines,
            ("gamma * final_values", "final_values"),
        ),
        ("last_values are never used", clock_spinning_up, ("last_values[i].item()", "0.0")),
        (
            "The last column bootstraps from last_values even where",
            clock_spinning_up,
            ("if timeout:", "if timeout and not epoch_ended:"),
            ("if terminal:", "if terminal and not epoch_ended:"),
        ),
        ("These are the value targets", clock_cleanrl, ("return advantages", "return advantages + values")),
        (None, clock_hands_on, ("= final_values[truncated]", "= rewards[truncated]")),
        (None, clock_spinning_up, ("if terminal:", "if terminal and path_start:")),
    ],
    "advantages_and_targets": [
        (
            "The value targets are made from whitened advantages",
            targets_cleanrl,
            ("    returns = advantages + values\n", ""),
            ("    return advantages, returns", "    return advantages, advantages + values"),
        ),
        ("The variance divides by n - 1", targets_cleanrl, ("std(unbiased=False)", "std()")),
        (
            "The two results are in the wrong order",
            targets_cleanrl,
            ("return advantages, returns", "return returns, advantages"),
        ),
        ("The advantages are not whitened", lambda a, v: (a, a + v)),
        ("Every row is whitened by itself", targets_layer_norm, ("advantages.shape, eps", "advantages.shape[1:], eps")),
        ("The targets are whitened as well", lambda a, v: (targets_cleanrl(a, v)[0], targets_cleanrl(a + v, v)[0])),
        (
            "The value targets are A - V",
            targets_cleanrl,
            ("returns = advantages + values", "returns = advantages - values"),
        ),
        ("The targets are the values alone", targets_cleanrl, ("returns = advantages + values", "returns = values")),
        ("It divides by the variance", targets_cleanrl, ("std(unbiased=False)", "var(unbiased=False)")),
        (None, targets_cleanrl, ("returns = advantages + values", "returns = 2 * advantages + values")),
    ],
    "reverse_scan": [
        ("The decays are not joined", scan_padded, ("        d = d * F.pad(d[:, shift:], (0, shift))\n", "")),
        ("It stops after one round", scan_padded, ("        shift *= 2", "        break")),
        ("The reach grows by one", scan_padded, ("shift *= 2", "shift += 1")),
        ("It runs forwards in time", lambda x, d: scan_padded(x.flip(1), d.flip(1)).flip(1)),
        ("The decays are not used", lambda x, d: torch.flip(torch.cumsum(torch.flip(x, [1]), 1), [1])),
        ("The decay is the next column's", lambda x, d: scan_padded(x, torch.cat([d[:, 1:], d[:, -1:]], 1))),
        ("no loop over the time steps", lambda x, d: _loop(x, d)),
        ("NaN where a number is expected", lambda x, d: _by_division(x, d)),
        (None, scan_padded, ("shift = 1", "shift = 2")),
    ],
}


def _loop(x, decays):
    columns = [x[:, -1]]
    for t in reversed(range(x.shape[1] - 1)):
        columns.insert(0, x[:, t] + decays[:, t] * columns[0])
    return torch.stack(columns, 1)


def _by_division(x, decays):
    before = torch.cat([torch.ones_like(decays[:, :1]), decays[:, :-1].cumprod(1)], 1)
    return (x * before).flip(1).cumsum(1).flip(1) / before
