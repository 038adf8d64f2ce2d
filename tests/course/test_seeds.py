"""When a run first reached a level."""

from __future__ import annotations

from types import SimpleNamespace

from minirlhf_course.seeds import SeedRun, run_seeds

from minirlhf.control.evaluation import Evaluation
from minirlhf.control.reinforce import ReinforceConfig, train_reinforce


def test_the_first_evaluation_at_a_level_counts_and_a_later_fall_does_not():
    rows = [Evaluation(steps, 0.0, value) for steps, value in ((10, 20.0), (20, 475.0), (30, 90.0), (40, 500.0))]
    run = SeedRun(0, SimpleNamespace(), rows, None)
    assert (run.first_at(475), run.first_at(476), run.first_at(501)) == (20, 40, None)


def test_seeds_may_come_one_by_one():
    runs = run_seeds(train_reinforce, "CartPole-v1", ReinforceConfig(total_steps=200), iter([3, 1]), episodes=1)
    assert [run.seed for run in runs] == [3, 1] and all(run.evaluations for run in runs)
