"""A sample of the crash points; `python tests/crash/every_point.py` tries them all."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("every_point.py")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux") or shutil.which("cc") is None, reason="needs Linux and cc")
@pytest.mark.parametrize("how", ["kill", "torn", "full", "short"])
def test_a_sample_of_the_operations(how: str) -> None:
    done = subprocess.run(
        [sys.executable, PROGRAM, "--how", how, "--points", "7"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "7 of 7 tried survived" in done.stdout, done.stdout + done.stderr[-2000:]
