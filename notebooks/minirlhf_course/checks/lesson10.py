"""Lesson 10: best of n and its KL, the curve and its peak, when to stop, ensembles, fresh labels, rounds."""

from __future__ import annotations

import math
from functools import partial

from torch import Tensor

from minirlhf_course import overoptimisation
from minirlhf_course.checks import rounds10
from minirlhf_course.checks.exercise import exercise
from minirlhf_course.checks.mistakes10 import (
    best_cases,
    best_with,
    curve_cases,
    curve_with,
    ensemble_cases,
    ensemble_with,
    fresh_cases,
    fresh_with,
    kl_cases,
    kl_with,
    stop_cases,
    stop_with,
)

# 10.1 ----------------------------------------------------------------------------------------------------------------


@exercise(
    "10.1",
    "how far is the best of n?",
    difficulty=2,
    minutes=10,
    task="Rank all answers that the model may give by their score, and call $u \\in [0, 1]$ an answer's place (0: the "
    "worst, 1: the best). One sample has a uniform $u$. The best of $n$ has the density $f(u) = n\\,u^{n-1}$, whatever "
    "the score is. So\n\n"
    "$$\\mathrm{KL}(\\text{best of } n \\,\\|\\, \\text{one}) = \\int_0^1 f(u) \\log f(u)\\, du.$$\n\n"
    "Do the integral, and write down what comes out.",
    cases=kl_cases,
    suspects={
        "log n is only the first term: it would be the KL of taking the best 1/n of all answers, each alike. The best "
        "of n is less sharp: take (n - 1) / n off.": partial(kl_with, "log n"),
        "This is the KL the other way round, of one sample from the best of n: average log f under f.": (
            partial(kl_with, "other way")
        ),
        "This is the root of the KL, the distance of the figures: give the KL.": partial(kl_with, "root"),
        "The second term is taken off, not added: u^(n-1) is at most 1, and its log is below 0.": (
            partial(kl_with, "added")
        ),
        "It takes off 1 / n: (n - 1) / n.": partial(kl_with, "one over n"),
        "It takes off n - 1 / n, where (n - 1) / n is meant: brackets.": partial(kl_with, "brackets"),
        "These are bits: nats, with the natural logarithm.": partial(kl_with, "bits"),
        "The logarithm has base 10: nats, with the natural logarithm.": partial(kl_with, "ten"),
        "It takes off 1: (n - 1) / n, which comes near to 1 only for large n, and is 0 for n = 1.": (
            partial(kl_with, "one")
        ),
        "The sign is flipped: a KL is never below 0.": partial(kl_with, "turned"),
        "log n is multiplied by (n - 1) / n: (n - 1) / n is taken off.": partial(kl_with, "times"),
    },
    hints=(
        "$\\log f = \\log n + (n-1) \\log u$. The first part averages to itself. For the second: $\\int_0^1 n\\,u^{n-1}"
        "\\log u\\, du = -1/n$, by parts.",
        "`counts.log() - (counts - 1) / counts`",
    ),
)
def best_of_n_kl(counts: Tensor) -> Tensor:
    """KL(best of n || one sample) in nats, for each n of counts: [M] float64 gives [M]."""
    return counts.new_tensor([overoptimisation.best_of_n_kl(int(n)) for n in counts])


# 10.2 ----------------------------------------------------------------------------------------------------------------


