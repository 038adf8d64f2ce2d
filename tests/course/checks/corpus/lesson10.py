"""Answers to lesson 10 in other hands; test_corpus.py says how to read them."""

import itertools
import math

import numpy as np
import torch

# 10.1 best_of_n_kl ---------------------------------------------------------------------------------------------------


def kl_by_trapezoid(counts):
    u = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    f = counts[:, None] * u ** (counts[:, None] - 1)
    return torch.trapezoid(torch.xlogy(f, f), u, dim=1)


def kl_by_midpoints(counts):
    u = (torch.arange(50_000, dtype=torch.float64) + 0.5) / 50_000
    out = []
    for n in counts.tolist():
        f = n * u ** (n - 1)
        out.append((f * f.log()).nan_to_num().mean())
    return torch.stack(out)


def kl_by_inverse_cdf(counts):  # E log f(U^(1/n)) over a grid of U: what one would sample, without the noise
    U = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    return torch.stack([(n.log() + (n - 1) / n * U.log()).mean() for n in counts])


# 10.2 best_of_n ------------------------------------------------------------------------------------------------------


def best_by_brute_force(proxy, values, n):
    rows = []
    for p, v in zip(proxy.tolist(), values.tolist(), strict=True):
        total, count = 0.0, 0
        for chosen in itertools.combinations(range(len(p)), n):
            top = max(p[i] for i in chosen)
            tied = [v[i] for i in chosen if p[i] == top]
            total, count = total + sum(tied) / len(tied), count + 1
        rows.append(total / count)
    return torch.tensor(rows, dtype=values.dtype)


def best_by_groups_of_ties(proxy, values, n):  # P(the highest proxy of a choice is x) = [C(upto, n) - C(below, n)] / C
    N, rows = proxy.shape[1], []
    for p, v in zip(proxy, values, strict=True):
        total = 0.0
        for x in p.unique():
            below, upto = int((p < x).sum()), int((p <= x).sum())
            total = total + v[p == x].mean() * (math.comb(upto, n) - math.comb(below, n)) / math.comb(N, n)
        rows.append(total)
    return torch.stack(rows)


def best_by_lgamma(proxy, values, n):  # WebGPT's estimator, with logarithms of factorials
    N = proxy.size(1)
    place = torch.arange(1, N + 1, dtype=values.dtype)
    m = torch.tensor(float(n), dtype=values.dtype)

    def log_comb(a, b):
        return torch.lgamma(a + 1) - torch.lgamma(b + 1) - torch.lgamma(a - b + 1)

    inside = place >= n
    log_weight = log_comb((place - 1).clamp(min=n - 1), m - 1) - log_comb(place[-1], m)
    weight = torch.where(inside, log_weight.exp(), 0.0)
    shared = torch.stack([torch.stack([v[p == x].mean() for x in p]) for p, v in zip(proxy, values, strict=True)])
    return (shared.gather(1, proxy.sort(dim=1).indices) * weight).sum(1)


def best_first_of_ties(proxy, values, n):
    place = torch.arange(proxy.shape[1])
    wins = values.new_tensor([math.comb(int(i), n - 1) for i in place]) / math.comb(len(place), n)
    order = proxy.flip(1).argsort(dim=1, stable=True)
    return (values.flip(1).gather(1, order) * wins).sum(1)


def best_by_sampling(proxy, values, n):
    total = 0.0
    for _ in range(200):
        chosen = torch.rand(proxy.shape).argsort(1)[:, :n]
        best = proxy.gather(1, chosen).argmax(1, keepdim=True)
        total = total + values.gather(1, chosen).gather(1, best)[:, 0]
    return total / 200


def best_unnormalised(proxy, values, n):
    return best_by_brute_force(proxy, values, n) * math.comb(proxy.shape[1], n)


def best_with_places_from_zero(proxy, values, n):
    N = proxy.shape[1]
    shared = torch.stack([torch.stack([v[p == x].mean() for x in p]) for p, v in zip(proxy, values, strict=True)])
    wins = values.new_tensor([math.comb(max(i - 1, 0), n - 1) if i else 0 for i in range(N)]) / math.comb(N, n)
    return (shared.gather(1, proxy.argsort(1)) * wins).sum(1)


# 10.3 curve_and_peak -------------------------------------------------------------------------------------------------


