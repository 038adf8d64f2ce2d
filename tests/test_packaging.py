"""The house: the two ways of installing agree, the pins hold, and what the pages promise is there."""

import contextlib
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
DOCS = ("architecture", "before_you_start", "data_formats", "papers", "sampling_elsewhere", "scaling")
PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{name}.md" for name in DOCS))


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


PROJECT = tomllib.loads(text_of("pyproject.toml"))["project"]


def dependencies(extra: str = "dev") -> list[Requirement]:
    """Everything that an extra asks for; an extra may be made of others, as in minirlhf[language]."""
    found = {str(wanted): wanted for wanted in map(Requirement, PROJECT["dependencies"])}
    for wanted in map(Requirement, PROJECT["optional-dependencies"][extra]):
        others = sorted(wanted.extras) if wanted.name == "minirlhf" else []
        parts = [part for name in others for part in dependencies(name)] or [wanted]
        found |= {str(part): part for part in parts}
    return list(found.values())


def pins() -> dict[str, Requirement]:
    lines = text_of("constraints.txt").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert len({canonicalize_name(pin.name) for pin in found}) == len(found), "a name is pinned twice"
    return {canonicalize_name(pin.name): pin for pin in found}


def pinned_version(pin: Requirement) -> Version:
    (only,) = pin.specifier
    assert only.operator == "==", f"{pin} is not exact"
    return Version(only.version)


def tracked_files() -> list[Path]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("dependency", dependencies(), ids=lambda requirement: requirement.name)
def test_dependency_is_pinned_within_its_range(dependency):
    pin = pins()[canonicalize_name(dependency.name)]
    assert dependency.specifier.contains(pinned_version(pin)), f"{pin} is outside {dependency}"
    assert str(pin.marker or "") == str(dependency.marker or ""), "marked for other systems"


def test_torch_and_triton_are_the_pair_that_belongs_together_and_no_pin_names_a_build():
    versions = {name: pinned_version(pin) for name, pin in pins().items()}
    assert (str(versions["torch"]), str(versions["triton"])) == ("2.13.0", "3.7.1")
    assert [name for name, version in versions.items() if version.local] == [], "+cpu would refuse a machine with a GPU"


def test_installed_versions_are_the_pinned_ones():
    installed = {canonicalize_name(found.name): found.version for found in metadata.distributions()}
    wanted = {name: pin for name, pin in pins().items() if pin.marker is None or pin.marker.evaluate()}
    fits = {name: name in installed and pin.specifier.contains(installed[name]) for name, pin in wanted.items()}
    wrong = {str(wanted[name]): installed.get(name) for name, right in fits.items() if not right}
    assert not wrong, "run `make setup` in a fresh .venv"


def test_every_package_that_is_needed_is_pinned():
    """Follow the installed packages' own requirements from pyproject's."""
    seen, todo = set(), dependencies()
    while todo:
        wanted = todo.pop()
        name, extras = canonicalize_name(wanted.name), frozenset({"", *wanted.extras})
        # A CUDA build of torch names the exact versions of its libraries itself.
        if (name, extras) in seen or name.startswith(("nvidia-", "cuda-")):
            continue
        seen.add((name, extras))
        with contextlib.suppress(metadata.PackageNotFoundError):
            inner = map(Requirement, metadata.requires(name) or [])
            todo += [x for x in inner if x.marker is None or any(x.marker.evaluate({"extra": e}) for e in extras)]
    assert {name for name, _ in seen} <= set(pins())


def test_conda_and_make_setup_install_with_the_same_pins():
    environment = yaml.safe_load(text_of("environment.yml"))
    assert environment["channels"] == ["conda-forge"]
    *packages, last = environment["dependencies"]
    assert [re.split("[=<>]", package)[0] for package in packages] == ["python", "pip"]
    (python,) = (package for package in packages if package.startswith("python"))
    assert Version(python.split("=")[-1]) in Requirement(f"python{PROJECT['requires-python']}").specifier
    assert last == {"pip": ["-c constraints.txt", "-e .[dev]"]}
    makefile = text_of("Makefile")
    assert 'install -qq -c constraints.txt -e ".[dev]"' in makefile
    assert "\n.venv/.stamp: pyproject.toml constraints.txt\n" in makefile
    assert not re.search(r"torch==\d", makefile), "torch's version stands in constraints.txt alone"


def test_ci_runs_make_test():
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111, "not executable"
    text = text_of(".ci/run")
    assert text.index("apt-get install") < text.index("make test"), "the test of JupyterLab needs a browser"


