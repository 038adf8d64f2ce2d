"""A reward that is checked instead of learned: is the answer right?

Two families of the small world ask for something that stands in the prompt itself, so a few lines can tell:

    closed_qa   "read this : the fox hid the key in a cave . who hid the key ?"     the fox
    classify    "animal or person : a witch", "happy or sad : the fox lost a key"   person; sad

An answer is right if, of all things that could be said here, it names exactly the one that was asked for. Naming two
is wrong: "the fox . the owl ." would be right about everything.
"""

from __future__ import annotations

from collections.abc import Sequence

from minirlhf_course.world import World
from minirlhf_course.world.families.labels import Classify
from minirlhf_course.world.families.questions import ClosedQA
from minirlhf_course.world.vocabulary import BEINGS, PLACES

__all__ = ["FAMILIES", "RightAnswer"]

FAMILIES = ("closed_qa", "classify")


class RightAnswer:
    """The reward of answers that can be checked: 1 if right, 0 if wrong. Call it with prompts and answers.

    Example:
        >>> right = RightAnswer(World(0))
        >>> asked = "read this : the fox hid the key in a tower . who hid the key ?"
        >>> right([asked] * 3, ["the fox .", "the owl .", "the fox . the owl ."])
        [1.0, 0.0, 0.0]
    """

    def __init__(self, world: World) -> None:
        self.world = world

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [float(self.is_right(x, y)) for x, y in zip(prompts, responses, strict=True)]

    def can_check(self, prompt: str) -> bool:
        """Whether the prompt is of a family whose answers can be checked."""
        return self.world.parse(prompt).family in FAMILIES

    def is_right(self, prompt: str, response: str) -> bool:
        """Whether the answer names what was asked for, and nothing in its place. ValueError for other prompts."""
        wanted, choices = self._wanted(prompt)
        said = f" {response} "
        return {choice for choice in choices if f" {choice} " in said} == {wanted}

    def _wanted(self, prompt: str) -> tuple[str, tuple[str, ...]]:
        """The right answer, and all that could be said in its place."""
        task = self.world.parse(prompt)
        family = self.world.families[task.family]
        if isinstance(family, ClosedQA):
            return (task.slots["a"], BEINGS) if "who hid" in prompt else (task.slots["p"], PLACES)
        if isinstance(family, Classify):
            label = family._label(task).split(" ")[-1]
            return label, ("animal", "person") if "c" in task.slots else ("happy", "sad")
        raise ValueError(f"no rule can check the answers to this prompt: {prompt!r}")