def curve_by_normal_equations(kl, gain):
    d = kl.sqrt()
    a, b, c = (d * d).sum(), -(d**3).sum(), (d**4).sum()
    p, q = (d * gain).sum(), -(d * d * gain).sum()
    det = a * c - b * b
    alpha, beta = (p * c - b * q) / det, (a * q - b * p) / det
    return torch.stack((alpha, beta, (alpha / (2 * beta)) ** 2))


def curve_by_qr(kl, gain):
    d = kl**0.5
    Q, R = torch.linalg.qr(torch.stack((d, d**2), dim=1))
    slope, bend = torch.linalg.solve_triangular(R, (Q.T @ gain)[:, None], upper=True)[:, 0]
    return torch.tensor([slope, -bend, (slope / (-2 * bend)).square()], dtype=gain.dtype)


def curve_by_newton(kl, gain):  # autograd's Hessian of the squared error, one Newton step from 0
    d = kl.sqrt()

    def error(x):
        return (d * (x[0] - x[1] * d) - gain).square().sum()

    x = torch.zeros(2, dtype=gain.dtype)
    x = x - torch.linalg.solve(torch.func.hessian(error)(x), torch.func.grad(error)(x))
    return torch.cat((x, (x[0] / x[1] / 2).square()[None]))


def curve_with_a_little_ridge(kl, gain):
    d = kl.sqrt()
    X = torch.stack((d, -d.square()), dim=1)
    alpha, beta = torch.linalg.solve(X.T @ X + 1e-10 * torch.eye(2, dtype=X.dtype), X.T @ gain)
    return torch.stack((alpha, beta, (alpha / (2 * beta)).square()))


def curve_by_numpy(kl, gain):
    d = np.sqrt(kl.numpy())
    (alpha, beta), *_ = np.linalg.lstsq(np.stack([d, -(d**2)], axis=1), gain.numpy(), rcond=None)
    return np.array([alpha, beta, (alpha / (2 * beta)) ** 2])


def curve_with(columns, peak):
    def fit(kl, gain):
        d = kl.sqrt()
        alpha, beta = (torch.linalg.pinv(torch.stack(columns(d), 1)) @ gain)[:2]
        return torch.stack((alpha, beta, peak(alpha, beta, kl, gain)))

    return fit


def best_of_n_columns(d):
    return d, -d.square()


# 10.4 gold_where_stopped ---------------------------------------------------------------------------------------------


def stop_one_by_one(proxy, validation, gold, kl, budget):
    out = []
    for r in range(len(gold)):
        best_score, best_step = -float("inf"), None
        for s in range(gold.shape[1]):
            if kl[r, s] <= budget and validation[r, s] > best_score:
                best_score, best_step = validation[r, s], s
        out.append(gold[r, best_step])
    return torch.stack(out)


def stop_by_penalty(proxy, validation, gold, kl, budget):
    allowed = torch.where(kl.le(budget), validation, torch.finfo(validation.dtype).min)
    return gold[torch.arange(len(gold)), allowed.argmax(dim=1)]


def stop_by_max(proxy, validation, gold, kl, budget):
    rows = []
    for v, g, k in zip(validation.tolist(), gold.tolist(), kl.tolist(), strict=True):
        best = max((s for s in range(len(g)) if k[s] <= budget), key=lambda s: (v[s], -s))
        rows.append(g[best])
    return torch.tensor(rows, dtype=gold.dtype)


def before_first_exceed(kl, budget):
    return (kl > budget).long().cumsum(1) == 0


def stop_before_first_exceed(proxy, validation, gold, kl, budget):
    held = validation.masked_fill(~before_first_exceed(kl, budget), -torch.inf)
    return gold.gather(1, held.argmax(1, keepdim=True))[:, 0]


def stop_last_before_first_exceed(proxy, validation, gold, kl, budget):
    at = before_first_exceed(kl, budget).sum(1, keepdim=True) - 1
    return gold.gather(1, at)[:, 0]


def stop_at_first_exceed(proxy, validation, gold, kl, budget):
    rows = []
    for g, k in zip(gold, kl, strict=True):
        over = (k > budget).nonzero()[:, 0]
        rows.append(g[over[0]] if len(over) else g[-1])
    return torch.stack(rows)


def stop_by_both(proxy, validation, gold, kl, budget):
    held = (proxy + validation).masked_fill(kl > budget, -torch.inf)
    return gold.gather(1, held.argmax(1, keepdim=True))[:, 0]


