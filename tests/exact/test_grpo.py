"""RLOO and GRPO on all groups of answers of a tiny vocabulary: what is unbiased, and how far each choice is off.

Every group of K of the fifteen sequences enters the batch, weighted by its probability, through the package's own
group_advantages, token_shares and ppo_loss. What comes out is the mean gradient itself, nothing sampled. A bias is the
part of it that does not lie along the exact gradient, as a share of it: Adam forgives a factor, but not a direction.
"""

import itertools

import pytest
import torch
from minirlhf_course.tiny import text_mdp

from minirlhf.kl import exact_kl
from minirlhf.language.grpo import ESTIMATORS, GRPOConfig, token_shares
from minirlhf.losses import ppo_loss, token_logprobs
from minirlhf.returns import group_advantages, masked_sum

F64 = torch.float64
close = torch.testing.assert_close
LENGTH = 3


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


class TinyGroups:
    """All fifteen sequences of at most three tokens, scored at random; policy and reference are tables of logits."""

    def __init__(self, beta: float = 0.3, k: int = 3) -> None:
        self.beta, self.k = beta, k
        problem = text_mdp()
        episodes, _ = problem.enumerate(torch.zeros(problem.shape, dtype=F64))
        self.where, self.mask = episodes.states, episodes.mask
        self.tokens = episodes.actions.masked_fill(~self.mask, -100)
        torch.manual_seed(1)
        self.theta = torch.randn(problem.shape, dtype=F64, requires_grad=True)
        self.ref = torch.randn(problem.shape, dtype=F64)
        self.scores = torch.randn(len(self.tokens), dtype=F64)
        self.groups = torch.tensor(list(itertools.product(range(len(self.tokens)), repeat=k)))  # [G, K]

    def logprobs(self, table):
        return torch.where(self.mask, token_logprobs(table[self.where], self.tokens), 0.0)

    def exact_gradient(self, beta: float | None = None):
        """Of E[r - beta log(pi / pi_ref)], the KL inside the expectation and all."""
        beta = self.beta if beta is None else beta
        log_pi = self.logprobs(self.theta).sum(1)
        objective = (log_pi.exp() * (self.scores - beta * (log_pi - self.logprobs(self.ref).sum(1)))).sum()
        return torch.autograd.grad(objective, self.theta)[0]

    def gradient(self, advantages_of=group_advantages, *, old=None, clip_range=float("inf"), **settings):
        """The mean gradient over all groups of answers of `old`, a table (default: the policy itself)."""
        config = GRPOConfig(
            group_size=self.k, batch_size=self.k, max_response_tokens=LENGTH, beta=self.beta, **settings
        )
        logprobs = self.logprobs(self.theta)
        old, ref = logprobs.detach() if old is None else self.logprobs(old), self.logprobs(self.ref)
        rewards = self.scores
        if config.kl == "reward":
            rewards = rewards - config.beta * (old - ref).sum(1)
        leave_one_out = config.baseline == "leave_one_out"
        advantages = advantages_of(
            rewards[self.groups], leave_one_out=leave_one_out, divide_by_std=config.divide_by_std
        )
        chances = old.sum(1)[self.groups].sum(1).exp()  # of each group
        loss = torch.zeros((), dtype=F64)
        for i in range(self.k):  # the i-th answers of all groups
            rows = self.groups[:, i]
            mask = self.mask[rows]
            counted = self.mask[self.groups].sum((1, 2))[:, None]  # tokens of each group, its own minibatch
            shares = token_shares(mask, 1, self.k, config) / (counted if config.loss_over == "tokens" else 1)
            weighted = chances[:, None] * advantages[:, i : i + 1] * shares
            loss = loss + ppo_loss(logprobs[rows], old[rows], weighted, mask, clip_range=clip_range, denominator=1)[0]
            if config.kl != "reward":
                kl = ESTIMATORS[config.kl](logprobs[rows], ref[rows])
                loss = loss + config.beta * masked_sum(chances[:, None] * shares * kl, mask)
        return -torch.autograd.grad(loss, self.theta)[0]


