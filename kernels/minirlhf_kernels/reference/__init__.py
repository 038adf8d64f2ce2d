"""What each operation means, in plain PyTorch: float32 or float64, any device, no other dependency."""

from minirlhf_kernels.reference.gae import gae, gae_with_moments
from minirlhf_kernels.reference.linear import linear_token_logprobs
from minirlhf_kernels.reference.linear_ppo import linear_ppo_loss
from minirlhf_kernels.reference.logprobs import IGNORED_TOKEN, token_logprobs
from minirlhf_kernels.reference.ppo import ppo_loss

__all__ = [
    "IGNORED_TOKEN",
    "gae",
    "gae_with_moments",
    "linear_ppo_loss",
    "linear_token_logprobs",
    "ppo_loss",
    "token_logprobs",
]
