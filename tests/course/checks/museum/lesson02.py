"""Wrong answers of lesson 02; test_museum.py says how to read them."""

from minirlhf.returns import gae


def baseline_advantages(rewards, values, ends, gamma):
    return gae(rewards, 0 * rewards, ends, gamma=gamma, lam=1.0)[0] - values.detach()


def baseline_losses(logprobs, values, returns):
    returns = returns.detach()
    advantages = (returns - values).detach()
    return -(advantages * logprobs).mean(), ((returns - values) ** 2).mean() / 2


def towards_whitened_advantages(logprobs, values, returns):
    advantages = (returns - values).detach()
    white = (advantages - advantages.mean()) / (advantages.var(correction=0) + 1e-8).sqrt()
    return -(advantages * logprobs).mean(), ((white + values.detach() - values) ** 2).mean() / 2


WRONG = {
    "baseline_advantages": [
        (7, "This is r - V", lambda rewards, values, ends, gamma: (rewards - values).detach()),
        ("-", "The gradient leaks into the baseline", baseline_advantages, (".detach()", "")),
    ],
    "baseline_losses": [
        ("-", "The policy's loss leaks a gradient into the baseline", baseline_losses,
         ("(returns - values).detach()", "returns - values")),
        ("-", "The baseline is trained on whitened returns", baseline_losses,
         ("((returns - values) **", "(((returns - returns.mean()) / (returns.std(correction=0) + 1e-8) - values) **")),
        (1, "The baseline is trained on whitened advantages plus V", towards_whitened_advantages),
        (6, "The minus sign of the policy's loss is missing", baseline_losses, ("return -", "return ")),
    ],
}  # fmt: skip
