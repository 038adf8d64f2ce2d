"""The Llama page computes what transformers computes: outputs, gradients, samples; and only where it may."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from minirlhf.language import forward, models
from minirlhf.language.forward import LlamaDecoder, TransformersDecoder, hidden_states, is_plain_llama, positions
from minirlhf.language.generation import draw, sample
from minirlhf.language.models import response_logprobs, sequence_scores, token_values
from minirlhf.training import generator_for

VOCABULARY = 50


def llama(kind=LlamaForCausalLM, dtype=torch.float64, *, bias: bool = False, **extra):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3}
    config = LlamaConfig(
        vocab_size=VOCABULARY, **{**sizes, **extra}, attention_bias=bias, mlp_bias=bias, pad_token_id=0, num_labels=1
    )
    model = kind(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, and far enough from a fresh model's flat output
            parameter.add_(0.3 * torch.randn_like(parameter))
    for layer in model.model.layers:
        layer.post_attention_layernorm.variance_epsilon = 1e-3  # not the other norm's
    return model


@st.composite
def batches(drawn):
    """Tokens and mask of rows with gaps anywhere; the last row is never empty."""
    rows, width = drawn(st.integers(1, 7)), drawn(st.integers(2, 20))
    torch.manual_seed(drawn(st.integers(0, 10_000)))
    mask = torch.rand(rows, width) < drawn(st.sampled_from([0.1, 0.5, 0.9, 1.1]))
    mask[-1, drawn(st.integers(0, width - 1))] = True
    return torch.randint(1, VOCABULARY, (rows, width)), mask


KINDS = {"plain": {}, "biases": {"bias": True}, "shared keys": {"num_attention_heads": 6, "num_key_value_heads": 2}}


@pytest.fixture(scope="module", params=KINDS.values(), ids=list(KINDS))
def body(request):
    """A body in float64 throughout: transformers' norms and sines would go through float32 on the way."""
    body = llama(**request.param).model
    inv_freq = body.rotary_emb.inv_freq.double()

    def rotary(x, position_ids):
        angles = torch.cat(2 * [position_ids[..., None] * inv_freq], dim=-1)
        return angles.cos(), angles.sin()

    body.rotary_emb.forward = rotary
    for norm in body.modules():
        if isinstance(norm, LlamaRMSNorm):
            norm.forward = lambda x, norm=norm: F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
    return body


def states(body, tokens, mask, wanted):
    packed = forward.llama.pack(tokens, mask)
    attend = forward.llama.causal(packed, len(tokens))
    return forward.llama.forward(body, packed.tokens, packed.positions, attend, wanted[mask])


@settings(max_examples=60, deadline=None)
@given(batch=batches(), seed=st.integers(0, 100))
def test_hidden_states_and_gradients_are_those_of_transformers(body, batch, seed: int) -> None:
    tokens, mask = batch
    torch.manual_seed(seed)
    theirs = body(
        input_ids=tokens, attention_mask=mask.long(), position_ids=positions(mask), use_cache=False
    ).last_hidden_state
    wanted = mask & (torch.rand(mask.shape) < 0.4)
    wanted[-1] = mask[-1]
    torch.testing.assert_close(states(body, tokens, mask, mask), theirs[mask], atol=1e-11, rtol=0)
    few = states(body, tokens, mask, wanted)
    torch.testing.assert_close(few, theirs[wanted], atol=1e-11, rtol=0)
    upstream = torch.randn_like(few)
    expected = torch.autograd.grad(theirs[wanted], list(body.parameters()), upstream)
    found = torch.autograd.grad(few, list(body.parameters()), upstream)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11 * float(b.abs().max()) + 1e-13, rtol=0)


def test_what_padding_holds_reaches_nobody(body) -> None:
    tokens, mask = torch.arange(1, 37).view(4, 9), torch.arange(9) < torch.tensor([[9], [6], [3], [1]])
    other = torch.where(mask, tokens, 7)
    assert torch.equal(states(body, tokens, mask, mask), states(body, other, mask, mask))
    alone = states(body, tokens[2:3, :3], mask[2:3, :3], mask[2:3, :3])
    torch.testing.assert_close(states(body, tokens, mask, mask)[15:18], alone, atol=1e-12, rtol=0)


