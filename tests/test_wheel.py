"""What `pip install` puts on a machine: built as a wheel, installed into an empty folder, and used far from the repo.

A kernel that is started in notebooks/ finds minirlhf_course there even where nothing is installed, so only a test from
elsewhere can say whether it was packed.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("minirlhf", "kernels/minirlhf_kernels", "notebooks/minirlhf_course")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "-q"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no build/ and no egg-info are left in the repo."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / "repo" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "repo")
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    subprocess.run([*PIP, *build, str(folder / "repo")], check=True, timeout=300)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_every_file_of_the_three_packages(wheel: Path) -> None:
    files = {
        path.relative_to((ROOT / name).parent).as_posix()
        for name in SOURCES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert files >= {f"{Path(name).name}/py.typed" for name in SOURCES}
    with ZipFile(wheel) as packed:
        assert {name for name in packed.namelist() if ".dist-info/" not in name} == files
        assert packed.read("minirlhf_course/__init__.py") == b"", "a kernel in notebooks/ must need nothing of it"


def test_far_from_the_repo_the_fast_run_makes_its_world_and_judges_by_gold(wheel: Path, tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    install = ["install", "--no-deps", "--no-index", "--no-compile", "--target", str(site)]
    subprocess.run([*PIP, *install, str(wheel)], check=True, timeout=300)
    code = """
import sys
from importlib.metadata import entry_points
from minirlhf.cli import main
status = main(sys.argv[1:])
(point,) = entry_points(group="minirlhf.worlds")
print(point.dist.locate_file(""), *(sys.modules[name].__file__ for name in ("minirlhf", "minirlhf_course")), sep="\\n")
sys.exit(status)
"""
    short = ["--sft.epochs", "0.02", "--reward-model.epochs", "0.02", "--rlhf.steps", "1", "--base.steps", "4"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "run", "--preset", "fast", "--device", "cpu", *short],
        cwd=empty,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    used = done.stdout.splitlines()[-3:]
    assert used == [str(site), *(str(site / name / "__init__.py") for name in ("minirlhf", "minirlhf_course"))]
    report = json.loads((empty / "runs" / "fast" / "report.json").read_text(encoding="utf-8"))
    assert (report["judge"], report["data"]) == ("gold", "world")
    assert (empty / "runs" / "fast" / "world" / "world.json").is_file()
    assert [path.name for path in empty.iterdir()] == ["runs"]
