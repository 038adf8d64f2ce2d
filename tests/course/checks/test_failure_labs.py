"""The failure labs: each letter plants its mistake, trains for real, shows its clue, and leaves PPO as it was."""

from __future__ import annotations

import csv
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from minirlhf_course import failure_lab, text_failure_lab

from minirlhf.control import ppo
from minirlhf.control.ppo import PPOConfig, train_ppo
from minirlhf.errors import UserError
from minirlhf.language import rlhf, rollouts

ROOT = Path(__file__).resolve().parents[3]
SHORT = PPOConfig(total_steps=6_000)
LABS = {"05_trpo_to_ppo": (failure_lab, ppo), "09_ppo_kl_ptx": (text_failure_lab, rlhf, rollouts)}
LETTERS = [(lab, trainers, letter) for lab, *trainers in LABS.values() for letter in lab.RUNS]


# Both ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lab", "trainers", "letter"), LETTERS, ids=[f"{x[1][0].__name__}-{x[2]}" for x in LETTERS])
def test_a_mistake_is_planted_while_it_lasts_and_gone_after(lab, trainers, letter):
    run = lab.RUNS[letter]
    places = [(trainer, name) for trainer in trainers for name in run.instead if hasattr(trainer, name)]
    assert {name for _, name in places} == set(run.instead)
    before = [getattr(*place) for place in places]
    with pytest.raises(ZeroDivisionError), lab.planted(run.instead):
        assert all(getattr(trainer, name) is run.instead[name] for trainer, name in places)
        raise ZeroDivisionError
    assert [getattr(*place) for place in places] == before
    assert lab.reveal(letter).startswith(f"**{letter}.** ")


