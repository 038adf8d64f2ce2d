"""The bug museum, as learners would write it: every wrong answer is refused by its check, which names the mistake.

museum/lessonNN.py has the wrong answers of a lesson: `WRONG`, check by check, rows of (number, what the check must say,
answer). The number is the museum's, as in tests/exact/test_bug_museum.py, and "-" marks a mistake that is not in it.
Where edits (old text, new text) follow, the answer is right, and must pass, until they are made. All of it is
independent of the suspects in minirlhf_course/checks, as a learner's code is.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest
from minirlhf_course.checks.kernels import variants


def exhibits():
    for path in sorted((Path(__file__).parent / "museum").glob("lesson*.py")):
        spec = importlib.util.spec_from_file_location(f"museum_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        checks = importlib.import_module(f"minirlhf_course.checks.{path.stem}")
        for name, rows in module.WRONG.items():
            for number, said, answer, *edits in rows:
                yield int(path.stem[-2:]), number, getattr(checks, name), said, answer, edits


MUSEUM = list(exhibits())
RIGHT = {answer: check for _, _, check, _, answer, edits in MUSEUM if edits}


@pytest.mark.parametrize(
    ("check", "said", "answer", "edits"),
    [pytest.param(*row, id=f"{number}-{row[0].number}-{row[0].name}-{row[1]}") for _, number, *row in MUSEUM],
)
def test_is_refused_and_named(check, said, answer, edits):
    if edits:
        (answer,) = variants(answer, {said: edits}).values()
    verdict = check.mark(answer)
    assert verdict.status == "failed"
    headline, _, case = verdict.message.partition("\n\n")
    hint = f"looks like a known mistake: {said}"  # where it is not the suspect's very numbers
    assert headline.startswith(said) or hint in headline, verdict.message
    assert case.startswith("Smallest failing case: ")


@pytest.mark.parametrize(("check", "answer"), [pytest.param(RIGHT[x], x, id=RIGHT[x].name) for x in RIGHT])
def test_a_right_answer_in_another_hand_passes(check, answer):
    verdict = check.mark(answer)
    assert verdict.status == "passed", verdict.message


@pytest.mark.parametrize(
    ("lessons", "numbers"),
    [
        (range(6), {1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 21, 22}),
        ([6], {4, 12, 21}),
        ([7], {17, 23}),
        ([8], {15, 16, 18, 19}),
        ([9], {1, 2, 8, 9, 10, 13, 14, 17}),
        ([13], {19, 34, 35, 36}),
    ],
)
def test_every_bug_of_these_lessons_is_here(lessons, numbers):
    assert {number for lesson, number, *_ in MUSEUM if lesson in lessons} >= numbers
