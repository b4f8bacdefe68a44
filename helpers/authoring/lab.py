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
    from http.client import HTTPResponse

    from playwright.sync_api import Browser, Locator, Page

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
# What comes after the last output: every widget stands in the page with its picture, every formula is typeset.
_SHOWN = f"""() => {{
    const panel = window.jupyterapp.shell.currentWidget.node;
    const promised = {_CODE_CELLS}.flatMap(c => c.model.outputs.toJSON())
        .filter(o => 'application/vnd.jupyter.widget-view+json' in (o.data ?? {{}})).length;
    if (panel.querySelectorAll('.jp-OutputArea-output > .jupyter-widgets').length < promised) return false;
    if ([...panel.querySelectorAll('img')].some(i => !i.complete)) return false;
    const texts = document.createTreeWalker(panel, NodeFilter.SHOW_TEXT);
    const bare = 'pre, code, script, style, textarea, mjx-container, .cm-editor';
    while (texts.nextNode()) {{
        const text = texts.currentNode;
        if (/\\$[^$]+\\$|\\\\tag\\{{/.test(text.data) && !text.parentElement.closest(bare)) return false;
    }}
    return true;
}}"""
_PLACE = "handle => handle.parentElement.style.transform"  # of a slider; moves with the key, before the kernel hears
_TWO_FRAMES = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
# The kernel answers in the order in which it is asked, so its reply comes after every picture asked for before.
# A slider keeps its last place back while the kernel is busy: ask until nothing changes any more.
_SETTLE = f"""async () => {{
    const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
    const pictures = () => [...document.querySelectorAll('img.widget-image')].map(i => i.src).join();
    let before;
    do {{
        before = pictures();
        await kernel.requestKernelInfo();
        await {_TWO_FRAMES};
    }} while (pictures() !== before);
}}"""


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
def serve(folder: Path) -> Iterator[tuple[str, str]]:
    """Serve a copy of `folder` in JupyterLab; yields the address of the server and the token that it asks for."""
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
            yield f"http://127.0.0.1:{port}", token
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
        errors = self.page.evaluate(_ERRORS)
        if not errors:  # an error may have kept a widget from being shown
            self.page.wait_for_function(_SHOWN, timeout=60_000)
        self.settle()
        return errors

    def settle(self) -> None:
        """Wait until the kernel has drawn and the page shows all that was asked for."""
        self.page.evaluate(_SETTLE)

    def explorers(self) -> list[Locator]:
        """Find the widgets that show a picture, top to bottom."""
        return self.page.locator(".jp-OutputArea-output .widget-vbox:has(> img.widget-image)").all()

    def picture_of(self, explorer: Locator) -> str:
        """Return an address of the picture that changes whenever the picture does."""
        return explorer.locator("img.widget-image").get_attribute("src") or ""

    def press(self, explorer: Locator, key: str, *, control: int = 0, patience: float = 5.0) -> bool:
        """Press `key` on a slider of `explorer`; say whether another picture came within `patience` seconds."""
        old = self.picture_of(explorer)
        handle = explorer.locator(".noUi-handle").nth(control)
        handle.focus()
        place = handle.evaluate(_PLACE)
        handle.press(key)
        if handle.evaluate(_PLACE) == place:  # it stood at that end already, and nothing was sent
            return False
        return self.another_picture(explorer, old, patience=patience)

    def another_picture(self, explorer: Locator, old: str, *, patience: float = 5.0) -> bool:
        """Wait for another picture than `old`; say whether one came within `patience` seconds."""
        image = explorer.locator("img.widget-image")
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
        box = view.bounding_box()
        pages = []
        for number in range(max(1, math.ceil((total - 60) / step))):
            view.evaluate(f"(v, top) => {{ v.scrollTop = top; return {_TWO_FRAMES} }}", number * step)
            pages.append(folder / f"page-{number + 1:02d}.png")
            # A part of the page: a picture of the element would be the same and take twice as long.
            self.page.screenshot(path=pages[-1], clip=box)
        return pages


class Lab:
    """A JupyterLab and a headless browser, in which one notebook after the other can be opened."""

    def __init__(self, address: str, token: str, browser: Browser, size: tuple[int, int]) -> None:
        self.address, self.token, self.browser, self.size = address, token, browser, size

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[NotebookPage]:
        """Open a notebook by its name in a browser window that knows of no other; nothing is run yet."""
        page = NotebookPage(self.browser.new_page(viewport={"width": self.size[0], "height": self.size[1]}))
        try:
            page.open(f"{self.address}/lab/tree/{name}?reset&token={self.token}")
            page.page.evaluate("() => window.jupyterapp.commands.execute('application:toggle-left-area')")
            yield page
        finally:
            page.page.close()
            self._stop_kernels()

    def _stop_kernels(self) -> None:
        """Stop what the page leaves running: the next notebook shall have the processor and the memory."""
        with self._ask("GET") as reply:
            sessions = json.load(reply)
        for session in sessions:
            self._ask("DELETE", session["id"]).close()

    def _ask(self, method: str, session: str = "") -> HTTPResponse:
        url = f"{self.address}/api/sessions{session and '/' + session}?token={self.token}"
        return urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=60)


@contextlib.contextmanager
def open_lab(folder: Path, *, size: tuple[int, int] = (1180, 1500)) -> Iterator[Lab]:
    """Start JupyterLab on a copy of `folder`, and a headless Chromium whose windows have `size`.

    Raises
    ------
    BrowserMissing
        With what to install.
    """
    chromium = require_browser()
    from playwright.sync_api import sync_playwright  # here: most commands do without

    with serve(folder) as (address, token), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, headless=True, args=_CHROMIUM_FLAGS)
        try:
            yield Lab(address, token, browser, size)
        finally:
            browser.close()


@contextlib.contextmanager
def open_notebook(path: Path, *, size: tuple[int, int] = (1180, 1500)) -> Iterator[NotebookPage]:
    """Open a copy of the notebook at `path`, in a JupyterLab and a browser of its own; nothing is run yet.

    Raises
    ------
    BrowserMissing
        With what to install.
    """
    with open_lab(path.parent, size=size) as lab, lab.open(path.name) as notebook:
        yield notebook
