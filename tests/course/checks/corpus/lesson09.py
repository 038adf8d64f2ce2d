"""Answers to lesson 09 in other hands; test_corpus.py says how to read them."""

import torch
import torch.nn.functional as F

from minirlhf.returns import gae, whiten

# 9.1 answer_mask -----------------------------------------------------------------------------------------------------


def answer_by_first_true(tokens, eos_id):  # trl: first_true_indices, whose answer is the row's length where none is
    row_len = tokens.size(-1)
    zero_or_index = row_len * (tokens != eos_id).long() + torch.arange(row_len)
    first = zero_or_index.min(dim=-1, keepdim=True).values.clamp(max=row_len)
    return torch.arange(row_len) <= first


def answer_by_argmax(tokens, eos_id):  # OpenRLHF: argmax, with a guard
    eos = tokens.eq(eos_id)
    last = torch.where(eos.any(1), eos.float().argmax(1), tokens.size(1) - 1)
    return torch.arange(tokens.size(1))[None, :] <= last[:, None]


def answer_by_loop(tokens, eos_id):
    mask = torch.ones_like(tokens, dtype=torch.bool)
    for row, sequence in enumerate(tokens.tolist()):
        if eos_id in sequence:
            mask[row, sequence.index(eos_id) + 1 :] = False
    return mask


def answer_by_cumprod(tokens, eos_id):
    alive = (tokens != eos_id).long().cumprod(dim=1)
    return torch.cat((torch.ones_like(alive[:, :1]), alive[:, :-1]), dim=1).bool()


def answer_of_first_row(tokens, eos_id):
    sequence = tokens[0].tolist()
    end = sequence.index(eos_id) if eos_id in sequence else len(sequence)
    return (torch.arange(tokens.shape[1]) <= end).expand(tokens.shape)


def answer_and_one_more(tokens, eos_id):
    first = torch.where((tokens == eos_id).any(1), (tokens == eos_id).int().argmax(1), tokens.shape[1])
    return torch.arange(tokens.shape[1]) <= first[:, None] + 1


# 9.2 token_rewards ---------------------------------------------------------------------------------------------------


def rewards_by_actual_end(scores, logprobs, ref_logprobs, response_mask, beta):  # trl, with masked_fill
    kl = (logprobs - ref_logprobs).masked_fill(~response_mask, 0.0).detach()
    rewards = -beta * kl
    actual_start = torch.arange(rewards.size(0))
    actual_end = response_mask.sum(1) - 1
    rewards[actual_start, actual_end] += scores
    return rewards


@torch.no_grad()
def rewards_by_scatter(scores, logprobs, ref_logprobs, response_mask, beta):  # OpenRLHF's compute_reward
    kl = torch.where(response_mask, logprobs - ref_logprobs, torch.zeros(()))
    eos_indices = response_mask.size(1) - 1 - response_mask.long().fliplr().argmax(dim=1, keepdim=True)
    last_reward = torch.zeros_like(kl).scatter_(dim=1, index=eos_indices, src=scores.unsqueeze(1).to(kl.dtype))
    return last_reward + -beta * kl


def rewards_row_by_row(scores, logprobs, ref_logprobs, response_mask, beta):  # lm-human-preferences, one answer each
    rows = []
    for score, new, ref, mask in zip(scores, logprobs.detach(), ref_logprobs, response_mask, strict=True):
        length = int(mask.sum())
        row = torch.zeros_like(new)
        row[:length] = -beta * (new[:length] - ref[:length])
        row[length - 1] += score
        rows.append(row)
    return torch.stack(rows)


def log_ratio(logprobs, ref_logprobs, response_mask):
    return torch.where(response_mask, logprobs - ref_logprobs, 0.0).detach()


def paid(per_token, scores, response_mask):
    per_token = per_token.clone()
    per_token[torch.arange(len(scores)), response_mask.sum(1) - 1] += scores
    return per_token


def rewards_with(change, score=lambda scores, mask: scores):
    """As rewards_by_actual_end, with `change(beta, d, mask)` in the place of -beta d."""

    def rewards(scores, logprobs, ref_logprobs, response_mask, beta):
        d = log_ratio(logprobs, ref_logprobs, response_mask)
        per_token = torch.where(response_mask, change(beta, d, response_mask), 0.0)
        return paid(per_token, score(scores, response_mask), response_mask)

    return rewards


def rewards_whitened(shift_mean):
    def rewards(*args):
        r, mask = rewards_by_actual_end(*args), args[3]
        mean = r[mask].mean()
        white = (r - mean) * torch.rsqrt(r[mask].var(correction=0) + 1e-8)
        return torch.where(mask, white if shift_mean else white + mean, 0.0)

    return rewards


