"""Lesson 09, PPO with a KL penalty: the answer's mask, token rewards, experience, KL estimators, PPO-ptx."""

from __future__ import annotations

import torch
from torch import Tensor

from minirlhf import kl
from minirlhf.kl import kl_rewards
from minirlhf.losses import sft_loss
from minirlhf.returns import gae, whiten
from minirlhf_course.checks.cases import SIZES, bools, generators, normal, random_cases, tensor, two_logprobs
from minirlhf_course.checks.exercise import Case, exercise
from minirlhf_course.checks.mistakes09 import (
    Three,
    estimates_with,
    experience_with,
    last_column,
    mask_with,
    ptx_with,
    rewards_with,
)


def _lengths(generator: torch.Generator, rows: int, width: int) -> Tensor:
    """A response mask [B, T]: each row counts its first 1 to T tokens."""
    lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
    return torch.arange(width) < lengths


# 9.1 -----------------------------------------------------------------------------------------------------------------


def _mask_cases() -> list[Case]:
    cases = [
        Case("it ends at once", (tensor([1, 0], dtype=torch.long), 1), bools([1, 0])),
        Case("it never ends", (tensor([7, 8], dtype=torch.long), 1), bools([1, 1])),
        Case("two words, EOS, padding", (tensor([7, 8, 1, 0], dtype=torch.long), 1), bools([1, 1, 1, 0])),
        Case("a second EOS after the first", (tensor([7, 1, 8, 1], dtype=torch.long), 1), bools([1, 1, 0, 0])),
    ]
    return cases + random_cases(lambda g, size: (torch.randint(0, 6, size, generator=g), 1))


@exercise(
    "9.1",
    "what belongs to the answer",
    difficulty=2,
    minutes=8,
    task="Everything up to **and including** the first EOS, and nothing after it. An answer that was cut at the limit "
    "has no EOS, and counts whole. (Why must EOS count? It is an action too: the policy chose to stop.)",
    cases=_mask_cases,
    suspects={
        "EOS is left out: choosing to stop is an action, and the one that the score is paid at.": mask_with("no eos"),
        "A mask of all ones: what stands after EOS would be trained on.": mask_with("ones"),
        "It leaves out EOS and counts what comes after it.": mask_with("not eos"),
        "An answer without EOS was cut at the limit: it counts whole.": mask_with("unended"),
        "Without EOS argmax gives 0: such an answer counts whole.": mask_with("argmax"),
        "It looks for padding: what follows EOS need not be padding. Look for the first EOS.": mask_with("padding"),
        "It goes up to the last EOS: the answer is over with the first.": mask_with("last"),
        "It goes on after EOS, until the second: count the EOS *before* each token.": mask_with("late"),
        "It is the wrong way round: True says what belongs to the answer.": mask_with("turned"),
        "It is the wrong way round: True from EOS on, where the answer and its EOS are asked for.": mask_with("after"),
        "This is EOS alone: everything up to it counts as well.": mask_with("eos alone"),
        "One token too many: what stands right behind EOS is out.": mask_with("one more"),
        "All rows are cut where the first one ends: each answer ends at its own EOS.": mask_with("first row"),
    },
    hints=(
        "A token counts if no EOS stands *before* it.",
        "`is_eos = (tokens == eos_id).long()`; the EOS before each token: `is_eos.cumsum(1) - is_eos`.",
    ),
)
def answer_mask(tokens: Tensor, eos_id: int) -> Tensor:
    """Which tokens [B, T] (int64) of each row belong to its answer: bool [B, T]."""
    is_eos = (tokens == eos_id).long()
    return is_eos.cumsum(1) - is_eos == 0


# 9.2 -----------------------------------------------------------------------------------------------------------------


def _reward_cases() -> list[Case]:
    one, two = bools([1]), bools([1, 1])
    padded = bools([1, 1, 0])
    cases = [
        Case("one token", (tensor(3), tensor([-1]), tensor([-1.5]), one, 0.5), tensor([2.75])),
        Case("two tokens", (tensor(3), tensor([-1, -1]), tensor([-2, -1.5]), two, 0.5), tensor([-0.5, 2.75])),
        Case(
            "two tokens and one of padding, where 9 and 5 lie",
            (tensor(3), tensor([-1, -1, 9]), tensor([-2, -1.5, 5]), padded, 0.5),
            tensor([-0.5, 2.75, 0]),
        ),
        Case(
            "NaN in the padding",
            (tensor(3), tensor([-1, -1, torch.nan]), tensor([-2, -1.5, torch.nan]), padded, 0.5),
            tensor([-0.5, 2.75, 0]),
        ),
    ]
    for size, generator in zip(SIZES, generators(), strict=True):
        mask = _lengths(generator, *size)
        logprobs, ref = -normal(generator, *size).abs(), -normal(generator, *size).abs()
        cases.append(Case(f"random, of shape {size}", (normal(generator, size[0]), logprobs, ref, mask, 0.3)))
    return cases


