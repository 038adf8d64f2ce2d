"""Bugs of `rlhf`: (number in the museum or "-", what the verdict must say or None, edits of the solution)."""

D = "d = torch.where(counts, old_logprobs - ref_logprobs, 0.0)"
CHARGE = "rewards = -beta * d\n"
PAY = "rewards[torch.arange(B), samples.lengths - 1] += scores"
RETURNS = "        returns = advantages + old_values  # of the raw advantages\n"
WHITEN = """        if config.whiten_advantages:
            mean, std = advantages[counts].mean(), advantages[counts].std(correction=0)
            advantages = (advantages - mean) / (std + 1e-8)
"""
FOLLOWING = "following = torch.where(counts[:, t], delta + config.gamma * config.lam * following, 0.0)"
RATIO = "ratio = (logprobs_of(policy, tokens, mask, T)[keep] - old_logprobs[rows][keep]).exp()"
NEW = "logprobs_of(policy, tokens, mask, T)[keep]"
MIN = "torch.minimum(ratio * A, clipped * A)"
LOSS = f"policy_loss = -{MIN}.mean()"
SLICE = "token_logits(model, tokens, mask)[:, -T - 1 : -1]"
ZERO = "                    optimizer.zero_grad()\n"
ADAM = "policy_adam = torch.optim.Adam(policy.parameters(),"
ADD = "policy_loss = policy_loss + config.ptx_coef * reading"
STEERED = "beta = beta * (1 + error * B / config.kl_horizon)"
REF_LOSS = "logprobs_of(reference, tokens, mask, T)[keep]"


def instead_of_rewards(term):
    """The KL as a term of the loss, and in no reward."""
    return [(CHARGE, "rewards = 0 * d\n"), (LOSS, f"{LOSS} + beta * ({term}).mean()")]


VALUES = "token_values(value_model, tokens, mask)[:, -T - 1 : -1]"
OBJECTIVE = "                # The clipped objective, over the tokens that count.\n"
READ = """                if config.ptx_coef > 0:
                    blocks = next(corpus)
                    said = token_logits(policy, blocks, torch.ones_like(blocks, dtype=torch.bool))[:, :-1]
                    policy_adam.zero_grad()
                    nn.functional.cross_entropy(said.flatten(0, 1), blocks[:, 1:].flatten()).backward()
                    policy_adam.step()
"""
OWN_WHITE = "                A = (A - A.mean()) / A.std(correction=0) if config.whiten_advantages else A\n"
ALL_COUNT = "ratio = (logprobs_of(policy, tokens, mask, T) - old_logprobs[rows]).exp()"
BY_ANSWER = f"w = (1 / keep.sum(1, keepdim=True) * keep)[keep]\n                policy_loss = -(w * {MIN}).sum()"
AT_ITS_END = "rewards = 0 * d\n        rewards[torch.arange(B), samples.lengths - 1] -= beta * d.sum(1)\n"
EARLY = "\n        rewards = torch.cat([rewards[:, 1:], torch.zeros(B, 1)], 1) * counts"
AFTER = "config.gamma * token_values(value_model, samples.tokens, samples.mask)[:, t - T].detach()"
ALL_VALUES = "values_of(samples.tokens, samples.mask, T)"
SUM_ON = (FOLLOWING, "following = delta + config.gamma * config.lam * following")
BY_POSITION = f"torch.distributions.Categorical({SLICE} / config.temperature).logits"
BOTH = ADAM.replace("policy.parameters()", "[*policy.parameters(), *reference.parameters()]")


def one(number, said, old, new):
    return number, said, [(old, new)]


