"""The parts of the packed Llama's layer: what they compute, and every backward against finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from minirlhf.language import layers
from minirlhf.language.layers import attend, attention_groups, pick, rotate, swiglu, unit

HEADS, SIZE = 3, 4
LENGTHS = {"one length": [5, 5, 5], "gaps": [7, 6, 4], "two groups": [9, 5, 4, 2], "alone": [1]}


def normal(*shape: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def turns(length: int) -> torch.Tensor:
    angles = torch.arange(length, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.1], dtype=torch.float64)
    return torch.polar(torch.ones_like(angles), angles)


def one_by_one(qkv: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Attention of each row by the textbook, softmax(q k^T) v without the keys behind a query."""
    mixed = []
    for row in qkv.split(lengths):
        q, k, v = row.view(len(row), 3, HEADS, SIZE).permute(1, 2, 0, 3)  # [H, T, d]
        scores = rotate(q, turns(len(row))) @ rotate(k, turns(len(row))).mT
        later = torch.ones(len(row), len(row), dtype=torch.bool).triu(1)
        mixed.append((scores.masked_fill(later, -torch.inf).softmax(-1) @ v).transpose(0, 1).flatten(1))
    return torch.cat(mixed)


def test_unit_times_a_weight_is_rms_norm() -> None:
    x, weight = normal(6, 8), normal(8)
    expected = F.rms_norm(x, (8,), weight, eps=1e-3)
    torch.testing.assert_close(unit(x, (8 * 1e-3) ** 0.5) * weight * 8**0.5, expected)
    assert gradcheck(lambda x: unit(x, 0.3), x)
    assert unit(torch.zeros(2, 8), 1e-3).abs().max() == 0


def test_swiglu() -> None:
    both = normal(5, 6)
    torch.testing.assert_close(swiglu(both), F.silu(both[:, :3]) * both[:, 3:])
    assert gradcheck(swiglu, both)


def test_pick() -> None:
    x, index = normal(6, 2), torch.tensor([4, 0, 5])
    assert torch.equal(pick(x, index), x[index])
    assert gradcheck(lambda x: pick(x, index), x)


def test_rotation_keeps_lengths_and_depends_on_the_distance_alone() -> None:
    q, k = normal(2, 1, SIZE)
    q, k = rotate(q.expand(9, SIZE), turns(9)), rotate(k.expand(9, SIZE), turns(9))
    torch.testing.assert_close(q.norm(dim=1), q.norm(dim=1)[:1].expand(9))
    products = q @ k.T
    torch.testing.assert_close(products[2:, 2:], products[:-2, :-2])


@pytest.mark.parametrize("widest", [256, 4, 0], ids=["held", "both", "flash"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=list(LENGTHS))
def test_attention(lengths: list[int], widest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held weights, flash attention and the textbook agree, and so do their gradients."""
    monkeypatch.setattr(layers, "WIDEST_HELD", widest)
    qkv, groups = normal(sum(lengths), 3 * HEADS * SIZE), attention_groups(lengths, HEADS)

    def ours(qkv):
        return attend(qkv, groups, turns(max(lengths)))

    before = qkv.detach().clone()
    torch.testing.assert_close(ours(qkv), one_by_one(qkv, lengths), atol=1e-12, rtol=0)
    assert torch.equal(qkv, before), "the caller's tensor is not rotated in place"
    upstream = normal(sum(lengths), HEADS * SIZE).detach()
    found, expected = (torch.autograd.grad(f, qkv, upstream)[0] for f in (ours(qkv), one_by_one(qkv, lengths)))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    if widest:
        assert gradcheck(ours, qkv, fast_mode=True)


def test_attention_holds_at_scores_beyond_the_range_of_exp() -> None:
    qkv = (300 * normal(6, 3 * HEADS * SIZE)).float().detach().requires_grad_()
    mixed = attend(qkv, attention_groups([4, 2], HEADS), turns(4).to(torch.complex64))
    torch.testing.assert_close(mixed.double(), one_by_one(qkv.double(), [4, 2]), atol=1e-2, rtol=1e-4)
    mixed.sum().backward()
    assert qkv.grad.isfinite().all()
