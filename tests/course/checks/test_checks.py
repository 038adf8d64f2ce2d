"""The exercises' checks: solutions pass, stubs are "not attempted", every known mistake is refused by its name."""

from __future__ import annotations

import importlib
import importlib.util
import linecache
import re
from pathlib import Path

import pytest
import torch
from minirlhf_course import checks
from minirlhf_course.checks import Case, Exercise, Verdict, exercise
from minirlhf_course.checks.outcome import Outcome, compare

ROOT = Path(__file__).resolve().parents[3]
SOLUTIONS = {path.name[:2]: path for path in sorted((ROOT / "notebooks" / "solutions").glob("[0-9]*.py"))}
LESSONS = {
    path.stem[-2:]: importlib.import_module(f"minirlhf_course.checks.{path.stem}")
    for path in sorted(Path(checks.__file__).parent.glob("lesson*.py"))
}
EXERCISES = {
    lesson: [item for item in vars(module).values() if isinstance(item, Exercise)] for lesson, module in LESSONS.items()
}
ALL = [(lesson, item) for lesson, items in EXERCISES.items() for item in items]
EACH = pytest.mark.parametrize(("lesson", "item"), ALL, ids=[f"{item.number}-{item.name}" for _, item in ALL])
SUSPECTS = [(item, sentence) for _, item in ALL for sentence in item.suspects]


def solution(lesson: str, name: str):
    spec = importlib.util.spec_from_file_location(f"solutions_{lesson}", SOLUTIONS[lesson])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, f"my_{name}")


def written(source: str, name: str):
    """A function from its text, as a notebook's cell would make it."""
    file = f"<cell {abs(hash(source))}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    space = {"torch": torch}
    exec(compile(source, file, "exec"), space)
    return space[name]


# Every exercise ----------------------------------------------------------------------------------------------------


@EACH
def test_the_solution_passes(lesson, item):
    verdict = item.mark(solution(lesson, item.name))
    assert verdict.status == "passed", verdict.message
    assert verdict.answer is verdict._function, "later cells must run the learner's function"


@EACH
@pytest.mark.parametrize(
    "body", ["...", "pass", "raise NotImplementedError", 'raise NotImplementedError("later")', "return ..."]
)
def test_the_untouched_stub_is_not_attempted_and_the_lesson_goes_on(lesson, item, body):
    assert item.stub.endswith("    ...  # your code here")
    stub = item.stub.removesuffix("...  # your code here")
    verdict = item.mark(written(f"{stub}{body}  # your code here", f"my_{item.name}"))
    assert verdict.status == "not attempted"
    assert verdict(*item.cases()[0].args) is not None


@EACH
def test_hand_worked_cases_agree_with_the_package(lesson, item):
    worked = [case for case in item.cases() if case.expected is not None]
    if item.observe is None:
        assert worked, "no case was worked by hand"
    for case in worked:
        got = item.run(item.reference, case)
        assert compare(Outcome(got.result), Outcome(case.expected), case.rtol) is None, case.name


@EACH
def test_the_package_passes_and_cases_have_several_sizes(lesson, item):
    assert item.mark(item.reference).status == "passed"
    cases, again = item.cases(), item.cases()
    shapes = {tuple(tuple(x.shape) for x in case.args if isinstance(x, torch.Tensor)) for case in cases}
    assert len(shapes) >= 2, "an answer for one size only would pass"
    for case, other in zip(cases, again, strict=True):
        for x, y in zip(case.args, other.args, strict=True):
            assert not isinstance(x, torch.Tensor) or torch.equal(x.nan_to_num(7), y.nan_to_num(7)), "not reproducible"


@pytest.mark.parametrize(("item", "sentence"), SUSPECTS, ids=[f"{item.number}-{item.name}-" for item, _ in SUSPECTS])
def test_every_suspect_is_refused_and_named(item, sentence):
    verdict = item.mark(item.suspects[sentence])
    assert verdict.status == "failed"
    assert verdict.message.startswith(f"{sentence}\n\nSmallest failing case: "), verdict.message
    faults = [item.run(item.suspects[sentence], case).fault for case in item.cases()]
    assert all(fault is None or (item.budget and "tensor operations" in fault) for fault in faults), faults


