"""Settings: frozen dataclasses whose field types say which values are allowed.

    @dataclass(frozen=True)
    class SFTConfig(Settings, option="sft"):
        epochs: Positive = 1.0
        batch_size: Count = 16

A value outside its range is rejected when the settings are created, before any training starts. None is accepted where
a field may be None.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, get_args, get_type_hints

from minirlhf.errors import UserError


class Range(NamedTuple):
    """The allowed values of a setting, in words and as a test; NaN fails every test."""

    wanted: str
    fits: Callable[[Any], bool]


def whole(least: int) -> Range:
    """The range of whole numbers from ``least`` up."""
    return Range(f"a whole number, {least} or more", lambda x: isinstance(x, int) and x >= least)


Count = Annotated[int, whole(1)]
CountOrZero = Annotated[int, whole(0)]
Seed = Annotated[
    int, Range("a whole number, 0 or more and below 2**63", lambda x: isinstance(x, int) and 0 <= x < 2**63)
]
Positive = Annotated[float, Range("a number above 0", lambda x: 0 < x < math.inf)]
PositiveOrInf = Annotated[float, Range("a number above 0, or inf", lambda x: x > 0)]
Temperature = Annotated[float, Range("a number, 0.01 or more", lambda x: 0.01 <= x < math.inf)]
"""Below, logits overflow and every draw is the most likely token: that is greedy decoding, and has its own name."""
NotNegative = Annotated[float, Range("a number, 0 or more", lambda x: 0 <= x < math.inf)]
Fraction = Annotated[float, Range("a number from 0 to 1", lambda x: 0 <= x <= 1)]


class Settings:
    """Base class of all settings: it checks every field against the range in its type.

    ``option`` in a subclass's header is its prefix on the command line: "rlhf" for ``--rlhf.beta``, "" for the top
    level. Settings without it are named by their class in messages.

    Example:
        >>> @dataclass(frozen=True)
        ... class Clip(Settings, option="rlhf"):
        ...     clip_range: Positive = 0.2
        >>> Clip(clip_range=0.0)
        Traceback (most recent call last):
        minirlhf.errors.UserError: --rlhf.clip-range 0.0: must be a number above 0
    """

    option: ClassVar[str | None] = None

    def __init_subclass__(cls, option: str | None = None) -> None:
        if option is not None:
            cls.option = option

    def __post_init__(self) -> None:
        for name, (wanted, fits) in _ranges(type(self)).items():
            value = getattr(self, name)
            if value is None:
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            self.require(number and fits(value), name, f"must be {wanted}")

    def require(self, fits: bool, name: str, message: str) -> None:
        """Reject the setting ``name`` unless ``fits`` is true.

        Raises:
            UserError: names the option, its value, and what it must be.
        """
        if not fits:
            place = f"{type(self).__name__}.{name}"
            if self.option is not None:
                place = "--" + f"{self.option}.{name}".removeprefix(".").replace("_", "-")
            raise UserError(f"{place} {getattr(self, name)}: {message}")


def _ranges(cls: type) -> dict[str, Range]:
    """The range of each field that has one in ``Annotated``, with or without ``| None``."""
    found = {}
    for name, hint in get_type_hints(cls, include_extras=True).items():
        for part in (hint, *get_args(hint)):
            for extra in getattr(part, "__metadata__", ()):
                if isinstance(extra, Range):
                    found[name] = extra
    return found


@dataclass(frozen=True, kw_only=True)
class PPOSettings(Settings):
    """The settings of PPO, for control tasks and for text."""

    epochs: Count
    """K, passes over each batch."""
    minibatch_size: Count
    """M, maximum rows per minibatch; an epoch is split into equal parts."""
    lr: NotNegative
    """Peak learning rate of the policy."""
    gamma: Fraction
    """Discount factor per step."""
    lam: Fraction = 0.95
    """GAE's lambda."""
    clip_range: Positive | None = 0.2
    """Ratios are clipped to 1 ± this; None disables clipping."""
    value_clip_range: Positive | None = None
    """Values are clipped to the old values ± this; None disables it."""
    entropy_coef: NotNegative = 0.0
    """Weight of the entropy bonus."""
    whiten_advantages: bool = True
    """Scale advantages to mean 0 and variance 1."""
    beta: NotNegative = 0.0
    """KL coefficient."""
    target_kl: Positive | None = None
    """Adapt beta to keep the KL near this; None keeps beta fixed."""
    max_grad_norm: PositiveOrInf
    """Gradients are clipped to this norm; inf disables it (the norm is still reported)."""
    adam_eps: Positive = 1e-5
    """Adam's epsilon."""
