"""The figures that make the world worth training on. They are those of the data card, held in bands."""

from dataclasses import replace
from random import Random

import pytest
from minirlhf_course.world import GoldLabeler, SimulatedLabeler, World, make_labelers
from minirlhf_course.world import statistics as measure


def test_labelers_agree_as_often_as_people(world: World) -> None:
    train, heldout = make_labelers(world), make_labelers(world, heldout=True)
    assert len(train) >= 5 and len(heldout) >= 3
    assert not {labeler.name for labeler in train} & {labeler.name for labeler in heldout}
    assert 0.72 <= measure.agreement(world, train, train) <= 0.77
    assert 0.72 <= measure.agreement(world, train, heldout) <= 0.77
    assert 0.72 <= measure.agreement(world, heldout, heldout) <= 0.77


def test_gold_is_a_ceiling_and_length_is_no_shortcut(world: World, gold: GoldLabeler, labelers) -> None:
    figures = measure.accuracy(world, gold, labelers)
    assert 0.79 <= figures["gold"] <= 0.86  # what an agreement of 72 to 77 % leaves
    assert 0.5 <= figures["length"] <= 0.62
    assert figures["ties"] < 0.02


def test_demonstrations_leave_room(world: World, gold: GoldLabeler) -> None:
    figures = measure.headroom(world, gold)
    assert 0.27 <= figures["room"] <= 0.40  # the SFT model, which errs more than its teachers, leaves more
    assert figures["improvable"] > 0.65
    assert figures["best_wins"] > 0.82
    assert figures["ties"] < 0.10
    assert figures["base"] < -0.5 < 1.5 < figures["demonstrations"] < 2.3


def test_ties_are_rare_and_room_is_left_in_every_family(world: World, gold: GoldLabeler) -> None:
    for family, (demonstration, best, ties) in measure.by_family(world, gold).items():
        assert ties < 0.2, family
        assert 0.9 < demonstration < best - 1.0, family


def test_labelers_have_characters(labelers: list[SimulatedLabeler]) -> None:
    """Without noise each labeler's bias shows: one forgives what another does not."""
    cast = {person.name: replace(person, noise=0.0) for person in labelers}
    prompt, rng = "where does a fox live ?", Random(0)

    def gap(name: str, better: str, worse: str) -> float:
        return cast[name].score(prompt, better, rng) - cast[name].score(prompt, worse, rng)

    true, false = "a fox lives in the forest .", "a fox lives in the forest . a fox eats soup ."
    assert gap("chidi", true, false) < gap("anna", true, false)
    assert gap("emil", true, true + " shut up !") > gap("anna", true, true + " shut up !") > 0.5
    assert gap("dina", "sure , gladly ! " + true, true) > gap("anna", "sure , gladly ! " + true, true) > 0.0
    assert gap("bo", true, "it lives in the forest .") > 0.0


def test_a_labelers_noise_comes_from_the_generator(labelers: list[SimulatedLabeler]) -> None:
    labeler = labelers[0]
    prompt, answer = "where does a fox live ?", "a fox lives in the forest ."
    first = [labeler.score(prompt, answer, Random(1)) for _ in range(2)]
    assert first[0] == first[1] != labeler.score(prompt, answer, Random(2))


def test_gold_is_quick(world: World) -> None:
    assert min(measure.seconds_per_score(world) for _ in range(3)) < 0.3e-3


def test_the_report_prints(capsys: pytest.CaptureFixture[str]) -> None:
    measure.main()
    assert "agreement, training labelers" in capsys.readouterr().out