@EACH
def test_what_a_lesson_shows(lesson, item):
    assert re.fullmatch(rf"{int(lesson)}\.[1-9]", item.number)
    assert 1 <= item.difficulty <= 5 and 1 <= item.minutes <= 60
    assert item.header.startswith(f"### Exercise {item.number}: ") and f"{item.minutes} minutes" in item.header
    assert all(len(line) <= 96 for line in item.stub.splitlines())
    assert item.stub.startswith(f"def my_{item.name}(")
    assert item.check_line == f"{item.name} = check.{item.name}(my_{item.name})"
    assert item.hints_markdown.count("<details>") == item.hints_markdown.count("</details>") == 2
    assert getattr(LESSONS[lesson], item.name) is item, "check.NAME must find it"
    assert set(item.leaves) <= set(item.arguments)


def test_every_lesson_has_its_solutions():
    assert LESSONS and LESSONS.keys() == SOLUTIONS.keys()


@pytest.mark.parametrize("lesson", [lesson for lesson in LESSONS if lesson != "00"])
def test_three_to_seven_exercises_a_lesson(lesson):
    numbers = [item.number for item in EXERCISES[lesson]]
    assert 3 <= len(numbers) <= 7
    assert numbers == [f"{int(lesson)}.{index}" for index in range(1, len(numbers) + 1)]


# The machine -------------------------------------------------------------------------------------------------------


def twice_cases():
    row = torch.tensor([[1.0, 2.0]])
    return [Case("a row", (row, 3.0), row * 3), Case("a column, float64", (row.double().T, 3.0))]


@exercise(
    "9.9",
    "a factor",
    difficulty=1,
    minutes=1,
    task="Multiply.",
    cases=twice_cases,
    suspects={"It adds: multiply.": lambda x, factor: x + factor},
    hints=("One sign.", "`x * factor`"),
    leaves=("x",),
)
def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    """x times factor."""
    return x * factor


