"""Solutions of lesson 00: each function stands for the stub of its name."""


def my_masked_mean(x, mask):
    return x[mask].mean()  # x[mask] holds just what counts, so there is no NaN to multiply by 0