BUGS = [
    (1, "targets are made of whitened advantages", [(WHITEN, ""), (RETURNS, WHITEN + RETURNS)]),
    (2, "KL changes nothing", instead_of_rewards(f"old_logprobs[rows][keep] - {REF_LOSS}.detach()")),
    one(3, "ratio is always 1", RATIO, f"new = {NEW}\n                ratio = (new - new.detach()).exp()"),
    one(4, "max for min", MIN, "torch.maximum(ratio * A, clipped * A)"),
    one(4, "smaller of the two losses", "0.5 * torch.maximum(", "0.5 * torch.minimum("),
    one(5, "before multiplying by A", MIN, "(torch.minimum(ratio, clipped) * A)"),
    one(6, "minus sign is missing", LOSS, LOSS.replace("-torch", "torch")),
    one(6, "KL has the wrong sign", CHARGE, "rewards = beta * d\n"),
    one(6, "wrong sign (bug 6)", "value_loss = 0.5 *", "value_loss = -0.5 *"),
    one(7, "A = r - V", FOLLOWING, "following = torch.where(counts[:, t], rewards[:, t] - old_values[:, t], 0.0)"),
    (8, "padding leaks into the returns", [(D, "d = old_logprobs - ref_logprobs"), SUM_ON]),
    (8, "padding leaks into the sum", [(f"torch.where(counts, {ALL_VALUES}, 0.0)", ALL_VALUES), SUM_ON]),
    one(9, "over the whole row, padding included", CHARGE, "rewards = -beta * d.mean(1, keepdim=True) * counts\n"),
    one(9, "over all columns, padding included", "kl = d.sum(1).mean().item()", "kl = d.mean().item()"),
    (9, "Padding counts in the loss", [(RATIO, ALL_COUNT), ("= advantages[rows][keep],", "= advantages[rows],")]),
    one(10, "paid a token early", PAY, "rewards[torch.arange(B), (samples.lengths - 2).clamp(min=0)] += scores"),
    one(10, "stored a token early", PAY, PAY + EARLY),
    one(14, "d^2 / 2", CHARGE, "rewards = -beta * d.square() / 2\n"),
    one(14, "exp(-d) - 1 + d", CHARGE, "rewards = -beta * (torch.expm1(-d) + d)\n"),
    one(14, "|d|", CHARGE, "rewards = -beta * d.abs()\n"),
    one(16, "behind the answer's end", "samples.responses()", "samples.response_tokens"),
    one(23, "off by one", SLICE, "token_logits(model, tokens, mask)[:, -T:]"),
    one(23, "off by one", SLICE, "token_logits(model, tokens, mask)[:, -T - 2 : -2]"),
    one(24, "not divided by config.temperature", " / config.temperature).log_softmax", ").log_softmax"),
    one("-", "softmax is taken twice", ").log_softmax(-1)", ").softmax(-1).log_softmax(-1)"),
    one("-", "log_softmax is missing", ".log_softmax(-1)", ""),
    one(28, "takes x for probabilities (bug 28)", f"({SLICE} / config.temperature).log_softmax(-1)", BY_POSITION),
    one(
        25,
        "gets no gradient",
        "mask, T)[keep]\n                near",
        "mask, T)[keep].detach().requires_grad_()\n                near",
    ),
    (30, "term of the loss, k3", instead_of_rewards(f"torch.expm1({REF_LOSS} - {NEW}) + {NEW} - {REF_LOSS}")),
    ("-", "term of the loss, d^2 / 2", instead_of_rewards(f"({NEW} - {REF_LOSS}).square() / 2")),
    ("-", "term of the loss, d itself", instead_of_rewards(f"{NEW} - {REF_LOSS}")),
    one("-", "charged at its last token", CHARGE, AT_ITS_END),
    one("-", "beta is missing", CHARGE, "rewards = -d\n"),
    one("-", "paid at the first token", PAY, "rewards[:, 0] += scores"),
    one("-", "paid in the last column", PAY, "rewards[:, -1] += scores * counts[:, -1]"),
    one("-", "missing_eos_penalty", " - config.missing_eos_penalty * (~samples.ended).float()", ""),
    one("-", "Every answer weighs the same", LOSS, BY_ANSWER),
    ("-", "SFT model, frozen", [(ADAM, BOTH), (LOSS, f"{LOSS} + 0.1 * ({NEW} - {REF_LOSS}).mean()")]),
    one("-", "reference is the policy", "    beta = config.beta\n", "    beta, reference = config.beta, policy\n"),
    one("-", "zero_grad() is missing", ZERO, ""),
    one("-", "one column to its left", VALUES, "token_values(value_model, tokens, mask)[:, -T:]"),
    one("-", "After the last token V is 0", "config.gamma * v_after", AFTER),
    one("-", "lambda is missing", "config.gamma * config.lam * following", "config.gamma * following"),
    (
        "-",
        "from the first token on",
        [
            ("for t in reversed(range(T)):", "for t in range(T):"),
            ("config.gamma * v_after", "config.gamma * (old_values[:, t + 1] if t + 1 < T else 0.0)"),
        ],
    ),
    one("-", "are not whitened", WHITEN, ""),
    ("-", "whitened in each minibatch", [(WHITEN, ""), (OBJECTIVE, OWN_WHITE + OBJECTIVE)]),
    one("-", "clip never acts", MIN, "(ratio * A)"),
    one("-", "V is not clipped", "torch.maximum((V - R).square(), (near - R).square())", "(V - R).square()"),
    one("-", "ptx_coef is missing", ADD, "policy_loss = policy_loss + reading"),
    one("-", "text is unlearned", ADD, ADD.replace("+", "-")),
    one("-", "Only the text is left", ADD, "policy_loss = config.ptx_coef * reading"),
    ("-", "not a step on each", [(ADD, "pass"), (OBJECTIVE, READ + OBJECTIVE)]),
    one("-", "beta stays where it was", STEERED, "pass"),
    one("-", "wrong way", STEERED, STEERED.replace("1 + error", "1 - error")),
    one("-", "charged config.beta in every batch", CHARGE, "rewards = -config.beta * d\n"),
    one("-", "nats per answer", "max(kl / config.target_kl", "max(d[counts].mean().item() / config.target_kl"),
    one("-", None, "torch.randperm(B, generator=generator)", "torch.arange(B)"),
    one("-", None, f"{ADAM} config.lr", f"{ADAM} config.value_lr"),
    one("-", None, "for _ in range(config.epochs)", "for _ in range(config.epochs + 1)"),
]
"""Museum's number or "-", what the marks must say (None: no cause is known, the first failed property says enough), and
the edits of the solution that plant it."""
