"""Solutions of lesson 05: each function stands for the stub of its name."""

import torch

from minirlhf.kl import exact_kl


def my_importance_ratio(logprobs, old_logprobs):
    return (logprobs - old_logprobs.detach()).exp()


def my_conjugate_gradient(matvec, b, iterations):
    x = torch.zeros_like(b)
    r, p = b.clone(), b.clone()
    rr = r @ r
    for _ in range(iterations):
        if rr < 1e-20:
            break
        fp = matvec(p)
        alpha = rr / (p @ fp)
        x = x + alpha * p
        r = r - alpha * fp
        rr, old_rr = r @ r, rr
        p = r + rr / old_rr * p
    return x


def my_fisher_vector_product(policy, theta, vector):
    theta = theta.detach().clone().requires_grad_()
    logits = policy(theta)
    kl = exact_kl(logits.detach(), logits).mean()
    (gradient,) = torch.autograd.grad(kl, theta, create_graph=True)
    return torch.autograd.grad(gradient @ vector, theta)[0]


conjugate_gradient, fisher_vector_product = my_conjugate_gradient, my_fisher_vector_product


def my_trpo_step(policy, surrogate, theta, max_kl, damping):
    def curved(v):
        return fisher_vector_product(policy, theta, v) + damping * v

    leaf = theta.clone().requires_grad_()
    old_L = surrogate(leaf)
    (g,) = torch.autograd.grad(old_L, leaf)
    x = conjugate_gradient(curved, g, 10)
    step = (2 * max_kl / (x @ curved(x))).sqrt() * x
    for k in range(11):
        new = theta + 0.5**k * step
        kl = exact_kl(policy(theta), policy(new)).mean()
        if surrogate(new) > old_L and kl <= max_kl:
            return new
    return theta


def my_clipped_loss(logprobs, old_logprobs, advantages, clip_range):
    ratio = (logprobs - old_logprobs.detach()).exp()
    advantages = advantages.detach()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages).mean()


def my_approx_kl(logprobs, old_logprobs):
    log_ratio = logprobs - old_logprobs.detach()
    return torch.expm1(log_ratio) - log_ratio


def my_clipped_value_loss(values, old_values, returns, clip_range):
    old, returns = old_values.detach(), returns.detach()
    near = old + (values - old).clamp(-clip_range, clip_range)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square()).mean()
