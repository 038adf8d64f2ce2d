"""ppo_loss: its equations, its metrics, what the mask hides, and how micro-batches add up."""

import collections
from math import exp, expm1

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from minirlhf_kernels import ppo_loss, reference
from torch.library import opcheck

F64, NAN = torch.float64, float("nan")
TENSORS = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns", "entropy", "ref_logprobs")
OPTIONS = {"clip_range": 0.2, "value_clip_range": 0.3, "value_coef": 0.7, "entropy_coef": 0.05, "kl_coef": 0.4}
DIFFERENTIABLE = ("logprobs", "values", "entropy")
pytestmark = pytest.mark.usefixtures("backend", "small_blocks")
triton_only = pytest.mark.parametrize("backend", ["triton"], indirect=True)


def batch(rows=4, columns=6, seed=0, dtype=F64):
    torch.manual_seed(seed)
    data = {name: torch.randn(rows, columns, dtype=F64) for name in TENSORS}
    data["logprobs"] = data["old_logprobs"] + 0.3 * data["logprobs"]
    return {k: v.to(dtype) for k, v in data.items()} | {"response_mask": torch.rand(rows, columns) < 0.7}


def run(data, call=ppo_loss, **options):
    """Loss, metrics and the gradients of what is differentiable."""
    data = {k: v.clone().requires_grad_(k in DIFFERENTIABLE) for k, v in data.items()}
    loss, metrics = call(**data, **(OPTIONS | options))
    return loss, metrics, torch.autograd.grad(loss, [data[k] for k in DIFFERENTIABLE if k in data])


def one_by_one(data, denominator):
    """Equation by equation over Python floats."""
    total, metrics = 0.0, collections.Counter()
    for position in data["response_mask"].nonzero().tolist():
        lp, old, adv, v, ov, ret, ent, ref = (float(data[name][tuple(position)]) for name in TENSORS)
        r = exp(lp - old)
        clipped = min(max(r, 0.8), 1.2)
        metrics["policy/loss"] += -min(r * adv, clipped * adv)
        metrics["policy/clip_fraction"] += clipped * adv < r * adv
        metrics["policy/approx_kl"] += (r - 1) - (lp - old)
        metrics["policy/ratio_mean"] += r
        near = ov + min(max(v - ov, -0.3), 0.3)
        metrics["value/loss"] += 0.5 * max((v - ret) ** 2, (near - ret) ** 2)
        metrics["value/clip_fraction"] += (near - ret) ** 2 > (v - ret) ** 2
        metrics["policy/entropy"] += ent
        metrics["policy/ref_kl"] += expm1(ref - lp) + lp - ref
        total += 0.4 * 0.5 * (lp - ref) ** 2
    total += metrics["policy/loss"] + 0.7 * metrics["value/loss"] - 0.05 * metrics["policy/entropy"]
    return total / denominator, {k: v / denominator for k, v in metrics.items()}


def test_every_term_and_metric_by_hand():
    data = batch()
    count = int(data["response_mask"].sum())
    loss, metrics, _ = run(data)
    expected, by_hand = one_by_one(data, count)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    by_hand["policy/ratio_max"] = (data["logprobs"] - data["old_logprobs"]).exp()[data["response_mask"]].max().item()
    assert set(metrics) == set(by_hand)
    for name, metric in metrics.items():
        assert metric.item() == pytest.approx(by_hand[name], rel=1e-12), name
        assert metric.dim() == 0 and not metric.requires_grad
    assert 0 < metrics["policy/clip_fraction"] < 1 and 0 < metrics["value/clip_fraction"] < 1