@exercise(
    "9.2",
    "a reward for every token",
    difficulty=3,
    minutes=15,
    task="$r_t = -\\beta\\,\\big(\\log \\pi(y_t|\\cdot) - \\log \\pi_\\text{SFT}(y_t|\\cdot)\\big)$ at each token that "
    "counts, plus the score at the last of them; 0 in the padding, whatever it holds (NaN too). They are numbers "
    "to be earned, so no gradient flows through them.",
    cases=_reward_cases,
    suspects={
        "The sign of the KL is wrong: a token likelier than under the reference costs, -beta * (logprobs - "
        "ref_logprobs).": rewards_with("sign"),
        "The KL is charged twice: at each token, and again in the score.": rewards_with("twice"),
        "beta is missing.": rewards_with("beta"),
        "The score replaces the last token's KL: add it.": rewards_with("assign"),
        "The score is paid at every token: pay it once, at the last.": rewards_with("every"),
        "This charges k3 = expm1(-d) + d: a fine estimate to look at, but the reward of equation 2 is -beta * d, "
        "whose sum is the log-ratio of the whole answer.": rewards_with("k3"),
        "The reward is stored a step early: at the token before the last.": rewards_with("early"),
        "The score is paid at the first token: pay it at the last that counts.": rewards_with("first"),
        "The KL is averaged over the answer: each token is charged its own log-ratio, whole.": rewards_with("mean"),
        "The score lands in the padding: the last token that counts is not the last column.": rewards_with(
            "last column"
        ),
        "The KL of padding leaks into the rewards: 0 where response_mask is False.": rewards_with("padding"),
        "0 * NaN is NaN: choose with torch.where(response_mask, ..., 0.0), do not multiply.": rewards_with("product"),
        "Only the last token's KL is charged: charge it at each token that counts.": rewards_with("last kl"),
        "The whole answer's KL is charged at the last token: the sum is right, but no token is told what it cost. "
        "Charge each where it falls.": rewards_with("sum at last"),
        "This charges k2 = d^2 / 2: never negative, but the reward of equation 2 is -beta * d, whose sum is the "
        "log-ratio of the whole answer.": rewards_with("k2"),
        "The log-ratio is clamped at 0: a token that the reference likes better must earn what it saves, or the sum is "
        "not the log-ratio of the whole answer.": rewards_with("clamp"),
        "This charges |d|: a token that the reference likes better must earn what it saves, or the sum is not the "
        "log-ratio of the whole answer.": rewards_with("absolute"),
        "This charges the ratio minus 1: charge its logarithm, logprobs - ref_logprobs.": rewards_with("ratio"),
        "This charges a difference of probabilities: log-probabilities are charged as they come.": rewards_with(
            "probabilities"
        ),
        "The score is spread over the answer: pay it whole, at the last token that counts.": rewards_with("spread"),
        "The score is divided by the answer's length: pay it as it comes.": rewards_with("score by length"),
        "beta stands before the score, too: it belongs to the KL alone.": rewards_with("beta score"),
        "The KL is never charged: -beta * (logprobs - ref_logprobs) at each token that counts.": rewards_with("free"),
        "These are rewards to go, added up to the end: give each token its own reward.": rewards_with("to go"),
        "The score has the wrong sign: it is paid, add it.": rewards_with("minus score"),
        "The score is missing: add it at the last token that counts.": rewards_with("score"),
        **{
            f"The rewards are whitened ({how}): leave them as they are, or beta and the score lose the units they were "
            "given in.": rewards_with(f"white, {how}")
            for how in ("their mean kept", "their mean kept, n - 1", "their mean removed", "their mean removed, n - 1")
        },
        "A gradient flows through the rewards: they are numbers to be earned, detach them. (PPO's gradient comes "
        "through the ratio, times an advantage made of these.)": rewards_with("graph"),
    },
    hints=(
        "First the KL with `torch.where`. The column of the last token that counts: `response_mask.sum(1) - 1`, for "
        "an answer that begins in column 0.",
        "`rewards = torch.where(response_mask, -beta * (logprobs - ref_logprobs), 0.0).detach()`; `rewards[rows, last] "
        "+= scores` with `rows = torch.arange(len(scores))`.",
    ),
    leaves=("logprobs",),
)
def token_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, beta: float) -> Tensor:
    """Rewards [B, T] of answers: scores [B]; logprobs, ref_logprobs, response_mask (bool) [B, T]."""
    return kl_rewards(scores, logprobs, ref_logprobs, response_mask, beta)


