"""minirlhf.kl: the estimators against the exact KL of an enumerated distribution, the rewards, the controllers."""

import pytest
import torch

from minirlhf.kl import AdaptiveKLController, FixedKLController, exact_kl, kl_k1, kl_k2, kl_k3, kl_rewards

F64, NAN = torch.float64, float("nan")


def two_policies(distance=1.0):
    torch.manual_seed(0)
    ref = 2 * torch.randn(12, dtype=F64)
    return (0.3 * ref + distance * torch.randn(12, dtype=F64)).requires_grad_(), ref


def test_the_estimators_by_enumeration():
    """Expectation under pi, summed over the vocabulary: k1 and k3 are exact, k2 is not, and no two are swapped."""
    logits, ref = two_policies()
    logprobs, ref_logprobs = logits.log_softmax(-1), ref.log_softmax(-1)
    p = logprobs.exp()
    exact = exact_kl(logits, ref)
    means = [(p * k(logprobs, ref_logprobs)).sum() for k in (kl_k1, kl_k2, kl_k3)]
    torch.testing.assert_close(means[0], exact)
    torch.testing.assert_close(means[2], exact)
    assert abs(means[1] - exact) > 0.05 * exact
    # the other direction, KL(ref || pi), is another number: reversed arguments would be noticed
    assert abs(exact_kl(ref, logits) - exact) > 0.05 * exact
    # k3 has less variance than k1 and is never negative; k1 is negative somewhere
    variances = [(p * k(logprobs, ref_logprobs).square()).sum() - exact**2 for k in (kl_k1, kl_k3)]
    assert variances[1] < variances[0]
    assert (kl_k3(logprobs, ref_logprobs) >= 0).all() and (kl_k1(logprobs, ref_logprobs) < 0).any()


def test_the_gradient_of_k2_is_that_of_the_kl_and_the_gradient_of_k3_is_not():
    """On samples of pi: E[grad k2] = grad KL(pi || ref), E[grad k3] = grad KL(ref || pi), E[grad k1] = 0."""
    logits, ref = two_policies()
    logprobs, ref_logprobs = logits.log_softmax(-1), ref.log_softmax(-1)
    p = logprobs.exp().detach()
    forward, backward = (torch.autograd.grad(kl, logits)[0] for kl in (exact_kl(logits, ref), exact_kl(ref, logits)))
    k1, k2, k3 = (
        torch.autograd.grad((p * k(logprobs, ref_logprobs)).sum(), logits, retain_graph=True)[0]
        for k in (kl_k1, kl_k2, kl_k3)
    )
    torch.testing.assert_close(k2, forward)
    torch.testing.assert_close(k3, backward)
    assert k1.abs().max() < 1e-12 and not torch.allclose(forward, backward, rtol=0.1)


def test_exact_kl_with_impossible_tokens():
    a, b = torch.tensor([0.0, 0.0, -torch.inf], requires_grad=True), torch.tensor([0.0, 0.0, 0.0])
    kl = exact_kl(a, b)
    torch.testing.assert_close(kl, torch.tensor(1.5).log())
    kl.backward()
    assert a.grad.isfinite().all()
    assert exact_kl(b, a.detach()) == torch.inf
    assert exact_kl(a.detach(), a.detach()) == 0
    assert torch.autograd.gradcheck(exact_kl, tuple(x.detach()[None].requires_grad_() for x in two_policies()))


def test_kl_rewards_by_hand():
    old = torch.tensor([[-1.0, -2.0, NAN], [-1.0, -1.0, -3.0]])
    ref = torch.tensor([[-3.0, -1.0, NAN], [-1.0, -2.0, -1.0]])
    mask = torch.tensor([[True, True, False], [False, True, True]])
    rewards = kl_rewards(torch.tensor([10.0, 20.0]), old, ref, mask, beta=0.5)
    assert rewards.tolist() == [[-1.0, 10.5, 0.0], [0.0, -0.5, 21.0]]
    # the sum is the objective r - beta log(pi / pi_ref) of the whole answer
    total = torch.tensor([10.0 - 0.5 * (2 - 1), 20.0 - 0.5 * (1 - 2)])
    torch.testing.assert_close(rewards.sum(1), total)
    old.requires_grad_()
    assert not kl_rewards(torch.tensor([10.0, 20.0]), old, ref, mask, beta=0.5).requires_grad


def test_kl_rewards_refuses():
    x, mask = torch.zeros(2, 3), torch.tensor([[True, True, False], [False, False, False]])
    with pytest.raises(ValueError, match="row 1 of response_mask counts no token"):
        kl_rewards(torch.zeros(2), x, x, mask, 0.1)
    with pytest.raises(ValueError, match="scores must be one per row"):
        kl_rewards(torch.zeros(2, 1), x, x, mask, 0.1)
    with pytest.raises(ValueError, match="share one shape"):
        kl_rewards(torch.zeros(2), x, x[:, :2], mask, 0.1)
    with pytest.raises(TypeError, match="bool"):
        kl_rewards(torch.zeros(2), x, x, mask.float(), 0.1)


def test_controllers():
    controller = AdaptiveKLController(0.1, target=6.0, horizon=1000)
    controller.update(kl=6.6, episodes=100)  # a tenth too far
    assert controller.beta == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    before = controller.beta
    controller.update(kl=0.0, episodes=100)  # much too near: the error is clipped to -0.2
    assert controller.beta == pytest.approx(before * (1 - 0.2 * 0.1))
    controller.update(kl=6.0, episodes=100)
    assert controller.beta == pytest.approx(before * 0.98)
    controller.update(kl=0.0, episodes=10**6)
    assert controller.beta == 0.0  # never negative
    restored = AdaptiveKLController(9.0, target=6.0, horizon=1000)
    controller.beta = 0.3
    restored.load_state_dict(controller.state_dict())
    assert restored.beta == 0.3 and all(type(v) is float for v in controller.state_dict().values())
    with pytest.raises(ValueError, match="finite"):
        controller.update(kl=NAN, episodes=1)
    for bad in ({"target": 0.0, "horizon": 1.0}, {"target": 1.0, "horizon": -1.0}):
        with pytest.raises(ValueError, match="above 0"):
            AdaptiveKLController(0.1, **bad)
    fixed = FixedKLController(0.2)
    fixed.update(kl=100.0, episodes=1)
    assert fixed.beta == 0.2
    with pytest.raises(ValueError, match="negative"):
        FixedKLController(-0.1)