@exercise(
    "10.2",
    "the best of n, from a pool",
    difficulty=4,
    minutes=25,
    task="$N$ answers to a prompt are sampled and scored, once. What is the best of $n$ worth, for every $n \\le N$? "
    "Do not take the first $n$ and throw the rest away: average over **all** $\\binom{N}{n}$ choices of $n$ from the "
    "pool. That needs no loop over choices. Sort by proxy: the answer at place $i$ (1 the worst, $N$ the best) wins "
    "a choice if it is in it and the other $n - 1$ come from the $i - 1$ below it. Answers with the same proxy share "
    "equally what they win together.",
    cases=best_cases,
    suspects={
        "It takes the best of the first n and throws the rest of the pool away: right on average, and as noisy as one "
        "draw. Average over all choices.": partial(best_with, "first n"),
        "It cuts the pool into groups of n: right on average, but C(N, n) choices are less noisy than N // n.": (
            partial(best_with, "groups")
        ),
        "It draws with putting back: then one answer may be drawn twice, and the best of n is worse than it is. The "
        "n answers are n different ones.": partial(best_with, "put back"),
        "Ties: here the last of those with the same proxy takes all. They must share, or the order in the pool "
        "decides.": partial(best_with, "ties"),
        "Ties: here the first of those with the same proxy takes all. They must share, or the order in the pool "
        "decides.": partial(best_with, "first tie"),
        "It is the best of the whole pool, whatever n is.": partial(best_with, "whole pool"),
        "It is not divided by C(N, n), the number of choices: the shares must sum to 1.": partial(best_with, "counts"),
        "Places are off by one: i - 1 answers lie below place i, so the worst one has none below it, and the best one "
        "N - 1.": partial(best_with, "shifted"),
        "This is the mean of all answers: the proxy is not looked at, nor is n.": partial(best_with, "mean"),
        "It is the mean of the n best: the best of n is one answer, the best of n drawn at random.": (
            partial(best_with, "top n")
        ),
        "It takes the best by `values`: the proxy decides who wins, it does not see values.": (
            partial(best_with, "own best")
        ),
        "It gives the winner's proxy: `values` of the winner is asked for.": partial(best_with, "proxy"),
        "It takes the lowest proxy: the highest wins.": partial(best_with, "worst"),
        "C(i, n) counts the choices among the lowest i, also those that i is not in: i must be in it, so the other "
        "n - 1 come from i - 1.": partial(best_with, "ranks"),
    },
    hints=(
        "`math.comb(i - 1, n - 1) / math.comb(N, n)` is the share that place i wins; these sum to 1. For ties: first "
        "replace every value by the mean of those with the same proxy. Then who wins among them does not matter.",
        "`same = (proxy[:, None] == proxy[:, :, None]).double()`, `values = (same @ values[..., None])[..., 0] / "
        "same.sum(2)`; `wins = values.new_tensor([math.comb(i, n - 1) for i in range(N)]) / math.comb(N, n)` with "
        "`N = proxy.shape[1]`; then `(values.gather(1, proxy.argsort(1)) * wins).sum(1)`.",
    ),
)
def best_of_n(proxy: Tensor, values: Tensor, n: int) -> Tensor:
    """What the best of n by proxy is worth on average, for each prompt: [B].

    proxy and values [B, N] float64, one row per prompt; 1 <= n <= N, drawn without putting back.
    """
    return overoptimisation.best_of_n(proxy, values, n)


# 10.3 ----------------------------------------------------------------------------------------------------------------


@exercise(
    "10.3",
    "the curve, and where it peaks",
    difficulty=3,
    minutes=20,
    task="Gao, Schulman and Hilton found that best-of-$n$'s gold above the start is well described by two numbers:\n\n"
    "$$\\text{gain} = d\\,(\\alpha - \\beta d), \\qquad d = \\sqrt{\\mathrm{KL}}.$$\n\n"
    "$\\alpha$ is what the first step away earns, $\\beta$ how fast the judge goes blind. Fit both by least squares, "
    "and say at which **KL** the fitted curve is highest. (At $d = 0$ there is no gain, so no constant.)",
    cases=curve_cases,
    suspects={
        "It fits against KL: the distance is its root.": partial(curve_with, "no root"),
        "The peak is given as a distance: as KL, so square it.": partial(curve_with, "distance"),
        "This is where all gain is lost again: the peak lies at half of that distance.": (
            partial(curve_with, "back to zero")
        ),
        "Half of the distance is a quarter of the KL, not half of it.": partial(curve_with, "half"),
        "The third number is the gain at the peak: the KL there is asked for.": partial(curve_with, "height"),
        "The square and the 2 are missing: the curve is highest at d = alpha / (2 beta), and the KL is the square of "
        "that.": partial(curve_with, "no 2"),
        "The peak is upside down: at d = alpha / (2 beta), and squared.": partial(curve_with, "upside down"),
        "The peak is the highest of the measured points: one point's noise decides. Take the fitted curve's.": (
            partial(curve_with, "measured")
        ),
        "This is Gao et al.'s form for reinforcement learning, d (alpha - beta log d): for best of n it is d (alpha - "
        "beta d).": partial(curve_with, "logarithm"),
        "beta has the wrong sign: in gain = d (alpha - beta d) a curve that bends down has beta > 0.": (
            partial(curve_with, "sign")
        ),
        "The order is alpha, beta, peak.": partial(curve_with, "swapped"),
        "The order is alpha, beta, peak: here the peak comes first.": partial(curve_with, "peak first"),
        "The peak is looked for among the measured KLs: it lies between them, where the derivative is 0.": (
            partial(curve_with, "grid")
        ),
        "There is a constant in the fit: no distance, no gain.": partial(curve_with, "constant"),
        "This fits gain / d: least squares of the gain itself, or the points nearest to 0, where noise is divided by "
        "almost nothing, weigh most.": partial(curve_with, "ratio"),
    },
    hints=(
        "It is linear in $\\alpha$ and $\\beta$: two columns, $d$ and $-d^2$. Set the derivative of $\\alpha d - "
        "\\beta d^2$ to 0 for the peak.",
        "`d = kl.sqrt()`, `columns = torch.stack((d, -d**2), 1)`, `alpha, beta = torch.linalg.lstsq(columns, "
        "gain[:, None]).solution[:, 0]`; the peak is `(alpha / (2 * beta))**2`.",
    ),
)
def curve_and_peak(kl: Tensor, gain: Tensor) -> Tensor:
    """[3]: alpha, beta, and the KL where alpha d - beta d^2 is highest, d = sqrt(KL).

    kl and gain [P] float64: gold above that of the start, at each KL.
    """
    alpha, beta = overoptimisation.fit_curve(kl.sqrt(), gain)
    return gain.new_tensor([alpha, beta, (alpha / (2 * beta)) ** 2])


