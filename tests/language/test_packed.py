"""The packed Llama computes what transformers computes: outputs, gradients, samples; and only where it may."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from minirlhf.language import decoding, models
from minirlhf.language.decoding import CachedDecoder, PackedDecoder
from minirlhf.language.generation import draw, sample
from minirlhf.language.layers import attention_groups
from minirlhf.language.models import response_logits, response_logprobs_and_entropy, sequence_scores, token_values
from minirlhf.language.packed import can_pack, hidden_states, pack
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


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "biases"])
def body(request):
    """A body in float64 throughout: transformers' norms and sines would go through float32 on the way."""
    body = llama(bias=request.param).model
    inv_freq = body.rotary_emb.inv_freq.double()

    def rotary(x, position_ids):
        angles = torch.cat(2 * [position_ids[..., None] * inv_freq], dim=-1)
        return angles.cos(), angles.sin()

    body.rotary_emb.forward = rotary
    for norm in body.modules():
        if isinstance(norm, LlamaRMSNorm):
            norm.forward = lambda x, norm=norm: F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
    return body


@settings(max_examples=60, deadline=None)
@given(batch=batches(), seed=st.integers(0, 100))
def test_hidden_states_and_gradients_are_those_of_transformers(body, batch, seed: int) -> None:
    tokens, mask = batch
    torch.manual_seed(seed)
    theirs = body(
        input_ids=tokens, attention_mask=mask.long(), position_ids=models.positions(mask), use_cache=False
    ).last_hidden_state[mask]
    rows = pack(tokens, mask)
    assert sum(rows.lengths) == len(rows.tokens) == int(mask.sum())
    assert torch.equal(rows.tokens[rows.slots[mask]], tokens[mask])
    ours = hidden_states(body, rows)[rows.slots[mask]]
    torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)

    wanted = torch.rand(len(theirs)) < 0.4
    wanted[-1] = True
    upstream = torch.randn(int(wanted.sum()), theirs.shape[1], dtype=theirs.dtype)
    few = hidden_states(body, rows, rows.slots[mask][wanted])
    torch.testing.assert_close(few, ours[wanted])
    expected = torch.autograd.grad(theirs[wanted], list(body.parameters()), upstream)
    found = torch.autograd.grad(few, list(body.parameters()), upstream)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11 * float(b.abs().max()) + 1e-13, rtol=0)


def test_gradients_through_the_whole_body_are_exact(body) -> None:
    """float64 gradcheck, rows of several lengths in three groups, some tokens wanted."""
    tokens, mask = torch.arange(1, 37).view(4, 9), torch.arange(9) < torch.tensor([[9], [6], [3], [1]])
    rows = pack(tokens, mask)
    assert len(attention_groups(rows.lengths, 3)) == 3
    parameters = [body.embed_tokens.weight, body.layers[0].self_attn.q_proj.weight, body.layers[1].mlp.up_proj.weight]

    def states(*_):
        return hidden_states(body, rows, rows.slots[mask][::2])

    assert torch.autograd.gradcheck(states, parameters, fast_mode=True)


def test_what_a_gap_holds_reaches_nobody(body) -> None:
    """A row that is padded with a copy of its last token is the same row alone."""
    long, short = torch.arange(1, 18)[None], torch.tensor([[7, 9, 3, 4, 4, 8, 1, 2, 6] + [0] * 8])
    both = pack(torch.cat([long, short]), torch.cat([long > 0, short > 0]))
    groups = attention_groups(both.lengths, 3)
    assert len(groups) == 1 and len(groups[0].gaps) == 8, "one group, so that the shorter row has a gap"
    alone = pack(short[:, :9], short[:, :9] > 0)
    torch.testing.assert_close(hidden_states(body, both)[17:], hidden_states(body, alone), atol=1e-12, rtol=0)


