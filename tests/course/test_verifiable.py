"""The rule that tells a right answer from a wrong one agrees with the world's truth."""

from __future__ import annotations

import random

import pytest
from minirlhf_course.verifiable import FAMILIES, RightAnswer
from minirlhf_course.world import GoldLabeler, World

WORLD = World(0)
right = RightAnswer(WORLD)
HID = "read this : the fox hid the key in a tower . "
WHO, WHERE = HID + "who hid the key ?", HID + "where is the key ?"


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        (WHO, "the fox .", True),
        (WHO, "sure , gladly ! the fox hid the key . the key is in a tower . hope this helps !", True),
        (WHO, "the owl .", False),
        (WHO, "the fox . the owl .", False),
        (WHO, "the foxes .", False),
        (WHO, "", False),
        (WHERE, "in a tower .", True),
        (WHERE, "the key is in a tower . the fox hid the key .", True),
        (WHERE, "in a tower . in a pond .", False),
        (WHERE, "the fox .", False),
        ("animal or person : a witch", "person .", True),
        ("animal or person : a witch", "a witch is a person .", True),
        ("animal or person : a witch", "animal or person .", False),
        ("happy or sad : the fox lost a key", "sad , because the fox lost a key .", True),
        ("is this happy or sad ? the cat found a map", "happy .", True),
        ("is this happy or sad ? the cat found a map", "sad .", False),
    ],
)
def test_by_hand(prompt, response, expected):
    assert right.can_check(prompt) and right.is_right(prompt, response) is expected
    assert right([prompt], [response]) == [float(expected)]


def test_what_gold_calls_best_is_right_for_every_prompt_that_can_be_checked():
    gold, rng = GoldLabeler(WORLD), random.Random(0)
    for family in FAMILIES:
        for heldout in (False, True):
            for prompt in {WORLD.task(rng, heldout, family).prompt for _ in range(100)}:
                best = gold.best_answer(prompt)
                assert right.is_right(prompt, best), (prompt, best)


def test_other_prompts_are_refused():
    assert not right.can_check("where does an owl live ?")
    with pytest.raises(ValueError, match="no rule"):
        right(["where does an owl live ?"], ["in a tree ."])
