"""The bug museum (docs: what has bitten public projects), as far as it concerns the mathematics.

Each check passes the package's function and refuses the mutated copies. Numbers are the museum's. (6, 7, 8, 10, 12, 22
also stand in test_policy_gradient.py, 9, 10 and 14 in test_rlhf.py; 31 to 33 in test_grpo.py, 34 to 36 in test_dpo.py.)
"""

import pytest
import torch
from torch.nn.functional import logsigmoid, one_hot

from minirlhf.kl import exact_kl, kl_k2, kl_k3
from minirlhf.losses import clipped_surrogate, implicit_rewards, ranking_loss, token_logprobs
from minirlhf.returns import gae, group_advantages, masked_mean, whiten

F64 = torch.float64


def close(a, b, tolerance=1e-9):
    return bool(((a - b).abs() <= tolerance).all())


def tensor(*rows):
    return torch.tensor(rows, dtype=F64)


# The checks ----------------------------------------------------------------------------------------------------------


def value_targets(targets_of):
    """With lam = 1 and no discount the target of a step is the sum of the rewards still to come."""
    rewards, values, ends = tensor([1, 2, 4]), tensor([9, -3, 0.5]), torch.tensor([[False, False, True]])
    return close(targets_of(rewards, values, ends), tensor([7, 6, 4]))


def gradient_of_the_kl(kl):
    """On every sample at its probability, the gradient of the estimate is that of the exact KL."""
    torch.manual_seed(0)
    theta, ref = torch.randn(6, dtype=F64, requires_grad=True), torch.randn(6, dtype=F64)
    logprobs = theta.log_softmax(-1)
    loss = (logprobs.exp().detach() * kl(logprobs, ref.log_softmax(-1))).sum()
    if not loss.requires_grad:
        return False
    return close(*(torch.autograd.grad(x, theta)[0] for x in (loss, exact_kl(theta, ref))))


def surrogate(loss_of):
    """Value and slope in the four corners (A > 0 or < 0, ratio above or below the clip) and inside."""
    #        ratio    A      loss   d loss / d logprob
    corners = [(1.5, 2.0, -2.4, 0.0), (0.5, 2.0, -1.0, -1.0), (1.5, -2.0, 3.0, 3.0), (0.5, -2.0, 1.6, 0.0)]
    corners += [(1.1, 2.0, -2.2, -2.2), (0.9, -2.0, 1.8, 1.8)]
    for ratio, advantage, loss, slope in corners:
        old = tensor(-1)
        new = (old + tensor(ratio).log()).requires_grad_()
        got = loss_of(new, old, tensor(advantage))
        (grad,) = torch.autograd.grad(got, new, allow_unused=True, materialize_grads=True)
        if not (close(got, loss) and close(grad, slope)):
            return False
    return True


def mean_of_what_counts(mean):
    x, mask = tensor([1, 3, 50], [5, 50, 50]), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    return all(bool(mean(data, mask) == 3.0) for data in (x, x.masked_fill(~mask, torch.nan)))


def digits_of_a_small_kl(kl):
    d = torch.logspace(-3, -2, 50)
    truth = torch.expm1(-d.double()) + d.double()
    return close(kl(d, torch.zeros(50)).double() / truth, 1.0, 1e-3)


def ranking(loss_of):
    """All answers alike: log 2 whatever K. Far apart: the difference itself, with a finite gradient. One known case."""
    k = torch.arange(4.0, dtype=F64).unsqueeze(0)
    far = tensor([-1000, 1000]).requires_grad_()
    loss = loss_of(far, -k[:, :2])
    (grad,) = torch.autograd.grad(loss, far)
    known = -logsigmoid(tensor(1, 2, 1)).mean()  # rewards 0, 1, 2 in the right order
    return (
        close(loss_of(torch.zeros_like(k), k), tensor(2).log())
        and close(loss, 2000)
        and close(grad, tensor([-1, 1]))
        and close(loss_of(k[:, :3], k[:, :3]), known)
    )


def never_above_zero(logprobs_of):
    torch.manual_seed(0)
    tokens = torch.arange(2000) % 40
    return bool((logprobs_of(torch.randn(2000, 40) + 30 * one_hot(tokens, 40), tokens) <= 0).all())


