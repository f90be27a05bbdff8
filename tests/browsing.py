"""Helpers for tests in a real browser: a studio process, pages that are watched, and axe-core.

with studio(workspace) as running:
    page = watched(browser, running.link)
    page.goto(running.link)
    page.problems          # what a page must never do; [] is right
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from typing import Any
from urllib.parse import urlsplit

NAMES = ("chromium", "chromium-browser", "google-chrome")
"""What the browser may be called; the first one on the path is used, and none is downloaded."""

ARGUMENTS = (
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)

LINK = re.compile(r"https?://127\.0\.0\.1:\d+/\S*token=\S+")

SERIOUS = ("serious", "critical")

_VIOLATIONS = """
    window.refused = [];
    document.addEventListener("securitypolicyviolation", (event) =>
        window.refused.push(`${event.violatedDirective}: ${event.blockedURI} ${event.sample}`));
"""


def browser_path() -> str | None:
    """Return the path of an installed chromium, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


# ── the process ───────────────────────────────────────────────────────────────────────────────────


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


# ── pages ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Watch:
    """What pages of a browser context did that no page of ours may do.

    Attributes:
        host: The only host and port that pages may ask.
        problems: Each in one line: errors in the console, exceptions, dialogs, foreign requests.
        dialogs: The messages of dialogs.
    """

    host: str
    problems: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)

    def follow(self, page: Any) -> None:
        """Watch a page from now on."""
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.problems.append(f"exception: {error}"))
        page.on("dialog", self._dialog)
        page.on("request", self._request)

    def _console(self, message: Any) -> None:
        if message.type == "error":
            place = message.location.get("url", "")
            self.problems.append(f"console: {message.text} ({place})")

    def _dialog(self, dialog: Any) -> None:
        self.dialogs.append(dialog.message)
        self.problems.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _request(self, request: Any) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob") and parts.netloc != self.host:
            self.problems.append(f"request: {request.url}")


def opened(browser: Any, address: str, *, state: Any = None, **options: Any) -> tuple[Any, Watch]:
    """Return a page of a context of its own, not yet loaded, and its watch.

    Args:
        browser: The browser of playwright.
        address: An address of the studio: its host is the only one that may be asked.
        state: Cookies of an earlier context.
        options: More options of the context, such as `viewport` and `color_scheme`.
    """
    options.setdefault("viewport", {"width": 1280, "height": 900})
    context = browser.new_context(storage_state=state, **options)
    context.set_default_timeout(20_000)
    context.add_init_script(_VIOLATIONS)
    watch = Watch(urlsplit(address).netloc)
    context.on("page", watch.follow)
    return context.new_page(), watch


def refused(page: Any) -> list[str]:
    """Return what the content security policy refused on the page that is shown now."""
    return [str(line) for line in page.evaluate("() => window.refused")]


def overflow(page: Any) -> int:
    """Return by how many pixels a page is wider than the window."""
    return int(
        page.evaluate(
            "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
    )


def accessibility(page: Any, impacts: Sequence[str] = SERIOUS) -> list[str]:
    """Return what axe-core finds on a page, one line for each element.

    Args:
        page: The page, as it is shown now.
        impacts: The impacts that count.
    """
    from axe_playwright_python.sync_playwright import Axe

    violations = Axe().run(page).response["violations"]
    return [
        f"{rule['id']} ({rule['impact']}): {node['html'][:200]} {node.get('failureSummary', '')[:300]}"
        for rule in violations
        if rule["impact"] in impacts
        for node in rule["nodes"]
    ]
