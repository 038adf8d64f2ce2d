"""Right trainers for `rlhf`, in the styles of other courses and libraries; no code of theirs is copied."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from minirlhf_course.studios.given import token_logits, token_values
from torch import nn, optim

from minirlhf.language.tokenization import decode


def masked_mean(values, mask):
    return (values * mask).sum() / mask.sum()


def masked_whiten(values, mask):
    mean = masked_mean(values, mask)
    var = masked_mean((values - mean) ** 2, mask)
    return (values - mean) * torch.rsqrt(var + 1e-8)


INVALID_LOGPROB = 1.0


def trl(policy, value_model, ref_policy, get_reward, processing_class, batches, args, *, sample, corpus, generator):
    """trl's habits: query_responses, padding_mask and padding_mask_p1, one optimizer with two groups, micro-batches."""
    groups = [
        {"params": policy.parameters(), "lr": args.lr},
        {"params": value_model.parameters(), "lr": args.value_lr},
    ]
    optimizer = optim.Adam(groups, betas=(0.9, 0.95), eps=args.adam_eps)
    kl_coef, stats = args.beta, []

    def selective_log_softmax(logits, index):
        chosen = torch.gather(logits, dim=-1, index=index.unsqueeze(-1)).squeeze(-1)
        return chosen - torch.logsumexp(logits, dim=-1)

    for queries in batches:
        with torch.no_grad():
            out = sample(policy, queries)
            query_responses, context_length = out.tokens, out.prompt_tokens.shape[1]
            responses = query_responses[:, context_length:]
            sequence_lengths = out.response_mask.long().sum(1) - 1
            positions = torch.arange(responses.shape[1]).repeat(responses.shape[0], 1)
            padding_mask = positions > sequence_lengths.unsqueeze(1)
            padding_mask_p1 = positions > (sequence_lengths + 1).unsqueeze(1)

            def forward(model, tokens, mask, context_length=context_length):
                logits = token_logits(model, tokens, mask)[:, context_length - 1 : -1]
                return selective_log_softmax(logits / (args.temperature + 1e-7), tokens[:, context_length:])

            logprobs = forward(policy, query_responses, out.mask)
            ref_logprobs = forward(ref_policy, query_responses, out.mask)
            values = token_values(value_model, query_responses, out.mask)[:, context_length - 1 : -1]
            scores = torch.tensor(get_reward(queries, decode(processing_class, out.responses())))
            contain_eos_token = out.ended
            scores[~contain_eos_token] -= args.missing_eos_penalty
            logprobs = torch.masked_fill(logprobs, padding_mask, INVALID_LOGPROB)
            ref_logprobs = torch.masked_fill(ref_logprobs, padding_mask, INVALID_LOGPROB)
            values = torch.masked_fill(values, padding_mask_p1, 0)
            values = torch.masked_fill(values, padding_mask, 0)

            kl = logprobs - ref_logprobs
            rewards = (-kl_coef * kl).clone()
            rewards[torch.arange(len(rewards)), sequence_lengths] += scores

            lastgaelam, advantages_reversed = 0, []
            for t in reversed(range(responses.shape[1])):
                nextvalues = values[:, t + 1] if t < responses.shape[1] - 1 else 0.0
                delta = rewards[:, t] + args.gamma * nextvalues - values[:, t]
                lastgaelam = delta + args.gamma * args.lam * lastgaelam
                advantages_reversed.append(lastgaelam)
            advantages = torch.stack(advantages_reversed[::-1], dim=1)
            returns = advantages + values
            if args.whiten_advantages:
                advantages = masked_whiten(advantages, ~padding_mask)
            advantages = torch.masked_fill(advantages, padding_mask, 0)

        ratio_stats = []
        for _ in range(args.epochs):
            b_inds = torch.randperm(len(queries), generator=generator)
            for inds in b_inds.tensor_split(math.ceil(len(queries) / args.minibatch_size)):
                keep = ~padding_mask[inds]
                new_logprobs = forward(policy, query_responses[inds], out.mask[inds])
                new_logprobs = torch.masked_fill(new_logprobs, ~keep, INVALID_LOGPROB)
                vpred = token_values(value_model, query_responses[inds], out.mask[inds])[:, context_length - 1 : -1]
                vpred = torch.masked_fill(vpred, padding_mask_p1[inds], 0)
                low, high = values[inds] - args.value_clip_range, values[inds] + args.value_clip_range
                vf_losses1 = torch.square(vpred - returns[inds])
                vf_losses2 = torch.square(torch.clamp(vpred, low, high) - returns[inds])
                vf_loss = 0.5 * masked_mean(torch.max(vf_losses1, vf_losses2), keep)
                ratio = torch.exp(new_logprobs - logprobs[inds])
                pg_losses = -advantages[inds] * ratio
                pg_losses2 = -advantages[inds] * torch.clamp(ratio, 1.0 - args.clip_range, 1.0 + args.clip_range)
                pg_loss = masked_mean(torch.max(pg_losses, pg_losses2), keep)
                with torch.no_grad():
                    outside = ((ratio - 1.0).abs() > args.clip_range).float()
                    ratio_stats.append(((ratio - 1.0).abs().max().item(), masked_mean(outside, keep).item()))
                optimizer.zero_grad()
                (pg_loss + vf_loss).backward()
                if args.ptx_coef:
                    block = next(corpus)
                    shift = token_logits(policy, block, torch.ones_like(block))[..., :-1, :]
                    lm = F.cross_entropy(shift.reshape(-1, shift.shape[-1]), block[..., 1:].reshape(-1))
                    (args.ptx_coef * lm).backward()
                nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
                nn.utils.clip_grad_norm_(value_model.parameters(), args.max_grad_norm)
                optimizer.step()
        mean_kl = kl.sum(1).mean()
        row = {"score": scores.mean().item(), "kl": mean_kl.item(), "beta": kl_coef}
        stats.append({**row, "first_ratio_error": ratio_stats[0][0], "first_clip_fraction": ratio_stats[0][1]})
        if args.target_kl:
            proportional_error = np.clip(mean_kl.item() / args.target_kl - 1, -0.2, 0.2)
            kl_coef *= 1 + proportional_error * len(queries) / args.kl_horizon
    return stats


