"""The bug museum (docs: what has bitten public projects), as far as it concerns the mathematics.

For each bug a mutated copy is put where the package's function stands, and the check that the package passes refuses
it. Numbers are the museum's. (6, 7, 8, 9, 10, 12, 14 and 22 also stand in test_policy_gradient_enumeration.py.)
"""

import pytest
import torch
from torch.nn.functional import logsigmoid

from minirlhf.kl import exact_kl, kl_k2, kl_k3
from minirlhf.losses import clipped_surrogate, ranking_loss, token_logprobs
from minirlhf.returns import gae, masked_mean, whiten

F64 = torch.float64


def close(a, b, tolerance=1e-9):
    return bool(((a - b).abs() <= tolerance).all())


# 1: value targets --------------------------------------------------------------------------------------------------


def targets_check(targets_of):
    """With lam = 1 and no discount the target of a step is the sum of the rewards still to come."""
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]], dtype=F64), torch.tensor([[9.0, -3.0, 0.5]], dtype=F64)
    ends = torch.tensor([[False, False, True]])
    return close(targets_of(rewards, values, ends), torch.tensor([[7.0, 6.0, 4.0]], dtype=F64))


def test_01_value_targets_from_whitened_advantages():
    options = {"gamma": 1.0, "lam": 1.0}
    assert targets_check(lambda r, v, e: gae(r, v, e, **options)[1])
    assert not targets_check(lambda r, v, e: whiten(gae(r, v, e, **options)[0]) + v)


# 2: the KL term's gradient -----------------------------------------------------------------------------------------


def kl_check(kl):
    """On every sample at its probability, the gradient of the estimate is that of the exact KL."""
    torch.manual_seed(0)
    theta, ref = torch.randn(6, dtype=F64, requires_grad=True), torch.randn(6, dtype=F64)
    logprobs = theta.log_softmax(-1)
    loss = (logprobs.exp().detach() * kl(logprobs, ref.log_softmax(-1))).sum()
    if not loss.requires_grad:
        return False
    got, expected = torch.autograd.grad(loss, theta)[0], torch.autograd.grad(exact_kl(theta, ref), theta)[0]
    return close(got, expected)


def test_02_kl_detached_and_14_the_wrong_kl():
    assert kl_check(kl_k2)
    assert not kl_check(lambda a, b: kl_k2(a, b).detach())
    assert not kl_check(kl_k3)
    assert not kl_check(lambda a, b: a - b)


# 3, 4, 5, 6: the clipped surrogate ---------------------------------------------------------------------------------


def surrogate_check(loss_of):
    """Value and slope in the four corners (A > 0 or < 0, ratio above or below the clip) and inside."""
    #        ratio    A      loss   d loss / d logprob
    corners = [(1.5, 2.0, -2.4, 0.0), (0.5, 2.0, -1.0, -1.0), (1.5, -2.0, 3.0, 3.0), (0.5, -2.0, 1.6, 0.0)]
    corners += [(1.1, 2.0, -2.2, -2.2), (0.9, -2.0, 1.8, 1.8)]
    for ratio, advantage, loss, slope in corners:
        old = torch.tensor([-1.0], dtype=F64)
        new = (old + torch.tensor(ratio, dtype=F64).log()).requires_grad_()
        got = loss_of(new, old, torch.tensor([advantage], dtype=F64))
        (grad,) = torch.autograd.grad(got, new, allow_unused=True, materialize_grads=True)
        if not (close(got, torch.tensor(loss, dtype=F64)) and close(grad, torch.tensor([slope], dtype=F64))):
            return False
    return True


def ratio_and_clip(new, old):
    ratio = (new - old).exp()
    return ratio, ratio.clamp(0.8, 1.2)


SURROGATE_BUGS = {
    "03 ratio always 1": lambda n, o, a: -(torch.minimum(*(x * a for x in ratio_and_clip(n, n.detach())))).mean(),
    "04 max for min": lambda n, o, a: -(torch.maximum(*(x * a for x in ratio_and_clip(n, o)))).mean(),
    "05 min before A": lambda n, o, a: -(torch.minimum(*ratio_and_clip(n, o)) * a).mean(),
    "06 no minus sign": lambda n, o, a: torch.minimum(*(x * a for x in ratio_and_clip(n, o))).mean(),
    "clipped alone": lambda n, o, a: -(ratio_and_clip(n, o)[1] * a).mean(),
}


@pytest.mark.parametrize("bug", SURROGATE_BUGS)
def test_the_clipped_surrogate_refuses(bug):
    assert surrogate_check(clipped_surrogate)
    assert surrogate_check(lambda n, o, a: -torch.minimum(*(x * a for x in ratio_and_clip(n, o))).mean())
    assert not surrogate_check(SURROGATE_BUGS[bug])