def each_token_is_predicted(logprobs_of):
    """A model that knows that each token is followed by the next one gives the sequence probability 1."""
    ids = torch.tensor([[0, 1, 2, 3]])
    return close(logprobs_of(100.0 * one_hot((ids + 1) % 5, 5), ids), 0.0)


# What they are shown -------------------------------------------------------------------------------------------------


def clip(new, old):
    ratio = (new - old).exp()
    return ratio, ratio.clamp(0.8, 1.2)


def compared_with_the_others(advantages_of):
    """Each answer against the mean of the other two; a group whose answers are all as good teaches nothing."""
    got = advantages_of(tensor([1, 2, 6], [5, 5, 5]))
    return close(got, tensor([-3, -1.5, 4.5], [0, 0, 0]))


def in_units_of_the_deviation(advantages_of):
    """The same for any scale of the rewards, 0 and not NaN where the answers are all as good."""
    got = advantages_of(tensor([1, 2, 6], [10, 20, 60], [5, 5, 5]))
    return close(got[0] * 7**0.5, tensor(-2, -1, 3), 1e-5) and close(got[1], got[0], 1e-5) and close(got[2], tensor(0))


def implicit_reward(loss_of):
    """log 2 at the reference; the chosen answer's tokens are pushed up, the other's down, each by beta / 2."""
    mask = torch.tensor([[[True, True, True], [True, False, False]]])  # [1 prompt, 2 answers, 3 tokens]
    ref = torch.full((1, 2, 3), -1.0, dtype=F64)
    logprobs = ref.clone().requires_grad_()
    loss = loss_of(logprobs, ref, mask, 0.1)
    if not close(loss, tensor(2).log(), 1e-6):
        return False
    (grad,) = torch.autograd.grad(loss, logprobs, allow_unused=True, materialize_grads=True)
    return close(grad, tensor([[-0.05, -0.05, -0.05], [0.05, 0.0, 0.0]]), 1e-6)


def dpo_loss(logprobs, ref, mask, beta):
    rewards = implicit_rewards(logprobs.flatten(0, 1), ref.flatten(0, 1), mask.flatten(0, 1), beta)
    return ranking_loss(rewards.view(-1, 2), tensor([2, 1]))


def preferred(rewards):
    return -logsigmoid(rewards[:, 0] - rewards[:, 1]).mean()


def pairs(rewards, scores):
    better = scores.unsqueeze(2) > scores.unsqueeze(1)
    return (rewards.unsqueeze(2) - rewards.unsqueeze(1))[better]


def best_against_the_rest(rewards, scores):
    best = rewards.gather(1, scores.argmax(1, True))
    return -logsigmoid((best - rewards)[scores < scores.amax(1, True)]).mean()


