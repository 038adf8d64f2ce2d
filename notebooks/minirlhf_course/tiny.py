"""Problems so small that the truth can be computed: values, the best policy, and the exact policy gradient.

A `TinyMDP` is three tables and a discount. Where a row of `transitions` sums to less than 1, the rest is the chance
that the episode ends: no terminal state is needed, and the value after an end is 0 of itself. With pi the softmax of a
table of logits theta [S, A] (Sutton & Barto, equations 4.4 and 13.5):

    V = r_pi + gamma P_pi V            so      V = (I - gamma P_pi)^-1 r_pi         `values`
    Q(s, a) = r(s, a) + gamma sum over s' of P(s'|s, a) V(s')                       `action_values`
    grad J(theta)[s, a] = d(s) pi(a|s) (Q(s, a) - V(s))                             `policy_gradient`

d(s) is the expected discounted count of visits. Against these, estimates from sampled episodes can be held:

    >>> problem = chain()
    >>> theta = torch.zeros(problem.shape, dtype=torch.float64)
    >>> episodes = problem.sample(theta, 2000, torch.Generator().manual_seed(0))
    >>> G = discounted_returns(episodes.rewards, episodes.ends, problem.gamma, mask=episodes.mask)
    >>> estimates = gradient_estimates(episodes, theta, G, problem.gamma)
    >>> error = (estimates.mean(0) - problem.policy_gradient(theta)).norm() / problem.policy_gradient(theta).norm()
    >>> bool(error < 0.1)
    True
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.errors import UserError
from minirlhf.returns import discounted_returns

__all__ = [
    "Episodes",
    "TinyMDP",
    "bandit",
    "chain",
    "discounted_returns",
    "gradient_estimates",
    "gridworld",
    "text_mdp",
    "two_junctions",
]

F64 = torch.float64


class Episodes(NamedTuple):
    """Episodes [N, T], padded to the longest: what lies where mask is False is 0."""

    states: Tensor
    """int64"""
    actions: Tensor
    """int64"""
    rewards: Tensor
    """float64"""
    ends: Tensor
    """bool, the last step of each episode that ended (one cut by `max_steps` has none)."""
    mask: Tensor
    """bool, True = a step that was played."""


@dataclass(frozen=True)
class TinyMDP:
    """A finite Markov decision process, all in float64.

    >>> problem = bandit([1.0, 3.0])
    >>> problem.expected_return(torch.zeros(problem.shape, dtype=torch.float64))  # each arm half of the time
    tensor(2., dtype=torch.float64)
    """

    transitions: Tensor
    """[S, A, S]: P(s' | s, a); what a row lacks to 1 is the chance that the episode ends."""
    rewards: Tensor
    """[S, A]: the expected reward of action a in state s."""
    start: Tensor
    """[S]: the chance to begin in each state."""
    gamma: float
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    reward_noise: float = 0.0
    """Standard deviation of the Gaussian noise on each sampled reward; no expectation depends on it."""

    def __post_init__(self) -> None:
        states, actions = self.rewards.shape
        for name, shape in {"transitions": (states, actions, states), "start": (states,)}.items():
            if getattr(self, name).shape != shape:
                raise UserError(f"TinyMDP: {name} must be {list(shape)}, not {list(getattr(self, name).shape)}")
        if len(self.state_names) != states or len(self.action_names) != actions:
            raise UserError(f"TinyMDP: {states} states and {actions} actions need as many names")
        totals = self.transitions.sum(-1)
        if bool((self.transitions < 0).any() | (totals > 1 + 1e-12).any()):
            raise UserError("TinyMDP: transitions must be at least 0 and sum to at most 1 over the next state")
        if bool((self.start < 0).any()) or abs(float(self.start.sum()) - 1) > 1e-12:
            raise UserError("TinyMDP: start must be a distribution over states")
        if not 0 <= self.gamma <= 1 or self.reward_noise < 0:
            raise UserError("TinyMDP: gamma must lie in [0, 1] and reward_noise be at least 0")

    @property
    def shape(self) -> tuple[int, int]:
        """(S, A), the shape of a table of logits."""
        return self.rewards.shape[0], self.rewards.shape[1]

    # The truth about a policy, softmax(theta) with theta [S, A]

    def values(self, theta: Tensor) -> Tensor:
        """V [S] by one linear solve; differentiable. (With gamma = 1 every episode must end under the policy.)"""
        pi = theta.softmax(-1)
        reward = (pi * self.rewards).sum(-1)
        move = torch.einsum("sa,sat->st", pi, self.transitions)
        return torch.linalg.solve(torch.eye(len(move), dtype=F64) - self.gamma * move, reward)

    def action_values(self, theta: Tensor) -> Tensor:
        """Q [S, A]"""
        return self.rewards + self.gamma * self.transitions @ self.values(theta)

    def advantages(self, theta: Tensor) -> Tensor:
        """A = Q - V [S, A]"""
        return self.action_values(theta) - self.values(theta).unsqueeze(-1)

    def expected_return(self, theta: Tensor) -> Tensor:
        """J = E[G_0], what a policy gradient ascends; differentiable."""
        return self.start @ self.values(theta)

    def visits(self, theta: Tensor) -> Tensor:
        """d [S]: sum over t of gamma^t P(S_t = s), counted while the episode lasts."""
        move = torch.einsum("sa,sat->st", theta.softmax(-1), self.transitions)
        return torch.linalg.solve(torch.eye(len(move), dtype=F64) - self.gamma * move.T, self.start)

    def policy_gradient(self, theta: Tensor) -> Tensor:
        """grad J [S, A] by the policy gradient theorem, exactly (autograd through `expected_return` agrees)."""
        theta = theta.detach()
        return self.visits(theta).unsqueeze(-1) * theta.softmax(-1) * self.advantages(theta)

    def optimal(self) -> tuple[Tensor, Tensor, Tensor]:
        """(V* [S], Q* [S, A], actions [S] int64, the first of the best in each state), by policy iteration.

        With gamma = 1 every policy that it meets, the always-first-action one included, must end its episodes.
        """
        best = torch.zeros(len(self.rewards), dtype=torch.int64)
        while True:
            q = self._action_values_of(best)
            # Move only for a real gain, or ties that differ by rounding would be swapped for ever.
            gain = q.max(-1).values - q.gather(1, best.unsqueeze(1)).squeeze(1)
            if not bool((gain > 1e-10).any()):
                first = (q >= q.max(-1, keepdim=True).values - 1e-10).to(torch.int64).argmax(-1)
                return q.max(-1).values, q, first
            best = torch.where(gain > 1e-10, q.argmax(-1), best)

    def _action_values_of(self, actions: Tensor) -> Tensor:
        rows = torch.arange(len(actions))
        move = self.transitions[rows, actions]
        v = torch.linalg.solve(torch.eye(len(rows), dtype=F64) - self.gamma * move, self.rewards[rows, actions])
        return self.rewards + self.gamma * self.transitions @ v

    # Episodes: drawn, or all that there are

    def sample(
        self, theta: Tensor, episodes: int, generator: torch.Generator | None = None, *, max_steps: int = 1000
    ) -> Episodes:
        """Draw whole episodes, all side by side. Those not over after `max_steps` are cut there."""
        pi = theta.detach().softmax(-1)
        # The end is drawn as one more next state.
        ending = (1 - self.transitions.sum(-1, keepdim=True)).clamp(min=0)
        moves = torch.cat((self.transitions, ending), -1)
        s = torch.multinomial(self.start, episodes, replacement=True, generator=generator)
        running = torch.ones(episodes, dtype=torch.bool)
        columns: list[tuple[Tensor, ...]] = []
        while bool(running.any()) and len(columns) < max_steps:
            a = torch.multinomial(pi[s], 1, generator=generator).squeeze(1)
            r = self.rewards[s, a]
            if self.reward_noise:
                r = r + self.reward_noise * torch.randn(episodes, generator=generator, dtype=F64)
            after = torch.multinomial(moves[s, a], 1, generator=generator).squeeze(1)
            over = running & (after == len(self.rewards))
            columns.append((s * running, a * running, torch.where(running, r, 0.0), over, running))
            running = running & ~over
            s = torch.where(running, after, 0)
        return Episodes(*(torch.stack(part, 1) for part in zip(*columns, strict=True)))

    def step(self, state: int, action: int, generator: torch.Generator | None = None) -> tuple[float, int, bool]:
        """One step: (reward, the state that it led to, whether the episode ended; the state is then 0)."""
        moves = torch.cat(
            (self.transitions[state, action], (1 - self.transitions[state, action].sum()).clamp(min=0)[None])
        )
        after = int(torch.multinomial(moves, 1, generator=generator))
        reward = float(self.rewards[state, action])
        if self.reward_noise:
            reward += self.reward_noise * float(torch.randn((), generator=generator, dtype=F64))
        return (reward, 0, True) if after == len(self.rewards) else (reward, after, False)

    def enumerate(self, theta: Tensor, *, max_episodes: int = 200_000) -> tuple[Episodes, Tensor]:
        """Every episode that can happen, and the probability of each [N], which sum to 1.

        Raises UserError where episodes can go on for ever, or are more than `max_episodes`: see `with_horizon`. The
        rewards are the expected ones.
        """
        pi = theta.detach().softmax(-1)
        ending = (1 - self.transitions.sum(-1)).clamp(min=0)
        done: list[tuple[list[int], list[int], float]] = []
        open_ones: list[tuple[list[int], list[int], float]] = []
        open_ones += [([s], [], p) for s, p in enumerate(self.start.tolist()) if p > 0]
        while open_ones:
            states, actions, chance = open_ones.pop()
            if len(done) + len(open_ones) > max_episodes or len(actions) > len(self.rewards):
                raise UserError("TinyMDP: too many episodes to list, or endless ones: use with_horizon(steps)")
            for a in range(len(self.action_names)):
                p = chance * float(pi[states[-1], a])
                if float(ending[states[-1], a]) > 1e-12:
                    done.append((states, [*actions, a], p * float(ending[states[-1], a])))
                for after in self.transitions[states[-1], a].nonzero().flatten().tolist():
                    moved = p * float(self.transitions[states[-1], a, after])
                    open_ones.append(([*states, after], [*actions, a], moved))
        shape = (len(done), max(len(actions) for _, actions, _ in done))
        states_table, actions_table = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        ends, mask = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
        for n, (states, actions, _) in enumerate(done):
            length = len(actions)
            states_table[n, :length], actions_table[n, :length] = torch.tensor(states), torch.tensor(actions)
            ends[n, length - 1], mask[n, :length] = True, True
        rewards = torch.where(mask, self.rewards[states_table, actions_table], 0.0)
        chances = torch.tensor([chance for _, _, chance in done], dtype=F64)
        return Episodes(states_table, actions_table, rewards, ends, mask), chances

    def with_horizon(self, steps: int) -> TinyMDP:
        """The same problem, ended after `steps` steps; the time becomes a part of the state (S * steps of them).

        So the end is a termination: nothing is cut, and every episode can be listed.
        """
        states, actions = self.shape
        transitions = torch.zeros(steps, states, actions, steps, states, dtype=F64)
        for t in range(steps - 1):
            transitions[t, :, :, t + 1] = self.transitions
        start = torch.zeros(steps, states, dtype=F64)
        start[0] = self.start
        return TinyMDP(
            transitions.reshape(steps * states, actions, steps * states),
            self.rewards.repeat(steps, 1),
            start.flatten(),
            self.gamma,
            tuple(f"{name}, t={t}" for t in range(steps) for name in self.state_names),
            self.action_names,
            self.reward_noise,
        )


def gradient_estimates(episodes: Episodes, theta: Tensor, weights: Tensor, gamma: float) -> Tensor:
    """One estimate of grad J an episode: [N, S, A].

        sum over t of gamma^t weights_t grad log pi(A_t | S_t),      grad log pi(a | s) = onehot(a) - pi(. | s)

    weights [N, T] say what each step is worth: G, G - V, a TD error, an advantage. Their mean over episodes is the
    estimate that a learner follows, their variance its noise. gamma^t belongs to the gradient of J; pass 1.0 to see
    what leaving it out does.
    """
    pi = theta.detach().softmax(-1)
    count, length = episodes.mask.shape
    scale = torch.where(episodes.mask, weights.to(F64) * gamma ** torch.arange(length, dtype=F64), 0.0)
    steps = torch.nn.functional.one_hot(episodes.actions, theta.shape[1]) - pi[episodes.states]  # [N, T, A]
    estimates = torch.zeros(count, *theta.shape, dtype=F64)
    index = episodes.states.unsqueeze(-1).expand(-1, -1, theta.shape[1])
    return estimates.scatter_add(1, index, scale.unsqueeze(-1) * steps)


def bandit(means: tuple[float, ...] | list[float] = (1.0, 2.0, 3.0), *, reward_noise: float = 0.0) -> TinyMDP:
    """One state, one action, over: arm k pays means[k] on average."""
    rewards = torch.tensor([list(means)], dtype=F64)
    names = tuple(f"arm {k}" for k in range(len(means)))
    transitions = torch.zeros(1, len(means), 1, dtype=F64)
    return TinyMDP(transitions, rewards, torch.ones(1, dtype=F64), 1.0, ("pull",), names, reward_noise)


def chain(length: int = 5, *, slip: float = 0.1, step_reward: float = -0.04, gamma: float = 0.95) -> TinyMDP:
    """A corridor of `length` cells from left to right; whoever steps out on the right gets 1 and is done.

    Each step costs `step_reward`, and with probability `slip` it goes the other way.
    """
    if length < 1:
        raise UserError(f"length must be at least 1, not {length}")
    transitions, rewards = torch.zeros(length, 2, length, dtype=F64), torch.full((length, 2), step_reward, dtype=F64)
    for s, a in product(range(length), range(2)):
        for toward, chance in ((a, 1 - slip), (1 - a, slip)):
            after = max(s - 1, 0) if toward == 0 else s + 1
            if after < length:
                transitions[s, a, after] += chance
            else:
                rewards[s, a] += chance  # out on the right
    start = torch.zeros(length, dtype=F64)
    start[0] = 1.0
    return TinyMDP(transitions, rewards, start, gamma, tuple(f"cell {s}" for s in range(length)), ("left", "right"))


GRID = ("S..G", ".#.P", "....")
"""The map of `gridworld`: start, goal, pit, wall, floor (after Russell & Norvig's 4 x 3 world)."""


def gridworld(
    grid: tuple[str, ...] = GRID, *, slip: float = 0.1, step_reward: float = -0.04, gamma: float = 0.95
) -> TinyMDP:
    """A map of S (start), G (goal, +1), P (pit, -1), # (wall) and . (floor); G and P end the episode when left.

    A step goes where it should, or with probability `slip` each to the left or right of that. Walls and edges hold.
    State names are "row,column". The actions are up, right, down, left.
    """
    cells = [(y, x) for y, row in enumerate(grid) for x, mark in enumerate(row) if mark != "#"]
    if len({len(row) for row in grid}) != 1 or set("".join(grid)) - set("SGP#.") or "S" not in "".join(grid):
        raise UserError("grid must be rows of one length made of S, G, P, # and ., with at least one S")
    number = {cell: s for s, cell in enumerate(cells)}
    steps = ((-1, 0), (0, 1), (1, 0), (0, -1))
    transitions, rewards = torch.zeros(len(cells), 4, len(cells), dtype=F64), torch.zeros(len(cells), 4, dtype=F64)
    for (y, x), a in product(cells, range(4)):
        s, mark = number[y, x], grid[y][x]
        if mark in "GP":
            rewards[s, a] = 1.0 if mark == "G" else -1.0
            continue
        rewards[s, a] = step_reward
        for turn, chance in ((0, 1 - 2 * slip), (1, slip), (-1, slip)):
            dy, dx = steps[(a + turn) % 4]
            transitions[s, a, number.get((y + dy, x + dx), s)] += chance
    begins = torch.tensor([float(grid[y][x] == "S") for y, x in cells], dtype=F64)
    names = tuple(f"{y},{x}" for y, x in cells)
    return TinyMDP(transitions, rewards, begins / begins.sum(), gamma, names, ("up", "right", "down", "left"))


def two_junctions() -> TinyMDP:
    """Two junctions in a row. Left at the first ends the walk with nothing; at the second left pays 1 and right -1.

    Who takes them for one and goes right with probability p at both has J = p (1 - 2 p).

    >>> alike = torch.tensor([[0.75, 0.25]] * 2, dtype=torch.float64).log()  # the best p there is
    >>> float(two_junctions().expected_return(alike))
    0.125
    """
    transitions, rewards = torch.zeros(2, 2, 2, dtype=F64), torch.tensor([[0.0, 0.0], [1.0, -1.0]], dtype=F64)
    transitions[0, 1, 1] = 1.0
    start = torch.tensor([1.0, 0.0], dtype=F64)
    return TinyMDP(transitions, rewards, start, 1.0, ("first junction", "second junction"), ("left", "right"))


def _agreement(words: tuple[str, ...]) -> float:
    """1 for a sentence that ends in "." after a word, and 1 more if it says "good" and never "bad"."""
    whole = len(words) > 1 and words[-1] == "."
    return float(whole) + float(whole and "good" in words and "bad" not in words)


def text_mdp(
    vocabulary: tuple[str, ...] = ("good", "bad", "."),
    length: int = 3,
    *,
    score: Callable[[tuple[str, ...]], float] = _agreement,
    stop: str = ".",
) -> TinyMDP:
    """Writing as an MDP: a state is the text so far, an action the next word, and the score comes once, at the end.

    The text ends with `stop` or after `length` words; gamma is 1. This is RLHF's problem in miniature: one reward for
    a whole answer, and credit to be given to each of its words. The state names are the texts.
    """
    if stop not in vocabulary or length < 1:
        raise UserError(f"stop must be a word of {vocabulary} and length at least 1, not {stop!r} and {length}")
    words = [word for word in vocabulary if word != stop]
    prefixes = [text for n in range(length) for text in product(words, repeat=n)]
    number = {text: s for s, text in enumerate(prefixes)}
    shape = (len(prefixes), len(vocabulary))
    transitions, rewards = torch.zeros(*shape, len(prefixes), dtype=F64), torch.zeros(shape, dtype=F64)
    for (s, text), (a, word) in product(enumerate(prefixes), enumerate(vocabulary)):
        longer = (*text, word)
        if word == stop or len(longer) == length:
            rewards[s, a] = score(longer)
        else:
            transitions[s, a, number[longer]] = 1.0
    start = torch.zeros(len(prefixes), dtype=F64)
    start[0] = 1.0
    return TinyMDP(transitions, rewards, start, 1.0, tuple(" ".join(text) for text in prefixes), vocabulary)
