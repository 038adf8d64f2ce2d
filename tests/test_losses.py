"""minirlhf.losses: each against its definition; the ranking loss against enumeration over pairs."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf.losses import (
    clipped_surrogate,
    count_ranked_prompts,
    entropy_from_logits,
    pairwise_accuracy,
    policy_gradient_loss,
    ranking_loss,
    sft_loss,
    token_logprobs,
    value_loss,
)

F64, NAN = torch.float64, float("nan")


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed), requires_grad=True)


# Losses over tokens, as functions of one differentiable tensor, what else they need, and a mask.
OTHER, OTHER2 = (randn(4, 5, seed=s).detach() for s in (1, 2))
TOKEN_LOSSES = {
    "policy_gradient_loss": lambda x, o, mask, **k: policy_gradient_loss(x, o[0], mask, **k),
    "clipped_surrogate": lambda x, o, mask, **k: clipped_surrogate(x, o[0], o[1], mask, **k),
    "value_loss": lambda x, o, mask, **k: value_loss(x, o[0], mask, **k),
    "value_loss clipped": lambda x, o, mask, **k: value_loss(x, o[0], mask, old_values=o[1], clip_range=0.3, **k),
    "sft_loss": lambda x, o, mask, **k: sft_loss(x, mask, **k),
}


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_masks_micro_batches_and_gradients(name):
    loss_of = TOKEN_LOSSES[name]
    x, others = randn(4, 5), (OTHER, OTHER2)
    mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(9)) < 0.6
    assert torch.autograd.gradcheck(lambda x: loss_of(x, others, mask), (x,))
    loss = loss_of(x, others, mask)
    (grad,) = torch.autograd.grad(loss, x)
    assert (grad[~mask] == 0).all() and (grad[mask] != 0).any()
    # NaN under the mask
    dirty = x.detach().masked_fill(~mask, NAN).requires_grad_()
    same = loss_of(dirty, tuple(o.masked_fill(~mask, NAN) for o in others), mask)
    assert torch.equal(same, loss) and torch.equal(torch.autograd.grad(same, dirty)[0], grad)
    # micro-batches
    rows = [slice(i, i + 1) for i in range(4)]
    parts = [loss_of(x[i], tuple(o[i] for o in others), mask[i], denominator=mask.sum()) for i in rows]
    torch.testing.assert_close(sum(parts), loss)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), x)[0], grad)
    with pytest.raises(ValueError, match=r"no token counts|nothing counts"):
        loss_of(x, others, torch.zeros_like(mask))
    with pytest.raises(ValueError):
        loss_of(x, others, mask.double())
    if name != "sft_loss":
        with pytest.raises(ValueError):
            loss_of(x, (OTHER[:, :1], OTHER2[:, :1]), mask)  # would broadcast
        torch.testing.assert_close(loss_of(x, others, None), loss_of(x, others, torch.ones_like(mask)))


def test_the_constants_carry_no_gradient():
    x, a, b = randn(3), randn(3, seed=1), randn(3, seed=2)
    loss = policy_gradient_loss(x, a) + clipped_surrogate(x, b, a) + value_loss(x, a, old_values=b, clip_range=0.1)
    loss.backward()
    assert a.grad is None and b.grad is None and x.grad is not None


def test_value_loss_is_half_the_square_and_clips_to_the_worse():
    v, r, old = torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([2.0])
    assert value_loss(v, r) == 0.5
    assert value_loss(v, r, old_values=old, clip_range=0.5) == 0.5 * 1.5**2
    with pytest.raises(ValueError, match="go together"):
        value_loss(v, r, clip_range=0.5)


def test_sft_loss_is_cross_entropy_of_the_completion():
    logits, ids = randn(2, 5, 7), torch.randint(7, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[False, True, True, False], [False, False, True, True]])
    loss = sft_loss(token_logprobs(logits[:, :-1], ids[:, 1:], mask=mask), mask)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1][mask], ids[:, 1:][mask])
    torch.testing.assert_close(loss, expected)


def test_entropy_from_logits():
    logits = torch.tensor([[0.0, 0.0, 0.0, -torch.inf], [900.0, 0.0, 0.0, 0.0]], dtype=F64, requires_grad=True)
    entropy = entropy_from_logits(logits)
    torch.testing.assert_close(entropy, torch.tensor([3.0, 1.0], dtype=F64).log(), rtol=1e-12, atol=1e-12)
    entropy.sum().backward()
    assert logits.grad.isfinite().all()
    assert torch.autograd.gradcheck(entropy_from_logits, (randn(3, 4),))
    assert torch.autograd.gradgradcheck(entropy_from_logits, (randn(2, 3),))


def ranking_by_enumeration(rewards, scores, mask):
    """Prompt by prompt, pair by pair, with log(sigmoid) in float64."""
    prompts = []
    for r, s, m in zip(rewards, scores, mask, strict=True):
        losses = []
        for i, j in combinations([k for k in range(len(s)) if m[k]], 2):
            if s[i] != s[j]:
                w, loser = (i, j) if s[i] > s[j] else (j, i)
                losses.append(-torch.log(torch.sigmoid(r[w] - r[loser])))
        if losses:
            prompts.append(sum(losses) / len(losses))
    return sum(prompts) / len(prompts)


@settings(max_examples=40, deadline=None)
@given(b=st.integers(1, 5), k=st.integers(2, 6), seed=st.integers(0, 10_000))
def test_ranking_loss_and_gradient_equal_enumeration_over_pairs(b, k, seed):
    g = torch.Generator().manual_seed(seed)
    rewards = torch.randn(b, k, dtype=F64, generator=g, requires_grad=True)
    scores, mask = torch.randint(4, (b, k), generator=g).double(), torch.rand(b, k, generator=g) < 0.8
    if count_ranked_prompts(scores, mask) == 0:
        with pytest.raises(ValueError, match="tied or masked"):
            ranking_loss(rewards, scores, mask)
        return
    loss, expected = ranking_loss(rewards, scores, mask), ranking_by_enumeration(rewards, scores, mask)
    torch.testing.assert_close(loss, expected)
    (grad,) = torch.autograd.grad(loss, rewards)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, rewards)[0])
    # NaN where nothing counts, another order, another scale of the scores, and a constant added to the rewards
    dirty = rewards.detach().masked_fill(~mask, NAN).requires_grad_()
    same = ranking_loss(dirty, scores.masked_fill(~mask, NAN), mask)
    assert torch.equal(same, loss) and torch.equal(torch.autograd.grad(same, dirty)[0], grad)
    order = torch.randperm(k, generator=g)
    torch.testing.assert_close(ranking_loss(rewards[:, order], scores[:, order], mask[:, order]), loss)
    torch.testing.assert_close(ranking_loss(rewards + 7, 3 * scores - 1, mask), loss)
    # micro-batches of one prompt
    denominator, rows = count_ranked_prompts(scores, mask), [slice(i, i + 1) for i in range(b)]
    parts = [ranking_loss(rewards[i], scores[i], mask[i], denominator=denominator) for i in rows]
    torch.testing.assert_close(torch.autograd.grad(sum(parts), rewards)[0], grad)


def test_ranking_loss_is_stable_and_normalised_by_the_pairs():
    r = torch.tensor([[-2000.0, 2000.0]], requires_grad=True)
    loss = ranking_loss(r, torch.tensor([[1.0, 0.0]]))
    loss.backward()
    assert loss == 4000 and r.grad.tolist() == [[-1.0, 1.0]]
    equal, scores = torch.zeros(1, 5, dtype=F64), torch.arange(5.0).unsqueeze(0)
    torch.testing.assert_close(ranking_loss(equal, scores), torch.tensor(2.0, dtype=F64).log())  # whatever K


@pytest.mark.parametrize(
    ("shape", "scores_shape", "mask", "message"),
    [
        ((3,), (3,), None, "must"),
        ((2, 3), (2, 1), None, "must"),
        ((2, 3), (2, 3), torch.ones(2, 3), "mask must be bool"),
    ],
)
def test_ranking_shapes_are_checked(shape, scores_shape, mask, message):
    with pytest.raises(ValueError, match=message):
        ranking_loss(torch.zeros(shape), torch.zeros(scores_shape), mask)


def test_pairwise_accuracy_counts_ties_by_halves():
    rewards = torch.tensor([[3.0, 2.0, 2.0, NAN], [0.0, 1.0, NAN, NAN]])
    scores = torch.tensor([[3.0, 2.0, 1.0, 9.0], [5.0, 5.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    correct, total = pairwise_accuracy(rewards, scores, mask)
    assert (correct.item(), total.item()) == (2.5, 3)
