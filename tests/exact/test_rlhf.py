"""RLHF on all sequences of a tiny vocabulary: its gradient (Proof 2) and its optimum (Proof 5), nothing sampled.

Every sequence enters the batch, weighted by its probability, through the package's own token_logprobs, kl_rewards, gae
and ppo_loss. KL-regularised, PPO converges to pi* proportional to pi_ref exp(r / beta); nothing of that is known to it.
"""

import pytest
import torch
from minirlhf_course.tiny import text_mdp
from torch.nn.functional import pad

from minirlhf.kl import exact_kl, kl_rewards
from minirlhf.losses import clipped_surrogate, ppo_loss, token_logprobs
from minirlhf.returns import gae

F64 = torch.float64
close = torch.testing.assert_close


class TinyLanguage:
    """All sequences of at most three tokens, one of them EOS; policy and reference are tables, one row per prefix."""

    def __init__(self, beta=0.3):
        self.beta = beta
        problem = text_mdp()
        episodes, _ = problem.enumerate(torch.zeros(problem.shape, dtype=F64))
        self.where, self.mask, self.ends = episodes.states, episodes.mask, episodes.ends
        self.tokens = episodes.actions.masked_fill(~self.mask, -100)
        torch.manual_seed(1)
        self.theta = torch.randn(problem.shape, dtype=F64, requires_grad=True)
        self.ref = torch.randn(problem.shape, dtype=F64)
        self.scores = torch.randn(len(self.tokens), dtype=F64)

    def logprobs(self, table):
        return token_logprobs(table[self.where], self.tokens)

    def naive(self, table):
        log_p = table.log_softmax(-1)[self.where].gather(-1, self.tokens.clamp(0).unsqueeze(-1)).squeeze(-1)
        return torch.where(self.mask, log_p, 0.0).sum(1)

    def objective(self):
        """E[r - beta log(pi / pi_ref)] (Ouyang et al. 2022, equation 2), the KL inside the expectation and all."""
        log_pi = self.naive(self.theta)
        return (log_pi.exp() * (self.scores - self.beta * (log_pi - self.naive(self.ref)))).sum()

    def exact_gradient(self):
        return torch.autograd.grad(self.objective(), self.theta)[0]

    def ppo_gradient(self, rewards_of=kl_rewards):
        """The expected gradient of the package's PPO: kl_rewards, gae, ppo_loss, each sequence at its probability."""
        logprobs = self.logprobs(self.theta)
        old, ref = logprobs.detach(), self.logprobs(self.ref)
        rewards = rewards_of(self.scores, old, ref, self.mask, self.beta)
        values = torch.linspace(-1, 1, 3, dtype=F64).expand_as(rewards).masked_fill(~self.mask, torch.nan)
        advantages, _ = gae(rewards, values, self.ends, gamma=1.0, lam=1.0, mask=self.mask)
        # Sequence n appears with its probability: its token terms are weighted by it through the advantages.
        chance = old.sum(1).exp().unsqueeze(1)
        loss, _ = ppo_loss(logprobs, old, chance * advantages, self.mask, denominator=1)
        return -torch.autograd.grad(loss, self.theta)[0]

    def optimum(self):
        """pi_ref exp(r / beta), normalised: the probability of each sequence."""
        return (self.naive(self.ref) + self.scores / self.beta).softmax(0).detach()


def test_ppo_with_the_kl_in_its_rewards_is_the_gradient_of_the_rlhf_objective():
    language = TinyLanguage()
    assert language.naive(language.theta).exp().sum().item() == pytest.approx(1.0)
    close(language.ppo_gradient(), language.exact_gradient(), rtol=1e-10, atol=1e-12)


