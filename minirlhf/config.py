"""Every setting of a run: the trainers' configurations and two presets."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from minirlhf.data import DataErrors
from minirlhf.errors import UserError
from minirlhf.language.evaluation import EvaluationConfig
from minirlhf.language.models import ModelConfig
from minirlhf.language.pretraining import PretrainingConfig
from minirlhf.language.reward_model import RewardModelConfig
from minirlhf.language.rlhf import RLHFConfig
from minirlhf.language.sft import SFTConfig
from minirlhf.settings import NotNegative, Seed, Settings, whole

PresetName = Literal["fast", "default"]
UNSAVED = ("save_seconds", "tensorboard", "shard", "allow_shared_rows")
"""Settings that affect no weight: a run may resume with other values, so config.json does not store them."""


@dataclass(frozen=True)
class RunConfig(Settings, option=""):
    """The whole pipeline: base model, SFT, reward model, PPO, PPO-ptx, evaluation and report."""

    data: Path | None = None
    """Folder of JSON lines or parquet, a file of comparisons, or hub:OWNER/NAME; default: the small world."""
    data_errors: DataErrors = "stop"
    """What to do about a row that is malformed, too long or teaches nothing: stop, or skip and count it."""
    comparisons: tuple[Path, ...] = ()
    """Files of more rankings to train the reward model on, beside those in the data folder (see minirlhf label)."""
    previous: Annotated[Path | None, tyro.conf.Suppress] = None
    """Set by minirlhf round: the run whose base and SFT models are kept and whose policies PPO goes on from."""
    out: Path = Path("runs/default")
    """Folder of the run; the same command resumes a run that was stopped."""
    model: str | None = None
    """A pretrained causal model (folder or hub name) in place of the base-model step."""
    seed: Seed = 0
    """Random seed for weights, data order and sampling."""
    preset: PresetName = "default"
    """fast: half a minute, to check that it works; default: a few minutes, for real results."""
    context_length: Annotated[int, whole(2)] | None = None
    """Longest sequence in tokens; default: as long as the data needs or the pretrained model allows."""
    device: str = "auto"
    """cpu, cuda, or auto (cuda if available)."""
    save_seconds: NotNegative = 10.0
    """Seconds between saves of the training state."""
    shard: bool = False
    """With several processes (torchrun), split every model that is trained over them (FSDP2)."""
    tensorboard: bool = False
    """Also write TensorBoard events; needs the extra `tensorboard`."""
    allow_shared_rows: bool = False
    """Train although more than 5 % of the held-out rows are in the training files too."""
    side_by_side: bool = True
    """On a CPU with at least two threads, train PPO and PPO-ptx at the same time, with half of the threads each."""
    model_size: ModelConfig = field(default_factory=ModelConfig)
    """Size of the base model that is trained from scratch."""
    base: PretrainingConfig = field(default_factory=PretrainingConfig)
    """Pretraining of the base model."""
    sft: SFTConfig = field(default_factory=SFTConfig)
    """Step 1: supervised fine-tuning."""
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    """Step 2: the reward model."""
    rlhf: RLHFConfig = field(default_factory=lambda: RLHFConfig(ptx_coef=0.05))
    """Step 3: PPO. Trains one policy with ptx_coef 0 (PPO) and one with the ptx_coef given here (PPO-ptx)."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Measurements at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is not None:
            self._check_unused()

    def _check_unused(self) -> None:
        """A pretrained model is not trained from scratch: all of model_size and most of base have no effect."""
        usual = preset(self.preset)
        for group in ("model_size", "base"):
            for one in fields(getattr(self, group)):
                given = getattr(getattr(self, group), one.name)
                if one.name != "block_length" and given != getattr(getattr(usual, group), one.name):
                    option = f"--{group}.{one.name}".replace("_", "-")
                    raise UserError(f"{option} {given}: not used together with --model {self.model}; leave one out")


def config_from_dict(settings: dict[str, Any], out: Path) -> RunConfig:
    """The settings of a run as its config.json holds them: all but `out` and `UNSAVED`."""

    def filled(config: Any, values: dict[str, Any]) -> Any:
        changes: dict[str, Any] = {}
        for one in fields(config):
            if one.name in values:
                old, new = getattr(config, one.name), values[one.name]
                changes[one.name] = filled(old, new) if is_dataclass(old) else new
        return replace(config, **changes)

    config: RunConfig = filled(RunConfig(), settings)
    data, previous = (Path(path) if path is not None else None for path in (config.data, config.previous))
    return replace(config, out=out, data=data, previous=previous, comparisons=tuple(map(Path, config.comparisons)))


def preset(name: PresetName) -> RunConfig:
    """The settings of a preset.

    Example:
        >>> preset("fast").base.steps < preset("default").base.steps
        True
    """
    config = RunConfig(preset=name)
    if name == "default":
        return config
    return replace(
        config,
        out=Path("runs/fast"),
        model_size=ModelConfig(hidden_size=32, layers=1, heads=2, intermediate_size=64, vocab_size=512),
        base=PretrainingConfig(steps=40, batch_size=32, block_length=32),
        sft=SFTConfig(epochs=0.5),
        reward_model=RewardModelConfig(epochs=0.1),
        rlhf=RLHFConfig(steps=6, batch_size=32, minibatch_size=16, ptx_coef=0.3, ptx_batch_size=4),
        evaluation=EvaluationConfig(prompts=64, corpus_blocks=32, examples=6),
    )
