"""Hidden states and logits of any transformers model, from padded rows of tokens or one token at a time.

Only this module knows how models differ: what computes them (`llama.py` for a plain Llama on a CPU, transformers' own
forward for all others), whether they take ``position_ids``, what they can read, where the body is under an adapter,
in which precision they compute, and which activations they keep.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from minirlhf.errors import UserError
from minirlhf.language import llama

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COMPUTES_IN, RECOMPUTES = "minirlhf_computes_in", "minirlhf_recomputes"
"""The attributes of a body that `compute_in` and `recompute_layers` set."""

LOGITS_ARE_DEAR = {"cuda"}
"""Device types where a step's [B, T, V] logits are never materialized: they would take more memory than the model.

Elsewhere neither are those of a model that recomputes its layers."""


def is_plain_llama(model: PreTrainedModel) -> bool:
    """Whether `llama.forward` computes a model: a Llama on a CPU with its original forward, in eval mode.

    Its matrices and norms are called as modules, so adapters in their place and hooks on them still apply.
    """
    from transformers.models.llama import modeling_llama as hf

    base = model.base_model
    if type(model) not in (hf.LlamaForCausalLM, hf.LlamaForSequenceClassification) or type(base) is not hf.LlamaModel:
        return False
    skipped = [model, base, *base.layers, *(layer.self_attn for layer in base.layers)]  # never called
    kinds = {type(model), hf.LlamaModel, hf.LlamaDecoderLayer, hf.LlamaAttention}
    plain = all(type(module) in kinds and not module.training and not _is_hooked(module) for module in skipped)
    causal = getattr(model.config, "is_causal", True) and len(base.layers) == model.config.num_hidden_layers
    on_cpu = base.embed_tokens.weight.device.type == "cpu"
    return plain and causal and on_cpu and getattr(base, COMPUTES_IN, None) is None


def _is_hooked(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)  # or a replaced forward


def without_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """The transformers model inside a peft adapter, whose layers the adapter has replaced; or the model itself.

    The adapter's layers stay in the inner model, even if merged or disabled, so it computes the same as the outer.

    Raises:
        UserError: the adapter adds something outside the layers, such as a prompt: the inner model is not the policy.
    """
    if not hasattr(model, "get_base_model"):
        return model
    passes_on = type(model.base_model).forward.__module__ == "peft.tuners.tuners_utils"  # only its arguments
    if not passes_on or any(getattr(one, "alora_invocation_tokens", None) for one in model.peft_config.values()):
        kinds = ", ".join(sorted({type(one).__name__ for one in model.peft_config.values()}))
        raise UserError(f"a peft adapter must only replace layers, as LoRA does; {kinds} does more than that")
    return model.get_base_model()


def compute_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let a model whose weights stay in float32 compute in another type, by torch's autocast. Clones do too."""
    setattr(without_adapter(model).base_model, COMPUTES_IN, dtype)


def compute_dtype(model: PreTrainedModel) -> torch.dtype:
    """The type that a model computes in: that of `compute_in`, else that of its weights."""
    model = without_adapter(model)
    return getattr(model.base_model, COMPUTES_IN, None) or model.dtype


def _computing(model: PreTrainedModel) -> contextlib.AbstractContextManager[object]:
    """Around one forward: autocast keeps its copies of the weights until it ends, so it must not outlive a step."""
    dtype = getattr(model.base_model, COMPUTES_IN, None)
    return contextlib.nullcontext() if dtype is None else torch.autocast(model.device.type, dtype=dtype)


@contextlib.contextmanager
def _computing_logits(model: PreTrainedModel) -> Iterator[None]:
    """`_computing`, and in half precision a contiguous input for the head.

    transformers gives it a slice of the hidden states. On a CPU torch then multiplies row by row, and in half precision
    it first copies the head's weight for each row: 0.5 GB for 16 rows, width 512 and a vocabulary of 32,000.
    """
    head = model.get_output_embeddings()
    half = compute_dtype(model) in (torch.bfloat16, torch.float16) and head is not None
    hook = head.register_forward_pre_hook(lambda _, given: tuple(x.contiguous() for x in given)) if half else None
    try:
        with _computing(model):
            yield
    finally:
        if hook is not None:
            hook.remove()


