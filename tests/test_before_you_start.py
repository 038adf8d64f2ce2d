"""docs/before_you_start.md: what its example prints, and the arithmetic written out beside it."""

import doctest
import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "before_you_start.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_the_example_prints_what_the_page_says():
    failed, attempted = doctest.testfile(str(PAGE), module_relative=False, encoding="utf-8")
    assert (failed, attempted) == (0, 9)


def test_the_sums_of_the_table_of_q_add_up():
    rows = re.findall(r"\| \$(1 \+ [^=|]+) = ([\d.]+)\$ \| \$([+-][\d.]+)\$ \|", TEXT)
    assert len(rows) == 4
    for (sums, q, advantage), value in zip(rows, (1.76, 1.76, 1.44, 1.44), strict=True):
        code = sums.replace(r"\tfrac12", "0.5 *").replace(r"0.5 * \cdot", "0.5 *")
        assert abs(eval(code) - float(q)) < 1e-12
        assert abs(float(q) - value - float(advantage)) < 1e-12
