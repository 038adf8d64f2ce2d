"""Wrong answers of lesson 00; test_museum.py says how to read them."""

import torch

WRONG = {
    "masked_mean": [
        (9, "The sum is right, the count is not", lambda x, mask: (x.nan_to_num() * mask).sum() / x.numel()),
        (17, "It averages over everything", lambda x, mask: x[torch.ones_like(mask)].mean()),
    ],
}  # fmt: skip