def test_the_workflow_for_teachers_passes_a_linter_and_marks_two_lines():
    workflow = ".github/workflows/ci.yml"
    command = [Path(sys.executable).with_name("zizmor"), "--offline", "--pedantic", ROOT / workflow]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    text = text_of(workflow)
    assert [text.count(f"# CHANGE {number} of 2: ") for number in (1, 2)] == [1, 1] and "bash .ci/run" in text


def test_extras_say_what_each_kind_of_user_needs():
    names = {extra: {wanted.name for wanted in dependencies(extra)} for extra in PROJECT["optional-dependencies"]}
    assert PROJECT["dependencies"] == ["torch>=2.11"]
    assert "transformers" in names["language"] and not names["language"] & {"tyro", "matplotlib", "gymnasium"}
    assert "gymnasium" in names["control"] and "transformers" not in names["control"]
    assert names["run"] > names["language"] and "jupyterlab" not in names["run"]
    assert names["course"] >= names["run"] | names["control"] and names["dev"] > names["all"]
    assert names["all"] == names["course"] | {"tensorboard", "peft"}


def test_make_lab_opens_the_first_lesson_and_make_test_runs_them_all():
    def dry(target: str) -> str:
        command = ["make", "--dry-run", "--always-make", "-C", str(ROOT), target]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert "jupyter lab  notebooks/00_map_and_setup.ipynb" in dry("lab")
    assert "notebooks/execute.py" in dry("notebooks")
    found = [sorted((ROOT / folder).glob("*.ipynb")) for folder in ("notebooks", "notebooks/studios")]
    notebooks = [str(path.relative_to(ROOT)) for paths in found for path in paths]
    assert f"--nbval-lax --nbval-current-env {' '.join(notebooks)}" in dry("test")


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_only_what_is_there(page):
    from minirlhf.cli import COMMANDS

    targets = set(re.findall(r"^([a-z]+):", text_of("Makefile"), flags=re.M))
    assert {"setup", "run", "test", "lab", "world", "bench", "clean", "help"} <= targets
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text_of(page), flags=re.S))
    assert set(re.findall(r"(?:^|[`&\n] ?)make ([a-z]+)", code)) <= targets
    assert set(re.findall(r"(?:^|[`&/\n] ?)minirlhf ([a-z]+)", code)) <= set(COMMANDS)
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text_of(page)) if "://" not in link]
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []


def test_readme_shows_the_pinned_torch_and_a_place_for_the_results():
    text = text_of("README.md")
    assert set(re.findall(r"torch==([\d.]+)", text)) == {str(pinned_version(pins()["torch"]))}
    assert text.index("<!-- results -->") < text.index("<!-- /results -->")


def test_readme_example_runs(tmp_path, monkeypatch, make_causal, tokenizer, tiny_folder):
    """The README's own lines, on a tiny model and with less to do."""
    (block,) = re.findall(r"```python\n(.*?)```", text_of("README.md"), flags=re.S)
    small = block.replace("RLHFConfig(steps=30)", "RLHFConfig(steps=1, batch_size=4, max_response_tokens=4)")
    assert small != block, "the README's example has changed: shorten it here too"
    shutil.copytree(tiny_folder, tmp_path / "data" / "small_world")
    make_causal().save_pretrained(tmp_path / "runs" / "default" / "sft")
    tokenizer.save_pretrained(tmp_path / "runs" / "default" / "sft")
    monkeypatch.chdir(tmp_path)
    exec(compile(small, "README.md", "exec"), {})
    assert (tmp_path / "runs" / "frogs" / "model.safetensors").is_file()


def test_no_file_names_a_machine_path_or_a_registry_host():
    # Written in pieces, so that this file passes its own test.
    paths = "|".join(("work", "root", "opt", "home/[a-z]", "Users/[A-Za-z]", "mnt/[a-z]"))
    hosts = "py" + r"pi\.org|python" + r"hosted\.org|download" + r"\.pytorch\.org|ana" + r"conda\.org"
    bad = re.compile(rf"(?<![\w.\]/-])/(?:{paths})(?:/|\b)|{hosts}|--(?:extra-)?index" + "-url", re.I)
    found = []
    for file in tracked_files():
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            if hit := bad.search(line):
                found.append(f"{file.relative_to(ROOT)}:{number}: {hit.group()}")
    assert not found, "\n".join(found)
