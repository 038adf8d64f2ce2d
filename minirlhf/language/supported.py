"""Check that a pretrained model can do every part of the pipeline, before any training and not an hour into it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from minirlhf.errors import CheckpointError
from minirlhf.language.forward import hidden_states, next_token_logits
from minirlhf.language.generation import sample
from minirlhf.language.models import empty_scalar, response_logprobs, token_values

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def check_model(model: PreTrainedModel) -> None:
    """Check that a causal model can be scored, samples as it is trained, and can lend its body to a scalar head.

    The scalar model is created on torch's meta device, so a large model needs no second copy.

    Args:
        model: in eval mode.

    Raises:
        CheckpointError: it can't, or a weight is not finite; the message says what failed.
    """
    _check_finite(model)
    scalar = empty_scalar(model)
    name, vocabulary = type(model).__name__, model.get_input_embeddings().num_embeddings
    tokens = torch.arange(6)[None].repeat(2, 1) % vocabulary
    mask = torch.tensor([[False, False, *[True] * 4], [True] * 6])
    try:
        third = torch.arange(6).expand(2, 6) == 3
        early = next_token_logits(model, tokens[:, :4], mask[:, :4], third[:, :4])
        later = next_token_logits(model, tokens, mask, third)
        end = vocabulary - 1
        samples = sample(model, [[0], [0, 1, 2, 3]], max_new_tokens=4, pad_id=0, eos_id=end, greedy=True)
        forced = response_logprobs(model, samples.tokens, samples.mask, samples.response_mask)
        states = hidden_states(model, tokens, mask, third)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{name} can't be trained here: {str(error).splitlines()[0]}") from error
    if states.shape[-1] != scalar.score.in_features:
        raise CheckpointError(f"{name}: its states have width {states.shape[-1]}, its head {scalar.score.in_features}")
    if not torch.allclose(early, later, atol=1e-3, rtol=1e-3):
        raise CheckpointError(f"{name}: a token changes what was predicted before it; give a causal model")
    gap = (forced - samples.logprobs).expm1().abs()
    exact = model.dtype == torch.float32
    if float(gap.max() if exact else gap.mean()) > (1e-3 if exact else 5e-2):  # as of PPO's first ratio
        raise CheckpointError(
            f"{name}: sampling with a cache gives other probabilities than a forward pass over the whole rows (off by "
            f"{float(gap.max()):.2g}), so PPO's updates would be wrong; give another model, or another transformers"
        )


@torch.no_grad()
def check_scalar_model(model: PreTrainedModel) -> None:
    """Check that a reward model scores a text by itself, whatever its padding, and can become a value network.

    Args:
        model: with a scalar head, in eval mode.

    Raises:
        CheckpointError: it can't, or a weight is not finite; the message says what failed.
    """
    _check_finite(model)
    name, vocabulary = type(model).__name__, model.get_input_embeddings().num_embeddings
    tokens = torch.arange(8)[None].repeat(2, 1) % vocabulary
    mask = torch.tensor([[False, False, *[True] * 4, False, False], [True] * 8])
    try:
        values = token_values(model, tokens, mask)
        alone = token_values(model, tokens[:1, 2:6], mask[:1, 2:6])
        early = token_values(model, tokens[1:, :4], mask[1:, :4])
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{name} can't score texts here: {str(error).splitlines()[0]}") from error
    if not torch.allclose(values[:1, 2:6], alone, atol=1e-3, rtol=1e-3):
        raise CheckpointError(f"{name}: padding changes its scores; give another model, or another transformers")
    if not torch.allclose(values[1:, :4], early, atol=1e-3, rtol=1e-3):
        raise CheckpointError(f"{name}: a token changes the values before it; give a causal model")


def _check_finite(model: PreTrainedModel) -> None:
    broken = [key for key, value in model.state_dict().items() if not value.isfinite().all()]
    if broken:
        raise CheckpointError(f"{type(model).__name__}: its weight {broken[0]} is NaN or infinite; save it again")
