"""Bugs of `actor_critic`: (number in the museum or "-", what the verdict must say or None, edits of the solution)."""

DRAWN = "policy.sample(policy(now), generator)"
TARGET = "following = steps[t].rewards + gamma * following\n"
CUT = "following = torch.where(steps[t].truncated, values(steps[t].next_observations), following)"
OVER = "following = torch.where(steps[t].terminated, 0.0, following)"
DELTAS = "deltas = (targets - v).detach()"
LOSS = "value_loss = 0.5 * (v - targets).square().mean()"
ACTED = "        optimizer.zero_grad()\n        loss.backward()\n"

BUGS = [
    (6, "The minus sign is missing", [("loss = -(factors", "loss = (factors")]),
    (6, "wrong sign", [("value_loss = 0.5", "value_loss = -0.5")]),
    (7, "A = r - V", [(DELTAS, "deltas = (torch.stack([step.rewards for step in steps]) - v).detach()")]),
    (
        10,
        "stored a step early",
        [("following = steps[t].rewards +", "following = (steps[t + 1].rewards if t + 1 < n else 0.0) +")],
    ),
    (11, "not drawn", [(DRAWN, "policy.mode(policy(now))")]),
    (
        28,
        "softmax is taken twice",
        [(DRAWN, "torch.distributions.Categorical(logits=policy(now).softmax(-1)).sample()")],
    ),
    (
        12,
        "done and next_done are swapped",
        [
            (CUT, "pass"),
            (
                OVER,
                "if t > 0:\n                    before = steps[t - 1].terminated | steps[t - 1].truncated\n"
                "                    following = torch.where(before, 0.0, following)",
            ),
        ],
    ),
    (
        22,
        "terminated episode is treated as a truncated one",
        [(CUT, CUT.replace("steps[t].truncated", "steps[t].truncated | steps[t].terminated")), (OVER, "")],
    ),
    (
        22,
        "truncated episode is treated as a terminated one",
        [(OVER, OVER.replace("steps[t].terminated", "steps[t].truncated | steps[t].terminated"))],
    ),
    (26, "runs into the next episode", [(CUT, ""), (OVER, ""), ("values(steps[-1].next_observations)", "values(now)")]),
    (25, "gets no gradient", [(LOSS, "value_loss = 0.5 * (v.detach().requires_grad_() - targets).square().mean()")]),
    (
        1,
        "whitened",
        [
            (
                LOSS,
                "white = (targets - targets.mean()) / (targets.std(correction=0) + 1e-8)\n"
                "        value_loss = 0.5 * (v - white).square().mean()",
            )
        ],
    ),
    (
        "-",
        "Advantages are whitened",
        [(DELTAS, DELTAS + "\n        deltas = (deltas - deltas.mean()) / (deltas.std(correction=0) + 1e-8)")],
    ),
    ("-", "gradient of its own", [("with torch.no_grad():\n            following", "if True:\n            following")]),
    (
        "-",
        "constant in it",
        [
            (DELTAS, "deltas = targets - v"),
            (
                "loss.backward()\n        nn.utils.clip_grad_norm_(policy",
                "loss.backward(retain_graph=True)\n        nn.utils.clip_grad_norm_(policy",
            ),
            ("        value_optimizer.zero_grad()\n", ""),
        ],
    ),
    ("-", "wrong observation", [(CUT, CUT.replace("next_observations", "observations"))]),
    (
        "-",
        "Nothing stands for what comes after",
        [("following = values(steps[-1].next_observations)", "following = torch.zeros(envs.num_envs)")],
    ),
    ("-", "The discount is missing", [(TARGET, TARGET.replace("gamma * ", ""))]),
    ("-", "The baseline is missing", [(DELTAS, "deltas = targets")]),
    (
        "-",
        "looks one step ahead",
        [
            (
                TARGET,
                "following = values(steps[t].next_observations)\n                "
                + OVER
                + "\n                "
                + TARGET,
            )
        ],
    ),
    (
        "-",
        "I goes on from one iteration",
        [
            (
                "        observations, actions, factors, steps = [], [], [], []\n",
                "        observations, actions, factors, steps = [], [], [], []\n"
                "        I = torch.ones(envs.num_envs)\n",
            )
        ],
    ),
    (
        "-",
        "where an episode does",
        [("I = torch.where(step.terminated | step.truncated, 1.0, gamma * I)", "I = gamma * I")],
    ),
    ("-", "zero_grad() is missing", [(ACTED, "        loss.backward()\n")]),
    ("-", None, [("        for _ in range(n):\n", "        now = envs.reset()\n        for _ in range(n):\n")]),
    ("-", None, [("while envs.steps < total_steps", "while len(log) < total_steps")]),
    ("-", None, [("torch.optim.Adam(values.parameters(), lr=value_lr", "torch.optim.Adam(values.parameters(), lr=lr")]),
]
"""Museum's number or "-", what the marks must say (None: no cause is known, the first failed property says enough), and
the edits of the solution that plant it."""
