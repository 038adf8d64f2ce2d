"""Stored tables: by seed, whatever the order of the rows, and an interval that the seeds allow."""

import pytest
import torch
from minirlhf_course.results import STUDENT, by_seed, over_seeds, read_results


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
