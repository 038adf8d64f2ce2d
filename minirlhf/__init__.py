"""minirlhf: from REINFORCE to InstructGPT, in notebooks and in one small package.

Everything is imported from its own module, for example ``from minirlhf.language.rlhf import train_rlhf``;
transformers, gymnasium and matplotlib load when they are first needed, so ``import minirlhf`` is quick.
"""

__version__ = "0.1.0"
