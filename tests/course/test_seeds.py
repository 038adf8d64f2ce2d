"""When a run first reached a level."""

from __future__ import annotations

from types import SimpleNamespace

from minirlhf_course.seeds import SeedRun, run_seeds

from minirlhf.control.evaluation import Evaluation


def test_the_first_evaluation_at_a_level_counts_and_a_later_fall_does_not():
    rows = [Evaluation(steps, 0.0, value) for steps, value in ((10, 20.0), (20, 475.0), (30, 90.0), (40, 500.0))]
    run = SeedRun(0, SimpleNamespace(), rows, None)
    assert (run.first_at(475), run.first_at(476), run.first_at(501)) == (20, 40, None)


def test_seeds_may_come_one_by_one():
    """As from a progress bar: each is trained before the next is asked for."""
    order = []

    def seeds():
        for seed in (3, 1):
            order.append(f"seed {seed}")
            yield seed

    def train(env, config, *, seed, callback, progress):
        order.append(f"trained {seed}")
        return SimpleNamespace()

    runs = run_seeds(train, "CartPole-v1", None, seeds())
    assert [run.seed for run in runs] == [3, 1]
    assert order == ["seed 3", "trained 3", "seed 1", "trained 1"]
