"""Times in a lesson are CPU time of the fastest series, and rows of one form, whoever measured them."""

from __future__ import annotations

import csv
import time

import pytest
import torch
from minirlhf_course import timing
from minirlhf_kernels import reference


def test_a_time_is_processor_time_per_call():
    def busy() -> None:
        end = time.process_time() + 2e-3
        while time.process_time() < end:
            pass

    assert 2e3 <= timing.microseconds(busy) < 4e3
    assert timing.microseconds(lambda: time.sleep(1e-3), least=2e-4) < 500, "who sleeps does not count"


def test_operations_are_counted_and_views_are_not():
    x = torch.zeros(3, 4)
    assert timing.count_operations(lambda: (x.t() + 1).exp()) == 2
    assert timing.count_operations(lambda: x.view(4, 3)[1:]) == 0

    def operations(T: int) -> int:
        batch = *torch.zeros(2, 2, T), torch.zeros(2, T) > 1
        return timing.count_operations(lambda: reference.gae(*batch, gamma=0.9, lam=0.9))

    assert operations(8) > operations(4), "a loop over time starts operations at every step"


def test_the_definitions_are_measured_beside_a_copy_of_their_bytes(monkeypatch):
    took = iter([1.0, 50.0] * 100)
    monkeypatch.setattr(timing, "microseconds", lambda call: (call(), next(took))[1])
    rows = timing.definitions()
    assert {row["kernel"] for row in rows} == {"token_logprobs", "ppo_loss", "gae"}
    assert all(row["share_of_copy"] == pytest.approx(0.02) and row["ms_p50"] == 0.05 for row in rows)
    assert len({(row["kernel"], row["shape"]) for row in rows}) == len(rows) == 11


def test_results_are_read_by_device_and_what_holds_no_times_is_left_out(tmp_path):
    def write(name: str, *rows: dict[str, str]) -> None:
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    write("one.csv", {"gpu": "A", "kernel": "gae", "ms_p50": "1.5"}, {"gpu": "a CPU", "kernel": "gae", "ms_p50": "9"})
    write("two.csv", {"gpu": "A", "kernel": "ppo_loss", "ms_p50": "2"})
    write("errors.csv", {"gpu": "A", "kernel": "gae", "largest_error": "0"})
    found = timing.results(tmp_path)
    assert list(found) == ["A"] and [row["kernel"] for row in found["A"]] == ["gae", "ppo_loss"]
