"""Bugs of `reinforce`: (number in the museum or "-", what the verdict must say or None, edits of the solution)."""

JUDGES = """            with torch.no_grad():
                weights = returns - values(observations)
"""
LEARNS = """            for _ in range(value_updates):
                value_optimizer.zero_grad()
                (0.5 * (values(observations) - returns)[counts].square().mean()).backward()
                value_optimizer.step()
"""
DRAWN = "policy.sample(policy(now), generator)"
FOLLOWING = "torch.where(counts[t], rewards[t] + gamma * (following + bootstraps[t]), 0.0)"
ERROR = "(values(observations) - returns)[counts]"

BUGS = [
    (6, "The minus sign is missing", [("loss = -torch.where", "loss = torch.where")]),
    (6, "wrong sign", [("value_loss = 0.5", "value_loss = -0.5")]),
    (
        7,
        "A = r - V for G - V",
        [("weights = returns\n", "weights = rewards\n"), ("weights = returns - values", "weights = rewards - values")],
    ),
    (
        10,
        "stored a step early",
        [("# G_t = R", "rewards = torch.cat((rewards[1:], torch.zeros_like(rewards[:1])))\n        # G_t = R")],
    ),
    (11, "not drawn", [(DRAWN, "policy.mode(policy(now))")]),
    (
        28,
        "softmax is taken twice",
        [(DRAWN, "torch.distributions.Categorical(logits=policy(now).softmax(-1)).sample()")],
    ),
    (28, "takes x for probabilities (bug 28)", [(DRAWN, "torch.distributions.Categorical(policy(now)).sample()")]),
    (
        22,
        "terminated episode is treated as a truncated one",
        [("torch.where(step.truncated, values(", "torch.where(step.truncated | step.terminated, values(")],
    ),
    (
        22,
        "truncated episode is treated as a terminated one",
        [("torch.where(step.truncated, values(step.next_observations), 0.0)", "torch.zeros(envs.num_envs)")],
    ),
    (
        25,
        "gets no gradient",
        [("0.5 * (values(observations) - ", "0.5 * (values(observations).detach().requires_grad_() - ")],
    ),
    (
        26,
        "across the end",
        [
            (FOLLOWING, "rewards[t] + gamma * (following + bootstraps[t])"),
            ("        rewards = torch.where(counts, rewards, 0.0)\n", ""),
        ],
    ),
    (
        1,
        "whitened",
        [(ERROR, "(values(observations) - (returns - returns[counts].mean()) / returns[counts].std())[counts]")],
    ),
    (
        "-",
        "Returns are whitened",
        [("weights = returns\n", "weights = (returns - returns[counts].mean()) / returns[counts].std()\n")],
    ),
    (
        "-",
        "constant in it",
        [(JUDGES, JUDGES.replace("with torch.no_grad():", "if True:")), ("value_optimizer.zero_grad()\n", "pass\n")],
    ),
    ("-", "discount is missing", [("rewards[t] + gamma * (following", "rewards[t] + (following")]),
    (
        "-",
        "whole return G_0",
        [
            ("weights = returns\n", "weights = returns[:1].expand_as(returns)\n"),
            ("weights = returns - values", "weights = returns[:1] - values"),
        ],
    ),
    ("-", "run forwards", [("in reversed(range(len(rewards)))", "in range(len(rewards))")]),
    ("-", "zero_grad() is missing", [("        optimizer.zero_grad()\n", "")]),
    ("-", "gamma^t", [("if weigh_by_gamma_t:", "if not weigh_by_gamma_t:")]),
    (
        "-",
        "judges after it has learned",
        [("if values is not None:\n            for", "if False:\n            for"), (JUDGES, LEARNS + JUDGES)],
    ),
    ("-", "wrong observation", [("values(step.next_observations)", "values(step.observations)")]),
    ("-", "after an environment's episode", [("torch.where(counts, weights * logprobs, 0.0)", "(weights * logprobs)")]),
    ("-", "after an environment's episode", [(ERROR, "(values(observations) - returns)")]),
    ("-", None, [("while running.any()", "while running.all()")]),
    (
        "-",
        None,
        [
            (
                "optimizer = torch.optim.Adam(policy.parameters(), lr=lr, eps=1e-5)",
                "optimizer = torch.optim.Adam(policy.parameters(), lr=10 * lr, eps=1e-5)",
            )
        ],
    ),
    ("-", None, [("        optimizer.step()\n", "")]),
]
"""Museum's number or "-", what the marks must say (None: no cause is known, the first failed property says enough), and
the edits of the solution that plant it."""