MISTAKES = {
    "the sign of the KL": lambda s, o, r, m, b: kl_rewards(s, o, r, m, -b),
    "no KL": lambda s, o, r, m, b: kl_rewards(s, o, r, m, 0.0),
    "museum 14: another KL": lambda s, o, r, m, b: kl_rewards(s, 0.5 * (o - r).square(), torch.zeros_like(o), m, b),
    "museum 10: the score a step early": lambda s, o, r, m, b: kl_rewards(s, o, r, m, b).roll(-1, 1),
    "museum 9: KL averaged over the row": lambda s, o, r, m, b: kl_rewards(
        s, (o - r).mean(1, keepdim=True).expand_as(o), torch.zeros_like(o), m, b
    ),
    "the score at the last column": lambda s, o, r, m, b: kl_rewards(0 * s, o, r, m, b) + pad(s[:, None], (2, 0)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_proof_refuses(mistake):
    language = TinyLanguage()
    gap = language.ppo_gradient(MISTAKES[mistake]) - language.exact_gradient()
    assert gap.abs().max() > 0.01


def test_off_policy_the_surrogate_is_the_importance_sampled_objective():
    """E_old[r A] = E_new[A] for one-token answers, and so is its gradient (TRPO, equation 14), while no clip acts."""
    torch.manual_seed(2)
    old, new = torch.randn(5, dtype=F64), torch.randn(5, dtype=F64, requires_grad=True)
    advantages, tokens = torch.randn(5, dtype=F64), torch.arange(5)
    logprobs, old_logprobs = token_logprobs(new.expand(5, 5), tokens), token_logprobs(old.expand(5, 5), tokens)
    weighted = old_logprobs.exp() * advantages
    got = -clipped_surrogate(logprobs, old_logprobs, weighted, clip_range=float("inf"), denominator=1)
    expected = (new.softmax(-1) * advantages).sum()
    close(got, expected)
    close(*(torch.autograd.grad(x, new)[0] for x in (got, expected)))


def test_kl_in_the_loss_has_the_gradient_of_the_exact_kl():
    """ppo_loss's kl_coef term (k2) on policy; with k3 in its place it would be the reversed KL's gradient."""
    torch.manual_seed(3)
    theta, ref, tokens = torch.randn(5, dtype=F64, requires_grad=True), torch.randn(5, dtype=F64), torch.arange(5)
    logprobs, ref_logprobs = token_logprobs(theta.expand(5, 5), tokens), token_logprobs(ref.expand(5, 5), tokens)
    total = torch.zeros(5, dtype=F64)
    for x, r in zip(logprobs.split(1), ref_logprobs.split(1), strict=True):  # one sample at a time, at its probability
        none, mask = torch.zeros(1, dtype=F64), torch.ones(1, dtype=torch.bool)
        loss, _ = ppo_loss(x, x.detach(), none, mask, ref_logprobs=r, kl_coef=1.0)
        total += x.detach().exp() * torch.autograd.grad(loss, theta, retain_graph=True)[0]
    close(total, torch.autograd.grad(exact_kl(theta, ref), theta)[0])


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_at_the_optimum_the_gradient_is_zero(beta):
    language = TinyLanguage(beta)
    optimum = language.optimum()
    flow = torch.zeros_like(language.theta)  # how often pi* draws each token after each prefix
    for n, t in language.mask.nonzero().tolist():
        flow[language.where[n, t], language.tokens[n, t]] += optimum[n]
    before = language.ppo_gradient().abs().max()
    with torch.no_grad():
        language.theta.copy_(flow.log())
        close(language.naive(language.theta).exp(), optimum)
    assert language.ppo_gradient().abs().max() < 1e-12 < 1e-2 < before


def test_ppo_converges_to_the_tilted_reference():
    language = TinyLanguage(beta=1.0)
    optimiser = torch.optim.Adam([language.theta], lr=0.2, eps=1e-12)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.99)
    for _ in range(500):
        language.theta.grad = -language.ppo_gradient()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        policy, ref = (language.naive(table).exp() for table in (language.theta, language.ref))
        close(policy, language.optimum(), rtol=0, atol=1e-3)
        # The optimum's value is beta log Z, and neither the reference nor the best answer alone is the optimum.
        log_z = (ref.log() + language.scores / language.beta).logsumexp(0)
        assert language.objective().item() == pytest.approx(language.beta * log_z.item(), abs=1e-4)
        assert (policy - ref).abs().max() > 0.05 and policy.max() < 0.9
