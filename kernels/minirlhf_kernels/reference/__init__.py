"""What each operation means, in plain PyTorch: float32 or float64, any device, no other dependency."""

from minirlhf_kernels.reference.gae import gae
from minirlhf_kernels.reference.linear import linear_token_logprobs
from minirlhf_kernels.reference.logprobs import IGNORED_TOKEN, token_logprobs
from minirlhf_kernels.reference.ppo import ppo_loss

__all__ = ["IGNORED_TOKEN", "gae", "linear_token_logprobs", "ppo_loss", "token_logprobs"]
