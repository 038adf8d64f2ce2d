"""Can a pretrained model play all the parts of the pipeline? Asked before any training, not after an hour of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from minirlhf.errors import CheckpointError
from minirlhf.language.generation import sample
from minirlhf.language.models import response_logits, untrained_scalar

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def check_model(model: PreTrainedModel) -> None:
    """Let a causal model write two tokens, be scored, and lend its body to a scalar model.

    The scalar model is made without memory of its own (on torch's meta device), so a large model costs no second copy.

    Args:
        model: in eval mode.

    Raises:
        CheckpointError: says what it can't do.
    """
    with torch.device("meta"):
        scalar = untrained_scalar(model)
    name, vocabulary = type(model).__name__, model.get_input_embeddings().num_embeddings
    tokens = torch.arange(6)[None].repeat(2, 1) % vocabulary
    mask = torch.tensor([[False, False, *[True] * 4], [True] * 6])
    try:
        scalar.base_model.load_state_dict(model.base_model.state_dict(), assign=True)
        early = response_logits(model, tokens[:, :-1], mask[:, :-1], 1)
        later = response_logits(model, tokens, mask, 2)[:, :1]
        sample(model, [[0], [0, 1]], max_new_tokens=2, pad_id=0, eos_id=1, greedy=True)
        states = model.base_model(input_ids=tokens, attention_mask=mask.long(), use_cache=False).last_hidden_state
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{name} can't be trained here: {str(error).splitlines()[0]}") from error
    if states.shape[-1] != scalar.score.in_features:
        raise CheckpointError(f"{name}: its states are {states.shape[-1]} wide, its head {scalar.score.in_features}")
    if not torch.allclose(early, later, atol=1e-3, rtol=1e-3):
        raise CheckpointError(f"{name}: a token changes what was predicted before it; give a causal model")
