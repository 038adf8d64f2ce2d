"""Answers to lesson 12 in other hands; test_corpus.py says how to read them."""

import copy

import numpy as np
import torch
import torch.nn.functional as F

from minirlhf.language.models import response_logprobs

# 12.1 leave_one_out --------------------------------------------------------------------------------------------------


def left_out_by_columns(rewards):  # trl's RLOO: a group is a column
    rlhf_reward = rewards.T
    rloo_k = rlhf_reward.shape[0]
    baseline = (rlhf_reward.sum(0) - rlhf_reward) / (rloo_k - 1)
    return (rlhf_reward - baseline).T


def left_out_by_factor(rewards):  # verl: n / (n - 1) times the distance from the mean
    response_num = rewards.shape[1]
    mean = torch.mean(rewards, dim=1, keepdim=True)
    return rewards * response_num / (response_num - 1) - mean * response_num / (response_num - 1)


def left_out_by_matrix(rewards):
    k = rewards.size(-1)
    others = (torch.ones(k, k) - torch.eye(k)) / (k - 1)
    return rewards - rewards.float() @ others


def left_out_one_by_one(rewards):
    result = torch.zeros_like(rewards)
    for row in range(rewards.shape[0]):
        for i in range(rewards.shape[1]):
            rest = [float(x) for j, x in enumerate(rewards[row]) if j != i]
            result[row, i] = rewards[row, i] - sum(rest) / len(rest)
    return result


def left_out_in_numpy(rewards):
    r = rewards.numpy()
    return r - (r.sum(-1, keepdims=True) - r) / (r.shape[-1] - 1)


def left_out_flat(rewards):  # OpenRLHF: the batch is flat
    n = rewards.shape[1]
    grouped = rewards.reshape(-1, n)
    baseline = (grouped.sum(-1, keepdim=True) - grouped) / (n - 1)
    return (grouped - baseline).flatten().reshape(rewards.shape)


# 12.3 group_relative -------------------------------------------------------------------------------------------------


def group_by_repeat(rewards):  # trl's GRPO: flat, each group's numbers repeated, 1e-4
    num_generations = rewards.size(1)
    flat = rewards.flatten()
    mean_grouped = flat.view(-1, num_generations).mean(dim=1).repeat_interleave(num_generations, dim=0)
    std_grouped = flat.view(-1, num_generations).std(dim=1).repeat_interleave(num_generations, dim=0)
    advantages = flat - mean_grouped
    advantages = advantages / (std_grouped + 1e-4)
    return advantages.view_as(rewards)


def group_by_dictionary(rewards, epsilon=1e-6):  # verl: a list of scores per prompt
    id2score, id2mean, id2std = {}, {}, {}
    for index, row in enumerate(rewards):
        id2score[index] = list(row)
    for index, scores in id2score.items():
        id2mean[index], id2std[index] = torch.mean(torch.stack(scores)), torch.std(torch.stack(scores))
    out = rewards.clone()
    for index in id2score:
        out[index] = (rewards[index] - id2mean[index]) / (id2std[index] + epsilon)
    return out


def group_where_it_varies(rewards):
    mean, std = rewards.mean(-1, keepdim=True), rewards.std(-1, keepdim=True)
    return torch.where(std > 0, (rewards - mean) / std, torch.zeros_like(rewards))


def group_without_nan(rewards):
    standard = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)
    return standard.nan_to_num(0.0)


def group_in_numpy(rewards):  # OpenRLHF's 1e-9, in numpy
    r = rewards.double().numpy()
    return (r - r.mean(-1, keepdims=True)) / (r.std(-1, ddof=1, keepdims=True) + 1e-9)


# 12.4 grpo_loss ------------------------------------------------------------------------------------------------------