@pytest.mark.parametrize("high", [0.1, 0.28, 5.0])
def test_the_clip_s_upper_limit_may_differ_from_its_lower_one(high):
    """DAPO's clip-higher: a token that should become likelier may rise to 1 + clip_range_high; it falls to 1 - 0.2."""
    ratio = torch.tensor([[1.25, 1.25, 0.7, 0.7]], dtype=F64)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=F64)
    logprobs, mask = ratio.log().requires_grad_(), torch.ones(1, 4, dtype=torch.bool)
    loss, metrics = ppo_loss(logprobs, torch.zeros(1, 4, dtype=F64), advantages, mask, clip_range_high=high)
    (grad,) = torch.autograd.grad(loss, logprobs)
    stops = high < 0.25
    by_hand = min(1.25, 1 + high) - 1.25 + 0.7 - 0.8
    assert loss.item() == pytest.approx(-by_hand / 4, rel=1e-12)
    torch.testing.assert_close(grad, torch.tensor([[0.0 if stops else -1.25, 1.25, -0.7, 0.0]], dtype=F64) / 4)
    assert metrics["policy/clip_fraction"].item() == (2 if stops else 1) / 4


def test_every_sequence_counts_the_same_where_their_means_are_averaged():
    """Every term and metric is the mean over sequences of its mean over their counted tokens."""
    data = batch(rows=5, dtype=F64)
    data["response_mask"][3] = False
    alone = [
        ppo_loss(**{k: v[[i]] for k, v in data.items()}, **OPTIONS) for i in range(5) if data["response_mask"][i].any()
    ]
    loss, metrics, grads = run(data, loss_agg_mode="seq-mean-token-mean")
    torch.testing.assert_close(loss, torch.stack([x[0] for x in alone]).mean())
    for name, metric in metrics.items():
        each = torch.stack([x[1][name] for x in alone])
        torch.testing.assert_close(metric, each.max() if name == "policy/ratio_max" else each.mean(), msg=name)
    # And in micro-batches of one sequence, divided by the number of sequences.
    options = {"loss_agg_mode": "seq-mean-token-mean", "denominator": 4.0}
    parts = [run({k: v[[i]] for k, v in data.items()}, **options) for i in range(5)]
    torch.testing.assert_close(sum(x[0] for x in parts), loss)
    for i, grad in enumerate(grads):
        torch.testing.assert_close(torch.cat([x[2][i] for x in parts]), grad)
    assert not torch.allclose(run(data)[0], loss)


def test_what_the_two_kl_losses_are_the_gradient_of():
    """Exact, by summing over a small vocabulary: p is the policy, each of its words drawn in proportion to p."""
    torch.manual_seed(4)
    logits, ref = torch.randn(5, dtype=F64, requires_grad=True), torch.randn(5, dtype=F64).log_softmax(0)
    log_p = logits.log_softmax(0)
    p, mask = log_p.exp(), torch.ones(1, dtype=torch.bool)
    forward, reverse = (ref.exp() * (ref - log_p)).sum(), (p * (log_p - ref)).sum()
    for estimator, divergence in (("k2", reverse), ("k3", forward)):
        (exact,) = torch.autograd.grad(divergence, logits, retain_graph=True)
        expected = torch.zeros(5, dtype=F64)
        value = 0.0
        for word in range(5):
            new, old, fixed = (x[[word]].detach() for x in (log_p, log_p, ref))
            new.requires_grad_()
            none = torch.zeros(1, dtype=F64)
            loss, _ = ppo_loss(
                new, old, none, mask, ref_logprobs=fixed, kl_coef=1.0, kl_estimator=estimator, denominator=1.0
            )
            (up,) = torch.autograd.grad(loss, new)
            expected += p[word].detach() * up * torch.autograd.grad(log_p[word], logits, retain_graph=True)[0]
            value += p[word].item() * loss.item()
        torch.testing.assert_close(expected, exact)
        assert estimator == "k2" or value == pytest.approx(reverse.item())  # k3's value is the other divergence


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
    dirty = {k: torch.where(data["response_mask"], v, garbage) for k, v in data.items() if k != "response_mask"}
    same, same_metrics, same_grads = run(data | dirty)
    assert torch.equal(loss, same)
    assert all(torch.equal(metrics[k], same_metrics[k]) for k in metrics)
    assert all(torch.equal(a, b) for a, b in zip(grads, same_grads, strict=True))


