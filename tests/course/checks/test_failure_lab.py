"""The failure lab: each letter trains for real, shows the clue that its reveal names, and leaves PPO as it was."""

from __future__ import annotations

import csv
from pathlib import Path

import nbformat
import pytest
import torch
from minirlhf_course import failure_lab

from minirlhf.control import ppo
from minirlhf.control.ppo import PPOConfig, train_ppo
from minirlhf.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
SHORT = PPOConfig(total_steps=6_000)


@pytest.fixture(scope="module")
def histories():
    torch.set_num_threads(1)
    return {letter: failure_lab.train(letter, "CartPole-v1", SHORT, seed=3).history for letter in failure_lab.RUNS}


def test_a_run_leaves_ppo_as_it_was(histories):
    assert ppo.gae is failure_lab.gae and ppo.ppo_loss is failure_lab.ppo_loss
    with pytest.raises(ZeroDivisionError), failure_lab.planted({"gae": failure_lab.reward_minus_value}):
        assert ppo.gae is failure_lab.reward_minus_value
        raise ZeroDivisionError
    assert ppo.gae is failure_lab.gae


def test_the_healthy_letter_is_the_same_run_as_without_the_lab(histories):
    healthy = train_ppo("CartPole-v1", SHORT, seed=3).history
    keys = [key for key in healthy[0] if key != "perf/seconds"]
    assert [[row[key] for key in keys] for row in histories["D"]] == [[row[key] for key in keys] for row in healthy]


def test_every_bug_changes_the_run(histories):
    entropies = {letter: [row["policy/entropy"] for row in history] for letter, history in histories.items()}
    assert len({tuple(values) for values in entropies.values()}) == len(failure_lab.RUNS)


def test_the_clues_are_there(histories):
    first = {letter: history[0] for letter, history in histories.items()}
    last = {letter: history[-1] for letter, history in histories.items()}
    healthy = first["D"]
    assert all(row["policy/approx_kl"] == 0 == row["policy/clip_fraction"] for row in histories["A"])
    assert first["A"]["policy/kl"] > 20 * healthy["policy/kl"]
    assert last["B"]["objective/episode_return"] < 25 and last["B"]["policy/clip_fraction"] < 0.1
    assert first["C"]["policy/approx_kl"] > 10 * healthy["policy/approx_kl"]
    assert all(row["value/loss"] < 0.7 for row in histories["E"]) and healthy["value/loss"] > 5
    assert last["F"]["objective/episode_return"] < 12 and last["F"]["policy/entropy"] < 0.1


def test_wrong_versions_on_two_episodes_in_one_row():
    # Step 1 ends an episode of two, column 2 resets, columns 3 and 4 belong to the next; all values 10, gamma 1.
    rewards = torch.tensor([[1.0, 1.0, 0.0, 1.0, 1.0]])
    values = torch.full((1, 5), 10.0)
    ends = torch.tensor([[False, True, False, False, False]])
    options = {
        "gamma": 1.0,
        "lam": 0.0,
        "last_values": torch.tensor([10.0]),
        "truncated_values": torch.zeros(1, 5),
        "mask": torch.tensor([[True, True, False, True, True]]),
    }

    def advantages(function):
        return function(rewards, values, ends, **options)[0][0, [0, 1, 3, 4]].tolist()

    assert advantages(failure_lab.gae) == [1.0, -9.0, 1.0, 1.0]
    assert advantages(failure_lab.termination_as_truncation) == [1.0, 1.0, 1.0, 1.0]
    assert advantages(failure_lab.end_kept_with_the_next_observation) == [1.0, 1.0, -9.0, 1.0]
    assert advantages(failure_lab.reward_minus_value) == [-9.0] * 4
    cut = options | {"truncated_values": torch.tensor([[0.0, 10.0, 0.0, 0.0, 0.0]])}
    assert failure_lab.gae(rewards, values, ends, **cut)[0][0, 1] == 1.0
    assert failure_lab.truncation_as_termination(rewards, values, ends, **cut)[0][0, 1] == -9.0


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"), [(1.5, 2.0, -3.0), (0.5, 2.0, -1.6), (1.5, -2.0, 2.4), (0.5, -2.0, 1.0)]
)
def test_max_for_min_by_hand(ratio, advantage, loss):
    new = torch.tensor([ratio]).log()
    mask = torch.ones(1, dtype=torch.bool)
    got, _ = failure_lab.max_for_min(new, torch.zeros(1), torch.tensor([advantage]), mask, clip_range=0.2)
    assert got.item() == pytest.approx(loss)
    got, _ = failure_lab.minus_missing(new, torch.zeros(1), torch.tensor([advantage]), mask, clip_range=0.2)
    clipped = min(max(ratio, 0.8), 1.2)
    assert got.item() == pytest.approx(min(ratio * advantage, clipped * advantage))


def test_unknown_letters_are_refused():
    with pytest.raises(UserError, match="not 'Z'"):
        failure_lab.train("Z", "CartPole-v1")
    with pytest.raises(UserError, match="not 'Z'"):
        failure_lab.reveal("Z")


def test_the_lesson_shows_what_the_lab_says_and_its_file_holds_every_run():
    lesson = nbformat.read(ROOT / "notebooks" / "05_trpo_to_ppo.ipynb", as_version=4)
    text = "\n".join(cell.source for cell in lesson.cells if cell.cell_type == "markdown")
    for letter in failure_lab.RUNS:
        assert failure_lab.reveal(letter) in text, f"run {letter}: rebuild the fold from failure_lab.reveal"
    with (ROOT / "data" / "results" / "failure_lab.csv").open(encoding="utf-8", newline="") as file:
        assert file.readline().startswith("# ")
        runs = {row["run"] for row in csv.DictReader(file)}
    assert runs == {"healthy", *failure_lab.RUNS}