def rewards_of_last_kl(scores, logprobs, ref_logprobs, response_mask, beta):
    d = log_ratio(logprobs, ref_logprobs, response_mask)
    last = F.one_hot(response_mask.sum(1) - 1, d.shape[1]).to(d.dtype)
    return (scores[:, None] - beta * d) * last


def rewards_of_summed_kl(scores, logprobs, ref_logprobs, response_mask, beta):
    d = log_ratio(logprobs, ref_logprobs, response_mask)
    last = F.one_hot(response_mask.sum(1) - 1, d.shape[1]).to(d.dtype)
    return (scores - beta * d.sum(1))[:, None] * last


def rewards_spread(scores, logprobs, ref_logprobs, response_mask, beta):
    d = log_ratio(logprobs, ref_logprobs, response_mask)
    return torch.where(response_mask, scores[:, None] / response_mask.sum(1, keepdim=True) - beta * d, 0.0)


# 9.3 experience ------------------------------------------------------------------------------------------------------


def masked_whiten(x, mask, correction=0):
    mean = x[mask].mean()
    return torch.where(mask, (x - mean) * torch.rsqrt(x[mask].var(correction=correction) + 1e-8), 0.0)


def experience_by_trl(scores, logprobs, ref_logprobs, values, response_mask, beta, lam):  # but for var's divisor
    values = torch.masked_fill(values, ~response_mask, 0)
    rewards = rewards_by_actual_end(scores, logprobs, ref_logprobs, response_mask, beta)
    lastgaelam, reversed_advantages, gen_length = 0, [], values.shape[1]
    for t in reversed(range(gen_length)):
        nextvalues = values[:, t + 1] if t < gen_length - 1 else 0.0
        delta = rewards[:, t] + nextvalues - values[:, t]
        lastgaelam = delta + lam * lastgaelam
        reversed_advantages.append(lastgaelam)
    advantages = torch.stack(reversed_advantages[::-1], axis=1)
    returns = advantages + values
    return masked_whiten(advantages, response_mask), torch.where(response_mask, returns, 0.0)


def experience_row_by_row(scores, logprobs, ref_logprobs, values, response_mask, beta, lam):
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    rewards = rewards_by_scatter(scores, logprobs, ref_logprobs, response_mask, beta)
    for b, length in enumerate(response_mask.sum(1).tolist()):
        last = 0.0
        for t in range(length - 1, -1, -1):
            following = values[b, t + 1] if t + 1 < length else 0.0
            last = rewards[b, t] + following - values[b, t] + lam * last
            advantages[b, t], returns[b, t] = last, last + values[b, t]
    kept = advantages[response_mask]
    white = (advantages - kept.mean()) / (kept.std(correction=0) + 1e-8)
    return white * response_mask, returns


def raw_experience(scores, logprobs, ref_logprobs, values, response_mask, beta, lam, change=None):
    rewards = rewards_by_actual_end(scores, logprobs, ref_logprobs, response_mask, beta)
    if change is not None:
        rewards = change(rewards, response_mask)
    ends = torch.zeros_like(response_mask)
    ends[torch.arange(len(scores)), response_mask.sum(1) - 1] = True
    return gae(rewards, values, ends, gamma=1.0, lam=lam, mask=response_mask)


def experience_by_package(*args):  # OpenRLHF's order: rewards, advantages and returns, then one normalisation
    advantages, returns = raw_experience(*args)
    return whiten(advantages, args[4]), returns


def experience_with(after, change=None):
    """`after(advantages, returns, values, mask)` of the raw ones; `change` of the rewards, before them."""

    def experience(*args):
        advantages, returns = raw_experience(*args, change=change)
        return after(advantages, returns, args[3], args[4])

    return experience


def whiten_each_row(advantages, returns, values, mask):
    rows = []
    for x, keep in zip(advantages, mask, strict=True):
        kept = x[keep]
        rows.append(torch.where(keep, (x - kept.mean()) / (kept.std(correction=0) + 1e-8), 0.0))
    return torch.stack(rows), returns


def rewards_to_go(advantages, returns, values, mask):
    return advantages, returns


def experience_of_monte_carlo_returns(scores, logprobs, ref_logprobs, values, response_mask, beta, lam):
    rewards = rewards_by_actual_end(scores, logprobs, ref_logprobs, response_mask, beta)
    advantages, _ = raw_experience(scores, logprobs, ref_logprobs, values, response_mask, beta, lam)
    to_go = rewards.flip(1).cumsum(1).flip(1) * response_mask
    return masked_whiten(advantages, response_mask), to_go


