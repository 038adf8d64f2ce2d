"""Wrong answers of lesson 05; test_museum.py says how to read them."""

import torch

from minirlhf.kl import exact_kl


def clipped_loss(logprobs, old_logprobs, advantages, clip_range):
    advantages = advantages.detach()
    ratio = torch.exp(logprobs - old_logprobs.detach())
    clipped = torch.clamp(ratio, 1 - clip_range, 1 + clip_range)
    return -torch.min(ratio * advantages, clipped * advantages).mean()


def approx_kl(logprobs, old_logprobs):
    r = logprobs - old_logprobs.detach()
    return torch.expm1(r) - r


def if_where_elif_was_meant(logprobs, old_logprobs, kind="k3"):
    r = logprobs - old_logprobs.detach()
    if kind == "k3":
        kl = torch.expm1(r) - r
    if kind == "k2":  # noqa: SIM108
        kl = r.square() / 2
    else:
        kl = -r
    return kl


def never_stops(matvec, b, iterations):
    x, r = torch.zeros_like(b), b.clone()
    p = r.clone()
    for _ in range(iterations):
        Ap = matvec(p)
        alpha = r.dot(r) / p.dot(Ap)
        x = x + alpha * p
        new_r = r - alpha * Ap
        p = new_r + new_r.dot(new_r) / r.dot(r) * p
        r = new_r
    return x


def fisher_vector_product(policy, theta, vector):
    theta = theta.clone().requires_grad_()
    kl = exact_kl(policy(theta).detach(), policy(theta)).mean()
    (g,) = torch.autograd.grad(kl, theta, create_graph=True)
    return torch.autograd.grad((g * vector).sum(), theta)[0]


def clipped_value_loss(values, old_values, returns, clip_range):
    old, R = old_values.detach(), returns.detach()
    near = torch.max(torch.min(values, old + clip_range), old - clip_range)
    return 0.5 * torch.maximum((values - R) ** 2, (near - R) ** 2).mean()


WRONG = {
    "importance_ratio": [
        (3, "The ratio is always 1", lambda logprobs, old_logprobs: torch.exp(logprobs - logprobs.detach())),
    ],
    "clipped_loss": [
        (3, "The ratio is always 1, so the clip never acts", clipped_loss, ("- old_logprobs", "- logprobs")),
        (4, "It takes the max where PPO takes the min", clipped_loss, ("torch.min", "torch.max")),
        (4, "It takes the max where PPO takes the min", clipped_loss,
         ("-torch.min(ratio * advantages, clipped", "torch.min(-ratio * advantages, -clipped")),
        (5, "The min is taken before multiplying by A", clipped_loss,
         ("torch.min(ratio * advantages, clipped * advantages)", "(torch.min(ratio, clipped) * advantages)")),
        (6, "The minus sign is missing", clipped_loss, ("return -", "return ")),
    ],
    "approx_kl": [
        (2, "The KL is detached from the graph", approx_kl, ("def", "@torch.no_grad()\ndef")),
        (13, "The digits cancel", approx_kl, ("torch.expm1(r)", "(torch.exp(r) - 1)")),
        (14, "This is k1 = -rho", if_where_elif_was_meant),
        ("-", "It is reversed", approx_kl, ("logprobs - old_logprobs.detach()", "old_logprobs.detach() - logprobs")),
    ],
    "conjugate_gradient": [
        ("-", "After it has converged, r is 0 and it divides 0 by 0: stop when r . r is tiny", never_stops),
    ],
    "fisher_vector_product": [
        ("-", "Everything came out 0. Either the policy that stays is not detached", fisher_vector_product,
         (".detach()", "")),
    ],
    "clipped_value_loss": [
        ("-", "It takes the min: take the larger of the two errors", clipped_value_loss,
         ("torch.maximum", "torch.minimum")),
    ],
}  # fmt: skip
