"""DPO on all sequences of a tiny vocabulary: its optimum, its gradient, and the mistakes that move them."""

import pytest
import torch
from minirlhf_course.tiny import text_mdp

from minirlhf.losses import implicit_rewards, ranking_loss, token_logprobs

F64 = torch.float64
close = torch.testing.assert_close


class TinyRankings:
    """All fifteen sequences of at most three tokens, every pair of them compared, labels at their probabilities."""

    def __init__(self, beta: float = 0.5) -> None:
        self.beta = beta
        problem = text_mdp()
        episodes, _ = problem.enumerate(torch.zeros(problem.shape, dtype=F64))
        self.where, self.mask = episodes.states, episodes.mask
        self.tokens = episodes.actions.masked_fill(~self.mask, -100)
        torch.manual_seed(1)
        self.ref = torch.randn(problem.shape, dtype=F64)
        self.rewards = torch.randn(len(self.tokens), dtype=F64)
        self.start = torch.randn(problem.shape, dtype=F64)

    def logprobs(self, table):
        return token_logprobs(table[self.where], self.tokens).masked_fill(~self.mask, torch.nan)

    def implicit(self, table, **changes):
        logprobs, ref = self.logprobs(table), self.logprobs(changes.get("ref", self.ref))
        return implicit_rewards(logprobs, ref, self.mask, self.beta)

    def loss(self, own, label_smoothing: float = 0.0):
        """The expected loss: each pair both ways round, with Bradley and Terry's probability of each label."""
        total = torch.zeros((), dtype=F64)
        one_won = torch.tensor([[1.0, 0.0]], dtype=F64)
        for i in range(len(own)):
            for j in range(i):
                chance = torch.sigmoid(self.rewards[i] - self.rewards[j])
                pair = torch.stack((own[i], own[j]))[None]
                for scores, weight in ((one_won, chance), (one_won.flip(1), 1 - chance)):
                    options = {"denominator": 1 / weight, "label_smoothing": label_smoothing}
                    total = total + ranking_loss(pair, scores, **options)
        return total

    def gradient(self, table, own_of=None, **options):
        table = table.clone().requires_grad_()
        own = self.implicit(table) if own_of is None else own_of(self, table)
        return torch.autograd.grad(self.loss(own, **options), table)[0]

    def optimum(self):
        """Token by token, the policy pi_ref exp(r / beta) / Z."""
        log_ref = torch.where(self.mask, self.logprobs(self.ref), 0.0).sum(1)
        return (log_ref + self.rewards / self.beta).softmax(0)

    def table_of(self, chances):
        """A table whose policy gives the sequences these probabilities."""
        mass = torch.zeros_like(self.ref)
        for n, chance in enumerate(chances):
            for t in range(int(self.mask[n].sum())):
                mass[self.where[n, t], self.tokens[n, t]] += chance
        return torch.where(mass > 0, mass, 1.0).log()


def test_at_pi_ref_exp_r_over_beta_the_gradient_is_zero() -> None:
    problem = TinyRankings()
    best = problem.table_of(problem.optimum())
    chances = torch.where(problem.mask, problem.logprobs(best), 0.0).sum(1).exp()
    close(chances, problem.optimum(), rtol=1e-12, atol=1e-14)
    assert problem.gradient(best).abs().max() < 1e-12
    assert problem.gradient(problem.start).abs().max() > 0.1


def test_descent_ends_there() -> None:
    problem = TinyRankings()
    table = problem.start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([table], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = problem.loss(problem.implicit(table))
        loss.backward()
        return loss

    optimizer.step(closure)
    chances = torch.where(problem.mask, problem.logprobs(table.detach()), 0.0).sum(1).exp()
    close(chances, problem.optimum(), rtol=1e-4, atol=1e-6)


MISTAKES = {
    "chosen and rejected swapped": lambda p, table: -p.implicit(table),
    "no reference": lambda p, table: p.beta * torch.where(p.mask, p.logprobs(table), 0.0).sum(1),
    "a reference that moves": lambda p, table: implicit_rewards(p.logprobs(table), p.logprobs(table), p.mask, p.beta),
    "a mean over tokens": lambda p, table: p.implicit(table) / p.mask.sum(1),
    "a mean over padding too": lambda p, table: p.implicit(table) / p.mask.shape[1],
    "without beta": lambda p, table: p.implicit(table) / p.beta,
    "the first token left out": lambda p, table: implicit_rewards(
        p.logprobs(table), p.logprobs(p.ref), p.mask & (torch.arange(p.mask.shape[1]) > 0), p.beta
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_proof_refuses(mistake: str) -> None:
    problem = TinyRankings()
    best = problem.table_of(problem.optimum())
    gradient = problem.gradient(best, own_of=MISTAKES[mistake])
    assert gradient.abs().max() > 0.01


def test_label_smoothing_is_the_probability_of_a_wrong_label() -> None:
    """Labels turned round with probability 0.1 and a loss that assumes it: the expected loss of the two is one."""
    torch.manual_seed(0)
    rewards = torch.randn(4, 5, dtype=F64, requires_grad=True)
    scores = torch.randn(4, 5, dtype=F64)
    smooth = ranking_loss(rewards, scores, label_smoothing=0.1)
    mixed = 0.9 * ranking_loss(rewards, scores) + 0.1 * ranking_loss(rewards, -scores)
    close(smooth, mixed)
    close(torch.autograd.grad(smooth, rewards)[0], torch.autograd.grad(mixed, rewards)[0])
    assert torch.autograd.gradcheck(lambda x: ranking_loss(x, scores, label_smoothing=0.1), rewards)


def test_gradcheck_of_the_whole_loss() -> None:
    torch.manual_seed(2)
    ref, mask = torch.randn(4, 3, dtype=F64), torch.tensor([[True] * 3, [True, True, False]] * 2)
    scores = torch.tensor([[2.0, 1.0], [1.0, 1.0]], dtype=F64)  # the second prompt is tied

    def loss(logprobs):
        return ranking_loss(implicit_rewards(logprobs, ref, mask, 0.3).view(2, 2), scores)

    logprobs = torch.randn(4, 3, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, logprobs)
    (gradient,) = torch.autograd.grad(loss(logprobs), logprobs)
    assert (gradient[2:] == 0).all() and (gradient[1, 2] == 0).all() and (gradient[0] != 0).all()
    spoiled = logprobs.detach().masked_fill(~mask, torch.nan).requires_grad_()
    close(torch.autograd.grad(loss(spoiled), spoiled)[0], gradient)
