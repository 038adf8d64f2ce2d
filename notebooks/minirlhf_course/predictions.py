"""Predict, then see: the reader types a prediction over the dots; a later cell shows it beside the result.

    factor = ...  # your prediction: a number, typed over the dots

    beside(factor, 3.97, "times")

The prediction is kept nowhere but in the reader's own notebook. It is never marked: a wrong one teaches more.
"""

from __future__ import annotations

from collections.abc import Sequence

Prediction = float | str


def beside(prediction: object, result: Prediction, unit: str = "", choices: Sequence[str] = ()) -> None:
    """Print a prediction beside the result; for an untouched one, only the result.

    Args:
        prediction: what the reader typed: a number, or one of `choices`; the untouched `...` is no prediction.
        result: what was measured.
        unit: printed after each number.
        choices: what could be chosen, where the result is one of a few words.

    Example:
        >>> beside(16, 3.97, "times")
        you said 16 times   it is 3.97 times
        >>> beside(..., 3.97)
        no prediction   it is 3.97
        >>> beside("left", "right", choices=("left", "right"))
        you said left   it is right
        >>> beside("lift", "right", choices=("left", "right"))
        'lift' is not one of the choices: left, right   it is right
        >>> beside("many", 3.97)
        'many' is not a number: type one, such as 4 or 0.5   it is 3.97
    """
    print(f"{_said(prediction, unit, choices)}   it is {_shown(result, unit)}")


def _said(prediction: object, unit: str, choices: Sequence[str]) -> str:
    if prediction is ...:
        return "no prediction"
    if choices:
        found = [choice for choice in choices if str(prediction).strip().lower() == choice.lower()]
        return f"you said {found[0]}" if found else f"{prediction!r} is not one of the choices: {', '.join(choices)}"
    if isinstance(prediction, bool) or not isinstance(prediction, int | float):
        return f"{prediction!r} is not a number: type one, such as 4 or 0.5"
    return f"you said {_shown(prediction, unit)}"


def _shown(value: Prediction, unit: str) -> str:
    text = value if isinstance(value, str) else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{text}{'' if unit in ('', '%') else ' '}{unit}"
