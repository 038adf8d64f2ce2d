"""Lesson 04, advantage functions: A = Q - V, n steps, GAE, its targets, and the scan that makes it fast."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from minirlhf import returns
from minirlhf.returns import gae as _gae
from minirlhf.returns import whiten as _whiten
from minirlhf_course.checks.exercise import exercise
from minirlhf_course.checks.mistakes04 import (
    clock_cases,
    clock_with,
    gae_cases,
    gae_with,
    n_step_cases,
    n_step_cut_late,
    n_step_with,
    q_cases,
    row_whitened,
    scan_cases,
    scan_with,
    target_cases,
)

# 4.1 -----------------------------------------------------------------------------------------------------------------


@exercise(
    "4.1",
    "A = Q - V",
    difficulty=1,
    minutes=5,
    task="By definition $A(s, a) = Q(s, a) - V(s)$: how much better an action is than what the policy does on average. "
    "What is $V$, given $Q$ and the policy?",
    cases=q_cases,
    suspects={
        "V is not the plain mean of Q: weigh each action by its probability.": lambda q, p: (
            q - q.mean(-1, keepdim=True)
        ),
        "V is not the best Q (that would be the optimal policy's): weigh each action by its probability.": (
            lambda q, p: q - q.amax(-1, keepdim=True)
        ),
        "V is one number per state: sum p * Q over the actions before subtracting.": lambda q, p: q - p * q,
        "The sign is wrong: A = Q - V, positive for a better action.": lambda q, p: (p * q).sum(-1, keepdim=True) - q,
        "This weighs the advantages by the probabilities: A = Q - V, without another p.": (
            lambda q, p: p * (q - (p * q).sum(-1, keepdim=True))
        ),
        "It averages over the states too: V(s) is one number for each state.": lambda q, p: q - (p * q).sum(-1).mean(),
        "The sum runs over the states: V(s) sums over the actions, the last dimension.": (
            lambda q, p: q - (p * q).sum(0, keepdim=True)
        ),
        "V is one sum over everything: V(s) is one number for each state.": lambda q, p: q - (p * q).sum(),
        "The products are averaged: the probabilities are the weights already, so sum over the actions.": (
            lambda q, p: q - (p * q).mean(-1, keepdim=True)
        ),
        "This is Q / V: the advantage is a difference.": lambda q, p: q / (p * q).sum(-1, keepdim=True),
    },
    hints=(
        "$V(s) = \\sum_a \\pi(a|s) Q(s, a)$.",
        "`.sum(-1, keepdim=True)` keeps a column of width 1, which subtracts from every action.",
    ),
)
def advantages_from_q(q_values: Tensor, probabilities: Tensor) -> Tensor:
    """A(s, a) of a known problem: q_values and probabilities, both [S, A] (a row per state), give [S, A]."""
    return q_values - (probabilities * q_values).sum(-1, keepdim=True)


# Trajectories --------------------------------------------------------------------------------------------------------


# 4.2 -----------------------------------------------------------------------------------------------------------------


@exercise(
    "4.2",
    "n steps",
    difficulty=3,
    minutes=20,
    task="Between one reward (lesson 03) and all of them (lesson 02): add $n$ real rewards, then trust the critic, "
    "$R_{t+1} + \\dots + \\gamma^{n-1} R_{t+n} + \\gamma^n V(S_{t+n}) - V(S_t)$. If the episode ends first, there "
    "are fewer "
    "rewards and no value; if the row ends first, `last_values` is the value of the state after its last column.",
    cases=n_step_cases,
    suspects={
        "The sum crosses the end of the episode into the next one: stop at ends.": partial(n_step_with, "crosses"),
        "It bootstraps from V after the episode ended: v(terminal) = 0, so multiply by (1 - ends).": (
            partial(n_step_with, "end")
        ),
        "Off by one: it adds up n + 1 rewards.": partial(n_step_with, "too many"),
        "Off by one: it adds up n - 1 rewards.": partial(n_step_with, "too few"),
        "It never bootstraps: after n rewards comes gamma^n V(S_{t+n}).": partial(n_step_with, "no value"),
        "The last state's value is missing: where the row ends in mid-episode, use last_values.": (
            partial(n_step_with, "last")
        ),
        "The value is not discounted: it is k steps away, gamma^k V.": partial(n_step_with, "no discount"),
        "The value is discounted once: it is k steps away, gamma^k V.": partial(n_step_with, "one gamma"),
        "The rewards are not discounted: gamma^k for the reward k steps away.": partial(n_step_with, "rewards"),
        "V(S_t) is missing: this is the target, the advantage is the target minus V(S_t).": (
            partial(n_step_with, "target")
        ),
        "The value beyond the row's end is discounted with gamma^n, though fewer than n steps lead there: "
        "gamma^k for k steps.": partial(n_step_with, "gamma n"),
        "The reward of an episode's last step is lost: the end cuts off what follows, not the step itself.": (
            partial(n_step_with, "reward lost")
        ),
        "The end is noticed a step late: ends[:, t] says that nothing after step t belongs to its episode.": (
            partial(n_step_with, "late")
        ),
        "The sum is cut a step late: delta is right, but ends[:, t] must cut what comes after step t too, not "
        "ends[:, t + 1].": n_step_cut_late,
        "Where fewer than n steps are left in the row it gives 0: add those that there are, then last_values.": (
            partial(n_step_with, "whole windows")
        ),
        "The value is a step early: after k rewards comes V(S_{t+k}), values[:, t + k].": (
            partial(n_step_with, "early value")
        ),
        "It adds up to the end, and never stops after n rewards.": partial(n_step_with, "all"),
    },
    hints=(
        "For one t, count k from 0: add $\\gamma^k R$, stop after n of them, at an end, or at the last column. "
        "Which value, if any, comes then?",
        "Or from errors: $\\sum_{k<n} \\gamma^k \\delta_{t+k}$, cut at the end of the episode. Start with `deltas`, "
        "and n - 1 "
        "times: `adv[:, :-1] = deltas[:, :-1] + gamma * ~ends[:, :-1] * adv[:, 1:]`, on a fresh copy each time.",
    ),
)
def n_step_advantages(
    rewards: Tensor, values: Tensor, ends: Tensor, last_values: Tensor, gamma: float, n: int
) -> Tensor:
    """The n-step advantage of every step: rewards, values, ends (bool) are [N, T], last_values [N]; gives [N, T].

    ends[:, t] says that the episode terminated with step t; last_values are V of the states after the last column.
    """
    return returns.n_step_advantages(rewards, values, ends, gamma, n, last_values=last_values)


# 4.3 -----------------------------------------------------------------------------------------------------------------


@exercise(
    "4.3",
    "GAE",
    difficulty=3,
    minutes=25,
    task="$A_t = \\delta_t + \\gamma\\lambda A_{t+1}$ with $\\delta_t = R_{t+1} + \\gamma V(S_{t+1}) - V(S_t)$. The "
    "end of an "
    "episode cuts in **two** places. Which?",
    cases=gae_cases,
    suspects={
        "The last step bootstraps from V after the episode ended: multiply by (1 - ends).": partial(
            gae_with, "bootstrap"
        ),
        "The sum crosses the end of the episode: the next one's advantage flows back over it. "
        "Multiply A_{t+1} by (1 - ends) too.": partial(gae_with, "carry"),
        "The ends are never used: both V(S_{t+1}) and A_{t+1} must be multiplied by (1 - ends).": (
            partial(gae_with, "never ends")
        ),
        "done and next_done are swapped: ends[:, t] says that step t is its episode's last, and so it cuts "
        "V(S_{t+1}) and "
        "A_{t+1} off from step t itself.": partial(gae_with, "flags early"),
        "done and next_done are swapped: it uses ends[:, t + 1] for step t.": partial(gae_with, "flags late"),
        "lam and gamma are swapped: delta is discounted with gamma, and lam appears only in gamma * lam * A_{t+1}.": (
            partial(gae_with, "swapped")
        ),
        "gamma is missing in the recursion: A_{t+1} is multiplied by gamma * lam.": partial(gae_with, "lam alone"),
        "lam is missing: A_{t+1} is multiplied by gamma * lam.": partial(gae_with, "gamma alone"),
        "gamma is missing in delta: R + gamma V(S') - V(S).": partial(gae_with, "no gamma"),
        "V(S) is missing in delta: R + gamma V(S') - V(S).": partial(gae_with, "no V"),
        "last_values are never used: they are V(S_{t+1}) of the last column.": partial(gae_with, "last"),
        "The reward of an episode's last step is lost: (1 - ends) belongs to V(S') and A_{t+1}.": (
            partial(gae_with, "reward lost")
        ),
        "These are the value targets, A + V: return A.": partial(gae_with, "targets"),
        "The result runs backwards in time: reverse it.": partial(gae_with, "flipped"),
        "The sum is cut a step late: delta is right, but ends[:, t] must cut A_{t+1} off from step t too, not "
        "ends[:, t + 1].": partial(gae_with, "carry late"),
        "The sum is cut a step early: delta is right, but ends[:, t] must cut A_{t+1} off from step t too, not "
        "ends[:, t - 1].": partial(gae_with, "carry early"),
        "In the last column V(S_{t+1}) is the row's first value (torch.roll goes round): use last_values.": (
            partial(gae_with, "rolled")
        ),
        "In the last column V(S_{t+1}) is the row's own last value: use last_values.": partial(gae_with, "own last"),
        "The values are not shifted: delta needs V(S_{t+1}), which is values[:, t + 1].": partial(
            gae_with, "unshifted"
        ),
        "It sums forwards in time: A_t needs what comes after t, so go from the last column back.": (
            partial(gae_with, "forwards")
        ),
        "These are the TD errors: A_t also has gamma * lam * A_{t+1}.": partial(gae_with, "deltas"),
        "The sign of delta is wrong: R + gamma V(S') - V(S).": partial(gae_with, "sign"),
        "lam is in delta too: it appears only in gamma * lam * A_{t+1}.": partial(gae_with, "lam in delta"),
        "The advantages are whitened: that comes in 4.5, return A as it is.": partial(gae_with, "white"),
    },
    hints=(
        "All deltas first, with the values shifted by one column (`last_values` at the end). Then from the last "
        "column back, "
        "like the return in lesson 01.",
        "`carry = delta[:, t] + gamma * lam * torch.where(ends[:, t], 0, carry)`, and the same `ends` in "
        "`delta = rewards + gamma * next_values * ~ends - values`.",
    ),
)
def gae(rewards: Tensor, values: Tensor, ends: Tensor, last_values: Tensor, gamma: float, lam: float) -> Tensor:
    """GAE's advantages: rewards, values, ends (bool) are [N, T], last_values [N]; gives [N, T].

    ends[:, t] says that the episode terminated with step t; last_values are V of the states after the last column.
    """
    return _gae(rewards, values, ends, gamma=gamma, lam=lam, last_values=last_values)[0]


# 4.4 -----------------------------------------------------------------------------------------------------------------


@exercise(
    "4.4",
    "two kinds of end",
    difficulty=3,
    minutes=15,
    task="An episode *terminated*: nothing follows. It was *truncated*: something would have followed, but the next "
    "column belongs to another episode. Or the row ends in mid-episode. For each of the three: which value goes into "
    "$\\delta_t$, and does $A_{t+1}$ flow back?",
    cases=clock_cases,
    suspects={
        "A truncation is treated as a termination: only the clock ended the episode, so delta takes V of its last "
        "observation, final_values[:, t].": partial(clock_with, "clock ends"),
        "A termination is treated as a truncation: nothing follows it, so V is 0; final_values count only where "
        "truncated.": partial(clock_with, "death goes on"),
        "terminated and truncated are swapped: it is the truncated episode that is still worth final_values.": (
            partial(clock_with, "kinds")
        ),
        "After a truncation it bootstraps from the reset observation: values[:, t + 1] belongs to the next episode, "
        "and this one's last observation is worth final_values[:, t].": partial(clock_with, "reset"),
        "The chain is not cut at a truncation: delta is right, but the next episode's advantage flows back into this "
        "one. Multiply A_{t+1} by (1 - terminated) and by (1 - truncated).": partial(clock_with, "chain"),
        "The truncations are ignored: these episodes are over as well. delta takes final_values[:, t], and nothing "
        "flows back from the next episode.": partial(clock_with, "ignored"),
        "The chain is not cut at a termination: delta is right, but the next episode's advantage flows back into this "
        "one. Multiply A_{t+1} by (1 - terminated) and by (1 - truncated).": partial(clock_with, "death's chain"),
        "The chain is not cut: delta is right, but advantages flow back over ends of both kinds. Multiply A_{t+1} by "
        "(1 - terminated) and by (1 - truncated).": partial(clock_with, "chains"),
        "The ends are never used: V(S_{t+1}) is 0 after a termination and final_values[:, t] after a truncation, and "
        "nothing flows back over either.": partial(clock_with, "never cut"),
        "V of the last observation is added to the reward, but the row goes on as if the episode did: a truncation "
        "must also cut off values[:, t + 1] and A_{t+1}.": partial(clock_with, "on top"),
        "V of the last observation is not discounted: it is one step away, gamma * final_values.": (
            partial(clock_with, "no gamma")
        ),
        "After a truncation it bootstraps from values[:, t], V of the state before the last step: what follows is "
        "worth final_values[:, t].": partial(clock_with, "own"),
        "last_values are never used: where the row ends in mid-episode they are V(S_{t+1}) of its last column.": (
            partial(clock_with, "last")
        ),
        "The last column bootstraps from last_values even where its episode has ended: then it is 0 or final_values, "
        "as in any other column.": partial(clock_with, "always last"),
        "These are the value targets, A + V: return A.": partial(clock_with, "targets"),
        "These are the TD errors: A_t also has gamma * lam * A_{t+1}.": partial(clock_with, "deltas"),
    },
    hints=(
        "Two cuts again, and they no longer look the same. In delta the next value is 0, `final_values`, or the next "
        "column's. In the chain it makes no difference why the episode ended.",
        "`next_values = torch.where(truncated, final_values, torch.where(terminated, 0, shifted))`, with `shifted` "
        "made as in 4.3. Then 4.3's recursion, cut at `terminated | truncated`.",
    ),
)
def gae_with_truncation(
    rewards: Tensor,
    values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    final_values: Tensor,
    last_values: Tensor,
    gamma: float,
    lam: float,
) -> Tensor:
    """GAE's advantages [N, T] where an episode may terminate or be truncated.

    rewards, values, terminated, truncated (bool, never both) and final_values are [N, T].
    final_values[:, t] is V of the observation in which step t ended an episode, 0 where it
    ended none; last_values [N] are V of the states after the last column.
    """
    after = torch.where(truncated, final_values, 0)
    ends = terminated | truncated
    return _gae(rewards, values, ends, gamma=gamma, lam=lam, last_values=last_values, truncated_values=after)[0]


# 4.5 -----------------------------------------------------------------------------------------------------------------


@exercise(
    "4.5",
    "two uses of one advantage",
    difficulty=2,
    minutes=8,
    task="The policy wants whitened advantages (`whiten` of lesson 02, over the whole batch); the critic wants its "
    "targets, "
    "$A + V$. Make both from GAE's result. The order matters, and more than one published code had it wrong.",
    cases=target_cases,
    suspects={
        "The value targets are made from whitened advantages: add the values to the raw ones, whiten afterwards.": (
            lambda a, v: (_whiten(a), _whiten(a) + v)
        ),
        "The advantages are not whitened: subtract their mean, divide by their standard deviation.": (
            lambda a, v: (a, a + v)
        ),
        "The value targets are the advantages: add the values.": lambda a, v: (_whiten(a), a),
        "The value targets are A - V: it is A + V, since A = target - V.": lambda a, v: (_whiten(a), a - v),
        "The targets are whitened as well: the critic must learn returns in their own units.": (
            lambda a, v: (_whiten(a), _whiten(a + v))
        ),
        "The mean is still there: subtract it.": lambda a, v: (_whiten(a, shift_mean=False), a + v),
        "The variance divides by n - 1: here it is the biased one, var(correction=0).": (
            lambda a, v: ((a - a.mean()) / (a.std() + 1e-8), a + v)
        ),
        "The two results are in the wrong order: advantages first.": lambda a, v: (a + v, _whiten(a)),
        "Every row is whitened by itself: take one mean and one variance over the whole batch.": (
            lambda a, v: (row_whitened(a), a + v)
        ),
        "It divides by the variance: divide by its square root.": (
            lambda a, v: ((a - a.mean()) / (a.var(correction=0) + 1e-8), a + v)
        ),
        "The mean is subtracted, and nothing divided: divide by the standard deviation as well.": (
            lambda a, v: (a - a.mean(), a + v)
        ),
        "The targets are the values alone: it is A + V.": lambda a, v: (_whiten(a), v),
        "The targets have lost their mean: add the values to the raw advantages.": (
            lambda a, v: (_whiten(a), a - a.mean() + v)
        ),
    },
    hints=(
        "Which of the two needs the advantages in their own units?",
        "`targets = advantages + values` first; then `(advantages - mean) / (var(correction=0) + 1e-8).sqrt()`.",
    ),
)
def advantages_and_targets(advantages: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """(whitened advantages, value targets) from GAE's raw advantages and the values: all [N, T]."""
    return _whiten(advantages), advantages + values


