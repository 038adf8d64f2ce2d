"""The tiny problems' truths against each other: linear solves, enumeration, autograd, brute force and samples."""

from itertools import product

import pytest
import torch
from minirlhf_course.tiny import TinyMDP, bandit, chain, gridworld, text_mdp

from minirlhf.errors import UserError
from minirlhf.returns import discounted_returns

F64 = torch.float64
close = torch.testing.assert_close
ONE = torch.ones(1, 1, 1, dtype=F64)
PROBLEMS = {"bandit": bandit(), "chain": chain(4), "gridworld": gridworld(), "text": text_mdp()}
LISTED = {"bandit": bandit(), "chain": chain(3).with_horizon(4), "text": text_mdp()}


def logits(problem, seed=0):
    return torch.randn(problem.shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.fixture(params=PROBLEMS)
def problem(request):
    return PROBLEMS[request.param]


@pytest.fixture(params=LISTED)
def listed(request):
    return LISTED[request.param]


def test_values_satisfy_bellmans_equations(problem):
    theta = logits(problem)
    v, q, pi = problem.values(theta), problem.action_values(theta), theta.softmax(-1)
    close((pi * q).sum(-1), v)
    backup = problem.rewards + problem.gamma * (problem.transitions * v).sum(-1)
    close(q, backup)
    close((pi * problem.advantages(theta)).sum(-1), torch.zeros_like(v), atol=1e-12, rtol=0)


def test_the_listed_episodes_have_probability_one_and_the_exact_return_as_their_mean(listed):
    theta = logits(listed)
    episodes, probabilities = listed.enumerate(theta)
    close(probabilities.sum(), torch.ones((), dtype=F64))
    assert len({(tuple(s), tuple(a)) for s, a in zip(episodes.states.tolist(), episodes.actions.tolist(), strict=True)})
    G = discounted_returns(episodes.rewards, episodes.ends, listed.gamma, mask=episodes.mask)
    close(probabilities @ G[:, 0], listed.expected_return(theta))


def test_the_policy_gradient_theorem_agrees_with_autograd(problem):
    theta = logits(problem).requires_grad_()
    gradient = torch.autograd.grad(problem.expected_return(theta), theta)[0]
    close(problem.policy_gradient(theta), gradient, rtol=1e-9, atol=1e-12)
    assert float(gradient.norm()) > 1e-3


@pytest.mark.parametrize("problem", [bandit(), chain(3), text_mdp(length=2)], ids=["bandit", "chain", "text"])
def test_the_optimal_policy_is_the_best_of_all_deterministic_ones(problem):
    v, q, actions = problem.optimal()
    states, choices = problem.shape
    best = torch.full((states,), -torch.inf, dtype=F64)
    for candidate in product(range(choices), repeat=states):
        theta = torch.full(problem.shape, -torch.inf, dtype=F64)
        theta[torch.arange(states), torch.tensor(candidate)] = 0.0
        best = torch.maximum(best, problem.values(theta))
    close(v, best)
    close(q.max(-1).values, v)
    close(q.gather(1, actions.unsqueeze(1)).squeeze(1), v)


def test_known_answers():
    assert bandit([1.0, 3.0]).optimal()[2].tolist() == [1]
    assert chain().optimal()[2].tolist() == [1] * 5
    words = text_mdp()
    v, _, actions = words.optimal()
    assert float(v[0]) == 2.0  # "good ." and whatever stands between
    state = words.state_names.index("good")
    assert words.action_names[actions[state]] in ("good", ".")
    corner = gridworld().state_names.index("2,0")  # up slips to the right, or to the left into the edge
    assert float(gridworld().transitions[corner, 0, corner]) == pytest.approx(0.1)
    grid = gridworld(slip=0.0, step_reward=0.0, gamma=0.9)
    values = dict(zip(grid.state_names, grid.optimal()[0].tolist(), strict=True))
    assert values["0,3"] == 1.0 and values["1,3"] == -1.0
    assert values["0,0"] == pytest.approx(0.9**3)  # three steps to the goal, paid on leaving it


def test_ascending_the_exact_gradient_reaches_the_optimum():
    problem = gridworld()
    theta = torch.zeros(problem.shape, dtype=F64)
    before = float(problem.expected_return(theta))
    for _ in range(3000):
        theta += 5.0 * problem.policy_gradient(theta)
    best = float(problem.start @ problem.optimal()[0])
    assert before < 0 < best
    assert float(problem.expected_return(theta)) == pytest.approx(best, abs=0.01)


def test_samples_come_as_often_as_their_probability_says(listed):
    theta, count = logits(listed), 20_000
    episodes, probabilities = listed.enumerate(theta)
    drawn = listed.sample(theta, count, torch.Generator().manual_seed(0))

    def keys(episodes):
        lists = (episodes.states.tolist(), episodes.actions.tolist(), episodes.mask.sum(1).tolist())
        return [(tuple(s[:n]), tuple(a[:n])) for s, a, n in zip(*lists, strict=True)]

    place = {key: n for n, key in enumerate(keys(episodes))}
    # The same states and actions can end or go on, so a key may stand for two listed episodes only if both ended.
    assert len(place) == len(probabilities)
    frequencies = torch.zeros(len(place), dtype=F64)
    for key in keys(drawn):
        frequencies[place[key]] += 1 / count
    errors = (frequencies - probabilities) / (probabilities * (1 - probabilities) / count).sqrt()
    assert float(errors.abs().max()) < 4.5
    close(drawn.rewards, torch.where(drawn.mask, listed.rewards[drawn.states, drawn.actions], 0.0))
    assert bool((drawn.ends.sum(1) == 1).all())


def test_reward_noise_changes_samples_and_no_expectation():
    quiet, noisy = bandit(), bandit(reward_noise=2.0)
    theta = logits(quiet)
    close(quiet.policy_gradient(theta), noisy.policy_gradient(theta))
    rewards = noisy.sample(theta, 40_000, torch.Generator().manual_seed(1)).rewards
    assert float(rewards.mean()) == pytest.approx(float(quiet.expected_return(theta)), abs=0.05)
    assert float(rewards.var()) > 4.0


def test_an_episode_that_is_cut_has_no_end():
    endless, theta = TinyMDP(ONE, ONE[0], ONE[0, 0], 0.5, ("s",), ("a",)), torch.zeros(1, 1, dtype=F64)
    episodes = endless.sample(theta, 3, max_steps=7)
    assert episodes.mask.shape == (3, 7) and not bool(episodes.ends.any())
    assert float(endless.values(theta)) == 2.0  # 1 + 1/2 + 1/4 + ...
    with pytest.raises(UserError, match="with_horizon"):
        endless.enumerate(theta)


IMPOSSIBLE = {
    "grid must be rows of one length": lambda: gridworld(("S.", "...")),
    "at least one S": lambda: gridworld(("..",)),
    "stop must be a word": lambda: text_mdp(stop="!"),
    "length must be at least 1": lambda: chain(0),
    "reward_noise": lambda: bandit([1.0], reward_noise=-1.0),
    "sum to at most 1": lambda: TinyMDP(2 * ONE, ONE[0], ONE[0, 0], 1.0, ("s",), ("a",)),
}


@pytest.mark.parametrize("message", IMPOSSIBLE)
def test_impossible_problems_are_refused(message):
    with pytest.raises(UserError, match=message):
        IMPOSSIBLE[message]()


def test_single_steps_follow_the_tables():
    generator = torch.Generator().manual_seed(0)
    problem = chain(2, slip=0.3)
    rewards, after, ended = zip(*(problem.step(1, 1, generator) for _ in range(2000)), strict=True)
    assert set(rewards) == {float(problem.rewards[1, 1])} and set(after) == {0}, "out on the right, or back to cell 0"
    assert abs(sum(ended) / 2000 - 0.7) < 0.04
    noisy = torch.tensor([bandit((1.0, 5.0), reward_noise=2.0).step(0, 1, generator)[0] for _ in range(2000)])
    assert abs(float(noisy.mean()) - 5) < 0.2 and abs(float(noisy.std()) - 2) < 0.15