RIGHT = [
    (value_targets, lambda r, v, e: gae(r, v, e, gamma=1.0, lam=1.0)[1]),
    (gradient_of_the_kl, kl_k2),
    (surrogate, clipped_surrogate),
    (surrogate, lambda n, o, a: -torch.minimum(*(x * a for x in clip(n, o))).mean()),
    (mean_of_what_counts, masked_mean),
    (digits_of_a_small_kl, kl_k3),
    (ranking, ranking_loss),
    (ranking, lambda r, s: -logsigmoid(pairs(r, s)).mean()),
    (never_above_zero, token_logprobs),
    (each_token_is_predicted, lambda logits, ids: token_logprobs(logits[:, :-1], ids[:, 1:])),
    (compared_with_the_others, lambda r: group_advantages(r, leave_one_out=True)),
    (compared_with_the_others, lambda r: r - (r.sum(1, True) - r) / 2),
    (in_units_of_the_deviation, lambda r: group_advantages(r, leave_one_out=False, divide_by_std=True)),
    (in_units_of_the_deviation, lambda r: (r - r.mean(1, True)) / (r.std(1, keepdim=True) + 1e-6)),
    (implicit_reward, dpo_loss),
    (implicit_reward, lambda x, ref, m, beta: preferred(beta * ((x - ref) * m).sum(2))),
]
WRONG = {
    "01 targets from whitened A": (value_targets, lambda r, v, e: whiten(gae(r, v, e, gamma=1.0, lam=1.0)[0]) + v),
    "02 the KL detached": (gradient_of_the_kl, lambda a, b: kl_k2(a, b).detach()),
    "14 the wrong KL: k3": (gradient_of_the_kl, kl_k3),
    "14 the wrong KL: k1": (gradient_of_the_kl, lambda a, b: a - b),
    "03 ratio always 1": (surrogate, lambda n, o, a: -torch.minimum(*(x * a for x in clip(n, n.detach()))).mean()),
    "04 max for min": (surrogate, lambda n, o, a: -torch.maximum(*(x * a for x in clip(n, o))).mean()),
    "05 min before A": (surrogate, lambda n, o, a: -(torch.minimum(*clip(n, o)) * a).mean()),
    "06 no minus sign": (surrogate, lambda n, o, a: torch.minimum(*(x * a for x in clip(n, o))).mean()),
    "clipped alone": (surrogate, lambda n, o, a: -(clip(n, o)[1] * a).mean()),
    "09 divided by the padding too": (mean_of_what_counts, lambda x, m: (x.nan_to_num() * m).mean()),
    "09 NaN times 0": (mean_of_what_counts, lambda x, m: (x * m).sum() / m.sum()),
    "17 a mask of all ones": (mean_of_what_counts, lambda x, m: masked_mean(x, torch.ones_like(m))),
    "13 k3 cancels in float32": (digits_of_a_small_kl, lambda a, b: (torch.exp(b - a) - 1) - (b - a)),
    "19 normalised twice": (ranking, lambda r, s: -logsigmoid(pairs(r, s)).mean() / len(pairs(r, s))),
    "19 without the log": (ranking, lambda r, s: -pairs(r, s).sigmoid().mean()),
    "19 unstable": (ranking, lambda r, s: -pairs(r, s).sigmoid().log().mean()),
    "19 not normalised": (ranking, lambda r, s: -logsigmoid(pairs(r, s)).sum()),
    "19 loser above winner": (ranking, lambda r, s: -logsigmoid(-pairs(r, s)).mean()),
    "19 best against the rest only": (ranking, best_against_the_rest),
    "20 the vocabulary's tail is forgotten": (
        never_above_zero, lambda z, t: z.gather(1, t[:, None])[:, 0] - z[:, :32].logsumexp(1)
    ),
    "23 off by one between logits and tokens": (each_token_is_predicted, token_logprobs),
    "31 the own answer in the baseline": (compared_with_the_others, lambda r: r - r.mean(1, True)),
    "31 the mean of the whole batch": (compared_with_the_others, lambda r: r - r.mean()),
    "32 the deviation of a constant group": (
        in_units_of_the_deviation, lambda r: (r - r.mean(1, True)) / r.std(1, keepdim=True)
    ),
    "32 the deviation of the whole batch": (in_units_of_the_deviation, lambda r: (r - r.mean(1, True)) / r.std()),
    "33 summed where averaged": (mean_of_what_counts, lambda x, m: torch.where(m, x, 0).sum()),
    "34 chosen and rejected swapped": (implicit_reward, lambda x, ref, m, b: preferred(b * ((ref - x) * m).sum(2))),
    "34 a reference that moves": (implicit_reward, lambda x, ref, m, b: preferred(b * ((x - x) * m).sum(2))),
    "34 no reference": (implicit_reward, lambda x, ref, m, b: preferred(b * (x * m).sum(2))),
    "35 the tokens of prompt and padding too": (implicit_reward, lambda x, ref, m, b: preferred(b * (x - ref).sum(2))),
    "36 a mean over tokens": (
        implicit_reward, lambda x, ref, m, b: preferred(b * ((x - ref) * m).sum(2) / m.sum(2))
    ),
    "36 a mean over padding too": (implicit_reward, lambda x, ref, m, b: preferred(b * ((x - ref) * m).mean(2))),
}  # fmt: skip


@pytest.mark.parametrize(("check", "function"), RIGHT)
def test_the_right_one_passes(check, function):
    assert check(function)


@pytest.mark.parametrize("bug", WRONG)
def test_is_refused(bug):
    check, function = WRONG[bug]
    assert not check(function)
