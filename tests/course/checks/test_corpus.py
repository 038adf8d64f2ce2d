"""Answers as readers of other courses write them: all right ones are accepted, all wrong ones refused and told why.

corpus/lessonNN.py has two dictionaries, check by check; no code of the courses named there is copied.

- `RIGHT`: the style (whose habits they are) to the answer.
- `WRONG`: rows of (what the verdict must say, answer). What it must say is part of its first paragraph: the true cause
  in the check's words, or None where the check does not know the mistake. It must then keep to "is not right" and state
  no cause. Where edits (old text, new text) follow, the answer is right, and must pass, until they are made.

All of it is independent of the suspects in minirlhf_course/checks, as a learner's code is.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path

import pytest
from minirlhf_course import checks
from minirlhf_course.checks import Exercise
from minirlhf_course.checks.kernels import KernelExercise, variants, why_not

TOLD = 0.75
"""The share of wrong answers that must be told why, over all lessons and in each of them."""

BARE = re.compile(
    r"(.* is not right\.|The numbers of .* are right, and its gradient into `\w+` is not\.)( It is close.*)?"
)
"""A verdict that says only that something is wrong, not why."""


def corpus():
    for path in sorted((Path(__file__).parent / "corpus").glob("lesson*.py")):
        spec = importlib.util.spec_from_file_location(f"corpus_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield path.stem, module


def marked(stem, name, *row):
    check = getattr(importlib.import_module(f"minirlhf_course.checks.{stem}"), name)
    skip = pytest.mark.skipif(isinstance(check, KernelExercise) and bool(why_not()), reason=why_not() or "-")
    return pytest.param(check, *row, id=f"{check.number}-{name}-{row[0]}", marks=skip)


CORPUS = dict(corpus())
RIGHT = [
    marked(stem, name, style, answer)
    for stem, module in CORPUS.items()
    for name, rows in module.RIGHT.items()
    for style, answer in rows.items()
]
WRONG = [
    marked(stem, name, said, answer, edits)
    for stem, module in CORPUS.items()
    for name, rows in module.WRONG.items()
    for said, answer, *edits in rows
]
EDITED = {param.values[2]: param for param in WRONG if param.values[3]}


@pytest.mark.parametrize(("check", "style", "answer"), RIGHT)
def test_a_right_answer_is_accepted(check, style, answer):
    verdict = check.mark(answer)
    assert verdict.status == "passed", verdict.message


@pytest.mark.parametrize(("check", "said", "answer", "edits"), EDITED.values())
def test_what_a_mistake_is_planted_into_is_right(check, said, answer, edits):
    verdict = check.mark(answer)
    assert verdict.status == "passed", verdict.message


@pytest.mark.parametrize(("check", "said", "answer", "edits"), WRONG)
def test_a_wrong_answer_is_refused_and_told_what_is_so(check, said, answer, edits):
    if edits:
        (answer,) = variants(answer, {str(said): edits}).values()
    verdict = check.mark(answer)
    assert verdict.status == "failed"
    headline, _, case = verdict.message.partition("\n\n")
    assert case.startswith("Smallest failing case: ") or isinstance(check, KernelExercise), verdict.message
    if said is None:
        assert BARE.fullmatch(headline), f"it states a cause, and the corpus knows of none: {verdict.message}"
    else:
        assert said in headline, verdict.message
        assert not BARE.fullmatch(headline), "a bare verdict is no cause: write None"


@pytest.mark.parametrize("stem", CORPUS)
def test_two_right_and_three_wrong_answers_for_every_exercise(stem):
    module = importlib.import_module(f"minirlhf_course.checks.{stem}")
    names = {name for name, item in vars(module).items() if isinstance(item, Exercise)}
    assert CORPUS[stem].RIGHT.keys() == CORPUS[stem].WRONG.keys() == names
    assert {name: len(rows) for name, rows in CORPUS[stem].RIGHT.items() if len(rows) < 2} == {}
    assert {name: len(rows) for name, rows in CORPUS[stem].WRONG.items() if len(rows) < 3} == {}


def test_three_quarters_of_the_wrong_answers_are_told_why(capsys):
    """Counts only: that what is said is said, and nothing false, is tested answer by answer above."""
    told = {
        stem: [said is not None for rows in module.WRONG.values() for said, *_ in rows]
        for stem, module in CORPUS.items()
    }
    told["all lessons"] = [each for lesson in told.values() for each in lesson]
    with capsys.disabled():
        print("\nwrong answers that are told why:")
        for stem, each in told.items():
            print(f"  {stem:<12} {sum(each):>4} of {len(each):>4}  {sum(each) / len(each):.0%}")
    assert {stem: sum(each) / len(each) for stem, each in told.items() if sum(each) < TOLD * len(each)} == {}


def test_every_lesson_with_exercises_has_a_corpus():
    lessons = {path.stem for path in Path(checks.__file__).parent.glob("lesson*.py")}
    assert CORPUS.keys() == lessons - {"lesson00"}, "lesson 00 has one exercise, to try the checks out"