# 9.4 kl_estimates ----------------------------------------------------------------------------------------------------


def estimates_in_double(logprobs, ref_logprobs):
    log_ratio = logprobs.double() - ref_logprobs.double()
    k3 = (-log_ratio).exp() - 1 + log_ratio
    return tuple(k.to(logprobs.dtype) for k in (log_ratio, log_ratio**2 / 2, k3))


def estimates_by_trl(logprobs, ref_logprobs):  # GRPO's per_token_kl, with expm1
    other_way = ref_logprobs - logprobs
    return -other_way, 0.5 * other_way.pow(2), torch.expm1(other_way) - other_way


def estimates_as_list(logprobs, ref_logprobs):  # OpenRLHF's compute_approx_kl, one name after the other
    found = []
    for kl_estimator in ("k1", "k2", "k3"):
        log_ratio = (
            logprobs.float() - ref_logprobs.float() if logprobs.dtype == torch.float32 else (logprobs - ref_logprobs)
        )
        if kl_estimator == "k2":
            log_ratio = log_ratio**2 / 2.0
        if kl_estimator == "k3":
            log_ratio = -log_ratio
            log_ratio = log_ratio.expm1() - log_ratio
        found.append(log_ratio)
    return tuple(found)  # fmt: skip


def estimates_with(change):
    def estimates(logprobs, ref_logprobs):
        d = logprobs - ref_logprobs
        return change(d, d.square() / 2, torch.expm1(-d) + d)

    return estimates


def estimates_clamped(logprobs, ref_logprobs):  # OpenRLHF
    d = (logprobs - ref_logprobs).clamp(-10, 10)
    return d, d**2 / 2, torch.expm1(-d) + d


# 9.5 ppo_ptx_loss ----------------------------------------------------------------------------------------------------


def ptx_by_openrlhf(ppo_loss, corpus_logprobs, ptx_coef):
    ptx_loss = -corpus_logprobs.flatten().mean()
    return ppo_loss + ptx_loss * ptx_coef


def ptx_token_by_token(ppo_loss, corpus_logprobs, ptx_coef):
    nll = sum(-row.sum() for row in corpus_logprobs) / corpus_logprobs.numel()
    return torch.stack((ppo_loss, ptx_coef * nll)).sum()


RIGHT = {
    "answer_mask": {
        "trl": answer_by_first_true,
        "OpenRLHF": answer_by_argmax,
        "loop": answer_by_loop,
        "cumprod": answer_by_cumprod,
        "integers": lambda tokens, eos_id: ((tokens == eos_id).cumsum(1) - (tokens == eos_id).long()).eq(0).int(),
    },
    "token_rewards": {
        "trl": rewards_by_actual_end,
        "OpenRLHF": rewards_by_scatter,
        "lm-human-preferences": rewards_row_by_row,
        "one-hot": lambda scores, logprobs, ref_logprobs, response_mask, beta: (
            -beta * log_ratio(logprobs, ref_logprobs, response_mask)
            + scores[:, None] * F.one_hot(response_mask.sum(1) - 1, response_mask.shape[1])
        ),
    },
    "experience": {
        "trl": experience_by_trl,
        "row by row": experience_row_by_row,
        "OpenRLHF": experience_by_package,
    },
    "kl_estimates": {
        "trl": estimates_by_trl,
        "OpenRLHF": estimates_as_list,
        "in double": estimates_in_double,
        "a list": lambda logprobs, ref_logprobs: list(estimates_by_trl(logprobs, ref_logprobs)),
    },
    "ppo_ptx_loss": {
        "OpenRLHF": ptx_by_openrlhf,
        "token by token": ptx_token_by_token,
        "the mean of rows of one length": lambda ppo_loss, corpus_logprobs, ptx_coef: (
            ppo_loss - ptx_coef * corpus_logprobs.mean(dim=1).mean()
        ),
        "alpha": lambda ppo_loss, corpus_logprobs, ptx_coef: ppo_loss.add(corpus_logprobs.mean(), alpha=-ptx_coef),
    },
}

