"""Three judgements that every studio asks for: the exact gradient, the package's own trainer, and CartPole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor, nn

from minirlhf.control.evaluation import evaluate
from minirlhf.control.policies import CategoricalPolicy, Networks, ValueNetwork, make_networks
from minirlhf_course.studios import probes
from minirlhf_course.studios.environments import cartpole
from minirlhf_course.studios.session import Trainer, watch
from minirlhf_course.studios.studio import Failure, Notes
from minirlhf_course.tiny import TinyMDP

# --- The exact gradient. ---


class Tabled:
    """A `TinyMDP` as an environment: one-hot observations."""

    def __init__(self, problem: TinyMDP) -> None:
        self._problem = problem
        self._random = np.random.default_rng(0)
        self._moves = torch.cat((problem.transitions, 1 - problem.transitions.sum(-1, keepdim=True)), -1).numpy()
        self._state = 0

    def reset(self, seed: int | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        if seed is not None:
            self._random = np.random.default_rng(seed)
        self._state = int(self._random.choice(len(self._problem.start), p=self._problem.start.numpy()))
        return self._observation(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        reward = float(self._problem.rewards[self._state, action])
        chances = self._moves[self._state, action].clip(min=0).cumsum()
        after = int(np.searchsorted(chances, self._random.random() * chances[-1], side="right"))
        over = after == len(self._problem.start)
        self._state = 0 if over else after
        return self._observation(), reward, over, False, {}

    def _observation(self) -> np.ndarray:
        row = np.zeros(len(self._problem.start), dtype=np.float32)
        row[self._state] = 1.0
        return row


def fixed_length(steps: int = 3, gamma: float = 0.8) -> TinyMDP:
    """Three states, two actions, drawn tables, and every episode ends after so many steps."""
    generator = torch.Generator().manual_seed(1)
    moves = torch.rand(3, 2, 3, generator=generator, dtype=torch.float64).square()
    rewards = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    names = (("s0", "s1", "s2"), ("a0", "a1"))
    start = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    return TinyMDP(moves / moves.sum(-1, keepdim=True), rewards, start, gamma, *names).with_horizon(steps)


def average_gradient(
    trainer: Trainer, settings: dict[str, Any], problem: TinyMDP, *, episodes: int = 3000, values: bool = False
) -> Failure | None:
    """Whether the gradient of a first update on very many episodes points where the exact one does.

    With `values` the trainer has a value network that knows the true values.
    """
    states, actions = problem.shape
    theta = 0.5 * torch.randn(problem.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    policy = CategoricalPolicy(nn.Identity(), nn.Linear(states, actions, bias=False))
    critic = ValueNetwork(nn.Identity(), nn.Linear(states, 1, bias=False))
    policy.head.load_state_dict({"weight": theta.t().float()})
    critic.head.load_state_dict({"weight": problem.values(theta).unsqueeze(0).float()})
    run = watch(
        trainer,
        lambda n: Tabled(problem),
        Networks(policy, critic),
        {**settings, "gamma": problem.gamma, "total_steps": 1},
        num_envs=episodes,
        without_values=not values,
    )
    if run.problem:
        return Failure(run.problem)
    got = -run.iterations[0].of("policy")[0].gradients["policy.head.weight"].double().t()
    exact = problem.policy_gradient(theta)
    cosine = float((got * exact).sum() / (got.norm() * exact.norm()))
    if cosine > 0.98:
        return None
    return Failure(
        f"Over {episodes:,} episodes the gradient's cosine with the exact one is {cosine:.3f}; a right one's is above "
        "0.98, and what is left is chance."
    )


# --- The package's own trainer. ---


class Vector:
    """Probes as gymnasium's vector environment, for the package's trainers; their episodes end together or never."""

    def __init__(self, make: Callable[[], Any], num_envs: int) -> None:
        self._envs = [make() for _ in range(num_envs)]
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        self.num_envs = num_envs
        self.single_observation_space = gymnasium.spaces.Box(0.0, 1.0, (self._envs[0].size,))
        self.single_action_space = gymnasium.spaces.Discrete(probes.ACTIONS)
        self._over = False

    def reset(self, seed: int | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        self._over = False
        return np.stack([env.reset()[0] for env in self._envs]), {}

    def step(self, actions: np.ndarray) -> tuple[Any, ...]:
        if self._over:
            nothing = np.zeros(self.num_envs)
            return self.reset()[0], nothing, nothing.astype(bool), nothing.astype(bool), {}
        rows = [env.step(int(action))[:4] for env, action in zip(self._envs, actions, strict=True)]
        observations, rewards, terminated, truncated = (np.stack(part) for part in zip(*rows, strict=True))
        self._over = bool((terminated | truncated).any())
        return observations, rewards, terminated, truncated, {}

    def close(self) -> None: ...


def same_as_package(
    trainer: Trainer,
    package: Callable[..., Any],
    config: Callable[..., Any],
    options: dict[str, Any],
    more: dict[str, Any],
    notes: Notes,
    *,
    length: int = 5,
    total_steps: int = 60,
    rtol: float = 1e-3,
    shared: bool = False,
    without_values: bool = False,
) -> Failure | None:
    """Whether a trainer has the weights of the package's after the same draws; other draws are no fault, but a remark.

    Args:
        trainer: the learner's.
        package: the package's trainer, and `config` its settings.
        options: settings of both; `more` are the learner's only.
        length: of the episodes, which end together; longer than the run: they never end.
    """

    def make() -> probes.Probe:
        # Every step pays for the action; the second kind of pay makes the returns differ.
        return probes.Probe(lambda kind, time, first, action: 1.0 + action - 0.5 * (time % 2), length=length, cycle=5)

    num_envs, size = 4, make().size
    theirs, ours = probes.networks(size, shared=shared), probes.networks(size, shared=shared)
    start = [p.detach().clone() for p in ours.parameters()]
    settings = config(num_envs=num_envs, total_steps=total_steps, **options)
    played: list[Tensor] = []
    sample = theirs.policy.sample

    def noted(outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        played.append(sample(outputs, generator))
        return played[-1]

    theirs.policy.sample = noted  # type: ignore[method-assign]
    package(lambda n: Vector(make, n), settings, seed=0, networks=theirs)
    run = watch(
        trainer,
        lambda n: make(),
        ours,
        {**options, **more, "total_steps": total_steps},
        num_envs=num_envs,
        without_values=without_values,
    )
    if run.problem:
        return Failure(run.problem)
    first = [row.actions for row in run.iterations[0].played]
    if not all(bool((x == y).all()) for x, y in zip(first, played, strict=False)):
        remark = "You draw in another order than the specification says, so step-for-step equality was not looked at."
        notes.remarks += [remark] if remark not in notes.remarks else []
        return None
    moved = [p.detach() - before for p, before in zip(ours.parameters(), start, strict=True)]
    right = [p.detach() - before for p, before in zip(theirs.parameters(), start, strict=True)]
    off = torch.cat([(x - y).flatten() for x, y in zip(moved, right, strict=True)]).norm()
    whole = torch.cat([x.flatten() for x in right]).norm()
    if off <= rtol * whole:
        return None
    return Failure(
        f"After {total_steps} steps of {num_envs} environments the weights have moved by {float(whole):.4f} in the "
        f"package's trainer; yours are {float(off):.4f} away from there, although your first actions are the same."
    )


# --- CartPole. ---

SEEDS = (0, 1, 2)
EVERY = 2_500


def cartpole_runs(
    trainer: Trainer,
    settings: dict[str, Any],
    notes: Notes,
    variant: str,
    *,
    level: float,
    num_envs: int = 8,
    shared: bool = False,
    without_values: bool = False,
) -> Failure | None:
    """Train on CartPole under each seed; the greedy policy must reach the level in some evaluation of each."""
    for seed in SEEDS:
        networks = make_networks("CartPole-v1", (64, 64), shared=shared, seed=seed)

        def judge(policy: Any = networks.policy) -> float:
            return float(evaluate(policy, "CartPole-v1", 20).mean())

        run = watch(
            trainer,
            lambda n: cartpole(),
            networks,
            settings,
            num_envs=num_envs,
            seed=seed,
            watched=False,
            without_values=without_values,
            judge=judge,
            every=EVERY,
        )
        if run.fault:
            return Failure(f"{run.fault}\n(CartPole, seed {seed})")
        notes.runs.setdefault(variant, []).append(run.evaluations)
    best = [max(row.mean_return for row in rows) for rows in notes.runs[variant]]
    if min(best) >= level:
        return None
    shown = ", ".join(f"{x:.0f}" for x in best)
    return Failure(f"{variant}: the best of each seed's evaluations are {shown}; {level:g} is asked for.")
