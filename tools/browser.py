"""A studio that runs, and a browser that is installed, for tests and pictures.

    with studio(workspace) as running, chromium() as browser:
        page = browser.new_page()
        page.goto(running.link)

The browser is the system's chromium, driven by playwright; nothing is downloaded.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome")
"""What the browser may be called; the first one on the path is used, and none is downloaded."""

ARGUMENTS = (
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)

LINK = re.compile(r"https?://127\.0\.0\.1:\d+/\S*token=\S+")


def browser_path() -> str | None:
    """Return the path of an installed chromium, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@dataclass
class Studio:
    """A running studio.

    Attributes:
        link: The address with the token, as the program printed it.
        process: The process.
        workspace: Its workspace.
    """

    link: str
    process: subprocess.Popen[str]
    workspace: Path

    @property
    def base(self) -> str:
        """The address without a path and without the token."""
        parts = urlsplit(self.link)
        return f"{parts.scheme}://{parts.netloc}"

    @property
    def token(self) -> str:
        """The token of the link."""
        return self.link.partition("token=")[2].partition("&")[0]

    def ask(self, verb: str, arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return what the HTTP API answers.

        Args:
            verb: The name of the verb, or another address below the API.
            arguments: The verb's arguments. None: nothing is sent.
        """
        body = None if arguments is None else json.dumps(arguments).encode()
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.base}/api/v1/{verb}", body, headers)
        with urllib.request.urlopen(request, timeout=120) as response:
            answer: dict[str, Any] = json.load(response)
        return answer


@contextmanager
def studio(workspace: Path, *options: str, seconds: float = 120) -> Iterator[Studio]:
    """Start `factsmith studio` on a workspace, and end it afterwards as Ctrl-C does.

    Args:
        workspace: The workspace. The command makes it if it does not exist.
        options: More options for the command line.
        seconds: How long the start may take.

    Raises:
        AssertionError: The program ended or printed no link in time; the message has its output.
    """
    command = [sys.executable, "-m", "factsmith", "studio", "-w", str(workspace)]
    command += ["--port", "0", "--no-browser", *options]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            link = _link(process, seconds)
            if link is None:
                process.kill()
                errors.seek(0)
                raise AssertionError(f"no link from {command}: {errors.read()[-3000:]}")
            yield Studio(link, process, workspace)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()


def _link(process: subprocess.Popen[str], seconds: float) -> str | None:
    """Return the first link that a program prints, and read on so that it never blocks."""
    links: Queue[str | None] = Queue()

    def read() -> None:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if match := LINK.search(line):
                    links.put(match[0])
        except ValueError:  # closed at the end
            pass
        links.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        return links.get(timeout=seconds)
    except Empty:
        return None


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start the installed chromium.

    Raises:
        FileNotFoundError: None of the names is on the path.
    """
    from playwright.sync_api import sync_playwright

    path = browser_path()
    if path is None:
        raise FileNotFoundError(f"no browser on the path; looked for {', '.join(NAMES)}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


def settle(page: Page, milliseconds: float = 30_000) -> None:
    """Wait until a page has its answer and has drawn its charts."""
    page.wait_for_function(
        """() => document.readyState === "complete"
            && !document.querySelector("#answer .waiting, .progress [data-running]")
            && [...document.querySelectorAll("[data-chart]")]
                .every((chart) => chart.querySelector("svg, canvas"))""",
        timeout=milliseconds,
    )
    page.wait_for_timeout(50)