@pytest.mark.parametrize("name", TENSORS)
def test_nan_in_a_token_that_counts_reaches_the_loss_and_the_metrics(name):
    data = batch()
    data["response_mask"][0, 0] = True
    data[name][0, 0] = NAN
    loss, metrics = ppo_loss(**data, **OPTIONS)
    assert loss.isnan()
    if name in ("logprobs", "old_logprobs"):
        assert metrics["policy/ratio_max"].isnan() and metrics["policy/ratio_mean"].isnan()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_add_up_to_the_same_gradient_and_metrics(size):
    data = batch(rows=6)
    data["response_mask"][0] = False  # a micro-batch in which nothing counts
    denominator = data["response_mask"].sum()
    loss, metrics, grads = run(data)
    parts = [run({k: v[s : s + size] for k, v in data.items()}, denominator=denominator) for s in range(0, 6, size)]
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
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_gradcheck(seed, mode, estimator):
    data = batch(2, 3, seed)
    options = OPTIONS | {"loss_agg_mode": mode, "kl_estimator": estimator, "clip_range_high": 0.3}
    inputs = tuple(data[k].clone().requires_grad_() for k in DIFFERENTIABLE)
    rest = {k: v for k, v in data.items() if k not in DIFFERENTIABLE}
    assert torch.autograd.gradcheck(
        lambda *a: ppo_loss(**dict(zip(DIFFERENTIABLE, a, strict=True)), **rest, **options)[0], inputs
    )


def test_a_far_policy_gives_finite_gradients_where_the_clip_acts():
    logprobs = torch.tensor([0.0, 0.0], requires_grad=True)
    old, mask = torch.tensor([-1000.0, -1000.0]), torch.tensor([True, True])
    loss, _ = ppo_loss(logprobs, old, torch.tensor([1.0, 0.0]), mask)
    loss.backward()
    assert loss.isfinite() and (logprobs.grad == 0).all()


def test_a_value_within_reach_is_not_counted_as_clipped():
    """In float32 old + (value - old) is often not quite the value."""
    data = batch(2, 500, dtype=torch.float32)
    data |= {"values": 0.1 * data["values"], "old_values": 0.1 * data["old_values"]}
    data = {k: data[k] for k in ("logprobs", "old_logprobs", "advantages", "response_mask", "values", "old_values")}
    data["returns"] = torch.randn(2, 500)
    move = data["values"] - data["old_values"]
    assert move.abs().max() < 1.0 and (data["old_values"] + move != data["values"]).any()
    _, metrics = ppo_loss(**data, value_clip_range=1.0)
    assert metrics["value/clip_fraction"] == 0
    assert metrics["value/loss"] == ppo_loss(**data)[1]["value/loss"]


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
        ({"clip_range_high": -0.1}, "clip_range_high must be above 0"),
        ({"kl_estimator": "k1"}, "kl_estimator must be 'k2' or 'k3', not 'k1'"),
        ({"loss_agg_mode": "mean"}, "loss_agg_mode must be 'token-mean' or"),
        ({"advantages": data["advantages"][:, :1]}, "advantages must have response_mask's shape"),
        ({"response_mask": data["response_mask"].double()}, "response_mask must be bool"),
    ):
        with pytest.raises(ValueError, match=message):
            ppo_loss(**(need | options))
    if not need["logprobs"].is_cuda:  # there a look at the mask would stop the host
        with pytest.raises(ValueError, match="no token counts"):
            ppo_loss(**(need | {"response_mask": torch.zeros(4, 6, dtype=torch.bool)}))


