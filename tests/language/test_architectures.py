"""The field's architectures: a token has one log-prob, sampled in a batch, teacher-forced in a batch, or alone."""

import pytest
import torch

from minirlhf.errors import CheckpointError
from minirlhf.language.generation import sample
from minirlhf.language.models import response_logprobs, scalar_model_from, sequence_scores
from minirlhf.language.supported import check_model
from minirlhf.training import generator_for

PROMPTS = [[7, 19, 33, 4, 90, 11, 6, 8, 21], [5], [44, 3, 61], [12, 13, 14, 15, 16, 17]]
WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = WIDTH | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SLIDING = {"sliding_window": 4}

MATRIX = {
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "llama": ("Llama", GROUPED | {"num_key_value_heads": 4}),
    "llama, grouped heads and biases": ("Llama", GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "qwen 2": ("Qwen2", GROUPED),
    "qwen 3": ("Qwen3", GROUPED),
    "mistral, sliding window": ("Mistral", GROUPED | SLIDING),
    "gemma 2, soft caps": (
        "Gemma2",
        GROUPED | SLIDING | {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
    ),
    "phi": ("Phi", WIDTH | {"intermediate_size": 48}),
    "neox": ("GPTNeoX", WIDTH | {"intermediate_size": 48}),
    "opt": ("OPT", WIDTH | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon, alibi": ("Falcon", WIDTH | {"alibi": True}),
    "falcon, rotary": ("Falcon", WIDTH | {"alibi": False}),
    "mixtral": ("Mixtral", GROUPED | EXPERTS),
    "gpt-oss": ("GptOss", GROUPED | SLIDING | EXPERTS),
}
ENDS = {"vocab_size": 101, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}


def made(kind: str, shape: dict):
    """A random model of an architecture, sharp enough for positions to matter, in eval mode."""
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**ENDS, **shape)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=MATRIX)
def model(request):
    return made(*MATRIX[request.param])


@torch.no_grad()
def test_sampled_teacher_forced_and_alone_agree(model) -> None:
    check_model(model)
    samples = sample(
        model, PROMPTS, max_new_tokens=7, pad_id=0, eos_id=1, generator=generator_for(0, "test"), temperature=1.3
    )
    forced = response_logprobs(model, samples.tokens, samples.mask, samples.response_mask, 1.3)
    assert (samples.logprobs - forced).abs().max() < 1e-5
    assert samples.logprobs[samples.response_mask].std() > 0.3, "a model that has something to say"
    for row, (prompt, length) in enumerate(zip(PROMPTS, samples.lengths.tolist(), strict=True)):
        answer = samples.response_tokens[row, :length]
        logits = model(torch.tensor([[*prompt, *answer.tolist()]])).logits[0, len(prompt) - 1 : -1]
        alone = (logits / 1.3).log_softmax(-1).gather(-1, answer[:, None]).squeeze(-1)
        assert (alone - samples.logprobs[row, :length]).abs().max() < 1e-5


@torch.no_grad()
def test_a_score_does_not_depend_on_the_padding(model) -> None:
    scalar = scalar_model_from(model, seed=1).eval()
    tokens = torch.tensor([[0] * (9 - len(row)) + row for row in PROMPTS])
    mask = torch.tensor([[False] * (9 - len(row)) + [True] * len(row) for row in PROMPTS])
    scores = sequence_scores(scalar, tokens, mask)
    alone = torch.cat([sequence_scores(scalar, torch.tensor([row]), torch.ones(1, len(row))) for row in PROMPTS])
    assert (scores - alone).abs().max() < 1e-5 * max(1.0, float(alone.abs().max())) and alone.std() > 1e-2


def test_a_cache_that_forgets_is_refused() -> None:
    model = made(*MATRIX["gpt2"])
    forward = model.forward

    def forgetful(*args, past_key_values=None, **options):
        out = forward(*args, past_key_values=past_key_values, **options)
        if past_key_values is not None and out.logits.shape[1] == 1:
            out.logits = out.logits + torch.linspace(0, 1, out.logits.shape[-1])
        return out

    model.forward = forgetful
    with pytest.raises(CheckpointError, match="GPT2LMHeadModel: sampling with a cache gives other probabilities"):
        check_model(model)