# 9.3 -----------------------------------------------------------------------------------------------------------------


def _experience_cases() -> list[Case]:
    same = tensor([-1, -1])
    cases = [
        Case(
            "two tokens, no KL, no values, lam 1",
            (tensor(3), same, same, tensor([0, 1]), bools([1, 1]), 0.5, 1.0),
            (tensor([1.0, -1.0]), tensor([3.0, 3.0])),
        ),
        Case(
            "two tokens, the first costs 1 nat, lam 1",
            (tensor(3), same, tensor([-2, -1]), tensor([0, 1]), bools([1, 1]), 0.5, 1.0),
            (tensor([1.0, -1.0]), tensor([2.5, 3.0])),
        ),
        Case(
            "and padding, where 9s lie",
            (
                tensor(3),
                tensor([-1, -1, 9]),
                tensor([-2, -1, 3]),
                tensor([0, 1, 9]),
                bools([1, 1, 0]),
                0.5,
                1.0,
            ),
            (tensor([1.0, -1.0, 0.0]), tensor([2.5, 3.0, 0.0])),
        ),
    ]
    for size, generator in zip(((1, 3), (2, 3), (3, 2), (2, 5), (5, 4), (4, 17)), generators(6), strict=True):
        mask = _lengths(generator, *size)
        mask[0, :2] = True
        new, ref, values = (normal(generator, *size) for _ in range(3))
        args = (normal(generator, size[0]), new, ref, values, mask, 0.3, 0.9)
        cases.append(Case(f"random, of shape {size}", args))
    return cases