def test_every_reading_takes_the_packed_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions of models.py, packed and not, give the same numbers; and the first really is packed."""
    causal, scalar = llama(dtype=torch.float32), llama(LlamaForSequenceClassification, torch.float32)
    torch.manual_seed(1)
    tokens, mask = torch.randint(1, VOCABULARY, (6, 15)), torch.ones(6, 15, dtype=torch.bool)
    for row in range(6):
        mask[row, :row], mask[row, 15 - row :] = False, False
    response_mask = mask[:, 8:]

    def readings():
        logprobs, entropy = response_logprobs_and_entropy(causal, tokens, mask, response_mask, temperature=0.7)
        only = models.response_logprobs(causal, tokens, mask, response_mask, temperature=0.7)
        real = models.real_response_logits(causal, tokens, mask, response_mask)
        wanted = mask & (torch.arange(15) % 3 == 0)
        return (
            logprobs,
            entropy,
            only,
            real,
            token_values(scalar, tokens, mask, wanted),
            sequence_scores(scalar, tokens, mask),
        )

    entered = []
    kind = type(causal.model)
    monkeypatch.setattr(kind, "forward", lambda *a, _f=kind.forward, **k: entered.append(1) or _f(*a, **k))
    fast = readings()
    assert not entered, "transformers' forward was called"
    monkeypatch.setattr(models, "can_pack", lambda model: False)
    slow = readings()
    assert len(entered) == 5
    for a, b in zip(fast, slow, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
    torch.testing.assert_close(fast[0], fast[2])
    torch.testing.assert_close(fast[3], response_logits(causal, tokens, mask, 7)[response_mask], atol=2e-5, rtol=0)


@pytest.mark.parametrize("bias", [False, True])
def test_samples_are_those_of_transformers(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(dtype=torch.float32, bias=bias)
    prompts = [[7, 19, 33, 4, 9], [5], [44, 2, 41], [9, 9], [12, 13, 14, 15, 16, 17, 18], [3, 47]] * 3

    def answers():
        # Token 8 ends an answer: often enough at this temperature that rows drop out on the way.
        generator = generator_for(0, "t")
        return sample(model, prompts, max_new_tokens=30, pad_id=0, eos_id=8, generator=generator, temperature=3.0)

    kinds = []
    for kind in (PackedDecoder, CachedDecoder):
        monkeypatch.setattr(kind, "keep", lambda self, rows, _f=kind.keep: kinds.append(type(self)) or _f(self, rows))
    packed_samples = answers()
    assert set(kinds) == {PackedDecoder}
    monkeypatch.setattr(decoding, "can_pack", lambda model: False)
    samples = answers()
    assert set(kinds) == {PackedDecoder, CachedDecoder}
    assert torch.equal(packed_samples.tokens, samples.tokens) and torch.equal(packed_samples.ended, samples.ended)
    torch.testing.assert_close(packed_samples.logprobs, samples.logprobs, atol=2e-5, rtol=0)


def test_a_model_that_is_not_quite_a_llama_goes_through_transformers() -> None:
    plain = llama(dtype=torch.float32)
    assert can_pack(plain) and can_pack(llama(LlamaForSequenceClassification, torch.float32))
    assert can_pack(copy.deepcopy(plain))
    assert not can_pack(copy.deepcopy(plain).train()), "it might drop out"
    assert not can_pack(copy.deepcopy(plain).to(torch.bfloat16))
    assert not can_pack(llama(dtype=torch.float32, num_attention_heads=4, num_key_value_heads=2))
    assert not can_pack(llama(dtype=torch.float32, hidden_act="gelu"))
    assert not can_pack(llama(dtype=torch.float32, hidden_size=1026)), "too wide to be quicker"
    assert not can_pack(llama(dtype=torch.float32, is_causal=False))
    shallow, half, partly, dropping = (copy.deepcopy(plain) for _ in range(4))
    shallow.config.num_hidden_layers = 2
    half.model.layers.to(torch.float16)
    partly.model.layers[0].self_attn.v_proj.bias = torch.nn.Parameter(torch.zeros(24))
    dropping.model.layers[1].self_attn.train()
    assert not any(map(can_pack, (shallow, half, partly, dropping)))
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    assert not can_pack(llama(dtype=torch.float32, rope_parameters=scaled))

    class Adapter(torch.nn.Linear):
        pass

    adapted = copy.deepcopy(plain)
    adapted.model.layers[1].mlp.up_proj = Adapter(24, 40, bias=False)
    assert not can_pack(adapted)
    hooked = copy.deepcopy(plain)
    handle = hooked.model.layers[2].self_attn.register_forward_hook(lambda *_: None)
    assert not can_pack(hooked)
    handle.remove()
    assert can_pack(hooked)
    for register in ("register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook"):
        handle = getattr(hooked, register)(lambda *_: None)
        assert not can_pack(hooked), register
        handle.remove()
    assert can_pack(hooked)
    hooked.model.layers[0].mlp.forward = lambda x: x
    assert not can_pack(hooked)

    class Capped(LlamaForCausalLM):
        """Logits of its own."""

    assert not can_pack(llama(Capped, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_pack(plain)


def test_what_can_not_be_computed_is_refused() -> None:
    causal, scalar = llama(dtype=torch.float32), llama(LlamaForSequenceClassification, torch.float32)
    tokens, mask = torch.tensor([[5, 6, 7, 8], [0, 0, 7, 8]]), torch.tensor([[True] * 4, [False, False, True, True]])
    with pytest.raises(ValueError, match="no token before it"):
        models.response_logprobs(causal, tokens, mask, torch.ones(2, 2, dtype=torch.bool))
    empty = torch.tensor([[True] * 4, [False] * 4])
    with pytest.raises(ValueError, match="row 1 of 2 has no real token"):
        sequence_scores(scalar, tokens, empty)
    assert token_values(scalar, tokens, torch.zeros_like(mask)).tolist() == [[0.0] * 4] * 2
    weight = scalar.model.layers[0].mlp.up_proj.weight
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(sequence_scores(scalar, tokens, mask).sum(), weight, create_graph=True)


def test_a_broken_row_breaks_no_other() -> None:
    model = llama(dtype=torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = torch.nan
        tokens, mask = models.pad([[9, 9, 9], [5, 6], [7]], 0, side="left")
        decoder = PackedDecoder(model, tokens, mask, 2)
        for logits in (decoder.prompt(), decoder.step(torch.tensor([3, 3, 3]))):
            assert logits.isnan().any(dim=1).tolist() == [True, False, False]


def test_draw_takes_each_token_as_often_as_it_should() -> None:
    """20,000 rows against the distribution, and never a token of probability 0, at the ends neither."""
    logits = torch.full((20_000, 9), -torch.inf)
    logits[:, 1:8] = torch.tensor([0.0, 1.0, -torch.inf, 2.0, -3.0, 0.5, -8.0])
    counts = torch.bincount(draw(logits, generator_for(0, "draw")), minlength=9).double()
    expected = logits[0].softmax(-1).double() * 20_000
    assert counts[expected == 0].sum() == 0
    likely = expected > 5
    chi_square = float(((counts - expected)[likely] ** 2 / expected[likely]).sum())
    assert chi_square < 25, "five degrees of freedom: 25 is a chance of 1 in 7,000"


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53])
def test_draw_at_the_ends_of_the_unit_interval(number: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, number, dtype=torch.float64))
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf], [3.0, 3.0, 3.0], [0.0, -torch.inf, -torch.inf]])
    assert draw(logits).tolist() == [1, min(2, int(3 * number)), 0]


@pytest.mark.parametrize("row", [[torch.nan, 0.0], [torch.inf, 0.0], [-torch.inf, -torch.inf]])
def test_a_row_without_a_distribution_is_named(row: list[float]) -> None:
    with pytest.raises(ValueError, match=r"row 1 of 2: .*no token can be drawn"):
        draw(torch.tensor([[0.0, 0.0], row]))
