"""What the tests of the language learners share."""

import pytest
import torch


class Gradients(list):
    """The gradients of one optimizer step after another."""

    def assert_same(self, one: int, two: int, tolerance: float) -> None:
        for a, b in zip(self[one], self[two], strict=True):
            assert float((a - b).abs().max()) < tolerance * max(1.0, float(a.abs().max()))


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> Gradients:
    """Kept where they would be clipped; Adam's first step is lr * sign(gradient), which blows rounding up."""
    kept = Gradients()

    def keep(parameters, norm: float) -> torch.Tensor:
        kept.append([p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in parameters])
        return torch.zeros(())

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", keep)
    return kept
