"""Each policy-gradient estimator equals the exact gradient, summed over everything that can happen (Proof 2).

Nothing is sampled: every sequence of a tiny vocabulary, or every episode of a tiny MDP, is listed with its probability,
the package's losses are taken on all of them at once, and the expectation of the gradient is compared with autograd
through the true expected return.
"""

from itertools import product

import pytest
import torch

from minirlhf.kl import exact_kl, kl_rewards
from minirlhf.losses import clipped_surrogate, policy_gradient_loss, ppo_loss, token_logprobs
from minirlhf.returns import discounted_returns, gae, n_step_advantages, td_errors, whiten

F64 = torch.float64
GAMMA = 0.9


class TinyMDP:
    """Two states, two actions, three steps; random moves; action 1 in state 1 ends the episode."""

    states, actions, steps = 2, 2, 3

    def __init__(self):
        torch.manual_seed(0)
        self.move = torch.randn(2, 2, 2, dtype=F64).softmax(-1)
        self.reward = torch.randn(2, 2, dtype=F64)
        self.theta = torch.randn(self.steps, 2, 2, dtype=F64, requires_grad=True)  # a policy for each time
        episodes = []
        for start in range(2):
            self._extend(episodes, [start], [], torch.tensor(0.5, dtype=F64))
        shape = (len(episodes), self.steps)
        self.s, self.a = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        self.ends, self.mask = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
        self.chance = torch.stack([e[2] for e in episodes])  # of the world's moves, without the policy
        for n, (s, a, _) in enumerate(episodes):
            length = len(a)
            self.s[n, :length], self.a[n, :length] = torch.tensor(s[:length]), torch.tensor(a)
            self.mask[n, :length], self.ends[n, length - 1] = True, True
        self.rewards = torch.where(self.mask, self.reward[self.s, self.a], torch.nan)

    def _extend(self, episodes, s, a, chance):
        for action in range(2):
            over = len(a) == self.steps - 1 or (s[-1] == 1 and action == 1)
            if over:
                episodes.append((s, [*a, action], chance))
            else:
                for nxt in range(2):
                    self._extend(episodes, [*s, nxt], [*a, action], chance * self.move[s[-1], action, nxt])

    def logprobs(self):
        logits = self.theta[torch.arange(self.steps), self.s]
        return token_logprobs(logits, self.a, mask=self.mask)

    def probability(self, logprobs):
        return self.chance * logprobs.sum(1).exp()

    def exact_gradient(self):
        discount = GAMMA ** torch.arange(self.steps, dtype=F64)
        returns = (torch.where(self.mask, self.rewards, 0.0) * discount).sum(1)
        log_p = (
            self.theta.log_softmax(-1)[torch.arange(self.steps), self.s].gather(-1, self.a.unsqueeze(-1)).squeeze(-1)
        )
        p = self.probability(torch.where(self.mask, log_p, 0.0))
        torch.testing.assert_close(p.sum(), torch.ones((), dtype=F64))
        return torch.autograd.grad((p * returns).sum(), self.theta)[0]

    def estimates(self, advantages):
        """One gradient an episode [E, ...], gamma^t and all, and the probabilities [E]."""
        discount = GAMMA ** torch.arange(self.steps, dtype=F64)
        logprobs = self.logprobs()
        grads = [
            -torch.autograd.grad(
                policy_gradient_loss(logprobs[n], (discount * advantages)[n], self.mask[n], denominator=1),
                self.theta,
                retain_graph=True,
            )[0]
            for n in range(len(advantages))
        ]
        return torch.stack(grads).flatten(1), self.probability(logprobs).detach()

    def true_values(self):
        v = torch.zeros(self.steps + 1, 2, dtype=F64)
        pi = self.theta.detach().softmax(-1)
        for t in reversed(range(self.steps)):
            after = (self.move * v[t + 1]).sum(-1)
            after[1, 1] = 0.0
            v[t] = (pi[t] * (self.reward + GAMMA * after)).sum(-1)
        return v[torch.arange(self.steps), self.s]

    def weights(self, kind):
        values = self.true_values()
        if "wrong" in kind:
            values = values + 3.0 + self.s  # a baseline may be anything that depends on the state
        values = values.masked_fill(~self.mask, torch.nan)
        base = {"mask": self.mask}
        returns = discounted_returns(self.rewards, self.ends, GAMMA, **base)
        return {
            "returns": lambda: returns,
            "baseline": lambda: torch.where(self.mask, returns - values, 0.0),
            "one-step": lambda: td_errors(self.rewards, values, self.ends, GAMMA, **base),
            "two-step": lambda: n_step_advantages(self.rewards, values, self.ends, GAMMA, 2, **base),
            "gae": lambda: gae(self.rewards, values, self.ends, gamma=GAMMA, lam=0.7, **base)[0],
            "gae-1": lambda: gae(self.rewards, values, self.ends, gamma=GAMMA, lam=1.0, **base)[0],
        }[kind.split()[0]]()


