"""The gradient into the output matrix is autograd's, answer by answer, whatever the weights and the padding."""

from __future__ import annotations

import torch
from minirlhf_course.checks.write07 import SIZE, tiny_tokenizer
from minirlhf_course.output_layer import output_layer

from minirlhf.language.generation import sample
from minirlhf.language.models import response_logprobs, tiny_llama
from minirlhf.language.tokenization import encode_prompts


def test_each_answers_gradient_is_autograds():
    tokenizer = tiny_tokenizer()
    model = tiny_llama(SIZE, tokenizer, 32, 0).eval()
    matrix = torch.nn.Parameter(torch.randn_like(model.get_output_embeddings().weight) * 0.2)
    model.lm_head.weight = matrix  # of its own: the embedding's share is left out
    prompts = encode_prompts(tokenizer, ["who owl", "where there now fox", "why"])
    samples = sample(
        model,
        prompts,
        max_new_tokens=12,
        pad_id=tokenizer.pad_token_id,
        eos_id=tokenizer.eos_token_id,
        generator=torch.Generator().manual_seed(2),
    )
    assert len(set(samples.lengths.tolist())) > 1, "padding takes part"
    weights = torch.randn(samples.response_mask.shape)
    found = output_layer(model, samples, micro_batch_tokens=20).gradients(weights)
    assert found.shape == (3, matrix.numel())
    for row, gradient in enumerate(found):
        logprobs = response_logprobs(model, samples.tokens, samples.mask, samples.response_mask)
        (expected,) = torch.autograd.grad((weights * logprobs)[row].sum(), matrix)
        torch.testing.assert_close(gradient.view_as(matrix), expected, rtol=1e-4, atol=1e-5)
