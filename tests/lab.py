"""JupyterLab in a headless Chromium, driven as a reader does; all that it keeps is in a folder of the caller's."""

import json
import os
import re
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

from playwright.sync_api import Locator, Page, sync_playwright

CHROMIUM = shutil.which("chromium")
SCREENSHOTS_VARIABLE = "ATTENTION_STUDY_SCREENSHOTS"  # the folder for screenshots; without it none are taken
PATIENCE = 180  # seconds until a wait gives up: for a stuck notebook, not a measure of a slow machine

# Console errors that say nothing about a notebook: part of the message, and why it may stand.
ALLOWED_ERRORS = {
    "Could not restore the debugger state: Canceled future": "Lab asked a kernel that a test before had restarted",
}


def set_parameters(source: str, values: dict) -> str:
    """A parameters cell with other defaults; every name must be in it."""
    for name, value in values.items():
        source, found = re.subn(
            rf"^({name}: \w+ =) .*?(?=  #|$)", lambda line, new=value: f"{line[1]} {new!r}", source, flags=re.MULTILINE
        )
        assert found == 1, f"no parameter {name}"
    return source


@contextmanager
def server(files: Path, state: Path, environment: dict[str, str]) -> Iterator[str]:
    """Lab that shows the folder `files` and keeps settings, history and kernels' files in `state`; yields its URL."""
    quiet = state / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))  # else Lab asks whether it may
    folders = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, token = f"http://127.0.0.1:{port}", secrets.token_hex()
    options = {
        "ServerApp.root_dir": files,
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.allow_root": True,
        "IdentityProvider.token": token,
        "LabApp.expose_app_in_browser": True,
        "LabApp.extension_manager": "readonly",
        "LabApp.news_url": None,
        "LabApp.check_for_updates_class": "jupyterlab.handlers.announcements.NeverCheckForUpdate",
    }
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", *(f"--{k}={v}" for k, v in options.items())]
    log = state / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            env=os.environ | {name: str(state / folder) for name, folder in folders.items()} | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_for(f"{url}/api/status?token={token}", process, log)
        yield f"{url}/lab?token={token}"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError) as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"JupyterLab did not start: {log.read_text()[-2000:]}") from error
            time.sleep(0.2)


@contextmanager
def browser() -> Iterator:
    """Debian's Chromium; Playwright's own download is not used."""
    # Root needs --no-sandbox; the others keep a closed network from being asked at every start.
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=flags)
        yield chromium
        chromium.close()


class Notebook:
    """One open notebook, in a page and a kernel of its own."""

    def __init__(self, browser, url: str, name: str):
        self.name = name
        self.page: Page = browser.new_page(viewport={"width": 1280, "height": 900})
        self.page.set_default_timeout(PATIENCE * 1000)
        self.errors: list[str] = []  # of the browser: its console's, and exceptions that nothing caught
        self.page.on("console", lambda said: said.type == "error" and self._note(f"{said.text} ({said.location})"))
        self.page.on("pageerror", lambda error: self._note(str(error)))
        # A workspace of its own, so that no notebook of an earlier page is opened again.
        self.page.goto(url.replace("/lab?", f"/lab/workspaces/{secrets.token_hex(4)}/tree/{name}?"))
        self.page.wait_for_function(
            """() => {
                const panel = window.jupyterapp?.shell.currentWidget;
                return panel?.sessionContext?.session?.kernel?.status === 'idle' && panel.content.model?.cells.length;
            }"""
        )

    def _note(self, error: str) -> None:
        if not any(part in error for part in ALLOWED_ERRORS):
            self.errors.append(error)

    def cells(self) -> list[dict]:
        """The code cells as the page has them now, in nbformat's form."""
        cells = self.page.evaluate("jupyterapp.shell.currentWidget.content.model.toJSON().cells")
        return [cell for cell in cells if cell["cell_type"] == "code"]

    def outputs(self, kind: str) -> list[dict]:
        return [output for cell in self.cells() for output in cell["outputs"] if output["output_type"] == kind]

    def edit(self, cell: int, source: str) -> None:
        """Another source for a code cell, by its number among them."""
        self.page.evaluate(
            """([cell, source]) => [...jupyterapp.shell.currentWidget.content.model.cells]
                .filter(cell => cell.type === 'code')[cell].sharedModel.setSource(source)""",
            [cell, source],
        )

    def restart(self) -> None:
        """A new kernel; the page keeps its cells and outputs."""
        self.page.evaluate("jupyterapp.shell.currentWidget.sessionContext.restartKernel()")

    def run_all(self, wait: bool = True) -> None:
        """What the menu's Run > Run All Cells does."""
        self.page.evaluate(
            """() => {
                window.ran = false;
                jupyterapp.commands.execute('runmenu:run-all').then(() => { window.ran = true; });
            }"""
        )
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until the cells that `run_all` started have run, or were given up after an error, and the kernel is idle."""
        # After an error the command is done before the cells that were given up are.
        self.page.wait_for_function(
            """() => {
                const panel = jupyterapp.shell.currentWidget;
                const cells = [...panel.content.model.cells].filter(cell => cell.type === 'code');
                return window.ran && cells.every(cell => cell.executionState === 'idle')
                    && panel.sessionContext.session.kernel.status === 'idle';
            }"""
        )

    def is_busy(self) -> bool:
        return self.page.evaluate("jupyterapp.shell.currentWidget.sessionContext.session.kernel.status") == "busy"

    def seen(self, selector: str = "") -> Locator:
        """The outputs, or what is in them, as Lab draws them."""
        return self.page.locator(f".jp-OutputArea-output {selector}")

    def screenshots(self) -> None:
        """The whole notebook, a PNG per screen, in the light and the dark theme, for somebody to look at."""
        if not os.environ.get(SCREENSHOTS_VARIABLE):
            return
        folder = Path(os.environ[SCREENSHOTS_VARIABLE])
        folder.mkdir(parents=True, exist_ok=True)
        self.page.mouse.move(0, 0)  # what is under the mouse is drawn otherwise
        pane = self.page.locator(".jp-WindowedPanel-outer").first
        last_cell = pane.locator(".jp-Cell").last
        for theme in ("Light", "Dark"):
            name = f"JupyterLab {theme}"
            self.page.evaluate("theme => jupyterapp.commands.execute('apputils:change-theme', {theme})", name)
            self.page.locator(f"body[data-jp-theme-name='{name}']").wait_for(state="attached")
            pane.evaluate("pane => pane.scrollTo(0, 0)")
            for number in range(1, 100):
                self.page.wait_for_timeout(
                    300
                )  # for the theme's colours, and for cells that are drawn as they come near
                self.page.screenshot(path=folder / f"{Path(self.name).stem}-{theme.lower()}-{number:02d}.png")
                end = pane.bounding_box()
                bottom = last_cell.bounding_box()
                if bottom["y"] + bottom["height"] <= end["y"] + end["height"]:
                    break
                pane.evaluate("pane => pane.scrollBy(0, pane.clientHeight - 40)")

    def close(self) -> None:
        """Stops the kernel too: many of them would not fit a small machine."""
        self.page.evaluate("jupyterapp.shell.currentWidget.sessionContext.shutdown()")
        self.page.close()
