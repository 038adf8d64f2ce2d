"""Lesson 08, the reward model: pair loss, K-way loss, pairs that teach, last token, noise ceiling, offset."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf import losses
from minirlhf_course.checks.cases import F64, bools, flags, generators, ids, normal, tensor
from minirlhf_course.checks.exercise import Case, exercise

EPSILONS = (1e-6, 1e-7, 1e-8, 1e-9, 1e-10, 1e-12)

# 8.1 -----------------------------------------------------------------------------------------------------------------


def _pair_cases() -> list[Case]:
    cases = [
        Case("two answers that score the same", (tensor(1), tensor(1)), tensor(math.log(2))[0]),
        Case("the better one ahead by ln 3: sigmoid is 3/4", (tensor(3).log(), tensor(0)), tensor(4 / 3).log()[0]),
        Case("both score 200", (tensor(200), tensor(200)), tensor(math.log(2))[0]),
        Case("the better one behind by 200", (tensor(0), tensor(200)), tensor(200.0)[0]),
        Case("the better one ahead by 20", (tensor(20), tensor(0)), tensor(20).neg().exp()[0]),
        Case("two pairs", (tensor(0, 3).exp().log(), tensor(0, 3)), tensor(math.log(2))[0]),
    ]
    for size, generator in zip((2, 3, 5, 17), generators(4), strict=True):
        cases.append(Case(f"random, {size} pairs", (2 * normal(generator, size), 2 * normal(generator, size))))
    return cases


def _pair_with(bug: str, chosen: Tensor, rejected: Tensor) -> Tensor:
    """Exercise 8.1 with one mistake planted."""
    difference = rejected - chosen if bug == "swapped" else chosen - rejected
    if bug == "unstable":
        return -difference.sigmoid().log().mean()
    if bug == "ratio":
        return -(chosen.exp() / (chosen.exp() + rejected.exp())).log().mean()
    if bug == "cut":
        return F.binary_cross_entropy(difference.sigmoid(), torch.ones_like(difference))
    if bug == "squares":
        return (1 - difference.sigmoid()).square().mean()
    if bug == "relu":
        return F.relu(-difference).mean()
    if bug == "crossed":
        return -F.logsigmoid(chosen[:, None] - rejected).mean()
    if bug == "to one":
        return (1 - difference).square().mean()
    if bug == "alone":
        return -(F.logsigmoid(chosen) + F.logsigmoid(-rejected)).mean()
    if bug == "mean first":
        return -F.logsigmoid(difference.mean())
    if bug == "no log":
        return -difference.sigmoid().mean()
    if bug == "one minus":
        return (1 - difference.sigmoid()).mean()
    if bug == "linear":
        return -difference.mean()
    if bug == "hinge":
        return (1 - difference).clamp(min=0).mean()
    if bug == "constant":
        return -F.logsigmoid(chosen - rejected.detach()).mean()
    if bug == "each":
        return -F.logsigmoid(difference)
    total = F.logsigmoid(difference)
    total = total.sum() if bug == "sum" else total.mean()
    return total if bug == "sign" else -total


def _capped(epsilon: float, chosen: Tensor, rejected: Tensor) -> Tensor:
    return -((chosen - rejected).sigmoid() + epsilon).log().mean()


@exercise(
    "8.1",
    "one comparison",
    difficulty=1,
    minutes=6,
    task="The probability that the labeler prefers $y_w$ to $y_l$ is modelled as $\\sigma(r_w - r_l)$. Write minus "
    "its log, the mean over pairs. One case has $r_w - r_l = -200$, as a model in trouble has: what does "
    "`torch.sigmoid` give there, and what is the log of that?",
    cases=_pair_cases,
    suspects={
        "log(sigmoid(x)) is unstable, and so is log(1 + exp(-x)): at x = -200 float32 has 0 for the sigmoid and inf "
        "for the exp. Use torch.nn.functional.logsigmoid, which never leaves the logarithm.": (
            partial(_pair_with, "unstable")
        ),
        **{
            f"The epsilon caps the loss at {-math.log(epsilon):.0f} and kills the gradient where the model is most "
            "wrong (a clamp does the same): logsigmoid.": partial(_capped, epsilon)
            for epsilon in EPSILONS
        },
        "`binary_cross_entropy` cuts the loss at 100: binary_cross_entropy_with_logits, of the difference itself, does "
        "not.": partial(_pair_with, "cut"),
        "exp of a large reward overflows: logsigmoid of the difference never forms it.": partial(_pair_with, "ratio"),
        "The log is missing: this is the mean probability of being wrong. Its gradient vanishes just where the "
        "model is most wrong.": partial(_pair_with, "no log"),
        "This is 1 - sigmoid, without the log: its gradient vanishes just where the model is most wrong.": (
            partial(_pair_with, "one minus")
        ),
        "The minus sign is missing: the optimizer minimises.": partial(_pair_with, "sign"),
        "The difference is the wrong way round: the preferred answer comes first, chosen - rejected.": (
            partial(_pair_with, "swapped")
        ),
        "There is no sigmoid: minus the difference has no lower end, and scores would grow for ever.": (
            partial(_pair_with, "linear")
        ),
        "This is a hinge: a fine loss, but sigmoid(r_w - r_l) is then no probability.": partial(_pair_with, "hinge"),
        "This is a hinge at 0: it asks for no lead at all, so scores that are all equal are already perfect.": (
            partial(_pair_with, "relu")
        ),
        "Every chosen answer is compared with every rejected one: only with its own, chosen[i] - rejected[i].": (
            partial(_pair_with, "crossed")
        ),
        "No gradient flows into the rejected answers: the model must learn to score them lower, too.": (
            partial(_pair_with, "constant")
        ),
        "One loss per pair comes back: take the mean.": partial(_pair_with, "each"),
        "This is the sum: take the mean over pairs.": partial(_pair_with, "sum"),
        "This is a regression of the probability to 1: its gradient vanishes just where the model is most wrong. Take "
        "minus the log.": partial(_pair_with, "squares"),
        "This is a regression of the difference to 1: it pulls back a model that is surer than that. Take minus the "
        "log of the sigmoid.": partial(_pair_with, "to one"),
        "Each answer is judged alone: the labeler has compared them, so only the difference counts.": (
            partial(_pair_with, "alone")
        ),
        "The mean is taken before the log: one loss per pair first, then their mean.": (
            partial(_pair_with, "mean first")
        ),
    },
    hints=(
        "$\\log \\sigma(x) = -\\log(1 + e^{-x})$, and PyTorch has it as one function that never forms $\\sigma$.",
        "`-torch.nn.functional.logsigmoid(chosen - rejected).mean()`",
    ),
    leaves=("chosen", "rejected"),
)
def pair_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Mean of -log sigmoid(r_w - r_l): rewards of preferred and of other answers, both [P], give a 0-d tensor."""
    rewards = torch.stack((chosen, rejected), dim=1)
    return losses.ranking_loss(rewards, torch.tensor([1.0, 0.0]).expand(len(rewards), 2))


