"""Answers to lesson 05 in other hands; test_corpus.py says how to read them."""

import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

# 5.1 -----------------------------------------------------------------------------------------------------------------


def ratio_cleanrl(logprobs, old_logprobs):
    logratio = logprobs - old_logprobs.data
    return logratio.exp()


def ratio_of_probabilities(logprobs, old_logprobs):
    with torch.no_grad():
        before = old_logprobs.exp()
    return torch.exp(logprobs) / (before + 1e-10)


def ratio_in_float32(logprobs, old_logprobs):
    return torch.exp(logprobs.float() - old_logprobs.detach().float())


# 5.2 -----------------------------------------------------------------------------------------------------------------


def cg_spinning_up(matvec, b, iterations):
    x = torch.zeros(len(b))
    r, p = b.clone(), b.clone()
    r_dot_old = torch.dot(r, r)
    for _ in range(iterations):
        z = matvec(p)
        alpha = r_dot_old / (torch.dot(p, z) + 1e-8)
        x = x + alpha * p
        r = r - alpha * z
        r_dot_new = torch.dot(r, r)
        if r_dot_new < 1e-20:
            break
        p = r + (r_dot_new / r_dot_old) * p
        r_dot_old = r_dot_new
    return x


def cg_hands_on(matvec, b, max_iter):
    x = torch.zeros_like(b)
    r = b.clone()
    p = b.clone()
    rdotr = torch.dot(r, r)
    for _ in range(max_iter):
        Hp = matvec(p)
        alpha = rdotr / torch.dot(p, Hp)
        x += alpha * p
        r -= alpha * Hp
        new_rdotr = torch.dot(r, r)
        if new_rdotr < 1e-10:
            break
        beta = new_rdotr / rdotr
        p = r + beta * p
        rdotr = new_rdotr
    return x


def cg_with_the_residual(matvec, b, iterations):
    """r . F p in the denominator: the same number as p . F p, since directions are conjugate."""
    x, r, p = 0 * b, b.clone(), b.clone()
    for _ in range(iterations):
        if r @ r < 1e-20:
            break
        Fp = matvec(p)
        alpha = (r @ r) / (r @ Fp)
        x, new_r = x + alpha * p, r - alpha * Fp
        p = new_r - (new_r @ Fp) / (p @ Fp) * p
        r = new_r
    return x


def krylov(matvec, b, iterations):
    """The best x of the span of b, F b, F F b, ...: what conjugate gradient finds, by a direct solve."""
    basis, v = [], b.double()
    for _ in range(iterations):
        for u in basis * 2:
            v = v - (u @ v) * u
        if v.norm() < 1e-8 * b.norm():
            break
        basis.append(v / v.norm())
        v = matvec(basis[-1])
    Q = torch.stack(basis, 1)
    small = torch.stack([Q.T @ matvec(q) for q in basis], 1)
    return Q @ torch.linalg.solve(small, Q.T @ b.double())


# 5.3 -----------------------------------------------------------------------------------------------------------------


def fisher_spinning_up(policy, theta, vector):
    theta = theta.detach().requires_grad_(True)
    logits = policy(theta)
    kl = kl_divergence(Categorical(logits=logits.detach()), Categorical(logits=logits)).mean()
    g = torch.autograd.grad(kl, theta, create_graph=True)[0]
    return torch.autograd.grad(torch.dot(g, vector), theta)[0]


def fisher_by_jacobian(policy, theta, vector):
    """J^T (diag(p) - p p^T) J v, averaged over states."""
    J = torch.autograd.functional.jacobian(policy, theta)
    p = policy(theta).softmax(-1)
    z = J @ vector
    z = p * z - p * (p * z).sum(-1, keepdim=True)
    return torch.einsum("sa,sap->p", z, J) / len(p)


def fisher_by_hessian(policy, theta, vector):
    p = policy(theta).detach().softmax(-1)
    return torch.func.hessian(lambda t: -(p * policy(t).log_softmax(-1)).sum(-1).mean())(theta) @ vector


