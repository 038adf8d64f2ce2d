"""minirlhf: from REINFORCE to InstructGPT, in notebooks and in one small package.

Modules load on first access, so ``import minirlhf`` is fast and ``minirlhf.losses.ppo_loss`` works right after it.
The mathematics (`losses`, `returns`, `kl`) needs only torch; extras install what the other modules need:
``pip install "minirlhf[language]"``, ``[control]``, ``[run]``, ``[course]`` or ``[all]``.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from types import ModuleType

__version__ = "0.2.0"

PROCESSORS = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
"""Those that this process may use, as `taskset` or a scheduler left them: torch may bind its first thread to one."""

MODULES = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "__main__")


def __getattr__(name: str) -> ModuleType:
    if name in MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return ["__version__", *MODULES]
