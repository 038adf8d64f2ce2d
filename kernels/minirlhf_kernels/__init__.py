"""The four hot paths of reinforcement learning from human feedback, usable on their own with torch alone.

- `token_logprobs`         logits and tokens to log-probabilities (and the entropy of each row)
- `linear_token_logprobs`  the same from hidden states and the head's weight, never holding all logits
- `ppo_loss`               clipped policy loss, value loss, entropy, KL and every metric
- `linear_ppo_loss`        the two above in one: the logits are made once, because the loss is known in forward
- `gae`                    generalised advantage estimation

`minirlhf_kernels.reference` defines each of them in plain PyTorch; `minirlhf_kernels.fused` is its twin in Triton,
which runs for tensors on a GPU. `MINIRLHF_KERNELS=reference|triton` forces one (see `dispatch`).
"""

from minirlhf_kernels.dispatch import (
    gae,
    gae_with_moments,
    linear_ppo_loss,
    linear_token_logprobs,
    ppo_loss,
    token_logprobs,
)
from minirlhf_kernels.reference import IGNORED_TOKEN

__all__ = [
    "IGNORED_TOKEN",
    "gae",
    "gae_with_moments",
    "linear_ppo_loss",
    "linear_token_logprobs",
    "ppo_loss",
    "token_logprobs",
]