RLOO = {"baseline": "leave_one_out", "divide_by_std": False, "loss_over": "constant", "kl": "reward"}


def bias(found, exact) -> tuple[float, float]:
    """(the factor along the exact gradient, the rest's share of what was found)."""
    along = float((found * exact).sum() / exact.square().sum())
    return along, float((found - along * exact).norm() / found.norm())


@pytest.mark.parametrize("k", [2, 3])
def test_the_mean_gradient_of_rloo_is_the_exact_one(k: int) -> None:
    problem = TinyGroups(k=k)
    close(LENGTH * problem.gradient(**RLOO), problem.exact_gradient(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [2, 3])
def test_the_own_answer_in_the_mean_is_a_factor(k: int) -> None:
    problem = TinyGroups(k=k)
    found = problem.gradient(**RLOO | {"baseline": "group_mean"})
    close(LENGTH * found, (k - 1) / k * problem.exact_gradient(), rtol=1e-12, atol=1e-12)


BIASED = {
    "the group's standard deviation": ({"divide_by_std": True}, 0.221),
    "a mean over each answer's tokens": ({"loss_over": "sequences"}, 0.386),
    "a mean over the group's tokens": ({"loss_over": "tokens"}, 0.115),
    "GRPO, all of it but the KL": ({"divide_by_std": True, "loss_over": "sequences"}, 0.508),
}


@pytest.mark.parametrize("choice", BIASED)
def test_what_the_divisions_bias(choice: str) -> None:
    """As shares of the mean gradient, on this problem: another one has other numbers, but none of them is 0."""
    problem = TinyGroups()
    settings, expected = BIASED[choice]
    _, found = bias(problem.gradient(**RLOO | settings), problem.exact_gradient())
    assert found == pytest.approx(expected, abs=0.005)


def test_at_equal_lengths_only_the_standard_deviation_is_a_bias() -> None:
    problem = TinyGroups()
    problem.mask = torch.ones_like(problem.mask)
    full = [n for n in range(len(problem.tokens)) if int((problem.tokens[n] >= 0).sum()) == LENGTH]
    problem.where, problem.tokens = problem.where[full], problem.tokens[full]
    problem.mask, problem.scores = problem.mask[full], problem.scores[full]
    problem.groups = torch.tensor(list(itertools.product(range(len(full)), repeat=3)))
    constant = problem.gradient(**RLOO)
    for loss_over in ("sequences", "tokens"):
        close(problem.gradient(**RLOO | {"loss_over": loss_over}), constant, rtol=1e-12, atol=1e-12)
    assert bias(problem.gradient(**RLOO | {"divide_by_std": True}), constant)[1] > 0.01


def test_answers_of_an_old_policy_need_the_ratio_and_the_clip_biases() -> None:
    """Off-policy, the product of a token's ratios is what is exact; each token's own ratio and its clip are not."""
    problem = TinyGroups(beta=0.0)
    exact = problem.exact_gradient()
    torch.manual_seed(3)
    near = problem.theta.detach() + 0.02 * torch.randn_like(problem.ref)
    far = problem.theta.detach() + 0.5 * torch.randn_like(problem.ref)
    biases = [bias(problem.gradient(**RLOO, old=old, clip_range=0.2), exact)[1] for old in (near, far)]
    assert biases[0] < 0.02 < 0.1 < biases[1]
    close(problem.gradient(**RLOO, old=problem.theta.detach(), clip_range=0.2), problem.gradient(**RLOO))


def test_the_kl_in_the_reward_is_exact_and_in_the_loss_is_not() -> None:
    """The KL's own gradient: that of the whole is the mean gradient with the KL minus that without."""
    problem, without = TinyGroups(beta=1.0), TinyGroups(beta=0.0)
    true = problem.exact_gradient() - without.exact_gradient()

    def of(kl: str):
        return LENGTH * (problem.gradient(**RLOO | {"kl": kl}) - without.gradient(**RLOO | {"kl": kl}))

    close(of("reward"), true, rtol=1e-12, atol=1e-12)
    assert of("k1").abs().max() < 1e-12, "the mean gradient of a log-probability is 0"
    log_pi = problem.logprobs(problem.theta)
    reached = torch.zeros(len(problem.ref), dtype=F64)  # the probability of reaching each prefix
    chance = log_pi.sum(1).exp().detach()
    for n, row in enumerate(problem.where):
        for state in row[problem.mask[n]]:
            reached[state] += chance[n]
    by_state = torch.autograd.grad((reached * exact_kl(problem.theta, problem.ref)).sum(), problem.theta)[0]
    turned = torch.autograd.grad((reached * exact_kl(problem.ref, problem.theta)).sum(), problem.theta)[0]
    close(of("k2"), -by_state, rtol=1e-10, atol=1e-12)
    close(of("k3"), -turned, rtol=1e-10, atol=1e-12)
    assert bias(of("k2"), true)[1] == pytest.approx(0.508, abs=0.005)
    assert bias(of("k3"), true)[1] == pytest.approx(0.644, abs=0.005)


def test_two_answers_are_a_pair_and_ties_teach_nothing() -> None:
    pair = torch.tensor([[3.0, 1.0], [2.0, 2.0]], dtype=F64)
    close(group_advantages(pair, leave_one_out=True), torch.tensor([[2.0, -2.0], [0.0, 0.0]], dtype=F64))
    by_std = group_advantages(pair, leave_one_out=False, divide_by_std=True)
    close(by_std[0], torch.tensor([0.5**0.5, -(0.5**0.5)], dtype=F64), rtol=1e-5, atol=0)  # how far apart is forgotten
    assert (by_std[1] == 0).all()
    with pytest.raises(ValueError, match="K >= 2"):
        group_advantages(pair[:, :1], leave_one_out=True)


def test_a_huge_score_that_all_share_is_no_variance() -> None:
    same = torch.full((1, 5), 1e4 + 0.1, dtype=torch.float32)
    for divide in (False, True):
        assert group_advantages(same, leave_one_out=True, divide_by_std=divide).abs().max() < 1e-2


MISTAKES = {
    "no baseline at all is unbiased too": (lambda r, **o: r, True),
    "a baseline shared by all groups is unbiased too": (lambda r, **o: r - 0.4, True),
    "the own answer in the mean, scaled as if left out": (lambda r, **o: r - r.mean(1, keepdim=True), False),
    "the best of the group as baseline": (lambda r, **o: r - r.amax(1, keepdim=True), False),
    "the own answer as baseline": (lambda r, **o: 0.5 * r, False),
    "only the sign": (lambda r, **o: (r - r.mean(1, keepdim=True)).sign(), False),
    "minus": (lambda r, **o: -group_advantages(r, **o), False),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_proof_refuses_what_is_wrong_and_accepts_other_baselines(mistake: str) -> None:
    problem = TinyGroups()
    advantages_of, right = MISTAKES[mistake]
    off = (LENGTH * problem.gradient(advantages_of, **RLOO) - problem.exact_gradient()).abs().max()
    assert (off < 1e-12) == right and (right or off > 0.01)


def test_gradcheck_of_the_whole_loss() -> None:
    torch.manual_seed(2)
    shape = (4, LENGTH)
    mask = torch.tensor([[True] * 3, [True, True, False]] * 2)
    old, ref, advantages = (torch.randn(shape, dtype=F64) for _ in range(3))
    for config in (GRPOConfig(), GRPOConfig(kl="k2", loss_over="tokens", clip_range_high=0.28)):
        shares = token_shares(mask, 10, 4, config)

        def loss(logprobs, config=config, shares=shares):
            policy, _ = ppo_loss(
                logprobs, old, advantages * shares, mask, clip_range_high=config.clip_range_high, denominator=1
            )
            return policy + masked_sum(shares * ESTIMATORS[config.kl](logprobs, ref), mask)

        logprobs = (old + 0.1 * torch.randn(shape, dtype=F64)).requires_grad_()
        assert torch.autograd.gradcheck(loss, logprobs)