def recompute_layers(model: PreTrainedModel) -> None:
    """Gradient checkpointing: of each layer the input alone is kept, and backward computes the layer again.

    So are log-probs from the last hidden states, a few rows at a time. transformers' own switch works only in training
    mode, where dropout is on too; this one works in eval mode. A clone recomputes with its own weights.

    Raises:
        UserError: its layers are not of the kind that transformers can checkpoint.
    """
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [layer for layer in without_adapter(model).modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(f"{type(model).__name__} has no layers that transformers can checkpoint; train it without")
    setattr(without_adapter(model).base_model, RECOMPUTES, True)
    for layer in layers:
        if "forward" not in vars(layer):
            # No dropout is on, so there is no random state to keep.
            forward = layer.forward
            layer.forward = functools.partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)


def context_of(model: PreTrainedModel) -> int | None:
    """The longest sequence in tokens that a model can read; None if it has no limit."""
    return getattr(model.config, "max_position_embeddings", None)


def readable(
    model: PreTrainedModel, tokens: Tensor, mask: Tensor, room: int = 0
) -> tuple[PreTrainedModel, Tensor, Tensor]:
    """The model inside any adapter, the tokens with 0 in place of padding, and the mask as bool.

    So padding never reaches the model, not even a pad token for which it has no embedding.

    Args:
        model: a causal or a scalar model.
        tokens: [B, T] int64.
        mask: [B, T] True at real tokens.
        room: tokens that are still to be sampled after each row.

    Raises:
        UserError: a token is outside the model's vocabulary, or a row longer than its context.
    """
    model, mask = without_adapter(model), mask.bool()
    tokens = tokens.where(mask, 0)
    vocabulary, context = len(model.get_input_embeddings().weight), context_of(model)
    outside = tokens[(tokens < 0) | (tokens >= vocabulary)].tolist()
    if outside:
        raise UserError(
            f"token {outside[0]} is outside the model's vocabulary of {vocabulary}; load tokenizer and model from the "
            "same folder: load_causal_model(folder, tokenizer)"
        )
    if context is not None and (longest := int(mask.sum(dim=1).max()) + room) > context:
        raise UserError(
            f"a row takes {longest} tokens{f', {room} of them its answer' if room else ''}, but the model reads "
            f"{context}; shorten the prompt or the answer"
        )
    return model, tokens, mask