def stop_at_index(proxy, validation, gold, kl, budget):
    return validation.masked_fill(kl > budget, -torch.inf).argmax(1)


def stop_with_penalised_validation(proxy, validation, gold, kl, budget):
    held = (validation - 0.1 * kl).masked_fill(kl > budget, -torch.inf)
    return gold.gather(1, held.argmax(1, keepdim=True))[:, 0]


def stop_nearest_to_budget(proxy, validation, gold, kl, budget):
    return gold.gather(1, (kl - budget).abs().argmin(1, keepdim=True))[:, 0]


# 10.5 ensemble_reward ------------------------------------------------------------------------------------------------


def ensemble_model_by_model(scores, reference, how):
    scaled = []
    for s, r in zip(scores, reference, strict=True):
        std, mean = torch.std_mean(r)
        scaled.append((s - mean) / (std + 1e-8))
    scaled = torch.stack(scaled)
    return scaled.min(dim=0)[0] if how == "min" else scaled.mean(dim=0)


def ensemble_by_sums(scores, reference, how):
    R = reference.shape[1]
    mu = reference.sum(1, keepdim=True) / R
    sigma = (((reference - mu) ** 2).sum(1, keepdim=True) / (R - 1)).sqrt()
    z = scores / sigma - mu / sigma
    return {"mean": torch.mean(z, 0), "min": torch.min(z, 0).values}[how]


def ensemble_with(scale, combine):
    def reward(scores, reference, how):
        return combine(scale(scores, reference), how)

    return reward


def standard(scores, reference):
    return (scores - reference.mean(1, keepdim=True)) / reference.std(1, keepdim=True)


def mean_or_min(z, how):
    return z.mean(0) if how == "mean" else z.amin(0)


def between_lowest_and_highest(scores, reference):
    low, high = reference.amin(1, keepdim=True), reference.amax(1, keepdim=True)
    return (scores - low) / (high - low)


def ensemble_standardised_after(scores, reference, how):
    combined, known = mean_or_min(scores, how), mean_or_min(reference, how)
    return (combined - known.mean()) / known.std()


def ensemble_along_the_models(scores, reference, how):
    return mean_or_min((scores - scores.mean(0)) / (scores.std(0, correction=0) + 1e-8), how)


# 10.6 fresh_pairs ----------------------------------------------------------------------------------------------------


def fresh_one_by_one(prompts, policies, scores):
    N, newest = len(scores), max(policies.tolist())
    pairs = torch.zeros(N, N, dtype=torch.bool)
    for i in range(N):
        for j in range(N):
            if policies[i] == newest and policies[j] == newest and prompts[i] == prompts[j]:
                pairs[i, j] = scores[i] > scores[j]
    return pairs


def fresh_by_index(prompts, policies, scores):
    kept = torch.nonzero(policies.eq(policies.max())).squeeze(1)
    pairs = torch.zeros(len(scores), len(scores), dtype=torch.bool)
    within = prompts[kept].unsqueeze(1).eq(prompts[kept].unsqueeze(0))
    pairs[kept[:, None], kept[None, :]] = within & scores[kept].unsqueeze(1).gt(scores[kept].unsqueeze(0))
    return pairs


def fresh_of_each_prompt(prompts, policies, scores):
    same = prompts[:, None] == prompts
    newest = policies == torch.where(same, policies, -1).amax(1)
    return same & newest[:, None] & newest & (scores[:, None] > scores)


def fresh_upper_only(prompts, policies, scores):
    return fresh_one_by_one(prompts, policies, scores).triu(1)


def fresh_without_scores(prompts, policies, scores):
    newest = policies == policies.max()
    return (prompts[:, None] == prompts) & newest[:, None] & newest & ~torch.eye(len(prompts), dtype=torch.bool)


def fresh_neighbours(prompts, policies, scores):
    pairs = fresh_one_by_one(prompts, policies, scores)
    between = (pairs.long() @ pairs.long()) > 0
    return pairs & ~between


def fresh_of_latest_number(prompts, policies, scores):
    newest = policies == policies[-1]
    return (prompts[:, None] == prompts) & newest[:, None] & newest & (scores[:, None] > scores)


# 10.7 rounds ---------------------------------------------------------------------------------------------------------


def rounds_with_lists(sft, rankings, batches, label, train_judge, train_policy):
    data, out = list(rankings), [sft]
    for prompts in batches:
        data += label(out[-1], prompts)
        out.append(train_policy(out[-1], train_judge(sft, data), sft))
    return out[1:]


