"""ppo_loss: its equations, its metrics, what the mask hides, and how micro-batches add up."""

import pytest
import torch
from minirlhf_kernels import ppo_loss

F64, NAN = torch.float64, float("nan")
TENSORS = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns", "entropy", "ref_logprobs")
OPTIONS = {"clip_range": 0.2, "value_clip_range": 0.3, "value_coef": 0.7, "entropy_coef": 0.05, "kl_coef": 0.4}
DIFFERENTIABLE = ("logprobs", "values", "entropy")


def batch(rows=4, columns=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    data = {name: torch.randn(rows, columns, dtype=F64, generator=g) for name in TENSORS}
    data["logprobs"] = data["old_logprobs"] + 0.3 * data["logprobs"]
    data["response_mask"] = torch.rand(rows, columns, generator=g) < 0.7
    return data


def run(data, **options):
    data = {k: v.clone().requires_grad_(k in DIFFERENTIABLE) for k, v in data.items()}
    loss, metrics = ppo_loss(**data, **(OPTIONS | options))
    grads = torch.autograd.grad(loss, [data[k] for k in DIFFERENTIABLE])
    return loss, metrics, grads


def one_by_one(data, denominator):
    """Equation by equation over Python floats."""
    from math import exp, expm1

    total, metrics = 0.0, dict.fromkeys(("policy", "clip", "kl", "ratio", "value", "vclip", "entropy", "ref"), 0.0)
    for position in data["response_mask"].nonzero().tolist():
        lp, old, adv, v, ov, ret, ent, ref = (float(data[name][tuple(position)]) for name in TENSORS)
        r = exp(lp - old)
        clipped = min(max(r, 0.8), 1.2)
        metrics["policy"] += -min(r * adv, clipped * adv)
        metrics["clip"] += clipped * adv < r * adv
        metrics["kl"] += (r - 1) - (lp - old)
        metrics["ratio"] += r
        near = ov + min(max(v - ov, -0.3), 0.3)
        metrics["value"] += 0.5 * max((v - ret) ** 2, (near - ret) ** 2)
        metrics["vclip"] += (near - ret) ** 2 > (v - ret) ** 2
        metrics["entropy"] += ent
        metrics["ref"] += expm1(ref - lp) + lp - ref
        total += 0.4 * 0.5 * (lp - ref) ** 2
    total += metrics["policy"] + 0.7 * metrics["value"] - 0.05 * metrics["entropy"]
    return total / denominator, {k: v / denominator for k, v in metrics.items()}


def test_every_term_and_metric_by_hand():
    data = batch()
    count = int(data["response_mask"].sum())
    loss, metrics, _ = run(data)
    expected, by_hand = one_by_one(data, count)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    names = {
        "policy/loss": "policy", "policy/clip_fraction": "clip", "policy/approx_kl": "kl", "policy/ratio_mean": "ratio",
        "value/loss": "value", "value/clip_fraction": "vclip", "policy/entropy": "entropy", "policy/ref_kl": "ref",
    }  # fmt: skip
    for name, key in names.items():
        assert metrics[name].item() == pytest.approx(by_hand[key], rel=1e-12), name
        assert metrics[name].dim() == 0 and not metrics[name].requires_grad
    ratio = (data["logprobs"] - data["old_logprobs"]).exp()[data["response_mask"]]
    assert metrics["policy/ratio_max"].item() == pytest.approx(ratio.max().item())
    assert set(metrics) == {*names, "policy/ratio_max"}
    assert 0 < metrics["policy/clip_fraction"] < 1 and 0 < metrics["value/clip_fraction"] < 1


def test_the_gradient_of_the_policy_term():
    """A r grad log pi where the clip is quiet, 0 where it acts; never through old_logprobs, advantages or returns."""
    data = batch()
    mask, count = data["response_mask"], data["response_mask"].sum()
    _, _, (grad, _, _) = run(data, kl_coef=0.0)
    ratio, adv = (data["logprobs"] - data["old_logprobs"]).exp(), data["advantages"]
    quiet = torch.where(adv > 0, ratio <= 1.2, ratio >= 0.8)
    torch.testing.assert_close(grad, torch.where(mask & quiet, -adv * ratio / count, 0.0))
    data = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in data.items()}
    ppo_loss(**data, **OPTIONS)[0].backward()
    assert all((v.grad is not None) == (k in DIFFERENTIABLE) for k, v in data.items())


def test_the_first_minibatch_of_the_first_epoch():
    data = batch()
    data["logprobs"] = data["old_logprobs"].clone()
    _, metrics, _ = run(data)
    assert metrics["policy/ratio_mean"] == metrics["policy/ratio_max"] == 1
    assert metrics["policy/approx_kl"] == metrics["policy/clip_fraction"] == 0


