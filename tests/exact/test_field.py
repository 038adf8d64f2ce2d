"""Held against the field: the same inputs give what other projects compute, to float64's last digits.

The numbers in field/*.json were made once by field/make.py, each with the version of the project that made them. Where
a project does something else on purpose or by rounding, the test says what.
"""

import json
from pathlib import Path

import pytest
import torch

from minirlhf.kl import kl_k1, kl_k2, kl_k3
from minirlhf.language.samplers import importance_weights
from minirlhf.losses import ppo_loss, ranking_loss, sft_loss, token_logprobs, value_loss
from minirlhf.returns import discounted_returns, gae, td_errors, whiten

FIELD = Path(__file__).parent / "field"
F64 = torch.float64


def read(name: str) -> dict:
    return json.loads((FIELD / f"{name}.json").read_text(encoding="utf-8"))


def close(got: torch.Tensor, expected, atol: float = 1e-14, rtol: float = 1e-14) -> None:
    expected = torch.tensor(expected, dtype=F64)
    assert got.dtype == F64 and expected.abs().max() > 1e-3
    torch.testing.assert_close(got.detach(), expected, atol=atol, rtol=rtol)


TEXT = {key: torch.tensor(value) for key, value in read("inputs")["text"].items() if key == "tokens"}
TEXT |= {key: torch.tensor(value, dtype=F64) for key, value in read("inputs")["text"].items() if key != "tokens"}
CONTROL = {key: torch.tensor(value, dtype=F64) for key, value in read("inputs")["control"].items()}
MASK = TEXT["mask"].bool()


