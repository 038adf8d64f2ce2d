"""Bugs of `ppo`: (number in the museum or "-", what the verdict must say or None, edits of the solution)."""

DRAWN = "policy.sample(policy(now), generator)"
MIN = "torch.minimum(ratio * adv, clipped * adv)"
ENDED = "ended = steps[t].terminated | steps[t].truncated"
V_AFTER = "v_after = torch.where(steps[t].terminated, 0.0, values(steps[t].next_observations))"
FOLLOWING = "following = delta + gamma * lam * torch.where(ended, 0.0, following)"
RETURNS = "            returns = advantages + old_values\n"
WHITEN = "                adv = (adv - adv.mean()) / (adv.std(correction=0) + 1e-8)\n"
OLD = "ratio = (policy.logprobs(outputs, act) - old).exp()"
LATE = "steps[max(t - 1, 0)].terminated | steps[max(t - 1, 0)].truncated"

BUGS = [
    (
        1,
        "targets are made of whitened advantages",
        [
            (
                RETURNS,
                "            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)\n" + RETURNS,
            )
        ],
    ),
    (
        3,
        "ratio is always 1",
        [(OLD, "ratio = (policy.logprobs(outputs, act) - policy.logprobs(outputs, act).detach()).exp()")],
    ),
    (4, "max for min", [(MIN, MIN.replace("minimum", "maximum"))]),
    (5, "before multiplying by A", [(MIN, "(torch.minimum(ratio, clipped) * adv)")]),
    (6, "minus sign is missing", [("loss = -(L_clip - value_coef * L_value", "loss = (L_clip + value_coef * L_value")]),
    (6, "wrong sign", [("- value_coef * L_value", "+ value_coef * L_value")]),
    (7, "A = r - V", [(FOLLOWING, "following = steps[t].rewards - old_values[:, t]")]),
    (
        10,
        "stored a step early",
        [("delta = steps[t].rewards", "delta = (steps[t + 1].rewards if t + 1 < rollout_steps else 0.0)")],
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
            (ENDED, f"ended = ({LATE}) if t else torch.zeros(envs.num_envs, dtype=torch.bool)"),
            (V_AFTER, f"v_after = values(steps[t].observations) * (~({LATE}) if t else 1.0)"),
        ],
    ),
    (
        22,
        "terminated episode is treated as a truncated one",
        [(V_AFTER, "v_after = values(steps[t].next_observations)")],
    ),
    (
        22,
        "truncated episode is treated as a terminated one",
        [(V_AFTER, V_AFTER.replace("steps[t].terminated", "steps[t].terminated | steps[t].truncated"))],
    ),
    (
        25,
        "gets no gradient",
        [("0.5 * (values(obs) - ret)", "0.5 * (torch.tensor([v.item() for v in values(obs)]) - ret)")],
    ),
    (26, "runs across the end", [(FOLLOWING, "following = delta + gamma * lam * following")]),
    (
        26,
        "delta and sum run into the next",
        [
            (FOLLOWING, "following = delta + gamma * lam * following"),
            (V_AFTER, "v_after = values(steps[t].observations)"),
        ],
    ),
    (26, "where an episode was truncated", [(ENDED, "ended = steps[t].terminated")]),
    ("-", "wrong observation", [("values(steps[t].next_observations)", "values(steps[t].observations)")]),
    ("-", "lambda is missing", [("gamma * lam *", "gamma *")]),
    ("-", "gamma is missing in the sum", [("gamma * lam *", "lam *")]),
    ("-", "gamma is missing in delta", [("steps[t].rewards + gamma * v_after", "steps[t].rewards + v_after")]),
    ("-", "are not normalised", [(WHITEN, "")]),
    (
        "-",
        "over the whole batch",
        [
            (WHITEN, ""),
            (
                RETURNS,
                RETURNS
                + "            advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)\n",
            ),
        ],
    ),
    ("-", "clip never acts", [(MIN, "(ratio * adv)")]),
    ("-", "slope is gone on both sides", [(MIN, "(clipped * adv)")]),
    ("-", "half the squared error", [("L_value = 0.5 *", "L_value =")]),
    ("-", "entropy bonus has the wrong sign", [("+ entropy_coef * S", "- entropy_coef * S")]),
    ("-", None, [("+ entropy_coef * S", "")]),
    ("-", None, [("index in order.tensor_split", "index in torch.arange(count).tensor_split")]),
    (
        "-",
        "without V taken off",
        [
            (
                "advantages = torch.zeros_like(old_values)\n",
                "advantages = torch.zeros_like(old_values)\n            advantages = torch.zeros_like(old_values)\n",
            ),
            (RETURNS, RETURNS + "            advantages = returns\n"),
        ],
    ),
    ("-", "zero_grad() is missing", [("                optimizer.zero_grad()\n", "")]),
    ("-", None, [("torch.optim.Adam(parameters, lr=lr, eps=1e-5)", "torch.optim.Adam(parameters, lr=lr, eps=1e-2)")]),
    (
        "-",
        "shared trunk twice",
        [
            (
                "list(dict.fromkeys([*policy.parameters(), *values.parameters()]))",
                "[*policy.parameters(), *values.parameters()]",
            )
        ],
    ),
    ("-", None, [("for _ in range(epochs)", "for _ in range(epochs + 1)")]),
]
"""Museum's number or "-", what the marks must say (None: no cause is known, the first failed property says enough), and
the edits of the solution that plant it."""