# 4.6 -----------------------------------------------------------------------------------------------------------------


def _scan_budget(x: Tensor, decays: Tensor) -> int:
    """16 operations a round and 40 more: a loop over 256 steps, of two operations or more each, does not fit."""
    return 16 * (max(x.shape[1] - 1, 1).bit_length() + 2) + 40


@exercise(
    "4.6",
    "the scan",
    difficulty=4,
    minutes=30,
    task="GAE and the return are one recursion, $y_t = x_t + d_t\\,y_{t+1}$, which seems to need $T$ steps in a "
    "row. It needs "
    "$\\log_2 T$: two neighbours $(x_t, d_t)$ and $(x_{t+1}, d_{t+1})$ together act like one step $(x_t + d_t "
    "x_{t+1},\\; d_t "
    "d_{t+1})$. Join neighbours, then neighbours of neighbours, doubling the reach. The check counts tensor "
    "operations.",
    cases=scan_cases,
    suspects={
        "The decays are not joined: after each round the decay over the doubled reach is d_t * d_{t + reach}.": (
            partial(scan_with, "decays")
        ),
        "The reach grows by one, and so counts steps twice: double it.": partial(scan_with, "linear"),
        "The reach grows by one, so that steps are counted twice: double it each round.": (
            partial(scan_with, "linear, cut")
        ),
        "It stops after one round: double the reach until it is at least T.": partial(scan_with, "one round"),
        "It runs forwards in time: y_t needs what comes after t.": partial(scan_with, "forwards"),
        "The decays are not used: y_t = x_t + d_t * y_{t+1}, and this is the sum of all that follows.": (
            lambda x, decays: x.flip(1).cumsum(1).flip(1)
        ),
        "The decay is the next column's: it is decays[:, t] that weighs y_{t+1}.": (
            lambda x, decays: scan_with("", x, torch.cat((decays[:, 1:], decays[:, -1:]), 1))
        ),
        "x_t is weighed by d_t too: y_t = x_t + d_t * y_{t+1}.": (
            lambda x, decays: scan_with("", torch.cat(((decays * x)[:, :-1], x[:, -1:]), 1), decays)
        ),
    },
    hints=(
        "Keep two tensors, `x` (what the next `reach` steps bring) and `d` (what is left of all that follows). At "
        "first "
        "`reach = 1`.",
        "A round: `x[:, :-reach]` becomes `x[:, :-reach] + d[:, :-reach] * x[:, reach:]`, then `d[:, :-reach]` becomes "
        "`d[:, :-reach] * d[:, reach:]`, then `reach *= 2`. Make new tensors: the right-hand sides need the old ones.",
    ),
    budget=_scan_budget,
)
def reverse_scan(x: Tensor, decays: Tensor) -> Tensor:
    """y_t = x_t + d_t y_{t+1}, with y = x in the last column, in about log2(T) rounds: x, decays [N, T] give [N, T]."""
    return scan_with("", x, decays)