# 10.4 ----------------------------------------------------------------------------------------------------------------


@exercise(
    "10.4",
    "when to stop, and what to report",
    difficulty=3,
    minutes=15,
    task="A run is measured now and then: the proxy it is trained on, the score of a *validation* reward model "
    "(trained on other rankings, never optimised), the KL, and gold. Stop each run where a team without gold would: "
    "of the measurements with KL at most `budget`, the one with the highest validation score, the earlier one where "
    "two are equal. Then report gold *there*. The score that chooses must not be the score that is reported, and "
    "neither may be the proxy.",
    cases=stop_cases,
    suspects={
        "The proxy chooses here: it is what the run climbs, and says the last step nearly always.": (
            partial(stop_with, "proxy")
        ),
        "Gold chooses here: nobody has it while training. Gold only reports, validation chooses.": (
            partial(stop_with, "oracle")
        ),
        "It reports the validation score it has chosen by: the highest of many noisy numbers is too high. Report gold "
        "there.": partial(stop_with, "told"),
        "It reports the proxy: that is what the run has climbed. Report gold there.": partial(stop_with, "proxy told"),
        "It takes the lowest validation score: the highest is the best.": partial(stop_with, "lowest"),
        "The budget is not looked at: measurements with a KL above it are out.": partial(stop_with, "no budget"),
        "KL at the budget is within it: <=.": partial(stop_with, "strict"),
        "It takes the last measurement within the budget: of those, the one with the highest validation score.": (
            partial(stop_with, "edge")
        ),
        "It takes the last measurement, whatever it is.": partial(stop_with, "end"),
        "It stops where the KL first leaves the budget: a later measurement within it counts as well, if the KL comes "
        "back.": partial(stop_with, "stays"),
        "It takes the last measurement before the KL first leaves the budget: of all those within it, the one with the "
        "highest validation score.": partial(stop_with, "last before"),
        "It takes the first measurement beyond the budget: that is out already. Of all those within it, the one with "
        "the highest validation score.": partial(stop_with, "first exceed"),
        "It takes the measurement whose KL is nearest to the budget: of those within it, the one with the highest "
        "validation score.": partial(stop_with, "nearest"),
        "The proxy has a say here, beside the validation score: it is what the run climbs. Validation chooses alone.": (
            partial(stop_with, "both")
        ),
        "This is gold at the start: report it where the validation score is highest.": partial(stop_with, "start"),
        "These are the indices of the measurements: report gold there.": partial(stop_with, "index"),
        "It stops at the first fall of the validation score: measurements are noisy, look at all of them.": (
            partial(stop_with, "first fall")
        ),
        "Where two are equally good it takes the later one: the earlier one is nearer to the start.": (
            partial(stop_with, "later")
        ),
        "It chooses one step for all runs: each run is stopped for itself.": partial(stop_with, "together"),
        "Measurements beyond the budget count as a score of 0, which may be the highest: fill with -inf.": (
            partial(stop_with, "zeros")
        ),
        "The index counts only the measurements within the budget, and is then looked up among all of them.": (
            partial(stop_with, "earlier of the filtered")
        ),
    },
    hints=(
        "`validation.masked_fill(kl > budget, -math.inf)`; `argmax` gives the first of equal ones.",
        "`at = validation.masked_fill(kl > budget, -math.inf).argmax(1, keepdim=True)`, then `gold.gather(1, at)[:, "
        "0]`. `proxy` is there to be left alone.",
    ),
)
def gold_where_stopped(proxy: Tensor, validation: Tensor, gold: Tensor, kl: Tensor, budget: float) -> Tensor:
    """Gold where each run is stopped: [R].

    proxy, validation, gold, kl [R, S] float64: R runs, S measurements of each; the first has
    KL 0; budget in nats.
    """
    at = validation.masked_fill(kl > budget, -math.inf).argmax(1, keepdim=True)
    return gold.gather(1, at)[:, 0]


