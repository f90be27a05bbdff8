"""Every page: for everybody, in both themes, at every width, from this host alone, and quiet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tools.browser import Studio, settle

from browsing import Visitor, accessibility, overflow, refused
from factsmith.atlas.story import MESSAGE, correction
from factsmith.keep.workbench import Workbench
from factsmith.model.load import load

pytestmark = pytest.mark.browser

WIDTHS = (360, 1280, 2560)

OTHERS = ("/", "/jobs", "/tour", "/ledger/show?revision=latest", "/ledger/diff?before=base")

SLOW = ("/memory/neuron?",)
"""Views that ask some hundred facts."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace with a patch, so that every page has something to show."""
    folder = tmp_path_factory.mktemp("pages") / "workspace"
    with Workbench(load("atlas"), folder) as bench:
        bench.apply(correction(), message=MESSAGE)
    return folder


def _links(page: Any, selector: str) -> list[str]:
    return [str(link.get_attribute("href")) for link in page.query_selector_all(selector)]


def test_every_page_is_right_in_both_themes_and_at_every_width(visitor: Visitor) -> None:
    page = visitor.open()
    rooms = _links(page, "#rooms a")
    waiting = [*OTHERS, *rooms]
    seen: dict[str, list[str]] = {}
    while waiting:
        address = waiting.pop(0)
        if address in seen or address.startswith(SLOW):
            continue
        visitor.go(page, address)
        seen[address] = _faults(page)
        waiting += [*_links(page, ".tabs a"), *_links(page, ".examples a")[:1]]
    assert {address: faults for address, faults in seen.items() if faults} == {}
    assert len(rooms) >= 8 and len(seen) >= 30, list(seen)


def _faults(page: Any) -> list[str]:
    """Return what is wrong with a page, in either theme and at any width."""
    lines = [f"too wide by {overflow(page)} at {width}" for width in WIDTHS if _wide(page, width)]
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        settle(page)
        lines += [f"{theme}: {line}" for line in accessibility(page)]
    n_headings = page.locator("h1").count()
    lines += [] if n_headings == 1 else [f"{n_headings} headings h1"]
    lines += [] if "factsmith" in page.title() else [f"the title is {page.title()!r}"]
    return lines + refused(page)


def test_a_page_that_waits_is_right_and_its_job_can_be_cancelled(visitor: Visitor) -> None:
    page = visitor.open()
    page.goto(visitor.running.base + "/memory/find?word=Bulgaria")
    page.get_by_role("button", name="Build the index").click()
    page.get_by_role("progressbar").wait_for()
    assert accessibility(page) == [] and refused(page) == [] and not _wide(page, 360)
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("as they were before").wait_for()


def _wide(page: Any, width: int) -> bool:
    page.set_viewport_size({"width": width, "height": 900})
    page.wait_for_timeout(30)
    return overflow(page) > 0


def test_a_fault_on_a_page_is_noticed(entered: Visitor) -> None:
    page = entered.open("/jobs")
    page.evaluate(
        """() => {
            const wide = document.createElement("div");
            wide.style.width = "5000px";
            wide.innerHTML = "<button></button>";
            document.querySelector("main").append(wide);
            const image = new Image();
            image.src = "http://example.org/x.png";
            document.querySelector("main").append(image);
        }"""
    )
    page.wait_for_timeout(100)
    assert overflow(page) > 3000
    assert any(line.startswith("button-name (critical)") for line in accessibility(page))
    assert any("example.org" in line for line in refused(page))
    assert any("request: http://example.org" in line for line in entered.problems)
    entered.close()


def test_a_page_that_is_not_there_says_so(entered: Visitor) -> None:
    for path in (
        "/nothing",
        "/ask/nothing",
        "/ledger/show?revision=ffff",
        "/jobs/123456",
        "/tour/7",
    ):
        page = entered.open(path)
        alert = page.get_by_role("alert").first
        assert alert.is_visible() and "Traceback" not in page.content(), path
        assert accessibility(page) == [], path
    # Chromium writes each answer that is an error into the console, and nothing besides is there.
    assert all("status of 4" in line for line in entered.problems), entered.problems
    entered.close()


def test_without_the_token_there_is_a_way_in_and_nothing_else(
    browser: Any, running: Studio
) -> None:
    page = browser.new_context().new_page()
    response = page.goto(running.base + "/ledger/log")
    assert response.status == 401
    assert "Bulgaria" not in page.content() and "link" in page.inner_text("body")
    page.context.close()
