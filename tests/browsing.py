"""Helpers for tests in a real browser: a studio process, pages that are watched, and axe-core.

with studio(workspace) as running:
    page = watched(browser, running.link)
    page.goto(running.link)
    page.problems          # what a page must never do; [] is right
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tools.browser import Studio, settle

from factsmith.keep.workbench import Workbench
from factsmith.model.fingerprint import weight_digests
from factsmith.model.load import load

SERIOUS = ("serious", "critical")

_VIOLATIONS = """
    window.refused = [];
    document.addEventListener("securitypolicyviolation", (event) =>
        window.refused.push(`${event.violatedDirective}: ${event.blockedURI} ${event.sample}`));
"""


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
        f"{rule['id']} ({rule['impact']}): {node['html'][:200]} {node.get('failureSummary', '')}"
        for rule in violations
        if rule["impact"] in impacts
        for node in rule["nodes"]
    ]


def weights_in(workspace: Path) -> dict[str, str]:
    """Return the digests of the weights that the model of a workspace has, loaded here and now."""
    with Workbench(load("atlas"), workspace) as bench:
        return weight_digests(bench.lm.module)


def tab_to(page: Any, selector: str, most: int = 80) -> None:
    """Press Tab until an element has the focus; it must be visible then.

    Raises:
        AssertionError: It cannot be reached.
    """
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            assert page.locator(selector).first.is_visible()
            return
    raise AssertionError(f"Tab does not reach {selector}")


class Visitor:
    """Somebody who has followed the link, in tabs of contexts of their own.

    Attributes:
        running: The studio.
        watches: What the tabs of each context did wrong.
    """

    def __init__(self, browser: Any, running: Studio) -> None:
        self.running = running
        self.watches: list[Watch] = []
        self._browser = browser
        self._contexts: list[Any] = []
        first, _ = opened(browser, running.link)
        first.goto(running.link)
        self._state = first.context.storage_state()
        first.context.close()

    def open(self, path: str = "/", **options: Any) -> Any:
        """Return a page in a new context; options as of `opened`."""
        page, watch = opened(self._browser, self.running.link, state=self._state, **options)
        self.watches.append(watch)
        self._contexts.append(page.context)
        self.go(page, path)
        return page

    def go(self, page: Any, path: str) -> None:
        """Go to a page, and wait until it has its answer and its charts."""
        page.goto(self.running.base + path)
        settle(page)

    @property
    def problems(self) -> list[str]:
        """What the tabs did wrong, each thing in one line."""
        return [line for watch in self.watches for line in watch.problems]

    def close(self) -> None:
        """Close the tabs, and forget what they did."""
        for context in self._contexts:
            context.close()
        self._contexts, self.watches = [], []
