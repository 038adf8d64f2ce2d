"""What the studios rest on: environments that tell an end from its aftermath, and gradients that can be read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from minirlhf_course.studios import equation9, ledger, mistakes, probes, targets
from minirlhf_course.studios.advantages import ADVANTAGES, CLIPS, clip_weights, gae
from minirlhf_course.studios.environments import Environments
from minirlhf_course.studios.ledger import batch_of, parallel, weights_of
from minirlhf_course.studios.session import watch
from minirlhf_course.studios.studio import Notes

SETTINGS = {"total_steps": 40, "gamma": 0.5}


def two_steps(cut):
    return Environments(lambda n: probes.Probe(lambda *_: 1.0, length=2, cut=cut), num_envs=3)


@pytest.mark.parametrize("cut", [False, True], ids=["terminated", "truncated"])
def test_what_followed_an_end_is_not_what_to_act_on_next(cut):
    envs = two_steps(cut)
    first = envs.reset()
    middle = envs.step(torch.tensor([0, 1, 0]))
    assert torch.equal(middle.observations, middle.next_observations) and not middle.terminated.any()
    last = envs.step([1, 1, 1])
    assert torch.equal(last.observations, first) and not torch.equal(last.next_observations, first)
    assert bool(last.terminated.all()) != cut and bool(last.truncated.all()) == cut
    assert envs.steps == 6 and last.rewards.tolist() == [1.0, 1.0, 1.0]


def test_what_a_trainer_does_to_its_tensors_stays_with_it():
    envs = two_steps(False)
    envs.reset().fill_(9.0)
    actions = torch.tensor([0, 1, 0])
    seen = []

    def trainer(envs, policy, values, **_):
        envs.reset()
        for action in range(2):
            actions.fill_(action)
            step = envs.step(actions)
            seen.append(step.rewards.clone())
            for x in step:
                x.fill_(0)
        return []

    problem = ledger.drawn(environments=3, steps=8, seed=0)
    run = watch(trainer, problem.make, problem.networks(), SETTINGS, num_envs=3)
    played = run.iterations[0].played
    assert [row.actions.tolist() for row in played] == [[0] * 3, [1] * 3]
    assert all(torch.equal(row.step.rewards, x) for row, x in zip(played, seen, strict=True))


@pytest.mark.parametrize("actions", [torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3), [0, 1]])
def test_actions_that_fit_no_environment_are_refused(actions):
    envs = two_steps(False)
    with pytest.raises(RuntimeError, match="reset"):
        envs.step([0, 0, 0])
    envs.reset()
    with pytest.raises(ValueError, match="actions must be 3 integers"):
        envs.step(actions)


def played(maximize=False):
    """Two updates, of losses whose weights are drawn: (run, [weights of each])."""
    drawn = []

    def trainer(envs, policy, values, **_):
        optimizer = torch.optim.SGD(policy.parameters(), 0.1, maximize=maximize)
        now = envs.reset()
        for seed in range(2):
            rows = []
            for _ in range(5):
                action = policy.sample(policy(now).detach())
                rows.append((now, action))
                now = envs.step(action).observations
            obs, actions = (torch.stack(x, 1) for x in zip(*rows, strict=True))
            weights = torch.randn(actions.shape, generator=torch.Generator().manual_seed(seed))
            drawn.append(weights.double())
            objective = (weights * policy.logprobs(policy(obs), actions)).sum()
            optimizer.zero_grad()
            (objective if maximize else -objective).backward()
            optimizer.step()
        return []

    problem = ledger.drawn(environments=4, steps=20, seed=4)
    return watch(trainer, problem.make, problem.networks(), SETTINGS, num_envs=4), drawn


@pytest.mark.parametrize("maximize", [False, True])
def test_a_gradient_tells_the_weight_of_every_step(maximize):
    run, drawn = played(maximize)
    assert run.fault is None and len(run.iterations) == 2
    for iteration, weights in zip(run.iterations, drawn, strict=True):
        batch = batch_of(iteration, iteration.updates[0].weights)
        assert len(set(batch.states.flatten().tolist())) == batch.states.numel(), "no observation comes twice"
        got = weights_of(iteration.updates[0], batch)
        torch.testing.assert_close(got, weights, rtol=1e-4, atol=1e-5)
        assert not ledger.outside(iteration.updates[0], batch)
        assert not parallel(-got, weights) and not parallel(got + 0.05, weights)


def test_no_known_mistake_is_right_on_the_ledger():
    run, _ = played()
    iteration = run.iterations[0]
    batch = batch_of(iteration, iteration.updates[0].weights)
    assert bool(batch.terminated.any()) and bool(batch.truncated[:, :-1].any())
    times = torch.arange(5).expand(4, -1)
    right = targets.right_targets(batch, 0.5)
    assert not [text for text, give in targets.TARGETS.items() if torch.allclose(give(batch, 0.5), right)]
    assert not parallel(targets.right_weights(batch, times, True), targets.right_weights(batch, times, False))
    right = gae(batch, 0.5, 0.8)
    assert not [text for text, give in ADVANTAGES.items() if torch.allclose(give(batch, 0.5, 0.8), right)]
    whole = batch_of(iteration, iteration.updates[0].weights, first_episodes=True)
    for by_gamma_t in (False, True):
        weights = mistakes.right_weights(whole, 0.5, by_gamma_t, True)
        same = [text for text, give in mistakes.KNOWN.items() if parallel(give(whole, 0.5, by_gamma_t, True), weights)]
        assert not same
    ratio, advantages = torch.tensor([0.5, 0.5, 1.5, 1.5, 1.1]), torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])
    right = clip_weights(ratio, advantages, 0.2)
    torch.testing.assert_close(right, torch.tensor([0.5, 0.0, 0.0, -1.5, 2.2]))
    assert not [text for text, give in CLIPS.items() if parallel(give(ratio, advantages, 0.2), right)]


def test_a_trainer_that_never_stops_is_stopped():
    def trainer(envs, policy, values, **_):
        envs.reset()
        while True:
            try:
                envs.step([0, 0])
            except Exception:  # no trainer can hold on to its environments
                continue

    run = watch(
        trainer, lambda n: probes.Probe(lambda *_: 1.0), probes.networks(2), SETTINGS, num_envs=2, watched=False
    )
    assert run.fault is not None and "plays on after" in run.fault


def test_a_kl_whose_digits_cancel_is_remarked_on_and_right_all_the_same():
    """As CleanRL writes it, k3 is 0 or negative after a tiny step: no mistake in a loop that only logs it."""
    file = Path(__file__).resolve().parents[3] / "notebooks" / "solutions" / "studios" / "03_ppo.py"
    text, space = file.read_text(encoding="utf-8"), {}
    precise, cancelling = "((ratio - 1) - ratio.log())", "((ratio - 1) - (policy.logprobs(outputs, act) - old))"
    assert text.count(precise) == 1
    for formula, remarks in ((precise, 0), (cancelling, 1)):
        exec(text.replace(precise, formula), space)
        notes = Notes()
        assert equation9.logs_what_happened(space["my_ppo"], notes) is None
        assert len(notes.remarks) == remarks and all("bug 13" in remark for remark in notes.remarks)
