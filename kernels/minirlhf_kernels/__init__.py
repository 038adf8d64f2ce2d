"""The four hot paths of reinforcement learning from human feedback, usable on their own with torch alone.

- `token_logprobs`         logits and tokens to log-probabilities (and the entropy of each row)
- `linear_token_logprobs`  the same from hidden states and the head's weight; on a GPU it never holds all logits
- `ppo_loss`               clipped policy loss, value loss, entropy, KL and every metric
- `gae`                    generalised advantage estimation

`minirlhf_kernels.reference` defines each of them in plain PyTorch; `minirlhf_kernels.fused` is the Triton version,
which runs for tensors on an NVIDIA GPU. `MINIRLHF_KERNELS=reference|triton` forces one (see `dispatch`).
"""

from minirlhf_kernels.dispatch import gae, linear_token_logprobs, ppo_loss, token_logprobs
from minirlhf_kernels.reference import IGNORED_TOKEN

__all__ = ["IGNORED_TOKEN", "gae", "linear_token_logprobs", "ppo_loss", "token_logprobs"]
