"""Studios accept right trainers, in whatever style, and refuse wrong ones, most of them with the cause.

For the studio NAME, foreign/NAME.py has right trainers in the styles of other courses (no code of theirs is copied),
and bugs/NAME.py edits of the solution in notebooks/solutions/studios/, each of which plants one mistake. The solutions
themselves are marked in tests/notebooks/test_studios.py.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import linecache
from pathlib import Path

import pytest
from minirlhf_course.studios.studio import MUSEUM, Studio

ROOT = Path(__file__).resolve().parents[3]
SOLUTIONS = sorted((ROOT / "notebooks" / "solutions" / "studios").glob("[0-9]*.py"))
NAMES = [path.stem.partition("_")[2] for path in SOLUTIONS]
NAMED = 0.7
"""The share of planted bugs whose cause must be said."""


def loaded(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def studio(name) -> Studio:
    return getattr(importlib.import_module(f"minirlhf_course.studios.{name}"), name)


SOLVED = {name: loaded(path, f"solution_{name}") for name, path in zip(NAMES, SOLUTIONS, strict=True)}
HERE = Path(__file__).parent
TRAINERS = {name: loaded(HERE / "foreign" / f"{name}.py", f"foreign_{name}").FOREIGN for name in NAMES}
PLANTED = {name: loaded(HERE / "bugs" / f"{name}.py", f"bugs_{name}").BUGS for name in NAMES}
FOREIGN = [
    pytest.param(name, trainer, id=f"{name}-{style}") for name in NAMES for style, trainer in TRAINERS[name].items()
]
BUGS = [
    pytest.param(name, said, edits, id=f"{name}-{index}-{number}-{said}")
    for name in NAMES
    for index, (number, said, edits) in enumerate(PLANTED[name])
]


def solution(name):
    return getattr(SOLVED[name], f"my_{name}")


def planted(name, edits):
    """The solution with a mistake; its source can be found by whoever looks for the line that failed."""
    text = inspect.getsource(SOLVED[name])
    for old, new in edits:
        assert text.count(old) == 1, f"{old!r} is in the solution {text.count(old)} times"
        text = text.replace(old, new)
    file = f"<{name}: {edits[0][1][:40]}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    space = {}
    exec(compile(text, file, "exec"), space)
    return space[f"my_{name}"]


def stub(name):
    space = {}
    exec(studio(name).stub, space)
    return space[f"my_{name}"]


@pytest.mark.parametrize("name", NAMES)
def test_an_untouched_stub_is_not_attempted(name, capsys):
    marks = studio(name)(stub(name))
    assert marks.status == "not attempted" and not marks.rows and not marks.passed
    assert capsys.readouterr().out.startswith(f"{name}: not attempted")
    taken = inspect.signature(stub(name)).parameters
    assert list(inspect.signature(solution(name)).parameters) == list(taken)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_function_is_refused(name):
    assert "Give the function itself" in studio(name).mark(3).message


@pytest.mark.slow
@pytest.mark.parametrize(("name", "trainer"), FOREIGN)
def test_a_right_trainer_in_another_style_passes(name, trainer):
    marks = studio(name).mark(trainer, last=False)
    assert marks.passed, marks.message


@pytest.mark.parametrize(("name", "said", "edits"), BUGS)
def test_a_planted_bug_is_refused_and_named(name, said, edits):
    marks = studio(name).mark(planted(name, edits), last=False, to_the_first=True)
    assert marks.status == "failed", "accepted"
    assert marks.message.startswith("The first that fails: ") and "Look at " in marks.message
    if said is None:
        assert not marks.named, marks.message
    else:
        explained, _, _ = marks.message.partition("Bugs of the museum")
        assert said in explained, marks.message


def test_most_bugs_are_named_and_most_of_the_museum_is_here():
    rows = [row for name in NAMES for row in PLANTED[name]]
    named = [row for row in rows if row[1] is not None]
    assert len(rows) >= 16 and len(named) >= NAMED * len(rows)
    assert {*range(1, 13), 14, 16, *range(22, 27), 28, 30} <= {row[0] for row in rows} - {"-"} <= set(MUSEUM)


def test_a_bug_fails_its_probe_too_and_nothing_is_run_after_a_trainer_that_raises():
    first = NAMES[0]
    wrong = planted(first, [("loss = -torch.where", "loss = torch.where")])
    rows = {row.title: row.status for row in studio(first).mark(wrong, last=False).rows}
    assert rows["probe 1, constant reward: V is 1"] == "passed"
    assert rows["probe 5, the right action depends on the observation"] == "failed"

    def raises(envs, policy, values, **settings):
        return envs.reset()[99]

    marks = studio(first).mark(raises)
    assert [row.status for row in marks.rows] == ["failed"] + ["not run"] * (len(marks.rows) - 1)
    assert "IndexError" in marks.message and "envs.reset()[99]" in marks.message
