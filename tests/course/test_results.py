"""Tables of data/results as lessons read them, and the package's lines as they show them."""

from __future__ import annotations

import math

import torch
from minirlhf_course.results import grouped, read_results
from minirlhf_course.sources import show_source

from minirlhf import losses
from minirlhf.language import sft


def test_reads_numbers_words_and_gaps_and_prints_what_the_table_is(tmp_path, capsys):
    file = tmp_path / "table.csv"
    file.write_text("# a machine; a day\nway,size,seed,gold\nplain,2,0,0.5\nplain,1,0,\nplain,2,1,1.5\nplain,1,1,3\n")
    rows = read_results(file)
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
