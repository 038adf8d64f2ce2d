"""The four models of RLHF are two kinds of transformers models: a causal one, and one with a scalar head.

policy, reference    AutoModelForCausalLM
reward, value        AutoModelForSequenceClassification with one label; the same head read at one token or at all

Any transformers decoder works; `tiny_llama` creates the small one that the course trains from scratch.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor, nn

from minirlhf import parallel
from minirlhf.checkpoints import ADAPTER, SCALAR
from minirlhf.errors import CheckpointError, UserError, require_installed, said_shortly
from minirlhf.language.forward import (
    LOGITS_ARE_DEAR,
    bare_head,
    hidden_states,
    next_token_logits,
    without_adapter,
)
from minirlhf.losses import linear_token_logprobs, token_logprobs
from minirlhf.settings import Count, Positive, Settings, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOGITS_AT_ONCE = 2**22
"""Logits in memory at a time where they are recomputed: 16 MiB in float32."""
BYTES = 256  # every byte-level BPE has a token for each


@dataclass(frozen=True)
class ModelConfig(Settings, option="model_size"):
    """The tiny Llama-style base model that is trained if no pretrained one is given."""

    hidden_size: Count = 96
    """Width of the model; a multiple of 2 x heads."""
    layers: Count = 4
    """Number of transformer blocks."""
    heads: Count = 4
    """Attention heads per block."""
    intermediate_size: Count = 256
    """Width of the feed-forward layer."""
    init_std: Positive = 0.05
    """Standard deviation of the initial weights; the usual 0.02 is meant for models ten times as wide."""
    vocab_size: Annotated[int, whole(BYTES + 2)] = 2048  # with <pad> and <eos>
    """Vocabulary of the byte-level BPE that is trained if the data folder has no tokenizer.json."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.hidden_size % (2 * self.heads) == 0
        self.require(fits, "hidden_size", f"must be a multiple of 2 x --model-size.heads ({2 * self.heads})")


def tiny_llama(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, context_length: int, seed: int
) -> PreTrainedModel:
    """A fresh Llama-style causal model with tied embeddings.

    Args:
        config: its size.
        tokenizer: gives the vocabulary and the special tokens.
        context_length: the longest sequence it will see, in tokens.
        seed: of its initial weights.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.heads,
                max_position_embeddings=context_length,
                tie_word_embeddings=True,
                initializer_range=config.init_std,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                bos_token_id=None,
            )
        )


def load_causal_model(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Load a causal model. The folder of a peft adapter gives its base model with the adapter merged into it.

    Args:
        path: a folder or a hub name.
        tokenizer: if it has more tokens than the model, such as an added pad token, the model's embedding is enlarged.
            Not needed for training: padding never enters a model.
        seed: of the new rows of the embedding.
        dtype: of its weights.

    Raises:
        CheckpointError: weights are missing or damaged, or it is not a causal model.
    """
    from transformers import AutoModelForCausalLM

    model, missing = _load(AutoModelForCausalLM, path, dtype)
    made = (model.config.architectures or [""])[0]
    if "ForSequenceClassification" in made:
        raise CheckpointError(f"{path}: a {made}, which only scores texts; give a causal model")
    _check_complete(path, missing)
    if tokenizer is not None:
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            with torch.random.fork_rng(devices=[]):  # transformers draws the new rows around the mean of the old ones
                torch.manual_seed(seed)
                model.resize_token_embeddings(len(tokenizer))
        model.config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


CLOSED = {"trust_remote_code": False, "use_safetensors": True}
"""A model's folder may name code, and weights may be a pickle that runs some: neither is ever loaded."""


def context_in(path: str | Path) -> int | None:
    """The longest sequence in tokens that a saved model can read; None if it has no limit.

    Args:
        path: a folder or a hub name; of an adapter, its base model counts.

    Raises:
        CheckpointError: its configuration can't be loaded.
    """
    return getattr(configuration(path), "max_position_embeddings", None)


def configuration(path: str | Path) -> Any:
    """What transformers calls the configuration of a saved model; of an adapter, its base model's.

    Raises:
        CheckpointError: it can't be loaded.
    """
    from transformers import AutoConfig

    with _said(path):
        if (Path(path) / ADAPTER).is_file():
            path = _base_of(Path(path))
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


def count_weights(path: str | Path) -> int:
    """Of a saved causal model, which is not loaded.

    Raises:
        CheckpointError: its configuration can't be loaded, or is not a causal model's.
    """
    from transformers import AutoModelForCausalLM

    found = configuration(path)
    with _said(path), torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(found).parameters())


