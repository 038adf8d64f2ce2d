"""gae against a plain loop, a hand-worked episode, and everything that must not leak."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from minirlhf_kernels import gae
from torch.library import opcheck

F64, NAN = torch.float64, float("nan")
pytestmark = pytest.mark.usefixtures("backend")
triton_only = pytest.mark.parametrize("backend", ["triton"], indirect=True)


def loop(rewards, values, ends, gamma, lam, last=None, truncated=None, mask=None):
    """The definition, one row and one step at a time, in Python floats."""
    r, v, ends, last, truncated, mask = (
        None if x is None else x.tolist() for x in (rewards, values, ends, last, truncated, mask)
    )
    rows, columns = rewards.shape
    advantages, returns = ([[0.0] * columns for _ in range(rows)] for _ in range(2))
    for n in range(rows):
        running = 0.0
        for t in reversed(range(columns)):
            if mask and not mask[n][t]:
                running = 0.0
                continue
            if ends[n][t]:
                running, after = 0.0, truncated[n][t] if truncated else 0.0
            elif t == columns - 1:
                after = last[n] if last else 0.0
            else:
                after = v[n][t + 1] if not mask or mask[n][t + 1] else 0.0
            running = r[n][t] + gamma * after - v[n][t] + gamma * lam * running
            advantages[n][t], returns[n][t] = running, running + v[n][t]
    return torch.tensor(advantages, dtype=F64), torch.tensor(returns, dtype=F64)


def turned(x):
    """The same [N, T], kept as [T, N]."""
    return x.t().contiguous().t() if torch.is_tensor(x) and x.dim() == 2 else x


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


@settings.get_profile("kernels")
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 12),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
    last=st.booleans(),
    truncated=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_equals_the_loop_in_both_layouts(rows, columns, dtype, gamma, lam, last, truncated, masked, seed):
    torch.manual_seed(seed)
    rewards, values, after = (torch.randn(rows, columns).to(dtype) for _ in range(3))
    ends = torch.rand(rows, columns) < 0.3
    mask = torch.rand(rows, columns) < 0.7 if masked else None  # holes too
    after[~ends] = NAN
    if mask is not None:
        rewards[~mask], values[~mask], after[~mask] = NAN, NAN, NAN
    options = {"last_values": torch.randn(rows).to(dtype) if last else None, "mask": mask}
    options["truncated_values"] = after if truncated else None
    expected = loop(rewards, values, ends, gamma, lam, *(options[k] for k in ("last_values", "truncated_values")), mask)
    got = gae(rewards, values, ends, gamma=gamma, lam=lam, **options)
    views = {name: turned(x) for name, x in options.items()}
    flipped = gae(*map(turned, (rewards, values, ends)), gamma=gamma, lam=lam, **views)
    mixed = gae(turned(rewards), values, turned(ends), gamma=gamma, lam=lam, **options)
    exact = {"rtol": 1e-12, "atol": 1e-12} if dtype == F64 else {"rtol": 1e-5, "atol": 1e-5}
    for x, y, z, u in zip(expected, got, flipped, mixed, strict=True):
        assert y.dtype == (F64 if dtype == F64 else torch.float32)
        torch.testing.assert_close(y.double(), x, **exact)
        assert torch.equal(z, y) and torch.equal(u, y)  # bit for bit


@pytest.mark.parametrize(("rows", "columns"), [(70, 9), (3, 140), (4, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_long_buffer(backend, rows, columns, dtype):
    """What is kept as [T, N] gives the same bits."""
    if backend == "triton" and not torch.cuda.is_available():
        rows, columns = min(rows, 6), columns // 9  # the interpreter walks a scan step by step
    torch.manual_seed(1)
    x = [torch.randn(rows, columns, dtype=dtype) for _ in range(2)] + [torch.rand(rows, columns) < 0.02]
    last = torch.randn(rows, dtype=dtype)
    got = gae(*x, gamma=0.999, lam=0.99, last_values=last)
    flipped = gae(*map(turned, x), gamma=0.999, lam=0.99, last_values=last)
    for y, z, exact in zip(got, flipped, loop(*x, 0.999, 0.99, last), strict=True):
        assert torch.equal(y, z) and y.dtype == dtype
        rtol, atol = (1e-11, 1e-11) if dtype == F64 else (1e-5, 1e-4)
        torch.testing.assert_close(y.double(), exact, rtol=rtol, atol=atol)


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


def test_no_rows_and_no_steps():
    for shape in ((0, 3), (3, 0)):
        x = torch.zeros(shape)
        for y in gae(x, x, x > 0, gamma=0.9, lam=0.9, last_values=torch.zeros(shape[0])):
            assert y.shape == shape


def test_what_is_refused():
    x, ends = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(TypeError, match="ends must be bool"):
        gae(x, x, torch.zeros(2, 3), gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match="values must have rewards' shape"):
        gae(x, torch.zeros(2, 4), ends, gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match="last_values"):
        gae(x, x, ends, gamma=1.0, lam=1.0, last_values=torch.zeros(3))
    with pytest.raises(ValueError, match="two dimensions"):
        gae(x[0], x[0], ends[0], gamma=1.0, lam=1.0)


@triton_only
@pytest.mark.parametrize("lay", [torch.clone, turned])
def test_the_operator_is_registered_as_it_behaves(lay):
    from minirlhf_kernels.fused.gae import gae_op

    r, v, after = (lay(torch.randn(3, 5)) for _ in range(3))
    ends, last = lay(torch.rand(3, 5) < 0.3), torch.randn(3)
    opcheck(gae_op, (r, v, ends, last, after, ~ends, 0.9, 0.8))
    opcheck(gae_op, (r, v, ends, None, None, None, 0.9, 0.8))