class OpenRLHF:
    """OpenRLHF's habits: an experience maker, losses as modules, one answer at a time in a buffer, action_mask."""

    class PolicyLoss(nn.Module):
        def __init__(self, eps):
            super().__init__()
            self.eps = eps

        def forward(self, log_probs, old_log_probs, advantages, action_mask):
            log_ratio = torch.where(action_mask, log_probs - old_log_probs, torch.zeros_like(log_probs))
            ratio = log_ratio.exp()
            surr1, surr2 = ratio * advantages, ratio.clamp(1 - self.eps, 1 + self.eps) * advantages
            loss = torch.where(action_mask, -torch.min(surr1, surr2), torch.zeros_like(surr1))
            return loss.sum() / action_mask.sum(), ratio.detach()[action_mask]

    class ValueLoss(nn.Module):
        def __init__(self, eps):
            super().__init__()
            self.eps = eps

        def forward(self, values, old_values, returns, action_mask):
            values_clipped = old_values + (values - old_values).clamp(-self.eps, self.eps)
            loss = torch.max((values_clipped - returns) ** 2, (values - returns) ** 2)
            return 0.5 * loss[action_mask].mean()

    class AdaptiveKL:
        def __init__(self, value, target, horizon):
            self.value, self.target, self.horizon = value, target, horizon

        def update(self, current, n_steps):
            if self.target is not None:
                self.value = self.value * (1 + min(max(current / self.target - 1, -0.2), 0.2) * n_steps / self.horizon)

    def __init__(self, actor, critic, initial_model, reward_fn, tokenizer, args, sample, corpus, generator):
        self.actor, self.critic, self.initial_model, self.args = actor, critic, initial_model, args
        self.reward_fn, self.tokenizer, self.sample, self.corpus = reward_fn, tokenizer, sample, corpus
        self.generator = generator
        self.actor_optim = optim.AdamW(
            actor.parameters(), lr=args.lr, betas=(0.9, 0.95), eps=args.adam_eps, weight_decay=0
        )
        self.critic_optim = optim.AdamW(
            critic.parameters(), lr=args.value_lr, betas=(0.9, 0.95), eps=args.adam_eps, weight_decay=0
        )
        self.kl_ctl = self.AdaptiveKL(args.beta, args.target_kl, args.kl_horizon)

    def log_probs(self, model, sequences, attention_mask, num_actions):
        log_probs = F.log_softmax(token_logits(model, sequences, attention_mask) / self.args.temperature, dim=-1)
        per_token = log_probs[:, :-1].gather(2, sequences[:, 1:].unsqueeze(2)).squeeze(2)
        return per_token[:, -num_actions:]

    def values(self, sequences, attention_mask, num_actions):
        return token_values(self.critic, sequences, attention_mask)[:, :-1][:, -num_actions:]

    @torch.no_grad()
    def make_experience(self, prompts):
        out = self.sample(self.actor, prompts)
        action_mask, n = out.response_mask, out.response_mask.shape[1]
        log_probs = self.log_probs(self.actor, out.tokens, out.mask, n)
        base = self.log_probs(self.initial_model, out.tokens, out.mask, n)
        r = []
        for prompt, answer, ended in zip(prompts, decode(self.tokenizer, out.responses()), out.ended, strict=True):
            r.append(self.reward_fn([prompt], [answer])[0] - (0.0 if ended else self.args.missing_eos_penalty))
        kl = (log_probs - base).masked_fill(~action_mask, 0.0)
        eos = action_mask.size(1) - 1 - action_mask.long().fliplr().argmax(dim=1, keepdim=True)
        last = torch.zeros_like(kl).scatter_(dim=1, index=eos, src=torch.tensor(r)[:, None].to(kl.dtype))
        reward = last - self.kl_ctl.value * kl
        value = self.values(out.tokens, out.mask, n) * action_mask
        advantages, lastgae = torch.zeros_like(reward), 0
        for t in reversed(range(n)):
            nextvalue = value[:, t + 1] if t < n - 1 else 0.0
            lastgae = (
                reward[:, t] + self.args.gamma * nextvalue - value[:, t] + self.args.gamma * self.args.lam * lastgae
            )
            advantages[:, t] = lastgae
        returns = advantages + value
        if self.args.whiten_advantages:
            picked = advantages[action_mask]
            advantages = (advantages - picked.mean()) * (picked.var(unbiased=False) + 1e-8).rsqrt()
        items = zip(out.tokens, out.mask, action_mask, log_probs, value, advantages, returns, strict=True)
        return list(items), kl.sum(1).mean().item(), float(np.mean(r))

    def training_step(self, items):
        sequences, attention_mask, action_mask, old, old_values, advantages, returns = (
            torch.stack(column) for column in zip(*items, strict=True)
        )
        n = action_mask.shape[1]
        new = self.log_probs(self.actor, sequences, attention_mask, n)
        actor_loss, ratio = self.PolicyLoss(self.args.clip_range)(new, old, advantages, action_mask)
        if self.args.ptx_coef > 0:
            data = next(self.corpus)
            ptx = -self.log_probs_of_text(data).mean()
            actor_loss = actor_loss + self.args.ptx_coef * ptx
        self.step(self.actor, self.actor_optim, actor_loss)
        loss = self.ValueLoss(self.args.value_clip_range)(
            self.values(sequences, attention_mask, n), old_values, returns, action_mask
        )
        self.step(self.critic, self.critic_optim, loss)
        return (ratio - 1).abs()

    def log_probs_of_text(self, data):
        log_probs = F.log_softmax(token_logits(self.actor, data, torch.ones_like(data)), dim=-1)
        return log_probs[:, :-1].gather(2, data[:, 1:].unsqueeze(2))

    def step(self, model, optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
        optimizer.step()

    def fit(self, batches):
        log = []
        for prompts in batches:
            buffer, kl, score = self.make_experience(prompts)
            moved = []
            for _ in range(self.args.epochs):
                order = torch.randperm(len(buffer), generator=self.generator)
                for index in order.chunk(math.ceil(len(buffer) / self.args.minibatch_size)):
                    moved.append(self.training_step([buffer[i] for i in index.tolist()]))
            row = {"score": score, "kl": kl, "beta": self.kl_ctl.value, "first_ratio_error": float(moved[0].max())}
            log.append({**row, "first_clip_fraction": float((moved[0] > self.args.clip_range).float().mean())})
            self.kl_ctl.update(kl, len(prompts))
        return log


def openrlhf(policy, value_model, reference, reward, tokenizer, batches, config, *, sample, corpus, generator):
    return OpenRLHF(policy, value_model, reference, reward, tokenizer, config, sample, corpus, generator).fit(batches)


def row_at_a_time(policy, value_model, reference, reward, tokenizer, batches, config, *, sample, corpus, generator):
    """CleanRL's and a textbook's habits: no padding at all; each answer alone, lists of floats, minus the objective."""
    pi_opt = optim.Adam(policy.parameters(), lr=config.lr, betas=(0.9, 0.95), eps=config.adam_eps, maximize=True)
    v_opt = optim.Adam(value_model.parameters(), lr=config.value_lr, betas=(0.9, 0.95), eps=config.adam_eps)
    beta, history = config.beta, []

    def whole(model, ids):
        return token_logits(model, ids[None], torch.ones_like(ids[None]))[0]

    def logp(model, ids, start):
        dist = torch.distributions.Categorical(logits=whole(model, ids)[start - 1 : -1] / config.temperature)
        return dist.log_prob(ids[start:])

    def value(ids, start):
        return token_values(value_model, ids[None], torch.ones_like(ids[None]).bool())[0, start - 1 : -1]

    for texts in batches:
        samples = sample(policy, texts)
        answers = decode(tokenizer, samples.responses())
        episodes, kls, scores = [], [], []
        for i, (text, answer) in enumerate(zip(texts, answers, strict=True)):
            ids = samples.tokens[i][samples.mask[i]]
            start = int(samples.prompt_mask[i].sum())
            with torch.no_grad():
                old, ref, v = logp(policy, ids, start), logp(reference, ids, start), value(ids, start)
            score = float(reward([text], [answer])[0])
            if not samples.ended[i]:
                score -= config.missing_eos_penalty
            rewards = [-beta * x for x in (old - ref).tolist()]
            rewards[-1] += score
            adv, running, v_next = [], 0.0, 0.0
            for r, v_now in zip(reversed(rewards), reversed(v.tolist()), strict=True):
                running = r + config.gamma * v_next - v_now + config.gamma * config.lam * running
                adv.insert(0, running)
                v_next = v_now
            adv = torch.tensor(adv)
            episodes.append([ids, start, old, v, adv, adv + v])
            kls.append(float((old - ref).sum()))
            scores.append(score)
        if config.whiten_advantages:
            everything = torch.cat([episode[4] for episode in episodes])
            for episode in episodes:
                episode[4] = (episode[4] - everything.mean()) / (everything.std() + 1e-8)
        first = None
        for _ in range(config.epochs):
            order = torch.randperm(len(episodes), generator=generator).numpy()
            for part in np.array_split(order, math.ceil(len(episodes) / config.minibatch_size)):
                count = sum(len(episodes[i][4]) for i in part)
                moved = []
                pi_opt.zero_grad()
                v_opt.zero_grad()
                for i in part:  # gradients add up
                    ids, start, old, v_old, adv, ret = episodes[i]
                    ratio = torch.exp(logp(policy, ids, start) - old)
                    bound = torch.where(adv > 0, (1 + config.clip_range) * adv, (1 - config.clip_range) * adv)
                    (torch.min(ratio * adv, bound).sum() / count).backward()
                    moved.append((ratio.detach() - 1).abs())
                    v = value(ids, start)
                    v_clip = v_old + torch.clamp(v - v_old, -config.value_clip_range, config.value_clip_range)
                    (0.5 * torch.max((v - ret) ** 2, (v_clip - ret) ** 2).sum() / count).backward()
                if config.ptx_coef > 0:
                    blocks = next(corpus)
                    for block in blocks:
                        likelihood = -F.cross_entropy(whole(policy, block)[:-1], block[1:])
                        (config.ptx_coef * likelihood / len(blocks)).backward()
                for model, opt in ((policy, pi_opt), (value_model, v_opt)):
                    nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                    opt.step()
                if first is None:
                    moved = torch.cat(moved)
                    first = float(moved.max()), float((moved > config.clip_range).float().mean())
        kl = float(np.mean(kls))
        history.append(
            {
                "score": float(np.mean(scores)),
                "kl": kl,
                "beta": beta,
                "first_ratio_error": first[0],
                "first_clip_fraction": first[1],
            }
        )
        if config.target_kl is not None:
            beta *= 1 + float(np.clip(kl / config.target_kl - 1, -0.2, 0.2)) * len(texts) / config.kl_horizon
    return history


FOREIGN = {"trl": trl, "OpenRLHF": openrlhf, "row at a time": row_at_a_time}