# 9, 17: masks ------------------------------------------------------------------------------------------------------


def test_09_and_17_means_over_padding():
    def check(mean):
        x, mask = torch.tensor([[1.0, 3.0, 50.0], [5.0, 50.0, 50.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
        nan = x.masked_fill(~mask, torch.nan)
        return all(bool(mean(data, mask) == 3.0) for data in (x, nan))

    assert check(masked_mean)
    assert not check(lambda x, m: (x * m).mean())  # divided by the padding too
    assert not check(lambda x, m: (x * m).sum() / m.sum())  # 0 * NaN
    assert not check(lambda x, m: masked_mean(x, torch.ones_like(m)))  # a mask of all ones


# 13: cancellation --------------------------------------------------------------------------------------------------


def test_13_k3_cancels_in_float32():
    def check(kl):
        d = torch.logspace(-3, -2, 50)
        truth = torch.expm1(-d.double()) + d.double()
        return close(kl(d, torch.zeros(50)).double() / truth, torch.ones(50, dtype=F64), 1e-3)

    assert check(kl_k3)
    assert not check(lambda a, b: (torch.exp(b - a) - 1) - (b - a))


# 19: the ranking loss ----------------------------------------------------------------------------------------------


def ranking_check(loss_of):
    """All answers alike: log 2 whatever K. Far apart: the difference itself, with a finite gradient. One known case."""
    k = torch.arange(4.0, dtype=F64).unsqueeze(0)
    far = torch.tensor([[-1000.0, 1000.0]], dtype=F64, requires_grad=True)
    loss = loss_of(far, -k[:, :2])
    (grad,) = torch.autograd.grad(loss, far)
    known = -(logsigmoid(torch.tensor([1.0, 2.0, 1.0], dtype=F64))).mean()  # rewards 0, 1, 2 in the right order
    return (
        close(loss_of(torch.zeros_like(k), k), torch.tensor(2.0, dtype=F64).log())
        and close(loss, torch.tensor(2000.0, dtype=F64))
        and close(grad, torch.tensor([[-1.0, 1.0]], dtype=F64))
        and close(loss_of(k[:, :3], k[:, :3]), known)
    )


def pairs(rewards, scores):
    better = scores.unsqueeze(2) > scores.unsqueeze(1)
    return (rewards.unsqueeze(2) - rewards.unsqueeze(1))[better], better.sum()


RANKING_BUGS = {
    "normalised twice": lambda r, s: -(logsigmoid(pairs(r, s)[0]).mean() / pairs(r, s)[1]),
    "without the log": lambda r, s: -pairs(r, s)[0].sigmoid().mean(),
    "unstable": lambda r, s: -pairs(r, s)[0].sigmoid().log().mean(),
    "not normalised": lambda r, s: -logsigmoid(pairs(r, s)[0]).sum(),
    "loser above winner": lambda r, s: -logsigmoid(-pairs(r, s)[0]).mean(),
    "best against the rest only": lambda r, s: (
        -logsigmoid((r.gather(1, s.argmax(1, True)) - r)[s < s.amax(1, True)]).mean()
    ),
}


@pytest.mark.parametrize("bug", RANKING_BUGS)
def test_19_the_ranking_loss_refuses(bug):
    assert ranking_check(ranking_loss)
    assert ranking_check(lambda r, s: -logsigmoid(pairs(r, s)[0]).mean())
    assert not ranking_check(RANKING_BUGS[bug])


# 20, 23: log-probabilities -----------------------------------------------------------------------------------------


def test_20_a_log_probability_is_never_above_zero():
    def check(logprobs_of):
        torch.manual_seed(0)
        logits = torch.randn(2000, 40) + 30 * torch.nn.functional.one_hot(torch.arange(2000) % 40, 40)
        return bool((logprobs_of(logits, torch.arange(2000) % 40) <= 0).all())

    assert check(token_logprobs)
    # float32 rounding of exp and sum separately, and a vocabulary whose tail is forgotten
    assert not check(lambda z, t: z.gather(1, t[:, None])[:, 0] - z[:, :32].logsumexp(1))


def test_23_off_by_one_between_logits_and_tokens():
    """A model that knows that each token is followed by the next one gives the sequence probability 1."""
    ids = torch.tensor([[0, 1, 2, 3]])
    logits = 100.0 * torch.nn.functional.one_hot((ids + 1) % 5, 5)
    assert close(token_logprobs(logits[:, :-1], ids[:, 1:]), torch.zeros(1, 3))
    assert not close(token_logprobs(logits, ids), torch.zeros(1, 4))
