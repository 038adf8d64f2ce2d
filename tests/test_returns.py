"""minirlhf.returns: each estimate against its definition, and the masked statistics."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf.returns import (
    discounted_returns,
    explained_variance,
    gae,
    masked_mean,
    masked_sum,
    masked_var,
    n_step_advantages,
    td_errors,
    whiten,
)

F64, NAN = torch.float64, float("nan")


def episode_batch(seed=0, rows=4, columns=9):
    g = torch.Generator().manual_seed(seed)
    rewards, values, after = (torch.randn(rows, columns, dtype=F64, generator=g) for _ in range(3))
    ends, mask = torch.rand(rows, columns, generator=g) < 0.25, torch.rand(rows, columns, generator=g) < 0.8
    options = {"truncated_values": after, "last_values": torch.randn(rows, dtype=F64, generator=g), "mask": mask}
    return rewards, values, ends, options


@pytest.mark.parametrize("seed", range(3))
def test_lam_one_telescopes_to_returns_minus_values_and_lam_zero_is_the_td_error(seed):
    rewards, values, ends, options = episode_batch(seed)
    mask = options["mask"]
    returns = discounted_returns(rewards, ends, 0.9, **options)
    advantages, targets = gae(rewards, values, ends, gamma=0.9, lam=1.0, **options)
    torch.testing.assert_close(advantages, torch.where(mask, returns - values, 0.0))
    torch.testing.assert_close(targets, returns)
    one_step, _ = gae(rewards, values, ends, gamma=0.9, lam=0.0, **options)
    assert torch.equal(one_step, td_errors(rewards, values, ends, 0.9, **options))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 12), seed=st.integers(0, 1000), masked=st.booleans())
def test_n_step_advantages_from_the_definition(n, seed, masked):
    rewards, values, ends, options = episode_batch(seed)
    mask = options["mask"] if masked else torch.ones_like(ends)
    options = options | {"mask": mask if masked else None}
    got, last = n_step_advantages(rewards, values, ends, 0.9, n, **options), rewards.shape[1] - 1
    for row in range(rewards.shape[0]):
        for t in range(rewards.shape[1]):
            if not mask[row, t]:
                assert got[row, t] == 0
                continue
            total = -values[row, t]
            for k in range(t, t + n):
                total = total + 0.9 ** (k - t) * rewards[row, k]
                if ends[row, k]:
                    after = options["truncated_values"][row, k]
                elif k == last:
                    after = options["last_values"][row]
                else:
                    after = values[row, k + 1] if mask[row, k + 1] else 0.0
                if ends[row, k] or k == last or not mask[row, k + 1]:
                    break
            torch.testing.assert_close(got[row, t], total + 0.9 ** (k + 1 - t) * after)
    # What is kept as [T, N] goes in as a view.
    r, v, e, m, after = (x.t().contiguous().t() for x in (rewards, values, ends, mask, options["truncated_values"]))
    options |= {"mask": m if masked else None, "truncated_values": after}
    assert torch.equal(n_step_advantages(r, v, e, 0.9, n, **options), got)
    with pytest.raises(ValueError, match="n must be at least 1"):
        n_step_advantages(rewards, values, ends, 0.9, 0, **options)


def test_whiten_removes_the_mean_or_keeps_it():
    torch.manual_seed(0)
    x, mask = 5 + 3 * torch.randn(6, 7, dtype=F64), torch.rand(6, 7) < 0.6
    x[~mask] = NAN
    for shift_mean, mean in ((True, 0.0), (False, float(x[mask].mean()))):
        out = whiten(x, mask, shift_mean=shift_mean)
        assert out[mask].mean().item() == pytest.approx(mean, abs=1e-9)
        assert out[mask].var(unbiased=False).item() == pytest.approx(1.0)
        assert (out[~mask] == 0).all()
    assert whiten(torch.tensor([1.0, 3.0])).tolist() == [-1.0, 1.0]  # the unbiased variance would give 0.707
    for mask in (torch.tensor([True, False]), torch.tensor([False, False])):
        with pytest.raises(ValueError, match="at least 2"):
            whiten(torch.tensor([1.0, 3.0]), mask)


def test_masked_statistics_and_their_gradients_ignore_nan():
    torch.manual_seed(1)
    x, mask = torch.randn(4, 5, dtype=F64), torch.rand(4, 5) < 0.6
    mask[:, 0] = True
    kept = x[mask]
    x[~mask] = NAN
    x.requires_grad_()
    torch.testing.assert_close(masked_sum(x, mask), kept.sum())
    torch.testing.assert_close(masked_mean(x, mask), kept.mean())
    torch.testing.assert_close(masked_var(x, mask), kept.var(unbiased=False))
    rows = [x.detach()[i][mask[i]].mean() for i in range(4)]
    torch.testing.assert_close(masked_mean(x, mask, dim=1), torch.stack(rows))
    for statistic in (masked_sum, masked_mean, masked_var, lambda x, m: whiten(x, m).pow(3).sum()):
        (grad,) = torch.autograd.grad(statistic(x, mask), x)
        assert grad.isfinite().all() and (grad[~mask] == 0).all()
    with pytest.raises(ValueError, match="at least 1"):
        masked_mean(x, torch.zeros_like(mask))
    with pytest.raises(ValueError, match="mask must be bool"):
        masked_mean(x, mask.double())
    with pytest.raises(ValueError, match="mask must be bool"):
        masked_sum(x, mask[:1])  # no silent broadcasting


def test_explained_variance():
    returns, mask = torch.tensor([1.0, 2.0, 3.0, NAN]), torch.tensor([True, True, True, False])
    assert explained_variance(returns + 5, returns, mask) == 1  # a constant offset costs nothing
    assert explained_variance(torch.zeros(4), returns, mask) == 0
    assert explained_variance(-returns, returns, mask) == -3
    assert explained_variance(torch.zeros(3), torch.ones(3)).isnan()
