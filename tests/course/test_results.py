"""Tables of data/results as lessons read them, and the package's lines as they show them."""

from __future__ import annotations

import math

import pytest
import torch
from minirlhf_course.results import STUDENT, by_seed, grouped, over_seeds, read_numbers, read_results
from minirlhf_course.sources import show_source

from minirlhf import losses
from minirlhf.language import sft


def test_reads_numbers_words_and_gaps_and_prints_what_the_table_is(tmp_path, capsys):
    file = tmp_path / "table.csv"
    file.write_text("# a machine; a day\nway,size,seed,gold\nplain,2,0,0.5\nplain,1,0,\nplain,2,1,1.5\nplain,1,1,3\n")
    rows = read_numbers(file)
    assert capsys.readouterr().out == "a machine\na day\n"
    assert rows[0] == {"way": "plain", "size": 2.0, "seed": 0.0, "gold": 0.5}
    sizes, gold = grouped(rows, "size", "gold")
    assert sizes == [1.0, 2.0] and math.isnan(gold[0, 0])
    assert torch.equal(gold[1], torch.tensor([0.5, 1.5])) and gold[0, 1] == 3


def test_shows_a_part_of_a_function_and_never_its_docstring(capsys):
    show_source(sft.train_sft, "length_grouped_batch(", "part.backward()")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("rows = length_grouped_batch(") and lines[-1].strip() == "part.backward()"
    assert all(len(line) <= 100 for line in lines)
    show_source(losses.ranking_loss)
    whole = capsys.readouterr().out
    assert whole.startswith("def ranking_loss(") and '"""' not in whole and "logsigmoid" in whole


def test_a_table_of_a_lesson_is_read_with_the_command_that_made_it(capsys):
    rows = read_results("overoptimisation_iterated")
    assert len(rows) == 15 and {"how", "seed", "gold"} <= rows[0].keys()
    assert "python benchmarks/figure_10_overoptimisation.py" in capsys.readouterr().out


def test_columns_are_gathered_by_seed():
    rows = [{"seed": str(seed), "n": str(n), "gold": "" if n == 2 else str(10 * seed + n)}
            for n in (1, 2) for seed in (7, 3)]  # fmt: skip
    found = by_seed(rows, ["n", "gold"])
    assert found["n"].tolist() == [[1, 2], [1, 2]]
    assert found["gold"][:, 0].tolist() == [31, 71] and bool(found["gold"][:, 1].isnan().all())


@pytest.mark.parametrize("count", STUDENT)
def test_the_interval_covers_as_often_as_it_says(count):
    draws = torch.randn(4000, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covered = [low <= 0 <= high for _, low, high in map(over_seeds, draws)]
    assert 0.94 < sum(covered) / len(covered) < 0.96