def _load(kind: Any, path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, list[str]]:
    """``kind.from_pretrained``, and the names of weights that are missing in the files."""
    if (Path(path) / ADAPTER).is_file():
        return _merged(kind, Path(path), dtype)
    config = configuration(path)
    if getattr(config, "surprise", None) is not None:
        raise CheckpointError(
            f"{path}: a reward model of minirlhf 0.1 whose score is more than a scalar head (config.surprise); "
            "without the rest it would score differently, so train it again"
        )
    with _said(path):
        options: dict[str, Any] = {"config": config, "dtype": dtype, "output_loading_info": True, **CLOSED}
        model, found = kind.from_pretrained(path, **options)
    return model, sorted(found["missing_keys"])


@contextlib.contextmanager
def _said(path: str | Path, what: str = "the model") -> Iterator[None]:
    """Turn what transformers raises where a model can't be loaded into one sentence.

    Raises:
        CheckpointError: says why, and what to give.
    """
    try:
        yield
    except (MemoryError, UserError):
        raise
    except Exception as error:  # what is in the files decides what is raised: transformers and peft promise nothing
        reason = said_shortly(error)
        if "trust_remote_code" in str(error):
            reason = "it brings code of its own, which minirlhf never runs"
        raise CheckpointError(
            f"{path}: {what} can't be loaded ({reason}); "
            "give a folder made by save_pretrained, weights in safetensors included, or a hub name"
        ) from error


def _merged(kind: Any, folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, list[str]]:
    """The base model of a peft adapter with the adapter merged into it, in float32 and then rounded once."""
    require_installed("peft", "lora")
    from peft import PeftModel

    check_weights(folder)
    config = configuration(folder)
    with _said(folder, "the adapter or its base model"):
        base = _base_of(folder)
        if "SequenceClassification" in kind.__name__:
            config.num_labels, config.score_offset = 1, score_offset(folder)
        options: dict[str, Any] = {"config": config, "dtype": torch.float32, "output_loading_info": True, **CLOSED}
        model, found = kind.from_pretrained(base, **options)
        adapted = PeftModel.from_pretrained(model, folder)
        inner = adapted.get_base_model().named_modules()
        brought = [name for name, module in inner if hasattr(module, "modules_to_save")]
        model = adapted.merge_and_unload()
    missing = [key for key in found["missing_keys"] if key.rsplit(".", 1)[0] not in brought]
    return half(model, dtype), sorted(missing)


