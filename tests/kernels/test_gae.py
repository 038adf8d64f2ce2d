"""gae against a plain loop, a hand-worked episode, and everything that must not leak."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from minirlhf_kernels import gae

F64 = torch.float64
NAN = float("nan")


def loop(rewards, values, ends, gamma, lam, last=None, truncated=None, mask=None):
    """The definition, one row and one step at a time, in Python floats."""
    rows, columns = rewards.shape
    advantages, returns = torch.zeros(rows, columns, dtype=F64), torch.zeros(rows, columns, dtype=F64)
    for n in range(rows):
        running = 0.0
        for t in reversed(range(columns)):
            if mask is not None and not mask[n, t]:
                running = 0.0
                continue
            if ends[n, t]:
                running, after = 0.0, float(truncated[n, t]) if truncated is not None else 0.0
            elif t == columns - 1:
                after = float(last[n]) if last is not None else 0.0
            else:
                after = float(values[n, t + 1]) if mask is None or mask[n, t + 1] else 0.0
            delta = float(rewards[n, t]) + gamma * after - float(values[n, t])
            running = delta + gamma * lam * running
            advantages[n, t], returns[n, t] = running, running + float(values[n, t])
    return advantages, returns


def test_a_hand_worked_episode_to_the_last_digit():
    """gamma = 1/2, lam = 1/2; two steps, an end, and two steps of an episode that goes on (value 4 after the buffer).

    t=3: 1 + 4/2 - 2 = 1; t=2: 0 + 2/2 - 1 + 1/4 = 1/4; t=1 (end): 2 - 1 = 1; t=0: 1 + 1/2 - 3 + 1/4 = -5/4
    """
    rewards = torch.tensor([[1.0, 2.0, 0.0, 1.0]])
    values = torch.tensor([[3.0, 1.0, 1.0, 2.0]])
    ends = torch.tensor([[False, True, False, False]])
    advantages, returns = gae(rewards, values, ends, gamma=0.5, lam=0.5, last_values=torch.tensor([4.0]))
    assert advantages.tolist() == [[-1.25, 1.0, 0.25, 1.0]]
    assert returns.tolist() == [[1.75, 2.0, 1.25, 3.0]]


def test_a_truncated_episode_bootstraps_and_a_terminated_one_does_not():
    rewards, values, ends = torch.ones(2, 2), torch.zeros(2, 2), torch.tensor([[False, True], [False, True]])
    after = torch.tensor([[NAN, 0.0], [NAN, 10.0]])  # read only where an episode ends
    advantages, _ = gae(rewards, values, ends, gamma=0.5, lam=1.0, truncated_values=after)
    assert advantages.tolist() == [[1.5, 1.0], [4.0, 6.0]]
    # The value after the last column belongs to an episode that goes on.
    advantages, _ = gae(rewards, values, ends, gamma=0.5, lam=1.0, last_values=torch.tensor([NAN, 7.0]))
    assert advantages.tolist() == [[1.5, 1.0], [1.5, 1.0]]


def test_nothing_flows_over_an_end():
    torch.manual_seed(0)
    rewards, values = torch.randn(3, 8, dtype=F64), torch.randn(3, 8, dtype=F64)
    ends = torch.zeros(3, 8, dtype=torch.bool)
    ends[:, 3] = True
    before = gae(rewards, values, ends, gamma=0.9, lam=0.8)[0]
    rewards[:, 4:], values[:, 4:] = 1e6, -1e6
    assert torch.equal(gae(rewards, values, ends, gamma=0.9, lam=0.8)[0][:, :4], before[:, :4])


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 12),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
    last=st.booleans(),
    truncated=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_equals_the_loop_in_both_layouts(rows, columns, gamma, lam, last, truncated, masked, seed):
    g = torch.Generator().manual_seed(seed)
    rewards, values, after = (torch.randn(rows, columns, dtype=F64, generator=g) for _ in range(3))
    ends = torch.rand(rows, columns, generator=g) < 0.3
    last_values = torch.randn(rows, dtype=F64, generator=g) if last else None
    after[~ends] = NAN
    mask = torch.rand(rows, columns, generator=g) < 0.7 if masked else None  # holes too
    if mask is not None:
        rewards[~mask], values[~mask], after[~mask] = NAN, NAN, NAN
    after = after if truncated else None
    expected = loop(rewards, values, ends, gamma, lam, last_values, after, mask)
    got = gae(rewards, values, ends, gamma=gamma, lam=lam, last_values=last_values, truncated_values=after, mask=mask)
    turned = (None if x is None else x.t().contiguous() for x in (rewards, values, ends, after, mask))
    r, v, e, a, m = turned
    flipped = gae(r, v, e, gamma=gamma, lam=lam, last_values=last_values, truncated_values=a, mask=m, time_dim=0)
    for x, y, z in zip(expected, got, flipped, strict=True):
        torch.testing.assert_close(y, x, rtol=1e-12, atol=1e-12)
        assert torch.equal(z.t(), y)  # bit for bit


def test_padding_leaks_nowhere_and_the_value_after_the_last_token_is_zero():
    rewards, values = torch.tensor([[0.0, 1.0, NAN, NAN]]), torch.tensor([[0.5, 0.5, NAN, 9.0]])
    mask, ends = torch.tensor([[True, True, False, False]]), torch.zeros(1, 4, dtype=torch.bool)
    advantages, returns = gae(rewards, values, ends, gamma=1.0, lam=1.0, mask=mask)
    assert advantages.tolist() == [[0.5, 0.5, 0.0, 0.0]] and returns.tolist() == [[1.0, 1.0, 0.0, 0.0]]


def test_inputs_are_left_alone_and_no_gradient_flows():
    rewards, values = torch.randn(2, 5), torch.randn(2, 5, requires_grad=True)
    ends, mask = torch.rand(2, 5) < 0.5, torch.rand(2, 5) < 0.5
    before = [x.detach().clone() for x in (rewards, values, ends, mask)]
    advantages, returns = gae(rewards, values, ends, gamma=0.9, lam=0.9, mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(before, (rewards, values, ends, mask), strict=True))
    assert not advantages.requires_grad and not returns.requires_grad


def test_float32_stays_close_to_float64_over_a_long_buffer():
    torch.manual_seed(1)
    rewards, values, ends = torch.randn(4, 4000), torch.randn(4, 4000), torch.rand(4, 4000) < 0.001
    exact = gae(rewards.double(), values.double(), ends, gamma=0.999, lam=0.99)[0]
    got = gae(rewards, values, ends, gamma=0.999, lam=0.99)[0]
    assert got.dtype == torch.float32 and exact.dtype == F64
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-4)


def test_what_is_refused():
    x, ends = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(TypeError, match="ends must be bool"):
        gae(x, x, torch.zeros(2, 3), gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match="values must have rewards' shape"):
        gae(x, torch.zeros(2, 4), ends, gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match="last_values"):
        gae(x, x, ends, gamma=1.0, lam=1.0, last_values=torch.zeros(3))
    with pytest.raises(ValueError, match="time_dim"):
        gae(x, x, ends, gamma=1.0, lam=1.0, time_dim=2)
    with pytest.raises(ValueError, match="two dimensions"):
        gae(x[0], x[0], ends[0], gamma=1.0, lam=1.0)