def rounds_by_recursion(sft, rankings, batches, label, train_judge, train_policy):
    def after(policy, known, left):
        if not left:
            return []
        known = label(policy, left[0]) + known
        policy = train_policy(policy, judge=train_judge(sft, known), reference=sft)
        return [policy, *after(policy, known, left[1:])]

    return after(sft, rankings, batches)


def rounds_with_a_generator(sft, rankings, batches, label, train_judge, train_policy):
    def run():
        policy, seen = sft, [rankings]
        for number in range(len(batches)):
            seen.append(label(policy, batches[number]))
            judge = train_judge(sft, [ranking for rows in seen for ranking in rows])
            policy = train_policy(policy, judge, sft)
            yield policy

    return tuple(run())


def rounds_edited(**changes):
    """The loop with one place changed: which, and what stands there, a function of (sft, policy, old, new)."""
    asked = changes.get("asked", lambda sft, policy: policy)
    start = changes.get("start", lambda sft, policy: policy)
    reference = changes.get("reference", lambda sft, policy: sft)
    body = changes.get("body", lambda sft, policy: sft)
    data = changes.get("data", lambda old, new: (*old, *new))

    def loop(sft, rankings, batches, label, train_judge, train_policy):
        policy, known, out = sft, rankings, []
        for prompts in batches:
            known = data(known, label(asked(sft, policy), prompts))
            judge = train_judge(body(sft, policy), known)
            policy = train_policy(start(sft, policy), judge, reference(sft, policy))
            out.append(policy)
        return out

    return loop


def rounds_last_only(*args):
    return rounds_with_lists(*args)[-1]


def rounds_with_the_start(*args):
    return [args[0], *rounds_with_lists(*args)]


def rounds_that_extend(sft, rankings, batches, label, train_judge, train_policy):
    rankings.extend(label(sft, batches[0]))
    return rounds_with_lists(sft, rankings, batches, label, train_judge, train_policy)


def rounds_in_place(sft, rankings, batches, label, train_judge, train_policy):
    known, out = rankings, []
    for prompts in batches:
        known = (*known, *label(sft, prompts))
        sft.copy_(train_policy(sft, train_judge(sft, known), sft))
        out.append(sft.clone())
    return out


def rounds_with_one_judge(sft, rankings, batches, label, train_judge, train_policy):
    policy, out = sft, []
    judge = train_judge(sft, (*rankings, *label(sft, batches[0])))
    for _ in batches:
        policy = train_policy(policy, judge, sft)
        out.append(policy)
    return out


RIGHT = {
    "rounds": {
        "lists": rounds_with_lists,
        "recursion": rounds_by_recursion,
        "a generator, as a tuple": rounds_with_a_generator,
    },
    "best_of_n_kl": {
        "closed form": lambda counts: torch.log(counts) - 1 + 1 / counts,
        "math": lambda counts: torch.tensor([math.log(n) - (n - 1) / n for n in counts.tolist()]),
        "trapezoid": kl_by_trapezoid,
        "midpoints": kl_by_midpoints,
        "inverse CDF": kl_by_inverse_cdf,
        "numpy": lambda counts: np.log(counts.numpy()) - (counts.numpy() - 1) / counts.numpy(),
    },
    "best_of_n": {
        "brute force": best_by_brute_force,
        "groups of ties": best_by_groups_of_ties,
        "WebGPT": best_by_lgamma,
    },
    "curve_and_peak": {
        "normal equations": curve_by_normal_equations,
        "QR": curve_by_qr,
        "Newton": curve_by_newton,
        "a little ridge": curve_with_a_little_ridge,
        "numpy": curve_by_numpy,
    },
    "gold_where_stopped": {
        "one by one": stop_one_by_one,
        "finfo.min": stop_by_penalty,
        "max with a key": stop_by_max,
    },
    "ensemble_reward": {
        "model by model, epsilon below": ensemble_model_by_model,
        "sums": ensemble_by_sums,
    },
    "fresh_pairs": {
        "one by one": fresh_one_by_one,
        "index": fresh_by_index,
        "integers": lambda prompts, policies, scores: fresh_by_index(prompts, policies, scores).long(),
    },
}

