"""Wrong answers of lesson 10; test_museum.py says how to read them."""

import math

import torch


def integrated(counts):
    rows = []
    for n in counts:
        u = (torch.arange(1, 2_000_001).double() - 0.5) / 2_000_000
        rows.append(-torch.log(n * u ** (n - 1)).mean())
    return torch.stack(rows).nan_to_num()


def with_putting_back(proxy, values, n):
    N = proxy.shape[1]
    rows = []
    for p, v in zip(proxy, values, strict=True):
        total = 0.0
        for a in set(p.tolist()):
            below, upto = (p < a).double().sum() / N, (p <= a).double().sum() / N
            total = total + v[p == a].mean() * (upto**n - below**n)
        rows.append(total)
    return torch.stack(rows)


def the_last_of_ties_wins(proxy, values, n):
    rows = []
    for p, v in zip(proxy.tolist(), values.tolist(), strict=True):
        order = sorted(range(len(p)), key=lambda i: p[i])
        total = sum(v[i] * math.comb(place, n - 1) for place, i in enumerate(order))
        rows.append(total / math.comb(len(p), n))
    return torch.tensor(rows, dtype=torch.float64)


def curve_and_peak(kl, gain):
    d = kl**0.5
    columns = torch.stack((d, -d * d), dim=1)
    alpha, beta = torch.linalg.lstsq(columns, gain[:, None]).solution.flatten()
    return torch.stack((alpha, beta, (alpha / (2 * beta)) ** 2))


def gold_where_stopped(proxy, validation, gold, kl, budget):
    rows = []
    for v, g, k in zip(validation, gold, kl, strict=True):
        ok = torch.nonzero(k <= budget).flatten()
        rows.append(g[ok[v[ok].argmax()]])
    return torch.stack(rows)


def ensemble_reward(scores, reference, how):
    m, s = reference.mean(1, keepdim=True), reference.std(1, keepdim=True)
    scores = (scores - m) / s
    return scores.min(dim=0).values if how == "min" else scores.mean(dim=0)


def fresh_pairs(prompts, policies, scores):
    new = policies == policies.max()
    pairs = torch.outer(new, new) & (prompts.view(-1, 1) == prompts.view(1, -1))
    return pairs & (scores.view(-1, 1) > scores.view(1, -1))


def rounds(sft, rankings, batches, label, train_judge, train_policy):
    policies = [sft]
    for prompts in batches:
        rankings += label(policies[-1], prompts)
        judge = train_judge(sft, rankings)
        policies.append(train_policy(policies[-1], judge, sft))
    return policies[1:]


WRONG = {
    "best_of_n_kl": [
        ("-", "log n is only the first term", lambda counts: torch.log(counts)),
        ("-", "It takes off n - 1 / n", lambda counts: torch.log(counts) - counts - 1 / counts),
        ("-", "These are bits", lambda counts: torch.log2(counts) - (counts - 1) / counts / math.log(2)),
        ("-", "The result is not right", integrated),
    ],
    "best_of_n": [
        ("-", "It takes the best of the first n",
         lambda proxy, values, n: values[torch.arange(len(values)), proxy[:, :n].max(dim=1).indices]),
        ("-", "It draws with putting back", with_putting_back),
        ("-", "Ties: here the last", the_last_of_ties_wins),
        ("-", "It is the mean of the n best",
         lambda proxy, values, n: values.gather(1, proxy.argsort(descending=True, stable=True)[:, :n]).mean(1)),
    ],
    "curve_and_peak": [
        ("-", "It fits against KL", curve_and_peak,
         ("kl**0.5", "kl"), ("(alpha / (2 * beta)) ** 2", "alpha / (2 * beta)")),
        ("-", "beta has the wrong sign", curve_and_peak, ("-d * d", "d**2")),
        ("-", "The peak is given as a distance", curve_and_peak, ("(alpha / (2 * beta)) ** 2", "alpha / beta / 2")),
        ("-", "There is a constant in the fit", curve_and_peak,
         ("stack((d,", "stack((torch.ones_like(d), d,"), ("alpha, beta = ", "_, alpha, beta = ")),
    ],
    "gold_where_stopped": [
        ("-", "The proxy chooses here", gold_where_stopped, ("zip(validation", "zip(proxy")),
        ("-", "Gold chooses here", gold_where_stopped, ("zip(validation", "zip(gold")),
        ("-", "It reports the validation score", gold_where_stopped, ("g[ok", "v[ok")),
        ("-", "The index counts only the measurements within the budget", gold_where_stopped,
         ("g[ok[v[ok].argmax()]]", "g[v[ok].argmax()]")),
        ("-", "The budget is not looked at", gold_where_stopped, ("ok[v[ok].argmax()]", "v.argmax()")),
    ],
    "ensemble_reward": [
        ("-", "The scores are combined raw", ensemble_reward, ("    scores = (scores - m) / s\n", "")),
        ("-", "One mean and one deviation for all models", ensemble_reward,
         ("mean(1, keepdim=True)", "mean()"), ("std(1, keepdim=True)", "std()")),
        ("-", "`how` is not looked at: min", ensemble_reward, ('scores.min(dim=0).values if how == "min" else ', "")),
    ],
    "fresh_pairs": [
        ("-", "Older policies' answers are in it: it is not enough", fresh_pairs,
         ("torch.outer(new, new)", "(policies.view(-1, 1) == policies.view(1, -1))")),
        ("-", "Ties make a pair here", fresh_pairs,
         ("scores.view(-1, 1) > scores.view(1, -1))", "scores.view(-1, 1) >= scores) & ~torch.eye(len(new)).bool()")),
        ("-", "Answers to different prompts are compared", fresh_pairs,
         (" & (prompts.view(-1, 1) == prompts.view(1, -1))", "")),
    ],
    "rounds": [
        ("-", "The SFT model's answers are labelled in every round", rounds, ("label(policies[-1]", "label(sft")),
        ("-", "The judge learns from the new rankings alone", rounds, ("rankings += label", "rankings = label")),
        ("-", "PPO starts from the SFT model", rounds, ("train_policy(policies[-1]", "train_policy(sft")),
        ("-", "The reference moves along", rounds, ("judge, sft))", "judge, policies[-1]))")),
        ("-", "The judge starts from the policy", rounds, ("train_judge(sft", "train_judge(policies[-1]")),
        ("-", "Labels come one round late", rounds, ("label(policies[-1]", "label([sft, *policies][-2]")),
    ],
}  # fmt: skip
