"""Templates that both write and read: the same line makes a sentence and finds its meaning again.

`"the {a:being} hid the {t:thing} ."` has two gaps: `a` takes a phrase of the slot class "being", `t` one of "thing".
A gap that occurs twice takes the same phrase both times.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from minirlhf_course.world.vocabulary import CLASSES

_GAP = re.compile(r"\{(\w+)(?::(\w+))?\}")


class Template:
    """One template, compiled.

    Example:
        >>> template = Template("the {a:being} hid the {t:thing} .")
        >>> template.fill({"a": "fox", "t": "key"})
        'the fox hid the key .'
        >>> template.read("the fox hid the key .")
        {'a': 'fox', 't': 'key'}
        >>> template.read("the fox ate .") is None
        True
    """

    def __init__(self, text: str, classes: Mapping[str, tuple[str, ...]] = CLASSES) -> None:
        self.text = text
        self.gaps: dict[str, tuple[str, ...]] = {}
        pattern, end = "", 0
        for gap in _GAP.finditer(text):
            pattern += re.escape(text[end : gap.start()])
            name, class_name = gap.group(1), gap.group(2) or gap.group(1)
            if name in self.gaps:
                pattern += f"(?P={name})"
            else:
                self.gaps[name] = classes[class_name]
                pattern += f"(?P<{name}>{'|'.join(re.escape(phrase) for phrase in classes[class_name])})"
            end = gap.end()
        self._pattern = re.compile(pattern + re.escape(text[end:]))

    def fill(self, slots: Mapping[str, str]) -> str:
        """The text with every gap filled. Raises KeyError if a gap has no phrase in `slots`."""
        return _GAP.sub(lambda gap: slots[gap.group(1)], self.text)

    def read(self, text: str) -> dict[str, str] | None:
        """The phrases in the gaps if the whole text fits the template, else None."""
        match = self._pattern.fullmatch(text)
        return match.groupdict() if match else None

    def words(self) -> Iterable[str]:
        """Every word that a text made from this template can contain."""
        yield from _GAP.sub("", self.text).split(" ")
        for phrases in self.gaps.values():
            for phrase in phrases:
                yield from phrase.split(" ")