# 8.2 -----------------------------------------------------------------------------------------------------------------


def _ranking_cases() -> list[Case]:
    ln2 = math.log(2)
    cases = [
        Case("two answers, the second is the better one", (tensor([0, 0]), tensor([1, 2])), tensor(ln2)[0]),
        Case(
            "three answers, three pairs",
            (tensor([2, 1, 0]), tensor([3, 2, 1])),
            (2 * F.softplus(tensor(-1)) + F.softplus(tensor(-2)))[0] / 3,
        ),
        Case("three answers, the last two are tied", (tensor([1, 0, 0]), tensor([3, 1, 1])), F.softplus(tensor(-1))[0]),
        Case("the best answer is not the first", (tensor([0, 2]), tensor([1, 5])), F.softplus(tensor(-2))[0]),
        Case("far apart, and wrong", (tensor([0, 200]), tensor([2, 1])), tensor(200.0)[0]),
        Case(
            "two prompts, the second with a tie",
            (tensor([0, 0, 0], [0, 3, 3]), tensor([1, 2, 3], [0, 1, 1])),
            (ln2 + F.softplus(tensor(-3)))[0] / 2,
        ),
        Case(
            "two prompts, the second all tied",
            (tensor([0, 0, 0], [1, 2, 3]), tensor([1, 2, 3], [1, 1, 1])),
            tensor(ln2)[0],
        ),
    ]
    for (rows, k), generator in zip(((1, 4), (3, 2), (4, 5), (6, 9)), generators(4), strict=True):
        rewards, scores = 2 * normal(generator, rows, k), (2 * normal(generator, rows, k)).round()
        scores[:, 0] = 9.0  # no row is all tied
        cases.append(Case(f"random, {rows} prompts with {k} answers, some tied", (rewards, scores)))
    return cases


