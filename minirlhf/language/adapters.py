"""LoRA through peft: every model of a run is an adapter on one frozen body (Hu et al. 2021).

The policy, the value network, the reference and the reward model each have modules of their own, but the body's weights
in them are the same tensors (`share`). So nothing switches adapters between two forwards, no trained tensor belongs to
two models, and the body is in memory once. In bfloat16 the body alone is rounded: adapters and scalar heads stay in
float32.

SFT trains an adapter A. The reference is the body with A, frozen; the policy, the value network and the reward model
start from copies of A. Merging A into the body instead would round it to the body's precision, and would need the
body on the disk twice.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from minirlhf.checkpoints import ADAPTER
from minirlhf.errors import CheckpointError, UserError, require_installed, said_shortly
from minirlhf.language.models import check_weights, empty_scalar, score_offset, share
from minirlhf.settings import Count, Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoraConfig(Settings, option="lora"):
    """Train adapters (LoRA) in place of all weights. There is no dropout, as in every step here."""

    rank: Count | None = None
    """Rank of the adapters, such as 16; None trains all weights."""
    alpha: Count | None = None
    """What an adapter adds is scaled by alpha / rank; default: 2 x rank."""
    targets: str = ALL_LINEAR
    """The matrices that get an adapter: all-linear (all but the head), or names such as q_proj,v_proj."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is None:
            for name, usual in (("alpha", None), ("targets", ALL_LINEAR)):
                self.require(getattr(self, name) == usual, name, "has no effect without --lora.rank")


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter of peft, and not a whole model."""
    return (Path(folder) / ADAPTER).is_file()


def add_lora(model: PreTrainedModel, config: LoraConfig, seed: int, base: str) -> PreTrainedModel:
    """Freeze a model and add an adapter, which at first changes nothing (its second factor is 0).

    Args:
        model: a causal model, or one with a scalar head, which is trained too. Its modules are changed in place: give
            `share(body)` to keep the body as it is.
        config: rank, alpha, targets.
        seed: random seed for the adapter's first factor.
        base: the body's folder or hub name, which peft's own loaders read from adapter_config.json.

    Raises:
        UserError: peft is not installed, no matrix has such a name, or it is a tied embedding's.
    """
    require_installed("peft", "lora")
    import peft

    assert config.rank is not None
    _refuse_tied(model, config.targets)
    scalar = getattr(model, "score", None) is not None
    settings = peft.LoraConfig(
        task_type="SEQ_CLS" if scalar else "CAUSAL_LM",
        r=config.rank,
        lora_alpha=2 * config.rank if config.alpha is None else config.alpha,
        lora_dropout=0.0,
        target_modules=ALL_LINEAR if config.targets == ALL_LINEAR else config.targets.split(","),
    )
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapted = peft.get_peft_model(model.requires_grad_(False), settings)
        except ValueError as error:
            said = f"{config.targets}: in {type(model).__name__}: {' '.join(str(error).split())}"
            raise UserError(f"--lora.targets {said}") from None
    settings.base_model_name_or_path = base  # peft has put the name that the model has in memory
    return adapted.eval()


def _refuse_tied(model: PreTrainedModel, targets: str) -> None:
    """Embedding and head may be one matrix. An adapter would change it in one place, and merged into it in both."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if ends[1] is None or ends[0].weight is not ends[1].weight:
        return
    for name, module in model.named_modules():
        if module in ends and any(f".{name}".endswith(f".{target}") for target in targets.split(",")):
            raise UserError(
                f"--lora.targets {targets}: {name} is tied: embedding and head are one matrix of this model, so an "
                "adapter on it can't be merged or exported; leave it out, or give all-linear"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without peft's notes on what it does right by itself (GPT-2's transposed matrices), and on its own code."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        yield


def lora_scalar_from(model: PreTrainedModel, config: LoraConfig, seed: int, base: str) -> PreTrainedModel:
    """A model with a scalar head that shares a causal model's body: the start of a reward model.

    Args:
        model: a frozen causal model, with or without an adapter; it is not changed. The new adapter starts as a copy
            of its own.
        config: rank, alpha, targets: those of the model's adapter.
        seed: random seed for the head, and for the adapter if the model has none.
        base: see `add_lora`.

    Raises:
        CheckpointError: transformers has no sequence classifier of its type.
        UserError: see `add_lora`.
    """
    causal: Any = share(model)
    own = {key: value for key, value in causal.state_dict().items() if "lora_" in key}
    scalar = add_lora(_scalar_on(causal.unload() if own else causal, seed), config, seed, base)
    fresh = {key: value for key, value in scalar.state_dict().items() if "lora_" in key}
    if own:
        # Both name the body's layers alike; what only the causal model has is an adapter of its head.
        assert fresh.keys() <= own.keys()
        scalar.load_state_dict({key: own[key] for key in fresh}, strict=False)
    return scalar


def _scalar_on(causal: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A scalar model on the body of a causal model itself, not on a copy; its head is float32."""
    scalar = empty_scalar(causal)
    setattr(scalar, scalar.base_model_prefix, causal.base_model)
    width = scalar.score.in_features
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scalar.score = nn.Linear(width, 1, bias=False, dtype=torch.float32)
        nn.init.normal_(scalar.score.weight, std=(width + 1) ** -0.5)
    scalar.score.to(causal.device)
    scalar.config.score_offset = 0.0
    return scalar.eval()


def load_adapter(folder: Path, body: PreTrainedModel) -> PreTrainedModel:
    """Load an adapter that peft saved, on a body that is in memory already and is shared.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors; of a causal or a scalar model.
        body: the causal model that it was trained on, frozen; it is not changed.

    Returns:
        A model in eval mode whose adapter (and scalar head) can be trained.

    Raises:
        CheckpointError: the adapter is damaged, or does not fit the body.
    """
    require_installed("peft", "lora")
    import peft

    check_weights(folder)
    try:
        scalar = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))["task_type"] == "SEQ_CLS"
        with _quiet(), torch.random.fork_rng(devices=[]):
            inner = _scalar_on(share(body), 0) if scalar else share(body)
            model = peft.PeftModel.from_pretrained(inner, folder, is_trainable=True)
        if scalar:
            model.config.score_offset = score_offset(folder)
    except (MemoryError, UserError):
        raise
    except Exception as error:  # what is in the files decides what is raised: peft promises nothing
        raise CheckpointError(f"{folder}: the adapter can't be loaded ({said_shortly(error)})") from error
    return model.eval()
