"""Solutions of lesson 10: each function stands for the stub of its name."""

import math

import torch


def my_best_of_n_kl(counts):
    return counts.log() - (counts - 1) / counts


def my_best_of_n(proxy, values, n):
    pool = proxy.shape[1]
    same = (proxy[:, None] == proxy[:, :, None]).to(values.dtype)
    values = (same @ values[..., None])[..., 0] / same.sum(2)  # ties share: now it does not matter who of them wins
    wins = values.new_tensor([math.comb(i, n - 1) for i in range(pool)]) / math.comb(pool, n)
    return (values.gather(1, proxy.argsort(1)) * wins).sum(1)


def my_curve_and_peak(kl, gain):
    d = kl.sqrt()
    columns = torch.stack((d, -(d**2)), 1)
    alpha, beta = torch.linalg.lstsq(columns, gain[:, None]).solution[:, 0]
    return torch.stack((alpha, beta, (alpha / (2 * beta)) ** 2))


def my_gold_where_stopped(proxy, validation, gold, kl, budget):
    at = validation.masked_fill(kl > budget, -math.inf).argmax(1, keepdim=True)
    return gold.gather(1, at)[:, 0]


def my_ensemble_reward(scores, reference, how):
    standard = (scores - reference.mean(1, keepdim=True)) / reference.std(1, keepdim=True)
    return standard.mean(0) if how == "mean" else standard.amin(0)


def my_fresh_pairs(prompts, policies, scores):
    newest = policies == policies.max()
    return (prompts[:, None] == prompts) & newest[:, None] & newest & (scores[:, None] > scores)


def my_rounds(sft, rankings, batches, label, train_judge, train_policy):
    policy = sft
    policies = []
    for prompts in batches:
        new = label(policy, prompts)  # of the newest policy
        rankings = (*rankings, *new)  # old and new
        judge = train_judge(sft, rankings)
        policy = train_policy(policy, judge, sft)  # on from the last round, KL to the SFT model
        policies.append(policy)
    return policies
