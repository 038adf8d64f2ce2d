"""JupyterLab itself, in headless Chromium: open a lesson, run it, solve an exercise, see the check change its mind."""

from __future__ import annotations

import ast
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from minirlhf_course.checks import Exercise, lesson01

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
LESSON = "01_reinforce"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
RUN_MS = 150_000
"""The longest a lesson may take, and a click may wait for it."""


def chromium() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no Chromium here (looked for {', '.join(BROWSERS)}): .ci/run installs one")
    return found


def solution(name: str) -> str:
    """The text of a solution, as a learner would type it: the file without its docstring and the other functions."""
    text = (NOTEBOOKS / "solutions" / f"{LESSON}.py").read_text(encoding="utf-8")
    nodes = [node for node in ast.parse(text).body[1:] if getattr(node, "name", f"my_{name}") == f"my_{name}"]
    return "\n".join(ast.get_source_segment(text, node) for node in nodes)


def ask(address: str, what: str, token: str) -> Any:
    """The server's own answer; None while it does not listen yet."""
    try:
        with urllib.request.urlopen(f"{address}/api/{what}?token={token}", timeout=10) as answer:
            return json.load(answer)
    except (urllib.error.URLError, OSError):
        return None


def wait_for_kernel(address: str, token: str) -> None:
    """Until the page is connected to an idle kernel: what the page itself shows is "idle" before there is one."""
    deadline = time.monotonic() + 60
    while True:
        kernels = [session["kernel"] for session in ask(address, "sessions", token) or []]
        if any(kernel["connections"] and kernel["execution_state"] == "idle" for kernel in kernels):
            return
        assert time.monotonic() < deadline, f"no kernel after 60 s: {kernels}"
        time.sleep(0.2)


@contextmanager
def jupyter_lab(folder: Path) -> Iterator[tuple[str, str]]:
    """JupyterLab on a folder, with its settings in there too; gives the server's address and its token."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    kinds = ("JUPYTER_CONFIG", "JUPYTER_DATA", "JUPYTER_RUNTIME", "JUPYTERLAB_SETTINGS", "JUPYTERLAB_WORKSPACES")
    own = {f"{kind}_DIR": str(folder / ".jupyter" / f"{kind}_DIR") for kind in kinds} | {"OMP_NUM_THREADS": "1"}
    settings = folder / ".jupyter" / "JUPYTERLAB_SETTINGS_DIR" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ip=127.0.0.1"]
    command += [f"--IdentityProvider.token={token}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}"]
    log = (folder / "server.log").open("w")
    server = subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while ask(address, "status", token) is None:
            assert server.poll() is None and time.monotonic() < deadline, (folder / "server.log").read_text()
            time.sleep(0.2)
        yield address, token
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        log.close()


def without_outputs(path: Path) -> None:
    """So that what appears was made in this run."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    path.write_text(json.dumps(notebook), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_lesson_runs_and_an_exercise_can_be_solved_in_jupyterlab(tmp_path):
    browser_path = chromium()
    from playwright.sync_api import expect, sync_playwright

    shutil.copytree(NOTEBOOKS, tmp_path / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for folder in ("docs", "data"):  # what lessons may read beside them
        shutil.copytree(ROOT / folder, tmp_path / folder)
    without_outputs(tmp_path / "notebooks" / f"{LESSON}.ipynb")
    item = next(item for item in vars(lesson01).values() if isinstance(item, Exercise))

    with jupyter_lab(tmp_path) as (address, token), sync_playwright() as playwright:
        options = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=browser_path, args=[*options, "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        try:
            page.goto(f"{address}/lab/tree/notebooks/{LESSON}.ipynb?token={token}")
            lesson = page.locator(".jp-NotebookPanel:visible")
            cells = lesson.locator(".jp-Cell")
            expect(cells.first).to_be_visible(timeout=60_000)
            wait_for_kernel(address, token)
            expect(lesson.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]")).to_be_visible(timeout=60_000)
            # Should JupyterLab ask for the kernel all the same, answer as a learner would.
            ask_kernel = page.locator(".jp-Dialog", has_text="Select Kernel")
            page.add_locator_handler(ask_kernel, lambda: ask_kernel.locator(".jp-mod-accept").click())
            stub = cells.filter(has_text=f"def my_{item.name}(").first
            check = cells.filter(has_text=item.check_line).first
            plot = lesson.locator(".jp-OutputArea-output img[src^='data:image/png']")
            assert plot.count() == 0

            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_text("Run All Cells", exact=True).click()
            expect(check).to_contain_text("not attempted", timeout=RUN_MS)
            expect(plot.first).to_be_visible(timeout=RUN_MS)
            expect(lesson.locator(".jp-InputPrompt", has_text="[*]")).to_have_count(0, timeout=RUN_MS)
            expect(lesson.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']")).to_have_count(0)

            # Type the solution over the stub, run it, run the check.
            editor = stub.locator(".cm-content")
            editor.scroll_into_view_if_needed()
            editor.click()
            page.keyboard.press("ControlOrMeta+a")
            page.keyboard.press("Delete")
            page.keyboard.insert_text(solution(item.name))
            page.keyboard.press("Shift+Enter")
            check.scroll_into_view_if_needed()
            check.locator(".cm-content").click()
            page.keyboard.press("Shift+Enter")
            expect(check).to_contain_text(f"{item.name}: passed", timeout=30_000)
            expect(check).not_to_contain_text("not attempted")
        except BaseException:
            page.screenshot(path=tmp_path / "failed.png")
            print((tmp_path / "server.log").read_text()[-3000:])
            raise
        finally:
            browser.close()