def fisher_in_float32(policy, theta, vector):
    theta = theta.detach().float().requires_grad_()
    logp = policy(theta).log_softmax(-1)
    kl = (logp.detach().exp() * (logp.detach() - logp)).sum(-1).mean()
    (g,) = torch.autograd.grad(kl, theta, create_graph=True)
    return torch.autograd.grad(g, theta, grad_outputs=vector.float())[0]


# 5.4 -----------------------------------------------------------------------------------------------------------------


def step_spinning_up(policy, surrogate, theta, delta, damping_coeff):
    """A loss to be minimised, so the step is taken away; an epsilon in the length; restores at the last try."""

    def hvp(v):
        return fisher_spinning_up(policy, theta.clone(), v) + damping_coeff * v

    params = theta.detach().clone().requires_grad_(True)
    pi_l_old = -surrogate(params)
    g = torch.autograd.grad(pi_l_old, params)[0]
    x = cg_spinning_up(hvp, g, 10)
    alpha = torch.sqrt(2 * delta / (torch.dot(x, hvp(x)) + 1e-8))
    before = Categorical(logits=policy(theta))
    for j in range(11):
        new = theta - alpha * x * 0.5**j
        with torch.no_grad():
            kl = kl_divergence(before, Categorical(logits=policy(new))).mean()
            pi_l_new = -surrogate(new)
        if kl <= delta and pi_l_new <= pi_l_old:
            break
        if j == 10:
            new = theta
    return new


def step_hands_on(policy, surrogate, theta, kl_constraint, damping):
    def hessian_vector(v):
        return fisher_by_jacobian(policy, theta, v) + damping * v

    leaf = theta.clone().requires_grad_()
    obj_grad = torch.autograd.grad(surrogate(leaf), leaf)[0].detach()
    d = cg_hands_on(hessian_vector, obj_grad, 10)
    Hd = hessian_vector(d)
    max_coef = torch.sqrt(2 * kl_constraint / (torch.dot(d, Hd) + 1e-8))
    old_dist, old_obj = Categorical(logits=policy(theta)), surrogate(theta)
    for i in range(11):
        coef = 0.5**i
        new_para = theta + coef * max_coef * d
        new_obj = surrogate(new_para)
        kl_div = torch.mean(kl_divergence(old_dist, Categorical(logits=policy(new_para))))
        if new_obj > old_obj and kl_div < kl_constraint:
            return new_para
    return theta


def step_by_a_direct_solve(policy, surrogate, theta, max_kl, damping):
    """The whole matrix, and x . g in place of x . F x, which is the same number; each length is half of the last."""
    eye = torch.eye(len(theta), dtype=theta.dtype)
    matrix = torch.stack([fisher_by_hessian(policy, theta, e) for e in eye], 1) + damping * eye
    g = torch.func.grad(surrogate)(theta)
    x = torch.linalg.solve(matrix, g)
    step = x * (2 * max_kl / (x @ g)) ** 0.5
    old = policy(theta).log_softmax(-1)
    for _ in range(11):
        new = policy(theta + step).log_softmax(-1)
        kl = (old.exp() * (old - new)).sum(-1).mean()
        if surrogate(theta + step) > surrogate(theta) and kl <= max_kl:
            return theta + step
        step = step / 2
    return theta.clone()


# 5.5 -----------------------------------------------------------------------------------------------------------------


def clip_cleanrl(logprobs, old_logprobs, advantages, clip_range):
    mb_advantages = advantages.detach()
    ratio = (logprobs - old_logprobs.detach()).exp()
    pg_loss1 = -mb_advantages * ratio
    pg_loss2 = -mb_advantages * torch.clamp(ratio, 1 - clip_range, 1 + clip_range)
    return torch.max(pg_loss1, pg_loss2).mean()


def clip_spinning_up(logprobs, old_logprobs, adv, clip_range):
    with torch.no_grad():
        adv = adv.clone()
        limit = torch.where(adv > 0, (1 + clip_range) * adv, (1 - clip_range) * adv)
        before = old_logprobs.clone()
    return -(torch.min(torch.exp(logprobs - before) * adv, limit)).mean()


def clip_hands_on(logprobs, old_logprobs, advantages, eps):
    ratio = torch.exp(logprobs - old_logprobs.detach())
    surr1 = ratio * advantages.detach()
    surr2 = torch.clamp(ratio, 1 - eps, 1 + eps) * advantages.detach()
    return torch.mean(-torch.min(surr1, surr2))


