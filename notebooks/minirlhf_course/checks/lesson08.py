"""Lesson 08, the reward model: pair loss, K-way loss, pairs that teach, last token, noise ceiling, offset."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from minirlhf import losses
from minirlhf_course.checks import write08
from minirlhf_course.checks.cases08 import (
    ceiling_cases,
    last_cases,
    offset_cases,
    pair_cases,
    ranking_cases,
    usable_cases,
)
from minirlhf_course.checks.exercise import exercise
from minirlhf_course.checks.mistakes08 import ceiling_with, last_with, offset_with, pair_with, ranking_with, usable_with

EPSILONS = (1e-6, 1e-7, 1e-8, 1e-9, 1e-10, 1e-12)

# 8.1 -----------------------------------------------------------------------------------------------------------------


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
    cases=pair_cases,
    suspects={
        "log(sigmoid(x)) is unstable, and so is log(1 + exp(-x)): at x = -200 float32 has 0 for the sigmoid and inf "
        "for the exp. Use torch.nn.functional.logsigmoid, which never leaves the logarithm.": (
            partial(pair_with, "unstable")
        ),
        **{
            f"The epsilon caps the loss at {-math.log(epsilon):.0f} and kills the gradient where the model is most "
            "wrong (a clamp does the same): logsigmoid.": partial(_capped, epsilon)
            for epsilon in EPSILONS
        },
        "`binary_cross_entropy` cuts the loss at 100: binary_cross_entropy_with_logits, of the difference itself, does "
        "not.": partial(pair_with, "cut"),
        "exp of a large reward overflows: logsigmoid of the difference never forms it.": partial(pair_with, "ratio"),
        "The log is missing: this is the mean probability of being wrong. Its gradient vanishes just where the "
        "model is most wrong.": partial(pair_with, "no log"),
        "This is 1 - sigmoid, without the log: its gradient vanishes just where the model is most wrong.": (
            partial(pair_with, "one minus")
        ),
        "The minus sign is missing: the optimizer minimises.": partial(pair_with, "sign"),
        "The difference is the wrong way round: the preferred answer comes first, chosen - rejected.": (
            partial(pair_with, "swapped")
        ),
        "There is no sigmoid: minus the difference has no lower end, and scores would grow for ever.": (
            partial(pair_with, "linear")
        ),
        "This is a hinge: a fine loss, but sigmoid(r_w - r_l) is then no probability.": partial(pair_with, "hinge"),
        "This is a hinge at 0: it asks for no lead at all, so scores that are all equal are already perfect.": (
            partial(pair_with, "relu")
        ),
        "Every chosen answer is compared with every rejected one: only with its own, chosen[i] - rejected[i].": (
            partial(pair_with, "crossed")
        ),
        "No gradient flows into the rejected answers: the model must learn to score them lower, too.": (
            partial(pair_with, "constant")
        ),
        "One loss per pair comes back: take the mean.": partial(pair_with, "each"),
        "This is the sum: take the mean over pairs.": partial(pair_with, "sum"),
        "This is a regression of the probability to 1: its gradient vanishes just where the model is most wrong. Take "
        "minus the log.": partial(pair_with, "squares"),
        "This is a regression of the difference to 1: it pulls back a model that is surer than that. Take minus the "
        "log of the sigmoid.": partial(pair_with, "to one"),
        "Each answer is judged alone: the labeler has compared them, so only the difference counts.": (
            partial(pair_with, "alone")
        ),
        "The mean is taken before the log: one loss per pair first, then their mean.": (
            partial(pair_with, "mean first")
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
    cases=ranking_cases,
    suspects={
        "It is normalised twice: the mean over pairs has divided by C(K, 2) already.": partial(ranking_with, "twice"),
        "1/C(K, 2) is missing: a prompt with 9 answers would weigh 36 times as much as one with 2.": (
            partial(ranking_with, "unweighted")
        ),
        "log(sigmoid(x)) is unstable, and so is log(1 + exp(-x)): use torch.nn.functional.logsigmoid.": (
            partial(ranking_with, "unstable")
        ),
        "The log is missing: -sigmoid has no gradient where the model is most wrong.": (
            partial(ranking_with, "no log")
        ),
        "The minus sign is missing: the optimizer minimises.": partial(ranking_with, "sign"),
        "The pairs are upside down: the better answer's reward comes first.": partial(ranking_with, "swapped"),
        "It takes the answers as sorted, the best first: compare their scores.": (
            partial(ranking_with, "first is best")
        ),
        "Every pair is counted in both directions: only (better, worse) is a pair.": (
            partial(ranking_with, "everybody")
        ),
        "Tied answers are counted as pairs: a tie prefers nothing, drop it (> and not >=).": (
            partial(ranking_with, "ties count")
        ),
        "It divides by K * K, as mean() over the matrix does: divide by the number of pairs.": (
            partial(ranking_with, "k squared")
        ),
        "The divisor still counts tied pairs: divide by the number of pairs that are left.": (
            partial(ranking_with, "ties in C")
        ),
        "It is the mean over all pairs of the batch, so a prompt with ties weighs less: first the mean of each "
        "prompt.": (partial(ranking_with, "over pairs")),
        "A prompt whose answers are all tied is counted in the mean over prompts: leave it out.": (
            partial(ranking_with, "tied prompts")
        ),
        "Only neighbours in the ranking are compared: all pairs count.": partial(ranking_with, "neighbours"),
        "Only the best and the worst are compared: all pairs count.": partial(ranking_with, "ends"),
        "This is the sum over prompts: take the mean.": partial(ranking_with, "sum"),
        "A prompt whose answers are all tied divides 0 by 0: clamp the number of its pairs at 1, and leave the prompt "
        "out of the mean.": partial(ranking_with, "unguarded"),
        "This is Plackett-Luce, a softmax over what is left at each place, summed over places: equation 1 compares "
        "pairs, and takes their mean.": partial(ranking_with, "places"),
        "This is Plackett-Luce, a softmax over what is left at each place: equation 1 compares pairs.": (
            partial(ranking_with, "places, mean")
        ),
        "The pairs are weighed by how far apart the labeler's scores are: only their order counts, and every pair "
        "weighs the same.": partial(ranking_with, "gaps"),
        "The pairs are weighed by how far apart the labeler's scores are, and divided by the sum of these weights: "
        "only their order counts, and every pair weighs the same.": partial(ranking_with, "gaps by gaps"),
        "The difference of the labeler's scores stands inside the sigmoid, as a margin: only their order counts.": (
            partial(ranking_with, "margin")
        ),
        "This is a regression on the labeler's scores: only their order counts, compare pairs.": (
            partial(ranking_with, "regression")
        ),
        "This is a softmax over all answers, with the best one as the right class: compare all pairs.": (
            partial(ranking_with, "classes")
        ),
        "This is ListNet, a softmax of the rewards against one of the scores: equation 1 compares pairs.": (
            partial(ranking_with, "ListNet")
        ),
        "Ties, and each answer against itself, count as half a win: they make no pair, leave them out.": (
            partial(ranking_with, "half")
        ),
        "This is a hinge: a fine loss, but sigmoid(r_w - r_l) is then no probability.": partial(ranking_with, "hinge"),
        "It divides by K, the number of answers: divide by the number of pairs.": partial(ranking_with, "by K"),
        "Only the best answer is compared with the others: all pairs count.": partial(ranking_with, "best"),
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


@exercise(
    "8.3",
    "pairs that teach something",
    difficulty=2,
    minutes=10,
    task="Long texts are cut to fit the model. Two answers that differ only behind the cut have become one text, "
    "with two different scores. Which pairs (i better than j) are left to learn from?",
    cases=usable_cases,
    suspects={
        "Answers that became equal after truncation still make a pair: r_i - r_j is 0 whatever the model does, so "
        "it only adds ln 2 to the loss and a coin toss to the accuracy. Compare the tokens, too.": (
            partial(usable_with, "truncated")
        ),
        "Ties are pairs here: a tie prefers nothing (> and not >=).": partial(usable_with, "ties"),
        "The pairs are upside down: [b, i, j] is True where i is better than j.": (partial(usable_with, "upside down")),
        "Each pair is there in both directions: only where i is better than j.": partial(usable_with, "either"),
        "All tokens must differ here: one different token is enough (any and not all).": partial(usable_with, "all"),
        "Only the first tokens are compared.": partial(usable_with, "first"),
        "Only the last tokens are compared.": partial(usable_with, "last"),
        "Only the sums of the tokens are compared: two texts may have the same sum. Compare token by token.": (
            partial(usable_with, "sums")
        ),
        "The order of the tokens is not looked at: two texts may have the same tokens in another order.": (
            partial(usable_with, "sorted")
        ),
        "One of the two conditions is enough here: both must hold, & and not |.": partial(usable_with, "or"),
        "These are the pairs that teach nothing: the texts must differ.": partial(usable_with, "same"),
        "The scores are not looked at: only where i is better than j.": partial(usable_with, "no scores"),
        "Only i < j is looked at: where the later answer is the better one, the pair stands at [b, i, j] with i > j.": (
            partial(usable_with, "upper")
        ),
        "An answer that has a twin is dropped altogether: it still makes pairs with all other texts.": (
            partial(usable_with, "twins")
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


@exercise(
    "8.4",
    "one score per answer",
    difficulty=2,
    minutes=10,
    task="The head gives a number at every token; the score is the one at the **last real token**, the only one "
    "that has read the whole answer. Padding may stand on the right, on the left, or on both sides, and holds "
    "garbage (NaN, too).",
    cases=last_cases,
    suspects={
        "It reads the last column: with padding on the right that is a pad token, and answers of unlike length are "
        "scored on nothing.": partial(last_with, "last column"),
        "It counts the real tokens: mask.sum(1) - 1 is the last one only if no padding stands on the left.": (
            partial(last_with, "count")
        ),
        "It looks for the first padding: with padding on the left that stands before the answer.": (
            partial(last_with, "first pad")
        ),
        "The reward is read on every token and averaged: tokens in the middle have not read the whole answer. Only "
        "the last one counts.": partial(last_with, "mean"),
        "The reward is read on every token and added up: a longer answer would score more for being long. Only the "
        "last token counts.": partial(last_with, "sum"),
        "It multiplies by a mask: 0 * NaN is NaN. Pick the number by its index.": partial(last_with, "multiplied"),
        "One token too far: that is the padding behind the answer.": partial(last_with, "one behind"),
        "One token too early: the answer's last token (EOS) is the one that knows it has ended.": (
            partial(last_with, "one before")
        ),
        "This is the first real token: it has read nothing yet.": partial(last_with, "first"),
        "All rows use the first row's index: each answer ends where it ends.": partial(last_with, "row's first"),
        "This is the lowest value of the answer: take the one at its last token.": partial(last_with, "lowest"),
        "This is the highest value of the answer: take the one at its last token.": partial(last_with, "highest"),
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


@exercise(
    "8.5",
    "the noise ceiling of two labelers",
    difficulty=3,
    minutes=20,
    task="Two labelers ranked the same answers. If each is right about a pair with probability $p$, whatever the "
    "other does, they agree when both are right or both are wrong: $a = p^2 + (1 - p)^2$. Measure $a$ over all "
    "pairs that **both** of them ordered, then solve for $p \\ge 1/2$: no model can agree with such a labeler "
    "more often than that. Where they agree less often than a coin, say $p = 1/2$.",
    cases=ceiling_cases,
    suspects={
        "The ceiling is not the agreement: where two labelers disagree, one of them is wrong, and a model may be "
        "right.": (partial(ceiling_with, "agreement")),
        "The second number is the agreement again: where two labelers disagree, one of them is wrong, and a model may "
        "be right.": partial(ceiling_with, "both"),
        "The root of the agreement forgets that they also agree when both are wrong: a = p^2 + (1 - p)^2.": (
            partial(ceiling_with, "root")
        ),
        "Half way between the agreement and 1: solve a = p^2 + (1 - p)^2 for p.": partial(ceiling_with, "half way"),
        "This is the agreement of two labelers who are right with probability a: it goes the other way, solve for p.": (
            partial(ceiling_with, "square")
        ),
        "Of the two solutions it takes the one below 1/2.": partial(ceiling_with, "minus"),
        "Below an agreement of 1/2 it takes the root of a negative number: clamp 2a - 1 at 0.": (
            partial(ceiling_with, "nan")
        ),
        "Below an agreement of 1/2 it turns the labelers' disagreement into a ceiling: clamp 2a - 1 at 0.": (
            partial(ceiling_with, "abs")
        ),
        "The whole matrix is counted, the diagonal too, where an answer agrees with itself: only pairs i < j.": (
            partial(ceiling_with, "diagonal")
        ),
        "Ties count: a pair that either of them tied has no order to agree on.": partial(ceiling_with, "ties"),
        "Ties of the second labeler count: drop a pair that either of them tied.": partial(ceiling_with, "one tie"),
        "It is the mean of the prompts' agreements: add up pairs over all prompts, then divide once.": (
            partial(ceiling_with, "of prompts")
        ),
        "Answers to different prompts are compared: pairs are made within a row.": partial(ceiling_with, "across"),
        "A tie counts as half an agreement: a pair that either of them tied is left out.": (
            partial(ceiling_with, "half ties")
        ),
        "This is the agreement beyond chance, 2a - 1, which is (2p - 1)^2: take its root, and solve for p.": (
            partial(ceiling_with, "chance")
        ),
        "The half is missing: p = (1 + sqrt(2a - 1)) / 2.": partial(ceiling_with, "no half"),
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


@exercise(
    "8.6",
    "zero is a demonstration",
    difficulty=1,
    minutes=8,
    task="The loss sees differences only, so a constant may be added to all scores. The paper picks it so that the "
    "labelers' demonstrations score 0 on average. Compute the number to take off: score the rows `batch_size` "
    "at a time (the last batch may be smaller).",
    cases=offset_cases,
    suspects={
        "The list is reset every batch: only the last batch's scores are in the mean. Make the list once, before "
        "the loop.": partial(offset_with, "reset"),
        "Only the first batch is scored.": partial(offset_with, "first"),
        "The first batch is left out.": partial(offset_with, "all but first"),
        "The model is not asked: this is the mean of the rows themselves.": partial(offset_with, "rows"),
        "It is the mean of the batches' means: the last, smaller batch weighs too much. Collect all scores, then "
        "take one mean.": partial(offset_with, "mean of means"),
        "The last batch is dropped because it is smaller: its rows count as well.": partial(offset_with, "dropped"),
        "This is the sum: take the mean.": partial(offset_with, "sum"),
        "It divides by the number of batches: divide by the number of rows.": partial(offset_with, "batches"),
        "The sign is flipped: give the number that is taken off, the mean itself.": partial(offset_with, "minus"),
        "This is the median: the average of the demonstrations is to be 0.": partial(offset_with, "median"),
        "The last batch is counted as if it were full: divide by the number of rows.": (
            partial(offset_with, "as if full")
        ),
        "This is the highest score: the average of the demonstrations is to be 0.": partial(offset_with, "highest"),
    },
    hints=(
        "`rows.split(batch_size)` gives the batches, the smaller last one too.",
        "`torch.cat([model(batch) for batch in rows.split(batch_size)]).mean()`",
    ),
)
def score_offset(model: Callable[[Tensor], Tensor], rows: Tensor, batch_size: int) -> Tensor:
    """The mean score of all rows [N, T], a 0-d tensor: model(batch [n, T]) gives [n], n at most batch_size."""
    return torch.cat([model(batch) for batch in rows.split(batch_size)]).mean()


fit_rewards = write08.fit_rewards  # 8.7