WRONG = {
    "answer_mask": [
        ("It is the wrong way round", lambda tokens, eos_id: ~answer_by_loop(tokens, eos_id)),
        ("All rows are cut where the first one ends", answer_of_first_row),
        ("One token too many", answer_and_one_more),
        ("This is EOS alone", lambda tokens, eos_id: tokens == eos_id),
        ("It goes up to the last EOS", lambda tokens, eos_id: (
            (tokens == eos_id).flip(1).cumsum(1).flip(1).gt(0) | ~(tokens == eos_id).any(1, keepdim=True))),
        ("It leaves out EOS and counts", lambda tokens, eos_id: tokens != eos_id),
        ("An answer without EOS", lambda tokens, eos_id: (
            answer_by_loop(tokens, eos_id) & (tokens == eos_id).any(1, keepdim=True))),
        ("It looks for padding", lambda tokens, eos_id: tokens > 0),
        ("EOS is left out", lambda tokens, eos_id: (tokens != eos_id).cumprod(1).bool()),
        ("It goes on after EOS, until the second", lambda tokens, eos_id: (tokens == eos_id).cumsum(1) < 2),
        ("It looks for padding", lambda tokens, eos_id: (tokens != 0) | (tokens == eos_id)),
        (None, lambda tokens, eos_id: torch.zeros_like(tokens)),
    ],
    "token_rewards": [
        ("The rewards are whitened", rewards_whitened(shift_mean=False)),
        ("The rewards are whitened", rewards_whitened(shift_mean=True)),
        ("Only the last token's KL is charged", rewards_of_last_kl),
        ("The whole answer's KL is charged at the last token", rewards_of_summed_kl),
        ("This charges k2", rewards_with(lambda beta, d, mask: -beta * d.square() / 2)),
        ("This charges k3", rewards_with(lambda beta, d, mask: -beta * ((-d).exp() - 1 + d))),
        ("The log-ratio is clamped at 0", rewards_with(lambda beta, d, mask: -beta * d.clamp(min=0))),
        ("This charges |d|", rewards_with(lambda beta, d, mask: -beta * d.abs())),
        ("This charges the ratio", rewards_with(lambda beta, d, mask: -beta * d.expm1())),
        ("The score is spread over the answer", rewards_spread),
        ("The score is divided by the answer's length", rewards_with(
            lambda beta, d, mask: -beta * d, lambda scores, mask: scores / mask.sum(1))),
        ("beta stands before the score, too", lambda scores, logprobs, ref_logprobs, response_mask, beta: (
            rewards_by_scatter(beta * scores, logprobs, ref_logprobs, response_mask, beta))),
        ("The score is missing", rewards_with(
            lambda beta, d, mask: -beta * d, lambda scores, mask: torch.zeros_like(scores))),
        (None, rewards_with(
            lambda beta, d, mask: -beta * d, lambda scores, mask: scores.clamp(-1, 1))),
        ("A gradient flows", lambda scores, logprobs, ref_logprobs, response_mask, beta: paid(
            torch.where(response_mask, -beta * (logprobs - ref_logprobs), 0.0), scores, response_mask)),
        ("The score has the wrong sign", lambda scores, *others: rewards_by_scatter(-scores, *others)),
        ("These are rewards to go", lambda *args: (
            torch.where(args[3], rewards_by_scatter(*args).flip(1).cumsum(1).flip(1), 0.0))),
        ("The KL is never charged", lambda scores, logprobs, ref_logprobs, response_mask, beta: (
            rewards_by_scatter(scores, ref_logprobs, ref_logprobs, response_mask, beta))),
        (None, lambda *args: torch.where(args[3], rewards_by_scatter(*args).cumsum(1), 0.0)),
    ],
    "experience": [
        ("Whitening divides by n - 1", experience_with(lambda a, r, v, mask: (masked_whiten(a, mask, 1), r))),
        ("Each answer is whitened by itself", experience_with(whiten_each_row)),
        ("The mean is put back", experience_with(lambda a, r, v, mask: (whiten(a, mask, shift_mean=False), r))),
        ("The mean is taken off, and the scale is left", experience_with(
            lambda a, r, v, mask: (torch.where(mask, a - a[mask].mean(), 0.0), r))),
        ("The rewards are whitened", experience_with(
            lambda a, r, v, mask: (whiten(a, mask), r), lambda r, mask: whiten(r, mask, shift_mean=False))),
        ("The rewards are whitened", experience_with(
            lambda a, r, v, mask: (whiten(a, mask), r), lambda r, mask: whiten(r, mask))),
        ("The returns are whitened, too", experience_with(
            lambda a, r, v, mask: (whiten(a, mask), whiten(r, mask)))),
        ("Both results are right, but swapped", experience_with(lambda a, r, v, mask: (r, whiten(a, mask)))),
        ("The returns are sums of rewards", experience_of_monte_carlo_returns),
        ("The second result is the raw advantages", experience_with(lambda a, r, v, mask: (whiten(a, mask), a))),
        ("The values are taken off twice", experience_with(
            lambda a, r, v, mask: (whiten(a, mask), torch.where(mask, a - v, 0.0)))),
        ("The advantages are not whitened", experience_with(rewards_to_go)),
        ("These are one-step errors", lambda *args: experience_by_package(*args[:-1], 0.0)),
        ("The sign of the KL is wrong", lambda scores, logprobs, ref_logprobs, *others: (
            experience_by_package(scores, ref_logprobs, logprobs, *others))),
        ("Whitening averages over padding, and leaves numbers there", experience_with(
            lambda a, r, v, mask: (whiten(a), r))),
        (None, experience_with(lambda a, r, v, mask: (whiten(a, mask).clamp(-1, 1), r))),
    ],
    "kl_estimates": [
        ("All results are right, but in the wrong order", estimates_with(lambda k1, k2, k3: (k1, k3, k2))),
        ("The log-ratio is clamped", estimates_clamped),
        ("k1 is clamped at 0", estimates_with(lambda k1, k2, k3: (k1.clamp(min=0), k2, k3))),
        ("k2 is not squared", estimates_with(lambda k1, k2, k3: (k1, k1 / 2, k3))),
        ("k3 lacks the + d", estimates_with(lambda k1, k2, k3: (k1, k2, k3 - k1))),
        ("k3 has the wrong sign before d", estimates_with(lambda k1, k2, k3: (k1, k2, k3 - 2 * k1))),
        ("k1 is multiplied by the ratio", estimates_with(lambda k1, k2, k3: (k1.exp() * k1, k2, k3))),
        ("k1 has the wrong sign", estimates_with(lambda k1, k2, k3: (-k1, k2, k3))),
        ("Result 1 of 3 has the shape", estimates_with(lambda k1, k2, k3: (k1.mean(), k2.mean(), k3.mean()))),
        ("The digits cancel", estimates_with(lambda k1, k2, k3: (k1, k2, torch.exp(-k1) - 1 + k1))),
        ("k1 is multiplied by the probability", lambda logprobs, ref_logprobs: (
            logprobs.exp() * (logprobs - ref_logprobs), *estimates_by_trl(logprobs, ref_logprobs)[1:])),
        ("It returns 2 results", lambda logprobs, ref_logprobs: estimates_by_trl(logprobs, ref_logprobs)[:2]),
        ("No gradient flows", estimates_with(lambda k1, k2, k3: (k1, k2, k3.detach()))),
        (None, estimates_with(lambda k1, k2, k3: (k1, k1.abs() / 2, k3))),
    ],
    "ppo_ptx_loss": [
        ("It divides by the rows only", lambda ppo_loss, corpus_logprobs, ptx_coef: (
            ppo_loss - ptx_coef * corpus_logprobs.sum(1).mean())),
        ("This adds the perplexity", lambda ppo_loss, corpus_logprobs, ptx_coef: (
            ppo_loss + ptx_coef * (-corpus_logprobs.mean()).exp())),
        ("No gradient flows from the result into `ppo_loss`", lambda ppo_loss, corpus_logprobs, ptx_coef: (
            ppo_loss.detach() - ptx_coef * corpus_logprobs.mean())),
        ("The sum is divided by 1 + ptx_coef", lambda ppo_loss, corpus_logprobs, ptx_coef: (
            (ppo_loss - ptx_coef * corpus_logprobs.mean()) / (1 + ptx_coef))),
        ("The sign of the whole is wrong", lambda ppo_loss, corpus_logprobs, ptx_coef: (
            -ppo_loss + ptx_coef * corpus_logprobs.mean())),
        ("The sign of PPO's loss is wrong", lambda ppo_loss, corpus_logprobs, ptx_coef: (
            -ppo_loss - ptx_coef * corpus_logprobs.mean())),
        ("The result has the shape", lambda ppo_loss, corpus_logprobs, ptx_coef: (
            ppo_loss - ptx_coef * corpus_logprobs)),
        ("It returns 2 results", lambda ppo_loss, corpus_logprobs, ptx_coef: (
            ppo_loss, -ptx_coef * corpus_logprobs.mean())),
        ("The two are multiplied", lambda ppo_loss, corpus_logprobs, ptx_coef: (
            ppo_loss * -ptx_coef * corpus_logprobs.mean())),
        (None, lambda ppo_loss, corpus_logprobs, ptx_coef: ppo_loss + ptx_coef * corpus_logprobs.square().mean()),
    ],
}  # fmt: skip