# 5.6 -----------------------------------------------------------------------------------------------------------------


def kl_schulman(logprobs, old_logprobs):
    logr = logprobs - old_logprobs.detach()
    return torch.special.expm1(logr) - logr


def kl_in_double(logprobs, old_logprobs):
    logr = logprobs.double() - old_logprobs.detach().double()
    return (logr.exp() - 1) - logr


def kl_series(logprobs, old_logprobs):
    x = logprobs - old_logprobs.detach()
    series = x**2 / 2 + x**3 / 6 + x**4 / 24 + x**5 / 120 + x**6 / 720
    return torch.where(x.abs() < 0.05, series, torch.exp(x) - 1 - x)


def kl_cleanrl(logprobs, old_logprobs):
    logratio = logprobs - old_logprobs.detach()
    ratio = logratio.exp()
    return (ratio - 1) - logratio


# 5.7 -----------------------------------------------------------------------------------------------------------------


def value_cleanrl(newvalue, b_values, b_returns, clip_coef):
    b_values, b_returns = b_values.detach(), b_returns.detach()
    v_loss_unclipped = (newvalue - b_returns) ** 2
    v_clipped = b_values + torch.clamp(newvalue - b_values, -clip_coef, clip_coef)
    v_loss_clipped = (v_clipped - b_returns) ** 2
    v_loss_max = torch.max(v_loss_unclipped, v_loss_clipped)
    return 0.5 * v_loss_max.mean()


def value_openrlhf(values, old_values, returns, clip_eps):
    old_values, returns = old_values.data, returns.data
    values_clipped = torch.clamp(values, old_values - clip_eps, old_values + clip_eps)
    surr1 = F.mse_loss(values_clipped, returns, reduction="none")
    surr2 = F.mse_loss(values, returns, reduction="none")
    return torch.maximum(surr1, surr2).mean() / 2


def value_by_hand(values, old_values, returns, clip_range):
    loss = 0.0
    for v, old, r in zip(values.flatten(), old_values.flatten().tolist(), returns.flatten().tolist(), strict=True):
        near = v.clamp(old - clip_range, old + clip_range)
        loss = loss + max((v - r) ** 2, (near - r) ** 2)
    return 0.5 * loss / values.numel()


RIGHT = {
    "importance_ratio": {
        "CleanRL": ratio_cleanrl,
        "Hands-on-RL: probabilities, an epsilon": ratio_of_probabilities,
        "float32": ratio_in_float32,
    },
    "conjugate_gradient": {
        "Spinning Up: an epsilon, float32": cg_spinning_up,
        "Hands-on-RL": cg_hands_on,
        "Krylov, a direct solve": krylov,
        "conjugacy used": cg_with_the_residual,
    },
    "fisher_vector_product": {
        "Spinning Up": fisher_spinning_up,
        "the Jacobian": fisher_by_jacobian,
        "torch.func.hessian": fisher_by_hessian,
        "float32": fisher_in_float32,
    },
    "trpo_step": {
        "Spinning Up: a loss, an epsilon, float32": step_spinning_up,
        "Hands-on-RL": step_hands_on,
        "the whole matrix": step_by_a_direct_solve,
    },
    "clipped_loss": {"CleanRL": clip_cleanrl, "Spinning Up": clip_spinning_up, "Hands-on-RL": clip_hands_on},
    "approx_kl": {"expm1": kl_schulman, "in float64": kl_in_double, "a series": kl_series},
    "clipped_value_loss": {"CleanRL": value_cleanrl, "OpenRLHF": value_openrlhf, "a loop": value_by_hand},
}

