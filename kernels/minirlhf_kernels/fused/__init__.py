"""The Triton version: each operation of `minirlhf_kernels.reference` in as few passes over memory as it needs."""

from minirlhf_kernels.fused.gae import gae
from minirlhf_kernels.fused.linear import linear_token_logprobs
from minirlhf_kernels.fused.logprobs import token_logprobs
from minirlhf_kernels.fused.ppo import ppo_loss

__all__ = ["gae", "linear_token_logprobs", "ppo_loss", "token_logprobs"]
