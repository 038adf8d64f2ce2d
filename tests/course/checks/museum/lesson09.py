"""Wrong answers of lesson 09; test_museum.py says how to read them."""

import torch
from minirlhf_course.checks import lesson09

from minirlhf.returns import gae, whiten


def answer_mask(tokens, eos_id):
    seen = torch.zeros(len(tokens), dtype=torch.bool)
    columns = []
    for t in range(tokens.shape[1]):
        columns.append(~seen)
        seen = seen | (tokens[:, t] == eos_id)
    return torch.stack(columns, 1)


def token_rewards(scores, logprobs, ref_logprobs, response_mask, beta):
    rewards = torch.where(response_mask, -beta * (logprobs - ref_logprobs), 0.0).detach()
    at = response_mask.sum(1) - 1
    rewards[torch.arange(len(scores)), at] += scores
    return rewards


def kl_estimates(logprobs, ref_logprobs):
    d = logprobs - ref_logprobs
    return d, 0.5 * d * d, torch.expm1(-d) + d


def experience(scores, logprobs, ref_logprobs, values, response_mask, beta, lam):
    rewards = lesson09.token_rewards.reference(scores, logprobs, ref_logprobs, response_mask, beta)
    ends = torch.zeros_like(response_mask)
    ends[torch.arange(len(scores)), response_mask.sum(1) - 1] = True
    advantages, returns = gae(rewards, values, ends, gamma=1.0, lam=lam, mask=response_mask)
    return whiten(advantages, response_mask), returns


def reward_minus_value(scores, logprobs, ref_logprobs, values, response_mask, beta, lam):
    rewards = lesson09.token_rewards.reference(scores, logprobs, ref_logprobs, response_mask, beta)
    advantages = (rewards - values) * response_mask
    return whiten(advantages, response_mask), (advantages + values) * response_mask


WRONG = {
    "answer_mask": [
        (17, "A mask of all ones", lambda tokens, eos_id: torch.ones_like(tokens, dtype=torch.bool)),
        ("-", "EOS is left out", answer_mask,
         ("        columns.append(~seen)\n", ""), ("== eos_id)\n", "== eos_id)\n        columns.append(~seen)\n")),
        ("-", "Without EOS argmax gives 0", lambda tokens, eos_id: (
            torch.arange(tokens.shape[1]) <= (tokens == eos_id).int().argmax(1)[:, None])),
    ],
    "token_rewards": [
        (8, "The KL of padding leaks into the rewards", token_rewards,
         ("torch.where(response_mask, -beta * (logprobs - ref_logprobs), 0.0)", "(-beta * (logprobs - ref_logprobs))")),
        (9, "The KL is averaged over the answer", token_rewards,
         ("0.0).detach()", "0.0).detach() / response_mask.sum(-1, keepdim=True)")),
        (10, "The reward is stored a step early", token_rewards,
         ("response_mask.sum(1) - 1", "(response_mask.sum(1) - 2).clamp(min=0)")),
        ("-", "The KL is charged twice", token_rewards, ("+= scores", "+= scores + rewards.sum(1)")),
        ("-", "The score lands in the padding", token_rewards, ("[torch.arange(len(scores)), at]", "[:, -1]")),
    ],
    "kl_estimates": [
        (2, "The KL is detached from the graph", kl_estimates, ("def", "@torch.no_grad()\ndef")),
        (13, "The digits cancel", kl_estimates, ("torch.expm1(-d)", "(torch.exp(-d) - 1)")),
        (14, "The third is k1 again", kl_estimates, ("torch.expm1(-d) + d", "d")),
    ],
    "experience": [
        (1, "The value targets are made from whitened advantages", experience,
         ("    return whiten(advantages, response_mask), returns",
          "    advantages = whiten(advantages, response_mask)\n"
          "    return advantages, (advantages + values) * response_mask")),
        ("-", "The KL is charged twice", experience,
         ("    rewards =",
          "    scores = scores - beta * ((logprobs - ref_logprobs) * response_mask).sum(1)\n    rewards =")),
        (7, "This is r - V", reward_minus_value),
        ("-", "Values of padding are in the returns", experience, ("mask), returns", "mask), advantages + values")),
        ("-", "gamma is 1 here", experience, ("gamma=1.0", "gamma=0.99")),
    ],
    "ppo_ptx_loss": [
        ("-", "PPO's share is scaled by 1 - ptx_coef", lambda ppo_loss, corpus_logprobs, ptx_coef: (
            (1 - ptx_coef) * ppo_loss - ptx_coef * corpus_logprobs.mean())),
        (6, "The sign is wrong", lambda ppo_loss, corpus_logprobs, ptx_coef: (
            ppo_loss + ptx_coef * corpus_logprobs.mean())),
    ],
}  # fmt: skip