WRONG = {
    "importance_ratio": [
        ("This is the log of the ratio", ratio_cleanrl, ("logratio.exp()", "logratio")),
        ("The ratio is upside down", ratio_cleanrl, ("logprobs - old_logprobs.data", "old_logprobs.data - logprobs")),
        ("The old policy is a constant", ratio_cleanrl, (".data", "")),
        ("No gradient flows into logprobs", lambda new, old: (new - old).exp().detach()),
        ("that is the ratio of whole trajectories", lambda new, old: (new - old.detach()).sum(-1).exp()),
        (
            "every action gets the ratio of the whole trajectory",
            ratio_cleanrl,
            ("logratio.exp()", "logratio.sum(-1, keepdim=True).exp().expand_as(logratio)"),
        ),
        ("It divides log-probabilities", lambda new, old: new / old.detach()),
        ("It detaches the wrong one", lambda new, old: (new.detach() - old).exp()),
        (
            "It subtracts probabilities",
            ratio_of_probabilities,
            ("torch.exp(logprobs) / (before + 1e-10)", "torch.exp(logprobs) - before"),
        ),
        (None, ratio_cleanrl, ("logratio.exp()", "logratio.exp().square()")),
    ],
    "conjugate_gradient": [
        ("After it has converged", cg_hands_on, ("        if new_rdotr < 1e-10:\n            break\n", "")),
        ("This is steepest descent", cg_hands_on, ("p = r + beta * p", "p = r.clone()")),
        ("beta is upside down", cg_hands_on, ("new_rdotr / rdotr", "rdotr / new_rdotr")),
        (
            "beta is always 1",
            cg_hands_on,
            (
                "        beta = new_rdotr / rdotr\n        p = r + beta * p\n        rdotr = new_rdotr",
                "        rdotr = new_rdotr\n        p = r + new_rdotr / rdotr * p",
            ),
        ),
        ("It runs one iteration too many", cg_hands_on, ("range(max_iter)", "range(max_iter + 1)")),
        ("It goes on to the solution", cg_hands_on, ("range(max_iter)", "range(50)")),
        ("It goes on to the solution", lambda matvec, b, n: _direct(matvec, b)),
        ("The residual has the wrong sign", cg_hands_on, ("r -= alpha", "r += alpha")),
        ("x moves by the whole direction", cg_hands_on, ("x += alpha * p", "x += p")),
        ("The step length misses the curvature", cg_hands_on, ("torch.dot(p, Hp)", "torch.dot(p, p)")),
        ("The direction never changes", cg_hands_on, ("        p = r + beta * p\n", "")),
        ("This is the residual", cg_hands_on, ("return x", "return r")),
        ("writes into its argument `b`", cg_hands_on, ("r = b.clone()", "r = b")),
        (None, cg_hands_on, ("x += alpha * p", "x += 0.5 * alpha * p")),
    ],
    "fisher_vector_product": [
        ("Everything came out 0", fisher_spinning_up, ("logits=logits.detach()", "logits=logits")),
        ("It sums over the states", fisher_by_jacobian, (" / len(p)", "")),
        (
            "Damping is added here",
            fisher_spinning_up,
            (
                "return torch.autograd.grad(torch.dot(g, vector), theta)[0]",
                "return torch.autograd.grad(torch.dot(g, vector), theta)[0] + 0.1 * vector",
            ),
        ),
        ("the second part is missing", fisher_by_jacobian, ("p * z - p * (p * z).sum(-1, keepdim=True)", "p * z")),
        ("The sign is wrong", fisher_by_hessian, ("-(p * policy", "(p * policy")),
        (
            "It is twice F v",
            fisher_spinning_up,
            (
                "kl_divergence(Categorical(logits=logits.detach()), Categorical(logits=logits)).mean()",
                "(kl_divergence(Categorical(logits=logits.detach()), Categorical(logits=logits))"
                " + kl_divergence(Categorical(logits=logits), Categorical(logits=logits.detach()))).mean()",
            ),
        ),
        ("It raises RuntimeError", fisher_spinning_up, (", create_graph=True", "")),
        (
            "Everything came out 0",
            fisher_spinning_up,
            ("torch.autograd.grad(torch.dot(g, vector), theta)[0]", "g.detach() * vector"),
        ),
        (None, fisher_by_jacobian, ("softmax(-1)", "softmax(-1) ** 2")),
    ],
    "trpo_step": [
        (
            "The square root is missing",
            step_hands_on,
            ("torch.sqrt(2 * kl_constraint / (torch.dot(d, Hd) + 1e-8))", "2 * kl_constraint / torch.dot(d, Hd)"),
        ),
        ("The KL is not checked", step_hands_on, (" and kl_div < kl_constraint", "")),
        ("accepts a step that makes L worse", step_hands_on, ("new_obj > old_obj and ", "")),
        ("the last one tried stays", step_hands_on, ("return theta", "return new_para")),
        ("the last one tried stays", step_spinning_up, ("            new = theta\n", "            pass\n")),
        ("It comes back to the old parameters every time", step_spinning_up, ("theta - alpha", "theta + alpha")),
        ("There is no line search", step_hands_on, ("if new_obj > old_obj and kl_div < kl_constraint", "if True")),
        ("The 2 is missing", step_by_a_direct_solve, ("(2 * max_kl / (x @ g))", "(max_kl / (x @ g))")),
        (
            "The direction is the plain gradient",
            step_hands_on,
            ("cg_hands_on(hessian_vector, obj_grad, 10)", "obj_grad"),
        ),
        ("The damping is missing: F v", step_by_a_direct_solve, (" + damping * eye", "")),
        (
            "The halvings pile up",
            step_hands_on,
            (
                "        new_para = theta + coef * max_coef * d\n",
                "        d = coef * d\n        new_para = theta + max_coef * d\n",
            ),
        ),
        ("L is compared with 0", step_hands_on, ("new_obj > old_obj", "new_obj > 0")),
        ("The KL is summed over the states", step_hands_on, ("torch.mean(kl_div", "torch.sum(kl_div")),
        (
            "The KL is measured the other way round",
            step_spinning_up,
            (
                "kl_divergence(before, Categorical(logits=policy(new)))",
                "kl_divergence(Categorical(logits=policy(new)), before)",
            ),
        ),
        (None, step_hands_on, ("0.5**i", "0.8**i")),
        (None, step_hands_on, ("return new_para", "return theta + 0.9 * (new_para - theta)")),
    ],
    "clipped_loss": [
        (
            "The log-ratios are summed over the row",
            clip_hands_on,
            (
                "torch.exp(logprobs - old_logprobs.detach())",
                "torch.exp((logprobs - old_logprobs.detach()).sum(-1, keepdim=True))",
            ),
        ),
        (
            "mean over rows of sums over steps",
            clip_hands_on,
            ("torch.mean(-torch.min(surr1, surr2))", "torch.mean(-torch.min(surr1, surr2).sum(-1))"),
        ),
        ("This is the sum", clip_cleanrl, (".mean()", ".sum()")),
        ("It takes the max where PPO takes the min", clip_cleanrl, ("torch.max", "torch.min")),
        (
            "The min is taken before multiplying by A",
            clip_hands_on,
            (
                "torch.mean(-torch.min(surr1, surr2))",
                "-torch.mean(torch.min(ratio, torch.clamp(ratio, 1 - eps, 1 + eps)) * advantages.detach())",
            ),
        ),
        (
            "The log of the ratio is clipped",
            clip_cleanrl,
            (
                "torch.clamp(ratio, 1 - clip_range, 1 + clip_range)",
                "torch.clamp(logprobs - old_logprobs.detach(), -clip_range, clip_range).exp()",
            ),
        ),
        ("Only the clipped term is there", clip_cleanrl, ("torch.max(pg_loss1, pg_loss2)", "pg_loss2")),
        ("A gradient flows into the advantages", clip_cleanrl, ("advantages.detach()", "advantages")),
        (
            "The advantages are whitened",
            clip_cleanrl,
            (
                "advantages.detach()",
                "(advantages - advantages.mean()).detach() / (advantages.std(correction=0).detach() + 1e-8)",
            ),
        ),
        (
            "The product r * A is clipped",
            clip_hands_on,
            ("torch.clamp(ratio, 1 - eps, 1 + eps) * advantages.detach()", "torch.clamp(surr1, 1 - eps, 1 + eps)"),
        ),
        (
            "The min is taken of two means",
            clip_hands_on,
            ("torch.mean(-torch.min(surr1, surr2))", "-torch.min(surr1.mean(), surr2.mean())"),
        ),
        (
            "The clip's bounds are -eps and +eps",
            clip_cleanrl,
            ("1 - clip_range, 1 + clip_range", "-clip_range, clip_range"),
        ),
        ("The minus sign is missing", clip_hands_on, ("mean(-torch", "mean(torch")),
        ("into `old_logprobs`, which is a constant here", clip_cleanrl, ("old_logprobs.detach()", "old_logprobs")),
        (
            None,
            clip_spinning_up,
            ("(1 + clip_range) * adv, (1 - clip_range)", "(1 - clip_range) * adv, (1 + clip_range)"),
        ),
    ],
    "approx_kl": [
        ("The digits cancel", kl_cleanrl),
        (
            "This is the mean",
            kl_schulman,
            ("torch.special.expm1(logr) - logr", "(torch.special.expm1(logr) - logr).mean()"),
        ),
        (
            "This is the sum over the row",
            kl_schulman,
            ("torch.special.expm1(logr) - logr", "(torch.special.expm1(logr) - logr).sum(-1)"),
        ),
        ("It is reversed", kl_schulman, ("logprobs - old_logprobs.detach()", "old_logprobs.detach() - logprobs")),
        ("This is k1 = -rho", lambda new, old: old.detach() - new),
        ("This is k2", lambda new, old: 0.5 * (new - old.detach()) ** 2),
        ("This is rho squared", lambda new, old: (new - old.detach()) ** 2),
        ("This is |rho|", lambda new, old: (new - old.detach()).abs()),
        ("The old policy is a constant", kl_schulman, (".detach()", "")),
        ("The KL is detached from the graph", lambda new, old: kl_schulman(new.detach(), old)),
        ("a term of the exact KL", lambda new, old: old.detach().exp() * (old.detach() - new)),
        ("Only exp(rho) - 1 is there", kl_schulman, ("expm1(logr) - logr", "expm1(logr)")),
        (None, lambda new, old: (new - old.detach()).exp() * (new - old.detach())),
    ],
    "clipped_value_loss": [
        ("It takes the min", value_cleanrl, ("torch.max(", "torch.min(")),
        (
            "Only the clipped error is there",
            value_cleanrl,
            ("torch.max(v_loss_unclipped, v_loss_clipped)", "v_loss_clipped"),
        ),
        (
            "Nothing is clipped, or around the return",
            value_cleanrl,
            ("b_values + torch.clamp(newvalue - b_values,", "b_returns + torch.clamp(newvalue - b_returns,"),
        ),
        ("The half is missing", value_cleanrl, ("0.5 * ", "")),
        (
            "The value itself is clipped",
            value_openrlhf,
            ("old_values - clip_eps, old_values + clip_eps", "-clip_eps, clip_eps"),
        ),
        (
            "It clips the quotient",
            value_openrlhf,
            (
                "torch.clamp(values, old_values - clip_eps, old_values + clip_eps)",
                "old_values * torch.clamp(values / old_values, 1 - clip_eps, 1 + clip_eps)",
            ),
        ),
        ("This is the sum", value_cleanrl, (".mean()", ".sum()")),
        (
            "The max is taken of two means",
            value_cleanrl,
            (
                "torch.max(v_loss_unclipped, v_loss_clipped)",
                "torch.max(v_loss_unclipped.mean(), v_loss_clipped.mean())",
            ),
        ),
        (
            "The max is taken of the values, before squaring",
            lambda v, old, r, c: (
                0.5 * ((torch.max(v, old.detach() + (v - old.detach()).clamp(-c, c)) - r.detach()) ** 2).mean()
            ),
        ),
        (
            "How far it moved is clipped, and the old value not added",
            value_cleanrl,
            ("b_values + torch.clamp", "torch.clamp"),
        ),
        (
            "A gradient flows into old_values",
            value_cleanrl,
            ("b_values, b_returns = b_values.detach(), b_returns.detach()", "b_returns = b_returns.detach()"),
        ),
        (
            "into `returns`, which is a constant here",
            value_openrlhf,
            ("old_values, returns = old_values.data, returns.data", "old_values = old_values.data"),
        ),
        (None, value_openrlhf, ("surr1 = F.mse_loss", "surr1 = F.huber_loss")),
    ],
}


def _direct(matvec, b):
    matrix = torch.stack([matvec(e) for e in torch.eye(len(b), dtype=b.dtype)], 1)
    return torch.linalg.solve(matrix, b)
