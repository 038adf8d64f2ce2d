"""Every setting of a run: the trainers' configurations and three presets."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import tyro

from minirlhf.data import DataErrors
from minirlhf.errors import UserError
from minirlhf.language.adapters import LoraConfig
from minirlhf.language.dpo import DPOConfig
from minirlhf.language.evaluation import EvaluationConfig
from minirlhf.language.grpo import GRPOConfig, RLOOConfig
from minirlhf.language.models import ModelConfig
from minirlhf.language.pretraining import PretrainingConfig
from minirlhf.language.reward_model import RewardModelConfig
from minirlhf.language.rlhf import RLHFConfig
from minirlhf.language.sft import SFTConfig
from minirlhf.settings import NotNegative, Seed, Settings, whole

PresetName = Literal["fast", "default", "pretrained"]
Method = Literal["ppo", "ppo_ptx", "rloo", "grpo", "dpo"]
METHODS: tuple[Method, ...] = get_args(Method)
SETTINGS = {"ppo": "rlhf", "ppo_ptx": "rlhf", "rloo": "rloo", "grpo": "grpo", "dpo": "dpo"}
"""The field of `RunConfig` with the settings of each method."""
UNSAVED = ("save_seconds", "tensorboard", "shard", "allow_shared_rows", "allow_oversize")
"""Settings that affect no weight: a run may resume with other values, so config.json does not store them."""
COMMANDED = ("reward",)
"""What runs the user's code: config.json only says what it was, so that no folder of a run can name code to run."""


def users(group: str, name: str) -> tuple[Method, ...]:
    """The methods that use a setting of a group of `SETTINGS`.

    Example:
        >>> users("rlhf", "beta"), users("rlhf", "ptx_coef")
        (('ppo', 'ppo_ptx'), ('ppo_ptx',))
    """
    if group == "rlhf" and name in ("ptx_coef", "ptx_batch_size"):
        return ("ppo_ptx",)
    return tuple(method for method in METHODS if SETTINGS[method] == group)


@dataclass(frozen=True)
class RunConfig(Settings, option=""):
    """The whole pipeline: base model, SFT, reward model, one policy for each method, evaluation and report."""

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
    """A pretrained causal model (folder or hub name) in place of the base-model step; see --preset pretrained."""
    given_sft: Annotated[str | None, tyro.conf.arg(name="sft")] = None
    """An SFT model (folder or hub name) in place of step 1; without --model it is the base model too."""
    given_reward_model: Annotated[str | None, tyro.conf.arg(name="reward-model")] = None
    """A reward model (folder or hub name of a sequence classifier with one label) in place of step 2."""
    reward: str | None = None
    """FILE.py:FUNCTION in place of step 2; called with lists of prompts and responses, returns one score each."""
    method: tuple[Method, ...] = ("ppo", "ppo_ptx")
    """Step 3: how to train policies from the SFT model, one for each method named (see docs/methods.md)."""
    seed: Seed = 0
    """Random seed for weights, data order and sampling."""
    preset: PresetName = "default"
    """fast: half a minute, to check that it works; default: a few minutes, for real results; pretrained: for --model,
    with learning rates, batches and precision as the field uses them (docs/pretrained.md)."""
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
    allow_oversize: bool = False
    """Start although the run would take more memory than is free, by the estimate made before training."""
    side_by_side: bool = True
    """On a CPU with at least two threads, train the methods two at a time, with half of the threads each."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the models compute in. Weights that are trained are float32 in either case."""
    gradient_checkpointing: bool = False
    """Keep only the input of each layer for backward and compute the rest again: less memory, more time."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters of low rank in place of full fine-tuning."""
    model_size: ModelConfig = field(default_factory=ModelConfig)
    """Size of the base model that is trained from scratch."""
    base: PretrainingConfig = field(default_factory=PretrainingConfig)
    """Pretraining of the base model."""
    sft: SFTConfig = field(default_factory=SFTConfig)
    """Step 1: supervised fine-tuning."""
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    """Step 2: the reward model."""
    rlhf: RLHFConfig = field(default_factory=lambda: RLHFConfig(ptx_coef=0.05))
    """Step 3: PPO. Trains one policy with ptx_coef 0 (ppo) and one with the ptx_coef given here (ppo_ptx)."""
    rloo: RLOOConfig = field(default_factory=RLOOConfig)
    """Step 3: RLOO (--method rloo)."""
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    """Step 3: GRPO (--method grpo)."""
    dpo: DPOConfig = field(default_factory=lambda: DPOConfig(epochs=0.75))
    """Step 3: DPO (--method dpo), on the comparisons that the reward model learns from: on as many of the small world's
    as PPO has time for."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Measurements at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_method()
        if self.given_reward_model is not None and self.reward is not None:
            raise UserError("--reward-model and --reward both take the place of step 2; leave one out")
        if self.lora.rank is not None and self.pretrained is None and self.previous is None:
            raise UserError("--lora.rank needs a pretrained model to adapt: give --model or --sft")
        if self.shard and self.lora.rank is not None:
            raise UserError("--shard: not with --lora.rank, whose body is whole in every process; leave one out")
        self._check_unused()

    def _check_method(self) -> None:
        if not self.method or not set(self.method) <= set(METHODS):
            raise UserError(f"--method {' '.join(self.method)}: name one or more of {', '.join(METHODS)}")
        if self.reward is not None and set(self.method) == {"dpo"}:
            raise UserError(
                f"--reward {self.reward}: DPO learns from the comparisons and calls no reward; leave it out, or name "
                "another method too"
            )

    def check_unused_methods(self) -> None:
        """Refuse the settings of methods that aren't trained: they would have no effect.

        Raises:
            UserError: names the option.
        """
        usual = preset(self.preset, lora=self.lora.rank is not None)
        for group in dict.fromkeys(SETTINGS.values()):
            for one in fields(getattr(self, group)):
                given, needed = getattr(getattr(self, group), one.name), users(group, one.name)
                if given != getattr(getattr(usual, group), one.name) and not set(needed) & set(self.method):
                    option = f"--{group}.{one.name}".replace("_", "-")
                    raise UserError(f"{option} {given}: not used without --method {' or '.join(needed)}")

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods in the order in which they are trained, each once."""
        return tuple(method for method in METHODS if method in self.method)

    @property
    def pretrained(self) -> str | None:
        """The model that takes the place of the base-model step, if one does."""
        return self.model if self.model is not None else self.given_sft

    @property
    def frozen_dtype(self) -> torch.dtype:
        """Of weights that are not trained: the body under adapters, the reference, the reward model in step 3."""
        return getattr(torch, self.precision)

    @property
    def body_dtype(self) -> torch.dtype:
        """Of the base model's weights: frozen under adapters, else trained and so float32."""
        return torch.float32 if self.lora.rank is None else self.frozen_dtype

    def _check_unused(self) -> None:
        """What is given is not trained: the settings of its step (and of a base model from scratch) have no effect."""
        body = ("--model", self.model) if self.model is not None else ("--sft", self.given_sft)
        reward = ("--reward", self.reward) if self.reward is not None else ("--reward-model", self.given_reward_model)
        replaced = {"model_size": body, "base": body, "sft": ("--sft", self.given_sft), "reward_model": reward}
        for group, (by, name) in replaced.items():
            if name is None:
                continue
            usual = getattr(preset(self.preset, lora=self.lora.rank is not None), group)
            for one in fields(usual):
                given = getattr(getattr(self, group), one.name)
                if one.name != "block_length" and given != getattr(usual, one.name):
                    option = f"--{group}.{one.name}".replace("_", "-")
                    raise UserError(f"{option} {given}: not used together with {by} {name}; leave one out")


