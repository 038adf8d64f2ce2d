"""JupyterLab in headless Chromium: a server of its own, a page with one notebook open, and its kernel."""

from __future__ import annotations

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@dataclass
class Lab:
    """A notebook that is open in a browser."""

    page: Any
    notebook: Any
    cells: Any
    kill_kernel: Callable[[], None]


def chromium() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no Chromium here (looked for {', '.join(BROWSERS)}): .ci/run installs one")
    return found


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


@pytest.fixture
def open_in_lab(tmp_path: Path) -> Callable[[str], Any]:
    """`with open_in_lab("notebooks/x.ipynb") as lab:` opens a notebook under tmp_path, its kernel running."""

    @contextmanager
    def opened(name: str) -> Iterator[Lab]:
        browser_path = chromium()
        from playwright.sync_api import expect, sync_playwright

        with jupyter_lab(tmp_path) as (address, token), sync_playwright() as playwright:
            options = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
            browser = playwright.chromium.launch(
                executable_path=browser_path, args=[*options, "--disable-dev-shm-usage"]
            )
            page = browser.new_page(viewport={"width": 1300, "height": 1000})

            def kill_kernel() -> None:
                (session,) = ask(address, "sessions", token)
                subprocess.run(["pkill", "-KILL", "-f", session["kernel"]["id"]], check=True)

            try:
                page.goto(f"{address}/lab/tree/{name}?token={token}")
                notebook = page.locator(".jp-NotebookPanel:visible")
                cells = notebook.locator(".jp-Cell")
                expect(cells.first).to_be_visible(timeout=60_000)
                wait_for_kernel(address, token)
                expect(notebook.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]")).to_be_visible(
                    timeout=60_000
                )
                # Should JupyterLab ask for the kernel all the same, answer as a learner would.
                ask_kernel = page.locator(".jp-Dialog", has_text="Select Kernel")
                page.add_locator_handler(ask_kernel, lambda: ask_kernel.locator(".jp-mod-accept").click())
                yield Lab(page, notebook, cells, kill_kernel)
            except BaseException:
                page.screenshot(path=tmp_path / "failed.png")
                print((tmp_path / "server.log").read_text()[-3000:])
                raise
            finally:
                browser.close()

    return opened
