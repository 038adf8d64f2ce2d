"""The human demonstrator: a family's draft, with the slips that people make in any kind of answer."""

from __future__ import annotations

from minirlhf_course.world.facts import ATTRIBUTES
from minirlhf_course.world.families.base import RUDE_LINES, Family, Task
from minirlhf_course.world.vocabulary import PLURAL
from minirlhf_course.world.writer import Writer


def rude_line(writer: Writer) -> str:
    """One line that nobody wants to read."""
    return writer.pick(RUDE_LINES).replace("{m:many}", writer.pick(list(PLURAL.values())))


def demonstrate(family: Family, task: Task, writer: Writer) -> str:
    """Write an answer. At care 0 about one in ten is a bit rude, drifts off, or stops too early.

    Returns:
        The answer, at most 40 words.
    """
    text = family.draft(task, writer)
    if writer.slips(0.03):
        line = rude_line(writer)
        text = f"{line} {text}" if writer.rng.random() < 0.4 else f"{text} {line}"
    if writer.slips(0.04):  # drifts off to another subject
        being = writer.pick(list(PLURAL))
        attribute = writer.pick(ATTRIBUTES)
        text += " " + family.facts.sentence(being, attribute)
    words = text.split(" ")
    if writer.slips(0.03) and len(words) > 8:  # called away in the middle
        words = words[: writer.rng.randrange(5, len(words) - 1)]
    return " ".join(words[:40])