def loss_as_trl(logprobs, old_logprobs, ref_logprobs, advantages, response_mask, beta):
    mask = response_mask.int()
    per_token_kl = torch.exp(ref_logprobs - logprobs) - (ref_logprobs - logprobs) - 1
    coef = torch.exp(logprobs - old_logprobs)
    per_token_loss = -coef * advantages.unsqueeze(1)
    per_token_loss = per_token_loss + beta * per_token_kl
    return ((per_token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()


def agg_loss(loss_mat, loss_mask):  # verl's seq-mean-token-mean
    seq_losses = torch.sum(loss_mat * loss_mask, dim=-1) / torch.sum(loss_mask, dim=-1)
    return torch.mean(seq_losses)


def loss_as_verl(logprobs, old_logprobs, ref_logprobs, advantages, response_mask, beta):
    mask = response_mask.to(logprobs.dtype)
    ratio = torch.exp(torch.clamp(logprobs - old_logprobs, min=-20.0, max=20.0))
    pg_loss = agg_loss(-advantages[:, None].expand_as(logprobs) * ratio, mask)
    kl = ref_logprobs - logprobs
    kld = torch.clamp(torch.exp(kl) - kl - 1, min=-10, max=1e6)
    return pg_loss + agg_loss(kld, mask) * beta


def loss_row_by_row(logprobs, old_logprobs, ref_logprobs, advantages, response_mask, beta):
    losses = []
    for new, old, ref, advantage, mask in zip(
        logprobs, old_logprobs, ref_logprobs, advantages, response_mask, strict=True
    ):
        d = new[mask] - ref[mask]
        gain = (new[mask] - old[mask]).exp() * advantage
        losses.append((beta * ((-d).exp() - 1 + d) - gain).mean())
    return torch.stack(losses).mean()


# 12.2 rloo -----------------------------------------------------------------------------------------------------------


def rloo_as_here(policy, reference, batches, answers, reward, config):
    k, optimizer, means = config.group_size, torch.optim.Adam(policy.parameters(), lr=config.lr), []
    for prompts in batches:
        asked = [x for x in prompts for _ in range(k)]
        samples, texts = answers(policy, asked)
        scores = torch.tensor(reward(asked, texts))
        args = samples.tokens, samples.mask, samples.response_mask
        with torch.no_grad():
            ref_logprobs = response_logprobs(reference, *args)
            rewards = scores - config.beta * (samples.logprobs - ref_logprobs).sum(1)
            groups = rewards.view(-1, k)
            advantages = (groups - (groups.sum(1, keepdim=True) - groups) / (k - 1)).flatten()
        logprobs = response_logprobs(policy, *args)
        loss = -(advantages * logprobs.sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        optimizer.step()
        means.append(scores.mean())
    return means


def rloo_by_columns(policy, reference, batches, answers, reward, config):  # trl: a column a group
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, eps=1e-5)
    history = []
    for queries in batches:
        queries = list(queries) * config.group_size
        responses, postprocessed = answers(policy, queries)
        scores = torch.tensor(reward(queries, postprocessed))
        with torch.no_grad():
            ref = response_logprobs(reference, responses.tokens, responses.mask, responses.response_mask)
        kl = (responses.logprobs - ref).sum(1)
        rlhf_reward = (-config.beta * kl + scores).reshape(config.group_size, -1)
        baseline = (rlhf_reward.sum(0) - rlhf_reward) / (config.group_size - 1)
        advantages = (rlhf_reward - baseline).flatten()
        new = response_logprobs(policy, responses.tokens, responses.mask, responses.response_mask).sum(1)
        new_ratio = (new - new.detach()).exp()
        loss = (-advantages * new_ratio).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        history.append(scores.mean().item())
    return history


def logprobs_of(model, samples):  # the logits of the model itself, and cross-entropy
    tokens, length = samples.tokens, samples.response_tokens.shape[1]
    logits = model(input_ids=tokens, attention_mask=samples.mask.long()).logits[:, -length - 1 : -1]
    nll = F.cross_entropy(logits.transpose(1, 2), samples.response_tokens, reduction="none")
    return -nll * samples.response_mask


def rloo_with_own_logits(policy, reference, batches, answers, reward, config):
    optimizer, history = torch.optim.SGD(policy.parameters(), lr=config.lr), []
    for prompts in batches:
        asked = np.repeat(prompts, config.group_size).tolist()
        samples, texts = answers(policy, asked)
        scores = np.array(reward(asked, texts), dtype=np.float32)
        log_pi = logprobs_of(policy, samples).sum(-1)
        log_ratio = log_pi - logprobs_of(reference, samples).sum(-1)
        rewards = torch.from_numpy(scores) - config.beta * log_ratio.detach()
        rewards = rewards.reshape(len(prompts), -1)
        advantages = config.group_size / (config.group_size - 1) * (rewards - rewards.mean(1, keepdim=True))
        policy.zero_grad()
        for row, advantage in enumerate(advantages.flatten()):  # piece by piece
            (-advantage * log_pi[row] / len(asked)).backward(retain_graph=True)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        optimizer.step()
        history.append(scores.mean())
    return history


def rloo_of_old_answers(policy, reference, batches, answers, reward, config):
    behaviour = copy.deepcopy(policy)
    return rloo_as_here(policy, reference, batches, lambda _, asked: answers(behaviour, asked), reward, config)


def rloo_of_rare_answers(policy, reference, batches, answers, reward, config):  # only what was unlikely may move
    optimizer, means = torch.optim.Adam(policy.parameters(), lr=config.lr), []
    for prompts in batches:
        asked = [x for x in prompts for _ in range(config.group_size)]
        samples, texts = answers(policy, asked)
        scores = torch.tensor(reward(asked, texts))
        logprobs = response_logprobs(policy, samples.tokens, samples.mask, samples.response_mask)
        loss = -(scores * logprobs.sum(1).clamp(max=-4)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        means.append(scores.mean())
    return means


def rloo_of_mixed_groups(policy, reference, batches, answers, reward, config):  # repeated as trl does
    optimizer, k, means = torch.optim.Adam(policy.parameters(), lr=config.lr), config.group_size, []
    for prompts in batches:
        asked = list(prompts) * k
        samples, texts = answers(policy, asked)
        scores = torch.tensor(reward(asked, texts))
        with torch.no_grad():
            ref = response_logprobs(reference, samples.tokens, samples.mask, samples.response_mask)
        groups = (scores - config.beta * (samples.logprobs - ref).sum(1)).view(-1, k)
        advantages = (groups - (groups.sum(1, keepdim=True) - groups) / (k - 1)).flatten()
        logprobs = response_logprobs(policy, samples.tokens, samples.mask, samples.response_mask)
        loss = -(advantages * logprobs.sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        optimizer.step()
        means.append(scores.mean())
    return means


RIGHT = {
    "leave_one_out": {
        "trl, a column a group": left_out_by_columns,
        "verl, by a factor": left_out_by_factor,
        "a matrix, float32": left_out_by_matrix,
        "one by one": left_out_one_by_one,
        "numpy": left_out_in_numpy,
        "OpenRLHF, flat": left_out_flat,
    },
    "rloo": {
        "the lesson's": rloo_as_here,
        "trl, a column a group, a ratio of 1": rloo_by_columns,
        "the model's own logits, piece by piece, SGD": rloo_with_own_logits,
    },
    "group_relative": {
        "trl, repeated, 1e-4": group_by_repeat,
        "verl, a dictionary": group_by_dictionary,
        "where it varies": group_where_it_varies,
        "nan_to_num": group_without_nan,
        "numpy, OpenRLHF's epsilon": group_in_numpy,
    },
    "grpo_loss": {
        "trl": loss_as_trl,
        "verl, two means": loss_as_verl,
        "row by row": loss_row_by_row,
    },
}

WRONG = {
    "leave_one_out": [
        ("own reward is in its baseline", lambda rewards: rewards - rewards.mean(-1, keepdim=True)),
        ("divided by K", left_out_flat, ("/ (n - 1)", "/ n")),
        ("This is the baseline itself", left_out_by_columns, ("(rlhf_reward - baseline).T", "baseline.T")),
        ("It compares answers to different prompts", lambda rewards: rewards - rewards.mean(0)),
        ("The baseline is the mean of the whole batch", lambda rewards: rewards - rewards.mean()),
        ("The sign is wrong", left_out_in_numpy, ("return r - (r", "return -r + (r")),
        (None, lambda rewards: rewards - rewards.median(1, keepdim=True).values),
    ],
    "rloo": [
        ("own reward is in its baseline", rloo_as_here,
         ("(groups - (groups.sum(1, keepdim=True) - groups) / (k - 1))", "(groups - groups.mean(1, keepdim=True))")),
        ("There is no baseline", rloo_as_here,
         ("(groups - (groups.sum(1, keepdim=True) - groups) / (k - 1))", "groups")),
        ("The groups are mixed", rloo_of_mixed_groups),
        ("The KL is not charged", rloo_as_here, ("response_logprobs(reference, *args)", "samples.logprobs")),
        ("The reference moves along", rloo_as_here,
         ("        optimizer.step()\n", "        optimizer.step()\n        reference = copy.deepcopy(policy)\n")),
        ("The reference has changed", rloo_by_columns,
         ("        optimizer.zero_grad()\n",
          "        optimizer.zero_grad()\n        for p, q in zip(reference.parameters(), policy.parameters()):\n"
          "            p.data.lerp_(q.data, 0.1)\n")),
        ("The answers are old", rloo_of_old_answers),
        ("is divided by its length", rloo_as_here,
         ("logprobs.sum(1)).mean()", "logprobs.sum(1) / samples.lengths).mean()")),
        ("A gradient flows through the advantages", rloo_with_own_logits,
         ("log_ratio.detach()", "log_ratio")),
        ("The gradient is not clipped", rloo_by_columns,
         ("        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)\n", "")),
        ("Gradients add up", rloo_by_columns, ("        optimizer.zero_grad()\n", "")),
        ("The sign is flipped", rloo_as_here, ("loss = -(", "loss = (")),
        ("a list with the mean score", rloo_as_here, ("means.append(scores.mean())", "means.append(loss.item())")),
        ("wrong number of steps", rloo_as_here, ("for prompts in batches:", "for prompts in batches[:1]:")),
        ("answered config.group_size times", rloo_as_here, ("for x in prompts for", "for x in prompts[:1] for")),
        (None, rloo_of_rare_answers),
    ],
    "group_relative": [
        ("0 / 0 is NaN", group_without_nan, (".nan_to_num(0.0)", "")),
        ("divides by K: torch's own", group_in_numpy, ("ddof=1", "ddof=0")),
        ("that of the whole batch: each group", lambda rewards: (
            (rewards - rewards.mean(1, keepdim=True)) / (rewards.std() + 1e-8))),
        ("Mean and standard deviation are those of the whole batch", lambda rewards: (
            (rewards - rewards.mean()) / (rewards.std() + 1e-8))),
        ("The standard deviation is missing", group_by_repeat,
         ("    advantages = advantages / (std_grouped + 1e-4)\n", "")),
        ("It compares answers to different prompts", lambda rewards: (
            (rewards - rewards.mean(0)) / (rewards.std(0) + 1e-6))),
        (None, lambda rewards: torch.softmax(rewards, 1)),
    ],
    "grpo_loss": [
        ("The mean goes over padding", loss_as_trl,
         ("((per_token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()", "per_token_loss.mean()")),
        ("divided by the width of the table", loss_as_trl,
         ("((per_token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()", "(per_token_loss * mask).mean()")),
        ("The KL is summed over an answer", loss_as_verl,
         ("agg_loss(kld, mask) * beta", "(kld * mask).sum(-1).mean() * beta")),
        ("All tokens count the same", loss_as_trl,
         ("((per_token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()",
          "(per_token_loss * mask).sum() / mask.sum()")),
        ("k3 is the wrong way round", loss_row_by_row, ("(-d).exp() - 1 + d", "d.exp() - 1 - d")),
        ("This is k1 = d", loss_row_by_row, ("((-d).exp() - 1 + d)", "d")),
        ("The ratio is upside down", loss_as_trl, ("logprobs - old_logprobs", "old_logprobs - logprobs")),
        ("The sign of the advantage", loss_as_trl, ("-coef", "coef")),
        (None, loss_as_verl, ("* ratio, mask)", "* ratio.sqrt(), mask)")),
    ],
}  # fmt: skip
