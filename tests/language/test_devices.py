"""Models on another device than the CPU, without a GPU: every learner and measurement, and the same numbers.

`Elsewhere` pretends that torch's meta device can compute. A tensor there holds one on the CPU that nobody else sees;
each operation is computed with those, and refused, as CUDA would, where it mixes devices. (A pretended CUDA device
can't be differentiated in a torch without CUDA, and under FakeTensorMode no mask can choose tokens.)
"""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from minirlhf.data import Comparison, Demonstration
from minirlhf.language import forward, pretraining, reward_model, rollouts, sft
from minirlhf.language.evaluation import EvaluationConfig, answer
from minirlhf.language.models import clone, response_logprobs, scalar_model_from, sequence_scores, token_values
from minirlhf.language.reward_model import RewardModelConfig, RewardModelScorer, train_reward_model
from minirlhf.language.rlhf import RLHFConfig, train_rlhf
from minirlhf.language.sft import SFTConfig, train_sft
from minirlhf.training import Recorder

FAR = torch.device("meta")
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}
CHOOSES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}  # also by an index on the CPU


class FarTensor(torch.Tensor):
    """A tensor on the pretended device; what it holds is in `near`, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near: torch.Tensor):
        layout = {"strides": near.stride(), "storage_offset": near.storage_offset(), "dtype": near.dtype}
        far = torch.Tensor._make_wrapper_subclass(
            cls, near.shape, device=FAR, requires_grad=near.requires_grad, **layout
        )
        far.near = near
        return far

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), options=None):
        return compute(operation, args, options or {})

    def tolist(self):
        return self.near.tolist()

    def data_ptr(self) -> int:
        return self.near.data_ptr()


def compute(operation, args, options):
    """One operation of torch, on the pretended device where a tensor or the options say so."""
    meet = tree_leaves((args, options))
    if operation in CHOOSES:
        meet = [x for x in meet if isinstance(x, FarTensor)] + tree_leaves((args[0], args[2:]))
    far = any(isinstance(x, FarTensor) for x in meet)
    near = [x for x in meet if isinstance(x, torch.Tensor) and not isinstance(x, FarTensor) and x.dim() > 0]
    if far and near and operation not in MOVES:
        raise RuntimeError(f"{operation}: a tensor on the CPU, {tuple(near[0].shape)}, among tensors elsewhere")
    wanted = options.get("device")
    goes_far = far if wanted is None else torch.device(wanted) == FAR
    if wanted is not None:
        options = options | {"device": torch.device("cpu")}
    plain = tree_map(lambda x: x.near if isinstance(x, FarTensor) else x, (args, options))
    result = operation(*plain[0], **plain[1])
    if goes_far:
        result = tree_map(lambda x: FarTensor(x) if isinstance(x, torch.Tensor) else x, result)
    return return_and_correct_aliasing(operation, args, options, result) if far and goes_far else result


class Elsewhere(TorchDispatchMode):
    """Within it, what is made on the meta device or moved there is on the pretended one."""

    def __enter__(self):
        self.maker = Maker()
        self.maker.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.maker.__exit__(*error)

    def __torch_dispatch__(self, operation, types, args=(), options=None):
        return compute(operation, args, options or {})


class Maker(TorchFunctionMode):
    """torch.tensor(..., device=...) reads its numbers before any operation is dispatched."""

    def __torch_function__(self, function, types, args=(), options=None):
        options = options or {}
        if function is torch.tensor and options.get("device") is not None:
            return torch.tensor(*args, **options | {"device": "cpu"}).to(options["device"])
        return function(*args, **options)


@pytest.fixture(params=[False, True], ids=["logits", "bare head"])
def far(request, monkeypatch: pytest.MonkeyPatch):
    """The pretended device, with and without what a GPU does instead of making logits.

    Optimizers are not the fused ones, which torch has for real devices alone, here and on the CPU beside it.
    """
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda kind, **o: nullcontext() if kind == FAR.type else autocast(kind, **o))

    def adamw(model, lr, **options):
        options = {"betas": (0.9, 0.95)} | options
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, foreach=False, **options)

    for module in (pretraining, sft, reward_model, rollouts):
        monkeypatch.setattr(module, "adamw", adamw)
    monkeypatch.setattr(forward, "is_plain_llama", lambda model: False)  # transformers computes on either device
    with Elsewhere():
        monkeypatch.setattr(forward, "LOGITS_ARE_DEAR", {FAR.type} if request.param else set())
        yield FAR


def moved(model, dtype: torch.dtype | None = None):
    """A copy on the pretended device. Its tied weights are tied again: `to` keeps them for real devices alone."""
    there = copy.deepcopy(model).to(FAR, dtype)
    there.tie_weights()
    return there


def weights(model) -> list[torch.Tensor]:
    return [getattr(p, "near", p).detach() for p in model.parameters()]


def same(here, there, atol: float = 2e-5) -> None:
    """The weights of two models, one of which is elsewhere."""
    assert {p.device for p in there.parameters()} == {FAR} != {p.device for p in here.parameters()}
    for a, b in zip(weights(here), weights(there), strict=True):
        torch.testing.assert_close(b, a, atol=atol, rtol=0)


def test_the_pretended_device_computes_and_mixes_with_nothing(far) -> None:
    layer = torch.nn.Linear(3, 2).to(far)
    x = torch.ones(4, 3)
    assert layer.weight.device == far and isinstance(layer.weight, torch.nn.Parameter)
    layer(x.to(far)).sum().backward()
    assert layer.weight.grad.device == far and layer.weight.grad.tolist() == [[4.0] * 3] * 2
    assert x.to(far)[torch.tensor([True, False, True, False])].shape == (2, 3)
    assert (x.to(far) * torch.tensor(2.0)).cpu().tolist() == [[2.0] * 3] * 4
    for mixed in (
        lambda: layer(x),
        lambda: x.to(far) + x,
        lambda: x[torch.tensor([0, 1], device=far)],
        lambda: torch.where(x.to(far) > 0, x.to(far), x),
    ):
        with pytest.raises(RuntimeError, match="on the CPU"):
            mixed()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_keep_device_and_dtype(causal, far, dtype: torch.dtype) -> None:
    model = moved(causal, dtype)
    for made in (clone(model), scalar_model_from(model, seed=1)):
        tensors = [*made.parameters(), *(b for b in made.buffers() if b.is_floating_point())]
        assert {x.device for x in tensors} == {far}
        assert {p.dtype for p in made.parameters()} == {dtype}
        assert not made.training
    head = scalar_model_from(causal, seed=1).score.weight
    torch.testing.assert_close(scalar_model_from(model, seed=1).score.weight.near, head.to(dtype), atol=0, rtol=0)


def test_every_reading(causal, far) -> None:
    there, scalar = moved(causal), scalar_model_from(causal, seed=1)
    far_scalar = moved(scalar)
    tokens, mask = torch.arange(2, 14).view(2, 6), torch.tensor([[False, False, *[True] * 4], [True] * 6])
    inputs = (tokens.to(far), mask.to(far))
    for got, wanted in (
        (response_logprobs(there, *inputs, mask[:, 3:].to(far)), response_logprobs(causal, tokens, mask, mask[:, 3:])),
        (token_values(far_scalar, *inputs), token_values(scalar, tokens, mask)),
        (sequence_scores(far_scalar, *inputs), sequence_scores(scalar, tokens, mask)),
    ):
        assert got.device == far and wanted.abs().max() > 1e-3
        torch.testing.assert_close(got.near, wanted, atol=2e-5, rtol=0)


PROMPTS = ["Tell me about the otter.", "Hi", "Sing about the barn and the marsh!", "Why?"]


def test_ppo_with_everything_elsewhere(make_causal, tokenizer, far) -> None:
    """The whole of it: sampling, a reward model, experience, updates with PPO-ptx, the moving average."""
    here = make_causal("gpt2", scale=3.0)
    blocks = torch.randint(2, len(tokenizer), (6, 8), generator=torch.Generator().manual_seed(0))
    sizes = {"steps": 2, "batch_size": 6, "minibatch_size": 3, "max_response_tokens": 6, "warmup": 0}
    config = RLHFConfig(**sizes, lr=1e-4, value_lr=1e-4, ptx_coef=0.1, ptx_batch_size=2, ema_decay=0.5, adam_eps=1e-3)
    results = []
    for model in (here, moved(here)):
        reward, value = (scalar_model_from(model, seed=seed).eval() for seed in (2, 3))
        recorder = Recorder("rlhf", progress=False)
        average = train_rlhf(
            clone(model), value, model, RewardModelScorer(reward, tokenizer), tokenizer, PROMPTS, config,
            corpus_blocks=blocks, recorder=recorder,
        )  # fmt: skip
        results.append((average, value, recorder.history))
    (average, value, rows), (far_average, far_value, far_rows) = results
    same(average, far_average)
    same(value, far_value)
    assert far_rows[0]["policy/first_ratio_error"] < 1e-5
    for row, far_row in zip(rows, far_rows, strict=True):
        for key in (key for key in row if not key.startswith("perf/")):
            assert far_row[key] == pytest.approx(row[key], rel=1e-3, abs=1e-4), key


def test_the_other_learners_and_the_measurements(make_causal, tokenizer, far) -> None:
    here = make_causal("llama", scale=3.0)
    there = moved(here)
    demonstrations = [Demonstration(prompt, "The otter naps.") for prompt in PROMPTS]
    comparisons = [Comparison(prompt, ("Yes.", "No, never.", "Go away"), (2.0, 1.0, 0.0)) for prompt in PROMPTS]
    quiet = lambda: Recorder("test", progress=False)  # noqa: E731
    for model in (here, there):
        train_sft(model, tokenizer, demonstrations, SFTConfig(batch_size=2, lr=1e-4), recorder=quiet())
    same(here, there)
    config = RewardModelConfig(batch_size=2, lr=1e-4)
    scorers = [
        RewardModelScorer(
            train_reward_model(m, tokenizer, comparisons, config, demonstrations=demonstrations, recorder=quiet()),
            tokenizer,
        )
        for m in (here, there)
    ]
    same(scorers[0].model, scorers[1].model)
    scores = [scorer(PROMPTS, ["The newt sings"] * len(PROMPTS)) for scorer in scorers]
    assert scores[1].device.type == "cpu"
    torch.testing.assert_close(scores[1], scores[0], atol=1e-4, rtol=0)
    settings = EvaluationConfig(max_response_tokens=5)
    said = [
        answer(m, tokenizer, PROMPTS, settings, reference=r)
        for m, r in ((here, make_causal("llama")), (there, moved(make_causal("llama"))))
    ]
    assert said[1].responses == said[0].responses and said[1].kl == pytest.approx(said[0].kl, abs=1e-3)
    blocks = torch.randint(2, len(tokenizer), (6, 8), generator=torch.Generator().manual_seed(0))
    losses = [pretraining.corpus_loss(model, blocks) for model in (here, there)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    base = pretraining.PretrainingConfig(steps=2, batch_size=3, lr=1e-4)
    for model in (here, there):
        pretraining.train_base(model, blocks, base, recorder=quiet())
    same(here, there)