def surrogate(new: torch.Tensor, weights: torch.Tensor | float = 1.0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return ppo_loss(new, TEXT["old_logprobs"], TEXT["advantages"] * weights, MASK, clip_range=0.2)


def learnt(name: str) -> torch.Tensor:
    return TEXT[name].clone().requires_grad_()


def control_gae() -> tuple[torch.Tensor, torch.Tensor]:
    ends = CONTROL["dones"].bool()
    rewards, values, last = CONTROL["rewards"], CONTROL["values"], CONTROL["last_values"]
    return gae(rewards, values, ends, gamma=0.97, lam=0.9, last_values=last)


def test_stable_baselines3() -> None:
    theirs, (advantages, returns) = read("sb3")["gae"], control_gae()
    close(advantages, theirs["advantages"])
    close(returns, theirs["returns"])


def test_torchrl() -> None:
    theirs, (advantages, returns) = read("torchrl"), control_gae()
    rewards, values, ends = CONTROL["rewards"], CONTROL["values"], CONTROL["dones"].bool()
    close(returns, theirs["td_lambda"])
    close(discounted_returns(rewards, ends, 0.97), theirs["reward_to_go"])
    close(td_errors(rewards, values, ends, 0.97, last_values=CONTROL["last_values"]) + values, theirs["td0"])
    close(advantages, theirs["gae"], atol=1e-6)  # theirs rounds gamma to float32


def test_gae_of_a_text_is_verl_s() -> None:
    theirs = read("verl")["gae"]
    last = torch.zeros_like(MASK).scatter(1, MASK.sum(1, keepdim=True) - 1, True)
    advantages, returns = gae(TEXT["rewards"], TEXT["values"], last, gamma=0.97, lam=0.9, mask=MASK)
    close(returns[MASK], torch.tensor(theirs["returns"], dtype=F64)[MASK].tolist())
    close(
        whiten(advantages, MASK)[MASK] * BESSEL, torch.tensor(theirs["whitened"], dtype=F64)[MASK].tolist(), 1e-7, 1e-7
    )


BESSEL = ((int(MASK.sum()) - 1) / int(MASK.sum())) ** 0.5  # theirs divide by n - 1


@pytest.mark.parametrize("peer", ["verl", "trl"])
def test_whitening_is_theirs_but_for_bessel_s_correction(peer: str) -> None:
    theirs = {key: torch.tensor(value, dtype=F64)[MASK] for key, value in read(peer)["whiten"].items()}
    x, mean = TEXT["advantages"], TEXT["advantages"][MASK].mean()
    close(whiten(x, MASK)[MASK] * BESSEL, theirs["True"].tolist(), 1e-7, 1e-7)  # both add 1e-8 to another variance
    close((whiten(x, MASK, shift_mean=False)[MASK] - mean) * BESSEL + mean, theirs["False"].tolist(), 1e-7, 1e-7)


@pytest.mark.parametrize(("name", "ours"), [("k1", kl_k1), ("k2", kl_k2), ("k3", kl_k3)])
@pytest.mark.parametrize("peer", ["verl", "openrlhf"])
def test_kl_estimators(peer: str, name: str, ours) -> None:
    tolerance = 1e-6 if peer == "openrlhf" else 1e-14  # OpenRLHF computes in float32
    close(ours(TEXT["logprobs"], TEXT["ref_logprobs"]), read(peer)["kl"][name], tolerance, tolerance)


@pytest.mark.parametrize("kind", ["policy", "weighted"])
@pytest.mark.parametrize("peer", ["verl", "openrlhf"])
def test_the_clipped_loss_and_its_importance_weights(peer: str, kind: str) -> None:
    """'weighted': truncated importance sampling of a sampler's tokens, with a cap of 1.2."""
    theirs, new = read(peer)[kind], learnt("logprobs")
    apart = TEXT["old_logprobs"] - TEXT["rollout_logprobs"]
    loss, metrics = surrogate(new, importance_weights(apart.exp(), 1.2) if kind == "weighted" else 1.0)
    close(loss, theirs["loss"])
    close(torch.autograd.grad(loss, new)[0], theirs["gradient"])
    if kind == "policy":
        assert float(metrics["policy/clip_fraction"]) == pytest.approx(theirs["clip_fraction"], abs=1e-7)
    if peer == "openrlhf":
        estimate = (TEXT["old_logprobs"] - TEXT["logprobs"] if kind == "policy" else -apart)[MASK].mean()
        assert float(estimate) == pytest.approx(theirs["kl"], abs=1e-14)


@pytest.mark.parametrize("peer", ["verl", "openrlhf"])
def test_value_loss(peer: str) -> None:
    theirs, values = read(peer)["value"], learnt("values")
    loss = value_loss(values, TEXT["returns"], MASK, old_values=TEXT["old_values"], clip_range=0.2)
    close(loss, theirs["loss"])
    close(torch.autograd.grad(loss, values)[0], theirs["gradient"])


def test_openrlhf_s_pairs_and_demonstrations() -> None:
    theirs, chosen, new = read("openrlhf"), learnt("chosen"), learnt("logprobs")
    pairs = ranking_loss(torch.stack([chosen, TEXT["rejected"]], 1), torch.tensor([[1.0, 0.0]] * 4))
    for loss, variable, name in ((pairs, chosen, "pairs"), (sft_loss(new, MASK), new, "sft")):
        close(loss, theirs[name]["loss"])
        close(torch.autograd.grad(loss, variable)[0], theirs[name]["gradient"])


def test_cleanrl_s_loss() -> None:
    theirs, new, values = read("cleanrl"), learnt("logprobs"), learnt("values")
    everything = torch.ones_like(MASK)
    loss, metrics = ppo_loss(
        new,
        TEXT["old_logprobs"],
        TEXT["advantages"],
        everything,
        values=values,
        old_values=TEXT["old_values"],
        returns=TEXT["returns"],
        entropy=-TEXT["old_logprobs"],
        value_clip_range=0.2,
        value_coef=0.5,
        entropy_coef=0.01,
    )
    close(loss, theirs["loss"]["loss"])
    for gradient, expected in zip(torch.autograd.grad(loss, (new, values)), theirs["loss"]["gradient"], strict=True):
        close(gradient.flatten(), expected)
    assert float(metrics["policy/approx_kl"]) == pytest.approx(theirs["approx_kl"], abs=1e-14)
    # Theirs counts every ratio outside the range; ours only those where the clipped term is the smaller one.
    outside = ((TEXT["logprobs"] - TEXT["old_logprobs"]).exp() - 1).abs() > 0.2
    assert float(outside.double().mean()) == pytest.approx(theirs["clip_fraction"], abs=1e-7)
    assert float(metrics["policy/clip_fraction"]) < theirs["clip_fraction"]


def test_trl_s_logprobs() -> None:
    close(token_logprobs(TEXT["logits"], TEXT["tokens"]), read("trl")["logprobs"])
