"""Wrong answers of lesson 12; test_museum.py says how to read them."""

import torch

from minirlhf.language.models import response_logprobs


def leave_one_out(rewards):
    k = rewards.shape[-1]
    mean = rewards.mean(-1, keepdim=True)
    return (rewards - mean) * k / (k - 1)


def group_relative(rewards):
    mean, std = rewards.mean(-1, keepdim=True), rewards.std(-1, keepdim=True)
    return (rewards - mean) / (std + 1e-8)


def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, response_mask, beta):
    d = logprobs - ref_logprobs
    k3 = torch.expm1(-d) + d
    gain = torch.exp(logprobs - old_logprobs) * advantages.unsqueeze(-1)
    lengths = response_mask.sum(-1)
    policy = -(torch.where(response_mask, gain, 0.0).sum(-1) / lengths).mean()
    kl = (torch.where(response_mask, k3, 0.0).sum(-1) / lengths).mean()
    return policy + beta * kl


def rloo(policy, reference, batches, answers, reward, config):
    adam, means = torch.optim.Adam(policy.parameters(), config.lr), []
    for prompts in batches:
        asked = [prompts[row // config.group_size] for row in range(len(prompts) * config.group_size)]
        samples, texts = answers(policy, asked)
        scores = torch.tensor(reward(asked, texts))
        with torch.no_grad():
            ref = response_logprobs(reference, samples.tokens, samples.mask, samples.response_mask)
        rewards = scores - config.beta * (samples.logprobs - ref).sum(-1)
        advantages = leave_one_out(rewards.view(len(prompts), -1)).view(-1)
        logprobs = response_logprobs(policy, samples.tokens, samples.mask, samples.response_mask)
        adam.zero_grad()
        (-advantages * logprobs.sum(-1)).mean().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        adam.step()
        means.append(float(scores.mean()))
    return means


WRONG = {
    "leave_one_out": [
        ("-", "An answer's own reward is in its baseline", leave_one_out, (" * k / (k - 1)", "")),
        ("-", "The baseline is the mean of the whole batch", leave_one_out,
         ("rewards.mean(-1, keepdim=True)", "rewards.mean()"), (" * k / (k - 1)", "")),
    ],
    "rloo": [
        ("-", "An answer's own reward is in its baseline", rloo,
         ("leave_one_out(rewards.view(len(prompts), -1))",
          "(rewards.view(len(prompts), -1) - rewards.view(len(prompts), -1).mean(1, keepdim=True))")),
        ("-", "The reference moves along with the policy", rloo,
         ("        adam.step()\n",
          "        adam.step()\n        from copy import deepcopy\n        reference = deepcopy(policy)\n")),
        ("-", "The reference has changed", rloo,
         ("        adam.step()\n", "        adam.step()\n        reference.load_state_dict(policy.state_dict())\n")),
        (6, "The sign is flipped", rloo, ("(-advantages *", "(advantages *")),
        ("-", "The KL is averaged over the answer's tokens", rloo,
         ("ref).sum(-1)", "ref).sum(-1) / samples.lengths")),
        (9, "The KL is averaged over padding", rloo, ("ref).sum(-1)", "ref).mean(-1)")),
        ("-", "Each answer's log-probability is a mean over padding", rloo,
         ("logprobs.sum(-1)", "logprobs.mean(-1)")),
    ],
    "group_relative": [
        ("-", "0 / 0 is NaN", group_relative, ("(std + 1e-8)", "std")),
    ],
    "grpo_loss": [
        ("-", "The KL is summed over an answer where the rest is averaged", grpo_loss,
         ("k3, 0.0).sum(-1) / lengths)", "k3, 0.0).sum(-1))")),
        ("-", "Each answer is divided by the width of the table", grpo_loss,
         ("lengths = response_mask.sum(-1)", "lengths = response_mask.shape[-1]")),
        (2, "No gradient flows through the KL", grpo_loss, ("k3 =", "d = d.detach()\n    k3 =")),
        (14, "k3 is the wrong way round", grpo_loss, ("torch.expm1(-d) + d", "torch.expm1(d) - d")),
    ],
}  # fmt: skip
