"""You are the labeler: rank answers in JupyterLab, by keyboard or by dragging. Each ranking is on the disk at once.

    from minirlhf.labeling import RankingFile
    from minirlhf.pipeline.label import items_to_rank

    items = items_to_rank(Path("data/checkpoints"), policy="sft")
    Ranking(RankingFile(Path("runs/mine.jsonl"), "ada"), items)

The page shows what Python knows: the count goes up when the ranking is in the file, not when a button was pressed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from minirlhf.errors import UserError
from minirlhf.labeling import Item, RankingFile


class Ranking(anywidget.AnyWidget):
    """Shows one item after another and appends each ranking to a file.

    Args:
        file: where the rankings go; what this labeler has ranked there is not asked again.
        items: what to rank.

    Example:
        >>> import tempfile
        >>> file = RankingFile(Path(tempfile.mkdtemp()) / "mine.jsonl", "ada")
        >>> widget = Ranking(file, [Item("name a fruit .", ("apple .", "granite ."))])
        >>> widget.receive({"do": "rank", "number": widget.item["number"], "ranking": [1, 2]})
        >>> widget.done, widget.item
        (1, {})
    """

    _esm = Path(__file__).with_name("ranking.js")
    _css = Path(__file__).with_name("ranking.css")
    item: Any = traitlets.Dict().tag(sync=True)
    """The number, prompt and responses on the page; empty when nothing is left."""
    done: Any = traitlets.Int().tag(sync=True)
    total: Any = traitlets.Int().tag(sync=True)
    message: Any = traitlets.Unicode().tag(sync=True)

    def __init__(self, file: RankingFile, items: Sequence[Item]) -> None:
        super().__init__(total=len(items))
        self.file, self.items = file, list(items)
        self.waiting = file.left(self.items)
        self._show("")
        self.on_msg(self._answer)

    def _answer(self, _: Any, content: dict[str, Any], __: Any) -> None:
        self.receive(content)
        self.send({})  # the page waits for it: a kernel that does not answer has saved nothing

    def receive(self, content: dict[str, Any]) -> None:
        """Do what the page asks: rank, skip or undo. What is about an item that has left the page is not done."""
        try:
            self._do(content)
        except (UserError, ValueError, OSError) as error:  # the page must hear of it
            self._show(f"The file of rankings can't be used: {error}")

    def _do(self, content: dict[str, Any]) -> None:
        asked, current = content.get("do"), self.item.get("number")
        if asked == "undo":
            undone = self.file.undo(self.items)
            self._refresh(first=undone)
            self._show("Took back your last ranking." if undone else "Nothing to take back.")
        elif current is not None and content.get("number") == current:
            item = self.items[current]
            if asked == "skip":
                self._refresh(last=item)
                self._show("Skipped: it comes back at the end.")
            elif asked == "rank":
                try:
                    written = self.file.append(item, content["ranking"])
                except (UserError, ValueError, KeyError, TypeError, OSError) as error:
                    self._show(f"Not saved: {error}")
                    return
                self._refresh()
                self._show("Saved." if written else "You ranked this one already, in another window.")

    def _refresh(self, first: Item | None = None, last: Item | None = None) -> None:
        """What is left, in the order on the page: another window may have ranked some of it."""
        left = set(self.file.left(self.items))
        order = [item for item in self.waiting if item not in (first, last)] + [last] * (last is not None)
        order = [first] * (first in left) + [item for item in order if item is not None]
        self.waiting = [item for item in dict.fromkeys([*order, *self.items]) if item in left]

    def _show(self, message: str) -> None:
        item = self.waiting[0] if self.waiting else None
        with self.hold_sync():
            self.done, self.message = self.total - len(self.waiting), message
            self.item = (
                {"number": self.items.index(item), "prompt": item.prompt, "responses": list(item.responses)}
                if item is not None
                else {}
            )