@settings.get_profile("kernels")
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 14),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
    absent=st.sets(st.sampled_from(["values", "old_values", "entropy", "ref_logprobs"])),
    denominator=st.sampled_from([None, float, torch.tensor]),
    view=st.booleans(),
    high=st.sampled_from([None, 0.05, 0.4]),
    estimator=st.sampled_from(["k2", "k3"]),
    mode=st.sampled_from(["token-mean", "seq-mean-token-mean"]),
    seed=st.integers(0, 10_000),
)
def test_equals_the_reference_in_float64(rows, columns, dtype, absent, denominator, view, high, estimator, mode, seed):
    absent = absent | {"old_values", "returns"} if "values" in absent else absent
    data = {k: v for k, v in batch(rows, columns, seed, dtype).items() if k not in absent}
    data["response_mask"][0, 0] = True
    data |= {k: torch.where(data["response_mask"], v, NAN) for k, v in data.items() if k != "response_mask"}
    if view:
        data = {name: x.t().contiguous().t() for name, x in data.items()}
    off = {"old_values": ("value_clip_range", None), "entropy": ("entropy_coef", 0), "ref_logprobs": ("kl_coef", 0)}
    options = {"denominator": denominator and denominator(7.5)} | dict(off[name] for name in absent & set(off))
    options |= {"clip_range_high": high, "kl_estimator": estimator, "loss_agg_mode": mode}
    wide = {k: v.double() if v.dtype == dtype else v for k, v in data.items()}
    loss, metrics, grads = run(data, **options)
    exact, exact_metrics, exact_grads = run(wide, reference.ppo_loss, **options)
    assert set(metrics) == set(exact_metrics) and loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    for name, metric in metrics.items():
        assert metric.dim() == 0 and not metric.requires_grad
        # A clip decided the other way in the last bit would show as a whole token: the data never sits on the edge.
        torch.testing.assert_close(metric.double(), exact_metrics[name], rtol=1e-5, atol=1e-6, msg=name)
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        assert grad.dtype == dtype
        rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (1e-2, 1e-4)
        torch.testing.assert_close(grad.double(), exact_grad, rtol=rtol, atol=atol)


@triton_only
def test_thirty_programs_add_up_once():
    """Whoever draws the last ticket adds up, in the same order every time."""
    data = batch(10, 48)
    losses = [ppo_loss(**data, **OPTIONS)[0] for _ in range(2)]
    assert losses[0] == losses[1]
    torch.testing.assert_close(losses[0], reference.ppo_loss(**data, **OPTIONS)[0])


@triton_only
@pytest.mark.parametrize("denominator", [(None, None), (7.0, None), (None, 7.0)])
def test_the_operators_are_registered_as_they_behave(denominator):
    from minirlhf_kernels.fused import ppo

    tensor = None if denominator[0] is None else torch.tensor(denominator[0])
    data = {k: v.requires_grad_(k in DIFFERENTIABLE) for k, v in batch().items()}
    names = ("logprobs", "old_logprobs", "advantages", "response_mask", "values", "old_values", "returns", "entropy")
    given = tuple(data[name] for name in (*names, "ref_logprobs"))
    rest = tensor, denominator[1]
    for k3_loss, sequence_mean in ((False, False), (True, True)):
        options = 0.8, 1.3, 0.3, 0.7, 0.05, 0.4, k3_loss, sequence_mean
        opcheck(ppo.forward_op, (*given, *rest, *options))
    opcheck(ppo.forward_op, (*given[:4], *[None] * 5, *rest, 0.8, 1.2, None, 0.5, 0.0, 0.0, False, False))
    with torch.no_grad():
        _, *saved = ppo.forward_op(*given, *rest, *options)
        saved.insert(1, given[3])
        opcheck(ppo.backward_op, (saved[0].sum(), *saved, 0.05, False, torch.float32, None, torch.float64))
        opcheck(ppo.backward_op, (saved[0].sum(), *saved, 0.05, True, None, torch.float64, torch.float64))
