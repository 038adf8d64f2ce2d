"""The policy gradient into a language model's output matrix, answer by answer: to see how much answers disagree.

The logits are a product of the last hidden states with one matrix, so this part of the gradient needs no backward pass:

    grad of log pi(y_t)  =  (onehot(y_t) - pi(. | x, y_<t))  h_t^T

and any number of weightings of the tokens can be had from the same forward pass. Where the matrix is the embedding too,
as in the small world's models, this is the share that flows through the output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from minirlhf.training import micro_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from minirlhf.language.generation import Samples

__all__ = ["OutputLayer", "output_layer"]


class OutputLayer(NamedTuple):
    """What the gradient of each answer token is made of."""

    errors: Tensor
    """[B, T, V] onehot - pi, 0 in the padding."""
    states: Tensor
    """[B, T, D] the hidden states that the logits are made from."""

    def gradients(self, weights: Tensor) -> Tensor:
        """sum over t of weights_t grad log pi(y_t), for each answer: weights [B, T] give [B, V * D]."""
        return torch.einsum("bt,btv,btd->bvd", weights, self.errors, self.states).flatten(1)


@torch.no_grad()
def output_layer(model: PreTrainedModel, samples: Samples, micro_batch_tokens: int = 4096) -> OutputLayer:
    """Read the answers once, and keep what their gradients are made of."""
    matrix = model.get_output_embeddings().weight
    rows, longest = samples.response_mask.shape
    errors = torch.zeros(rows, longest, len(matrix))
    states = torch.zeros(rows, longest, matrix.shape[1])
    for group in micro_batches(samples.mask.sum(dim=1).tolist(), micro_batch_tokens):
        index = torch.tensor(group)
        part = samples.rows(index)
        width = part.response_mask.shape[1]
        places = (part.mask.long().cumsum(1) - 1).clamp(0)
        read = model.base_model(input_ids=part.tokens, attention_mask=part.mask.long(), position_ids=places)
        before = read.last_hidden_state[:, -width - 1 : -1]  # what stands before a token predicts it
        chances = (before @ matrix.T).softmax(-1)
        wrong = torch.nn.functional.one_hot(part.response_tokens, len(matrix)) - chances
        errors[index, :width] = torch.where(part.response_mask[..., None], wrong, 0.0)
        states[index, :width] = before
    return OutputLayer(errors, states)
