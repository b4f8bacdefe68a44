"""JupyterLab on this machine's loopback, opened in a headless Chromium: for tests and for looking at pages."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # playwright is needed by maintainers only
    from playwright.sync_api import Locator, Page

_CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
_SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True},
    "notebook-extension/tracker": {"windowingMode": "none"},  # every cell is in the page, not only the visible ones
}
_IDLE = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
_CODE_CELLS = "window.jupyterapp.shell.currentWidget.content.widgets.filter(c => c.model.type === 'code')"
_ALL_RUN = f"() => {_CODE_CELLS}.every(c => c.model.executionCount !== null)"
_ERRORS = (
    f"() => {_CODE_CELLS}.flatMap(c => c.model.outputs.toJSON())"
    ".filter(o => o.output_type === 'error').map(o => o.ename + ': ' + o.evalue)"
)


class BrowserMissing(Exception):
    """There is no browser to drive, or no playwright to drive it with."""


def find_chromium() -> str:
    """Path of a Chromium or Chrome: ``$CHROMIUM``, else the first one found under its usual names."""
    if path := os.environ.get("CHROMIUM"):
        if not Path(path).is_file():
            raise BrowserMissing(f"CHROMIUM={path} is no file: set it to the browser's program")
        return path
    names = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"]
    places = [
        "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
        "/Applications/Chromium.app/Contents/MacOS/Chromium",
    ]
    found = [path for name in names if (path := shutil.which(name))] + [p for p in places if Path(p).is_file()]
    if not found:
        raise BrowserMissing(
            "no Chromium found: install one (Debian: `apt-get install chromium`) or set CHROMIUM to its path"
        )
    return found[0]


def require_browser() -> str:
    """Path of the browser to drive.

    Raises
    ------
    BrowserMissing
        With what to install: playwright, or a browser.
    """
    if importlib.util.find_spec("playwright") is None:
        raise BrowserMissing("playwright is not installed: run `pip install -c constraints.txt -e '.[test]'`")
    return find_chromium()


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve a copy of `folder` in JupyterLab; yields the address of a notebook, with ``{}`` for its name."""
    with tempfile.TemporaryDirectory(prefix="lab") as scratch:
        work = Path(scratch)
        shutil.copytree(folder, work / "root")
        for name, values in _SETTINGS.items():
            path = work / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values), encoding="utf-8")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        token = secrets.token_hex(16)
        environment = os.environ | {
            "DRIVE_WIDGETS": "0",  # as for a reader
            "JUPYTER_CONFIG_DIR": str(work / "config"),
            "JUPYTER_RUNTIME_DIR": str(work / "runtime"),
            "JUPYTERLAB_SETTINGS_DIR": str(work / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(work / "workspaces"),
        }
        command = [
            sys.executable,
            "-m",
            "jupyterlab",
            "--no-browser",
            "--allow-root",
            "--ip=127.0.0.1",
            f"--port={port}",
            "--ServerApp.port_retries=0",
            f"--IdentityProvider.token={token}",
            f"--ServerApp.root_dir={work / 'root'}",
            "--LabApp.expose_app_in_browser=True",
            "--LabApp.extension_manager=readonly",
        ]
        with (work / "lab.log").open("w") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            _wait_until_up(f"http://127.0.0.1:{port}/api/status?token={token}", server, work / "lab.log")
            yield f"http://127.0.0.1:{port}/lab/tree/{{}}?reset&token={token}"
        finally:
            server.terminate()
            try:
                server.wait(timeout=20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _wait_until_up(url: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not come up:\n{log.read_text()[-2000:]}")


def _is_local(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:"))


class NotebookPage:
    """One notebook, open in JupyterLab in a headless browser."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.console_errors: list[str] = []
        self.failed_requests: list[str] = []
        page.on("console", lambda m: self.console_errors.append(m.text) if m.type == "error" else None)
        self.foreign_requests: list[str] = []  # a lecture hall may have no network: nothing may ask for it
        page.on("request", lambda r: None if _is_local(r.url) else self.foreign_requests.append(r.url))
        page.on("requestfailed", lambda request: self.failed_requests.append(f"{request.url} {request.failure}"))

    def open(self, url: str) -> None:
        """Load the notebook and wait for its kernel."""
        self.page.goto(url)
        self.page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=60_000)
        self.page.wait_for_function(_IDLE, timeout=60_000)

    def run_all(self) -> list[str]:
        """Run all cells; return the errors that stand in their outputs."""
        self.page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
        self.page.wait_for_function(_ALL_RUN, timeout=180_000)
        self.page.wait_for_function(_IDLE, timeout=60_000)
        self.page.wait_for_timeout(1500)  # formulas are typeset after the last output arrived
        return self.page.evaluate(_ERRORS)

    def explorers(self) -> list[Locator]:
        """Find the widgets that show a picture, top to bottom."""
        return self.page.locator(".jp-OutputArea-output .widget-vbox:has(> img.widget-image)").all()

    def picture_of(self, explorer: Locator) -> str:
        """Return an address of the picture that changes whenever the picture does."""
        return explorer.locator("img.widget-image").get_attribute("src") or ""

    def press(self, explorer: Locator, key: str, *, control: int = 0, patience: float = 5.0) -> bool:
        """Press `key` on a slider of `explorer`; say whether another picture came within `patience` seconds."""
        image = explorer.locator("img.widget-image")
        old = self.picture_of(explorer)
        handle = explorer.locator(".noUi-handle").nth(control)
        handle.focus()
        handle.press(key)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            if self.picture_of(explorer) != old and image.evaluate("i => i.complete && i.naturalWidth > 0"):
                return True
            self.page.wait_for_timeout(20)
        return False

    def save_pages(self, folder: Path) -> list[Path]:
        """Save pictures of the whole notebook in `folder`, one screen after the other."""
        folder.mkdir(parents=True, exist_ok=True)
        view = self.page.locator(".jp-NotebookPanel:visible .jp-WindowedPanel-outer").first
        # Up to the end of the last cell: below it Lab leaves a blank screen for scrolling.
        screen, total = view.evaluate(
            "v => { const last = [...v.querySelectorAll('.jp-Cell')].at(-1).getBoundingClientRect();"
            " return [v.clientHeight, v.scrollTop + last.bottom - v.getBoundingClientRect().top] }"
        )
        step = screen - 60
        pages = []
        for number in range(max(1, math.ceil((total - 60) / step))):
            view.evaluate("(v, top) => { v.scrollTop = top }", number * step)
            self.page.wait_for_timeout(120)
            pages.append(folder / f"page-{number + 1:02d}.png")
            view.screenshot(path=pages[-1])
        return pages


@contextlib.contextmanager
def open_notebook(path: Path, *, size: tuple[int, int] = (1180, 1500)) -> Iterator[NotebookPage]:
    """Open a copy of the notebook at `path` in JupyterLab under headless Chromium; nothing is run yet.

    Raises
    ------
    BrowserMissing
        With what to install.
    """
    chromium = require_browser()
    from playwright.sync_api import sync_playwright  # here: most commands do without

    with serve(path.parent) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, headless=True, args=_CHROMIUM_FLAGS)
        try:
            page = NotebookPage(browser.new_page(viewport={"width": size[0], "height": size[1]}))
            page.open(url.format(path.name))
            page.page.evaluate("() => window.jupyterapp.commands.execute('application:toggle-left-area')")
            yield page
        finally:
            browser.close()
