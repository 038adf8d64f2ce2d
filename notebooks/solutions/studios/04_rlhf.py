"""The solution of the studio `rlhf`: one plain way to write it. Others are as right."""

import math

import torch
from minirlhf_course.studios.given import token_logits, token_values
from torch import nn

from minirlhf.language.tokenization import decode


def my_rlhf(policy, value_model, reference, reward, tokenizer, batches, config, *, sample, corpus, generator):
    policy_adam = torch.optim.Adam(policy.parameters(), config.lr, (0.9, 0.95), config.adam_eps)
    value_adam = torch.optim.Adam(value_model.parameters(), config.value_lr, (0.9, 0.95), config.adam_eps)
    beta = config.beta
    log = []

    def logprobs_of(model, tokens, mask, T):
        # What follows column t is said by the logits of column t: shifted by one.
        logprobs = (token_logits(model, tokens, mask)[:, -T - 1 : -1] / config.temperature).log_softmax(-1)
        return logprobs.gather(-1, tokens[:, -T:, None]).squeeze(-1)  # [B, T]

    def values_of(tokens, mask, T):
        return token_values(value_model, tokens, mask)[:, -T - 1 : -1]  # before each token of the answer

    for texts in batches:
        # Sample, score.
        samples = sample(policy, texts)
        counts, old_logprobs = samples.response_mask, samples.logprobs
        B, T = counts.shape
        scores = torch.as_tensor(reward(texts, decode(tokenizer, samples.responses()))).float()
        scores = scores - config.missing_eos_penalty * (~samples.ended).float()

        # Charge the KL token by token; the score is paid at the last token.
        with torch.no_grad():
            ref_logprobs = logprobs_of(reference, samples.tokens, samples.mask, T)
            old_values = torch.where(counts, values_of(samples.tokens, samples.mask, T), 0.0)
        d = torch.where(counts, old_logprobs - ref_logprobs, 0.0)
        rewards = -beta * d
        rewards[torch.arange(B), samples.lengths - 1] += scores

        # GAE. After the last token V is 0, and nothing comes back from the padding, where all is 0.
        advantages = torch.zeros_like(rewards)
        following, v_after = torch.zeros(B), torch.zeros(B)
        for t in reversed(range(T)):
            delta = rewards[:, t] + config.gamma * v_after - old_values[:, t]
            following = torch.where(counts[:, t], delta + config.gamma * config.lam * following, 0.0)
            advantages[:, t], v_after = following, old_values[:, t]
        returns = advantages + old_values  # of the raw advantages
        if config.whiten_advantages:
            mean, std = advantages[counts].mean(), advantages[counts].std(correction=0)
            advantages = (advantages - mean) / (std + 1e-8)

        first = None
        for _ in range(config.epochs):
            order = torch.randperm(B, generator=generator)
            for rows in order.tensor_split(math.ceil(B / config.minibatch_size)):
                tokens, mask, keep = samples.tokens[rows], samples.mask[rows], counts[rows]
                A, R, old_v = advantages[rows][keep], returns[rows][keep], old_values[rows][keep]

                # The clipped objective, over the tokens that count.
                ratio = (logprobs_of(policy, tokens, mask, T)[keep] - old_logprobs[rows][keep]).exp()
                clipped = ratio.clamp(1 - config.clip_range, 1 + config.clip_range)
                policy_loss = -torch.minimum(ratio * A, clipped * A).mean()

                # The value loss, clipped too.
                V = values_of(tokens, mask, T)[keep]
                near = old_v + (V - old_v).clamp(-config.value_clip_range, config.value_clip_range)
                value_loss = 0.5 * torch.maximum((V - R).square(), (near - R).square()).mean()

                # PPO-ptx: read a little, in the same step.
                if config.ptx_coef > 0:
                    blocks = next(corpus)
                    said = token_logits(policy, blocks, torch.ones_like(blocks, dtype=torch.bool))[:, :-1]
                    reading = nn.functional.cross_entropy(said.flatten(0, 1), blocks[:, 1:].flatten())
                    policy_loss = policy_loss + config.ptx_coef * reading

                for model, optimizer, loss in (
                    (policy, policy_adam, policy_loss),
                    (value_model, value_adam, value_loss),
                ):
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                    optimizer.step()
                if first is None:
                    moved = (ratio.detach() - 1).abs()
                    first = moved.max().item(), (moved > config.clip_range).float().mean().item()

        kl = d.sum(1).mean().item()  # nats per answer
        log.append(
            {
                "score": scores.mean().item(),
                "kl": kl,
                "beta": beta,
                "first_ratio_error": first[0],
                "first_clip_fraction": first[1],
            }
        )
        if config.target_kl is not None:  # steer beta towards the target
            error = min(max(kl / config.target_kl - 1, -0.2), 0.2)
            beta = beta * (1 + error * B / config.kl_horizon)
    return log