WRONG = {
    "rounds": [
        ("The SFT model's answers are labelled in every round", rounds_edited(asked=lambda sft, policy: sft)),
        ("The judge learns from the new rankings alone", rounds_edited(data=lambda old, new: new)),
        ("PPO starts from the SFT model in every round", rounds_edited(start=lambda sft, policy: sft)),
        ("The reference moves along", rounds_edited(reference=lambda sft, policy: policy)),
        ("The judge starts from the policy", rounds_edited(body=lambda sft, policy: policy)),
        ("The judge of the first round stays", rounds_with_one_judge),
        ("It returns one tensor", rounds_last_only),
        ("It returns", rounds_with_the_start),
        ("object has no attribute 'extend'", rounds_that_extend),
        ("It writes into its argument `sft`", rounds_in_place),
        (None, rounds_edited(data=lambda old, new: (*new, *new, *old))),
        (None, rounds_edited(asked=lambda sft, policy: sft, start=lambda sft, policy: sft)),
    ],
    "best_of_n_kl": [
        ("It takes off 1", lambda counts: counts.log() - 1),
        ("The sign is flipped", lambda counts: (counts - 1) / counts - counts.log()),
        ("log n is multiplied by (n - 1) / n", lambda counts: counts.log() * (counts - 1) / counts),
        (None, lambda counts: counts.log() - (counts - 1) / 2),
        (None, lambda counts: counts * counts.log() - (counts - 1)),
        (None, lambda counts: counts.log() - counts / (counts + 1)),
        ("This is the KL the other way round", lambda counts: counts - 1 - counts.log()),
        ("These are bits", lambda counts: (counts.log() - 1 + 1 / counts) / math.log(2)),
        ("The logarithm has base 10", lambda counts: counts.log10() - (counts - 1) / counts),
        (None, lambda counts: (counts - 1) / counts),
    ],
    "best_of_n": [
        ("Ties: here the first", best_first_of_ties),
        (None, best_by_sampling),
        ("It is not divided by C(N, n)", best_unnormalised),
        ("Places are off by one", best_with_places_from_zero),
        ("It is the best of the whole pool", lambda proxy, values, n: values.gather(1, proxy.argmax(1)[:, None])[:, 0]),
        ("It takes the best by `values`", lambda proxy, values, n: best_by_brute_force(values, values, n)),
        ("It gives the winner's proxy", lambda proxy, values, n: best_by_brute_force(proxy, proxy, n)),
        ("It takes the lowest proxy", lambda proxy, values, n: best_by_brute_force(-proxy, values, n)),
        ("This is the mean of all answers", lambda proxy, values, n: values.mean(1)),
        ("It takes the lowest proxy", lambda proxy, values, n: best_by_lgamma(-proxy, values, n)),
        ("The result has the shape", lambda proxy, values, n: best_by_lgamma(proxy, values, n).mean()),
        (None, lambda proxy, values, n: ((n * proxy).softmax(1) * values).sum(1)),
    ],
    "curve_and_peak": [
        ("This is Gao et al.'s form for reinforcement learning", curve_with(
            lambda d: (d, -torch.xlogy(d, d)), lambda a, b, kl, gain: (2 * (a / b - 1)).exp())),
        ("The peak is the highest of the measured points", curve_with(
            best_of_n_columns, lambda a, b, kl, gain: kl[gain.argmax()])),
        ("The third number is the gain at the peak", curve_with(
            best_of_n_columns, lambda a, b, kl, gain: a**2 / (4 * b))),
        ("The peak is given as a distance", curve_with(best_of_n_columns, lambda a, b, kl, gain: a / (2 * b))),
        ("This is where all gain is lost", curve_with(best_of_n_columns, lambda a, b, kl, gain: (a / b) ** 2)),
        ("The square and the 2 are missing", curve_with(best_of_n_columns, lambda a, b, kl, gain: a / b)),
        ("The peak is upside down", curve_with(best_of_n_columns, lambda a, b, kl, gain: (2 * b / a) ** 2)),
        ("It fits against KL", curve_with(
            lambda d: (d**2, -(d**4)), lambda a, b, kl, gain: a / (2 * b))),
        ("It returns", lambda kl, gain: tuple(curve_by_qr(kl, gain))),
        ("The peak is looked for among the measured KLs", curve_with(
            best_of_n_columns, lambda a, b, kl, gain: kl[(a * kl.sqrt() - b * kl).argmax()])),
        ("The order is alpha, beta, peak", lambda kl, gain: curve_by_qr(kl, gain).roll(1)),
        (None, curve_with(best_of_n_columns, lambda a, b, kl, gain: (a / (2 * b)) ** 0.5)),
    ],
    "gold_where_stopped": [
        ("It stops where the KL first leaves the budget", stop_before_first_exceed),
        ("It takes the last measurement before the KL first leaves", stop_last_before_first_exceed),
        ("It takes the first measurement beyond the budget", stop_at_first_exceed),
        ("The proxy has a say", stop_by_both),
        ("These are the indices", stop_at_index),
        (None, stop_with_penalised_validation),
        ("It takes the measurement whose KL is nearest to the budget", stop_nearest_to_budget),
        ("Gold chooses here", lambda proxy, validation, gold, kl, budget: (
            gold.masked_fill(kl > budget, -torch.inf).amax(1))),
        ("The budget is not looked at", lambda proxy, validation, gold, kl, budget: (
            gold.gather(1, validation.argmax(1, keepdim=True))[:, 0])),
        ("It reports the proxy", lambda proxy, validation, gold, kl, budget: (
            stop_by_penalty(proxy, validation, proxy, kl, budget))),
        ("It takes the lowest validation score", lambda proxy, validation, gold, kl, budget: (
            stop_by_penalty(proxy, -validation, gold, kl, budget))),
        ("This is gold at the start", lambda proxy, validation, gold, kl, budget: gold[:, 0]),
        (None, lambda proxy, validation, gold, kl, budget: (
            torch.where(kl <= budget, gold, 0).sum(1) / (kl <= budget).sum(1))),
    ],
    "ensemble_reward": [
        ("This is the mean minus the models' deviation (dividing by M)", ensemble_with(
            standard, lambda z, how: z.mean(0) if how == "mean" else z.mean(0) - z.std(0, correction=0))),
        ("They are brought between the lowest and the highest", ensemble_with(between_lowest_and_highest, mean_or_min)),
        ("They are combined first", ensemble_standardised_after),
        ("They are standardised across the models", ensemble_along_the_models),
        ("is infinite where a number is expected", lambda scores, reference, how: mean_or_min(
            (scores - reference.mean(0).mean()) / reference.std(0, correction=0).mean(), how)),
        ("It takes the highest", ensemble_with(standard, lambda z, how: z.mean(0) if how == "mean" else z.amax(0))),
        ("Mean and min are interchanged", ensemble_with(
            standard, lambda z, how: z.amin(0) if how == "mean" else z.mean(0))),
        ("The result has the shape", lambda scores, reference, how: standard(scores, reference)),
        ("This is the mean minus the models' deviation (dividing by M - 1)", ensemble_with(
            standard, lambda z, how: z.mean(0) if how == "mean" or len(z) < 2 else z.mean(0) - z.std(0))),
        ("This is the lowest score of the whole batch", ensemble_with(
            standard, lambda z, how: z.mean(0) if how == "mean" else z.min().repeat(z.shape[1]))),
        ("The result has the shape", ensemble_with(
            standard, lambda z, how: z.mean(1) if how == "mean" else z.amin(1))),
        (None, ensemble_with(
            lambda scores, reference: (scores[:, :, None] > reference[:, None]).double().mean(2), mean_or_min)),
    ],
    "fresh_pairs": [
        ("The newest policy of each prompt", fresh_of_each_prompt),
        ("Only i < j is looked at", fresh_upper_only),
        ("The scores are not looked at", fresh_without_scores),
        ("Only neighbours in the ranking", fresh_neighbours),
        ("The last answer's policy", fresh_of_latest_number),
        ("It is the wrong way round", lambda prompts, policies, scores: fresh_one_by_one(prompts, policies, -scores)),
        ("The result has the shape", lambda prompts, policies, scores: (
            fresh_one_by_one(prompts, policies, scores).nonzero())),
        ("Only the worse one must be new", lambda prompts, policies, scores: (
            (prompts[:, None] == prompts) & (policies == policies.max()) & (scores[:, None] > scores))),
        ("A newer policy's answer is compared with an older one's", lambda prompts, policies, scores: (
            (prompts[:, None] == prompts) & (policies[:, None] > policies) & (scores[:, None] > scores))),
        (None, lambda prompts, policies, scores: (
            (prompts[:, None] == prompts) & (policies[:, None] >= policies) & (scores[:, None] > scores))),
    ],
}  # fmt: skip