def _ranking_with(bug: str, rewards: Tensor, scores: Tensor) -> Tensor:
    """Exercise 8.2 with one mistake planted."""
    k = rewards.shape[1]
    differences = rewards[:, :, None] - rewards[:, None, :]
    better = scores[:, :, None] > scores[:, None, :]
    upper = torch.ones(k, k, dtype=torch.bool).triu(1)
    if bug == "first is best":
        better = upper.expand_as(better)
    if bug == "ties count":
        better = better | ((scores[:, :, None] == scores[:, None, :]) & upper)
    if bug == "everybody":
        better = ~torch.eye(k, dtype=torch.bool).expand_as(better)
    if bug in ("neighbours", "ends"):
        order = scores.argsort(dim=1, descending=True, stable=True)
        rewards, scores = rewards.gather(1, order), scores.gather(1, order)
        differences = rewards[:, :, None] - rewards[:, None, :]
        better = scores[:, :, None] > scores[:, None, :]
        near = torch.ones(k, k, dtype=torch.bool).triu(1).tril(1)
        if bug == "ends":
            near = torch.zeros(k, k, dtype=torch.bool)
            near[0, -1] = True
        better = better & near
    if bug == "swapped":
        better = better.transpose(1, 2)
    if bug == "regression":
        return F.mse_loss(rewards, scores)
    if bug == "classes":
        return F.cross_entropy(rewards, scores.argmax(1))
    if bug == "ListNet":
        return -(scores.softmax(1) * rewards.log_softmax(1)).sum(1).mean()
    if bug == "half":
        halves = ((scores[:, :, None] - scores[:, None, :]).sign() + 1) / 2
        return F.binary_cross_entropy_with_logits(differences, halves)
    if bug.startswith("places"):
        ordered = rewards.gather(1, scores.argsort(dim=1, descending=True, stable=True))
        nll = (ordered.flip(1).logcumsumexp(1).flip(1) - ordered)[:, :-1]
        return nll.sum(1).mean() if bug == "places" else nll.mean()
    gap = torch.where(better, scores[:, :, None] - scores[:, None, :], 0)
    if bug == "margin":
        differences = differences - gap
    if bug == "best":
        best = scores == scores.amax(1, keepdim=True)
        better = better & best[:, :, None] & (best.cumsum(1) == 1)[:, :, None]
    if bug == "no log":
        logs = differences.sigmoid()
    elif bug == "hinge":
        logs = (differences - 1).clamp(max=0)
    elif bug == "unstable":
        logs = torch.where(better, differences, 0).sigmoid().log()
    else:
        logs = F.logsigmoid(differences)
    kept = torch.where(better, logs, 0)
    if bug.startswith("gaps"):
        kept = kept * gap
    counts = better.sum((1, 2))
    per_prompt = kept.sum((1, 2))
    choose = k * (k - 1) / 2
    prompts = (counts > 0).sum()
    if bug == "unweighted":
        loss = per_prompt.sum() / prompts
    elif bug == "twice":
        loss = (per_prompt / counts.clamp(min=1)).sum() / prompts / choose
    elif bug == "ties in C":
        loss = per_prompt.sum() / choose / prompts
    elif bug == "k squared":
        loss = kept.mean((1, 2)).sum() / prompts
    elif bug == "over pairs":
        loss = kept.sum() / counts.sum()
    elif bug == "tied prompts":
        loss = (per_prompt / counts.clamp(min=1)).mean()
    elif bug == "sum":
        loss = (per_prompt / counts.clamp(min=1)).sum()
    elif bug == "by K":
        loss = per_prompt.sum() / k / prompts
    elif bug == "gaps by gaps":
        loss = (per_prompt / gap.sum((1, 2)).clamp(min=1e-9)).sum() / prompts
    elif bug == "unguarded":
        loss = (per_prompt / counts).mean()
    else:
        loss = (per_prompt / counts.clamp(min=1)).sum() / prompts
    return loss if bug == "sign" else -loss


def _ranking_capped(epsilon: float, rewards: Tensor, scores: Tensor) -> Tensor:
    better = scores[:, :, None] > scores[:, None, :]
    logs = ((rewards[:, :, None] - rewards[:, None, :]).sigmoid() + epsilon).log()
    counts = better.sum((1, 2))
    return -(torch.where(better, logs, 0).sum((1, 2)) / counts.clamp(min=1)).sum() / (counts > 0).sum()