def _base_of(adapter: Path) -> str:
    """The folder or hub name of an adapter's base model."""
    base = json.loads((adapter / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    if not isinstance(base, str):
        raise ValueError(f"{ADAPTER} names no base model")
    if (Path(base) / ADAPTER).is_file():  # transformers would load that one too, also from a pickle
        raise ValueError(f"its base model {base} is an adapter too: merge one into the other")
    return base


def check_weights(adapter: Path) -> None:
    """peft would load an adapter's weights from a pickle where no safetensors are.

    Raises:
        CheckpointError: the folder has no weights in safetensors.
    """
    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        raise CheckpointError(f"{file}: missing; weights in other formats are not loaded: save the adapter again")


def score_offset(adapter: Path) -> float:
    """What is taken off the scores of an adapter's scalar model: 0 unless minirlhf has saved it."""
    file = adapter / SCALAR
    return float(json.loads(file.read_text(encoding="utf-8"))["score_offset"]) if file.is_file() else 0.0


def _check_complete(path: str | Path, missing: list[str]) -> None:
    if missing:  # transformers would give them random values, and say so in a warning
        raise CheckpointError(f"{path}: {len(missing)} weights are missing, the first is {missing[0]}; save it again")


def load_scalar_model(path: str | Path) -> PreTrainedModel:
    """Load a reward or value model saved by minirlhf, or any one-label sequence classifier of transformers."""
    from transformers import AutoModelForSequenceClassification

    model, missing = _load(AutoModelForSequenceClassification, path)
    _check_scalar(model)
    _check_complete(path, missing)
    return model


def half(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast the weights of a model that is not trained, in place, as `from_pretrained` does with a dtype.

    A scalar head stays as it is: scores need more than 8 bits. So do buffers: rotary frequencies that were rounded to
    bfloat16 would turn a token at position 1,000 by a radian too much.
    """
    head = getattr(model, "score", None)
    kept = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.data = parameter.data.to(dtype)
    return model


def scalar_model_from(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A model with a scalar head on a copy of a causal model's body: the start of a reward model.

    It has the same device, dtype and mode, and all of it is trainable; a peft adapter is merged into the copy. The head
    is initialized with standard deviation 1/sqrt(d+1), so that scores start near unit scale at any width d ("The N
    implementation details of RLHF with PPO").

    Args:
        model: a causal model; it is not changed.
        seed: random seed for the head.

    Raises:
        CheckpointError: transformers has no sequence classifier of its type.
    """
    causal = clone(model)
    if without_adapter(causal) is not causal:
        causal = causal.merge_and_unload()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scalar = empty_scalar(causal, device="cpu").train(causal.training)
        nn.init.normal_(scalar.score.weight, std=(scalar.score.in_features + 1) ** -0.5)
    setattr(scalar, scalar.base_model_prefix, causal.base_model)
    scalar.score.to(model.device, model.dtype)
    scalar.config.score_offset = 0.0
    return scalar.requires_grad_(True)


def empty_scalar(model: PreTrainedModel, device: str = "meta") -> PreTrainedModel:
    """An untrained scalar model of a causal model's type and size; on torch's meta device it has no weights.

    Raises:
        CheckpointError: transformers has none of that type, or none with the same body.
    """
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(model.config)
    config.num_labels = 1
    try:
        with torch.device(device):
            scalar = AutoModelForSequenceClassification.from_config(config)
    except ValueError:
        scalar = None
    if type(getattr(scalar, "base_model", None)) is not type(model.base_model):
        raise CheckpointError(
            f"{type(model).__name__} can't be a reward model: transformers has no sequence classifier of its type "
            f"({config.model_type}) with the same body; give a decoder that has one, such as Llama, GPT-2 or Qwen"
        )
    _check_scalar(scalar)
    return scalar


def clone(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model that shares no weights with it: same device and dtype, adapters and frozen parts included."""
    return copy.deepcopy(model)


def share(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model whose frozen weights are the same tensors as the model's: only what is trained takes memory.

    With LoRA this puts several adapters on one body. Each copy has modules of its own, so no forward has to switch
    adapters, and a layer that backward computes again has the right one.

    Example:
        >>> layers = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
        >>> twin = share(layers)
        >>> twin[0].weight is layers[0].weight, twin[1].weight is layers[1].weight
        (True, False)
    """
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})


def _check_scalar(model: PreTrainedModel) -> None:
    if getattr(getattr(model, "score", None), "out_features", None) != 1:
        raise CheckpointError(
            f"{type(model).__name__} has no scalar head named 'score'; a reward model is a transformers decoder "
            "loaded as AutoModelForSequenceClassification with num_labels=1"
        )


def response_logits(model: PreTrainedModel, tokens: Tensor, mask: Tensor, response_mask: Tensor) -> Tensor:
    """The logits of each response token: [W, V], in the order of response_mask [B, T]. See `response_logprobs`."""
    return next_token_logits(model, tokens[:, :-1], mask[:, :-1], _before(mask, response_mask))


def response_logprobs(
    model: PreTrainedModel,
    tokens: Tensor,
    mask: Tensor,
    response_mask: Tensor,
    temperature: float = 1.0,
    *,
    return_entropy: bool = False,
) -> Any:
    """Log-probability of each response token, teacher-forced: [B, T] float32, 0 where response_mask is False.

    Args:
        model: a causal model.
        tokens: [B, P + T] with every response token among the last T columns. Padding may be at either end of a row,
            not within it.
        mask: [B, P + T] bool, True at real tokens.
        response_mask: [B, T] bool, True at response tokens, EOS included.
        temperature: the one that the response was sampled with.
        return_entropy: also return the entropy, in nats, of the distribution that each token was drawn from, [B, T].

    Raises:
        ValueError: a response token has no token before it.
    """
    targets = tokens[:, -response_mask.shape[1] :][response_mask]  # [W]
    options: dict[str, Any] = {"temperature": temperature, "return_entropy": return_entropy}

    def fused() -> Any:  # the logits are never materialized
        states = hidden_states(model, tokens[:, :-1], mask[:, :-1], _before(mask, response_mask))
        head = bare_head(model)
        assert head is not None
        return _linear_logprobs(states, head, targets, options)

    if bare_head(model) is None:
        out = token_logprobs(response_logits(model, tokens, mask, response_mask), targets, **options)
    else:
        out = parallel.within(model, fused)
    if return_entropy:
        return _spread(out[0], response_mask), _spread(out[1], response_mask)
    return _spread(out, response_mask)


def _linear_logprobs(states: Tensor, head: Tensor, targets: Tensor, options: dict[str, Any]) -> Any:
    """`linear_token_logprobs`, without all logits at once: on a GPU by its kernel, elsewhere a few rows at a time."""
    from torch.utils.checkpoint import checkpoint

    if states.device.type in LOGITS_ARE_DEAR:
        return linear_token_logprobs(states, head, targets, **options)
    rows = max(1, LOGITS_AT_ONCE // len(head))
    again = {"use_reentrant": False, "preserve_rng_state": False} | options
    parts = [
        checkpoint(linear_token_logprobs, few, head, own, **again)
        for few, own in zip(states.split(rows), targets.split(rows), strict=True)
    ]
    return tuple(map(torch.cat, zip(*parts, strict=True))) if options["return_entropy"] else torch.cat(parts)


def _before(mask: Tensor, response_mask: Tensor) -> Tensor:
    """The token before each response token, which predicts it: [B, P + T - 1] bool. The shift by one is done here."""
    length = response_mask.shape[1]
    before = torch.zeros_like(mask[:, :-1])
    before[:, -length:] = response_mask
    if (before & ~mask[:, :-1]).any():
        raise ValueError("a response token has no token before it to predict it: give every row a prompt")
    return before


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """[W] values scattered to where mask [...] is True, 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def token_values(model: PreTrainedModel, tokens: Tensor, mask: Tensor, wanted: Tensor | None = None) -> Tensor:
    """The scalar head at every real token, offset removed: [B, T] -> [B, T] float32, 0 at padding.

    With ``wanted`` [B, T] bool, True at some of the real tokens, the others are 0 too and may not be computed.
    """
    wanted = mask.bool() if wanted is None else wanted
    return _spread(_scalars(model, tokens, mask, wanted), wanted)


def _scalars(model: PreTrainedModel, tokens: Tensor, mask: Tensor, wanted: Tensor) -> Tensor:
    _check_scalar(model)
    scores = parallel.within(
        model, lambda: model.score(hidden_states(model, tokens, mask, wanted).to(_head_dtype(model)))
    )
    return scores.squeeze(-1).float() - getattr(model.config, "score_offset", 0.0)


def _head_dtype(model: PreTrainedModel) -> torch.dtype:
    return next(model.score.parameters()).dtype  # float32 also on a body in bfloat16


def sequence_scores(model: PreTrainedModel, tokens: Tensor, mask: Tensor) -> Tensor:
    """The scalar head at the last real token, by explicit index: [B, T] -> [B] float32.

    Padding on the left, on the right or on both sides gives the same score.

    Raises:
        ValueError: a row without any real token.
    """
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    last = torch.where(mask.bool(), columns, -1).amax(dim=1)
    if (last < 0).any():
        raise ValueError(f"row {int(last.argmin())} of {len(last)} has no real token, and so no score")
    return _scalars(model, tokens, mask, columns == last[:, None])


def pad(rows: Sequence[Sequence[int]], pad_id: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """Pad token rows to one width: -> tokens [B, T] int64 and mask [B, T] bool, True at real tokens.

    Example:
        >>> tokens, mask = pad([[5, 6], [7]], pad_id=0, side="left")
        >>> tokens.tolist(), mask.tolist()
        ([[5, 6], [0, 7]], [[True, True], [False, True]])
    """
    width = max(len(row) for row in rows)
    filled = []
    for row in rows:
        gap = [pad_id] * (width - len(row))
        filled.append([*gap, *row] if side == "left" else [*row, *gap])
    tokens = torch.tensor(filled, dtype=torch.long).view(len(rows), width)
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    columns = torch.arange(width)[None]
    return tokens, columns >= width - lengths if side == "left" else columns < lengths


def pad_answers(rows: Sequence[Sequence[int]], starts: Sequence[int], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pad rows of prompt + answer for `response_logprobs`: tokens and mask [B, P + T], response_mask [B, T].

    Args:
        rows: token ids.
        starts: where each row's answer begins.
        pad_id: fills the end of shorter rows.

    Example:
        >>> tokens, mask, response_mask = pad_answers([[5, 6, 7], [8, 9]], [1, 1], pad_id=0)
        >>> tokens.tolist(), response_mask.tolist()
        ([[5, 6, 7], [8, 9, 0]], [[True, True], [True, False]])
    """
    tokens, mask = pad(rows, pad_id)
    begins = torch.tensor(starts)
    kept = tokens.shape[1] - int(begins.min())  # columns that hold an answer's token in some row
    answers = mask & (torch.arange(tokens.shape[1]) >= begins[:, None])
    return tokens, mask, answers[:, -kept:]
