"""The families of instructions, after InstructGPT's table of use cases (Ouyang et al. 2022, Table 1)."""

from minirlhf_course.world.families.base import Family, Marks, Sentence, Task
from minirlhf_course.world.families.explain import Explain
from minirlhf_course.world.families.labels import Classify
from minirlhf_course.world.families.lists import Brainstorm
from minirlhf_course.world.families.questions import ClosedQA, OpenQA
from minirlhf_course.world.families.stories import Story
from minirlhf_course.world.families.talk import Chat
from minirlhf_course.world.families.texts import Rewrite, Summarise

REGISTRY: tuple[type[Family], ...] = (
    Story,
    Explain,
    OpenQA,
    ClosedQA,
    Brainstorm,
    Chat,
    Rewrite,
    Summarise,
    Classify,
)

__all__ = ["REGISTRY", "Family", "Marks", "Sentence", "Task"]