@exercise(
    "8.2",
    "all pairs of a ranking",
    difficulty=3,
    minutes=20,
    task="Equation 1: for every prompt the mean of $-\\log\\sigma(r_w - r_l)$ over all of its pairs, then the mean "
    "over prompts. Tied answers make no pair, so the divisor of a prompt is the number of pairs that are left "
    "($K(K-1)/2$ without ties); a prompt without any counts for nothing. The answers come in no particular "
    "order.",
    cases=_ranking_cases,
    suspects={
        "It is normalised twice: the mean over pairs has divided by C(K, 2) already.": partial(_ranking_with, "twice"),
        "1/C(K, 2) is missing: a prompt with 9 answers would weigh 36 times as much as one with 2.": (
            partial(_ranking_with, "unweighted")
        ),
        "log(sigmoid(x)) is unstable, and so is log(1 + exp(-x)): use torch.nn.functional.logsigmoid.": (
            partial(_ranking_with, "unstable")
        ),
        "The log is missing: -sigmoid has no gradient where the model is most wrong.": (
            partial(_ranking_with, "no log")
        ),
        "The minus sign is missing: the optimizer minimises.": partial(_ranking_with, "sign"),
        "The pairs are upside down: the better answer's reward comes first.": partial(_ranking_with, "swapped"),
        "It takes the answers as sorted, the best first: compare their scores.": (
            partial(_ranking_with, "first is best")
        ),
        "Every pair is counted in both directions: only (better, worse) is a pair.": (
            partial(_ranking_with, "everybody")
        ),
        "Tied answers are counted as pairs: a tie prefers nothing, drop it (> and not >=).": (
            partial(_ranking_with, "ties count")
        ),
        "It divides by K * K, as mean() over the matrix does: divide by the number of pairs.": (
            partial(_ranking_with, "k squared")
        ),
        "The divisor still counts tied pairs: divide by the number of pairs that are left.": (
            partial(_ranking_with, "ties in C")
        ),
        "It is the mean over all pairs of the batch, so a prompt with ties weighs less: first the mean of each "
        "prompt.": (partial(_ranking_with, "over pairs")),
        "A prompt whose answers are all tied is counted in the mean over prompts: leave it out.": (
            partial(_ranking_with, "tied prompts")
        ),
        "Only neighbours in the ranking are compared: all pairs count.": partial(_ranking_with, "neighbours"),
        "Only the best and the worst are compared: all pairs count.": partial(_ranking_with, "ends"),
        "This is the sum over prompts: take the mean.": partial(_ranking_with, "sum"),
        "A prompt whose answers are all tied divides 0 by 0: clamp the number of its pairs at 1, and leave the prompt "
        "out of the mean.": partial(_ranking_with, "unguarded"),
        "This is Plackett-Luce, a softmax over what is left at each place, summed over places: equation 1 compares "
        "pairs, and takes their mean.": partial(_ranking_with, "places"),
        "This is Plackett-Luce, a softmax over what is left at each place: equation 1 compares pairs.": (
            partial(_ranking_with, "places, mean")
        ),
        "The pairs are weighed by how far apart the labeler's scores are: only their order counts, and every pair "
        "weighs the same.": partial(_ranking_with, "gaps"),
        "The pairs are weighed by how far apart the labeler's scores are, and divided by the sum of these weights: "
        "only their order counts, and every pair weighs the same.": partial(_ranking_with, "gaps by gaps"),
        "The difference of the labeler's scores stands inside the sigmoid, as a margin: only their order counts.": (
            partial(_ranking_with, "margin")
        ),
        "This is a regression on the labeler's scores: only their order counts, compare pairs.": (
            partial(_ranking_with, "regression")
        ),
        "This is a softmax over all answers, with the best one as the right class: compare all pairs.": (
            partial(_ranking_with, "classes")
        ),
        "This is ListNet, a softmax of the rewards against one of the scores: equation 1 compares pairs.": (
            partial(_ranking_with, "ListNet")
        ),
        "Ties, and each answer against itself, count as half a win: they make no pair, leave them out.": (
            partial(_ranking_with, "half")
        ),
        "This is a hinge: a fine loss, but sigmoid(r_w - r_l) is then no probability.": partial(_ranking_with, "hinge"),
        "It divides by K, the number of answers: divide by the number of pairs.": partial(_ranking_with, "by K"),
        "Only the best answer is compared with the others: all pairs count.": partial(_ranking_with, "best"),
        **{
            f"The epsilon caps the loss of a pair at {-math.log(epsilon):.0f} and kills the gradient where the model "
            "is most wrong: logsigmoid.": partial(_ranking_capped, epsilon)
            for epsilon in EPSILONS
        },
    },
    hints=(
        "`rewards[:, :, None] - rewards[:, None, :]` is [B, K, K], all differences at once; the same with `scores` "
        "says which of them are pairs.",
        "`losses = torch.where(pairs, -F.logsigmoid(differences), 0).sum((1, 2))`, `counts = pairs.sum((1, 2))`, "
        "then `(losses / counts.clamp(min=1)).sum() / (counts > 0).sum()`.",
    ),
    leaves=("rewards",),
)
def ranking_loss(rewards: Tensor, scores: Tensor) -> Tensor:
    """The K-way loss: the model's rewards and the labeler's scores (high = good), both [B, K], give a 0-d tensor."""
    return losses.ranking_loss(rewards, scores)


# 8.3 -----------------------------------------------------------------------------------------------------------------


def _usable_cases() -> list[Case]:
    cases = [
        Case(
            "two answers, the second is better",
            (ids([[5, 6], [5, 7]]), tensor([1, 2])),
            bools([[0, 0], [1, 0]]),
        ),
        Case("tied", (ids([[5, 6], [5, 7]]), tensor([1, 1])), bools([[0, 0], [0, 0]])),
        Case(
            "alike after truncation, and scored apart",
            (ids([[5, 6], [5, 6]]), tensor([1, 2])),
            bools([[0, 0], [0, 0]]),
        ),
        Case(
            "three texts with the same sum, two of which have the same tokens",
            (ids([[4, 7], [7, 4], [5, 6]]), tensor([3, 2, 1])),
            bools([[0, 1, 1], [0, 0, 1], [0, 0, 0]]),
        ),
        Case("different in the first token alone", (ids([[4, 6], [5, 6]]), tensor([2, 1])), bools([[0, 1], [0, 0]])),
        Case(
            "one is the beginning of the other (0 is padding)",
            (ids([[5, 6, 0], [5, 6, 7]]), tensor([2, 1])),
            bools([[0, 1], [0, 0]]),
        ),
    ]
    for (rows, k, width), generator in zip(((2, 3, 2), (3, 4, 3), (4, 6, 3)), generators(3), strict=True):
        tokens = torch.randint(3, 5, (rows, k, width), generator=generator)
        scores = (2 * normal(generator, rows, k)).round()
        cases.append(Case(f"random, {rows} prompts with {k} answers", (tokens, scores)))
    return cases


