"""What lesson 08 does with rankings: pairs side by side, the reader's own file, agreement with its interval."""

from __future__ import annotations

from minirlhf_course.rankings import agreement, ranked_by, side_by_side, single_comparisons

from minirlhf.data import Comparison
from minirlhf.labeling import Item, RankingFile

ROWS = [Comparison("p", ("a", "b", "c"), (3.0, 1.0, 2.0)), Comparison("q", ("a", "b"), (1.0, 1.0))]


def test_pairs_of_two_labelers_stand_in_the_same_order():
    second = {("p", ("a", "b", "c")): (10.0, 20.0, 30.0), ("q", ("a", "b")): (5.0, 6.0)}
    own, other = side_by_side(ROWS, second)
    assert own.tolist() == [[3, 1], [3, 2], [1, 2], [1, 1]]
    assert other.tolist() == [[10, 20], [10, 30], [20, 30], [5, 6]]


def test_single_comparisons_put_the_better_first_and_leave_ties_out():
    pairs = single_comparisons(ROWS)
    assert [row.responses for row in pairs] == [("a", "b"), ("a", "c"), ("c", "b")]
    assert {row.scores for row in pairs} == {(1.0, 0.0)}


def test_the_readers_rankings_are_found_by_name_and_in_the_order_of_the_items(tmp_path):
    items = [Item("p", ("a", "b")), Item("q", ("c", "d")), Item("r", ("e", "f"))]
    file = tmp_path / "mine.jsonl"
    assert ranked_by("me", file, items) == []
    mine, other = RankingFile(file, "me"), RankingFile(file, "you")
    mine.append(items[2], (1, 2))
    mine.append(items[0], (2, 1))
    other.append(items[1], (1, 2))
    found = ranked_by("me", file, items)
    assert [row.prompt for row in found] == ["p", "r"]
    assert found[0].scores[1] > found[0].scores[0] and found[1].scores[0] > found[1].scores[1]


def test_agreement_counts_ties_half_and_brackets_the_share():
    share, text = agreement(ROWS[:1], [[2.0, 1.0, 2.0]])
    assert share == 2.5 / 3
    assert text.startswith(" 83%  [")