@exercise(
    "9.3",
    "from scores to advantages",
    difficulty=4,
    minutes=25,
    task="A batch of answers, all of it: token rewards (`token_rewards`, from 9.2), GAE with $\\gamma = 1$, returns, "
    "whitened advantages. The KL is charged once; nothing comes from the padding; returns are made of the *raw* "
    "advantages. `minirlhf.returns.gae` and `whiten` are yours to use.",
    cases=_experience_cases,
    suspects={
        "The value targets are made from whitened advantages: returns = raw advantages + values.": experience_with(
            "whitened targets"
        ),
        "The KL is charged twice: token_rewards has charged it, and the score has it taken off again.": experience_with(
            "twice"
        ),
        "The KL is never charged.": experience_with("free"),
        "The advantages are not whitened.": experience_with("raw"),
        "Whitening divides by n - 1 here, as trl's does: `minirlhf.returns.whiten` divides by n.": experience_with(
            "n - 1"
        ),
        "Each answer is whitened by itself: then a bad answer looks as good as a good one. One mean and one deviation "
        "for the batch.": experience_with("each row"),
        "The mean is put back: whitened advantages have mean 0 (shift_mean=True).": experience_with("mean kept"),
        "The mean is taken off, and the scale is left: divide by the standard deviation, too.": experience_with(
            "centred"
        ),
        "The rewards are whitened, their mean kept: whiten the advantages alone, or beta and the score lose the units "
        "they were given in.": experience_with("white rewards, kept"),
        "The rewards are whitened, too, all as trl does it (dividing by n - 1): whiten the advantages alone, or beta "
        "and the score lose the units they were given in.": experience_with("white rewards, trl, kept"),
        "The rewards are whitened, their mean removed: whiten the advantages alone, or each token more changes what an "
        "answer is worth.": experience_with("white rewards"),
        "The returns are whitened, too: values are trained on them in the units of the score.": experience_with(
            "white returns"
        ),
        "The returns are sums of rewards, as with lam = 1: returns = raw advantages + values.": experience_with("sums"),
        "The second result is the raw advantages: returns = raw advantages + values.": experience_with("raw twice"),
        "The values are taken off twice: returns = raw advantages + values.": experience_with("minus"),
        "The returns are the rewards: returns = raw advantages + values.": experience_with("rewards"),
        "The reward is stored a step early.": experience_with("early"),
        "Whitening averages over padding: give it the mask.": experience_with("over padding"),
        "This is r - V: an advantage looks ahead, use gae.": experience_with("reward minus value"),
        "The sign of the KL is wrong: a token likelier than under the reference costs.": experience_with("kl sign"),
        "Whitening averages over padding, and leaves numbers there: give it the mask.": experience_with("into padding"),
        "These are one-step errors, as with lam = 0: lam is not used.": experience_with("one step"),
        "lam is not used.": experience_with("lam"),
        "gamma is 1 here: an answer is short, and its end is all that is paid for.": experience_with("gamma"),
        "Values of padding are in the returns: 0 there.": experience_with("values of padding"),
        "The value of padding leaks in: the answer ends at its last token that counts, and what follows is worth 0. "
        "Give gae the mask, and ends there.": experience_with("padding"),
    },
    hints=(
        "Three calls in a row. `ends` is True at the last token that counts.",
        "`advantages, returns = gae(rewards, values, ends, gamma=1.0, lam=lam, mask=response_mask)`; then `return "
        "whiten(advantages, response_mask), returns`.",
    ),
)
def experience(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    response_mask: Tensor,
    beta: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Whitened advantages and raw returns, each [B, T]: scores [B], the other tensors [B, T]."""
    rewards = kl_rewards(scores, logprobs, ref_logprobs, response_mask, beta)
    ends = torch.zeros_like(response_mask).scatter(1, last_column(response_mask), True)
    advantages, returns = gae(rewards, values, ends, gamma=1.0, lam=lam, mask=response_mask)
    return whiten(advantages, response_mask), returns


# 9.4 -----------------------------------------------------------------------------------------------------------------


def _kl_cases() -> list[Case]:
    near = torch.tensor([[-1.0, -1.002, -1.005, -1.01]])
    cases = [
        Case("the same policy", (tensor([-1]), tensor([-1])), (tensor([0.0]), tensor([0.0]), tensor([0.0]))),
        Case(
            "d = log 2",
            (tensor([0.5]).log(), tensor([0.25]).log()),
            (tensor([0.6931472]), tensor([0.2402265]), tensor([0.1931472])),
        ),
        Case(
            "far apart: d = -12 and 12, where e^12 = 162754.79",
            (tensor([-13, -1]), tensor([-1, -13])),
            (tensor([-12.0, 12.0]), tensor([72.0, 72.0]), tensor([162741.79, 11.0000061])),
        ),
        Case("nearly the same policy, in float32", (near, torch.full_like(near, -1.0)), rtol=1e-3),
    ]
    return cases + two_logprobs()


@exercise(
    "9.4",
    "three estimates of one KL",
    difficulty=2,
    minutes=10,
    task="Tokens drawn from $\\pi$, $d = \\log\\pi - \\log\\pi_\\text{ref}$. Schulman's three estimates of "
    "$\\mathrm{KL}(\\pi \\| \\pi_\\text{ref})$ per token: $k_1 = d$, $k_2 = d^2/2$, $k_3 = e^{-d} - 1 + d$. Mind the "
    "digits: near $d = 0$ the large terms of $k_3$ cancel.",
    cases=_kl_cases,
    suspects={
        "The half of k2 is missing.": estimates_with("half"),
        "k1 has lost its sign: single estimates may be negative, and the mean is right only with them.": estimates_with(
            "absolute"
        ),
        "All is reversed: d = logprobs - ref_logprobs, since the tokens are the policy's.": estimates_with("reversed"),
        "k3 is reversed: expm1(-d) + d. (expm1(d) - d would be right for tokens drawn from the reference.)": (
            estimates_with("k3 reversed")
        ),
        "The third is k1 again: a chain of ifs falls through to the wrong one.": estimates_with("falls through"),
        "The digits cancel: exp(-d) - 1 loses in float32 what is left after adding d. Use torch.expm1(-d) + d.": (
            estimates_with("digits")
        ),
        "The log-ratio is clamped to [-10, 10], as some libraries do: the estimates are then wrong, and have no "
        "gradient, just where the policies are furthest apart.": estimates_with("limited"),
        "k1 is clamped at 0: single estimates may be negative, and the mean is right only with them.": estimates_with(
            "k1 at 0"
        ),
        "k1 has the wrong sign: logprobs - ref_logprobs.": estimates_with("k1 turned"),
        "k2 is not squared: d^2 / 2.": estimates_with("not squared"),
        "k3 lacks the + d: expm1(-d) + d.": estimates_with("k3 without d"),
        "k3 has the wrong sign before d: expm1(-d) + d.": estimates_with("k3 minus d"),
        "k1 is multiplied by the ratio: the tokens are the policy's already, average d as it is.": estimates_with(
            "weighed"
        ),
        "k1 is multiplied by the probability: the tokens are drawn from the policy already, so d is averaged as it "
        "is.": estimates_with("expected"),
        "The KL is detached from the graph: as a term of a loss it would have no gradient.": estimates_with("no graph"),
    },
    hints=(
        "`expm1(x)` is exp(x) - 1, computed without the cancellation.",
        "`d = logprobs - ref_logprobs`; `return d, d.square() / 2, torch.expm1(-d) + d`.",
    ),
    leaves=("logprobs",),
)
def kl_estimates(logprobs: Tensor, ref_logprobs: Tensor) -> Three:
    """k1, k2 and k3 of KL(pi || ref) from tokens of pi: two tensors [...] give three, with gradient."""
    return kl.kl_k1(logprobs, ref_logprobs), kl.kl_k2(logprobs, ref_logprobs), kl.kl_k3(logprobs, ref_logprobs)


# 9.5 -----------------------------------------------------------------------------------------------------------------


def _ptx_cases() -> list[Case]:
    cases = [
        Case("one token", (tensor(2)[0], tensor([-3]), 0.5), tensor(3.5)[0]),
        Case("two tokens", (tensor(2)[0], tensor([-3, -1]), 0.5), tensor(3.0)[0]),
    ]
    return cases + random_cases(lambda g, size: (normal(g, 1)[0], -normal(g, *size).abs(), 0.3))


@exercise(
    "9.5",
    "PPO-ptx",
    difficulty=1,
    minutes=5,
    task="Equation 2's last term, as a loss to be minimised: PPO's loss, and `ptx_coef` times the negative mean "
    "log-probability of the corpus' tokens. One loss, one gradient: the *sum* of the two, before one optimizer step.",
    cases=_ptx_cases,
    suspects={
        "The sign is wrong: this makes the corpus less likely. Subtract the mean log-probability.": ptx_with("sign"),
        "PPO's share is scaled by 1 - ptx_coef: equation 2 adds, PPO's gradient stays as it is.": ptx_with("mixture"),
        "ptx_coef stands before the wrong term.": ptx_with("coefficient"),
        "ptx_coef is missing.": ptx_with("missing"),
        "These are probabilities: log-likelihood means the log-probabilities as they are.": ptx_with("probabilities"),
        "No gradient flows into the corpus' log-probabilities: then the term is for show.": ptx_with("detached"),
        "PPO's loss is missing: add the two.": ptx_with("alone"),
        "It divides by the rows only: take the mean over all tokens, or ptx_coef changes its meaning with the length "
        "of the rows.": ptx_with("rows"),
        "This adds the perplexity: add the negative mean log-probability, without the exponential.": ptx_with(
            "perplexity"
        ),
        "The sum is divided by 1 + ptx_coef: equation 2 adds, PPO's gradient stays as it is.": ptx_with("share"),
        "The sign of the whole is wrong: PPO's loss is a loss already, and the corpus' is minus its mean "
        "log-probability.": ptx_with("turned"),
        "The sign of PPO's loss is wrong: it is a loss already, add it as it is.": ptx_with("ppo turned"),
        "The two are multiplied: equation 2 adds them.": ptx_with("product"),
        "This is the sum over tokens: take the mean, or ptx_coef changes its meaning with the batch.": ptx_with("sum"),
    },
    hints=("The language-model loss is `-corpus_logprobs.mean()`.", "`ppo_loss - ptx_coef * corpus_logprobs.mean()`"),
    leaves=("ppo_loss", "corpus_logprobs"),
)
def ppo_ptx_loss(ppo_loss: Tensor, corpus_logprobs: Tensor, ptx_coef: float) -> Tensor:
    """PPO's loss (0-d) and the corpus' log-probabilities [B, T] give PPO-ptx's loss (0-d)."""
    return ppo_loss + ptx_coef * sft_loss(corpus_logprobs, torch.ones_like(corpus_logprobs, dtype=torch.bool))
