"""KL-regularised RLHF on an enumerable problem converges to pi* proportional to pi_ref exp(r / beta) (Proof 5).

Exact gradients: every one of the sequences enters the batch, weighted by its probability, through the package's own
token_logprobs, kl_rewards, gae and ppo_loss. Nothing of the optimum is known to the optimiser.
"""

import pytest
import torch
from test_policy_gradient_enumeration import TinyLanguage


def tilted_reference(language):
    return (language.naive(language.ref) + language.scores / language.beta).softmax(0).detach()


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_at_the_optimum_the_gradient_is_zero(beta):
    language = TinyLanguage(beta)
    optimum = tilted_reference(language)
    flow = torch.zeros_like(language.theta)  # how often pi* draws each token after each prefix
    for n, t in language.mask.nonzero().tolist():
        flow[language.where[n, t], language.tokens[n, t]] += optimum[n]
    before = language.ppo_gradient().abs().max()
    with torch.no_grad():
        language.theta.copy_(flow.log())
        torch.testing.assert_close(language.naive(language.theta).exp(), optimum)
    assert language.ppo_gradient().abs().max() < 1e-12 < 1e-2 < before


def test_ppo_converges_to_the_tilted_reference():
    language = TinyLanguage(beta=1.0)
    optimum = tilted_reference(language)
    optimiser = torch.optim.Adam([language.theta], lr=0.2, eps=1e-12)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.99)
    for _ in range(500):
        language.theta.grad = -language.ppo_gradient()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        policy, ref = (language.naive(table).exp() for table in (language.theta, language.ref))
        torch.testing.assert_close(policy, optimum, rtol=0, atol=1e-3)
        # The optimum's value is beta log Z, and neither the reference nor the best answer alone is the optimum.
        log_z = (ref.log() + language.scores / language.beta).logsumexp(0)
        assert language.objective().item() == pytest.approx(language.beta * log_z.item(), abs=1e-4)
        assert (policy - ref).abs().max() > 0.05 and policy.max() < 0.9