@pytest.mark.parametrize("lesson", LABS)
def test_the_lesson_shows_what_the_lab_says_and_its_file_holds_every_run(lesson):
    lab = LABS[lesson][0]
    cells = nbformat.read(ROOT / "notebooks" / f"{lesson}.ipynb", as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for letter, run in lab.RUNS.items():
        assert lab.reveal(letter) in text, f"run {letter}: rebuild the fold from the lab's reveal"
        assert f"\n{run.number}. {run.name}\n" in text, "the list of suspects is the lab's own"
        assert f"run {letter}" not in text.split("## The failure lab")[0], "told before it is asked"
    with (ROOT / "data" / "results" / f"{lab.__name__.split('.')[-1]}.csv").open(encoding="utf-8", newline="") as file:
        assert file.readline().startswith("# ")
        runs = {row["run"] for row in csv.DictReader(file)}
    assert runs == {"healthy", *lab.RUNS}


@pytest.mark.parametrize(("lab", "healthy"), [(failure_lab, "D"), (text_failure_lab, "C")])
def test_one_run_is_healthy_and_an_unknown_letter_is_refused(lab, healthy):
    assert [letter for letter, run in lab.RUNS.items() if not run.instead] == [healthy]
    for asked in (lab.reveal, lambda letter: lab.train(letter, "CartPole-v1")):
        with pytest.raises(UserError, match=f"{', '.join(lab.RUNS)}, not 'Z'"):
            asked("Z")


@pytest.mark.parametrize("lab", [failure_lab, text_failure_lab])
def test_match_tells_right_from_wrong_and_not_which_number_would_be_right(lab):
    right = {letter: run.number for letter, run in lab.RUNS.items()}
    count = len(right)
    assert sorted(right.values()) == list(range(1, count + 1))
    said = lab.match(right)
    assert said.endswith(f"**{count} of {count} right.**") and "more than once" not in said
    assert all(f"*The clue:* {run.clue}" in said for run in lab.RUNS.values())
    assert lab.match(dict.fromkeys(right)).startswith("No answers yet: a number from 1 to")

    letter = next(iter(right))
    own, other = lab.RUNS[letter], next(run for run in lab.RUNS.values() if run.number != right[letter])
    said = lab.match({letter: other.number})
    assert f"**{letter}**: not {other.number}, {other.name}. {own.look}" in said and own.name not in said
    assert own.clue not in said and said.endswith(f"**0 of {count} right.**")
    said = lab.match({letter: count + 1})
    assert f"there is no {count + 1}" in said and own.name not in said
    assert "you have 1 more than once" in lab.match(dict.fromkeys(list(right)[:2], 1))
    with pytest.raises(UserError, match="not 'Z'"):
        lab.match({"Z": 1})


def test_a_page_of_the_lab_draws_every_seed_inside_of_its_panel():
    def row(run, seed, step, kl):
        return {"run": run, "seed": str(seed), "step": str(step), "kl": kl}

    rows = [row("healthy", seed, step, f"{0.1 * (seed + 1)}") for seed in range(3) for step in range(4)]
    rows += [row(run, seed, step, "50") for run in "AB" for seed in range(2) for step in range(3)]
    rows += [row("A", 1, 3, ""), row("B", 0, 3, "1")]  # a point without the metric, and a longer seed
    meter = failure_lab.Meter("kl", "KL, nats (log)", 0.01, 10, (0.01, 1, 10), log=True)
    figure = failure_lab.draw(rows, ["A", "B"], [meter, meter], "step", "step")
    assert len(figure.axes) == 4 and figure.get_size_inches()[0] == 10
    for axis in figure.axes:
        median, *seeds = (line.get_ydata() for line in axis.get_lines())
        assert median == pytest.approx([0.2] * 4) and [list(seed) for seed in seeds] == [[10.0] * 3] * 2
        assert axis.get_ylim()[1] > 10 and axis.get_yscale() == "log"
    assert [axis.get_title("left") for axis in figure.axes] == ["KL, nats (log)"] * 2 + [""] * 2


# Control -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def histories():
    return {letter: failure_lab.train(letter, "CartPole-v1", SHORT, seed=3).history for letter in failure_lab.RUNS}


def test_a_run_leaves_ppo_as_it_was(histories):
    assert ppo.gae is failure_lab.gae and ppo.ppo_loss is failure_lab.ppo_loss


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


@pytest.fixture(scope="module")
def stored():
    with (ROOT / "data" / "results" / "failure_lab.csv").open(encoding="utf-8", newline="") as file:
        file.readline()
        rows = list(csv.DictReader(file))

    def of(run, metric):
        return failure_lab.curves(rows, run, metric, "env_steps")[1]

    return rows, of


def test_what_the_folds_say_holds_in_the_stored_runs(stored):
    _, of = stored
    kl, entropy, loss, explained = "policy/approx_kl", "policy/entropy", "value/loss", "value/explained_variance"
    others = {letter: ["healthy", *(run for run in failure_lab.RUNS if run != letter)] for letter in failure_lab.RUNS}
    first = {run: of(run, kl)[:, 0] for run in others["A"] + ["A"]}
    assert (of("A", kl) == 0).all() and (of("A", "policy/clip_fraction") == 0).all()
    assert all((of(run, kl).max(1) > 0).all() for run in others["A"])
    assert first["B"].min() > 0 and first["B"].max() < min(first[run].min() for run in others["B"] if run != "A")
    assert all(x > 10 * first["healthy"].max() for run in "CF" for x in first[run])
    assert of("C", kl)[:, :5].mean() > first["C"].mean(), "the next ones are no better"
    after = {run: of(run, entropy)[:, 1] for run in first}
    assert after["F"].max() < 0.15 < after["A"].max() < after["C"].min() and after["C"].max() < after["D"].min()
    assert all(np.median(of(run, "return")) < 12 for run in "BCF")
    assert of("D", "return")[:, -5:].mean() > 475
    assert of("H", "return")[:, -5:].min() > 475 and (of("E", "return")[:, -5:].mean(1) > 475).sum() == 2
    assert of("E", loss).min() > 0.2 and of("E", loss).max() < 0.6
    assert min(of(run, loss)[:, 0].min() for run in others["E"]) > 40 * of("E", loss)[:, 0].max()
    assert of("E", explained).mean() > of("healthy", explained).mean()
    assert np.median(of("G", loss)[:, 25]) < 0.5 * np.median(of("healthy", loss)[:, 25])
    assert of("G", "return").mean(1).max() < of("healthy", "return").mean(1).min()
    later = {run: np.median(of(run, loss)[:, 20:30], 1) for run in first}
    alike = [run for run in others["G"] if first[run].min() > 0.005 and first[run].max() < 0.01]
    assert set(alike) == {"healthy", "D", "E", "H"} and later["G"].max() < min(later[run].min() for run in alike)
    assert min(later["C"].min(), later["F"].min()) < later["G"].min()
    late = {run: np.median(of(run, loss)[:, -10:], 1) for run in first}
    assert late["H"].min() > 30 and np.median(late["H"]) > 100 * np.median(late["healthy"])


def test_the_evidence_is_of_every_run_and_names_who_lies_among_its_seeds(stored):
    rows, of = stored
    _, *lines = failure_lab.evidence(rows).splitlines()
    assert {line[0] for line in lines} == set(failure_lab.RUNS) and len(lines) == len(failure_lab.NUMBERS)
    told = {(line[0], line[3:34].strip()): line[34:].split(maxsplit=2) for line in lines}
    assert (
        told["A", "largest KL of an update"][:2] == ["0", "0"] and "nobody" in told["A", "largest KL of an update"][2]
    )
    low, high, among = told["C", "entropy after one update"]
    seeds = of("C", "policy/entropy")[:, 1]
    assert [float(low), float(high)] == pytest.approx([seeds.min(), seeds.max()], rel=1e-2)
    nearest = max(of("A", "policy/entropy")[:, 1])
    assert among == f"nobody; next {nearest:.3g} (A)"
    assert told["D", "return at the end"][2] == "seeds of E, H, healthy"


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
    options["truncated_values"] = torch.tensor([[0.0, 10.0, 0.0, 0.0, 0.0]])
    assert advantages(failure_lab.gae)[1] == 1.0
    assert advantages(failure_lab.truncation_as_termination)[1] == -9.0


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"), [(1.5, 2.0, -3.0), (0.5, 2.0, -1.6), (1.5, -2.0, 2.4), (0.5, -2.0, 1.0)]
)
def test_max_for_min_by_hand(ratio, advantage, loss):
    batch = torch.tensor([ratio]).log(), torch.zeros(1), torch.tensor([advantage]), torch.ones(1, dtype=torch.bool)
    assert failure_lab.max_for_min(*batch, clip_range=0.2)[0].item() == pytest.approx(loss)
    clipped = min(max(ratio, 0.8), 1.2)
    missing, _ = failure_lab.minus_missing(*batch, clip_range=0.2)
    assert missing.item() == pytest.approx(min(ratio * advantage, clipped * advantage))