def inputs(model: nn.Module, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Model inputs for padded tokens. Without position_ids the logits of a left-padded GPT-2 are far off."""
    found = {"input_ids": tokens, "attention_mask": mask.long()}
    if "position_ids" in inspect.signature(model.forward).parameters:
        found["position_ids"] = positions(mask)
    return found


def positions(mask: Tensor) -> Tensor:
    """Position of each token among the real ones: [B, T] bool or int -> [B, T] int64.

    Example:
        >>> positions(torch.tensor([[0, 0, 1, 1, 1]])).tolist()
        [[0, 0, 0, 1, 2]]
    """
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def hidden_states(model: PreTrainedModel, tokens: Tensor, mask: Tensor, wanted: Tensor) -> Tensor:
    """The body's last hidden states at the wanted tokens, row by row: [W, D].

    Args:
        model: a causal or a scalar model.
        tokens: [B, T] int64. Padding may be at either end of a row, not within it.
        mask: [B, T] bool, True at real tokens.
        wanted: [B, T] bool, True at W of the real tokens.

    Raises:
        UserError: see `readable`.
    """
    model, tokens, mask = readable(model, tokens, mask)
    if is_plain_llama(model):
        packed = llama.pack(tokens, mask)
        attend = llama.causal(packed, len(tokens))
        return llama.forward(model.base_model, packed.tokens, packed.positions, attend, wanted[mask])
    body = model.base_model
    with _computing(model):
        states = body(**inputs(body, tokens, mask), use_cache=False).last_hidden_state[wanted]
    return states.to(compute_dtype(model))


def next_token_logits(model: PreTrainedModel, tokens: Tensor, mask: Tensor, wanted: Tensor) -> Tensor:
    """Logits of the token after each wanted one, row by row: [W, V]. Arguments and errors as in `hidden_states`."""
    model = without_adapter(model)
    if is_plain_llama(model):
        return model.lm_head(hidden_states(model, tokens, mask, wanted))
    model, tokens, mask = readable(model, tokens, mask)
    last = tokens.shape[1] - int(wanted.any(0).int().argmax())  # columns from the first that any row wants
    with _computing_logits(model):
        out = model(**inputs(model, tokens, mask), use_cache=False, logits_to_keep=last)
    return out.logits[:, -last:][wanted[:, -last:]]


def bare_head(model: PreTrainedModel) -> Tensor | None:
    """The head's weight [V, D] if it alone computes the logits, and they are dear (`LOGITS_ARE_DEAR`); else None.

    Also None if something else takes part: a bias, an adapter, a soft cap (Gemma 2), a scale (Cohere, Granite).
    """
    model = without_adapter(model)
    head = model.get_output_embeddings()
    dear = model.device.type in LOGITS_ARE_DEAR or getattr(model.base_model, RECOMPUTES, False)
    if not dear or type(head) is not nn.Linear or head.bias is not None:
        return None
    settings = model.config.get_text_config().to_dict().items()
    shaped = any(("logit" in name or "lm_head" in name) and value not in (None, False, 1) for name, value in settings)
    if shaped or list(model.children()) != [model.base_model, head]:
        return None
    return head.weight.to(compute_dtype(model))


class Decoder(Protocol):
    """Logits of the next token, [b, V] float32, for b running rows."""

    def prompt(self) -> Tensor:
        """After the prompts."""

    def step(self, token: Tensor) -> Tensor:
        """After one more token per row, [b]."""

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows, [new b]."""


def decoder_for(model: PreTrainedModel, tokens: Tensor, mask: Tensor, max_new_tokens: int) -> Decoder:
    """A decoder of one token at a time, after left-padded prompts: tokens [B, P] int64, mask [B, P] bool.

    Raises:
        UserError: see `readable`.
    """
    model, tokens, mask = readable(model, tokens, mask, room=max_new_tokens)
    kind = LlamaDecoder if is_plain_llama(model) else TransformersDecoder
    return kind(model, tokens, mask, max_new_tokens)


class LlamaDecoder:
    """`llama.forward` with its cache."""

    def __init__(self, model: PreTrainedModel, tokens: Tensor, mask: Tensor, max_new_tokens: int) -> None:
        self._model, self._prompts = model, llama.pack(tokens, mask)
        self._cache = llama.Cache(model.base_model, len(tokens), tokens.shape[1] + max_new_tokens)

    def prompt(self) -> Tensor:
        tokens, rows, places = self._prompts
        attend = self._cache.prompts(self._prompts)
        last = places + 1 == self._cache.lengths[rows]
        return self._logits(llama.forward(self._model.base_model, tokens, places, attend, last))

    def step(self, token: Tensor) -> Tensor:
        places = self._cache.lengths
        return self._logits(llama.forward(self._model.base_model, token, places, self._cache.step()))

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._model.lm_head(hidden).float()

    def keep(self, rows: Tensor) -> None:
        self._cache.select(rows)


class TransformersDecoder:
    """A model's own forward with transformers' cache."""

    def __init__(self, model: PreTrainedModel, tokens: Tensor, mask: Tensor, max_new_tokens: int) -> None:
        from transformers import DynamicCache

        self._model, self._tokens = model, tokens
        self._cache = DynamicCache(config=model.config)
        room = torch.ones(len(mask), max_new_tokens, dtype=torch.long, device=mask.device)
        self._attention, self._width = torch.cat([mask.long(), room], dim=1), mask.shape[1]
        self._positions = positions(mask)
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def prompt(self) -> Tensor:
        return self._forward(self._tokens)

    def step(self, token: Tensor) -> Tensor:
        self._width += 1
        self._positions = self._positions[:, -1:] + 1
        return self._forward(token[:, None])

    def _forward(self, tokens: Tensor) -> Tensor:
        with _computing_logits(self._model):
            out = self._model(
                tokens,
                attention_mask=self._attention[:, : self._width],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
                **({"position_ids": self._positions} if self._takes_positions else {}),
            )
        return out.logits[:, -1].float()

    def keep(self, rows: Tensor) -> None:
        self._cache.batch_select_indices(rows)
        self._attention, self._positions = self._attention[rows], self._positions[rows]