REFUSED = {
    "adds": ("return x + factor", "It adds: multiply."),
    "in place": ("x *= factor\n    return x", "writes into its argument `x`"),
    "in place, result right": ("y = x * factor\n    x += 1\n    return y", "writes into its argument `x`"),
    "no return": ("y = x * factor", "returns None: is there a `return`"),
    "shape": ("return (x * factor).sum()", "The result has the shape (), not (1, 2)"),
    "broadcast": ("return x * factor + torch.zeros_like(x).T", "has the shape (2, 2), not (1, 2)"),
    "number": ("return float(x.detach().sum())", "The result is a single number, not a tensor of the shape (1, 2)"),
    "text": ("return 'x'", "The result is a str, not a tensor or a number"),
    "NaN": ("return (x * factor).sum() / 0 * 0", "The result is NaN where a number is expected: look for 0 / 0"),
    "infinite": ("return (x * factor) / 0", "The result is infinite where a number is expected: look for a division"),
    "infinite gradient": ("y = x * factor\n    return y + 0 * (y - y.detach()).sqrt()", "gradient into `x` is NaN"),
    "two results": ("return x * factor, x", "It returns 2 results, not one tensor"),
    "no gradient": ("return (x * factor).detach()", "No gradient flows from the result into `x`"),
    "no_grad": ("with torch.no_grad():\n        return x * factor", "No gradient flows from the result into `x`"),
    "wrong gradient": ("return x * factor - x + x.detach()", "gradient into `x` is not"),
    "right in the sum": ("d = x.flip(-1) - x\n    return x * factor + d - d.detach()", "gradient into `x` is not"),
    "nearly": ("return x * (factor + 1e-4)", "The result is not right. It is close: off by up to 0.0002, where"),
    "printed alike": ("return x * (factor + 1e-4)", "  difference = up to 0.0002"),
    "a gradient of 0": ("return (x.clamp(max=-9) + 9) * 0 + x.detach() * factor", "its gradient into `x` is not."),
    "one size": ("return x * factor if x.shape == (1, 2) else x", "Smallest failing case: a column"),
    "a constant": ("return torch.tensor([[3.0, 6.0]], requires_grad=True)", "Smallest failing case: a row"),
    "raises": ("y = x * factor\n    return y[5]", "in the line: return y[5]"),
    "half-written": ("y = x * factor\n    raise NotImplementedError", "It raises NotImplementedError"),
    "a name that is not there": ("return x * gamma", "name 'gamma' is not defined"),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_refuses(wrong):
    body, expected = REFUSED[wrong]
    verdict = scaled.mark(written(f"def my_scaled(x, factor):\n    {body}\n", "my_scaled"))
    assert verdict.status == "failed"
    assert expected in verdict.message
    assert "Smallest failing case: " in verdict.message
    assert torch.equal(verdict(torch.ones(2), 2.0), torch.full((2,), 2.0)), "the lesson must go on"


RIGHT = {
    "float32": "return (x * factor).float()",
    "a buffer in float32": "y = torch.zeros(x.shape)\n    y[:] = x * factor\n    return y",
    "float32 alone": "return x * (torch.eye(len(x)) @ torch.full((len(x), x.shape[1]), factor))",
    "float32 times float64, which raises": "return (torch.eye(len(x)) @ x) * factor",
    "an epsilon": "return x * (factor + 1e-6)",
}


@pytest.mark.parametrize("right", RIGHT)
def test_accepts(right):
    verdict = scaled.mark(written(f"def my_scaled(x, factor):\n    {RIGHT[right]}\n", "my_scaled"))
    assert verdict.status == "passed", verdict.message


def counted_cases():
    return [
        Case("one", (torch.tensor([1.0]),), (torch.tensor(1.0), torch.tensor([True]), 1)),
        Case("two, float64", (torch.tensor([[2.0, -1.0]]).double(),)),
        Case("nothing above 0", (torch.tensor([0.0]),)),
    ]


@exercise(
    "9.8",
    "sum, signs, count",
    difficulty=1,
    minutes=1,
    task="Count.",
    cases=counted_cases,
    suspects={},
    hints=("", ""),
    leaves=("x",),
)
def counted(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(the sum of what is above 0 (a constant), where that is, how many)."""
    return x.detach()[x > 0].sum(), x > 0, int((x > 0).sum())


OTHER_TYPES = {
    "integers for a mask": lambda x: (x.detach()[x > 0].sum(), (x > 0).long(), int((x > 0).sum())),
    "a tensor for a number": lambda x: [x.detach()[x > 0].sum(), x > 0, (x > 0).sum()],
    "a float for a tensor": lambda x: (x[x > 0].sum().item(), x > 0, float((x > 0).sum())),
    "numpy": lambda x: (x.detach().numpy()[(x > 0).numpy()].sum(), (x > 0).numpy(), int((x > 0).sum())),
}


@pytest.mark.parametrize("which", OTHER_TYPES)
def test_right_numbers_of_another_type_pass_and_later_cells_get_the_packages_types(which):
    verdict = counted.mark(OTHER_TYPES[which])
    assert verdict.status == "passed", verdict.message
    total, mask, count = verdict(torch.tensor([1.0, 2.0, -3.0]))
    assert torch.equal(total, torch.tensor(3.0)) and torch.equal(mask, torch.tensor([True, True, False]))
    assert type(count) is int and count == 2
    assert counted.mark(verdict).status == "passed"


def test_a_constant_is_named_where_no_case_has_a_gradient():
    verdict = counted.mark(lambda x: (x[x > 0].sum(), x > 0, int((x > 0).sum())))
    expected = "A gradient flows from result 1 of 3 into `x`, which is a constant here: use x.detach()."
    assert verdict.message.startswith(expected), verdict.message


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda x: (x > 0, x.detach()[x > 0].sum(), (x > 0).sum()), "your result 2 comes first, then result 1, then"),
        (lambda x: ((x > 0).sum(), x.detach()[x > 0].sum(), x > 0), "your result 2 comes first, then result 3, then"),
    ],
)
def test_results_in_the_wrong_order_are_recognised(answer, said):
    verdict = counted.mark(answer)
    assert verdict.status == "failed"
    assert verdict.message.startswith("All results are right, but in the wrong order: "), verdict.message
    assert said in verdict.message


def test_swapped_results_of_a_random_exercise_are_recognised():
    check = LESSONS["01"].sample_actions
    verdict = check.mark(lambda logits: tuple(reversed(solution("01", "sample_actions")(logits))))
    assert verdict.message.startswith("Both results are right, but swapped: return the second one first."), verdict


def test_what_an_exercise_observes_is_said_in_words():
    check = LESSONS["01"].sample_actions

    def shifted(logits):
        actions, logprobs = solution("01", "sample_actions")(logits)
        return (actions + 1) % logits.shape[-1], logprobs

    message = check.mark(shifted).message
    assert "The share of each action is not right." in message and "result 3" not in message
    assert "\n  the share of each action: expected [[0.5" in message


def test_no_stub_has_a_word_alone_on_a_line_or_a_broken_shape():
    for item in (item for items in EXERCISES.values() for item in items):
        lines = item.stub.splitlines()
        alone = [line for line in lines if re.fullmatch(r"\s+\S+", line) and line.strip() != '"""']
        assert not alone, item.stub
        assert not any(line.count("[") != line.count("]") for line in lines), item.stub


def test_what_looks_like_a_mistake_on_the_smallest_case_alone_is_a_hint_and_not_the_verdict():
    def adds_to_rows(x, factor):
        return x + factor if x.shape == (1, 2) else x * 5

    headline = scaled.mark(adds_to_rows).message.partition("\n\n")[0]
    hint = "On this case it looks like a known mistake: It adds: multiply."
    assert headline == f"The result is not right. {hint}"


def test_a_wrong_signature_is_said():
    verdict = scaled.mark(lambda x: x)
    assert "It can't be called with (x, factor), as the stub can." in verdict.message


def test_what_is_not_a_function_is_said():
    verdict = scaled.mark(torch.ones(2))
    assert verdict.status == "failed"
    assert "Give the function itself: `scaled = check.scaled(my_scaled)`" in verdict.message


def test_an_interrupt_is_not_swallowed():
    def stops(x, factor):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scaled.mark(stops)


def test_random_state_and_grad_mode_are_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    scaled.mark(lambda x, factor: x * factor + 0 * torch.rand(1, dtype=x.dtype))
    assert torch.equal(torch.rand(2), expected)
    with torch.no_grad():
        assert scaled.mark(lambda x, factor: x * factor).status == "passed"
        assert not torch.is_grad_enabled()


def test_prints_in_short_and_returns_a_function(capsys):
    verdict = scaled(lambda x, factor: x + factor)
    assert isinstance(verdict, Verdict) and callable(verdict)
    assert capsys.readouterr().out == (
        "scaled: failed\n"
        "It adds: multiply.\n"
        "\n"
        "Smallest failing case: a row\n"
        "  x        = [[1, 2]]\n"
        "  factor   = 3\n"
        "  expected = [[3, 6]]\n"
        "  got      = [[4, 5]]\n"
    )


def test_checking_again_what_a_check_returned_judges_the_learners_function():
    untouched = written("def my_scaled(x, factor):\n    ...\n", "my_scaled")
    assert scaled.mark(scaled.mark(untouched)).status == "not attempted"
    assert scaled.mark(scaled.mark(lambda x, factor: x * factor)).status == "passed"


def test_a_large_failing_case_shows_the_first_place_that_differs():
    returns = LESSONS["01"].discounted_returns

    def wrong_in_long_rows(rewards, ends, gamma):
        result = returns.reference(rewards, ends, gamma)
        result[-1, 16:] += 1
        return result

    verdict = returns.mark(wrong_in_long_rows)
    assert "Smallest failing case: random, of shape (4, 17)" in verdict.message
    assert "first at [3, 16]: expected " in verdict.message


def test_a_loop_over_the_steps_is_no_scan():
    def loop(x, decays):
        result, carry = torch.zeros_like(x), torch.zeros_like(x[:, 0])
        for t in reversed(range(x.shape[1])):
            carry = x[:, t] + decays[:, t] * carry
            result[:, t] = carry
        return result

    verdict = LESSONS["04"].reverse_scan.mark(loop)
    assert verdict.status == "failed" and "no loop over the time steps" in verdict.message