# Text ----------------------------------------------------------------------------------------------------------------


def test_the_planted_mistakes_are_mistakes():
    scores, mask = torch.tensor([3.0]), torch.tensor([[True, True, False]])
    old, ref = torch.tensor([[-1.0, -1.0, 9.0]]), torch.tensor([[-2.0, -1.5, 5.0]])
    right = rlhf.kl_rewards(scores, old, ref, mask, 0.5)
    assert right.tolist() == [[-0.5, 2.75, 0.0]]
    assert text_failure_lab.kl_paid_out(scores, old, ref, mask, 0.5).tolist() == [[0.5, 3.25, 0.0]]
    assert text_failure_lab.score_at_the_first_token(scores, old, ref, mask, 0.5).tolist() == [[2.5, -0.25, 0.0]]
    values, ends = torch.zeros(1, 3), torch.tensor([[False, True, False]])
    advantages, returns = text_failure_lab.targets_from_whitened(right, values, ends, gamma=1.0, lam=1.0, mask=mask)
    assert torch.allclose(advantages, returns) and abs(float(returns.sum())) < 1e-6


def test_what_the_clues_of_the_text_lab_say_is_so():
    with (ROOT / "data" / "results" / "text_failure_lab.csv").open(encoding="utf-8", newline="") as file:
        file.readline()
        rows = text_failure_lab.evidence(list(csv.DictReader(file)))
    found = {(letter, what.split(",")[0]): numbers for letter, what, *numbers in rows}
    assert len(found) == len(rows) and all("*How sure:*" in run.clue for run in text_failure_lab.RUNS.values())

    own, healthy = found["A", "first ratio - 1"]
    assert own.min() > 0.78 and healthy.max() < 2e-5
    own, healthy = found["A", "KL before any update"]
    assert own.min() > 0.03 and abs(healthy).max() < 1e-3
    own, healthy = found["A", "entropy"]
    assert own.max() < healthy.min()
    own, healthy = found["B", "KL"]
    assert own.min() > 120 and healthy.max() < 4
    own, healthy = found["B", "entropy"]
    assert own.min() > 2 * healthy.max()
    own, healthy = found["C", "KL"]
    assert 0.5 * healthy.min() < own.min() and own.max() < 1.5 * healthy.max()
    own, healthy = found["D", "expl. variance"]
    assert own.max() < healthy.min() - 0.5
    own, healthy = found["D", "value loss"]
    assert own.max() < 0.7 * healthy.min()
    own, healthy = found["E", "value loss"]
    assert round(own.min(), 2) >= 0.42 and round(own.max(), 2) <= 0.51
    assert healthy.min() < own.min() and own.max() < healthy.max(), "they pass through there"
    own, healthy = found["E", "expl. variance"]
    assert own.min() > 0 > healthy.max()
    for letter in text_failure_lab.RUNS:
        own, healthy = found[letter, "score"]
        if letter in "BDE":
            assert own.max() < healthy.min() - 0.25
        else:
            assert own.min() > healthy.min() - 0.2, "of A the score says nothing"


def test_no_penalty_at_all_ends_far_nearer_than_the_text_labs_b():
    with (ROOT / "data" / "results" / "ppo_kl_ptx_sweep.csv").open(encoding="utf-8", newline="") as file:
        file.readline()
        free = [float(row["kl"]) for row in csv.DictReader(file) if row["beta"] and float(row["beta"]) == 0]
    assert len(free) == 3 and 8 < sum(free) / 3 < 12
