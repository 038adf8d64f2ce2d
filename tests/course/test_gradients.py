"""The contribution of each episode to the gradient: their mean is the learner's, and padding has no say."""

import pytest
import torch
from minirlhf_course.gradients import episode_gradients

from minirlhf.control.environments import make_envs
from minirlhf.control.policies import make_networks
from minirlhf.control.rollout import Collector, Trajectory
from minirlhf.errors import UserError
from minirlhf.losses import policy_gradient_loss
from minirlhf.returns import discounted_returns


@pytest.fixture(params=["CartPole-v1", "Pendulum-v1"])
def played(request) -> tuple[torch.nn.Module, Trajectory]:
    policy, _ = make_networks(request.param, hidden=(8,), seed=3)
    return policy, Collector(make_envs(request.param, 5), seed=1).collect_episodes(policy)


def test_their_mean_is_the_gradient_of_the_loss(played):
    policy, episodes = played
    weights = discounted_returns(episodes.rewards, episodes.ends, 0.9, mask=episodes.mask)
    rows = episode_gradients(policy, episodes, weights)
    assert rows.shape == (5, sum(p.numel() for p in policy.parameters()))
    assert all(p.grad is None for p in policy.parameters())

    logprobs = policy.logprobs(policy(episodes.observations), episodes.actions)
    policy_gradient_loss(logprobs, weights, episodes.mask, denominator=5).backward()
    together = torch.cat([p.grad.flatten() for p in policy.parameters()])
    torch.testing.assert_close(-rows.mean(0), together, rtol=1e-4, atol=1e-5 * float(together.abs().max()))


def test_a_row_depends_on_its_own_episode_only(played):
    policy, episodes = played
    weights = torch.randn(episodes.mask.shape, generator=torch.Generator().manual_seed(0))
    rows = episode_gradients(policy, episodes, weights)
    changed = weights.clone()
    changed[1:] = 0
    only_first = episode_gradients(policy, episodes, changed)
    torch.testing.assert_close(only_first[0], rows[0])
    assert not only_first[1:].any()


def test_what_the_mask_leaves_out_changes_nothing(played):
    policy, episodes = played
    mask = episodes.mask & (torch.arange(episodes.mask.shape[1]) % 3 > 0)
    rows = episode_gradients(policy, episodes._replace(mask=mask), episodes.rewards)
    weights = torch.where(mask, episodes.rewards, torch.nan)
    observations = torch.where(mask.unsqueeze(-1), episodes.observations, torch.nan)
    assert torch.equal(
        rows, episode_gradients(policy, episodes._replace(observations=observations, mask=mask), weights)
    )


def test_weights_of_another_shape_are_an_error(played):
    with pytest.raises(UserError, match="one a step"):
        episode_gradients(*played, torch.ones(2))
