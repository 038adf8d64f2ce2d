"""What marks the exercises: one file per lesson, each exercise with its cases and its likely mistakes.

Where a lesson's file would get long, its cases and its planted mistakes are in `casesNN.py` and `mistakesNN.py`.

In a lesson:

    from minirlhf_course.checks import lesson04 as check

    def my_gae(rewards, values, ends, last_values, gamma, lam):
        ...  # your code here

    gae = check.gae(my_gae)  # prints the verdict; later cells use `gae`

`check.gae` prints "not attempted" for an untouched stub, "passed", or the mistake by its name with the smallest case
that shows it. What it returns can be called: it is your function once that has passed, the package's until then.
So a lesson runs from top to bottom with no exercise solved.

`exercise.py` is the machine (`Exercise`, `Case`, `Verdict`); the lessons' files only declare. Nothing of the package
imports `minirlhf_course.checks`.
"""

from minirlhf_course.checks.exercise import Case, Exercise, Verdict, exercise

__all__ = ["Case", "Exercise", "Verdict", "exercise"]