# 10.5 ----------------------------------------------------------------------------------------------------------------


@exercise(
    "10.5",
    "several judges",
    difficulty=2,
    minutes=12,
    task="Where one reward model is fooled, another one, trained from another start, may not be. Combine $M$ of them: "
    "their mean, or for each answer the lowest of them (Coste et al.: worst-case optimisation). But a reward model's "
    "zero and its scale are its own (lesson 08). First bring each of them to one scale: mean 0 and standard deviation "
    "1 (`.std()`) over `reference`, its scores of a fixed set of the SFT model's answers.",
    cases=ensemble_cases,
    suspects={
        "The scores are combined raw: the model with the largest scale rules the mean, and the lowest one is mostly "
        "the model whose zero lies lowest. Standardise each first.": partial(ensemble_with, "raw"),
        "They are standardised over the batch at hand: then every batch has mean 0, however good it is, and PPO could "
        "not see that it gets better. Use the mean and deviation of `reference`.": partial(ensemble_with, "own batch"),
        "One mean and one deviation for all models: each has its own, along dimension 1.": (
            partial(ensemble_with, "all together")
        ),
        "The mean is not taken off: zero differs from model to model.": partial(ensemble_with, "not centred"),
        "It does not divide by the deviation: the scale differs from model to model.": (
            partial(ensemble_with, "not scaled")
        ),
        "Only the mean is divided: brackets.": partial(ensemble_with, "brackets"),
        "It divides by the variance: by the standard deviation.": partial(ensemble_with, "variance"),
        "The deviation divides by R: `.std()` divides by R - 1.": partial(ensemble_with, "population"),
        "Mean and min are interchanged.": partial(ensemble_with, "swapped"),
        "`how` is not looked at: min asks for the lowest.": partial(ensemble_with, "always mean"),
        "`how` is not looked at: mean asks for the mean.": partial(ensemble_with, "pessimist"),
        "It takes the highest: an optimist is fooled whenever one of them is.": partial(ensemble_with, "max"),
        "It takes one model for all answers: the lowest of each answer.": partial(ensemble_with, "one model"),
        "This is the lowest score of the whole batch: the lowest of each answer.": (
            partial(ensemble_with, "one for all")
        ),
        "This is the median: the mean is asked for.": partial(ensemble_with, "median"),
        "This is the sum: the mean, or beta's unit changes with the number of models.": partial(ensemble_with, "sum"),
        "They are brought between the lowest and the highest of `reference`: mean 0 and standard deviation 1 are asked "
        "for.": partial(ensemble_with, "range"),
        "They are combined first and standardised afterwards: bring each model to one scale before.": (
            partial(ensemble_with, "afterwards")
        ),
        "They are standardised across the models, answer by answer: then their mean is 0 for every answer. Use each "
        "model's own mean and deviation over `reference`.": partial(ensemble_with, "across"),
        "This is the mean minus the models' deviation (dividing by M), another cautious reward: the lowest is asked "
        "for.": partial(ensemble_with, "doubt, M"),
        "This is the mean minus the models' deviation (dividing by M - 1), another cautious reward: the lowest is "
        "asked for.": partial(ensemble_with, "doubt, M - 1"),
    },
    hints=(
        "`reference.mean(1, keepdim=True)` and `reference.std(1, keepdim=True)` are [M, 1], and fit `scores` [M, B].",
        '`standard = (scores - mean) / deviation`; `standard.mean(0) if how == "mean" else standard.amin(0)`',
    ),
)
def ensemble_reward(scores: Tensor, reference: Tensor, how: str) -> Tensor:
    """One reward per answer from M models: [B].

    scores [M, B] float64: of the answers; reference [M, R]: of the SFT model's answers;
    how is "mean" or "min".
    """
    mean, deviation = reference.mean(1, keepdim=True), reference.std(1, keepdim=True)
    standard = (scores - mean) / deviation
    return standard.mean(0) if how == "mean" else standard.amin(0)