@pytest.mark.parametrize("garbage", [NAN, float("inf"), -float("inf"), 1e30])
def test_garbage_under_the_mask_changes_nothing(garbage):
    data = batch()
    loss, metrics, grads = run(data)
    for name in TENSORS:
        data[name] = torch.where(data["response_mask"], data[name], garbage)
    same, same_metrics, same_grads = run(data)
    assert torch.equal(loss, same)
    assert all(torch.equal(metrics[k], same_metrics[k]) for k in metrics)
    assert all(torch.equal(a, b) for a, b in zip(grads, same_grads, strict=True))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_add_up_to_the_same_gradient_and_metrics(size):
    data = batch(rows=6)
    data["response_mask"][0] = False  # a micro-batch in which nothing counts
    denominator = data["response_mask"].sum()
    loss, metrics, grads = run(data)
    parts = [
        run({k: v[start : start + size] for k, v in data.items()}, denominator=denominator)
        for start in range(0, 6, size)
    ]
    torch.testing.assert_close(sum(p[0] for p in parts), loss)
    for name in metrics:
        together = [p[1][name] for p in parts]
        torch.testing.assert_close(max(together) if name == "policy/ratio_max" else sum(together), metrics[name])
    for i, grad in enumerate(grads):
        torch.testing.assert_close(torch.cat([p[2][i] for p in parts]), grad)
    # Dividing each by its own count, as many trainers do, is another gradient.
    own = [run({k: v[s : s + 3] for k, v in data.items()})[2][0] / 2 for s in (0, 3)]
    assert not torch.allclose(torch.cat(own), grads[0])


@pytest.mark.parametrize("seed", range(3))
def test_gradcheck(seed):
    data = batch(2, 3, seed)
    inputs = tuple(data[k].clone().requires_grad_() for k in DIFFERENTIABLE)
    rest = {k: v for k, v in data.items() if k not in DIFFERENTIABLE}
    assert torch.autograd.gradcheck(
        lambda *a: ppo_loss(**dict(zip(DIFFERENTIABLE, a, strict=True)), **rest, **OPTIONS)[0], inputs
    )


def test_a_far_policy_gives_finite_gradients_where_the_clip_acts():
    logprobs = torch.tensor([0.0, 0.0], requires_grad=True)
    old, mask = torch.tensor([-1000.0, -1000.0]), torch.tensor([True, True])
    loss, _ = ppo_loss(logprobs, old, torch.tensor([1.0, 0.0]), mask)
    loss.backward()
    assert loss.isfinite() and (logprobs.grad == 0).all()


def values_within_reach():
    """Values near their old ones in float32, where old + (value - old) is often not quite the value."""
    torch.manual_seed(0)
    data = {name: torch.randn(2, 500) for name in ("logprobs", "advantages", "old_values", "returns")}
    data |= {"values": 0.1 * torch.randn(2, 500), "old_logprobs": data["logprobs"]}
    data["old_values"] *= 0.1
    move = data["values"] - data["old_values"]
    assert move.abs().max() < 1.0 and (data["old_values"] + move != data["values"]).any()
    return data | {"response_mask": torch.ones(2, 500, dtype=torch.bool)}


def test_a_value_within_reach_is_not_counted_as_clipped():
    data = values_within_reach()
    _, metrics = ppo_loss(**data, value_clip_range=1.0)
    assert metrics["value/clip_fraction"] == 0
    assert metrics["value/loss"] == ppo_loss(**data)[1]["value/loss"]


def test_half_precision_is_read_as_float32():
    data = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch().items()}
    loss, metrics = ppo_loss(**data, **OPTIONS)
    assert loss.dtype == torch.float32 and metrics["policy/approx_kl"].dtype == torch.float32


def test_what_is_refused():
    data = batch()
    need = {k: data[k] for k in ("logprobs", "old_logprobs", "advantages", "response_mask")}
    for options, message in (
        ({"entropy_coef": 0.1}, "entropy_coef needs entropy"),
        ({"kl_coef": 0.1}, "kl_coef needs ref_logprobs"),
        ({"values": data["values"]}, "values and returns go together"),
        ({"value_clip_range": 0.2}, "value_clip_range needs old_values"),
        ({"old_values": data["old_values"]}, "old_values needs values"),
        ({"clip_range": 0.0}, "clip_range must be above 0"),
        ({"advantages": data["advantages"][:, :1]}, "advantages must have response_mask's shape"),
        ({"response_mask": data["response_mask"].double()}, "response_mask must be bool"),
        ({"response_mask": torch.zeros(4, 6, dtype=torch.bool)}, "no token counts"),
    ):
        with pytest.raises(ValueError, match=message):
            ppo_loss(**(need | options))