def _usable_with(bug: str, tokens: Tensor, scores: Tensor) -> Tensor:
    """Exercise 8.3 with one mistake planted."""
    better = scores[:, :, None] > scores[:, None, :]
    if bug == "ties":
        better = scores[:, :, None] >= scores[:, None, :]
    if bug == "upside down":
        better = better.transpose(1, 2)
    if bug == "either":
        better = scores[:, :, None] != scores[:, None, :]
    unequal = tokens[:, :, None] != tokens[:, None, :]
    if bug == "no scores":
        return unequal.any(-1)
    if bug == "upper":
        return (better & unequal.any(-1)).triu(1)
    if bug == "twins":
        alone = (~unequal.any(-1)).sum(2) == 1
        return better & alone[:, :, None] & alone[:, None, :]
    if bug == "sorted":
        ordered = tokens.sort(-1).values
        return better & (ordered[:, :, None] != ordered[:, None, :]).any(-1)
    if bug == "or":
        return better | unequal.any(-1)
    if bug == "same":
        return better & ~unequal.any(-1)
    if bug == "sums":
        return better & (tokens.sum(-1)[:, :, None] != tokens.sum(-1)[:, None, :])
    differ = {"all": unequal.all(-1), "first": unequal[..., 0], "last": unequal[..., -1]}.get(bug, unequal.any(-1))
    return better if bug == "truncated" else better & differ


@exercise(
    "8.3",
    "pairs that teach something",
    difficulty=2,
    minutes=10,
    task="Long texts are cut to fit the model. Two answers that differ only behind the cut have become one text, "
    "with two different scores. Which pairs (i better than j) are left to learn from?",
    cases=_usable_cases,
    suspects={
        "Answers that became equal after truncation still make a pair: r_i - r_j is 0 whatever the model does, so "
        "it only adds ln 2 to the loss and a coin toss to the accuracy. Compare the tokens, too.": (
            partial(_usable_with, "truncated")
        ),
        "Ties are pairs here: a tie prefers nothing (> and not >=).": partial(_usable_with, "ties"),
        "The pairs are upside down: [b, i, j] is True where i is better than j.": (
            partial(_usable_with, "upside down")
        ),
        "Each pair is there in both directions: only where i is better than j.": partial(_usable_with, "either"),
        "All tokens must differ here: one different token is enough (any and not all).": partial(_usable_with, "all"),
        "Only the first tokens are compared.": partial(_usable_with, "first"),
        "Only the last tokens are compared.": partial(_usable_with, "last"),
        "Only the sums of the tokens are compared: two texts may have the same sum. Compare token by token.": (
            partial(_usable_with, "sums")
        ),
        "The order of the tokens is not looked at: two texts may have the same tokens in another order.": (
            partial(_usable_with, "sorted")
        ),
        "One of the two conditions is enough here: both must hold, & and not |.": partial(_usable_with, "or"),
        "These are the pairs that teach nothing: the texts must differ.": partial(_usable_with, "same"),
        "The scores are not looked at: only where i is better than j.": partial(_usable_with, "no scores"),
        "Only i < j is looked at: where the later answer is the better one, the pair stands at [b, i, j] with i > j.": (
            partial(_usable_with, "upper")
        ),
        "An answer that has a twin is dropped altogether: it still makes pairs with all other texts.": (
            partial(_usable_with, "twins")
        ),
    },
    hints=(
        "Two conditions, each [B, K, K], joined by `&`. The first is in exercise 8.2 already.",
        "`(tokens[:, :, None] != tokens[:, None, :]).any(-1)`",
    ),
)
def usable_pairs(tokens: Tensor, scores: Tensor) -> Tensor:
    """True at [b, i, j] where answer i is better than j and another text: tokens [B, K, T], scores [B, K]."""
    better = scores[:, :, None] > scores[:, None, :]
    return better & (tokens[:, :, None] != tokens[:, None, :]).any(-1)


# 8.4 -----------------------------------------------------------------------------------------------------------------