# 10.6 ----------------------------------------------------------------------------------------------------------------


@exercise(
    "10.6",
    "pairs for the next round",
    difficulty=2,
    minutes=10,
    task="When a policy has left the answers its judge was trained on, ask the labelers again, about what it says "
    "*now*. Of all answers in the file, which pairs teach the judge what it does not know yet? Both answers must be of "
    "the **newest** policy (the highest number), to the **same** prompt, and the labeler must have preferred one: ties "
    "make no pair.",
    cases=fresh_cases,
    suspects={
        "Answers to different prompts are compared: nobody ranked those against each other.": (
            partial(fresh_with, "prompts")
        ),
        "Older policies' answers are in it: pairs whose two answers are both the newest policy's.": (
            partial(fresh_with, "any policy")
        ),
        "Older policies' answers are in it: it is not enough that both are of one policy, it must be the newest.": (
            partial(fresh_with, "one policy")
        ),
        "One answer of the newest policy is enough here: both must be. New against old mostly teaches what a hack "
        "looks like against an answer, which is easier.": partial(fresh_with, "one of them"),
        "Only the better one must be new here: both must be.": partial(fresh_with, "winner"),
        "Only the worse one must be new here: both must be.": partial(fresh_with, "loser"),
        "A newer policy's answer is compared with an older one's: both must be the newest policy's.": (
            partial(fresh_with, "newer wins")
        ),
        "These are the oldest policy's answers: the newest has the highest number.": partial(fresh_with, "oldest"),
        "Ties make a pair here: the labeler preferred neither.": partial(fresh_with, "ties"),
        "An answer is better than itself here: > and not >=.": partial(fresh_with, "with itself"),
        "Each pair is there in both directions: [i, j] means that i is the better one.": (
            partial(fresh_with, "both ways")
        ),
        "It is the wrong way round: [i, j] means that i, the row, is the better one.": partial(fresh_with, "worse"),
        "The newest policy of each prompt is taken: a prompt that the newest policy has not answered makes no pair.": (
            partial(fresh_with, "each prompt")
        ),
        "The last answer's policy is taken for the newest: the newest has the highest number.": (
            partial(fresh_with, "last answer")
        ),
        "The scores are not looked at: only where i is the better one.": partial(fresh_with, "no scores"),
        "Only i < j is looked at: where the later answer is the better one, the pair stands at [i, j] with i > j.": (
            partial(fresh_with, "upper")
        ),
        "Only neighbours in the ranking are compared: use all pairs.": partial(fresh_with, "neighbours"),
        "Only the best against the worst: a ranking of K answers has up to K (K - 1) / 2 pairs, use them all.": (
            partial(fresh_with, "best and worst")
        ),
    },
    hints=(
        "`prompts[:, None] == prompts` is [N, N]: same prompt, for all pairs at once. Three such conditions, joined by "
        "`&`.",
        "`newest = policies == policies.max()`; `(prompts[:, None] == prompts) & newest[:, None] & newest & (scores[:, "
        "None] > scores)`",
    ),
)
def fresh_pairs(prompts: Tensor, policies: Tensor, scores: Tensor) -> Tensor:
    """True at [i, j] where answer i is the better one of a pair for the next round: bool [N, N].

    prompts and policies [N] int64: which prompt, and which policy's answer; scores [N] float64:
    the labeler's, higher is better.
    """
    newest = policies == policies.max()
    better = scores[:, None] > scores
    return (prompts[:, None] == prompts) & newest[:, None] & newest & better


# 10.7 ----------------------------------------------------------------------------------------------------------------


rounds = rounds10.rounds
