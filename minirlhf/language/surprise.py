"""A reward model that hears how surprised its own body is by an answer.

    r(x, y) = head(h_last) + f(log p(y_1 | x), log p(y_2 | x, y_1), ...)

A wrong name in fluent text is what a scalar head misses: the body predicts token t in its last layer at token t - 1,
and no layer is left to compare the prediction with what came. The comparison is one dot product, h[t - 1] with the
embedding of token t, and a softmax; f is a small network of what it says, trained with the rest by the ranking loss.
(A bias or a soft cap that a model's head may have besides is left out.)

InstructGPT's reward model has no f. Where wrong answers are improbable ones, as in the small world, f is worth about
six points of accuracy; in text of another kind probability may say little about quality, and f learns to stay silent.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minirlhf.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMALLEST = 3  # log-probs that enter f one by one
FLOOR = -4.0  # nats: where the second mean stops counting
WIDTH = 32


class Surprise(nn.Module):
    """f: log-probs of an answer's tokens -> one number; 0 before training.

    The three smallest log-probs, their mean, their mean with each cut at -4 nats, and the log of their count go through
    one hidden layer. f bends where more of the same changes nothing: an answer with a wrong name is wrong.
    """

    def __init__(self, vocabulary: Tensor | None = None) -> None:
        """`vocabulary` [V, D] is copied where the causal model's head is not its embedding."""
        super().__init__()
        self.hidden = nn.Linear(SMALLEST + 3, WIDTH)
        self.out = nn.Linear(WIDTH, 1, bias=False)
        self.vocabulary = None if vocabulary is None else nn.Parameter(vocabulary.detach().clone())

    def forward(self, logprobs: Tensor, mask: Tensor) -> Tensor:
        """logprobs [B, T] of an answer's tokens, mask [B, T] True at them -> [B].

        Example:
            >>> Surprise()(torch.tensor([[-0.5, -3.0]]), torch.tensor([[True, True]])).shape
            torch.Size([1])
        """
        logprobs = torch.where(mask, logprobs, 0.0)  # 0 is no surprise
        count = mask.sum(dim=1, keepdim=True).clamp(min=1)
        room = nn.functional.pad(logprobs, (0, max(0, SMALLEST - logprobs.shape[1])))
        parts = [
            room.topk(SMALLEST, dim=1, largest=False).values / 5,
            logprobs.sum(dim=1, keepdim=True) / count,
            logprobs.clamp(min=FLOOR).sum(dim=1, keepdim=True) / count,
            count.log() / 3,
        ]
        return self.out(nn.functional.silu(self.hidden(torch.cat(parts, dim=1)))).squeeze(1)


def add_surprise(scalar: PreTrainedModel, causal: PreTrainedModel, seed: int) -> None:
    """Give a scalar model made of a causal model's body an f of its own; in place."""
    head, embedding = causal.get_output_embeddings().weight, causal.get_input_embeddings().weight
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scalar.surprise = Surprise(None if head is embedding else head)
    nn.init.zeros_(scalar.surprise.out.weight)
    scalar.surprise.to(scalar.device)
    scalar.config.surprise = "own_head" if scalar.surprise.vocabulary is not None else "embedding"


def has_surprise(scalar: PreTrainedModel) -> bool:
    """Whether a scalar model has an f."""
    return getattr(scalar, "surprise", None) is not None


def add_empty_surprise(scalar: PreTrainedModel) -> None:
    """The f that scalar.config speaks of, for weights that come from a file; in place."""
    kind = getattr(scalar.config, "surprise", None)
    if kind is not None:
        embedding = scalar.get_input_embeddings().weight
        scalar.surprise = Surprise(torch.zeros_like(embedding) if kind == "own_head" else None)


class ScalarModel:
    """AutoModelForSequenceClassification that does not warn of an f in the file: `load_surprise` reads it."""

    @staticmethod
    def from_pretrained(path: str | Path, **options: Any) -> Any:
        from transformers import AutoConfig, AutoModelForSequenceClassification

        config = AutoConfig.from_pretrained(path)
        if getattr(config, "surprise", None) is None:
            return AutoModelForSequenceClassification.from_pretrained(path, **options)
        kind = AutoModelForSequenceClassification._model_mapping[type(config)]
        quiet: Any = type(kind.__name__, (kind,), {"_keys_to_ignore_on_load_unexpected": [r"^surprise\."]})
        loaded = quiet.from_pretrained(path, **options)
        (loaded[0] if isinstance(loaded, tuple) else loaded).__class__ = kind
        return loaded


def load_surprise(scalar: PreTrainedModel, folder: Path) -> None:
    """Give a scalar model the f that its config speaks of, from the folder's safetensors; in place.

    Raises:
        CheckpointError: it does not stand there whole.
    """
    from safetensors.torch import load_file

    add_empty_surprise(scalar)
    if not has_surprise(scalar):
        return
    own: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file).items()
        own |= {name.removeprefix("surprise."): x.float() for name, x in tensors if name.startswith("surprise.")}
    try:
        scalar.surprise.load_state_dict(own)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{folder}: the model's surprise can't be loaded ({reason}); save it again") from None