def _last_cases() -> list[Case]:
    nan = torch.nan
    cases = [
        Case("no padding", (tensor([1, 2, 3]), bools([1, 1, 1])), tensor(3.0)),
        Case("padding on the right", (tensor([1, 2, nan]), bools([1, 1, 0])), tensor(2.0)),
        Case("padding on the left", (tensor([nan, 2, 3]), bools([0, 1, 1])), tensor(3.0)),
        Case("padding on both sides", (tensor([nan, 2, 3, nan]), bools([0, 1, 1, 0])), tensor(3.0)),
        Case("a single token", (tensor([nan, 2, nan]), bools([0, 1, 0])), tensor(2.0)),
        Case(
            "two answers of unlike length",
            (tensor([1, 2, 3], [4, nan, nan]), bools([1, 1, 1], [1, 0, 0])),
            tensor(3.0, 4.0),
        ),
    ]
    for (rows, columns), generator in zip(((3, 4), (5, 9), (2, 17)), generators(3), strict=True):
        values = normal(generator, rows, columns)
        left = torch.randint(0, columns // 2, (rows, 1), generator=generator)
        right = torch.randint(columns // 2, columns, (rows, 1), generator=generator)
        place = torch.arange(columns)
        mask = (place >= left) & (place <= right)
        values = torch.where(mask | flags(generator, rows, columns, share=0.5), values, nan)
        cases.append(Case(f"random, of shape {(rows, columns)}, padded on both sides", (values, mask)))
    return cases


def _last_with(bug: str, token_values: Tensor, mask: Tensor) -> Tensor:
    """Exercise 8.4 with one mistake planted."""
    columns = token_values.shape[1]
    rows = torch.arange(len(token_values))
    counts = mask.sum(1)
    if bug == "mean":
        return torch.where(mask, token_values, 0).sum(1) / counts
    if bug == "sum":
        return torch.where(mask, token_values, 0).sum(1)
    if bug == "lowest":
        return torch.where(mask, token_values, torch.inf).amin(1)
    if bug == "highest":
        return torch.where(mask, token_values, -torch.inf).amax(1)
    if bug == "multiplied":
        last = torch.where(mask, torch.arange(columns), -1).amax(1)
        return (token_values * F.one_hot(last, columns)).sum(1)
    last = torch.where(mask, torch.arange(columns), -1).amax(1)
    index = {
        "last column": torch.full_like(counts, columns - 1),
        "count": counts - 1,
        "first pad": (~mask).int().argmax(1) - 1,
        "one behind": (last + 1).clamp(max=columns - 1),
        "one before": (last - 1).clamp(min=0),
        "first": mask.int().argmax(1),
        "row's first": last[:1].expand_as(last),
    }[bug]
    return token_values[rows, index]


@exercise(
    "8.4",
    "one score per answer",
    difficulty=2,
    minutes=10,
    task="The head gives a number at every token; the score is the one at the **last real token**, the only one "
    "that has read the whole answer. Padding may stand on the right, on the left, or on both sides, and holds "
    "garbage (NaN, too).",
    cases=_last_cases,
    suspects={
        "It reads the last column: with padding on the right that is a pad token, and answers of unlike length are "
        "scored on nothing.": partial(_last_with, "last column"),
        "It counts the real tokens: mask.sum(1) - 1 is the last one only if no padding stands on the left.": (
            partial(_last_with, "count")
        ),
        "It looks for the first padding: with padding on the left that stands before the answer.": (
            partial(_last_with, "first pad")
        ),
        "The reward is read on every token and averaged: tokens in the middle have not read the whole answer. Only "
        "the last one counts.": partial(_last_with, "mean"),
        "The reward is read on every token and added up: a longer answer would score more for being long. Only the "
        "last token counts.": partial(_last_with, "sum"),
        "It multiplies by a mask: 0 * NaN is NaN. Pick the number by its index.": partial(_last_with, "multiplied"),
        "One token too far: that is the padding behind the answer.": partial(_last_with, "one behind"),
        "One token too early: the answer's last token (EOS) is the one that knows it has ended.": (
            partial(_last_with, "one before")
        ),
        "This is the first real token: it has read nothing yet.": partial(_last_with, "first"),
        "All rows use the first row's index: each answer ends where it ends.": partial(_last_with, "row's first"),
        "This is the lowest value of the answer: take the one at its last token.": partial(_last_with, "lowest"),
        "This is the highest value of the answer: take the one at its last token.": partial(_last_with, "highest"),
    },
    hints=(
        "The index of the last True in each row: give every column its number, and take the largest that counts.",
        "`last = torch.where(mask, torch.arange(T), -1).amax(1)`, then `token_values.gather(1, last[:, None])`.",
    ),
    leaves=("token_values",),
)
def last_token_scores(token_values: Tensor, mask: Tensor) -> Tensor:
    """Each answer's score [B] from the head at every token [B, T] and the mask [B, T], True at real tokens."""
    columns = torch.arange(token_values.shape[1])
    last = torch.where(mask, columns, -1).amax(1)
    return token_values.gather(1, last[:, None]).squeeze(1)


# 8.5 -----------------------------------------------------------------------------------------------------------------


def _ceiling_cases() -> list[Case]:
    def both(agreement: float, ceiling: float) -> tuple[Tensor, Tensor]:
        return torch.tensor(agreement, dtype=F64), torch.tensor(ceiling, dtype=F64)

    def rows(*scores: object) -> Tensor:
        return tensor(*scores, dtype=F64)

    ladder = rows([1, 2, 3, 4, 5])
    # One neighbour swapped: 9 of 10 pairs agree. Two swaps of neighbours and one more: 8, 7.
    cases = [
        Case("they agree on everything", (rows([1, 2, 3]), rows([10, 20, 30])), both(1.0, 1.0)),
        Case("one pair of ten the other way", (ladder, rows([2, 1, 3, 4, 5])), both(0.9, (1 + 0.8**0.5) / 2)),
        Case("a tie of the first, one of the second", (rows([1, 1, 2]), rows([1, 2, 2])), both(1.0, 1.0)),
        Case("they agree by chance", (rows([1, 2], [1, 2]), rows([1, 2], [2, 1])), both(0.5, 0.5)),
        Case("they disagree on everything", (rows([1, 2]), rows([2, 1])), both(0.0, 0.5)),
        Case(
            "two prompts, one has fewer pairs",
            (rows([1, 2, 3], [1, 1, 2]), rows([1, 2, 3], [1, 1, 0])),
            both(3 / 5, (1 + 0.2**0.5) / 2),
        ),
    ]
    for (count, k), generator in zip(((4, 4), (8, 6), (20, 9)), generators(3), strict=True):
        truth = normal(generator, count, k)
        one, two = truth + 0.5 * normal(generator, count, k), truth + 0.5 * normal(generator, count, k)
        cases.append(Case(f"random, {count} prompts with {k} answers", (one.round(), two.round())))
    return cases


def _ceiling_with(bug: str, scores: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Exercise 8.5 with one mistake planted."""
    first = (scores[:, :, None] - scores[:, None, :]).sign()
    second = (others[:, :, None] - others[:, None, :]).sign()
    upper = torch.ones(scores.shape[1], scores.shape[1], dtype=torch.bool).triu(1)
    counted = {"diagonal": torch.ones_like(first, dtype=torch.bool), "ties": upper.expand_as(first)}.get(
        bug, (first != 0) & (second != 0) & upper
    )
    if bug == "one tie":
        counted = (first != 0) & upper
    if bug == "across":
        return _ceiling_with("", scores.reshape(1, -1), others.reshape(1, -1))
    same = (first == second) & counted
    agreement = same.sum().double() / counted.sum()
    if bug == "of prompts":
        shares = same.sum((1, 2)).double() / counted.sum((1, 2)).clamp(min=1)
        agreement = shares[counted.any(2).any(1)].mean()
    if bug == "half ties":
        agreement = torch.where((first != 0) & (second != 0), same.double(), 0.5)[upper.expand_as(first)].mean()
    excess = (2 * agreement - 1).clamp(min=0)
    if bug == "chance":
        return agreement, 2 * agreement - 1
    if bug == "no half":
        return agreement, 1 + excess.sqrt()
    if bug == "abs":
        excess = (2 * agreement - 1).abs()
    if bug == "agreement":
        return agreement, agreement.clamp(min=0.5)
    if bug == "both":
        return agreement, agreement
    if bug == "root":
        return agreement, agreement.sqrt()
    if bug == "half way":
        return agreement, (1 + agreement) / 2
    if bug == "square":
        return agreement, agreement**2 + (1 - agreement) ** 2
    if bug == "minus":
        return agreement, (1 - excess.sqrt()) / 2
    if bug == "nan":
        excess = 2 * agreement - 1
    return agreement, (1 + excess.sqrt()) / 2


@exercise(
    "8.5",
    "the noise ceiling of two labelers",
    difficulty=3,
    minutes=20,
    task="Two labelers ranked the same answers. If each is right about a pair with probability $p$, whatever the "
    "other does, they agree when both are right or both are wrong: $a = p^2 + (1 - p)^2$. Measure $a$ over all "
    "pairs that **both** of them ordered, then solve for $p \\ge 1/2$: no model can agree with such a labeler "
    "more often than that. Where they agree less often than a coin, say $p = 1/2$.",
    cases=_ceiling_cases,
    suspects={
        "The ceiling is not the agreement: where two labelers disagree, one of them is wrong, and a model may be "
        "right.": (partial(_ceiling_with, "agreement")),
        "The second number is the agreement again: where two labelers disagree, one of them is wrong, and a model may "
        "be right.": partial(_ceiling_with, "both"),
        "The root of the agreement forgets that they also agree when both are wrong: a = p^2 + (1 - p)^2.": (
            partial(_ceiling_with, "root")
        ),
        "Half way between the agreement and 1: solve a = p^2 + (1 - p)^2 for p.": partial(_ceiling_with, "half way"),
        "This is the agreement of two labelers who are right with probability a: it goes the other way, solve for p.": (
            partial(_ceiling_with, "square")
        ),
        "Of the two solutions it takes the one below 1/2.": partial(_ceiling_with, "minus"),
        "Below an agreement of 1/2 it takes the root of a negative number: clamp 2a - 1 at 0.": (
            partial(_ceiling_with, "nan")
        ),
        "Below an agreement of 1/2 it turns the labelers' disagreement into a ceiling: clamp 2a - 1 at 0.": (
            partial(_ceiling_with, "abs")
        ),
        "The whole matrix is counted, the diagonal too, where an answer agrees with itself: only pairs i < j.": (
            partial(_ceiling_with, "diagonal")
        ),
        "Ties count: a pair that either of them tied has no order to agree on.": partial(_ceiling_with, "ties"),
        "Ties of the second labeler count: drop a pair that either of them tied.": partial(_ceiling_with, "one tie"),
        "It is the mean of the prompts' agreements: add up pairs over all prompts, then divide once.": (
            partial(_ceiling_with, "of prompts")
        ),
        "Answers to different prompts are compared: pairs are made within a row.": partial(_ceiling_with, "across"),
        "A tie counts as half an agreement: a pair that either of them tied is left out.": (
            partial(_ceiling_with, "half ties")
        ),
        "This is the agreement beyond chance, 2a - 1, which is (2p - 1)^2: take its root, and solve for p.": (
            partial(_ceiling_with, "chance")
        ),
        "The half is missing: p = (1 + sqrt(2a - 1)) / 2.": partial(_ceiling_with, "no half"),
    },
    hints=(
        "`(scores[:, :, None] - scores[:, None, :]).sign()` is 1, 0 or -1 for each pair; so for the other labeler. "
        "Agreement is where their product is 1.",
        "$2a - 1 = (2p - 1)^2$, so $p = (1 + \\sqrt{2a - 1}) / 2$.",
    ),
)
def noise_ceiling(scores: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """(agreement, ceiling), two 0-d float64 tensors, from two labelers' scores of the same answers, both [B, K].

    A pair that either of them tied is left out."""
    product = (scores[:, :, None] - scores[:, None, :]).sign() * (others[:, :, None] - others[:, None, :]).sign()
    # Both directions of a pair are in the matrix, above and below the line.
    agreement = (product > 0).sum().double() / (product != 0).sum()
    return agreement, (1 + (2 * agreement - 1).clamp(min=0).sqrt()) / 2


# 8.6 -----------------------------------------------------------------------------------------------------------------


def first_token(rows: Tensor) -> Tensor:
    """A model for the cases: the score of a row is its first number."""
    return rows[:, 0]


def row_mean(rows: Tensor) -> Tensor:
    """Another one: the mean of the row."""
    return rows.mean(1)


def _offset_cases() -> list[Case]:
    model: Callable[[Tensor], Tensor] = first_token
    cases = [
        Case("one row", (model, tensor([3]), 4), tensor(3.0)[0]),
        Case("two batches of one row", (model, tensor([1], [3]), 1), tensor(2.0)[0]),
        Case("two rows, of which the model reads the first number", (model, tensor([1, 9], [3, 5]), 2), tensor(2.0)[0]),
        Case("a batch of two, a batch of one", (model, tensor([1], [2], [6]), 2), tensor(3.0)[0]),
        Case("two batches of two", (model, tensor([1], [2], [6], [7]), 2), tensor(4.0)[0]),
    ]
    for (rows, width, size), generator in zip(((5, 2, 2), (7, 3, 3), (10, 4, 4)), generators(3), strict=True):
        cases.append(
            Case(f"random, {rows} rows in batches of {size}", (row_mean, normal(generator, rows, width), size))
        )
    return cases


def _offset_with(bug: str, model: Callable[[Tensor], Tensor], rows: Tensor, batch_size: int) -> Tensor:
    """Exercise 8.6 with one mistake planted."""
    parts = [model(part) for part in rows.split(batch_size)]
    if bug == "reset":
        return parts[-1].mean()
    if bug == "first":
        return parts[0].mean()
    if bug == "all but first":
        return torch.cat(parts[1:] or parts).mean()
    if bug == "rows":
        return rows.mean()
    if bug == "mean of means":
        return torch.stack([part.mean() for part in parts]).mean()
    if bug == "dropped":
        whole = [part for part in parts if len(part) == batch_size] or parts
        return torch.cat(whole).mean()
    scores = torch.cat(parts)
    return {
        "sum": scores.sum(),
        "minus": -scores.mean(),
        "median": scores.median(),
        "batches": scores.sum() / len(parts),
        "as if full": scores.sum() / (len(parts) * batch_size),
        "highest": scores.max(),
    }[bug]


@exercise(
    "8.6",
    "zero is a demonstration",
    difficulty=1,
    minutes=8,
    task="The loss sees differences only, so a constant may be added to all scores. The paper picks it so that the "
    "labelers' demonstrations score 0 on average. Compute the number to take off: score the rows `batch_size` "
    "at a time (the last batch may be smaller).",
    cases=_offset_cases,
    suspects={
        "The list is reset every batch: only the last batch's scores are in the mean. Make the list once, before "
        "the loop.": partial(_offset_with, "reset"),
        "Only the first batch is scored.": partial(_offset_with, "first"),
        "The first batch is left out.": partial(_offset_with, "all but first"),
        "The model is not asked: this is the mean of the rows themselves.": partial(_offset_with, "rows"),
        "It is the mean of the batches' means: the last, smaller batch weighs too much. Collect all scores, then "
        "take one mean.": partial(_offset_with, "mean of means"),
        "The last batch is dropped because it is smaller: its rows count as well.": partial(_offset_with, "dropped"),
        "This is the sum: take the mean.": partial(_offset_with, "sum"),
        "It divides by the number of batches: divide by the number of rows.": partial(_offset_with, "batches"),
        "The sign is flipped: give the number that is taken off, the mean itself.": partial(_offset_with, "minus"),
        "This is the median: the average of the demonstrations is to be 0.": partial(_offset_with, "median"),
        "The last batch is counted as if it were full: divide by the number of rows.": (
            partial(_offset_with, "as if full")
        ),
        "This is the highest score: the average of the demonstrations is to be 0.": partial(_offset_with, "highest"),
    },
    hints=(
        "`rows.split(batch_size)` gives the batches, the smaller last one too.",
        "`torch.cat([model(batch) for batch in rows.split(batch_size)]).mean()`",
    ),
)
def score_offset(model: Callable[[Tensor], Tensor], rows: Tensor, batch_size: int) -> Tensor:
    """The mean score of all rows [N, T], a 0-d tensor: model(batch [n, T]) gives [n], n at most batch_size."""
    return torch.cat([model(batch) for batch in rows.split(batch_size)]).mean()