MDP = TinyMDP()
UNBIASED = ("returns", "baseline", "baseline wrong", "one-step", "two-step", "gae", "gae-1", "gae-1 wrong")


@pytest.mark.parametrize("kind", UNBIASED)
def test_every_estimator_has_the_exact_gradient_as_its_mean(kind):
    grads, p = MDP.estimates(MDP.weights(kind))
    torch.testing.assert_close((p.unsqueeze(1) * grads).sum(0), MDP.exact_gradient().flatten(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["one-step wrong", "two-step wrong", "gae wrong"])
def test_bootstrapping_from_wrong_values_is_biased(kind):
    grads, p = MDP.estimates(MDP.weights(kind))
    assert ((p.unsqueeze(1) * grads).sum(0) - MDP.exact_gradient().flatten()).abs().max() > 0.01


def test_baselines_and_bootstrapping_lower_the_variance():
    variance = {}
    for kind in UNBIASED:
        grads, p = MDP.estimates(MDP.weights(kind))
        mean = (p.unsqueeze(1) * grads).sum(0)
        variance[kind] = float((p.unsqueeze(1) * (grads - mean).square()).sum())
    assert variance["one-step"] < variance["gae"] < variance["baseline"] < variance["returns"]
    assert variance["baseline wrong"] > variance["baseline"]


MISTAKES = {
    "museum 6: missing minus sign": lambda mdp: -mdp.weights("returns"),
    "museum 7: A = r - V for G - V": lambda mdp: torch.where(mdp.mask, mdp.rewards - mdp.true_values(), 0.0),
    "museum 8: rewards of padding leak into returns": lambda mdp: discounted_returns(
        torch.where(mdp.mask, mdp.rewards, 1.0), torch.zeros_like(mdp.ends), GAMMA
    ),
    "museum 10: reward stored a step early": lambda mdp: discounted_returns(
        mdp.rewards.nan_to_num(0.0).roll(-1, 1), mdp.ends, GAMMA, mask=mdp.mask
    ),
    "museum 12: ends belong to the step before": lambda mdp: gae(
        mdp.rewards, mdp.true_values(), mdp.ends.roll(1, 1), gamma=GAMMA, lam=1.0, mask=mdp.mask
    )[0],
    "museum 22: the end treated as truncation": lambda mdp: gae(
        mdp.rewards, mdp.true_values(), mdp.ends, gamma=GAMMA, lam=1.0, mask=mdp.mask,
        truncated_values=1.0 + mdp.s.double(),
    )[0],
    "returns whitened over all episodes": lambda mdp: whiten(mdp.weights("returns"), mdp.mask),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_proof_refuses(mistake):
    grads, p = MDP.estimates(MISTAKES[mistake](MDP))
    assert ((p.unsqueeze(1) * grads).sum(0) - MDP.exact_gradient().flatten()).abs().max() > 0.005


# Sequences of a tiny vocabulary: RLHF's own objective --------------------------------------------------------------


class TinyLanguage:
    """All sequences of at most three tokens over {0, 1, EOS = 2}; the policy and reference are free tables."""

    def __init__(self, beta=0.3):
        torch.manual_seed(1)
        self.beta = beta
        everything = [s for n in (1, 2, 3) for s in product(range(3), repeat=n)]
        sequences = [s for s in everything if 2 not in s[:-1] and (len(s) == 3 or s[-1] == 2)]
        self.prefixes = [()] + [p for n in (1, 2) for p in product(range(2), repeat=n)]
        self.tokens = torch.full((len(sequences), 3), -100)
        self.where = torch.zeros(len(sequences), 3, dtype=torch.int64)
        for n, s in enumerate(sequences):
            self.tokens[n, : len(s)] = torch.tensor(s)
            for t in range(len(s)):
                self.where[n, t] = self.prefixes.index(s[:t])
        self.mask = self.tokens != -100
        self.theta = torch.randn(len(self.prefixes), 3, dtype=F64, requires_grad=True)
        self.ref = torch.randn(len(self.prefixes), 3, dtype=F64)
        self.scores = torch.randn(len(sequences), dtype=F64)
        self.ends = torch.zeros_like(self.mask)
        self.ends[torch.arange(len(sequences)), self.mask.sum(1) - 1] = True

    def logprobs(self, table):
        return token_logprobs(table[self.where], self.tokens)

    def naive(self, table):
        log_p = table.log_softmax(-1)[self.where].gather(-1, self.tokens.clamp(0).unsqueeze(-1)).squeeze(-1)
        return torch.where(self.mask, log_p, 0.0).sum(1)

    def objective(self):
        log_pi = self.naive(self.theta)
        return (log_pi.exp() * (self.scores - self.beta * (log_pi - self.naive(self.ref)))).sum()

    def exact_gradient(self):
        return torch.autograd.grad(self.objective(), self.theta)[0]

    def ppo_gradient(self, rewards_of=kl_rewards, loss_of=None, **options):
        """Expected gradient of the package's PPO pipeline: kl_rewards, gae, ppo_loss, each sequence at its chance."""
        logprobs = self.logprobs(self.theta)
        old, ref = logprobs.detach(), self.logprobs(self.ref)
        rewards = rewards_of(self.scores, old, ref, self.mask, self.beta)
        values = torch.linspace(-1, 1, 3, dtype=F64).expand_as(rewards).masked_fill(~self.mask, torch.nan)
        advantages, _ = gae(rewards, values, self.ends, gamma=1.0, lam=1.0, mask=self.mask)
        # Sequence n appears with its probability: its token terms are weighted by it through the advantages.
        chance = old.sum(1).exp().unsqueeze(1)
        loss_of = loss_of or (lambda *a: ppo_loss(*a, denominator=1, **options)[0])
        return -torch.autograd.grad(loss_of(logprobs, old, chance * advantages, self.mask), self.theta)[0]


def test_ppo_with_the_kl_in_its_rewards_is_the_gradient_of_the_rlhf_objective():
    """E[r - beta log(pi / pi_ref)] (Ouyang et al. 2022, equation 2), the KL inside the expectation and all."""
    language = TinyLanguage()
    assert language.naive(language.theta).exp().sum().item() == pytest.approx(1.0)
    torch.testing.assert_close(language.ppo_gradient(), language.exact_gradient(), rtol=1e-10, atol=1e-12)


RLHF_MISTAKES = {
    "the sign of the KL": lambda s, o, r, m, b: kl_rewards(s, o, r, m, -b),
    "no KL": lambda s, o, r, m, b: kl_rewards(s, o, r, m, 0.0),
    "museum 14: another KL": lambda s, o, r, m, b: kl_rewards(s, 0.5 * (o - r).square(), torch.zeros_like(o), m, b),
    "museum 10: the score a step early": lambda s, o, r, m, b: (
        kl_rewards(s, o, r, m, b).roll(-1, 1) + kl_rewards(s, o, r, m, b).roll(-1, 1)[:, -1:] * 0
    ),
    "museum 9: KL averaged over the row": lambda s, o, r, m, b: kl_rewards(
        s, (o - r).mean(1, keepdim=True).expand_as(o), torch.zeros_like(o), m, b
    ),
    "the score at the last column": lambda s, o, r, m, b: (
        kl_rewards(0 * s, o, r, m, b) + torch.nn.functional.pad(s[:, None], (2, 0))
    ),
}


@pytest.mark.parametrize("mistake", RLHF_MISTAKES)
def test_the_rlhf_proof_refuses(mistake):
    language = TinyLanguage()
    gap = language.ppo_gradient(RLHF_MISTAKES[mistake]) - language.exact_gradient()
    assert gap.abs().max() > 0.01


def test_off_policy_the_surrogate_is_the_importance_sampled_objective():
    """E_old[r A] = E_new[A] for one-token answers, and so is its gradient (TRPO, equation 14), while no clip acts."""
    torch.manual_seed(2)
    old, new = torch.randn(5, dtype=F64), torch.randn(5, dtype=F64, requires_grad=True)
    advantages, tokens = torch.randn(5, dtype=F64), torch.arange(5)
    logprobs, old_logprobs = token_logprobs(new.expand(5, 5), tokens), token_logprobs(old.expand(5, 5), tokens)
    p_old = old_logprobs.exp()
    got = clipped_surrogate(logprobs, old_logprobs, p_old * advantages, clip_range=float("inf"), denominator=1)
    expected = (new.softmax(-1) * advantages).sum()
    torch.testing.assert_close(-got, expected)
    for a, b in zip(*(torch.autograd.grad(x, new) for x in (-got, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_kl_in_the_loss_has_the_gradient_of_the_exact_kl():
    """ppo_loss's kl_coef term (k2) on policy; with k3 in its place it would be the reversed KL's gradient."""
    torch.manual_seed(3)
    theta, ref, tokens = torch.randn(5, dtype=F64, requires_grad=True), torch.randn(5, dtype=F64), torch.arange(5)
    logprobs, ref_logprobs = token_logprobs(theta.expand(5, 5), tokens), token_logprobs(ref.expand(5, 5), tokens)
    total = torch.zeros(5, dtype=F64)
    for token in range(5):  # one sample at a time, at its probability
        x = (logprobs[token : token + 1], logprobs[token : token + 1].detach(), torch.zeros(1, dtype=F64))
        mask = torch.ones(1, dtype=torch.bool)
        loss, _ = ppo_loss(*x, mask, ref_logprobs=ref_logprobs[token : token + 1], kl_coef=1.0)
        total += logprobs[token].detach().exp() * torch.autograd.grad(loss, theta, retain_graph=True)[0]
    torch.testing.assert_close(total, torch.autograd.grad(exact_kl(theta, ref), theta)[0])