def test_every_reading_takes_the_llama_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions of models.py give the same numbers by it and by transformers; and the first really is by it."""
    causal, scalar = llama(dtype=torch.float32), llama(LlamaForSequenceClassification, torch.float32)
    torch.manual_seed(1)
    tokens, mask = torch.randint(1, VOCABULARY, (6, 15)), torch.ones(6, 15, dtype=torch.bool)
    for row in range(6):
        mask[row, :row], mask[row, 15 - row :] = False, False
    response_mask = mask[:, 8:]

    def readings():
        wanted = mask & (torch.arange(15) % 3 == 0)
        return (
            *response_logprobs(causal, tokens, mask, response_mask, temperature=0.7, return_entropy=True),
            response_logprobs(causal, tokens, mask, response_mask, temperature=0.7),
            models.response_logits(causal, tokens, mask, response_mask),
            token_values(scalar, tokens, mask, wanted),
            sequence_scores(scalar, tokens, mask),
        )

    entered = []
    kind = type(causal.model)
    monkeypatch.setattr(kind, "forward", lambda *a, _f=kind.forward, **k: entered.append(1) or _f(*a, **k))
    page = readings()
    assert not entered, "transformers' forward was called"
    monkeypatch.setattr(forward, "is_plain_llama", lambda model: False)
    theirs = readings()
    assert len(entered) == 5
    for a, b in zip(page, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
    torch.testing.assert_close(page[0], page[2])


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_samples_are_those_of_transformers(kind: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(dtype=torch.float32, **kind)
    prompts = [[7, 19, 33, 4, 9], [5], [44, 2, 41], [9, 9], [12, 13, 14, 15, 16, 17, 18], [3, 47]] * 3

    def answers():
        # Token 8 ends an answer: often enough at this temperature that rows drop out on the way.
        generator = generator_for(0, "t")
        return sample(model, prompts, max_new_tokens=30, pad_id=0, eos_id=8, generator=generator, temperature=3.0)

    kinds = []
    for kind in (LlamaDecoder, TransformersDecoder):
        monkeypatch.setattr(kind, "keep", lambda self, rows, _f=kind.keep: kinds.append(type(self)) or _f(self, rows))
    ours = answers()
    assert set(kinds) == {LlamaDecoder}
    monkeypatch.setattr(forward, "is_plain_llama", lambda model: False)
    samples = answers()
    assert set(kinds) == {LlamaDecoder, TransformersDecoder}
    assert torch.equal(ours.tokens, samples.tokens) and torch.equal(ours.ended, samples.ended)
    torch.testing.assert_close(ours.logprobs, samples.logprobs, atol=2e-5, rtol=0)


def test_a_model_that_is_not_quite_a_llama_goes_through_transformers() -> None:
    plain = llama(dtype=torch.float32)
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    for model in (
        plain,
        llama(LlamaForSequenceClassification, torch.float32),
        copy.deepcopy(plain).to(torch.bfloat16),
        llama(dtype=torch.float32, num_attention_heads=4, num_key_value_heads=2),
        llama(dtype=torch.float32, hidden_act="gelu"),
        llama(dtype=torch.float32, rope_parameters=scaled),
    ):
        assert is_plain_llama(model)
    assert not is_plain_llama(copy.deepcopy(plain).train()), "it might drop out"
    assert not is_plain_llama(llama(dtype=torch.float32, is_causal=False))
    shallow, dropping, hooked = (copy.deepcopy(plain) for _ in range(3))
    shallow.config.num_hidden_layers = 2
    dropping.model.layers[1].self_attn.train()
    assert not is_plain_llama(shallow) and not is_plain_llama(dropping)
    for register in (
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ):
        for module in (hooked, hooked.model, hooked.model.layers[2], hooked.model.layers[2].self_attn):
            handle = getattr(module, register)(lambda *_: None)
            assert not is_plain_llama(hooked), register
            handle.remove()
    assert is_plain_llama(hooked)
    hooked.model.layers[0].self_attn.forward = lambda x: x
    assert not is_plain_llama(hooked)

    class Capped(LlamaForCausalLM):
        """Logits of its own."""

    assert not is_plain_llama(llama(Capped, torch.float32))


def test_an_adapter_or_a_hook_on_a_matrix_has_its_say() -> None:
    model = llama(dtype=torch.float32)

    class Adapter(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    adapter = Adapter(24, 40, bias=False)
    adapter.weight = model.model.layers[1].mlp.up_proj.weight
    model.model.layers[1].mlp.up_proj = adapter
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, x, out: out + 0.5)
    assert is_plain_llama(model)
    tokens, mask = torch.randint(1, VOCABULARY, (3, 7)), torch.ones(3, 7, dtype=torch.bool)
    theirs = model.model(input_ids=tokens, attention_mask=mask.long(), use_cache=False).last_hidden_state
    torch.testing.assert_close(hidden_states(model, tokens, mask, mask), theirs[mask], atol=2e-5, rtol=0)


def test_what_can_not_be_computed_is_refused() -> None:
    causal, scalar = llama(dtype=torch.float32), llama(LlamaForSequenceClassification, torch.float32)
    tokens, mask = torch.tensor([[5, 6, 7, 8], [0, 0, 7, 8]]), torch.tensor([[True] * 4, [False, False, True, True]])
    with pytest.raises(ValueError, match="no token before it"):
        models.response_logprobs(causal, tokens, mask, torch.ones(2, 2, dtype=torch.bool))
    empty = torch.tensor([[True] * 4, [False] * 4])
    with pytest.raises(ValueError, match="row 1 of 2 has no real token"):
        sequence_scores(scalar, tokens, empty)
    assert token_values(scalar, tokens, torch.zeros_like(mask)).tolist() == [[0.0] * 4] * 2


def test_a_broken_row_breaks_no_other() -> None:
    model = llama(dtype=torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = torch.nan
        tokens, mask = models.pad([[9, 9, 9], [5, 6], [7]], 0, side="left")
        decoder = LlamaDecoder(model, tokens, mask, 2)
        for logits in (decoder.prompt(), decoder.step(torch.tensor([3, 3, 3]))):
            assert logits.isnan().any(dim=1).tolist() == [True, False, False]


def test_draw_takes_each_token_as_often_as_it_should() -> None:
    """20,000 rows against the distribution, and never a token of probability 0, at the ends neither."""
    logits = torch.full((20_000, 9), -torch.inf)
    logits[:, 1:8] = torch.tensor([0.0, 1.0, -torch.inf, 2.0, -3.0, 0.5, -8.0])
    chances = torch.rand(20_000, dtype=torch.float64, generator=generator_for(0, "draw"))
    counts = torch.bincount(draw(logits, chances), minlength=9).double()
    expected = logits[0].softmax(-1).double() * 20_000
    assert counts[expected == 0].sum() == 0
    likely = expected > 5
    chi_square = float(((counts - expected)[likely] ** 2 / expected[likely]).sum())
    assert chi_square < 25, "five degrees of freedom: 25 is a chance of 1 in 7,000"


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53])
def test_draw_at_the_ends_of_the_unit_interval(number: float) -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf], [3.0, 3.0, 3.0], [0.0, -torch.inf, -torch.inf]])
    chances = torch.full((3,), number, dtype=torch.float64)
    assert draw(logits, chances).tolist() == [1, min(2, int(3 * number)), 0]


@pytest.mark.parametrize("row", [[torch.nan, 0.0], [torch.inf, 0.0], [-torch.inf, -torch.inf]])
def test_a_row_without_a_distribution_is_named(row: list[float]) -> None:
    with pytest.raises(ValueError, match=r"row 1 of 2: .*no token can be drawn"):
        draw(torch.tensor([[0.0, 0.0], row]), torch.zeros(2, dtype=torch.float64))


def test_an_answer_depends_on_its_own_row_alone() -> None:
    """Not on how the batch is cut, nor on which rows have ended: each row has a generator of its own."""
    model = llama(dtype=torch.float64)
    prompts = [[7, 19, 33], [5], [44, 2, 41, 8], [9, 9], [12, 13, 14], [3, 47]]

    def answers(rows: list[int]) -> list[list[int]]:
        generators = [generator_for(0, "answer", row) for row in rows]
        options = {"max_new_tokens": 25, "pad_id": 0, "eos_id": 8, "temperature": 3.0}
        return sample(model, [prompts[row] for row in rows], generator=generators, **options).responses()

    together = answers(list(range(6)))
    assert len({len(row) for row in together}) > 2, "rows end at different times"
    assert answers([0, 1]) + answers([2]) + answers([3, 4, 5]) == together
    assert answers([5, 3, 1]) == [together[5], together[3], together[1]]