def config_from_dict(settings: dict[str, Any], out: Path) -> RunConfig:
    """The settings of a run as its config.json holds them: all but `out`, `UNSAVED` and `COMMANDED`."""

    def filled(config: Any, values: dict[str, Any]) -> Any:
        changes: dict[str, Any] = {}
        for one in fields(config):
            if one.name in values and one.name not in COMMANDED:
                old, new = getattr(config, one.name), values[one.name]
                changes[one.name] = filled(old, new) if is_dataclass(old) else new
        return replace(config, **changes)

    config: RunConfig = filled(RunConfig(), settings)
    data, previous = (Path(path) if path is not None else None for path in (config.data, config.previous))
    method, comparisons = tuple(config.method), tuple(map(Path, config.comparisons))
    return replace(config, out=out, data=data, previous=previous, method=method, comparisons=comparisons)


def preset(name: PresetName, *, lora: bool = False) -> RunConfig:
    """The settings of a preset; those of "pretrained" depend on whether adapters are trained.

    Example:
        >>> preset("fast").base.steps < preset("default").base.steps
        True
    """
    config = RunConfig(preset=name)
    if name == "default":
        return config
    if name == "pretrained":
        return _pretrained(config, 10.0 if lora else 1.0)
    return replace(
        config,
        out=Path("runs/fast"),
        model_size=ModelConfig(hidden_size=32, layers=1, heads=2, intermediate_size=64, vocab_size=512),
        base=PretrainingConfig(steps=40, batch_size=32, block_length=32),
        sft=SFTConfig(epochs=0.5),
        reward_model=RewardModelConfig(epochs=0.1),
        rlhf=RLHFConfig(steps=6, batch_size=32, minibatch_size=16, ptx_coef=0.3, ptx_batch_size=4),
        rloo=RLOOConfig(steps=6, batch_size=32, minibatch_size=16),
        grpo=GRPOConfig(steps=6, batch_size=32, minibatch_size=16),
        dpo=DPOConfig(epochs=0.05),
        evaluation=EvaluationConfig(prompts=64, corpus_blocks=32, examples=6),
    )


def _pretrained(config: RunConfig, faster: float) -> RunConfig:
    """Settings of the order that the field uses for real models; docs/pretrained.md names the sources.

    Args:
        config: the defaults.
        faster: adapters are trained with ten times the learning rate of full fine-tuning (Schulman et al. 2025).
    """
    sampled: Any = {"steps": 200, "batch_size": 256, "warmup": 10, "max_response_tokens": 256, "cache_tokens": 32_768}
    return replace(
        config,
        out=Path("runs/pretrained"),
        save_seconds=600.0,  # a state holds three numbers for each trained weight
        side_by_side=False,  # it would double the memory
        precision="bfloat16",
        gradient_checkpointing=True,
        base=PretrainingConfig(block_length=512),
        sft=SFTConfig(batch_size=32, lr=1e-5 * faster, warmup=10, weight_decay=0.0),
        reward_model=RewardModelConfig(batch_size=64, lr=1e-5 * faster, weight_decay=0.0),
        rlhf=RLHFConfig(**sampled, lr=3e-6 * faster, value_lr=1e-5 * faster, beta=0.05, ptx_coef=0.05),
        rloo=RLOOConfig(**sampled, lr=1e-6 * faster, beta=0.05),
        grpo=GRPOConfig(**sampled, lr=1e-6 * faster, group_size=8),
        dpo=DPOConfig(batch_size=64, lr=5e-7 * faster, beta=0.1, max_response_tokens=256),
        evaluation=EvaluationConfig(prompts=256, max_response_tokens=256, batch_size=64, corpus_blocks=64),
    )
